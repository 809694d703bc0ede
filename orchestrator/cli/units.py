"""Numbers for people: sizes in MiB, rates in Mbit/s, short times in ms; and the other way round for options."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime

SHORTEST_ID = 8
"""Long ids are shown with at least this many characters, and with as many as tell them apart."""

LONG_ID = 24
"""From this length on an id is abbreviated; a shorter one was made for people."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B?|B)?", re.IGNORECASE)
_SIZES = {"b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|min|h)", re.IGNORECASE)
_TIMES_MS = {"ms": 1, "s": 1000, "m": 60_000, "min": 60_000, "h": 3_600_000}
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([mg])bit", re.IGNORECASE)
_RATES_MBPS = {"m": 1, "g": 1000}


def size(count: float) -> str:
    """Bytes as people read them: "512 B", "16.0 KiB", "64.2 MiB"."""
    for unit, step in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= step:
            return f"{count / step:.1f} {unit}"
    return f"{count:.0f} B"


def milliseconds(value: float) -> str:
    """ "6.3 ms", "840 ms", then as `seconds`."""
    if value >= 10_000:
        return seconds(value / 1000)
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def seconds(value: float) -> str:
    """ "4.2 s", "41 s", "3 min 20 s", "2 h 5 min"."""
    if value < 10:
        return f"{max(0.0, value):.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def rate(mbps: float) -> str:
    """ "941 Mbit/s", "3.2 Mbit/s"."""
    return f"{mbps:.0f} Mbit/s" if mbps >= 10 or not mbps else f"{mbps:.1f} Mbit/s"


def clock(wall_s: float, now_s: float) -> str:
    """Local time of day, with the date when it was not within the last twelve hours; empty when not known."""
    if wall_s <= 0:
        return ""
    at = datetime.fromtimestamp(wall_s).astimezone()
    return at.strftime("%H:%M:%S" if abs(now_s - wall_s) < 12 * 3600 else "%Y-%m-%d %H:%M")


def count(number: int, noun: str) -> str:
    """ "1 guest", "3 guests"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def abbreviate(ids: Iterable[str]) -> dict[str, str]:
    """The shortest beginning that tells each long id from the others, at least `SHORTEST_ID` characters."""
    ordered = sorted(set(ids))
    short: dict[str, str] = {}
    for index, one in enumerate(ordered):
        neighbours = ordered[max(0, index - 1) : index] + ordered[index + 1 : index + 2]
        need = max((_common(one, other) + 1 for other in neighbours), default=0)
        short[one] = one if len(one) < LONG_ID else one[: max(SHORTEST_ID, need)]
    return short


def short(one: str) -> str:
    """An id where it stands alone."""
    return one if len(one) < LONG_ID else one[:SHORTEST_ID]


def _common(one: str, other: str) -> int:
    """Length of the beginning that both share."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def natural(name: str) -> list[tuple[int, str]]:
    """Sorting key: host-2 comes before host-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


# --- what people write ------------------------------------------------------------------------------------------------


def parse_bytes(text: str) -> int:
    """ "64KiB", "1.5MiB", "4096" in bytes. ValueError with a sentence for anything else."""
    return _whole(text, "b", 1, "must be a number of bytes or a size such as 64KiB or 1MiB")


def parse_mib(text: str) -> int:
    """ "64MiB", "1.5GiB", "64" (MiB) in MiB. ValueError with a sentence for anything else."""
    return _whole(text, "mib", 1 << 20, "must be a number of MiB or a size such as 64MiB or 1GiB")


def _whole(text: str, unit: str, step: int, wanted: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    word = (found[2] or unit).lower() if found else ""
    if found and len(word) == 2 and word.endswith("i"):
        word += "b"
    if not found or word not in _SIZES:
        raise ValueError(f"{wanted}, not {text!r}")
    exact = float(found[1]) * _SIZES[word] / step
    if exact != int(exact):
        raise ValueError(f"{wanted}, and come to a whole number, not {text!r}")
    return int(exact)


def parse_ms(text: str) -> int:
    """ "500ms", "30s", "2m", "1h" in ms. ValueError with a sentence for anything else."""
    found = _TIME.fullmatch(text.strip())
    if not found:
        raise ValueError(f"must be a time with its unit such as 500ms, 30s or 2m, not {text!r}")
    return round(float(found[1]) * _TIMES_MS[found[2].lower()])


def parse_mbps(text: str) -> int:
    """ "500mbit", "2.5gbit" in Mbit/s; "0": no bound. ValueError with a sentence for anything else."""
    if text.strip() == "0":
        return 0
    found = _RATE.fullmatch(text.strip())
    if not found or not float(found[1]):
        raise ValueError(f"must be a bandwidth such as 500mbit or 2.5gbit, not {text!r}")
    return max(1, round(float(found[1]) * _RATES_MBPS[found[2].lower()]))
