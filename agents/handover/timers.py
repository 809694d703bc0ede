"""PURE. The timers of a session: which of them run follows from its state, and each start has a number of its own.

A machine says with one function which timers its state needs (`due`). After each step the missing ones are started and
those that nothing waits for any more are cancelled, so no stage can forget either. A ring that was on its way when its
timer was cancelled carries a number that is not running: it is nobody's.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from agents.handover.words import CancelTimer, Command, Rang, StartTimer, Timer


@dataclass(frozen=True, slots=True)
class Timers:
    """Which timers run, each with the number of its start."""

    running: tuple[tuple[Timer, int], ...] = ()
    started: int = 0

    def number(self, timer: Timer) -> int | None:
        """Of the start that runs; None when it does not run."""
        return next((number for running, number in self.running if running is timer), None)

    def rang(self, event: Rang) -> Timers | None:
        """Without the timer that rang. None: it had been cancelled."""
        if not is_running(self, event):
            return None
        return Timers(tuple(each for each in self.running if each[0] is not event.timer), self.started)

    def kept(self, due: Collection[Timer]) -> tuple[Timers, tuple[Command, ...]]:
        """Just those in `due` run, and what that takes. One that runs already runs on."""
        over = tuple(CancelTimer(*each) for each in self.running if each[0] not in due)
        missing = [timer for timer in due if self.number(timer) is None]
        if not over and not missing:
            return self, ()
        begun = tuple((timer, self.started + n) for n, timer in enumerate(missing, 1))
        kept = tuple(each for each in self.running if each[0] in due)
        starts = tuple(StartTimer(*each) for each in begun)
        return Timers((*kept, *begun), self.started + len(begun)), (*over, *starts)


def is_running(timers: Timers, event: Rang) -> bool:
    """The ring is that of the newest start of its timer."""
    return timers.number(event.timer) == event.number
