"""What every record in the ledger has in common: it keeps what a newer version of Drover wrote into it."""

from __future__ import annotations

import re
from dataclasses import Field, dataclass, field, fields
from enum import StrEnum
from typing import Any, Self

READS = 1
"""Which records this version reads: those whose `min_reader` is this or less. Raised by one whenever a record can say
something that an older version would misread (docs/upgrade.md)."""
MIN_READER = "min_reader"
"""The key under which a record says so. Without it every version may read it."""


@dataclass(frozen=True, slots=True)
class Record:
    """Base of everything that is stored as JSON.

    While a cluster is being upgraded, an older process reads and rewrites records of a newer one. The fields that it
    does not know stand in `newer` and are written back as they were (`dataclasses.replace` carries them along);
    fields that an older version did not write take their defaults.
    """

    newer: dict[str, Any] = field(default_factory=dict[str, Any], compare=False, repr=False, kw_only=True)
    """By name, as JSON. Never decided upon."""

    def min_reader(self) -> int:
        """The least `READS` of a version that may act on this record as it stands. A record that uses what older
        versions would overlook, where overlooking it does harm, answers with the version that brought it; one that
        does not use it stays readable for all."""
        return 1


def known_fields(kind: type[Any]) -> tuple[Field[Any], ...]:
    """The fields that this version gives a meaning to, in order."""
    return tuple(each for each in fields(kind) if each.name != "newer")


class OpenWord(StrEnum):
    """Words that explain and are passed on. One that only a newer version knows is kept as it is; no comparison with a
    word of this version is true of it."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str) or re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", value) is None:
            return None
        word = str.__new__(cls, value)
        word._name_ = value
        word._value_ = value
        return word
