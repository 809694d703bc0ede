"""Guests that somebody else has started: examined where they run, recorded, and moved at once.

A guest that was adopted is written down as one that is about to be born; its specification names the process, so that
its agent takes that over and never starts another one, whoever repeats the call.
"""

from __future__ import annotations

import uuid
from dataclasses import replace

import structlog

from orchestrator import wire
from orchestrator.api import decisions
from orchestrator.api.calls import Caller, Tools, digest, pause
from orchestrator.api.guests import Guests
from orchestrator.api.migrations import Migrations
from orchestrator.api.reads import no_place
from orchestrator.api.requests import Request
from orchestrator.core.agent import VmmExamined
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.core.guest import name_error
from orchestrator.core.handover import Ownership
from orchestrator.core.obstacles import refused
from orchestrator.core.offers import Obstacle
from orchestrator.core.placement import choose, need_for
from orchestrator.core.records import Adopted, GuestSpec, HostRecord
from orchestrator.ledger import paths
from orchestrator.ledger.births import name_freed
from orchestrator.rpc.agent_client import CALL_S, EXAMINE_S
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2

log = structlog.get_logger(__name__)

_MAX_SOCKET_PATH = 107
_MOVE = uuid.UUID("6e2b9a52-6a1d-4f0f-9df5-0b5a3a8f7c10")
"""Namespace of the ids by which the move that follows an adoption is repeat-safe."""


class Adoptions:
    """The calls about guests that somebody else has started."""

    def __init__(self, tools: Tools, guests: Guests, migrations: Migrations) -> None:
        self._tools = tools
        self._guests = guests
        self._migrations = migrations

    async def adopt(self, request: pb.AdoptGuestRequest, caller: Caller) -> pb.AdoptGuestResponse:
        """The guest is kept, and on its way to another host, when this returns. Nothing is written when anything stands
        against it; its process is left as it is. Raises what stands against it, everything at once."""
        wished = check(request)
        asked = Request.of("" if request.validate_only else request.request_id, digest("AdoptGuest", request))
        if earlier := await asked.earlier(self._tools):
            return await self._moved(earlier.rpartition("/")[2], asked, request, caller)
        if not await name_freed(self._tools.store, request.name):
            said = f"there is a guest {request.name} already"
            raise DroverError(RefusalReason.ALREADY_EXISTS, said, field="name")
        found = await self._examined(request, wished, caller)
        against = [*found.obstacles, *await self._nowhere(request, found.spec)]
        if request.validate_only:
            guest = types_pb2.Guest(
                name=request.name, spec=wire.guest_spec_to_proto(found.spec), host=request.host, want_run=found.running
            )
            return pb.AdoptGuestResponse(guest=guest, obstacles=map(wire.obstacle_to_proto, against))
        if against:
            raise _refused(request, against)
        taken = Adopted(request.pid, found.start_time, request.qmp)
        spec = replace(found.spec, adopted=taken)
        kept = await self._guests.recorded(spec, request.host, asked, caller, want_run=found.running)
        log.info("guest to be adopted", guest=spec.name, uuid=kept, host=request.host, pid=request.pid, by=caller.by)
        return await self._moved(kept, asked, request, caller)

    async def _examined(self, request: pb.AdoptGuestRequest, wished: GuestSpec | None, caller: Caller) -> VmmExamined:
        known = await self._tools.ledger.read(HostRecord, paths.host(request.host))
        if known is None:
            raise DroverError(RefusalReason.NOT_FOUND, f"there is no host {request.host}", field="host")
        agent = self._tools.agents.at(known[0].control_address, request.host)
        timeout_s = caller.remaining_s(EXAMINE_S)
        return await agent.examine_vmm(request.name, request.pid, request.qmp, wished, timeout_s)

    async def _nowhere(self, request: pb.AdoptGuestRequest, spec: GuestSpec) -> list[Obstacle]:
        """It moves at once or not at all: some other host must be able to take it now."""
        snapshot = await self._tools.index.recent()
        choice = choose(snapshot.views(), need_for(spec, source=request.host), wanted=request.destination)
        if choice.destination is not None:
            return []
        error = no_place(choice, field="destination" if request.destination else "")
        return [(error.reason, f"no other host can take it: {error.message}")]

    async def _moved(
        self, guest: str, asked: Request, request: pb.AdoptGuestRequest, caller: Caller
    ) -> pb.AdoptGuestResponse:
        """Taken over, and its first move asked for. May be repeated: an adoption that was cut off goes on here."""
        view = await self._guests.started(guest, caller)
        move = pb.CreateMigrationRequest(
            request_id=str(uuid.uuid5(_MOVE, asked.id)), guest=request.name, destination=request.destination
        )
        try:
            migration = await self._migrations.create(move, caller)
        except DroverError as error:
            raise _stays(view, error) from error
        return pb.AdoptGuestResponse(guest=await self._guests.view(guest), migration=migration)

    async def release(self, name: str, caller: Caller) -> types_pb2.Guest:
        """Give a guest that was adopted and has not moved since back to whoever started its process. A move of it is
        cancelled first. Raises NOT_ADOPTABLE for any other guest, GUEST_NOT_RUNNING when it has ended or crashed."""
        uuid_ = await self._guests.uuid_of(name)
        read = await self._guests.read(uuid_)
        if read.record.phase is Ownership.GONE and read.record.released:
            return await self._guests.view(uuid_)
        if read.spec.adopted is None:
            said = f"guest {name} was started by Drover: there is nobody to give it back to"
            raise DroverError(RefusalReason.NOT_ADOPTABLE, said)
        if read.record.migration and read.record.phase in (Ownership.OPEN, Ownership.ABORTED):
            await self._migrations.ensure_cancelled(read.record.migration, caller)
        while True:
            read = await self._guests.read(uuid_)
            agent = await self._tools.agent(read.record.owner.host)
            try:
                await agent.release_vmm(uuid_, caller.remaining_s(CALL_S))
                break
            except DroverError as error:  # the attempt that was cancelled is still being ended there
                if error.reason is not RefusalReason.GUEST_IS_MIGRATING or caller.out_of_time:
                    raise
            await pause(caller)
        log.info("guest released", guest=name, uuid=uuid_, host=read.record.owner.host, by=caller.by)
        return await self._guests.view(uuid_)


def check(request: pb.AdoptGuestRequest) -> GuestSpec | None:
    """What the operator says of the guest, if anything. Raises INVALID_ARGUMENT with everything that is wrong with the
    request by itself."""
    bad: list[tuple[str, str]] = []
    if said := decisions.request_id_error(request.request_id):
        bad.append(("request_id", said))
    for field in ("name", "host"):
        if said := name_error(getattr(request, field)):
            bad.append((field, said))
    if request.destination and (said := name_error(request.destination)):
        bad.append(("destination", said))
    elif request.destination and request.destination == request.host:
        bad.append(("destination", "must be another host: the guest runs on this one already"))
    if request.pid < 2:
        bad.append(("pid", f"must be the pid of a QEMU on {request.host or 'the host'}, not {request.pid}"))
    if not request.qmp.startswith("/") or len(request.qmp.encode()) > _MAX_SOCKET_PATH:
        said = f"must be the whole path of its monitor's unix socket, of at most {_MAX_SOCKET_PATH} bytes"
        bad.append(("qmp", said))
    wished = None
    if request.HasField("spec"):
        try:
            wished = wire.guest_spec_from_proto(request.spec)
        except DroverError as error:
            bad += error.violations
    if bad:
        raise invalid(bad)
    return wished


def _refused(request: pb.AdoptGuestRequest, against: list[Obstacle]) -> DroverError:
    return refused(f"process {request.pid} of {request.host} is not taken over", against)


def _stays(guest: types_pb2.Guest, error: DroverError) -> DroverError:
    """It is a guest, and still in the process that somebody else started."""
    said = (
        f"guest {guest.name} was adopted on {guest.host}, and its move was refused ({error.message}): repeat the "
        "request with the same request_id, `drover migrate` it, or `drover guest release` it"
    )
    return DroverError(error.reason, said, field=error.field, violations=error.violations, details=error.details)
