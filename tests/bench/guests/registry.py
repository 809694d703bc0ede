"""What a figure of `make bench-guests` is, for those who add one.

A module of this package that measures something has a mapping `FIGURES` from the names that `--only` takes to its
scenes, and stands in `MODULES` of `__main__.py`. A scene raises `NotHere` where something it needs is missing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.bench.fleet.figures import Figure, at_most, beside, percentile

__all__ = ["Asked", "Figure", "NotHere", "Scene", "at_least", "at_most", "beside", "not_taken", "percentile", "spread"]


class NotHere(Exception):
    """The figure cannot be taken on this machine; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says to every scene."""

    scale: float = 1.0

    def many(self, count: int, least: int = 1) -> int:
        """So many of `count` as `--scale` asks for."""
        return max(least, round(count * self.scale))


@dataclass(frozen=True, slots=True)
class Scene:
    """Measures one or several figures that need the same things. `timeout_s` bounds it at full scale."""

    take: Callable[[Asked], Awaitable[list[Figure]]]
    timeout_s: float = 600.0


def at_least(name: str, value: float, unit: str, limit: float, note: str = "") -> Figure:
    return Figure(name, round(value, 2), unit, f">= {limit:g}", value >= limit, note)


def not_taken(name: str, why: str) -> Figure:
    """Neither met nor missed: what was to be measured did not happen."""
    return Figure(name, None, "", note=f"not taken: {why}")


def spread(values: list[float]) -> str:
    """For a note: how many, and between what nine of ten lie."""
    return f"n = {len(values)}, p5 {percentile(values, 0.05):.1f}, p95 {percentile(values, 0.95):.1f}"
