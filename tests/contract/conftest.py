"""Stores for the contracts: the memory store and the real ZooKeeper, which all of them run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from orchestrator.ledger.store import Store
from orchestrator.ledger.zookeeper import ZooKeeperStore
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
