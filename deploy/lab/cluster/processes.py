"""Processes by pid and start time, so that nothing is ever done to a stranger that got a recycled pid.

Every function treats a process that vanishes meanwhile as one that is gone, and raises LivenessUnknown when the kernel
cannot tell (no descriptor left, for one): nothing may be taken for gone then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator import proc
from orchestrator.core.liveness import LivenessUnknown

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Identity:
    """One process for all time: `start_time` is field 22 of /proc/<pid>/stat, in clock ticks since boot."""

    pid: int
    start_time: int


@dataclass(frozen=True, slots=True)
class RunningProcess:
    """A process as /proc showed it; what costs another read is a method."""

    identity: Identity
    parent: int
    name: str

    @property
    def pid(self) -> int:
        """As long as `identity` holds; the kernel gives the number to others later."""
        return self.identity.pid

    def arguments(self) -> list[str]:
        """Its command line, read now; empty for one that is gone or a zombie."""
        return [os.fsdecode(part) for part in _read(self.pid, "cmdline").split(b"\0") if part]

    def environment(self) -> dict[str, str]:
        """As it was at exec. Empty when it may not be read, or when the process wrote its title over it."""
        pairs = (os.fsdecode(entry).partition("=") for entry in _read(self.pid, "environ").split(b"\0"))
        return {name: value for name, equals, value in pairs if equals}

    def directory(self) -> Path | None:
        """Its working directory."""
        with contextlib.suppress(OSError):
            return (PROC / str(self.pid) / "cwd").readlink()
        return None

    def files(self) -> Iterator[str]:
        """What its descriptors refer to, as /proc shows them: paths, `socket:[inode]`, ..."""
        with contextlib.suppress(OSError):
            for descriptor in (PROC / str(self.pid) / "fd").iterdir():
                with contextlib.suppress(OSError):
                    yield str(descriptor.readlink())

    def network(self) -> tuple[int, int] | None:
        """Device and inode of its network namespace, comparable with those of a file in /run/netns."""
        with contextlib.suppress(OSError):
            status = (PROC / str(self.pid) / "ns" / "net").stat()
            return status.st_dev, status.st_ino
        return None


def _read(pid: int, what: str) -> bytes:
    try:
        return (PROC / str(pid) / what).read_bytes()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise LivenessUnknown(f"process {pid}: {error}") from error
        return b""


def look(pid: int) -> RunningProcess | None:
    """The process with this pid, or None if there is none. A zombie counts as none: it can do nothing any more."""
    stat = proc.stat_of(pid)
    if stat is None or stat.zombie:
        return None
    return RunningProcess(Identity(pid, stat.start_time), stat.parent, stat.name)


def identify(pid: int) -> Identity | None:
    """The process that has this pid now; None: there is none. Raises LivenessUnknown."""
    seen = look(pid)
    return seen.identity if seen else None


def is_alive(identity: Identity) -> bool:
    """This very process is there, and not just another one with its pid. Raises LivenessUnknown."""
    return identify(identity.pid) == identity


def scan() -> Iterator[RunningProcess]:
    """Every living process that may be seen."""
    with os.scandir(PROC) as entries:
        pids = [int(entry.name) for entry in entries if entry.name.isdigit()]
    for pid in pids:
        if seen := look(pid):
            yield seen


def descendants(roots: Collection[int]) -> set[Identity]:
    """The living children of these pids, their children, and so on (without the roots themselves)."""
    children: dict[int, list[RunningProcess]] = {}
    for seen in scan():
        children.setdefault(seen.parent, []).append(seen)
    found: set[Identity] = set()
    waiting = list(roots)
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child.identity not in found:
                found.add(child.identity)
                waiting.append(child.pid)
    return found


def ancestors_and_self() -> set[int]:
    """This process and whoever started it, up to init: never to be killed by a clean-up that runs in it."""
    found: set[int] = set()
    pid = os.getpid()
    while pid > 0 and pid not in found:
        found.add(pid)
        seen = look(pid)
        pid = seen.parent if seen else 0
    return found


def send(identity: Identity, number: signal.Signals) -> bool:
    """Signal exactly this process; False if it is gone. No race: the pidfd is opened before the identity is checked."""
    descriptor = proc.open_process(identity.pid, identity.start_time)
    if descriptor is None:
        return False
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def wait_gone(identities: Collection[Identity], timeout_s: float) -> set[Identity]:
    """Wait until all are gone, at most `timeout_s`; what is still there, or may be."""
    deadline = time.monotonic() + timeout_s
    left = {identity for identity in identities if _may_be_alive(identity)}
    while left and time.monotonic() < deadline:
        time.sleep(0.01)
        left = {identity for identity in left if _may_be_alive(identity)}
    return left


def _may_be_alive(identity: Identity) -> bool:
    try:
        return is_alive(identity)
    except LivenessUnknown:
        return True
