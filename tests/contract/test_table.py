"""Rows of lists, on the memory store and on the real ZooKeeper."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest

from orchestrator.ledger import table as table_module
from orchestrator.ledger.store import Create, Delete, Done, Op, SetData, Store, StoreUnavailable
from orchestrator.ledger.table import Table
from orchestrator.ledger.zookeeper import ZooKeeperStore
from tests.fakes.coordination import MemoryStore
from tests.fakes.zookeeper import ZooKeeperServer

Connect = Callable[[], Store]


@pytest.fixture
async def store(connect: Connect) -> AsyncIterator[Store]:
    opened = connect()
    await opened.start()
    await opened.ensure("/r")
    yield opened
    await opened.close()


@dataclass(frozen=True)
class Word:
    text: str

    @property
    def over(self) -> bool:
        return self.text == "over"


async def done(store: Store, *ops: Op) -> None:
    result = await store.multi(ops)
    assert isinstance(result, Done), result


def words(store: Store, *, first: Callable[[], object] | None = None) -> Table[Word]:
    async def read(name: str) -> Word | None:
        node = await store.read(f"/r/{name}")
        return None if node is None else Word(node.data.decode())

    async def names() -> tuple[str, ...]:
        return await store.children("/r")

    return Table(store, "/r", names=names, first=first, name_of=lambda path: path[3:], read=read)  # type: ignore[arg-type]


async def told(table: Table[Word]) -> dict[str, str]:
    return {name: row.text for name, row in (await table.rows()).items()}


async def test_rows_come_change_and_go(connect: Connect, store: Store) -> None:
    other = connect()
    await other.start()
    await done(other, Create("/r/a", b"1"), Create("/r/b", b"over"))
    table = words(store)
    assert await told(table) == {"a": "1", "b": "over"}
    assert table.complete
    news: list[str] = []
    table.listen(news.append)
    await done(store, SetData("/r/a", b"2", 0), Create("/r/c", b"3"))
    assert await told(table) == {"a": "2", "b": "over", "c": "3"}, "its own writes at once"
    assert sorted(news) == ["a", "c"]
    await done(other, Delete("/r/b", 0))
    await store.barrier()
    assert await told(table) == {"a": "2", "c": "3"}
    reads = table.reads
    for _ in range(50):
        await table.rows()
    assert table.reads == reads
    await table.close()
    await other.close()


async def test_what_moves_is_told_before_all_that_ever_was_is_known(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "_FEW", 10)
    monkeypatch.setattr(table_module, "_SLICE", 5)
    await done(store, *(Create(f"/r/{n:03}", b"over") for n in range(200)))
    await done(store, Create("/r/hot", b"1"))

    async def first() -> list[str]:
        return ["hot", "gone meanwhile"]

    table = words(store, first=first)
    seen = await told(table)
    assert seen["hot"] == "1"
    assert len(seen) < 100
    assert not table.complete
    await done(store, Create("/r/new", b"2"))
    assert (await told(table))["new"] == "2"
    assert not table.complete
    assert await table.completed()
    assert len(await told(table)) == 202
    assert table.reads <= 204, "each was read once"
    await table.close()


async def test_without_the_ledger_it_says_so(store: Store) -> None:
    table = words(store)
    await table.rows()
    if isinstance(store, MemoryStore):
        store.down = True
        with pytest.raises(StoreUnavailable):
            await table.rows()
        store.down = False
        assert await told(table) == {}
    await table.close()


@pytest.mark.zookeeper
async def test_after_a_reconnect_only_what_may_have_moved_is_read(server: ZooKeeperServer) -> None:
    store = ZooKeeperStore(server.hosts, chroot="/rows", session_timeout_s=4)
    other = ZooKeeperStore(server.hosts, chroot="/rows", session_timeout_s=4)
    await store.start()
    await other.start()
    await store.ensure("/r")
    await done(store, *(Create(f"/r/{n}", b"over") for n in range(50)), Create("/r/hot", b"1"))
    table = words(store)
    assert len(await table.rows()) == 51
    before = table.reads
    store._cut()
    await done(other, SetData("/r/hot", b"2", 0), Delete("/r/3", 0), Create("/r/new", b"over"))
    async with asyncio.timeout(15):
        while True:
            try:
                seen = await told(table)
            except StoreUnavailable:
                seen = {}
            if seen.get("hot") == "2" and "new" in seen and "3" not in seen:
                break
            await asyncio.sleep(0.05)
    assert len(seen) == 51
    assert table.reads - before < 10
    await table.close()
    await store.close()
    await other.close()
