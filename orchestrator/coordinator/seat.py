"""A coordinator's entry in the ledger, for as long as it runs: who could lead, and who is there to share the work."""

from __future__ import annotations

import asyncio
import uuid

import structlog

from orchestrator.core.records import Leader
from orchestrator.ledger import paths
from orchestrator.ledger.records import encode
from orchestrator.ledger.store import Create, Delete, Op, SessionState, Store

log = structlog.get_logger(__name__)

LOOK_S = 15.0
"""The entry is looked at again this often, whatever the session says."""


class Seat:
    """`name` is in the configuration; of several coordinators each has its own."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._path = paths.seat(name)
        self._content = self._new_content()
        """Another one for each session, by which an entry is known to be of this one."""
        self._session_moved = asyncio.Event()
        store.on_session(self._session)

    def _new_content(self) -> bytes:
        return encode(Leader(self._name, uuid.uuid4().hex))

    def _session(self, state: SessionState) -> None:
        if state is SessionState.LOST:
            self._content = self._new_content()
        self._session_moved.set()

    async def tend(self) -> None:
        """One look: the entry is there and is of this session afterwards. Returns when it is time for the next one.
        Raises StoreUnavailable."""
        self._session_moved.clear()
        if self._store.session is SessionState.CONNECTED:
            await self._enter()
        try:
            async with asyncio.timeout(LOOK_S):
                await self._session_moved.wait()
        except TimeoutError:
            pass

    async def _enter(self) -> None:
        """An entry of an earlier session, ours or a predecessor's, would go with that session: it is replaced."""
        await self._store.barrier()
        found = await self._store.read(self._path)
        if found is not None and found.data == self._content:
            return
        await self._store.ensure(paths.SEATS)
        replaced: list[Op] = [Delete(self._path, found.version)] if found is not None else []
        result = await self._store.multi([*replaced, Create(self._path, self._content, ephemeral=True)])
        log.debug("seat taken", path=self._path, result=str(result))
