"""What an agent owes a guest that no session speaks for: one case per line of docs/protocol.md it rests on.

The exploration runs the same function through every interleaving; these cases say what is meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from agents.guest import duty as rules
from agents.guest.duty import Copy, Do, duty
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef

HERE, THERE, BEFORE = HostRef("a", "1"), HostRef("b", "1"), HostRef("a", "0")
IDLE = GuestRecord("g", Ownership.IDLE, HERE)
LEAVING = GuestRecord("g", Ownership.OPEN, HERE, "m", 1, THERE, "there")
OPENED_AGAIN = replace(LEAVING, attempt=2, inc="")
GIVEN = GuestRecord("g", Ownership.COMMITTED, THERE, "m", 1, THERE, "there", source=HERE)
GONE_THERE = GuestRecord("g", Ownership.IDLE, THERE, "m", 1, THERE, "there", source=HERE)
COMING = GuestRecord("g", Ownership.OPEN, THERE, "m", 1, HERE, "here")
TAKEN = GuestRecord("g", Ownership.COMMITTED, HERE, "m", 1, HERE, "here", source=THERE)
ARRIVED = GuestRecord("g", Ownership.IDLE, HERE, "m", 1, HERE, "here", source=THERE)
CLOSED = GuestRecord("g", Ownership.IDLE, HERE, "m", 1, reason=AbortReason.LATE_SWITCHOVER_ACK)

BORN = Copy("born", False, running=True)
SEALED = Copy("born", False, sealed=True)
WAITING = Copy("here", True, "m", 1)


def do(
    record: GuestRecord, *copies: Copy, marker: bool = False, want_run: bool = True, here: HostRef = HERE
) -> tuple[Do, str]:
    found = duty(record, here, copies, marker=marker, want_run=want_run)
    return found.do, found.inc


CASES = {
    "a guest at rest": (do(IDLE, BORN), (Do.NOTHING, "")),
    "paused as wished": (do(IDLE, replace(BORN, running=False), want_run=False), (Do.NOTHING, "")),
    "wish to pause": (do(IDLE, BORN, want_run=False), (Do.STOP, "born")),
    "wish to run": (do(IDLE, replace(BORN, running=False)), (Do.RUN, "born")),
    "shut down by itself": (do(IDLE, replace(BORN, running=False, ended=True)), (Do.NOTHING, "")),
    "shut down on its way, conductor died": (
        do(LEAVING, replace(BORN, running=False, ended=True)),
        (Do.END_AS_SOURCE, "born"),
    ),
    "birth seen": (do(replace(IDLE, phase=Ownership.STARTING), BORN), (Do.FINISH_BIRTH, "born")),
    "never born": (do(replace(IDLE, phase=Ownership.STARTING)), (Do.BURY, "")),
    "born before the power was lost": (do(replace(IDLE, phase=Ownership.STARTING, owner=BEFORE)), (Do.BURY, "")),
    "VMM died": (do(IDLE), (Do.DECLARE_CRASHED, "")),
    "VMM died in an attempt": (do(LEAVING), (Do.DECLARE_CRASHED, "")),
    "power was lost": (do(replace(IDLE, owner=BEFORE)), (Do.DECLARE_CRASHED, "")),
    "crashed": (do(replace(IDLE, phase=Ownership.CRASHED)), (Do.NOTHING, "")),
    "opened, not begun": (do(replace(LEAVING, inc=""), BORN), (Do.NOTHING, "")),
    "H7: bound, conductor died": (do(LEAVING, BORN), (Do.END_AS_SOURCE, "born")),
    "H7: parked, whatever the record": (
        do(replace(LEAVING, phase=Ownership.ABORTED), replace(BORN, running=False, migrating=True)),
        (Do.END_AS_SOURCE, "born"),
    ),
    "in a session": (do(LEAVING, replace(BORN, in_session=True)), (Do.NOTHING, "")),
    "H7: sealed, outcome open": (do(LEAVING, SEALED), (Do.END_AS_SOURCE, "born")),
    "sealed, attempt over, wish to run": (do(CLOSED, SEALED), (Do.RUN, "born")),
    "sealed, attempt over, stays paused": (do(CLOSED, SEALED, want_run=False), (Do.NOTHING, "")),
    "sealed, the next attempt is opened, wish to run": (
        do(replace(LEAVING, attempt=2, inc=""), SEALED),
        (Do.RUN, "born"),
    ),
    "sealed, the next attempt is opened, stays paused": (
        do(replace(LEAVING, attempt=2, inc=""), SEALED, want_run=False),
        (Do.NOTHING, ""),
    ),
    "H9: committed, not DONE": (do(GIVEN, SEALED), (Do.END_AS_SOURCE, "born")),
    "H9: DONE": (do(GONE_THERE, SEALED), (Do.DISCARD, "born")),
    "crashed at the destination": (do(replace(GIVEN, phase=Ownership.CRASHED), SEALED), (Do.DISCARD, "born")),
    "receiver died before the bind": (do(replace(COMING, inc=""), WAITING), (Do.END_AS_DESTINATION, "here")),
    "H7: receiver died": (do(COMING, WAITING), (Do.END_AS_DESTINATION, "here")),
    "receiver's attempt is over": (do(replace(COMING, phase=Ownership.ABORTED), WAITING), (Do.DISCARD, "here")),
    "receiver's attempt was followed": (do(replace(COMING, attempt=2, inc=""), WAITING), (Do.DISCARD, "here")),
    "H8: committed to another process": (do(replace(TAKEN, inc="other"), WAITING), (Do.GIVE_BACK, "")),
    "committed, taker died": (do(TAKEN, WAITING, marker=True), (Do.END_AS_DESTINATION, "here")),
    "H10: committed, VMM dead, no marker": (do(TAKEN), (Do.GIVE_BACK, "")),
    "H10: committed, VMM dead, marker": (do(TAKEN, marker=True), (Do.DECLARE_CRASHED, "")),
    "H10: committed, power was lost": (do(replace(TAKEN, owner=BEFORE)), (Do.DECLARE_CRASHED, "")),
    "H10: dead, but a session is at it": (do(TAKEN, replace(WAITING, in_session=True)), (Do.NOTHING, "")),
    "DONE, not noted down": (do(ARRIVED, WAITING), (Do.PROMOTE, "here")),
    "back home, the old copy forgotten": (
        do(ARRIVED, replace(WAITING, incoming=False, running=True), SEALED),
        (Do.DISCARD, "born"),
    ),
    "H11: declared dead while it was cut off": (
        do(replace(IDLE, phase=Ownership.CRASHED, host_died=True), BORN),
        (Do.DISCARD, "born"),
    ),
    "H11: declared dead, the session sees to it": (
        do(replace(LEAVING, phase=Ownership.CRASHED, host_died=True), replace(BORN, in_session=True)),
        (Do.NOTHING, ""),
    ),
    "ended, its process was not": (do(replace(IDLE, phase=Ownership.GONE), BORN), (Do.DISCARD, "born")),
    "ended elsewhere": (do(replace(GONE_THERE, phase=Ownership.GONE), SEALED), (Do.DISCARD, "born")),
}


@pytest.mark.parametrize(("found", "wanted"), CASES.values(), ids=CASES)
def test_duty(found: tuple[Do, str], wanted: tuple[Do, str]) -> None:
    assert found == wanted


def test_a_copy_that_left_is_never_started_on_the_strength_of_the_wish() -> None:
    """The dangerous one: a sealed copy would run beside the guest."""
    for record in (LEAVING, GIVEN, GONE_THERE, replace(GIVEN, phase=Ownership.CRASHED)):
        assert do(record, SEALED)[0] is not Do.RUN


def foreign() -> Iterator[tuple[GuestRecord, Copy]]:
    """Every record that gives the guest to another host, and every living copy of it here that was not given away."""
    for phase, inc, attempt, source in product(Ownership, ("there", "born", ""), (0, 1, 2), (HERE, THERE, None)):
        record = GuestRecord("g", phase, THERE, "m" if attempt else "", attempt, THERE, inc, source=source)
        for running, ended, migrating in product((True, False), repeat=3):
            yield record, Copy("born", False, running=running, ended=ended, migrating=migrating)


@pytest.mark.rule("H2")
def test_a_copy_that_was_never_given_away_is_kept_whatever_the_ledger_says() -> None:
    """Whoever could write to the ledger gave a guest away: the owner killed the only copy within a second."""
    tried = list(foreign())
    assert len(tried) > 1000
    assert {do(record, copy) for record, copy in tried} == {(Do.REFUSE_OWNER, "born")}


@pytest.mark.rule("H2")
def test_the_mutant_foreign_owner_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "may_have_been_given_away", lambda copy: True)
    assert Do.DISCARD in {do(record, copy)[0] for record, copy in foreign()}


def test_a_restarted_agent_still_knows_that_it_gave_a_guest_away() -> None:
    """Its VMM is sealed, which outlives the agent that submitted the COMMIT: the copy goes with DONE."""
    assert do(GIVEN, SEALED) == (Do.END_AS_SOURCE, "born")
    assert do(GONE_THERE, SEALED) == (Do.DISCARD, "born")
    moved_on = replace(GONE_THERE, owner=HostRef("c", "1"), migration="m2", inc="other")
    assert do(moved_on, SEALED) == (Do.DISCARD, "born")
