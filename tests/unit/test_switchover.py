"""The ACK ledger: what is pending, when the gate is open, what is late."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.ids import AckRequest
from orchestrator.core.switchover import AckLedger

A1, A2, B1 = AckRequest("a", 1), AckRequest("a", 2), AckRequest("b", 1)


@pytest.mark.rule("R10")
def test_without_a_request_the_gate_is_open() -> None:
    assert AckLedger().gate_open
    assert AckLedger().late == ()


@pytest.mark.rule("R8")
def test_a_request_closes_the_gate_until_its_own_ack() -> None:
    asked = AckLedger().request(A1)
    assert not asked.gate_open
    assert asked.ack(A1).gate_open


@pytest.mark.rule("R11", "R13")
def test_an_ack_answers_neither_another_device_nor_a_newer_generation() -> None:
    asked = AckLedger().request(A1).request(B1)
    assert asked.ack(B1).pending == (A1,)
    again = AckLedger().request(A1).request(A2)
    assert again.ack(A1).pending == (A2,)
    assert again.ack(A2).gate_open


def test_requests_are_idempotent_and_an_older_generation_is_dropped() -> None:
    asked = AckLedger().request(A2)
    assert asked.request(A2) == asked
    assert asked.request(A1) == asked


def test_an_early_ack_counts_when_its_request_arrives() -> None:
    assert AckLedger().ack(A1).request(A1).gate_open


@pytest.mark.rule("R17")
def test_a_request_of_a_running_guest_is_late_at_the_check() -> None:
    assert AckLedger().request(A1).ack(A1).request(A2).freeze().late == (A2,)


@pytest.mark.rule("R18", "R20")
def test_r20_a_stopped_guest_is_not_aborted_for_what_was_pending() -> None:
    """The superseded first version of the patch failed on any pending request after the final query."""
    stopped = AckLedger().request(A1).stop_by_wish()
    assert stopped.gate_open
    frozen = stopped.freeze()
    assert frozen.pending == (A1,), "the superseded rule would abort here"
    assert frozen.late == ()
    assert frozen.request(B1).late == (), "nor for one that comes between stop and freeze"
    assert frozen.request(B1).while_stopped == (A1, B1)


@pytest.mark.rule("R15")
def test_a_resumed_guest_is_gated_again() -> None:
    stopped = AckLedger().request(A1).stop_by_wish()
    assert not stopped.resume_by_wish().gate_open


def test_wishes_after_the_freeze_change_nothing() -> None:
    frozen = AckLedger().request(A1).freeze()
    assert frozen.stop_by_wish() == frozen
    assert frozen.late == (A1,)


_ENTRIES = st.builds(AckRequest, st.sampled_from("abc"), st.integers(1, 4))
_OPS = st.lists(st.tuples(st.booleans(), _ENTRIES), max_size=20)


@given(_OPS)
def test_order_and_repetition_do_not_matter(ops: list[tuple[bool, AckRequest]]) -> None:
    def play(sequence: list[tuple[bool, AckRequest]]) -> AckLedger:
        ledger = AckLedger()
        for is_ack, entry in sequence:
            ledger = ledger.ack(entry) if is_ack else ledger.request(entry)
        return ledger

    once, doubled, backwards = play(ops), play(ops + ops), play(ops[::-1])
    assert once.pending == doubled.pending == backwards.pending


@given(_OPS)
def test_the_gate_is_open_exactly_when_every_newest_request_is_acked(ops: list[tuple[bool, AckRequest]]) -> None:
    ledger = AckLedger()
    asked: dict[str, int] = {}
    acked: dict[str, int] = {}
    for is_ack, entry in ops:
        ledger = ledger.ack(entry) if is_ack else ledger.request(entry)
        side = acked if is_ack else asked
        side[entry.device] = max(side.get(entry.device, 0), entry.generation)
    assert ledger.gate_open == all(acked.get(device, 0) >= generation for device, generation in asked.items())
