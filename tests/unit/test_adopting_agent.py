"""An agent that takes over a process: whatever happens in between, no other one is started, and it is not ended.

The engine is a fake; the process is real.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from agents.__main__ import Peers
from agents.agent import Agent
from agents.config import AgentConfig
from agents.engine import base as engine
from agents.engine.qemu import process as vmm_process
from agents.engine.qemu.engine import QemuEngine
from agents.engine.qemu.vmm import QemuVmm
from agents.guest import adopting, files
from agents.host.metrics import Metrics
from orchestrator.core import handover
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import Adopted, GuestSpec, WantRun
from orchestrator.ledger import paths
from orchestrator.ledger.records import decode
from orchestrator.proc import start_time_of
from tests.fakes.adopting import AdoptingFake, started_by_hand
from tests.fakes.config import agent_config, agent_identity
from tests.fakes.coordination import MemoryStore, World
from tests.fakes.engine import FakeVmm

HERE = HostRef("h2", "boot-h2")
G = "0f0e0d0c-0b0a-4987-8654-321001234567"


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with started_by_hand() as made:
        yield made


@pytest.fixture
def mover() -> AdoptingFake:
    return AdoptingFake()


@pytest.fixture
def config(tmp_path: Path) -> AgentConfig:
    return agent_config(tmp_path)


@pytest.fixture
async def world(config: AgentConfig, mover: AdoptingFake, process: subprocess.Popen[bytes]) -> World:
    """A guest that is about to be adopted: all is written, and its agent has not been asked yet."""
    found = await adopting.examine(cast(engine.MigrationEngine, mover), config, "web", (process.pid, "/run/q"))
    assert found.examined.obstacles == ()
    taken = Adopted(process.pid, found.start_time, "/run/q")
    world = World(MemoryStore())
    for root in paths.ROOTS:
        world.put(root, WantRun())
    world.put(paths.epoch(), WantRun())
    world.put(paths.guest_spec(G), replace(found.examined.spec, adopted=taken))
    world.put(paths.want_run(G), WantRun())
    world.put(paths.name("web"), G)
    world.put(paths.guest(G), handover.birth("web", HERE, writer="api"))
    return world


def made(config: AgentConfig, world: World, mover: AdoptingFake) -> Agent:
    stores = (world.store, MemoryStore(world.store.tree))
    moves = cast(engine.MigrationEngine, mover)
    return Agent(config, agent_identity(HERE), moves, stores, Peers(), Metrics(CollectorRegistry()))


@pytest.fixture
async def agent(config: AgentConfig, world: World, mover: AdoptingFake) -> AsyncIterator[Agent]:
    agent = made(config, world, mover)
    await agent.start()
    yield agent
    await agent.stop()


def record(world: World) -> GuestRecord:
    return world.record(G)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110 - the ledger is looked at from outside
            await asyncio.sleep(0.01)


async def test_a_birth_takes_the_process_over_and_starts_none(
    agent: Agent, world: World, mover: AdoptingFake, process: subprocess.Popen[bytes]
) -> None:
    for _ in range(2):  # may be repeated
        assert (await agent.start_guest(G)).pid == process.pid
    assert record(world).phase is Ownership.IDLE
    assert mover.started == []


async def test_what_cannot_be_taken_is_left_as_it_was(
    agent: Agent, world: World, mover: AdoptingFake, process: subprocess.Popen[bytes]
) -> None:
    mover.fails = "the monitor has gone"
    with pytest.raises(DroverError, match="the monitor has gone"):
        await agent.start_guest(G)
    assert (record(world).phase, record(world).never_ran) == (Ownership.GONE, True)
    assert (mover.started, process.poll()) == ([], None)


async def test_one_that_has_changed_since_is_not_taken(agent: Agent, world: World, mover: AdoptingFake) -> None:
    mover.answers["machine"]["memory"]["size"] += 1 << 20
    with pytest.raises(DroverError) as caught:
        await agent.start_guest(G)
    assert caught.value.reason is RefusalReason.NOT_ADOPTABLE
    assert record(world).phase is Ownership.GONE


async def test_another_process_under_the_same_pid_is_not_taken(
    agent: Agent, world: World, process: subprocess.Popen[bytes]
) -> None:
    path = paths.guest_spec(G)
    spec = decode(GuestSpec, world.store.tree.nodes[path].data, path=path)
    assert spec.adopted is not None
    other = replace(spec.adopted, start_time=spec.adopted.start_time - 1)
    world.put(paths.guest_spec(G), replace(spec, adopted=other))
    with pytest.raises(DroverError) as caught:
        await agent.start_guest(G)
    assert caught.value.reason is RefusalReason.NOT_FOUND
    assert start_time_of(process.pid) == spec.adopted.start_time


async def test_an_agent_that_died_behind_the_note_goes_on(
    config: AgentConfig, world: World, mover: AdoptingFake, process: subprocess.Popen[bytes]
) -> None:
    first = made(config, world, mover)
    await first.start()
    await first.start_guest(G)
    await first.stop()
    world.put(paths.guest(G), handover.birth("web", HERE, writer="api"))  # it died before this was written over
    second = made(config, world, mover)
    await second.start()
    await until(lambda: record(world).phase is Ownership.IDLE)
    assert (mover.started, process.poll()) == ([], None)
    await second.stop()


async def test_an_agent_that_died_before_the_note_leaves_it_as_it_was(
    config: AgentConfig, world: World, mover: AdoptingFake, process: subprocess.Popen[bytes]
) -> None:
    """It has never been a guest, so it is no process of one that was forgotten."""
    spec = decode(GuestSpec, world.store.tree.nodes[paths.guest_spec(G)].data)
    files.GuestFiles(config, G, spec).make()
    agent = made(config, world, mover)
    await agent.start()
    await until(lambda: record(world).phase is Ownership.GONE)
    assert record(world).never_ran
    assert (mover.started, process.poll()) == ([], None)
    assert paths.name("web") not in world.store.tree.nodes
    await agent.stop()


async def test_given_back_it_is_let_go_and_its_name_is_free(
    agent: Agent, world: World, mover: AdoptingFake, process: subprocess.Popen[bytes]
) -> None:
    await agent.start_guest(G)
    await agent.release_vmm(G)
    assert record(world).released
    assert (mover.let_go_of, process.poll()) == ([process.pid], None)
    assert agent.status().guests == ()
    await agent.release_vmm(G)  # may be repeated


async def test_a_process_that_is_a_guest_already_is_not_examined_again(
    agent: Agent, process: subprocess.Popen[bytes]
) -> None:
    await agent.start_guest(G)
    with pytest.raises(DroverError) as caught:
        await agent.examine_vmm("other", process.pid, "/run/q", None)
    assert caught.value.reason is RefusalReason.ALREADY_EXISTS


async def test_of_two_guests_that_are_to_be_the_same_process_one_is(
    agent: Agent, world: World, mover: AdoptingFake, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were examined before either was taken over, and each names a monitor of its own."""
    other = G.replace("0f0e", "1f1e")
    spec = decode(GuestSpec, world.store.tree.nodes[paths.guest_spec(G)].data)
    assert spec.adopted is not None
    second = replace(spec, name="web2", adopted=replace(spec.adopted, qmp="/run/q2"))
    world.put(paths.guest_spec(other), second)
    world.put(paths.want_run(other), WantRun())
    world.put(paths.name("web2"), other)
    world.put(paths.guest(other), handover.birth("web2", HERE, writer="api"))
    begun = asyncio.Barrier(2)
    take_over = AdoptingFake.take_over

    async def together(self: AdoptingFake, metadata: engine.VmmMetadata, spec: engine.VmmSpec) -> FakeVmm:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await begun.wait()
        return await take_over(self, metadata, spec)

    monkeypatch.setattr(AdoptingFake, "take_over", together)
    answers = await asyncio.gather(agent.start_guest(G), agent.start_guest(other), return_exceptions=True)
    (refused,) = [answer for answer in answers if isinstance(answer, BaseException)]
    assert isinstance(refused, DroverError)
    assert refused.reason is RefusalReason.ALREADY_EXISTS
    assert sorted(world.record(uuid).phase for uuid in (G, other)) == [Ownership.GONE, Ownership.IDLE]
    assert process.poll() is None


def _below(socket: Path) -> subprocess.Popen[bytes]:
    """Called like a QEMU with that monitor."""
    command = ["qemu-system-x86_64", "-c", "import time; time.sleep(60)", f"unix:{socket},server=on,wait=off"]
    return subprocess.Popen(command, executable=sys.executable)


async def test_a_process_of_a_guest_of_drover_s_own_is_not_examined(
    config: AgentConfig, world: World, mover: AdoptingFake
) -> None:
    """Its note may be lost: its guest is not given up, and would run twice under two names."""
    socket = files.guests_root(config.dir / "guests") / G[:16] / "i.qmp"
    with _below(socket) as child:
        agent = made(config, world, mover)
        await agent.start()
        with pytest.raises(DroverError) as caught:
            await agent.examine_vmm("other", child.pid, str(socket), None)
        assert caught.value.reason is RefusalReason.ALREADY_EXISTS
        await agent.stop()
        child.kill()


async def test_a_qemu_that_cannot_be_noted_down_is_told_again_what_it_was_told_at_its_start(
    tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever started it waits for its end when the guest shuts down."""
    said: list[tuple[str, object]] = []

    async def execute(self: QemuVmm, command: str, arguments: object = None, **_: object) -> None:
        said.append((command, arguments))

    async def nothing(self: object, *_: object) -> None:
        pass

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(QemuVmm, "_execute", execute)
    for name in ("connect", "learn"):
        monkeypatch.setattr(QemuVmm, name, nothing)
    monkeypatch.setattr(QemuEngine, "_known", nothing)
    monkeypatch.setattr(vmm_process, "write_metadata", full)
    extra = {engine.ADOPTED_QMP: "/run/q", "shutdown": "poweroff", "reboot": "reset"}
    start_time = start_time_of(process.pid)
    assert start_time is not None
    noted = engine.VmmMetadata(G, "i", process.pid, start_time, "owner", extra=extra)
    spec = engine.VmmSpec(G, "i", GuestSpec("web"), tmp_path, tmp_path / "c", None)
    with pytest.raises(engine.EngineError, match="disk full"):
        await QemuEngine(None).take_over(noted, spec)
    actions = [arguments for command, arguments in said if command == "set-action"]
    assert actions[-1] == {"shutdown": "poweroff", "reboot": "reset"}
