"""The agent at the other end of an attempt: the port to it, and gRPC behind that port.

Calls are idempotent, bounded, and raise `PeerUnavailable`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet

import grpc
import grpc.aio

from agents.shims.base import Frame, FrameKind, Load
from orchestrator import wire, wire_agent, wire_attempts, wire_hardware
from orchestrator.core.disks import DestinationSide, ImageThere, SyncPoint
from orchestrator.core.ids import AckRequest, AttemptRef
from orchestrator.core.records import GuestSpec, LiveMachine, TimelineEntry
from orchestrator.pki.names import of_host
from orchestrator.rpc import channels
from orchestrator.rpc.credentials import Credentials
from orchestrator.rpc.errors import told
from orchestrator.tasks import Tasks
from protos.drover.v1 import agent_pb2 as pb
from protos.drover.v1 import agent_pb2_grpc as rpc


class PeerUnavailable(Exception):
    """No answer in time: the call may have arrived. Repeat it or let the ledger decide."""


@dataclass(frozen=True, slots=True)
class Described:
    """A guest's machine, as its source tells of it."""

    machine: LiveMachine
    pool_tokens: Mapping[str, str]
    """The word in each shared pool that its disks are in, as the source reads it."""
    locked_pools: tuple[str, ...] = ()
    """The pools in which the source holds a lock just now; none from an agent that does not know of it."""
    spec: GuestSpec | None = None
    """The specification that belongs to the machine; None: from an older version, which changes none."""


class DestinationPeer(Protocol):
    """What a source says to its destination, for one attempt and `inc`."""

    async def ping(self) -> bool:
        """The peer answers and knows the attempt."""
        ...

    async def send_frame(self, frame: Frame) -> None:
        """Pass on a piece of a device's state, in order. Returns when the stream took it (back-pressure), not when
        it was loaded."""
        ...

    async def images(self) -> tuple[ImageThere, ...]:
        """The images that the destination has for the guest's local disks."""
        ...

    async def release(self, points: tuple[SyncPoint, ...]) -> None:
        """The local disks are drained: the destination lets go of their images, and then says LOADED with them."""
        ...

    async def go(self, want_run: bool) -> bool:
        """True: answered once the guest had been started there (or left stopped, as wished)."""
        ...


class SourcePeer(Protocol):
    """What a destination says to its source."""

    async def machine(self, *, hold_locks: bool = False) -> Described:
        """The guest's machine as the source has it now, and what tells of the shared pools that its disks are in.

        `hold_locks`: the source holds a lock in each of them for some seconds from now on. Raises DroverError when the
        source has no machine to tell.
        """
        ...

    async def ack(self, entry: AckRequest) -> None:
        """A device here has loaded its initial data of that generation."""
        ...

    async def loaded(self, inc: str, loads: tuple[Load, ...], images: tuple[SyncPoint, ...] = ()) -> None:
        """LOADED: VMM and devices hold all of the guest, validated; `loads` says what each device received, `images`
        at which point each local disk was released. The source compares it with what it sent before it commits."""
        ...

    async def failed(self, inc: str) -> None:
        """FAILED: this destination cannot take the guest any more. The source aborts the attempt."""
        ...

    async def done(self, inc: str) -> None:
        """DONE: the guest is in its wished run state here, and the source may end its copy."""
        ...


_CALL_S = 1.0
_PING_S = 0.8
_MACHINE_S = 3.0
"""Not in a blackout: the source may be busy with its other guests."""
_RELEASE_S = 4.0
_FRAME_S = 10.0
"""A destination device that takes no data for this long has failed the attempt."""

MAX_FRAME_BYTES = 2 << 20
"""Of device state in one frame; device processes give half of it at a time."""
MAX_CALL_BYTES = 4 << 20
"""Of any message between agents: a frame, or a report with its time line."""
MAX_DIGEST_BYTES = 64

_TO_KIND = {
    FrameKind.PRECOPY: pb.FRAME_KIND_PRECOPY,
    FrameKind.INITIAL_SENT: pb.FRAME_KIND_INITIAL_SENT,
    FrameKind.STOP_COPY: pb.FRAME_KIND_STOP_COPY,
    FrameKind.END: pb.FRAME_KIND_END,
}
FROM_KIND = {number: kind for kind, number in _TO_KIND.items()}

AttemptKey = tuple[str, int, str]
"""(migration, attempt, inc)"""


def _tag(ref: AttemptRef, inc: str) -> pb.AttemptTag:
    return pb.AttemptTag(guest_uuid=ref.guest, migration=ref.migration, attempt=ref.attempt, inc=inc)


def key_of(tag: pb.AttemptTag) -> AttemptKey:
    """The attempt that a call says it is for."""
    return tag.migration, tag.attempt, tag.inc


def points_to_proto(points: Iterable[SyncPoint]) -> list[pb.SyncPoint]:
    """As they travel between agents."""
    return [pb.SyncPoint(disk=point.disk, sync=point.sync, size_bytes=point.size_bytes) for point in points]


def points_from_proto(points: Iterable[pb.SyncPoint]) -> tuple[SyncPoint, ...]:
    """See `points_to_proto`."""
    return tuple(SyncPoint(point.disk, point.sync, point.size_bytes) for point in points)


async def _answered(call: Any) -> Any:
    """The reply of a unary call, or PeerUnavailable."""
    try:
        return await call
    except grpc.RpcError as error:
        raise PeerUnavailable(str(error.code() if isinstance(error, grpc.aio.AioRpcError) else error)) from error


class GrpcDestinationPeer(DestinationPeer):
    """`DestinationPeer` over gRPC: what a source says to its destination. One device stream per attempt."""

    def __init__(self, channel: grpc.aio.Channel, ref: AttemptRef, inc: str) -> None:
        self._stub: rpc.PeerServiceAsyncStub = rpc.PeerServiceStub(channel)
        self._tag = _tag(ref, inc)
        self._stream: Any = None
        self._acks: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._closed = False
        self.on_ack: Callable[[AckRequest], None] = lambda _entry: None
        """Called on the event loop for each ACK of a destination device."""
        self.on_lost: Callable[[], None] = lambda: None
        """Called once if the device stream ends and we did not end it: the destination's agent died or refused it."""

    async def ping(self) -> bool:
        reply = await _answered(self._stub.Ping(pb.PingRequest(tag=self._tag), timeout=_PING_S))
        return bool(reply.known)

    async def send_frame(self, frame: Frame) -> None:
        message = pb.TransferDevicesRequest(
            device=frame.device,
            session=frame.session,
            kind=_TO_KIND[frame.kind],
            generation=frame.generation,
            data=frame.data,
            total_bytes=frame.total_bytes,
            digest=frame.digest,
        )
        async with self._turn:
            try:
                async with asyncio.timeout(_FRAME_S):
                    if self._stream is None:
                        # An agent that was away a moment ago is waited for, within the bound.
                        self._stream = self._stub.TransferDevices(wait_for_ready=True)
                        self._acks = asyncio.create_task(self._read_acks(self._stream))
                        message.tag.CopyFrom(self._tag)
                    await self._stream.write(message)
            except (grpc.RpcError, asyncio.InvalidStateError, TimeoutError) as error:
                raise PeerUnavailable(f"device stream to the destination: {error!r}") from error

    async def _read_acks(self, stream: Any) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            async for reply in stream:
                self.on_ack(AckRequest(reply.device, reply.ack_generation))
        if not self._closed:
            self.on_lost()

    async def images(self) -> tuple[ImageThere, ...]:
        reply = await _answered(self._stub.DescribeImages(pb.DescribeImagesRequest(tag=self._tag), timeout=_MACHINE_S))
        return tuple(
            ImageThere(
                each.disk,
                DestinationSide(each.image, each.since),
                each.size_bytes,
                wire_agent.endpoint_from_proto(each.endpoint, field="endpoint"),
            )
            for each in reply.images
        )

    async def release(self, points: tuple[SyncPoint, ...]) -> None:
        request = pb.ReleaseImagesRequest(tag=self._tag, points=points_to_proto(points))
        await _answered(self._stub.ReleaseImages(request, timeout=_RELEASE_S))

    async def go(self, want_run: bool) -> bool:
        request = pb.GoRequest(tag=self._tag, want_run=want_run)
        return bool((await _answered(self._stub.Go(request, timeout=_CALL_S))).done)

    async def close(self) -> None:
        """End the device stream. Idempotent; never raises."""
        self._closed = True
        if self._stream is not None:
            self._stream.cancel()
        if self._acks is not None:
            self._acks.cancel()
            await asyncio.wait([self._acks], timeout=_CALL_S)


class GrpcSourcePeer(SourcePeer):
    """`SourcePeer` over gRPC: what a destination says to its source. ACKs go back on the source's own stream."""

    def __init__(self, channel: grpc.aio.Channel, ref: AttemptRef, inc: str) -> None:
        self._stub: rpc.PeerServiceAsyncStub = rpc.PeerServiceStub(channel)
        self._tag = _tag(ref, inc)
        self.acks: asyncio.Queue[AckRequest] = asyncio.Queue()
        self.timeline: Callable[[], Sequence[TimelineEntry]] = tuple
        """What DONE carries along, for `explain`."""

    async def warm(self) -> None:
        """Connect before the blackout; a failure is the source's to notice."""
        with contextlib.suppress(PeerUnavailable):
            await _answered(self._stub.Ping(pb.PingRequest(tag=self._tag), timeout=_CALL_S))

    async def machine(self, *, hold_locks: bool = False) -> Described:
        request = pb.DescribeMachineRequest(guest_uuid=self._tag.guest_uuid, hold_locks=hold_locks)
        try:
            reply = await _answered(self._stub.DescribeMachine(request, timeout=_MACHINE_S))
        except PeerUnavailable as error:
            if isinstance(error.__cause__, grpc.RpcError) and (refusal := told(error.__cause__)):
                raise refusal from error
            raise
        spec = wire.guest_spec_from_proto(reply.spec) if reply.HasField("spec") else None
        machine = wire_hardware.machine_from_proto(reply.machine)
        return Described(machine, dict(reply.pool_tokens), tuple(reply.locked_pools), spec)

    async def ack(self, entry: AckRequest) -> None:
        """Put it into `acks`, from which the served device stream takes it to the source. Sends nothing itself."""
        self.acks.put_nowait(entry)

    async def loaded(self, inc: str, loads: tuple[Load, ...], images: tuple[SyncPoint, ...] = ()) -> None:
        devices = [
            pb.DeviceLoad(device=load.device, session=load.session, bytes=load.bytes, digest=load.digest)
            for load in loads
        ]
        request = pb.ReportLoadedRequest(tag=self._tag, devices=devices, images=points_to_proto(images))
        await _answered(self._stub.ReportLoaded(request, timeout=_CALL_S))

    async def failed(self, inc: str) -> None:
        await _answered(self._stub.ReportFailed(pb.ReportFailedRequest(tag=self._tag), timeout=_CALL_S))

    async def done(self, inc: str) -> None:
        entries = [wire_attempts.timeline_to_proto(entry) for entry in self.timeline()]
        await _answered(self._stub.ReportDone(pb.ReportDoneRequest(tag=self._tag, timeline=entries), timeout=_CALL_S))


class Peers:
    """Connections to the agents that we exchange guests with: warm as long as an attempt uses them, and for IDLE_S
    after.

    A connection costs both ends a descriptor and a ping every few seconds, so those of a host that once moved guests to
    a thousand others would never end. Closing is work of the event loop: one at a time, between attempts.
    """

    IDLE_S = 60.0
    MOST = 64
    """Beyond these, the one that was unused for the longest goes when another is made."""

    def __init__(self, credentials: Credentials | None = None) -> None:
        """With credentials they are by mutual TLS, each only to the agent of the host that is meant."""
        self._credentials = credentials
        self._lines: OrderedDict[Hashable, _Line] = OrderedDict()
        """The one that was used last stands last."""
        self._closing = Tasks("connections to peers")
        self._sweeping: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._lines)

    def destination(self, address: str, ref: AttemptRef, inc: str, host: str = "") -> GrpcDestinationPeer:
        """A new peer for one attempt over the connection to `address`, which is made if there is none. Does not wait
        for it. `host`: whose agent must answer there."""
        line = self._line(address, host)
        peer = GrpcDestinationPeer(line.channel, ref, inc)
        line.users.add(peer)
        return peer

    def source(self, address: str, ref: AttemptRef, inc: str, host: str = "") -> GrpcSourcePeer:
        """As `destination`, for the other direction."""
        line = self._line(address, host)
        peer = GrpcSourcePeer(line.channel, ref, inc)
        line.users.add(peer)
        return peer

    async def close(self) -> None:
        """End all connections, also those that attempts use."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        lines, self._lines = list(self._lines.values()), OrderedDict()
        await asyncio.gather(*(line.channel.close() for line in lines))
        await self._closing.close()

    def _line(self, address: str, host: str) -> _Line:
        loop = asyncio.get_running_loop()
        # With renewed certificates the next attempt has a new connection; those under way keep theirs.
        shown = self._credentials.version() if self._credentials is not None else None
        key = (address, host, shown) if self._credentials is not None else address
        if key not in self._lines:
            if len(self._lines) >= self.MOST:
                self._close_one(0.0)
            self._lines[key] = _Line(self._connected(address, host))
        line = self._lines[key]
        line.used_s = loop.time()
        self._lines.move_to_end(key)
        if self._sweeping is None:
            self._sweeping = loop.call_later(self.IDLE_S / 4, self._sweep)
        return line

    def _connected(self, address: str, host: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return channels.aio_channel(address)
        server = of_host(self._credentials.identity.cluster, host)
        return channels.tls_channel(address, self._credentials, server)

    def _sweep(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for line in self._lines.values():
            if line.users:
                line.used_s = now_s
        self._close_one(self.IDLE_S)
        again = asyncio.get_running_loop().call_later(self.IDLE_S / 4, self._sweep) if self._lines else None
        self._sweeping = again

    def _close_one(self, idle_s: float) -> None:
        now_s = asyncio.get_running_loop().time()
        for key, line in self._lines.items():
            if not line.users and now_s - line.used_s >= idle_s:
                del self._lines[key]
                self._closing.spawn(line.channel.close(), "close")
                return


@dataclass(eq=False)
class _Line:
    channel: grpc.aio.Channel
    users: WeakSet[GrpcDestinationPeer | GrpcSourcePeer] = field(
        default_factory=WeakSet[GrpcDestinationPeer | GrpcSourcePeer]
    )
    """Of attempts that are not over."""
    used_s: float = 0.0
