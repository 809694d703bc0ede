"""PeerService between two agents, as it is served: each call is handed to the attempt that it is for.

A call for an attempt that nobody here conducts is answered STALE_ATTEMPT; who sent it lets the ledger decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from agents.handover.attempt import Arrival, Departure
from agents.handover.peer import FROM_KIND, MAX_DIGEST_BYTES, MAX_FRAME_BYTES, AttemptKey, key_of, points_from_proto
from agents.shims.base import Frame, Load
from orchestrator import wire, wire_agent, wire_attempts, wire_hardware
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import GuestSpec, LiveMachine
from orchestrator.rpc.credentials import calling_host
from protos.drover.v1 import agent_pb2 as pb
from protos.drover.v1 import agent_pb2_grpc as rpc


class Attempts(Protocol):
    """Those that are under way here."""

    def departure(self, key: AttemptKey) -> Departure | None:
        """The attempt's source half, if it is conducted here."""
        ...

    def arrival(self, key: AttemptKey) -> Arrival | None:
        """The attempt's destination half, if it is conducted here."""
        ...

    async def machine(self, uuid: str) -> tuple[LiveMachine, GuestSpec]:
        """Of a guest that is here, with its specification. Raises DroverError."""
        ...

    async def pool_tokens(self, uuid: str) -> Mapping[str, str]:
        """Of the shared pools of a guest that is here. Raises DroverError."""
        ...

    async def must_go_to(self, uuid: str, host: str) -> None:
        """Raises NOT_PERMITTED unless a guest that is here is on its way to that host, as its record says."""
        ...

    async def hold_locks(self, uuid: str) -> tuple[str, ...]:
        """For some seconds, in the shared pools of a guest that is here; in which. Raises DroverError."""
        ...


class PeerServicer(rpc.PeerServiceServicer):
    """Serves the other agents. Handlers only pass on what comes from the other end of the attempt, where callers have
    certificates."""

    def __init__(self, attempts: Attempts) -> None:
        self._attempts = attempts

    async def Ping(self, request: pb.PingRequest, context: Any) -> pb.PingResponse:
        key = key_of(request.tag)
        known = self._attempts.arrival(key) is not None or self._attempts.departure(key) is not None
        return pb.PingResponse(known=known)

    async def DescribeMachine(self, request: pb.DescribeMachineRequest, context: Any) -> pb.DescribeMachineResponse:
        if host := calling_host(context):
            await self._attempts.must_go_to(request.guest_uuid, host)
        machine, spec = await self._attempts.machine(request.guest_uuid)
        tokens = await self._attempts.pool_tokens(request.guest_uuid)
        locked = await self._attempts.hold_locks(request.guest_uuid) if request.hold_locks else ()
        return pb.DescribeMachineResponse(
            machine=wire_hardware.machine_to_proto(machine),
            pool_tokens=tokens,
            spec=wire.guest_spec_to_proto(spec),
            locked_pools=locked,
        )

    async def TransferDevices(
        self, request_iterator: AsyncIterator[pb.TransferDevicesRequest], context: Any
    ) -> AsyncIterator[pb.TransferDevicesResponse]:
        """Frames are taken in order, each before the next is read; ACKs go out as they come, also between frames."""
        first = await anext(request_iterator, None)
        if first is None:
            return
        arrival = self._arrival(first.tag, context)
        frames = asyncio.create_task(_take_frames(arrival, first, request_iterator))
        ack = asyncio.create_task(arrival.acks.get())
        try:
            while not frames.done() or ack.done():
                await asyncio.wait({ack, frames}, return_when=asyncio.FIRST_COMPLETED)
                if ack.done():
                    entry = ack.result()
                    ack = asyncio.create_task(arrival.acks.get())
                    yield pb.TransferDevicesResponse(device=entry.device, ack_generation=entry.generation)
            frames.result()
        finally:
            ack.cancel()
            frames.cancel()

    async def ReportLoaded(self, request: pb.ReportLoadedRequest, context: Any) -> pb.ReportLoadedResponse:
        loads = [Load(d.device, d.session, d.bytes, d.digest) for d in request.devices]
        self._departure(request.tag, context).loaded(request.tag.inc, loads, points_from_proto(request.images))
        return pb.ReportLoadedResponse()

    async def DescribeImages(self, request: pb.DescribeImagesRequest, context: Any) -> pb.DescribeImagesResponse:
        images = [
            pb.DiskImage(
                disk=each.disk,
                image=each.side.image,
                since=each.side.since,
                size_bytes=each.size_bytes,
                endpoint=wire_agent.endpoint_to_proto(each.endpoint),
            )
            for each in self._arrival(request.tag, context).images()
        ]
        return pb.DescribeImagesResponse(images=images)

    async def ReleaseImages(self, request: pb.ReleaseImagesRequest, context: Any) -> pb.ReleaseImagesResponse:
        await self._arrival(request.tag, context).release(points_from_proto(request.points))
        return pb.ReleaseImagesResponse()

    async def Go(self, request: pb.GoRequest, context: Any) -> pb.GoResponse:
        return pb.GoResponse(done=await self._arrival(request.tag, context).go(request.tag.inc, request.want_run))

    async def ReportDone(self, request: pb.ReportDoneRequest, context: Any) -> pb.ReportDoneResponse:
        self._departure(request.tag, context).done(
            [wire_attempts.timeline_from_proto(entry) for entry in request.timeline]
        )
        return pb.ReportDoneResponse()

    async def ReportFailed(self, request: pb.ReportFailedRequest, context: Any) -> pb.ReportFailedResponse:
        self._departure(request.tag, context).destination_failed()
        return pb.ReportFailedResponse()

    def _arrival(self, tag: pb.AttemptTag, context: Any) -> Arrival:
        found = self._attempts.arrival(key_of(tag))
        if found is None:
            raise _stale(tag)
        _must_come_from(found.source, context)
        return found

    def _departure(self, tag: pb.AttemptTag, context: Any) -> Departure:
        found = self._attempts.departure(key_of(tag))
        if found is None:
            raise _stale(tag)
        _must_come_from(found.destination, context)
        return found


def _must_come_from(other_end: str, context: Any) -> None:
    """Raises NOT_PERMITTED for any other host than the one at the other end of the attempt."""
    host = calling_host(context)
    if host and host != other_end:
        raise DroverError(RefusalReason.NOT_PERMITTED, f"host {host} is not at the other end of this attempt")


async def _take_frames(
    arrival: Arrival, first: pb.TransferDevicesRequest, others: AsyncIterator[pb.TransferDevicesRequest]
) -> None:
    await arrival.frame(_frame(first))
    async for message in others:
        await arrival.frame(_frame(message))


def _frame(message: pb.TransferDevicesRequest) -> Frame:
    """Raises INVALID_ARGUMENT for what no agent of this version sends."""
    kind = FROM_KIND.get(message.kind)
    if kind is None:
        raise _wrong("kind", f"there is no frame of kind {int(message.kind)}")
    if len(message.data) > MAX_FRAME_BYTES:
        raise _wrong("data", f"a frame has at most {MAX_FRAME_BYTES} bytes, not {len(message.data)}")
    if min(message.generation, message.total_bytes) < 0 or len(message.digest) > MAX_DIGEST_BYTES:
        raise _wrong("total_bytes", "negative, or a digest that is none")
    return Frame(
        message.device,
        message.session,
        kind,
        message.generation,
        message.data,
        message.total_bytes,
        message.digest,
    )


def _wrong(field: str, said: str) -> DroverError:
    return DroverError(RefusalReason.INVALID_ARGUMENT, said, field=field)


def _stale(tag: pb.AttemptTag) -> DroverError:
    said = f"attempt {tag.attempt} of {tag.migration} with destination process {tag.inc} is not under way here"
    return DroverError(RefusalReason.STALE_ATTEMPT, said)
