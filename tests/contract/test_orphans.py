"""An attempt that nobody has opened is ended on the real ledger as on the one in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from orchestrator.coordinator.orphans import Orphans
from orchestrator.core import handover
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import GuestSpec, Leader, Reservation
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Create, Done, Store
from tests.fakes.coordination import World

G, FORGED = "11111111-0000-4000-8000-000000000001", "0f0e0d0c-0000-4000-8000-000000000001"


@pytest.fixture
async def store(connect: Callable[[], Store]) -> AsyncIterator[Store]:
    opened = connect()
    await opened.start()
    await Ledger(opened).init_tree()
    yield opened
    await opened.close()


async def test_it_is_aborted_then_closed_and_its_room_is_given_back(store: Store) -> None:
    record = GuestRecord("web", Ownership.IDLE, HostRef("h1", "b1"))
    opened = handover.open_attempt(record, FORGED, 1, HostRef("h2", "b2"), epoch=0, writer="a stranger")
    for path, content in (
        (paths.epoch(), Leader("me", "1")),
        (paths.guest(G), opened),
        (paths.guest_spec(G), GuestSpec("web", 64)),
        (paths.reservation("h2", FORGED), Reservation(64)),
    ):
        await store.ensure(path.rpartition("/")[0])
        if await store.read(path) is None:
            assert isinstance(await store.multi([Create(path, encode(content))]), Done)
    node = await store.read(paths.epoch())
    assert node is not None
    index = Index(store)
    orphans = Orphans(store, index, World(), node.version)
    found: list[Ownership] = []
    for _ in range(3):
        await orphans.look(lambda _: False)
        guest = await store.read(paths.guest(G))
        assert guest is not None
        found.append(decode(GuestRecord, guest.data).phase)
    await index.close()
    assert found == [Ownership.ABORTED, Ownership.IDLE, Ownership.IDLE]
    assert await store.read(paths.reservation("h2", FORGED)) is None
    assert await store.read(paths.migration(FORGED)) is None
