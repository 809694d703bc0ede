"""PURE. What an operator wants to be woken for, out of what an API shows: each trouble once when it begins, and once
when it is over.

Nothing is stored anywhere. Whoever begins to look is told of what is wrong at that moment, so a reader that was away
has missed nothing that still matters, and only that a trouble came and went meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

KEPT = 10_000
"""Jobs that have ended and are remembered, so that their end is told once."""


class EventKind(StrEnum):
    """What happened; the words that programs go by."""

    GUEST_CRASHED = "GUEST_CRASHED"
    HOST_SILENT = "HOST_SILENT"
    """Its agent has no session; its guests may well run."""
    HOST_BACK = "HOST_BACK"
    MIGRATION_FAILED = "MIGRATION_FAILED"
    """For good: no further attempt. The guest is where it was."""
    EVACUATION_FAILED = "EVACUATION_FAILED"
    """It ended, and guests are left."""
    EVACUATION_BLOCKED = "EVACUATION_BLOCKED"
    """It goes on, and a guest cannot leave as things are."""
    NOBODY_LEADS = "NOBODY_LEADS"
    LEADS_AGAIN = "LEADS_AGAIN"
    QUARANTINED = "QUARANTINED"
    API_UNREACHABLE = "API_UNREACHABLE"
    API_BACK = "API_BACK"


_PAGES = frozenset({EventKind.GUEST_CRASHED, EventKind.HOST_SILENT, EventKind.NOBODY_LEADS, EventKind.API_UNREACHABLE})
_GOOD = frozenset({EventKind.HOST_BACK, EventKind.LEADS_AGAIN, EventKind.API_BACK})


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened."""

    kind: EventKind
    subject: str
    """guests/NAME, hosts/NAME, migrations/ID, evacuations/ID, coordinator or api."""
    message: str

    @property
    def severity(self) -> str:
        """`page`: look now. `ticket`: look in working hours. `info`: a trouble is over."""
        if self.kind in _GOOD:
            return "info"
        return "page" if self.kind in _PAGES else "ticket"


class Observer:
    """Told everything that is seen, as often as it is seen; answers what of it is news."""

    def __init__(self) -> None:
        self._crashed: set[str] = set()
        self._silent: set[str] = set()
        self._told: OrderedDict[str, None] = OrderedDict()
        self._blocked: dict[str, frozenset[str]] = {}
        self._leads = True
        self._quarantined: frozenset[str] = frozenset()
        self._away = False

    def guest(self, uuid: str, name: str, ownership: str, host: str, message: str) -> list[Event]:
        """A guest as it is now."""
        if ownership != "CRASHED":
            self._crashed.discard(uuid)
            return []
        if uuid in self._crashed:
            return []
        self._crashed.add(uuid)
        return [Event(EventKind.GUEST_CRASHED, f"guests/{name}", message or f"{name} does not run any more on {host}")]

    def migration(self, name: str, guest: str, phase: str, failure: str, message: str) -> list[Event]:
        """A migration as it is now."""
        if phase != "FAILED" or not self._is_news(name):
            return []
        said = f"{guest} was not moved: {failure}" + (f": {message}" if message else "")
        return [Event(EventKind.MIGRATION_FAILED, f"migrations/{name}", said)]

    def evacuation(
        self, name: str, host: str, phase: str, failure: str, message: str, blocked: Mapping[str, str]
    ) -> list[Event]:
        """An evacuation as it is now. `blocked`: guests that cannot leave, and why."""
        if phase not in ("PENDING", "RUNNING"):
            self._blocked.pop(name, None)
        if phase == "FAILED" and self._is_news(name):
            said = f"{host} is not empty: {failure}" + (f": {message}" if message else "")
            return [Event(EventKind.EVACUATION_FAILED, f"evacuations/{name}", said)]
        if phase != "RUNNING":
            return []
        before = self._blocked.get(name, frozenset())
        self._blocked[name] = frozenset(blocked)
        return [
            Event(EventKind.EVACUATION_BLOCKED, f"evacuations/{name}", f"{guest} cannot leave {host}: {why}")
            for guest, why in sorted(blocked.items())
            if guest not in before
        ]

    def hosts(self, silent: Mapping[str, bool]) -> list[Event]:
        """All hosts, and which are silent."""
        events: list[Event] = []
        for host, is_silent in sorted(silent.items()):
            if is_silent and host not in self._silent:
                said = f"the agent of {host} has no session; its guests may well run"
                events.append(Event(EventKind.HOST_SILENT, f"hosts/{host}", said))
            if not is_silent and host in self._silent:
                events.append(Event(EventKind.HOST_BACK, f"hosts/{host}", f"the agent of {host} is there again"))
        self._silent = {host for host, is_silent in silent.items() if is_silent}
        return events

    def health(self, leader: str, quarantined: Mapping[str, str]) -> list[Event]:
        """Who leads (empty: nobody), and what is set aside with its reason."""
        events: list[Event] = []
        if not leader and self._leads:
            said = "no coordinator leads: nothing begins, nothing is retried; guests run on"
            events.append(Event(EventKind.NOBODY_LEADS, "coordinator", said))
        if leader and not self._leads:
            events.append(Event(EventKind.LEADS_AGAIN, "coordinator", f"{leader} leads"))
        self._leads = bool(leader)
        events += [
            Event(EventKind.QUARANTINED, resource, f"set aside, and tried again: {why}")
            for resource, why in sorted(quarantined.items())
            if resource not in self._quarantined
        ]
        self._quarantined = frozenset(quarantined)
        return events

    def away(self, why: str) -> list[Event]:
        """No API answers."""
        news = [] if self._away else [Event(EventKind.API_UNREACHABLE, "api", why)]
        self._away = True
        return news

    def back(self) -> list[Event]:
        """An API answers."""
        news = [Event(EventKind.API_BACK, "api", "an API answers again")] if self._away else []
        self._away = False
        return news

    def _is_news(self, job: str) -> bool:
        if job in self._told:
            return False
        self._told[job] = None
        while len(self._told) > KEPT:
            self._told.popitem(last=False)
        return True
