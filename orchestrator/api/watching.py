"""Streams of resources: each as it is, and again whenever it changed.

Changes are announced by watches on the ledger and by samples from the agents; both are hints, merged while a stream is
busy, so that a slow reader gets the newest state and never a backlog. What a stream sends is read anew for a change in
the ledger, and put together from memory for a sample.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import structlog
from google.protobuf.message import Message

from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.text import quoted
from orchestrator.fleet import Fleet
from orchestrator.ledger.records import BadRecord
from orchestrator.ledger.store import Store, StoreUnavailable

log = structlog.get_logger(__name__)

MERGE_S = 0.1
"""A stream sends a resource at most so often."""
RETRY_S = 0.25
READS_AT_ONCE = 32

Unfollow = Callable[[], None]
R = TypeVar("R")
M = TypeVar("M", bound=Message)
M_co = TypeVar("M_co", bound=Message, covariant=True)


@dataclass(slots=True)
class _Shared:
    callbacks: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    seen: bool = False
    stop: Unfollow = lambda: None

    def moved(self, _content: object) -> None:
        self.seen = True
        for callback in list(self.callbacks):
            callback()


class Hints:
    """Watches on the ledger, one per node however many streams follow it. A follower is called when something moved,
    and once soon after it began."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._nodes: dict[tuple[str, bool], _Shared] = {}

    def follow(self, path: str, callback: Callable[[], None], *, children: bool = False) -> Unfollow:
        """`children`: the names below it, instead of its content."""
        key = (path, children)
        shared = self._nodes.get(key)
        if shared is None:
            shared = self._nodes[key] = _Shared()
            store = self._store
            shared.stop = store.watch_children(path, shared.moved) if children else store.watch(path, shared.moved)
        elif shared.seen:
            asyncio.get_running_loop().call_soon(callback)
        shared.callbacks.append(callback)

        def end() -> None:
            if callback in shared.callbacks:
                shared.callbacks.remove(callback)
            if not shared.callbacks and self._nodes.get(key) is shared:
                del self._nodes[key]
                shared.stop()

        return end


class Source(Protocol[R, M_co]):
    """What a stream has to know about one kind of resource."""

    async def discover(self) -> Iterable[str]:
        """All that are not over."""
        ...

    async def roots(self) -> Iterable[str]:
        """The nodes below which new ones appear."""
        ...

    async def read(self, name: str) -> R | None:
        """None: there is no such resource."""
        ...

    def view(self, read: R) -> M_co:
        """With what the agents say at this moment."""
        ...

    def over(self, read: R) -> bool:
        """It will not change any more."""
        ...

    def paths(self, read: R) -> Iterable[str]:
        """The nodes whose change changes the resource."""
        ...

    def keys(self, read: R) -> Iterable[str]:
        """Guests and migrations whose samples show in the resource."""
        ...


@dataclass(slots=True)
class _Followed(Generic[R]):
    read: R | None = None
    sent: Message | None = None
    stops: list[Unfollow] = field(default_factory=list[Unfollow])
    keys: frozenset[str] = frozenset()


class Stream(Generic[R, M]):
    """One caller's watch. With `names` it ends when each of them is over; without, it follows all that are not over
    and those to come until its caller leaves."""

    def __init__(self, source: Source[R, M], hints: Hints, fleet: Fleet, names: Iterable[str]) -> None:
        self._source = source
        self._hints = hints
        self._fleet = fleet
        self._named = list(dict.fromkeys(names))
        self._followed: dict[str, _Followed[R]] = {}
        self._by_key: dict[str, set[str]] = {}
        self._over: set[str] = set()
        self._moved: dict[str, bool] = {}
        """What to look at in the next turn; True: read it anew."""
        self._look_for_more = False
        self._wake = asyncio.Event()
        self._roots: dict[str, Unfollow] = {}

    async def run(self) -> AsyncIterator[M]:
        """Raises NOT_FOUND for a name that there is not."""
        unlisten = self._fleet.listen(self._sampled)
        try:
            if self._named:
                await self._begin_named()
            else:
                self._more()
            while True:
                self._wake.clear()
                for message in await self._turn():
                    yield message
                if self._named and not self._followed:
                    return
                await self._wake.wait()
                await asyncio.sleep(MERGE_S)
        finally:
            unlisten()
            for stop in self._roots.values():
                stop()
            for name in list(self._followed):
                self._drop(name)

    async def _begin_named(self) -> None:
        for name in self._named:
            if await self._source.read(name) is None:
                raise DroverError(RefusalReason.NOT_FOUND, f"there is no {quoted(name)}", field="names")
            self._follow(name)

    # --- hints --------------------------------------------------------------------------------------------------------

    def _more(self) -> None:
        self._look_for_more = True
        self._wake.set()

    def _touch(self, name: str) -> None:
        self._moved[name] = True
        self._wake.set()

    def _sampled(self, key: str) -> None:
        for name in self._by_key.get(key, ()):
            self._moved.setdefault(name, False)
            self._wake.set()

    # --- turns --------------------------------------------------------------------------------------------------------

    async def _turn(self) -> list[M]:
        """What is new since the last turn. What the ledger does not tell now is looked at in the next."""
        if self._look_for_more:
            self._look_for_more = False
            try:
                await self._find_more()
            except StoreUnavailable:
                await self._later(self._more)
        moved, self._moved = self._moved, {}
        stale = [name for name, anew in moved.items() if anew and name in self._followed]
        bound = asyncio.Semaphore(READS_AT_ONCE)
        results = await asyncio.gather(*(self._refresh(name, bound) for name in stale))
        if not all(results):
            await self._later(self._wake.set)
        return [message for name in moved if (message := self._news(name)) is not None]

    async def _find_more(self) -> None:
        for root in await self._source.roots():
            if root not in self._roots:
                self._roots[root] = self._hints.follow(root, self._more, children=True)
        for name in await self._source.discover():
            if name not in self._followed and name not in self._over:
                self._follow(name)

    def _follow(self, name: str) -> None:
        self._followed[name] = _Followed()
        self._moved[name] = True

    async def _refresh(self, name: str, bound: asyncio.Semaphore) -> bool:
        """Read it anew. False: the ledger did not answer, it stays to be looked at."""
        followed = self._followed[name]
        try:
            async with bound:
                followed.read = await self._source.read(name)
        except StoreUnavailable:
            self._moved[name] = True
            return False
        except BadRecord as error:
            if self._named:
                raise
            log.error("left out of a watch: it cannot be read", name=name, error=str(error))
            followed.read = None
        if followed.read is None:
            self._drop(name)
            return True
        self._index(name, followed, frozenset(self._source.keys(followed.read)))
        if not followed.stops and not self._source.over(followed.read):
            paths = self._source.paths(followed.read)
            followed.stops = [self._hints.follow(path, lambda: self._touch(name)) for path in paths]
        return True

    def _news(self, name: str) -> M | None:
        followed = self._followed.get(name)
        if followed is None or followed.read is None:
            return None
        message = self._source.view(followed.read)
        over = self._source.over(followed.read)
        old = message == followed.sent or (over and followed.sent is None and not self._named)
        followed.sent = message
        if over:
            self._drop(name)
        return None if old else message

    def _index(self, name: str, followed: _Followed[R], keys: frozenset[str]) -> None:
        for key in followed.keys - keys:
            self._by_key[key].discard(name)
            if not self._by_key[key]:
                del self._by_key[key]
        for key in keys - followed.keys:
            self._by_key.setdefault(key, set()).add(name)
        followed.keys = keys

    def _drop(self, name: str) -> None:
        followed = self._followed.pop(name, None)
        self._over.add(name)
        if followed is not None:
            self._index(name, followed, frozenset())
            for stop in followed.stops:
                stop()

    @staticmethod
    async def _later(again: Callable[[], None]) -> None:
        await asyncio.sleep(RETRY_S)
        again()
