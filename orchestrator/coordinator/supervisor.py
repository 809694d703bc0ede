"""The leading coordinator: elected through the store, adopts what is unfinished, admits, hands out, runs evacuations.

Leadership is one transaction that moves `epoch` and creates `leader`; the version of `epoch` is the epoch. Being leader
is never assumed afterwards: each write checks the epoch, so a coordinator that froze cannot write when it wakes (H12).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from orchestrator.coordinator.deaths import DeathRunner
from orchestrator.coordinator.driver import STORE_RETRY_S, WAITING, Deposed, epoch_write, must_lead
from orchestrator.coordinator.evacuations import EvacuationRunner
from orchestrator.coordinator.orphans import PASS_S as ORPHANS_S
from orchestrator.coordinator.orphans import Orphans
from orchestrator.coordinator.places import Places
from orchestrator.coordinator.pool import WorkerLost
from orchestrator.coordinator.ports import AgentDirectory
from orchestrator.coordinator.quarantine import Quarantine
from orchestrator.coordinator.retention import PASS_S, Keeping
from orchestrator.coordinator.rights import PASS_S as RIGHTS_S
from orchestrator.coordinator.rights import Rights
from orchestrator.coordinator.upgrade import Upgrade
from orchestrator.core.handover import GuestRecord
from orchestrator.core.records import Leader, MigrationSpec, MigrationState, Shards
from orchestrator.core.retention import Retention
from orchestrator.core.shards import MAX_SHARDS, Share
from orchestrator.fencing.base import Fencers
from orchestrator.history import HistoryFile
from orchestrator.ledger import active, incarnation, layout, paths
from orchestrator.ledger.gather import each
from orchestrator.ledger.index import Index
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.ledger.store import (
    Check,
    Conflict,
    Create,
    Delete,
    Done,
    Op,
    OutcomeUnknown,
    SessionState,
    SetData,
    Store,
    StoreUnavailable,
    Versioned,
)
from orchestrator.tasks import Tasks, failures

log = structlog.get_logger(__name__)

LEDGER = "the ledger"
"""`Status.waiting_for` while ZooKeeper does not answer."""
ELECTION_POLL_S = 0.25
YIELD_S = 3.0
"""A shard that nobody leads is left for so long to the seat that should lead it."""
SEAT_TAKEN_S = 1.0
"""While another leads its place is watched, and looked at this often all the same."""
WORKER_RETRY_S = 0.3
ROOM_AGAIN_S = 1.0
ROOM_AGAIN_MAX_S = 10.0
"""A migration that waits for room looks for it at first this often, and in the end this seldom."""
WORKERS_LOST = 3
"""A migration that lost this many workers in a row is set aside: it may be what ends them."""
LOOK_RETRY_S = 0.5
LOOK_S = 1.0
"""While nothing moves, the leader makes sure this often that the ledger answers."""
NET_S = 30.0
"""And looks this often at the whole active set, whatever the watch said."""
POWER_S = 2.0
"""Between two looks at "safe to power off" of jobs that are over."""
TELL_S = 0.2
"""The list of what is set aside is written at most so often."""
HEALTHY_S = 30.0
"""What has worked for this long after it was set aside is no longer set aside."""


Dispatch = Callable[[str, int], Awaitable[str]]
"""(migration, epoch) -> terminal phase, or "DEPOSED". Raises WorkerLost."""

Spawn = Callable[[Coroutine[Any, Any, None]], None]
"""Run it until this leadership is over; Deposed ends the leadership."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Admission. Starting 1,000 at once makes every ledger write wait for all the others; 125/s keeps p99 at 26 ms."""

    starts_per_s: float = 125.0
    """Migrations that begin, in the long run."""
    burst: int = 10
    """So many may begin at once."""
    max_concurrent: int = 1_000
    """Migrations under way at a time."""
    max_per_source: int = 8
    """Migrations leaving one host at a time; they share its link."""


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
    """For the health answer."""

    leading: bool = False
    epoch: int = -1
    waiting_for: str = LEDGER
    """What keeps it from leading, or from looking; empty while all is well."""
    progress: int = 0
    """Rises with each whole look of a leader, and while another coordinator is seen to lead: one that stands still is
    stuck, whatever else it does."""
    driving: int = 0
    jobs: int = 0
    quarantined: int = 0
    adopted: int = 0
    finished: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(slots=True)
class _News:
    """What was announced of the active set and not looked at yet."""

    moved: set[str] = field(default_factory=set[str])
    everything: bool = False
    net_at_s: float = 0.0
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    def announced(self, path: str | None) -> None:
        if path is None:
            self.everything = True
        else:
            self.moved.add(path)
        self.woken.set()


class Supervisor:
    """Leads one shard of the fleet, which is all of it as a rule.

    `name` identifies this coordinator's seat: a new process on the same seat replaces the leader that sat there.
    `limits` are those of the share.
    """

    def __init__(
        self,
        store: Store,
        dispatch: Dispatch,
        *,
        agents: AgentDirectory,
        fencers: Fencers | None = None,
        name: str = "coordinator",
        limits: Limits = Limits(),
        quarantine: Quarantine | None = None,
        retention: Retention | None = None,
        history: HistoryFile | None = None,
        share: Share = Share(),
        index: Index | None = None,
    ) -> None:
        self._store = store
        self._dispatch = dispatch
        self._agents = agents
        self._fencers = fencers or Fencers()
        self._limits = limits
        self._me = Leader(name, uuid.uuid4().hex)
        self._may_usurp = True
        self._share = share
        self._leader, self._epoch_path = paths.leader(share.shard), paths.epoch(share.shard)
        self._set_aside = paths.quarantine(share.shard)
        self._bucket = TokenBucket(limits.starts_per_s, limits.burst)
        self._places = Places(
            store, max_concurrent=limits.max_concurrent, max_per_source=limits.max_per_source, shard=share.shard
        )
        self._others: set[str] = set()
        """Nodes of the active set that belong to other shards."""
        self.prefers_another = False
        """Another seat that is there should lead this shard: it gets the time to."""
        self._hand_over = asyncio.Event()
        self._lost = asyncio.Event()
        self._index = index or Index(store)
        self._retention = retention or Retention()
        self._history = history
        self._known: set[str] = set()
        """Nodes of the active set whose migrations and jobs are seen through just now."""
        self._nudged = asyncio.Event()
        self._quarantine = Quarantine() if quarantine is None else quarantine
        self.status = Status()
        store.on_session(self._session)

    def _session(self, state: SessionState) -> None:
        if state is SessionState.LOST:
            self._lost.set()

    def set_aside(self) -> Counter[tuple[str, ...]]:
        """How many resources are quarantined, by kind and by the error that did it."""
        entries = self._quarantine.entries()
        return Counter((entry.resource.partition("/")[0], entry.reason.partition(":")[0]) for entry in entries)

    def queued(self) -> Counter[tuple[str, ...]]:
        """How many migrations wait for their turn, by what keeps them: SOURCE or CLUSTER."""
        return Counter((turn,) for turn in self._places.turns())

    async def run(self) -> None:
        """Campaign, lead until deposed, campaign again; for ever, whatever is raised below."""
        while True:
            epoch = await self.elect()
            log.info("leading", epoch=epoch, shard=self._share.shard)
            self.status.leading, self.status.epoch, self.status.waiting_for = True, epoch, ""
            try:
                await self._lead(epoch)
            except Exception:
                log.exception("leadership failed", epoch=epoch)
            finally:
                self.status.leading = False
                self._known, self._others = set(), set()
            log.warning("leads no longer", epoch=epoch)
            await self.step_down()

    # --- election -----------------------------------------------------------------------------------------------------

    async def elect(self) -> int:
        """Returns the epoch once this coordinator leads; `status.waiting_for` says what keeps it from that."""
        moved = asyncio.Event()
        unwatch = self._store.watch(self._leader, lambda _seat: moved.set())
        free_since_s: float | None = None
        try:
            while True:
                epoch = None
                moved.clear()
                pause_s = ELECTION_POLL_S
                try:
                    if await self._is_taken():
                        pause_s, free_since_s = SEAT_TAKEN_S, None
                    elif self._should_wait(free_since_s := free_since_s or time.monotonic()):
                        self.status.waiting_for = "the seat that should lead"
                        self.status.progress += 1
                    else:
                        epoch = await self._stand()
                except StoreUnavailable:
                    self.status.waiting_for = LEDGER
                except Exception as error:
                    log.exception("campaign failed")
                    self.status.waiting_for = f"a campaign that does not fail: {error!r}"
                if epoch is not None:
                    self._may_usurp = False
                    return epoch
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await moved.wait()
        finally:
            unwatch()

    async def _is_taken(self) -> bool:
        """By another's leadership, as far as one read can tell: that is all which a coordinator does that waits."""
        seat = await self._store.read(self._leader)
        return seat is not None and not self._may_take(seat)

    def _should_wait(self, free_since_s: float) -> bool:
        """For another seat, which should lead this shard. Not for long: one that is there need not be well."""
        return self.prefers_another and time.monotonic() - free_since_s < YIELD_S

    def hand_over(self) -> None:
        """End this leadership, for the seat that should lead the shard."""
        self._hand_over.set()

    async def _agreed(self) -> int | None:
        """The version of the node that says into how many shards the fleet is shared out, once it says what this
        coordinator was told. Nobody may lead while that changes, and nobody who led before may write afterwards."""
        await self._store.ensure(paths.SHARDS)
        node = await self._store.read(paths.SHARDS)
        if node is None:
            return None
        before = decode(Shards, node.data or b"{}", path=paths.SHARDS).count
        if before == self._share.shards:
            return node.version
        self.status.waiting_for = (
            f"leaders of a fleet in {before} shards: this coordinator was told {self._share.shards} (`shards`)"
        )
        self.status.progress += 1
        ops: list[Op] = [SetData(paths.SHARDS, encode(Shards(self._share.shards)), node.version)]
        for shard in range(min(before, MAX_SHARDS)):
            if await self._store.read(paths.leader(shard)) is not None:
                return None
            epoch = await self._store.read(paths.epoch(shard))
            if epoch is not None:
                ops += [Create(paths.leader(shard), b""), Delete(paths.leader(shard), 0)]  # nobody leads
                ops.append(SetData(paths.epoch(shard), epoch.data, epoch.version))
        result = await self._store.multi(ops)
        log.warning("the fleet is shared out anew", before=before, shards=self._share.shards, result=str(result))
        return result.versions[0] if isinstance(result, Done) else None

    async def _stand(self) -> int | None:
        self._lost.clear()
        if wrong := await self._too_new():
            self.status.waiting_for = wrong
            self.status.progress += 1
            return None
        self._hand_over.clear()
        active_set = (paths.ACTIVE_MIGRATIONS, paths.ACTIVE_EVACUATIONS, paths.ENDED_EVACUATIONS)
        for path in (self._epoch_path, self._set_aside, *active_set):
            await self._store.ensure(path)
        await self._store.barrier()  # H13: the first read of a session is not older than it
        return await self._campaign()

    async def _too_new(self) -> str:
        """Why a coordinator of this version may not lead; empty when it may. An older layout is upgraded by the leader
        of shard 0, and the others wait for that."""
        try:
            await layout.must_be_ours(self._store)
        except layout.WrongLayout as wrong:
            return str(wrong) if wrong.newer or self._share.shard else ""
        return ""

    async def _campaign(self) -> int | None:
        agreed = await self._agreed()
        if agreed is None:
            return None
        seat = await self._store.read(self._leader)
        node = await self._store.read(self._epoch_path)
        if node is None:
            return None
        me = replace(self._me, write=uuid.uuid4().hex)
        ops: list[Op] = [SetData(self._epoch_path, encode(me), node.version)]
        if seat is not None:
            if not self._may_take(seat):
                return None
            ops.append(Delete(self._leader, seat.version))
        ops += [Create(self._leader, encode(me), ephemeral=True), Check(paths.SHARDS, agreed)]
        result = await self._store.multi(ops)
        match result:
            case Done():
                return result.versions[0]
            case OutcomeUnknown(sent=True):
                return await self._was_elected(me)
            case Conflict():
                self.status.waiting_for = "the end of a race for the seat"
                return None
            case OutcomeUnknown():
                self.status.waiting_for = LEDGER
                return None

    def _may_take(self, seat: Versioned) -> bool:
        """Its own seat, from a leadership that it gave up while its session lived; or, once, a predecessor's."""
        try:
            holder = decode(Leader, seat.data, path=self._leader)
        except BadRecord as error:
            self.status.waiting_for = f"a seat that cannot be read: {error}"
            # Somebody sits there, perhaps of a newer version: this one waits well, and no restart would help it.
            self.status.progress += 1
            return False
        if holder.id == self._me.id or (holder.name == self._me.name and self._may_usurp):
            return True
        self.status.waiting_for = f"{holder.name} leads"
        self.status.progress += 1
        return False

    async def _was_elected(self, me: Leader) -> int | None:
        await self._store.barrier()
        seat = await self._store.read(self._leader)
        node = await self._store.read(self._epoch_path)
        mine = encode(me)
        return node.version if seat and node and seat.data == mine and node.data == mine else None

    async def step_down(self) -> None:
        """Free the seat, so that whoever campaigns next wins at once. Where the ledger does not answer the seat goes
        with the session, and this coordinator's next campaign takes it from itself."""
        try:
            await self._store.barrier()
            seat = await self._store.read(self._leader)
            if seat is not None and decode(Leader, seat.data, path=self._leader).id == self._me.id:
                await self._store.multi([Delete(self._leader, seat.version)])
        except (StoreUnavailable, BadRecord) as error:
            log.warning("the seat is not freed", error=str(error))

    # --- leading ------------------------------------------------------------------------------------------------------

    async def _lead(self, epoch: int) -> None:
        """Returns when leadership is over: session lost, or a write found another epoch; nothing else ends it."""
        over = asyncio.Event()
        tasks = Tasks("leader")

        def failed(error: BaseException) -> None:
            if not isinstance(error, Deposed):
                log.error("the leader cannot go on", exc_info=error)
            over.set()

        def spawn(work: Coroutine[Any, Any, None]) -> None:
            tasks.spawn(work, work.__name__, failed=failed)

        self._quarantine.clear_all()
        runner = EvacuationRunner(self._store, self._index, epoch, self._nudged, self._agents, share=self._share)
        spawn(self._until_set(self._lost, over))
        spawn(self._until_set(self._hand_over, over))
        if self._share.shard == 0:
            upgrade = tasks.spawn(Upgrade(self._store, epoch, self._upgrading).run(), "upgrade", failed=failed)
            if upgrade is not None:
                await asyncio.wait({upgrade, asyncio.ensure_future(over.wait())}, return_when=asyncio.FIRST_COMPLETED)
            tasks.spawn(incarnation.given(self._store), "name of the ledger", failed=failed)
        spawn(self._discover(epoch, runner, spawn))
        spawn(self._for_ever(lambda: self._places.tend(epoch), "places of those who wait", 0.0))
        keeping = Keeping(self._store, self._index, epoch, self._retention, self._history)
        if self._share.shard == 0:  # what concerns hosts, or the ledger, as a whole
            deaths = DeathRunner(self._store, self._agents, self._index, epoch, self._fencers)
            spawn(self._for_ever(deaths.run, "deaths of hosts", 1.0))
            spawn(self._for_ever(keeping.run, "retention", PASS_S))
            spawn(self._for_ever(Rights(self._store).set_right, "rights", RIGHTS_S))
        orphans = Orphans(self._store, self._index, self._agents, epoch, share=self._share)

        async def end_orphans() -> None:
            await asyncio.sleep(ORPHANS_S)  # first: what this leader adopts is not known yet
            await orphans.look(self._is_driven)

        spawn(self._for_ever(end_orphans, "guests without a migration", 0.0))
        spawn(self._for_ever(runner.refresh_ended, "refresh of evacuations that ended", POWER_S))
        spawn(self._for_ever(lambda: self._tell_quarantine(epoch), "list of what is set aside", TELL_S))
        try:
            await over.wait()
        finally:
            await tasks.close()
            await keeping.close()

    async def _for_ever(self, work: Callable[[], Awaitable[None]], what: str, every_s: float) -> None:
        """Raises Deposed; whatever else `work` raises is logged, and it is called again."""
        while True:
            try:
                await work()
            except (Deposed, asyncio.CancelledError):
                raise
            except StoreUnavailable:
                pass
            except Exception as error:
                failures[what] += 1
                log.error("failed, trying again", what=what, exc_info=error)
            await asyncio.sleep(every_s)

    async def _tell_quarantine(self, epoch: int) -> None:
        await self._quarantine.changed.wait()
        self._quarantine.changed.clear()
        told = self._quarantine.list()
        self.status.quarantined = len(self._quarantine)
        node = await self._store.read(self._set_aside)
        if node is None:
            await self._store.ensure(self._set_aside)
        elif node.data == encode(told) or await self._write(
            epoch, [SetData(self._set_aside, encode(told), node.version)]
        ):
            return
        self._quarantine.changed.set()

    def _upgrading(self, said: str) -> None:
        self.status.waiting_for = said
        self.status.progress += 1

    async def _until_set(self, end: asyncio.Event, over: asyncio.Event) -> None:
        await end.wait()
        over.set()

    async def _discover(self, epoch: int, runner: EvacuationRunner, spawn: Spawn) -> None:
        """Find migrations and jobs in the active set: what is over costs nothing, however much of it there is."""
        news = _News()
        stop = self._store.watch_tree([paths.ACTIVE_MIGRATIONS, paths.ACTIVE_EVACUATIONS], news.announced)
        try:
            while True:
                news.woken.clear()
                try:
                    for path in await self._found(news):
                        self._adopt(path, epoch, runner, spawn)
                except StoreUnavailable:
                    self.status.waiting_for = LEDGER
                    await asyncio.sleep(STORE_RETRY_S)
                    continue
                except Exception as error:
                    self.status.waiting_for = f"a look that does not fail: {error!r}"
                    log.error("a look at the ledger failed", exc_info=error)
                    await asyncio.sleep(LOOK_RETRY_S)
                    continue
                self.status.progress += 1
                self.status.waiting_for = ""
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await news.woken.wait()
        finally:
            stop()

    async def _found(self, news: _News) -> list[str]:
        """Nodes of the active set that are not known yet. Without news it reads as well: a leader to whom the ledger
        does not answer makes no progress. On StoreUnavailable what was announced is looked at the next time."""
        roots = (paths.ACTIVE_MIGRATIONS, paths.ACTIVE_EVACUATIONS)
        announced, news.moved = news.moved, set()
        whole = news.everything or time.monotonic() >= news.net_at_s
        try:
            if whole:
                found = [f"{root}/{name}" for root in roots for name in await self._store.children(root)]
                self._others.intersection_update(found)
            else:
                if not announced:
                    await self._store.children(paths.ACTIVE)
                found = [path for path in announced if path not in roots]
            found = [path for path in found if path not in self._known and path not in self._others]
            if not whole or self._share.shards > 1:
                nodes = zip(found, await each(found, self._store.read), strict=True)
                found = [path for path, node in nodes if node is not None and self._is_mine(path, node)]
        except BaseException:
            news.moved |= announced
            raise
        if whole:
            news.everything, news.net_at_s = False, time.monotonic() + NET_S
        return found

    def _is_mine(self, path: str, node: Versioned) -> bool:
        """Whether a migration's guest, or a job, belongs to this shard. A node that cannot be read is shard 0's to set
        aside."""
        root, _, name = path.rpartition("/")
        if root == paths.ACTIVE_MIGRATIONS and self._share.shards > 1:
            try:
                name = str(json.loads(node.data))
            except ValueError:
                return self._share.shard == 0
        mine = self._share.has(name)
        if not mine:
            self._others.add(path)
        return mine

    async def _guarded(self, resource: str, work: Callable[[], Awaitable[None]]) -> None:
        """See one migration or job to its end. Whatever it raises sets it aside, and nothing else; it is tried again.

        Raises Deposed.
        """
        while True:
            task = asyncio.ensure_future(work())
            try:
                await asyncio.wait({task}, timeout=HEALTHY_S)
                if not task.done():
                    self._quarantine.clear(resource)
                await task
            except Deposed:
                raise
            except StoreUnavailable:
                await asyncio.sleep(STORE_RETRY_S)
            except Exception as error:
                await asyncio.sleep(self._quarantine.fail(resource, error))
            else:
                self._quarantine.clear(resource)
                return
            finally:
                task.cancel()

    def _adopt(self, path: str, epoch: int, runner: EvacuationRunner, spawn: Spawn) -> None:
        """`path`: a node of the active set. Known until it is over."""
        root, _, name = path.rpartition("/")
        self._known.add(path)
        if root == paths.ACTIVE_MIGRATIONS:
            spawn(self._see_through(path, f"migrations/{name}", lambda: self._drive(name, epoch)))
        else:
            spawn(self._see_through(path, f"evacuations/{name}", lambda: self._job(name, runner)))

    def _is_driven(self, migration: str) -> bool:
        return paths.active_migration(migration) in self._known

    async def _see_through(self, path: str, resource: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await self._guarded(resource, work)
        finally:
            self._known.discard(path)

    async def _job(self, job: str, runner: EvacuationRunner) -> None:
        self.status.jobs += 1
        try:
            await runner.run(job)
        finally:
            self.status.jobs -= 1

    async def _read_state(self, migration: str, epoch: int) -> tuple[MigrationSpec, MigrationState, str] | None:
        """With the source host; None when the migration is over, or there is none."""
        while True:
            try:
                node = await self._store.read(paths.migration_state(migration))
                if node is None:
                    await self._leave_active_set(migration, epoch)
                    return None
                state = decode(MigrationState, node.data, path=paths.migration_state(migration))
                if state.phase.terminal:
                    await self._leave_active_set(migration, epoch)
                    return None
                spec_node = await self._store.read(paths.migration(migration))
                spec = decode(MigrationSpec, spec_node.data if spec_node else b"", path=paths.migration(migration))
                return spec, state, state.source or await self._source_of(spec)
            except StoreUnavailable:
                await asyncio.sleep(STORE_RETRY_S)

    async def _leave_active_set(self, migration: str, epoch: int) -> None:
        """Whoever ended it took it out, so there is nothing to do as a rule."""
        if leave := await active.migration_ends(self._store, migration):
            await self._write(epoch, leave)

    async def _write(self, epoch: int, ops: Sequence[Op]) -> bool:
        return await epoch_write(self._store, epoch, ops, self._share.shard)

    async def _source_of(self, spec: MigrationSpec) -> str:
        node = await self._store.read(paths.guest(spec.guest))
        return decode(GuestRecord, node.data, path=paths.guest(spec.guest)).owner.host if node else ""

    async def _drive(self, migration: str, epoch: int) -> None:
        """Admit one migration and see it to its end, in as many turns and under as many workers as it takes."""
        again_s, waited_s = ROOM_AGAIN_S, 0.0
        while True:
            found = await self._read_state(migration, epoch)
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
        lost = 0
        try:
            while True:
                try:
                    phase = await self._dispatch(migration, epoch)
                except WorkerLost as error:
                    lost += 1
                    log.warning("worker lost", migration=migration, error=str(error), in_a_row=lost)
                    if lost >= WORKERS_LOST:
                        raise
                    await asyncio.sleep(WORKER_RETRY_S)
                    continue
                if phase == "DEPOSED":
                    await must_lead(self._store, epoch, self._share.shard)
                    raise WorkerLost(f"its worker believes that epoch {epoch} is over, the ledger does not")
                if phase == WAITING:
                    return phase
                log.info("migration ended", migration=migration, phase=phase)
                self.status.finished[phase] = self.status.finished.get(phase, 0) + 1
                self._nudged.set()
                return phase
        finally:
            self.status.driving -= 1
