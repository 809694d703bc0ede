"""The ledger is lost and brought back from a backup that is older than the guests: each runs in exactly one place, and
can be moved again. Real agents, QEMUs and ZooKeeper; the coordinator's part is played by the test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deploy.lab.workload import Workload, boot_of
from orchestrator.coordinator.agents import RpcAgents
from orchestrator.core import handover
from orchestrator.core.agent import ConductOrder
from orchestrator.core.endpoint import Endpoint, join_address
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import GuestSpec, HostRecord
from orchestrator.ledger import incarnation, paths
from orchestrator.ledger.ledger import Ledger, op_set
from orchestrator.ledger.store import Done
from orchestrator.ledger.zookeeper import ZooKeeperStore
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.cluster import ROOT, short_directory
from tests.fakes.zookeeper import ZooKeeperServer, missing
from tests.integration.test_ipv6 import API_PORT, Host, arrived, connected, end_vmms, live, served_api, started, until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.zookeeper,
    pytest.mark.qemu,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
]
HERE = "127.0.0.1"
HOSTS = (Host("h1", HERE, 7821), Host("h2", HERE, 7831))


# --- what happens, in processes of their own: gRPC's threads are not for the tests' -----------------------------------


def cli(*words: str) -> dict[str, object]:
    command = [sys.executable, "-m", "orchestrator.cli.main", "ledger", *words, "-o", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    print("$ drover ledger", *words, "\n", done.stdout, done.stderr)
    assert done.returncode == 0
    return json.loads(done.stdout)


async def move(store: ZooKeeperStore, agents: RpcAgents, uuid: str, migration: str, to: str) -> None:
    """As a coordinator does it whose epoch is the ledger's."""
    ledger = Ledger(store)
    found = await ledger.read_guest(uuid)
    assert found is not None
    record, version, _ = found
    source, target = [await ledger.read(HostRecord, paths.host(name)) for name in (record.owner.host, to)]
    assert source is not None
    assert target is not None
    await store.ensure(paths.epoch())
    node = await store.read(paths.epoch())
    assert node is not None
    await store.ensure(paths.migration(migration))
    for path in (paths.requests(migration), paths.acks(migration)):
        await store.ensure(path)
    there, ref = HostRef(to, target[0].boot_id), AttemptRef(uuid, migration, 1)
    opened = handover.open_attempt(record, migration, 1, there, epoch=node.version, writer="test")
    assert isinstance(await store.multi([op_set(paths.guest(uuid), opened, version)]), Done)
    prepared = await agents.at(target[0].control_address).prepare_destination(
        ref,
        epoch=node.version,
        source_peer=Endpoint.parse(source[0].peer_address),
        timeout_ms=30_000,
        multifd_channels=0,
    )
    order = ConductOrder(ref, node.version, prepared, there, MigrationPolicy())
    await agents.at(source[0].control_address).conduct_attempt(order)
    await until(lambda: arrived(ledger, uuid, there))


async def places(agents: RpcAgents) -> dict[str, list[tuple[str, str, bool]]]:
    """Guest -> where there is a process of it: host, inc, whether its vCPUs run."""
    found: dict[str, list[tuple[str, str, bool]]] = {}
    for host in HOSTS:
        held = await agents.at(join_address(host.address, host.first_port)).list_copies()
        assert held.complete
        for copy in held.copies:
            found.setdefault(copy.name, []).append((host.name, copy.held.inc, copy.held.running))
    return found


async def beats(agents: RpcAgents, host: str, uuid: str) -> None:
    """Its console says something new: it runs there, whatever anybody says."""
    (where,) = [each for each in HOSTS if each.name == host]

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    said = b""
    async with contextlib.aclosing(
        agents.at(join_address(where.address, where.first_port)).hold_console(uuid, "", nothing(), 60.0)
    ) as console:
        async for data, _ in console:
            said += data
            if said.count(b"\n") >= 3:
                return
    raise AssertionError(f"guest {uuid} is silent on {host}")


async def before(zookeeper: str, directory: Path) -> None:
    """Two guests on h1, a backup; then one of them moves, and a third is made."""
    store, agents = ZooKeeperStore(zookeeper), RpcAgents()
    await until(lambda: connected(store))
    client = await asyncio.to_thread(OrchestratorClient, join_address(HERE, API_PORT))
    await until(lambda: live(client))
    await incarnation.given(store)
    boot = boot_of(Workload(dirty_mib=1), seed=0)
    web = (await asyncio.to_thread(client.create_guest, GuestSpec("web", boot=boot), "h1")).uuid
    stays = (await asyncio.to_thread(client.create_guest, GuestSpec("stays", boot=boot), "h1")).uuid
    told = await asyncio.to_thread(cli, "export", str(directory / "backup"), "--zookeeper", zookeeper)
    assert told["guests"] == 2
    await move(store, agents, web, "abcdef012345", "h2")
    new = (await asyncio.to_thread(client.create_guest, GuestSpec("new", boot=boot), "h2")).uuid
    (directory / "uuids").write_text(json.dumps({"web": web, "stays": stays, "new": new}))
    (directory / "before").write_text(json.dumps(await places(agents)))
    await store.close()


async def after(zookeeper: str, directory: Path) -> None:
    """The ledger is empty, and comes back."""
    agents, file = RpcAgents(), str(directory / "backup")
    uuids: dict[str, str] = json.loads((directory / "uuids").read_text())
    told = json.loads((directory / "before").read_text())
    ran = {name: [tuple(each) for each in found] for name, found in told.items()}
    look = await asyncio.to_thread(cli, "import", file, "--zookeeper", zookeeper)
    assert not look["done"]
    token = str(look["token"])
    done = await asyncio.to_thread(cli, "import", file, "--zookeeper", zookeeper, "--confirm", token)
    assert done["done"]
    assert done["left"] == []
    store = ZooKeeperStore(zookeeper)
    await until(lambda: connected(store))
    ledger = Ledger(store)
    for name, host in (("web", "h2"), ("stays", "h1"), ("new", "h2")):
        found = await ledger.read_guest(uuids[name])
        assert found is not None, name
        assert found[0].owner.host == host, found
        await beats(agents, host, uuids[name])

    async def kept() -> bool:
        status = [await agents.at(join_address(each.address, each.first_port)).get_agent() for each in HOSTS]
        print("troubles", [one.troubles for one in status])
        return not any(one.troubles for one in status)

    await until(kept)
    assert await places(agents) == ran, "the very processes that ran before, each in one place"
    await move(store, agents, uuids["web"], "abcdef012346", "h1")
    await beats(agents, "h1", uuids["web"])

    async def left() -> bool:
        return [host for host, _, _ in (await places(agents))["web"]] == ["h1"]

    await until(left)
    await store.close()
    print("brought back")


# --- the test ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory() -> Iterator[Path]:
    path = short_directory()
    yield path
    shutil.rmtree(path, ignore_errors=True)


def phase(name: str, zookeeper: ZooKeeperServer, directory: Path) -> None:
    program = [sys.executable, __file__, name, zookeeper.hosts, str(directory)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    print(done.stdout, done.stderr)
    if done.returncode:
        for log in sorted(directory.glob("**/log")):
            print(log, log.read_text(errors="replace")[-4000:])
    assert done.returncode == 0


def again(host: Host, directory: Path) -> subprocess.Popen[bytes]:
    """The host's agent, restarted: its guests ran on."""
    own = directory / host.name
    command = [sys.executable, "-m", "agents", "--config", str(own / "agent.json")]
    with open(own / "log", "ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def test_guests_that_moved_since_the_backup_run_on_where_they_are(directory: Path) -> None:
    zookeeper = ZooKeeperServer(directory / "zk", HERE)
    running: list[subprocess.Popen[bytes]] = []
    try:
        zookeeper.start()
        agents = [started(host, zookeeper.hosts, directory, loopback=True) for host in HOSTS]
        running += agents
        api = served_api(HERE, zookeeper.hosts, directory, None)
        running.append(api)
        phase("before", zookeeper, directory)
        api.terminate()
        api.wait(30)
        zookeeper.kill()
        shutil.rmtree(directory / "zk" / "data")
        (directory / "zk" / "data").mkdir()
        zookeeper.start()
        # A client of ZooKeeper speaks to no server that knows less than it has seen: agents have to be new ones.
        for agent in agents:
            agent.terminate()
        for agent in agents:
            agent.wait(30)
        running += [again(host, directory) for host in HOSTS]
        phase("after", zookeeper, directory)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(30)
        end_vmms(directory)
        zookeeper.kill()


if __name__ == "__main__":
    asyncio.run({"before": before, "after": after}[sys.argv[1]](sys.argv[2], Path(sys.argv[3])))
