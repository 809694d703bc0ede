"""What the shells of both sessions share."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import structlog

from agents.handover.table import InvalidTransition, key_of
from agents.handover.words import CancelTimer, Command, Event, Rang, StartTimer, Timer

log = structlog.get_logger(__name__)

State = TypeVar("State")
Stepped = tuple[State, tuple[Command, ...]]


class Mistakes:
    """Events that a machine's stage does not take. In production they are counted and logged, and the state stays."""

    strict: ClassVar[bool] = False
    """Raise InvalidTransition instead: for tests."""
    seen: ClassVar[Counter[str]] = Counter()
    """Of this process, by stage and event; metrics read it."""


def stepped(step: Callable[[State, Event], Stepped[State]], state: State, event: Event) -> Stepped[State]:
    """What the machine makes of the event; nothing if its stage does not take it."""
    try:
        return step(state, event)
    except InvalidTransition as error:
        if Mistakes.strict:
            raise
        key: Any = key_of(event)
        Mistakes.seen[f"{error.stage} {getattr(key, '__name__', key)}"] += 1
        log.error(
            "invalid transition",
            migration=error.ref.migration,
            attempt=error.ref.attempt,
            guest=error.ref.guest,
            stage=error.stage,
            received=str(event),
        )
        return state, ()


class Clock:
    """The timers of one session. They are started and cancelled at once, whatever its shell is busy with."""

    def __init__(self, feed: Callable[[Event], None], after_ms: Mapping[Timer, float]) -> None:
        """`after_ms`: how long each timer takes; those of the other half of an attempt are left out."""
        self._feed = feed
        self._after_ms = after_ms
        self._handles: dict[int, asyncio.TimerHandle] = {}

    def start(self, timer: StartTimer) -> None:
        loop = asyncio.get_running_loop()
        after_s = self._after_ms[timer.timer] / 1000
        self._handles[timer.number] = loop.call_later(after_s, self._ring, Rang(timer.timer, timer.number))

    def cancel(self, timer: CancelTimer) -> None:
        handle = self._handles.pop(timer.number, None)
        if handle is not None:
            handle.cancel()

    def close(self) -> None:
        for handle in self._handles.values():
            handle.cancel()
        self._handles.clear()

    def _ring(self, ring: Rang) -> None:
        self._handles.pop(ring.number, None)
        self._feed(ring)
