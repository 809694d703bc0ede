"""Processes that outlive the agent that started them: known by pid and start time, watched by descriptor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path


def start_time_of(pid: int) -> int | None:
    """Field 22 of /proc/<pid>/stat; None when there is no such process, or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def tail_of(path: Path) -> str:
    """The last words in a process's log, for an error message."""
    try:
        return path.read_text(errors="replace").strip()[-400:]
    except OSError:
        return ""


async def spawned(start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """`start` in a thread; raises what it raises. When the caller is cancelled meanwhile, nothing is left behind."""
    spawning = asyncio.ensure_future(asyncio.to_thread(start))
    try:
        return await asyncio.shield(spawning)
    except asyncio.CancelledError:
        await asyncio.wait({spawning})
        if spawning.exception() is None:
            spawning.result().kill()
            await asyncio.to_thread(spawning.result().wait)
        raise


class Watched:
    """A process known by pid and start time, child or not. `on_death` is called once, on the event loop."""

    def __init__(self, pid: int, start_time: int) -> None:
        self.pid = pid
        self._start_time = start_time
        self.dead = asyncio.Event()
        self.on_death: Callable[[], None] | None = None
        self._fd: int | None = None
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self.dead.set()
            return
        asyncio.get_running_loop().add_reader(self._fd, self._died)
        if start_time_of(pid) != start_time:  # the pid was recycled before the descriptor was open
            self._died()

    def alive(self) -> bool:
        return not self.dead.is_set() and start_time_of(self.pid) == self._start_time

    def kill(self) -> None:
        """Through the descriptor: a recycled pid cannot be hit."""
        if self._fd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def close(self) -> None:
        if self._fd is not None:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None

    def _died(self) -> None:
        self.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        self.dead.set()
        if self.on_death is not None:
            self.on_death()
