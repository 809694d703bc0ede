"""AgentService on the wire: translates and passes on. What may be done is decided by the agent and its sessions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from agents.agent import Agent
from agents.disks.imports import FoundImage
from orchestrator import wire, wire_agent, wire_hardware
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.text import clip
from orchestrator.ledger.records import BadRecord
from orchestrator.ledger.store import StoreUnavailable
from protos.drover.v1 import agent_pb2 as pb
from protos.drover.v1 import agent_pb2_grpc as rpc
from protos.drover.v1 import types_pb2


def translate(error: Exception) -> DroverError | None:
    """For `rpc.errors.Errors`: what a handler lets through."""
    if isinstance(error, StoreUnavailable):
        return DroverError(RefusalReason.LEDGER_UNREACHABLE, f"ZooKeeper does not answer this agent: {error}")
    if isinstance(error, BadRecord):
        return DroverError(RefusalReason.INTERNAL, str(error))
    return None


STOP_S = 5.0
"""For a caller that was told to stop sending to do so. One that goes on may get an error of gRPC's in place of ours."""


async def _ended(requests: AsyncIterator[Any]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_S):
            async for _ in requests:
                pass


class AgentServicer(rpc.AgentServiceServicer):
    """For coordinator and API."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def GetAgent(self, request: pb.GetAgentRequest, context: Any) -> pb.GetAgentResponse:
        return wire_agent.agent_status_to_proto(self._agent.status())

    async def ListCopies(self, request: pb.ListCopiesRequest, context: Any) -> pb.ListCopiesResponse:
        return wire_agent.held_to_proto(await self._agent.held())

    async def RejoinLedger(self, request: pb.RejoinLedgerRequest, context: Any) -> pb.RejoinLedgerResponse:
        await self._agent.rejoin(request.incarnation)
        return pb.RejoinLedgerResponse()

    async def StartGuest(self, request: pb.StartGuestRequest, context: Any) -> pb.StartGuestResponse:
        status = await self._agent.start_guest(request.guest_uuid)
        return pb.StartGuestResponse(guest=wire_agent.guest_status_to_proto(status))

    async def RestoreRecord(self, request: pb.RestoreRecordRequest, context: Any) -> pb.RestoreRecordResponse:
        status = await self._agent.restore_record(request.guest_uuid)
        return pb.RestoreRecordResponse(guest=wire_agent.guest_status_to_proto(status))

    async def EndGuest(self, request: pb.EndGuestRequest, context: Any) -> pb.EndGuestResponse:
        await self._agent.end_guest(request.guest_uuid)
        return pb.EndGuestResponse()

    async def KeepGuest(self, request: pb.KeepGuestRequest, context: Any) -> pb.KeepGuestResponse:
        await self._agent.keep_guest(request.guest_uuid, only_ended=request.only_ended)
        return pb.KeepGuestResponse()

    async def ApplyWantRun(self, request: pb.ApplyWantRunRequest, context: Any) -> pb.ApplyWantRunResponse:
        return wire_agent.wish_applied_to_proto(await self._agent.apply_want_run(request.guest_uuid, request.sequence))

    async def PrepareDestination(
        self, request: pb.PrepareDestinationRequest, context: Any
    ) -> pb.PrepareDestinationResponse:
        return wire_agent.prepared_to_proto(
            await self._agent.prepare_destination(wire_agent.prepare_order_from_proto(request))
        )

    async def ConductAttempt(self, request: pb.ConductAttemptRequest, context: Any) -> pb.ConductAttemptResponse:
        await self._agent.conduct_attempt(wire_agent.conduct_order_from_proto(request))
        return pb.ConductAttemptResponse()

    async def GetAttempt(self, request: pb.GetAttemptRequest, context: Any) -> pb.GetAttemptResponse:
        return wire_agent.attempt_seen_to_proto(self._agent.get_attempt(request.migration, request.attempt))

    async def Nudge(self, request: pb.NudgeRequest, context: Any) -> pb.NudgeResponse:
        self._agent.nudge(request.guest_uuid)
        return pb.NudgeResponse()

    async def WatchAgent(self, request: pb.WatchAgentRequest, context: Any) -> AsyncIterator[pb.WatchAgentResponse]:
        async for sample in self._agent.watch():
            yield wire_agent.agent_sample_to_proto(sample)

    async def ChangeMachine(self, request: pb.ChangeMachineRequest, context: Any) -> pb.ChangeMachineResponse:
        wanted = wire_hardware.machine_change_from_proto(request)
        spec = await self._agent.change_machine(request.guest_uuid, wanted, request.reservations_version)
        return pb.ChangeMachineResponse(spec=wire.guest_spec_to_proto(spec))

    async def CheckGuests(self, request: pb.CheckGuestsRequest, context: Any) -> pb.CheckGuestsResponse:
        answer = pb.CheckGuestsResponse()
        for uuid, found in (await self._agent.check_guests(request.guest_uuids)).items():
            answer.guests.add(guest_uuid=uuid, obstacles=map(wire.obstacle_to_proto, found))
        return answer

    async def HoldConsole(
        self, request_iterator: AsyncIterator[pb.HoldConsoleRequest], context: Any
    ) -> AsyncIterator[pb.HoldConsoleResponse]:
        first = await anext(request_iterator, None)
        if first is None:
            raise DroverError(RefusalReason.INVALID_ARGUMENT, "nothing was sent: the first message names the guest")
        async with self._agent.console(first.guest_uuid, first.inc) as session:

            async def type_on() -> None:
                async for each in request_iterator:
                    session.type(each.data)
                session.end()

            typing = asyncio.create_task(type_on())
            try:
                yield pb.HoldConsoleResponse(attached=True)
                async for said in session.output():
                    yield pb.HoldConsoleResponse(data=said.data, lost_bytes=said.lost_bytes)
            finally:
                typing.cancel()
                await asyncio.wait({typing}, timeout=1.0)

    async def ListPoolImages(self, request: pb.ListPoolImagesRequest, context: Any) -> pb.ListPoolImagesResponse:
        found, more = await self._agent.images.listed(request.pool, request.after, request.page_size)
        images = [self._image(request.pool, each) for each in found]
        return pb.ListPoolImagesResponse(images=images, more=more)

    async def ReceiveImage(
        self, request_iterator: AsyncIterator[pb.ReceiveImageRequest], context: Any
    ) -> AsyncIterator[pb.ReceiveImageResponse]:
        first = await anext(request_iterator, None)
        if first is None:
            raise DroverError(RefusalReason.INVALID_ARGUMENT, "nothing was sent: the first message says what follows")

        async def parts() -> AsyncIterator[tuple[bytes, bytes]]:
            yield first.data, first.sha256
            async for each in request_iterator:
                yield each.data, each.sha256

        try:
            image = wire_hardware.image_import_from_proto(first.name, first.pool, first.format, first.size_bytes)
            found = await self._agent.images.receive(image, parts())
        except DroverError:
            yield pb.ReceiveImageResponse(stop=True)
            await _ended(request_iterator)
            raise
        yield pb.ReceiveImageResponse(image=self._image(first.pool, found))

    def _image(self, pool: str, found: FoundImage) -> types_pb2.Image:
        return types_pb2.Image(
            name=found.name,
            pool=pool,
            host=self._agent.here.host,
            format=wire_hardware.disk_format_to_proto(found.header.format),
            size_bytes=found.header.size_bytes,
            used_bytes=found.used_bytes,
            backing=clip(found.header.backing),
            message=found.header.message,
        )

    async def ExamineVmm(self, request: pb.ExamineVmmRequest, context: Any) -> pb.ExamineVmmResponse:
        wished = wire.guest_spec_from_proto(request.wished) if request.HasField("wished") else None
        found = await self._agent.examine_vmm(request.name, request.pid, request.qmp, wished)
        return pb.ExamineVmmResponse(
            spec=wire.guest_spec_to_proto(found.examined.spec),
            start_time=found.start_time,
            running=found.examined.running,
            obstacles=map(wire.obstacle_to_proto, found.examined.obstacles),
        )

    async def ReleaseVmm(self, request: pb.ReleaseVmmRequest, context: Any) -> pb.ReleaseVmmResponse:
        await self._agent.release_vmm(request.guest_uuid)
        return pb.ReleaseVmmResponse()

    async def OpenVmmDisplay(self, request: pb.OpenVmmDisplayRequest, context: Any) -> pb.OpenVmmDisplayResponse:
        found = await self._agent.open_display(request.guest_uuid)
        return pb.OpenVmmDisplayResponse(display=wire_agent.display_to_proto(found))

    async def PassInstruction(self, request: pb.PassInstructionRequest, context: Any) -> pb.PassInstructionResponse:
        answer = await self._agent.instruct(request.guest_uuid, request.device, request.instruction)
        return pb.PassInstructionResponse(answer=answer)
