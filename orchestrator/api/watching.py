"""Streams of resources: each as it is, and again whenever it changed.

All streams of one kind share a `Feed`, which follows the ledger and the agents once, reads and renders what changed
once, and numbers the changes. A stream remembers only the number up to which it has told; a slow reader gets the newest
state and never a backlog, and one that does not read at all is dropped by the server (`rpc.errors.Errors`).

Changes are announced by watches on the ledger and by samples from the agents; both are hints. What is sent is read anew
for a change in the ledger, and put together from memory for a sample.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import structlog
from google.protobuf.message import Message

from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.text import quoted
from orchestrator.fleet import Fleet
from orchestrator.ledger import paths
from orchestrator.ledger.gather import each
from orchestrator.ledger.records import BadRecord
from orchestrator.ledger.store import Store, StoreUnavailable
from orchestrator.tasks import Tasks

log = structlog.get_logger(__name__)

MERGE_S = 0.1
"""A resource is told at most so often."""
AGE_S = 1.0
RETRY_S = 0.25

Unfollow = Callable[[], None]
R = TypeVar("R")
M = TypeVar("M", bound=Message)
M_co = TypeVar("M_co", bound=Message, covariant=True)


class Source(Protocol[R, M_co]):
    """What a feed has to know about one kind of resource."""

    root: str
    """Its children are the resources; its grandchildren, if it is one of `paths.SHARDED`."""

    async def active(self, names: Iterable[str]) -> Iterable[str]:
        """Those of the names that may not be over. Raises StoreUnavailable."""
        ...

    async def read(self, name: str) -> R | None:
        """None: it does not exist. Raises StoreUnavailable, BadRecord."""
        ...

    def view(self, read: R) -> M_co: ...

    def aged(self, read: R, message: Any) -> M_co:
        """What is told: the message of `view` with how long the resource has taken by now, which is no news."""
        ...

    def over(self, read: R) -> bool:
        """Nothing of it will change any more."""
        ...

    def paths(self, read: R) -> Iterable[str]:
        """The nodes whose change changes the resource."""
        ...

    def keys(self, read: R) -> Iterable[str]:
        """Guests and migrations whose samples show in the resource."""
        ...


@dataclass(slots=True, eq=False)
class _Entry(Generic[R]):
    """One resource that is followed."""

    read: R | None = None
    message: Any = None
    """As `view` gives it."""
    told: Any = None
    """The same with its age, as it was at `told_s`; None: not told yet."""
    told_s: float = 0.0
    error: BadRecord | None = None
    revision: int = 0
    """Of the feed, when it was last changed; 0: not looked at yet."""
    over: bool = False
    ever_active: bool = False
    """It was seen before it was over."""
    stops: list[Unfollow] = field(default_factory=list[Unfollow])
    keys: frozenset[str] = frozenset()


@dataclass(slots=True, eq=False)
class _Reader:
    """One stream."""

    names: frozenset[str]
    """Empty: all."""
    told: int = 0
    """Everything up to this revision."""
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Feed(Generic[R, M]):
    """All resources of one kind that somebody watches. Does nothing while nobody does."""

    def __init__(self, source: Source[R, M], store: Store, fleet: Fleet) -> None:
        self._source = source
        self._store = store
        self._fleet = fleet
        self._entries: dict[str, _Entry[R]] = {}
        self._order: OrderedDict[str, None] = OrderedDict()
        """Names that were looked at, by revision."""
        self._revision = 0
        self._readers: set[_Reader] = set()
        self._wanted: dict[str, set[_Reader]] = {}
        """Who names it."""
        self._by_key: dict[str, set[str]] = {}
        self._moved: dict[str, bool] = {}
        """What to look at in the next turn; True: read it anew."""
        self._listed: dict[str, frozenset[str]] = {}
        """Names below each root, as they were announced."""
        self._candidates: set[str] = set()
        """Listed, and not looked at yet."""
        self._roots: dict[str, Unfollow] = {}
        self._wake = asyncio.Event()
        self._unlisten: Unfollow = lambda: None
        self._task: asyncio.Task[None] | None = None
        self._tasks = Tasks("watches")

    # --- streams ------------------------------------------------------------------------------------------------------

    async def stream(self, names: Iterable[str]) -> AsyncGenerator[M]:
        """One caller's watch. With `names` it ends when each of them is over; without, it tells all that are not over
        and those to come until its caller leaves. Raises NOT_FOUND for a name that there is not."""
        wanted = frozenset(names)
        missing = await each(wanted, self._is_missing)
        if any(missing):
            name = next(name for name, gone in zip(wanted, missing, strict=True) if gone)
            raise DroverError(RefusalReason.NOT_FOUND, f"there is no {quoted(name)}", field="names")
        reader = _Reader(wanted)
        left = set(wanted)
        ahead: dict[str, int] = {}
        self._join(reader)
        try:
            while True:
                reader.news.clear()
                up_to, seen, ahead = self._revision, ahead, {}
                for name in self._since(reader, left):
                    entry = self._entries.get(name)
                    if entry is None:
                        continue
                    if entry.error is not None and wanted:
                        raise entry.error
                    if entry.over or (entry.read is None and entry.error is None):
                        left.discard(name)
                    if entry.revision > up_to:  # it changed while others were told: told now as it is
                        ahead[name] = entry.revision
                    if entry.message is not None and entry.revision > seen.get(name, reader.told):
                        yield self._told(entry)
                reader.told = up_to
                if wanted and not left:
                    return
                await reader.news.wait()
        finally:
            self._leave(reader)

    def _told(self, entry: _Entry[R]) -> M:
        """One message for all streams, with how long the resource has taken; that is at most AGE_S old."""
        now_s = asyncio.get_running_loop().time()
        if entry.told is None or (not entry.over and now_s - entry.told_s > AGE_S):
            entry.told = entry.message if entry.read is None else self._source.aged(entry.read, entry.message)
            entry.told_s = now_s
        return entry.told

    async def _is_missing(self, name: str) -> bool:
        entry = self._entries.get(name)
        return (entry is None or entry.read is None) and await self._source.read(name) is None

    def _since(self, reader: _Reader, left: set[str]) -> list[str]:
        """What is news to a reader, in the order of the changes."""
        if reader.names:
            entries = ((name, self._entries[name]) for name in left)
            news = [(entry.revision, name) for name, entry in entries if entry.revision > reader.told]
            return [name for _, name in sorted(news)]
        found: list[str] = []
        for name in reversed(self._order):
            entry = self._entries[name]
            if entry.revision <= reader.told:
                break
            if entry.ever_active and entry.error is None and not (entry.over and reader.told == 0):
                found.append(name)
        return found[::-1]

    def _join(self, reader: _Reader) -> None:
        self._readers.add(reader)
        for name in reader.names:
            self._wanted.setdefault(name, set()).add(reader)
            self._follow(name)
        if not reader.names and not self._roots:
            self._watch_root(self._source.root, shards=self._source.root in paths.SHARDED)
        if self._task is None or self._task.done():
            self._unlisten = self._fleet.listen(self._sampled)
            self._task = self._tasks.spawn(self._run(), "feed")
        self._wake.set()

    def _leave(self, reader: _Reader) -> None:
        self._readers.discard(reader)
        for name in reader.names:
            self._wanted[name].discard(reader)
            if not self._wanted[name]:
                del self._wanted[name]
        if not any(not other.names for other in self._readers):
            self._unwatch_roots()
        self._prune()
        if not self._readers and self._task is not None:
            self._task.cancel()
            self._task = None
            self._unlisten()

    # --- hints --------------------------------------------------------------------------------------------------------

    def _watch_root(self, path: str, *, shards: bool) -> None:
        def listed(names: tuple[str, ...]) -> None:
            if path not in self._roots:
                return
            if shards:
                for name in names:
                    if f"{path}/{name}" not in self._roots:
                        self._watch_root(f"{path}/{name}", shards=False)
                return
            self._candidates.update(frozenset(names) - self._listed.get(path, frozenset()))
            self._listed[path] = frozenset(names)
            self._wake.set()

        self._roots[path] = lambda: None
        self._roots[path] = self._store.watch_children(path, listed)

    def _unwatch_roots(self) -> None:
        for stop in self._roots.values():
            stop()
        self._roots, self._listed, self._candidates = {}, {}, set()

    def _touch(self, name: str) -> None:
        self._moved[name] = True
        self._wake.set()

    def _sampled(self, key: str) -> None:
        for name in self._by_key.get(key, ()):
            self._moved.setdefault(name, False)
            self._wake.set()

    # --- turns --------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._turn()
            except Exception:
                log.exception("a watch's look failed")
                await self._later()
            await self._wake.wait()
            await asyncio.sleep(MERGE_S)

    async def _turn(self) -> None:
        """Look at what moved since the last turn. What the ledger does not tell now is looked at in the next."""
        found, self._candidates = self._candidates, set()
        try:
            for name in await self._source.active(found):
                self._follow(name)
        except StoreUnavailable:
            self._candidates |= found
            await self._later()
        moved, self._moved = self._moved, {}
        stale = [name for name, anew in moved.items() if anew and name in self._entries]
        if not all(await each(stale, self._refresh)):
            await self._later()
        changed = [name for name in moved if name in self._entries and self._render(name)]
        readers = {reader for reader in self._readers if not reader.names} if changed else set[_Reader]()
        for name in changed:
            readers |= self._wanted.get(name, set())
        for reader in readers:
            reader.news.set()
        self._prune()

    async def _later(self) -> None:
        await asyncio.sleep(RETRY_S)
        self._wake.set()

    def _follow(self, name: str) -> None:
        if name not in self._entries:
            self._entries[name] = _Entry()
            self._moved[name] = True

    async def _refresh(self, name: str) -> bool:
        """Read it anew. False: the ledger did not answer, it stays to be looked at."""
        entry = self._entries.get(name)
        if entry is None:
            return True
        try:
            entry.read, entry.error = await self._source.read(name), None
        except StoreUnavailable:
            self._moved[name] = True
            return False
        except DroverError as error:
            log.warning("a watch looks again", name=name, error=error.message)
            self._moved[name] = True
            return False
        except BadRecord as error:
            log.error("left out of watches: it cannot be read", name=name, error=str(error))
            entry.read, entry.error = None, error
        if self._entries.get(name) is entry:
            self._index(
                name, entry, frozenset(self._source.keys(entry.read)) if entry.read is not None else frozenset()
            )
            if entry.read is not None and not entry.stops and not self._source.over(entry.read):
                paths = self._source.paths(entry.read)
                entry.stops = [self._store.watch(path, lambda _content: self._touch(name)) for path in paths]
        return True

    def _render(self, name: str) -> bool:
        """Whether there is something new to tell."""
        entry = self._entries[name]
        try:
            message = self._source.view(entry.read) if entry.read is not None else None
        except Exception as error:  # of this resource: the others are told all the same
            fault = None if isinstance(error, DroverError) else error
            log.error("left out of watches: it cannot be shown", name=name, error=str(error), exc_info=fault)
            message, entry.read, entry.error = None, None, BadRecord(f"{name}: it cannot be shown: {error!r}")
        over = entry.read is not None and self._source.over(entry.read)
        if entry.revision and entry.error is None and (message, over) == (entry.message, entry.over):
            return False
        self._revision += 1
        entry.message, entry.over, entry.revision = message, over, self._revision
        entry.told = None
        entry.ever_active |= message is not None and not over
        self._order[name] = None
        self._order.move_to_end(name)
        if over:
            self._unfollow(name, entry)
        return True

    def _index(self, name: str, entry: _Entry[R], keys: frozenset[str]) -> None:
        for key in entry.keys - keys:
            self._by_key[key].discard(name)
            if not self._by_key[key]:
                del self._by_key[key]
        for key in keys - entry.keys:
            self._by_key.setdefault(key, set()).add(name)
        entry.keys = keys

    def _unfollow(self, name: str, entry: _Entry[R]) -> None:
        self._index(name, entry, frozenset())
        for stop in entry.stops:
            stop()
        entry.stops = []

    def _prune(self) -> None:
        """Forget what nobody waits for any more: what is over and told, or everything once nobody watches all."""
        behind = [reader.told for reader in self._readers if not reader.names]
        for name, entry in list(self._entries.items()):
            told = not behind or (entry.revision > 0 and entry.revision <= min(behind))
            done = entry.over or (entry.revision > 0 and entry.read is None)
            if name not in self._wanted and (not behind or (done and told)):
                self._unfollow(name, entry)
                del self._entries[name]
                self._order.pop(name, None)


# --- bounds -----------------------------------------------------------------------------------------------------------

MAX_STREAMS = 2_000
MAX_STREAMS_OF_ONE = 200
"""Of one address; all callers over a unix socket are one."""


class Streams:
    """How many watches there are, and of whom."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self._count.total()

    @contextmanager
    def one(self, peer: str) -> Generator[None]:
        """While it lasts. Raises TOO_MANY_WATCHES."""
        who = peer.rpartition(":")[0] or peer
        if self._count[who] >= MAX_STREAMS_OF_ONE or self.total >= MAX_STREAMS:
            said = f"{self._count[who]} watches of yours and {self.total} in all are open: end some of them"
            raise DroverError(RefusalReason.TOO_MANY_WATCHES, said)
        self._count[who] += 1
        try:
            yield
        finally:
            self._count[who] -= 1
            if not self._count[who]:
                del self._count[who]
