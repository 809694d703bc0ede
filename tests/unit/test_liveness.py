"""Only ENOENT and ESRCH mean that a process is gone. With any other error of any call nothing is decided, nowhere."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from agents.__main__ import Peers
from agents.agent import Agent
from agents.engine import base as engine
from agents.engine.base import EngineError, VmmMetadata
from agents.engine.qemu.engine import QemuEngine
from agents.engine.qemu.features import Features
from agents.guest.files import GuestFiles
from agents.host.metrics import Metrics
from agents.host.processes import Watched
from agents.shims.base import ShimError
from agents.shims.companion import DeviceProcess, DevicesSpec
from deploy.lab.cluster import processes as lab
from orchestrator import proc
from orchestrator.core.agent import RunState, Trouble
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.liveness import Liveness, LivenessUnknown
from orchestrator.core.records import GuestSpec, WantRun
from orchestrator.ledger import paths
from tests.fakes.config import agent_config, agent_identity
from tests.fakes.coordination import MemoryStore, World
from tests.fakes.engine import FakeEngine, FakeVmm

G = "0f0e0d0c-0b0a-4987-8654-321001234567"
HERE = HostRef("h2", "boot-h2")
ERRORS = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.EACCES)
CALLS = ("open", "pidfd_open", "poll")
FEATURES = Features("11.1.0", ("pc",), frozenset(), True, True, True, True, "none", False)
EVERY = pytest.mark.parametrize(("call", "number"), [(call, number) for call in CALLS for number in ERRORS])


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def inject(patch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """Every use of one system call by which processes are told alive or gone fails from here on."""
    match call:
        case "open":
            patch.setattr(proc, "open", failing(number), raising=False)
        case "pidfd_open":
            patch.setattr(os, "pidfd_open", failing(number))
        case _:
            patch.setattr(select, "poll", failing(number))


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def started(child: subprocess.Popen[bytes]) -> int:
    found = proc.start_time_of(child.pid)
    assert found is not None
    return found


def test_liveness_is_no_truth_value() -> None:
    with pytest.raises(TypeError, match="three values"):
        assert Liveness.UNKNOWN


@EVERY
def test_no_error_means_that_a_process_is_gone(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    start_time = started(child)
    with monkeypatch.context() as patched:
        inject(patched, call, number)
        with pytest.raises(LivenessUnknown):
            proc.open_process(child.pid, start_time)
        if call == "open":
            for ask in (proc.stat_of, lab.look, lab.identify):
                with pytest.raises(LivenessUnknown):
                    ask(child.pid)
            identity = lab.Identity(child.pid, start_time)
            assert lab.wait_gone([identity], 0) == {identity}
    descriptor = proc.open_process(child.pid, start_time)
    assert descriptor is not None
    os.close(descriptor)


async def test_a_process_that_is_watched_needs_no_descriptor_to_be_told_alive() -> None:
    """With none left, as in a process of its own: the limit holds for all of it."""
    program = """
import asyncio, os, resource, subprocess
from agents.host.processes import Watched
async def main():
    child = subprocess.Popen(["sleep", "60"])
    watched, _ = await Watched.adopt_child(child)
    held = []
    try:
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError as error:
        print(error.errno, watched.liveness().value)
    watched.kill()
    await asyncio.wait_for(watched.dead.wait(), 10)
    print(watched.liveness().value)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
asyncio.run(main())
"""
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == [str(errno.EMFILE), "alive", "gone"], done.stderr


@EVERY
async def test_no_vmm_and_no_device_process_is_given_up(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str, number: int
) -> None:
    files = GuestFiles(agent_config(tmp_path), G, GuestSpec("web"))
    files.make()
    mover = QemuEngine(Path("no-image"))
    mover._features = FEATURES
    metadata = VmmMetadata(G, "i1", child.pid, started(child), "owner")
    devices = DevicesSpec(G, "i1", files.directory, (), 0)
    note = {"guest": G, "inc": "i1", "pid": child.pid, "start_time": metadata.start_time}
    devices.path("devices.json").write_text(json.dumps(note))
    with monkeypatch.context() as patched:
        inject(patched, call, number)
        with pytest.raises(EngineError):
            await mover.adopt(metadata, files.vmm_spec("i1"))
        with pytest.raises(ShimError):
            await DeviceProcess.adopt(devices)
    recycled = replace(metadata, start_time=metadata.start_time - 1)
    assert await mover.adopt(recycled, files.vmm_spec("i1")) is None
    devices.path("devices.json").write_text("{")
    with pytest.raises(ShimError, match="cannot be read"):
        await DeviceProcess.adopt(devices)
    devices.path("devices.json").unlink()
    assert await DeviceProcess.adopt(devices) is None


class RealProcesses(FakeEngine):
    """Its VMMs are real processes; all else about them is made up."""

    async def adopt(self, metadata: VmmMetadata, spec: engine.VmmSpec) -> FakeVmm | None:
        try:
            watched = Watched.find(metadata.pid, metadata.start_time)
        except LivenessUnknown as error:
            raise EngineError(str(error)) from error
        return None if watched is None else RealVmm(self, metadata, spec, watched)


class RealVmm(FakeVmm):
    def __init__(self, mover: FakeEngine, metadata: VmmMetadata, spec: engine.VmmSpec, watched: Watched) -> None:
        super().__init__(mover, metadata, spec, engine.RunState.RUNNING)
        self.watched = watched
        watched.on_death = lambda: self._emit(engine.VmmDied())

    def liveness(self) -> Liveness:
        return self.watched.liveness()

    async def destroy(self) -> None:
        self.watched.kill()

    async def detach(self) -> None:
        self.watched.close()


@pytest.fixture
def world() -> World:
    world = World(MemoryStore())
    for root in paths.ROOTS:
        world.put(root, WantRun())
    world.put(paths.guest_spec(G), GuestSpec("web"))
    world.put(paths.want_run(G), WantRun())
    world.put(paths.guest(G), GuestRecord("web", Ownership.IDLE, HERE))
    return world


def made(tmp_path: Path, world: World, child: subprocess.Popen[bytes]) -> Agent:
    """An agent that finds the child as the VMM of a guest of its own."""
    config = agent_config(tmp_path)
    files = GuestFiles(config, G, GuestSpec("web"))
    files.make()
    metadata = VmmMetadata(G, "i1", child.pid, started(child), "owner")
    (files.directory / "i1.json").write_text(json.dumps(asdict(metadata)))
    stores = (world.store, MemoryStore(world.store.tree))
    mover = cast(engine.MigrationEngine, RealProcesses())
    return Agent(config, agent_identity(HERE), mover, stores, Peers(), Metrics(CollectorRegistry()))


async def until(agent: Agent, state: RunState) -> None:
    async with asyncio.timeout(30):
        while [guest.run_state for guest in agent.status().guests] != [state]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@EVERY
async def test_a_guest_outlives_an_agent_that_can_ask_nothing(
    child: subprocess.Popen[bytes],
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    call: str,
    number: int,
) -> None:
    """While it is adopted, and while it is kept: not declared crashed, not killed, and said to be not known."""
    with monkeypatch.context() as patched:
        inject(patched, call, number)
        agent = made_blind(tmp_path, world, child)
        await agent.start()
        await asyncio.sleep(0.05)
        assert not agent.status().complete
        (trouble,) = agent.status().troubles
        assert (trouble.guest, trouble.trouble) == (G, Trouble.NOT_KEPT)
        assert world.record(G).phase is Ownership.IDLE
    agent.nudge(G)
    await until(agent, RunState.RUNNING)
    assert agent.status().complete
    assert [copy.pid for copy in agent.status().copies] == [child.pid]
    with monkeypatch.context() as patched:
        inject(patched, call, number)
        for _ in range(3):
            agent.nudge(G)
            await asyncio.sleep(0.02)
        assert world.record(G).phase is Ownership.IDLE
        assert agent.status().complete == (call != "poll")
    assert child.poll() is None
    await agent.stop()


def made_blind(tmp_path: Path, world: World, child: subprocess.Popen[bytes]) -> Agent:
    """The note was written while all was well."""
    start_time, real = 0, proc.start_time_of
    with pytest.MonkeyPatch.context() as patched:
        with open(f"/proc/{child.pid}/stat", "rb") as file:
            start_time = int(file.read().rpartition(b")")[2].split()[19])
        patched.setattr(proc, "start_time_of", lambda pid: start_time if pid == child.pid else real(pid))
        return made(tmp_path, world, child)


async def test_a_guest_whose_vmm_died_is_still_declared(
    child: subprocess.Popen[bytes], world: World, tmp_path: Path
) -> None:
    agent = made(tmp_path, world, child)
    await agent.start()
    await until(agent, RunState.RUNNING)
    child.kill()
    async with asyncio.timeout(30):
        while world.record(G).phase is not Ownership.CRASHED:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await agent.stop()
    child.returncode = 0  # the agent has reaped it
