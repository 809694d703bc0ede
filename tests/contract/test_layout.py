"""A ledger of layout 1 or 2 becomes one of layout 3, wherever the upgrade is cut off; on ZooKeeper and in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from orchestrator.coordinator import upgrade as upgrade_module
from orchestrator.coordinator.driver import Deposed
from orchestrator.coordinator.upgrade import Upgrade
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import (
    Attempts,
    Cordon,
    EvacuationGuest,
    EvacuationGuests,
    EvacuationPhase,
    EvacuationSpec,
    EvacuationState,
    GuestSpec,
    HostRecord,
    MigrationPhase,
    MigrationSpec,
    MigrationState,
    RequestRecord,
    Reservations,
    WantRun,
)
from orchestrator.ledger import layout, paths
from orchestrator.ledger.gather import members
from orchestrator.ledger.layout import Layout, WrongLayout
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.records import encode
from orchestrator.ledger.snapshot import Reader
from orchestrator.ledger.store import (
    Create,
    Delete,
    Done,
    Op,
    OutcomeUnknown,
    SetData,
    Store,
    StoreUnavailable,
    WriteResult,
)
from orchestrator.ledger.zookeeper import ZooKeeperStore
from tests.fakes.coordination import MemoryStore
from tests.fakes.zookeeper import ZooKeeperServer, missing

H1, H2 = HostRef("h1", "b1"), HostRef("h2", "b2")
WORD = "x" * 250
PROMISED = {"m2-open": 64, "m3": 8, "m4": 8, "m5": 8}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooKeeperServer]:
    if missing():
        pytest.skip(missing())
    server = ZooKeeperServer(tmp_path_factory.mktemp("zk") / "server")
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["memory", pytest.param("zookeeper", marks=pytest.mark.zookeeper)])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    server: ZooKeeperServer = request.getfixturevalue("server")
    store = ZooKeeperStore(server.hosts, chroot=f"/{request.node.name.replace('[', '-').replace(']', '')}")
    await store.start()
    yield store
    await store.close()


def old_nodes() -> dict[str, bytes]:
    """A ledger as the last version of layout 1 left it. One guest has left h1, one is on its way to h1, one is over."""
    row = EvacuationGuest("u", "web", 64, "m" * 32, MigrationPhase.SUCCEEDED, "h2", message=WORD)
    records: dict[str, object] = {
        "/guests/aa-1": GuestRecord("web", Ownership.IDLE, H2, source=H1),
        "/guests/aa-2": GuestRecord("db", Ownership.OPEN, H2, "m2", 1, destination=H1),
        "/guests/bb-3": GuestRecord("old", Ownership.GONE, H1),
        "/migs/m1/m1-over": MigrationSpec("m1-over", "aa-1", "web"),
        "/migs/m1/m1-over/state": MigrationState(MigrationPhase.SUCCEEDED),
        "/migs/m1/m1-over/attempts": Attempts(),
        "/migs/m2/m2-open": MigrationSpec("m2-open", "aa-2", "db"),
        "/migs/m2/m2-open/state": MigrationState(MigrationPhase.PREPARING),
        "/migs/m2/m2-open/attempts": Attempts(),
        "/evac/h1-under-way": EvacuationSpec("h1-under-way", "h1"),
        "/evac/h1-under-way/state": EvacuationState(EvacuationPhase.RUNNING),
        "/evac/h1-ended": EvacuationSpec("h1-ended", "h1"),
        "/evac/h1-ended/state": EvacuationState(EvacuationPhase.SUCCEEDED),
        "/evac/h2-ended": EvacuationSpec("h2-ended", "h2"),
        "/evac/h2-ended/state": EvacuationState(EvacuationPhase.SUCCEEDED),
        "/requests/r-1": RequestRecord("guests/aa-1", "d", 1.0),
        "/requests/8f": RequestRecord("guests/aa-2", "d", 2.0),
        "/hosts/h1": HostRecord("h1", "b1", "h1:1", "h1:2", 1024, 1000),
        "/hosts/h1/cordon": Cordon(True, "work"),
        "/hosts/h1/resv": Reservations(PROMISED, {"m2-open": {"fast": 1 << 30}}),
        "/hosts/h2": HostRecord("h2", "b2", "h2:1", "h2:2", 1024, 1000),
        "/hosts/h2/cordon": Cordon(),
        "/hosts/h2/resv": Reservations(),
        "/names/web": "aa-1",
    }
    for number in range(40):  # more than one transaction
        records[f"/evac/h1-under-way/guests-{number:04}"] = EvacuationGuests((row,) * 50)
    for uuid in ("aa-1", "aa-2", "bb-3"):
        records[f"/guests/{uuid}/spec"] = GuestSpec("web")
        records[f"/guests/{uuid}/want_run"] = WantRun()
    records["/guests/aa-1/migration"] = "m1-over"
    return {path: encode(record) for path, record in records.items()}


async def fill(store: Store, nodes: dict[str, bytes]) -> None:
    await store.ensure(paths.epoch())
    for root in ("/requests", "/names", "/guests", "/migs", "/evac", "/hosts"):
        await store.ensure(root)
    for path in sorted(nodes, key=lambda path: path.count("/")):
        if path.startswith("/migs"):
            await store.ensure("/".join(path.split("/")[:3]))
        assert isinstance(await store.multi([Create(path, nodes[path])]), Done)


async def everything(store: Store, path: str) -> dict[str, bytes]:
    node = await store.read(path)
    found = {} if node is None else {path: node.data}
    for child in await store.children(path):
        found |= await everything(store, f"{path}/{child}")
    return found


async def snapshot(store: Store) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for root in (*paths.ROOTS, paths.LAYOUT):
        if root != paths.BARRIER:
            found |= await everything(store, root)
    return found


def moved(old: str) -> str:
    """Where a node of layout 1 is in layout 2."""
    _, root, name, *rest = old.split("/")
    place = {"guests": paths.guest, "evac": paths.evacuation, "requests": paths.request_id}.get(root)
    return old if place is None else "/".join([place(name), *rest])


async def check(store: Store) -> None:
    found = await snapshot(store)
    for path, data in old_nodes().items():
        assert found.get(moved(path)) == (b"" if path.endswith("/resv") else data), path
    for host, promised in (("h1", PROMISED), ("h2", {})):
        entry = await Reader(store).host(host)
        assert entry is not None
        assert entry.reservations.memory_mib == promised
        assert entry.reservations.disk_bytes == ({"m2-open": {"fast": 1 << 30}} if promised else {})
    for root, wanted in (
        (paths.GUESTS, {"aa-1", "aa-2", "bb-3"}),
        (paths.EVACUATIONS, {"h1-under-way", "h1-ended", "h2-ended"}),
        (paths.REQUESTS, {"r-1", "8f"}),
    ):
        assert set(await members(store, root)) == wanted
        assert all(len(name) == 2 for name in await store.children(root))
    assert await store.children(paths.host_guests("h1")) == ("aa-2",)
    assert await store.children(paths.host_guests("h2")) == ("aa-1", "aa-2")
    assert await store.children(paths.ACTIVE_MIGRATIONS) == ("m2-open",)
    assert await store.children(paths.ACTIVE_EVACUATIONS) == ("h1-under-way",)
    assert await store.children(paths.ENDED_EVACUATIONS) == ("h1-ended",), "h2 is not cordoned"
    assert await layout.of_tree(store) == layout.OURS


class Crash(Exception):
    pass


class Cut:
    """A store whose user dies at its n-th write: the write was applied, or was not."""

    def __init__(self, store: Store, writes: int, *, applied: bool) -> None:
        self._store, self._left, self._applied = store, writes, applied

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    async def multi(self, ops: Sequence[Op], timeout_s: float = 2.0) -> WriteResult:
        self._left -= 1
        if self._left < 0:
            if self._applied:
                await self._store.multi(ops, timeout_s)
            raise Crash
        return await self._store.multi(ops, timeout_s)


def upgrade(store: object, epoch: int = 0, said: list[str] | None = None) -> Upgrade:
    return Upgrade(store, epoch, (said if said is not None else []).append)  # pyright: ignore[reportArgumentType]


async def test_everything_is_where_it_belongs(store: Store) -> None:
    await fill(store, old_nodes())
    await upgrade(store).run()
    await check(store)
    before = await snapshot(store)
    await upgrade(store).run()
    assert await snapshot(store) == before


@pytest.mark.parametrize("applied", [False, True])
async def test_an_upgrade_that_is_cut_off_at_any_write_is_finished_by_the_next_leader(applied: bool) -> None:
    writes = 0
    while True:
        store = MemoryStore()
        await fill(store, old_nodes())
        try:
            await upgrade(Cut(store, writes, applied=applied)).run()
            break
        except Crash:
            pass
        await upgrade(store).run()
        await check(store)
        writes += 1
    assert writes > 10


async def as_layout_2_left_it(store: Store) -> None:
    """Everything is in its place but what hosts have promised."""
    await fill(store, old_nodes())
    await upgrade(store).run()
    for host, promised in (("h1", old_nodes()["/hosts/h1/resv"]), ("h2", old_nodes()["/hosts/h2/resv"])):
        above = paths.reservations(host)
        for name in await store.children(above):
            assert isinstance(await store.multi([Delete(f"{above}/{name}", 0)]), Done)
        node = await store.read(above)
        assert node is not None
        assert isinstance(await store.multi([SetData(above, promised, node.version)]), Done)
    node = await store.read(paths.LAYOUT)
    assert node is not None
    assert isinstance(await store.multi([SetData(paths.LAYOUT, encode(Layout(2)), node.version)]), Done)


async def test_a_ledger_of_layout_2_gets_a_node_for_each_promise(store: Store) -> None:
    await as_layout_2_left_it(store)
    with pytest.raises(WrongLayout, match="has layout 2; waiting for a coordinator"):
        await layout.must_be_ours(store)
    await upgrade(store).run()
    await check(store)


@pytest.mark.parametrize("applied", [False, True])
async def test_no_promise_is_lost_wherever_the_upgrade_from_layout_2_is_cut_off(
    applied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upgrade_module, "MAX_OPS", 3)
    writes = 0
    while True:
        store = MemoryStore()
        await as_layout_2_left_it(store)
        try:
            await upgrade(Cut(store, writes, applied=applied)).run()
            break
        except Crash:
            pass
        await upgrade(store).run()
        await check(store)
        writes += 1
    assert writes >= 4


async def test_promises_that_cannot_be_read_are_waited_for_and_named() -> None:
    store, said = MemoryStore(), list[str]()
    await as_layout_2_left_it(store)
    path = paths.reservations("h1")
    good, node = old_nodes()["/hosts/h1/resv"], store.tree.nodes[path]
    assert isinstance(await store.multi([SetData(path, b"{", node.version)]), Done)
    task = asyncio.create_task(upgrade(store, said=said).run())
    async with asyncio.timeout(30):
        while not any("/hosts/h1/resv: content: Invalid JSON" in each for each in said):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert await layout.of_tree(store) == 2
        assert isinstance(await store.multi([SetData(path, good, node.version + 1)]), Done)
        await task
    await check(store)


async def test_an_answer_that_is_lost_changes_nothing(store: Store) -> None:
    await fill(store, old_nodes())

    class Lossy(Cut):
        async def multi(self, ops: Sequence[Op], timeout_s: float = 2.0) -> WriteResult:
            self._left += 1
            result = await self._store.multi(ops, timeout_s)
            return OutcomeUnknown() if ops and self._left % 2 else result

    await upgrade(Lossy(store, 0, applied=True)).run()
    await check(store)


async def test_a_leader_that_was_deposed_moves_nothing_more(store: Store) -> None:
    await fill(store, old_nodes())
    with pytest.raises(Deposed):
        await upgrade(store, epoch=7).run()
    assert await layout.of_tree(store) == 1


async def test_it_waits_for_the_end_of_the_older_versions_agents(store: Store) -> None:
    await fill(store, old_nodes())
    assert isinstance(await store.multi([Create(paths.live("h2"), b"")]), Done)
    said: list[str] = []
    task = asyncio.create_task(upgrade(store, said=said).run())
    async with asyncio.timeout(10):
        while not said:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert "older version's agents on h2" in said[-1]
    assert await layout.of_tree(store) == 1
    found = await store.read(paths.live("h2"))
    assert found is not None
    assert isinstance(await store.multi([Delete(paths.live("h2"), found.version)]), Done)
    async with asyncio.timeout(30):
        await task
    await check(store)


async def test_an_empty_tree_gets_the_layout_of_whoever_comes_first(store: Store) -> None:
    await asyncio.gather(*(Ledger(store).init_tree() for _ in range(5)))
    assert await layout.of_tree(store) == layout.OURS


async def test_nobody_touches_a_tree_of_another_layout(store: Store) -> None:
    await fill(store, old_nodes())
    before = await snapshot(store)
    with pytest.raises(WrongLayout, match="has layout 1; waiting for a coordinator") as wrong:
        await Ledger(store).init_tree()
    assert not wrong.value.newer
    assert await snapshot(store) == before


@pytest.mark.parametrize("data", [encode(Layout(layout.OURS + 1)), b"{"])
async def test_a_newer_layout_is_refused(store: Store, data: bytes) -> None:
    assert isinstance(await store.multi([Create(paths.LAYOUT, data)]), Done)
    with pytest.raises(WrongLayout) as wrong:
        await Ledger(store).init_tree()
    assert wrong.value.newer
    with pytest.raises(WrongLayout):
        await upgrade(store).run()


async def test_a_ledger_that_does_not_answer_is_waited_for(tmp_path: Path) -> None:
    store = MemoryStore()
    await fill(store, old_nodes())
    store.down = True
    task = asyncio.create_task(upgrade(store).run())
    await asyncio.sleep(0.3)
    assert not task.done()
    with pytest.raises(StoreUnavailable):
        await layout.must_be_ours(store)
    store.down = False
    async with asyncio.timeout(30):
        await task
    await check(store)
