"""Hosts that run their guests by libvirt, in a cluster of real agents. Guests judge their own moves.

The daemons come up in the hosts' own network namespaces while the cluster starts. With DROVER_LONG=1 (`make libvirt`);
what decides of the engine alone is in tests/contract/test_engine_libvirt.py, which `make test` runs in its short form.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lab.cluster.network import NAMESPACES, obstacle
from deploy.lab.libvirt_hosts import Host, NoLibvirt, environment, tree
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import types_pb2
from tests.fakes.cluster import Cluster, make_config, missing, running_cluster, short_directory
from tests.integration.handover import disks
from tests.integration.handover.judge import judge, nothing_is_left
from tests.integration.handover.scene import Observer, Scene, device, reach

pytestmark = [
    pytest.mark.integration,
    pytest.mark.qemu,
    pytest.mark.zookeeper,
    pytest.mark.long,
    pytest.mark.timeout(400),
    pytest.mark.skipif("DROVER_LONG" not in os.environ, reason="a cluster of its own: `make libvirt`, DROVER_LONG=1"),
]

BY_LIBVIRT, OTHER = ("host-1", "host-2"), "host-3"
ROOT = Path(__file__).parents[2]
UP_S = 120.0


class Daemons:
    """Of the hosts that run their guests by libvirt; each starts once its host's network is there."""

    def __init__(self, found: Path, directory: Path, namespaces: dict[str, str]) -> None:
        self.of = {
            host: Host(found, directory / host, number, namespaces[host]) for number, host in enumerate(BY_LIBVIRT, 1)
        }
        self._namespaces = namespaces
        self._starting = threading.Thread(target=self._start, daemon=True)
        self.failed: Exception | None = None

    def begin(self) -> None:
        self._starting.start()

    def _start(self) -> None:
        until = time.monotonic() + UP_S
        try:
            for host, daemon in self.of.items():
                while not (NAMESPACES / self._namespaces[host]).exists():
                    if time.monotonic() > until:
                        raise NoLibvirt(f"{host} has no network after {UP_S:g} s")
                    time.sleep(0.02)
                daemon.start()
        except Exception as error:
            self.failed = error

    def end(self) -> None:
        self._starting.join(UP_S)
        for daemon in self.of.values():
            daemon.kill()


Running = tuple[Cluster, OrchestratorClient, Observer, Daemons]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    if lacking := missing() or obstacle():
        pytest.skip(str(lacking))
    try:
        found = tree(ROOT / "build" / "libvirt")
    except NoLibvirt as error:
        pytest.skip(f"no libvirt: {error}")
    with contextlib.ExitStack() as stack:
        directory = short_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        away = short_directory()
        stack.callback(shutil.rmtree, away, ignore_errors=True)
        sockets = {host: away / host / "run/libvirt/libvirt-sock" for host in BY_LIBVIRT}
        settings = [f"{name}={value}" for name, value in environment(found).items()]
        agent = ["env", *settings, sys.executable, "-m", "agents", "--config", "{config}"]
        config = make_config(directory, hosts=3, libvirt_on=sockets, commands={"agent": agent})
        daemons = Daemons(found, away, {host: config.layout.namespace(int(host[-1])) for host in BY_LIBVIRT})
        stack.callback(daemons.end)
        daemons.begin()
        cluster = stack.enter_context(running_cluster(config))
        assert daemons.failed is None, daemons.failed
        client = stack.enter_context(OrchestratorClient(cluster.api))
        observer = stack.enter_context(contextlib.closing(Observer(cluster)))
        yield cluster, client, observer, daemons


@pytest.fixture
def scene(running: Running, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """Judged after the test by what its guests themselves said: memory, devices, never twice."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower()).strip("-")
    made = Scene(*running[:3], f"{name[:30].strip('-')}-{os.urandom(2).hex()}")
    yield made
    for verdict in judge(made, made.guests):
        print(f"{verdict.guest} stopped for {list(verdict.stops_ms)} ms by its own heartbeats")
    made.end_guests(made.guests)
    nothing_is_left(made, made.guests)


@pytest.fixture
def daemons(running: Running) -> Daemons:
    return running[3]


def outcomes(over: types_pb2.Migration) -> list[tuple[str, str]]:
    return [(report.outcome, report.reason) for report in over.attempts]


def test_a_linux_guest_moves_with_its_shared_disk_and_its_card_and_loses_no_promise(scene: Scene) -> None:
    """Once after a late ACK, which finds everything sent and the image let go, and back. Its taps never stay behind."""
    disks.must_be_here(scene)
    guest = disks.linux_guest(scene, device("late", "asks: [{at: freeze}]"), local=False)
    assert disks.taps(scene, scene.here), "its card is in a network of the host's"
    assert outcomes(scene.succeeded(scene.migrate(guest, scene.there), 180.0)) == [LATE, MOVED]
    print(disks.judge_disks(scene, guest))
    before = disks.promised(scene, guest)
    reach(lambda: disks.promised(scene, guest) > before + 20, "it writes there", 120.0)
    scene.succeeded(scene.migrate(guest, scene.here), 180.0)
    before = disks.promised(scene, guest)
    reach(lambda: disks.promised(scene, guest) > before + 20, "it writes here again", 120.0)
    print(disks.judge_disks(scene, guest))
    with pytest.raises(DroverError) as refused:
        disks.linux_guest(scene, local=True, shared=False)
    assert refused.value.reason is RefusalReason.FEATURE_NOT_AVAILABLE
    assert "disk root in the local pool fast" in refused.value.message


NEVER_ACKED = "faults: [{call: ack, times: always}]"
LATE = ("ABORTED", "LATE_SWITCHOVER_ACK")
MOVED = ("COMMITTED", "")


def test_a_guest_is_late_once_and_moves_then(scene: Scene) -> None:
    """The late ACK is found when libvirt has sealed the guest, which runs on all the same; then it moves, and back."""
    host = scene.client.get_host(scene.here)
    assert host.engine.startswith("libvirt ")
    assert any("no check before the last pass" in limit for limit in host.engine_limits)
    guest = scene.guest(device("late", "asks: [{at: freeze}]"))
    assert outcomes(scene.succeeded(scene.migrate(guest, scene.there), 120.0)) == [LATE, MOVED]
    with pytest.raises(DroverError) as refused:
        scene.client.create_migration(guest.name, OTHER)
    assert refused.value.reason is RefusalReason.MACHINE_TYPE_MISMATCH
    assert "one engine only" in refused.value.message


def test_a_guest_that_is_suspended_with_an_ack_pending_is_not_late(scene: Scene) -> None:
    """The founding case: `virsh migrate --timeout` stops the guest while a device still owes its ACK."""
    guest = scene.guest(device("dpu", NEVER_ACKED))
    order = scene.migrate(guest, scene.there, precopy_timeout_ms=1000, on_timeout="suspend")
    assert outcomes(scene.succeeded(order, 120.0)) == [MOVED]
    assert scene.want_run(guest)
    reach(lambda: scene.beats(guest, scene.there) > 0, "it runs there")


@pytest.mark.parametrize("which", ["here", "there"])
def test_an_agent_is_killed_around_the_commit(scene: Scene, which: str) -> None:
    guest = scene.guest(device("dpu"))
    for _ in range(2):
        there = next(host for host in BY_LIBVIRT if host != scene.record(guest).owner.host)
        here = next(host for host in BY_LIBVIRT if host != there)
        order = scene.migrate(guest, there)
        scene.reach_phase(order, "SWITCHOVER", "COMMITTED", "FINALIZING")
        scene.kill_agent(here if which == "here" else there)
        over = scene.ended(order, 180.0)
        print(outcomes(over))
        scene.agents_are_back()
        reach(lambda: scene.beats(guest) > 0, "it runs")


@pytest.mark.parametrize("which", ["here", "there"])
def test_a_daemon_is_killed_around_the_commit(scene: Scene, daemons: Daemons, which: str) -> None:
    guest = scene.guest(device("dpu"))
    order = scene.migrate(guest, scene.there)
    scene.reach_phase(order, "SWITCHOVER", "COMMITTED", "FINALIZING")
    daemon = daemons.of[scene.here if which == "here" else scene.there]
    daemon.kill()
    time.sleep(0.5)
    daemon.start()
    print(outcomes(scene.ended(order, 180.0)))
