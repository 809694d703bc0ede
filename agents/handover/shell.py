"""What the shells of both sessions share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import structlog

from agents.handover.table import InvalidTransition, key_of
from agents.handover.words import Command, Event

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
