"""The one place that knows the qemu.qmp library: bounded commands, an event stream, a second out-of-band connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from qemu.qmp import EventListener, QMPClient, QMPError
from qemu.qmp.qmp_client import ExecuteError

from agents.engine.base import EngineError, EngineTimeout

# A VMM that ends is reported by our own events; the library's tracebacks about the lost socket say nothing more.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

RawSink = Callable[[str, Mapping[str, Any], float], None]


class QmpConnection:
    """One QMP connection. Every call raises EngineError (refused, or the VMM is gone) or EngineTimeout."""

    def __init__(self, name: str, sink: RawSink | None = None) -> None:
        self._client = QMPClient(name)
        self._sink = sink
        self._listener = EventListener()
        self._task: asyncio.Task[None] | None = None

    async def connect(self, path: Path, timeout_s: float) -> None:
        """One try. Raises EngineError when nobody answers."""
        self._client.register_listener(self._listener)
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.connect(str(path))
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            raise EngineError(f"no QMP at {path}: {error}") from error
        self._task = asyncio.create_task(self._pump())

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float = 2.0, oob: bool = False
    ) -> Any:
        """The command's return value as JSON has it. `oob` lets it overtake commands that block (QEMU's manual,
        "Out-of-band execution"). After an EngineTimeout it may still be carried out."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, arguments, oob=oob)
        except TimeoutError as error:
            raise EngineTimeout(f"{command}: no answer from QEMU in {timeout_s:g} s") from error
        except ExecuteError as error:
            raise EngineError(f"{command}: {error}") from error
        except (QMPError, OSError, EOFError) as error:
            raise EngineError(f"{command}: the connection to QEMU is lost") from error

    async def pass_descriptor(self, name: str, descriptor: int, *, timeout_s: float = 2.0) -> None:
        """QEMU gets a copy of an open descriptor and knows it by `name`, in place of one that it knew so before. The
        command that names it takes it over; the caller still closes its own. Raises as `execute` does."""
        try:
            self._client.send_fd_scm(descriptor)
        except (QMPError, OSError) as error:
            raise EngineError(f"getfd: a descriptor cannot be passed to QEMU: {error}") from error
        await self.execute("getfd", {"fdname": name}, timeout_s=timeout_s)

    async def close(self) -> None:
        """End the connection, within about two seconds; QEMU goes on. Idempotent, never raises."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=1.0)
        with contextlib.suppress(Exception):  # the library re-raises whatever had ended the connection
            async with asyncio.timeout(1.0):
                await self._client.disconnect()

    async def _pump(self) -> None:
        async for message in self._listener:
            if self._sink is None:
                continue
            stamp = cast("Mapping[str, int]", message["timestamp"])
            data = cast("Mapping[str, Any]", message.get("data") or {})
            self._sink(str(message["event"]), data, stamp["seconds"] + stamp["microseconds"] / 1e6)
