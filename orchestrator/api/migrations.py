"""Migrations: ask for one, look at it, cancel it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from dataclasses import replace

import structlog

from orchestrator import wire
from orchestrator.api import checks, decisions, views
from orchestrator.api.calls import WRITE_TRIES, Caller, Tools, contended, digest, pause, tries, write
from orchestrator.api.decisions import CancelStep
from orchestrator.api.past import forgotten
from orchestrator.api.reads import (
    GuestRead,
    MigrationRead,
    guest_uuid,
    no_place,
    quarantined,
    read_guest,
    read_migration,
)
from orchestrator.api.requests import Request
from orchestrator.core import handover
from orchestrator.core.errors import AbortReason, DroverError, RefusalReason, invalid
from orchestrator.core.guest import name_error
from orchestrator.core.handover import GuestRecord
from orchestrator.core.placement import GuestInput, choose, need_of
from orchestrator.core.policy import MigrationPolicy, policy_errors
from orchestrator.core.records import MigrationSpec
from orchestrator.ledger import active, paths
from orchestrator.ledger.ledger import op_set
from orchestrator.ledger.migrations import creation, free_of_others
from orchestrator.ledger.store import Check, Delete, Done, Op, StoreUnavailable
from orchestrator.tasks import Tasks
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2

log = structlog.get_logger(__name__)


class Migrations:
    """The calls about migrations."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._nudges = Tasks("nudges")

    # --- look ---------------------------------------------------------------------------------------------------------

    async def get(self, name: str) -> types_pb2.Migration:
        """Also long after its end: from the ledger, or from the history once that has forgotten it."""
        try:
            read = await self.read(name)
        except DroverError as error:
            if error.reason is not RefusalReason.NOT_FOUND or (gone := await forgotten(self._tools, name)) is None:
                raise
            read = gone
        shown = views.migration(read, self._tools.fleet)
        shown.elapsed_ms = views.migration_elapsed_ms(read, self._tools.fleet, self._tools.ages)
        if not shown.end_time.seconds:
            reason = (await quarantined(self._tools.ledger)).get(f"migrations/{name}", "")
            shown.message = views.quarantined(shown.message, reason)
        return shown

    async def read(self, name: str) -> MigrationRead:
        """As the ledger has it now. Raises NOT_FOUND, StoreUnavailable, BadRecord."""
        return await read_migration(self._tools.ledger, name)

    # --- ask ----------------------------------------------------------------------------------------------------------

    async def create(self, request: pb.CreateMigrationRequest, caller: Caller) -> types_pb2.Migration:
        """Write the migration down and return; the coordinator carries it out. A `destination` that is asked for
        must have room now, or may have later under `wait_for_capacity`. With `validate_only` nothing is written,
        and the answer is what would be. Raises INVALID_ARGUMENT, NOT_FOUND, REQUEST_ID_REUSED,
        GUEST_IS_MIGRATING, OUTCOME_UNKNOWN, and what `no_place` gives."""
        check(request)
        asked = Request.of("" if request.validate_only else request.request_id, digest("CreateMigration", request))
        if earlier := await asked.earlier(self._tools):
            return await self.get(earlier.rpartition("/")[2])
        guest = await guest_uuid(self._tools.ledger, request.guest, field="guest")
        if request.validate_only:
            spec, read = await self._judged(request, guest, caller)
            await free_of_others(self._tools.store, guest, spec.guest_name)
            validated = await self._validated(spec, read)
            known = await checks.obstacles(self._tools, read.record.owner.host, [guest], caller)
            checks.need_none(spec.guest_name, known[guest])
            return validated
        contest = tries(caller)
        while True:
            await contest.another()
            try:
                spec, read = await self._judged(request, guest, caller)
                ops = [Check(paths.guest(guest), read.version), *await creation(self._tools.store, spec)]
            except DroverError as error:
                # It may be this very request, sent twice, that has made the migration in the guest's way.
                if error.reason is RefusalReason.GUEST_IS_MIGRATING and (known := await asked.earlier(self._tools)):
                    return await self.get(known.rpartition("/")[2])
                raise
            created = await asked.create(self._tools, f"migrations/{spec.id}", ops, caller)
            if created:
                name = created.rpartition("/")[2]
                if name == spec.id:
                    log.info("migration asked for", migration=name, guest=spec.guest_name, by=caller.by)
                return await self.get(name)

    async def _judged(
        self, request: pb.CreateMigrationRequest, guest: str, caller: Caller
    ) -> tuple[MigrationSpec, GuestRead]:
        """The migration that would be, and the guest as it was when it was judged. Raises why there can be none."""
        read = await read_guest(self._tools.ledger, guest)
        decisions.need_movable(read.record)
        policy = _policy(request, read)
        if request.destination:
            await self._destination(read, request.destination, may_wait=policy.wait_for_capacity)
        spec = MigrationSpec(
            id=uuid.uuid4().hex[:12],
            guest=guest,
            guest_name=read.record.name,
            destination=request.destination,
            policy=policy,
            requested_by=caller.by,
            create_time_s=self._tools.wall_s(),
        )
        return spec, read

    async def _destination(self, read: GuestRead, wanted: str, *, may_wait: bool = False) -> str:
        """Where the guest would go now; empty: nowhere, but `may_wait`, and time may bring a place. Raises the refusal
        that stands against the wanted host, or against all."""
        snapshot = await self._tools.index.recent()
        need = need_of(GuestInput(read.uuid, read.record, read.spec))
        choice = choose(snapshot.views(), need, wanted=wanted)
        if choice.destination is None and may_wait and choice.passing:
            return ""
        if choice.destination is None:
            raise no_place(choice, field="destination" if wanted else "")
        return choice.destination.host

    async def _validated(self, spec: MigrationSpec, read: GuestRead) -> types_pb2.Migration:
        return types_pb2.Migration(
            guest=spec.guest_name,
            guest_uuid=spec.guest,
            source=read.record.owner.host,
            destination=await self._destination(read, spec.destination),
            policy=wire.policy_to_proto(spec.policy),
        )

    # --- cancel -------------------------------------------------------------------------------------------------------

    async def cancel(self, name: str, caller: Caller) -> types_pb2.Migration:
        """Returns once a write of ours, or of somebody before us, says that the migration will never commit (H6)."""
        await self.ensure_cancelled(name, caller)
        return await self.get(name)

    async def ensure_cancelled(self, name: str, caller: Caller) -> None:
        """Raises ALREADY_COMMITTED and ALREADY_ENDED."""
        writer = f"api-{uuid.uuid4().hex}"
        for _ in range(WRITE_TRIES):
            read = await self.read(name)
            step = decisions.cancel_step(name, read.standing)
            if step is CancelStep.NOTHING:
                return
            ops = self._cancel_ops(step, read, writer)
            if step is CancelStep.CLOSE:
                ops += await self._release(name, read.standing.state.destination)
            if step in (CancelStep.CLOSE, CancelStep.SETTLE):
                ops += await active.migration_ends(self._tools.store, name)
            result = await write(self._tools, ops, caller)
            if isinstance(result, Done):
                log.info("cancelled", migration=name, guest=read.spec.guest_name, step=step, by=caller.by)
                if step is CancelStep.ABORT and read.standing.record is not None:
                    self._nudge(read.spec.guest, read.standing.record)
                return
            if result is not None:
                await pause(caller)
        raise contended()

    async def _release(self, migration: str, host: str) -> list[Op]:
        """Between two attempts a migration keeps the memory that is promised to it."""
        path = paths.reservation(host, migration)
        found = await self._tools.store.read(path) if host else None
        return [] if found is None else [Delete(path, found.version)]

    def _cancel_ops(self, step: CancelStep, read: MigrationRead, writer: str) -> list[Op]:
        spec, standing = read.spec, read.standing
        record_path, state_path = paths.guest(spec.guest), paths.migration_state(spec.id)
        over = replace(
            decisions.cancelled_state(standing.state, wall_s=self._tools.wall_s()),
            spent_ms=float(views.migration_elapsed_ms(read, self._tools.fleet, self._tools.ages)),
        )
        if step is CancelStep.SETTLE or standing.record is None:
            return [op_set(state_path, over, standing.state_version)]
        if step is CancelStep.ABORT:
            attempt = standing.record.attempt
            aborted = handover.abort(standing.record, spec.id, attempt, AbortReason.CANCELLED, writer=writer)
            return [op_set(record_path, aborted, standing.record_version)]
        if step is CancelStep.CLOSE:
            closed = handover.close(standing.record, spec.id, writer=writer)
            return [
                op_set(record_path, closed, standing.record_version),
                op_set(state_path, over, standing.state_version),
            ]
        wished = decisions.cancel_wished(standing.state)
        return [Check(record_path, standing.record_version), op_set(state_path, wished, standing.state_version)]

    def _nudge(self, guest: str, record: GuestRecord) -> None:
        """Both agents watch the record; this only saves them the delay of the watch."""
        for host in (record.owner, record.destination):
            if host is not None:
                self._nudges.spawn(self._nudge_one(guest, host.host), "nudge")

    async def _nudge_one(self, guest: str, host: str) -> None:
        with contextlib.suppress(DroverError, StoreUnavailable):
            agent = await self._tools.agent(host)
            await agent.nudge(guest)


def check(request: pb.CreateMigrationRequest) -> None:
    """Raises INVALID_ARGUMENT with everything that is wrong with the request by itself."""
    bad: list[tuple[str, str]] = []
    if said := decisions.request_id_error(request.request_id):
        bad.append(("request_id", said))
    if said := name_error(request.guest):
        bad.append(("guest", said))
    if request.destination and (said := name_error(request.destination)):
        bad.append(("destination", said))
    bad += policy_violations(request.policy)
    if bad:
        raise invalid(bad)


_RELATED = {"backoff_initial_ms": "backoff_max_ms", "gate_wait_ms": "switchover_timeout_ms"}
"""Fields whose bounds are other fields."""


def policy_violations(
    message: types_pb2.MigrationPolicy, bases: Sequence[MigrationPolicy] | None = None
) -> list[tuple[str, str]]:
    """What is wrong with a policy laid over each of `bases`, in the fields that the message sets; with what is wrong
    whatever it is laid over when there are none."""
    try:
        given = wire.overrides_from_proto(message)
        merged = [wire.policy_from_proto(message, base) for base in bases or [MigrationPolicy()]]
    except DroverError as error:
        return list(error.violations)
    bad = [(field, said) for policy in merged for field, said in policy_errors(policy)]
    if bases is None:
        bad = [(field, said) for field, said in bad if field not in _RELATED]
    ours = [(f"policy.{field}", said) for field, said in bad if field in given or _RELATED.get(field) in given]
    return list(dict.fromkeys(ours))


def _policy(request: pb.CreateMigrationRequest, read: GuestRead) -> MigrationPolicy:
    """The guest's own with what the request sets. Raises INVALID_ARGUMENT when the two do not go together."""
    if bad := policy_violations(request.policy, [read.spec.policy]):
        raise invalid(bad)
    return wire.policy_from_proto(request.policy, read.spec.policy)
