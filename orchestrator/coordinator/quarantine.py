"""What the leader has set aside: migrations and evacuations whose driver fails, or whose records cannot be read.

They are tried again, ever more slowly, and everything else goes on. Everybody reads the list in the ledger
(`paths.quarantine`): the API shows it beside each resource, `drover status` as a whole.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import structlog

from orchestrator.core.records import Quarantined, QuarantineList

log = structlog.get_logger(__name__)

FIRST_S = 1.0
LONGEST_S = 60.0
MAX_SHOWN = 200
"""Entries in the ledger; the others are only counted there."""
MAX_REASON = 500


class Quarantine:
    """Of one leadership. `changed` is set whenever the list has to be told again."""

    def __init__(
        self, *, first_s: float = FIRST_S, longest_s: float = LONGEST_S, wall_s: Callable[[], float] = time.time
    ) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._wall_s = wall_s
        self._entries: dict[str, Quarantined] = {}
        self._failures: Counter[str] = Counter()
        self.changed = asyncio.Event()

    def entries(self) -> tuple[Quarantined, ...]:
        """All of them."""
        return tuple(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def fail(self, resource: str, error: BaseException) -> float:
        """`resource` is set aside because of `error`. Returns the seconds until it should be tried again."""
        reason = f"{type(error).__name__}: {error}"[:MAX_REASON]
        known = self._entries.get(resource)
        self._failures[resource] += 1
        wait_s = min(self._longest_s, self._first_s * 2 ** min(self._failures[resource] - 1, 16))
        if known is None or known.reason != reason:
            log.error("set aside", resource=resource, reason=reason, again_s=wait_s, exc_info=error)
            since_s = known.since_s if known else self._wall_s()
            self._entries[resource] = Quarantined(resource, reason, since_s)
            self.changed.set()
        return wait_s

    def clear(self, resource: str) -> None:
        """It works again, or is over."""
        self._failures.pop(resource, None)
        if self._entries.pop(resource, None) is not None:
            log.info("no longer set aside", resource=resource)
            self.changed.set()

    def clear_all(self) -> None:
        """A new leadership looks for itself."""
        self._entries.clear()
        self._failures.clear()
        self.changed.set()

    def list(self) -> QuarantineList:
        """As it is told: the oldest first, bounded."""
        entries = sorted(self._entries.values(), key=lambda entry: (entry.since_s, entry.resource))
        return QuarantineList(tuple(entries[:MAX_SHOWN]), left_out=max(0, len(entries) - MAX_SHOWN))
