"""The ledger goes away in the middle of a hand-over, or forgets an agent: no guest stays stopped or runs twice for it.

Before the COMMIT has left, the source goes on alone. After that nothing but the ledger decides, and its return is
waited for.
"""

from __future__ import annotations

import pytest

from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import Ownership
from tests.integration.handover.scene import Born, Scene, device

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]

SESSION_S = 6.0
"""What agents ask for; a server that sees nothing of a client for so long forgets it."""
STOPPED_MOST_MS = 7_000
"""The default of switchover_timeout_ms and what a busy machine adds, besides what the ledger is away."""


def arrived(scene: Scene, guest: Born, migration: str) -> list[str]:
    """Reasons of the attempts before the one that brought it away."""
    over = scene.succeeded(migration, 60)
    assert scene.record(guest).owner.host == scene.there
    stopped_ms = scene.longest_stop_ms(guest)
    print(f"stopped for at most {stopped_ms:.0f} ms")
    assert stopped_ms < STOPPED_MOST_MS + scene.away_ms
    return [report.reason for report in over.attempts[:-1]]


def test_restarted_in_precopy(scene: Scene) -> None:
    guest = scene.guest(device("dpu", "delays: [{call: load, ms: 4000, times: 1}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "PRE_COPY")
    scene.reach(lambda: scene.record(guest).inc, "an attempt that is bound")
    scene.restart_zookeeper()
    assert set(arrived(scene, guest, migration)) <= {AbortReason.LEDGER_UNREACHABLE}


def test_restarted_while_parked(scene: Scene) -> None:
    guest = scene.guest(device("dpu", "delays: [{call: stop_copy, ms: 1800, times: 1}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "PRE_COPY_P2P")
    scene.restart_zookeeper()
    arrived(scene, guest, migration)


def test_restarted_before_the_commit(scene: Scene) -> None:
    """Its data is loaded when the ledger comes back, or not yet."""
    guest = scene.guest(device("dpu", "delays: [{call: validate, ms: 2000, times: 1}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "STOP_COPY")
    scene.restart_zookeeper()
    arrived(scene, guest, migration)


def test_restarted_with_the_commit_on_its_way(scene: Scene) -> None:
    """The server is killed with the transaction in its hands: it is lost, or it was written down."""
    guest = scene.guest(device("dpu", "delays: [{call: validate, ms: 2000, times: 1}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "STOP_COPY")
    scene.freeze(scene.part("zookeeper"))
    scene.reach_device(guest, scene.there, "STOP")
    scene.hold_on(0.5)  # for LOADED to arrive and the COMMIT to leave
    scene.restart_zookeeper()
    arrived(scene, guest, migration)


def test_restarted_after_the_commit(scene: Scene) -> None:
    """GO is enough for the destination; DONE waits for the ledger, and with it the end of the old copy."""
    guest = scene.guest(device("dpu", "delays: [{call: activate, ms: 2000, times: 1}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach(lambda: scene.record(guest).phase is Ownership.COMMITTED, "COMMITTED")
    scene.restart_zookeeper()
    assert arrived(scene, guest, migration) == []


def expire(scene: Scene, *hosts: str) -> None:
    """Let the agents' sessions end while they stand still; they wake up and learn of it."""
    agents = [scene.agent(host) for host in hosts]
    for agent in agents:
        scene.freeze(agent)
    for host in hosts:
        scene.reach(lambda host=host: not scene.is_live(host), f"the end of the session of {host}", SESSION_S * 4)
    scene.hold_on(1.0)  # their second sessions were begun a moment later
    scene.thaw_all()
    assert [scene.agent(host) for host in hosts] == agents
    scene.ledger_is_back()


def test_sessions_expired_in_precopy(scene: Scene) -> None:
    """Of the source and of the destination: the attempt goes on, or ends and is followed by another."""
    guest = scene.guest(device("dpu", "delays: [{call: load, ms: 9000, times: 1}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "PRE_COPY")
    scene.reach(lambda: scene.record(guest).inc, "an attempt that is bound")
    expire(scene, scene.here, scene.there)
    arrived(scene, guest, migration)


@pytest.mark.parametrize("end", ["source", "destination"])
def test_session_expired_in_the_last_pass(scene: Scene, end: str) -> None:
    """An agent that stood still for so long may have missed everything; what it finds in the ledger holds."""
    guest = scene.guest(device("dpu", "delays: [{call: validate, ms: 1500, times: 1}]"))
    migration = scene.migrate(guest, scene.there, switchover_timeout_ms=30_000)
    scene.reach_device(guest, scene.here, "STOP_COPY")
    expire(scene, scene.here if end == "source" else scene.there)
    arrived(scene, guest, migration)


def test_sessions_expired_at_rest(scene: Scene) -> None:
    """Everybody's sessions end at once: guests do not notice, and the next migrations work."""
    guests = [scene.guest(device()), scene.guest()]
    zookeeper = scene.part("zookeeper")
    with scene.frozen(zookeeper):
        scene.hold_on(SESSION_S + 2)
    scene.ledger_is_back()
    for guest in guests:
        assert scene.longest_stop_ms(guest) < 1000
    for guest in guests:
        scene.succeeded(scene.migrate(guest, scene.there), 60)


def test_a_guest_is_paused_as_wished_while_the_ledger_is_away(scene: Scene) -> None:
    """Nothing is answered that was not written: the wish is refused, or holds."""
    guest = scene.guest()
    zookeeper = scene.part("zookeeper")
    scene.kill(zookeeper)
    answered = scene.answer(lambda: scene.client.pause_guest(guest.name))
    scene.cluster.came_back("zookeeper", zookeeper.pid, 30)
    scene.ledger_is_back()
    wish = scene.want_run(guest)
    print(f"answered {answered or 'done'}, the wish is to {'run' if wish else 'be paused'}")
    if not answered:
        assert wish is False
