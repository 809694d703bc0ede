"""What the watches have to know about guests, migrations and evacuations (`watching.Source`)."""

from __future__ import annotations

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
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.ledger import paths
from protos.drover.v1 import types_pb2


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

    root = paths.ACTIVE_MIGRATIONS

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def active(self, names: Iterable[str]) -> Iterable[str]:
        return names

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
    root = paths.ACTIVE_EVACUATIONS

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def active(self, names: Iterable[str]) -> Iterable[str]:
        return names

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
