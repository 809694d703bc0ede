"""What watches of a large fleet cost on a real ZooKeeper: nothing while nothing moves, and one look for what does."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from orchestrator.api.watching import Feed
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import GuestSpec, WantRun
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import op_create, op_set
from orchestrator.ledger.store import Done, Op, Versioned
from orchestrator.ledger.zookeeper import ZooKeeperStore
from protos.drover.v1 import types_pb2
from tests.fakes.api import ApiCluster, api_cluster, until
from tests.fakes.zookeeper import ZooKeeperServer, missing

pytestmark = [pytest.mark.zookeeper, pytest.mark.timeout(300)]
GUESTS = 2_000
STREAMS = 200
REST_S = 10.0


class Counting(ZooKeeperStore):
    """Counts what is asked of it, apart from the probe of its health."""

    reads = 0

    async def read(self, path: str, timeout_s: float = 2.0) -> Versioned | None:
        self.reads += path.startswith(f"{paths.GUESTS}/")
        return await super().read(path, timeout_s)

    async def children(self, path: str, timeout_s: float = 2.0) -> tuple[str, ...]:
        self.reads += 1
        return await super().children(path, timeout_s)

    @property
    def node_watches(self) -> int:
        return len(self._watches)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[ApiCluster]:
    if missing():
        pytest.skip(missing())
    server = ZooKeeperServer(tmp_path / "zk")
    server.start()
    try:
        async with api_cluster(Counting(server.hosts, session_timeout_s=4), tmp_path) as cluster:
            yield cluster
    finally:
        server.kill()


async def _seed(store: ZooKeeperStore) -> list[str]:
    uuids = [str(uuid.uuid4()) for _ in range(GUESTS)]
    for shard in sorted({paths.shard(paths.guest(each)) for each in uuids}):
        await store.ensure(shard)
    for start in range(0, GUESTS, 100):
        ops: list[Op] = []
        for each in uuids[start : start + 100]:
            ops.append(op_create(paths.guest(each), GuestRecord(f"g-{each[:12]}", Ownership.IDLE, HostRef("h1", "b"))))
            ops.append(op_create(paths.guest_spec(each), GuestSpec(f"g-{each[:12]}")))
            ops.append(op_create(paths.want_run(each), WantRun(True)))
        assert isinstance(await store.multi(ops, 10), Done)
    return uuids


async def _collect(
    feed: Feed[object, types_pb2.Guest], names: tuple[str, ...], into: dict[str, types_pb2.Guest]
) -> None:
    async with aclosing(feed.stream(names)) as guests:
        async for guest in guests:
            into[guest.uuid] = guest


async def test_two_thousand_guests_watched_by_two_hundred_streams_cost_nothing_at_rest(api: ApiCluster) -> None:
    store = api.store
    assert isinstance(store, Counting)
    uuids = await _seed(store)
    feed: Feed[object, types_pb2.Guest] = api.server.servicer.guest_feed  # type: ignore[assignment]
    before = store.node_watches
    named = [tuple(uuids[number :: STREAMS // 2]) for number in range(STREAMS // 2)]
    told: list[dict[str, types_pb2.Guest]] = [{} for _ in range(STREAMS)]
    store.reads = 0
    tasks = [
        asyncio.create_task(_collect(feed, names, into))
        for names, into in zip([*[()] * (STREAMS // 2), *named], told, strict=True)
    ]
    try:
        await until(lambda: sum(map(len, told)) == GUESTS * (STREAMS // 2 + 1), 120)
        await asyncio.sleep(1)
        assert store.reads < 12 * GUESTS, "the reads grow with the number of streams"
        assert store.node_watches == before, "a guest has a watch of its own"

        store.reads, busy_s, began_s = 0, time.process_time(), time.monotonic()
        await asyncio.sleep(REST_S)
        share = (time.process_time() - busy_s) / (time.monotonic() - began_s)
        assert store.reads == 0
        print(f"at rest: {100 * share:.1f} % of a core")
        assert share < 0.05

        node = await store.read(paths.want_run(uuids[7]))
        assert node is not None
        store.reads = 0
        assert isinstance(await store.multi([op_set(paths.want_run(uuids[7]), WantRun(False), node.version)]), Done)
        knowing = [into for into in told if uuids[7] in into]
        await until(lambda: not any(into[uuids[7]].want_run for into in knowing), 30)
        assert len(knowing) == STREAMS // 2 + 1
        assert len({id(into[uuids[7]]) for into in knowing}) == 1, "it is rendered once"
        assert store.reads <= 10, "it is read once, by the watches and by the index"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert not feed._entries
    assert not feed._by_path
    assert not feed._by_key
