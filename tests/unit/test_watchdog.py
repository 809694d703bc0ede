"""The coordinator's watchdog: restarts an actor that hangs, and leaves one alone that waits for the ledger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.coordinator import watchdog
from orchestrator.coordinator.supervisor import LEDGER
from orchestrator.coordinator.watchdog import LEDGER_SILENT_S, SILENT_S, Verdict

Answer = dict[str, Any] | None
STEP_S = 0.5


def verdicts(answer: Callable[[float], Answer], until_s: float) -> list[tuple[float, Verdict]]:
    """What is done about an actor that answers so, as the time goes by; LEAVE is left out."""
    pulse, now_s, said = watchdog.start(0.0), 0.0, []
    while now_s < until_s:
        now_s += STEP_S
        pulse, verdict = watchdog.feel(pulse, answer(now_s), now_s)
        if verdict is not Verdict.LEAVE:
            said.append((now_s, verdict))
    return said


def status(progress: int, waiting_for: str = "") -> dict[str, Any]:
    return {"progress": progress, "waiting_for": waiting_for}


def test_an_actor_that_turns_its_rounds_is_left_alone() -> None:
    assert verdicts(lambda now_s: status(int(now_s)), 10 * SILENT_S) == []


def test_an_actor_that_waits_for_the_ledger_is_left_alone() -> None:
    assert verdicts(lambda _now_s: status(7, LEDGER), LEDGER_SILENT_S) == []


def test_an_actor_that_waits_for_the_ledger_for_too_long_is_restarted() -> None:
    (first, verdict), (second, _) = verdicts(lambda _now_s: status(7, LEDGER), 2.5 * LEDGER_SILENT_S)
    assert verdict is Verdict.RESTART
    assert LEDGER_SILENT_S < first <= LEDGER_SILENT_S + 4 * STEP_S
    assert second - first >= LEDGER_SILENT_S


def test_it_has_all_its_time_once_the_ledger_is_back() -> None:
    back_s = LEDGER_SILENT_S - 1

    def answer(now_s: float) -> Answer:
        return status(7, LEDGER) if now_s < back_s else status(7 if now_s < back_s + SILENT_S - 1 else 8)

    assert verdicts(answer, back_s + 1.5 * SILENT_S) == []


@pytest.mark.parametrize("waiting_for", ["", "host-1 leads", "a campaign that does not fail: KeyError()"])
def test_an_actor_that_answers_but_turns_no_round_is_restarted(waiting_for: str) -> None:
    (at_s, verdict), *_ = verdicts(lambda _now_s: status(7, waiting_for), 1.5 * SILENT_S)
    assert verdict is Verdict.RESTART
    assert SILENT_S < at_s <= SILENT_S + 2 * STEP_S


@pytest.mark.parametrize("last", ["", LEDGER])
def test_a_silent_actor_is_restarted_whatever_it_said_last_and_then_ray_is_gone(last: str) -> None:
    said = verdicts(lambda now_s: status(7, last) if now_s <= 5 else None, 5 + 2 * SILENT_S + 2)
    assert said[0][1] is Verdict.RESTART
    assert SILENT_S < said[0][0] <= 5 + SILENT_S + 2 * STEP_S
    assert said[-1][1] is Verdict.RAY_GONE
