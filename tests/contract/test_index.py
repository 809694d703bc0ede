"""The view of the fleet, on the memory store and on the real ZooKeeper: always what a whole look would find, for the
price of what moved."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.placement import host_views
from orchestrator.core.records import Cordon, GuestSpec, HostRecord, Reservation, WantRun
from orchestrator.ledger import index as index_module
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.ledger import Ledger, op_create, op_set
from orchestrator.ledger.records import encode
from orchestrator.ledger.snapshot import GuestEntry, HostEntry, Reader
from orchestrator.ledger.store import (
    Create,
    Delete,
    Done,
    Op,
    SessionState,
    SetData,
    Store,
    StoreUnavailable,
    Versioned,
)
from orchestrator.ledger.zookeeper import ZooKeeperStore
from tests.fakes.zookeeper import ZooKeeperServer

Connect = Callable[[], Store]
HOSTS = ("h0", "h1", "h2")


@pytest.fixture
async def store(connect: Connect) -> AsyncIterator[Store]:
    opened = connect()
    await opened.start()
    await Ledger(opened).init_tree()
    for name in HOSTS:
        await register(opened, name)
    yield opened
    await opened.close()


@pytest.fixture
async def index(store: Store) -> AsyncIterator[Index]:
    known = Index(store)
    yield known
    await known.close()


async def done(store: Store, *ops: Op) -> None:
    result = await store.multi(ops)
    assert isinstance(result, Done), result


async def register(store: Store, name: str, memory_mib: int = 1024) -> None:
    record = HostRecord(name, f"boot-{name}", f"{name}:1", f"{name}:2", memory_mib, 1000)
    await done(
        store,
        op_create(paths.host(name), record),
        op_create(paths.cordon(name), Cordon()),
        Create(paths.reservations(name), b""),
        Create(paths.live(name), b"", ephemeral=True),
    )


def guest(uuid: str, host: str) -> list[Op]:
    record = GuestRecord(f"n-{uuid}", Ownership.IDLE, HostRef(host, f"boot-{host}"))
    return [
        op_create(paths.guest(uuid), record),
        op_create(paths.guest_spec(uuid), GuestSpec(f"n-{uuid}", 64)),
        op_create(paths.want_run(uuid), WantRun()),
    ]


class Counted:
    """A store that counts what is asked of it; reads can be held back."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.reads = 0
        self.held: dict[str, asyncio.Event] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    async def read(self, path: str, timeout_s: float = 2.0) -> Versioned | None:
        self.reads += 1
        if path in self.held:
            await self.held[path].wait()
        return await self._store.read(path, timeout_s)

    async def children(self, path: str, timeout_s: float = 2.0) -> tuple[str, ...]:
        self.reads += 1
        return await self._store.children(path, timeout_s)


async def whole_look(store: Store) -> tuple[dict[str, HostEntry], dict[str, GuestEntry]]:
    reader, ledger = Reader(store), Ledger(store)
    hosts = {name: await reader.host(name) for name in await ledger.list_hosts()}
    guests = {uuid: await reader.guest(uuid) for uuid in await ledger.list_guests()}
    alive = {uuid: one for uuid, one in guests.items() if one and one.input.record.phase is not Ownership.GONE}
    return {name: one for name, one in hosts.items() if one}, alive


async def same(store: Store, index: Index) -> None:
    """What the index says against a whole look, and against a placement's view computed from scratch."""
    snapshot = await index.snapshot()
    hosts, guests = await whole_look(store)
    assert snapshot.hosts == hosts
    assert snapshot.guests == {uuid: one.input for uuid, one in guests.items()}
    assert dict(await index.guests()) == guests
    expected = host_views([one.input for one in snapshot.hosts.values()], list(snapshot.guests.values()))
    assert sorted(snapshot.views(), key=str) == sorted(expected, key=str)
    for promise in {mig for one in snapshot.hosts.values() for mig in one.input.reservations.memory_mib}:
        expected = host_views(
            [one.input for one in snapshot.hosts.values()], list(snapshot.guests.values()), but=promise
        )
        assert sorted(snapshot.views(but=promise), key=str) == sorted(expected, key=str)


async def test_it_is_what_a_whole_look_finds_whatever_happens(connect: Connect, store: Store, index: Index) -> None:
    """DROVER_SEED=n repeats one."""
    seed = int(os.environ.get("DROVER_SEED", random.randrange(1 << 30)))
    print(f"seed {seed}")
    rng = random.Random(seed)
    other = connect()
    await other.start()
    alive: list[str] = []
    await same(store, index)
    for turn in range(60):
        writer = rng.choice([store, other])
        await _one_change(writer, rng, alive, turn)
        if rng.random() < 0.4:
            await same(store, index)
    await same(store, index)
    assert index.whole_looks == 1, "nothing but what moved was read"
    await other.close()


async def _one_change(store: Store, rng: random.Random, alive: list[str], turn: int) -> None:
    host = rng.choice(HOSTS)
    what = rng.choice(["birth", "birth", "move", "end", "cordon", "promise", "wish", "live", "remove", "junk"])
    if what == "birth" or not alive:
        alive.append(f"{turn:08x}-aaaa-4aaa-8aaa-aaaaaaaaaaaa")
        await store.ensure(paths.guest(alive[-1]).rpartition("/")[0])
        await done(store, *guest(alive[-1], host))
        return
    uuid = rng.choice(alive)
    entry = await Reader(store).guest(uuid)
    assert entry is not None
    record, ref = entry.input.record, HostRef(host, f"boot-{host}")
    match what:
        case "move":
            moved = rng.choice(
                [
                    replace(record, owner=ref),
                    replace(record, phase=Ownership.OPEN, destination=ref, migration="m", attempt=turn),
                    replace(record, phase=Ownership.COMMITTED, source=record.owner, owner=ref, migration="m"),
                ]
            )
            await done(store, op_set(paths.guest(uuid), moved, entry.version))
        case "end":
            alive.remove(uuid)
            await done(store, op_set(paths.guest(uuid), replace(record, phase=Ownership.GONE), entry.version))
        case "remove":
            alive.remove(uuid)
            ops = [Delete(paths.guest_spec(uuid), 0), Delete(paths.want_run(uuid), entry.wish_version)]
            await done(store, *ops, Delete(paths.guest(uuid), entry.version))
        case "junk":
            hidden = await Reader(store).host(host)
            await done(store, SetData(paths.guest(uuid), b"{}", entry.version))
            await done(store, op_set(paths.guest(uuid), record, entry.version + 1))
            assert hidden is not None
        case "wish":
            await done(store, op_set(paths.want_run(uuid), WantRun(sequence=turn), entry.wish_version))
        case "live":
            await _blink(store, host)
        case _:
            known = await Reader(store).host(host)
            assert known is not None
            if what == "cordon":
                await done(store, op_set(paths.cordon(host), Cordon(on=rng.random() < 0.5), known.cordon_version))
            else:
                await _promise(store, host, rng.choice(["m", f"mig{turn}"]), known.reservations_version)


async def _promise(store: Store, host: str, migration: str, version: int) -> None:
    """As drivers do: what takes room moves the version above it, what frees it does not."""
    path = paths.reservation(host, migration)
    node = await store.read(path)
    if node is not None:
        await done(store, Delete(path, node.version))
    else:
        taken = SetData(paths.reservations(host), b"", version)
        await done(store, taken, op_create(path, Reservation(64, {"fast": version})))


async def _blink(store: Store, host: str) -> None:
    node = await store.read(paths.live(host))
    if node is not None:
        await done(store, Delete(paths.live(host), node.version))
    if node is None or hash(host) % 2:
        await done(store, Create(paths.live(host), b"", ephemeral=True))


async def test_a_look_costs_nothing_while_nothing_moves(store: Store) -> None:
    uuid = ""
    for number in range(5):
        uuid = f"{number:08x}-aaaa-4aaa-8aaa-aaaaaaaaaaaa"
        await store.ensure(paths.guest(uuid).rpartition("/")[0])
        await done(store, *guest(uuid, "h1"))
    counted = Counted(store)
    index = Index(counted)  # type: ignore[arg-type]
    before = await index.recent()
    assert len(before.on("h1")) == 5
    counted.reads = 0
    assert all([await index.recent() is before for _ in range(100)])
    await index.snapshot()
    assert counted.reads == 0
    node = await store.read(paths.cordon("h2"))
    assert node is not None
    await done(store, op_set(paths.cordon("h2"), Cordon(on=True), node.version))
    after = await index.snapshot()
    assert after.hosts["h2"].input.cordon.on
    assert not before.hosts["h2"].input.cordon.on, "a snapshot stays what it was"
    assert counted.reads == 1, "the node that moved"
    node = await store.read(paths.want_run(uuid))
    assert node is not None
    counted.reads = 0
    await done(store, op_set(paths.want_run(uuid), WantRun(run=False), node.version))
    assert (await index.guests())[uuid].wish == WantRun(run=False)
    assert counted.reads <= 2, "the record and its wish"
    await index.close()


async def test_memory_that_a_guest_took_is_never_given_away_twice(store: Store) -> None:
    """A reservation is released; the guest that it was for is recorded on the host, but that is not read yet."""
    uuid = "00000001-aaaa-4aaa-8aaa-aaaaaaaaaaaa"
    await store.ensure(paths.guest(uuid).rpartition("/")[0])
    await done(store, *guest(uuid, "h0"), op_create(paths.reservation("h1", "m"), Reservation(64)))
    counted = Counted(store)
    index = Index(counted)  # type: ignore[arg-type]

    def free(name: str) -> int:
        return next(view.free_mib for view in index._view.snapshot().views() if view.ref.host == name)

    await index.recent()
    assert free("h1") == 1024 - 64
    release = counted.held[paths.guest(uuid)] = asyncio.Event()
    entry = await Reader(store).guest(uuid)
    assert entry is not None
    moved = replace(entry.input.record, owner=HostRef("h1", "boot-h1"))
    both = [op_set(paths.guest(uuid), moved, entry.version), Delete(paths.reservation("h1", "m"), 0)]
    await done(store, *both)
    looking = asyncio.ensure_future(index.recent())
    for _ in range(50):
        await asyncio.sleep(0.005)
        assert free("h1") == 1024 - 64
    release.set()
    await looking
    assert free("h1") == 1024 - 64
    assert free("h0") == 1024
    await index.close()


async def test_what_cannot_be_read_keeps_its_room_and_is_named(store: Store, index: Index) -> None:
    uuid = "00000001-aaaa-4aaa-8aaa-aaaaaaaaaaaa"
    await store.ensure(paths.guest(uuid).rpartition("/")[0])
    await done(store, *guest(uuid, "h0"))
    assert not (await index.snapshot()).unreadable
    newer = encode({"phase": "DREAMING", "name": "n", "owner": {"host": "h0", "boot_id": "b"}})
    await done(store, SetData(paths.guest(uuid), newer, 0))
    seen = await index.snapshot()
    assert list(seen.unreadable) == [paths.guest(uuid)]
    assert seen.hosts["h0"].input.reservations.memory_mib == {f"unreadable {uuid}": 64}
    assert {view.ref.host: view.free_mib for view in seen.views()} == {"h0": 960, "h1": 1024, "h2": 1024}
    record = GuestRecord("n", Ownership.IDLE, HostRef("h1", "b"))
    await done(store, op_set(paths.guest(uuid), record, 1))
    seen = await index.snapshot()
    assert not seen.unreadable
    assert {view.ref.host: view.free_mib for view in seen.views()} == {"h0": 1024, "h1": 960, "h2": 1024}
    host = await store.read(paths.host("h2"))
    assert host is not None
    await done(store, SetData(paths.host("h2"), b"?", host.version))
    seen = await index.snapshot()
    assert list(seen.hosts) == ["h0", "h1"]
    assert list(seen.unreadable) == [paths.host("h2")]


@pytest.mark.zookeeper
async def test_after_a_reconnect_it_has_missed_nothing(server: ZooKeeperServer) -> None:
    store = ZooKeeperStore(server.hosts, chroot="/again", session_timeout_s=4)
    other = ZooKeeperStore(server.hosts, chroot="/again", session_timeout_s=4)
    await store.start()
    await other.start()
    await Ledger(store).init_tree()
    for name in HOSTS:
        await register(other, name)
    index = Index(store)
    await same(store, index)
    rng, alive = random.Random(1), list[str]()
    for turn in range(12):
        if turn % 4 == 0:
            store._cut()
        await _one_change(other, rng, alive, turn)
        async with asyncio.timeout(15):
            while True:
                try:
                    await same(store, index)
                    break
                except StoreUnavailable:
                    await asyncio.sleep(0.05)
    assert index.whole_looks >= 3
    store._state = SessionState.SUSPENDED
    with pytest.raises(StoreUnavailable):
        await index.recent()
    await index.close()
    await store.close()
    await other.close()


async def test_nobody_waits_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "RETRY_S", 0.01)
    counted = Counted(store)
    counted.held[paths.host("h1")] = asyncio.Event()
    index = Index(counted)  # type: ignore[arg-type]
    with pytest.raises(StoreUnavailable, match="the ledger as a whole was not seen"):
        await index.flush(timeout_s=0.2)
    counted.held[paths.host("h1")].set()
    assert set((await index.recent()).hosts) == set(HOSTS)
    await index.close()
