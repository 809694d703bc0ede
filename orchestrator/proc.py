"""What the kernel tells of processes: the one reader of /proc/<pid>/stat, and process descriptors (pidfd).

A process is known by pid and start time, since pids are given again. Only two errors mean that a process is gone:
ENOENT of its directory in /proc, and ESRCH. After any other (no descriptor left, no memory, an I/O error, no
permission) nobody knows whether it lives: `LivenessUnknown` is raised, and decides nothing.
"""

from __future__ import annotations

import errno
import os
import re
import select
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.core.liveness import Liveness, LivenessUnknown

_NAMED = re.compile(rb"\0-name\0guest=")
"""Of a VMM's command line, whatever its program is called."""
_WAITS = re.compile(rb"[^\0]*/sh\0-c\0[^\0]*\0gate\0")
"""The beginning of the command line of what waits for its note (`agents.host.processes.gated`)."""
_GONE = frozenset({errno.ENOENT, errno.ESRCH})
_PARENT, _START_TIME, _FIELDS = 1, 19, 20
"""Of the fields that follow the name; the state is the first of them."""


@dataclass(frozen=True, slots=True)
class Stat:
    """Some fields of /proc/<pid>/stat."""

    pid: int
    name: str
    parent: int
    start_time: int
    """In clock ticks since the machine's start (field 22)."""
    zombie: bool
    """It has ended, and its parent has not asked for its exit status yet."""


def stat_of(pid: int) -> Stat | None:
    """None: there is no such process. Raises LivenessUnknown when it cannot be told."""
    path = f"/proc/{pid}/stat"
    try:
        with open(path, "rb") as file:
            text = file.read().decode(errors="replace")
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise LivenessUnknown(f"process {pid}: {error}") from error
    # The name is in parentheses and may itself hold any of them, so the fields start after the last one.
    before, _, after = text.rpartition(")")
    fields = after.split()
    if len(fields) < _FIELDS:
        raise LivenessUnknown(f"process {pid}: {path} holds something else than expected")
    return Stat(pid, before.partition("(")[2], int(fields[_PARENT]), int(fields[_START_TIME]), fields[0] in ("Z", "X"))


def start_time_of(pid: int) -> int | None:
    """In clock ticks since the machine's start; None: there is no such process. Raises LivenessUnknown."""
    stat = stat_of(pid)
    return None if stat is None else stat.start_time


def vmms_below(directories: Iterable[str]) -> list[int]:
    """Pids of the VMMs whose command line names something below one of `directories`. Raises LivenessUnknown.

    For a guest whose notes are lost: no note is no proof that nothing of it runs.
    """
    return _vmms([os.fsencode(f"{directory}/") for directory in directories])


def vmms_naming(path: Path) -> list[int]:
    """Pids of the VMMs whose command line names this very file. Raises LivenessUnknown."""
    return _vmms([os.fsencode(path) + b"\0"])


def _vmms(sought: list[bytes]) -> list[int]:
    found: list[int] = []
    try:
        names = [path.name for path in Path("/proc").iterdir()]
    except OSError as error:
        raise LivenessUnknown(f"the processes of this machine cannot be listed: {error}") from error
    for name in filter(str.isdigit, names):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read().replace(b",,", b",")  # QEMU has commas in paths doubled
        except OSError as error:
            if error.errno in _GONE:
                continue
            raise LivenessUnknown(f"process {name}: {error}") from error
        program = words.partition(b"\0")[0].rpartition(b"/")[2]
        # What writes the images of a guest that is to come runs no vCPU; whoever waits for the note of a VMM is none.
        is_vmm = (b"qemu" in program and b"storage-daemon" not in program) or _NAMED.search(words) is not None
        if is_vmm and _WAITS.match(words) is None and any(below in words for below in sought):
            found.append(int(name))
    return sorted(found)


def descriptor_of(pid: int) -> int | None:
    """A descriptor of whatever process has this pid now; None: there is none. Raises LivenessUnknown.

    The caller closes it.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise LivenessUnknown(f"process {pid}: pidfd_open: {error}") from error


def liveness_of(descriptor: int) -> Liveness:
    """Of the process behind a descriptor that is held already. Needs no other descriptor; a zombie is gone."""
    try:
        asked = select.poll()
        asked.register(descriptor, select.POLLIN)
        return Liveness.GONE if asked.poll(0) else Liveness.ALIVE
    except (OSError, MemoryError):
        return Liveness.UNKNOWN


def open_process(pid: int, start_time: int) -> int | None:
    """A descriptor of exactly this process; None: it is gone. Raises LivenessUnknown. The caller closes it."""
    descriptor = descriptor_of(pid)
    if descriptor is None:
        return None
    try:
        # In this order, the start time that is read belongs to the process behind the descriptor, or that has ended.
        found = start_time_of(pid)
        alive = liveness_of(descriptor)
        if alive is Liveness.UNKNOWN or (found is None and alive is Liveness.ALIVE):
            raise LivenessUnknown(f"process {pid}: the kernel does not say whether it lives; is /proc mounted?")
    except BaseException:
        os.close(descriptor)
        raise
    if found == start_time and alive is Liveness.ALIVE:
        return descriptor
    os.close(descriptor)
    return None
