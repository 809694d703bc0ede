"""A guest that powers itself off, at rest and on its way. It is neither lost nor crashed: it has ended, where it was,
and nobody starts it again."""

from __future__ import annotations

import pytest

from deploy.lab.cluster import console_client
from deploy.lab.workload import Workload
from orchestrator import wire
from orchestrator.core.errors import RefusalReason
from orchestrator.core.handover import Ownership
from tests.integration.handover.scene import Born, Scene, device

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]

SLOW_ACK = "delays: [{call: load, ms: 3000, times: 1}]"
STANDS = "delays: [{call: last_look, ms: 1500, times: 1}]"
"""So long the guest stands still, its device in PRE_COPY_P2P: what it is told then is the first thing that it does."""
LATE = f"{STANDS}\nasks: [{{at: final_query, times: 1}}]"
"""The demand comes after that: nothing is decided as long as the guest is told."""


def power_off(scene: Scene, guest: Born) -> None:
    console_client.send_sync(scene.layout.dir, guest.name, "p", scene.here)


def has_ended(scene: Scene, guest: Born, host: str = "") -> None:
    """And stays so, in peace: its agent does not try again and again to set it going. Then it is stopped for good."""
    host = host or scene.here

    def ended() -> bool:
        now = scene.client.get_guest(guest.name)
        return (wire.word(now, "run_state"), wire.word(now, "ownership"), now.host) == ("ENDED", "IDLE", host)

    scene.reach(ended, "a guest that has ended")
    # The copy of an attempt that was given up ends by itself, a moment later.
    scene.reach(lambda: [vmm.host for vmm in scene.vmms(guest)] == [host], "one VMM, where it ended")
    log = scene.layout.host(host) / "agent.log"
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
    # As long as the API has not reached the new agent, the wish is recorded and no more.
    refused = RefusalReason.GUEST_NOT_RUNNING
    scene.reach(lambda: scene.answer(lambda: scene.client.resume_guest(guest.name)) == refused, "the agent's answer")
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


def test_with_the_first_thing_it_does_at_the_destination(scene: Scene) -> None:
    guest = scene.guest(device("dpu", STANDS))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "PRE_COPY_P2P")
    power_off(scene, guest)
    scene.succeeded(migration)
    has_ended(scene, guest, scene.there)


def test_with_the_first_thing_it_does_after_a_late_ack(scene: Scene) -> None:
    """The abort is written after it has run again: it is not overwritten, and no attempt more is made."""
    guest = scene.guest(device("dpu", LATE))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "PRE_COPY_P2P")
    power_off(scene, guest)
    over = scene.ended(migration)
    assert over.failure == "GUEST_ENDED"
    assert over.attempts[0].reason == "LATE_SWITCHOVER_ACK"
    assert {report.outcome for report in over.attempts} == {"ABORTED"}
    has_ended(scene, guest)


def test_its_end_is_what_lets_it_converge_and_its_agent_hears_of_both_at_once(scene: Scene) -> None:
    """The engine has stopped and parked it by the time that its agent looks: nothing is given away."""
    guest = scene.guest(memory_mib=96, workload=Workload(dirty_mib=48, dirty_pages_per_s=40_000))
    migration = scene.migrate(guest, scene.there, max_bandwidth_mbps=200, precopy_timeout_ms=60_000)
    scene.reach(lambda: scene.client.get_migration(migration).progress.gate_open, "the gate is open")
    scene.hold_on(0.5)
    with scene.frozen(scene.agent(scene.here)):
        power_off(scene, guest)
        scene.hold_on(3.5)  # for QEMU to send the rest, less than the agent's session with the ledger lasts
    over = scene.ended(migration)
    assert (over.failure, {report.outcome for report in over.attempts}) == ("GUEST_ENDED", {"ABORTED"})
    has_ended(scene, guest)
