"""What the watches have to know about guests, migrations and evacuations (`watching.Source`)."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.api import views
from orchestrator.api.calls import Tools
from orchestrator.api.reads import (
    EvacuationRead,
    GuestRead,
    MigrationRead,
    quarantined,
    read_evacuation,
    read_guest,
    read_migration,
)
from orchestrator.api.watching import Source
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger
from protos.drover.v1 import types_pb2


def _none_if_missing(error: DroverError) -> None:
    if error.reason is not RefusalReason.NOT_FOUND:
        raise error


class _SetAside:
    """Why leaders have set resources of one kind aside, as it was last read."""

    def __init__(self, ledger: Ledger, kind: str) -> None:
        self._ledger = ledger
        self._kind = kind
        self._reasons: dict[str, str] = {}

    async def refresh(self) -> list[str]:
        """Names of those for which that is otherwise than before. Raises StoreUnavailable."""
        found = await quarantined(self._ledger)
        reasons = {path.removeprefix(self._kind): why for path, why in found.items() if path.startswith(self._kind)}
        before, self._reasons = self._reasons, reasons
        return [name for name in before.keys() | reasons.keys() if before.get(name) != reasons.get(name)]

    def said(self, name: str, message: str) -> str:
        """`message` with why it was set aside."""
        return views.quarantined(message, self._reasons.get(name, ""))


class GuestSource(Source[GuestRead, types_pb2.Guest]):
    """By uuid: one life."""

    trees: tuple[str, ...] = (paths.GUESTS,)

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def names(self) -> Iterable[str]:
        return list(await self._tools.index.guests())

    def name_of(self, path: str) -> str:
        return paths.guest_of(path)

    def begins(self, path: str) -> bool:
        return True

    def is_shared(self, path: str) -> bool:
        return False

    async def refresh(self) -> Iterable[str]:
        return ()

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
        return read.record.phase is Ownership.GONE

    def paths(self, read: GuestRead) -> Iterable[str]:
        return ()

    def keys(self, read: GuestRead) -> Iterable[str]:
        return [read.uuid]


_SHOWN = ("", "state", "attempts")
"""What of a migration's nodes shows in it."""


class MigrationSource(Source[MigrationRead, types_pb2.Migration]):
    """Without the time lines of attempts: those are for who asks for one migration."""

    trees: tuple[str, ...] = (paths.ACTIVE_MIGRATIONS, paths.MIGRATIONS, paths.GUESTS, paths.COORDINATORS)

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._set_aside = _SetAside(tools.ledger, "migrations/")

    async def names(self) -> Iterable[str]:
        return await self._tools.store.children(paths.ACTIVE_MIGRATIONS)

    def name_of(self, path: str) -> str:
        return paths.member(path, paths.MIGRATIONS, _SHOWN) or paths.active_of(path, paths.ACTIVE_MIGRATIONS)

    def begins(self, path: str) -> bool:
        return bool(paths.active_of(path, paths.ACTIVE_MIGRATIONS))

    def is_shared(self, path: str) -> bool:
        return paths.is_quarantine(path)

    async def refresh(self) -> Iterable[str]:
        return await self._set_aside.refresh()

    async def read(self, name: str) -> MigrationRead | None:
        try:
            return await read_migration(self._tools.ledger, name)
        except DroverError as error:
            return _none_if_missing(error)

    def view(self, read: MigrationRead) -> types_pb2.Migration:
        shown = views.migration(read, self._tools.fleet, timelines=False)
        if not self.over(read):
            shown.message = self._set_aside.said(read.spec.id, shown.message)
        return shown

    def aged(self, read: MigrationRead, message: types_pb2.Migration) -> types_pb2.Migration:
        now = types_pb2.Migration()
        now.CopyFrom(message)
        now.elapsed_ms = views.migration_elapsed_ms(read, self._tools.fleet, self._tools.ages)
        return now

    def over(self, read: MigrationRead) -> bool:
        return read.standing.state.phase.terminal

    def paths(self, read: MigrationRead) -> Iterable[str]:
        return [paths.guest(read.spec.guest)]

    def keys(self, read: MigrationRead) -> Iterable[str]:
        return [read.spec.id]


class EvacuationSource(Source[EvacuationRead, types_pb2.Evacuation]):
    """With its guests, and whether its host is cordoned now."""

    trees: tuple[str, ...] = (paths.ACTIVE_EVACUATIONS, paths.EVACUATIONS, paths.HOSTS, paths.COORDINATORS)

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._set_aside = _SetAside(tools.ledger, "evacuations/")

    async def names(self) -> Iterable[str]:
        return await self._tools.store.children(paths.ACTIVE_EVACUATIONS)

    def name_of(self, path: str) -> str:
        return paths.member(path, paths.EVACUATIONS) or paths.active_of(path, paths.ACTIVE_EVACUATIONS)

    def begins(self, path: str) -> bool:
        return bool(paths.active_of(path, paths.ACTIVE_EVACUATIONS))

    def is_shared(self, path: str) -> bool:
        return paths.is_quarantine(path)

    async def refresh(self) -> Iterable[str]:
        return await self._set_aside.refresh()

    async def read(self, name: str) -> EvacuationRead | None:
        try:
            return await read_evacuation(self._tools.ledger, name)
        except DroverError as error:
            return _none_if_missing(error)

    def view(self, read: EvacuationRead) -> types_pb2.Evacuation:
        shown = views.evacuation(read, self._tools.fleet)
        if not self.over(read):
            shown.message = self._set_aside.said(read.spec.id, shown.message)
        return shown

    def aged(self, read: EvacuationRead, message: types_pb2.Evacuation) -> types_pb2.Evacuation:
        now = types_pb2.Evacuation()
        now.CopyFrom(message)
        now.elapsed_ms = views.evacuation_elapsed_ms(read, self._tools.ages)
        return now

    def over(self, read: EvacuationRead) -> bool:
        return read.state.phase.terminal

    def paths(self, read: EvacuationRead) -> Iterable[str]:
        return [paths.cordon(read.spec.host)]

    def keys(self, read: EvacuationRead) -> Iterable[str]:
        return [each.migration for each in read.state.guests if each.migration and not each.phase.terminal]
