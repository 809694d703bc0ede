"""What the agents say right now: progress samples and run states, kept in memory while they are fresh.

One watch per live host. Nothing here is ever stored, and nothing is decided by it: an agent that falls silent takes
everything it said with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from orchestrator.core.agent import AgentSample, AttemptStatus, GuestStatus
from orchestrator.core.errors import DroverError
from orchestrator.core.records import HostRecord
from orchestrator.ledger import paths
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import Store, Versioned
from orchestrator.rpc.agent_client import AgentClients
from orchestrator.tasks import Tasks

log = structlog.get_logger(__name__)

RETRY_S = 0.5
RENEW_S = 0.05
MAX_PER_HOST = 4_096
"""Guests, and attempts, remembered of one host: those that changed last. Agents do not say what is no longer there;
each new watch begins with what is."""

T = TypeVar("T")

Listener = Callable[[str], None]
"""Uuid of a guest whose run state, or id of a migration whose sample, is new."""


@dataclass(slots=True)
class _Host:
    """One host as it is registered, and what its agent said since the present watch began."""

    record: HostRecord | None = None
    live: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """The registration moved."""
    hearing: bool = False
    guests: dict[str, GuestStatus] = field(default_factory=dict[str, GuestStatus])
    attempts: dict[str, AttemptStatus] = field(default_factory=dict[str, AttemptStatus])
    """By migration."""


class Fleet:
    """`start` it inside a running loop. Every answer is what is known at that moment, and never blocks."""

    def __init__(self, store: Store, agents: AgentClients) -> None:
        self._store = store
        self._agents = agents
        self._hosts: dict[str, _Host] = {}
        self._listeners: list[Listener] = []
        self._tasks = Tasks("samples of the fleet")
        self._following: dict[str, asyncio.Task[None]] = {}
        self._unwatch: dict[str, list[Callable[[], None]]] = {}
        self._stop_discovery: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Follow the list of hosts, and each live one's agent from then on. Does not wait for the first samples."""
        self._stop_discovery = self._store.watch_children(paths.HOSTS, self._hosts_changed)

    async def close(self) -> None:
        """End all watches and calls. What was known stays readable and grows old."""
        self._stop_discovery()
        for stops in self._unwatch.values():
            for stop in stops:
                stop()
        await self._tasks.close()
        self._following, self._unwatch = {}, {}

    # --- answers ------------------------------------------------------------------------------------------------------

    def guest(self, host: str, uuid: str) -> GuestStatus | None:
        """What the agent of `host` says about a guest; None: it is silent, or does not know it."""
        known = self._hosts.get(host)
        return known.guests.get(uuid) if known is not None else None

    def attempt(self, host: str, migration: str, attempt: int) -> AttemptStatus | None:
        """The newest sample of an attempt, from its source host; None when there is none, or of another attempt."""
        known = self._hosts.get(host)
        status = known.attempts.get(migration) if known is not None else None
        return status if status is not None and status.ref.attempt == attempt else None

    def hears(self, host: str) -> bool:
        """Whether the agent of `host` is being listened to."""
        known = self._hosts.get(host)
        return known is not None and known.hearing

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call back with everything new. Returns a function that ends it."""
        self._listeners.append(listener)

        def end() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return end

    # --- discovery ----------------------------------------------------------------------------------------------------

    def _hosts_changed(self, names: tuple[str, ...]) -> None:
        for name in names:
            if name not in self._hosts:
                host = self._hosts[name] = _Host()
                self._unwatch[name] = [
                    self._store.watch(paths.host(name), lambda node, host=host: self._registered(host, node)),
                    self._store.watch(paths.live(name), lambda node, host=host: self._alive(host, node)),
                ]
                following = self._tasks.keep(lambda host=host: self._follow(host), f"agent of {name}", again_s=RETRY_S)
                if following is not None:
                    self._following[name] = following
        for name in set(self._hosts) - set(names):
            self._forget(name)

    def _forget(self, name: str) -> None:
        for stop in self._unwatch.pop(name, []):
            stop()
        if task := self._following.pop(name, None):
            task.cancel()
        if host := self._hosts.pop(name, None):
            self._silent(host)

    def _registered(self, host: _Host, node: Versioned | None) -> None:
        try:
            record = decode(HostRecord, node.data) if node is not None and node.data else None
        except BadRecord as error:
            log.error("host record cannot be read", error=str(error))
            record = None
        if record != host.record:
            host.record = record
            host.changed.set()

    def _alive(self, host: _Host, node: Versioned | None) -> None:
        if host.live != (node is not None):
            host.live = not host.live
            host.changed.set()

    # --- one agent ----------------------------------------------------------------------------------------------------

    async def _follow(self, host: _Host) -> None:
        """Listen to the host's agent for as long as it is registered and live, again and again."""
        while True:
            host.changed.clear()
            record = host.record
            if record is None or not host.live:
                await host.changed.wait()
                continue
            hearing = asyncio.ensure_future(self._hear(host, record))
            moved = asyncio.ensure_future(host.changed.wait())
            try:
                await asyncio.wait({hearing, moved}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (hearing, moved):
                    task.cancel()
                await asyncio.gather(hearing, moved, return_exceptions=True)
                self._silent(host)
            await asyncio.sleep(RETRY_S if not host.changed.is_set() else 0)

    async def _hear(self, host: _Host, record: HostRecord) -> None:
        """Watch after watch until the agent falls silent, which is no error: nothing about it is known then."""
        address = record.control_address
        try:
            while True:
                fresh = True
                async for sample in self._agents.at(address, record.name).watch_agent():
                    if fresh:
                        host.hearing, fresh = True, False
                        host.guests, host.attempts = {}, {}
                    self._take(host, sample)
                await asyncio.sleep(RENEW_S)
        except DroverError as error:
            log.debug("agent is silent", address=address, error=str(error))
        except Exception:
            log.exception("watch of an agent failed", address=address)

    def _take(self, host: _Host, sample: AgentSample) -> None:
        for guest in sample.guests:
            _remember(host.guests, guest.guest, guest)
        for attempt in sample.attempts:
            host.attempts.pop(attempt.ref.migration, None)
            if not attempt.ended:
                _remember(host.attempts, attempt.ref.migration, attempt)
        self._tell([*(guest.guest for guest in sample.guests), *(each.ref.migration for each in sample.attempts)])

    def _silent(self, host: _Host) -> None:
        gone = [*host.guests, *host.attempts]
        host.hearing, host.guests, host.attempts = False, {}, {}
        self._tell(gone)

    def _tell(self, news: list[str]) -> None:
        for listener in list(self._listeners):
            for key in news:
                listener(key)


def _remember(known: dict[str, T], key: str, value: T) -> None:
    known.pop(key, None)
    known[key] = value
    if len(known) > MAX_PER_HOST:
        del known[next(iter(known))]
