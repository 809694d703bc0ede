"""One attempt that this host is the destination of, as its agent holds it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from agents.guest.copies import Copy
from agents.handover.destination import DestinationStage
from agents.handover.destination_shell import DestinationShell
from agents.handover.peer import AttemptKey, SourceClient
from agents.handover.words import Command
from agents.shims.base import Frame
from orchestrator.core.agent import AttemptStatus
from orchestrator.core.ids import AckRequest, AttemptRef
from orchestrator.core.migration import Prepared

_WARM_S = 2.0
_STARTED_S = 0.7


@dataclass
class Arrival:
    """Made when the copy waits for its stream, kept until it is the guest or is gone."""

    runner: DestinationShell
    copy: Copy
    peer: SourceClient
    prepared: Prepared | None
    """What its caller was told, and is told again; None: the agent was restarted, and the attempt is only ended."""

    def __post_init__(self) -> None:
        self.peer.timeline = lambda: self.runner.timeline

    @property
    def ref(self) -> AttemptRef:
        return self.runner.state.ref

    @property
    def key(self) -> AttemptKey:
        return self.ref.migration, self.ref.attempt, self.runner.state.inc

    @property
    def acks(self) -> asyncio.Queue[AckRequest]:
        return self.peer.acks

    async def frame(self, frame: Frame) -> None:
        await self.runner.frame(frame)

    async def go(self, inc: str, want_run: bool) -> bool:
        """True when the guest was started within the call, which tells the source when its blackout ended."""
        self.runner.go(inc, want_run)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STARTED_S):
                await self.runner.started.wait()
        return self.runner.started.is_set()

    async def receive(self, first: Sequence[Command] = ()) -> DestinationStage:
        """To DONE or discard."""
        warm = asyncio.create_task(self._keep_warm())
        try:
            return (await self.runner.run(first)).stage
        finally:
            warm.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await warm

    async def _keep_warm(self) -> None:
        """No connection may have to be made in the blackout."""
        while True:
            await self.peer.warm()
            await asyncio.sleep(_WARM_S)

    def status(self) -> AttemptStatus:
        return AttemptStatus(self.ref, None, None, ended=self.runner.state.stage.ended)
