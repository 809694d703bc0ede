"""Placements of one worker: judged one at a time, written side by side.

A placement is a compare-and-set on what its destination has promised. Two for the same host at once would lose a race
against each other; two for different hosts have nothing to do with each other, and a write takes as long as the quorum
takes. So whoever judges has the turn, and gives it up before the write. Several workers do not know of each other: of
hosts that will do alike each prefers those of its own lane, and who loses a race all the same looks again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator


class Placing:
    """One per worker."""

    def __init__(self, lane: int = 0, lanes: int = 1) -> None:
        self.lane = lane, lanes
        """Which of the hosts that will do alike come first here: others have lanes of their own."""
        self.turn = asyncio.Lock()
        """To be held from the look at the fleet until `writing` has been entered."""
        self._writing: dict[str, asyncio.Event] = {}
        self._written = set[str]()

    def look(self) -> None:
        """In one's turn: whoever looks at the fleet does it from here on."""
        self._written.clear()

    @property
    def busy(self) -> frozenset[str]:
        """Hosts that a placement is being written for, or was since the look began: what they have promised is not, or
        need not be, what was seen."""
        return frozenset(self._writing) | self._written

    @contextlib.contextmanager
    def writing(self, host: str) -> Generator[None]:
        """A placement there is being written. Raises ValueError for a host that is busy."""
        if host in self._writing:
            raise ValueError(f"a placement on {host} is being written already")
        over = self._writing[host] = asyncio.Event()
        try:
            yield
        finally:
            del self._writing[host]
            self._written.add(host)
            over.set()

    async def idle(self, host: str) -> None:
        """Wait until nothing is being written for a host; as long as the ledger takes."""
        while (over := self._writing.get(host)) is not None:
            await over.wait()
