"""A process is known by pid and start time, and only then is anything done to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from deploy.lab.cluster import processes


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    # A name with a blank and parentheses: such names have broken many a reader of /proc/<pid>/stat.
    program = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'a) R (b'); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-S", "-c", program], stdout=subprocess.PIPE, env={"MARK": "x=y"})
    assert process.stdout
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_what_proc_tells(child: subprocess.Popen[bytes]) -> None:
    seen = processes.look(child.pid)
    assert seen
    assert (seen.name, seen.parent) == ("a) R (b", os.getpid())
    assert seen.environment() == {"MARK": "x=y"}
    assert seen.arguments()[1:3] == ["-S", "-c"]
    assert str(seen.directory()) == os.getcwd()  # noqa: PTH109
    assert seen.identity in processes.descendants([os.getpid()])
    assert seen.identity in {other.identity for other in processes.scan()}
    assert {os.getpid(), os.getppid()} <= processes.ancestors_and_self()


def test_a_recycled_pid_is_a_stranger(child: subprocess.Popen[bytes]) -> None:
    identity = processes.identify(child.pid)
    assert identity
    stranger = replace(identity, start_time=identity.start_time - 1)
    assert not processes.is_alive(stranger)
    assert not processes.send(stranger, signal.SIGKILL)
    assert child.poll() is None
    assert processes.wait_gone([stranger], 0) == set()


def test_the_dead_are_gone_even_before_they_are_reaped(child: subprocess.Popen[bytes]) -> None:
    identity = processes.identify(child.pid)
    assert identity
    assert processes.wait_gone([identity], 0.05) == {identity}
    assert processes.send(identity, signal.SIGKILL)
    assert processes.wait_gone([identity], 5) == set()
    assert processes.look(child.pid) is None  # a zombie
    assert not processes.send(identity, signal.SIGKILL)
    child.wait()
    assert not processes.send(identity, signal.SIGKILL)
