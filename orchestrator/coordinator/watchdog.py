"""When the process outside Ray restarts the coordinator's actor, or takes Ray for dead.

Pure: the shell pings the actor, and tells the answer and the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from orchestrator.coordinator.supervisor import LEDGER

SILENT_S = 20.0
"""An actor that answers nothing, or turns no round, for this long is restarted; silent twice as long: Ray is gone."""
LEDGER_SILENT_S = 600.0
"""An actor that answers, and says that it waits for the ledger, is restarted after this: its client may be stuck,
but a restart brings no ledger back, and costs a start of Python and the list of what was set aside."""


class Verdict(StrEnum):
    """What to do about the actor now."""

    LEAVE = "LEAVE"
    RESTART = "RESTART"
    RAY_GONE = "RAY_GONE"


@dataclass(frozen=True, slots=True)
class Pulse:
    """What is known of the actor. Times are seconds of the caller's monotonic clock."""

    answered_s: float
    moved_s: float
    """When it last turned a round, or said that it cannot because it has no ledger."""
    progress: int = -1
    waits_since_s: float | None = None
    """Since when each answer has said that it waits for the ledger."""


def start(now_s: float) -> Pulse:
    """The pulse of an actor that was started at `now_s`, a monotonic time: it counts as well until then."""
    return Pulse(answered_s=now_s, moved_s=now_s)


def feel(pulse: Pulse, status: Mapping[str, Any] | None, now_s: float) -> tuple[Pulse, Verdict]:
    """Take in one answer of the actor (`supervisor.Status` as a mapping; None: there was none) and judge.

    After RESTART it has all its time again.
    """
    if status is not None:
        pulse = _answered(pulse, status, now_s)
    waited_s = 0.0 if pulse.waits_since_s is None else now_s - pulse.waits_since_s
    if now_s - pulse.answered_s > 2 * SILENT_S:
        return pulse, Verdict.RAY_GONE
    if now_s - pulse.moved_s > SILENT_S or waited_s > LEDGER_SILENT_S:
        return replace(pulse, moved_s=now_s, waits_since_s=None), Verdict.RESTART
    return pulse, Verdict.LEAVE


def _answered(pulse: Pulse, status: Mapping[str, Any], now_s: float) -> Pulse:
    pulse = replace(pulse, answered_s=now_s)
    if status["progress"] != pulse.progress:
        return replace(pulse, progress=status["progress"], moved_s=now_s, waits_since_s=None)
    if status["waiting_for"] == LEDGER:
        since_s = now_s if pulse.waits_since_s is None else pulse.waits_since_s
        return replace(pulse, moved_s=now_s, waits_since_s=since_s)
    return replace(pulse, waits_since_s=None)
