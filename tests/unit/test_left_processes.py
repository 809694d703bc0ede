"""An agent that is killed at any instant while it makes a copy leaves no process that its successor does not end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from agents.__main__ import Peers
from agents.agent import Agent
from agents.engine import base as engine
from agents.guest.files import GuestFiles
from agents.host.metrics import Metrics
from agents.shims.companion import DeviceProcess
from orchestrator.core.ids import HostRef
from orchestrator.core.records import DeviceSpec, GuestSpec, ShimKind, Tpm
from tests.fakes.config import agent_config, agent_identity
from tests.fakes.coordination import MemoryStore
from tests.fakes.engine import FakeEngine

G = "0f0e0d0c-0b0a-4987-8654-321001234567"
INC = "00112233445566aa"
HERE = HostRef("h2", "boot-h2")
SPEC = GuestSpec("web", tpm=Tpm(), devices=(DeviceSpec("dev0", ShimKind.COMPANION),))
MARK = "DROVER_TEST_LEFT"
"""In the environment of everything that a killed agent started."""
PROGRAMS = {
    "qemu-vmm": "exec sleep 300",
    "qemu-storage-daemon": "exec sleep 300",
    "swtpm": 'for word; do case $word in type=unixio,path=*) touch "${word#*path=}";; esac; done; exec sleep 300',
}
AGENT = """
import asyncio, os, pathlib, signal, subprocess, sys
from agents.disks import daemon
from agents.engine.qemu import process
from agents.engine.qemu.engine import QemuEngine
from agents.guest import copies, tpm
from agents.guest.files import GuestFiles
from agents.host import processes
from agents.shims import companion
from orchestrator.core.records import LiveMachine
from tests.fakes.config import agent_config
from tests.unit.test_left_processes import G, INC, SPEC
from tests.unit.test_liveness import FEATURES

where, when, directory = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dies_at(owner, name):
    real = getattr(owner, name)
    def last(*words, **more):
        if when == "before":
            die()
        real(*words, **more)
        die()
    setattr(owner, name, last)

module, name = where.split(".")
owner = {"daemon": daemon, "process": process, "tpm": tpm, "companion": companion, "processes": processes}[module]
if not hasattr(owner, name):
    sys.exit(f"there is no {where}")
dies_at(owner, name)

async def main():
    files = GuestFiles(agent_config(directory), G, SPEC)
    files.make()
    if module == "daemon":
        await daemon.DiskDaemon.start(files.directory, "127.0.0.1", 1)
    (directory / "kernel").touch()
    mover = QemuEngine(directory / "kernel", binary=str(directory / "bin/qemu-vmm"))
    mover._features = FEATURES
    machine = LiveMachine("pc", "qemu64", 64, 1)
    await copies.prepare(mover, files, INC, "m", 1, 1, machine)

asyncio.run(main())
"""
INSTANTS = [
    (where, when)
    for where in (
        "tpm.note_down",
        "tpm.let_in",
        "companion.note_down",
        "companion._describe",
        "process.popen_gated",
        "daemon.note_down",
    )
    for when in ("before", "after")
] + [("process.write_metadata", "before"), ("daemon.let_in", "before")]


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """Runs an agent that is killed at that instant. What is left after the test is ended."""
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)
    environment = {**os.environ, MARK: str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def kill(where: str, when: str) -> None:
        command = [sys.executable, "-c", AGENT, where, when, str(tmp_path)]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr

    yield kill
    for pid in left(tmp_path):
        os.kill(pid, signal.SIGKILL)


def left(directory: Path) -> dict[int, str]:
    """Command lines of living processes that an agent of this test started."""
    found: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={directory}\0".encode() in (path / "environ").read_bytes():
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


async def none_left(directory: Path) -> None:
    until_s = time.monotonic() + 30
    while found := left(directory):
        assert time.monotonic() < until_s, found
        await asyncio.sleep(0.05)


def successor(directory: Path) -> Agent:
    store = MemoryStore()
    stores = (store, MemoryStore(store.tree))
    mover = cast(engine.MigrationEngine, FakeEngine())
    return Agent(agent_config(directory), agent_identity(HERE), mover, stores, Peers(), Metrics(CollectorRegistry()))


@pytest.mark.parametrize(("where", "when"), INSTANTS)
async def test_what_was_started_for_a_copy_that_never_was_noted_down_is_ended(
    killed: Callable[[str, str], None], tmp_path: Path, where: str, when: str
) -> None:
    await asyncio.to_thread(killed, where, when)
    if where.startswith("daemon"):
        if when == "after":  # noted: whoever takes the guest's disks, or lets them go, finds it by its note
            assert (GuestFiles(agent_config(tmp_path), G, SPEC).directory / "storage.note").exists()
        await none_left(tmp_path)
        return
    agent = successor(tmp_path)
    await agent.start()
    try:
        await none_left(tmp_path)
        directory = GuestFiles(agent_config(tmp_path), G, SPEC).directory
        names = {path.name for path in directory.glob(f"{INC}.*")}
        assert names <= {f"{INC}.tpmstate"}
        assert not list(tmp_path.glob(f"{G}.{INC}*"))
    finally:
        await agent.stop()


async def test_nothing_is_taken_from_under_a_vmm_whose_note_is_lost(tmp_path: Path) -> None:
    """It may be the guest, and its device process is all that its devices have."""
    files = GuestFiles(agent_config(tmp_path), G, SPEC)
    files.make()
    devices = await DeviceProcess.start(files.devices_spec(INC), incoming=False)
    words = ["qemu-stand-in", "-c", "import time; time.sleep(300)", str(files.directory.absolute() / f"{INC}.qmp")]
    vmm = await asyncio.to_thread(lambda: subprocess.Popen(words, executable=sys.executable))
    try:
        while files.vmms() != [vmm.pid]:  # noqa: ASYNC110 - until it is what it was started as
            await asyncio.sleep(0.01)
        agent = successor(tmp_path)
        await agent.start()
        await agent.stop()
        await devices.ready()
    finally:
        vmm.kill()
        await asyncio.to_thread(vmm.wait)
        await devices.destroy()
