"""Transitions and decisions of the guest record that the exploration does not reach one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core import handover
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
