"""What is changed of a guest: its spec, and its machine while it runs."""

# ruff: noqa: N802 (the methods have the names that the service gives them)

from __future__ import annotations

from orchestrator import wire, wire_hardware
from orchestrator.api import decisions, guests
from orchestrator.core import changes
from orchestrator.core.errors import DroverError, RefusalReason
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_parts.guests import Guests
from tests.fakes.orchestrator_parts.state import record_of

R = RefusalReason


class GuestChanges(Guests):
    async def EditGuest(self, request: pb.EditGuestRequest, context: object) -> types.Guest:
        await self._called("EditGuest", request)
        spec = guests.checked_edit(request)
        guest = self._guest(request.name)
        if request.etag and request.etag != self._etag(guest):
            raise DroverError(R.EDIT_STALE, f"guest {guest.name} was edited meanwhile", field="etag")
        guests.must_be_editable(record_of(guest), wire.guest_spec_from_proto(guest.spec), spec)
        edited = types.Guest()
        edited.CopyFrom(guest)
        edited.spec.CopyFrom(wire.guest_spec_to_proto(spec))
        if not request.validate_only and edited.spec != guest.spec:
            self.edits[guest.uuid] = self.edits.get(guest.uuid, 0) + 1
            guest.spec.CopyFrom(edited.spec)
            edited = guest
        edited.etag = guest.etag = self._etag(guest)
        return edited

    async def AttachToGuest(self, request: pb.AttachToGuestRequest, context: object) -> types.Guest:
        await self._called("AttachToGuest", request)
        return self._changed(request.guest, wire_hardware.attachment_from_proto(request))

    async def DetachFromGuest(self, request: pb.DetachFromGuestRequest, context: object) -> types.Guest:
        await self._called("DetachFromGuest", request)
        return self._changed(request.guest, wire_hardware.detachment_from_proto(request))

    def _changed(self, name: str, change: changes.MachineChange) -> types.Guest:
        guest = self._guest(name, "guest")
        decisions.need_movable(record_of(guest))
        spec = changes.changed(wire.guest_spec_from_proto(guest.spec), change)
        guest.spec.CopyFrom(wire.guest_spec_to_proto(spec))
        return guest
