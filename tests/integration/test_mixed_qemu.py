"""A cluster in the middle of an upgrade: QEMU 10.0 on one host, 11.1 on the others. Guests judge their own moves."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator

import pytest

from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import DeviceSpec, ShimKind
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import types_pb2
from tests.fakes.cluster import Cluster, make_config, missing, running_cluster, short_directory
from tests.fakes.vfio_rig import qemu
from tests.integration.handover.judge import judge, nothing_is_left
from tests.integration.handover.scene import Observer, Scene, reach
from tests.integration.handover.scene import device as companion

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]

OLD, NEW, OTHER = "host-1", "host-2", "host-3"
COMMON = "pc-i440fx-10.0"
"""Offered by both."""


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Cluster, OrchestratorClient, Observer]]:
    if lacking := missing():
        pytest.skip(lacking)
    old, new = qemu("10.0"), qemu("11.1")
    with contextlib.ExitStack() as stack:
        directory = short_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        config = make_config(directory, hosts=3, qemu=new, qemu_on={OLD: old})
        cluster = stack.enter_context(running_cluster(config))
        client = stack.enter_context(OrchestratorClient(cluster.api))
        observer = stack.enter_context(contextlib.closing(Observer(cluster)))
        yield cluster, client, observer


@pytest.fixture
def scene(running: tuple[Cluster, OrchestratorClient, Observer], request: pytest.FixtureRequest) -> Iterator[Scene]:
    """Judged after the test by what its guests themselves said: memory, devices, never twice."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower()).strip("-")
    made = Scene(*running, f"{name[:40].strip('-')}-{os.urandom(2).hex()}")
    yield made
    made.uncordon()
    for verdict in judge(made, made.guests):
        print(f"{verdict.guest} stopped for {list(verdict.stops_ms)} ms by its own heartbeats")
    made.end_guests(made.guests)
    nothing_is_left(made, made.guests)


def in_one_attempt(over: types_pb2.Migration) -> None:
    assert [report.outcome for report in over.attempts] == ["COMMITTED"], over.attempts


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param((), id="no device"),
        pytest.param((companion("nic"),), id="a companion"),
        pytest.param((DeviceSpec("a", ShimKind.VFIO), DeviceSpec("b", ShimKind.VFIO)), id="two inside the VMM"),
    ],
)
def test_a_machine_that_both_have_moves_there_and_back(scene: Scene, devices: tuple[DeviceSpec, ...]) -> None:
    """To 11.1, on to another 11.1, and back to 10.0: it counts as 10.0 does for this machine type."""
    guest = scene.guest(*devices, host=OLD, machine=COMMON)
    for there in (NEW, OTHER, OLD):
        in_one_attempt(scene.succeeded(scene.migrate(guest, there)))


def test_an_alias_is_what_it_was_at_birth(scene: Scene) -> None:
    guest = scene.guest(host=OLD)
    assert scene.client.get_guest(guest.name).spec.machine == COMMON
    in_one_attempt(scene.succeeded(scene.migrate(guest, NEW)))
    in_one_attempt(scene.succeeded(scene.migrate(guest, OLD)))


def test_what_the_older_engine_does_not_know_is_refused_with_what_would_help(scene: Scene) -> None:
    guest = scene.guest(host=NEW)
    with pytest.raises(DroverError) as refused:
        scene.client.create_migration(guest.name, OLD)
    assert refused.value.reason is RefusalReason.MACHINE_TYPE_MISMATCH
    assert f"can go there once it is started anew as {COMMON}" in refused.value.message
    in_one_attempt(scene.succeeded(scene.migrate(guest, OTHER)))


def test_the_last_old_host_is_emptied(scene: Scene) -> None:
    guests = [scene.guest(host=OLD), scene.guest(companion("nic"), host=OLD, machine=COMMON)]
    job = scene.client.create_evacuation(OLD).evacuation.name
    reach(lambda: scene.client.get_evacuation(job).safe_to_power_off, "the old host is empty", 60.0)
    assert {scene.record(guest).owner.host for guest in guests} <= {NEW, OTHER}
