"""Who may write what is set right by whoever leads: what an earlier leader left when it ended, and a tree that was open
until its ensemble learned who asks.

A driver gives the other end of an attempt its word as the attempt is opened, and takes it back when the migration is
over. In between its process may end.
"""

from __future__ import annotations

import asyncio

import structlog

from orchestrator.core.death import hosts_of
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.records import MigrationState
from orchestrator.ledger import paths
from orchestrator.ledger.gather import each, members
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import Create, Store

log = structlog.get_logger(__name__)

PASS_S = 3_600.0
"""What is to be set right by a later look was left by a driver that could not reach the ledger."""
_PAUSE_S = 0.05
"""After some dozens of guests: a fleet of ten thousand is looked through in minutes, and nobody notices."""
_SOME = 50


class Rights:
    """Of the whole tree. Does nothing where the ledger does not know who asks."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def set_right(self) -> None:
        """May be repeated, and cut off anywhere. Raises StoreUnavailable."""
        if not self._store.keeps_rights:
            return
        if await self._store.read(paths.RIGHTS) is None:
            await self._close_all()
            await self._store.multi([Create(paths.RIGHTS, b"")])
            log.info("the ledger was open: from now on each node says who may write it")
        guests = await members(self._store, paths.GUESTS)
        for number in range(0, len(guests), _SOME):
            await each(guests[number : number + _SOME], self._guest)
            await asyncio.sleep(_PAUSE_S)

    async def _close_all(self) -> None:
        for path in ("", *paths.ROOTS, paths.LAYOUT, paths.COORDINATORS, paths.ACTIVE):
            await self._store.grant(path or "/", ())
        for root in paths.ROOTS:
            if root != paths.BARRIER:
                await self._below(root)
        for migration in await members(self._store, paths.MIGRATIONS):
            await self._migration(migration)

    async def _below(self, path: str) -> None:
        names = await self._store.children(path)
        for child in (f"{path}/{name}" for name in names):
            await self._store.grant(child, ())
            await self._below(child)

    async def _migration(self, name: str) -> None:
        node = await self._store.read(paths.migration_state(name))
        try:
            state = decode(MigrationState, node.data) if node is not None else MigrationState()
        except BadRecord:
            return
        for path in (paths.requests(name), paths.acks(name)):
            await self._store.grant(path, {state.source} if state.source and not state.phase.terminal else ())

    async def _guest(self, uuid: str) -> None:
        """One under way keeps what its driver has given: that is what its record says as well."""
        node = await self._store.read(paths.guest(uuid))
        try:
            record = decode(GuestRecord, node.data) if node is not None else None
        except BadRecord:
            return
        if record is None or record.phase is Ownership.GONE:
            return
        hosts = hosts_of(record)
        if record.phase in (Ownership.IDLE, Ownership.ABORTED) and record.migration:
            active = await self._store.read(paths.active_migration(record.migration))
            if active is not None:
                return  # its driver may be about to open the next attempt
        await self._store.grant(paths.guest(uuid), hosts)
        await self._store.grant(paths.guest_spec(uuid), {record.owner.host})
