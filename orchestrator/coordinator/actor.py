"""The coordinator inside Ray: one detached, named Coordinator actor and a pool of asynchronous MigrationWorker actors.

Both are crash-only. Ray thinking an actor unique proves nothing; the epoch in the ledger does. An exception in a task
that an actor started is silent in Ray, so both leave the process when theirs ends, and Ray starts them again.
"""

# ray's .remote() and .options() hide the types of what they return.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import structlog
from prometheus_client import REGISTRY
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from orchestrator import descriptors
from orchestrator.coordinator.metrics import register
from orchestrator.coordinator.pool import Pool, WorkerLost, WorkerPort
from orchestrator.coordinator.seat import Seat
from orchestrator.coordinator.shares import Shares, share_limits, shares_of
from orchestrator.coordinator.supervisor import Status, Supervisor
from orchestrator.coordinator.wiring import CoordinatorConfig, fencers_of, history_of, make_agents, make_store
from orchestrator.coordinator.worker import Worker
from orchestrator.core.shards import Share
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.store import SessionState, Store, StoreUnavailable
from orchestrator.metrics import LAG_S, PROBE_S, LedgerProbe, lag, serve_on
from orchestrator.tasks import Tasks
from orchestrator.telemetry import configure_logging, flush

log = structlog.get_logger(__name__)

COORDINATOR = "coordinator"
WORKER = "worker-"
CALLS = 5_000
"""Calls that an actor answers side by side: each migration under way is one call to a worker."""
_SPREAD = {"scheduling_strategy": "SPREAD"}
"""Workers go to different nodes of the Ray cluster, where it has several: none of them carries all migrations."""


def _die_with(task: asyncio.Task[None]) -> None:
    """Leave the process when a task for life ends in an exception; Ray restarts the actor."""
    if not task.cancelled() and task.exception() is not None:
        log.error("actor dies", exc_info=task.exception())
        flush()
        os._exit(70)


LEADER_LINGER_S = 10.0
"""What moved in the fleet is read by the leader when it asks, and otherwise this late: it seldom asks."""
_YOUNG = 10_000
"""Objects that are made before Python looks for garbage among them, in place of 700: each migration makes thousands."""


def _settle_memory() -> None:
    """What start-up made, Ray's many modules above all, lives for ever: no later collection need look at it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, 20, 20)


async def _connect(store: Store) -> None:
    while True:
        try:
            await store.start()
            return
        except StoreUnavailable as error:
            log.warning("ledger is not reachable, trying again", error=str(error))
            await asyncio.sleep(0.5)


class MigrationWorker:
    """Drives migrations as coroutines, over one ledger session and one set of channels."""

    def __init__(self, config: CoordinatorConfig, seat: int = 0) -> None:
        configure_logging(config.log_level)
        descriptors.raise_limit()
        self._seat = seat
        self._store: Store | None = None
        self._ready: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        self._task = asyncio.get_running_loop().create_task(self._start(config))
        self._task.add_done_callback(_die_with)

    async def _start(self, config: CoordinatorConfig) -> None:
        store = self._store = make_store(config)
        await _connect(store)
        worker = Worker(
            store, make_agents(config), max_arrivals=config.max_arrivals, lane=self._seat, lanes=config.workers
        )
        _settle_memory()
        self._ready.set_result(worker)

    async def drive(self, migration: str, epoch: int, shard: int = 0) -> str:
        """The migration's terminal phase, or "DEPOSED"."""
        worker = await asyncio.shield(self._ready)
        return await worker.drive(migration, epoch, shard)

    async def ping(self) -> dict[str, Any]:
        """`ready`: it has a ledger. `pid` and `machine` say whom to end when it does not answer any more."""
        ready = self._store is not None and self._store.session is SessionState.CONNECTED
        driving = self._ready.result().driving if self._ready.done() else 0
        return {"pid": os.getpid(), "machine": socket.gethostname(), "ready": ready, "driving": driving}


class RayWorker(WorkerPort):
    """A worker that is an actor of Ray."""

    def __init__(self, config: CoordinatorConfig, seat: int, before: int) -> None:
        name = f"{WORKER}{seat}-{before}"
        self._handle: Any = (
            ray.remote(MigrationWorker).options(**_options(config, name), **_SPREAD).remote(config, seat)
        )
        self._told: dict[str, Any] = {}

    async def drive(self, migration: str, epoch: int, shard: int = 0) -> str:
        try:
            return await self._handle.drive.remote(migration, epoch, shard)
        except RayActorError as error:
            raise WorkerLost(str(error)) from None

    async def ping(self) -> bool:
        try:
            self._told = await self._handle.ping.remote()
        except RayError as error:
            raise WorkerLost(str(error)) from None
        return bool(self._told["ready"])

    def kill(self) -> None:
        """Ray asks a process to end itself, which a frozen one does not: the kernel ends that one."""
        pid = self._told.get("pid")
        if pid and self._told.get("machine") == socket.gethostname():
            with contextlib.suppress(OSError):
                if b"MigrationWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        try:
            ray.kill(self._handle, no_restart=True)
        except Exception as error:  # whatever it is: another worker takes the seat
            log.warning("a silent worker is not ended by Ray", error=str(error))


class Coordinator:
    """Holds leadership, admits, and hands each migration to a worker."""

    def __init__(self, config: CoordinatorConfig) -> None:
        configure_logging(config.log_level)
        descriptors.raise_limit()
        self._config = config
        self._shares: Shares | None = None
        self._pool: Pool | None = None
        self._tasks = Tasks("coordinator")
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(_die_with)

    async def _run(self) -> None:
        store = make_store(self._config)
        pool = self._pool = Pool(
            self._config.workers,
            lambda seat, before: RayWorker(self._config, seat, before),
            has_ledger=lambda: store.session is SessionState.CONNECTED,
        )
        self._tasks.keep(pool.tend, "workers", again_s=1.0, every_s=0.0)
        if self._config.metrics_listen:
            register(REGISTRY, lambda: self._shares, lambda: self._pool)
            probe = LedgerProbe(REGISTRY, lambda: store.read(paths.epoch()))
            self._tasks.keep(probe.look, "probe of the ledger", again_s=PROBE_S)
            self._tasks.keep(lag.look, "lag of the event loop", again_s=LAG_S)
            self._tasks.spawn(serve_on(REGISTRY, self._config.metrics_listen), "metrics")
        await _connect(store)
        _settle_memory()
        shares = self._shares = self._share_out(store, pool)
        self._tasks.keep(Seat(store, self._config.name).tend, "this coordinator's seat", again_s=1.0, every_s=0.0)
        self._tasks.keep(shares.tend, "what each seat leads", again_s=1.0, every_s=0.0)
        await shares.run()

    def _share_out(self, store: Store, pool: Pool) -> Shares:
        config = self._config
        agents, fencers, index = make_agents(config), fencers_of(config), Index(store, linger_s=LEADER_LINGER_S)
        history = history_of(config)

        def supervisor(share: Share) -> Supervisor:
            async def dispatch(migration: str, epoch: int) -> str:
                return await pool.dispatch(migration, epoch, share.shard)

            return Supervisor(
                store,
                dispatch,
                agents=agents,
                fencers=fencers,
                name=config.name,
                limits=share_limits(config.limits, share.shards),
                retention=config.retention,
                history=history,
                share=share,
                index=index,
            )

        return Shares(store, config.name, [supervisor(share) for share in shares_of(config.shards)])

    async def ping(self) -> dict[str, Any]:
        """Status of the supervisor; `progress` stands still when it is stuck."""
        status = asdict(self._shares.status if self._shares else Status())
        return {"pid": os.getpid(), "workers_replaced": self._pool.replaced if self._pool else 0, **status}


def _options(config: CoordinatorConfig, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": config.ray_namespace,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": CALLS,
    }


# --- for the process outside Ray --------------------------------------------------------------------------------------


class RayGone(Exception):
    """The cluster does not answer: nothing inside this process can mend that."""


def connect(config: CoordinatorConfig) -> None:
    """Raises RayGone. Token and mode must be in the environment before this module is imported."""
    try:
        ray.init(
            address=config.ray_address,
            namespace=config.ray_namespace,
            log_to_driver=False,
            configure_logging=False,
        )
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise RayGone(f"Ray at {config.ray_address} does not answer: {error}") from error


def disconnect() -> None:
    """Leave the cluster; the actors stay."""
    ray.shutdown()


def start_or_find(config: CoordinatorConfig) -> Any:
    """The handle of the cluster's detached coordinator actor, which is made if there is none. Raises RayError."""
    return ray.remote(Coordinator).options(**_options(config, COORDINATOR)).remote(config)


def ping(handle: Any, timeout_s: float) -> dict[str, Any] | None:
    """None: no answer now (the actor restarts, or is stuck)."""
    try:
        return ray.get(handle.ping.remote(), timeout=timeout_s)
    except (GetTimeoutError, RayActorError):
        return None
    except RayError as error:
        raise RayGone(str(error)) from error


def restart(handle: Any) -> None:
    """Kill the actor's process; Ray starts it again."""
    ray.kill(handle, no_restart=False)


def stop_all(config: CoordinatorConfig) -> None:
    """End all actors for good: the head then stops at once instead of draining for 30 s."""
    names = [name for name in ray.util.list_named_actors() if name.startswith(WORKER)]
    for name in [COORDINATOR, *names]:
        try:
            ray.kill(ray.get_actor(name, namespace=config.ray_namespace), no_restart=True)
        except ValueError:
            continue  # never started
