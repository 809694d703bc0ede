"""The hand-over calls between two agents, over a real channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from agents.handover.peer import PeerUnavailable
from agents.serving.peer import AttemptKey, DestinationClient, PeerServicer
from agents.shims.base import Frame, FrameKind
from orchestrator.core.ids import AckRequest, AttemptRef
from orchestrator.rpc import channels
from orchestrator.rpc.errors import Errors
from protos.drover.v1.agent_pb2_grpc import add_PeerServiceServicer_to_server

REF, INC = AttemptRef("g", "m", 1), "i"
MARKER = Frame("dpu", 1, FrameKind.INITIAL_SENT, generation=1)


class Arriving:
    """Acknowledges each marker."""

    def __init__(self) -> None:
        self.acks: asyncio.Queue[AckRequest] = asyncio.Queue()

    async def frame(self, frame: Frame) -> None:
        self.acks.put_nowait(AckRequest(frame.device, frame.generation))

    async def go(self, inc: str, want_run: bool) -> bool:
        return True


class Agent:
    """A destination that knows one attempt."""

    def __init__(self) -> None:
        self.arrival = Arriving()

    def departing(self, key: AttemptKey) -> None:
        return None

    def arriving(self, key: AttemptKey) -> Arriving | None:
        return self.arrival if key == ("m", 1, INC) else None


async def serve(address: str) -> grpc.aio.Server:
    server = channels.aio_server([Errors(require_deadline=False)])
    add_PeerServiceServicer_to_server(PeerServicer(Agent()), server)
    channels.listen(server, address)
    await server.start()
    return server


@pytest.fixture
async def channel(tmp_path: Path) -> AsyncIterator[tuple[str, grpc.aio.Channel]]:
    address = f"unix:{tmp_path}/peer"
    made = channels.aio_channel(address)
    yield address, made
    await made.close()


async def acked(client: DestinationClient) -> AckRequest:
    """Of one marker, over the device stream."""
    got: asyncio.Queue[AckRequest] = asyncio.Queue()
    client.on_ack = got.put_nowait
    await client.send_frame(MARKER)
    async with asyncio.timeout(5):
        return await got.get()


async def test_devices_reach_an_agent_that_was_away_a_moment_ago(channel: tuple[str, grpc.aio.Channel]) -> None:
    """The channel still waits to connect again: an attempt with the agent's successor must not fail for that."""
    address, to_it = channel
    server = await serve(address)
    before = DestinationClient(to_it, REF, INC)
    assert await before.ping()
    await server.stop(None)
    for _ in range(3):
        with pytest.raises(PeerUnavailable):
            await before.ping()
    server = await serve(address)
    client = DestinationClient(to_it, REF, INC)
    assert await acked(client) == AckRequest("dpu", 1)
    await client.close()
    await server.stop(None)


async def test_a_source_hears_at_once_that_its_device_stream_is_gone(channel: tuple[str, grpc.aio.Channel]) -> None:
    """In the blackout the guest would stay stopped until the switchover's deadline."""
    address, to_it = channel
    server = await serve(address)
    client, lost = DestinationClient(to_it, REF, INC), asyncio.Event()
    client.on_lost = lost.set
    await acked(client)
    await server.stop(None)
    async with asyncio.timeout(2):
        await lost.wait()
    await client.close()


async def test_a_device_stream_that_the_source_ends_is_not_lost(channel: tuple[str, grpc.aio.Channel]) -> None:
    address, to_it = channel
    server = await serve(address)
    client, lost = DestinationClient(to_it, REF, INC), asyncio.Event()
    client.on_lost = lost.set
    await acked(client)
    await client.close()
    await server.stop(None)
    await asyncio.sleep(0.1)
    assert not lost.is_set()
