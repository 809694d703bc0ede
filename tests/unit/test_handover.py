"""Transitions and decisions of the guest record that the exploration does not reach one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core import death, handover
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord, Ownership, Refused, Verdict
from orchestrator.core.ids import HostRef

S, D, E = HostRef("s", "boot-s"), HostRef("d", "boot-d"), HostRef("e", "boot-e")
IDLE = GuestRecord("g", Ownership.IDLE, S)
OPEN = handover.open_attempt(IDLE, "m", 1, D, epoch=3, writer="w1")
BOUND = handover.bind(OPEN, "m", 1, "i1", writer="w2")
COMMITTED = handover.commit(BOUND, "m", 1, "i1", writer="w3")
ABORTED = handover.abort(BOUND, "m", 1, AbortReason.LATE_SWITCHOVER_ACK, ("nic",), writer="w4")


def test_a_clean_life() -> None:
    born = handover.birth("g", S, writer="w0")
    assert born.phase is Ownership.STARTING
    assert handover.started(born, writer="w").phase is Ownership.IDLE
    assert (COMMITTED.owner, COMMITTED.source) == (D, S)
    done = handover.done(COMMITTED, "m", 1, "i1", writer="w")
    assert (done.phase, done.owner, done.inc) == (Ownership.IDLE, D, "i1")
    assert handover.gone(done, writer="w").phase is Ownership.GONE


def test_an_abort_names_reason_and_devices_and_leads_to_the_next_attempt() -> None:
    assert (ABORTED.reason, ABORTED.devices) == (AbortReason.LATE_SWITCHOVER_ACK, ("nic",))
    second = handover.open_attempt(ABORTED, "m", 2, E, epoch=4, writer="w")
    assert (second.attempt, second.destination, second.inc, second.reason) == (2, E, "", None)


@pytest.mark.parametrize(
    "change",
    [
        lambda: handover.open_attempt(OPEN, "m", 2, D, epoch=1, writer=""),
        lambda: handover.open_attempt(IDLE, "m", 2, D, epoch=1, writer=""),
        lambda: handover.open_attempt(IDLE, "m", 1, S, epoch=1, writer=""),
        lambda: handover.open_attempt(ABORTED, "other", 2, D, epoch=1, writer=""),
        lambda: handover.open_attempt(replace(ABORTED, reason=AbortReason.CANCELLED), "m", 2, D, epoch=1, writer=""),
        lambda: handover.bind(BOUND, "m", 1, "i2", writer=""),
        lambda: handover.commit(OPEN, "m", 1, "i1", writer=""),
        lambda: handover.commit(BOUND, "m", 1, "i2", writer=""),
        lambda: handover.commit(BOUND, "m", 2, "i1", writer=""),
        lambda: handover.commit(ABORTED, "m", 1, "i1", writer=""),
        lambda: handover.abort(COMMITTED, "m", 1, AbortReason.CANCELLED, writer=""),
        lambda: handover.abort(ABORTED, "m", 1, AbortReason.CANCELLED, writer=""),
        lambda: handover.close(BOUND, "m", writer=""),
        lambda: handover.done(BOUND, "m", 1, "i1", writer=""),
        lambda: handover.done(COMMITTED, "m", 1, "i2", writer=""),
        lambda: handover.roll_back(COMMITTED, by=D, vmm_seen_dead=True, marker=True, writer=""),
        lambda: handover.roll_back(COMMITTED, by=D, vmm_seen_dead=False, marker=False, writer=""),
        lambda: handover.roll_back(COMMITTED, by=HostRef("d", "new"), vmm_seen_dead=True, marker=False, writer=""),
        lambda: handover.gone(OPEN, writer=""),
        lambda: handover.crashed(handover.gone(IDLE, writer=""), writer=""),
    ],
)
def test_what_a_record_does_not_allow_is_refused_with_a_sentence(change: object) -> None:
    assert callable(change)
    with pytest.raises(Refused) as refused:
        change()
    assert len(str(refused.value)) > 10


def test_rollback_gives_the_guest_back_to_the_source() -> None:
    back = handover.roll_back(COMMITTED, by=D, vmm_seen_dead=True, marker=False, writer="w")
    assert (back.phase, back.owner, back.reason) == (Ownership.ABORTED, S, AbortReason.ROLLED_BACK)


@pytest.mark.parametrize(
    ("record", "moved", "expected"),
    [
        (COMMITTED, False, Verdict.COMMITTED),
        (handover.done(COMMITTED, "m", 1, "i1", writer="w"), False, Verdict.COMMITTED),
        (BOUND, False, Verdict.UNDECIDED),
        (BOUND, True, Verdict.REFUSED),
        (ABORTED, False, Verdict.REFUSED),
        (handover.open_attempt(ABORTED, "m", 2, E, epoch=1, writer="w"), False, Verdict.REFUSED),
        (handover.close(ABORTED, "m", writer="w"), False, Verdict.REFUSED),
        (handover.crashed(BOUND, writer="w"), False, Verdict.CRASHED),
    ],
)
def test_h5_only_content_decides(record: GuestRecord, moved: bool, expected: Verdict) -> None:
    assert handover.verdict(record, S, "m", 1, req_moved=moved) is expected


def test_h9_h10_crash_and_discard() -> None:
    assert not handover.may_discard_source(COMMITTED, S, "i1")
    assert handover.may_discard_source(handover.done(COMMITTED, "m", 1, "i1", writer="w"), S, "i1")
    assert not handover.may_discard_source(ABORTED, S, "i1")
    assert handover.must_declare_crashed(COMMITTED, D, vmm_alive=False, marker=True)
    assert not handover.must_declare_crashed(COMMITTED, D, vmm_alive=False, marker=False)
    assert handover.must_declare_crashed(COMMITTED, HostRef("d", "new"), vmm_alive=False, marker=False)
    assert handover.must_declare_crashed(IDLE, S, vmm_alive=False, marker=False)
    assert not handover.must_declare_crashed(IDLE, D, vmm_alive=False, marker=False)


def test_h11_h12() -> None:
    assert not handover.may_declare_dead(certificate=False)
    assert handover.epoch_is_current(5, 5)
    assert not handover.epoch_is_current(5, 4)
    assert not handover.epoch_is_current(5, 6)


# --- stopped, kept and started again ----------------------------------------------------------------------------------

CRASHED = handover.crashed(IDLE, writer="w")
KEPT = handover.stopped(CRASHED, by=S, nothing_left=True, writer="w")
AGAIN = handover.start_again(KEPT, HostRef("s", "next"), writer="w")


def test_a_guest_that_is_kept_lives_on_under_its_uuid() -> None:
    assert (KEPT.phase, KEPT.stopped, KEPT.owner) == (Ownership.CRASHED, True, S)
    assert (AGAIN.phase, AGAIN.stopped, AGAIN.owner.boot_id, AGAIN.starts) == (Ownership.STARTING, False, "next", 1)
    running = handover.started(AGAIN, writer="w")
    assert (running.phase, running.starts) == (Ownership.IDLE, 1)
    second = handover.stopped(handover.crashed(running, writer="w"), by=running.owner, nothing_left=True, writer="w")
    assert handover.start_again(second, running.owner, writer="w").starts == 2


def test_nothing_of_an_attempt_is_left_in_a_guest_that_is_kept() -> None:
    kept = handover.stopped(handover.crashed(COMMITTED, writer="w"), by=D, nothing_left=True, writer="w")
    assert replace(kept, coord_epoch=0) == replace(KEPT, owner=D)
    again = handover.start_again(kept, D, writer="w")
    assert handover.is_over_for_destination(again, "m", 1, "i1"), "whatever was made for an attempt is to be discarded"
    assert handover.may_discard_source(again, S, again.inc)
    assert not handover.may_run_at_destination(again, D, "i1")


def test_the_end_of_a_start_that_failed() -> None:
    assert handover.stopped(AGAIN, by=AGAIN.owner, nothing_left=True, writer="w").stopped
    assert not handover.gone(AGAIN, writer="w").never_ran, "it has run before"
    assert handover.gone(KEPT, writer="w").stopped is False


@pytest.mark.parametrize(
    "change",
    [
        lambda: handover.start_again(CRASHED, S, writer=""),
        lambda: handover.start_again(IDLE, S, writer=""),
        lambda: handover.start_again(KEPT, D, writer=""),
        lambda: handover.start_again(AGAIN, S, writer=""),
        lambda: handover.start_again(handover.gone(KEPT, writer=""), S, writer=""),
        lambda: handover.stopped(IDLE, by=S, nothing_left=True, writer=""),
        lambda: handover.stopped(CRASHED, by=D, nothing_left=True, writer=""),
        lambda: handover.stopped(CRASHED, by=S, nothing_left=False, writer=""),
        lambda: handover.stopped(handover.birth("g", S, writer=""), by=S, nothing_left=True, writer=""),
        lambda: handover.stopped(replace(CRASHED, host_died=True, successor="u"), by=S, nothing_left=True, writer=""),
        lambda: handover.succeeded_by(KEPT, "u", writer=""),
        lambda: handover.open_attempt(KEPT, "m", 1, D, epoch=1, writer=""),
    ],
)
def test_only_what_is_proven_to_be_nowhere_starts_again(change: object) -> None:
    assert callable(change)
    with pytest.raises(Refused):
        change()


def test_a_kept_guest_of_a_host_that_died_is_not_started_elsewhere_as_well() -> None:
    died = handover.host_died(IDLE, certificate=True, writer="w")
    assert death.may_restart(died)
    assert not death.may_restart(handover.stopped(died, by=HostRef("s", "next"), nothing_left=True, writer="w"))
