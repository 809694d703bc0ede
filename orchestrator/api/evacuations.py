"""Evacuations: ask for one, say who can move where, look at it, cancel it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace

import structlog

from orchestrator import wire
from orchestrator.api import checks, decisions, views
from orchestrator.api.calls import Caller, Tools, digest, tries, write
from orchestrator.api.migrations import policy_violations
from orchestrator.api.reads import EvacuationRead, not_found, quarantined, read_evacuation
from orchestrator.api.requests import Request
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.core.guest import name_error
from orchestrator.core.handover import Ownership
from orchestrator.core.offers import Obstacle
from orchestrator.core.placement import GuestInput, need_of, plan
from orchestrator.core.records import EvacuationPhase, EvacuationSpec, EvacuationState
from orchestrator.ledger import active, paths
from orchestrator.ledger.evacuations import read_job
from orchestrator.ledger.ledger import op_create, op_set
from orchestrator.ledger.records import BadRecord
from orchestrator.ledger.snapshot import Snapshot
from orchestrator.ledger.store import Check, Done, Op
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2

log = structlog.get_logger(__name__)

DEFAULT_CONCURRENT = 4
MAX_CONCURRENT = 1_000


class Evacuations:
    """The calls about evacuations."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    # --- look ---------------------------------------------------------------------------------------------------------

    async def read(self, name: str) -> EvacuationRead:
        """As the ledger has it now. Raises NOT_FOUND, StoreUnavailable, BadRecord."""
        return await read_evacuation(self._tools.ledger, name)

    async def get(self, name: str) -> types_pb2.Evacuation:
        """One evacuation as the API shows it, with how long it has taken and what the agents say of its guests.
        Raises NOT_FOUND."""
        read = await self.read(name)
        shown = views.evacuation(read, self._tools.fleet)
        shown.elapsed_ms = views.evacuation_elapsed_ms(read, self._tools.ages)
        if not shown.end_time.seconds:
            reason = (await quarantined(self._tools.ledger)).get(f"evacuations/{name}", "")
            shown.message = views.quarantined(shown.message, reason)
        return shown

    # --- ask ----------------------------------------------------------------------------------------------------------

    async def create(self, request: pb.CreateEvacuationRequest, caller: Caller) -> pb.CreateEvacuationResponse:
        """Cordon the host and write the job, in one transaction; the coordinator carries it out. With
        `validate_only` nothing is written, and the answer says where each guest could go. Raises
        INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS (another one empties the host), REQUEST_ID_REUSED,
        OUTCOME_UNKNOWN."""
        check(request)
        asked = Request.of("" if request.validate_only else request.request_id, digest("CreateEvacuation", request))
        if earlier := await asked.earlier(self._tools):
            return await self._answer(earlier)
        contest = tries(caller)
        while True:
            await contest.another()
            snapshot = await self._tools.index.recent()
            if request.host not in snapshot.hosts:
                raise not_found("host", request.host, field="host")
            leaving = [each for each in snapshot.guests.values() if _leaves(each, request.host)]
            if bad := policy_violations(request.policy, [each.spec.policy for each in leaving] or None):
                raise invalid(bad)
            spec = EvacuationSpec(
                id=f"{request.host}-{uuid.uuid4().hex[:8]}",
                host=request.host,
                max_concurrent=request.max_concurrent or DEFAULT_CONCURRENT,
                policy=wire.overrides_from_proto(request.policy),
                requested_by=caller.by,
                create_time_s=self._tools.wall_s(),
            )
            if request.validate_only:
                uuids = [each.uuid for each in leaving]
                known = await checks.obstacles(self._tools, request.host, uuids, caller)
                verdicts = _verdicts(snapshot, leaving, known)
                empty = EvacuationState()
                unsaved = EvacuationRead(replace(spec, id="", create_time_s=0.0), empty, empty, 0, None)
                return _response(views.evacuation(unsaved, self._tools.fleet), verdicts)
            verdicts = _verdicts(snapshot, leaving)
            await self._refuse_second(request.host, asked)
            await self._tools.store.ensure(paths.shard(paths.evacuation(spec.id)))
            created = await asked.create(self._tools, f"evacuations/{spec.id}", _ops(spec, snapshot), caller)
            if created:
                known = created.rpartition("/")[2]
                if known == spec.id:
                    log.info("evacuation asked for", evacuation=known, host=request.host, by=caller.by)
                return _response(await self.get(known), verdicts)

    async def _answer(self, operation: str) -> pb.CreateEvacuationResponse:
        """Of a request that was carried out before: the job as it is, and verdicts on who is still there."""
        evacuation = await self.get(operation.rpartition("/")[2])
        snapshot = await self._tools.index.recent()
        leaving = [each for each in snapshot.guests.values() if _leaves(each, evacuation.host)]
        return _response(evacuation, _verdicts(snapshot, leaving))

    async def _refuse_second(self, host: str, asked: Request) -> None:
        for job in await self._tools.ledger.list_evacuations():
            try:
                read = await read_job(self._tools.store, job, rows=())
            except BadRecord:
                if not job.startswith(f"{host}-"):
                    continue  # of another host, by its name
                raise
            if read is None or read.spec.host != host or read.head.phase.terminal:
                continue
            if not await asked.earlier(self._tools):
                said = f"evacuation {job} is emptying {host} already: watch that one, or cancel it first"
                raise DroverError(RefusalReason.ALREADY_EXISTS, said, details={"evacuation": job})

    # --- cancel -------------------------------------------------------------------------------------------------------

    async def cancel(self, name: str, caller: Caller) -> types_pb2.Evacuation:
        """The wish is durable when this returns. Migrations past their commit arrive all the same."""
        contest = tries(caller)
        while True:
            await contest.another()
            read = await self.read(name)
            state = read.state
            if state.cancel_requested or state.phase is EvacuationPhase.CANCELLED:
                return await self.get(name)
            if state.phase.terminal:
                said = f"evacuation {name} is over: {state.phase}"
                raise DroverError(RefusalReason.ALREADY_ENDED, said, details={"phase": state.phase})
            wished = op_set(paths.evacuation_state(name), replace(read.head, cancel_requested=True), read.version)
            if isinstance(await write(self._tools, [wished], caller), Done):
                log.info("evacuation cancelled", evacuation=name, host=read.spec.host, by=caller.by)
                return await self.get(name)


# --- pure parts -------------------------------------------------------------------------------------------------------


def check(request: pb.CreateEvacuationRequest) -> None:
    """Raises INVALID_ARGUMENT with everything that is wrong with the request by itself."""
    bad: list[tuple[str, str]] = []
    if said := decisions.request_id_error(request.request_id):
        bad.append(("request_id", said))
    if said := name_error(request.host):
        bad.append(("host", said))
    if not 0 <= request.max_concurrent <= MAX_CONCURRENT:
        said = f"must be between 1 and {MAX_CONCURRENT}, or 0 for {DEFAULT_CONCURRENT}, not {request.max_concurrent}"
        bad.append(("max_concurrent", said))
    bad += policy_violations(request.policy)
    if bad:
        raise invalid(bad)


def _leaves(guest: GuestInput, host: str) -> bool:
    """A guest that the evacuation has to move. A crashed one has nothing left to move."""
    return guest.record.owner.host == host and guest.record.phase is not Ownership.CRASHED


def _verdicts(
    snapshot: Snapshot, leaving: Sequence[GuestInput], known: Mapping[str, Sequence[Obstacle]] | None = None
) -> list[pb.PlacementVerdict]:
    """Where each guest would go now, or why it cannot; by size, as they would be started. Guests that are on their way
    already have their place. `known`: what their host says against it, by uuid."""
    by_size = sorted(leaving, key=lambda each: (-each.spec.memory_mib, each.record.name))
    staying = [each for each in by_size if not decisions.present_migration(each.record)]
    planned = {each.need.guest: each for each in plan(snapshot.views(), [need_of(each) for each in staying])}
    for guest, against in (known or {}).items():
        if guest in planned:
            planned[guest] = checks.despite(planned[guest], against)
    return [views.verdict(one, planned.get(one.uuid)) for one in by_size]


def _ops(spec: EvacuationSpec, snapshot: Snapshot) -> list[Op]:
    """The job, and the cordon that comes with it: nothing new goes to the host from this transaction on."""
    entry = snapshot.hosts[spec.host]
    path = paths.cordon(spec.host)
    on = replace(entry.input.cordon, on=True, why=f"evacuation {spec.id}", by=spec.requested_by)
    cordon = Check(path, entry.cordon_version) if entry.input.cordon.on else op_set(path, on, entry.cordon_version)
    return [
        op_create(paths.evacuation(spec.id), spec),
        op_create(paths.evacuation_state(spec.id), EvacuationState()),
        active.job_begins(spec),
        cordon,
    ]


def _response(evacuation: types_pb2.Evacuation, verdicts: Sequence[pb.PlacementVerdict]) -> pb.CreateEvacuationResponse:
    return pb.CreateEvacuationResponse(evacuation=evacuation, verdicts=verdicts)
