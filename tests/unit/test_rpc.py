"""Errors, deadlines and health across a real gRPC server on loopback; the agents' client against a fake agent."""

# ruff: noqa: N802 (handlers are named as the .proto names the calls)

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.coordinator.agents import RpcAgents
from orchestrator.coordinator.ports import AgentDirectory, AgentPort, ConductOrder
from orchestrator.core.agent import AgentSample, AttemptSeen, AttemptStatus, GuestStatus, Progress, RunState
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.migration import Prepared
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import MigrationPhase, WantRun
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import op_create
from orchestrator.ledger.store import Done
from orchestrator.rpc import channels, errors, health
from orchestrator.rpc.agent_client import AgentClient
from orchestrator.rpc.channels import aio_channel, aio_server, channel, listen
from orchestrator.rpc.errors import Errors, code_of, from_rpc_error
from protos.drover.v1 import agent_pb2 as pb
from protos.drover.v1.agent_pb2_grpc import AgentServiceStub, add_AgentServiceServicer_to_server
from tests.fakes.agent import FakeAgent
from tests.fakes.coordination import MemoryStore

R = RefusalReason


class Raising(FakeAgent):
    """GetAgent raises what it is given; WatchAgent does so after one message."""

    error: Exception = DroverError(R.NOT_FOUND, "nobody")

    async def GetAgent(self, request: pb.GetAgentRequest, context: Any) -> pb.GetAgentResponse:
        raise self.error

    async def WatchAgent(self, request: pb.WatchAgentRequest, context: Any) -> AsyncIterator[pb.WatchAgentResponse]:
        yield pb.WatchAgentResponse()
        raise self.error


@pytest.fixture
async def agent() -> AsyncIterator[Raising]:
    agent = Raising("h1", MemoryStore())
    await agent.start()
    yield agent
    await agent.stop()


@pytest.fixture
async def client(agent: Raising) -> AsyncIterator[AgentClient]:
    client = AgentClient(agent.address)
    yield client
    await client.close()


async def collect(stream: AsyncIterator[AgentSample], into: list[AgentSample]) -> None:
    async for sample in stream:
        into.append(sample)


async def refusal(client: AgentClient) -> DroverError:
    with pytest.raises(DroverError) as caught:
        await client.get_agent()
    return caught.value


@pytest.mark.parametrize("reason", R)
async def test_every_reason_crosses_the_wire(agent: Raising, client: AgentClient, reason: RefusalReason) -> None:
    agent.error = DroverError(reason, "because ä", details={"zxid": "7"})
    got = await refusal(client)
    assert (got.reason, got.message, got.details, got.violations) == (reason, "because ä", {"zxid": "7"}, ())
    assert code_of(reason) is not grpc.StatusCode.OK


async def test_field_violations_cross_the_wire(agent: Raising, client: AgentClient) -> None:
    agent.error = invalid([("name", "is empty"), ("vcpus", "must be positive")])
    got = await refusal(client)
    assert got.violations == (("name", "is empty"), ("vcpus", "must be positive"))
    assert got.field == ""
    assert "name: is empty" in got.message
    agent.error = invalid([("name", "is empty")])
    got = await refusal(client)
    assert (got.field, got.message) == ("name", "is empty")


async def test_what_was_not_foreseen_is_internal_and_says_no_secrets(
    agent: Raising, client: AgentClient, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.error = ZeroDivisionError("/etc/secret")
    got = await refusal(client)
    assert got.reason is R.INTERNAL
    assert "ZeroDivisionError" in got.message
    assert "secret" not in got.message
    assert "secret" in "".join(capsys.readouterr())


async def test_streams_end_with_the_same_error(agent: Raising, client: AgentClient) -> None:
    agent.error = DroverError(R.GUEST_NOT_RUNNING, "gone")
    seen: list[AgentSample] = []
    with pytest.raises(DroverError, match="gone"):
        await collect(client.watch_agent(), seen)
    assert seen == [AgentSample()]


async def test_a_handlers_exception_is_translated_by_who_knows_it() -> None:
    agent = Raising("h1", MemoryStore())
    agent.error = KeyError("x")
    server = aio_server(
        [Errors(require_deadline=True, translate=lambda _error: DroverError(R.LEDGER_UNREACHABLE, "no quorum"))]
    )
    add_AgentServiceServicer_to_server(agent, server)
    client = AgentClient(f"127.0.0.1:{listen(server, '127.0.0.1:0')}")
    await server.start()
    got = await refusal(client)
    assert got.reason is R.LEDGER_UNREACHABLE
    await client.close()
    await server.stop(None)


async def test_a_refusal_of_any_length_arrives_as_that_refusal(agent: Raising, client: AgentClient) -> None:
    """Longer than gRPC takes, in its message as in its violations: 500 hosts, or 500 bad labels."""
    agent.error = DroverError(R.NO_CAPACITY, "no room: " + "host-1 has 1 MiB free; " * 500)
    got = await refusal(client)
    assert got.reason is R.NO_CAPACITY
    assert got.message.startswith("no room: host-1 has 1 MiB free")
    agent.error = invalid([(f"spec.labels['{n}{'x' * 200}']", "a key is 1 to 63 letters") for n in range(500)])
    got = await refusal(client)
    assert got.reason is R.INVALID_ARGUMENT
    assert got.message.startswith("500 fields are wrong")
    assert 1 < len(got.violations) <= 20


async def test_a_request_that_is_no_message_is_refused(agent: Raising, capsys: pytest.CaptureFixture[str]) -> None:
    async with aio_channel(agent.address) as bare:
        for call in (
            bare.unary_unary("/drover.v1.AgentService/GetAgent"),
            bare.unary_unary("/drover.v1.AgentService/Nudge"),
        ):
            with pytest.raises(aio.AioRpcError) as caught:
                await call(b"\xff\xff", timeout=5)
            got = from_rpc_error(caught.value)
            assert (got.reason, caught.value.code()) == (R.INVALID_ARGUMENT, grpc.StatusCode.INVALID_ARGUMENT)
            assert "not a message" in got.message
        with pytest.raises(aio.AioRpcError) as caught:
            async for _ in bare.unary_stream("/drover.v1.AgentService/WatchAgent")(b"\xff\xff", timeout=5):
                pass
        assert from_rpc_error(caught.value).reason is R.INVALID_ARGUMENT
    assert "Traceback" not in "".join(capsys.readouterr())


async def test_a_call_whose_first_message_does_not_come_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later ones may take as long as they like."""
    monkeypatch.setattr(errors, "FIRST_S", 0.3)

    class Listening(FakeAgent):
        async def HoldConsole(
            self, request_iterator: AsyncIterator[pb.HoldConsoleRequest], context: Any
        ) -> AsyncIterator[pb.HoldConsoleResponse]:
            async for each in request_iterator:
                yield pb.HoldConsoleResponse(data=each.data)

    agent = Listening("h1", MemoryStore())
    await agent.start()
    try:
        async with aio_channel(agent.address) as bare:
            stub = AgentServiceStub(bare)
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.HoldConsole(timeout=20).read()
            refused = from_rpc_error(caught.value)
            assert refused.reason is R.INVALID_ARGUMENT
            assert "the first message says" in refused.message
            call = stub.HoldConsole(timeout=20)
            for data in (b"a", b"b"):
                await call.write(pb.HoldConsoleRequest(data=data))
                assert await call.read() == pb.HoldConsoleResponse(data=data)
                await asyncio.sleep(0.5)
            await call.done_writing()
            assert await call.read() is aio.EOF
    finally:
        await agent.stop()


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        ("Stream removed (received metadata size exceeds soft limit (14318 vs. 8192))", R.INTERNAL),
        ("Stream removed (received metadata size exceeds hard limit (value length 20000 vs. 16384))", R.INTERNAL),
        ("CLIENT: Sent message larger than max (300000 vs. 262144)", R.INVALID_ARGUMENT),
        ("SERVER: Received message larger than max (300000 vs. 262144)", R.INVALID_ARGUMENT),
        ("CLIENT: Received message larger than max (17000000 vs. 16777216)", R.OUTCOME_UNKNOWN),
        ("SERVER: Sent message larger than max (17000000 vs. 16777216)", R.OUTCOME_UNKNOWN),
        ("quota", R.OUTCOME_UNKNOWN),
    ],
)
def test_what_grpc_says_of_sizes(details: str, reason: RefusalReason) -> None:
    """A refusal that was too long for its trailers is no unknown outcome, nor is a request that was never sent; an
    answer that was too large to take may be one of a call that had its effect."""
    got = from_rpc_error(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, details))
    assert got.reason is reason


async def test_calls_without_a_deadline_are_refused(agent: Raising) -> None:
    async with aio_channel(agent.address) as bare:
        stub = AgentServiceStub(bare)
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.GetAgent(pb.GetAgentRequest())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert from_rpc_error(caught.value).reason is R.DEADLINE_REQUIRED
        with pytest.raises(aio.AioRpcError) as caught:
            async for _ in stub.WatchAgent(pb.WatchAgentRequest()):
                pass
        assert from_rpc_error(caught.value).reason is R.DEADLINE_REQUIRED


async def test_a_server_of_ours_is_known_by_a_synchronous_caller_too(agent: Raising) -> None:
    def ask() -> DroverError:
        with channel(agent.address) as sync:
            try:
                AgentServiceStub(sync).GetAgent(pb.GetAgentRequest(), timeout=5)
            except grpc.RpcError as error:
                return from_rpc_error(error)
            raise AssertionError("no error")

    agent.error = DroverError(R.STALE_EPOCH, "old", field="epoch")
    got = await asyncio.to_thread(ask)
    assert (got.reason, got.field) == (R.STALE_EPOCH, "epoch")


class Status(grpc.RpcError):
    """A failed call of somebody who is not us."""

    def __init__(self, code: grpc.StatusCode, details: str | None = "no") -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        return ()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, R.AGENT_UNREACHABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, R.OUTCOME_UNKNOWN),
        (grpc.StatusCode.CANCELLED, R.OUTCOME_UNKNOWN),
        (grpc.StatusCode.INTERNAL, R.OUTCOME_UNKNOWN),
        (grpc.StatusCode.UNKNOWN, R.OUTCOME_UNKNOWN),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, R.OUTCOME_UNKNOWN),
        (grpc.StatusCode.UNIMPLEMENTED, R.INTERNAL),
        (grpc.StatusCode.NOT_FOUND, R.NOT_FOUND),
        (grpc.StatusCode.INVALID_ARGUMENT, R.INVALID_ARGUMENT),
    ],
)
def test_a_status_without_our_reason(code: grpc.StatusCode, reason: RefusalReason) -> None:
    got = from_rpc_error(Status(code), peer="the agent of h1")
    assert got.reason is reason
    assert "the agent of h1" in got.message


@given(st.sampled_from(grpc.StatusCode), st.none() | st.text())
def test_every_status_becomes_an_error_with_a_sentence(code: grpc.StatusCode, details: str | None) -> None:
    got = from_rpc_error(Status(code, details), unreachable=R.API_UNREACHABLE)
    assert got.message
    assert (got.reason is R.API_UNREACHABLE) == (code is grpc.StatusCode.UNAVAILABLE)


async def test_nobody_there(tmp_path: Path) -> None:
    client = AgentClient(f"unix:{tmp_path}/nobody.sock")
    got = await refusal(client)
    await client.close()
    assert got.reason is R.AGENT_UNREACHABLE
    assert "nobody.sock" in got.message


async def test_no_answer_in_time_is_an_unknown_outcome() -> None:
    agent = FakeAgent("h1", MemoryStore(), delays_s={"GetAgent": 5})
    await agent.start()
    client = AgentClient(agent.address)
    with pytest.raises(DroverError) as caught:
        await client.get_agent(timeout_s=0.1)
    assert caught.value.reason is R.OUTCOME_UNKNOWN
    await client.close()
    await agent.stop()


@pytest.mark.timeout(60)
async def test_a_reader_that_takes_nothing_in_is_dropped_and_told_when_it_reads_again() -> None:
    ended = asyncio.Event()

    class Flood(FakeAgent):
        async def WatchAgent(self, request: pb.WatchAgentRequest, context: Any) -> AsyncIterator[pb.WatchAgentResponse]:
            try:
                while True:
                    yield pb.WatchAgentResponse(guests=[pb.GuestStatus(name="x" * 200_000)])
            finally:
                ended.set()

    server = aio_server([Errors(require_deadline=True, slow_reader_s=0.5)])
    add_AgentServiceServicer_to_server(Flood("h1", MemoryStore()), server)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    reads_again = threading.Event()

    def read() -> DroverError:
        with channel(f"127.0.0.1:{port}") as sync:
            call = AgentServiceStub(sync).WatchAgent(pb.WatchAgentRequest(), timeout=60)
            try:
                next(call)
                reads_again.wait(30)
                for _ in call:
                    pass
            except grpc.RpcError as error:
                return from_rpc_error(error)
        raise AssertionError("no error")

    reading = asyncio.ensure_future(asyncio.to_thread(read))
    async with asyncio.timeout(30):
        await ended.wait()
    reads_again.set()
    assert (await reading).reason is R.SLOW_READER
    await server.stop(None)


async def test_two_servers_never_share_a_port(agent: Raising) -> None:
    second = aio_server()
    with pytest.raises(DroverError, match="in use"):
        listen(second, agent.address)


async def test_health(tmp_path: Path) -> None:
    """Asked right after it could not be reached, which others still remember: what was does not count."""
    address = f"unix:{tmp_path}/s.sock"
    assert "cannot be asked" in (await health.check(address) or "")
    other = aio_channel(address)
    with pytest.raises(aio.AioRpcError):
        await AgentServiceStub(other).GetAgent(pb.GetAgentRequest(), timeout=1)
    service, server = health.HealthService(["drover.v1.X"]), aio_server([Errors(require_deadline=True)])
    await service.set(False)
    service.add_to(server)
    listen(server, address)
    await server.start()
    try:
        assert "does not serve" in (await health.check(address) or "")
        await service.set(True)
        assert await health.check(address) is None
        await service.end()
        await service.set(True)
        assert "does not serve" in (await health.check(address) or "")
    finally:
        await server.stop(None)
        await other.close()


async def test_a_server_without_a_health_service_is_well_as_long_as_it_answers(agent: Raising) -> None:
    assert await health.check(agent.address) is None


# --- AgentClient ------------------------------------------------------------------------------------------------------

REF = AttemptRef("g1", "m1", 1)


@pytest.fixture
async def plain() -> AsyncIterator[FakeAgent]:
    agent = FakeAgent("h1", MemoryStore())
    await agent.start()
    yield agent
    await agent.stop()


async def test_the_coordinators_directory_keeps_one_channel_per_agent(plain: FakeAgent) -> None:
    directory: AgentDirectory = RpcAgents()
    port: AgentPort = directory.at(plain.address)
    assert directory.at(plain.address) is port
    prepared = await port.prepare_destination(
        REF, epoch=3, source_peer=Endpoint("2001:db8::1", 1), timeout_ms=1000, multifd_channels=0
    )
    assert prepared == Prepared("inc-1", Endpoint("127.0.0.1", 1), Endpoint("127.0.0.1", 7702))
    order = ConductOrder(REF, 3, prepared, HostRef("h2", "b2"), MigrationPolicy(), "LATE_SWITCHOVER_ACK")
    await port.conduct_attempt(order)
    assert await port.get_attempt("m1", 1) == AttemptSeen(known=False)
    await port.nudge("g1")
    assert plain.calls == [
        ("PrepareDestination", "g1"),
        ("ConductAttempt", "g1 h2 LATE_SWITCHOVER_ACK"),
        ("GetAttempt", "m1"),
        ("Nudge", "g1"),
    ]
    await directory.close()


async def test_a_watch_tells_everything_and_then_what_is_new(plain: FakeAgent) -> None:
    client = AgentClient(plain.address)
    first = GuestStatus("g1", "web", "inc", RunState.RUNNING, 1)
    plain.say(AgentSample(guests=(first,)))
    attempt = AttemptStatus(REF, MigrationPhase.PRECOPY, Progress(transferred_bytes=5, gate_open=True))
    seen: list[AgentSample] = []
    async for sample in client.watch_agent():
        seen.append(sample)
        if len(seen) == 2:
            break
        plain.say(AgentSample(attempts=(attempt,)))
    assert seen == [AgentSample(guests=(first,)), AgentSample(attempts=(attempt,))]
    await client.close()


async def test_a_watch_ends_by_itself_at_its_bound(plain: FakeAgent) -> None:
    client = AgentClient(plain.address)
    assert [sample async for sample in client.watch_agent(timeout_s=0.2)] == [AgentSample()]
    await client.close()


async def test_wishes_and_instructions(plain: FakeAgent) -> None:
    client = AgentClient(plain.address)
    await plain.store.ensure(paths.shard(paths.guest("g1")))
    here = GuestRecord("web", Ownership.IDLE, HostRef("h1", "boot-h1"))
    ops = [op_create(paths.guest("g1"), here), op_create(paths.want_run("g1"), WantRun(False, "x", 3))]
    assert isinstance(await plain.store.multi(ops), Done)
    answer = await client.apply_want_run("g1", 3)
    assert (answer.applied, answer.run_state) == (True, RunState.PAUSED)
    assert await client.pass_instruction("g1", "nic", "blink 2") == "nic was told: blink 2"
    await client.close()


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_a_server_takes_a_bounded_number_of_connections_and_cuts_off_who_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = channels._with(channels._SERVER, {"grpc.server_handshake_timeout_ms": 1_000})
    monkeypatch.setattr(channels, "_SERVER", options)
    server = aio_server(max_connections=8)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    before = open_descriptors()
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
    await asyncio.sleep(0.3)
    assert open_descriptors() - before - len(idle) <= 8
    async with asyncio.timeout(20):
        for reader, _ in idle:
            try:
                while await reader.read(4096):  # its settings, which nobody asked for
                    pass
            except ConnectionError:
                pass
    async with aio_channel(f"127.0.0.1:{port}", alone=True) as late, asyncio.timeout(20):
        await late.channel_ready()
    await server.stop(0)
