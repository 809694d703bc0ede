"""The contract of the coordination store: the memory store and the real ZooKeeper pass the same cases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from kazoo.client import KazooClient

from orchestrator.ledger.store import (
    Check,
    Conflict,
    ConflictKind,
    Create,
    Delete,
    Done,
    OutcomeUnknown,
    SessionState,
    SetData,
    Store,
    StoreUnavailable,
    Versioned,
)
from orchestrator.ledger.zookeeper import ZooKeeperStore
from tests.fakes.zookeeper import ZooKeeperServer

Connect = Callable[[], Store]


@pytest.fixture
async def store(connect: Connect) -> AsyncIterator[Store]:
    opened = connect()
    await opened.start()
    await opened.ensure("/a")
    yield opened
    await opened.close()


async def done(store: Store, *ops: Create | SetData | Check | Delete) -> Done:
    result = await store.multi(ops)
    assert isinstance(result, Done), result
    return result


async def test_create_read_set(store: Store) -> None:
    first = await done(store, Create("/a/x", b"1"))
    assert first.versions == (0,)
    second = await done(store, SetData("/a/x", b"2", 0))
    assert second.versions == (1,)
    assert second.zxid > first.zxid
    assert await store.read("/a/x") == Versioned(b"2", 1, second.zxid)
    assert await store.read("/a/none") is None


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (SetData("/a/x", b"", 7), ConflictKind.BAD_VERSION),
        (Check("/a/x", 7), ConflictKind.BAD_VERSION),
        (Delete("/a/x", 7), ConflictKind.BAD_VERSION),
        (Create("/a/x", b""), ConflictKind.EXISTS),
        (SetData("/a/none", b"", 0), ConflictKind.MISSING),
        (Create("/a/none/y", b""), ConflictKind.MISSING),
    ],
    ids=str,
)
async def test_a_conflict_applies_nothing_and_says_which(
    store: Store, bad: Create | SetData | Check | Delete, kind: ConflictKind
) -> None:
    await done(store, Create("/a/x", b"1"))
    assert await store.multi([Create("/a/y", b""), bad, Create("/a/z", b"")]) == Conflict(1, kind)
    assert await store.children("/a") == ("x",)
    assert await store.read("/a/x") is not None


async def test_a_node_may_be_made_and_taken_away_in_one_transaction(store: Store) -> None:
    """That is how the absence of a node is tested: it conflicts when the node is there."""
    await done(store, Create("/a/x", b""), Delete("/a/x", 0), Create("/a/y", b""))
    assert await store.children("/a") == ("y",)
    assert await store.multi([Create("/a/y", b""), Delete("/a/y", 0)]) == Conflict(0, ConflictKind.EXISTS)
    assert await store.children("/a") == ("y",)


async def test_check_delete_and_children(store: Store) -> None:
    await done(store, Create("/a/x", b""), Create("/a/b", b""))
    assert await store.children("/a") == ("b", "x")
    assert (await done(store, Check("/a/b", 0), Delete("/a/x", 0))).versions == (-1, -1)
    assert await store.children("/a") == ("b",)
    assert await store.children("/none") == ()


async def test_a_node_is_deleted_after_its_children(store: Store) -> None:
    await done(store, Create("/a/x", b""), Create("/a/x/y", b""))
    assert await store.multi([Delete("/a/x", 0)]) == Conflict(0, ConflictKind.NOT_EMPTY)
    await done(store, Delete("/a/x/y", 0), Delete("/a/x", 0))
    assert await store.children("/a") == ()


async def test_ensure_is_idempotent_and_keeps_content(store: Store) -> None:
    await store.ensure("/p/q/r")
    await done(store, SetData("/p/q", b"kept", 0))
    await store.ensure("/p/q/r")
    node = await store.read("/p/q")
    assert node is not None
    assert node.data == b"kept"


async def test_a_barrier_proves_a_quorum(store: Store) -> None:
    await store.barrier()
    assert store.quorum_age_s < 5
    assert store.session is SessionState.CONNECTED


async def test_ephemeral_nodes_go_with_their_session(connect: Connect, store: Store) -> None:
    other = connect()
    await other.start()
    await done(other, Create("/a/live", b"", ephemeral=True))
    assert await store.read("/a/live") is not None
    await other.close()
    async with asyncio.timeout(20):
        while await store.read("/a/live") is not None:  # noqa: ASYNC110 - another process removes it
            await asyncio.sleep(0.05)


async def wait_for(ready: Callable[[], bool], timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while not ready():  # noqa: ASYNC110 - set from the store's callbacks
            await asyncio.sleep(0.01)


async def test_a_watch_tells_now_and_every_newest_content(connect: Connect, store: Store) -> None:
    seen: list[bytes | None] = []
    end = store.watch("/a/w", lambda node: seen.append(node.data if node else None))
    await wait_for(lambda: seen == [None])
    await done(store, Create("/a/w", b"1"))
    await wait_for(lambda: seen[-1] == b"1")
    other = connect()
    await other.start()
    await done(other, SetData("/a/w", b"2", 0))
    await wait_for(lambda: seen[-1] == b"2")
    await done(other, Delete("/a/w", 1))
    await wait_for(lambda: seen[-1] is None)
    end()
    await done(other, Create("/a/w", b"3"))
    await asyncio.sleep(0.2)
    assert seen[-1] is None
    await other.close()


async def test_a_callback_that_fails_ends_no_watch(connect: Connect, store: Store) -> None:
    """What it cannot read today may be mended tomorrow."""
    await done(store, Create("/a/w", b"bad"))
    seen: list[bytes] = []

    def callback(node: Versioned | None) -> None:
        assert node is not None
        if node.data == b"bad":
            raise ValueError("bad")
        seen.append(node.data)

    end = store.watch("/a/w", callback)
    await asyncio.sleep(0.2)
    await done(store, SetData("/a/w", b"good", 0))
    async with asyncio.timeout(20):
        while not seen:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert seen == [b"good"]
    end()


async def test_children_are_watched(store: Store) -> None:
    seen: list[tuple[str, ...]] = []
    store.watch_children("/a", seen.append)
    await wait_for(lambda: bool(seen) and seen[-1] == ())
    await done(store, Create("/a/x", b""))
    await done(store, Create("/a/y", b""))
    await wait_for(lambda: seen[-1] == ("x", "y"))


async def test_a_tree_is_watched_with_all_that_is_below(connect: Connect, store: Store) -> None:
    """Also what did not exist, however deep, again and again, by whomever."""
    seen: list[str | None] = []
    end = store.watch_tree(["/a", "/c"], seen.append)
    await wait_for(lambda: seen == [None])
    other = connect()
    await other.start()
    await other.ensure("/c")
    await wait_for(lambda: seen[1:] == ["/c"])
    seen.pop()
    await done(other, Create("/a/x", b"1"), Create("/a/x/y", b""))
    await done(store, SetData("/a/x", b"2", 0))
    await done(other, SetData("/a/x", b"3", 1), Delete("/a/x/y", 0))
    await other.ensure("/ab")
    await done(other, SetData("/a", b"", 0))
    await done(other, Create("/c/x", b""))
    await wait_for(lambda: seen == [None, "/a/x", "/a/x/y", "/a/x", "/a/x", "/a/x/y", "/a", "/c/x"])
    end()
    await done(other, Delete("/a/x", 2))
    await asyncio.sleep(0.2)
    assert seen[-1] == "/c/x"
    await other.close()


async def test_what_moved_is_announced_before_any_answer_that_shows_it(connect: Connect, store: Store) -> None:
    """A view may trust: what it was not told of has not moved before what it has just read."""
    seen: list[str | None] = []
    store.watch_tree(["/a"], seen.append)
    await wait_for(lambda: seen == [None])
    other = connect()
    await other.start()
    await done(other, Create("/a/x", b"0"), Create("/a/y", b"0"))
    for turn in range(100):
        writing = asyncio.ensure_future(other.multi([SetData("/a/x", b"", turn), SetData("/a/y", b"", turn)]))
        while True:
            node = await store.read("/a/y")
            told = seen.count("/a/x") - 1
            if node is not None and node.version == turn + 1:
                break
        assert told == turn + 1
        assert isinstance(await writing, Done)
    before = seen.count("/a/x")
    await done(store, SetData("/a/x", b"", 100))
    assert seen.count("/a/x") == before + 1, "its own writes too"
    await other.close()


async def test_a_conflict_is_as_good_as_a_barrier(connect: Connect, store: Store) -> None:
    """Who loses a race knows by that answer what made it lose, and needs no write to be sure."""
    other, seen = connect(), list[str | None]()
    await other.start()
    await done(other, Create("/a/x", b""), Create("/a/y", b""))
    store.watch_tree(["/a"], seen.append)
    await wait_for(lambda: bool(seen))
    for turn in range(50):
        told = seen.count("/a/y")
        await done(other, SetData("/a/x", b"", turn), SetData("/a/y", b"", turn))
        assert await store.multi([SetData("/a/x", b"", turn)]) == Conflict(0, ConflictKind.BAD_VERSION)
        assert seen.count("/a/y") == told + 1
        node = await store.read("/a/y")
        assert node is not None
        assert node.version == turn + 1
    await other.close()


@pytest.mark.zookeeper
async def test_a_tree_is_told_as_a_whole_after_each_reconnect(server: ZooKeeperServer) -> None:
    store = ZooKeeperStore(server.hosts, chroot="/trees", session_timeout_s=4)
    await store.start()
    await store.ensure("/a")
    seen: list[str | None] = []
    store.watch_tree(["/a"], seen.append)
    await wait_for(lambda: seen == [None])
    store._cut()
    await wait_for(lambda: seen == [None, None], 20)
    await done(store, Create("/a/x", b""))
    await wait_for(lambda: seen[2:] == ["/a/x"])
    states: list[SessionState] = []
    store.on_session(states.append)
    await asyncio.to_thread(end_session, server.hosts, *store._client.client_id)
    await wait_for(lambda: seen[3:] == [None], 20)
    await done(store, Create("/a/y", b""))
    await wait_for(lambda: seen[4:] == ["/a/y"])
    await store.close()


@pytest.mark.zookeeper
async def test_a_burst_of_reads_does_not_cut_the_connection_that_it_waits_for(server: ZooKeeperServer) -> None:
    store = ZooKeeperStore(server.hosts, chroot="/burst", session_timeout_s=4)
    await store.start()
    await store.ensure("/a")
    states: list[SessionState] = []
    store.on_session(states.append)
    await done(store, *(Create(f"/a/{n}", b"x" * 1000) for n in range(200)))
    answers = await asyncio.gather(*(store.read(f"/a/{n % 200}") for n in range(8_000)))
    assert not states, "it stayed connected"
    assert all(isinstance(one, Versioned) for one in answers)
    writes = await asyncio.gather(*(store.multi([]) for _ in range(2_000)))
    assert not states
    assert all(isinstance(one, Done) or (isinstance(one, OutcomeUnknown) and not one.sent) for one in writes)
    await store.close()


@pytest.mark.zookeeper
async def test_while_the_server_is_down_nothing_is_queued_and_watches_come_back(server: ZooKeeperServer) -> None:
    store = ZooKeeperStore(server.hosts, chroot="/down", session_timeout_s=4)
    await store.start()
    await store.ensure("/a")
    await done(store, Create("/a/x", b"1"))
    states: list[SessionState] = []
    seen: list[bytes] = []
    store.on_session(states.append)
    store.watch("/a/x", lambda node: seen.append(node.data if node else b""))
    await wait_for(lambda: seen == [b"1"])
    server.kill()
    try:
        await wait_for(lambda: store.session is not SessionState.CONNECTED)
        result = await store.multi([SetData("/a/x", b"lost", 0)])
        assert isinstance(result, OutcomeUnknown)
        assert not result.sent
        with pytest.raises(StoreUnavailable):
            await store.read("/a/x")
        with pytest.raises(StoreUnavailable):
            await store.barrier()
    finally:
        server.start()
    await wait_for(lambda: store.session is SessionState.CONNECTED, 20)
    await wait_for(lambda: states[-1] is SessionState.CONNECTED)
    node = await store.read("/a/x")
    assert node is not None
    assert node.data == b"1", "a write that was refused while disconnected must never arrive"
    await done(store, SetData("/a/x", b"2", 0))
    await wait_for(lambda: seen[-1] == b"2")
    await store.close()


async def test_the_first_write_of_a_new_session_is_as_good_as_any(server: ZooKeeperServer) -> None:
    """The server ends the session; what belonged to it is made again before it is missed."""
    store = ZooKeeperStore(server.hosts, chroot="/expired", session_timeout_s=4)
    await store.start()
    await done(store, Create("/n", b"1"))
    states: list[SessionState] = []
    store.on_session(states.append)
    await asyncio.to_thread(end_session, server.hosts, *store._client.client_id)
    async with asyncio.timeout(10):
        while states[-1:] != [SessionState.CONNECTED]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert SessionState.LOST in states
    await done(store, SetData("/n", b"2", 0))
    await store.close()


@pytest.mark.parametrize("look", ["read", "children", "watch"])
async def test_the_first_look_of_a_new_session_stands_behind_a_write_of_it(server: ZooKeeperServer, look: str) -> None:
    """H13: it may be with a server that is behind the one before."""
    store = ZooKeeperStore(server.hosts, chroot="/first", session_timeout_s=4)
    await store.start()
    await store.ensure("/n")
    for _ in range(2):
        match look:
            case "read":
                await store.read("/n")
            case "children":
                await store.children("/n")
            case _:
                seen: list[object] = []
                store.watch("/n", seen.append)
                await wait_for(lambda seen=seen: bool(seen))
        path = f"/first{store._barrier_path}"
        session = store._client.client_id[0]
        assert await asyncio.to_thread(owner_of, server.hosts, path) == session
        await asyncio.to_thread(end_session, server.hosts, *store._client.client_id)
        await wait_for(lambda before=session: store._client.client_id and store._client.client_id[0] != before, 20)
        await wait_for(lambda: store.session is SessionState.CONNECTED, 20)
    await store.close()


def owner_of(hosts: str, path: str) -> int:
    """The session that an ephemeral node goes with."""
    client = KazooClient(hosts=hosts)
    client.start(timeout=5)
    try:
        found = client.exists(path)
        return found.ephemeralOwner if found is not None else 0
    finally:
        client.stop()
        client.close()


def end_session(hosts: str, session: int, password: bytes) -> None:
    """Somebody else takes the session over and closes it, which is how it ends at the server."""
    twin = KazooClient(hosts=hosts, client_id=(session, password))
    twin.start(timeout=5)
    twin.stop()
    twin.close()


async def test_no_server_is_said_within_the_bound() -> None:
    store = ZooKeeperStore("127.0.0.1:1", session_timeout_s=4)
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
        await store.start(timeout_s=1)
