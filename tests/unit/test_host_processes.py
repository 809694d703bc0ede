"""Processes that an agent starts are noted down before they begin, or do not begin."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from agents.guest.tpm import available
from agents.host.processes import gated, let_in
from orchestrator.proc import vmms_below

_KILLED_BEFORE_THE_NOTE = """
import asyncio, os, pathlib, signal, sys
from agents.guest import tpm
tpm.note_down = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(tpm.Tpm.launch(pathlib.Path(sys.argv[1]), "i1"))
"""


def waiting(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(gated(command), stdin=subprocess.PIPE)


def test_a_gated_process_begins_once_it_is_let_in(tmp_path: Path) -> None:
    child = waiting(["touch", str(tmp_path / "a b")])
    assert not (tmp_path / "a b").exists()
    let_in(child)
    assert child.wait(30) == 0
    assert (tmp_path / "a b").exists()


def test_a_gated_process_whose_starter_is_gone_never_begins(tmp_path: Path) -> None:
    child = waiting(["touch", str(tmp_path / "a")])
    assert child.stdin
    child.stdin.close()
    assert child.wait(30) != 0
    assert not (tmp_path / "a").exists()


def test_what_waits_is_no_vmm_and_no_word_of_a_guest_hides_one(tmp_path: Path) -> None:
    """A word of a guest's may be any: a VMM that is overlooked runs beside the one that is started in its place."""
    below = str(tmp_path / "guest")
    command = ["qemu-system-x86_64", "-c", "import time; time.sleep(60)", "-append", "gate", f"{below}/i.qmp"]
    waits = waiting(command)
    runs = subprocess.Popen(command, executable=sys.executable)
    try:
        until_s = time.monotonic() + 20
        while not Path(f"/proc/{runs.pid}/cmdline").read_bytes():  # the kernel has it a moment after the program began
            assert time.monotonic() < until_s
            time.sleep(0.01)
        assert vmms_below([below]) == [runs.pid]
    finally:
        for child in (waits, runs):
            child.kill()
            child.wait()
    assert waits.stdin
    waits.stdin.close()


@pytest.mark.skipif(not available(), reason="no swtpm")
def test_a_tpm_that_nobody_noted_down_does_not_stay(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", _KILLED_BEFORE_THE_NOTE, str(tmp_path)], timeout=60, check=False)
    assert killed.returncode == -9
    until_s = time.monotonic() + 20
    while left := naming(tmp_path):
        assert time.monotonic() < until_s, left
        time.sleep(0.05)


def naming(directory: Path) -> list[str]:
    """Command lines of processes that name the directory."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(directory) in words:
            found.append(words)
    return found
