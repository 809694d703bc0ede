"""Adoption of processes that somebody else has started, and their release."""

# ruff: noqa: N802 (the methods have the names that the service gives them)

from __future__ import annotations

import uuid
from dataclasses import replace

from orchestrator import wire
from orchestrator.api import adoptions, decisions
from orchestrator.api.reads import no_place, not_found
from orchestrator.core.agent import VmmExamined
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.placement import choose, need_for
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_parts.guests import Guests
from tests.fakes.orchestrator_parts.migrations import Migrations
from tests.fakes.orchestrator_parts.state import over, record_of

R = RefusalReason


class Adoption(Guests, Migrations):
    async def AdoptGuest(self, request: pb.AdoptGuestRequest, context: object) -> pb.AdoptGuestResponse:
        await self._called("AdoptGuest", request)
        wished = adoptions.check(request)
        if earlier := self._earlier("AdoptGuest", request):
            return self._adopted(request, self._guest(earlier))
        if request.name in self.guests:
            raise DroverError(R.ALREADY_EXISTS, f"there is a guest {request.name} already", field="name")
        found = self._examined(request)
        spec = replace(found.spec, name=request.name)
        if wished is not None:
            spec = replace(spec, labels=wished.labels, policy=wished.policy, on_host_death=wished.on_host_death)
        against = list(found.obstacles)
        choice = choose(self._views(), need_for(spec, source=request.host), wanted=request.destination)
        if choice.destination is None:
            error = no_place(choice)
            against.append((error.reason, f"no other host can take it: {error.message}"))
        told = wire.guest_spec_to_proto(spec)
        guest = types.Guest(name=spec.name, spec=told, host=request.host, want_run=found.running)
        if request.validate_only:
            return pb.AdoptGuestResponse(guest=guest, obstacles=map(wire.obstacle_to_proto, against))
        if against:
            raise adoptions._refused(request, against)
        self._place(spec, "", request.host, "host")
        guest.uuid = str(uuid.uuid4())
        guest.etag = self._etag(guest)
        guest.ownership = types.OWNERSHIP_PHASE_IDLE
        guest.run_state = types.RUN_STATE_RUNNING if found.running else types.RUN_STATE_PAUSED
        self.guests[guest.name] = guest
        self.adopted[guest.uuid] = (request.host, request.pid)
        self._carry(guest, 1)
        self._remember("AdoptGuest", request, f"guests/{guest.uuid}")
        return self._adopted(request, guest)

    def _examined(self, request: pb.AdoptGuestRequest) -> VmmExamined:
        self._known(self.hosts, request.host, "host", "host")
        process = (request.host, request.pid)
        found = self.vmms.get(process, not_found("process", str(request.pid), field="pid"))
        if isinstance(found, DroverError):
            raise found
        if process in self.adopted.values():
            raise DroverError(R.ALREADY_EXISTS, f"process {request.pid} is a guest already", field="pid")
        return found

    def _adopted(self, request: pb.AdoptGuestRequest, guest: types.Guest) -> pb.AdoptGuestResponse:
        """And its first move asked for, once."""
        decisions.need_alive(record_of(guest))
        move = pb.CreateMigrationRequest(
            request_id=str(uuid.uuid5(uuid.NAMESPACE_OID, request.request_id)),
            guest=request.name,
            destination=request.destination,
        )
        try:
            migration = self._created(move)
        except DroverError as error:
            raise adoptions._stays(guest, error) from error
        return pb.AdoptGuestResponse(guest=guest, migration=migration)

    async def ReleaseGuest(self, request: pb.ReleaseGuestRequest, context: object) -> types.Guest:
        await self._called("ReleaseGuest", request)
        guest = self._guest(request.name)
        if guest.uuid in self.released:
            return guest
        if guest.uuid not in self.adopted:
            raise DroverError(R.NOT_ADOPTABLE, f"guest {guest.name} was started by Drover")
        moving = self.migrations.get(guest.migration)
        if moving is not None and not over(moving):
            self._cancelled(moving)
            guest.ownership, guest.migration = types.OWNERSHIP_PHASE_IDLE, ""
        if guest.ownership != types.OWNERSHIP_PHASE_IDLE:
            raise DroverError(R.GUEST_NOT_RUNNING, f"guest {guest.name} is {wire.word(guest, 'ownership')}")
        if guest.host != self.adopted[guest.uuid][0]:
            raise DroverError(R.NOT_ADOPTABLE, f"guest {guest.name} has moved: its process is Drover's own")
        del self.adopted[guest.uuid]
        self.released.add(guest.uuid)
        return self._ended(guest)
