"""A host that may be one: what somebody with the right to it makes in the ledger before the host's agent comes.

Where the ledger knows who asks, no agent can make itself a host: the node of its record and the one above its
certificates are there, empty, and only the agent with that host's certificate may fill them.
"""

from __future__ import annotations

from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.store import Store


async def enrol(store: Store, host: str) -> None:
    """May be repeated; a host that is registered stays as it is. Raises StoreUnavailable, WrongLayout."""
    await Ledger(store).init_tree()
    await store.ensure(paths.host(host))
    await store.ensure(paths.fences(host))
