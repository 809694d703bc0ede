"""What talks to a guest: its console, and instructions for its devices."""

# ruff: noqa: N802 (the methods have the names that the service gives them)

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from orchestrator import wire
from orchestrator.api import guests
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_parts.state import LOOK_S, State

R = RefusalReason


class GuestAccess(State):
    async def AttachConsole(
        self, request_iterator: AsyncIterator[pb.AttachConsoleRequest], context: object
    ) -> AsyncIterator[pb.AttachConsoleResponse]:
        first = await anext(request_iterator)
        await self._called("AttachConsole", first)
        if not first.guest:
            raise invalid([("guest", "is missing")])
        guest = self._guest(first.guest, "guest")
        over = (types.OWNERSHIP_PHASE_STOPPED, types.OWNERSHIP_PHASE_CRASHED, types.OWNERSHIP_PHASE_GONE)
        if guest.ownership in over:
            raise DroverError(R.GUEST_NOT_RUNNING, f"guest {guest.name} does not run")
        said: asyncio.Queue[bytes] = asyncio.Queue()
        self.listening.setdefault(guest.name, []).append(said)
        self.typed.setdefault(guest.name, bytearray()).extend(first.data)

        async def type_on() -> None:
            async for each in request_iterator:
                self.typed[guest.name] += each.data

        typing = asyncio.create_task(type_on())
        try:
            host = ""
            while guest.ownership not in over and not typing.done():
                if guest.host != host:
                    host = guest.host
                    yield pb.AttachConsoleResponse(host=host)
                if said.empty():
                    await asyncio.sleep(LOOK_S)
                else:
                    yield pb.AttachConsoleResponse(data=said.get_nowait())
            if not typing.done():
                yield pb.AttachConsoleResponse(message=f"guest {guest.name} has ended")
        finally:
            typing.cancel()
            self.listening[guest.name].remove(said)

    async def InstructDevice(self, request: pb.InstructDeviceRequest, context: object) -> pb.InstructDeviceResponse:
        await self._called("InstructDevice", request)
        if not self.instructions:
            raise DroverError(R.INSTRUCTIONS_DISABLED, "this cluster lets nobody instruct devices")
        guests.check_instruction(request)
        guests.need_device(wire.guest_spec_from_proto(self._guest(request.guest, "guest").spec), request.device)
        return pb.InstructDeviceResponse(answer=f"{request.device} was told: {request.instruction}")
