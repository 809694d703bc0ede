"""Fresh looks at all hosts and guests for placements and evacuations, shared by everybody who asks at the same time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.placement import GuestInput, HostInput, HostView, host_views
from orchestrator.core.records import Cordon, GuestSpec, HostRecord, Reservations
from orchestrator.ledger import paths
from orchestrator.ledger.gather import each
from orchestrator.ledger.records import decode
from orchestrator.ledger.store import Store

_AT_ONCE = 64
"""Reads under way: more would only queue behind each other in the client."""


@dataclass(frozen=True, slots=True)
class HostEntry:
    """A host with the versions that a reservation's write must find unmoved."""

    input: HostInput
    cordon_version: int
    reservations_version: int
    """-1: the node does not exist yet."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All hosts, and all guests whose life is not over."""

    hosts: dict[str, HostEntry]
    guests: dict[str, GuestInput]

    def views(self, *, but: str = "") -> tuple[HostView, ...]:
        """`but`: a migration whose own promise is not counted."""
        return host_views([host.input for host in self.hosts.values()], list(self.guests.values()), but=but)


class Inventory:
    """Reads hosts before guests: a reservation that was released before its host was read belongs to a guest whose
    commit is seen as well, so memory is never counted too low."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._specs: dict[str, GuestSpec] = {}
        self._gone: set[str] = set()
        self._next: asyncio.Task[Snapshot] | None = None
        self._scan = asyncio.Lock()

    async def snapshot(self) -> Snapshot:
        """A look that began after this call. Raises StoreUnavailable, or BadRecord naming the node."""
        if self._next is None:
            self._next = asyncio.create_task(self._run())
        return await asyncio.shield(self._next)

    async def _run(self) -> Snapshot:
        async with self._scan:
            self._next = None  # whoever asks from now on needs a later look than this one
            hosts = await self._hosts()
            return Snapshot(hosts, await self._guests())

    async def _hosts(self) -> dict[str, HostEntry]:
        names = await self._store.children(paths.HOSTS)
        entries = await each(names, self.host)
        return {name: entry for name, entry in zip(names, entries, strict=True) if entry is not None}

    async def host(self, name: str) -> HostEntry | None:
        """None when the host is not registered, or not completely yet."""
        record, cordon, reservations, live = await asyncio.gather(
            self._store.read(paths.host(name)),
            self._store.read(paths.cordon(name)),
            self._store.read(paths.reservations(name)),
            self._store.read(paths.live(name)),
        )
        if record is None or not record.data or cordon is None:
            return None
        promised = decode(Reservations, reservations.data) if reservations and reservations.data else Reservations()
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
        )

    async def _guests(self) -> dict[str, GuestInput]:
        uuids = [uuid for uuid in await self._store.children(paths.GUESTS) if uuid not in self._gone]
        found = await each(uuids, self._guest, at_once=_AT_ONCE)
        return {guest.uuid: guest for guest in found if guest is not None}

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
