"""The destination's VMM or its agent is killed, at each step of an attempt.

Before the commit the guest runs on at the source and the next attempt brings it away. After the commit it is the
destination's: a killed agent's successor starts it in place; a killed VMM gives it back only with the proof that it
never ran there, and is a crash of the guest otherwise, as on any host.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from orchestrator import wire
from orchestrator.core.errors import AbortReason, FailureReason
from orchestrator.core.handover import Ownership
from protos.drover.v1 import types_pb2
from tests.integration.handover.scene import Born, Scene, device

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]

Lose = Callable[[Scene, Born], None]
LOST = {
    AbortReason.DESTINATION_LOST,
    AbortReason.DESTINATION_RESTARTED,
    AbortReason.ENGINE_FAILED,
    AbortReason.SHIM_FAILED,
    AbortReason.PREPARE_FAILED,
    AbortReason.SWITCHOVER_TIMEOUT,
    AbortReason.ROLLED_BACK,
}
STOPPED_MOST_MS = 7_000
"""The default of switchover_timeout_ms and what a busy machine adds: before its commit nothing may keep a guest longer
stopped, but for the agent that it waits for."""


def lose_vmm(scene: Scene, guest: Born) -> None:
    scene.kill(scene.incoming(guest))


def lose_agent(scene: Scene, guest: Born) -> None:
    scene.kill_agent(scene.incoming(guest).host)


def brought_away(scene: Scene, guest: Born, migration: str) -> types_pb2.Migration:
    """In a later attempt, after a stop that was bounded."""
    scene.agents_are_back()
    over = scene.succeeded(migration)
    *aborted, last = over.attempts
    assert aborted
    assert {report.outcome for report in aborted} == {"ABORTED"}
    assert {report.reason for report in aborted} <= LOST
    assert scene.record(guest).owner.host == last.destination
    stopped_ms = scene.longest_stop_ms(guest)
    print(f"stopped for at most {stopped_ms:.0f} ms")
    assert stopped_ms < STOPPED_MOST_MS + scene.away_ms
    return over


both = pytest.mark.parametrize("lose", [lose_vmm, lose_agent])


@both
def test_preparing(scene: Scene, lose: Lose) -> None:
    """It waits for a stream that the source, which stands still, does not send yet."""
    guest = scene.guest(device())
    with scene.frozen(scene.agent(scene.here)):
        migration = scene.migrate(guest)
        scene.reach(lambda: scene.incoming(guest).endpoint, "a destination that listens")
        assert not scene.record(guest).inc
        lose(scene, guest)
    brought_away(scene, guest, migration)


@pytest.mark.parametrize("devices", [0, 1])
@both
def test_precopy(scene: Scene, lose: Lose, devices: int) -> None:
    """With a device the gate is held closed; without one a trickle of bandwidth keeps pre-copy going."""
    guest = scene.guest(*[device("dpu", "faults: [{call: ack, sessions: 1, times: always}]")][:devices])
    migration = scene.migrate(guest, max_bandwidth_mbps=0 if devices else 8)
    scene.reach(lambda: scene.record(guest).inc, "an attempt that is bound")
    scene.reach_phase(migration, "PRECOPY")
    if devices:
        scene.reach_device(guest, scene.here, "PRE_COPY")
    lose(scene, guest)
    brought_away(scene, guest, migration)


@both
def test_parked(scene: Scene, lose: Lose) -> None:
    guest = scene.guest(device("dpu", "delays: [{call: stop_copy, ms: 1500, times: 1}]"))
    migration = scene.migrate(guest)
    scene.reach_device(guest, scene.here, "PRE_COPY_P2P")
    lose(scene, guest)
    brought_away(scene, guest, migration)


@both
def test_after_continue(scene: Scene, lose: Lose) -> None:
    """The engine's last pass cannot end, since the destination's VMM takes nothing."""
    guest = scene.guest(device("dpu", "delays: [{call: stop_copy, ms: 1800, times: 1}]"))
    migration = scene.migrate(guest)
    scene.reach_device(guest, scene.here, "PRE_COPY_P2P")
    vmm = scene.incoming(guest)
    with scene.frozen(vmm):
        scene.reach_device(guest, scene.here, "STOP_COPY")
        lose(scene, guest)
    brought_away(scene, guest, migration)


@both
def test_loaded(scene: Scene, lose: Lose) -> None:
    """Everything is loaded and validated, and the source, which stands still, has not heard of it."""
    guest = scene.guest(device("dpu", "delays: [{call: validate, ms: 2500, times: 1}]"))
    migration = scene.migrate(guest, switchover_timeout_ms=20_000)
    scene.reach_device(guest, scene.here, "STOP_COPY")
    vmm = scene.incoming(guest)
    scene.hold_on(1.0)  # for all data to be sent
    with scene.frozen(scene.agent(scene.here)):
        scene.reach_device(guest, vmm.host, "STOP")
        assert scene.record(guest).phase is Ownership.OPEN
        lose(scene, guest)
        scene.hold_on(0.5)  # for the other end to notice before anything can be committed to it
    scene.agents_are_back()
    over = scene.succeeded(migration)
    if over.attempts[0].outcome == "ABORTED":
        brought_away(scene, guest, migration)
    else:  # LOADED was on its way already, and the agent's successor found itself committed
        assert lose is lose_agent
        assert scene.record(guest).owner.host == vmm.host


def held_after_commit(scene: Scene) -> tuple[Born, str]:
    guest = scene.guest(device("dpu", "delays: [{call: activate, ms: 3000, times: 1}]"))
    migration = scene.migrate(guest, scene.there)
    marker = scene.layout.volatile(scene.there)
    scene.reach(lambda: [path for path in marker.glob(f"{guest.uuid}.*") if path.suffix != ".reserved"], "the marker")
    assert scene.record(guest).phase is Ownership.COMMITTED
    return guest, migration


def test_agent_after_the_commit(scene: Scene) -> None:
    """Its successor finds its own commit and starts the guest in place."""
    guest, migration = held_after_commit(scene)
    scene.kill_agent(scene.there)
    over = scene.succeeded(migration)
    assert [report.outcome for report in over.attempts] == ["COMMITTED"]
    assert scene.record(guest).owner.host == scene.there


def test_vmm_after_the_commit_and_the_marker(scene: Scene) -> None:
    """It may have run: nobody may start the old copy, and it is said."""
    guest, migration = held_after_commit(scene)
    guest.may_crash = True
    lose_vmm(scene, guest)
    over = scene.ended(migration)
    assert (wire.word(over, "phase"), over.failure) == ("FAILED", FailureReason.GUEST_CRASHED)
    assert scene.record(guest).phase is Ownership.CRASHED


def test_vmm_after_the_commit_before_the_marker(scene: Scene) -> None:
    """With the agent killed as well: its successor proves that nothing had an effect there, and gives it back."""
    guest = scene.guest(device("dpu", "delays: [{call: validate, ms: 3000, times: 1}]"))
    migration = scene.migrate(guest, scene.there, switchover_timeout_ms=15_000)
    scene.reach_device(guest, scene.here, "STOP_COPY")
    scene.hold_on(1.0)  # for all of the guest to be sent: validating begins then
    with scene.frozen(scene.agent(scene.here)):  # LOADED waits at its door
        scene.reach_device(guest, scene.there, "STOP")
        scene.hold_on(0.5)  # for LOADED to go out
        scene.freeze(scene.agent(scene.there))  # which never hears of the COMMIT
    scene.reach(lambda: scene.record(guest).phase is Ownership.COMMITTED, "COMMITTED")
    scene.kill(scene.incoming(guest))
    scene.kill_agent(scene.there)
    over = brought_away(scene, guest, migration)
    assert over.attempts[0].reason == AbortReason.ROLLED_BACK
