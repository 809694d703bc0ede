"""Nodes as they were last read, for whoever is told of every one that moves: what has not moved is not read again.

A node that is read from here is as new as everything that was announced to this process (`Store.watch_tree`), and that
is as new as any answer it has had: after a barrier, or a write of its own, nobody finds here what was there before.
Several nodes that are read one after the other need not be of the same instant, as with the ledger itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.ledger.gather import each
from orchestrator.ledger.store import Store, StoreUnavailable, Versioned

Follower = Callable[[], None]

_AT_ONCE = 32


async def below(store: Store, path: str) -> dict[str, Versioned]:
    """The nodes directly below `path`, by name. Raises StoreUnavailable."""
    names = await store.children(path)
    nodes = await each(names, lambda name: store.read(f"{path}/{name}"), at_once=_AT_ONCE)
    return {name: node for name, node in zip(names, nodes, strict=True) if node is not None}


@dataclass(slots=True)
class _Family:
    """The nodes directly below one, of which those in `moved` are to be read again."""

    known: dict[str, Versioned] = field(default_factory=dict[str, Versioned])
    moved: set[str] = field(default_factory=set[str])
    listed: bool = False
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of whoever reads what moved: nobody else is to be told meanwhile that nothing has."""


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
        self._families: dict[str, _Family] = {}
        """By the node above."""

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

    async def below(self, path: str) -> dict[str, Versioned]:
        """The nodes directly below `path`, by name: listed once, and then only what moved of them is read. Remembered
        until `forget`. Raises StoreUnavailable."""
        if not self._sure:
            return await below(self._store, path)
        family = self._families.setdefault(path, _Family())
        async with family.turn:
            if not family.listed:
                family.moved.update(await self._store.children(path))
                family.listed = True
            if family.moved:
                await self._read_moved(path, family)
            if self._families.get(path) is not family:
                raise StoreUnavailable("the connection was lost meanwhile")
            return dict(family.known)

    async def _read_moved(self, path: str, family: _Family) -> None:
        moved, family.moved = family.moved, set()
        try:
            nodes = await each(moved, lambda name: self._store.read(f"{path}/{name}"), at_once=_AT_ONCE)
        except BaseException:
            family.moved |= moved
            raise
        for name, node in zip(moved, nodes, strict=True):
            family.known.pop(name, None)
            if node is not None:
                family.known[name] = node

    async def one_below(self, path: str, name: str) -> Versioned | None:
        """As `Store.read` of one of them; costs no read where it is known. Raises StoreUnavailable."""
        family = self._families.get(path)
        if family is not None and name in family.known and name not in family.moved:
            return family.known[name]
        return await self.read(f"{path}/{name}")

    def knows(self, path: str) -> bool:
        """Whether it costs no read now."""
        return path in self._known

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
        above, _, name = path.rpartition("/")
        if (family := self._families.get(above)) is not None:
            family.moved.add(name)
        for follower in list(self._followers.get(path, ())):
            follower()

    def doubt(self, path: str) -> None:
        """Ask the ledger the next time, whatever was announced."""
        self._known.pop(path, None)
        self._reading.pop(path, None)

    def forget(self, path: str) -> None:
        """Nobody keeps it any more, nor what is below it."""
        self._kept.discard(path)
        self._families.pop(path, None)
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
        self._families.clear()

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._known)
