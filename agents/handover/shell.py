"""What the shells of both sessions share: events in, one step of the machine, commands out; timers, notes, tasks.

A task that fails with what nobody foresaw ends the session loudly: `_drive` raises it, and the guest's keeper ends the
attempt as after a restart of the agent (H7). Nothing is decided here.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import structlog

from agents.handover.table import InvalidTransition, key_of
from agents.handover.words import CancelTimer, Command, Do, Event, Note, Rang, Seen, StartTimer, Timer
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.records import TimelineEntry
from orchestrator.tasks import Tasks

log = structlog.get_logger(__name__)

RETRY_S = 0.1
"""Between two tries of what has no clear outcome, and between two copies of a message that is repeated."""
_END_S = 5.0


class Stage(Protocol):
    """Where a machine stands; what this file needs to know of it."""

    @property
    def ended(self) -> bool:
        """No event is taken any more, and the shell may stop."""
        ...


class SessionState(Protocol):
    """What both machines' states have."""

    @property
    def ref(self) -> AttemptRef:
        """The attempt that this session is one half of."""
        ...

    @property
    def here(self) -> HostRef:
        """The host that this half runs on, in its present power cycle."""
        ...

    @property
    def stage(self) -> Stage:
        """Where the machine stands; ends the shell once it has `ended`."""
        ...


State = TypeVar("State")
Session = TypeVar("Session", bound=SessionState)
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
        """Feed `Rang` once the time of this timer is over. Its number tells it from earlier ones of the same kind."""
        loop = asyncio.get_running_loop()
        after_s = self._after_ms[timer.timer] / 1000
        self._handles[timer.number] = loop.call_later(after_s, self._ring, Rang(timer.timer, timer.number))

    def cancel(self, timer: CancelTimer) -> None:
        """One that has rung or was never started is no mistake; its `Rang` may still be on its way."""
        handle = self._handles.pop(timer.number, None)
        if handle is not None:
            handle.cancel()

    def close(self) -> None:
        """Cancel all timers."""
        for handle in self._handles.values():
            handle.cancel()
        self._handles.clear()

    def _ring(self, ring: Rang) -> None:
        self._handles.pop(ring.number, None)
        self._feed(ring)


class Shell(Generic[Session]):
    """Drives one machine to its end. Shells derive from it, set it up first, and carry out what `_take` is given."""

    state: Session
    timeline: list[TimelineEntry]

    def _set_up(
        self, step: Callable[[Session, Event], Stepped[Session]], after_ms: Mapping[Timer, float], half: str
    ) -> None:
        self._step = step
        self._events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._commands: asyncio.Queue[Command] = asyncio.Queue()
        self._clock = Clock(self.feed, after_ms)
        ref = self.state.ref
        self._tasks = Tasks(f"{half} of attempt {ref.attempt} of {ref.migration}")
        self._began = 0.0
        self._retry: asyncio.TimerHandle | None = None

    @property
    def elapsed_ms(self) -> float:
        """Since the attempt began here, by the loop's own clock; 0 before."""
        return (asyncio.get_running_loop().time() - self._began) * 1000 if self._began else 0.0

    def feed(self, event: Event) -> None:
        """Take in an event; from this loop only."""
        self._events.put_nowait(event)

    async def _drive(self) -> None:
        """Until the machine has ended. Raises what ended a task of this session."""
        while not self.state.stage.ended:
            event = await self._events.get()
            if isinstance(event, BaseException):
                raise event
            stage = self.state.stage
            self.state, commands = stepped(self._step, self.state, event)
            if self.state.stage is not stage:
                self._no_retry()
            for command in commands:
                self._queue(command)

    async def _close(self) -> None:
        """Bounded: a call that swallows its cancellation must not make the guest unmovable."""
        self._clock.close()
        self._no_retry()
        await self._tasks.close(_END_S)

    def _queue(self, command: Command) -> None:
        """Notes and timers are carried out at once, everything else in turn."""
        match command:
            case Note(event, detail):
                self._note(event, detail)
            case StartTimer():
                self._clock.start(command)
            case CancelTimer():
                self._clock.cancel(command)
            case _:
                self._take(command)

    def _take(self, command: Command) -> None:
        if command is Do.RETRY_LATER:
            self._retry_later()
        else:
            self._commands.put_nowait(command)

    def _retry_later(self) -> None:
        """RETRY_DUE after a pause, beside everything else: no other command waits for it. One at a time, for the stage
        that asks."""
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(RETRY_S, self._retry_due)

    def _no_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _retry_due(self) -> None:
        self._retry = None
        self.feed(Seen.RETRY_DUE)

    def _spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any] | None:
        """Beside everything else, until the session ends. An exception that it does not handle itself ends the session;
        None: it is over already."""
        return self._tasks.spawn(work, name, failed=self._events.put_nowait)

    def _note(self, event: str, detail: str = "") -> None:
        """A line of the time line, and of the log."""
        at_ms = (asyncio.get_running_loop().time() - self._began) * 1000
        self.timeline.append(TimelineEntry(round(at_ms, 2), self.state.here.host, event, detail))
        ref = self.state.ref
        log.info(event, migration=ref.migration, attempt=ref.attempt, detail=detail)
