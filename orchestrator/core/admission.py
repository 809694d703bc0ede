"""Who may begin next: the queue in front of the cluster's places. Pure: no clock, no I/O.

A migration under way takes one of the cluster's places and one of the places of its source, whose link it loads. It is
given both or neither: a migration that waits for its source holds nothing that another source could use.

Turns go round. Sources follow each other in a ring; within a source its jobs do (an evacuation is a job, and so are all
migrations together that users asked for one by one); within a job, first come, first served. A source or a job that has
had its turn goes to the end of its ring, so nobody is overtaken more often than once per turn by each of the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True, slots=True)
class Ticket:
    """One migration in the queue."""

    migration: str
    source: str
    """Host that it leaves."""
    job: str = ""
    """Evacuation that asked for it; empty: a user did."""


_Line = OrderedDict[str, Ticket]
"""Tickets of one job on one source, in the order in which they came."""
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Admission:
    """The queue and the places. `add` or `hold` a ticket, `admit` whoever may begin, `leave` at the end."""

    def __init__(self, *, max_concurrent: int, max_per_source: int) -> None:
        self._max_concurrent = max_concurrent
        self._max_per_source = max_per_source
        self._waiting: OrderedDict[str, OrderedDict[str, _Line]] = OrderedDict()
        """Ring of sources, each with its ring of jobs."""
        self._tickets: dict[str, Ticket] = {}
        """Everybody who waits, by migration."""
        self._running: dict[str, Ticket] = {}
        self._per_source: dict[str, int] = {}

    def waiting(self) -> tuple[Ticket, ...]:
        """In the order in which they came."""
        return tuple(self._tickets.values())

    def running(self) -> tuple[Ticket, ...]:
        """Tickets that hold a place now, in the order in which they were admitted."""
        return tuple(self._running.values())

    def add(self, ticket: Ticket) -> None:
        """Join the queue. A migration that waits or runs already stays where it is."""
        if ticket.migration in self._tickets or ticket.migration in self._running:
            return
        self._tickets[ticket.migration] = ticket
        jobs = self._waiting.setdefault(ticket.source, OrderedDict())
        jobs.setdefault(ticket.job, OrderedDict())[ticket.migration] = ticket

    def hold(self, ticket: Ticket) -> None:
        """Take the places without a turn, also beyond the limits: the migration is under way, whoever admitted it."""
        self.leave(ticket.migration)
        self._running[ticket.migration] = ticket
        self._per_source[ticket.source] = self._per_source.get(ticket.source, 0) + 1

    def leave(self, migration: str) -> None:
        """Give up the turn or the places; nothing happens to a migration that is not here."""
        if (ticket := self._tickets.get(migration)) is not None:
            self._unqueue(ticket, served=False)
        if (ticket := self._running.pop(migration, None)) is not None:
            left = self._per_source[ticket.source] - 1
            if left:
                self._per_source[ticket.source] = left
            else:
                del self._per_source[ticket.source]

    def admit(self) -> Iterator[Ticket]:
        """Everybody who may begin now, in turn. Each takes its places as it is handed out."""
        while (ticket := self._next()) is not None:
            self._unqueue(ticket, served=True)
            self.hold(ticket)
            yield ticket

    def why(self, migration: str) -> str:
        """What a waiting migration waits for, as a sentence; empty for one that does not wait."""
        ticket = self._tickets.get(migration)
        if ticket is None:
            return ""
        if self._full(ticket.source):
            whose, taken, limit = f"are leaving {ticket.source}", self._per_source[ticket.source], self._max_per_source
        elif len(self._running) >= self._max_concurrent:
            whose, taken, limit = "are under way in the cluster", len(self._running), self._max_concurrent
        else:
            return "waiting for its turn"
        return f"waiting for a place: {taken} of at most {limit} migrations {whose} already"

    def turns(self) -> list[str]:
        """For each ticket that waits, whose limit keeps it: SOURCE or CLUSTER."""
        return ["SOURCE" if self._full(ticket.source) else "CLUSTER" for ticket in self._tickets.values()]

    def _full(self, source: str) -> bool:
        return self._per_source.get(source, 0) >= self._max_per_source

    def _next(self) -> Ticket | None:
        """The first source in the ring that has a place; its first job; that job's first migration."""
        if len(self._running) >= self._max_concurrent:
            return None
        for source, jobs in self._waiting.items():
            if not self._full(source):
                line = next(iter(jobs.values()))
                return next(iter(line.values()))
        return None

    def _unqueue(self, ticket: Ticket, *, served: bool) -> None:
        """Out of its line. `served`: its job and its source have had their turn and go to the ends of their rings."""
        del self._tickets[ticket.migration]
        jobs = self._waiting[ticket.source]
        line = jobs[ticket.job]
        del line[ticket.migration]
        _turn(jobs, ticket.job, keep=bool(line), served=served)
        _turn(self._waiting, ticket.source, keep=bool(jobs), served=served)


def _turn(ring: OrderedDict[_Key, _Value], key: _Key, *, keep: bool, served: bool) -> None:
    if not keep:
        del ring[key]
    elif served:
        ring.move_to_end(key)
