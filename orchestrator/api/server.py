"""One API process: its parts, its server, its health."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from orchestrator import descriptors
from orchestrator.api import limits
from orchestrator.api.calls import Tools
from orchestrator.api.config import ApiConfig
from orchestrator.api.servicer import OrchestratorServicer, translate
from orchestrator.fleet import Fleet
from orchestrator.ledger.index import Index
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.store import SessionState, Store, StoreUnavailable
from orchestrator.rpc.agent_client import AgentClients
from orchestrator.rpc.channels import MAX_REQUEST_BYTES, aio_server, listen
from orchestrator.rpc.errors import Errors
from orchestrator.rpc.health import HealthService
from protos.drover.v1 import orchestrator_pb2
from protos.drover.v1.orchestrator_pb2_grpc import add_OrchestratorServiceServicer_to_server

log = structlog.get_logger(__name__)

SERVICE: str = orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"].full_name
RETRY_S = 0.5
GRACE_S = 1.0
SLOW_READER_S = 30.0


class ApiServer:
    """`start`, then `stop`. Serves at once; while ZooKeeper is away calls say so and health is NOT_SERVING."""

    def __init__(self, config: ApiConfig, store: Store) -> None:
        self._config = config
        self._store = store
        agents = AgentClients()
        self.tools = Tools(
            store=store,
            agents=agents,
            fleet=Fleet(store, agents),
            index=Index(store),
            ledger=Ledger(store),
            chaos=config.chaos,
        )
        self.servicer = OrchestratorServicer(self.tools)
        self._health = HealthService([SERVICE])
        self._server = aio_server(
            [Errors(require_deadline=True, translate=translate, check=limits.check, slow_reader_s=SLOW_READER_S)],
            max_request_bytes=MAX_REQUEST_BYTES,
            max_connections=descriptors.connections_of(descriptors.limit(), len(config.listen)),
        )
        self._tasks: set[asyncio.Task[Any]] = set()
        self._tree_is_there = False
        self.ports: list[int] = []
        """Where it listens, in the order of `listen`; 0 for a unix socket."""

    async def start(self) -> None:
        """Raises DroverError when an address cannot be used."""
        await self._health.set(False)
        add_OrchestratorServiceServicer_to_server(self.servicer, self._server)
        self._health.add_to(self._server)
        self.ports = [listen(self._server, address) for address in self._config.listen]
        await self._server.start()
        self._store.on_session(lambda _state: self._spawn(self._tell_health()))
        self._spawn(self._connect())

    async def _connect(self) -> None:
        while True:
            try:
                await self._store.start()
                await self.tools.ledger.init_tree()
                break
            except StoreUnavailable as error:
                log.warning("ledger is not reachable, trying again", error=str(error))
                await asyncio.sleep(RETRY_S)
        self.tools.fleet.start()
        self._tree_is_there = True
        log.info("serving", listen=self._config.listen)
        await self._tell_health()

    async def _tell_health(self) -> None:
        await self._health.set(self._tree_is_there and self._store.session is SessionState.CONNECTED)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("task failed", exc_info=task.exception())

    async def stop(self) -> None:
        """Let calls under way end, within GRACE_S; then everything else."""
        await self._health.end()
        await self._server.stop(GRACE_S)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.tools.fleet.close()
        await self.tools.agents.close()
        await self._store.close()
