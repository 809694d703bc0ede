"""All of Ray is killed in the middle of an evacuation: the agents own their transfers, which go on and end without it.

The next coordinator finds everything in the ledger. That no transfer was started again is proved by the numbers of the
attempts and by `inc`, the one destination process that an attempt is bound to.
"""

from __future__ import annotations

import pytest

from orchestrator import wire
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import Ownership
from protos.drover.v1 import types_pb2
from tests.integration.handover.scene import RAY_S, Born, Scene, device

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]


def evacuate(scene: Scene, max_concurrent: int = 0, **policy: object) -> str:
    return scene.client.create_evacuation(scene.here, max_concurrent, policy).evacuation.name


def migration_of(scene: Scene, guest: Born) -> str:
    """Its one migration, once the coordinator has created it."""

    def found() -> str:
        names = [each.name for each in scene.client.list_migrations(guest.name)]
        assert len(names) <= 1, names
        return names[0] if names else ""

    return scene.reach(found, f"a migration of {guest.name}")


def bound(scene: Scene, guest: Born) -> tuple[int, str]:
    record = scene.record(guest)
    return record.attempt, record.inc


def emptied(scene: Scene, evacuation: str) -> dict[str, types_pb2.Migration]:
    """The host is empty and everybody arrived; the guests' migrations by name."""

    def over() -> types_pb2.Evacuation | None:
        now = scene.client.get_evacuation(evacuation)
        return now if wire.word(now, "phase") in ("SUCCEEDED", "FAILED", "CANCELLED") else None

    now = scene.reach(over, "the evacuation's end", RAY_S)
    assert wire.word(now, "phase") == "SUCCEEDED", now
    assert {guest.guest for guest in now.guests} == {guest.name for guest in scene.guests}
    scene.reach(lambda: scene.client.get_evacuation(evacuation).safe_to_power_off, "safe to power off")
    assert scene.client.list_guests(scene.here) == []
    scene.client.uncordon_host(scene.here)
    return {guest.name: scene.succeeded(migration_of(scene, guest)) for guest in scene.guests}


def test_in_every_phase_that_lasts(scene: Scene) -> None:
    """One guest waits for its turn, one is in pre-copy, one is committed and not yet running, one waits to retry.

    Guests of one size leave in the order of their names. One that is committed takes no place any more, so two places
    are held by the guests in pre-copy and in RETRY_WAIT, and the last one waits as long as both of them do.
    """
    committed = scene.guest(device("dpu", "delays: [{call: activate, ms: 16000, times: 1}]"))
    precopy = scene.guest(device("dpu", "delays: [{call: load, ms: 15000, times: 1}]"))
    retrying = scene.guest(device("dpu", "asks: [{at: freeze}]"))
    waiting = scene.guest()
    evacuation = evacuate(scene, 2, backoff_initial_ms=12_000, backoff_max_ms=12_000)
    scene.reach(lambda: scene.record(committed).phase is Ownership.COMMITTED, "COMMITTED")
    scene.reach_phase(migration_of(scene, retrying), "RETRY_WAIT")
    scene.reach_phase(migration_of(scene, precopy), "PRECOPY")
    before = {guest.name: bound(scene, guest) for guest in (precopy, committed)}
    assert scene.record(waiting).phase is Ownership.IDLE
    scene.kill_ray()
    assert scene.record(committed).phase is Ownership.COMMITTED
    scene.coordinator_is_back()
    moved = emptied(scene, evacuation)
    for guest in (precopy, committed):
        (report,) = moved[guest.name].attempts
        assert (report.attempt, report.inc) == before[guest.name], "the same transfer"
    assert [report.reason for report in moved[retrying.name].attempts] == [AbortReason.LATE_SWITCHOVER_ACK, ""]
    assert len(moved[waiting.name].attempts) == 1


def test_in_the_blackout(scene: Scene) -> None:
    """It ends within the second, with nobody to conduct the evacuation."""
    guest = scene.guest(device("dpu", "delays: [{call: stop_copy, ms: 1500, times: 1}]"))
    evacuation = evacuate(scene)
    scene.reach_device(guest, scene.here, "PRE_COPY_P2P")
    before = bound(scene, guest)
    scene.kill_ray()
    scene.reach(lambda: scene.record(guest).owner.host != scene.here, "its new owner")
    assert bound(scene, guest) == before
    scene.coordinator_is_back()
    (report,) = emptied(scene, evacuation)[guest.name].attempts
    assert (report.attempt, report.inc) == before
    assert scene.longest_stop_ms(guest) < 4000


def test_while_preparing(scene: Scene) -> None:
    """An attempt that is open and has no destination process yet is taken up where it stands."""
    guest = scene.guest(device())
    agents = [scene.agent(host) for host in (scene.there, scene.third)]
    for agent in agents:
        scene.freeze(agent)
    evacuation = evacuate(scene)
    scene.reach(lambda: scene.record(guest).phase is Ownership.OPEN, "OPEN")
    assert bound(scene, guest) == (1, "")
    scene.kill_ray()
    for agent in agents:
        scene.thaw(agent)
    scene.coordinator_is_back()
    (report,) = emptied(scene, evacuation)[guest.name].attempts
    assert report.attempt == 1
