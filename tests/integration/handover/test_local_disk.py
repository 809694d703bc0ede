"""Guests with a local disk, in a cluster of real agents: moved, asked late, and hit at each step.

Afterwards there is one image that is in use, where the guest is, and nobody writes to any other.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
from pathlib import Path

import pytest

from orchestrator.core.errors import AbortReason
from orchestrator.core.records import DiskFormat, DiskSpec
from protos.drover.v1 import types_pb2
from tests.integration.handover.scene import Born, Scene, device

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]

SIZE = 32 << 20
NEVER_ACKED_AT_FIRST = "faults: [{call: ack, sessions: 1, times: always}]"


def with_disk(scene: Scene, scenario: str | None = "") -> Born:
    image = f"disk-{secrets.token_hex(4)}.qcow2"
    devices = [] if scenario is None else [device("dpu", scenario)]
    return scene.guest(*devices, disks=[DiskSpec("root", "fast", image, size_bytes=SIZE)])


def daemons(scene: Scene, guest: Born) -> list[Path]:
    """Notes of storage daemons."""
    return list(scene.layout.hosts.glob(f"*/guests/{guest.uuid[:16]}/storage.note"))


def hosts_with_image(scene: Scene, guest: Born) -> set[str]:
    name = guest.spec.disks[0].image
    found = scene.layout.hosts.glob(f"*/pools/fast/{name}")
    return {path.relative_to(scene.layout.hosts).parts[0] for path in found}


def moved(scene: Scene, guest: Born, migration: str) -> types_pb2.Migration:
    scene.agents_are_back()
    over = scene.succeeded(migration, 60.0)
    host = scene.record(guest).owner.host
    assert host == scene.there
    scene.reach(lambda: hosts_with_image(scene, guest) == {host}, "one image, where the guest is")
    scene.reach(lambda: not daemons(scene, guest), "the end of the storage daemon")
    return over


def disks_ready(scene: Scene, migration: str) -> list[types_pb2.DiskProgress]:
    """As the samples have them; empty while one of them is not at the destination yet."""
    now = scene.client.get_migration(migration)
    found = list(now.progress.disks)
    return found if all(disk.ready for disk in found) else []


def copied(over: types_pb2.Migration) -> list[str]:
    """How each attempt that came so far brought the disk up to date."""
    return [
        entry.detail.partition(": ")[2]
        for report in over.attempts
        for entry in report.timeline
        if entry.event == "disk_copied"
    ]


def test_there_and_back(scene: Scene) -> None:
    guest = with_disk(scene, None)
    assert copied(moved(scene, guest, scene.migrate(guest, scene.there))) == ["full"]
    scene.here, scene.there = scene.there, scene.here
    moved(scene, guest, scene.migrate(guest, scene.there))


def test_late_acks_copy_nothing_twice(scene: Scene) -> None:
    guest = with_disk(scene, "asks: [{at: freeze, times: 2, bytes: 4096}]")
    over = moved(scene, guest, scene.migrate(guest, scene.there))
    assert [report.reason for report in over.attempts[:-1]] == [AbortReason.LATE_SWITCHOVER_ACK] * 2
    assert copied(over) == ["full", "goes_on", "goes_on"]


def test_the_destination_process_dies_behind_the_drain(scene: Scene) -> None:
    guest = with_disk(scene, "delays: [{call: validate, ms: 3000, times: 1}]")
    migration = scene.migrate(guest, scene.there, switchover_timeout_ms=15_000)
    scene.reach_device(guest, scene.here, "STOP_COPY")
    scene.hold_on(1.0)  # for the drain, which is over before validating begins
    scene.kill_if_alive(scene.incoming(guest))
    over = moved(scene, guest, migration)
    assert copied(over) == ["full", "increment"]


def test_the_daemon_dies_while_the_guest_is_copied(scene: Scene) -> None:
    """A guest that writes nothing does not notice; the next attempt does not believe in what was left."""
    guest = with_disk(scene, NEVER_ACKED_AT_FIRST)
    migration = scene.migrate(guest, scene.there, ack_timeout_ms=5_000)
    (root,) = scene.reach(lambda: disks_ready(scene, migration), "a disk that is copied", 120.0)
    assert (root.name, root.way, root.copied_bytes, root.remaining_bytes) == ("root", "full", SIZE, 0)
    note = json.loads(daemons(scene, guest)[0].read_text())
    os.kill(note["pid"], signal.SIGKILL)
    assert copied(moved(scene, guest, migration)) == ["full", "full"]


@pytest.mark.parametrize("which", ["source", "destination"])
@pytest.mark.parametrize(
    ("scenario", "state"),
    [
        (NEVER_ACKED_AT_FIRST, "PRE_COPY"),
        ("delays: [{call: stop_copy, ms: 1800, times: 1}]", "PRE_COPY_P2P"),
        ("delays: [{call: validate, ms: 1500, times: 1}]", "STOP_COPY"),
    ],
    ids=["precopy", "parked", "last-pass"],
)
def test_an_agent_is_killed(scene: Scene, scenario: str, state: str, which: str) -> None:
    guest = with_disk(scene, scenario)
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, state)
    scene.kill_agent(scene.here if which == "source" else scene.there)
    over = moved(scene, guest, migration)
    print("copied", copied(over))


def test_a_destination_that_is_given_up_keeps_no_image(scene: Scene) -> None:
    guest = with_disk(scene, "faults: [{call: ack, times: always}]")
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "PRE_COPY")
    assert hosts_with_image(scene, guest) == {scene.here, scene.there}
    scene.client.cancel_migration(migration)
    scene.reach(lambda: hosts_with_image(scene, guest) == {scene.here}, "the end of the image that is not needed")
    scene.reach(lambda: not daemons(scene, guest), "the end of the storage daemon")


def several(scene: Scene) -> tuple[Born, dict[Path, bytes]]:
    """Two local disks, the second with a content of its own, a shared one, and one that is only read; and what the
    images that this made here hold."""
    name = secrets.token_hex(4)
    content = os.urandom(1 << 20) + bytes(SIZE - (2 << 20)) + os.urandom(1 << 20)
    fast = {host: scene.layout.host(host) / "pools" / "fast" for host in (scene.here, scene.there)}
    held = {fast[scene.here] / f"data-{name}.raw": content}
    held |= {pool / f"tools-{name}.raw": content[: 1 << 20] for pool in fast.values()}
    for path, data in held.items():
        path.write_bytes(data)
    disks = [
        DiskSpec("root", "fast", f"root-{name}.qcow2", size_bytes=SIZE),
        DiskSpec("data", "fast", f"data-{name}.raw", DiskFormat.RAW, size_bytes=SIZE),
        DiskSpec("all", "shared", f"all-{name}.qcow2", size_bytes=SIZE),
        DiskSpec("tools", "fast", f"tools-{name}.raw", DiskFormat.RAW, read_only=True),
    ]
    return scene.guest(disks=disks), held


def test_several_disks_move_in_one_migration(scene: Scene) -> None:
    guest, held = several(scene)
    over = moved(scene, guest, scene.migrate(guest, scene.there))
    assert copied(over) == ["full", "full"], "of the local ones that are written to, and of no other"
    data = next(path for path in held if path.name.startswith("data"))
    came = scene.layout.host(scene.there) / "pools" / "fast" / data.name
    assert came.read_bytes() == held[data]
    assert not data.exists()
    assert all(path.read_bytes() == kept for path, kept in held.items() if path.name.startswith("tools"))


def test_one_disk_that_cannot_go_keeps_all_of_them_where_they_are(scene: Scene) -> None:
    """The name of its image is taken at the destination."""
    guest, held = several(scene)
    data = next(path for path in held if path.name.startswith("data"))
    taken = scene.layout.host(scene.there) / "pools" / "fast" / data.name
    taken.write_bytes(b"somebody else's")
    beats = scene.beats(guest)
    over = scene.ended(scene.migrate(guest, scene.there, max_attempts=1), 60.0)
    assert over.failure, "it was not moved"
    assert scene.record(guest).owner.host == scene.here
    scene.reach(lambda: scene.beats(guest, scene.here) > beats + 10, "it runs on where it was")
    scene.reach(lambda: hosts_with_image(scene, guest) == {scene.here}, "nothing of the other disk is left there")
    assert taken.read_bytes() == b"somebody else's"
    assert data.read_bytes() == held[data]
    taken.unlink()
    moved(scene, guest, scene.migrate(guest, scene.there))
