"""The real API over real gRPC, on a ledger in memory and fake agents: what a client sees, without a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest

from orchestrator.api.config import ApiConfig
from orchestrator.api.server import ApiServer
from orchestrator.core.errors import DroverError
from orchestrator.core.records import Cordon
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import op_create
from orchestrator.ledger.store import Create, Done, Store, StoreUnavailable
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.agent import FakeAgent

P = ParamSpec("P")
T = TypeVar("T")


HANGS_S = 120.0
"""Nothing is proved by it: the client has a deadline of its own."""


class Calling:
    """Calls of a client that blocks, out of a test that must not."""

    async def call(self, method: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        async with asyncio.timeout(HANGS_S):
            return await asyncio.to_thread(method, *args, **named)

    async def refused(self, method: Callable[P, object], *args: P.args, **named: P.kwargs) -> DroverError:
        with pytest.raises(DroverError) as caught:
            await self.call(method, *args, **named)
        return caught.value


@dataclass
class ApiCluster(Calling):
    """Hosts h1, h2, ... with an agent each, an API, a client of it. `call` runs a client's method beside the loop."""

    store: Store
    directory: Path
    instructions: bool = False
    agents: dict[str, FakeAgent] = field(default_factory=dict[str, FakeAgent])

    async def host(self, name: str, memory_mib: int = 1024, *, live: bool = True, **offered: Any) -> FakeAgent:
        """`offered`: more fields of its record."""
        agent = self.agents[name] = FakeAgent(name, self.store)
        await agent.start()
        ops = [
            op_create(paths.host(name), replace(agent.record(memory_mib), **offered)),
            op_create(paths.cordon(name), Cordon()),
            Create(paths.reservations(name), b""),
            Create(paths.host_guests(name), b""),
            *([Create(paths.live(name), b"")] if live else []),
        ]
        assert isinstance(await self.store.multi(ops), Done)
        return agent

    @property
    def address(self) -> str:
        return f"unix:{self.directory}/api.sock"

    async def start(self, hosts: int = 3) -> None:
        self.server = ApiServer(
            ApiConfig((self.address, "127.0.0.1:0"), "", instructions=self.instructions), self.store
        )
        await self.server.start()
        self.client = OrchestratorClient(self.address, timeout_s=5)
        async with asyncio.timeout(10):
            while not await self._tree_is_there():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for number in range(1, hosts + 1):
            await self.host(f"h{number}")

    async def _tree_is_there(self) -> bool:
        """The API has connected, made it, and serves."""
        with suppress(StoreUnavailable):
            return not self.server.refusal and await self.store.read(paths.ROOTS[-2]) is not None
        return False

    async def hearing(self, *hosts: str) -> None:
        """Until the API listens to these agents."""
        await until(lambda: all(self.server.tools.fleet.hears(host) for host in hosts))

    async def stop(self) -> None:
        self.client.close()
        await self.server.stop()
        for agent in self.agents.values():
            await agent.stop()


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def api_cluster(
    store: Store, directory: Path, *, instructions: bool = False, hosts: int = 3
) -> AsyncIterator[ApiCluster]:
    cluster = ApiCluster(store, directory, instructions)
    try:
        await cluster.start(hosts)
        yield cluster
    finally:
        await cluster.stop()
