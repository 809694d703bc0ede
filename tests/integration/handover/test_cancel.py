"""A cancel in each phase of a migration: one answer, and it is true for ever.

Two callers cancel at once. "Cancelled" means that the migration never commits and the guest stays; a refusal names the
transaction that gave the guest away.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from deploy.lab.cluster import teardown
from orchestrator import wire
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.integration.handover.scene import Born, Scene, device

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]

CANCELLED = "CANCELLED"


def cancel(scene: Scene, migration: str) -> str:
    """What two callers at once are told: CANCELLED, or the reason of the refusal with its zxid; the same to both."""

    def one(_: int) -> str:
        with OrchestratorClient(scene.cluster.api) as client:
            while True:
                try:
                    client.cancel_migration(migration)
                except DroverError as error:
                    print(error)
                    if error.reason is RefusalReason.LEDGER_UNREACHABLE:  # nothing was written: asked again
                        scene.hold_on(0.1)
                        continue
                    return f"{error.reason} {error.details.get('zxid', '')}".strip()
                return CANCELLED

    with ThreadPoolExecutor(2) as callers:
        told = set(callers.map(one, range(2)))
    assert len(told) == 1, told
    return told.pop()


def came_too_late(told: str) -> bool:
    """It names the transaction that gave the guest away."""
    reason, _, zxid = told.partition(" ")
    return reason == RefusalReason.ALREADY_COMMITTED and int(zxid) > 0


def is_cancelled(scene: Scene, guest: Born, migration: str) -> None:
    over = scene.ended(migration)
    assert wire.word(over, "phase") == CANCELLED
    assert all(report.outcome == "ABORTED" for report in over.attempts)
    assert scene.record(guest).owner.host == scene.here


def is_committed(scene: Scene, guest: Born, migration: str) -> None:
    assert wire.word(scene.ended(migration), "phase") == "SUCCEEDED"
    assert scene.record(guest).owner.host == scene.there


def test_pending(scene: Scene) -> None:
    """The coordinator is not there: the API alone can answer."""
    guest = scene.guest()
    held = teardown.find_ray(scene.layout)
    for process in held:
        scene.freeze(process)
    migration = scene.migrate(guest, scene.there)
    assert scene.phase(migration) == "PENDING"
    assert cancel(scene, migration) == CANCELLED
    assert scene.phase(migration) == CANCELLED
    scene.thaw_all()
    is_cancelled(scene, guest, migration)


def test_preparing(scene: Scene) -> None:
    """Its destination does not answer. Where that is noticed before a migration begins, there is another try."""
    guest = scene.guest()

    def begun() -> str:
        phase = scene.phase(migration)
        return phase if phase in ("PREPARING", "FAILED") else ""

    for _ in range(5):
        with scene.frozen(scene.agent(scene.there)):
            migration = scene.migrate(guest, scene.there)
            if scene.reach(begun, "a migration that has begun") == "PREPARING":
                assert cancel(scene, migration) == CANCELLED
                is_cancelled(scene, guest, migration)
                return
        assert scene.ended(migration).failure == "DESTINATION_NOT_ELIGIBLE"
        scene.ledger_is_back()  # and every host is heard
    pytest.fail("each silence was noticed before a migration had begun")


def held_in_precopy(scene: Scene) -> tuple[Born, str]:
    guest = scene.guest(device("dpu", "faults: [{call: ack, times: always}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "PRE_COPY")
    scene.reach_phase(migration, "PRECOPY")
    return guest, migration


def held_parked(scene: Scene) -> tuple[Born, str]:
    guest = scene.guest(device("dpu", "delays: [{call: stop_copy, ms: 1800}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "PRE_COPY_P2P")
    return guest, migration


def held_after_continue(scene: Scene) -> tuple[Born, str]:
    """The destination has everything and takes long to validate it."""
    guest = scene.guest(device("dpu", "delays: [{call: validate, ms: 2500}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "STOP_COPY")
    return guest, migration


def held_in_device(scene: Scene) -> tuple[Born, str]:
    """The engine's last pass is under way and the destination's VMM takes nothing: only the second monitor helps."""
    guest = scene.guest(device("dpu", "delays: [{call: stop_copy, ms: 1800}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "PRE_COPY_P2P")
    scene.freeze(scene.incoming(guest))
    scene.reach_device(guest, scene.here, "STOP_COPY")
    return guest, migration


@pytest.mark.parametrize("held", [held_in_precopy, held_parked, held_after_continue, held_in_device])
def test_under_way(scene: Scene, held: Callable[[Scene], tuple[Born, str]]) -> None:
    guest, migration = held(scene)
    assert scene.record(guest).phase is Ownership.OPEN
    assert cancel(scene, migration) == CANCELLED
    is_cancelled(scene, guest, migration)


def test_submitted(scene: Scene) -> None:
    """The COMMIT waits in a ledger that stands still, and the cancels come after it: whoever is first, it is said."""
    guest, migration = held_after_continue(scene)
    zookeeper = scene.part("zookeeper")
    scene.freeze(zookeeper)
    scene.reach_device(guest, scene.there, "STOP")
    with ThreadPoolExecutor(1) as caller:
        answer = caller.submit(cancel, scene, migration)
        scene.hold_on(0.3)
        scene.thaw(zookeeper)
        told = answer.result()
    if told == CANCELLED:
        is_cancelled(scene, guest, migration)
    else:
        assert came_too_late(told)
        is_committed(scene, guest, migration)


def test_committed(scene: Scene) -> None:
    guest = scene.guest(device("dpu", "delays: [{call: activate, ms: 1500}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach(lambda: scene.record(guest).phase is Ownership.COMMITTED, "COMMITTED")
    assert came_too_late(cancel(scene, migration))
    is_committed(scene, guest, migration)


def test_retry_wait(scene: Scene) -> None:
    guest = scene.guest(device("dpu", "asks: [{at: freeze}]"))
    migration = scene.migrate(guest, scene.there, backoff_initial_ms=20_000, backoff_max_ms=20_000)
    scene.reach_phase(migration, "RETRY_WAIT")
    assert cancel(scene, migration) == CANCELLED
    assert scene.phase(migration) == CANCELLED
    is_cancelled(scene, guest, migration)


def test_over(scene: Scene) -> None:
    """Too late for both ends: the answer is that it arrived, or that it was cancelled before."""
    guest = scene.guest()
    arrived = scene.migrate(guest, scene.there)
    scene.succeeded(arrived)
    assert came_too_late(cancel(scene, arrived))
    assert scene.record(guest).owner.host == scene.there
    with scene.frozen(scene.agent(scene.third)):
        cancelled = scene.migrate(guest, scene.third)
        assert cancel(scene, cancelled) == CANCELLED
    assert cancel(scene, cancelled) == CANCELLED
