"""Servers that ask who calls: by real certificates over real sockets."""

# ruff: noqa: N802 - calls have the names that gRPC gives them

from __future__ import annotations

import ast
import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agents.handover.peer import Peers, PeerUnavailable
from agents.serving.peer import PeerServicer
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.pki.authority import Authority
from orchestrator.pki.files import PkiError, show, utc_now, write_denied
from orchestrator.pki.names import of_role
from orchestrator.rpc import channels
from orchestrator.rpc.agent_client import AgentClients
from orchestrator.rpc.credentials import Credentials
from orchestrator.rpc.errors import Errors
from orchestrator.rpc.guard import Guard
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from orchestrator.rpc.roles import METHODS
from protos.drover.v1 import agent_pb2, types_pb2
from protos.drover.v1 import agent_pb2_grpc as agent_rpc
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import orchestrator_pb2_grpc as rpc
from tests.fakes.certificates import CLUSTER, Certificates
from tests.unit.test_peer_rpc import INC, REF, Agent

ROOT = Path(__file__).resolve().parents[2]
R = RefusalReason
CALL_S = 20.0


class Api(rpc.OrchestratorServiceServicer):
    def __init__(self) -> None:
        self.heard: list[str] = []

    async def ListGuests(self, request: Any, context: Any) -> pb.ListGuestsResponse:
        self.heard.append("ListGuests")
        return pb.ListGuestsResponse()

    async def CordonHost(self, request: Any, context: Any) -> types_pb2.Host:
        self.heard.append("CordonHost")
        return types_pb2.Host(name=request.name)


class Nudged(agent_rpc.AgentServiceServicer):
    """Answers at once, and for the guest `slow` when it is told to."""

    def __init__(self) -> None:
        self.nudges = 0
        self.going, self.held = asyncio.Event(), asyncio.Event()

    async def Nudge(self, request: Any, context: Any) -> agent_pb2.NudgeResponse:
        if request.guest_uuid == "slow":
            self.going.set()
            await self.held.wait()
        self.nudges += 1
        return agent_pb2.NudgeResponse()


class Servers:
    def __init__(self, directory: Path) -> None:
        self.pki = Certificates(directory)
        self.authority = Authority(directory / "ca")
        self.api, self.agent = Api(), Nudged()  # pyright: ignore[reportAbstractUsage] - the rest is not called
        self._made: list[Any] = []

    async def serve(self, identity: Path, add: Any, servicer: Any) -> str:
        credentials = Credentials(identity)
        server = channels.aio_server([Errors(require_deadline=False), Guard(credentials, identity)])
        add(servicer, server)
        port = channels.listen(server, "127.0.0.1:0", credentials)
        await server.start()
        self._made.append(server)
        return f"127.0.0.1:{port}"

    async def serve_api(self) -> str:
        return await self.serve(self.pki.role("api"), rpc.add_OrchestratorServiceServicer_to_server, self.api)

    async def serve_agent(self) -> str:
        return await self.serve(self.pki.host("h1"), agent_rpc.add_AgentServiceServicer_to_server, self.agent)

    async def serve_peer(self) -> str:
        peer = PeerServicer(Agent())  # of an attempt whose source is h1
        return await self.serve(self.pki.host("h2"), agent_rpc.add_PeerServiceServicer_to_server, peer)

    async def close(self) -> None:
        for server in self._made:
            await server.stop(0)


@pytest.fixture
async def servers(tmp_path: Path) -> AsyncIterator[Servers]:
    made = Servers(tmp_path / "pki")
    yield made
    await made.close()


async def refused(address: str, identity: Path, call: str = "list_guests", *said: str) -> RefusalReason | None:
    """What the API says to it; None: it did what was asked."""

    def ask() -> RefusalReason | None:
        with OrchestratorClient(address, CALL_S, identity) as client:
            try:
                getattr(client, call)(*said)
            except DroverError as error:
                return error.reason
        return None

    return await asyncio.to_thread(ask)


async def test_a_role_does_what_is_its_own_and_nothing_else(servers: Servers, tmp_path: Path) -> None:
    pki, address = servers.pki, await servers.serve_api()
    assert await refused(address, pki.role("viewer")) is None
    assert await refused(address, pki.role("viewer"), "cordon_host", "h1") is R.NOT_PERMITTED
    assert await refused(address, pki.host("h1"), "cordon_host", "h1") is R.NOT_PERMITTED
    assert await refused(address, pki.role("zookeeper")) is R.NOT_PERMITTED
    assert servers.api.heard == ["ListGuests"]
    assert await refused(address, pki.role("operator"), "cordon_host", "h1") is None
    other = tmp_path / "other"
    Authority.create(tmp_path / "other-ca", CLUSTER, utc_now()).issue(of_role(CLUSTER, "admin"), other, utc_now())
    assert await refused(address, other) is R.API_UNREACHABLE, "an authority that is not ours"
    assert servers.api.heard == ["ListGuests", "CordonHost"]


async def test_whoever_is_revoked_is_refused_from_then_on(servers: Servers, tmp_path: Path) -> None:
    address, admin, api = await servers.serve_api(), servers.pki.role("admin"), tmp_path / "pki/role/api"
    assert await refused(address, admin) is None
    write_denied(api, [show(admin, utc_now()).serial])
    assert await refused(address, admin) is R.UNAUTHENTICATED
    (api / "deny.json").write_text("{")
    assert await refused(address, admin) is R.UNAUTHENTICATED, "a list that cannot be read is not an empty one"
    write_denied(api, [])
    assert await refused(address, admin) is None


async def test_agents_are_known_by_their_certificate_and_not_by_their_address(servers: Servers) -> None:
    address = await servers.serve_agent()
    clients = AgentClients(Credentials(servers.pki.role("coordinator")))
    await clients.at(address, "h1").nudge("g", timeout_s=CALL_S)
    with pytest.raises(DroverError) as wrong:
        await clients.at(address, "h2").nudge("g", timeout_s=CALL_S)
    assert wrong.value.reason is R.AGENT_UNREACHABLE
    assert servers.agent.nudges == 1
    await clients.close()


async def test_calls_under_way_outlive_a_renewal(servers: Servers) -> None:
    address, mine = await servers.serve_agent(), servers.pki.role("coordinator")
    clients = AgentClients(Credentials(mine))
    waiting = asyncio.create_task(clients.at(address, "h1").nudge("slow", timeout_s=3 * CALL_S))
    await servers.agent.going.wait()
    servers.authority.renew(mine, utc_now())
    await clients.at(address, "h1").nudge("fast", timeout_s=CALL_S)
    assert not waiting.done()
    servers.agent.held.set()
    await waiting
    assert servers.agent.nudges == 2
    await clients.close()


async def test_only_the_other_end_of_an_attempt_is_heard(servers: Servers) -> None:
    pki, address = servers.pki, await servers.serve_peer()

    async def go(identity: Path) -> str:
        peers = Peers(Credentials(identity))
        try:
            return str(await peers.destination(address, REF, INC, "h2").go(True))
        except PeerUnavailable as error:
            return f"{error} {error.__cause__}"
        finally:
            await peers.close()

    assert await go(pki.host("h1")) == "True"
    assert "not at the other end" in await go(pki.host("h3"))
    assert "may not call" in await go(pki.role("admin"))
    peers = Peers(Credentials(pki.host("h3")))
    with pytest.raises(DroverError) as error:
        await peers.source(address, REF, INC, "h2").machine()
    assert error.value.reason is R.NOT_PERMITTED, "the machine of a guest is told to where it goes"
    await peers.close()


async def test_the_next_attempt_shows_the_renewed_certificate(servers: Servers) -> None:
    address, mine = await servers.serve_peer(), servers.pki.host("h1")
    peers = Peers(Credentials(mine))
    before = peers.destination(address, REF, INC, "h2")
    assert await before.ping()
    servers.authority.renew(mine, utc_now())
    after = peers.destination(address, REF, INC, "h2")
    assert len(peers) == 2, "one is made before the other is broken"
    assert await after.ping()
    assert await before.ping()
    await peers.close()


def test_a_guard_does_not_start_with_a_deny_list_that_cannot_be_read(tmp_path: Path) -> None:
    mine = Certificates(tmp_path / "pki").role("api")
    (mine / "deny.json").write_text("[]")
    with pytest.raises(PkiError, match="is no deny list"):
        Guard(Credentials(mine), mine)


MAKERS = {"insecure_channel", "secure_channel", "add_insecure_port", "add_secure_port"}
ELSEWHERE = {"deploy/lab/devices/flow_table.py"}
"""A program of the lab that shows how a device's own looks: it serves a unix socket, and uses nothing of ours."""


def _makers() -> Iterator[str]:
    for file in (file for top in ("agents", "orchestrator", "deploy") for file in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.split(".")[-1] in MAKERS or called in {"aio.server", "grpc.aio.server", "grpc.server"}:
                yield str(file.relative_to(ROOT))


def test_channels_and_servers_are_made_in_one_place() -> None:
    assert set(_makers()) - ELSEWHERE == {"orchestrator/rpc/channels.py"}


def test_the_page_tells_the_table() -> None:
    told: dict[str, frozenset[str]] = {}
    for line in (ROOT / "docs/security.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].endswith("Service") and cells[1] != "Calls":
            told |= {f"/drover.v1.{cells[0]}/{call}": frozenset(cells[2].split(", ")) for call in cells[1].split(", ")}
    assert told == METHODS
