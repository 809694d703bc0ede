"""What is read of one resource before anything is said or done about it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TypeVar

from orchestrator.api.decisions import Standing, is_id
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.guest import name_error
from orchestrator.core.handover import GuestRecord
from orchestrator.core.placement import Choice, obstacles
from orchestrator.core.records import (
    Attempts,
    Cordon,
    EvacuationSpec,
    EvacuationState,
    GuestSpec,
    MigrationSpec,
    MigrationState,
    QuarantineList,
    Shards,
    WantRun,
)
from orchestrator.core.shards import MAX_SHARDS
from orchestrator.core.text import quoted
from orchestrator.ledger import paths
from orchestrator.ledger.evacuations import read_job
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.tries import Tries

T = TypeVar("T")

_TRIES = 10


@dataclass(frozen=True, slots=True)
class GuestRead:
    """One life of a guest. `version` and `mzxid` are those of the record's node, `want_version` that of the wish's
    node, -1 where nobody has wished anything."""

    uuid: str
    record: GuestRecord
    version: int
    mzxid: int
    spec: GuestSpec
    want_run: WantRun | None
    want_version: int
    spec_version: int = -1
    """Of the specification's node; -1: not read here."""

    @property
    def etag(self) -> str:
        """Names this content of the specification; empty: not known here."""
        return f"{self.uuid}.{self.spec_version}" if self.spec_version >= 0 else ""


@dataclass(frozen=True, slots=True)
class MigrationRead:
    """What was asked for, and where it stands."""

    spec: MigrationSpec
    standing: Standing


@dataclass(frozen=True, slots=True)
class EvacuationRead:
    """What was asked for, where it stands, and the cordon that belongs to it."""

    spec: EvacuationSpec
    state: EvacuationState
    """With its guests."""
    head: EvacuationState
    """As its node holds it."""
    version: int
    """Of the head."""
    cordon: Cordon | None
    """Of its host, as it is now."""
    cordon_version: int = -1
    order: int = 0
    """zxid that made it."""


def not_found(kind: str, name: str, *, field: str = "name") -> DroverError:
    """NOT_FOUND, to be raised for what does not exist; `field` of the request named it."""
    return DroverError(RefusalReason.NOT_FOUND, f"there is no {kind} {quoted(name)}", field=field)


def no_place(choice: Choice, *, field: str = "") -> DroverError:
    """Why a placement found no destination; `details` count the hosts that each reason stands against."""
    counts = {reason.value: str(count) for reason, count in obstacles(choice.verdicts).items()}
    return DroverError(choice.reason or RefusalReason.NO_CAPACITY, choice.message, field=field, details=counts)


async def guest_uuid(ledger: Ledger, name: str, *, field: str = "name") -> str:
    """Of the guest's present life. A uuid is taken as well, so that a life that is over can be looked at.

    Raises INVALID_ARGUMENT for what can be no name, NOT_FOUND.
    """
    if wrong := name_error(name):
        raise DroverError(RefusalReason.INVALID_ARGUMENT, wrong, field=field)
    found = await ledger.read(str, paths.name(name))
    if found is not None:
        return found[0]
    if is_id(name) and await ledger.store.read(paths.guest(name)) is not None:
        return name
    raise not_found("guest", name, field=field)


async def read_guest(ledger: Ledger, uuid: str) -> GuestRead:
    """Raises NOT_FOUND."""
    found = await ledger.read_guest(uuid)
    spec = await ledger.read(GuestSpec, paths.guest_spec(uuid))
    if found is None or spec is None:
        raise not_found("guest", uuid)
    want = await ledger.read(WantRun, paths.want_run(uuid))
    record, version, mzxid = found
    wish, wish_version = want if want else (None, -1)
    return GuestRead(uuid, record, version, mzxid, spec[0], wish, wish_version, spec[1])


async def read_migration(ledger: Ledger, migration: str) -> MigrationRead:
    """Raises NOT_FOUND.

    State, record, state again: when the state did not move, the record belongs to it. Whatever opens or settles an
    attempt moves both, so a half of such a write is never seen.
    """
    spec = await ledger.read(MigrationSpec, paths.migration(migration)) if is_id(migration) else None
    if spec is None:
        raise not_found("migration", migration)
    path = paths.migration_state(migration)
    before = await ledger.read(MigrationState, path)
    said = f"migration {migration} keeps moving: look again"
    looks = Tries(lambda: DroverError(RefusalReason.OUTCOME_UNKNOWN, said), at_most=_TRIES)
    while True:
        await looks.another()
        found = await ledger.read_guest(spec[0].guest)
        attempts = await ledger.read(Attempts, paths.attempts(migration))
        after = await ledger.read(MigrationState, path)
        if before is None or after is None:
            raise BadRecord(f"{path}: missing")
        if before[1] == after[1]:
            record, version, mzxid = found or (None, -1, 0)
            reports = attempts[0].reports if attempts else ()
            return MigrationRead(spec[0], Standing(record, version, mzxid, *after, reports))
        before = after


async def quarantined(ledger: Ledger) -> dict[str, str]:
    """Why the leaders have set resources aside, by `migrations/<id>` and `evacuations/<id>`."""
    found: dict[str, str] = {}
    for shard in range(await fleet_shards(ledger)):
        try:
            node = await ledger.store.read(paths.quarantine(shard))
            entries = decode(QuarantineList, node.data).entries if node is not None and node.data else ()
        except BadRecord:
            continue
        found |= {entry.resource: entry.reason for entry in entries}
    return found


async def fleet_shards(ledger: Ledger) -> int:
    """Into how many shards the fleet is shared out among coordinators."""
    with contextlib.suppress(BadRecord):
        node = await ledger.store.read(paths.SHARDS)
        if node is not None and node.data:
            return max(1, min(MAX_SHARDS, decode(Shards, node.data, path=paths.SHARDS).count))
    return 1


async def read_evacuation(ledger: Ledger, job: str) -> EvacuationRead:
    """Raises NOT_FOUND."""
    read = await read_job(ledger.store, job) if is_id(job) else None
    if read is None:
        raise not_found("evacuation", job)
    path = paths.cordon(read.spec.host)
    node = await ledger.store.read(path)
    cordon = decode(Cordon, node.data, path=path) if node is not None and node.data else None
    version = node.version if node is not None else -1
    return EvacuationRead(read.spec, read.state, read.head, read.version, cordon, version, read.mzxid)
