"""Drives one migration: carries out what `core.migration` decides, and shows it what the records say.

Every write is a transaction that checks the coordinator's epoch (H12), every call to an agent carries it. No write's
result is believed beyond "definitely over": afterwards the records are read again and decide, so a lost answer, a lost
race and a crash all go on in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import structlog

from orchestrator.coordinator.placing import Placing
from orchestrator.coordinator.ports import AgentDirectory, AgentPort, ConductOrder
from orchestrator.core import handover, migration
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AttemptRef
from orchestrator.core.offers import hardware_need, local_bytes, offer_of
from orchestrator.core.placement import GuestInput, choose, need_of
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import (
    AttemptReport,
    Attempts,
    GuestSpec,
    HostRecord,
    MigrationPhase,
    MigrationSpec,
    MigrationState,
    Requests,
    Reservation,
)
from orchestrator.ledger import active, births, markers, paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.records import decode, encode, encode_attempts
from orchestrator.ledger.snapshot import HostEntry, Snapshot
from orchestrator.ledger.store import (
    Check,
    Conflict,
    Create,
    Delete,
    Done,
    Op,
    OutcomeUnknown,
    SetData,
    Store,
    StoreUnavailable,
    Versioned,
)
from orchestrator.tasks import Tasks

log = structlog.get_logger(__name__)

RESYNC_S = 5.0
"""The records are looked at this often, whatever was announced."""
ANEW_S = 60.0
"""And read from the ledger, whatever is known of them, about this often."""
STORE_RETRY_S = 0.2
REPORT_WAIT_S = 3.0
REPORT_POLL_S = 0.1
WRITE_TRIES = 20

_REPEATED = frozenset(
    {
        RefusalReason.AGENT_UNREACHABLE,
        RefusalReason.OUTCOME_UNKNOWN,
        RefusalReason.LEDGER_UNREACHABLE,
        RefusalReason.BUSY,
    }
)
"""Answers after which the same call is made again, until the attempt's deadline."""

_AT_SOURCE = frozenset({Ownership.STARTING, Ownership.IDLE, Ownership.OPEN, Ownership.ABORTED})
"""While the guest's owner is the source of the migration, or would be."""

T = TypeVar("T")


SPENT_S = 10.0
SPENT_PART = 0.1
"""A driver that takes over counts at most so much of a budget again: SPENT_S, or this part of it if that is more. What
thousands have spent of an hour each need not be written down every ten seconds."""

WAITING = "WAITING"
"""In place of a terminal phase: the migration waits for room, and is to be driven again later."""


class Deposed(Exception):
    """Another coordinator leads, or may: nothing more may be written under this epoch."""


@dataclass(slots=True)
class WorkerShared:
    """What the drivers of one worker share."""

    store: Store
    agents: AgentDirectory
    index: Index
    epoch: int
    placing: Placing = field(default_factory=Placing)
    """So that a worker does not lose races against itself."""
    max_arrivals: int = 0
    clock_s: Callable[[], float] = time.monotonic
    wall_s: Callable[[], float] = time.time
    """Only for stamps that people read."""
    rng: random.Random = field(default_factory=random.Random)
    shard: int = 0
    """Of the fleet; `epoch` is that shard's."""

    async def write(self, ops: Sequence[Op]) -> bool:
        """`epoch_write` under this epoch."""
        return await epoch_write(self.store, self.epoch, ops, self.shard)


@dataclass(frozen=True, slots=True)
class _Nodes:
    """The three nodes of a migration with their versions."""

    guest: Versioned | None
    record: GuestRecord | None
    state_version: int
    state: MigrationState
    attempts: Versioned | None
    reports: tuple[AttemptReport, ...]
    source_live: bool = True

    def untouched(self, mig: str) -> bool:
        """As it was created: no driver has opened an attempt, or spent any of its time."""
        state, record = self.state, self.record
        begun = state.attempt > 0 or state.spent_ms > 0 or bool(self.reports) or state.phase.terminal
        return not begun and self.state_version >= 0 and record is not None and record.migration != mig

    def seen(self) -> migration.Read:
        return migration.Read(self.record, self.state, self.reports, self.source_live)


@dataclass(frozen=True, slots=True)
class _Opening:
    """What opens an attempt, and the host that it is to go to."""

    host: str
    ops: list[Op]
    hosts: frozenset[str]
    """Those that have a word in it."""


async def epoch_write(store: Store, epoch: int, ops: Sequence[Op], shard: int = 0) -> bool:
    """`multi[check the shard's epoch; ops]`. True: applied for certain. False: read again, it is over either way.

    Raises Deposed when the epoch moved. Waits for the store as long as it takes; the caller is cancelled when its
    leadership ends.
    """
    result = await store.multi([Check(paths.epoch(shard), epoch), *ops])
    match result:
        case Done():
            return True
        case Conflict(index=0):
            raise Deposed(f"epoch {epoch} is over")
        case Conflict():
            return False
        case OutcomeUnknown(sent=False):
            await asyncio.sleep(STORE_RETRY_S)
            return False
        case OutcomeUnknown():
            await until_available(store.barrier)
            return False


async def must_lead(store: Store, epoch: int, shard: int = 0) -> None:
    """Whether `epoch` stands, asked behind a barrier: nobody else's word deposes a coordinator.

    Raises Deposed, StoreUnavailable.
    """
    await store.barrier()
    node = await store.read(paths.epoch(shard))
    if node is None or node.version != epoch:
        raise Deposed(f"epoch {epoch} is over: the ledger names {node.version if node else 'none'}")


async def until_available(call: Callable[[], object]) -> None:
    """Repeat a coroutine function until the store answers."""
    while True:
        try:
            await call()  # type: ignore[misc]
            return
        except StoreUnavailable:
            await asyncio.sleep(STORE_RETRY_S)


class Driver:
    """One migration from where its records stand to its verdict."""

    def __init__(self, tools: WorkerShared, spec: MigrationSpec) -> None:
        self._tools = tools
        self._spec = spec
        self._events: asyncio.Queue[migration.Event | BaseException | None] = asyncio.Queue()
        self._tasks = Tasks(f"driver of {spec.id}")
        self._course: migration.Course | None = None
        self._fresh = False
        self._stale = False
        """A change was announced, and is in the queue of events."""
        self._anew_at_s = tools.clock_s() + ANEW_S * tools.rng.uniform(0.5, 1.0)
        self._mine = (paths.guest(spec.guest), paths.migration_state(spec.id), paths.attempts(spec.id))
        self._decoded: dict[str, tuple[Versioned, object]] = {}

    async def run(self) -> str:
        """Returns the terminal phase, or WAITING. Raises Deposed, or BadRecord when a node cannot be read.

        Cancelling it is a crash as far as the protocol is concerned: safe at any instant.
        """
        follow = self._tools.index.follow
        unwatch = [follow(path, self._changed) for path in self._mine]
        try:
            nodes = await self._look()
            if nodes.record is not None and nodes.record.phase in _AT_SOURCE:
                unwatch.append(follow(paths.live(nodes.record.owner.host), self._changed))
            self._tasks.spawn(self._keep_spent(), "time spent", failed=self._failed)
            return await self._loop(nodes)
        finally:
            for stop in unwatch:
                stop()
            await self._tasks.close()

    def _failed(self, error: BaseException) -> None:
        """Whatever fails beside the driver ends it, and its migration is driven anew."""
        self._events.put_nowait(error)

    def _changed(self) -> None:
        if not self._stale:  # one look sees whatever changed before it
            self._stale = True
            self._events.put_nowait(None)

    async def _loop(self, nodes: _Nodes) -> str:
        course = migration.start(
            self._spec, now_ms=self._now_ms(), spent_ms=nodes.state.spent_ms, reports=nodes.reports
        )
        self._course = course
        event: migration.Event = nodes.seen()
        while True:
            jitter = self._tools.rng.uniform(0.5, 1.0)
            step = migration.step(course, event, now_ms=self._now_ms(), jitter=jitter)
            self._course = course = step.course
            for command in step.commands:
                if isinstance(command, migration.End):
                    return course.durable.phase
                if isinstance(command, migration.StandBack):
                    return WAITING
                self._spawn(command)
            event = await self._next(course)

    async def _next(self, course: migration.Course) -> migration.Event:
        """The next event: an answer, a tick that is due, or what the records say after they changed."""
        wake = migration.wake_ms(course)
        wait = RESYNC_S if wake is None else max(0.0, (wake - self._now_ms()) / 1000)
        try:
            async with asyncio.timeout(min(wait, RESYNC_S)):
                got = await self._events.get()
        except TimeoutError:
            if wait <= RESYNC_S and wake is not None:
                return migration.Tick()
            got = None
        if isinstance(got, BaseException):
            raise got
        if got is not None:
            return got
        self._stale = False
        return (await self._look()).seen()

    def _now_ms(self) -> float:
        return self._tools.clock_s() * 1000

    def _spent_ms(self) -> float:
        return 0.0 if self._course is None else migration.spent_ms(self._course, self._now_ms())

    def _attempt_ms(self) -> float:
        return 0.0 if self._course is None else migration.attempt_ms(self._course, self._now_ms())

    async def _look(self) -> _Nodes:
        while True:
            try:
                return await self._read()
            except StoreUnavailable:
                await asyncio.sleep(STORE_RETRY_S)

    async def _read(self) -> _Nodes:
        """H13: what another driver has done with the migration, through another server of the ledger, is not missed.

        Until this driver has written, that takes a barrier; but none where the migration looks untouched, for then the
        driver's own first write is a compare-and-set that fails if anything was missed.
        """
        nodes = await self._read_as_shown()
        if not self._fresh and not nodes.untouched(self._spec.id):
            await self._tools.store.barrier()
            self._fresh = True
            self._doubt()
            nodes = await self._read_as_shown()
        return nodes

    async def _write(self, ops: Sequence[Op]) -> bool:
        """As `WorkerShared.write`. One that was applied stands before everything that is read from here on."""
        written = await self._tools.write(ops)
        self._fresh = self._fresh or written
        return written

    async def _read_as_shown(self) -> _Nodes:
        """State, guest, state again: when the state did not move, the record belongs to it. Whatever opens or settles
        an attempt moves both, so a half of such a write is never seen."""
        spec = self._spec
        if self._tools.clock_s() >= self._anew_at_s:
            self._doubt()
        read = self._tools.index.nodes.read
        state = await read(paths.migration_state(spec.id))
        while True:
            before = state
            guest = await read(paths.guest(spec.guest))
            attempts = await read(paths.attempts(spec.id))
            state = await read(paths.migration_state(spec.id))
            if (before and before.version) == (state and state.version):
                break
        record = self._decode(GuestRecord, guest, paths.guest(spec.guest)) if guest else None
        source = record.owner.host if record is not None and record.phase in _AT_SOURCE else ""
        known = self._decode(MigrationState, state, paths.migration_state(spec.id)) if state and state.data else None
        told = self._decode(Attempts, attempts, paths.attempts(spec.id)) if attempts and attempts.data else None
        return _Nodes(
            guest=guest,
            record=record,
            source_live=not source or await read(paths.live(source)) is not None,
            state_version=state.version if state else -1,
            state=known or MigrationState(),
            attempts=attempts,
            reports=told.reports if told is not None else (),
        )

    def _doubt(self) -> None:
        """Ask the ledger the next time, whatever is known of the nodes."""
        self._anew_at_s = self._tools.clock_s() + ANEW_S
        for path in self._mine:
            self._tools.index.nodes.doubt(path)

    def _decode(self, kind: type[T], node: Versioned, path: str) -> T:
        """Once for as long as the node stands still."""
        found = self._decoded.get(path)
        if found is None or found[0] != node:
            found = self._decoded[path] = node, decode(kind, node.data, path=path)
        return cast(T, found[1])

    # --- effects ------------------------------------------------------------------------------------------------------

    async def _keep_spent(self) -> None:
        """Write down now and then how much of the budget is used up, so that a driver which takes over in the middle of
        an attempt does not begin to count anew. A write that fails is made up for by the next one."""
        every_s = spent_every_s(self._spec.policy)
        while True:
            await asyncio.sleep(every_s)
            try:
                await self._write_spent(every_s)
            except StoreUnavailable:
                continue
            except Exception as error:  # ends the driver, as a failure of any effect
                self._events.put_nowait(error)
                return

    async def _write_spent(self, every_s: float) -> None:
        nodes = await self._read()
        if nodes.state.phase.terminal or self._spent_ms() - nodes.state.spent_ms < every_s * 1000:
            return
        state = replace(nodes.state, spent_ms=self._spent_ms())
        write = SetData(paths.migration_state(self._spec.id), encode(state), nodes.state_version)
        await self._write([write])

    def _spawn(self, command: migration.Command) -> None:
        self._tasks.spawn(self._guarded(command), type(command).__name__, failed=self._failed)

    async def _guarded(self, command: migration.Command) -> None:
        """A failure of an effect ends the driver: Deposed and StoreUnavailable are no faults of it."""
        try:
            event = await self._effect(command)
        except Exception as error:
            self._failed(error)
            return
        self._events.put_nowait(event)
        if isinstance(event, migration.Finished):
            self._events.put_nowait(None)

    async def _effect(self, command: migration.Command) -> migration.Event:
        match command:
            case migration.Open():
                return await self._until_read(lambda: self._open(command))
            case migration.Wait():
                return await self._until_read(lambda: self._wait(command))
            case migration.Abort():
                return await self._until_read(lambda: self._abort(command))
            case migration.Settle():
                return await self._until_read(lambda: self._settle(command))
            case migration.Prepare():
                return await self._prepare(command)
            case migration.Conduct():
                return await self._conduct(command)
            case migration.FetchReport():
                return migration.ReportAnswer(await self._until_read(lambda: self._report(command)))
            case migration.End() | migration.StandBack():
                raise AssertionError(f"{command} is not an effect")

    async def _until_read(self, call: Callable[[], object]) -> T:  # type: ignore[type-var]
        while True:
            try:
                return await call()  # type: ignore[misc, return-value]
            except StoreUnavailable:
                await asyncio.sleep(STORE_RETRY_S)

    async def _pause(self) -> None:
        """Between two tries of a write that lost a race: long enough to let the winner finish."""
        await asyncio.sleep(self._tools.rng.uniform(0.005, 0.05))

    async def _open(self, command: migration.Open) -> migration.Event:
        placing = self._tools.placing
        for number in range(WRITE_TRIES):
            with contextlib.ExitStack() as until_written:
                async with placing.turn:
                    opening = await self._opening(command, guess=number == 0)
                    if not isinstance(opening, _Opening):
                        return opening
                    until_written.enter_context(placing.writing(opening.host))
                await self._tools.store.grant(paths.guest(self._spec.guest), opening.hosts)
                if await self._write(opening.ops):
                    return migration.Finished()
            await self._pause()
        return migration.Finished()

    async def _opening(self, command: migration.Open, *, guess: bool) -> _Opening | migration.Event:
        """What to write where, for a host that nothing else is being written for; called in one's turn. `guess`: what
        is likely to be so need not be looked up, since a write of it has not failed yet."""
        fresh = False
        while True:
            self._tools.placing.look()
            snapshot = await (self._tools.index.snapshot() if fresh else self._tools.index.recent())
            found = await self._judge(command, snapshot, await self._read(), guess=guess and not fresh)
            if isinstance(found, (migration.NoPlace, migration.SourceSilent)) and not fresh:
                fresh = True  # there may be a place that this process has not been told of yet
            elif isinstance(found, _Opening) and found.host in self._tools.placing.busy:
                await self._tools.placing.idle(found.host)  # and look again
            else:
                return found

    async def _judge(
        self, command: migration.Open, snapshot: Snapshot, nodes: _Nodes, *, guess: bool
    ) -> _Opening | migration.Event:
        spec, record = self._spec, nodes.record
        guest_spec = await self._tools.index.spec(spec.guest)
        if record is None or nodes.guest is None or guest_spec is None:
            return migration.Finished()
        if nodes.state.cancel_requested or nodes.state.phase.terminal:
            return migration.Finished()
        source = record.owner.host
        if source in snapshot.hosts and not snapshot.hosts[source].input.live:
            return migration.SourceSilent()
        need = need_of(GuestInput(spec.guest, record, guest_spec))
        choice = choose(
            snapshot.views(but=spec.id),
            need,
            wanted=command.wanted,
            prefer=command.prefer,
            avoid=command.avoid,
            later=self._tools.placing.busy,
            lane=self._tools.placing.lane,
            max_arrivals=self._tools.max_arrivals,
            salt=spec.id,
        )
        if choice.destination is None:
            reason = choice.reason or RefusalReason.NO_CAPACITY
            return migration.NoPlace(reason, choice.message, choice.transient, choice.passing)
        try:
            opened = handover.open_attempt(
                record, spec.id, command.attempt, choice.destination, epoch=self._tools.epoch, writer=_writer()
            )
        except handover.Refused:
            return migration.Finished()  # the record moved: look again
        state = self._preparing(nodes.state, command.attempt, source, choice.destination.host)
        entry = snapshot.hosts[choice.destination.host]
        moved = nodes.state.destination not in ("", choice.destination.host)
        ops: list[Op] = [
            *(await self._release(nodes.state.destination) if moved else []),
            Check(paths.cordon(choice.destination.host), entry.cordon_version),
            SetData(paths.guest(spec.guest), encode(opened), nodes.guest.version),
            *await self._reserve(entry, guest_spec),
            SetData(paths.migration_state(spec.id), encode(state), nodes.state_version),
            *await self._missing_ack_nodes(source, likely=guess and nodes.state.attempt == 0),
            await self._marked(choice.destination.host, likely=guess and nodes.state.attempt == 0),
        ]
        return _Opening(choice.destination.host, ops, frozenset({source, choice.destination.host}))

    def _preparing(self, state: MigrationState, attempt: int, source: str, destination: str) -> MigrationState:
        """The migration's state as an attempt is opened."""
        return replace(
            state,
            phase=MigrationPhase.PREPARING,
            attempt=attempt,
            source=source,
            destination=destination,
            message="",
            waiting_for=None,
            retry_wait_ms=0,
            spent_ms=self._spent_ms(),
            opened_spent_ms=self._spent_ms(),
            epoch=self._tools.epoch,
        )

    async def _missing_ack_nodes(self, source: str, *, likely: bool) -> list[Op]:
        """`likely`: they are missing, as far as one may guess; the write will say."""
        missing: list[Op] = []
        for path in (paths.requests(self._spec.id), paths.acks(self._spec.id)):
            if likely or await self._tools.store.read(path) is None:
                missing.append(Create(path, encode(Requests()), writers=(source,)))
        return missing

    async def _marked(self, host: str, *, likely: bool) -> Op:
        """The guest in the list of its destination. `likely`: it is not there, as for ACKs."""
        if likely:
            return Create(paths.host_guest(host, self._spec.guest), b"")
        return await markers.marked(self._tools.store, host, self._spec.guest)

    async def _wait(self, command: migration.Wait) -> migration.Event:
        for _ in range(WRITE_TRIES):
            nodes = await self._read()
            if nodes.state.cancel_requested or nodes.state.phase.terminal:
                return migration.Finished()
            state = replace(
                nodes.state,
                message=command.message,
                waiting_for=command.what,
                spent_ms=self._spent_ms(),
                epoch=self._tools.epoch,
            )
            write = SetData(paths.migration_state(self._spec.id), encode(state), nodes.state_version)
            release = await self._release(nodes.state.destination) if nodes.state.destination else []
            if await self._write([write, *release]):
                return migration.Told(command.stand_back)
            await self._pause()
        return migration.Finished()

    async def _abort(self, command: migration.Abort) -> migration.Event:
        """Repeats the compare-and-set until the attempt is open no longer, whoever ended it."""
        while True:
            nodes = await self._read()
            record = nodes.record
            if record is None or nodes.guest is None or record.phase is not Ownership.OPEN:
                break
            if (record.migration, record.attempt) != (self._spec.id, command.attempt):
                break
            aborted = handover.abort(record, self._spec.id, command.attempt, command.reason, writer=_writer())
            ops: list[Op] = [SetData(paths.guest(self._spec.guest), encode(aborted), nodes.guest.version)]
            if command.said and nodes.state_version >= 0:
                state = replace(nodes.state, message=command.said)
                ops.append(SetData(paths.migration_state(self._spec.id), encode(state), nodes.state_version))
            if await self._write(ops):
                self._nudge(record)
                break
            await self._pause()
        return migration.Finished()

    def _nudge(self, record: GuestRecord) -> None:
        """Agents also watch the record; this only saves them the delay of the watch."""
        for host in (record.owner, record.destination):
            if host is not None:
                self._tasks.spawn(self._nudge_one(host.host), "nudge")

    async def _nudge_one(self, host: str) -> None:
        with contextlib.suppress(DroverError, StoreUnavailable):
            agent, _ = await self._agent(host)
            await agent.nudge(self._spec.guest)

    async def _settle(self, command: migration.Settle) -> migration.Event:
        for number in range(WRITE_TRIES):
            nodes = await self._read()
            if nodes.state.phase.terminal:
                break
            ops = await self._settle_ops(command, nodes, again=number > 0)
            if ops is None:
                break
            if await self._write(ops):
                if command.phase.terminal and nodes.record is not None:
                    await self._only_owner_writes(nodes.record)
                break
            await self._pause()
        return migration.Finished()

    async def _only_owner_writes(self, record: GuestRecord) -> None:
        """The other end of the attempt has no word any more. What a coordinator that ends now leaves, the next leader
        takes back (`coordinator/rights.py`)."""
        with contextlib.suppress(StoreUnavailable):
            await self._tools.store.grant(paths.guest(self._spec.guest), {record.owner.host})

    async def _settle_ops(self, command: migration.Settle, nodes: _Nodes, *, again: bool) -> list[Op] | None:
        """One transaction: report, reservation, guest record, state. None: the record moved, look again."""
        spec = self._spec
        ops: list[Op] = []
        if command.close:
            if nodes.guest is None or nodes.record is None or nodes.record.phase is not Ownership.ABORTED:
                return None
            closed = handover.close(nodes.record, spec.id, writer=_writer())
            ops.append(SetData(paths.guest(spec.guest), encode(closed), nodes.guest.version))
        elif nodes.guest is not None:
            ops.append(Check(paths.guest(spec.guest), nodes.guest.version))  # what was judged still stands
        report = command.report
        if report is not None and all(known.attempt != report.attempt for known in nodes.reports):
            known = _decode_or(Attempts, nodes.attempts, Attempts())
            data = encode_attempts((*known.reports, report), over=known)
            ops.append(_put(paths.attempts(spec.id), data, nodes.attempts))
        if nodes.state.destination and not command.keep_room:
            ops += await self._release(nodes.state.destination)
        state = replace(
            nodes.state,
            phase=command.phase,
            failure=command.failure,
            message=command.message,
            waiting_for=None,
            retry_wait_ms=command.retry_wait_ms,
            spent_ms=self._spent_ms(),
            end_time_s=self._tools.wall_s() if command.phase.terminal else 0.0,
            epoch=self._tools.epoch,
        )
        ops.append(SetData(paths.migration_state(spec.id), encode(state), nodes.state_version))
        if command.phase.terminal:
            if again:
                ops += await active.migration_ends(self._tools.store, spec.id)
            else:
                ops.append(active.migration_leaves(spec.id))
        return ops

    async def _promise(self, host: str) -> Versioned | None:
        return await self._tools.index.nodes.one_below(paths.reservations(host), self._spec.id)

    async def _reserve(self, entry: HostEntry, guest: GuestSpec) -> list[Op]:
        """Memory, and room for the guest's disks in the host's local pools. What was promised before stands."""
        name, path = entry.input.record.name, paths.reservation(entry.input.record.name, self._spec.id)
        disk_bytes = local_bytes(hardware_need(guest), offer_of(entry.input.record, None, ()))
        promise = Reservation(guest.memory_mib, disk_bytes)
        known = self._spec.id in entry.reservations.memory_mib
        before = await self._promise(name) if known else None
        return [births.room_taken(name, entry), _put(path, encode(promise), before)]

    async def _release(self, host: str) -> list[Op]:
        node = await self._promise(host)
        return [] if node is None else [Delete(paths.reservation(host, self._spec.id), node.version)]

    # --- calls to agents ----------------------------------------------------------------------------------------------

    async def _agent(self, host: str) -> tuple[AgentPort, HostRecord]:
        """Raises AGENT_UNREACHABLE when the host is not registered, StoreUnavailable."""
        node = await self._tools.index.nodes.read(paths.host(host), keep=True)
        if node is None or not node.data:
            raise DroverError(RefusalReason.AGENT_UNREACHABLE, f"{host} has not registered an agent")
        record = decode(HostRecord, node.data, path=paths.host(host))
        return self._tools.agents.at(record.control_address, host), record

    def _ref(self, attempt: int) -> AttemptRef:
        return AttemptRef(self._spec.guest, self._spec.id, attempt)

    async def _prepare(self, command: migration.Prepare) -> migration.Event:
        course = self._course
        record = course.record if course else None
        if record is None or record.destination is None:
            return migration.Finished()
        try:
            agent, host = await self._agent(record.destination.host)
            if host.boot_id != record.destination.boot_id:
                said = f"{host.name} lost power after it was chosen"
                return migration.CallRefused(command.attempt, RefusalReason.STALE_ATTEMPT, said)
            _, source = await self._agent(record.owner.host)
            prepared = await agent.prepare_destination(
                self._ref(command.attempt),
                epoch=self._tools.epoch,
                source_peer=_peer(source),
                timeout_ms=self._spec.policy.prepare_timeout_ms,
                multifd_channels=self._spec.policy.multifd_channels,
                shard=self._tools.shard,
            )
        except (DroverError, StoreUnavailable) as error:
            return await self._call_failed(command.attempt, error)
        return migration.PrepareAnswer(command.attempt, prepared)

    async def _conduct(self, command: migration.Conduct) -> migration.Event:
        course = self._course
        record = course.record if course else None
        if record is None or record.destination is None:
            return migration.Finished()
        order = ConductOrder(
            attempt=self._ref(command.attempt),
            epoch=self._tools.epoch,
            prepared=command.prepared,
            destination=record.destination,
            policy=self._spec.policy,
            previous_reason=command.previous_reason,
            shard=self._tools.shard,
        )
        try:
            agent, _ = await self._agent(record.owner.host)
            await agent.conduct_attempt(order)
        except (DroverError, StoreUnavailable) as error:
            return await self._call_failed(command.attempt, error)
        return migration.ConductAnswer(command.attempt)

    async def _call_failed(self, attempt: int, error: DroverError | StoreUnavailable) -> migration.Event:
        """An agent that says STALE_EPOCH while ours stands is wrong, which ends this attempt and nothing else.

        Raises Deposed.
        """
        if isinstance(error, DroverError) and error.reason is RefusalReason.STALE_EPOCH:
            await until_available(lambda: must_lead(self._tools.store, self._tools.epoch, self._tools.shard))
            log.error("an agent calls our epoch stale, the ledger does not", attempt=attempt, error=error.message)
        return _refused(attempt, error)

    async def _report(self, command: migration.FetchReport) -> AttemptReport:
        """The source agent's report completed from the records; waits for its end, but not for ever."""
        nodes = await self._read()
        told: AttemptReport | None = None
        deadline = self._tools.clock_s() + REPORT_WAIT_S
        while self._tools.clock_s() < deadline:
            try:
                agent, _ = await self._agent(nodes.state.source)
                seen = await agent.get_attempt(self._spec.id, command.attempt)
            except DroverError:
                pass
            else:
                told = seen.report if seen.known else None
                if seen.ended or not seen.known:
                    break
            await asyncio.sleep(REPORT_POLL_S)
        return await self._completed(command, nodes, told)

    async def _completed(
        self, command: migration.FetchReport, nodes: _Nodes, told: AttemptReport | None
    ) -> AttemptReport:
        """What the record says outranks what the agent says: the record was the decision."""
        record = nodes.record
        ours = record is not None and record.migration == self._spec.id and record.attempt == command.attempt
        report = told or AttemptReport(attempt=command.attempt, outcome=command.outcome)
        report = replace(
            report,
            attempt=command.attempt,
            outcome=command.outcome,
            source=nodes.state.source,
            destination=nodes.state.destination,
            duration_ms=report.duration_ms or self._attempt_ms(),
        )
        said = nodes.state.message if ours and command.outcome == "ABORTED" else ""  # by `_abort`
        if not report.message and (said or told is None):
            report = replace(report, message=said or "the source agent has no report of this attempt")
        if record is None or not ours:
            return report
        if command.outcome == "ABORTED":
            mzxid = nodes.guest.mzxid if nodes.guest else 0
            devices = record.devices or report.devices
            report = replace(report, reason=record.reason, devices=devices, zxid=report.zxid or mzxid)
        requests = _decode_or(Requests, await self._tools.store.read(paths.requests(self._spec.id)), Requests())
        acks = _decode_or(Requests, await self._tools.store.read(paths.acks(self._spec.id)), Requests())
        return replace(
            report,
            inc=record.inc or report.inc,
            requests=report.requests or requests.entries,
            acks=report.acks or acks.entries,
        )


def spent_every_s(policy: MigrationPolicy) -> float:
    """How often what is spent of a migration's budgets is written down."""
    return max(SPENT_S, SPENT_PART * min(policy.precopy_timeout_ms, policy.total_timeout_ms) / 1000)


def _writer() -> str:
    return f"coordinator-{uuid.uuid4().hex}"


def _decode_or(kind: type[T], node: Versioned | None, default: T) -> T:
    return decode(kind, node.data) if node is not None and node.data else default


def _put(path: str, data: bytes, node: Versioned | None) -> Op:
    return Create(path, data) if node is None else SetData(path, data, node.version)


def _peer(host: HostRecord) -> Endpoint:
    """Raises WRONG_ENDPOINT when a host has registered something else than an address."""
    try:
        return Endpoint.parse(host.peer_address)
    except ValueError as error:
        raise DroverError(RefusalReason.WRONG_ENDPOINT, f"{host.name}: {error}") from error


def _refused(attempt: int, error: DroverError | StoreUnavailable) -> migration.Event:
    if isinstance(error, StoreUnavailable):
        return migration.CallRefused(attempt, RefusalReason.LEDGER_UNREACHABLE, str(error), unreachable=True)
    return migration.CallRefused(attempt, error.reason, error.message, unreachable=error.reason in _REPEATED)
