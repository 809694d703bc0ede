"""How fast a guest may go out, and how long it may stand still for the rest: its hold, and the end of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from agents.engine import base
from agents.engine.base import EngineError, EngineStatus, HoldStart

Execute = Callable[..., Awaitable[Any]]

_TRICKLE_BYTES_PER_S = 4096
_TRICKLE_DOWNTIME_MS = 1
_NO_LIMIT_MS, _NO_LIMIT_BYTES_PER_S = 2_000_000, 1 << 40
"""The most that QEMU takes for a downtime: of a guest that stands still there is none to keep short."""
_POLL_S = 0.003


class QemuRate:
    """Of the migration that is under way, or of none. `execute` is QMP's main connection."""

    def __init__(self, execute: Execute, progress: Callable[[], Awaitable[base.Progress]]) -> None:
        self._execute = execute
        self._progress = progress
        self._options: base.OutgoingOptions | None = None
        self._switchover_bandwidth = False
        self._released = True
        self._tail: asyncio.Task[None] | None = None
        self._parameters = asyncio.Lock()
        self.stands = False
        """The guest was stopped on purpose."""

    def of(self, options: base.OutgoingOptions, *, stands: bool, switchover_bandwidth: bool) -> None:
        """The next migration. `switchover_bandwidth`: this QEMU can be told a rate for the time after the stop."""
        self._options, self.stands, self._switchover_bandwidth = options, stands, switchover_bandwidth
        self._released = options.hold is HoldStart.OPEN

    async def first(self, options: base.OutgoingOptions) -> None:
        """Before the migration is started."""
        await self._set_rate(full=options.hold is not HoldStart.TRICKLE, open_gate=self._released)

    def watch(self, options: base.OutgoingOptions) -> None:
        """From its start."""
        if options.hold is HoldStart.TAIL:
            self._tail = asyncio.create_task(self._watch_tail(options.tail_bytes))

    async def hold(self) -> None:
        """See `base.Vmm.hold`."""
        async with self._parameters:
            self._released = False
            await self._set_rate(full=False, open_gate=False)

    async def release(self) -> None:
        """See `base.Vmm.release`."""
        async with self._parameters:
            self._released = True
            await self._set_rate(full=True, open_gate=True)

    async def now_stands(self, stands: bool) -> None:
        """Of a migration under way this changes the limit; that it cannot be told must not undo a stop or a start."""
        async with self._parameters:
            self.stands = stands
            if self._released:
                with contextlib.suppress(EngineError):
                    await self._set_rate(full=True, open_gate=True)

    def close(self) -> None:
        """Nothing is watched any more; what QEMU was told stays."""
        if self._tail is not None:
            self._tail.cancel()

    async def _set_rate(self, *, full: bool, open_gate: bool) -> None:
        if self._options is None:
            return
        link = self._options.link_bytes_per_s
        share = link // max(1, self._options.sharing())
        limit_ms, for_the_rest = self._options.downtime_limit_ms, share
        if self.stands:
            limit_ms, for_the_rest = _NO_LIMIT_MS, _NO_LIMIT_BYTES_PER_S
        values = {
            "max-bandwidth": link if full else _TRICKLE_BYTES_PER_S,
            "downtime-limit": limit_ms if open_gate else _TRICKLE_DOWNTIME_MS,
        }
        if self._switchover_bandwidth:
            values["avail-switchover-bandwidth"] = for_the_rest if open_gate else _TRICKLE_BYTES_PER_S
        await self._execute("migrate-set-parameters", values)

    async def _watch_tail(self, tail_bytes: int) -> None:
        """Drop to the trickle near the end. Ends by itself; a lost QEMU is reported elsewhere."""
        with contextlib.suppress(EngineError):
            while not self._released:
                progress = await self._progress()
                if progress.status not in (EngineStatus.SETUP, EngineStatus.ACTIVE, EngineStatus.NONE):
                    return
                if progress.total_bytes > 0 and progress.remaining_bytes < tail_bytes:
                    async with self._parameters:
                        if not self._released:
                            await self._set_rate(full=False, open_gate=False)
                    return
                await asyncio.sleep(_POLL_S)
