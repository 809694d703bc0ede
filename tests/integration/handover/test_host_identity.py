"""Other agents claim a host's name: from a copied configuration, and from a cloned disk while the host is silent.

A newcomer once fenced the first: its running guests became CRASHED, their names were free, and the same guest was
started elsewhere: two copies ran.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from deploy.lab.cluster import commands, network, processes
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import HostRecord
from orchestrator.ledger import paths
from tests.fakes.cluster import ROOT, short_directory
from tests.integration.handover.scene import Scene

pytestmark = [
    pytest.mark.integration,
    pytest.mark.zookeeper,
    pytest.mark.qemu,
    pytest.mark.skipif(os.geteuid() != 0, reason="another machine is a namespace, which needs root"),
]


def _sockets(folder: str, names: list[str]) -> list[str]:
    """No copy of a disk has them."""
    return [name for name in names if (Path(folder) / name).is_socket()]


class Newcomer:
    """An agent beside the cluster's, in another host's namespace, with the files of the first where they are copied."""

    def __init__(self, scene: Scene, stack: ExitStack, *, cloned: bool = False) -> None:
        self.directory = short_directory()
        stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        if cloned:
            disk = scene.layout.host(scene.here)
            shutil.copytree(disk, self.directory / "d", ignore=_sockets)
        (self.directory / "id").write_text(f"{uuid.uuid4()}\n{uuid.uuid4()}\n")
        config: dict[str, Any] = json.loads(scene.layout.agent_json(scene.here).read_text())
        places = {place.name: place for place in scene.cluster.places.hosts}
        config |= {
            "address": places[scene.third].address,
            "control_port": 7801,
            "peer_port": 7802,
            "metrics_port": 0,
            "identity": {"kind": "simulated", "file": str(self.directory / "id")},
            "dir": str(self.directory / "d"),
            "volatile_dir": str(self.directory / "v"),
            "console_dir": str(self.directory / "c"),
        }
        for name in ("d", "v", "c"):
            (self.directory / name).mkdir(exist_ok=True)
        (self.directory / "agent.json").write_text(json.dumps(config))
        self._namespace = places[scene.third].namespace

    def run(self) -> tuple[int, str]:
        """Exit status and what it said."""
        command = [sys.executable, "-m", "agents", "--config", str(self.directory / "agent.json")]
        done = subprocess.run(
            network.command_in(self._namespace, command),
            cwd=ROOT, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        print(done.stdout, done.stderr)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def place(scene: Scene, host: str) -> tuple[HostRecord | None, bytes | None, tuple[str, ...]]:
    """Everything that the ledger says of a host's place."""
    live = scene.observer.run(scene.observer.store.read(paths.live(host)))
    fences = scene.observer.run(scene.observer.store.children(paths.fences(host)))
    return scene.observer.read(HostRecord, paths.host(host)), live.data if live else None, fences


@pytest.mark.rule("H11")
def test_a_copied_configuration_gets_nothing(scene: Scene, stack: ExitStack) -> None:
    guests = [scene.guest() for _ in range(2)]
    before = place(scene, scene.here)
    code, said = Newcomer(scene, stack).run()
    assert code == 2
    assert f"this agent may not be {scene.here}: it belongs to another installation" in said
    assert place(scene, scene.here) == before
    for guest in guests:
        assert scene.record(guest).phase is Ownership.IDLE
        assert [vmm.host for vmm in scene.vmms(guest)] == [scene.here]
    with pytest.raises(DroverError) as refused:
        scene.client.create_guest(guests[0].spec, scene.there, request_id=f"twice-{guests[0].name}")
    assert refused.value.reason is RefusalReason.ALREADY_EXISTS
    scene.succeeded(scene.migrate(guests[0], scene.there))


@pytest.mark.rule("H11")
def test_a_cloned_disk_gets_nothing_while_its_original_is_silent(scene: Scene, stack: ExitStack) -> None:
    """The clone has the installation, its last claim, and another boot_id, like a host that lost power."""
    guest = scene.guest()
    clone = Newcomer(scene, stack, cloned=True)
    record, _, fences = place(scene, scene.here)
    agent = scene.agent(scene.here)
    namespace = next(each.namespace for each in scene.cluster.places.hosts if each.name == scene.here)
    ledger = scene.cluster.zookeeper.rpartition(":")[0]
    subprocess.run(network.command_in(namespace, ["ip", "route", "add", "blackhole", ledger]), check=True)
    try:
        scene.reach(lambda: place(scene, scene.here)[1] is None, "the session of the first lapses")
        code, said = clone.run()
    finally:
        subprocess.run(network.command_in(namespace, ["ip", "route", "del", "blackhole", ledger]), check=True)
    assert code == 2
    assert f"this agent may not be {scene.here}: it was registered by another machine" in said
    assert place(scene, scene.here)[::2] == (record, fences)
    assert processes.is_alive(agent)
    scene.reach(lambda: place(scene, scene.here)[1] is not None, "the first has its session again")
    assert scene.record(guest).phase is Ownership.IDLE
    scene.succeeded(scene.migrate(guest, scene.there))


def test_a_restarted_agent_waits_for_no_session(scene: Scene) -> None:
    """Its lock proves that its predecessor is dead, whose session lasts some seconds longer."""
    guest = scene.guest()
    before = place(scene, scene.here)[0]
    old = scene.agent(scene.here)
    os.kill(old.pid, signal.SIGKILL)

    def registered() -> HostRecord | None:
        record = place(scene, scene.here)[0]
        return record if record is not None and before is not None and record.identity != before.identity else None

    after = scene.reach(registered, "its successor is registered")
    assert before is not None
    assert after.identity is not None
    assert before.identity is not None
    assert (after.identity.installation, after.identity.machine) == (
        before.identity.installation,
        before.identity.machine,
    )
    scene.reach(lambda: scene.agent(scene.here) != old, "another process")
    log = (scene.layout.host(scene.here) / "agent.log").read_text()
    assert "waiting for it to lapse" not in log[log.rfind("agent serves", 0, log.rfind("agent serves")) :]
    scene.succeeded(scene.migrate(guest, scene.there))


@pytest.mark.rule("H11")
def test_an_agent_whose_directory_lies_on_another_file_system_goes_on(scene: Scene) -> None:
    """Its lock file is another one there. It was refused until the host restarted, and its guests had no agent."""
    guest = scene.guest()
    before, _, certified = place(scene, scene.here)
    assert before is not None
    assert before.identity is not None
    lock = scene.layout.host(scene.here) / "agent.lock"
    shutil.copy2(lock, lock.with_suffix(".new"))
    lock.with_suffix(".new").replace(lock)
    scene.kill_agent(scene.here)

    def registered() -> HostRecord | None:
        record = place(scene, scene.here)[0]
        return record if record is not None and record.identity != before.identity else None

    after = scene.reach(registered, "its successor is registered", 60)
    assert after.identity is not None
    assert (after.boot_id, after.identity.installation) == (before.boot_id, before.identity.installation)
    assert after.identity.lock != before.identity.lock
    assert place(scene, scene.here)[2] == certified, "no power cycle was certified to be over"
    scene.agents_are_back()
    assert [vmm.host for vmm in scene.vmms(guest)] == [scene.here]
    scene.succeeded(scene.migrate(guest, scene.there))


def test_a_host_that_lost_power_proves_it_itself(scene: Scene) -> None:
    guest = scene.guest()
    guest.may_crash = True
    before = place(scene, scene.here)[0]
    assert before is not None
    assert commands.power_cycle(scene.cluster.dir, scene.here)
    scene.reach(lambda: before.boot_id in place(scene, scene.here)[2], "the certificate", 60)
    scene.reach(lambda: scene.record(guest).phase is Ownership.CRASHED, "the guest is known to be over", 60)
    assert scene.record(guest).owner == HostRef(scene.here, before.boot_id)
