"""How old things in the ledger are, without anybody's wall clock: the ledger counts intervals, and orders them.

The leader moves the count on once it has seen it stand still for TICK_S on its own monotonic clock; the zxids of the
moves say which writes came before which of them. So an interval lasts TICK_S at least, and the count stands still while
nobody leads: things are taken for younger than they are, never for older (docs/adr/0017).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.ledger import paths
from orchestrator.ledger.ledger import op_create, op_set
from orchestrator.ledger.records import decode
from orchestrator.ledger.store import Store

TICK_S = 1_800.0
KEPT_TICKS = 10_000
"""208 days; what is older has at least that age."""
MAX_AGE_H = (KEPT_TICKS - 1) * TICK_S / 3600


@dataclass(frozen=True, slots=True)
class Ticks:
    """`/reqclock`: zxids of the latest moves of the count but the very last, which is the node's own."""

    zxids: tuple[int, ...] = ()


class LedgerClock:
    """`look` from time to time; `age_h` answers from the last look."""

    def __init__(self, store: Store, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock_s = clock_s
        self._seen = -2
        """Version of the count."""
        self._since_s = 0.0
        self._moves: tuple[int, ...] = ()

    async def look(self) -> None:
        """Move the count on when it is time. Raises StoreUnavailable, BadRecord."""
        path = paths.LEDGER_CLOCK
        node = await self._store.read(path)
        version = node.version if node is not None else -1
        known: tuple[int, ...] = decode(Ticks, node.data, path=path).zxids if node is not None and node.data else ()
        self._moves = (*known, node.mzxid) if node is not None else known
        if version != self._seen:
            self._seen, self._since_s = version, self._clock_s()
        elif self._clock_s() - self._since_s >= TICK_S:
            moved = Ticks((*known, node.mzxid)[-KEPT_TICKS:] if node is not None and node.data else ())
            write = op_create(path, moved) if node is None else op_set(path, moved, node.version)
            await self._store.multi([write])  # whoever was first: it has moved, which the next look sees

    def age_h(self, zxid: int) -> float:
        """At least so long ago was the write of this zxid."""
        whole = len(self._moves) - bisect_left(self._moves, zxid) - 1
        return max(0, whole) * TICK_S / 3600
