"""`python -m tests.bench.fleet.agents FILE`: many light agents in one process.

Each is the real agent with its own sessions, servers and directory; only the engine under it is light. A line on
standard input is a command, its answer a line of JSON on standard output:

    hold | go PER_S | precopy SECONDS | restart HOST | told | stop
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
from kazoo.protocol.connection import ConnectionHandler
from prometheus_client import CollectorRegistry

from agents.agent import Agent
from agents.config import AgentConfig
from agents.handover.peer import MAX_CALL_BYTES, Peers
from agents.host.metrics import Metrics
from agents.serving.control import AgentServicer, translate
from agents.serving.peer import PeerServicer
from orchestrator import descriptors
from orchestrator.core.endpoint import join_address
from orchestrator.core.ids import HostRef
from orchestrator.ledger.zookeeper import ZooKeeperStore
from orchestrator.rpc import channels
from orchestrator.rpc.errors import Errors
from orchestrator.telemetry import configure_logging
from protos.drover.v1.agent_pb2_grpc import add_AgentServiceServicer_to_server, add_PeerServiceServicer_to_server
from tests.bench.fleet import fill
from tests.bench.fleet.engine import LightEngine, Precopy
from tests.fakes.config import agent_identity

STARTS = 8
"""Agents that start side by side: more would only be late together."""
SESSION_S = 10.0
SWITCH_S = 0.0005
"""How long one thread keeps the interpreter from the others. Each agent has two more threads, of its ZooKeeper clients,
which need it for each packet. With 5 ms, as Python has it, hundreds of them wait for seconds behind a busy event loop,
lose their sessions, and make that loop busier by coming back; an agent alone in its process never sees that."""


@dataclass(frozen=True, slots=True)
class Share:
    """The hosts of one process, as its file says."""

    zookeeper: str
    directory: str
    first: int
    count: int
    hosts: int
    """Of the whole fleet; likewise `guests`."""
    guests: int
    memory_mib: int = 65_536
    program: tuple[str, ...] = ()
    niceness: int = 0


class Pings:
    """kazoo's pings are traffic that ZooKeeper counts as reads. They are sent by few lines of it, wrapped here."""

    def __init__(self) -> None:
        self.sent = 0
        self._lock = threading.Lock()
        handlers: Any = ConnectionHandler
        original = handlers._send_ping

        def counted(handler: Any, *args: Any) -> Any:
            with self._lock:
                self.sent += 1
            return original(handler, *args)

        handlers._send_ping = counted


@dataclass
class LightAgent:
    """One host. `start` and `stop` may alternate; its VMMs stay."""

    config: AgentConfig
    here: HostRef
    engine: LightEngine
    stores: list[ZooKeeperStore] = field(default_factory=list[ZooKeeperStore])
    servers: list[grpc.aio.Server] = field(default_factory=list[grpc.aio.Server])
    agent: Agent | None = None
    peers: Peers | None = None

    async def start(self) -> None:
        self.stores = [
            ZooKeeperStore(self.config.zookeeper, chroot=self.config.chroot, session_timeout_s=SESSION_S)
            for _ in range(2)
        ]
        await asyncio.gather(*(store.start(60.0) for store in self.stores))
        self.peers = Peers()
        metrics = Metrics(CollectorRegistry())
        me = agent_identity(self.here, agent=os.urandom(8).hex())
        self.agent = Agent(self.config, me, self.engine, (self.stores[0], self.stores[1]), self.peers, metrics)
        errors = Errors(require_deadline=False, translate=translate)
        control = channels.aio_server([errors])
        hand_over = channels.aio_server([errors], max_request_bytes=MAX_CALL_BYTES)
        add_AgentServiceServicer_to_server(AgentServicer(self.agent), control)
        add_PeerServiceServicer_to_server(PeerServicer(self.agent), hand_over)
        channels.listen(control, join_address(self.config.address, self.config.control_port))
        channels.listen(hand_over, join_address(self.config.address, self.config.peer_port))
        self.servers = [hand_over, control]
        await hand_over.start()
        await self.agent.start()
        await control.start()

    async def stop(self) -> None:
        await asyncio.gather(*(server.stop(0.2) for server in reversed(self.servers)))
        if self.agent is not None:
            await self.agent.stop()
        if self.peers is not None:
            await self.peers.close()
        await asyncio.gather(*(store.close() for store in self.stores))


class Fleet:
    """The agents of this process."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self.precopy = Precopy()
        self.pings = Pings()
        self.agents: dict[str, LightAgent] = {}

    async def start(self) -> None:
        turn = asyncio.Semaphore(STARTS)

        async def one(number: int) -> None:
            async with turn:
                self.agents[fill.host_name(number)] = agent = self._make(number)
                await agent.start()

        async with asyncio.TaskGroup() as tasks:
            for number in range(self.share.first, self.share.first + self.share.count):
                tasks.create_task(one(number))
        gc.collect()
        gc.freeze()

    def _make(self, number: int) -> LightAgent:
        share = self.share
        program, directory = tuple(share.program), Path(share.directory)
        config = fill.agent_config(directory, number, share.zookeeper, program, share.memory_mib)
        for guest in fill.guests_of(number, share.hosts, share.guests):
            fill.on_disk(config, guest)
        return LightAgent(config, fill.host_ref(number), LightEngine(precopy=self.precopy))

    async def obey(self, line: str) -> dict[str, Any]:
        """Carry out one command; what is told afterwards."""
        match line.split():
            case ["hold"]:
                self.precopy.held = True
            case ["go", per_s]:
                self.precopy.go(float(per_s))
            case ["precopy", seconds]:
                self.precopy.seconds = float(seconds)
            case ["restart", host]:
                await self.agents[host].stop()
                await self.agents[host].start()
            case ["told"]:
                pass
            case _:
                return {"error": f"unknown command {line!r}"}
        return {"pings": self.pings.sent, "agents": len(self.agents), "at_s": time.time()}


async def _lines() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def _serve(share: Share) -> None:
    fleet = Fleet(share)
    lines = await _lines()
    await fleet.start()
    print(json.dumps({"ready": len(fleet.agents)}), flush=True)
    while line := (await lines.readline()).decode().strip():
        if line == "stop":
            break
        try:
            told = await fleet.obey(line)
        except Exception as error:
            told = {"error": repr(error)}
        print(json.dumps(told), flush=True)


def main() -> None:
    share = Share(**json.loads(Path(sys.argv[1]).read_bytes()))
    configure_logging("warning")
    descriptors.raise_limit()
    sys.setswitchinterval(SWITCH_S)
    with contextlib.suppress(OSError):
        os.nice(share.niceness)
    asyncio.run(_serve(share))
    os._exit(0)  # thousands of sessions need not be ended one by one


if __name__ == "__main__":
    main()
