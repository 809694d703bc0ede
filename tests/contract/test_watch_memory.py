"""Watches on a real ZooKeeper leave nothing behind in the client, however often their nodes are read and however many
come and go."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from orchestrator.ledger import zookeeper
from orchestrator.ledger.store import Create, Done, SetData, StoreUnavailable
from orchestrator.ledger.zookeeper import ZooKeeperStore
from tests.fakes.api import until
from tests.fakes.zookeeper import ZooKeeperServer, missing

pytestmark = [pytest.mark.zookeeper]


DISARM_S = 0.3


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ZooKeeperServer]:
    if missing():
        pytest.skip(missing())
    server = ZooKeeperServer(tmp_path / "zk")
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def store(server: ZooKeeperServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ZooKeeperStore]:
    monkeypatch.setattr(zookeeper, "REREAD_S", 0.01)
    monkeypatch.setattr(zookeeper, "_DISARM_S", DISARM_S)
    opened = ZooKeeperStore(server.hosts, session_timeout_s=4)
    await opened.start()
    await opened.ensure("/a/b")
    yield opened
    await opened.close()


def armed(store: ZooKeeperStore) -> dict[str, int]:
    """Callbacks that kazoo keeps, by node."""
    client = store._client
    sets = (*client._data_watchers.items(), *client._child_watchers.items())
    return {f"{index} {path}": len(callbacks) for index, (path, callbacks) in enumerate(sets)}


async def test_a_node_that_never_moves_keeps_one_callback(store: ZooKeeperStore) -> None:
    looks = 0

    async def counted(*_: object) -> None:
        nonlocal looks
        looks += 1
        return await real(*_)  # type: ignore[arg-type]

    real = store._look
    store._look = counted  # type: ignore[method-assign,assignment]
    ends = [store.watch("/a", lambda _: None) for _ in range(3)]
    ends += [store.watch_children("/a", lambda _: None) for _ in range(3)]
    ends += [store.watch("/missing", lambda _: None), store.watch_children("/missing", lambda _: None)]
    await until(lambda: looks > 500, 40)
    assert sorted(armed(store).values()) == [1, 1, 2], "one per node and kind of watch"
    for end in ends:
        end()
    await until(lambda: not armed(store))
    assert not store._triggers


async def test_watches_that_come_and_go_leave_nothing_and_those_that_stay_are_told(store: ZooKeeperStore) -> None:
    seen: list[bytes] = []
    stay = store.watch("/a", lambda node: seen.append(node.data if node else b"?"))
    for _ in range(10):
        ends = [store.watch(f"/a/{n % 20}", lambda _: None) for n in range(50)]
        ends += [store.watch("/a", lambda _: None) for _ in range(20)]
        await asyncio.sleep(0.02)  # some have not had their first answer when they end
        for end in ends:
            end()
            end()
    await until(lambda: len(armed(store)) == 1)
    node = await store.read("/a")
    assert node is not None
    assert isinstance(await store.multi([SetData("/a", b"new", node.version), Create("/a/c", b"")]), Done)
    await until(lambda: seen[-1:] == [b"new"])
    stay()
    await until(lambda: not armed(store))


async def test_an_answer_that_comes_long_after_the_end_of_its_watch_leaves_nothing(
    server: ZooKeeperServer, store: ZooKeeperStore
) -> None:
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    ends = [store.watch("/a", lambda _: None), store.watch_children("/missing", lambda _: None)]
    await asyncio.sleep(0.05)  # they ask, and the server stands still
    for end in ends:
        end()
    await asyncio.sleep(2 * DISARM_S)
    server.process.send_signal(signal.SIGCONT)
    for _ in range(3):  # what is answered is answered in turn: theirs have come by then
        await store.read("/a", 20)
    await until(lambda: not armed(store) and not store._triggers)


async def test_ten_thousand_reads_at_once_do_not_cut_the_session(store: ZooKeeperStore) -> None:
    lost: list[object] = []
    store.on_session(lost.append)
    found = await asyncio.gather(*(store.read("/a") for _ in range(10_000)), return_exceptions=True)
    assert not [each for each in found if isinstance(each, StoreUnavailable)]
    assert not lost


async def test_all_who_watch_a_node_see_a_change_by_one_read(
    store: ZooKeeperStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zookeeper, "REREAD_S", 1_000.0)
    real, reads = store._client.get_async, list[str]()

    def counted(path: str, watch: object = None) -> object:
        reads.append(path)
        return real(path, watch=watch)

    store._client.get_async = counted
    seen: list[list[bytes]] = [[] for _ in range(5)]
    ends = [store.watch("/a", lambda node, told=told: told.append(node.data if node else b"")) for told in seen]
    await until(lambda: all(len(told) == 1 for told in seen), 10)
    assert len(reads) == 1
    for number in range(1, 20):
        assert isinstance(await store.multi([SetData("/a", b"%d" % number, number - 1)]), Done)
        await until(lambda number=number: all(told[-1] == b"%d" % number for told in seen), 10)
    assert len(reads) <= 20, "one read for each change"
    for end in ends:
        end()
