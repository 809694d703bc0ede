"""Fresh looks at all hosts and guests for placements and evacuations, shared by everybody who asks at the same time.

A record that cannot be read, such as one of a newer version, stops nobody else. A host like that takes no guests. A
guest like that is not moved, and counts where it is: its host keeps room for it and is not "safe to power off".
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field, replace

import structlog

from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.placement import GuestInput, HostInput, HostView, host_views
from orchestrator.core.record import Record
from orchestrator.core.records import Cordon, GuestSpec, HostRecord, Reservations
from orchestrator.ledger import paths
from orchestrator.ledger.gather import each
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import Store

log = structlog.get_logger(__name__)

_AT_ONCE = 64
"""Reads under way: more would only queue behind each other in the client."""


@dataclass(frozen=True, slots=True)
class HostEntry:
    """A host with the versions that a reservation's write must find unmoved."""

    input: HostInput
    cordon_version: int
    reservations_version: int
    """-1: the node does not exist yet."""
    reservations: Reservations
    """As they stand in the ledger. Those of `input` may have more: room for guests that cannot be read."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All hosts, and all guests whose life is not over."""

    hosts: dict[str, HostEntry]
    guests: dict[str, GuestInput]
    unreadable: dict[str, str] = field(default_factory=dict[str, str])
    """What is wrong with records that are left out, by node."""

    def views(self, *, but: str = "") -> tuple[HostView, ...]:
        """`but`: a migration whose own promise is not counted."""
        return host_views([host.input for host in self.hosts.values()], list(self.guests.values()), but=but)


@dataclass(frozen=True, slots=True)
class _Whereabouts(Record):
    """The least that has to be known of a guest whose record cannot be read as a whole."""

    owner: HostRef
    destination: HostRef | None = None


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """A guest. `hosts` None: it may be anywhere; `memory_mib` None: it may have any size."""

    uuid: str
    hosts: frozenset[str] | None
    memory_mib: int | None


class Inventory:
    """Reads hosts before guests: a reservation that was released before its host was read belongs to a guest whose
    commit is seen as well, so memory is never counted too low."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._specs: dict[str, GuestSpec] = {}
        self._gone: set[str] = set()
        self._next: asyncio.Task[Snapshot] | None = None
        self._scan = asyncio.Lock()
        self._complaints: dict[str, str] = {}

    async def snapshot(self) -> Snapshot:
        """A look that began after this call. Raises StoreUnavailable."""
        if self._next is None:
            self._next = asyncio.create_task(self._run())
        return await asyncio.shield(self._next)

    async def _run(self) -> Snapshot:
        async with self._scan:
            self._next = None  # whoever asks from now on needs a later look than this one
            unreadable: dict[str, str] = {}
            hosts = await self._hosts(unreadable)
            guests, hidden = await self._guests(unreadable)
            for path, why in unreadable.items():
                if self._complaints.get(path) != why:
                    log.error("left out: a record cannot be read", path=path, error=why)
            self._complaints = unreadable
            return Snapshot({name: _with_room(entry, hidden) for name, entry in hosts.items()}, guests, unreadable)

    async def _hosts(self, unreadable: dict[str, str]) -> dict[str, HostEntry]:
        async def one(name: str) -> HostEntry | None:
            try:
                return await self.host(name)
            except BadRecord as error:
                unreadable[paths.host(name)] = str(error)
                return None

        names = await self._store.children(paths.HOSTS)
        entries = await each(names, one)
        return {name: entry for name, entry in zip(names, entries, strict=True) if entry is not None}

    async def host(self, name: str) -> HostEntry | None:
        """None when the host is not registered, or not completely yet. Raises StoreUnavailable, BadRecord."""
        record, cordon, reservations, live = await asyncio.gather(
            self._store.read(paths.host(name)),
            self._store.read(paths.cordon(name)),
            self._store.read(paths.reservations(name)),
            self._store.read(paths.live(name)),
        )
        if record is None or not record.data or cordon is None:
            return None
        promised = Reservations()
        if reservations and reservations.data:
            promised = decode(Reservations, reservations.data, path=paths.reservations(name))
        known = decode(HostRecord, record.data, path=paths.host(name))
        over = live is None and await self._store.read(paths.fence(name, known.boot_id)) is not None
        return HostEntry(
            HostInput(
                record=known,
                live=live is not None,
                certified_dead=over,
                cordon=decode(Cordon, cordon.data, path=paths.cordon(name)) if cordon.data else Cordon(),
                reservations=promised,
            ),
            cordon_version=cordon.version,
            reservations_version=reservations.version if reservations else -1,
            reservations=promised,
        )

    async def _guests(self, unreadable: dict[str, str]) -> tuple[dict[str, GuestInput], list[_Unreadable]]:
        hidden: list[_Unreadable] = []

        async def one(uuid: str) -> GuestInput | None:
            try:
                return await self._guest(uuid)
            except BadRecord as error:
                unreadable[paths.guest(uuid)] = str(error)
                hidden.append(await self._whereabouts(uuid))
                return None

        uuids = [uuid for uuid in await self._store.children(paths.GUESTS) if uuid not in self._gone]
        found = await each(uuids, one, at_once=_AT_ONCE)
        return {guest.uuid: guest for guest in found if guest is not None}, hidden

    async def _whereabouts(self, uuid: str) -> _Unreadable:
        hosts = memory_mib = None
        with contextlib.suppress(BadRecord):
            node = await self._store.read(paths.guest(uuid))
            if node is not None:
                known = decode(_Whereabouts, node.data)
                hosts = frozenset(ref.host for ref in (known.owner, known.destination) if ref is not None)
        with contextlib.suppress(BadRecord):
            spec = await self.spec(uuid)
            memory_mib = spec.memory_mib if spec is not None else None
        return _Unreadable(uuid, hosts, memory_mib)

    async def _guest(self, uuid: str) -> GuestInput | None:
        node = await self._store.read(paths.guest(uuid))
        if node is None:
            return None
        record = decode(GuestRecord, node.data, path=paths.guest(uuid))
        if record.phase is Ownership.GONE:  # for good, while its node stays: never looked at again
            self._gone.add(uuid)
            self._specs.pop(uuid, None)
            return None
        spec = await self.spec(uuid)
        return None if spec is None else GuestInput(uuid, record, spec)

    async def spec(self, uuid: str) -> GuestSpec | None:
        """Immutable, so read once."""
        if uuid not in self._specs:
            node = await self._store.read(paths.guest_spec(uuid))
            if node is None:
                return None
            self._specs[uuid] = decode(GuestSpec, node.data, path=paths.guest_spec(uuid))
        return self._specs[uuid]


def _with_room(entry: HostEntry, hidden: list[_Unreadable]) -> HostEntry:
    """The host with a promise for each guest that cannot be read and is, or may be, there.

    One of unknown size takes all the room. One that may be anywhere takes none, for it would stop every host, but keeps
    every host from being safe to power off.
    """
    name, all_of_it = entry.input.record.name, entry.input.record.memory_mib
    room: dict[str, int] = {}
    for guest in hidden:
        if guest.hosts is None:
            room[f"unreadable {guest.uuid}"] = 0
        elif name in guest.hosts:
            room[f"unreadable {guest.uuid}"] = all_of_it if guest.memory_mib is None else guest.memory_mib
    if not room:
        return entry
    promised = {**entry.reservations.memory_mib, **room}
    return replace(entry, input=replace(entry.input, reservations=replace(entry.reservations, memory_mib=promised)))
