"""The agent's end of the shim protocol (protos/drover/v1/shim.proto): devices held by another program on this host.

One `ShimClient` speaks with one program about the devices of one VMM process. Every call is bounded; a lost connection
is made again and the call repeated under its id, so that it happens once.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from google.protobuf.message import Message
from grpc import StatusCode, aio

from agents.shims.base import (
    DestinationShim,
    FinalQuery,
    Frame,
    FrameKind,
    InVmmDevices,
    Load,
    Refusal,
    SendFrame,
    ShimError,
    SourceShim,
)
from agents.shims.inside import DeviceEvent, InVmmDevice
from orchestrator.core.ids import AckRequest
from orchestrator.core.liveness import Liveness
from orchestrator.rpc import channels
from orchestrator.tasks import Tasks
from protos.drover.v1 import shim_pb2 as pb
from protos.drover.v1.shim_pb2_grpc import ShimServiceStub

if TYPE_CHECKING:
    from protos.drover.v1.shim_pb2_grpc import ShimServiceAsyncStub

log = structlog.get_logger(__name__)

Answer = TypeVar("Answer", bound=Message)
Call = Callable[..., Awaitable[Answer]]

BLACKOUT_S = 2.0
"""For what a stopped guest waits for."""
CALL_S = 5.0
ARRIVAL_S = 10.0
"""Validation and activation."""
LOAD_S = 120.0
"""A device may take long over its initial data: the policy's ACK timeout ends that, this only ends a dead wait."""
_READ_WAIT_MS = 1_000
_RECONNECT_S = 0.005
_WATCH_AGAIN_S = 0.05
MAX_STATE_BYTES = 1 << 20
"""Of one piece of a device's state."""

_BROKEN = (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)
"""The connection, not the program, ended the call: it is repeated."""

MAX_ANSWER = 64 << 10
"""Characters of what a program says to an instruction; the rest is cut off."""
_REFUSALS = {
    StatusCode.INVALID_ARGUMENT: Refusal.WRONG,
    StatusCode.FAILED_PRECONDITION: Refusal.UNWILLING,
    StatusCode.PERMISSION_DENIED: Refusal.UNWILLING,
}

_KINDS = {
    pb.STATE_KIND_PRECOPY: FrameKind.PRECOPY,
    pb.STATE_KIND_INITIAL_SENT: FrameKind.INITIAL_SENT,
    pb.STATE_KIND_STOP_COPY: FrameKind.STOP_COPY,
    pb.STATE_KIND_END: FrameKind.END,
}
_KINDS_BACK = {kind: number for number, kind in _KINDS.items()}


class ShimClient:
    """Calls to one program about the devices of one VMM process. For the running event loop."""

    def __init__(self, path: Path, guest: str, inc: str, liveness: Callable[[], Liveness]) -> None:
        """`path`: the program's unix socket. `liveness`: of the program; no call outlasts a GONE."""
        self._path, self._guest, self._inc = path, guest, inc
        self._liveness = liveness
        self._channel: aio.Channel | None = None
        self._tasks = Tasks(f"shim client {guest}/{inc}")
        self._watching = False
        self._told: dict[str, tuple[int, int]] = {}
        self.listeners: dict[str, Callable[[int, int], None]] = {}
        """By device: told of (session, generation) of each request, once each."""

    @property
    def stub(self) -> ShimServiceAsyncStub:
        """Raises ShimError once the client is closed."""
        if self._tasks.closed:
            raise ShimError("its device program was let go of")
        if self._channel is None:
            self._channel = channels.local_channel(self._path)
        return ShimServiceStub(self._channel)

    def tag(self, device: str) -> pb.DeviceTag:
        """How calls name one of the VMM's devices; with an empty name, all of them."""
        return pb.DeviceTag(guest_uuid=self._guest, inc=self._inc, device=device)

    async def call(self, method: Call[Answer], request: Message, *, who: str, timeout_s: float = CALL_S) -> Answer:
        """The answer. Raises ShimError: refused, failed, program gone, or no answer in time."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        name = type(request).__name__.removesuffix("Request")
        while True:
            try:
                return await method(request, timeout=max(until - loop.time(), 0.001))
            except aio.AioRpcError as error:
                code, said = error.code(), error.details() or ""
            if code is StatusCode.DEADLINE_EXCEEDED or loop.time() >= until:
                raise ShimError(f"{who}: {name} was not answered in {timeout_s:g} s")
            if code is StatusCode.UNIMPLEMENTED:
                raise ShimError(f"{who}: its program does not know {name}", refusal=Refusal.UNWILLING)
            if code not in _BROKEN:
                said = said or f"{who}: {name} was refused: {code.name}"
                raise ShimError(said, reset=code is StatusCode.DATA_LOSS, refusal=_REFUSALS.get(code))
            if self._tasks.closed or self._liveness() is Liveness.GONE:
                raise ShimError(f"{who}: its device program is gone")
            await asyncio.sleep(_RECONNECT_S)

    async def describe_all(self, timeout_s: float = CALL_S) -> pb.DescribeResponse:
        """What the program holds, of any guest. Raises ShimError."""
        return await self.call(self.stub.Describe, pb.DescribeRequest(), who=str(self._path), timeout_s=timeout_s)

    async def must_be_ours(self, timeout_s: float = CALL_S) -> None:
        """The program serves this VMM process only. Raises ShimError: another one, or it does not answer."""
        found = await self.describe_all(timeout_s)
        if {(one.tag.guest_uuid, one.tag.inc) for one in found.devices} != {(self._guest, self._inc)}:
            raise ShimError(f"{self._path} belongs to another guest")

    async def attach(self, device: str, options: Mapping[str, str], *, incoming: bool) -> None:
        """See ShimService.AttachDevice. Raises ShimError."""
        request = pb.AttachDeviceRequest(tag=self.tag(device), call_id=_new_id(), incoming=incoming, options=options)
        await self.call(self.stub.AttachDevice, request, who=device)

    async def detach(self, device: str, timeout_s: float = CALL_S) -> None:
        """See ShimService.DetachDevice; a device that is not there is detached. Raises ShimError."""
        request = pb.DetachDeviceRequest(tag=self.tag(device), call_id=_new_id())
        await self.call(self.stub.DetachDevice, request, who=device, timeout_s=timeout_s)

    async def instruct(self, device: str, instruction: str) -> str:
        """Tell a device something in its program's own words; what the program says to it, up to MAX_ANSWER.

        Raises ShimError. Its `refusal`: WRONG when the program does not understand it, UNWILLING when the device takes
        no instructions, or not now; the device is as it was then.
        """
        request = pb.InstructRequest(tag=self.tag(device), call_id=_new_id(), instruction=instruction)
        return (await self.call(self.stub.Instruct, request, who=device)).answer[:MAX_ANSWER]

    async def end(self, timeout_s: float) -> None:
        """The program ends. Raises ShimError: it did not say so."""
        await self.call(self.stub.End, pb.EndRequest(), who=str(self._path), timeout_s=timeout_s)

    def listen(self, device: str, listener: Callable[[int, int], None]) -> None:
        """Tell `listener` of the device's requests, also of those made while nobody listened."""
        self.listeners[device] = listener
        self._told.pop(device, None)
        if not self._watching:
            self._watching = True
            self._tasks.spawn(self._watch(), "watch")

    async def _watch(self) -> None:
        while True:
            try:
                request = pb.WatchAckRequestsRequest(guest_uuid=self._guest, inc=self._inc)
                async for asked in self.stub.WatchAckRequests(request):
                    self.tell(asked.tag.device, asked.session, asked.generation)
            except aio.AioRpcError as error:
                if error.code() not in (*_BROKEN, StatusCode.DEADLINE_EXCEEDED):
                    log.warning("cannot watch a device's requests", socket=str(self._path), error=error.details())
            await asyncio.sleep(_WATCH_AGAIN_S)

    def tell(self, device: str, session: int, generation: int) -> None:
        """Each once, whether it came with an answer or by the watch; a session's generations only go up."""
        told = self._told.get(device)
        listener = self.listeners.get(device)
        if listener is None or (told is not None and told[0] == session and told[1] >= generation):
            return
        self._told[device] = (session, generation)
        listener(session, generation)

    async def close(self) -> None:
        """End the connection and stop listening for requests. The program and its devices go on."""
        await self._tasks.close()
        if self._channel is not None:
            await self._channel.close()


class RemoteSource(SourceShim):
    """A device at the source, as its program holds it."""

    def __init__(self, device: str, client: ShimClient) -> None:
        self.device = device
        self._client = client
        self._me = uuid.uuid4().hex
        self._session: int | None = None
        self._on_request: Callable[[AckRequest], None] | None = None
        self._seq = 0
        """Pieces of this session that were handed to the channel."""
        self._broken = ""

    async def begin(self, session: int, on_request: Callable[[AckRequest], None]) -> None:
        if self._session != session:
            self._seq, self._broken = 0, ""
        self._session, self._on_request = session, on_request
        self._client.listen(self.device, self._asked)
        request = pb.BeginSessionRequest(tag=self._tag, call_id=_new_id(), session=session, by=self._me)
        answer = await self._client.call(self._client.stub.BeginSession, request, who=self.device)
        self._heard(answer, session)

    def _asked(self, session: int, generation: int) -> None:
        if session == self._session and self._on_request is not None:
            self._on_request(AckRequest(self.device, generation))

    def _heard(self, answer: Any, session: int | None) -> None:
        """A request that came with an answer is told before the caller goes on, not some time later by the watch."""
        if session is not None and answer.HasField("asked"):
            self._client.tell(self.device, session, answer.asked)

    async def run_precopy(self, send: SendFrame) -> None:
        if self._session is None:
            raise ShimError(f"{self.device}: no session was begun")
        while (frame := await self._read(stopped=False)) is not None:
            await self._hand_over(send, frame)

    async def _hand_over(self, send: SendFrame, frame: Frame) -> None:
        """A frame that is on its way goes all the way even when pre-copy ends: never lost, never sent twice."""
        sending = asyncio.ensure_future(_awaited(send, frame))
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            await asyncio.wait({sending}, timeout=BLACKOUT_S)
            if sending.done() and not sending.cancelled() and sending.exception() is None:
                self._seq += 1
            else:
                sending.cancel()
                self._broken = f"{self.device}: nobody knows whether a piece of its state was sent"
            raise
        self._seq += 1

    async def _read(self, *, stopped: bool) -> Frame | None:
        """The next frame; None when nothing more comes in the device's present state."""
        wait_ms, timeout_s = (0, BLACKOUT_S) if stopped else (_READ_WAIT_MS, CALL_S)
        while True:
            request = pb.ReadStateRequest(
                tag=self._tag, session=self._session or 0, seq=self._seq + 1, wait_ms=wait_ms, stopped=stopped
            )
            found = await self._client.call(self._client.stub.ReadState, request, who=self.device, timeout_s=timeout_s)
            if found.kind == pb.STATE_KIND_OVER:
                return None
            if found.kind in _KINDS:
                return self._frame(found)
            if found.kind != pb.STATE_KIND_UNSPECIFIED:
                raise ShimError(f"{self.device}: its program sent a kind of state that is not known: {found.kind}")

    def _frame(self, found: pb.ReadStateResponse) -> Frame:
        if len(found.data) > MAX_STATE_BYTES:
            raise ShimError(f"{self.device}: its program sent {len(found.data)} bytes at once, over {MAX_STATE_BYTES}")
        return Frame(
            self.device,
            self._session or 0,
            _KINDS[found.kind],
            found.generation,
            found.data,
            found.total_bytes,
            found.digest,
        )

    async def hook(self, name: str) -> None:
        request = pb.ReachHookRequest(tag=self._tag, call_id=_new_id(), hook=name)
        answer = await self._client.call(self._client.stub.ReachHook, request, who=self.device)
        self._heard(answer, answer.session if answer.HasField("session") else None)

    async def quiesce(self) -> FinalQuery:
        request = pb.QuiesceRequest(tag=self._tag, call_id=_new_id(), session=self._session)
        found = await self._client.call(self._client.stub.Quiesce, request, who=self.device, timeout_s=BLACKOUT_S)
        newest = AckRequest(self.device, found.asked) if found.HasField("asked") else None
        return FinalQuery(newest, found.stop_copy_bytes)

    async def stop_copy(self) -> None:
        if self._session is None:
            self._session = 0
        request = pb.StopCopyRequest(tag=self._tag, call_id=_new_id(), session=self._session)
        await self._client.call(self._client.stub.StopCopy, request, who=self.device, timeout_s=BLACKOUT_S)

    async def stop_copy_frames(self) -> AsyncIterator[Frame]:
        if self._broken:
            raise ShimError(self._broken)
        ended = False
        while not ended:
            frame = await self._read(stopped=True)
            if frame is None:
                raise ShimError(f"{self.device}: its session is over before all of its state was sent")
            self._seq += 1
            ended = frame.kind is FrameKind.END
            yield frame

    async def roll_back(self) -> None:
        request = pb.RollBackRequest(tag=self._tag, call_id=_new_id())
        await self._client.call(self._client.stub.RollBack, request, who=self.device)
        self._session = None

    async def retire(self) -> None:
        request = pb.RetireRequest(tag=self._tag, call_id=_new_id())
        await self._client.call(self._client.stub.Retire, request, who=self.device)
        self._session = None

    @property
    def _tag(self) -> pb.DeviceTag:
        return self._client.tag(self.device)


async def _awaited(send: SendFrame, frame: Frame) -> None:
    await send(frame)


def _new_id() -> str:
    return uuid.uuid4().hex


class RemoteDestination(DestinationShim):
    """A device at the destination, as its program holds it."""

    def __init__(self, device: str, client: ShimClient) -> None:
        self.device = device
        self._client = client
        self._session: int | None = None

    async def begin_load(self, session: int) -> None:
        request = pb.BeginLoadRequest(tag=self._tag, call_id=_new_id(), session=session)
        await self._client.call(self._client.stub.BeginLoad, request, who=self.device)
        self._session = session

    async def load(self, frame: Frame) -> AckRequest | None:
        request = pb.LoadStateRequest(
            tag=self._tag,
            call_id=_new_id(),
            session=frame.session,
            kind=_KINDS_BACK[frame.kind],
            generation=frame.generation,
            data=frame.data,
            total_bytes=frame.total_bytes,
            digest=frame.digest,
        )
        found = await self._client.call(self._client.stub.LoadState, request, who=self.device, timeout_s=LOAD_S)
        return AckRequest(self.device, frame.generation) if found.acknowledged else None

    async def validate(self) -> Load:
        session = self._session
        if session is None:
            raise ShimError(f"{self.device}: no load was begun")
        request = pb.ValidateRequest(tag=self._tag, call_id=_new_id(), session=session)
        found = await self._client.call(self._client.stub.Validate, request, who=self.device, timeout_s=ARRIVAL_S)
        return Load(self.device, session, found.bytes, found.digest)

    async def activate(self) -> None:
        request = pb.ActivateRequest(tag=self._tag, call_id=_new_id())
        await self._client.call(self._client.stub.Activate, request, who=self.device, timeout_s=ARRIVAL_S)

    async def discard(self) -> None:
        request = pb.DiscardRequest(tag=self._tag, call_id=_new_id())
        await self._client.call(self._client.stub.Discard, request, who=self.device)

    @property
    def _tag(self) -> pb.DeviceTag:
        return self._client.tag(self.device)


class RemoteInside(InVmmDevices):
    """The devices inside a VMM, as their program tells of them."""

    def __init__(self, client: ShimClient) -> None:
        self._client = client

    async def look(self) -> tuple[InVmmDevice, ...]:
        tag = self._client.tag("")
        request = pb.LookInsideRequest(guest_uuid=tag.guest_uuid, inc=tag.inc)
        found = await self._client.call(
            self._client.stub.LookInside, request, who="device program", timeout_s=BLACKOUT_S
        )
        return tuple(map(_in_vmm_device, found.devices))


def _in_vmm_device(told: pb.LookInsideResponse.Device) -> InVmmDevice:
    return InVmmDevice(
        device=told.device,
        session=told.session,
        initial_bytes=told.initial_bytes,
        stop_copy_bytes=told.stop_copy_bytes,
        precopy_sent_bytes=told.precopy_sent_bytes,
        stop_copy_sent_bytes=told.stop_copy_sent_bytes,
        reinits=told.reinits,
        late=told.late,
        lost=told.lost,
        events=tuple(DeviceEvent(event.at_s, event.what) for event in told.events),
    )
