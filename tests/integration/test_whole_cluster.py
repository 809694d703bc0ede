"""A cluster of real parts only: agents, API, coordinator, collector, Ray, ZooKeeper. How fast it starts and mends."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest

from deploy.lab.cluster import commands, network, processes, teardown
from deploy.lab.cluster.layout import LocalClusterError
from deploy.lab.workload import Workload, boot_of
from orchestrator.core.records import DeviceSpec, GuestSpec, ShimKind
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.cluster import Cluster, make_config, missing, running_cluster, short_directory, until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.zookeeper,
    pytest.mark.qemu,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    directory = short_directory()
    try:
        begun = time.monotonic()
        with running_cluster(make_config(directory, hosts=3)) as cluster:
            print(f"\nwhole cluster ready after {time.monotonic() - begun:.2f} s")
            yield cluster
            begun = time.monotonic()
        print(f"whole cluster down after {time.monotonic() - begun:.2f} s")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def test_every_part_is_well_when_up_returns(cluster: Cluster) -> None:
    assert {part.name: part.health for part in cluster.status().parts if part.health != "ok"} == {}
    kinds = {part.kind for part in cluster.status().parts}
    assert kinds == {"zookeeper", "ray", "api", "collector", "agent", "coordinator"}


@pytest.mark.parametrize("name", ["agent-host-1", "api", "collector", "coordinator", "zookeeper"])
def test_a_killed_part_is_started_again_at_once_and_serves_soon(cluster: Cluster, name: str) -> None:
    killed_at, old = time.time(), cluster.kill(name)
    serves_s = cluster.came_back(name, old, 40)
    started_s = cluster.started_again(name, old) - killed_at
    print(f"{name} killed: started again after {started_s:.2f} s, serves after {serves_s:.2f} s")
    assert started_s < 1
    until(lambda: cluster.status().healthy, 60)


def test_a_host_that_lost_power_comes_back_as_another(cluster: Cluster) -> None:
    before = cluster.layout.power_cycle("host-2").read_text()
    begun = time.monotonic()
    assert commands.power_cycle(cluster.dir, "host-2")
    print(f"host-2 serves {time.monotonic() - begun:.2f} s after its power cycle")
    assert cluster.layout.power_cycle("host-2").read_text() != before
    until(lambda: cluster.status().healthy, 60)


def test_all_of_ray_killed(cluster: Cluster) -> None:
    driver, head = cluster.part("coordinator").pid, cluster.kill("ray")
    assert driver
    took_s = cluster.came_back("ray", head, 60)
    took_s += cluster.came_back("coordinator", driver, 60)
    print(f"Ray killed: the coordinator leads again after {took_s:.2f} s")


def test_guests_outlive_agent_and_supervisor_and_end_with_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the other cluster and without namespaces, where marks are all that tells whose a process is."""
    monkeypatch.setenv(network.NO_NAMESPACES_VARIABLE, "1")
    directory = short_directory()
    try:
        with running_cluster(make_config(directory, hosts=2)) as other:
            assert other.status().healthy
            device = DeviceSpec("dpu", ShimKind.COMPANION, initial_bytes=65_536)
            with OrchestratorClient(other.api, timeout_s=30) as client:
                client.create_guest(GuestSpec("web", boot=boot_of(Workload(), (device,)), devices=(device,)), "host-1")
            processes_of_guest = set(teardown.noted_processes(other.layout))
            assert len(other.guests()) == 1
            assert len(processes_of_guest) == 2
            other.came_back("agent-host-1", other.kill("agent-host-1"), 40)
            assert set(teardown.noted_processes(other.layout)) == processes_of_guest
            other.kill_supervisor()
            assert all(map(processes.is_alive, processes_of_guest))
            with pytest.raises(LocalClusterError, match=r"1 of its guests still runs: "):
                commands.up(other.config)
            assert all(map(processes.is_alive, processes_of_guest))
            assert commands.down(directory) == []
            assert not any(map(processes.is_alive, processes_of_guest))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
