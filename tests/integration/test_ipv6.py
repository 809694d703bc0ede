"""IPv6 from end to end: ZooKeeper, API, metrics, agents, hand-over calls, QEMU's stream; on loopback, between hosts.

The coordinator's part is played by the test: everything else is real.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.lab.cluster import network
from deploy.lab.workload import Workload, boot_of
from orchestrator.coordinator.agents import RpcAgents
from orchestrator.core import handover
from orchestrator.core.agent import ConductOrder
from orchestrator.core.endpoint import Endpoint, join_address
from orchestrator.core.errors import DroverError
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import GuestSpec, HostRecord
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger, op_set
from orchestrator.ledger.store import Done, StoreUnavailable
from orchestrator.ledger.zookeeper import ZooKeeperStore
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.contract.test_engine import image
from tests.fakes.cluster import ROOT, short_directory
from tests.fakes.zookeeper import ZooKeeperServer, missing

pytestmark = [
    pytest.mark.integration,
    pytest.mark.zookeeper,
    pytest.mark.qemu,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
]
API_PORT = 7790


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    """As it stands in agent.json."""
    first_port: int
    namespace: str | None = None


def started(host: Host, zookeeper: str, directory: Path, *, loopback: bool) -> subprocess.Popen[bytes]:
    own = directory / host.name
    for name in ("d", "v"):
        (own / name).mkdir(parents=True)
    (own / "id").write_text(f"{uuid.uuid4()}\n{uuid.uuid4()}\n")
    config = {
        "host": host.name,
        "address": host.address,
        "allow_loopback": loopback,
        "control_port": host.first_port,
        "peer_port": host.first_port + 1,
        "metrics_port": host.first_port + 2,
        "zookeeper": zookeeper,
        "dir": str(own / "d"),
        "console_dir": str(own),
        "volatile_dir": str(own / "v"),
        "identity": {"kind": "simulated", "file": str(own / "id")},
        "memory_mib": 256,
        "accelerator": "tcg",
        "guest_image": str(image()),
    }
    (own / "agent.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "agents", "--config", str(own / "agent.json")]
    with open(own / "log", "wb") as log:
        return subprocess.Popen(network.command_in(host.namespace, command), cwd=ROOT, stdout=log, stderr=log)


def served_api(address: str, zookeeper: str, directory: Path, namespace: str | None) -> subprocess.Popen[bytes]:
    file = directory / "api.json"
    file.write_text(json.dumps({"listen": [join_address(address, API_PORT)], "zookeeper": zookeeper}))
    command = [sys.executable, "-m", "orchestrator.api", "--config", str(file)]
    with open(directory / "api.log", "wb") as log:
        return subprocess.Popen(network.command_in(namespace, command), cwd=ROOT, stdout=log, stderr=log)


# --- what happens, in a process of its own that lives in one of the namespaces ----------------------------------------


async def moved(zookeeper: str, api: str, metrics: Sequence[str]) -> None:
    """A guest is made through the API on h1 and moved to h2."""
    async with asyncio.timeout(90):
        store = ZooKeeperStore(zookeeper)
        await until(lambda: connected(store))
        client = await asyncio.to_thread(OrchestratorClient, join_address(api, API_PORT))
        await until(lambda: live(client))
        spec = GuestSpec("web", boot=boot_of(Workload(dirty_mib=1), seed=0))
        guest = (await asyncio.to_thread(client.create_guest, spec, "h1")).uuid
        ledger, agents = Ledger(store), RpcAgents()
        here, there = [await ledger.read(HostRecord, paths.host(name)) for name in ("h1", "h2")]
        assert here is not None
        assert there is not None
        print("registered", here[0].peer_address, there[0].peer_address)
        ref, target = AttemptRef(guest, "abcdef012345", 1), HostRef("h2", there[0].boot_id)
        await store.ensure(paths.migration(ref.migration))
        await store.ensure(paths.epoch())  # its first version is epoch 0
        for path in (paths.requests(ref.migration), paths.acks(ref.migration)):
            await store.ensure(path)
        found = await ledger.read_guest(guest)
        assert found is not None
        opened = handover.open_attempt(found[0], ref.migration, 1, target, epoch=0, writer="test")
        assert isinstance(await store.multi([op_set(paths.guest(guest), opened, found[1])]), Done)
        prepared = await agents.at(there[0].control_address).prepare_destination(
            ref, epoch=0, source_peer=Endpoint.parse(here[0].peer_address), timeout_ms=30_000, multifd_channels=0
        )
        print("stream", prepared.stream)
        order = ConductOrder(ref, 0, prepared, target, MigrationPolicy())
        await agents.at(here[0].control_address).conduct_attempt(order)
        await until(lambda: arrived(ledger, guest, target))
        for address in metrics:
            told = await asyncio.to_thread(read, f"http://{address}/metrics")
            assert "drover_guests" in told
        await asyncio.to_thread(client.stop_guest, "web")
        await store.close()
    print("moved over IPv6")


def read(address: str) -> str:
    with urllib.request.urlopen(address, timeout=5) as answer:
        return answer.read().decode()


async def connected(store: ZooKeeperStore) -> bool:
    with contextlib.suppress(StoreUnavailable):
        await store.start()
        return True
    return False


async def live(client: OrchestratorClient) -> bool:
    with contextlib.suppress(DroverError):
        hosts = await asyncio.to_thread(client.list_hosts)
        return sum(host.state == 1 for host in hosts) == 2
    return False


async def arrived(ledger: Ledger, guest: str, there: HostRef) -> bool:
    found = await ledger.read(GuestRecord, paths.guest(guest))
    assert found is not None
    assert found[0].phase is not Ownership.ABORTED, found[0]
    return found[0].phase is Ownership.IDLE and found[0].owner == there


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    while not await true():  # noqa: ASYNC110
        await asyncio.sleep(0.05)


# --- the tests --------------------------------------------------------------------------------------------------------


def run(directory: Path, hosts: Sequence[Host], ledger: str, *, loopback: bool) -> None:
    namespace = hosts[0].namespace
    zookeeper = ZooKeeperServer(directory / "zk", ledger, network.command_in(namespace, []) if namespace else ())
    running: list[subprocess.Popen[bytes]] = []
    try:
        zookeeper.start()
        running += [started(host, zookeeper.hosts, directory, loopback=loopback) for host in hosts]
        running.append(served_api(ledger, zookeeper.hosts, directory, namespace))
        metrics = [join_address(host.address, host.first_port + 2) for host in hosts]
        program = [sys.executable, __file__, zookeeper.hosts, ledger, *metrics]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            network.command_in(namespace, program),
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        print(done.stdout, done.stderr)
        for log in sorted(directory.glob("**/log")):
            print(log, log.read_text(errors="replace")[-3000:])
        assert done.returncode == 0
        assert "moved over IPv6" in done.stdout
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(20)
        end_vmms(directory)
        zookeeper.kill()


def end_vmms(directory: Path) -> None:
    for note in directory.glob("*/d/guests/*/*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            os.kill(int(json.loads(note.read_bytes())["pid"]), 9)


@pytest.fixture
def directory() -> Iterator[Path]:
    path = short_directory()
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_a_guest_moves_over_the_loopback_address_with_and_without_brackets(directory: Path) -> None:
    run(directory, (Host("h1", "::1", 7801), Host("h2", "[::1]", 7811)), "::1", loopback=True)


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    mark = uuid.uuid4().hex[:6]
    one, two = f"six-{mark}-a", f"six-{mark}-b"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in (one, two):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", f"s{mark}a", "netns", one, "type", "veth", "peer", "name", f"s{mark}b", "netns", two)
        for name, end, address in ((one, f"s{mark}a", "fd00:d0::1"), (two, f"s{mark}b", "fd00:d0::2")):
            ip("-n", name, "addr", "add", f"{address}/64", "dev", end, "nodad")
            ip("-n", name, "link", "set", end, "up")
        yield one, two
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no IPv6 namespaces here: {error.stderr.decode()}")
    finally:
        for name in (one, two):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_a_guest_moves_between_two_hosts_that_have_ipv6_only(directory: Path, namespaces: tuple[str, str]) -> None:
    one, two = namespaces
    hosts = (Host("h1", "fd00:d0::1", 7801, one), Host("h2", "[fd00:d0::2]", 7801, two))
    run(directory, hosts, "fd00:d0::1", loopback=False)


if __name__ == "__main__":
    asyncio.run(moved(sys.argv[1], sys.argv[2], sys.argv[3:]))
