"""An agent without a free descriptor keeps what it has: its guests are not declared crashed, and it goes on later."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.core.handover import Ownership
from tests.integration.handover.scene import Born, Scene, device

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]


@contextlib.contextmanager
def no_descriptor_left(pid: int) -> Iterator[None]:
    """Whatever the process opens from here on fails with EMFILE."""
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    assert limits[0] == limits[1], "an agent takes as many as it may have"
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def alive(scene: Scene, guest: Born) -> list[int]:
    return [vmm.pid for vmm in scene.vmms(guest) if Path(f"/proc/{vmm.pid}").exists()]


def test_guests_outlive_an_agent_without_a_free_descriptor(scene: Scene) -> None:
    plain, with_device = scene.guest(), scene.guest(device())
    guests = (plain, with_device)
    before = {guest.name: alive(scene, guest) for guest in guests}
    agent = scene.agent(scene.here)
    with no_descriptor_left(agent.pid):
        for _ in range(4):  # each wish makes the keeper look
            for guest in guests:
                with contextlib.suppress(Exception):
                    scene.client.pause_guest(guest.name)
                with contextlib.suppress(Exception):
                    scene.client.resume_guest(guest.name)
        scene.hold_on(6)  # one round of looks that nobody asked for
        for guest in guests:
            assert scene.record(guest).phase is Ownership.IDLE
            assert alive(scene, guest) == before[guest.name]
    assert scene.agent(scene.here) == agent, "the agent itself lived on"
    for guest in guests:
        scene.succeeded(scene.migrate(guest, scene.there))
