"""Runs drivers: what a Ray worker process, or the coordinator itself without Ray, does with (migration, epoch)."""

from __future__ import annotations

import asyncio

from orchestrator.coordinator.driver import STORE_RETRY_S, Deposed, Driver, WorkerShared, must_lead, until_available
from orchestrator.coordinator.placing import Placing
from orchestrator.coordinator.ports import AgentDirectory
from orchestrator.core.records import MigrationSpec
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.records import decode
from orchestrator.ledger.store import Store, StoreUnavailable

LINGER_S = 1.0
"""While nobody looks for a place, what moved in the fleet is read this late: most of it moves again within that."""


class Worker:
    """Many migrations as coroutines over one store session and one set of channels.

    Driving the same migration twice at once is safe (every write is a compare-and-set) but wasteful, so a second
    request for it joins the first, unless it comes from a newer epoch, which ends the older drivers.
    """

    def __init__(
        self, store: Store, agents: AgentDirectory, *, max_arrivals: int = 0, lane: int = 0, lanes: int = 1
    ) -> None:
        """One of `lanes` that place side by side: hosts that will do alike are first looked for in its own `lane`."""
        self._store = store
        self._agents = agents
        self._max_arrivals = max_arrivals
        self._index = Index(store, also=(paths.MIGRATIONS,), linger_s=LINGER_S)
        self._tools: dict[int, WorkerShared] = {}
        """By shard of the fleet."""
        self._running: dict[tuple[int, str], asyncio.Task[str]] = {}
        """By shard and migration."""
        self._placing = Placing(lane, lanes)

    @property
    def driving(self) -> int:
        """How many migrations it drives now."""
        return len(self._running)

    async def drive(self, migration: str, epoch: int, shard: int = 0) -> str:
        """Returns the terminal phase; "DEPOSED" when `epoch`, of that shard of the fleet, is over. Raises BadRecord for
        an unreadable node."""
        tools = await self._tools_of(epoch, shard)
        if tools is None:
            return "DEPOSED"
        task = self._running.get((shard, migration))
        if task is None:
            task = asyncio.create_task(self._drive(migration, tools))
            self._running[shard, migration] = task
            task.add_done_callback(lambda done: self._over(shard, migration, done))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                return "DEPOSED"
            raise

    def _over(self, shard: int, migration: str, done: asyncio.Task[str]) -> None:
        if self._running.get((shard, migration)) is done:
            del self._running[shard, migration]

    async def _tools_of(self, epoch: int, shard: int) -> WorkerShared | None:
        """None: `epoch` is over. A lower one than before may be the newest all the same, after a restore."""
        tools = self._tools.get(shard)
        if tools is not None and epoch < tools.epoch:
            try:
                await until_available(lambda: must_lead(self._store, epoch, shard))
            except Deposed:
                return None
        tools = self._tools.get(shard)
        if tools is None or epoch != tools.epoch:
            self.stop(shard)
            tools = self._tools[shard] = WorkerShared(
                self._store,
                self._agents,
                self._index,
                epoch,
                placing=self._placing,
                max_arrivals=self._max_arrivals,
                shard=shard,
            )
        return tools

    async def _drive(self, migration: str, tools: WorkerShared) -> str:
        try:
            return await Driver(tools, await self._spec(migration)).run()
        except Deposed:
            return "DEPOSED"

    async def _spec(self, migration: str) -> MigrationSpec:
        path = paths.migration(migration)
        while True:
            try:
                node = await self._store.read(path)
                if node is None:  # our server may be behind the one through which it was made
                    await self._store.barrier()
                    node = await self._store.read(path)
            except StoreUnavailable:
                await asyncio.sleep(STORE_RETRY_S)
                continue
            return decode(MigrationSpec, node.data if node else b"", path=path)

    def stop(self, shard: int | None = None) -> None:
        """Let go of every migration of a shard, or of all, where it stands; the records say where that is."""
        for key in [key for key in self._running if shard in (None, key[0])]:
            self._running.pop(key).cancel()
