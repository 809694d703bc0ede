"""How a migration comes into being: all of its nodes at once, and never two of one guest beside each other."""

from __future__ import annotations

from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import Attempts, MigrationSpec, MigrationState
from orchestrator.ledger import active, paths
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Create, Op, SetData, Store, Versioned


async def creation(store: Store, spec: MigrationSpec) -> list[Op]:
    """What the coordinator expects to find of a migration, for one transaction with the caller's own checks.

    The transaction conflicts when another migration of the guest was created since this look. Raises DroverError
    (GUEST_IS_MIGRATING, with the other's id), StoreUnavailable, BadRecord.
    """
    newest = await free_of_others(store, spec.guest, spec.guest_name)
    await store.ensure(paths.shard(paths.migration(spec.id)))
    path, content = paths.newest_migration(spec.guest), encode(spec.id)
    return [
        Create(path, content) if newest is None else SetData(path, content, newest.version),
        Create(paths.migration(spec.id), encode(spec)),
        Create(paths.migration_state(spec.id), encode(MigrationState())),
        Create(paths.attempts(spec.id), encode(Attempts())),
        active.migration_begins(spec),
    ]


async def free_of_others(store: Store, guest: str, name: str) -> Versioned | None:
    """The node that names the guest's newest migration, which is over; None before its first one.

    The guest's record names a migration only while an attempt is open: between the request and the first attempt, which
    may take long, nothing but this node knows of it. Raises as `creation` does.
    """
    path = paths.newest_migration(guest)
    newest = await store.read(path)
    if newest is None:
        return None
    known = decode(str, newest.data, path=path)
    state = await store.read(paths.migration_state(known))
    if state is not None and not decode(MigrationState, state.data, path=paths.migration_state(known)).phase.terminal:
        said = f"guest {name} is in migration {known} already"
        raise DroverError(RefusalReason.GUEST_IS_MIGRATING, said, details={"migration": known})
    return newest
