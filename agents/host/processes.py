"""Processes that outlive the agent that started them: known by pid and start time, watched by descriptor."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from orchestrator import proc
from orchestrator.core.liveness import Liveness, LivenessUnknown
from orchestrator.whole import write_whole


def tail_of(path: Path) -> str:
    """The last words in a process's log, for an error message; empty when they cannot be read."""
    try:
        return path.read_text(errors="replace").strip()[-400:]
    except OSError:
        return ""


def gated(command: Sequence[str]) -> list[str]:
    """The command, begun only by `let_in`: a process that nobody noted down before its agent was killed ends by itself.

    To be started with a pipe for its standard input. Its pid and start time are the command's own.
    """
    return ["/bin/sh", "-c", 'read -r _ && exec "$@" </dev/null', "gate", *command]


def let_in(child: subprocess.Popen[bytes]) -> None:
    """It is noted down: the command of a `gated` child begins. Raises OSError when the child is gone."""
    assert child.stdin is not None
    with child.stdin as gate:
        gate.write(b"\n")


def leashed(command: Sequence[str]) -> list[str]:
    """The command, which does not outlive its agent however that ends. Its pid is the command's own.

    To be started with a pipe for its standard input, whose end is noticed by a process beside it, and in a session of
    its own, which `end_leashed` ends. While either of the two is there the kernel gives their number to nobody else.
    """
    return ["/bin/sh", "-c", 'exec 3<&0; { read -r _ <&3; kill -9 $$; } & exec "$@" 3<&- </dev/null', "leash", *command]


def end_leashed(child: subprocess.Popen[bytes]) -> None:
    """Kill a `leashed` child with whoever watches over it, and reap it. Idempotent. Blocking."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    if child.stdin is not None:
        child.stdin.close()
    child.wait()


def note_down(path: Path, known: Mapping[str, object]) -> None:
    """Write what a later agent finds a process by; whole or not at all. Raises OSError."""
    write_whole(path, json.dumps(known).encode())


async def spawned(start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """`start` in a thread; raises what it raises. When the caller is cancelled meanwhile, nothing is left behind."""
    spawning = asyncio.ensure_future(asyncio.to_thread(start))
    try:
        return await asyncio.shield(spawning)
    except asyncio.CancelledError:
        await asyncio.wait({spawning})
        if spawning.exception() is None:
            await ended(spawning.result())
        raise


async def ended(child: subprocess.Popen[bytes]) -> None:
    """Kill a child that nothing has been done with yet, and reap it."""
    child.kill()
    await asyncio.to_thread(child.wait)


class Watched:
    """A process behind a descriptor, child or not. `on_death` is called once, on the event loop."""

    def __init__(self, pid: int, descriptor: int | None) -> None:
        """`descriptor` is this object's from here on. None: the process is gone already."""
        self.pid = pid
        self.dead = asyncio.Event()
        self.on_death: Callable[[], None] | None = None
        self._fd = descriptor
        if descriptor is None:
            self.dead.set()
        else:
            asyncio.get_running_loop().add_reader(descriptor, self._died)

    @classmethod
    def find(cls, pid: int, start_time: int) -> Watched | None:
        """The process that an earlier agent started; None: it is gone. Raises LivenessUnknown."""
        descriptor = proc.open_process(pid, start_time)
        return None if descriptor is None else cls(pid, descriptor)

    @classmethod
    async def adopt_child(cls, child: subprocess.Popen[bytes]) -> tuple[Watched, int]:
        """A child that was just started, and its start time. Raises LivenessUnknown; the child is ended then.

        Its pid cannot be given again before it was waited for, which from here on nobody but this object does.
        """
        descriptor: int | None = None
        try:
            descriptor = proc.descriptor_of(child.pid)
            start_time = proc.start_time_of(child.pid)
            if descriptor is None or start_time is None:
                raise LivenessUnknown(f"process {child.pid}: it was started, and the kernel knows nothing of it")
            watched = cls(child.pid, descriptor)
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            await ended(child)
            raise
        child.returncode = 0  # Popen must neither reap it nor warn
        return watched, start_time

    def liveness(self) -> Liveness:
        """Asked of the descriptor that is held: this needs no other one. UNKNOWN after `close`."""
        if self.dead.is_set():
            return Liveness.GONE
        return Liveness.UNKNOWN if self._fd is None else proc.liveness_of(self._fd)

    def kill(self) -> None:
        """Through the descriptor: a recycled pid cannot be hit."""
        if self._fd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def close(self) -> None:
        """Let go of the process and leave it as it is."""
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
