"""A QEMU that is only asked something does not outlive the agent that asks, however that ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agents.host.processes import end_leashed, leashed

_PROBE = """
import asyncio, pathlib, sys
from agents.engine.qemu.engine import QemuEngine
asyncio.run(QemuEngine(pathlib.Path("none"), sys.argv[1]).probe())
"""
_TRIAL = """
import asyncio, pathlib, sys
from agents.engine.base import VmmSpec
from agents.engine.qemu import foreign
from orchestrator.core.records import GuestSpec
here = pathlib.Path(sys.argv[1]).parent
spec = VmmSpec("g", "i", GuestSpec("g"), here, here / "con", None, "127.0.0.1")
asyncio.run(foreign.tried_out([sys.argv[1]], spec))
"""


def _is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _reach(holds: Callable[[], bool], what: str) -> None:
    until_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until_s, what
        time.sleep(0.01)


@pytest.mark.parametrize("program", [_PROBE, _TRIAL], ids=["probe", "trial"])
def test_it_ends_with_an_agent_that_is_killed(tmp_path: Path, program: str) -> None:
    note, qemu = tmp_path / "pid", tmp_path / "qemu"
    qemu.write_text(f"#!/bin/sh\necho $$ > {note}.tmp && mv {note}.tmp {note}\nexec sleep 60\n")
    qemu.chmod(0o755)
    agent = subprocess.Popen([sys.executable, "-c", program, str(qemu)])
    try:
        _reach(note.exists, "it did not begin")
        pid = int(note.read_text())
        assert _is_there(pid)
    finally:
        agent.kill()
        agent.wait()
    _reach(lambda: not _is_there(pid), "it outlives its agent")


@pytest.mark.parametrize("by_itself", [True, False])
def test_nothing_is_left_of_one_that_is_ended(tmp_path: Path, by_itself: bool) -> None:
    command = leashed(["sh", "-c", "exit 3" if by_itself else "exec sleep 60"])
    child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    if by_itself:
        assert child.wait(30) == 3
    end_leashed(child)
    end_leashed(child)
    assert child.returncode == (3 if by_itself else -signal.SIGKILL)
    _reach(lambda: not _of_session(child.pid), "who watched over it is left")


def _of_session(session: int) -> list[str]:
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[3] == str(session) and words[0] != "Z":
            found.append(path.parent.name)
    return found
