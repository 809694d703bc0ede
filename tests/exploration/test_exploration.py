"""The production machines within bounds that fit into a test run; `make explore` runs wider ones."""

from __future__ import annotations

import os

import pytest

from agents.handover.destination import DestinationStage, DestinationState, destination_step
from agents.handover.source import blackout
from agents.handover.words import RecordSeen
from orchestrator.core.handover import GuestRecord, Ownership
from tests.exploration.mutants import MUTANTS, Mutant
from tests.exploration.search import explore, follow
from tests.exploration.verdict import flaw
from tests.exploration.world import D1, MIGRATION, S1, Bounds, ref

pytestmark = pytest.mark.timeout(900)
"""They compute for up to ten seconds, which a busy machine makes minutes of."""

QUICK = (
    Bounds(requests=1, cancels=0, faults=0, gate_wait=True),
    Bounds(requests=1, cancels=1, faults=0),
    Bounds(requests=0, cancels=1, faults=1),
    Bounds(requests=0, cancels=0, faults=1, power=1),
    Bounds(requests=0, cancels=0, faults=0, wishes=2),
    Bounds(requests=1, cancels=0, faults=0, devices=False, inside=True),
    Bounds(requests=0, cancels=0, faults=0, wishes=2, devices=False, inside=True),
    Bounds(requests=0, cancels=0, faults=1, off=True),
    Bounds(requests=0, cancels=0, faults=0, time=True),
    Bounds(requests=0, cancels=0, faults=0, disk=True),
    Bounds(requests=0, cancels=0, faults=0, disk=True, writes=1, drained_before=True),
    Bounds(requests=0, cancels=0, faults=1, devices=False, disk=True, writes=0, drained_before=True),
    Bounds(requests=0, cancels=0, faults=1, old=True),
    Bounds(requests=0, cancels=1, faults=0, attempts=2, old=True),
)
WIDE = (
    Bounds(requests=2, cancels=0, faults=0),
    Bounds(requests=1, cancels=0, faults=0, wishes=2, devices=False, inside=True),
    Bounds(requests=1, cancels=0, faults=1, devices=False, inside=True),
    Bounds(requests=0, cancels=0, faults=1, attempts=2),
    Bounds(requests=2, cancels=0, faults=0, gate_wait=True),
    Bounds(requests=1, cancels=0, faults=1),
    Bounds(requests=0, cancels=0, faults=2),
    Bounds(requests=1, cancels=0, faults=0, wishes=1),
    Bounds(requests=0, cancels=0, faults=1, wishes=1),
    Bounds(requests=1, cancels=1, faults=0, attempts=2),
    Bounds(requests=1, cancels=0, faults=1, off=True),
    Bounds(requests=0, cancels=0, faults=1, wishes=1, off=True),
    Bounds(requests=1, cancels=0, faults=1, off=True, devices=False, inside=True),
    Bounds(requests=1, cancels=0, faults=0, time=True),
    Bounds(requests=0, cancels=0, faults=1, time=True),
    Bounds(requests=0, cancels=0, faults=0, devices=False, disk=True, attempts=2),
    Bounds(requests=0, cancels=0, faults=1, devices=False, disk=True, writes=1),
    Bounds(requests=0, cancels=0, faults=0, wishes=1, disk=True, writes=1, drained_before=True),
    Bounds(requests=0, cancels=0, faults=1, devices=False, disk=True, writes=1, attempts=2),
    Bounds(requests=0, cancels=0, faults=2, devices=False, disk=True),
    Bounds(requests=1, cancels=1, faults=0, disk=True, writes=1, attempts=2),
    Bounds(requests=1, cancels=1, faults=1, old=True),
    Bounds(requests=0, cancels=0, faults=1, attempts=2, old=True),
)


def _assert_sound(bounds: Bounds) -> None:
    result = explore(bounds)
    print(f"{bounds}: {result.states} states, {result.edges} edges")
    assert result.complete, "the search was cut off before it had seen everything within its bounds"
    assert result.states > 1_000
    assert not result.flaws, result.flaws
    assert not result.dead_ends, result.dead_ends


@pytest.mark.parametrize("bounds", QUICK, ids=str)
def test_nothing_runs_twice_or_is_lost(bounds: Bounds) -> None:
    _assert_sound(bounds)


@pytest.mark.long
@pytest.mark.skipif("DROVER_LONG" not in os.environ, reason="wide bounds: make explore")
@pytest.mark.parametrize("bounds", WIDE, ids=str)
def test_wider_bounds(bounds: Bounds) -> None:
    _assert_sound(bounds)


def _marks(mutant: Mutant) -> list[pytest.MarkDecorator]:
    return [pytest.mark.rule(rule) for rule in mutant.rule.split() if rule.startswith("H")]


@pytest.mark.parametrize("mutant", [pytest.param(each, id=each.name, marks=_marks(each)) for each in MUTANTS])
def test_every_rule_is_needed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name, value in mutant.patches():
        monkeypatch.setattr(owner, name, value)
    result = explore(mutant.bounds, first=not mutant.dead_ends, strict=False)
    for found, path in result.flaws.items():
        print(f"{mutant.rule} {mutant.name}: {found} after {len(path)} steps: {' > '.join(path[-8:])}")
    if mutant.dead_ends:
        assert result.dead_ends or result.flaws
    else:
        assert result.flaws, f"{mutant.name} was not caught in {result.states} states"


@pytest.mark.rule("H8")
def test_a_copy_of_another_incarnation_never_takes_over() -> None:
    """H8, mutant `any_inc`: the world has one destination process per attempt, so this case stands on its own."""
    loaded = DestinationState(ref(1), D1, "i1", stage=DestinationStage.LOADED)
    other = GuestRecord("g", Ownership.COMMITTED, D1, MIGRATION, 1, D1, "i2", source=S1)
    state, _ = destination_step(loaded, RecordSeen(other))
    assert state.stage is DestinationStage.DISCARDING
    mine = GuestRecord("g", Ownership.COMMITTED, D1, MIGRATION, 1, D1, "i1", source=S1)
    state, _ = destination_step(loaded, RecordSeen(mine))
    assert state.stage is DestinationStage.MARKING


_TWO = Bounds(requests=1, cancels=0, faults=0, attempts=2)
_BEGUN = ("C opens", "D prepares", "S conducts", "S bind ok")
_NEXT = ("C aborts", "C opens")
_ENDED = ("S watch", "S roll_back_shims", "S abort_engine", "D watch", "D discard_destination")
_LOADED = ("Q parks", "S quiesce", "S proceed", "Q loads", "D validate", "Q completes", "LOADED")


@pytest.mark.rule("H14")
def test_what_a_device_asks_in_an_attempt_that_is_over_binds_no_later_one() -> None:
    """It asks within its session, which ends with the attempt; in the next one it asks again if it needs to."""
    asked = follow(_TWO, *_BEGUN, *_NEXT, "device asks", *_ENDED, *_BEGUN[1:], *_LOADED)
    assert not flaw(asked)
    given = follow(_TWO, *_BEGUN, *_NEXT, "device asks", *_ENDED, *_BEGUN[1:], *_LOADED, "S Commit ok")
    assert (given.record.phase, flaw(given)) == (Ownership.COMMITTED, "")


@pytest.mark.rule("H14")
@pytest.mark.parametrize("stands", [("Q parks",), ("Q parks", "S quiesce")], ids=["parked", "checked"])
def test_the_freeze_of_an_attempt_that_is_over_makes_no_request_of_the_next_one_late(stands: tuple[str, ...]) -> None:
    """That one's own freeze is still to come."""
    proceeds = ("S proceed",) if len(stands) > 1 else ()
    world = follow(_TWO, *_BEGUN, *stands, *_NEXT, "API asks", *proceeds)
    assert world.source is not None
    assert world.source.ref.attempt < world.record.attempt
    assert world.pending
    assert not world.late


@pytest.mark.rule("H14")
def test_what_is_asked_of_the_next_attempt_binds_it_although_the_one_before_is_not_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its session never hears of it, so the COMMIT's own check must refuse."""
    path = (*_BEGUN, *_NEXT, "API asks", *_ENDED, *_BEGUN[1:], *_LOADED)
    refused = follow(_TWO, *path, "S Commit refused")
    assert refused.record.phase is Ownership.OPEN
    monkeypatch.setattr(blackout, "req_to_check", lambda state: None)
    assert flaw(follow(_TWO, *path, "S Commit ok")) == "COMMIT OVER A LATE REQUEST"
