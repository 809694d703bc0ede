"""Devices inside the VMM in a whole cluster on QEMU 11.1: its own late ACKs, recovered by everything that we have."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
from collections.abc import Iterator

import pytest

from deploy.lab.devices.scenario_text import late_ack, options_of
from orchestrator.core.errors import AbortReason
from orchestrator.core.records import DeviceSpec, ShimKind
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import types_pb2
from tests.fakes.cluster import Cluster, make_config, missing, running_cluster, short_directory
from tests.fakes.vfio_rig import qemu
from tests.integration.handover import blows
from tests.integration.handover.judge import judge, nothing_is_left
from tests.integration.handover.scene import Observer, Scene
from tests.integration.handover.scene import device as companion

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]
LATE = AbortReason.LATE_SWITCHOVER_ACK


def inside(name: str, scenario: str = "") -> DeviceSpec:
    """A device inside the VMM. `scenario` as in docs/scenario.md."""
    return DeviceSpec(name, ShimKind.VFIO, options=options_of(scenario))


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Cluster, OrchestratorClient, Observer]]:
    if lacking := missing():
        pytest.skip(lacking)
    binary = qemu("11.1")
    with contextlib.ExitStack() as stack:
        directory = short_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        cluster = stack.enter_context(running_cluster(make_config(directory, hosts=3, chaos=True, qemu=binary)))
        client = stack.enter_context(OrchestratorClient(cluster.api))
        observer = stack.enter_context(contextlib.closing(Observer(cluster)))
        yield cluster, client, observer


@pytest.fixture
def scene(running: tuple[Cluster, OrchestratorClient, Observer], request: pytest.FixtureRequest) -> Iterator[Scene]:
    """Judged after the test by what its guests themselves said: memory, devices, never twice."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower()).strip("-")
    made = Scene(*running, f"{name[:40].strip('-')}-{os.urandom(2).hex()}")
    yield made
    made.agents_are_back()
    for verdict in judge(made, made.guests):
        print(f"{verdict.guest} stopped for {list(verdict.stops_ms)} ms by its own heartbeats")
    made.end_guests(made.guests)
    nothing_is_left(made, made.guests)


def late_names(over: types_pb2.Migration) -> list[tuple[str, ...]]:
    *aborted, last = over.attempts
    assert last.outcome == "COMMITTED"
    assert {report.reason for report in aborted} <= {LATE}, over.attempts
    return [tuple(report.devices) for report in aborted]


@pytest.mark.parametrize("times", [1, 3])
def test_late_acks_inside_qemu_are_recovered(scene: Scene, times: int) -> None:
    late = f"asks: [{{at: freeze, times: {times}, bytes: 4096}}]"
    guest = scene.guest(inside("nic", late), inside("gpu"))
    over = scene.succeeded(scene.migrate(guest, "host-2"))
    assert late_names(over) == [("nic",)] * times
    assert len({report.inc for report in over.attempts}) == times + 1, "each attempt has a destination of its own"
    for report in over.attempts[:-1]:
        events = [entry.event for entry in report.timeline]
        assert "engine_found_late" in events
        assert "device" in events
        assert [(one.name, one.reinits, one.late) for one in report.device_progress] == [
            ("nic", 1, True),
            ("gpu", 0, False),
        ]
    print(f"late ACKs inside QEMU stopped the guest for {[r.blackout_ms for r in over.attempts[:-1]]} ms")


def test_an_injected_late_ack_of_a_device_inside(scene: Scene) -> None:
    guest = scene.guest(inside("nic"), companion("dpu"))
    assert "freeze" in scene.client.instruct_device(guest.name, "nic", late_ack("freeze", 2))
    over = scene.succeeded(scene.migrate(guest, "host-2"))
    assert late_names(over) == [("nic",)] * 2
    back = scene.succeeded(scene.migrate(guest, "host-3"))
    assert late_names(back) == []


def test_attempts_at_a_device_that_is_always_late_are_bounded(scene: Scene) -> None:
    guest = scene.guest(inside("nic", "asks: [{at: freeze, times: always}]"))
    over = scene.ended(scene.migrate(guest, "host-2", max_attempts=3, backoff_initial_ms=50))
    assert (over.failure, over.attempt) == ("ATTEMPTS_EXHAUSTED", 3)
    assert [tuple(report.devices) for report in over.attempts] == [("nic",)] * 3
    assert scene.record(guest).owner.host == "host-1"


def test_the_successor_of_a_killed_agent_keeps_guest_and_devices(scene: Scene) -> None:
    guest = scene.guest(inside("nic", "delays: [{call: load, ms: 2500, times: 1}]"))
    migration = scene.migrate(guest, "host-2")
    scene.reach_phase(migration, "PRECOPY")
    scene.kill_agent("host-1")
    over = scene.succeeded(migration)
    assert over.attempts[0].outcome == "ABORTED"
    assert scene.record(guest).owner.host == "host-2"


def test_a_device_that_lost_its_state_is_no_success(scene: Scene) -> None:
    guest = scene.guest(inside("nic", "faults: [{call: stop_copy}]"))
    over = scene.ended(scene.migrate(guest, "host-2"))
    assert (over.failure, over.attempt) == ("DEVICE_RESET", 1)
    assert "nic" in over.message or over.attempts[0].devices == ["nic"]
    assert scene.record(guest).owner.host == "host-1"
    scene.guests.remove(guest)  # its own complaint about the device is what the judge would find
    scene.end_guests([guest])


SCENARIOS = (
    "",
    "asks: [{at: freeze, times: 2, bytes: 4096}]",
    "asks: [{at: precopy, bytes: 65536}]",
    "delays: [{call: load, ms: 300}]",
    "delays: [{call: stop_copy, ms: 200}]",
)


def some_inside(chance: random.Random) -> list[DeviceSpec]:
    made = [inside(f"in{n}", chance.choice(SCENARIOS)) for n in range(chance.choice([1, 1, 2]))]
    return [*made, companion("dpu", "asks: [{at: freeze}]")] if chance.random() < 0.3 else made


@pytest.mark.timeout(600 + 60 * blows.ROUNDS)
def test_blows_at_any_instant(scene: Scene) -> None:
    """As in the hand-over tests, for guests with devices inside the VMM."""
    blows.some_rounds(scene, blows.ROUNDS // 2, some_inside)
