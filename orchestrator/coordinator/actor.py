"""The coordinator inside Ray: one detached, named Coordinator actor and a pool of asynchronous MigrationWorker actors.

Both are crash-only. Ray thinking an actor unique proves nothing; the epoch in the ledger does. An exception in a task
that an actor started is silent in Ray, so both leave the process when theirs ends, and Ray starts them again.
"""

# ray's .remote() and .options() hide the types of what they return.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict
from typing import Any

import ray
import structlog
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from orchestrator.coordinator.supervisor import Status, Supervisor, WorkerLost
from orchestrator.coordinator.wiring import CoordinatorConfig, fencers_of, make_agents, make_store
from orchestrator.coordinator.worker import Worker
from orchestrator.ledger.store import Store, StoreUnavailable

log = structlog.get_logger(__name__)

COORDINATOR = "coordinator"
CALLS = 5_000
"""Calls that an actor answers side by side: each migration under way is one call to a worker."""


def _die_with(task: asyncio.Task[None]) -> None:
    """Leave the process when a task for life ends in an exception; Ray restarts the actor."""
    if not task.cancelled() and task.exception() is not None:
        log.error("actor dies", error=repr(task.exception()))
        os._exit(70)


async def _connect(config: CoordinatorConfig) -> Store:
    store = make_store(config)
    while True:
        try:
            await store.start()
            return store
        except StoreUnavailable as error:
            log.warning("ledger is not reachable, trying again", error=str(error))
            await asyncio.sleep(0.5)


class MigrationWorker:
    """Drives migrations as coroutines, over one ledger session and one set of channels."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._ready: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        self._task = asyncio.get_running_loop().create_task(self._start(config))
        self._task.add_done_callback(_die_with)

    async def _start(self, config: CoordinatorConfig) -> None:
        store = await _connect(config)
        self._ready.set_result(Worker(store, make_agents(config), max_arrivals=config.max_arrivals))

    async def drive(self, migration: str, epoch: int) -> str:
        """The migration's terminal phase, or "DEPOSED"."""
        worker = await asyncio.shield(self._ready)
        return await worker.drive(migration, epoch)

    async def ping(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "driving": self._ready.result().driving if self._ready.done() else 0}


class Coordinator:
    """Holds leadership, admits, and hands each migration to a worker."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        self._supervisor: Supervisor | None = None
        self._workers: list[Any] = []
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(_die_with)

    async def _run(self) -> None:
        self._workers = [_start_worker(self._config, number) for number in range(self._config.workers)]
        store = await _connect(self._config)
        self._supervisor = Supervisor(
            store,
            self._dispatch,
            agents=make_agents(self._config),
            fencers=fencers_of(self._config),
            limits=self._config.limits,
        )
        await self._supervisor.run()

    async def _dispatch(self, migration: str, epoch: int) -> str:
        """Always the same worker for a migration, so that a repeated hand-out joins the driver that runs."""
        worker = self._workers[int(migration[:8].encode().hex(), 16) % len(self._workers)]
        try:
            return await worker.drive.remote(migration, epoch)
        except RayActorError as error:
            raise WorkerLost(str(error)) from None

    async def ping(self) -> dict[str, Any]:
        """Status of the supervisor; `progress` stands still when it is stuck."""
        status = asdict(self._supervisor.status if self._supervisor else Status())
        return {"pid": os.getpid(), **status}


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


def _start_worker(config: CoordinatorConfig, number: int) -> Any:
    return ray.remote(MigrationWorker).options(**_options(config, f"worker-{number}")).remote(config)


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
    for name in [COORDINATOR, *(f"worker-{number}" for number in range(config.workers))]:
        try:
            ray.kill(ray.get_actor(name, namespace=config.ray_namespace), no_restart=True)
        except ValueError:
            continue  # never started
