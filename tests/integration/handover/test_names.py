"""The longest names that are allowed, of guests and devices: nothing on a host is bounded by them."""

from __future__ import annotations

import pytest

from orchestrator.core.handover import Ownership
from tests.integration.handover.scene import Scene, device

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]


def test_a_guest_with_a_name_of_63_characters_moves(scene: Scene) -> None:
    scene._prefix = f"{scene._prefix}-".ljust(61, "n")
    guest = scene.guest(device("d" * 63))
    assert len(guest.name) == 63
    scene.succeeded(scene.migrate(guest, scene.there))
    record = scene.record(guest)
    assert (record.phase, record.owner.host) == (Ownership.IDLE, scene.there)
    scene.reach(lambda: scene.beats(guest, scene.there) > 0, "a beat at its new host")


def test_nobody_else_may_reach_a_vmm_or_its_devices(scene: Scene) -> None:
    guest = scene.guest(device())
    (vmm,) = scene.vmms(guest)
    directory = scene.layout.host(scene.here) / "guests" / guest.uuid[:16]
    assert directory.stat().st_mode & 0o077 == 0
    sockets = [path for path in directory.iterdir() if path.is_socket()]
    assert {path.suffix for path in sockets} >= {".qmp", ".oob", ".com1", ".ctl"}
    assert [path.name for path in sockets if path.stat().st_mode & 0o077] == []
    assert vmm.pid
