"""Which ledger this host believes: the one that it has known, or one that was put in its place before its agent's eyes.

A ledger that was restored from an older state, or made anew, says wrong things about every guest that has moved since.
Its incarnation tells: an agent remembers the id on its disk, and of a ledger with another one it believes nothing, but
for one that says that it `follows` the known one, as an import does after it has asked all agents. Until then guests
run on as they are, and nothing new begins here (docs/adr/0061).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from agents.host.journal import Journal
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import Incarnation
from orchestrator.ledger import paths
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import SessionState, Store, StoreUnavailable, Versioned

log = structlog.get_logger(__name__)


class Believed:
    """One look at the ledger per session, and one whenever the node moves, however many ask. `watch` once."""

    def __init__(self, host: str, store: Store, journal: Journal) -> None:
        self._host = host
        self._store = store
        self._journal = journal
        self._turn = asyncio.Lock()
        self._moves = 0
        self._looked = -1
        """`_moves` at the last look that was not overtaken."""
        self._said: str = ""
        self.on_change: Callable[[], None] = lambda: None
        """Called when the answer may be another one now."""
        self._unwatch: Callable[[], None] = lambda: None
        store.on_session(self._session)

    def watch(self) -> None:
        """Hear of it when another ledger is announced."""
        self._unwatch = self._store.watch(paths.INCARNATION, lambda _: self._moved())

    def close(self) -> None:
        """End the watch."""
        self._unwatch()

    def _session(self, _state: SessionState) -> None:
        self._moves += 1  # behind a new connection there may be another ledger

    def _moved(self) -> None:
        self._moves += 1
        self.on_change()

    @property
    def id(self) -> str:
        """Of the ledger that is believed; empty: none has said yet which it is."""
        return self._journal.incarnation

    @property
    def settled(self) -> bool:
        """The ledger is believed, and nothing has happened since that was found out."""
        return self._looked == self._moves and not self._said

    @property
    def said(self) -> str:
        """Why it is not believed, as far as is known; empty: it is."""
        return self._said

    async def doubt(self) -> str:
        """Why nothing that the ledger says now, or said since the session began, is believed; empty: it is. Raises
        StoreUnavailable."""
        while self._looked != self._moves:
            async with self._turn:
                moves = self._moves
                if self._looked == moves:
                    break
                await self._store.barrier()
                said = await self._judge(await self._store.read(paths.INCARNATION))
                if said and said != self._said:
                    log.error("the ledger is not believed: guests run on, nothing new begins here", why=said)
                self._said, self._looked = said, moves
        return self._said

    async def must_believe(self) -> None:
        """Raises OLD_RECORD for a ledger that is not believed, LEDGER_UNREACHABLE when that cannot be found out."""
        try:
            said = await self.doubt()
        except StoreUnavailable as error:
            raise DroverError(RefusalReason.LEDGER_UNREACHABLE, f"{self._host}: {error}") from error
        if said:
            raise DroverError(RefusalReason.OLD_RECORD, f"{self._host} begins nothing: {said}")

    async def rejoin(self, incarnation: str) -> None:
        """Believe the ledger of that id from now on: an operator's word. Raises INVALID_ARGUMENT when the ledger has
        another id, LEDGER_UNREACHABLE."""
        try:
            await self._store.barrier()
            found = _of(await self._store.read(paths.INCARNATION))
        except (StoreUnavailable, BadRecord) as error:
            raise DroverError(RefusalReason.LEDGER_UNREACHABLE, f"{self._host}: {error}") from error
        if found is None or found.id != incarnation:
            said = f"{self._host} reads incarnation {found.id if found else 'none'} in the ledger, not {incarnation}"
            raise DroverError(RefusalReason.INVALID_ARGUMENT, said, field="incarnation")
        log.warning("the ledger is believed on an operator's word", incarnation=incarnation, before=self.id)
        await self._journal.see_incarnation(incarnation)
        self._moved()

    async def _judge(self, node: Versioned | None) -> str:
        try:
            found = _of(node)
        except BadRecord as error:
            return str(error)
        known: str = self._journal.incarnation
        if found is None or found.id == known:  # one that does not say which it is says nothing against the guests
            return ""
        announced = known in found.follows and self._host in found.hosts
        if known and not announced:
            return (
                f"it is another one than this host has known (incarnation {found.id}, not {known}), and was not put in "
                f"its place by an import: put the right one back, or, if it is to be this one, `drover host rejoin "
                f"{self._host}`"
            )
        log.info("the ledger is believed", incarnation=found.id, before=known)
        await self._journal.see_incarnation(found.id)
        return ""


def _of(node: Versioned | None) -> Incarnation | None:
    return decode(Incarnation, node.data, path=paths.INCARNATION) if node is not None and node.data else None
