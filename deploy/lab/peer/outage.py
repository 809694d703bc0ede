"""PURE. How long a guest was cut off from a peer outside, by the times at which its answers came.

The peer sends a numbered message each `every_ms`, over UDP and over one TCP connection, and stamps each answer with its
own clock. An outage is the longest time without an answer, less the time between two messages: what is left when every
message is answered at once is 0. TCP's is longer than UDP's: what was lost is sent again when its timer says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Gap:
    """Two answers one after the other."""

    before_ns: int
    after_ns: int

    @property
    def ms(self) -> float:
        """Between the two."""
        return (self.after_ns - self.before_ns) / 1e6


@dataclass(frozen=True, slots=True)
class Outage:
    """Of one guest in one window. None: too few answers to say."""

    udp_ms: float | None
    tcp_ms: float | None
    wrong: int = 0
    """Answers that were not what had been sent: a byte of the connection was lost, doubled or changed."""
    breaks: int = 0
    """TCP connections that ended while the guest was watched."""


def longest_gap(stamps: Sequence[int], start_ns: int, end_ns: int) -> Gap | None:
    """The longest time between two answers that meets the window; None when no two do. `stamps` in order."""
    gaps = (Gap(*pair) for pair in pairwise(stamps) if pair[1] >= start_ns and pair[0] <= end_ns)
    return max(gaps, key=lambda gap: gap.ms, default=None)


def outage_ms(stamps: Sequence[int], every_ms: float, start_ns: int, end_ns: int) -> float | None:
    """See the head of this file. None as well while the guest has not answered again since the window began."""
    gap = longest_gap(stamps, start_ns, end_ns)
    return None if gap is None else max(0.0, gap.ms - every_ms)


def median(values: Iterable[float]) -> float | None:
    """The middle one, the lower of two; None when there are none."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2] if ordered else None
