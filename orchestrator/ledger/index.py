"""The fleet in memory: every host and every guest, kept true by watches, so that nobody has to read the ledger to look.

One watch tells which nodes moved; those are read again, and nothing else is. A whole look happens once at the start and
after each reconnect, at a pace that leaves room for others.

**What a snapshot may be wrong about.** It may be old, by the time a read takes: whoever writes checks the versions it
was made from. It is never wrong in the dangerous direction. Memory is freed at a host by its reservations, and taken
there by a guest's record, written earlier or at once; a view that knew the first and not the second would give the
same memory away twice. So hosts are read before guests, and taken in after them: when a host's answer is here, whatever
moved before it has been announced (`Store.watch_tree`), and is read before the answer counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

import structlog

from orchestrator.core.evacuation import concerns
from orchestrator.core.handover import Ownership
from orchestrator.core.placement import GuestInput, HostView, host_views
from orchestrator.core.records import GuestSpec
from orchestrator.ledger import paths
from orchestrator.ledger.askers import Askers
from orchestrator.ledger.gather import each
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.nodes import Nodes
from orchestrator.ledger.records import BadRecord
from orchestrator.ledger.snapshot import GuestEntry, HostEntry, Reader, Snapshot, UnreadableGuest, with_room
from orchestrator.ledger.store import SessionState, Store, StoreUnavailable
from orchestrator.tasks import Tasks

log = structlog.get_logger(__name__)

RETRY_S = 0.2
LOOK_S = 30.0
"""A first look at ten thousand guests takes seconds; nobody waits longer for it."""
_AT_ONCE = 32

Listener = Callable[[str], None]
"""Called with the path of the record that moved: `paths.guest(uuid)` or `paths.host(name)`."""


class View:
    """What is known, and each host as a placement sees it. Pure: somebody else reads.

    Per host only what moved is computed again, so that a snapshot costs no look at ten thousand guests.
    """

    def __init__(self) -> None:
        self.guests: dict[str, GuestEntry] = {}
        self.hosts: dict[str, HostEntry] = {}
        """As they are in the ledger."""
        self._hidden: dict[str, UnreadableGuest] = {}
        self._unreadable: dict[str, str] = {}
        self._inputs: dict[str, GuestInput] = {}
        """Of `guests`; beside it, so that a snapshot is one copy."""
        self._on: dict[str, frozenset[str]] = {}
        self._stale: set[str] = set()
        """Hosts whose view has to be made again."""
        self._shown: dict[str, HostEntry] = {}
        """With room for guests that cannot be read; by name, like `_seen`."""
        self._seen: dict[str, HostView] = {}
        self._promised: dict[str, frozenset[str]] = {}
        """By what a promise is made to: hosts that have made one."""
        self._shot: Snapshot | None = None

    def put_guest(self, uuid: str, entry: GuestEntry | None) -> None:
        """None: its life is over, or there is none."""
        self._touch(uuid, self.guests.pop(uuid, None))
        self._inputs.pop(uuid, None)
        self._show(uuid)
        if entry is not None:
            self.guests[uuid], self._inputs[uuid] = entry, entry.input
            self._touch(uuid, entry, add=True)

    def put_host(self, name: str, entry: HostEntry | None) -> None:
        """None: it is not registered."""
        self._unreadable.pop(paths.host(name), None)
        self._shot = None
        if entry is None:
            self._show_promises(name, ())
            for known in (self.hosts, self._shown, self._seen):
                known.pop(name, None)
            return
        self.hosts[name] = entry
        self._stale.add(name)

    def hide_guest(self, guest: UnreadableGuest, why: str) -> bool:
        """Its record cannot be read. Whether that is news."""
        news = self._unreadable.get(paths.guest(guest.uuid)) != why
        self.put_guest(guest.uuid, None)
        self._hidden[guest.uuid] = guest
        self._unreadable[paths.guest(guest.uuid)] = why
        self._stale.update(self.hosts if guest.hosts is None else guest.hosts)
        return news

    def hide_host(self, name: str, why: str) -> bool:
        """Its record cannot be read. Whether that is news."""
        news = self._unreadable.get(paths.host(name)) != why
        self.put_host(name, None)
        self._unreadable[paths.host(name)] = why
        return news

    def snapshot(self) -> Snapshot:
        """As of now; the same object until something moves."""
        if self._shot is None:
            known = len(self._shown)
            for name in [name for name in self._stale if name in self.hosts]:
                entry = with_room(self.hosts[name], self._hidden.values())
                self._show_promises(name, entry.input.reservations.memory_mib)
                here = [self._inputs[uuid] for uuid in self._on.get(name, ())]
                self._shown[name], self._seen[name] = entry, host_views([entry.input], here)[0]
            self._stale.clear()
            if len(self._shown) != known:  # hosts that were known keep their places
                self._shown, self._seen = dict(sorted(self._shown.items())), dict(sorted(self._seen.items()))
            self._shot = Snapshot(
                hosts=dict(self._shown),
                guests=dict(self._inputs),
                unreadable=dict(self._unreadable),
                seen=dict(self._seen),
                concerned=dict(self._on),
                promised=dict(self._promised),
            )
        return self._shot

    def _show_promises(self, host: str, promised: Collection[str]) -> None:
        """In place of those that its entry has shown so far."""
        shown = self._shown.get(host)
        before = shown.input.reservations.memory_mib if shown is not None else {}
        for one in before:
            if one not in promised and (left := self._promised.pop(one) - {host}):
                self._promised[one] = left
        for one in promised:
            if one not in before:
                self._promised[one] = self._promised.get(one, frozenset()) | {host}

    def _show(self, uuid: str) -> None:
        """It is not hidden any more."""
        hidden = self._hidden.pop(uuid, None)
        self._unreadable.pop(paths.guest(uuid), None)
        if hidden is not None:
            self._stale.update(self.hosts if hidden.hosts is None else hidden.hosts)

    def _touch(self, uuid: str, entry: GuestEntry | None, *, add: bool = False) -> None:
        self._shot = None
        if entry is None:
            return
        record = entry.input.record
        for ref in (record.owner, record.source, record.destination):
            if ref is None or not concerns(record, ref.host):
                continue
            self._stale.add(ref.host)
            here = self._on.pop(ref.host, frozenset())
            if here := here | {uuid} if add else here - {uuid}:
                self._on[ref.host] = here


class Index:
    """One per process. Starts with the first look anybody takes; `close` ends it."""

    def __init__(self, store: Store, *, also: Sequence[str] = (), linger_s: float = 0.0) -> None:
        """`also`: further trees whose nodes may be read from `nodes`. What moved is read when somebody asks, and
        otherwise within `linger_s`: one who reads late reads once what moved several times."""
        self._store = store
        self._ledger = Ledger(store)
        self._trees = (paths.HOSTS, paths.GUESTS, paths.FENCE, *also)
        self._linger_s = linger_s
        self.nodes = Nodes(store)
        """Single nodes, which cost no read while they stand still. Of other trees they are not to be read here."""
        self._reader = Reader(store, self.nodes)
        self._view = View()
        self._gone: dict[str, int] = {}
        """Guests whose life is over while their nodes stand, with the zxid of that: never looked at again."""
        self._moved_hosts: set[str] = set()
        self._moved_guests: set[str] = set()
        self._everything = False
        self._gap = True
        """Events may have been missed, and the whole look that makes up for it is not announced yet: what is read now
        may not be put beside what was read before."""
        self._gaps = 0
        """How many there were: one that began and ended within a round is noticed by it."""
        self._askers = Askers()
        self._wanted = False
        """Somebody has asked."""
        self._busy = False
        """A round is under way."""
        self._listeners: list[Listener] = []
        self._tasks = Tasks("index")
        self._end: Callable[[], None] | None = None
        self.whole_looks = 0
        """How often everything was read: once, and after each reconnect."""

    # --- answers ------------------------------------------------------------------------------------------------------

    async def snapshot(self) -> Snapshot:
        """Nothing in it is older than this call. Costs one write, and reads of what moved. Raises StoreUnavailable."""
        self._start()
        await self._store.barrier()
        return await self.recent()

    async def recent(self) -> Snapshot:
        """With everything that has been announced to this process, so with all that it wrote itself. For those who
        check versions when they write, and for people. Raises StoreUnavailable."""
        await self.flush()
        return self._view.snapshot()

    async def guests(self) -> Mapping[str, GuestEntry]:
        """Whose life is not over, by uuid, as `recent`. Not to be changed. Raises StoreUnavailable."""
        await self.flush()
        return self._view.guests

    async def gone(self) -> Mapping[str, int]:
        """Guests whose life is over while the ledger still has them: zxid of their end, by uuid, as `recent`. Not to be
        changed. Raises StoreUnavailable."""
        await self.flush()
        return self._gone

    async def spec(self, uuid: str) -> GuestSpec | None:
        """As of the last round. Raises StoreUnavailable, BadRecord."""
        known = self._view.guests.get(uuid)
        return known.input.spec if known is not None else await self._reader.spec(uuid)

    async def host(self, name: str) -> HostEntry | None:
        """Read anew. Raises StoreUnavailable, BadRecord."""
        return await Reader(self._store).host(name)

    async def flush(self, timeout_s: float = LOOK_S) -> None:
        """Until everything that was announced so far has been read. Raises StoreUnavailable."""
        self._start()
        if self._store.session is not SessionState.CONNECTED:
            raise StoreUnavailable("not connected to ZooKeeper")
        if not (self._gap or self._everything or self._moved_hosts or self._moved_guests or self._busy):
            return
        self._wanted = True
        await self._askers.answered(timeout_s, "the ledger as a whole")

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call back for every record that has moved, once it is taken in. Returns a function that ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    async def close(self) -> None:
        """End the watch. A later look starts it again."""
        if self._end is not None:
            self._end()
            self._end = None
            self.nodes.lost()
        await self._tasks.close()

    def follow(self, path: str, follower: Callable[[], None]) -> Callable[[], None]:
        """Call back whenever a node of the trees moved, or may have; it is remembered meanwhile. Returns a function
        that ends it."""
        self._start()
        return self.nodes.follow(path, follower)

    # --- what moves ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._end is not None:
            return
        self._tasks = Tasks("index")
        self._gap = True
        self._busy = False
        self._end = self._store.watch_tree(self._trees, self._announced)
        self._store.on_session(self._session)
        self._tasks.spawn(self._run(), "index")

    def _session(self, state: SessionState) -> None:
        if state is not SessionState.CONNECTED:
            self._gap = True
            self._gaps += 1
            self.nodes.lost()

    def _announced(self, path: str | None) -> None:
        if path is None:
            self._everything, self._gap = True, False
            self.nodes.everything()
        else:
            self.nodes.moved(path)
            if name := paths.host_of(path):
                self._moved_hosts.add(name)
            elif uuid := paths.guest_of(path):
                self._moved_guests.add(uuid)
            else:
                return
        self._askers.wake.set()

    async def _run(self) -> None:
        """Round after round, each for what was announced before it began."""
        while True:
            await self._askers.wake.wait()
            self._askers.wake.clear()
            if not self._wanted:
                continue  # single nodes are followed, and nobody has asked for the whole
            if self._linger_s and not self._askers.any:
                await self._askers.linger(self._linger_s)
            if self._gap:
                continue  # woken again once everything is announced
            asked = self._askers.take()
            self._busy = True
            try:
                news = await self._round()
            except Exception as error:
                if not isinstance(error, StoreUnavailable):
                    log.exception("a look at the ledger failed")
                self._askers.put_back(asked)
                await asyncio.sleep(RETRY_S)
                self._askers.wake.set()
                continue
            finally:
                self._busy = False
            self._askers.answer(asked)
            for path in news:
                for listener in list(self._listeners):
                    listener(path)

    async def _round(self) -> list[str]:
        """Read what moved: hosts first, taken in last (see above). Returns what was taken in; on StoreUnavailable
        nothing is, and all of it is read in the next round."""
        gaps = self._gaps
        if self._everything:
            self._everything = False
            try:
                await self._list()
            except BaseException:
                self._everything = True
                raise
        hosts, self._moved_hosts = self._moved_hosts, set()
        guests = set[str]()
        try:
            found_hosts = await each(hosts, self._read_host, at_once=_AT_ONCE)
            guests, self._moved_guests = self._moved_guests, set()
            found_guests = await each(guests, self._read_guest, at_once=_AT_ONCE)
            if self._gap or self._gaps != gaps:
                raise StoreUnavailable("the connection was lost meanwhile")
        except BaseException:
            self._moved_hosts |= hosts
            self._moved_guests |= guests
            raise
        for uuid, entry in zip(guests, found_guests, strict=True):
            self._take_guest(uuid, entry)
        for name, host in zip(hosts, found_hosts, strict=True):
            self._take_host(name, host)
        return [*map(paths.guest, guests), *map(paths.host, hosts)]

    async def _list(self) -> None:
        """A whole look: whatever there is, and whatever was known."""
        hosts, guests = await self._ledger.list_hosts(), await self._ledger.list_guests()
        self._gone = {uuid: self._gone[uuid] for uuid in guests if uuid in self._gone}
        self._moved_hosts |= self._view.hosts.keys() | set(hosts)
        self._moved_guests |= (self._view.guests.keys() | set(guests)) - self._gone.keys()
        self.whole_looks += 1

    async def _read_host(self, name: str) -> HostEntry | BadRecord | None:
        try:
            return await self._reader.host(name)
        except BadRecord as error:
            return error

    async def _read_guest(self, uuid: str) -> GuestEntry | tuple[UnreadableGuest, BadRecord] | None:
        try:
            return await self._reader.guest(uuid)
        except BadRecord as error:
            return await self._reader.whereabouts(uuid), error

    def _take_host(self, name: str, found: HostEntry | BadRecord | None) -> None:
        if not isinstance(found, BadRecord):
            self._view.put_host(name, found)
        elif self._view.hide_host(name, str(found)):
            log.error("left out: a record cannot be read", host=name, error=str(found))

    def _take_guest(self, uuid: str, found: GuestEntry | tuple[UnreadableGuest, BadRecord] | None) -> None:
        self._gone.pop(uuid, None)
        if isinstance(found, tuple):
            if self._view.hide_guest(found[0], str(found[1])):
                log.error("left out: a record cannot be read", guest=uuid, error=str(found[1]))
            return
        if found is not None and found.input.record.phase is Ownership.GONE:
            self._gone[uuid] = found.mzxid
            found = None
        if found is None:
            self._reader.forget(uuid)
        self._view.put_guest(uuid, found)
