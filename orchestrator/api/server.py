"""One API process: its parts, its server, its health."""

from __future__ import annotations

import asyncio
import contextlib

import structlog
from google.protobuf.message import Message
from prometheus_client import CollectorRegistry

from orchestrator import descriptors
from orchestrator.api import limits
from orchestrator.api.calls import Tools
from orchestrator.api.config import ApiConfig
from orchestrator.api.metrics import ApiMetrics
from orchestrator.api.servicer import OrchestratorServicer, translate
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.fleet import Fleet
from orchestrator.history import HistoryFile
from orchestrator.ledger.index import Index
from orchestrator.ledger.layout import WrongLayout
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.store import SessionState, Store, StoreUnavailable
from orchestrator.metrics import PROBE_S, serve_on
from orchestrator.pki.config import directory_of
from orchestrator.rpc.agent_client import AgentClients
from orchestrator.rpc.channels import MAX_AGE_MS, MAX_REQUEST_BYTES, aio_server, listen
from orchestrator.rpc.credentials import credentials_of
from orchestrator.rpc.errors import Errors
from orchestrator.rpc.guard import Guard
from orchestrator.rpc.health import HealthService
from orchestrator.tasks import Tasks
from protos.drover.v1 import orchestrator_pb2
from protos.drover.v1.orchestrator_pb2_grpc import add_OrchestratorServiceServicer_to_server

log = structlog.get_logger(__name__)

SERVICE: str = orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"].full_name
LAYOUT_AGAIN_S = 1.0
RETRY_S = 0.5
RECONNECT_S = 8.0
"""A read waits for so long, and at most for half of its caller's time, for a ledger that is away."""
RECONNECT_LOOK_S = 0.05
_READS = ("Get", "List", "Watch")
GRACE_S = 1.0
SLOW_READER_S = 30.0


class ApiServer:
    """`start`, then `stop`. Serves at once; while ZooKeeper is away calls say so and health is NOT_SERVING.

    Raises PkiError when the certificates that its configuration names cannot be used."""

    def __init__(self, config: ApiConfig, store: Store, registry: CollectorRegistry | None = None) -> None:
        self._config = config
        self._store = store
        tls = directory_of(config.tls)
        self._credentials = credentials_of(tls)
        guards = [Guard(self._credentials, tls)] if self._credentials is not None and tls is not None else []
        agents = AgentClients(self._credentials)
        self.tools = Tools(
            store=store,
            agents=agents,
            fleet=Fleet(store, agents),
            index=Index(store),
            ledger=Ledger(store),
            history=HistoryFile(config.history) if config.history.path else None,
            instructions=config.instructions,
        )
        self.servicer = OrchestratorServicer(self.tools)
        self.metrics = ApiMetrics(registry or CollectorRegistry(), store, lambda: self.servicer.streams_open)
        self._health = HealthService([SERVICE])
        self._server = aio_server(
            [
                Errors(
                    require_deadline=True,
                    translate=translate,
                    check=self._check,
                    slow_reader_s=SLOW_READER_S,
                    answered=self.metrics.answered,
                    look_again=self._look_again if "," in config.zookeeper else None,
                ),
                *guards,
            ],
            max_request_bytes=MAX_REQUEST_BYTES,
            max_age_ms=MAX_AGE_MS if guards else 0,
            max_connections=descriptors.connections_of(descriptors.limit(), len(config.listen)),
        )
        self._tasks = Tasks("API")
        self._tree_is_there = False
        self.refusal = "the API has not seen the ledger yet"
        """Why no call is served; empty: calls are."""
        self.ports: list[int] = []
        """Where it listens, in the order of `listen`; 0 for a unix socket."""

    async def start(self) -> None:
        """Raises DroverError when an address cannot be used."""
        await self._health.set(False)
        add_OrchestratorServiceServicer_to_server(self.servicer, self._server)
        self._health.add_to(self._server)
        self.ports = [listen(self._server, address, self._credentials) for address in self._config.listen]
        await self._server.start()
        self._store.on_session(self._session_moved)
        self._tasks.spawn(self._connect(), "connection with the ledger")
        self._tasks.keep(self.metrics.ledger.look, "probe of the ledger", again_s=PROBE_S)
        if self._config.metrics_listen:
            self._tasks.spawn(serve_on(self.metrics.registry, self._config.metrics_listen), "metrics")

    async def _connect(self) -> None:
        while True:
            try:
                await self._store.start()
                await self.tools.ledger.init_tree()
                break
            except StoreUnavailable as error:
                log.warning("ledger is not reachable, trying again", error=str(error))
                await asyncio.sleep(RETRY_S)
            except WrongLayout as error:
                self.refusal = str(error)
                log.warning("no call is served", why=self.refusal)
                await asyncio.sleep(LAYOUT_AGAIN_S)
        self.refusal = ""
        self.tools.fleet.start()
        self._tree_is_there = True
        log.info("serving", listen=self._config.listen)
        await self._tell_health()

    def _check(self, request: Message) -> None:
        """Raises LEDGER_UNREACHABLE for every call while the ledger has another layout, and as `limits.check` does."""
        if self.refusal:
            raise DroverError(RefusalReason.LEDGER_UNREACHABLE, self.refusal)
        limits.check(request)

    def _session_moved(self, _state: SessionState) -> None:
        self._tasks.spawn(self._tell_health(), "health")

    async def _look_again(self, error: Exception, method: str, left_s: float) -> bool:
        """Whether a call is to be carried out once more, since an ensemble of several servers shows two more things.

        What is not there for the server that this API reads from may have been made through another one, a moment ago:
        after a barrier this server knows everything that was there before the call. And whoever is connected to a
        server that goes is without a ledger until it has found another: reads wait for that.
        """
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            if isinstance(error, DroverError) and error.reason is RefusalReason.NOT_FOUND:
                await self._store.barrier()
                return True
            if isinstance(error, StoreUnavailable) and method.startswith(_READS):
                async with asyncio.timeout(min(RECONNECT_S, left_s / 2)):
                    while self._store.session is not SessionState.CONNECTED:  # noqa: ASYNC110 - bounded above
                        await asyncio.sleep(RECONNECT_LOOK_S)
                return True
        return False

    async def _tell_health(self) -> None:
        await self._health.set(self._tree_is_there and self._store.session is SessionState.CONNECTED)

    async def stop(self) -> None:
        """Let calls under way end, within GRACE_S; then everything else."""
        await self._health.end()
        await self._server.stop(GRACE_S)
        await self._tasks.close()
        await self.servicer.close()
        await self.tools.index.close()
        await self.tools.fleet.close()
        await self.tools.agents.close()
        await self._store.close()
