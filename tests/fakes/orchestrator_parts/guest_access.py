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
_OVER = (types.OWNERSHIP_PHASE_STOPPED, types.OWNERSHIP_PHASE_CRASHED, types.OWNERSHIP_PHASE_GONE)


class GuestAccess(State):
    async def AttachConsole(
        self, request_iterator: AsyncIterator[pb.AttachConsoleRequest], context: object
    ) -> AsyncIterator[pb.AttachConsoleResponse]:
        first = await anext(request_iterator)
        await self._called("AttachConsole", first)
        if not first.guest:
            raise invalid([("guest", "is missing")])
        guest = self._guest(first.guest, "guest")
        if guest.ownership in _OVER:
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
            while guest.ownership not in _OVER and not typing.done():
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

    async def OpenDisplay(self, request: pb.OpenDisplayRequest, context: object) -> pb.OpenDisplayResponse:
        await self._called("OpenDisplay", request)
        guest = self._guest(request.guest, "guest")
        if guest.ownership in _OVER:
            raise DroverError(R.GUEST_NOT_RUNNING, f"guest {guest.name} does not run")
        if not guest.spec.display.vnc:
            raise DroverError(R.DISPLAY_NOT_AVAILABLE, f"guest {guest.name} has no screen")
        found = types.DisplayAddress(host=guest.host, socket=f"/run/{guest.host}/{guest.uuid}.vnc")
        return pb.OpenDisplayResponse(display=found)

    async def InstructDevice(self, request: pb.InstructDeviceRequest, context: object) -> pb.InstructDeviceResponse:
        await self._called("InstructDevice", request)
        if not self.instructions:
            raise DroverError(R.INSTRUCTIONS_DISABLED, "this cluster lets nobody instruct devices")
        guests.check_instruction(request)
        guests.need_device(wire.guest_spec_from_proto(self._guest(request.guest, "guest").spec), request.device)
        return pb.InstructDeviceResponse(answer=f"{request.device} was told: {request.instruction}")
