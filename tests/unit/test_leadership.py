"""Leadership outlives whatever one migration or job does, and a leader that gives up can lead again."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest

from orchestrator.api.health import cluster_health
from orchestrator.coordinator import supervisor as supervising
from orchestrator.coordinator.pool import WorkerLost
from orchestrator.coordinator.quarantine import Quarantine
from orchestrator.coordinator.supervisor import Dispatch, Supervisor
from orchestrator.coordinator.worker import Worker
from orchestrator.core.records import Cordon, EvacuationPhase, MigrationPhase, QuarantineList
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import Versioned
from tests.fakes.coordination import MemoryStore, World
from tests.fakes.coordinator import EPOCH, until


@pytest.fixture
def world() -> World:
    world = World()
    for host in ("h1", "h2", "h3"):
        world.host(host)
    world.store.tree.nodes[paths.epoch()] = Versioned(b"", EPOCH, 0)
    for number in (1, 2):
        world.guest(f"g{number}", "h1")
        world.migration(f"m{number}", f"g{number}")
    return world


@contextlib.asynccontextmanager
async def leading(world: World, dispatch: Dispatch | None = None) -> AsyncIterator[Supervisor]:
    drivers = Worker(world.store, world)
    supervisor = Supervisor(
        world.store, dispatch or drivers.drive, agents=world, quarantine=Quarantine(first_s=0.05, longest_s=0.1)
    )
    task = asyncio.create_task(supervisor.run())
    try:
        yield supervisor
    finally:
        task.cancel()
        drivers.stop()
        await asyncio.gather(task, return_exceptions=True)


def quarantined(world: World) -> dict[str, str]:
    """What the leader tells everybody."""
    node = world.store.tree.nodes.get(paths.quarantine())
    entries = decode(QuarantineList, node.data).entries if node is not None and node.data else ()
    return {entry.resource: entry.reason for entry in entries}


@pytest.mark.parametrize("error", [KeyError("a bug in one driver"), BadRecord("no such field"), OSError("no room")])
async def test_one_driver_that_fails_is_quarantined_and_the_others_go_on(world: World, error: Exception) -> None:
    drivers, broken = Worker(world.store, world), True

    async def dispatch(migration: str, epoch: int) -> str:
        if migration == "m1" and broken:
            raise error
        return await drivers.drive(migration, epoch)

    async with leading(world, dispatch) as supervisor:
        await until(lambda: world.state("m2").phase is MigrationPhase.SUCCEEDED)
        await until(lambda: "migrations/m1" in quarantined(world))
        assert type(error).__name__ in quarantined(world)["migrations/m1"]
        assert (supervisor.status.leading, supervisor.status.epoch) == (True, EPOCH + 1)
        broken = False
        await until(lambda: world.state("m1").phase is MigrationPhase.SUCCEEDED)
        await until(lambda: not quarantined(world))
        assert supervisor.status.epoch == EPOCH + 1


async def test_a_migration_that_cannot_be_read_is_quarantined_until_it_can_be(world: World) -> None:
    path = paths.migration_state("m1")
    good = world.store.tree.nodes[path]
    world.store.tree.nodes[path] = Versioned(b'{"phase": "TELEPORTING"}', 0, 0)
    async with leading(world):
        await until(lambda: world.state("m2").phase is MigrationPhase.SUCCEEDED)
        await until(lambda: "migrations/m1" in quarantined(world))
        assert path in quarantined(world)["migrations/m1"]
        world.store.tree.nodes[path] = good
        await until(lambda: world.state("m1").phase is MigrationPhase.SUCCEEDED)
        await until(lambda: not quarantined(world))


async def test_a_migration_that_kills_its_workers_is_quarantined(world: World) -> None:
    drivers = Worker(world.store, world)

    async def dispatch(migration: str, epoch: int) -> str:
        if migration == "m1":
            raise WorkerLost("killed")
        return await drivers.drive(migration, epoch)

    async with leading(world, dispatch):
        await until(lambda: world.state("m2").phase is MigrationPhase.SUCCEEDED)
        await until(lambda: "WorkerLost" in quarantined(world).get("migrations/m1", ""))


async def test_a_job_with_an_override_of_a_newer_version_stops_nothing(world: World) -> None:
    """The field stays in the policy of the migrations that it creates, for agents that know it."""
    world.store.tree.nodes.pop(paths.migration("m1"))
    world.store.tree.nodes.pop(paths.newest_migration("g1"), None)
    world.evacuation("e1", "h1")
    node = world.store.tree.nodes[paths.evacuation("e1")]
    spec = json.loads(node.data) | {"policy": {"a_newer_field_ms": 5}}
    world.store.tree.nodes[paths.evacuation("e1")] = Versioned(json.dumps(spec).encode(), 0, 0)
    async with leading(world) as supervisor:
        await until(lambda: world.state("m2").phase is MigrationPhase.SUCCEEDED)
        await until(lambda: world.job("e1").phase is EvacuationPhase.SUCCEEDED)
        assert supervisor.status.epoch == EPOCH + 1
    made = next(guest.migration for guest in world.job("e1").guests if guest.guest == "g1")
    assert json.loads(world.store.tree.nodes[paths.migration(made)].data)["policy"]["a_newer_field_ms"] == 5


async def test_a_job_that_cannot_be_carried_out_is_quarantined(world: World) -> None:
    world.evacuation("e1", "h2")
    world.store.tree.nodes[paths.evacuation_state("e1")] = Versioned(b'{"phase": "LEVITATING"}', 0, 0)
    async with leading(world):
        await until(lambda: "evacuations/e1" in quarantined(world))
        await until(lambda: world.state("m2").phase is MigrationPhase.SUCCEEDED)


async def test_an_unreadable_job_does_not_keep_the_others_from_being_looked_at(world: World) -> None:
    """The unreadable one comes first in every listing."""
    for migration in ("m1", "m2"):
        world.store.tree.nodes.pop(paths.migration(migration))
    world.evacuation("e0", "h2")
    world.store.tree.nodes[paths.evacuation_state("e0")] = Versioned(b"{", 0, 0)
    world.evacuation("e1", "h3")
    async with leading(world):
        await until(lambda: world.job("e1").safe_to_power_off)
        world.guest("g9", "h3")
        await until(lambda: not world.job("e1").safe_to_power_off)


# --- the seat ---------------------------------------------------------------------------------------------------------


async def test_a_leader_that_was_deposed_by_somebody_s_word_leads_again(world: World) -> None:
    """Its own seat still stands, for its session lives."""
    supervisor = Supervisor(world.store, Worker(world.store, world).drive, agents=world)
    first = await supervisor.elect()
    async with asyncio.timeout(5):
        assert await supervisor.elect() > first


async def test_a_leader_that_gives_up_frees_its_seat_for_another(world: World) -> None:
    other = Supervisor(MemoryStore(world.store.tree), Worker(world.store, world).drive, agents=world, name="b")
    one = Supervisor(world.store, Worker(world.store, world).drive, agents=world, name="a")
    epoch = await one.elect()
    waiting = asyncio.create_task(other.elect())
    await until(lambda: "a leads" in other.status.waiting_for)
    await one.step_down()
    async with asyncio.timeout(5):
        assert await waiting == epoch + 1


async def test_an_unreadable_seat_is_told_and_ends_no_campaign(world: World) -> None:
    world.store.tree.nodes[paths.leader()] = Versioned(b"{", 0, 0)
    supervisor = Supervisor(world.store, Worker(world.store, world).drive, agents=world)
    waiting = asyncio.create_task(supervisor.elect())
    await until(lambda: "cannot be read" in supervisor.status.waiting_for)
    health = await cluster_health(Ledger(world.store))
    assert health.leader == "unreadable"
    assert [each.resource for each in health.quarantined] == ["leader"]
    assert "cannot be read" in health.quarantined[0].reason
    world.store.tree.nodes.pop(paths.leader())
    async with asyncio.timeout(5):
        assert await waiting == EPOCH + 1


async def test_a_coordinator_that_waits_for_an_unreadable_seat_is_not_restarted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody of a newer version may sit there; its own watchdog took the wait for a stuck process."""
    monkeypatch.setattr(supervising, "SEAT_TAKEN_S", 0.01)
    world.store.tree.nodes[paths.leader()] = Versioned(b'{"name": 7}', 0, 0)
    supervisor = Supervisor(world.store, Worker(world.store, world).drive, agents=world)
    waiting = asyncio.create_task(supervisor.elect())
    await until(lambda: "cannot be read" in supervisor.status.waiting_for)
    before = supervisor.status.progress
    await until(lambda: supervisor.status.progress > before + 2)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_leader_s_look_that_always_fails_is_no_progress(world: World) -> None:
    async with leading(world) as supervisor:
        await until(lambda: world.state("m2").phase is MigrationPhase.SUCCEEDED)

        async def children(path: str, timeout_s: float = 2.0) -> tuple[str, ...]:
            raise RuntimeError("broken")

        world.store.children = children
        await asyncio.sleep(0.2)
        before = supervisor.status.progress
        await asyncio.sleep(1.5)
        assert supervisor.status.progress == before
        assert "RuntimeError" in supervisor.status.waiting_for


# --- records of a newer version in everybody's way --------------------------------------------------------------------


def garble(world: World, path: str, **fields: object) -> None:
    """The node as a version wrote it that knows words which this one does not."""
    node = world.store.tree.nodes[path]
    world.store.tree.nodes[path] = Versioned(json.dumps(json.loads(node.data) | fields).encode(), node.version, 0)


async def test_an_unreadable_guest_or_host_keeps_nobody_else_from_moving(world: World) -> None:
    world.guest("g9", "h3", memory_mib=1024)
    garble(world, paths.guest("g9"), phase="ASCENDED")
    world.host("h4", memory_mib=10_000)
    garble(world, paths.host("h4"), machine_types="many")
    async with leading(world):
        await until(lambda: world.state("m1").phase is MigrationPhase.SUCCEEDED)
        await until(lambda: world.state("m2").phase is MigrationPhase.SUCCEEDED)
    assert {world.record(guest).owner.host for guest in ("g1", "g2")} == {"h2"}, "the room of g9 is kept on h3"
    assert world.reserved("h3") == {} == world.reserved("h2"), "and promised to nobody in the ledger"


@pytest.mark.parametrize("fields", [{"phase": "ASCENDED"}, {"phase": "ASCENDED", "owner": "somewhere"}])
async def test_no_host_is_safe_to_power_off_that_an_unreadable_guest_may_be_on(
    world: World, fields: dict[str, object]
) -> None:
    world.guest("g9", "h3")
    garble(world, paths.guest("g9"), **fields)
    world.put(paths.cordon("h3"), Cordon(on=True))
    world.evacuation("e1", "h3")
    async with leading(world):
        await until(lambda: world.state("m1").phase.terminal and world.state("m2").phase.terminal)
        await asyncio.sleep(0.6)
        assert not world.job("e1").safe_to_power_off
        world.guest("g9", "h2")
        await until(lambda: world.job("e1").phase.terminal and world.record("g9").owner.host != "h3")
        await until(lambda: world.job("e1").safe_to_power_off)


async def test_what_a_newer_version_promised_is_left_alone(world: World) -> None:
    for host in ("h2", "h3"):
        world.promise(host, other=64)
        garble(world, paths.reservation(host, "other"), bandwidth_mbps=5)
    async with leading(world):
        await until(lambda: world.state("m1").phase is MigrationPhase.SUCCEEDED)
    for host in ("h2", "h3"):
        promised = json.loads(world.store.tree.nodes[paths.reservation(host, "other")].data)
        assert (promised["bandwidth_mbps"], promised["memory_mib"]) == (5, 64)
