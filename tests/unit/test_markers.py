"""An agent knows the guests that concern its host from the list below the host, and reads nothing at rest."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from agents.host import concerned
from agents.host.concerned import Concerned
from orchestrator.core import handover
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import GuestSpec, WantRun
from orchestrator.ledger import markers, paths
from orchestrator.ledger.ledger import op_set
from orchestrator.ledger.store import Check, Conflict, Create, Done
from tests.fakes.coordination import MemoryStore, World
from tests.fakes.coordinator import drive, world
from tests.unit.test_lost_ledger import HERE, THERE, G, House, until

__all__ = ["world"]


def listed(world: World, host: str) -> tuple[str, ...]:
    return world.store.tree.children(paths.host_guests(host))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


async def test_an_attempt_lists_its_guest_at_the_destination_in_the_transaction_that_opens_it(world: World) -> None:
    node = paths.host_guest("h2", "g1")
    assert await drive(world) == "SUCCEEDED"
    assert listed(world, "h2") == ("g1",)
    (made,) = [ops for ops in world.store.writes if any(op.path == node for op in ops)]
    assert Create(node, b"") in made
    assert paths.guest("g1") in {op.path for op in made}


async def test_a_node_that_is_there_is_checked_and_one_that_goes_meanwhile_makes_it_look_again(world: World) -> None:
    node = paths.host_guest("h2", "g1")
    world.put(node, "")
    real, removed = world.store.multi, False

    async def multi(ops, timeout_s: float = 2.0):
        nonlocal removed
        if Check(node, 0) in ops and not removed:
            world.store.tree.nodes.pop(node)
            removed = True
        return await real(ops, timeout_s)

    world.store.multi = multi
    assert await drive(world) == "SUCCEEDED"
    assert removed
    assert listed(world, "h2") == ("g1",)


@pytest.mark.parametrize("guests", [1, 2 * concerned.BATCH + 1])
async def test_what_left_goes_off_the_list_many_at_a_time(guests: int) -> None:
    world = World()
    world.host("h1")
    for number in range(guests):
        world.guest(f"g{number}", "h2")
        world.put(paths.host_guest("h1", f"g{number}"), "")
    world.guest("stays", "h1")
    world.put(paths.host_guest("h1", "stays"), "")
    world.put(paths.host_guest("h1", "gone"), "")
    of_host = Concerned("h1", world.store)
    assert await of_host.drop(await of_host.listed()) == set()
    assert listed(world, "h1") == ("stays",)
    assert len(world.store.writes) == (guests + 1 + concerned.BATCH - 1) // concerned.BATCH


async def test_nothing_goes_off_the_list_that_moved_meanwhile() -> None:
    """An attempt leads back to the host between the look and the write."""
    world = World()
    world.host("h1")
    world.guest("g1", "h2")
    node = paths.host_guest("h1", "g1")
    world.put(node, "")
    real = world.store.multi

    async def multi(ops, timeout_s: float = 2.0):
        world.store.multi = real
        record = handover.open_attempt(world.record("g1"), "m", 1, HostRef("h1", "boot-h1"), epoch=0, writer="c")
        opened = op_set(paths.guest("g1"), record, world.store.tree.nodes[paths.guest("g1")].version)
        assert isinstance(await real([opened, await markers.marked(world.store, "h1", "g1")]), Done)
        return await real(ops, timeout_s)

    world.store.multi = multi
    of_host = Concerned("h1", world.store)
    assert await of_host.drop(["g1"]) == {"g1"}
    assert await of_host.drop(["g1"]) == set(), "it concerns the host now"
    assert listed(world, "h1") == ("g1",)


async def test_the_other_way_round_the_attempt_conflicts(world: World) -> None:
    world.guest("g1", "h1")
    world.put(paths.host_guest("h2", "g1"), "")
    marked = await markers.marked(world.store, "h2", "g1")
    assert await Concerned("h2", world.store).drop(["g1"]) == set()
    assert isinstance(await world.store.multi([marked]), Conflict)


async def test_a_guest_that_is_here_and_not_listed_is_listed_again(house: House) -> None:
    """As in a ledger that lost what is below the host."""
    await house.agent.start()
    await house.born()
    house.world.store.tree.nodes.pop(paths.host_guest(HERE.host, G))
    house.agent._tidy_at_s = 0.0
    house.world.store.tree.notify(paths.host_guest(HERE.host, G))
    await until(lambda: listed(house.world, HERE.host) == (G,))
    await house.agent.stop()


async def test_a_guest_that_the_ledger_lists_and_nobody_has_is_declared_crashed(house: House) -> None:
    await house.agent.start()
    house.world.put(paths.guest("b" * 32), GuestRecord("b", Ownership.IDLE, HERE))
    house.world.put(paths.guest_spec("b" * 32), GuestSpec("b"))
    house.world.put(paths.want_run("b" * 32), WantRun())
    await asyncio.sleep(0.1)
    house.world.put(paths.host_guest(HERE.host, "b" * 32), "")
    house.world.store.tree.notify(paths.host_guest(HERE.host, "b" * 32))
    await until(lambda: house.world.record("b" * 32).phase is Ownership.CRASHED)
    await house.agent.stop()


async def test_guests_of_other_hosts_are_not_looked_at(house: House) -> None:
    looked: list[str] = []
    for number in range(50):
        house.world.put(paths.guest(f"g{number}"), GuestRecord("g", Ownership.IDLE, THERE))

    async def read(path: str, timeout_s: float = 2.0):
        looked.append(path)
        return await MemoryStore.read(house.world.store, path, timeout_s)

    house.world.store.read = read
    await house.agent.start()
    await asyncio.sleep(0.3)
    assert not [path for path in looked if path.startswith(f"{paths.GUESTS}/")]
    await house.agent.stop()


def test_a_host_that_a_guest_has_left_is_none_of_its_hosts() -> None:
    record = GuestRecord("g", Ownership.IDLE, THERE, source=HERE)
    assert markers.concerns(record, THERE.host)
    assert not markers.concerns(record, HERE.host)
    assert not markers.concerns(replace(record, phase=Ownership.GONE), THERE.host)
