"""The API on a real ZooKeeper: what the tests on the memory store claim holds there, and it outlives its absence."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import wire
from orchestrator.core import handover
from orchestrator.core.errors import AbortReason, DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import GuestSpec, MigrationPhase, MigrationState
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger, op_set
from orchestrator.ledger.store import Done, Store
from orchestrator.ledger.zookeeper import ZooKeeperStore
from orchestrator.rpc import health
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.api import ApiCluster, api_cluster
from tests.fakes.zookeeper import ZooKeeperServer, missing

pytestmark = pytest.mark.zookeeper
R = RefusalReason
D = HostRef("h2", "boot-h2")


@pytest.fixture
def zookeeper(tmp_path: Path) -> Iterator[ZooKeeperServer]:
    if missing():
        pytest.skip(missing())
    server = ZooKeeperServer(tmp_path / "zk")
    server.start()
    yield server
    server.kill()


def connect(zookeeper: ZooKeeperServer) -> Store:
    return ZooKeeperStore(zookeeper.hosts, session_timeout_s=4)


@pytest.fixture
async def api(zookeeper: ZooKeeperServer, tmp_path: Path) -> AsyncIterator[ApiCluster]:
    async with api_cluster(connect(zookeeper), tmp_path) as cluster:
        yield cluster


async def change(store: Store, uuid: str, *steps: Callable[[GuestRecord], GuestRecord]) -> GuestRecord:
    """Transitions of a guest's record, as its agents make them."""
    ledger = Ledger(store)
    for step in steps:
        found = await ledger.read_guest(uuid)
        assert found is not None
        assert isinstance(await ledger.cas(paths.guest(uuid), step(found[0]), found[1]), Done)
    found = await ledger.read_guest(uuid)
    assert found is not None
    return found[0]


async def open_attempt(store: Store, uuid: str, name: str) -> None:
    """Record and state in one transaction, as the coordinator writes them."""
    ledger = Ledger(store)
    found, state = await ledger.read_guest(uuid), await ledger.read(MigrationState, paths.migration_state(name))
    assert found is not None
    assert state is not None
    opened = handover.open_attempt(found[0], name, 1, D, epoch=0, writer="c")
    preparing = replace(state[0], phase=MigrationPhase.PREPARING, attempt=1, source="h1", destination="h2")
    ops = [op_set(paths.guest(uuid), opened, found[1]), op_set(paths.migration_state(name), preparing, state[1])]
    assert isinstance(await store.multi(ops), Done)
    await change(store, uuid, lambda record: handover.bind(record, name, 1, "inc", writer="a"))


async def test_the_life_of_a_guest(api: ApiCluster) -> None:
    guest = await api.call(api.client.create_guest, GuestSpec("web"), "h2", request_id="r1")
    assert (guest.host, wire.word(guest, "run_state")) == ("h2", "RUNNING")
    assert (await api.call(api.client.create_guest, GuestSpec("web"), "h2", request_id="r1")).uuid == guest.uuid
    assert (await api.refused(api.client.create_guest, GuestSpec("web"))).reason is R.ALREADY_EXISTS
    assert wire.word(await api.call(api.client.pause_guest, "web"), "wish") == "APPLIED"
    assert [each.name for each in await api.call(api.client.list_guests)] == ["web"]
    assert wire.word(await api.call(api.client.stop_guest, "web"), "ownership") == "GONE"
    assert await api.call(api.client.list_guests) == []
    assert (await api.refused(api.client.get_guest, "web")).reason is R.NOT_FOUND


@pytest.mark.rule("H6")
async def test_a_cancel_before_the_commit_and_one_after_it(api: ApiCluster) -> None:
    uuid = (await api.call(api.client.create_guest, GuestSpec("web"), "h1")).uuid
    name = (await api.call(api.client.create_migration, "web")).name
    await open_attempt(api.store, uuid, name)
    cancelled = await api.call(api.client.cancel_migration, name)
    assert (wire.word(cancelled, "phase"), cancelled.cancel_requested) == ("ABORTING", True)
    record = await change(api.store, uuid, lambda record: handover.close(record, name, writer="c"))
    assert (record.phase, record.reason) == (Ownership.IDLE, AbortReason.CANCELLED)

    uuid = (await api.call(api.client.create_guest, GuestSpec("db"), "h1")).uuid
    second = (await api.call(api.client.create_migration, "db")).name
    await open_attempt(api.store, uuid, second)
    await change(api.store, uuid, lambda record: handover.commit(record, second, 1, "inc", writer="a"))
    found = await Ledger(api.store).read_guest(uuid)
    assert found is not None
    error = await api.refused(api.client.cancel_migration, second)
    assert (error.reason, error.details["zxid"]) == (R.ALREADY_COMMITTED, str(found[2]))


@pytest.mark.rule("H6")
async def test_cancels_and_commits_race_and_one_of_them_wins(api: ApiCluster) -> None:
    """Ten times side by side: whoever is told "cancelled" finds the guest at the source for ever."""
    answers: set[str] = set()
    for number in range(10):
        name = f"g{number}"
        uuid = (await api.call(api.client.create_guest, GuestSpec(name, memory_mib=16), "h1")).uuid
        migration = (await api.call(api.client.create_migration, name)).name
        await open_attempt(api.store, uuid, migration)
        asked = asyncio.create_task(api.call(api.client.cancel_migration, migration))
        await asyncio.sleep(0.001 * number)
        committed = True
        try:
            await change(api.store, uuid, lambda record: handover.commit(record, migration, 1, "inc", writer="a"))  # noqa: B023
        except (handover.Refused, AssertionError):
            committed = False
        try:
            await asked
            answer = "CANCELLED"
        except DroverError as error:
            answer = error.reason
        assert answer == (R.ALREADY_COMMITTED if committed else "CANCELLED")
        answers.add(answer)
    assert answers


async def test_the_same_request_at_several_apis_is_one_resource(
    zookeeper: ZooKeeperServer, api: ApiCluster, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        apis = [api]
        for number in (2, 3):
            directory = tmp_path / f"api{number}"
            directory.mkdir()
            apis.append(await stack.enter_async_context(api_cluster(connect(zookeeper), directory, hosts=0)))
        guests = await asyncio.gather(
            *(each.call(each.client.create_guest, GuestSpec("web"), request_id="r1") for each in apis for _ in (1, 2))
        )
        assert len({guest.uuid for guest in guests}) == 1
        migrations = await asyncio.gather(
            *(each.call(each.client.create_migration, "web", request_id="r2") for each in apis for _ in (1, 2))
        )
        assert len({migration.name for migration in migrations}) == 1
        jobs = await asyncio.gather(
            *(each.call(each.client.create_evacuation, "h1", request_id="r3") for each in apis for _ in (1, 2))
        )
        assert len({job.evacuation.name for job in jobs}) == 1


async def test_several_apis_never_promise_the_same_memory(
    zookeeper: ZooKeeperServer, api: ApiCluster, tmp_path: Path
) -> None:
    (tmp_path / "second").mkdir()
    async with api_cluster(connect(zookeeper), tmp_path / "second", hosts=0) as other:

        async def one(each: ApiCluster, number: int) -> str:
            try:
                return (await each.call(each.client.create_guest, GuestSpec(f"g{number}", memory_mib=300))).host
            except DroverError as error:
                return error.reason

        homes = await asyncio.gather(*(one(each, number) for number, each in enumerate([api, other] * 6)))
    assert sorted(homes) == ["NO_CAPACITY"] * 3 + ["h1"] * 3 + ["h2"] * 3 + ["h3"] * 3


async def test_an_absence_of_zookeeper_is_said_and_outlived(zookeeper: ZooKeeperServer, api: ApiCluster) -> None:
    guest = await api.call(api.client.create_guest, GuestSpec("web"), "h1")
    watch = api.client.watch_guests()
    assert (await asyncio.to_thread(next, watch)).uuid == guest.uuid
    assert await health.check(api.address) is None
    zookeeper.kill()
    assert (await api.refused(api.client.list_guests)).reason is R.LEDGER_UNREACHABLE
    assert (await api.refused(api.client.pause_guest, "web")).reason is R.LEDGER_UNREACHABLE
    async with asyncio.timeout(10):
        while await health.check(api.address) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    zookeeper.start()
    async with asyncio.timeout(15):
        while await health.check(api.address) is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await api.call(api.client.pause_guest, "web")
    async with asyncio.timeout(15):
        while (await asyncio.to_thread(next, watch)).want_run:
            pass


async def test_the_process_serves_and_ends_on_sigterm(zookeeper: ZooKeeperServer, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/api.sock"
    config = {
        "listen": [address, "127.0.0.1:0"],
        "zookeeper": zookeeper.hosts,
        "instructions": True,
        "log_level": "info",
    }
    (tmp_path / "api.json").write_text(json.dumps(config))
    command = (sys.executable, "-m", "orchestrator.api", "--config", str(tmp_path / "api.json"))
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(20):
            while await health.check(address) is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        with OrchestratorClient(address) as client:
            assert await asyncio.to_thread(client.list_hosts) == []
            watch = client.watch_guests()
            reading = asyncio.create_task(asyncio.to_thread(next, watch, None))
            process.terminate()
            _, log = await asyncio.wait_for(process.communicate(), 10)
        await asyncio.wait({reading}, timeout=10)
        reading.exception()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    lines = [json.loads(line) for line in log.decode().splitlines()]
    assert [line["event"] for line in lines][:1] == ["serving"]
    assert all({"event", "level", "at"} <= set(line) for line in lines), lines
