"""Guests that are stopped and kept, and started again."""

# ruff: noqa: N802 (the methods have the names that the service gives them)

from __future__ import annotations

from orchestrator import wire
from orchestrator.core.errors import DroverError, RefusalReason
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_parts.guests import Guests

R = RefusalReason


class KeptGuests(Guests):
    async def StopAndKeepGuest(self, request: pb.StopAndKeepGuestRequest, context: object) -> types.Guest:
        await self._called("StopAndKeepGuest", request)
        guest = self._guest(request.name)
        if guest.ownership == types.OWNERSHIP_PHASE_GONE:
            raise DroverError(R.GUEST_NOT_RUNNING, f"guest {guest.name} has ended for good")
        if guest.ownership != types.OWNERSHIP_PHASE_STOPPED:
            if guest.ownership != types.OWNERSHIP_PHASE_CRASHED:
                self._carry(guest, -1)
            guest.ownership, guest.run_state = types.OWNERSHIP_PHASE_STOPPED, types.RUN_STATE_ENDED
            guest.want_run, guest.message = False, f"stopped, and kept on {guest.host}"
            self.process_ends(guest)
        return guest

    async def StartGuestAgain(self, request: pb.StartGuestAgainRequest, context: object) -> types.Guest:
        await self._called("StartGuestAgain", request)
        guest = self._guest(request.name)
        if guest.ownership == types.OWNERSHIP_PHASE_GONE:
            raise DroverError(R.GUEST_NOT_RUNNING, f"guest {guest.name} has ended for good")
        if guest.run_state == types.RUN_STATE_ENDED:
            if guest.ownership == types.OWNERSHIP_PHASE_IDLE:
                self._carry(guest, -1)
            self._place(wire.guest_spec_from_proto(guest.spec), "", guest.host, "")
            guest.ownership, guest.run_state = types.OWNERSHIP_PHASE_IDLE, types.RUN_STATE_RUNNING
            guest.want_run, guest.message = True, ""
            self._carry(guest, 1)
        return guest
