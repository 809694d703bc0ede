"""The leader forgets what is over and no longer wanted, at a pace that what lives does not feel.

`core.retention` says what may go. Before anything goes it is read once more, and written to the history file if there
is one; the transaction that removes it fails if it moved meanwhile. A crash in between leaves a line too many in the
history, never one too few.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

from orchestrator.coordinator.driver import epoch_write
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.records import EvacuationState, HostRecord, MigrationState
from orchestrator.core.retention import Ended, Kept, Retention, surplus
from orchestrator.history import Entry, HistoryFile, entry
from orchestrator.ledger import paths, rows
from orchestrator.ledger.clock import LedgerClock
from orchestrator.ledger.evacuations import read_job
from orchestrator.ledger.gather import each
from orchestrator.ledger.index import Index
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.ledger.store import Check, Create, Delete, Op, Store, StoreUnavailable

log = structlog.get_logger(__name__)

PASS_S = 60.0
"""Between two passes; at rest one costs a read."""
CERTIFICATES_S = 6 * 3600.0
"""Certificates are few, and nobody watches them: all of them are listed this often."""
BATCH = 20
"""Lines that go to the history file at once, and nodes' worth of work that a crash may repeat."""
SLICE_PACE_S = 0.5
"""Between two slices of the rows that a new leader learns: it has migrations to adopt first."""

LINGER_S = 30.0
"""What moved is read this late, unless a pass begins: it may move again within that, and no burst of reads follows."""


@dataclass(slots=True)
class Counts:
    """For status and metrics: what was removed since this coordinator leads."""

    removed: dict[str, int] = field(default_factory=dict[str, int])
    failures: int = 0
    """Passes that ended in an error: a full disk, a ledger that did not answer."""


@dataclass(frozen=True, slots=True)
class _Doomed:
    """Something read once more before it goes."""

    ops: list[Op]
    line: Entry | None
    """None: it leaves no line."""


class Keeping:
    """What is kept of what is over, under one leadership. `close` ends its watches."""

    def __init__(
        self, store: Store, index: Index, epoch: int, retention: Retention, history: HistoryFile | None = None
    ) -> None:
        self._store = store
        self._index = index
        self._epoch = epoch
        self._retention = retention
        self._history = history
        self._clock = LedgerClock(store)
        self._migrations = rows.migrations(store, pace_s=SLICE_PACE_S, linger_s=LINGER_S)
        self._evacuations = rows.evacuations(store, pace_s=SLICE_PACE_S, linger_s=LINGER_S)
        self._requests = rows.requests(store, pace_s=SLICE_PACE_S, linger_s=LINGER_S)
        self._certificates_at_s = float("-inf")
        self.counts = Counts()

    async def run(self) -> None:
        """One pass. Raises Deposed, StoreUnavailable, BadRecord, OSError (the history file): nothing is removed then
        that is not in the history."""
        try:
            await self._clock.look()
            await self._pass(Kept.EVACUATIONS, self._ended_evacuations, self._evacuation)
            await self._pass(Kept.MIGRATIONS, self._ended_migrations, self._migration)
            await self._pass(Kept.GUESTS, self._gone_guests, self._guest)
            await self._pass(Kept.REQUESTS, self._old_requests, self._request)
            now_s = asyncio.get_running_loop().time()
            if now_s >= self._certificates_at_s + CERTIFICATES_S and self._migrations.complete:
                await self._pass(Kept.CERTIFICATES, self._old_certificates, self._certificate)
                await self._mend_active_set()
                self._certificates_at_s = now_s
        except (StoreUnavailable, BadRecord, OSError):
            self.counts.failures += 1
            raise

    async def close(self) -> None:
        """End the watches; a pass that is under way is the caller's to cancel."""
        for table in (self._migrations, self._evacuations, self._requests):
            await table.close()

    # --- what may go --------------------------------------------------------------------------------------------------

    async def _pass(
        self,
        kind: Kept,
        candidates: Callable[[], Awaitable[list[str]]],
        read: Callable[[str], Awaitable[_Doomed | None]],
    ) -> None:
        todo = await candidates()
        for at in range(0, len(todo), BATCH):
            found = await each(todo[at : at + BATCH], read)
            await self._remove(kind, [one for one in found if one is not None])

    async def _remove(self, kind: Kept, doomed: list[_Doomed]) -> None:
        lines = [one.line for one in doomed if one.line is not None]
        if lines and self._history is not None:
            await asyncio.to_thread(self._history.append, lines)
        for one in doomed:
            if await epoch_write(self._store, self._epoch, one.ops):
                self.counts.removed[kind] = self.counts.removed.get(kind, 0) + 1
            await asyncio.sleep(1 / self._retention.removals_per_s)
        if doomed:
            log.info("forgotten", kind=kind, count=len(doomed))

    def _ended(self, name: str, zxid: int) -> Ended:
        return Ended(name, zxid, self._clock.age_h(zxid))

    async def _ended_migrations(self) -> list[str]:
        known = await self._migrations.rows()
        if not self._migrations.complete:
            return []  # how many there are is not known yet
        ended = [self._ended(row.name, row.ended) for row in known.values() if row.over]
        candidates = surplus(ended, self._retention.migrations)
        if not candidates:
            return []
        needed = await self._named_by_jobs()
        records = [one.input.record for one in (await self._index.guests()).values()]
        needed |= {record.migration for record in records if record.phase is not Ownership.IDLE}
        return surplus(ended, self._retention.migrations, needed=needed)

    async def _named_by_jobs(self) -> set[str]:
        """Migrations of evacuations that are not over, or that cannot be read; raises BadRecord for the latter."""
        needed: set[str] = set()
        for row in list((await self._evacuations.rows()).values()):
            if not row.over:
                job = await read_job(self._store, row.name)
                needed |= {guest.migration for guest in job.guests} if job is not None else set()
        return needed

    async def _ended_evacuations(self) -> list[str]:
        known = await self._evacuations.rows()
        if not self._evacuations.complete:
            return []
        over = [row for row in known.values() if row.over]
        cordoned = {name for name, one in (await self._index.recent()).hosts.items() if one.input.cordon.on}
        newest = {row.host: row for row in sorted(over, key=lambda row: row.order)}
        needed = {row.name for host, row in newest.items() if host in cordoned}  # says whether it may be powered off
        return surplus([self._ended(row.name, row.ended) for row in over], self._retention.evacuations, needed=needed)

    async def _gone_guests(self) -> list[str]:
        ended = [self._ended(uuid, zxid) for uuid, zxid in (await self._index.gone()).items()]
        candidates = surplus(ended, self._retention.guests)
        if not candidates:
            return []
        return surplus(ended, self._retention.guests, needed=await self._still_somewhere())

    async def _still_somewhere(self) -> set[str]:
        """Guests of which some host has not said that nothing is left there, and those that a migration under way is
        about."""
        hosts = await self._store.children(paths.HOSTS)
        marked = await each(hosts, lambda host: self._store.children(paths.host_guests(host)))
        needed = {uuid for names in marked for uuid in names}
        return needed | {row.guest for row in (await self._migrations.rows()).values() if not row.over}

    async def _old_requests(self) -> list[str]:
        known = await self._requests.rows()
        if not self._requests.complete:
            return []
        return surplus([self._ended(row.name, row.order) for row in known.values()], self._retention.requests)

    async def _old_certificates(self) -> list[str]:
        """Named `host/boot_id`."""
        snapshot = await self._index.snapshot()
        named = [guest.record for guest in snapshot.guests.values()]
        refs = {ref for record in named for ref in (record.owner, record.source, record.destination) if ref is not None}
        needed = {f"{ref.host}/{ref.boot_id}" for ref in refs}
        needed |= {f"{name}/{one.input.record.boot_id}" for name, one in snapshot.hosts.items()}
        hosts = await self._store.children(paths.FENCE)
        found = await each(hosts, self._certificates_of)
        ended = [one for several in found for one in several]
        if snapshot.unreadable:  # one of those may name any of them
            return []
        return surplus(ended, self._retention.certificates, needed=needed)

    async def _certificates_of(self, host: str) -> list[Ended]:
        async def one(boot_id: str) -> Ended:
            node = await self._store.read(paths.fence(host, boot_id))
            return self._ended(f"{host}/{boot_id}", node.mzxid if node is not None else 1 << 62)

        return await each(await self._store.children(paths.fences(host)), one)

    async def _mend_active_set(self) -> None:
        """What is not over has its node in the active set; where a ledger was mended by hand it may lack one."""
        active = set(await self._store.children(paths.ACTIVE_MIGRATIONS))
        for row in list((await self._migrations.rows()).values()):
            if not row.over and not row.unreadable and row.name not in active:
                node = await self._store.read(paths.migration_state(row.name))
                if node is None or decode(MigrationState, node.data).phase.terminal:
                    continue
                log.error("a migration that is not over was not in the active set", migration=row.name)
                ops = [Check(paths.migration_state(row.name), node.version)]
                begins = Create(paths.active_migration(row.name), encode(row.guest))
                await epoch_write(self._store, self._epoch, [*ops, begins])

    # --- one more look ------------------------------------------------------------------------------------------------

    async def _migration(self, name: str) -> _Doomed | None:
        content = await self._content(paths.migration(name))
        state = content.get("state")
        if state is None or not decode(MigrationState, state[0], path=paths.migration_state(name)).phase.terminal:
            return None
        return self._doomed(Kept.MIGRATIONS, name, paths.migration(name), content)

    async def _evacuation(self, name: str) -> _Doomed | None:
        content = await self._content(paths.evacuation(name))
        head = content.get("state")
        if head is None or not decode(EvacuationState, head[0], path=paths.evacuation_state(name)).phase.terminal:
            return None
        doomed = self._doomed(Kept.EVACUATIONS, name, paths.evacuation(name), content)
        told = await self._store.read(paths.ended_evacuation(name))
        if told is not None:
            doomed.ops.append(Delete(paths.ended_evacuation(name), told.version))
        return doomed

    async def _guest(self, uuid: str) -> _Doomed | None:
        content = await self._content(paths.guest(uuid))
        record = content.get("")
        if record is None or decode(GuestRecord, record[0], path=paths.guest(uuid)).phase is not Ownership.GONE:
            return None
        return self._doomed(Kept.GUESTS, uuid, paths.guest(uuid), content)

    async def _request(self, name: str) -> _Doomed | None:
        path = paths.request_id(name)
        node = await self._store.read(path)
        return None if node is None else _Doomed([Delete(path, node.version)], None)

    async def _certificate(self, name: str) -> _Doomed | None:
        host, _, boot_id = name.partition("/")
        path = paths.fence(host, boot_id)
        node = await self._store.read(path)
        registered = await self._store.read(paths.host(host))
        if node is None:
            return None
        holder = decode(HostRecord, registered.data, path=paths.host(host)) if registered and registered.data else None
        if holder is not None and holder.boot_id == boot_id:
            return None
        return _Doomed([Delete(path, node.version)], None)

    async def _content(self, path: str) -> dict[str, tuple[bytes, int, int]]:
        """Of a node and its children: content, version, mzxid, by name; "" is the node itself. Empty: there is none."""
        names = ["", *await self._store.children(path)]
        nodes = await each(names, lambda name: self._store.read(f"{path}/{name}" if name else path))
        found = {
            name: (node.data, node.version, node.mzxid)
            for name, node in zip(names, nodes, strict=True)
            if node is not None
        }
        return found if "" in found else {}

    def _doomed(self, kind: Kept, name: str, path: str, content: dict[str, tuple[bytes, int, int]]) -> _Doomed:
        """Children before their parent, all in one transaction; one that was made meanwhile makes it fail."""
        children = [Delete(f"{path}/{child}", one[1]) for child, one in content.items() if child]
        line = entry(kind, name, {child: one[0] for child, one in content.items()}, content[""][2])
        return _Doomed([*children, Delete(path, content[""][1])], line)
