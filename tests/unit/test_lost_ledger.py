"""A ledger that was emptied, or restored from a backup, while guests run: nothing is decided against any of them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from agents.__main__ import Peers
from agents.agent import Agent
from agents.engine import base as engine
from agents.engine.base import RunState as Vcpus
from agents.host.metrics import Metrics
from orchestrator.core import handover
from orchestrator.core.agent import RunState, Trouble
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import GuestSpec, WantRun
from orchestrator.ledger import paths
from orchestrator.ledger.records import encode
from orchestrator.ledger.store import Versioned
from tests.fakes.config import agent_config, agent_identity
from tests.fakes.coordination import MemoryStore, World
from tests.fakes.engine import FakeEngine

G = "0f0e0d0c-0b0a-4987-8654-321001234567"
HERE, THERE = HostRef("h2", "boot-h2"), HostRef("h1", "boot-h1")


class House:
    """One host with one agent, which is restarted at will, and the ledger."""

    def __init__(self, directory: Path) -> None:
        self.config = agent_config(directory)
        self.world = World(MemoryStore())
        self.mover = FakeEngine()
        self.fill()
        self.agent = self.made()

    def made(self) -> Agent:
        stores = (self.world.store, MemoryStore(self.world.store.tree))
        mover = cast(engine.MigrationEngine, self.mover)
        return Agent(self.config, agent_identity(HERE), mover, stores, Peers(), Metrics(CollectorRegistry()))

    def fill(self) -> None:
        for root in paths.ROOTS:
            self.world.put(root, WantRun())

    async def restarted(self) -> None:
        await self.agent.stop()
        self.agent = self.made()
        await self.agent.start()

    async def born(self) -> None:
        self.world.put(paths.name("web"), G)
        self.world.put(paths.guest(G), handover.birth("web", HERE, writer="api"))
        self.world.put(paths.guest_spec(G), GuestSpec("web"))
        self.world.put(paths.want_run(G), WantRun())
        self.world.put(paths.host_guest(HERE.host, G), "")
        await self.agent.start_guest(G)
        (vmm,) = self.mover.processes.values()
        note = vmm.spec.directory / f"{vmm.spec.inc}.json"  # as the real engine leaves it
        note.write_text(json.dumps(asdict(vmm.metadata)))
        await until(lambda: self.trouble() is None and self.agent._known(G).record is not None)
        await self.looked()

    async def looked(self) -> None:
        """The keeper has had its look, several times."""
        for _ in range(5):
            self.agent.nudge(G)
            await asyncio.sleep(0.02)

    def emptied(self) -> None:
        nodes = self.world.store.tree.nodes
        for path in [path for path in nodes if G in path or path.endswith("/web")]:
            del nodes[path]

    def older(self, record: GuestRecord) -> None:
        """What a backup brought back: written before anything that is there now."""
        self.world.store.tree.nodes[paths.guest(G)] = Versioned(encode(record), 1, 1)

    def trouble(self) -> Trouble | None:
        found = self.agent.status().troubles
        return found[0].trouble if found else None


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_guest_without_a_record_runs_on_and_is_told_of(house: House, restarted: bool) -> None:
    await house.agent.start()
    await house.born()
    house.emptied()
    if restarted:
        await house.restarted()
    await house.looked()
    await until(lambda: house.trouble() is Trouble.NO_RECORD)
    (copy,) = house.agent.status().copies
    assert (copy.guest, copy.name) == (G, "web")
    assert len(house.mover.processes) == 1
    with pytest.raises(DroverError) as refused:
        await house.agent.end_guest(G)
    assert refused.value.reason in (RefusalReason.OLD_RECORD, RefusalReason.NOT_FOUND)
    assert paths.guest(G) not in house.world.store.tree.nodes, "nobody writes a record by himself"

    status = await house.agent.restore_record(G)
    assert (status.run_state, status.name) == (RunState.RUNNING, "web")
    record = house.world.record(G)
    assert (record.phase, record.owner) == (Ownership.IDLE, HERE)
    await until(lambda: house.trouble() is None)
    with pytest.raises(DroverError, match="the ledger has its record"):
        await house.agent.restore_record(G)
    assert len(house.mover.processes) == 1
    await house.agent.stop()


async def test_a_guest_that_was_paused_is_paused_after_its_record_is_back(house: House) -> None:
    await house.agent.start()
    await house.born()
    (vmm,) = house.mover.processes.values()
    await vmm.pause()
    house.emptied()
    await house.agent.restore_record(G)
    await house.looked()
    assert vmm.run is Vcpus.PAUSED
    await house.agent.stop()


@pytest.mark.parametrize("state", ["sealed", "given away", "name taken"])
async def test_no_record_is_written_for_what_may_run_elsewhere(house: House, state: str) -> None:
    await house.agent.start()
    await house.born()
    (vmm,) = house.mover.processes.values()
    record = house.world.record(G)
    house.emptied()
    match state:
        case "sealed":
            vmm.run = Vcpus.SEALED
        case "given away":
            known = house.agent._journal.known_record(G)
            assert known is not None
            given = replace(record, owner=THERE, phase=Ownership.COMMITTED)
            house.agent._journal.saw_record(G, replace(known, record=given))
        case _:
            house.world.put(paths.name("web"), "another")
    with pytest.raises(DroverError) as refused:
        await house.agent.restore_record(G)
    taken = state == "name taken"
    assert refused.value.reason is (RefusalReason.ALREADY_EXISTS if taken else RefusalReason.GUEST_IS_MIGRATING)
    assert paths.guest(G) not in house.world.store.tree.nodes
    await house.agent.stop()


OLDER = {
    "it was elsewhere": GuestRecord("web", Ownership.IDLE, THERE),
    "it had crashed elsewhere": GuestRecord("web", Ownership.CRASHED, THERE),
    "it was on its way": GuestRecord("web", Ownership.COMMITTED, THERE, "m", 1, THERE, "i", source=HERE),
    "it was about to be born": GuestRecord("web", Ownership.STARTING, HERE),
}


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("record", OLDER.values(), ids=OLDER)
async def test_an_older_record_decides_nothing(house: House, record: GuestRecord, restarted: bool) -> None:
    await house.agent.start()
    await house.born()
    newest = house.world.store.tree.nodes[paths.guest(G)]
    house.older(record)
    if restarted:
        await house.agent._journal._write_all()
        await house.restarted()
    await house.looked()
    await until(lambda: house.trouble() is Trouble.OLD_RECORD)
    (vmm,) = house.mover.processes.values()
    assert vmm.run is Vcpus.RUNNING
    assert house.world.record(G) == record
    house.world.store.tree.nodes[paths.guest(G)] = newest
    await until(lambda: house.trouble() is None)
    await house.agent.stop()


@pytest.mark.parametrize("phase", [Ownership.STARTING, Ownership.IDLE])
async def test_nothing_is_decided_against_a_guest_whose_notes_are_lost_while_its_vmm_runs(
    house: House, phase: Ownership
) -> None:
    """Neither declared crashed nor, where the end of its birth was never written, buried: its name would be free, and
    somebody would start it again beside that process."""
    await house.agent.start()
    await house.born()
    (vmm,) = house.mover.processes.values()
    directory = vmm.spec.directory
    await house.agent.stop()
    house.mover.processes.clear()
    for note in directory.glob("*.json"):
        if phase is Ownership.IDLE or note.name != "guest.json":
            note.unlink()
    house.world.put(paths.guest(G), replace(house.world.record(G), phase=phase))
    words = ["qemu-stand-in", "-c", "import time; time.sleep(60)", str(directory.absolute() / "i.qmp")]
    running = await asyncio.to_thread(lambda: subprocess.Popen(words, executable=sys.executable))
    try:
        house.agent = house.made()
        await house.agent.start()
        house.agent.nudge(G)
        await house.agent._host(G)
        await until(lambda: house.trouble() is Trouble.NOT_KEPT or house.world.record(G).phase is not phase)
        assert house.world.record(G).phase is phase
    finally:
        running.kill()
        await asyncio.to_thread(running.wait)
    over = Ownership.CRASHED if phase is Ownership.IDLE else Ownership.GONE
    await until(lambda: house.world.record(G).phase is over)
    await house.agent.stop()


async def test_a_host_that_a_guest_has_left_does_not_declare_it_on_the_word_of_an_old_ledger(house: House) -> None:
    await house.agent.start()
    await house.born()
    (vmm,) = house.mover.processes.values()
    vmm.run = engine.RunState.SEALED  # it was sent: a copy that never was is not given up for any record
    gone = replace(house.world.record(G), owner=THERE, migration="m", attempt=1, inc="i", source=HERE)
    house.world.put(paths.guest(G), gone)
    await house.looked()
    await until(lambda: not house.agent.status().copies)
    await house.agent._journal._write_all()
    house.older(GuestRecord("web", Ownership.IDLE, HERE))
    await house.restarted()
    await until(lambda: house.trouble() is Trouble.OLD_RECORD)
    assert house.world.record(G).phase is Ownership.IDLE
    await house.agent.stop()
