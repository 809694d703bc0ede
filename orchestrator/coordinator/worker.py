"""Runs drivers: what a Ray worker process, or the coordinator itself without Ray, does with (migration, epoch)."""

from __future__ import annotations

import asyncio

from orchestrator.coordinator.driver import STORE_RETRY_S, Deposed, Driver, Tools, must_lead, until_available
from orchestrator.coordinator.ports import AgentDirectory
from orchestrator.core.records import MigrationSpec
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.records import decode
from orchestrator.ledger.store import Store, StoreUnavailable


class Worker:
    """Many migrations as coroutines over one store session and one set of channels.

    Driving the same migration twice at once is safe (every write is a compare-and-set) but wasteful, so a second
    request for it joins the first, unless it comes from a newer epoch, which ends the older drivers.
    """

    def __init__(self, store: Store, agents: AgentDirectory, *, max_arrivals: int = 0) -> None:
        self._store = store
        self._agents = agents
        self._max_arrivals = max_arrivals
        self._index = Index(store)
        self._tools: Tools | None = None
        self._running: dict[str, asyncio.Task[str]] = {}

    @property
    def driving(self) -> int:
        """How many migrations it drives now."""
        return len(self._running)

    async def drive(self, migration: str, epoch: int) -> str:
        """Returns the terminal phase; "DEPOSED" when `epoch` is over. Raises BadRecord for an unreadable node."""
        tools = await self._tools_of(epoch)
        if tools is None:
            return "DEPOSED"
        task = self._running.get(migration)
        if task is None:
            task = asyncio.create_task(self._drive(migration, tools))
            self._running[migration] = task
            task.add_done_callback(lambda _done: self._running.pop(migration, None))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                return "DEPOSED"
            raise

    async def _tools_of(self, epoch: int) -> Tools | None:
        """None: `epoch` is over. A lower one than before may be the newest all the same, after a restore."""
        if self._tools is not None and epoch < self._tools.epoch:
            try:
                await until_available(lambda: must_lead(self._store, epoch))
            except Deposed:
                return None
        if self._tools is None or epoch != self._tools.epoch:
            self.stop()
            self._tools = Tools(self._store, self._agents, self._index, epoch, max_arrivals=self._max_arrivals)
        return self._tools

    async def _drive(self, migration: str, tools: Tools) -> str:
        try:
            return await Driver(tools, await self._spec(migration)).run()
        except Deposed:
            return "DEPOSED"

    async def _spec(self, migration: str) -> MigrationSpec:
        path = paths.migration(migration)
        while True:
            try:
                node = await self._store.read(path)
            except StoreUnavailable:
                await asyncio.sleep(STORE_RETRY_S)
                continue
            return decode(MigrationSpec, node.data if node else b"", path=path)

    def stop(self) -> None:
        """Let go of every migration where it stands; the records say where that is."""
        for task in self._running.values():
            task.cancel()
        self._running = {}
