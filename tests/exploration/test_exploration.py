"""The production machines within bounds that fit into a test run; `make explore` runs wider ones."""

from __future__ import annotations

import os

import pytest

from agents.handover.destination import DestinationStage, DestinationState, destination_step
from agents.handover.words import RecordSeen
from orchestrator.core.handover import GuestRecord, Ownership
from tests.exploration.mutants import MUTANTS, Mutant
from tests.exploration.search import explore
from tests.exploration.world import D1, MIGRATION, S1, Bounds, ref

QUICK = (
    Bounds(requests=1, cancels=0, faults=0, gate_wait=True),
    Bounds(requests=1, cancels=1, faults=0),
    Bounds(requests=0, cancels=1, faults=1),
    Bounds(requests=0, cancels=0, faults=1, power=1),
    Bounds(requests=0, cancels=0, faults=0, wishes=2),
    Bounds(requests=0, cancels=1, faults=0, attempts=2),
    Bounds(requests=1, cancels=0, faults=0, devices=False, inside=True),
    Bounds(requests=0, cancels=0, faults=0, wishes=2, devices=False, inside=True),
    Bounds(requests=0, cancels=0, faults=1, off=True),
    Bounds(requests=0, cancels=0, faults=0, time=True),
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
