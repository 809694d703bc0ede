"""All shards of the fleet as one coordinator sees them: it campaigns for each, and keeps its even part.

Each shard has a `Supervisor` of its own, with an election and an epoch of its own. Of the seats that are there each
should lead as many shards as the others; who leads more hands over, after a while, so that a seat which comes and goes
moves nothing. What nobody leads is taken by whoever is there.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import structlog

from orchestrator.coordinator.supervisor import LEDGER, Limits, Status, Supervisor
from orchestrator.core.shards import Share, portion, preferred
from orchestrator.ledger import paths
from orchestrator.ledger.store import Store

log = structlog.get_logger(__name__)

LOOK_S = 2.0
HAND_OVER_S = 10.0
"""How long another seat must have been there before it gets what it should lead; doubled each time it came back."""
HAND_OVER_MAX_S = 1_280.0


def shares_of(shards: int) -> list[Share]:
    """Every part of a fleet that is divided into so many shards."""
    return [Share(shard, shards) for shard in range(shards)]


def share_limits(limits: Limits, shards: int) -> Limits:
    """What each of the shards may admit, so that all together keep to the limits."""
    return replace(
        limits,
        starts_per_s=limits.starts_per_s / shards,
        burst=portion(limits.burst, shards),
        max_concurrent=portion(limits.max_concurrent, shards),
        max_per_source=portion(limits.max_per_source, shards),
    )


class Shares:
    """One supervisor per shard, and who should lead what."""

    def __init__(
        self, store: Store, name: str, supervisors: list[Supervisor], clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._name = name
        self._supervisors = supervisors
        self._clock_s = clock_s
        self._unwanted_since_s: dict[int, float] = {}
        """Since when a shard is led here that another seat should lead."""
        self._patience_s = [HAND_OVER_S] * len(supervisors)

    async def run(self) -> None:
        """For ever."""
        await asyncio.gather(*(supervisor.run() for supervisor in self._supervisors))

    async def tend(self) -> None:
        """One look at the seats. Raises StoreUnavailable."""
        if len(self._supervisors) > 1:
            self.even_out(await self._store.children(paths.SEATS))
        await asyncio.sleep(LOOK_S)

    def even_out(self, seats: tuple[str, ...]) -> None:
        """Hand over what another seat has been there to lead for long enough."""
        now_s = self._clock_s()
        for shard, supervisor in enumerate(self._supervisors):
            wanted = preferred(shard, seats)
            supervisor.prefers_another = wanted not in ("", self._name)
            if not (supervisor.prefers_another and supervisor.status.leading):
                self._unwanted_since_s.pop(shard, None)
                continue
            since_s = self._unwanted_since_s.setdefault(shard, now_s)
            if now_s - since_s >= self._patience_s[shard]:
                log.info("handing a shard over", shard=shard, to=wanted)
                self._patience_s[shard] = min(2 * self._patience_s[shard], HAND_OVER_MAX_S)
                del self._unwanted_since_s[shard]
                supervisor.hand_over()

    def set_aside(self) -> Counter[tuple[str, ...]]:
        """As `Supervisor.set_aside`, of all shards."""
        return sum((supervisor.set_aside() for supervisor in self._supervisors), Counter[tuple[str, ...]]())

    def queued(self) -> Counter[tuple[str, ...]]:
        """As `Supervisor.queued`, of all shards."""
        return sum((supervisor.queued() for supervisor in self._supervisors), Counter[tuple[str, ...]]())

    @property
    def status(self) -> Status:
        """Of all shards together. Progress is that of the slowest: one that stands still is stuck."""
        each = [supervisor.status for supervisor in self._supervisors]
        waiting = [one.waiting_for for one in each if one.waiting_for]
        finished: dict[str, int] = {}
        for one in each:
            for phase, count in one.finished.items():
                finished[phase] = finished.get(phase, 0) + count
        return Status(
            leading=any(one.leading for one in each),
            epoch=max(one.epoch for one in each),
            waiting_for=LEDGER if LEDGER in waiting else next(iter(waiting), ""),
            progress=min(one.progress for one in each),
            driving=sum(one.driving for one in each),
            jobs=sum(one.jobs for one in each),
            quarantined=sum(one.quarantined for one in each),
            adopted=sum(one.adopted for one in each),
            finished=finished,
        )
