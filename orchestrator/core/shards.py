"""How a fleet is shared out between coordinators: what belongs to which shard, and who should lead it.

A shard is a part of the fleet that one coordinator leads at a time, under an epoch of its own. A guest, and each of its
migrations, belongs to the shard that its uuid names, an evacuation to that of its id; what concerns a host as a whole
belongs to shard 0. Nothing is stored about it: whoever knows the number of shards knows the shard.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

MAX_SHARDS = 64


@dataclass(frozen=True, slots=True)
class Share:
    """One shard of how many."""

    shard: int = 0
    shards: int = 1

    def has(self, name: str) -> bool:
        """Whether a guest, by its uuid, or an evacuation, by its id, belongs to it."""
        return shard_of(name, self.shards) == self.shard


def shard_of(name: str, shards: int) -> int:
    """Of a guest's uuid or an evacuation's id. The same in every process and version."""
    return zlib.crc32(name.encode()) % shards if shards > 1 else 0


def preferred(shard: int, seats: Sequence[str]) -> str:
    """The seat that should lead a shard, of those that are there: each gets its even part. Empty: none is there."""
    there = sorted(seats)
    return there[shard % len(there)] if there else ""


def portion(limit: int, shards: int) -> int:
    """What one shard may have of a limit that holds for the fleet, so that all together do not exceed it. At least 1:
    a limit below the number of shards is exceeded."""
    return max(1, limit // shards)
