"""A guest that dirties its memory faster than it can be sent: policy decides what happens when the time is over."""

from __future__ import annotations

import pytest

from deploy.lab.workload import Workload
from orchestrator import wire
from orchestrator.core.errors import AbortReason, FailureReason
from tests.integration.handover.scene import Scene, device

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]

BUSY = Workload(dirty_mib=8, dirty_pages_per_s=2000)
"""8 MiB/s, against 3 MiB/s of bandwidth."""
NARROW = {"max_bandwidth_mbps": 24, "downtime_limit_ms": 50, "precopy_timeout_ms": 3000}


@pytest.mark.parametrize("devices", [0, 1])
def test_abort(scene: Scene, devices: int) -> None:
    """It stays and runs on, and no attempt follows that could only end the same way."""
    guest = scene.guest(*[device()][:devices], workload=BUSY)
    over = scene.ended(scene.migrate(guest, scene.there, **NARROW))
    assert (wire.word(over, "phase"), over.failure) == ("FAILED", FailureReason.NOT_CONVERGING)
    assert [report.reason for report in over.attempts] == [AbortReason.NOT_CONVERGING]
    assert scene.record(guest).owner.host == scene.here
    assert scene.longest_stop_ms(guest) < 1000


@pytest.mark.parametrize("devices", [0, 1])
def test_suspend(scene: Scene, devices: int) -> None:
    """It is stopped so that the rest can be sent, and runs on at the destination: nobody wished it to be paused."""
    guest = scene.guest(*[device()][:devices], workload=BUSY)
    over = scene.succeeded(scene.migrate(guest, scene.there, on_timeout="suspend", **NARROW))
    assert [report.outcome for report in over.attempts] == ["COMMITTED"]
    assert scene.want_run(guest)
    assert scene.record(guest).owner.host == scene.there
    print(f"stopped for {scene.longest_stop_ms(guest):.0f} ms so that the rest could be sent")


def test_a_busy_guest_moves_when_the_link_is_wide_enough(scene: Scene) -> None:
    guest = scene.guest(device(), workload=BUSY)
    scene.succeeded(scene.migrate(guest, scene.there))
