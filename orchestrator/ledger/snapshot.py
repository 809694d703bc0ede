"""All hosts and guests, for placements and evacuations: what is in the ledger, without reading it each time.

The view is kept by `index.Index`, which reads what moved and nothing else. A record that cannot be read, such as one of
a newer version, stops nobody else. A host like that takes no guests. A guest like that is not moved, and counts where
it is: its host keeps room for it and is not "safe to power off".
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from orchestrator.core.handover import GuestRecord
from orchestrator.core.ids import HostRef
from orchestrator.core.placement import GuestInput, HostInput, HostView, host_views
from orchestrator.core.record import Record
from orchestrator.core.records import Cordon, GuestSpec, HostRecord, HostSpace, Reservation, Reservations, WantRun
from orchestrator.ledger import paths
from orchestrator.ledger.nodes import Nodes, below
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import Store, Versioned


@dataclass(frozen=True, slots=True)
class HostEntry:
    """A host with the versions that a reservation's write must find unmoved."""

    input: HostInput
    cordon_version: int
    reservations_version: int
    """-1: the node does not exist yet. Moves with whatever takes room on the host."""
    reservations: Reservations
    """As they stand in the ledger. Those of `input` may have more: room for guests that cannot be read."""


@dataclass(frozen=True, slots=True)
class GuestEntry:
    """A guest with what a write must find unmoved."""

    input: GuestInput
    version: int
    mzxid: int
    wish: WantRun | None
    wish_version: int
    """-1: there is none."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All hosts, and all guests whose life is not over. It does not change any more."""

    hosts: Mapping[str, HostEntry]
    guests: Mapping[str, GuestInput]
    unreadable: Mapping[str, str] = field(default_factory=dict[str, str])
    """What is wrong with records that are left out, by node."""
    seen: Mapping[str, HostView] = field(default_factory=dict[str, HostView])
    """Every host as a placement sees it."""
    concerned: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    """Uuids of the guests whose record names a host as owner, source or destination, by host."""
    promised: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    """Hosts that have promised something to a migration, by migration."""

    def views(self, *, but: str = "") -> tuple[HostView, ...]:
        """`but`: a migration whose own promise is not counted. Looks at no guest unless it has such a promise."""
        if not but:
            return tuple(self.seen.values())
        changed = {name: self._view(name, but) for name in self.promised.get(but, ()) if name in self.seen}
        return tuple({**self.seen, **changed}.values())

    def _view(self, name: str, but: str) -> HostView:
        return host_views([self.hosts[name].input], self.on(name), but=but)[0]

    def on(self, host: str) -> list[GuestInput]:
        """The guests that have to do with a host."""
        return [self.guests[uuid] for uuid in self.concerned.get(host, ()) if uuid in self.guests]


@dataclass(frozen=True, slots=True)
class _Whereabouts(Record):
    """The least that has to be known of a guest whose record cannot be read as a whole."""

    owner: HostRef
    destination: HostRef | None = None


@dataclass(frozen=True, slots=True)
class UnreadableGuest:
    """A guest whose record cannot be read as a whole."""

    uuid: str
    hosts: frozenset[str] | None
    """None: it may be anywhere."""
    memory_mib: int | None
    """None: it may have any size."""


class Reader:
    """Reads one host or one guest. Every call raises StoreUnavailable, and BadRecord for what it cannot read.

    With `nodes` only what has moved of a host, and of a guest's wish, is read again: one node where it would be four.
    """

    def __init__(self, store: Store, nodes: Nodes | None = None) -> None:
        """`nodes` are told of every node that moves, before the answer that shows it."""
        self._store = store
        self._nodes = nodes
        self._specs: dict[str, tuple[bytes, GuestSpec]] = {}
        self._promises: dict[str, dict[str, tuple[Versioned, Reservation]]] = {}
        """By host and migration, decoded once."""

    async def _node(self, path: str, *, keep: bool = True) -> Versioned | None:
        if self._nodes is None:
            return await self._store.read(path)
        return await self._nodes.read(path, keep=keep)

    async def _several(self, *wanted: str) -> list[Versioned | None]:
        """Side by side, as far as they have to be read at all."""
        unknown = [path for path in wanted if self._nodes is None or not self._nodes.knows(path)]
        if len(unknown) > 1:
            return list(await asyncio.gather(*map(self._node, wanted)))
        return [await self._node(path) for path in wanted]

    async def host(self, name: str) -> HostEntry | None:
        """None when the host is not registered, or not completely yet. Raises StoreUnavailable, BadRecord."""
        record, cordon, reservations, live = await self._several(
            paths.host(name), paths.cordon(name), paths.reservations(name), paths.live(name)
        )
        if record is None or not record.data or cordon is None:
            self._promises.pop(name, None)
            return None
        promised = await self._promised(name)  # after their version: so none that belongs to it is missed
        known = decode(HostRecord, record.data, path=paths.host(name))
        space = await self._node(paths.space(name)) if known.pools else None
        over = live is None and await self._store.read(paths.fence(name, known.boot_id)) is not None
        return HostEntry(
            HostInput(
                record=known,
                live=live is not None,
                certified_dead=over,
                cordon=decode(Cordon, cordon.data, path=paths.cordon(name)) if cordon.data else Cordon(),
                reservations=promised,
                space=decode(HostSpace, space.data, path=paths.space(name)) if space and space.data else None,
            ),
            cordon_version=cordon.version,
            reservations_version=reservations.version if reservations else -1,
            reservations=promised,
        )

    async def _promised(self, host: str) -> Reservations:
        above = paths.reservations(host)
        found = await (below(self._store, above) if self._nodes is None else self._nodes.below(above))
        before = self._promises.get(host, {})
        known = self._promises[host] = {
            name: before[name]
            if name in before and before[name][0] == node
            else (node, decode(Reservation, node.data, path=f"{above}/{name}"))
            for name, node in found.items()
        }
        return Reservations.of({name: promise for name, (_, promise) in known.items()})

    async def whereabouts(self, uuid: str) -> UnreadableGuest:
        """What can be made out of a guest whose record is not readable."""
        hosts = memory_mib = None
        with contextlib.suppress(BadRecord):
            node = await self._store.read(paths.guest(uuid))
            if node is not None:
                known = decode(_Whereabouts, node.data)
                hosts = frozenset(ref.host for ref in (known.owner, known.destination) if ref is not None)
        with contextlib.suppress(BadRecord):
            spec = await self.spec(uuid)
            memory_mib = spec.memory_mib if spec is not None else None
        return UnreadableGuest(uuid, hosts, memory_mib)

    async def guest(self, uuid: str) -> GuestEntry | None:
        """None: there is no such guest."""
        node = await self._node(paths.guest(uuid), keep=False)
        if node is None:
            return None
        record = decode(GuestRecord, node.data, path=paths.guest(uuid))
        spec = await self.spec(uuid)
        if spec is None:
            return None
        path = paths.want_run(uuid)
        wish = await self._node(path)
        known = decode(WantRun, wish.data, path=path) if wish is not None and wish.data else None
        return GuestEntry(
            GuestInput(uuid, record, spec), node.version, node.mzxid, known, wish.version if wish is not None else -1
        )

    async def spec(self, uuid: str) -> GuestSpec | None:
        """Seldom edited, so decoded once for each content."""
        path = paths.guest_spec(uuid)
        node = await self._node(path)
        if node is None:
            return None
        known = self._specs.get(uuid)
        if known is None or known[0] != node.data:
            known = self._specs[uuid] = node.data, decode(GuestSpec, node.data, path=path)
        return known[1]

    def forget(self, uuid: str) -> None:
        """Its life is over, or it is gone."""
        self._specs.pop(uuid, None)
        if self._nodes is not None:
            self._nodes.forget(paths.want_run(uuid))
            self._nodes.forget(paths.guest_spec(uuid))


def with_room(entry: HostEntry, hidden: Iterable[UnreadableGuest]) -> HostEntry:
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
