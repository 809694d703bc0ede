"""A Linux guest on a bridge, in a whole cluster: a peer talks with it over moves and deaths, and no tap is left."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.lab.cluster import network, parts
from deploy.lab.cluster.network import command_in
from deploy.lab.cluster.teardown import noted_processes
from deploy.lab.peer.client import Peer
from deploy.lab.workload import LINUX_INITRD, LinuxWorkload, linux_address, linux_boot_of
from orchestrator import wire
from orchestrator.core.records import GuestSpec, NicSpec
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.cluster import Cluster, kill, make_config, running_cluster, short_directory

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(600)]

GUEST = "linux"
BOOT_S = 180.0


def until(what: str, question: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    config = make_config(short_directory(), hosts=2)
    images, script = parts.linux_guest(config.layout)
    if why := network.obstacle():
        pytest.skip(f"no network namespaces: {why}")
    made = subprocess.run([script, str(images)], capture_output=True, text=True, timeout=400, check=False)
    if not (Path(images) / LINUX_INITRD).is_file():
        pytest.skip(made.stderr.strip())
    with running_cluster(config) as running:
        yield running


def taps_on(cluster: Cluster, host: str) -> list[str]:
    """Names of the taps of guests on a host, whoever has them open."""
    place = next(place for place in cluster.places.hosts if place.name == host)
    command = command_in(place.namespace, ["ip", "-json", "link", "show"])
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
    return sorted(link["ifname"] for link in json.loads(told) if link.get("ifalias", "").startswith("drover "))


def moved(client: OrchestratorClient, destination: str) -> None:
    name = client.create_migration(GUEST, destination).name
    phases: list[str] = []

    def over() -> bool:
        phases.append(wire.word(client.get_migration(name), "phase"))
        return phases[-1] in ("SUCCEEDED", "FAILED", "CANCELLED")

    until("the migration is over", over, 120)
    assert phases[-1] == "SUCCEEDED"


def answered_again(peer: Peer, since_ns: int) -> None:
    """Both ways, after that instant, on the connection of before."""

    def both() -> bool:
        seen = peer.outage(GUEST, since_ns, time.monotonic_ns())
        return seen.udp_ms is not None and seen.tcp_ms is not None

    until("it answers both ways", both, 60)
    seen = peer.outage(GUEST, since_ns, time.monotonic_ns())
    assert (seen.wrong, seen.breaks) == (0, 0)


def test_a_connection_outlives_moves_and_agents_and_no_tap_is_left(cluster: Cluster) -> None:
    boot = linux_boot_of(LinuxWorkload(mem_mib=4), 0)
    spec = GuestSpec(GUEST, 128, machine="q35", boot=boot, nics=(NicSpec("eth0", "lab"),))
    with OrchestratorClient(cluster.api, 30) as client, Peer(cluster.places.management_namespace) as peer:
        uuid = client.create_guest(spec, "host-1").uuid
        peer.watch(GUEST, linux_address(uuid))
        peer.await_answers(GUEST, BOOT_S)
        assert len(taps_on(cluster, "host-1")) == 1

        # A move: the connection goes on, the tap is at the other host now.
        began_ns = time.monotonic_ns()
        moved(client, "host-2")
        answered_again(peer, began_ns)
        until("the source's tap is gone", lambda: taps_on(cluster, "host-1") == [])
        (tap,) = taps_on(cluster, "host-2")

        # Its agent is killed: the tap of a guest that runs stays, and one that nobody owns goes.
        place = next(place for place in cluster.places.hosts if place.name == "host-2")
        config = json.loads(cluster.layout.agent_json("host-2").read_text())
        left_over(place.namespace or "", Path(config["dir"]))
        assert len(taps_on(cluster, "host-2")) == 2
        began_ns = time.monotonic_ns()
        cluster.started_again("agent-host-2", cluster.kill("agent-host-2"))
        until("the tap of nobody is gone", lambda: taps_on(cluster, "host-2") == [tap])
        answered_again(peer, began_ns)

        # Back again, by the agent that adopted it.
        began_ns = time.monotonic_ns()
        moved(client, "host-1")
        answered_again(peer, began_ns)
        until("host-2 has no tap", lambda: taps_on(cluster, "host-2") == [])

        # Its VMM dies: the tap goes with it.
        (vmm,) = (identity for identity, host in noted_processes(cluster.layout).items() if host == "host-1")
        kill(vmm.pid)
        until("the dead guest's tap is gone", lambda: taps_on(cluster, "host-1") == [])


def left_over(namespace: str, directory: Path) -> None:
    """A tap as an agent leaves it that is killed between the tap and the VMM."""
    from agents.nets.ports import Owner, Port, make_lines
    from agents.nets.taps import root_of

    owner = Owner(root_of(directory), "1f2e3d4c-0000-4000-8000-000000000000", "00112233445566aa")
    lines = make_lines([Port("eth0", "dvleft-0", network.GUEST_BRIDGE, "52:54:00:00:00:01", 1500)], owner)
    subprocess.run(
        command_in(namespace, ["ip", "-batch", "-"]), input="\n".join(lines), text=True, check=True, timeout=10
    )
