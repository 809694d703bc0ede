"""What many watches and a long history cost: everything is read and rendered once, and nothing stays behind."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import wire
from orchestrator.api import lists, watching
from orchestrator.api.watching import Feed
from orchestrator.core import handover
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.ids import HostRef
from orchestrator.core.records import EvacuationSpec, GuestSpec, MigrationPhase, MigrationSpec, MigrationState
from orchestrator.ledger import active, paths
from orchestrator.ledger.ledger import op_create
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Done, SetData, Versioned
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2
from tests.fakes.api import ApiCluster, api_cluster, until
from tests.fakes.coordination import MemoryStore, World

R = RefusalReason
pytestmark = pytest.mark.timeout(60)


class Counting(MemoryStore):
    """Counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    async def read(self, path: str, timeout_s: float = 2.0) -> Versioned | None:
        self.reads.append(path)
        return await super().read(path, timeout_s)

    async def children(self, path: str, timeout_s: float = 2.0) -> tuple[str, ...]:
        self.reads.append(path)
        return await super().children(path, timeout_s)


@pytest.fixture
def store() -> Counting:
    return Counting()


@pytest.fixture
def world(store: Counting) -> World:
    return World(store)


@pytest.fixture
async def api(store: Counting, tmp_path: Path) -> AsyncIterator[ApiCluster]:
    async with api_cluster(store, tmp_path) as cluster:
        await cluster.call(cluster.client.create_guest, GuestSpec("web"), "h1")
        yield cluster


def feed_of(api: ApiCluster) -> Feed[Any, types_pb2.Migration]:
    return api.server.servicer.migration_feed


def _listening(feed: Feed[Any, Any], store: MemoryStore) -> tuple[int, int, int]:
    return len(store.tree.watches), len(store.tree.nodes.trees), len(feed._fleet._listeners)


async def seed(store: MemoryStore, number: int, phase: MigrationPhase, guest: str = "g") -> str:
    """A migration as the ledger keeps it."""
    name = f"{number:012x}"[::-1]
    await store.ensure(paths.shard(paths.migration(name)))
    spec = MigrationSpec(name, guest, f"n-{guest}", create_time_s=1_000_000.0 - number)
    ops = [op_create(paths.migration(name), spec), op_create(paths.migration_state(name), MigrationState(phase))]
    if not phase.terminal:
        ops.append(active.migration_begins(spec))
    assert isinstance(await store.multi(ops), Done)
    return name


async def collect(stream: AsyncGenerator[types_pb2.Migration], into: list[types_pb2.Migration]) -> None:
    async with aclosing(stream):
        async for message in stream:
            into.append(message)


async def test_a_new_migration_is_read_and_rendered_once_for_all_streams(api: ApiCluster, store: Counting) -> None:
    for number in range(300):
        await seed(store, number, MigrationPhase.SUCCEEDED)
    feed = feed_of(api)
    told: list[list[types_pb2.Migration]] = [[] for _ in range(100)]
    tasks = [asyncio.create_task(collect(feed.stream(()), into)) for into in told]
    await until(lambda: feed._stands and not (feed._around or feed._moved or feed._backlog), 20)
    quiet = -1
    while quiet != len(store.reads):  # until the first look is over
        quiet = len(store.reads)
        await asyncio.sleep(0.5)
    store.reads.clear()
    name = (await api.call(api.client.create_migration, "web")).name
    await until(lambda: all(told))
    assert {each[0].name for each in told} == {name}
    assert all(each[0] is told[0][0] for each in told), "each stream has a message of its own"
    listed = [path for path in store.reads if path.startswith(paths.MIGRATIONS) and path.count("/") <= 2]
    assert listed == [], "a new migration makes nobody list the shards again"
    assert len(store.reads) < 60, "the reads grow with the number of streams"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_streams_that_come_and_go_leave_nothing(api: ApiCluster, store: Counting) -> None:
    name = (await api.call(api.client.create_migration, "web")).name
    feed = feed_of(api)
    before = _listening(feed, store)
    for _ in range(200):
        for names in ((), (name,)):
            stream = feed.stream(names)
            assert (await anext(stream)).name == name
            await stream.aclose()
    assert not feed._readers
    assert not feed._entries
    assert not feed._order
    assert not feed._wanted
    assert not feed._by_key
    assert not feed._by_path
    assert not feed._done
    assert not feed._moved
    assert not feed._backlog
    assert _listening(feed, store) == before


async def test_what_moves_while_a_resource_is_read_for_the_first_time_is_not_missed(
    api: ApiCluster, world: World, store: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the guest's record is part of a migration is known only once the migration has been read."""
    made = await api.call(api.client.create_migration, "web")
    record = world.record(made.guest_uuid)
    read_again = asyncio.Event()

    async def read(path: str, timeout_s: float = 2.0) -> Versioned | None:
        found = await Counting.read(store, path, timeout_s)
        if path == paths.attempts(made.name) and not read_again.is_set():
            read_again.set()
            opened = handover.open_attempt(record, made.name, 1, HostRef("h2", "b"), epoch=0, writer="c")
            await _write(store, paths.guest(made.guest_uuid), encode(opened))
        return found

    feed = feed_of(api)
    assert await feed._source.read(made.name) is not None
    stream = feed.stream([made.name])
    async with asyncio.timeout(10), aclosing(stream):
        feed._is_missing = lambda _name: asyncio.sleep(0, False)  # type: ignore[method-assign]
        monkeypatch.setattr(store, "read", read)
        phases = [wire.word(await anext(stream), "phase")]
        assert read_again.is_set()
        while phases[-1] != "PREPARING":
            phases.append(wire.word(await anext(stream), "phase"))


async def test_everything_that_is_watched_is_read_again_after_a_gap_and_nothing_else(
    api: ApiCluster, world: World, store: Counting
) -> None:
    name = (await api.call(api.client.create_migration, "web")).name
    feed = feed_of(api)
    stream = feed.stream(())
    async with asyncio.timeout(10), aclosing(stream):
        assert (await anext(stream)).name == name
        trees = list(store.tree.nodes.trees)
        store.tree.nodes.trees.clear()  # nothing is announced
        world.edit_state(name, lambda state: replace(state, message="moved in the gap"))
        new = await seed(store, 9, MigrationPhase.PENDING)
        store.tree.nodes.trees.extend(trees)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        store.reads.clear()
        feed._announced(None)
        told = {each.name: each.message for each in (await waiting, await anext(stream))}
        assert told == {name: "moved in the gap", new: ""}
        assert len(store.reads) < 20


async def test_what_is_over_is_told_to_those_who_saw_it_and_then_forgotten(
    api: ApiCluster, world: World, store: Counting
) -> None:
    name = (await api.call(api.client.create_migration, "web")).name
    feed = feed_of(api)
    slow, quick = feed.stream(()), feed.stream(())
    assert [(await anext(each)).name for each in (slow, quick)] == [name, name]
    await api.call(api.client.cancel_migration, name)
    assert (await anext(quick)).phase == types_pb2.MIGRATION_PHASE_CANCELLED
    late = feed.stream(())
    waiting = asyncio.ensure_future(anext(late))
    assert name in feed._entries
    assert (await anext(slow)).phase == types_pb2.MIGRATION_PHASE_CANCELLED
    nexts = [asyncio.ensure_future(anext(each)) for each in (slow, quick)]
    await asyncio.sleep(0.3)
    other = await seed(store, 77, MigrationPhase.PENDING)
    assert {each.name for each in await asyncio.gather(waiting, *nexts)} == {other}, "and not to those who came later"
    await until(lambda: list(feed._entries) == [other])
    for each in (slow, quick, late):
        await each.aclose()


async def test_a_reader_is_never_told_the_same_twice_while_others_move(api: ApiCluster, store: Counting) -> None:
    names = [await seed(store, number, MigrationPhase.PENDING) for number in range(20)]
    feed = feed_of(api)
    stream = feed.stream(())
    first = await anext(stream)
    path = paths.migration_state(names[-1])
    for attempt in (1, 2):
        node = store.tree.nodes[path]
        write = SetData(path, b'{"phase":"PENDING","attempt":%d}' % attempt, node.version)
        assert isinstance(await store.multi([write]), Done)
    await asyncio.sleep(0.4)
    told = [first, *[await anext(stream) for _ in range(19)]]
    assert {each.name for each in told} == set(names)
    assert next(each for each in told if each.name == names[-1]).attempt == 2
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.4):
            await anext(stream)
    await stream.aclose()


async def test_watches_are_capped_by_address_and_in_all(api: ApiCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MAX_STREAMS_OF_ONE", 2)
    streams = [api.client.watch_guests() for _ in range(3)]
    for stream in streams[:2]:
        assert (await api.call(next, stream)).name == "web"
    error = await api.refused(next, streams[2])
    assert error.reason is R.TOO_MANY_WATCHES
    assert "2 watches of yours" in error.message
    streams[0].close()  # type: ignore[attr-defined]
    await until(lambda: api.server.servicer.streams_open == 1)
    assert (await api.call(next, api.client.watch_guests())).name == "web"
    counted = watching.Streams()
    monkeypatch.setattr(watching, "MAX_STREAMS", 5)
    with ExitStack() as stack:
        for number in range(5):
            stack.enter_context(counted.one(f"ipv4:10.0.0.{number}:1"))
        with pytest.raises(DroverError, match="5 in all"):
            stack.enter_context(counted.one("ipv4:10.0.0.9:1"))
    assert counted.total == 0


# --- a long history ---------------------------------------------------------------------------------------------------


async def test_active_lists_no_migration_that_is_over_however_long_the_history(
    api: ApiCluster, store: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than are remembered as they are listed; and a list reads little of what does not change."""
    monkeypatch.setattr(lists, "_REMEMBERED", 100)
    names = [await seed(store, number, MigrationPhase.SUCCEEDED) for number in range(400)]
    active = [await seed(store, 1_000 + number, MigrationPhase.PENDING, "h") for number in range(3)]
    listed = await api.call(api.client.list_migrations, active_only=True)
    assert [each.name for each in listed] == active[::-1]
    await api.call(api.client.list_migrations)
    store.reads.clear()
    everything = await api.call(api.client.list_migrations, limit=1_000)
    assert [each.name for each in everything] == [*active[::-1], *names[::-1]], "newest first, page by page"
    store.reads.clear()
    await api.call(api.client.list_migrations, limit=50)
    await api.call(api.client.list_migrations, limit=50)
    assert len(store.reads) < 2 * 60 + 5 * 50, "a list reads nothing but its page"
    assert [each.guest for each in await api.call(api.client.list_migrations, limit=5)][:3] == ["n-h"] * 3


async def test_what_cannot_be_read_hides_nothing_and_is_named(api: ApiCluster, store: Counting) -> None:
    good = await seed(store, 1, MigrationPhase.SUCCEEDED)
    for number, path in ((2, paths.migration), (3, paths.migration_state)):
        bad = await seed(store, number, MigrationPhase.PENDING)
        node = store.tree.nodes[path(bad)]
        store.tree.nodes[path(bad)] = replace(node, data=b'{"phase": 7}')
    left: list[pb.Unreadable] = []
    listed = await api.call(lambda: api.client.list_migrations(unreadable=left))
    assert [each.name for each in listed] == [good]
    nodes = [paths.migration(left[0].name), paths.migration_state(left[1].name)]
    assert [each.reason.partition(":")[0] for each in left] == nodes
    job = (await api.call(api.client.create_evacuation, "h1")).evacuation.name
    await store.ensure(paths.shard(paths.evacuation("old-1")))
    store.tree.nodes[paths.evacuation("old-1")] = Versioned(b"{}", 0, 1)
    store.tree.nodes[paths.evacuation_state("old-1")] = Versioned(b'{"phase": 7}', 0, 1)
    left.clear()
    found = await api.call(lambda: api.client.list_evacuations(unreadable=left))
    assert [each.name for each in found] == [job]
    assert [(each.name, paths.evacuation("old-1") in each.reason) for each in left] == [("old-1", True)]


async def test_an_evacuation_of_a_newer_version_is_listed_shown_watched_and_cancelled(
    api: ApiCluster, store: Counting
) -> None:
    """One field of its policy that this version does not know hid all evacuations, and it could not be cancelled."""
    job = (await api.call(api.client.create_evacuation, "h1")).evacuation.name
    known = (await api.call(api.client.create_evacuation, "h2")).evacuation.name
    path = paths.evacuation(job)
    spec = decode(EvacuationSpec, store.tree.nodes[path].data)
    newer = replace(spec, policy={"max_attempts": 3, "teleport": True, "on_timeout": "shrug"})
    store.tree.nodes[path] = replace(store.tree.nodes[path], data=encode(newer))
    left: list[pb.Unreadable] = []
    assert [each.name for each in await api.call(lambda: api.client.list_evacuations(unreadable=left))] == [known, job]
    assert not left
    shown = await api.call(api.client.get_evacuation, job)
    assert (shown.policy.max_attempts, shown.policy.HasField("ack_timeout_ms")) == (3, False)
    assert shown.message == "set by a newer version, not shown here: on_timeout, teleport"
    async with asyncio.timeout(10), aclosing(api.server.servicer.evacuation_feed.stream([job])) as seen:
        assert (await anext(seen)).name == job
    assert (await api.call(api.client.cancel_evacuation, job)).cancel_requested


async def _write(store: Counting, path: str, content: bytes) -> None:
    written = await store.multi([SetData(path, content, store.tree.nodes[path].version)])
    assert isinstance(written, Done)


async def test_a_record_that_does_not_fit_into_an_answer_is_that_resources_trouble(
    api: ApiCluster, store: Counting
) -> None:
    """Whatever is wrong with it: the others are listed, and watched."""
    odd = await api.call(api.client.create_guest, GuestSpec("odd"), "h2")
    for path, content in (
        (paths.guest_spec(odd.uuid), encode(GuestSpec("odd", memory_mib=1 << 40))),
        (paths.want_run(odd.uuid), b'{"run": "perhaps"}'),
        (paths.guest(odd.uuid), b'{"phase": "FLOATING"}'),
    ):
        before = store.tree.nodes[path]
        await _write(store, path, content)
        for host, others in (("", ["web"]), ("h1", ["web"]), ("h2", [])):
            left: list[pb.Unreadable] = []
            guests = await api.call(functools.partial(api.client.list_guests, host, unreadable=left))
            assert [each.name for each in guests] == others
            assert [each.name for each in left] == (
                [] if host == "h1" and path == paths.guest_spec(odd.uuid) else [odd.uuid]
            )
        async with asyncio.timeout(10), aclosing(api.server.servicer.guest_feed.stream([])) as seen:
            assert (await anext(seen)).name == "web"
        await _write(store, path, before.data)
    path = paths.cordon("h3")
    await _write(store, path, b"{")
    left = []
    hosts = await api.call(lambda: api.client.list_hosts(unreadable=left))
    assert [each.name for each in hosts] == ["h1", "h2"]
    assert [(each.name, path in each.reason) for each in left] == [("h3", True)]


async def test_lists_are_in_the_ledgers_order_whatever_the_clocks_say(api: ApiCluster, store: Counting) -> None:
    """One API is eight days ahead, then right again."""
    names: list[str] = []
    jobs: list[str] = []
    for ahead_s in (8 * 86_400.0, 0.0, -3_600.0):
        api.server.tools.wall_s = lambda ahead_s=ahead_s: 1_700_000_000.0 + ahead_s
        names.append((await api.call(api.client.create_migration, "web")).name)
        await api.call(api.client.cancel_migration, names[-1])
        jobs.append((await api.call(api.client.create_evacuation, "h2")).evacuation.name)
        path = paths.evacuation_state(jobs[-1])
        over = SetData(path, b'{"phase":"SUCCEEDED"}', store.tree.nodes[path].version)
        assert isinstance(await store.multi([over]), Done)
    assert [each.name for each in await api.call(api.client.list_migrations)] == names[::-1]
    assert [each.name for each in await api.call(api.client.list_evacuations)] == jobs[::-1]
