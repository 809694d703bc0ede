"""What lists and the retention know of each migration, evacuation and request id: one row each (`table.Table`)."""

from __future__ import annotations

from dataclasses import dataclass
from sys import intern

from orchestrator.core.records import EvacuationSpec, EvacuationState, MigrationSpec, MigrationState
from orchestrator.core.text import clip
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import Store
from orchestrator.ledger.table import Table


@dataclass(frozen=True, slots=True)
class MigrationRow:
    """One migration."""

    name: str
    order: int
    """zxid of its creation: the ledger's own order, whatever the clocks of those who wrote there."""
    guest: str = ""
    """Uuid."""
    guest_name: str = ""
    evacuation: str = ""
    source: str = ""
    destination: str = ""
    phase: str = ""
    attempts: int = 0
    failure: str = ""
    create_time_s: float = 0.0
    end_time_s: float = 0.0
    ended: int = 0
    """zxid of its end; 0: it is not over."""
    unreadable: str = ""
    """Why it cannot be read; empty: it can."""

    @property
    def over(self) -> bool:
        """Nothing of it changes any more."""
        return self.ended > 0


@dataclass(frozen=True, slots=True)
class EvacuationRow:
    """One evacuation."""

    name: str
    order: int
    """zxid of its creation."""
    host: str = ""
    phase: str = ""
    create_time_s: float = 0.0
    end_time_s: float = 0.0
    ended: int = 0
    """zxid at which it was over, or was last told whether its host may be powered off; 0: it is not over."""
    unreadable: str = ""

    @property
    def over(self) -> bool:
        """It has no more migrations to create; its head may still be told about its host."""
        return self.ended > 0


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One request id."""

    name: str
    order: int
    """zxid of its creation."""

    @property
    def over(self) -> bool:
        """It never changes."""
        return True


def migrations(store: Store, *, pace_s: float = 0.0, linger_s: float = 0.0) -> Table[MigrationRow]:
    """All that the ledger holds, those under way first."""
    ledger = Ledger(store)

    async def read(name: str) -> MigrationRow | None:
        path = paths.migration(name)
        node = await store.read(path)
        state = await store.read(paths.migration_state(name)) if node is not None else None
        if node is None:
            return None
        try:
            spec = decode(MigrationSpec, node.data, path=path)
            if state is None or not state.data:
                return None  # not written as a whole yet: its state will be announced
            now = decode(MigrationState, state.data, path=paths.migration_state(name))
        except BadRecord as error:
            return MigrationRow(name, node.mzxid, unreadable=clip(str(error)))
        return MigrationRow(
            name=name,
            order=node.mzxid,
            guest=spec.guest,
            guest_name=spec.guest_name,
            evacuation=intern(spec.evacuation),
            source=intern(now.source),
            destination=intern(now.destination or spec.destination),
            phase=intern(now.phase.value),
            attempts=now.attempt,
            failure=intern(now.failure.value if now.failure is not None else ""),
            create_time_s=spec.create_time_s,
            end_time_s=now.end_time_s,
            ended=state.mzxid if now.phase.terminal else 0,
        )

    return Table(
        store,
        paths.MIGRATIONS,
        names=ledger.list_migrations,
        name_of=lambda path: paths.member(path, paths.MIGRATIONS, ("", "state")),
        read=read,
        pace_s=pace_s,
        linger_s=linger_s,
    )


def evacuations(store: Store, *, pace_s: float = 0.0, linger_s: float = 0.0) -> Table[EvacuationRow]:
    """All that the ledger holds."""
    ledger = Ledger(store)

    async def read(name: str) -> EvacuationRow | None:
        path = paths.evacuation(name)
        node = await store.read(path)
        head = await store.read(paths.evacuation_state(name)) if node is not None else None
        if node is None:
            return None
        try:
            spec = decode(EvacuationSpec, node.data, path=path)
            if head is None or not head.data:
                return None
            state = decode(EvacuationState, head.data, path=paths.evacuation_state(name))
        except BadRecord as error:
            return EvacuationRow(name, node.mzxid, unreadable=clip(str(error)))
        return EvacuationRow(
            name=name,
            order=node.mzxid,
            host=intern(spec.host),
            phase=intern(state.phase.value),
            create_time_s=spec.create_time_s,
            end_time_s=state.end_time_s,
            ended=head.mzxid if state.phase.terminal else 0,
        )

    return Table(
        store,
        paths.EVACUATIONS,
        names=ledger.list_evacuations,
        name_of=lambda path: paths.member(path, paths.EVACUATIONS, ("", "state")),
        read=read,
        pace_s=pace_s,
        linger_s=linger_s,
    )


def requests(store: Store, *, pace_s: float = 0.0, linger_s: float = 0.0) -> Table[RequestRow]:
    """All that the ledger holds."""
    ledger = Ledger(store)

    async def read(name: str) -> RequestRow | None:
        node = await store.read(paths.request_id(name))
        return None if node is None else RequestRow(name, node.mzxid)

    return Table(
        store,
        paths.REQUESTS,
        names=ledger.list_requests,
        name_of=lambda path: paths.member(path, paths.REQUESTS, ("",)),
        read=read,
        pace_s=pace_s,
        linger_s=linger_s,
    )
