"""The other files hit instants that somebody thought of; these are drawn (see `blows`)."""

from __future__ import annotations

import pytest

from orchestrator.core.records import DeviceSpec
from tests.integration.handover import blows, disks
from tests.integration.handover.scene import Born, Scene

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]


DISK_ROUNDS = max(1, blows.ROUNDS // 8)


@pytest.mark.timeout(120 * blows.ROUNDS)
def test_blows(scene: Scene) -> None:
    blows.some_rounds(scene, blows.ROUNDS, blows.companions)


@pytest.mark.timeout(240 * DISK_ROUNDS)
def test_blows_on_disks_and_cards(scene: Scene) -> None:
    """A Linux guest with a local and a shared disk and a card: no promised record is lost, no image has two writers,
    and no tap is left."""
    disks.must_be_here(scene)

    def born(scene: Scene, *devices: DeviceSpec) -> Born:
        return disks.linux_guest(scene, *devices)

    blows.some_rounds(scene, DISK_ROUNDS, blows.companions, born=born, also=disks.judge_disks, within_s=2.5)
