"""A coordinator over a ledger and agents in memory, and what its tests do again and again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator.coordinator.supervisor import Limits, Supervisor
from orchestrator.coordinator.worker import Worker
from orchestrator.core.errors import AbortReason
from orchestrator.core.records import HostRecord
from orchestrator.ledger import paths
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Done, SetData, Versioned
from tests.fakes.coordination import MemoryStore, World

EPOCH = 3
LATE = AbortReason.LATE_SWITCHOVER_ACK


@pytest.fixture
def world() -> World:
    world = World()
    for host in ("h1", "h2", "h3"):
        world.host(host)
    world.store.tree.nodes[paths.epoch()] = Versioned(b"", EPOCH, 0)
    world.guest("g1", "h1")
    world.migration("m1", "g1")
    return world


def worker(world: World) -> Worker:
    return Worker(world.store, world)


async def drive(world: World, migration: str = "m1") -> str:
    async with asyncio.timeout(10):
        return await worker(world).drive(migration, EPOCH)


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def leading(world: World, store: MemoryStore | None = None, name: str = "c", limits: Limits | None = None):
    store = store or world.store
    drivers = Worker(store, world)
    supervisor = Supervisor(store, drivers.drive, agents=world, name=name, limits=limits or Limits())
    task = asyncio.create_task(supervisor.run())
    try:
        yield supervisor
    finally:
        task.cancel()
        drivers.stop()
        await asyncio.gather(task, return_exceptions=True)


def make_room(world: World, host: str, memory_mib: int) -> None:
    """Another host record in place of the old one, as an agent with another configuration writes it."""
    path = paths.host(host)
    node = world.store.tree.nodes[path]
    record = replace(decode(HostRecord, node.data), memory_mib=memory_mib)
    assert isinstance(world.store._apply([SetData(path, encode(record), node.version)]), Done)


def silence(world: World, host: str) -> None:
    world.store.tree.nodes.pop(paths.live(host))
    world.store.tree.notify(paths.live(host))
