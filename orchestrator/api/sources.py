"""What the watches have to know about guests, migrations and evacuations (`watching.Source`)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from orchestrator.api import views
from orchestrator.api.calls import Tools
from orchestrator.api.reads import (
    EvacuationRead,
    GuestRead,
    MigrationRead,
    read_evacuation,
    read_guest,
    read_migration,
)
from orchestrator.api.watching import READS_AT_ONCE
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.core.records import MigrationState
from orchestrator.ledger import paths
from protos.drover.v1 import types_pb2


def _none_if_missing(error: DroverError) -> None:
    if error.reason is not RefusalReason.NOT_FOUND:
        raise error


class GuestSource:
    """By uuid: one life."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._gone: set[str] = set()

    async def discover(self) -> Iterable[str]:
        return [uuid for uuid in await self._tools.ledger.list_guests() if uuid not in self._gone]

    async def roots(self) -> Iterable[str]:
        return [paths.GUESTS]

    async def read(self, name: str) -> GuestRead | None:
        try:
            return await read_guest(self._tools.ledger, name)
        except DroverError as error:
            return _none_if_missing(error)

    def view(self, read: GuestRead) -> types_pb2.Guest:
        return views.guest(read, self._tools.fleet)

    def over(self, read: GuestRead) -> bool:
        if read.record.phase is Ownership.GONE:
            self._gone.add(read.uuid)
        return read.record.phase is Ownership.GONE

    def paths(self, read: GuestRead) -> Iterable[str]:
        return [paths.guest(read.uuid), paths.want_run(read.uuid)]

    def keys(self, read: GuestRead) -> Iterable[str]:
        return [read.uuid]


class MigrationSource:
    """Without the time lines of attempts: those are for who asks for one migration."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._over: set[str] = set()

    async def discover(self) -> Iterable[str]:
        """Reads the state of those that are not known to be over, once each."""
        unknown = [name for name in await self._tools.ledger.list_migrations() if name not in self._over]
        bound = asyncio.Semaphore(READS_AT_ONCE)

        async def active(name: str) -> bool:
            async with bound:
                found = await self._tools.ledger.read(MigrationState, paths.migration_state(name))
            if found is not None and found[0].phase.terminal:
                self._over.add(name)
            return name not in self._over

        found = await asyncio.gather(*(active(name) for name in unknown))
        return [name for name, is_active in zip(unknown, found, strict=True) if is_active]

    async def roots(self) -> Iterable[str]:
        shards = await self._tools.store.children(paths.MIGRATIONS)
        return [paths.MIGRATIONS, *(f"{paths.MIGRATIONS}/{shard}" for shard in shards)]

    async def read(self, name: str) -> MigrationRead | None:
        try:
            return await read_migration(self._tools.ledger, name)
        except DroverError as error:
            return _none_if_missing(error)

    def view(self, read: MigrationRead) -> types_pb2.Migration:
        return views.migration(read, self._tools.fleet, timelines=False)

    def over(self, read: MigrationRead) -> bool:
        if read.standing.state.phase.terminal:
            self._over.add(read.spec.id)
        return read.standing.state.phase.terminal

    def paths(self, read: MigrationRead) -> Iterable[str]:
        name = read.spec.id
        return [paths.guest(read.spec.guest), paths.migration_state(name), paths.attempts(name)]

    def keys(self, read: MigrationRead) -> Iterable[str]:
        return [read.spec.id]


class EvacuationSource:
    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def discover(self) -> Iterable[str]:
        return await self._tools.ledger.list_evacuations()

    async def roots(self) -> Iterable[str]:
        return [paths.EVACUATIONS]

    async def read(self, name: str) -> EvacuationRead | None:
        try:
            return await read_evacuation(self._tools.ledger, name)
        except DroverError as error:
            return _none_if_missing(error)

    def view(self, read: EvacuationRead) -> types_pb2.Evacuation:
        return views.evacuation(read, self._tools.fleet)

    def over(self, read: EvacuationRead) -> bool:
        return read.state.phase.terminal

    def paths(self, read: EvacuationRead) -> Iterable[str]:
        return [paths.evacuation_state(read.spec.id), paths.cordon(read.spec.host)]

    def keys(self, read: EvacuationRead) -> Iterable[str]:
        return [each.migration for each in read.state.guests if each.migration and not each.phase.terminal]
