"""The end of a migration that goes out: how it is stopped at any cost, and when it is really over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from agents.engine.base import EngineError, EngineStatus, EngineTimeout, RunState, VmmState
from agents.engine.qemu import answers
from agents.engine.qemu.block import QemuDisks
from agents.engine.qemu.bounded import bounded

Execute = Callable[..., Awaitable[Any]]

_POLL_S = 0.003
_CANCEL_S = 1.0
_FREE_S = 0.3
"""How long a guest that may stand still waits for a QEMU that a lost disk target may have stopped."""


class QemuEnding:
    """Of one QEMU's migrations. `execute` is QMP's main connection; `urgently` takes commands out of band."""

    def __init__(
        self, state: Callable[[float], Awaitable[VmmState]], execute: Execute, urgently: Execute, disks: QemuDisks
    ) -> None:
        self._state = state
        self._execute = execute
        self._urgently = urgently
        self._disks = disks

    async def abort(self, timeout_s: float) -> VmmState:
        """See `base.Vmm.abort`."""
        async with bounded("abort", timeout_s):
            over = False
            await self._disks.free(_FREE_S)
            with contextlib.suppress(EngineTimeout):
                # Not asked first whether there is anything to cancel: the guest may stand still, and QEMU takes this
                # for nothing when there is not.
                await self._execute("migrate_cancel", timeout_s=_CANCEL_S)
                over = await self._over_within(_CANCEL_S)
            if not over:
                await self._yank()
            final = await self._settled()
        # The return socket is shut down before the status changes, so a cancel may end as a failure.
        return replace(final, status=EngineStatus.CANCELLED) if final.status is EngineStatus.FAILED else final

    async def _over_within(self, timeout_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while (await self._state(timeout_s)).status not in answers.OVER:  # noqa: ASYNC110 - no event tells it
                    await asyncio.sleep(_POLL_S)
                return True
        return False

    async def _yank(self) -> None:
        instances = await self._urgently("query-yank", oob=False, timeout_s=0.3) if await self._answers() else None
        if instances is None or {"type": "migration"} in instances:
            with contextlib.suppress(EngineError):
                await self._urgently("yank", {"instances": [{"type": "migration"}]}, timeout_s=1.0, oob=True)

    async def _answers(self) -> bool:
        try:
            await self._execute("query-status", timeout_s=0.2)
        except EngineTimeout:
            return False
        return True

    async def _settled(self) -> VmmState:
        """After the end: the vCPUs have their final state and QEMU has cleaned up. The caller bounds it."""
        while True:
            with contextlib.suppress(EngineTimeout):
                now = await self._state(1.0)
                if now.status in answers.OVER and now.run_state is not RunState.FINISHING:
                    await self.cleaned_up(2.0)
                    return now
            await asyncio.sleep(_POLL_S)

    async def cleaned_up(self, timeout_s: float) -> None:
        """QEMU <= 10.2 cleans up after it reports the end; new capabilities before that made it abort."""
        async with bounded("clean-up after a migration", timeout_s):
            while {"type": "migration"} in await self._execute("query-yank"):  # noqa: ASYNC110 - as above
                await asyncio.sleep(_POLL_S)
