"""Texts that repeat what somebody else wrote: kept short, for a refusal has to fit into the trailers of an answer, and
harmless where a terminal shows them."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 200
"""Characters of a foreign text that a sentence of ours repeats."""
NAMED = 5
"""Things that a sentence names one by one; the rest is counted."""

_CONTROLS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD),
}


def visible(text: str) -> str:
    """The text with a sign in place of each character that a terminal would obey, one for one: escape sequences (which
    clear the screen or write over it) and changes of the direction of writing. Line ends and tabs stay."""
    return text.translate(_CONTROLS)


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
