"""Single nodes that are followed, on the memory store and on the real ZooKeeper: never older than what this process has
been told, and read once for as long as they stand still."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import pytest

from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.store import Create, Delete, Done, Op, SetData, Store, StoreUnavailable, Versioned
from orchestrator.ledger.zookeeper import ZooKeeperStore
from tests.fakes.zookeeper import ZooKeeperServer

Connect = Callable[[], Store]
FOLLOWED = tuple(paths.migration_state(f"{number:08x}") for number in range(4))


class Counted:
    """A store that counts reads; those of a path can be held back once they are answered."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.reads: list[str] = []
        self.held: dict[str, asyncio.Event] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    async def read(self, path: str, timeout_s: float = 2.0) -> Versioned | None:
        self.reads.append(path)
        found = await self._store.read(path, timeout_s)
        if path in self.held:
            await self.held[path].wait()
        return found


@pytest.fixture
async def store(connect: Connect) -> AsyncIterator[Store]:
    opened = connect()
    await opened.start()
    await Ledger(opened).init_tree()
    for path in FOLLOWED:
        await opened.ensure(path.rpartition("/")[0])
    yield opened
    await opened.close()


@pytest.fixture
async def counted(store: Store) -> Counted:
    return Counted(store)


@pytest.fixture
async def index(counted: Counted) -> AsyncIterator[Index]:
    known = Index(counted, also=(paths.MIGRATIONS,))  # type: ignore[arg-type]
    yield known
    await known.close()


async def done(store: Store, *ops: Op) -> None:
    result = await store.multi(ops)
    assert isinstance(result, Done), result


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - a watch tells when it likes
            await asyncio.sleep(0.005)


async def sure(index: Index) -> None:
    """The watch stands."""
    told = asyncio.Event()
    end = index.follow("/migs/none", told.set)
    await until(lambda: index.nodes._sure)
    end()


async def change(store: Store, path: str, rng: random.Random) -> None:
    node = await store.read(path)
    if node is None:
        await done(store, Create(path, str(rng.random()).encode()))
    elif rng.random() < 0.2:
        await done(store, Delete(path, node.version))
    else:
        await done(store, SetData(path, str(rng.random()).encode(), node.version))


async def test_what_is_followed_is_read_once_while_it_stands_still(
    store: Store, counted: Counted, index: Index
) -> None:
    path = FOLLOWED[0]
    await done(store, Create(path, b"one"))
    news: list[str] = []
    end = index.follow(path, lambda: news.append(path))
    await sure(index)
    for _ in range(5):
        found = await asyncio.gather(*(index.nodes.read(path) for _ in range(5)))
        assert [one and one.data for one in found] == [b"one"] * 5
    assert counted.reads.count(path) == 1
    news.clear()
    await done(store, SetData(path, b"two", 0))
    found = await index.nodes.read(path)
    assert found is not None
    assert found.data == b"two", "its own write is announced before it is answered"
    assert news == [path]
    assert counted.reads.count(path) == 2
    end()
    assert len(index.nodes) == 0, "what nobody follows is not remembered"
    await index.nodes.read(path)
    assert len(index.nodes) == 0


@pytest.mark.parametrize("seed", range(3))
async def test_it_is_never_older_than_a_write_or_a_barrier_of_this_process(
    store: Store, connect: Connect, index: Index, seed: int
) -> None:
    other, rng = connect(), random.Random(seed)
    await other.start()
    for path in FOLLOWED:
        index.follow(path, lambda: None)
    await sure(index)
    for _ in range(60):
        path = rng.choice(FOLLOWED)
        if rng.random() < 0.5:
            await change(store, path, rng)
        else:
            await change(other, path, rng)
            await store.barrier()
        known = [await index.nodes.read(one) for one in FOLLOWED]
        assert known == [await other.read(one) for one in FOLLOWED]
    await other.close()


async def test_an_answer_that_a_move_has_overtaken_is_not_remembered(
    store: Store, counted: Counted, index: Index
) -> None:
    path = FOLLOWED[0]
    await done(store, Create(path, b"old"))
    index.follow(path, lambda: None)
    await sure(index)
    release = counted.held[path] = asyncio.Event()
    reading = asyncio.ensure_future(index.nodes.read(path))
    await until(lambda: path in counted.reads)
    await asyncio.sleep(0.05)
    await done(store, SetData(path, b"new", 0))
    again = asyncio.ensure_future(index.nodes.read(path))
    release.set()
    await reading
    found = await again
    assert found is not None
    assert found.data == b"new", "a read that began after the move joined one that began before"
    found = await index.nodes.read(path)
    assert found is not None
    assert found.data == b"new"


async def test_a_reader_that_gives_up_takes_no_other_with_it(store: Store, counted: Counted, index: Index) -> None:
    path = FOLLOWED[0]
    await done(store, Create(path, b"one"))
    index.follow(path, lambda: None)
    await sure(index)
    release = counted.held[path] = asyncio.Event()
    first, second = (asyncio.ensure_future(index.nodes.read(path)) for _ in range(2))
    await until(lambda: path in counted.reads)
    first.cancel()
    await asyncio.wait({first})
    release.set()
    found = await second
    assert found is not None
    assert found.data == b"one"


async def test_single_nodes_cost_no_look_at_the_fleet(store: Store, counted: Counted, index: Index) -> None:
    index.follow(FOLLOWED[0], lambda: None)
    await sure(index)
    await done(store, Create(FOLLOWED[0], b"one"))
    await index.nodes.read(FOLLOWED[0])
    await asyncio.sleep(0.1)
    assert index.whole_looks == 0
    assert set(counted.reads) <= {FOLLOWED[0]}


async def test_one_who_lingers_reads_once_what_moved_often(store: Store, counted: Counted) -> None:
    index = Index(counted, linger_s=60.0)  # type: ignore[arg-type]
    await index.recent()
    counted.reads.clear()
    path = paths.cordon("h0")
    await store.ensure(paths.host("h0"))
    await done(store, Create(path, b""))
    for version in range(5):
        await done(store, SetData(path, b"{}", version))
    await asyncio.sleep(0.1)
    assert path not in counted.reads, "nobody asked"
    async with asyncio.timeout(10):
        await index.recent()
    assert counted.reads.count(path) == 1
    await index.close()


@pytest.mark.zookeeper
async def test_without_a_connection_nothing_is_taken_for_known(server: ZooKeeperServer) -> None:
    store = ZooKeeperStore(server.hosts, chroot="/nodes", session_timeout_s=4)
    other = ZooKeeperStore(server.hosts, chroot="/nodes", session_timeout_s=4)
    await store.start()
    await other.start()
    await Ledger(store).init_tree()
    for path in FOLLOWED:
        await other.ensure(path.rpartition("/")[0])
    index, rng, told = Index(store, also=(paths.MIGRATIONS,)), random.Random(5), asyncio.Event()
    for path in FOLLOWED:
        index.follow(path, told.set)
    await sure(index)
    for _ in range(6):
        told.clear()
        store._cut()
        for path in FOLLOWED:
            await change(other, path, rng)
        async with asyncio.timeout(15):
            await told.wait()
            while True:
                try:
                    await store.barrier()
                    known = [await index.nodes.read(path) for path in FOLLOWED]
                    break
                except StoreUnavailable:
                    await asyncio.sleep(0.02)
        assert known == [await other.read(path) for path in FOLLOWED]
    await index.close()
    await store.close()
    await other.close()
