"""Nothing goes wrong: the guest moves with what it has, in one attempt."""

from __future__ import annotations

import pytest

from orchestrator.core.handover import Ownership
from tests.integration.handover.scene import Scene, device

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]


@pytest.mark.parametrize("devices", [0, 1, 3])
def test_a_guest_moves_in_one_attempt(scene: Scene, devices: int) -> None:
    guest = scene.guest(*(device(f"dev{n}") for n in range(devices)))
    over = scene.succeeded(scene.migrate(guest, scene.there))
    assert [(report.attempt, report.outcome) for report in over.attempts] == [(1, "COMMITTED")]
    record = scene.record(guest)
    assert (record.phase, record.owner.host, record.inc) == (Ownership.IDLE, scene.there, over.attempts[0].inc)
    assert [entry.device for entry in over.attempts[0].acks] == [f"dev{n}" for n in range(devices)]


def test_a_guest_moves_there_and_back_and_on(scene: Scene) -> None:
    """Several migrations in a row: each leaves nothing behind that the next could trip over."""
    guest = scene.guest(device())
    for destination in (scene.there, scene.here, scene.there, scene.third):
        scene.succeeded(scene.migrate(guest, destination))
        assert scene.record(guest).owner.host == destination


@pytest.mark.parametrize("devices", [0, 1])
def test_a_paused_guest_arrives_paused(scene: Scene, devices: int) -> None:
    guest = scene.guest(*(device(f"dev{n}") for n in range(devices)))
    scene.client.pause_guest(guest.name)
    over = scene.succeeded(scene.migrate(guest, scene.there))
    assert len(over.attempts) == 1
    assert scene.record(guest).owner.host == scene.there
    assert scene.beats(guest, scene.there) == 0
