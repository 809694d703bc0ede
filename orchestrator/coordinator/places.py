"""The queue of `core.admission` at work: migrations wait here for their places, say what for, and are not forgotten.

What a waiting migration waits for, and how much of its total timeout that has cost, is written to its state now and
then, so that users read it and the next coordinator does not begin to count anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace

import structlog

from orchestrator.coordinator.driver import STORE_RETRY_S, epoch_write
from orchestrator.core.admission import Admission, Ticket
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.records import MigrationSpec, MigrationState, WaitingFor
from orchestrator.ledger import paths
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.ledger.store import SetData, Store, StoreUnavailable, Versioned

log = structlog.get_logger(__name__)

TEND_S = 0.5
TELL_AFTER_S = 1.0
"""A wait that is shorter is not worth a write."""
TELL_AGAIN_S = 5.0
"""What one migration says changes at most this often."""
REMEMBER_S = 30.0
"""At most so much of a waiting migration's time is lost with its coordinator."""
TELLS_PER_TURN = 20
"""A thousand that wait must not load the ledger like a thousand that run."""
COMMITTED_HOLD_S = 20.0
"""A migration that was committed loads no link any more. It keeps its places for the moment that its end takes, not
until a destination that died comes back."""


@dataclass(slots=True)
class _Waiting:
    ticket: Ticket
    since_s: float
    spent_ms: float
    """Before it came here."""
    called: asyncio.Future[None]
    told: str = ""
    told_at_s: float = field(default=float("-inf"))


def _nothing() -> None:
    pass


class Places:
    """Of one coordinator. Everything it waits for in the ledger is tried again in the next turn."""

    def __init__(
        self,
        store: Store,
        *,
        max_concurrent: int,
        max_per_source: int,
        shard: int = 0,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._shard = shard
        self._admission = Admission(max_concurrent=max_concurrent, max_per_source=max_per_source)
        self._clock_s = clock_s
        self._waiting: dict[str, _Waiting] = {}
        self._since_s: dict[str, float] = {}
        """Since when those who have places have them."""

    def turns(self) -> list[str]:
        """What keeps each of those that wait: SOURCE, too many leave its source already, or CLUSTER."""
        return self._admission.turns()

    @contextlib.asynccontextmanager
    async def held(self, spec: MigrationSpec, source: str) -> AsyncGenerator[None]:
        """For a migration that is under way already: holding it back would only stall it."""
        self._admission.hold(Ticket(spec.id, source, spec.evacuation))
        async with self._occupied(spec.id):
            yield

    @contextlib.asynccontextmanager
    async def turn(
        self, spec: MigrationSpec, source: str, state: MigrationState, epoch: int, *, waited_s: float = 0.0
    ) -> AsyncGenerator[None]:
        """Wait for the migration's turn and have its places inside. `waited_s`: it has waited before, unwritten so far.

        A migration whose total timeout runs out while it waits, or that somebody ends meanwhile, gets in without a
        place: it takes none to be told its end. Raises Deposed.
        """
        ticket = Ticket(spec.id, source, spec.evacuation)
        now_s = self._clock_s()
        waiting = _Waiting(ticket, now_s, state.spent_ms + waited_s * 1000, asyncio.get_running_loop().create_future())
        self._admission.add(ticket)
        self._waiting[spec.id] = waiting
        self._call()

        def seen(node: Versioned | None) -> None:
            self._look(waiting, node)

        unwatch = _nothing
        if not waiting.called.done():  # as a rule it is, and nobody need be heard meanwhile
            unwatch = self._store.watch(paths.migration_state(spec.id), seen)
        try:
            left_s = max(0.0, spec.policy.total_timeout_ms - waiting.spent_ms) / 1000
            await asyncio.wait([waiting.called], timeout=left_s)
            if not waiting.called.done():
                self._admission.leave(spec.id)
            unwatch()
            del self._waiting[spec.id]
            if waiting.told or self._clock_s() - now_s + waited_s >= TELL_AFTER_S:
                await self._until_told(waiting, epoch)
            async with self._occupied(spec.id):
                yield
        finally:
            unwatch()
            self._waiting.pop(spec.id, None)
            self._admission.leave(spec.id)
            self._call()

    async def tend(self, epoch: int) -> None:
        """For ever: let those who wait say so, and give back the places of those who will not need them."""
        while True:
            await asyncio.sleep(TEND_S)
            with contextlib.suppress(StoreUnavailable):
                await self._tell_some(epoch)
                await self._free_committed()

    @contextlib.asynccontextmanager
    async def _occupied(self, migration: str) -> AsyncGenerator[None]:
        self._since_s[migration] = self._clock_s()
        try:
            yield
        finally:
            del self._since_s[migration]
            self._admission.leave(migration)
            self._call()

    def _call(self) -> None:
        for ticket in self._admission.admit():
            waiting = self._waiting.get(ticket.migration)
            if waiting is not None and not waiting.called.done():
                waiting.called.set_result(None)

    # --- what they say ------------------------------------------------------------------------------------------------

    async def _tell_some(self, epoch: int) -> None:
        """Those who have been silent for longest first."""
        now_s = self._clock_s()
        due = [waiting for waiting in self._waiting.values() if self._is_due(waiting, now_s)]
        due.sort(key=lambda waiting: waiting.told_at_s)
        for waiting in due[:TELLS_PER_TURN]:
            if not waiting.called.done():
                await self._tell(waiting, self._admission.why(waiting.ticket.migration), epoch)

    def _is_due(self, waiting: _Waiting, now_s: float) -> bool:
        silent_s = now_s - max(waiting.told_at_s, waiting.since_s)
        if waiting.called.done() or silent_s < TELL_AFTER_S:
            return False
        if silent_s >= REMEMBER_S or not waiting.told:
            return True
        return silent_s >= TELL_AGAIN_S and waiting.told != self._admission.why(waiting.ticket.migration)

    async def _until_told(self, waiting: _Waiting, epoch: int) -> None:
        """That it waits no longer, and what the wait has cost: its driver counts from there."""
        while True:
            try:
                if await self._tell(waiting, "", epoch):
                    return
            except StoreUnavailable:
                await asyncio.sleep(STORE_RETRY_S)

    async def _tell(self, waiting: _Waiting, said: str, epoch: int) -> bool:
        """False: others were quicker with the same node. True: told, or there is nobody to tell any more."""
        migration = waiting.ticket.migration
        path = paths.migration_state(migration)
        node = await self._store.read(path)
        state = self._look(waiting, node)
        if node is None or state is None:
            return True
        now_s = self._clock_s()
        spent_ms = waiting.spent_ms + (now_s - waiting.since_s) * 1000
        what = WaitingFor.PLACE if said else None
        if not said and not waiting.told:
            said, what = state.message, state.waiting_for  # it waits for something else as well, which stays true
        new = replace(state, message=said, waiting_for=what, spent_ms=spent_ms, epoch=epoch)
        waiting.told, waiting.told_at_s = said, now_s
        return await epoch_write(self._store, epoch, [SetData(path, encode(new), node.version)], self._shard)

    def _look(self, waiting: _Waiting, node: Versioned | None) -> MigrationState | None:
        """None: the migration waits no longer, since somebody ended it (or its node cannot be read, which its driver
        will say)."""
        with contextlib.suppress(BadRecord):
            state = decode(MigrationState, node.data) if node is not None and node.data else None
            if state is not None and not state.phase.terminal:
                return state
        self._admission.leave(waiting.ticket.migration)
        if not waiting.called.done():
            waiting.called.set_result(None)
        return None

    # --- places that nobody needs -------------------------------------------------------------------------------------

    async def _free_committed(self) -> None:
        now_s = self._clock_s()
        for ticket in self._admission.running():
            since_s = self._since_s.get(ticket.migration, now_s)
            if now_s - since_s < COMMITTED_HOLD_S:
                continue
            self._since_s[ticket.migration] = now_s
            if await self._is_committed(ticket.migration):
                log.info("committed, and its end is not in sight: its places are free", migration=ticket.migration)
                self._admission.leave(ticket.migration)
                self._call()

    async def _is_committed(self, migration: str) -> bool:
        try:
            spec_node = await self._store.read(paths.migration(migration))
            if spec_node is None:
                return False
            spec = decode(MigrationSpec, spec_node.data, path=paths.migration(migration))
            node = await self._store.read(paths.guest(spec.guest))
            record = decode(GuestRecord, node.data, path=paths.guest(spec.guest)) if node is not None else None
        except BadRecord:
            return False
        return record is not None and record.phase is Ownership.COMMITTED and record.migration == migration
