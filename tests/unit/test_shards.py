"""A fleet that is shared out: who leads which shard, what a shard's leader does, and what nobody may write any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from uuid import UUID, uuid5

import pytest

from agents.host.epoch import EpochGate
from agents.host.incarnation import Believed
from agents.host.journal import Journal
from orchestrator.api.health import cluster_health
from orchestrator.coordinator import shares as sharing
from orchestrator.coordinator.driver import Deposed, epoch_write
from orchestrator.coordinator.quarantine import Quarantine
from orchestrator.coordinator.seat import Seat
from orchestrator.coordinator.shares import Shares, share_limits, shares_of
from orchestrator.coordinator.supervisor import Limits, Supervisor
from orchestrator.coordinator.worker import Worker
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import Leader, MigrationPhase
from orchestrator.core.shards import Share, portion, preferred, shard_of
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.records import decode
from orchestrator.ledger.store import Create, Versioned
from tests.fakes.coordination import MemoryStore, World
from tests.fakes.coordinator import until

GUESTS = [str(uuid5(UUID(int=0), f"guest {number}")) for number in range(8)]


def test_every_process_finds_the_same_shard_and_shards_are_about_even() -> None:
    assert [shard_of(guest, 4) for guest in GUESTS[:4]] == [2, 0, 1, 1], "these must never change"
    assert {shard_of(guest, 1) for guest in GUESTS} == {0}
    counts = [0] * 4
    for number in range(4000):
        counts[shard_of(str(uuid5(UUID(int=1), str(number))), 4)] += 1
    assert min(counts) > 850
    assert all(sum(Share(shard, 3).has(guest) for shard in range(3)) == 1 for guest in GUESTS)


def test_seats_get_their_even_part_and_who_is_left_gets_all() -> None:
    assert [preferred(shard, ("b", "a")) for shard in range(4)] == ["a", "b", "a", "b"]
    assert {preferred(shard, ("b",)) for shard in range(4)} == {"b"}
    assert preferred(0, ()) == ""


def test_all_shards_together_keep_to_the_limits() -> None:
    limits = Limits(starts_per_s=100, burst=10, max_concurrent=1000, max_per_source=8)
    each = share_limits(limits, 4)
    assert (each.starts_per_s, each.burst, each.max_concurrent, each.max_per_source) == (25, 2, 250, 2)
    assert share_limits(limits, 1) == limits
    assert portion(3, 4) == 1, "a limit below the number of shards cannot be kept"


class ASeat:
    """A coordinator with a session of its own."""

    def __init__(self, world: World, name: str, shards: int = 2) -> None:
        self.name = name
        self.store = MemoryStore(world.store.tree)
        self.worker = Worker(self.store, world)
        self.supervisors = [self._supervisor(world, share) for share in shares_of(shards)]
        self.shares = Shares(self.store, name, self.supervisors)
        self._seat = Seat(self.store, name)
        self._tasks: list[asyncio.Task[None]] = []

    def _supervisor(self, world: World, share: Share) -> Supervisor:
        async def dispatch(migration: str, epoch: int) -> str:
            return await self.worker.drive(migration, epoch, share.shard)

        aside = Quarantine(first_s=0.05, longest_s=0.1)
        return Supervisor(self.store, dispatch, agents=world, name=self.name, share=share, quarantine=aside)

    async def __aenter__(self) -> ASeat:
        async def for_ever(look: Callable[[], Awaitable[None]]) -> None:
            while True:
                await look()

        await self._seat._enter()
        self._tasks = [asyncio.create_task(for_ever(self.shares.tend)), asyncio.create_task(self.shares.run())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.freeze()

    async def freeze(self) -> None:
        """It does nothing any more, and its session lapses."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.worker.stop()
        self.store.expire()

    def leads(self) -> list[int]:
        return [shard for shard, supervisor in enumerate(self.supervisors) if supervisor.status.leading]


@pytest.fixture
def world() -> World:
    world = World()
    for host in ("h1", "h2", "h3"):
        world.host(host, memory_mib=4096)
    for number, guest in enumerate(GUESTS):
        world.guest(guest, "h1")
        world.migration(f"m{number}", guest)
    return world


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "LOOK_S", 0.02)
    monkeypatch.setattr(sharing, "HAND_OVER_S", 0.1)


@asynccontextmanager
async def two(world: World) -> AsyncIterator[tuple[ASeat, ASeat]]:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(ASeat(world, "a"))
        other = await stack.enter_async_context(ASeat(world, "b"))
        await until(lambda: (one.leads(), other.leads()) == ([0], [1]))
        yield one, other


def all_succeeded(world: World) -> bool:
    return all(world.state(f"m{number}").phase is MigrationPhase.SUCCEEDED for number in range(len(GUESTS)))


def epoch_of(world: World, shard: int) -> int:
    return world.store.tree.nodes[paths.epoch(shard)].version


async def test_each_seat_leads_its_part_and_drives_its_guests_under_its_own_epoch(world: World) -> None:
    await world.store.ensure(paths.epoch(1))
    world.store.tree.nodes[paths.epoch(1)] = Versioned(b"", 40, 0)
    async with two(world):
        await until(lambda: all_succeeded(world))
    for number, guest in enumerate(GUESTS):
        assert world.record(guest).owner.host != "h1"
        assert world.state(f"m{number}").epoch == epoch_of(world, shard_of(guest, 2))
    assert epoch_of(world, 1) > 40 > epoch_of(world, 0)


async def test_the_survivor_takes_all_and_who_was_frozen_writes_nothing(world: World) -> None:
    async with two(world) as (one, other):
        before = epoch_of(world, 0)
        await one.freeze()
        await until(lambda: other.leads() == [0, 1])
        with pytest.raises(Deposed):
            await epoch_write(one.store, before, [Create("/hosts/h9", b"")], 0)
        assert await one.worker.drive("m1", before, 0) in ("DEPOSED", "SUCCEEDED")
        await until(lambda: all_succeeded(world))


async def test_a_seat_that_comes_back_gets_its_part_again(world: World) -> None:
    async with ASeat(world, "b") as other:
        await until(lambda: other.leads() == [0, 1])
        async with ASeat(world, "a") as one:
            await until(lambda: (one.leads(), other.leads()) == ([0], [1]))
            await until(lambda: all_succeeded(world))
        await until(lambda: other.leads() == [0, 1])


async def test_what_a_seat_that_is_there_does_not_lead_is_led_by_another(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.coordinator.supervisor.YIELD_S", 0.1)
    stuck = MemoryStore(world.store.tree)
    await Seat(stuck, "a")._enter()  # it is there, and campaigns for nothing
    async with ASeat(world, "b") as other:
        await until(lambda: all_succeeded(world))
        assert sorted(other.shares._patience_s)[0] == 0.1
        await until(lambda: max(other.shares._patience_s) > 0.3)  # it hands over in vain ever more seldom


async def test_a_job_moves_guests_of_all_shards_and_only_its_own_leader_carries_it_out(world: World) -> None:
    for number in range(len(GUESTS)):
        for path in (paths.active_migration(f"m{number}"), paths.migration_state(f"m{number}")):
            world.store.tree.nodes.pop(path)
    jobs = [f"job{number}" for number in range(2)]
    world.evacuation(jobs[0], "h1", max_concurrent=8)
    async with two(world) as seats:
        await until(lambda: world.job(jobs[0]).phase.terminal)
        assert world.job(jobs[0]).epoch == epoch_of(world, shard_of(jobs[0], 2))
        assert all(seat.shares.status.quarantined == 0 for seat in seats)
    assert {shard_of(guest, 2) for guest in GUESTS} == {0, 1}
    assert not any(world.record(guest).owner.host == "h1" for guest in GUESTS)


async def test_another_number_of_shards_begins_when_nobody_leads_and_ends_every_leadership_before(world: World) -> None:
    async with ASeat(world, "a", shards=1) as before:
        await until(lambda: before.leads() == [0])
        epoch = epoch_of(world, 0)
        async with ASeat(world, "b", shards=2) as after:
            await until(lambda: "a leads" in after.supervisors[0].status.waiting_for)
            await until(lambda: "in 1 shards: this coordinator was told 2" in after.supervisors[1].status.waiting_for)
            assert after.leads() == []
            await before.freeze()
            await until(lambda: after.leads() == [0, 1])
            with pytest.raises(Deposed):
                await epoch_write(before.store, epoch, [Create("/hosts/h9", b"")])
            health = await cluster_health(Ledger(world.store))
            assert health.leader == "b (shards 0 1)"


async def test_an_agent_keeps_one_epoch_per_shard(tmp_path: Path) -> None:
    store = MemoryStore()
    for shard, version in ((0, 3), (5, 7)):
        await store.ensure(paths.epoch(shard))
        store.tree.nodes[paths.epoch(shard)] = Versioned(b"", version, 0)
    journal = Journal(tmp_path)
    journal.open()
    gate = EpochGate("h1", store, journal, Believed("h1", store, journal))
    await gate.heed(3)
    await gate.heed(7, 5)
    for offered, shard in ((7, 0), (3, 5), (0, 1)):
        with pytest.raises(DroverError) as caught:
            await gate.heed(offered, shard)
        assert caught.value.reason is RefusalReason.STALE_EPOCH
    for shard in (-1, 64):
        with pytest.raises(DroverError) as caught:
            await gate.heed(0, shard)
        assert caught.value.reason is RefusalReason.INVALID_ARGUMENT
    again = Journal(tmp_path)
    again.open()
    assert [again.epoch(shard) for shard in (0, 1, 5)] == [3, -1, 7]


async def test_a_seat_is_there_while_its_session_is_and_one_of_a_name_replaces_the_other() -> None:
    store = MemoryStore()
    seat, successor = Seat(store, "a"), Seat(MemoryStore(store.tree), "a")

    def holder() -> str:
        node = store.tree.nodes.get(paths.seat("a"))
        return decode(Leader, node.data).id if node else ""

    await seat._enter()
    first = holder()
    await seat._enter()
    assert holder() == first
    await successor._enter()
    assert holder() not in ("", first)
    store.expire()
    assert holder(), "the successor's own"
