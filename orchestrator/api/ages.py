"""How long migrations and evacuations have taken, from durations alone.

Stamps of different processes may not be subtracted: one API whose clock is eight days ahead would show every migration
of the others as eight days long. So a duration is put together from pieces that were each measured by one monotonic
clock: what the coordinators had counted when they last wrote the state (`spent_ms`), how long this API has seen that
state, and how long the source's agent says that the attempt has been under way.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MAX_REMEMBERED = 10_000


@dataclass(slots=True)
class _Seen:
    version: int
    """Of the state's node."""
    at_s: float
    """When this API first saw that version."""
    before_ms: float = 0.0
    """How long it had been so by then, as far as is known."""


class Ages:
    """What this API remembers of states that still change: those that were asked for last."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._seen: OrderedDict[str, _Seen] = OrderedDict()

    def elapsed_ms(self, resource: str, version: int, spent_ms: float, attempt_ms: float = 0.0) -> float:
        """Of a resource that is not over. `spent_ms`: what its state says, in that version of its node; `attempt_ms`:
        of the attempt that began with that version.

        Never more than what has passed. It may be less: of a state that nobody looked at, and in which no attempt runs,
        only `spent_ms` is known at first.
        """
        now_s = self._clock_s()
        seen = self._seen.get(resource)
        if seen is None or seen.version != version:
            seen = self._seen[resource] = _Seen(version, now_s)
        self._seen.move_to_end(resource)
        while len(self._seen) > MAX_REMEMBERED:
            self._seen.popitem(last=False)
        here_ms = (now_s - seen.at_s) * 1000
        seen.before_ms = max(seen.before_ms, attempt_ms - here_ms)
        return spent_ms + here_ms + seen.before_ms
