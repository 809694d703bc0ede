"""A guest that powers itself off, at rest and on its way. It is neither lost nor crashed: it has ended, where it was,
and nobody starts it again."""

from __future__ import annotations

import pytest

from deploy.lab.cluster import console_client
from orchestrator import wire
from orchestrator.core.errors import RefusalReason
from orchestrator.core.handover import Ownership
from tests.integration.handover.scene import Born, Scene, device

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]

SLOW_ACK = "delays: [{call: load, ms: 3000, times: 1}]"


def power_off(scene: Scene, guest: Born) -> None:
    console_client.send_sync(scene.layout.dir, guest.name, "p")


def has_ended(scene: Scene, guest: Born) -> None:
    """And stays so, in peace: its agent does not try again and again to set it going. Then it is stopped for good."""

    def ended() -> bool:
        now = scene.client.get_guest(guest.name)
        return (wire.word(now, "run_state"), wire.word(now, "ownership"), now.host) == ("ENDED", "IDLE", scene.here)

    scene.reach(ended, "a guest that has ended")
    log = scene.layout.host(scene.here) / "agent.log"
    scene.hold_on(1)
    before = log.read_text().count(f'"guest": "{guest.name}"')
    scene.hold_on(1.5)
    assert log.read_text().count(f'"guest": "{guest.name}"') == before
    assert ended()
    scene.guests.remove(guest)
    scene.end_guests([guest])


def test_at_rest_under_its_agent_and_the_next(scene: Scene) -> None:
    guest = scene.guest()
    power_off(scene, guest)
    scene.reach(lambda: wire.word(scene.client.get_guest(guest.name), "run_state") == "ENDED", "its end")
    scene.kill_agent(scene.here)
    scene.agents_are_back()
    over = scene.ended(scene.migrate(guest, scene.there))
    assert over.failure == "GUEST_ENDED"
    assert scene.answer(lambda: scene.client.resume_guest(guest.name)) == RefusalReason.GUEST_NOT_RUNNING
    has_ended(scene, guest)


def test_in_precopy(scene: Scene) -> None:
    guest = scene.guest(device("dpu", SLOW_ACK))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "PRE_COPY")
    power_off(scene, guest)
    over = scene.ended(migration)
    assert (over.failure, [report.reason for report in over.attempts]) == ("GUEST_ENDED", ["GUEST_ENDED"])
    assert scene.record(guest).phase is Ownership.IDLE
    has_ended(scene, guest)


def test_in_precopy_while_its_agent_is_away(scene: Scene) -> None:
    """The successor finds an attempt without its conductor, of a guest that cannot be set going again."""
    guest = scene.guest(device("dpu", SLOW_ACK))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "PRE_COPY")
    with scene.frozen(scene.agent(scene.here)):
        power_off(scene, guest)
        scene.hold_on(0.3)
        scene.kill_agent(scene.here)
    scene.agents_are_back()
    over = scene.ended(migration)
    assert over.failure == "GUEST_ENDED"
    assert {report.outcome for report in over.attempts} == {"ABORTED"}
    has_ended(scene, guest)
