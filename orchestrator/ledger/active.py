"""The active set: which migrations and jobs are not over, so that who leads finds them without a look at what is
over.

A node of it is made in the transaction that makes the migration or job, and goes in the one that writes its terminal
phase: what is not over has a node. A job that is over keeps another one while its host stays cordoned, for so long does
what it says of the host still count.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core.records import EvacuationSpec, MigrationSpec
from orchestrator.ledger import paths
from orchestrator.ledger.records import encode
from orchestrator.ledger.store import Create, Delete, Op, Store


def migration_begins(spec: MigrationSpec) -> Create:
    """For the transaction that creates the migration."""
    return Create(paths.active_migration(spec.id), encode(spec.guest))


def job_begins(spec: EvacuationSpec) -> Create:
    """For the transaction that creates the job."""
    return Create(paths.active_evacuation(spec.id), encode(spec.host))


async def migration_ends(store: Store, migration: str) -> list[Op]:
    """For the transaction that writes the terminal phase, which conflicts if the node moves meanwhile. Raises
    StoreUnavailable."""
    return await _without(store, paths.active_migration(migration))


def migration_leaves(migration: str) -> Delete:
    """As `migration_ends`, without a look: nobody writes such a node twice, so it has its first version, or is missing,
    and then the transaction conflicts."""
    return Delete(paths.active_migration(migration), 0)


async def job_ends(store: Store, spec: EvacuationSpec) -> list[Op]:
    """As `migration_ends`; the job counts as ended from now on."""
    path = paths.ended_evacuation(spec.id)
    made: Sequence[Op] = () if await store.read(path) is not None else (Create(path, encode(spec.host)),)
    return [*await _without(store, paths.active_evacuation(spec.id)), *made]


async def _without(store: Store, path: str) -> list[Op]:
    """A node that is missing, as in a ledger that was restored by hand, keeps nothing from ending."""
    node = await store.read(path)
    return [] if node is None else [Delete(path, node.version)]
