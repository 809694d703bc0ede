"""What the watches have to know about guests, migrations and evacuations (`watching.Source`)."""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from orchestrator.api import views
from orchestrator.api.calls import Tools
from orchestrator.api.history import History
from orchestrator.api.reads import (
    EvacuationRead,
    GuestRead,
    MigrationRead,
    read_evacuation,
    read_guest,
    read_migration,
)
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.ledger import paths
from orchestrator.ledger.evacuations import read_job
from orchestrator.ledger.gather import each
from orchestrator.ledger.records import BadRecord
from protos.drover.v1 import types_pb2

log = structlog.get_logger(__name__)


def _none_if_missing(error: DroverError) -> None:
    if error.reason is not RefusalReason.NOT_FOUND:
        raise error


class GuestSource:
    """By uuid: one life."""

    root = paths.GUESTS

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._gone: set[str] = set()

    async def active(self, names: Iterable[str]) -> Iterable[str]:
        return [uuid for uuid in names if uuid not in self._gone]

    async def read(self, name: str) -> GuestRead | None:
        try:
            return await read_guest(self._tools.ledger, name)
        except DroverError as error:
            return _none_if_missing(error)

    def view(self, read: GuestRead) -> types_pb2.Guest:
        return views.guest(read, self._tools.fleet)

    def aged(self, read: GuestRead, message: types_pb2.Guest) -> types_pb2.Guest:
        return message

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

    root = paths.MIGRATIONS

    def __init__(self, tools: Tools, history: History) -> None:
        self._tools = tools
        self._history = history

    async def active(self, names: Iterable[str]) -> Iterable[str]:
        return [line.name for line in await self._history.of(names) if not line.over]

    async def read(self, name: str) -> MigrationRead | None:
        try:
            return await read_migration(self._tools.ledger, name)
        except DroverError as error:
            return _none_if_missing(error)

    def view(self, read: MigrationRead) -> types_pb2.Migration:
        return views.migration(read, self._tools.fleet, timelines=False)

    def aged(self, read: MigrationRead, message: types_pb2.Migration) -> types_pb2.Migration:
        now = types_pb2.Migration()
        now.CopyFrom(message)
        now.elapsed_ms = views.migration_elapsed_ms(read, self._tools.fleet, self._tools.ages)
        return now

    def over(self, read: MigrationRead) -> bool:
        return read.standing.state.phase.terminal

    def paths(self, read: MigrationRead) -> Iterable[str]:
        name = read.spec.id
        return [paths.guest(read.spec.guest), paths.migration_state(name), paths.attempts(name)]

    def keys(self, read: MigrationRead) -> Iterable[str]:
        return [read.spec.id]


class EvacuationSource:
    root = paths.EVACUATIONS

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._over: set[str] = set()

    async def active(self, names: Iterable[str]) -> Iterable[str]:
        """Reads the head of those that are not known to be over, once each."""
        unknown = [name for name in names if name not in self._over]

        async def one(name: str) -> bool:
            try:
                found = await read_job(self._tools.store, name, rows=())
            except BadRecord as error:
                log.error("left out of watches: it cannot be read", evacuation=name, error=str(error))
                return False
            if found is not None and found.head.phase.terminal:
                self._over.add(name)
            return found is not None and name not in self._over

        found = await each(unknown, one)
        return [name for name, is_active in zip(unknown, found, strict=True) if is_active]

    async def read(self, name: str) -> EvacuationRead | None:
        try:
            return await read_evacuation(self._tools.ledger, name)
        except DroverError as error:
            return _none_if_missing(error)

    def view(self, read: EvacuationRead) -> types_pb2.Evacuation:
        return views.evacuation(read, self._tools.fleet)

    def aged(self, read: EvacuationRead, message: types_pb2.Evacuation) -> types_pb2.Evacuation:
        now = types_pb2.Evacuation()
        now.CopyFrom(message)
        now.elapsed_ms = views.evacuation_elapsed_ms(read, self._tools.ages)
        return now

    def over(self, read: EvacuationRead) -> bool:
        return read.state.phase.terminal

    def paths(self, read: EvacuationRead) -> Iterable[str]:
        return [paths.evacuation_state(read.spec.id), paths.cordon(read.spec.host)]

    def keys(self, read: EvacuationRead) -> Iterable[str]:
        return [each.migration for each in read.state.guests if each.migration and not each.phase.terminal]
