"""The hand-over calls between two agents, over a real channel."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, cast

import grpc.aio
import pytest

from agents.handover.attempt import Arrival
from agents.handover.peer import (
    MAX_FRAME_BYTES,
    AttemptKey,
    GrpcDestinationPeer,
    GrpcSourcePeer,
    Peers,
    PeerUnavailable,
)
from agents.serving.peer import PeerServicer
from agents.shims.base import Frame, FrameKind
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.ids import AckRequest, AttemptRef
from orchestrator.core.records import GuestSpec, LiveMachine
from orchestrator.rpc import channels
from orchestrator.rpc.errors import Errors
from protos.drover.v1 import agent_pb2 as pb
from protos.drover.v1.agent_pb2_grpc import PeerServiceStub, add_PeerServiceServicer_to_server

REF, INC = AttemptRef("g", "m", 1), "i"
MARKER = Frame("dpu", 1, FrameKind.INITIAL_SENT, generation=1)


class Acknowledging:
    """An arrival, as far as the servicer speaks to it: acknowledges each marker."""

    def __init__(self) -> None:
        self.acks: asyncio.Queue[AckRequest] = asyncio.Queue()
        self.source = "h1"

    async def frame(self, frame: Frame) -> None:
        self.acks.put_nowait(AckRequest(frame.device, frame.generation))

    async def go(self, inc: str, want_run: bool) -> bool:
        return True


class Agent:
    """A destination that knows one attempt."""

    def __init__(self) -> None:
        self.known = cast(Arrival, Acknowledging())

    def departure(self, key: AttemptKey) -> None:
        return None

    def arrival(self, key: AttemptKey) -> Arrival | None:
        return self.known if key == ("m", 1, INC) else None

    async def machine(self, uuid: str) -> tuple[LiveMachine, GuestSpec]:
        raise DroverError(RefusalReason.NOT_FOUND, f"there is no guest {uuid} here")

    async def pool_tokens(self, uuid: str) -> Mapping[str, str]:
        raise DroverError(RefusalReason.NOT_FOUND, f"there is no guest {uuid} here")

    async def must_go_to(self, uuid: str, host: str) -> None:
        raise DroverError(RefusalReason.NOT_PERMITTED, f"guest {uuid} does not go to {host}")

    async def hold_locks(self, uuid: str) -> tuple[str, ...]:
        raise DroverError(RefusalReason.NOT_FOUND, f"there is no guest {uuid} here")


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


async def acked(client: GrpcDestinationPeer) -> AckRequest:
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
    before = GrpcDestinationPeer(to_it, REF, INC)
    assert await before.ping()
    await server.stop(None)
    for _ in range(3):
        with pytest.raises(PeerUnavailable):
            await before.ping()
    server = await serve(address)
    client = GrpcDestinationPeer(to_it, REF, INC)
    assert await acked(client) == AckRequest("dpu", 1)
    await client.close()
    await server.stop(None)


async def test_a_source_hears_at_once_that_its_device_stream_is_gone(channel: tuple[str, grpc.aio.Channel]) -> None:
    """In the blackout the guest would stay stopped until the switchover's deadline."""
    address, to_it = channel
    server = await serve(address)
    client, lost = GrpcDestinationPeer(to_it, REF, INC), asyncio.Event()
    client.on_lost = lost.set
    await acked(client)
    await server.stop(None)
    async with asyncio.timeout(2):
        await lost.wait()
    await client.close()


async def test_a_device_stream_that_the_source_ends_is_not_lost(channel: tuple[str, grpc.aio.Channel]) -> None:
    address, to_it = channel
    server = await serve(address)
    client, lost = GrpcDestinationPeer(to_it, REF, INC), asyncio.Event()
    client.on_lost = lost.set
    await acked(client)
    await client.close()
    await server.stop(None)
    await asyncio.sleep(0.1)
    assert not lost.is_set()


async def test_a_source_that_has_no_machine_to_tell_is_no_silent_one(channel: tuple[str, grpc.aio.Channel]) -> None:
    """The first is over with its answer, the second is asked again until the attempt's time is."""
    address, to_it = channel
    client = GrpcSourcePeer(to_it, REF, INC)
    with pytest.raises(PeerUnavailable):
        await client.machine()
    server = await serve(address)

    async def asked() -> None:
        while True:  # the channel waits to connect again
            with contextlib.suppress(PeerUnavailable):
                await client.machine()

    with pytest.raises(DroverError, match="there is no guest g here") as raised:
        await asyncio.wait_for(asked(), 10)
    assert raised.value.reason is RefusalReason.NOT_FOUND
    await server.stop(None)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"kind": 77}, "there is no frame of kind 77"),
        ({"kind": 0}, "there is no frame of kind 0"),
        ({"kind": 1, "data": b"x" * (MAX_FRAME_BYTES + 1)}, "a frame has at most"),
        ({"kind": 4, "total_bytes": -1}, "negative"),
        ({"kind": 4, "digest": b"x" * 65}, "a digest that is none"),
    ],
)
async def test_frames_that_no_agent_sends_are_refused(
    channel: tuple[str, grpc.aio.Channel], wrong: dict[str, Any], field: str
) -> None:
    address, made = channel
    server = await serve(address)
    tag = pb.AttemptTag(guest_uuid="g", migration="m", attempt=1, inc=INC)
    stream: Any = PeerServiceStub(made).TransferDevices(iter([pb.TransferDevicesRequest(tag=tag, device="d", **wrong)]))
    with pytest.raises(grpc.aio.AioRpcError, match=field) as caught:
        async for _ in stream:
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await server.stop(0)


async def test_connections_that_no_attempt_uses_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peers, "IDLE_S", 0.04)
    peers = Peers()
    used = peers.destination("127.0.0.1:1", REF, INC)
    peers.destination("127.0.0.1:2", REF, INC)
    peers.source("127.0.0.1:3", REF, INC)
    assert len(peers) == 3
    async with asyncio.timeout(10):
        while len(peers) > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert len(peers) == 1, "the one in use stays"
    del used
    async with asyncio.timeout(10):
        while len(peers):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await peers.close()


async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peers, "MOST", 3)
    peers = Peers()
    kept = [peers.source(f"127.0.0.1:{port}", REF, INC) for port in (1, 2)]
    for port in range(10, 30):
        peers.source(f"127.0.0.1:{port}", REF, INC)
    assert len(peers) == 3
    many = [peers.source(f"127.0.0.1:{port}", REF, INC) for port in range(40, 50)]
    assert len(peers) >= 12, "attempts that are under way are never cut off"
    assert len(kept) + len(many) == 12
    await peers.close()
