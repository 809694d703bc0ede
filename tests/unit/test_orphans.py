"""A guest whose record says that it is on its way in a migration that there is not: nobody else would ever end that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from orchestrator.coordinator.driver import Deposed
from orchestrator.coordinator.orphans import Orphans
from orchestrator.core import handover
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import Leader, MigrationPhase, MigrationState, Reservation
from orchestrator.core.shards import Share, shard_of
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.store import Versioned
from tests.fakes.coordination import World

FORGED = "0f0e0d0c-0000-4000-8000-000000000001"


@dataclass
class Scene:
    world: World
    index: Index
    orphans: Orphans

    def open_in(self, migration: str, *, inc: str = "", phase: Ownership = Ownership.OPEN) -> None:
        """The guest is on its way from h1 to h2, as somebody who is no coordinator wrote."""
        record = GuestRecord("n-g1", Ownership.IDLE, HostRef("h1", "boot-h1"))
        opened = handover.open_attempt(record, migration, 1, HostRef("h2", "boot-h2"), epoch=0, writer="a stranger")
        self.world.put(paths.guest("g1"), replace(opened, inc=inc, phase=phase))

    async def look(self, driven: tuple[str, ...] = ()) -> Ownership:
        await self.orphans.look(lambda migration: migration in driven)
        return self.world.record("g1").phase


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    world = World()
    for root in paths.ROOTS:
        world.put(root, "")
    world.put(paths.epoch(), Leader("me", "1"))
    world.host("h1")
    world.host("h2")
    world.guest("g1", "h1")
    index = Index(world.store)
    yield Scene(world, index, Orphans(world.store, index, world, 0))
    await index.close()


@pytest.mark.parametrize("inc", ["", "0123456789abcdef"])
async def test_an_attempt_of_a_migration_that_there_is_not_is_ended_and_then_closed(scene: Scene, inc: str) -> None:
    scene.open_in(FORGED, inc=inc)
    scene.world.put(paths.reservation("h2", FORGED), Reservation(64))
    assert await scene.look() is Ownership.ABORTED
    assert not scene.world.reserved("h2"), "nobody comes for the room"
    assert await scene.look() is Ownership.IDLE
    record = scene.world.record("g1")
    assert (record.owner.host, record.destination) == ("h1", None)
    assert paths.migration(FORGED) not in scene.world.store.tree.nodes
    moved = scene.world.store.tree.zxid
    assert await scene.look() is Ownership.IDLE
    assert scene.world.store.tree.nodes[paths.guest("g1")].mzxid <= moved


@pytest.mark.parametrize("name", ["", "..", "a/b", "/", "x" * 200, "ä"])
async def test_a_migration_that_cannot_be_called_so_is_none(scene: Scene, name: str) -> None:
    scene.open_in(name or FORGED)
    scene.world.put(paths.guest("g1"), replace(scene.world.record("g1"), migration=name))
    assert await scene.look() is Ownership.ABORTED
    assert await scene.look() is Ownership.IDLE


@pytest.mark.parametrize("phase", list(MigrationPhase))
async def test_one_that_is_under_way_is_its_drivers(scene: Scene, phase: MigrationPhase) -> None:
    """Whether this leader knows of it already or not."""
    scene.world.migration(FORGED, "g1")
    scene.world.put(paths.migration_state(FORGED), MigrationState(phase, attempt=1))
    scene.open_in(FORGED)
    assert await scene.look() is (Ownership.ABORTED if phase.terminal else Ownership.OPEN)


async def test_one_that_is_driven_costs_no_look(scene: Scene) -> None:
    scene.open_in(FORGED)
    assert await scene.look(driven=(FORGED,)) is Ownership.OPEN


async def test_half_a_migration_is_left_to_people(scene: Scene) -> None:
    scene.world.migration(FORGED, "g1")
    del scene.world.store.tree.nodes[paths.migration_state(FORGED)]
    scene.open_in(FORGED)
    assert await scene.look() is Ownership.OPEN


@pytest.mark.parametrize("phase", [Ownership.COMMITTED, Ownership.STARTING, Ownership.CRASHED, Ownership.IDLE])
async def test_what_is_not_open_is_not_its_business(scene: Scene, phase: Ownership) -> None:
    """Above all what was committed: the destination may run it."""
    scene.open_in(FORGED, inc="0123456789abcdef", phase=phase)
    assert await scene.look() is phase


async def test_a_migration_that_begins_meanwhile_keeps_its_attempt(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at it and the write."""
    scene.open_in(FORGED)
    is_over = scene.orphans._is_over

    async def late(migration: str) -> object:
        found = await is_over(migration)
        scene.world.migration(FORGED, "g1")
        return found

    monkeypatch.setattr(scene.orphans, "_is_over", late)
    assert await scene.look() is Ownership.OPEN


async def test_a_record_that_cannot_be_read_keeps_no_other_waiting(scene: Scene) -> None:
    scene.open_in(FORGED)
    scene.world.guest("g0", "h1")
    other = "00000000-0000-4000-8000-000000000002"
    scene.world.put(paths.guest("g0"), replace(scene.world.record("g1"), migration=other))
    scene.world.put(paths.migration_state(other), MigrationState())
    scene.world.store.tree.nodes[paths.migration_state(other)] = Versioned(b"{", 0, 1)
    assert await scene.look() is Ownership.ABORTED
    assert scene.world.record("g0").phase is Ownership.OPEN


async def test_each_leader_ends_those_of_its_shard(scene: Scene) -> None:
    scene.open_in(FORGED)
    scene.orphans = Orphans(scene.world.store, scene.index, scene.world, 0, share=Share(1 - shard_of("g1", 2), 2))
    assert await scene.look() is Ownership.OPEN


async def test_who_does_not_lead_any_more_ends_nothing(scene: Scene) -> None:
    scene.open_in(FORGED)
    scene.orphans = Orphans(scene.world.store, scene.index, scene.world, -7)
    with pytest.raises(Deposed):
        await scene.look()
    assert scene.world.record("g1").phase is Ownership.OPEN
