"""The other files hit instants that somebody thought of; these are drawn (see `blows`)."""

from __future__ import annotations

import pytest

from tests.integration.handover import blows
from tests.integration.handover.scene import Scene

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]


@pytest.mark.timeout(120 * blows.ROUNDS)
def test_blows(scene: Scene) -> None:
    blows.some_rounds(scene, blows.ROUNDS, blows.companions)
