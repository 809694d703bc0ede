"""A fencer that is a program of the operator's (docs/fencing.md has the contract)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Mapping, Sequence

from orchestrator.fencing.base import Fenced, Fencer, Power

CONTRACT = 1
"""Version of the contract, in what the program reads."""
KEPT_BYTES = 4_096
"""Of what the program says; the rest is read and thrown away."""
SAID_CHARACTERS = 300
EXIT_OFF = 0
EXIT_NOT_OFF = 1
_END_S = 2.0
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "HOME", "PYTHONPATH")
_CHUNK = 4_096


class ExecFencer(Fencer):
    """Runs `command power-off HOST` and believes its exit code."""

    def __init__(
        self, command: Sequence[str], *, timeout_s: float = 60.0, environment: Mapping[str, str] | None = None
    ) -> None:
        self._command = tuple(command)
        self._timeout_s = timeout_s
        self._environment = dict(environment or {})

    async def power_off(self, host: str) -> Fenced:
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                "power-off",
                host,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=self._env(host),
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return Fenced(Power.UNKNOWN, f"{self._command[0]} cannot be started: {error}")
        heard = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.gather(_tell(process, host), _listen(process, heard))
                code = await process.wait()
        except TimeoutError:
            return Fenced(Power.UNKNOWN, f"no answer within {self._timeout_s:g} s{_quoted(heard)}")
        finally:
            await _end(process)
        if code == EXIT_OFF:
            return Fenced(Power.OFF, _line(heard) or "confirmed")
        if code == EXIT_NOT_OFF:
            return Fenced(Power.NOT_OFF, _line(heard))
        how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
        return Fenced(Power.UNKNOWN, f"{self._command[0]} {how}{_quoted(heard)}")

    def _env(self, host: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        return {**kept, **self._environment, "DROVER_FENCE_ACTION": "power-off", "DROVER_FENCE_HOST": host}


async def _tell(process: asyncio.subprocess.Process, host: str) -> None:
    """A program that does not read it is none the worse."""
    assert process.stdin is not None
    order = {"contract": CONTRACT, "action": "power-off", "host": host}
    with contextlib.suppress(ConnectionError):
        process.stdin.write(json.dumps(order).encode() + b"\n")
        await process.stdin.drain()
    with contextlib.suppress(ConnectionError):
        process.stdin.close()
        await process.stdin.wait_closed()


async def _listen(process: asyncio.subprocess.Process, heard: bytearray) -> None:
    """To the end, so that the program never waits for a reader; only the beginning is kept."""
    assert process.stdout is not None
    while chunk := await process.stdout.read(_CHUNK):
        heard += chunk[: max(0, KEPT_BYTES - len(heard))]


async def _end(process: asyncio.subprocess.Process) -> None:
    """Its whole process group: what it started goes with it, and nothing stays behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.returncode is None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                await process.wait()


def _line(heard: bytearray) -> str:
    """The last line that says something, for people."""
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in heard.decode(errors="replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:SAID_CHARACTERS] if lines else ""


def _quoted(heard: bytearray) -> str:
    said = _line(heard)
    return f": {said}" if said else ""
