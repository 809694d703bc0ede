"""Hosts that die among real parts: fenced, or declared dead on somebody's word; their guests start elsewhere once."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator

import pytest

from deploy.lab.cluster import commands, network, processes
from deploy.lab.workload import Workload, boot_of
from orchestrator import wire
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import GuestSpec, OnHostDeath
from orchestrator.rpc.messages import HostDeath
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import types_pb2
from tests.fakes.cluster import Cluster, make_config, missing, running_cluster, short_directory, until
from tests.integration.handover.scene import reach

pytestmark = [
    pytest.mark.integration,
    pytest.mark.zookeeper,
    pytest.mark.qemu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    directory = short_directory()
    try:
        with running_cluster(make_config(directory, hosts=3)) as cluster:
            yield cluster
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[OrchestratorClient]:
    with OrchestratorClient(cluster.api, timeout_s=30) as client:
        yield client


def guest(name: str, *, restart: bool = False) -> GuestSpec:
    wish = OnHostDeath.RESTART if restart else OnHostDeath.LEAVE
    return GuestSpec(name, boot=boot_of(Workload(), ()), on_host_death=wish)


def state(client: OrchestratorClient, host: str) -> str:
    return wire.word(client.get_host(host), "state")


def vmms(cluster: Cluster, host: str) -> set[int]:
    """Pids of the VMMs that run on a host, found among all processes by the host's directory."""
    mark = str(cluster.layout.host(host)) + "/"
    found: set[int] = set()
    for identity in cluster.guests():
        seen = processes.look(identity.pid)  # one that ends just now has no command line any more
        if seen is not None and any(mark in word for word in seen.arguments()):
            found.add(identity.pid)
    return found


def born(client: OrchestratorClient, spec: GuestSpec, host: str) -> types_pb2.Guest:
    """A host whose agent was away a moment ago is live before the API has reached it: asked again with the same id."""
    request_id = f"birth-{secrets.token_hex(8)}"
    return reach(lambda: client.create_guest(spec, host, request_id=request_id), f"the birth of {spec.name}", 60)


def declare(client: OrchestratorClient, host: str, *, on_word: bool = False) -> HostDeath:
    plan = client.declare_host_dead(host)
    assert wire.word(plan, "phase") == "PLANNED"
    return client.declare_host_dead(host, plan.confirmation_token, on_operators_word=on_word, requested_by="the test")


def runs_on(client: OrchestratorClient, name: str) -> str:
    """The host, once the guest runs."""
    seen = client.get_guest(name)
    return seen.host if wire.word(seen, "run_state") == "RUNNING" else ""


def test_an_emptied_host_is_safe_to_power_off_once_its_agent_says_that_no_copy_is_left(
    cluster: Cluster, client: OrchestratorClient
) -> None:
    for name in ("one", "two"):
        born(client, guest(name), "host-3")
    assert len(vmms(cluster, "host-3")) == 2
    job = client.create_evacuation("host-3").evacuation.name
    safe_with: set[int] = set()
    for seen in client.watch_evacuations([job]):
        if seen.safe_to_power_off:
            safe_with |= vmms(cluster, "host-3")
    ended = client.get_evacuation(job)
    assert (wire.word(ended, "phase"), ended.message) == ("SUCCEEDED", "host-3 is empty")
    until(lambda: client.get_evacuation(job).safe_to_power_off, 60)
    assert not safe_with, "it was said to be safe while a copy was left"
    assert not vmms(cluster, "host-3")
    for name in ("one", "two"):
        client.stop_guest(name)
    client.uncordon_host("host-3")


@pytest.mark.rule("H11")
def test_a_host_without_power_is_fenced_and_its_guest_starts_elsewhere_once(
    cluster: Cluster, client: OrchestratorClient
) -> None:
    web = born(client, guest("web", restart=True), "host-1")
    born(client, guest("db"), "host-1")
    with pytest.raises(DroverError) as caught:
        client.declare_host_dead("host-1")
    assert caught.value.reason is RefusalReason.HOST_ALIVE
    commands.power_cycle(cluster.dir, "host-1", off=True)
    until(lambda: state(client, "host-1") == "SILENT", 60)
    plan = client.declare_host_dead("host-1")
    assert [(fate.guest, fate.fate) for fate in plan.guests] == [("db", "LOST"), ("web", "RESTARTED")]
    assert plan.fencer == "lab"

    done = declare(client, "host-1")
    assert (wire.word(done, "phase"), done.crashed, done.fencer) == ("DONE", 2, "lab")
    took_s = until(lambda: runs_on(client, "web") in ("host-2", "host-3"), 60)
    print(f"web runs elsewhere {took_s:.2f} s after the declaration was done")
    assert client.get_guest("web").uuid != web.uuid
    assert len(cluster.guests()) == 1, "one VMM, and none on the dead host"
    assert state(client, "host-1") == "DEAD"
    assert wire.word(client.get_guest("db"), "ownership") == "CRASHED"
    client.stop_guest("db")
    born(client, guest("db"), "host-2")

    assert commands.power_on(cluster.dir, "host-1"), "it boots again and registers as another power cycle"
    until(lambda: state(client, "host-1") == "LIVE", 60)
    assert len(cluster.guests()) == 2
    for name in ("web", "db"):
        client.stop_guest(name)


@pytest.mark.rule("H11")
def test_a_host_that_was_only_cut_off_ends_its_copies_when_it_is_back(
    cluster: Cluster, client: OrchestratorClient
) -> None:
    """On the operator's word, and it was wrong: two copies run until the agent reads the ledger again."""
    born(client, guest("shop", restart=True), "host-2")
    (old,) = vmms(cluster, "host-2")
    namespace = next(place.namespace for place in cluster.places.hosts if place.name == "host-2")
    if namespace is None:
        pytest.skip("needs network namespaces to cut a host off")
    network.set_link(namespace, up=False)
    try:
        until(lambda: state(client, "host-2") == "SILENT", 60)
        done = declare(client, "host-2", on_word=True)
        assert (wire.word(done, "phase"), done.on_operators_word) == ("DONE", True)
        assert "the test at " in done.requested_by
        until(lambda: runs_on(client, "shop") in ("host-1", "host-3"), 60)
        assert vmms(cluster, "host-2") == {old}, "nobody could tell it to end"
    finally:
        network.set_link(namespace, up=True)
    took_s = until(lambda: not vmms(cluster, "host-2"), 60)
    print(f"the old copy ended {took_s:.2f} s after the cable was back")
    until(lambda: runs_on(client, "shop") in ("host-1", "host-3"), 60, "the new copy runs on")
    assert state(client, "host-2") == "DEAD", "before it has booted again it takes nothing on"
    with pytest.raises(DroverError) as caught:
        client.create_guest(guest("other"), "host-2")
    print(caught.value)
    assert commands.power_cycle(cluster.dir, "host-2")
    until(lambda: state(client, "host-2") == "LIVE", 60)
    born(client, guest("other"), "host-2")
