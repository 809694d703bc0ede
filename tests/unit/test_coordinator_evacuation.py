"""An evacuation over a ledger and agents in memory: what it moves, how it ends, and when power may go off."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from orchestrator.core import evacuation
from orchestrator.core import migration as machine
from orchestrator.core.agent import CopyStatus
from orchestrator.core.errors import FailureReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import Cordon, EvacuationPhase, GuestSpec, HostDeath, MigrationPhase, OnHostDeath
from orchestrator.ledger import paths
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Done, SetData, Versioned
from tests.fakes.coordination import World
from tests.fakes.coordinator import LATE, leading, make_room, silence, until, world

__all__ = ["world"]


async def test_an_evacuation_finds_the_packing_that_exists(world: World) -> None:
    world.store.tree.nodes.pop(paths.migration("m1"))
    world.guest("g1", "h1", memory_mib=600)
    world.guest("g2", "h1", memory_mib=400)
    world.guest("g3", "h1", memory_mib=400)
    make_room(world, "h2", 800)
    make_room(world, "h3", 600)
    world.evacuation("e1", "h1", max_concurrent=1)
    async with leading(world):
        await until(lambda: world.job("e1").phase.terminal)
    assert world.job("e1").phase is EvacuationPhase.SUCCEEDED
    assert world.record("g1").owner.host == "h3"


async def test_evacuation_empties_the_host(world: World) -> None:
    world.store.tree.nodes.pop(paths.migration("m1"))
    for n in range(2, 7):
        world.guest(f"g{n}", "h1", memory_mib=60 * n)
    world.ends = [LATE, LATE]
    world.evacuation("e1", "h1")
    async with leading(world):
        await until(lambda: world.job("e1").phase.terminal)
        job = world.job("e1")
        assert job.phase is EvacuationPhase.SUCCEEDED
        assert job.safe_to_power_off
        assert {world.record(f"g{n}").owner.host for n in range(1, 7)} == {"h2", "h3"}
        path = paths.cordon("h1")
        assert job.safe_at == world.store.tree.nodes[path].version
        for cordon in (Cordon(), Cordon(on=True)):
            write = SetData(path, encode(cordon), world.store.tree.nodes[path].version)
            assert isinstance(world.store._apply([write]), Done)
        await until(lambda: world.job("e1").safe_at == world.store.tree.nodes[path].version)


async def test_evacuation_survives_its_coordinator(world: World) -> None:
    world.store.tree.nodes.pop(paths.migration("m1"))
    for n in range(2, 6):
        world.guest(f"g{n}", "h1")
    world.evacuation("e1", "h1", max_concurrent=2)
    world.hold = asyncio.Event()
    async with leading(world):
        await until(lambda: sum(bool(world.record(f"g{n}").inc) for n in range(1, 6)) == 2)
        await asyncio.sleep(0.1)
        assert len(world.conducting) == 2
    async with leading(world):
        world.hold.set()
        await until(lambda: world.job("e1").phase.terminal)
    assert world.job("e1").phase is EvacuationPhase.SUCCEEDED
    assert len(world.conducting) == 5
    assert all(guest.tries == 1 for guest in world.job("e1").guests)


async def test_cancelled_evacuation_cancels_what_is_under_way(world: World) -> None:
    world.store.tree.nodes.pop(paths.migration("m1"))
    world.hold = asyncio.Event()
    world.evacuation("e1", "h1")
    async with leading(world):
        await until(lambda: bool(world.record("g1").inc))
        await asyncio.sleep(0.05)
        path = paths.evacuation_state("e1")
        wish = encode(replace(world.job("e1"), cancel_requested=True))
        world.store._apply([SetData(path, wish, world.store.tree.nodes[path].version)])
        await until(lambda: world.job("e1").phase is EvacuationPhase.CANCELLED)
    assert world.record("g1").owner.host == "h1"
    assert world.job("e1").guests[0].phase is MigrationPhase.CANCELLED


async def test_power_is_not_safe_while_a_copy_is_left_and_the_agent_says_so(world: World) -> None:
    """The records say that the guest has left; its stopped copy still holds memory and disks."""
    world.store.tree.nodes.pop(paths.migration("m1"))
    world.copies["h1"] = [CopyStatus("g1", "n-g1", "inc", 64, 4711)]
    world.evacuation("e1", "h1")
    async with leading(world):
        await until(lambda: world.record("g1").owner.host != "h1" and "copies" in world.job("e1").message)
        assert not world.job("e1").phase.terminal
        assert not world.job("e1").safe_to_power_off
        world.copies["h1"] = []
        world.unsure.add("h1")
        await until(lambda: "nobody has said" in world.job("e1").message)
        assert not world.job("e1").safe_to_power_off
        world.unsure.clear()
        await until(lambda: world.job("e1").phase is EvacuationPhase.SUCCEEDED)
    assert world.job("e1").safe_to_power_off


async def test_an_evacuation_of_a_host_that_dies_says_who_was_lost(world: World) -> None:
    world.store.tree.nodes.pop(paths.migration("m1"))
    world.hold = asyncio.Event()
    for root in (paths.FENCE, paths.DEATHS, paths.FENCERS):
        world.store.tree.nodes[root] = Versioned(b"", 0, 0)
    world.guest("g2", "h1")
    path = paths.guest_spec("g2")
    world.put(path, replace(decode(GuestSpec, world.store.tree.nodes[path].data), on_host_death=OnHostDeath.RESTART))
    world.put(paths.name("n-g2"), "g2")
    world.evacuation("e1", "h1")
    async with leading(world):
        await until(lambda: all(world.record(uuid).inc for uuid in ("g1", "g2")))
        world.store.tree.nodes.pop(paths.live("h1"))
        world.silent.add("h1")
        world.put(paths.death("h1"), HostDeath("h1", "boot-h1", on_word=True, requested_by="ann"))
        await until(lambda: world.job("e1").phase.terminal)
    job = world.job("e1")
    assert (job.phase, job.failure) == (EvacuationPhase.FAILED, FailureReason.HOST_DIED)
    assert job.message == "0 of 2 guests had left h1 when it died; crashed with it: n-g1; to start elsewhere: n-g2"
    assert job.safe_to_power_off, "a certificate says that nothing runs there"
    assert world.reserved("h2") == {} == world.reserved("h3")


async def test_the_evacuation_of_a_dead_host_ends_and_names_what_is_left(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SOURCE_PATIENCE_MS", 500.0)
    monkeypatch.setattr(evacuation, "SILENT_MS", 1_000.0)
    world.store.tree.nodes.pop(paths.migration("m1"))
    world.put(paths.guest("st"), GuestRecord("n-st", Ownership.STARTING, HostRef("h1", "boot-h1")))
    world.put(paths.guest_spec("st"), GuestSpec("n-st"))
    silence(world, "h1")
    world.evacuation("e1", "h1")
    async with leading(world):
        await until(lambda: world.job("e1").phase.terminal)
    job = world.job("e1")
    assert (job.phase, job.failure) == (EvacuationPhase.FAILED, FailureReason.SOURCE_UNREACHABLE)
    assert "n-st (still starting)" in job.message
    assert not job.safe_to_power_off
    assert world.reserved("h2") == {} == world.reserved("h3")
