"""Who may take a host's place: none is taken from an agent that is alive, no power cycle certified that is not over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.core import identity
from orchestrator.core.identity import AgentIdentity, Doubt
from tests.exploration import identity as world_module
from tests.exploration.identity import Bounds, Kind, World, explore

WORLDS = (
    Bounds(Kind.COPIED, cuts=2),
    Bounds(Kind.COPIED, declared=1),
    Bounds(Kind.CLONED, cuts=2),
    Bounds(Kind.CLONED, declared=1),
    Bounds(Kind.TWIN, cuts=2),
    Bounds(Kind.TWIN, declared=1),
    Bounds(Kind.FRESH_TWIN, deaths=0, cuts=0),
    Bounds(Kind.BESIDE, cuts=2),
    Bounds(Kind.BESIDE, cycles=1, moves=1),
    Bounds(Kind.APART, cycles=1, moves=1),
    Bounds(Kind.CLONED, moves=1),
    Bounds(Kind.FRESH_TWIN, deaths=0, cuts=0, moves=1),
)


def operator_acts(world: World) -> bool:
    """The name went to another installation, or to another copy of this one: the first agent is right to stop."""
    return world.record.lock == "lock1"


@pytest.mark.rule("H11")
@pytest.mark.parametrize(
    "bounds", WORLDS, ids=lambda bounds: f"{bounds.kind}-{bounds.cuts}-{bounds.declared}-{bounds.moves}"
)
def test_a_place_is_only_taken_from_the_dead(bounds: Bounds) -> None:
    result = explore(bounds, is_lost=operator_acts)
    print(f"{bounds}: {result.states} states")
    assert result.states > 100
    assert not result.flaws, result.flaws
    assert not result.dead_ends, result.dead_ends


def _never_doubted(me: AgentIdentity, *_: Any) -> Doubt:
    return Doubt.NONE


def _same_machine_is_enough(me: AgentIdentity, holder: AgentIdentity) -> bool:
    return (me.machine, me.boot_id) == (holder.machine, holder.boot_id)


Patch = tuple[Any, str, Callable[..., Any]]
MUTANTS: dict[str, tuple[list[Patch], Bounds]] = {
    "newcomer_certifies": ([(identity, "former_cycle_doubt", _never_doubted)], Bounds(Kind.COPIED)),
    "live_ignored": ([(identity, "session_is_over", lambda *_: True)], Bounds(Kind.FRESH_TWIN, deaths=0, cuts=0)),
    "other_installation": (
        [(identity, "is_same_installation", lambda *_: True), (identity, "has_last_claim", lambda *_: True)],
        Bounds(Kind.TWIN),
    ),
    "old_copy": ([(identity, "has_last_claim", lambda *_: True)], Bounds(Kind.TWIN)),
    "other_machine": ([(identity, "machine_doubt", _never_doubted)], Bounds(Kind.CLONED)),
    "other_directory": ([(identity, "is_successor", _same_machine_is_enough)], Bounds(Kind.BESIDE)),
    "holder_unasked": ([(identity, "has_ended", lambda *_: True)], Bounds(Kind.BESIDE)),
    "moved_old_copy": ([(identity, "has_last_claim", lambda *_: True)], Bounds(Kind.BESIDE, deaths=3)),
    "other_markers": ([(identity, "has_markers", lambda *_: True)], Bounds(Kind.APART)),
    "unguarded": ([(world_module, "holds", lambda *_: True)], Bounds(Kind.FRESH_TWIN, deaths=0, cuts=0)),
}


@pytest.mark.rule("H11")
@pytest.mark.parametrize("name", MUTANTS)
def test_every_rule_of_identity_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patches, bounds = MUTANTS[name]
    for owner, attribute, value in patches:
        monkeypatch.setattr(owner, attribute, value)
    result = explore(bounds, first=True)
    for found, path in result.flaws.items():
        print(f"{name}: {found} after {len(path)} steps: {' > '.join(path)}")
    assert result.flaws, f"{name} was not caught in {result.states} states"
