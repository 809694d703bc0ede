"""A device asks for another ACK when the guest is stopped: it runs on at the source, and the retry succeeds."""

from __future__ import annotations

import pytest

from deploy.lab.devices.scenario_text import late_ack
from orchestrator.core.errors import AbortReason
from orchestrator.core.ids import AckRequest
from orchestrator.core.records import Requests
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import op_set
from orchestrator.ledger.store import Check, Done
from protos.drover.v1 import types_pb2
from tests.integration.handover.scene import Born, Scene, device

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]

LATE = AbortReason.LATE_SWITCHOVER_ACK
NEVER_ACKED = "faults: [{call: ack, times: always}]"


def late_aborts(over: types_pb2.Migration) -> list[tuple[str, ...]]:
    """Devices of each attempt but the last, all of which were aborted for them; the last one committed."""
    *aborted, last = over.attempts
    assert last.outcome == "COMMITTED"
    assert {report.reason for report in aborted} <= {LATE}, over.attempts
    return [tuple(report.devices) for report in aborted]


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("times", [1, 3])
def test_late_acks_in_a_row(scene: Scene, times: int, devices: int) -> None:
    """The first device is late, beside others that are not."""
    scenario = f"asks: [{{at: freeze, times: {times}, bytes: 4096}}]"
    guest = scene.guest(device("late", scenario), *(device(f"dev{n}") for n in range(1, devices)))
    over = scene.succeeded(scene.migrate(guest, scene.there))
    assert late_aborts(over) == [("late",)] * times
    assert len({report.inc for report in over.attempts}) == times + 1, "each attempt has a destination of its own"


def test_several_devices_are_late_at_once(scene: Scene) -> None:
    guest = scene.guest(*(device(f"dev{n}", "asks: [{at: final_query}]") for n in range(3)))
    over = scene.succeeded(scene.migrate(guest, scene.there))
    assert late_aborts(over) == [("dev0", "dev1", "dev2")]


def test_an_injected_late_ack(scene: Scene) -> None:
    guest = scene.guest(device())
    assert "freeze" in scene.client.instruct_device(guest.name, "dpu", late_ack("freeze", 2))
    over = scene.succeeded(scene.migrate(guest, scene.there))
    assert late_aborts(over) == [("dpu",)] * 2


def test_a_request_at_an_open_gate_closes_it_and_aborts_nothing_by_itself(scene: Scene) -> None:
    """The guest runs: it is held again, or it was stopped first, which is late."""
    guest = scene.guest(device("dpu", "asks: [{at: gate_open, times: 2, bytes: 4096}]"))
    over = scene.succeeded(scene.migrate(guest, scene.there))
    assert len(late_aborts(over)) <= 2
    assert max(entry.generation for entry in over.attempts[-1].acks) >= 3


def test_what_a_device_asked_in_an_earlier_attempt_holds_no_later_one_up(scene: Scene) -> None:
    """It asks in its first attempt only, as a device whose initial data did not change may."""
    once = "{ask_at_begin: false, asks: [{at: precopy, sessions: 1}]}"
    guest = scene.guest(device("once", once), device("late", "asks: [{at: freeze}]"))
    over = scene.succeeded(scene.migrate(guest, scene.there, ack_timeout_ms=5000))
    assert late_aborts(over) == [("late",)]
    assert [entry.device for entry in over.attempts[1].requests] == ["late"]


def test_a_guest_that_is_paused_with_an_ack_pending_is_not_held_up_by_it(scene: Scene) -> None:
    guest = scene.guest(device("dpu", NEVER_ACKED))
    migration = scene.migrate(guest, scene.there)
    scene.reach_phase(migration, "PRECOPY")
    pending(scene, migration)
    scene.client.pause_guest(guest.name)
    over = scene.succeeded(migration)
    assert late_aborts(over) == []
    assert [(each.device, each.generation) for each in over.attempts[0].requested_while_stopped] == [("dpu", 1)]
    arrived_stopped(scene, guest)


def test_a_paused_guest_is_never_refused_for_a_late_request(scene: Scene) -> None:
    guest = scene.guest(device("dpu", "asks: [{at: final_query, times: always}]"))
    scene.client.pause_guest(guest.name)
    over = scene.succeeded(scene.migrate(guest, scene.there))
    assert late_aborts(over) == []
    assert [each.device for each in over.attempts[0].requested_while_stopped] == ["dpu"]
    arrived_stopped(scene, guest)


def test_a_guest_that_is_suspended_with_an_ack_pending_runs_on_arrival(scene: Scene) -> None:
    guest = scene.guest(device("dpu", NEVER_ACKED))
    over = scene.succeeded(scene.migrate(guest, scene.there, precopy_timeout_ms=1000, on_timeout="suspend"))
    assert late_aborts(over) == []
    assert scene.want_run(guest)
    assert scene.record(guest).owner.host == scene.there


def test_a_device_that_asks_after_the_check_is_served_in_stop_copy(scene: Scene) -> None:
    guest = scene.guest(device("dpu", "asks: [{at: after_check, times: always}]"))
    over = scene.succeeded(scene.migrate(guest, scene.there))
    assert late_aborts(over) == []


def test_a_request_through_the_ledger_after_the_check_wins_before_the_commit(scene: Scene) -> None:
    """H14: nobody but the ledger says whether it came in time."""
    guest = scene.guest(device("dpu", "delays: [{call: validate, ms: 3000, times: 1}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "STOP_COPY")
    request_through_the_ledger(scene, guest, migration)
    over = scene.succeeded(migration)
    assert late_aborts(over) == [("dpu",)]


def pending(scene: Scene, migration: str) -> None:
    """The request is written down, and there is no ACK for it."""

    def written() -> bool:
        found = scene.observer.read(Requests, paths.requests(migration))
        return found is not None and [entry.device for entry in found.entries] == ["dpu"]

    scene.reach(written, "a request in the ledger")


def arrived_stopped(scene: Scene, guest: Born) -> None:
    assert scene.record(guest).owner.host == scene.there
    assert scene.beats(guest, scene.there) == 0


def request_through_the_ledger(scene: Scene, guest: Born, migration: str) -> None:
    """As the API's own way in would write it."""
    ledger = scene.observer.ledger
    known = scene.observer.run(ledger.read(Requests, paths.requests(migration)))
    found = scene.observer.run(ledger.read_guest(guest.uuid))
    assert known
    assert found
    (entry,), version = known[0].entries, known[1]
    asked = Requests((AckRequest("dpu", entry.generation + 1),), known[0].attempt)
    ops = [Check(paths.guest(guest.uuid), found[1]), op_set(paths.requests(migration), asked, version)]
    assert isinstance(scene.observer.run(scene.observer.store.multi(ops)), Done)
