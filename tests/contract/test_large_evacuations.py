"""An evacuation of two thousand guests, with nowhere to go but seventy cordoned hosts whose reasons are long; and hosts
that were emptied hundreds of times. On the store in memory, which takes no more per write than ZooKeeper, and of fewer
guests on a real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import wire
from orchestrator.coordinator.evacuations import EvacuationRunner
from orchestrator.core.errors import FailureReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import (
    Cordon,
    EvacuationGuest,
    EvacuationPhase,
    EvacuationSpec,
    EvacuationState,
    GuestSpec,
    HostRecord,
    MigrationPhase,
    MigrationState,
    WantRun,
)
from orchestrator.ledger import evacuations as layout
from orchestrator.ledger import paths
from orchestrator.ledger.gather import each
from orchestrator.ledger.index import Index
from orchestrator.ledger.ledger import Ledger, op_create
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.ledger.store import Create, Done, Op, SetData, Store
from orchestrator.ledger.zookeeper import ZooKeeperStore
from tests.fakes.api import ApiCluster, api_cluster
from tests.fakes.coordination import MemoryStore
from tests.fakes.zookeeper import ZooKeeperServer, missing

pytestmark = pytest.mark.timeout(240)

GUESTS = 2_000
ON_ZOOKEEPER = 600
"""As many as would not fit into one node of it."""
BATCH = 20
"""Guests in one transaction."""
SOURCE = HostRef("h1", "boot-h1")
WHY = "w" * 1000
SAID = "no host can take it: " + "; ".join(f"host-{n} is cordoned ({WHY[:200]})" for n in range(5))


@pytest.fixture(params=["memory", pytest.param("zookeeper", marks=pytest.mark.zookeeper)])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    if missing():
        pytest.skip(missing())
    server = ZooKeeperServer(tmp_path / "zk")
    server.start()
    store = ZooKeeperStore(server.hosts)
    yield store
    await store.close()
    server.kill()


@pytest.fixture
async def api(store: Store, tmp_path: Path) -> AsyncIterator[ApiCluster]:
    async with api_cluster(store, tmp_path, hosts=0) as cluster:
        await store.ensure(paths.epoch())
        cluster.client.timeout_s = 100.0
        yield cluster


async def put(store: Store, batches: Iterable[list[Op]]) -> None:
    async def write(ops: list[Op]) -> None:
        made = {op.path for op in ops}
        for parent in {paths.shard(path) for path in made} - made:
            await store.ensure(parent)
        assert isinstance(await store.multi(ops), Done)

    await each(batches, write)


def host(name: str, memory_mib: int, cordon: Cordon) -> list[Op]:
    """It is live, and nobody is there: names of hosts are not looked up."""
    return [
        op_create(paths.host(name), HostRecord(name, f"boot-{name}", "127.0.0.1:1", "127.0.0.1:2", memory_mib, 1000)),
        op_create(paths.cordon(name), cordon),
        Create(paths.reservations(name), b""),
        Create(paths.host_guests(name), b""),
        Create(paths.live(name), b""),
    ]


def guest(number: int) -> list[Op]:
    uuid, name = f"uuid-{number:04}", f"guest-{number:04}-{'n' * 40}"
    return [
        op_create(paths.name(name), uuid),
        op_create(paths.guest(uuid), GuestRecord(name, Ownership.IDLE, SOURCE)),
        op_create(paths.guest_spec(uuid), GuestSpec(name, 64)),
        op_create(paths.want_run(uuid), WantRun()),
    ]


async def populate(store: Store, guests: int) -> None:
    await put(store, [host("h1", 1 << 20, Cordon())])
    await put(store, (host(f"full-{number:02}", 64 << 10, Cordon(True, WHY)) for number in range(70)))
    await put(
        store,
        (
            [op for n in range(first, min(first + BATCH, guests)) for op in guest(n)]
            for first in range(0, guests, BATCH)
        ),
    )


async def fail(store: Store, job: layout.Job) -> None:
    """What the drivers make of every migration that was begun."""

    async def one(row: EvacuationGuest) -> None:
        path = paths.migration_state(row.migration)
        node = await store.read(path)
        assert node is not None
        state = decode(MigrationState, node.data)
        if not state.phase.terminal:
            ended = replace(state, phase=MigrationPhase.FAILED, failure=FailureReason.NO_CAPACITY, message=SAID)
            assert isinstance(await store.multi([SetData(path, encode(ended), node.version)]), Done)

    await each([row for row in job.guests if row.migration], one)


async def read(store: Store, name: str) -> layout.Job:
    job = await layout.read_job(store, name)
    assert job is not None
    return job


async def largest_node(store: Store, name: str) -> int:
    children = await store.children(paths.evacuation(name))
    nodes = [await store.read(f"{paths.evacuation(name)}/{child}") for child in children]
    return max(len(node.data) for node in nodes if node is not None)


async def test_two_thousand_guests_that_cannot_go_anywhere(api: ApiCluster, store: Store) -> None:
    guests = GUESTS if isinstance(store, MemoryStore) else ON_ZOOKEEPER
    await populate(store, guests)
    planned = await api.call(api.client.create_evacuation, "h1", 900, validate_only=True)
    assert len(planned.verdicts) == guests
    assert all(verdict.reason and len(verdict.message) < 2_000 for verdict in planned.verdicts)
    name = (await api.call(api.client.create_evacuation, "h1", 900)).evacuation.name
    runner = EvacuationRunner(store, Index(store), 0, asyncio.Event(), api.server.tools.agents)
    turns = 0
    while not await runner.turn(name):
        turns += 1
        assert turns < 40, "it finds no end"
        if turns > 1:
            await fail(store, await read(store, name))
    job = await read(store, name)
    assert (job.head.phase, len(job.guests)) == (EvacuationPhase.FAILED, guests)
    assert all(row.failure is FailureReason.NO_CAPACITY for row in job.guests)
    assert await largest_node(store, name) < 150_000
    assert not job.head.guests
    shown = await api.call(api.client.get_evacuation, name)
    assert len({one.guest for one in shown.guests}) == guests
    assert f"{guests} of {guests} guests remain on h1" in shown.message
    assert len(shown.message) <= layout.MAX_MESSAGE
    assert all(len(one.message) <= layout.SAID for one in shown.guests)
    assert [one.name for one in await api.call(api.client.list_evacuations)] == [name]
    explained = await api.call(api.client.get_migration, shown.guests[-1].migration)
    assert explained.message == SAID, "the migration itself keeps all that was said"
    assert not shown.safe_to_power_off


async def test_a_large_job_is_cancelled_between_two_of_its_writes(
    api: ApiCluster, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wish is never written over, whatever of the job's rows was stored by then."""
    guests = 400
    monkeypatch.setattr(layout, "MAX_TRANSACTION", 20_000)
    await populate(store, guests)
    name = (await api.call(api.client.create_evacuation, "h1", 900)).evacuation.name
    runner = EvacuationRunner(store, Index(store), 0, asyncio.Event(), api.server.tools.agents)
    job = await read(store, name)
    assert not await runner.turn(name)
    stale = layout.transactions(job, replace(job.state, message="late"))
    assert len(layout.transactions(job, (await read(store, name)).state)) > 1
    assert (await api.call(api.client.cancel_evacuation, name)).cancel_requested
    for ops in stale:
        assert not isinstance(await store.multi(ops), Done)
    while not await runner.turn(name):
        for row in (await read(store, name)).guests:
            if row.migration and not row.phase.terminal:
                await api.call(api.client.cancel_migration, row.migration)
    job = await read(store, name)
    assert (job.head.phase, job.head.failure) == (EvacuationPhase.CANCELLED, FailureReason.CANCELLED)
    assert len(job.guests) == guests


async def test_a_job_of_an_older_version_goes_on_with_its_guests(api: ApiCluster, store: Store) -> None:
    """Its guests are in its head; the next write moves them, and a cancel before that loses none of them."""
    await put(store, [host("h1", 4096, Cordon(True)), *(guest(number) for number in range(120))])
    old = [EvacuationGuest(f"uuid-{n:04}", f"guest-{n}", 64, "a" * 30 + f"{n:02}", tries=1) for n in range(3)]
    old = [replace(row, phase=MigrationPhase.SUCCEEDED, destination="h2", attempts=1) for row in old]
    state = EvacuationState(EvacuationPhase.RUNNING, tuple(old))
    await put(store, [[op_create(paths.evacuation("e1"), EvacuationSpec("e1", "h1"))]])
    await put(store, [[op_create(paths.evacuation_state("e1"), state)]])
    assert len((await api.call(api.client.get_evacuation, "e1")).guests) == 3
    runner = EvacuationRunner(store, Index(store), 0, asyncio.Event(), api.server.tools.agents)
    assert not await runner.turn("e1")
    job = await read(store, "e1")
    assert (len(job.head.guests), len(job.guests), len(job.rows)) == (0, 120, 3)
    assert job.guests[:3] == tuple(old)


async def test_a_host_that_was_emptied_hundreds_of_times_is_uncordoned_with_one_small_write(
    api: ApiCluster, store: Store
) -> None:
    await api.host("h1", 4096)
    await api.call(api.client.cordon_host, "h1")
    row = EvacuationGuest("u", "web", 64, "m" * 32, MigrationPhase.SUCCEEDED, "h2", message="x" * 250)
    state = EvacuationState(EvacuationPhase.SUCCEEDED, (row,) * 12)
    names = [f"h1-{number:03}" for number in range(400)]
    await put(store, ([op_create(paths.evacuation(name), EvacuationSpec(name, "h1"))] for name in names))
    await put(store, ([op_create(paths.evacuation_state(name), state)] for name in names))
    await put(store, ([op_create(paths.ended_evacuation(name), "h1")] for name in names))
    runner = EvacuationRunner(store, Index(store), 0, asyncio.Event(), api.server.tools.agents)
    await runner.refresh_ended()
    for name in (names[0], names[-1]):
        assert (await api.call(api.client.get_evacuation, name)).safe_to_power_off
    assert not (await api.call(api.client.uncordon_host, "h1")).cordoned
    for again in (False, True):
        for name in (names[0], names[-1]):
            assert not (await api.call(api.client.get_evacuation, name)).safe_to_power_off, again
        await api.call(api.client.cordon_host, "h1")  # safe again only once somebody has looked under this cordon
    await runner.refresh_ended()
    assert all(one.safe_to_power_off for one in await api.call(api.client.list_evacuations))
    assert wire.word(await api.call(api.client.get_host, "h1"), "state") == "LIVE"


async def test_no_transaction_is_too_large_and_only_what_changed_is_written(store: Store) -> None:
    await store.start()
    await Ledger(store).init_tree()
    spec = EvacuationSpec("e1", "h1")
    await put(store, [[op_create(paths.evacuation("e1"), spec)]])
    await put(store, [[op_create(paths.evacuation_state("e1"), EvacuationState())]])
    job = await read(store, "e1")
    rows = tuple(EvacuationGuest(f"u{n}", "n" * 63, 64, "m" * 32, message="\x00" * 300) for n in range(5_000))
    state = EvacuationState(guests=rows)
    batches = layout.transactions(job, state)
    assert max(sum(len(op.data) for op in ops if isinstance(op, Create | SetData)) for ops in batches) < 800_000
    for ops in batches:
        assert isinstance(await store.multi(ops), Done)
    assert layout.written(job, state) == await read(store, "e1")
    job = await read(store, "e1")
    assert job.state == state
    one = replace(state, guests=(*rows[:777], replace(rows[777], attempts=3), *rows[778:]))
    (ops,) = layout.transactions(job, one)
    assert [op.path for op in ops] == [paths.evacuation_guests("e1", 15), paths.evacuation_state("e1")]
    assert isinstance(await store.multi(ops), Done)
    assert layout.written(job, one) == await read(store, "e1")
    with pytest.raises(BadRecord):
        encode(state)  # as it used to be written: into one node
