"""PURE. What the probe's disk must hold: a raw image judged from outside, without the guest and without QEMU.

Layout and contents are those of probe.c. A promise is a record whose `fdatasync` returned; the guest's heartbeats say
how many there are, so every record up to the newest heartbeat must be on the disk, and later ones may be.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

SLOTS = 1024
PAGE = 4096
RING_AT = 1 << 20
_WORDS = PAGE // 8
_MAGIC = 0x3150524556524F44
_MASK = (1 << 64) - 1
_HEAD = 4
"""Words of a record before its content: magic, number, generation, check."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one image."""

    checked: int
    """Promised records that were looked for."""
    missing: tuple[int, ...]
    """Numbers of those that are not there, or not whole."""
    newest: int
    """The highest number of any whole record; 0: there is none."""

    @property
    def kept(self) -> bool:
        """Every promise was kept."""
        return not self.missing


def mix(x: int) -> int:
    """The probe's hash of 64 bits."""
    x ^= x >> 31
    x = x * 0x7FB5D329728EA185 & _MASK
    x ^= x >> 27
    x = x * 0x81DADEF4BC2DD44D & _MASK
    return x ^ x >> 33


def seed_of(uuid: str) -> int:
    """What sets one guest's records apart from another's."""
    return int(uuid[:8], 16)


def record(number: int, seed: int) -> bytes:
    """A record as the probe writes it."""
    content = [number * 977 * i + i & _MASK for i in range(_HEAD, _WORDS)]
    check = mix((sum(content) & _MASK) ^ mix(number))
    return struct.pack(f"<{_WORDS}Q", _MAGIC ^ seed, number, 0, check, *content)


def number_of(page: bytes, seed: int) -> int:
    """Of a whole record of the guest with this seed; 0: it is none."""
    if len(page) != PAGE:
        return 0
    magic, number = struct.unpack_from("<2Q", page)
    return number if magic == _MAGIC ^ seed and page == record(number, seed) else 0


def check(read: Callable[[int, int], bytes], seed: int, promised: int) -> Verdict:
    """Judge an image of which `read(offset, size)` gives the bytes. `promised`: the newest promise known outside."""
    found = [number_of(read(RING_AT + slot * PAGE, PAGE), seed) for slot in range(SLOTS)]
    wanted = range(max(1, promised - SLOTS + 1), promised + 1)
    # A slot whose promised record was written over by a later one is as it should be.
    missing = tuple(number for number in wanted if not _follows(found[number % SLOTS], number))
    return Verdict(len(wanted), missing, max(found))


def _follows(found: int, number: int) -> bool:
    return found >= number and found % SLOTS == number % SLOTS
