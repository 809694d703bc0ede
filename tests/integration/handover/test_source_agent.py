"""The source's agent is killed, at each step of an attempt: its successor conducts nothing that it did not start.

It ends what it finds (H7), so the guest runs on, or is the destination's; it never stays stopped.
"""

from __future__ import annotations

import pytest

from deploy.lab.workload import Workload
from orchestrator import wire
from orchestrator.core.errors import AbortReason, FailureReason
from orchestrator.core.handover import Ownership
from protos.drover.v1 import types_pb2
from tests.integration.handover.scene import Born, Scene, device

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]

STOPPED_MOST_MS = 7_000
"""The default of switchover_timeout_ms and what a busy machine adds, besides what the agent took to come back."""


def went_on(scene: Scene, guest: Born, migration: str) -> types_pb2.Migration:
    """It moved in the end, and was never stopped for longer than its agent was away."""
    scene.agents_are_back()
    over = scene.succeeded(migration)
    assert scene.record(guest).owner.host == scene.there
    stopped_ms = scene.longest_stop_ms(guest)
    print(f"stopped for at most {stopped_ms:.0f} ms")
    assert stopped_ms < STOPPED_MOST_MS + scene.away_ms
    return over


def ended_by_its_successor(over: types_pb2.Migration) -> bool:
    """Where the agent was away for so long that its silence was noticed, attempts made in vain lie in between."""
    first, *between, last = over.attempts
    return (
        first.outcome == "ABORTED"
        and first.reason in (AbortReason.SOURCE_RESTARTED, AbortReason.DESTINATION_LOST)
        and all(one.reason == AbortReason.SOURCE_UNREACHABLE for one in between)
        and last.outcome == "COMMITTED"
    )


@pytest.mark.parametrize("devices", [0, 1])
def test_precopy(scene: Scene, devices: int) -> None:
    guest = scene.guest(*[device("dpu", "faults: [{call: ack, sessions: 1, times: always}]")][:devices])
    migration = scene.migrate(guest, scene.there, max_bandwidth_mbps=0 if devices else 8)
    scene.reach(lambda: scene.record(guest).inc, "an attempt that is bound")
    scene.reach_phase(migration, "PRECOPY")
    if devices:
        scene.reach_device(guest, scene.here, "PRE_COPY")
    scene.kill_agent(scene.here)
    assert ended_by_its_successor(went_on(scene, guest, migration))


def test_parked(scene: Scene) -> None:
    guest = scene.guest(device("dpu", "delays: [{call: stop_copy, ms: 1800, times: 1}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "PRE_COPY_P2P")
    scene.kill_agent(scene.here)
    assert ended_by_its_successor(went_on(scene, guest, migration))


def test_last_pass(scene: Scene) -> None:
    """Everything was sent, or is about to be; the destination has not said that it is loaded."""
    guest = scene.guest(device("dpu", "delays: [{call: validate, ms: 3000, times: 1}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "STOP_COPY")
    scene.kill_agent(scene.here)
    assert ended_by_its_successor(went_on(scene, guest, migration))


def test_submitted(scene: Scene) -> None:
    """Its COMMIT is on its way through a ledger that stands still: it lands, or it does not, and everybody obeys."""
    guest = scene.guest(device("dpu", "delays: [{call: validate, ms: 2000, times: 1}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "STOP_COPY")
    zookeeper = scene.part("zookeeper")
    scene.freeze(zookeeper)
    scene.reach_device(guest, scene.there, "STOP")
    scene.hold_on(0.5)  # for LOADED to arrive and the COMMIT to leave
    scene.kill_agent(scene.here)
    scene.thaw(zookeeper)
    over = went_on(scene, guest, migration)
    assert over.attempts[0].outcome == "COMMITTED" or ended_by_its_successor(over)


def test_committed(scene: Scene) -> None:
    """The destination needs nobody to take over, and the successor destroys the old copy on DONE."""
    guest = scene.guest(device("dpu", "delays: [{call: activate, ms: 1500, times: 1}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach(lambda: scene.record(guest).phase is Ownership.COMMITTED, "COMMITTED")
    scene.kill_agent(scene.here)
    over = went_on(scene, guest, migration)
    assert [report.outcome for report in over.attempts] == ["COMMITTED"]


def test_a_paused_guest_stays_paused_and_its_migration_says_why_it_ends(scene: Scene) -> None:
    """Everything was sent when the agent died, so QEMU moves it again only once it has run (RETRY_NEEDS_RUN)."""
    guest, other = scene.guest(device("dpu", "delays: [{call: validate, ms: 1500, times: 1}]")), scene.guest()
    scene.client.pause_guest(guest.name)
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "STOP_COPY")
    scene.kill_agent(scene.here)
    scene.client.pause_guest(other.name)
    scene.agents_are_back()
    over = scene.ended(migration)
    if wire.word(over, "phase") == "FAILED":
        assert over.failure == FailureReason.RETRY_NEEDS_RUN
        assert scene.record(guest).owner.host == scene.here
        scene.client.resume_guest(guest.name)
        scene.succeeded(scene.migrate(guest, scene.there))
    else:
        assert scene.beats(guest, scene.there) == 0, "committed before its agent died"


def test_guests_at_rest_do_not_notice(scene: Scene) -> None:
    guests = [scene.guest(device(), workload=Workload(dirty_mib=4, dirty_pages_per_s=500)) for _ in range(3)]
    for _ in range(2):
        scene.kill_agent(scene.here)
        scene.agents_are_back()
    for guest in guests:
        assert scene.longest_stop_ms(guest) < 1000


def test_a_vmm_that_does_not_answer_a_new_agent_is_not_dead(scene: Scene) -> None:
    """It stands still for longer than the agent asks it at its start, and runs on when it can."""
    guest = scene.guest(device())
    (vmm,) = scene.vmms(guest)
    with scene.frozen(vmm):
        scene.kill_agent(scene.here)
        scene.agents_are_back()
        scene.hold_on(2.0)
        assert scene.record(guest).phase is Ownership.IDLE
    first = scene.beats(guest)
    scene.reach(lambda: scene.beats(guest) > first + 10, "heartbeats again")
    scene.succeeded(scene.migrate(guest, scene.there))
