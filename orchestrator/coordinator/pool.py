"""The workers of a coordinator: which one drives what, and who is replaced when it is silent.

A worker that froze, hangs or never gets ready holds all its migrations up without an error. So each is asked again and
again whether it is well; one that is silent for too long is ended, another takes its place, and its migrations are
handed out anew. Should the silent one wake after all, it does no harm: its writes are compare-and-set like everybody's,
and what it finds in the records then is over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import structlog

log = structlog.get_logger(__name__)

LOOK_S = 1.0
PING_S = 2.0
SILENT_S = 5.0
"""One that was well is replaced after so much silence; with LOOK_S and PING_S less than ten seconds."""
START_S = 8.0
"""The same for one that starts; doubled with each replacement in a row, so that a slow machine gets there as well."""
SLOWEST_START_S = 128.0
CALM_S = 120.0
"""A worker whose predecessor was replaced less than this ago gets twice the time, and so on: where the machine is too
slow for its load, to hand out everything anew only adds to that."""


class WorkerLost(Exception):
    """The worker that drove a migration is gone; the migration goes on as its records say, under another worker."""


class WorkerPort(Protocol):
    """One worker, in a process of its own."""

    async def drive(self, migration: str, epoch: int, shard: int = 0) -> str:
        """The terminal phase, WAITING or "DEPOSED". Raises WorkerLost when its process died."""
        ...

    async def ping(self) -> bool:
        """Whether it has a ledger and can drive. Raises WorkerLost, or never returns: the caller bounds it."""
        ...

    def kill(self) -> None:
        """End its process for good, at once, even if it is frozen. Never raises."""
        ...


Start = Callable[[int, int], WorkerPort]
"""(seat, how many sat there before) -> a worker that is about to start."""


@dataclass(slots=True)
class _Member:
    worker: WorkerPort
    well_s: float
    answered: bool = False
    silent: bool = True
    """It did not answer when it was last asked."""
    lost: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Seat:
    number: int
    member: _Member
    before: int = 0
    in_a_row: int = 0
    replaced_s: float = float("-inf")
    lately: int = 0
    """Replacements, each less than CALM_S after the one before; 0 once the last is older."""

    def patience_s(self, now_s: float) -> float:
        """How long its worker may be silent."""
        if not self.member.answered:
            return min(SLOWEST_START_S, START_S * 2**self.in_a_row)
        if now_s - self.replaced_s > CALM_S:
            self.lately = 0
        return min(SLOWEST_START_S, SILENT_S * 2**self.lately)


class Pool:
    """`has_ledger`: whether the coordinator itself has one. While it has none, no worker can get ready either."""

    def __init__(
        self,
        size: int,
        start: Start,
        *,
        has_ledger: Callable[[], bool],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start = start
        self._has_ledger = has_ledger
        self._clock_s = clock_s
        self._seats = [_Seat(number, _Member(start(number, 0), clock_s())) for number in range(size)]
        self.replaced = 0

    @property
    def well(self) -> tuple[int, int]:
        """How many workers answered when they were last asked, and how many there are."""
        return sum(not seat.member.silent for seat in self._seats), len(self._seats)

    async def dispatch(self, migration: str, epoch: int, shard: int = 0) -> str:
        """Always the same seat for a migration, so that a repeated hand-out joins the driver that runs.

        Ends with the migration or with its worker: nobody waits for one that is silent. Raises WorkerLost.
        """
        member = self._seats[int(migration[:8].encode().hex(), 16) % len(self._seats)].member
        call = asyncio.ensure_future(member.worker.drive(migration, epoch, shard))
        lost = asyncio.ensure_future(member.lost.wait())
        try:
            await asyncio.wait({call, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise WorkerLost("its worker was silent and has been replaced")
            return call.result()
        finally:
            call.cancel()
            lost.cancel()

    async def tend(self) -> None:
        """One look at every worker; silent ones are replaced."""
        await asyncio.gather(*(self._look(seat) for seat in self._seats))
        await asyncio.sleep(LOOK_S)

    async def _look(self, seat: _Seat) -> None:
        member = seat.member
        well = False
        try:
            async with asyncio.timeout(PING_S):
                ready = await member.worker.ping()
            well = ready or not self._has_ledger()
        except (TimeoutError, WorkerLost):
            pass
        now_s = self._clock_s()
        member.silent = not well
        if well:
            member.well_s, member.answered, seat.in_a_row = now_s, True, 0
            return
        silent_s = now_s - member.well_s
        if silent_s > seat.patience_s(now_s):
            log.error("a worker is silent: another takes its place", worker=seat.number, silent_s=round(silent_s, 1))
            self._replace(seat, now_s)

    def _replace(self, seat: _Seat, now_s: float) -> None:
        old = seat.member
        old.worker.kill()
        seat.before += 1
        seat.in_a_row += 1
        seat.lately, seat.replaced_s = seat.lately + 1, now_s
        self.replaced += 1
        seat.member = _Member(self._start(seat.number, seat.before), now_s)
        old.lost.set()
