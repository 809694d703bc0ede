"""Carries out what `core.evacuation` decides: reads the facts, stores the state, creates and cancels migrations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from orchestrator.coordinator.driver import STORE_RETRY_S, Deposed, epoch_write
from orchestrator.coordinator.ports import AgentDirectory
from orchestrator.core import evacuation
from orchestrator.core.death import why_left
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord
from orchestrator.core.placement import need_of
from orchestrator.core.policy import override
from orchestrator.core.records import (
    Cordon,
    EvacuationGuest,
    EvacuationSpec,
    EvacuationState,
    HostRecord,
    MigrationPhase,
    MigrationSpec,
    MigrationState,
    host_ref,
)
from orchestrator.core.shards import Share
from orchestrator.ledger import active, paths
from orchestrator.ledger.evacuations import Job, Rows, read_job, transactions, trimmed, written
from orchestrator.ledger.gather import each
from orchestrator.ledger.index import Index
from orchestrator.ledger.migrations import creation
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.ledger.store import Delete, Op, SetData, Store, StoreUnavailable, Versioned

log = structlog.get_logger(__name__)

TURN_S = 0.5


REMEMBER_MS = 30_000.0
"""At most so much of a job's time is lost with its coordinator."""


@dataclass(slots=True)
class _Seen:
    """What is known of a job from one look to the next: durations, on this coordinator's clock."""

    begun_s: float
    spent_ms: float
    """Before that."""
    changed_s: float
    silent_s: float | None = None
    """Since when the host's agent is silent."""

    def dated(self, facts: evacuation.Facts, now_s: float) -> evacuation.Facts:
        self.silent_s = None if facts.source_live else (self.silent_s or now_s)
        return replace(
            facts,
            spent_ms=self.spent_ms + (now_s - self.begun_s) * 1000,
            silent_ms=0.0 if self.silent_s is None else max(1.0, (now_s - self.silent_s) * 1000),
            stalled_ms=(now_s - self.changed_s) * 1000,
        )


class EvacuationRunner:
    """All jobs of one leadership. `nudged` is set by whoever knows that a migration ended."""

    def __init__(
        self,
        store: Store,
        index: Index,
        epoch: int,
        nudged: asyncio.Event,
        agents: AgentDirectory,
        wall_s: Callable[[], float] = time.time,
        clock_s: Callable[[], float] = time.monotonic,
        share: Share = Share(),
    ) -> None:
        self._store = store
        self._index = index
        self._epoch = epoch
        self._share = share
        self._nudged = nudged
        self._agents = agents
        self._wall_s = wall_s
        self._rows: dict[str, tuple[Rows, ...]] = {}
        """Of the jobs under way."""
        self._ended: dict[str, Job] = {}
        """Jobs that are over, without their guests."""
        self._clock_s = clock_s
        self._seen: dict[str, _Seen] = {}
        self._complaints: dict[str, str] = {}

    async def run(self, job: str) -> None:
        """Until the job is over. Raises Deposed, BadRecord, and whatever a command of it failed with."""
        while True:
            try:
                if await self.turn(job):
                    return
            except StoreUnavailable:
                await asyncio.sleep(STORE_RETRY_S)
                continue
            self._nudged.clear()
            try:
                async with asyncio.timeout(TURN_S):
                    await self._nudged.wait()
            except TimeoutError:
                pass

    async def turn(self, job: str) -> bool:
        """One look and what follows from it. True: the job is over."""
        read = await self._read(job)
        if read is None:
            return False
        spec, state = read.spec, read.state
        if state.phase.terminal:
            self._forget(job)
            await self._leave_active_set(spec)
            return True
        now_s = self._clock_s()
        seen = self._seen.setdefault(job, _Seen(now_s, state.spent_ms, now_s))
        facts = seen.dated(await self._facts(spec, state), now_s)
        step = evacuation.step(spec, state, facts)
        new = trimmed(replace(step.state, epoch=self._epoch, safe_at=_safe_at(step.state, facts)))
        if (new.phase, new.guests) != (state.phase, state.guests):
            seen.changed_s = now_s
        if new.phase.terminal:
            new = replace(new, end_time_s=self._wall_s())
        if new != state or facts.spent_ms - state.spent_ms >= REMEMBER_MS:
            new = replace(new, spent_ms=facts.spent_ms)
        if new != state and not await self._store_state(read, new):
            return False  # cancelled meanwhile, perhaps: look again before anything is done
        await self._carry_out_all(step.commands, spec)
        if new.phase.terminal:
            self._forget(job)
        return new.phase.terminal

    def _forget(self, job: str) -> None:
        self._rows.pop(job, None)
        self._seen.pop(job, None)

    async def _leave_active_set(self, spec: EvacuationSpec) -> None:
        """Of a job that was over when it was found. Whoever ended it took it out: as a rule there is nothing to do."""
        if await self._store.read(paths.active_evacuation(spec.id)) is not None:
            await self._write(await active.job_ends(self._store, spec))

    async def _carry_out_all(self, commands: Sequence[evacuation.Command], spec: EvacuationSpec) -> None:
        """One guest's command that fails holds none of the others up. Raises the first failure."""
        first: Exception | None = None
        for command in commands:
            try:
                await self._carry_out(command, spec)
            except (StoreUnavailable, Deposed):
                raise
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    async def _read(self, job: str) -> Job | None:
        """The leader alone writes the guests' rows, so they are read once."""
        read = await read_job(self._store, job, rows=self._rows.get(job))
        if read is not None:
            self._rows[job] = read.rows
        return read

    async def _store_state(self, job: Job, state: EvacuationState) -> bool:
        """False: somebody else moved the job, or the answer was lost. Some guests may be stored then: look again."""
        known = self._rows.pop(job.spec.id, None)
        batches = transactions(job, state)
        if state.phase.terminal:
            batches[-1] += await active.job_ends(self._store, job.spec)
        for ops in batches:
            if not await self._write(ops):
                return False
        if known is not None:
            self._rows[job.spec.id] = written(job, state).rows
        return True

    async def _facts(self, spec: EvacuationSpec, state: EvacuationState) -> evacuation.Facts:
        """Migrations first: one that ended is never seen with a guest record from before its end, which was announced
        to the index before the answer that says so."""
        known = await each((guest for guest in state.guests if guest.migration), self._migration)
        migrations = {name: found for name, found in known if found is not None}
        snapshot = await self._index.recent()
        entry = snapshot.hosts.get(spec.host)
        guests = [
            evacuation.GuestOnHost(guest.uuid, guest.spec.name, guest.spec.memory_mib, guest.record, need_of(guest))
            for guest in snapshot.on(spec.host)
        ]
        facts = evacuation.Facts(
            cordoned=entry is not None and entry.input.cordon.on,
            guests=guests,
            migrations=migrations,
            source_live=entry is None or entry.input.live,
            reserved=entry is not None and bool(entry.input.reservations.memory_mib),
            hosts=snapshot.views(),
            cordon_version=entry.cordon_version if entry is not None else -1,
            dead=entry is not None and entry.input.certified_dead,
        )
        if facts.dead:
            return replace(facts, crashed=await self._crashed(state, spec.host))
        if entry is None or not evacuation.records_say_empty(spec.host, facts):
            return facts
        return replace(facts, empty=await self._is_empty(entry.input.record))

    async def _is_empty(self, host: HostRecord) -> bool | None:
        """The agent's own word about this power cycle."""
        try:
            status = await self._agents.at(host.control_address, host.name).get_agent()
        except DroverError as error:
            log.info("an emptied host does not say whether a copy is left", host=host.name, why=error.message)
            return None
        if status.host != host_ref(host) or not status.complete:
            return None
        return not status.copies

    async def _crashed(self, state: EvacuationState, host: str) -> dict[str, bool]:
        """Guests of the job that died with its host, each with whether it is started elsewhere."""
        found: dict[str, bool] = {}
        for guest in state.guests:
            if guest.phase is MigrationPhase.SUCCEEDED:
                continue
            node = await self._store.read(paths.guest(guest.guest))
            record = decode(GuestRecord, node.data, path=paths.guest(guest.guest)) if node and node.data else None
            spec = await self._index.spec(guest.guest)
            if record is not None and spec is not None and record.host_died and record.owner.host == host:
                found[guest.guest] = not why_left(spec)
        return found

    async def _migration(self, guest: EvacuationGuest) -> tuple[str, MigrationState | None]:
        """One that is over does not change any more: what the job wrote down of it is all that the job needs."""
        if guest.phase.terminal:
            state = MigrationState(guest.phase, guest.attempts, destination=guest.destination)
            return guest.migration, replace(state, failure=guest.failure, message=guest.message)
        node = await self._store.read(paths.migration_state(guest.migration))
        return guest.migration, self._state_of(guest, node) if node is not None else None

    def _state_of(self, guest: EvacuationGuest, node: Versioned) -> MigrationState:
        """As it was last seen, where it cannot be read: the job goes on with its other guests."""
        try:
            return decode(MigrationState, node.data, path=paths.migration_state(guest.migration))
        except BadRecord as error:
            self._complain(guest.migration, error)
            return MigrationState(guest.phase, guest.attempts, destination=guest.destination)

    async def _carry_out(self, command: evacuation.Command, spec: EvacuationSpec) -> None:
        match command:
            case evacuation.CordonHost():
                await self._cordon(spec)
            case evacuation.CreateMigration():
                await self._create(command, spec)
            case evacuation.CancelMigration():
                await self._cancel(command.id)

    async def _cordon(self, spec: EvacuationSpec) -> None:
        path = paths.cordon(spec.host)
        node = await self._store.read(path)
        if node is None:
            log.warning("host to be emptied is not registered", host=spec.host, evacuation=spec.id)
            return
        known = decode(Cordon, node.data, path=path) if node.data else Cordon()
        content = encode(replace(known, on=True, why=f"evacuation {spec.id}", by=spec.requested_by or "coordinator"))
        await self._write([SetData(path, content, node.version)])

    async def _create(self, command: evacuation.CreateMigration, spec: EvacuationSpec) -> None:
        guest_spec = await self._index.spec(command.guest)
        if guest_spec is None or await self._store.read(paths.migration(command.id)) is not None:
            return
        policy = dict(spec.policy)
        if command.total_timeout_ms:
            policy["total_timeout_ms"] = command.total_timeout_ms
        migration = MigrationSpec(
            id=command.id,
            guest=command.guest,
            guest_name=command.name,
            preferred=command.preferred,
            policy=override(guest_spec.policy, policy),
            evacuation=spec.id,
            requested_by=spec.requested_by,
            create_time_s=self._wall_s(),
        )
        try:
            ops = await creation(self._store, migration)
        except DroverError as error:
            if error.reason is not RefusalReason.GUEST_IS_MIGRATING:
                raise
            log.info("waiting for another migration of a guest", guest=command.name, **error.details)
            return
        await self._write(ops)

    async def _cancel(self, migration: str) -> None:
        """The migration's own driver sees the wish and aborts; after the commit it lets the guest arrive."""
        path = paths.migration_state(migration)
        node = await self._store.read(path)
        if node is None:
            return
        state = decode(MigrationState, node.data, path=path)
        if state.cancel_requested or state.phase.terminal:
            return
        wish = SetData(path, encode(replace(state, cancel_requested=True)), node.version)
        await self._write([wish])

    # --- after the end ----------------------------------------------------------------------------------------------

    async def _write(self, ops: Sequence[Op]) -> bool:
        """`epoch_write` under this leadership."""
        return await epoch_write(self._store, self._epoch, ops, self._share.shard)

    async def refresh_ended(self) -> None:
        """Keep "safe to power off" true or false for jobs that are over, while their host stays cordoned. One job that
        cannot be looked at keeps none of the others from it. Raises StoreUnavailable, Deposed."""
        facts: dict[str, evacuation.Facts | None] = {}
        names = [job for job in await self._store.children(paths.ENDED_EVACUATIONS) if self._share.has(job)]
        for known in (self._ended, self._complaints):
            for name in known.keys() - set(names):
                del known[name]
        for job in names:
            try:
                await self._refresh_one(job, facts)
            except (StoreUnavailable, Deposed):
                raise
            except Exception as error:
                self._complain(job, error)

    def _complain(self, job: str, error: Exception) -> None:
        """Once per error: jobs that are over are looked at every two seconds."""
        if self._complaints.get(job) != repr(error):
            self._complaints[job] = repr(error)
            log.error("evacuation cannot be looked at", evacuation=job, exc_info=error)

    async def _refresh_one(self, name: str, facts: dict[str, evacuation.Facts | None]) -> None:
        """`facts` are those of this round, by host: a host is looked at once however many of its jobs are over."""
        job = self._ended.get(name) or await read_job(self._store, name, rows=())
        if job is None:
            await self._stop_refreshing(name)
            return
        if not job.head.phase.terminal:
            return
        if not job.head.guests:  # as a job of this version is written; it changes no more but by what follows here
            self._ended[name] = job
        host, head = job.spec.host, job.head
        if host not in facts:
            cordon = await self._store.read(paths.cordon(host))
            on = cordon is not None and bool(cordon.data) and decode(Cordon, cordon.data, path=paths.cordon(host)).on
            facts[host] = await self._facts(job.spec, EvacuationState()) if on else None
        seen = facts[host]
        if seen is None:  # what it said before an uncordon holds no more, without a word
            await self._stop_refreshing(name)
            return
        new = evacuation.step(job.spec, head, seen).state
        new = replace(new, safe_at=_safe_at(new, seen))
        if new == head:
            return
        write = SetData(paths.evacuation_state(name), encode(new), job.version)
        self._ended.pop(name, None)
        if await self._write([write]) and not new.guests:
            self._ended[name] = replace(job, head=new, version=job.version + 1)

    async def _stop_refreshing(self, name: str) -> None:
        path = paths.ended_evacuation(name)
        node = await self._store.read(path)
        if node is not None:
            await self._write([Delete(path, node.version)])


def _safe_at(state: EvacuationState, facts: evacuation.Facts) -> int:
    return facts.cordon_version if state.safe_to_power_off else -1
