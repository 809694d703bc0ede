"""The ledger's own name, by which agents tell it from another one that was put in its place (docs/adr/0061)."""

from __future__ import annotations

import asyncio
import time
import uuid

import structlog

from orchestrator.core.records import Incarnation
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import op_create
from orchestrator.ledger.records import decode
from orchestrator.ledger.store import Done, Store, StoreUnavailable

log = structlog.get_logger(__name__)

AGAIN_S = 1.0


async def read(store: Store) -> Incarnation | None:
    """Which ledger this is; None: it has no name yet. Raises StoreUnavailable, BadRecord."""
    node = await store.read(paths.INCARNATION)
    return decode(Incarnation, node.data, path=paths.INCARNATION) if node is not None and node.data else None


async def given(store: Store) -> None:
    """See to it that the ledger has a name: the leader's task. Returns once it has; a tree into which a backup is just
    being imported gets its own from the import."""
    while True:
        try:
            if await store.read(paths.INCARNATION) is not None:
                return
            if await store.read(paths.RESTORE) is None:
                await store.ensure(paths.CLUSTER)
                made = Incarnation(uuid.uuid4().hex, why="made by the first coordinator", time_s=time.time())
                if isinstance(await store.multi([op_create(paths.INCARNATION, made)]), Done):
                    log.info("the ledger has a name", incarnation=made.id)
        except StoreUnavailable:
            pass
        await asyncio.sleep(AGAIN_S)
