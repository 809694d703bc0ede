"""A COMMIT whose server falls silent: another one is asked, long before an ordinary write would be given up.

A real ZooKeeper behind two proxies that can stall: two servers, as far as a client can see.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest

from agents.handover import ledger as attempt_ledger
from agents.handover.ledger import AttemptLedger
from agents.handover.words import Seen
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.ledger.store import StoreUnavailable
from orchestrator.ledger.zookeeper import ZooKeeperStore
from tests.fakes.attempt import Moves, S
from tests.fakes.zookeeper import ZooKeeperServer, missing

pytestmark = [
    pytest.mark.zookeeper,
    pytest.mark.integration,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
ORDINARY_S = 2.0
"""What the store gives a write unless told otherwise."""


@dataclass
class Door:
    """One way to the server."""

    server_port: int
    port: int = 0
    connections: int = 0
    """Made so far; `used`: open now."""
    used: int = 0
    asks: bool = True
    """What a client says gets through."""
    answers: bool = True
    _tasks: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])
    _listener: asyncio.Server | None = None

    async def open(self) -> None:
        self._listener = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self._listener is not None
        self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.used += 1
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.server_port)
        for work in (self._pass(reader, there_writer, "asks"), self._pass(there_reader, writer, "answers")):
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if getattr(self, direction):
                    writer.write(data)
                    await writer.drain()
        self.used -= direction == "asks"
        writer.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooKeeperServer]:
    running = ZooKeeperServer(tmp_path_factory.mktemp("zk") / "server")
    running.start()
    yield running
    running.kill()


@pytest.fixture
async def doors(server: ZooKeeperServer) -> AsyncIterator[list[Door]]:
    made = [Door(server.port), Door(server.port)]
    for door in made:
        await door.open()
    yield made
    for door in made:
        await door.close()


async def read_at_last(ledger: AttemptLedger) -> GuestRecord:
    """As the session does after an unknown outcome: a moment's pause, and again."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(StoreUnavailable):
                return (await ledger.read_behind_barrier())[0]
            await asyncio.sleep(0.1)


@pytest.mark.parametrize(("silent", "came_to"), [("asks", Ownership.OPEN), ("answers", Ownership.COMMITTED)])
async def test_a_commit_without_an_answer_asks_another_server(
    doors: list[Door], silent: str, came_to: Ownership
) -> None:
    hosts = ",".join(f"127.0.0.1:{door.port}" for door in doors)
    store = ZooKeeperStore(hosts, session_timeout_s=8)
    await store.start()
    moves = Moves(store=store)
    await moves.born()
    ref = await moves.opened()
    ledger = AttemptLedger(store, ref, S, "i1", "agent-1")
    assert await ledger.bind() is Seen.BOUND

    used = next(door for door in doors if door.used)
    other = next(door for door in doors if door is not used)
    before = other.connections
    setattr(used, silent, False)
    began = time.monotonic()
    assert await ledger.commit(0) is Seen.LEDGER_UNKNOWN
    assert time.monotonic() - began < ORDINARY_S / 2
    assert attempt_ledger.COMMIT_S < ORDINARY_S / 10
    record = await read_at_last(ledger)
    assert other.connections > before
    assert record.phase is came_to, "the read tells the outcome"
    print(f"the outcome of a COMMIT without an answer was known after {time.monotonic() - began:.2f} s")
    await store.close()
