"""PURE. A machine as data: which stage takes which event, and what becomes of it.

A machine lists its edges as rows (event, stages, handler), each with its reason in a comment. An event that may come
late or twice has an edge to `ignored` that says why. What no row names is an `InvalidTransition`: somebody's mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, TypeVar

from agents.handover.words import Command, Event, Rang, Seen, Timer
from orchestrator.core.ids import AttemptRef

Stage = TypeVar("Stage", bound=StrEnum)
State = TypeVar("State")

Key = Seen | Timer | type
"""What a table tells events apart by: those without content by themselves, rings by their timer, others by type."""

Handler = Callable[..., tuple[Any, tuple[Command, ...]]]
"""Called with the state, and with the event if that has content other than a timer."""

Row = tuple[Key, Iterable[Stage], Handler]


class InvalidTransition(Exception):
    """A machine was told something that its stage does not take. The state is as it was."""

    def __init__(self, ref: AttemptRef, stage: StrEnum, event: Event) -> None:
        super().__init__(f"attempt {ref.attempt} of {ref.migration}, guest {ref.guest}: {stage} does not take {event}")
        self.ref = ref
        self.stage = stage
        self.event = event


def key_of(event: Event) -> Key:
    """Under which key a table has the event."""
    if isinstance(event, Rang):
        return event.timer
    return event if isinstance(event, Seen) else type(event)


def table(rows: Iterable[Row[Stage]]) -> dict[tuple[Stage, Key], Handler]:
    """Raises ValueError if two rows speak of the same stage and event."""
    made: dict[tuple[Stage, Key], Handler] = {}
    for key, stages, handler in rows:
        for stage in stages:
            if (stage, key) in made:
                raise ValueError(f"two edges for {key} in {stage}")
            made[stage, key] = handler
    return made


def ignored(state: State, _event: Event | None = None) -> tuple[State, tuple[Command, ...]]:
    """An event that may come here, and changes nothing; why it may stands beside the edge."""
    return state, ()
