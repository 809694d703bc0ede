"""Nodes as they were last read, for whoever is told of every one that moves: what has not moved is not read again.

A node that is read from here is as new as everything that was announced to this process (`Store.watch_tree`), and that
is as new as any answer it has had: after a barrier, or a write of its own, nobody finds here what was there before.
Several nodes that are read one after the other need not be of the same instant, as with the ledger itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from orchestrator.ledger.store import Store, Versioned

Follower = Callable[[], None]


class Nodes:
    """Whoever owns it says what moved (`moved`), that anything may have (`everything`), and that moves may be missed
    from now on (`lost`, as it begins); until the next `everything` each read asks the ledger."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sure = False
        self._known: dict[str, Versioned | None] = {}
        self._kept: set[str] = set()
        self._reading: dict[str, asyncio.Task[Versioned | None]] = {}
        """What is being read. One that a move has overtaken is nobody's any more but its callers'."""
        self._followers: dict[str, list[Follower]] = {}

    async def read(self, path: str, *, keep: bool = False) -> Versioned | None:
        """As `Store.read`. Remembered while the path is followed, or with `keep` until it is forgotten. Raises
        StoreUnavailable."""
        if keep:
            self._kept.add(path)
        if path in self._known:
            return self._known[path]
        if not self._sure:
            return await self._store.read(path)
        reading = self._reading.get(path)
        if reading is None:
            reading = self._reading[path] = asyncio.ensure_future(self._store.read(path))
            reading.add_done_callback(lambda done: self._read(path, done))
        return await asyncio.shield(reading)

    def _read(self, path: str, done: asyncio.Task[Versioned | None]) -> None:
        failed = done.cancelled() or done.exception() is not None
        if self._reading.get(path) is not done:
            return
        del self._reading[path]
        if not failed and self._is_wanted(path):
            self._known[path] = done.result()

    def _is_wanted(self, path: str) -> bool:
        return path in self._kept or path in self._followers

    def follow(self, path: str, follower: Follower) -> Callable[[], None]:
        """Call back whenever the node moved, or may have. Returns a function that ends it, after which the node is not
        remembered any more unless others want it."""
        self._followers.setdefault(path, []).append(follower)

        def end() -> None:
            followers = self._followers.get(path, [])
            if follower in followers:
                followers.remove(follower)
            if not followers:
                self._followers.pop(path, None)
            if not self._is_wanted(path):
                self._known.pop(path, None)

        return end

    def moved(self, path: str) -> None:
        """The node is not what it was."""
        self.doubt(path)
        for follower in list(self._followers.get(path, ())):
            follower()

    def doubt(self, path: str) -> None:
        """Ask the ledger the next time, whatever was announced."""
        self._known.pop(path, None)
        self._reading.pop(path, None)

    def forget(self, path: str) -> None:
        """Nobody keeps it any more."""
        self._kept.discard(path)
        if not self._is_wanted(path):
            self._known.pop(path, None)

    def everything(self) -> None:
        """Any node may have moved; every move from here on is told."""
        self._sure = True
        self._drop()
        for followers in list(self._followers.values()):
            for follower in list(followers):
                follower()

    def lost(self) -> None:
        """Moves may be missed from here on."""
        self._sure = False
        self._drop()

    def _drop(self) -> None:
        self._known.clear()
        self._reading.clear()

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._known)
