"""What happens while the host is emptied: somebody watches every migration, and pauses a guest at the right instant.

The watch runs beside the evacuation, in threads of its own. It notes when it saw what, on the clock that the collector
stamps the guests' lines with (one machine, one CLOCK_MONOTONIC).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.lab.cluster.evidence import Window
from deploy.lab.demo.judge import OPERATOR, OperatorPause, Role
from deploy.lab.demo.staging import client_of
from orchestrator import wire
from orchestrator.core.errors import DroverError

if TYPE_CHECKING:
    from orchestrator.rpc.messages import Migration

AFTERMATH_NS = 200_000_000
"""How long after its arrival was seen a guest counts as left alone again."""
LAST_NEWS_S = 5.0
_TERMINAL = frozenset({"SUCCEEDED", "CANCELLED", "FAILED"})
_ABORTED = frozenset({"ABORTING", "RETRY_WAIT", "CANCELLED", "FAILED"})


@dataclass
class Sight:
    """What was seen of one guest's migration, and when; never earlier than it happened."""

    migration: str = ""
    first_ns: int = 0
    over_ns: int = 0
    attempt: int = 0
    aborts_ns: list[int] = field(default_factory=list[int])
    """First sight of the end of each attempt that was aborted."""

    def see(self, message: Migration, ns: int) -> None:
        """Take note of the migration as the API told of it at `ns`; only what is seen for the first time gets a
        stamp."""
        phase = wire.word(message, "phase")
        self.migration = message.name
        self.first_ns = self.first_ns or ns
        self.attempt = max(self.attempt, message.attempt)
        aborted = self.attempt - 1 + (message.attempt == self.attempt and phase in _ABORTED)
        self.aborts_ns += [ns] * (aborted - len(self.aborts_ns))
        if phase in _TERMINAL:
            self.over_ns = self.over_ns or ns

    def left_alone(self, start_ns: int, end_ns: int) -> tuple[Window, ...]:
        """Before its migration was created, and after it had arrived."""
        spans = [(start_ns, self.first_ns or end_ns)]
        spans += [(self.over_ns + AFTERMATH_NS, end_ns)] if self.over_ns else []
        return tuple(Window(start, end) for start, end in spans if start < end)


class Incidents:
    """Watches from `__enter__` to `__exit__`. Every wait in it is bounded."""

    def __init__(self, directory: Path, roles: Iterable[Role]) -> None:
        roles = tuple(roles)
        self._waiting_for = {role.name for role in roles}
        self._to_pause = {role.name for role in roles if role.stopped_by == OPERATOR}
        self._client = client_of(directory)
        self._news = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._over = False
        self.began_ns = 0
        self.sights: dict[str, Sight] = {}
        self.pauses: dict[str, OperatorPause] = {}
        self.mishaps: list[str] = []

    def __enter__(self) -> Incidents:
        self.began_ns = time.monotonic_ns()
        self._spawn("the watch of the migrations", self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._client.close()
        for thread in self._threads:
            thread.join(LAST_NEWS_S)

    def await_last_news(self) -> None:
        """The watch may lag a little behind the end of the evacuation."""
        with self._news:
            self._news.wait_for(lambda: not self._waiting_for, LAST_NEWS_S)

    def resume(self, guest: str) -> None:
        """The operator lets a guest that was paused run again. Raises DroverError."""
        ns = time.monotonic_ns()
        self._client.resume_guest(guest)
        self.pauses[guest] = replace(self.pauses[guest], resumed_ns=ns)

    # --- threads ------------------------------------------------------------------------------------------------------

    def _spawn(self, what: str, act: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                act()
            except DroverError as error:
                if not self._over:
                    self.mishaps.append(f"{what} failed: {error}")

        thread = threading.Thread(target=guarded, name=what, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _watch(self) -> None:
        for message in self._client.watch_migrations():
            ns = time.monotonic_ns()
            guest = message.guest
            with self._news:
                sight = self.sights.setdefault(guest, Sight())
                sight.see(message, ns)
                if sight.over_ns:
                    self._waiting_for.discard(guest)
                self._news.notify_all()
            pending = tuple(dict.fromkeys(ack.device for ack in message.progress.pending_acks))
            if guest in self._to_pause and pending and wire.word(message, "phase") == "PRECOPY":
                self._to_pause.remove(guest)
                # Beside the watch, whose stamps must not wait for the answer.
                self._spawn(f"the pause of {guest}", lambda guest=guest, p=pending: self._pause(guest, p))

    def _pause(self, guest: str, pending: tuple[str, ...]) -> None:
        asked_ns = time.monotonic_ns()
        self.pauses[guest] = OperatorPause(pending, asked_ns)
        answer = self._client.pause_guest(guest)
        if wire.word(answer, "wish") == "APPLIED":
            self.pauses[guest] = replace(self.pauses[guest], effective_ns=time.monotonic_ns())
