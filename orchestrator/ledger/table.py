"""A few words of every resource of one kind, also of those that are over: for lists, which cannot read thousands of
nodes.

Fed by one watch. What moves is read at once; what is already there is read in the background, a slice at a time, so
that a process that has just started answers about what moves before it knows all that ever was. A row that is over is
never read again, and a row whose nodes are gone is forgotten: memory is bounded by what the ledger keeps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Generic, Protocol, TypeVar

import structlog

from orchestrator.ledger.askers import Askers
from orchestrator.ledger.gather import each
from orchestrator.ledger.store import SessionState, Store, StoreUnavailable
from orchestrator.tasks import Tasks

log = structlog.get_logger(__name__)

RETRY_S = 0.2
LOOK_S = 5.0
_AT_ONCE = 16
_SLICE = 256
"""Of what is already there, between two looks at what moves."""
_FEW = 1_000
"""So many unknown names after a reconnect are read like what moved."""


class Row(Protocol):
    """What a table needs to know of its rows."""

    @property
    def over(self) -> bool:
        """Nothing of it changes any more."""
        ...


R = TypeVar("R", bound=Row)


class Table(Generic[R]):
    """Starts with the first look; `close` ends it. Everything runs on one event loop."""

    def __init__(
        self,
        store: Store,
        root: str,
        *,
        names: Callable[[], Awaitable[Iterable[str]]],
        name_of: Callable[[str], str],
        read: Callable[[str], Awaitable[R | None]],
        first: Callable[[], Awaitable[Iterable[str]]] | None = None,
        pace_s: float = 0.0,
        linger_s: float = 0.0,
    ) -> None:
        """`names` lists all there are, `first` those worth reading before the others; `name_of` tells whose node stands
        at a path, empty for a node that no row is made of; `read` returns None for what is not there. All of them may
        raise StoreUnavailable. `pace_s` is a pause after each slice of what was there before. What moved is read when
        somebody asks for rows, and otherwise within `linger_s`."""
        self._store = store
        self._root = root
        self._names = names
        self._first = first
        self._pace_s = pace_s
        self._linger_s = linger_s
        self._name_of = name_of
        self._read = read
        self._rows: dict[str, R] = {}
        self._moved: set[str] = set()
        self._backlog: dict[str, None] = {}
        self._everything = False
        self._listed = False
        self._busy = False
        self._askers = Askers()
        self._listeners: list[Callable[[str], None]] = []
        self._tasks = Tasks("table")
        self._end: Callable[[], None] | None = None
        self.reads = 0
        """Rows read so far."""

    async def rows(self) -> Mapping[str, R]:
        """By name, with everything that was announced to this process so far. Not to be changed, and only good until
        the next await. Raises StoreUnavailable."""
        await self._flush()
        return self._rows

    @property
    def complete(self) -> bool:
        """Everything that the ledger holds has been read."""
        return self._listed and not self._backlog

    async def completed(self, timeout_s: float = LOOK_S) -> bool:
        """Wait so long for it to be complete. Raises StoreUnavailable at once while there is no connection."""
        self._start()
        if self._store.session is not SessionState.CONNECTED:
            raise StoreUnavailable("not connected to ZooKeeper")
        try:
            async with asyncio.timeout(timeout_s):
                while not self.complete:  # noqa: ASYNC110 - a slice takes about as long
                    await asyncio.sleep(0.02)
        except TimeoutError:
            return False
        return True

    def listen(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Call back with the name of each row that is new, or has moved. Returns a function that ends it."""
        self._start()
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    async def close(self) -> None:
        """End the watch."""
        if self._end is not None:
            self._end()
            self._end = None
        await self._tasks.close()

    def _start(self) -> None:
        if self._end is None:
            self._tasks = Tasks("table")
            self._end = self._store.watch_tree((self._root,), self._announced)
            self._tasks.spawn(self._run(), self._root)

    async def _flush(self) -> None:
        self._start()
        if self._store.session is not SessionState.CONNECTED:
            raise StoreUnavailable("not connected to ZooKeeper")
        if self._listed and not (self._everything or self._moved or self._busy):
            return
        await self._askers.answered(LOOK_S, self._root)

    def _announced(self, path: str | None) -> None:
        if path is None:
            self._everything = True
        elif name := self._name_of(path):
            self._moved.add(name)
        else:
            return
        self._askers.wake.set()

    async def _run(self) -> None:
        while True:
            await self._askers.wake.wait()
            self._askers.wake.clear()
            if self._linger_s and self._listed and not self._askers.any and not self._backlog:
                await self._askers.linger(self._linger_s)
            asked = self._askers.take()
            self._busy = True
            try:
                news = await self._round()
            except Exception as error:
                if not isinstance(error, StoreUnavailable):
                    log.exception("a look at the ledger failed", root=self._root)
                self._askers.put_back(asked)
                await asyncio.sleep(RETRY_S)
                self._askers.wake.set()
                continue
            finally:
                self._busy = False
            if not self._listed:  # woken, but the watch does not stand yet
                self._askers.put_back(asked)
                continue
            self._askers.answer(asked)
            for name in news:
                for listener in list(self._listeners):
                    listener(name)
            if self._backlog:
                if not self._moved:
                    await asyncio.sleep(self._pace_s)
                self._askers.wake.set()

    async def _round(self) -> list[str]:
        """What moved, else a slice of what was there before. On a failure all of it is read again."""
        if self._everything:
            self._everything = False
            try:
                await self._list()
            except BaseException:
                self._everything = True
                raise
        moved, self._moved = self._moved, set()
        todo = list(moved) or list(self._backlog)[:_SLICE]
        try:
            found = await each(todo, self._read, at_once=_AT_ONCE)
        except BaseException:
            self._moved |= moved
            raise
        self.reads += len(todo)
        for name, row in zip(todo, found, strict=True):
            self._backlog.pop(name, None)
            if row is None:
                self._rows.pop(name, None)
            else:
                self._rows[name] = row
        return todo

    async def _list(self) -> None:
        names = set(await self._names())
        first = set(await self._first()) if self._first is not None else set[str]()
        for gone in self._rows.keys() - names:
            del self._rows[gone]
        unknown = names - self._rows.keys()
        self._moved |= (first & names) | {name for name, row in self._rows.items() if not row.over}
        if len(unknown) <= _FEW:
            self._moved |= unknown
        else:
            self._backlog = dict.fromkeys(sorted(unknown - self._moved))
        self._listed = True
