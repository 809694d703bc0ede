"""A connection that is lost while the fleet is being read."""

from __future__ import annotations

import pytest

from orchestrator.ledger.index import Index
from orchestrator.ledger.store import SessionState, StoreUnavailable
from tests.fakes.coordination import MemoryStore, Tree


async def test_a_gap_that_ends_within_a_round_is_not_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts from after it beside guests from before it would give memory away twice."""
    index = Index(MemoryStore(Tree()))
    index._announced(None)
    index._everything = False
    index._moved_guests = {"g"}

    async def read(_: str) -> None:
        index._session(SessionState.SUSPENDED)
        index._announced(None)

    monkeypatch.setattr(index, "_read_guest", read)
    with pytest.raises(StoreUnavailable):
        await index._round()
    assert index._moved_guests == {"g"}
    assert index._everything
