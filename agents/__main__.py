"""`drover agent --config agent.yaml`: the agent of one host.

SIGTERM and SIGINT end it; its guests, devices and transfers go on and are adopted by the next one. Exit status 2: the
configuration or the host cannot be used, said in one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import click
import grpc.aio
import structlog

from agents.agent import Agent
from agents.config import AgentConfig, ConfigError, load
from agents.engine.base import EngineError, MigrationEngine
from agents.engine.libvirt.engine import LibvirtEngine
from agents.engine.qemu.engine import QemuEngine
from agents.handover.peer import MAX_CALL_BYTES, Peers
from agents.host import addresses
from agents.host.identity import OneAgent, identity_of, make_identity
from agents.host.metrics import Metrics
from agents.serving.control import AgentServicer, translate
from agents.serving.peer import PeerServicer
from orchestrator import descriptors
from orchestrator.config import DIRECTORY
from orchestrator.core.endpoint import join_address
from orchestrator.core.errors import DroverError
from orchestrator.core.identity import AgentIdentity
from orchestrator.core.liveness import LivenessUnknown
from orchestrator.ledger.store import SessionState, StoreUnavailable
from orchestrator.ledger.zookeeper import ZooKeeperStore
from orchestrator.pki.config import directory_of
from orchestrator.pki.files import PkiError
from orchestrator.rpc import channels
from orchestrator.rpc.credentials import credentials_of
from orchestrator.rpc.errors import Errors
from orchestrator.rpc.guard import Guard
from orchestrator.rpc.health import HealthService
from orchestrator.tasks import Tasks
from orchestrator.telemetry import configure_logging
from protos.drover.v1.agent_pb2_grpc import add_AgentServiceServicer_to_server, add_PeerServiceServicer_to_server

log = structlog.get_logger(__name__)

CONNECT_RETRY_S = 0.3
STOP_S = 0.5
NICENESS = -10
SERVICE = "drover.v1.AgentService"


async def _connected(store: ZooKeeperStore) -> ZooKeeperStore:
    while True:
        try:
            await store.start()
            return store
        except StoreUnavailable as error:
            log.warning("ZooKeeper does not answer, trying again", error=str(error))
            await asyncio.sleep(CONNECT_RETRY_S)


def _engine(config: AgentConfig) -> MigrationEngine:
    if config.engine == "libvirt":
        socket = config.libvirt_socket
        return LibvirtEngine(config.guest_image, socket, config.qemu, config.accelerator, images=config.images)
    return QemuEngine(config.guest_image, config.qemu, config.accelerator, config.vfio_preload, images=config.images)


async def _probed(engine: MigrationEngine) -> None:
    """The engine remembers what it found; what is wrong with its VMM is told by whoever needs it."""
    with contextlib.suppress(EngineError):
        await engine.probe()


def _follow(health: HealthService, state: SessionState, agent: Agent) -> None:
    """An agent without ZooKeeper begins no switchover, and one that lost its host's place begins nothing."""
    _following.spawn(health.set(state is SessionState.CONNECTED and not agent.place.lost), "health")


_following = Tasks("health of the agent")


async def _serve(config: AgentConfig, me: AgentIdentity) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    engine = _engine(config)
    tls = directory_of(config.tls)
    stores = [ZooKeeperStore(config.zookeeper, chroot=config.chroot, tls=tls) for _ in range(2)]
    # Side by side: guests that stand still may be waiting for an agent that was killed.
    (store, commits), _ = await asyncio.gather(asyncio.gather(*map(_connected, stores)), _probed(engine))
    credentials = credentials_of(tls)
    guards = [Guard(credentials, tls)] if credentials is not None and tls is not None else []
    peers = Peers(credentials)
    metrics = Metrics()
    agent = Agent(config, me, engine, (store, commits), peers, metrics)
    told = await metrics.serve(config.listen, config.metrics_port) if config.metrics_port else None
    errors = Errors(require_deadline=False, translate=translate)
    connections = descriptors.connections_of(descriptors.limit())
    control = channels.aio_server(
        [errors, *guards], max_connections=connections, max_age_ms=channels.MAX_AGE_MS if guards else 0
    )
    hand_over = channels.aio_server([errors, *guards], max_request_bytes=MAX_CALL_BYTES, max_connections=connections)
    add_AgentServiceServicer_to_server(AgentServicer(agent), control)
    add_PeerServiceServicer_to_server(PeerServicer(agent), hand_over)
    health = HealthService([SERVICE])
    health.add_to(control)
    channels.listen(control, join_address(config.listen, config.control_port), credentials)
    channels.listen(hand_over, join_address(config.listen, config.peer_port), credentials)
    await hand_over.start()  # sessions that are adopted speak to their peers at once
    try:
        if not await _done_before(agent.start(), stopping):
            return
        await control.start()
        await _serve_until(stopping, agent, control, health, store)
    finally:
        await hand_over.stop(STOP_S)
        if told is not None:
            await told.close()
        await peers.close()
        await asyncio.gather(store.close(), commits.close())


async def _done_before(work: Coroutine[Any, Any, None], stopping: asyncio.Event) -> bool:
    """False: it was cancelled, since the agent is to stop. Raises what the work raises."""
    doing, stop = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    await asyncio.wait({doing, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if doing.done():
        doing.result()
        return True
    doing.cancel()
    await asyncio.wait({doing})
    return False


async def _serve_until(
    stopping: asyncio.Event, agent: Agent, control: grpc.aio.Server, health: HealthService, store: ZooKeeperStore
) -> None:
    # What lives for ever is never looked at again, so that collections stay short in a blackout.
    gc.collect()
    gc.freeze()
    store.on_session(lambda state: _follow(health, state, agent))
    agent.place.on_change = lambda: _follow(health, store.session, agent)
    await health.set(True)
    log.info("agent serves", host=agent.here.host, boot_id=agent.here.boot_id)
    await stopping.wait()
    await health.end()
    await control.stop(STOP_S)
    await agent.stop()


def _go_before_guests() -> None:
    """A guest that stands still waits for this process: on a busy host it must not queue behind the guests that run.

    Devices inherit it, VMMs do not. Without the right to it, the agent goes like everybody else.
    """
    try:
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    except OSError as error:
        log.warning("cannot go before the guests: blackouts grow on a busy host", error=str(error))


@click.command()
@click.option(
    "--config",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=DIRECTORY / "agent.yaml",
    show_default=True,
)
def main(path: Path) -> None:
    """Run the agent of one host until told to stop."""
    try:
        config = addresses.settled(load(path))
        configure_logging(config.log_level)
        os.umask(0o077)  # sockets of VMMs and devices obey whoever may connect
        descriptors.raise_limit()
        _go_before_guests()
        identity = make_identity(config)
        identity.check_volatile(config.volatile_dir)
        lock = OneAgent(config.dir / "agent.lock")
        held = lock.take()
        # The installation is read, or made, when the host is registered.
        me = identity_of(identity.read(), lock=held, volatile_dir=config.volatile_dir)
        structlog.contextvars.bind_contextvars(host=config.host)
        if not me.machine:
            log.warning("this hardware has no number of its own: after a loss of power the host must be declared dead")
        asyncio.run(_serve(config, me))
    except (ConfigError, DroverError, EngineError, LivenessUnknown, PkiError, OSError) as error:
        click.echo(f"drover-agent: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
