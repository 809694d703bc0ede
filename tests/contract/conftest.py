"""Stores for the contracts: the memory store and the real ZooKeeper, which all of them run on. And the two that answer
as OrchestratorService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.ledger.store import Store
from orchestrator.ledger.zookeeper import ZooKeeperStore
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import types_pb2 as types
from tests.contract.orchestrator_subject import WEB, Subject, subject
from tests.fakes.coordination import MemoryStore, Tree
from tests.fakes.zookeeper import ZooKeeperServer, missing

Connect = Callable[[], Store]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooKeeperServer]:
    if missing():
        pytest.skip(missing())
    running = ZooKeeperServer(tmp_path_factory.mktemp("zk") / "server")
    running.start()
    yield running
    running.kill()


@pytest.fixture(params=["memory", pytest.param("zookeeper", marks=pytest.mark.zookeeper)])
def connect(request: pytest.FixtureRequest) -> Connect:
    """Makes clients that share one empty tree."""
    if request.param == "memory":
        tree = Tree()
        return lambda: MemoryStore(tree)
    running: ZooKeeperServer = request.getfixturevalue("server")
    chroot = f"/{abs(hash(request.node.name)):x}"
    return lambda: ZooKeeperStore(running.hosts, chroot=chroot, session_timeout_s=4)


# --- OrchestratorService ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["fake", "api"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def api(kind: str, tmp_path: Path) -> AsyncIterator[Subject]:
    async with subject(kind, tmp_path) as made:
        yield made


@pytest.fixture
def client(api: Subject) -> OrchestratorClient:
    return api.client


@pytest.fixture
async def web(api: Subject, client: OrchestratorClient) -> types.Guest:
    """Runs on h1."""
    return await api.call(client.create_guest, WEB, "h1")
