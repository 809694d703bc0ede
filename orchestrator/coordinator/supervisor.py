"""The leading coordinator: elected through the store, adopts what is unfinished, admits, hands out, runs evacuations.

Leadership is one transaction that moves `epoch` and creates `leader`; the version of `epoch` is the epoch. Being leader
is never assumed afterwards: each write checks the epoch, so a coordinator that froze cannot write when it wakes (H12).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import structlog

from orchestrator.coordinator.deaths import DeathRunner
from orchestrator.coordinator.driver import STORE_RETRY_S, WAITING, Deposed
from orchestrator.coordinator.evacuations import EvacuationRunner
from orchestrator.coordinator.places import Places
from orchestrator.coordinator.ports import AgentDirectory
from orchestrator.core.handover import GuestRecord
from orchestrator.core.records import MigrationSpec, MigrationState
from orchestrator.fencing.base import Fencers
from orchestrator.ledger import paths
from orchestrator.ledger.inventory import Inventory
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.ledger.store import (
    Create,
    Delete,
    Done,
    Op,
    OutcomeUnknown,
    SessionState,
    SetData,
    Store,
    StoreUnavailable,
)

log = structlog.get_logger(__name__)

ELECTION_POLL_S = 0.25
WORKER_RETRY_S = 0.3
BAD_RECORD_RETRY_S = 10.0
ROOM_AGAIN_S = 1.0
ROOM_AGAIN_MAX_S = 10.0
"""A migration that waits for room looks for it at first this often, and in the end this seldom."""


class WorkerLost(Exception):
    """The worker that drove a migration died; the migration goes on as its records say, under another worker."""


Dispatch = Callable[[str, int], Awaitable[str]]
"""(migration, epoch) -> terminal phase, or "DEPOSED". Raises WorkerLost."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Admission. Starting 1,000 at once makes every ledger write wait for all the others; 125/s keeps p99 at 26 ms."""

    starts_per_s: float = 125.0
    burst: int = 10
    max_concurrent: int = 1_000
    max_per_source: int = 8
    """Migrations leaving one host at a time; they share its link."""


@dataclass(frozen=True, slots=True)
class Leader:
    """Content of `leader` and of `epoch`."""

    name: str
    id: str


class TokenBucket:
    """At most `rate` per second in the long run, `burst` at once."""

    def __init__(self, rate: float, burst: int, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = burst
        self._clock_s = clock_s
        self._tokens = float(burst)
        self._at_s = clock_s()
        self._turn = asyncio.Lock()

    async def take(self) -> None:
        """Waits for a token; first come, first served."""
        async with self._turn:
            now = self._clock_s()
            self._tokens = min(float(self._burst), self._tokens + (now - self._at_s) * self._rate)
            self._at_s = now
            self._tokens -= 1
            if self._tokens < 0:
                await asyncio.sleep(-self._tokens / self._rate)


@dataclass(slots=True)
class Status:
    """For the health answer: a supervisor whose `turns` stand still is stuck."""

    leading: bool = False
    epoch: int = -1
    driving: int = 0
    jobs: int = 0
    turns: int = 0
    adopted: int = 0
    finished: dict[str, int] = field(default_factory=dict[str, int])


class Supervisor:
    """`name` identifies this coordinator's seat: a new process on the same seat replaces the leader that sat there."""

    def __init__(
        self,
        store: Store,
        dispatch: Dispatch,
        *,
        agents: AgentDirectory,
        fencers: Fencers | None = None,
        name: str = "coordinator",
        limits: Limits = Limits(),
    ) -> None:
        self._store = store
        self._dispatch = dispatch
        self._agents = agents
        self._fencers = fencers or Fencers()
        self._limits = limits
        self._me = Leader(name, uuid.uuid4().hex)
        self._may_usurp = True
        self._bucket = TokenBucket(limits.starts_per_s, limits.burst)
        self._places = Places(store, max_concurrent=limits.max_concurrent, max_per_source=limits.max_per_source)
        self._lost = asyncio.Event()
        self._known: set[str] = set()
        self._jobs: set[str] = set()
        self._nudged = asyncio.Event()
        self.status = Status()
        store.on_session(self._session)

    def _session(self, state: SessionState) -> None:
        if state is SessionState.LOST:
            self._lost.set()

    async def run(self) -> None:
        """Campaign, lead until deposed, campaign again; for ever."""
        while True:
            epoch = await self.elect()
            log.info("leading", epoch=epoch)
            self.status.leading, self.status.epoch = True, epoch
            try:
                await self._lead(epoch)
            finally:
                self.status.leading = False
                self._known, self._jobs = set(), set()
            log.warning("deposed", epoch=epoch)

    # --- election -----------------------------------------------------------------------------------------------------

    async def elect(self) -> int:
        """Returns the epoch once this coordinator leads."""
        while True:
            self.status.turns += 1
            try:
                self._lost.clear()
                await self._store.ensure(paths.epoch())
                await self._store.ensure(paths.MIGRATIONS)
                await self._store.ensure(paths.EVACUATIONS)
                await self._store.barrier()  # H13: the first read of a session is not older than it
                epoch = await self._campaign()
            except StoreUnavailable:
                epoch = None
            if epoch is not None:
                self._may_usurp = False
                return epoch
            await asyncio.sleep(ELECTION_POLL_S)

    async def _campaign(self) -> int | None:
        seat = await self._store.read(paths.leader())
        node = await self._store.read(paths.epoch())
        if node is None:
            return None
        ops: list[Op] = [SetData(paths.epoch(), encode(self._me), node.version)]
        if seat is not None:
            holder = decode(Leader, seat.data, path=paths.leader())
            if holder.name != self._me.name or not self._may_usurp:
                return None
            ops.append(Delete(paths.leader(), seat.version))
        ops.append(Create(paths.leader(), encode(self._me), ephemeral=True))
        result = await self._store.multi(ops)
        match result:
            case Done():
                return result.versions[0]
            case OutcomeUnknown(sent=True):
                return await self._was_elected()
            case _:
                return None

    async def _was_elected(self) -> int | None:
        await self._store.barrier()
        seat = await self._store.read(paths.leader())
        node = await self._store.read(paths.epoch())
        mine = encode(self._me)
        return node.version if seat and node and seat.data == mine and node.data == mine else None

    # --- leading ------------------------------------------------------------------------------------------------------

    async def _lead(self, epoch: int) -> None:
        """Returns when leadership is over: the session is lost, or a write found another epoch."""
        tasks: set[asyncio.Task[None]] = set()
        over = asyncio.Event()

        def spawn(work: Coroutine[Any, Any, None]) -> None:
            task = asyncio.create_task(self._until_deposed(work, over))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        spawn(self._watch_lost(over))
        spawn(self._discover(epoch, spawn))
        try:
            await over.wait()
        finally:
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_deposed(self, work: Coroutine[Any, Any, None], over: asyncio.Event) -> None:
        """Deposed ends the leadership; anything else unexpected ends it too, loudly, and a new election follows."""
        try:
            await work
        except Deposed:
            over.set()
        except Exception:
            log.exception("leader task failed")
            await asyncio.sleep(1.0)
            over.set()

    async def _watch_lost(self, over: asyncio.Event) -> None:
        await self._lost.wait()
        over.set()

    async def _discover(self, epoch: int, spawn: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        """Find migrations and jobs by watch, with a slow full look as a net."""
        woken = asyncio.Event()
        stops = [
            self._store.watch_children(paths.MIGRATIONS, lambda _names: woken.set()),
            self._store.watch_children(paths.EVACUATIONS, lambda _names: woken.set()),
        ]
        shards: set[str] = set()
        runner = EvacuationRunner(self._store, Inventory(self._store), epoch, self._nudged, self._agents)
        spawn(self._guard_power(runner))
        spawn(self._places.tend(epoch))
        spawn(DeathRunner(self._store, self._agents, Inventory(self._store), epoch, self._fencers).run())
        try:
            while True:
                self.status.turns += 1
                woken.clear()
                try:
                    for shard in await self._store.children(paths.MIGRATIONS):
                        path = f"{paths.MIGRATIONS}/{shard}"
                        if shard not in shards:
                            shards.add(shard)
                            stops.append(self._store.watch_children(path, lambda _names: woken.set()))
                        for migration in await self._store.children(path):
                            self._adopt(migration, epoch, spawn)
                    for job in await self._store.children(paths.EVACUATIONS):
                        self._adopt_job(job, runner, spawn)
                except StoreUnavailable:
                    await asyncio.sleep(STORE_RETRY_S)
                    continue
                try:
                    async with asyncio.timeout(1.0):
                        await woken.wait()
                except TimeoutError:
                    pass
        finally:
            for stop in stops:
                stop()

    def _adopt(self, migration: str, epoch: int, spawn: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        if migration not in self._known:
            self._known.add(migration)
            spawn(self._drive(migration, epoch))

    def _adopt_job(
        self, job: str, runner: EvacuationRunner, spawn: Callable[[Coroutine[Any, Any, None]], None]
    ) -> None:
        if job not in self._jobs:
            self._jobs.add(job)
            spawn(self._job(job, runner))

    async def _job(self, job: str, runner: EvacuationRunner) -> None:
        self.status.jobs += 1
        try:
            await runner.run(job)
        except BadRecord as error:
            log.error("evacuation cannot be read", evacuation=job, error=str(error))
        finally:
            self.status.jobs -= 1

    async def _guard_power(self, runner: EvacuationRunner) -> None:
        while True:
            await runner.refresh_ended()
            await asyncio.sleep(2.0)

    async def _read_state(self, migration: str) -> tuple[MigrationSpec, MigrationState, str] | None:
        """With the source host; None when the migration is over, or not written as a whole yet."""
        while True:
            try:
                node = await self._store.read(paths.migration_state(migration))
                if node is None or not node.data:
                    self._known.discard(migration)  # its creator is not through yet: the next look finds it again
                    return None
                state = decode(MigrationState, node.data, path=paths.migration_state(migration))
                if state.phase.terminal:
                    return None
                spec_node = await self._store.read(paths.migration(migration))
                spec = decode(MigrationSpec, spec_node.data if spec_node else b"", path=paths.migration(migration))
                return spec, state, state.source or await self._source_of(spec)
            except StoreUnavailable:
                await asyncio.sleep(STORE_RETRY_S)

    async def _source_of(self, spec: MigrationSpec) -> str:
        node = await self._store.read(paths.guest(spec.guest))
        return decode(GuestRecord, node.data, path=paths.guest(spec.guest)).owner.host if node else ""

    async def _drive(self, migration: str, epoch: int) -> None:
        """Admit one migration and see it to its end, in as many turns and under as many workers as it takes."""
        again_s, waited_s = ROOM_AGAIN_S, 0.0
        while True:
            try:
                found = await self._read_state(migration)
            except BadRecord as error:
                log.error("migration cannot be read", migration=migration, error=str(error))
                return
            if found is None or await self._take_turn(*found, waited_s, epoch) != WAITING:
                return
            await asyncio.sleep(again_s)
            waited_s, again_s = again_s, min(ROOM_AGAIN_MAX_S, again_s * 1.5)

    async def _take_turn(
        self, spec: MigrationSpec, state: MigrationState, source: str, waited_s: float, epoch: int
    ) -> str:
        if state.attempt > 0 and state.waiting_for is None:
            self.status.adopted += 1
            async with self._places.held(spec, source):
                return await self._dispatch_until_over(spec.id, epoch)
        async with self._places.turn(spec, source, state, epoch, waited_s=waited_s):
            await self._bucket.take()
            return await self._dispatch_until_over(spec.id, epoch)

    async def _dispatch_until_over(self, migration: str, epoch: int) -> str:
        """The terminal phase, or WAITING."""
        self.status.driving += 1
        try:
            while True:
                try:
                    phase = await self._dispatch(migration, epoch)
                except WorkerLost as error:
                    log.warning("worker lost", migration=migration, error=str(error))
                    await asyncio.sleep(WORKER_RETRY_S)
                    continue
                except BadRecord as error:
                    log.error("migration cannot be read", migration=migration, error=str(error))
                    await asyncio.sleep(BAD_RECORD_RETRY_S)
                    continue
                if phase == "DEPOSED":
                    raise Deposed(f"epoch {epoch} is over")
                if phase == WAITING:
                    return phase
                log.info("migration ended", migration=migration, phase=phase)
                self.status.finished[phase] = self.status.finished.get(phase, 0) + 1
                self._nudged.set()
                return phase
        finally:
            self.status.driving -= 1
