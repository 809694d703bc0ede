"""The active set: what is not over has a node there, what is over costs nobody anything."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from orchestrator.coordinator.retention import Keeping
from orchestrator.core.records import EvacuationPhase, MigrationPhase, MigrationState
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger
from tests.fakes.api import ApiCluster, api_cluster
from tests.fakes.coordination import MemoryStore, World
from tests.fakes.coordinator import EPOCH, drive, until, world
from tests.unit.test_leadership import leading

__all__ = ["world"]


def active(world: World) -> set[str]:
    roots = (paths.ACTIVE_MIGRATIONS, paths.ACTIVE_EVACUATIONS, paths.ENDED_EVACUATIONS)
    return {f"{root}/{name}" for root in roots for name in world.store.tree.children(root)}


class Reads(MemoryStore):
    """Notes what is read and listed."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[str] = []

    async def read(self, path: str, timeout_s: float = 2.0):
        self.paths.append(path)
        return await super().read(path, timeout_s)

    async def children(self, path: str, timeout_s: float = 2.0) -> tuple[str, ...]:
        self.paths.append(path)
        return await super().children(path, timeout_s)


async def test_a_migration_leaves_the_active_set_in_the_transaction_that_ends_it(world: World) -> None:
    node = paths.active_migration("m1")
    assert await drive(world) == "SUCCEEDED"
    assert active(world) == set()
    (last,) = [ops for ops in world.store.writes if any(op.path == node for op in ops)]
    assert paths.migration_state("m1") in {op.path for op in last}


async def test_a_job_is_active_then_ended_then_forgotten_with_its_cordon(world: World) -> None:
    world.evacuation("e1", "h1")
    async with leading(world):
        await until(lambda: world.job("e1").phase is EvacuationPhase.SUCCEEDED, 30)
        await until(lambda: paths.ended_evacuation("e1") in active(world), 30)
        assert paths.active_evacuation("e1") not in active(world)
        world.put(paths.cordon("h1"), {"on": False})
        world.store.tree.notify(paths.cordon("h1"))
        await until(lambda: active(world) == set(), 30)


@pytest.mark.parametrize("ended", [100, 2_000])
async def test_a_leader_looks_at_nothing_that_is_over(ended: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for retention, which has to, at its own pace."""

    async def never(_keeping: Keeping) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Keeping, "run", never)
    world = World(store=Reads())
    for host in ("h1", "h2"):
        world.host(host)
    world.put(paths.epoch(), "")
    world.guest("g1", "h1")
    world.migration("m1", "g1")
    for number in range(ended):
        name = f"{number:04x}-over"
        world.migration(name, "g1")
        world.put(paths.migration_state(name), MigrationState(MigrationPhase.SUCCEEDED))
        world.evacuation(name, "h2")
        world.put(paths.evacuation_state(name), {"phase": "SUCCEEDED"})
        for node in (paths.active_migration(name), paths.active_evacuation(name)):
            world.store.tree.nodes.pop(node)
    async with leading(world) as supervisor:
        await until(lambda: world.state("m1").phase is MigrationPhase.SUCCEEDED, 30)
        assert supervisor.status.adopted == 0
    assert isinstance(world.store, Reads)
    looked = [path for path in world.store.paths if "-over" in path or path in (paths.MIGRATIONS, paths.EVACUATIONS)]
    assert looked == []


async def test_a_node_that_was_left_behind_goes(world: World) -> None:
    """As after a restore of the ledger by hand: the migration is over, or there is none; the node says otherwise."""
    world.put(paths.migration_state("m1"), MigrationState(MigrationPhase.CANCELLED))
    world.put(paths.active_migration("none"), "g1")
    world.evacuation("e1", "h1")
    world.put(paths.evacuation_state("e1"), {"phase": "CANCELLED"})
    async with leading(world) as supervisor:
        await until(lambda: active(world) <= {paths.ended_evacuation("e1")}, 30)
        await until(lambda: not supervisor._known, 30)


async def test_what_the_api_creates_and_cancels(tmp_path: Path, world: World) -> None:
    world.store.tree.nodes.pop(paths.active_migration("m1"))
    world.put(paths.migration_state("m1"), MigrationState(MigrationPhase.CANCELLED))
    async with api_cluster(world.store, tmp_path, hosts=0) as api:
        await Ledger(world.store).init_tree()
        made = await cancelled(api, world)
        assert world.state(made).phase is MigrationPhase.CANCELLED
        assert active(world) == set()


async def cancelled(api: ApiCluster, world: World) -> str:
    world.put(paths.name("n-g1"), "g1")
    world.put(paths.want_run("g1"), {"run": True})
    made = (await api.call(api.client.create_migration, "n-g1")).name
    assert active(world) == {paths.active_migration(made)}
    await api.call(api.client.cancel_migration, made)
    return made


async def test_only_its_epoch_takes_anything_out(world: World) -> None:
    world.store.tree.nodes[paths.epoch()] = world.store.tree.nodes[paths.epoch()].__class__(b"", EPOCH + 1, 0)
    assert await drive(world) == "DEPOSED"
    assert active(world) == {paths.active_migration("m1")}
    await asyncio.sleep(0)
