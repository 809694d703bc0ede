"""The control plane of a real cluster goes on when one of its parts is stopped or one record cannot be read."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from deploy.lab.cluster import processes, teardown
from orchestrator import wire
from orchestrator.core.records import GuestSpec
from orchestrator.ledger import paths
from orchestrator.ledger.store import Create, Delete, Done
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import orchestrator_pb2 as pb
from tests.fakes.cluster import Cluster, make_config, missing, running_cluster, short_directory, until
from tests.integration.handover.scene import Observer

pytestmark = [
    pytest.mark.integration,
    pytest.mark.zookeeper,
    pytest.mark.qemu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
]

GUESTS = 6
JOB = "host-3-fromthefuture"


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
    with OrchestratorClient(cluster.api, timeout_s=60) as client:
        for number in range(GUESTS):
            client.create_guest(GuestSpec(f"g{number}", memory_mib=32), "host-1")
        yield client


def workers(cluster: Cluster) -> list[processes.Identity]:
    return [one for one in teardown.find_ray(cluster.layout) if "MigrationWorker" in " ".join(command_of(one))]


def command_of(identity: processes.Identity) -> list[str]:
    return next((seen.arguments() for seen in processes.scan() if seen.identity == identity), [])


def all_over(client: OrchestratorClient, names: list[str]) -> bool:
    return all(client.get_migration(name).end_time.seconds for name in names)


def test_a_record_that_cannot_be_read_stops_nobody_else(cluster: Cluster, client: OrchestratorClient) -> None:
    with closing(Observer(cluster)) as observer:
        job = {"id": JOB, "host": "host-3", "policy": {"on_timeout": "ask_the_future"}}
        ops = [
            Create(paths.evacuation(JOB), json.dumps(job).encode()),
            Create(paths.evacuation_state(JOB), b'{"phase": "LEVITATING"}'),
            Create(paths.active_evacuation(JOB), b'"host-3"'),
        ]
        observer.run(observer.store.ensure(paths.shard(paths.evacuation(JOB))))
        assert isinstance(observer.run(observer.store.multi(ops)), Done)
        until(lambda: [e.resource for e in client.get_cluster_health().quarantined] == [f"evacuations/{JOB}"], 60)
        left: list[pb.Unreadable] = []
        assert not client.list_evacuations(unreadable=left)
        assert [(each.name, "LEVITATING" in each.reason or "phase" in each.reason) for each in left] == [(JOB, True)]
        health = next(part.health for part in cluster.status().parts if part.name == "coordinator")
        assert f"1 quarantined (`drover health`), evacuations/{JOB}" in health
        assert not cluster.status().healthy
        assert client.get_cluster_health().leader
        made = client.create_migration("g0", "host-2")
        until(lambda: all_over(client, [made.name]), 90)
        assert wire.word(client.get_migration(made.name), "phase") == "SUCCEEDED"
        ends = [Delete(paths.evacuation_state(JOB), 0), Delete(paths.evacuation(JOB), 0)]
        assert isinstance(observer.run(observer.store.multi(ends)), Done)


def test_a_worker_that_is_stopped_is_replaced_and_every_migration_ends(
    cluster: Cluster, client: OrchestratorClient
) -> None:
    until(lambda: len(workers(cluster)) == 2, 60)
    before = workers(cluster)
    processes.send(before[0], signal.SIGSTOP)
    stopped_at = time.monotonic()
    made = [client.create_migration(f"g{number}", "host-2").name for number in range(1, GUESTS)]
    until(lambda: before[0] not in workers(cluster), 60)
    print(f"the stopped worker was ended after {time.monotonic() - stopped_at:.1f} s")
    until(lambda: all_over(client, made), 120)
    print(f"all migrations were over after {time.monotonic() - stopped_at:.1f} s")
    assert {wire.word(client.get_migration(name), "phase") for name in made} == {"SUCCEEDED"}
