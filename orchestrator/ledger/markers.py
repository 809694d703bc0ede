"""Which guests concern a host: one empty node each, so that its agent looks at those and never at the whole fleet.

Whoever writes a record that gives a guest to a host, or may come to, makes the node in the same transaction, or checks
that it is there. Only the host's own agent removes nodes, when the record does so no more, in a transaction that checks
the record: so a node may be there for nothing, and never be missing.
"""

from __future__ import annotations

from orchestrator.core.death import hosts_of
from orchestrator.core.handover import GuestRecord
from orchestrator.ledger import paths
from orchestrator.ledger.store import Check, Create, Delete, Op, Store


def concerns(record: GuestRecord, host: str) -> bool:
    """Whether the host's list has to name the guest."""
    return host in hosts_of(record)


async def marked(store: Store, host: str, uuid: str) -> Op:
    """For a transaction that writes a record which names the host; it conflicts when the node moves meanwhile. Raises
    StoreUnavailable."""
    path = paths.host_guest(host, uuid)
    node = await store.read(path)
    return Create(path, b"") if node is None else Check(path, node.version)


async def unmarked(store: Store, host: str) -> list[Op]:
    """What is left of a host's nodes, the one above them last: for a host that is removed. Raises StoreUnavailable."""
    root = paths.host_guests(host)
    children = [f"{root}/{uuid}" for uuid in await store.children(root)]
    nodes = [(path, await store.read(path)) for path in (*children, root)]
    return [Delete(path, node.version) for path, node in nodes if node is not None]
