"""Streams of resources: each as it is, and again whenever it changed.

All streams of one kind share a `Feed`, which follows the ledger and the agents once, reads and renders what changed
once, and numbers the changes. A stream remembers only the number up to which it has told; a slow reader gets the newest
state and never a backlog, and one that does not read at all is dropped by the server (`rpc.errors.Errors`).

Changes are announced by one watch on the trees of the ledger in which the resources lie, and by samples from the
agents; both are hints. What is sent is read anew for a change in the ledger, and put together from memory for a sample.
While nothing moves nothing is done, however many resources are watched.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import structlog
from google.protobuf.message import Message

from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.text import quoted
from orchestrator.fleet import Fleet
from orchestrator.ledger.gather import each
from orchestrator.ledger.records import BadRecord
from orchestrator.ledger.store import Store, StoreUnavailable
from orchestrator.tasks import Tasks

log = structlog.get_logger(__name__)

MERGE_S = 0.1
"""A resource is told at most so often."""
AGE_S = 1.0
RETRY_S = 0.25
SLICE = 512
"""Resources looked at in one turn: a first look at thousands holds up no news for longer."""

Unfollow = Callable[[], None]
R = TypeVar("R")
M = TypeVar("M", bound=Message)
M_co = TypeVar("M_co", bound=Message, covariant=True)


class Source(Protocol[R, M_co]):
    """What a feed has to know about one kind of resource."""

    trees: tuple[str, ...]
    """Roots of all nodes that show in a resource."""

    async def names(self) -> Iterable[str]:
        """All that are not over. Raises StoreUnavailable."""
        ...

    def name_of(self, path: str) -> str:
        """Whose own node stands at `path`; empty: it is of no resource, or of another kind."""
        ...

    def begins(self, path: str) -> bool:
        """Whether a resource that is not over may have been created with the node at `path`, one of its own."""
        ...

    def is_shared(self, path: str) -> bool:
        """Whether the node at `path` shows in many resources, see `refresh`."""
        ...

    async def refresh(self) -> Iterable[str]:
        """Read the shared nodes. Returns the names of those in which they show otherwise than before. Raises
        StoreUnavailable."""
        ...

    async def read(self, name: str) -> R | None:
        """None: it does not exist. Raises StoreUnavailable, BadRecord."""
        ...

    def view(self, read: R) -> M_co:
        """The message, with what the agents say of it now, and without an age."""
        ...

    def aged(self, read: R, message: Any) -> M_co:
        """What is told: the message of `view` with how long the resource has taken by now, which is no news."""
        ...

    def over(self, read: R) -> bool:
        """Nothing of it will change any more."""
        ...

    def paths(self, read: R) -> Iterable[str]:
        """The nodes, apart from its own, whose change changes the resource."""
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
    paths: frozenset[str] = frozenset()
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
        self._of_all: set[_Reader] = set()
        """Those that name nothing."""
        self._wanted: dict[str, set[_Reader]] = {}
        """Who names it."""
        self._by_key: dict[str, set[str]] = {}
        self._by_path: dict[str, set[str]] = {}
        self._moved: dict[str, bool] = {}
        """What to look at in the next turn; True: read it anew."""
        self._backlog: dict[str, None] = {}
        """What to read anew once nothing else is to be looked at."""
        self._stands = False
        """Whatever moves from now on is announced."""
        self._around = False
        """The names of all, and the shared nodes, are to be looked at."""
        self._meanwhile: set[str] | None = None
        """Where something moved during this turn; None: none is under way."""
        self._done: set[str] = set()
        """Names that are over, or gone, and may not have been told to all yet."""
        self._wake = asyncio.Event()
        self._ends: list[Unfollow] = []
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
            if name not in self._entries:
                self._follow(name, self._moved)
        if not reader.names:
            self._around |= not self._of_all
            self._of_all.add(reader)
        if self._task is None or self._task.done():
            self._ends = [
                self._store.watch_tree(self._source.trees, self._announced),
                self._fleet.listen(self._sampled),
            ]
            self._task = self._tasks.spawn(self._run(), "feed")
        self._wake.set()

    def _leave(self, reader: _Reader) -> None:
        self._readers.discard(reader)
        self._of_all.discard(reader)
        for name in reader.names:
            self._wanted[name].discard(reader)
            if not self._wanted[name]:
                del self._wanted[name]
        self._prune(reader.names if reader.names or self._of_all else self._entries)
        if not self._readers and self._task is not None:
            self._task.cancel()
            self._task, self._stands, self._around = None, False, False
            for end in self._ends:
                end()
            self._ends = []
            self._moved, self._backlog = {}, {}

    # --- hints --------------------------------------------------------------------------------------------------------

    def _announced(self, path: str | None) -> None:
        """Something moved at `path`; None: everything may have moved."""
        if path is None:
            self._stands = self._around = True
            self._backlog.update((name, None) for name, entry in self._entries.items() if not entry.over)
            self._wake.set()
            return
        if self._meanwhile is not None:
            self._meanwhile.add(path)
        if self._source.is_shared(path):
            self._around = True
            self._wake.set()
        for name in self._by_path.get(path, ()):
            self._touch(name)
        if name := self._source.name_of(path):
            if name in self._entries:
                self._touch(name)
            elif self._of_all and self._source.begins(path):
                self._follow(name, self._moved)

    def _touch(self, name: str) -> None:
        if not self._entries[name].over:
            self._moved[name] = True
            self._wake.set()

    def _sampled(self, key: str) -> None:
        for name in self._by_key.get(key, ()):
            self._moved.setdefault(name, False)
            self._wake.set()

    # --- turns --------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not self._stands:
                continue  # woken again once it does
            try:
                whole = await self._turn()
            except Exception:
                log.exception("a watch's look failed")
                whole = False
            if not whole:
                await asyncio.sleep(RETRY_S)
            if not whole or self._moved or self._backlog:
                self._wake.set()
            await asyncio.sleep(MERGE_S)

    async def _turn(self) -> bool:
        """Look at what moved since the last turn, or at a slice of it. False: the ledger did not tell all; what is
        missing is looked at in the next."""
        self._meanwhile = set()
        try:
            whole = await self._look_around()
            moved = self._take()
            whole &= all(await each([name for name, anew in moved.items() if anew], self._refresh))
        finally:
            self._meanwhile = None
        changed = [name for name in moved if name in self._entries and self._render(name)]
        readers = set(self._of_all) if changed else set[_Reader]()
        for name in changed:
            readers |= self._wanted.get(name, set())
        for reader in readers:
            reader.news.set()
        self._prune(())
        return whole

    async def _look_around(self) -> bool:
        """At what there is, and at what shows in many. False: the ledger did not answer."""
        if not self._around:
            return True
        self._around = False
        try:
            for name in await self._source.refresh():
                if name in self._entries:
                    self._moved.setdefault(name, False)
            if self._of_all:
                found = await self._source.names()
                for name in found if self._of_all else ():
                    if name not in self._entries:
                        self._follow(name, self._backlog)
        except StoreUnavailable:
            self._around = True
            return False
        except BaseException:
            self._around = True
            raise
        return True

    def _take(self) -> dict[str, bool]:
        """What this turn looks at: news first."""
        todo = {name: self._moved.pop(name) for name in list(islice(self._moved, SLICE))}
        for name in list(islice(self._backlog, SLICE - len(todo))):
            del self._backlog[name]
            todo[name] = True
        return {name: anew for name, anew in todo.items() if name in self._entries}

    def _follow(self, name: str, when: dict[str, Any]) -> None:
        self._entries[name] = _Entry()
        when[name] = True
        self._wake.set()

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
            return True
        if self._entries.get(name) is not entry:
            return True
        known, read = entry.paths, entry.read
        if read is None:
            self._index(name, entry)
        else:
            self._index(name, entry, frozenset(self._source.paths(read)), frozenset(self._source.keys(read)))
        if self._meanwhile and not self._meanwhile.isdisjoint(entry.paths - known):
            self._moved[name] = True  # its node moved before it was known to be one of its nodes
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
        if over or entry.read is None:
            self._done.add(name)
        if entry.revision and entry.error is None and (message, over) == (entry.message, entry.over):
            return False
        self._revision += 1
        entry.message, entry.over, entry.revision = message, over, self._revision
        entry.told = None
        entry.ever_active |= message is not None and not over
        self._order[name] = None
        self._order.move_to_end(name)
        if over:
            self._index(name, entry)
        return True

    def _index(
        self, name: str, entry: _Entry[R], paths: frozenset[str] = frozenset(), keys: frozenset[str] = frozenset()
    ) -> None:
        """By what it is found when something moves."""
        for index, old, new in ((self._by_path, entry.paths, paths), (self._by_key, entry.keys, keys)):
            for key in old - new:
                index[key].discard(name)
                if not index[key]:
                    del index[key]
            for key in new - old:
                index.setdefault(key, set()).add(name)
        entry.paths, entry.keys = paths, keys

    def _prune(self, left: Iterable[str]) -> None:
        """Forget what nobody waits for any more: what is over and told, and what of `left` nobody watches."""
        told = min((reader.told for reader in self._of_all), default=self._revision)
        for name in [*left, *self._done]:
            entry = self._entries.get(name)
            if entry is None:
                self._done.discard(name)
                continue
            done = name in self._done and (entry.over or entry.read is None)
            if name not in self._wanted and (not self._of_all or (done and 0 < entry.revision <= told)):
                self._index(name, entry)
                del self._entries[name]
                self._order.pop(name, None)
                self._done.discard(name)
            elif not done:
                self._done.discard(name)


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
        """Of all callers together."""
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
