"""Texts that repeat what somebody else wrote, kept short: a refusal has to fit into the trailers of an answer."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 200
"""Characters of a foreign text that a sentence of ours repeats."""
NAMED = 5
"""Things that a sentence names one by one; the rest is counted."""


def clip(text: str, limit: int = SHOWN) -> str:
    """At most `limit` characters, the last one an ellipsis where something was cut off."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def quoted(value: object, limit: int = SHOWN) -> str:
    """The value between quotes, as it came, clipped."""
    return clip(repr(value), limit)


def handful(things: Iterable[str], separator: str = ", ", limit: int = NAMED) -> str:
    """The first few, and how many more there are."""
    found = list(things)
    if len(found) <= limit:
        return separator.join(found)
    return separator.join([*found[:limit], f"and {len(found) - limit} more"])
