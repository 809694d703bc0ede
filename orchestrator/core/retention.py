"""What may be forgotten of what is over: bounds by age and by number, and never what something that lives still names.

Pure. Ages are counted by the ledger's own clock (`ledger.clock`), so that no wall clock that jumps forgets anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum


class Kept(StrEnum):
    """What is kept for a while after its end."""

    MIGRATIONS = "migrations"
    EVACUATIONS = "evacuations"
    GUESTS = "guests"
    """Those that are GONE."""
    REQUESTS = "requests"
    """Request ids: a call that is repeated after it was forgotten is carried out a second time."""
    CERTIFICATES = "certificates"
    """Of power cycles that are over."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Kept while younger than `max_age_h` and among the newest `max_count`, and in any case for `min_age_h`."""

    max_age_h: float
    """What is older goes."""
    max_count: int
    """Of more than these the oldest go."""
    min_age_h: float = 1.0
    """What is younger stays in any case."""

    def problems(self) -> list[str]:
        """What is wrong with it; empty: nothing."""
        found: list[str] = []
        if self.max_count < 0:
            found.append(f"max_count is {self.max_count}: it is 0 or more")
        if self.min_age_h < 0:
            found.append(f"min_age_h is {self.min_age_h:g}: it is 0 or more")
        if self.max_age_h < self.min_age_h:
            found.append(f"max_age_h ({self.max_age_h:g}) is less than min_age_h ({self.min_age_h:g})")
        return found


@dataclass(frozen=True, slots=True)
class Retention:
    """The bounds of a ledger; docs/operations.md explains them."""

    migrations: Bound = Bound(30 * 24, 20_000)
    """Ended migrations with their attempts."""
    evacuations: Bound = Bound(90 * 24, 1_000)
    """Ended evacuations."""
    guests: Bound = Bound(30 * 24, 20_000)
    """Guests that are gone."""
    requests: Bound = Bound(7 * 24, 100_000, min_age_h=24.0)
    """Request ids: a call repeated later is carried out again."""
    certificates: Bound = Bound(180 * 24, 10_000, min_age_h=24.0)
    """Certificates of power cycles that are over."""
    removals_per_s: float = 20.0
    """The pace: what lives has the ledger first."""

    def of(self, kind: Kept) -> Bound:
        """The bound of one kind."""
        bounds = {
            Kept.MIGRATIONS: self.migrations,
            Kept.EVACUATIONS: self.evacuations,
            Kept.GUESTS: self.guests,
            Kept.REQUESTS: self.requests,
            Kept.CERTIFICATES: self.certificates,
        }
        return bounds[kind]

    def problems(self) -> list[str]:
        """What is wrong with it; empty: nothing."""
        found = [f"{kind}: {problem}" for kind in Kept for problem in self.of(kind).problems()]
        if self.removals_per_s <= 0:
            found.append(f"removals_per_s is {self.removals_per_s:g}: it is more than 0")
        return found


@dataclass(frozen=True, slots=True)
class Ended:
    """Something that is over."""

    name: str
    order: int
    """When it ended, in the ledger's own order; larger is later."""
    age_h: float
    """At least this long ago."""


def surplus(ended: Iterable[Ended], bound: Bound, *, needed: Collection[str] = ()) -> list[str]:
    """Names of what may go, the oldest first. `needed` is named by something that lives: it stays, and takes none of
    the places of the others."""
    loose = sorted((one for one in ended if one.name not in needed), key=lambda one: (-one.order, one.name))
    gone = [
        one
        for number, one in enumerate(loose)
        if one.age_h >= bound.min_age_h and (one.age_h >= bound.max_age_h or number >= bound.max_count)
    ]
    return [one.name for one in reversed(gone)]
