"""Mutual TLS over real sockets, and the table of who may call what."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from orchestrator.pki.authority import Authority
from orchestrator.pki.files import PkiError, utc_now
from orchestrator.pki.names import of_host, of_role
from orchestrator.rpc import channels, health
from orchestrator.rpc.credentials import Credentials
from orchestrator.rpc.roles import METHODS, may_call
from protos.drover.v1 import agent_pb2, orchestrator_pb2
from tests.fakes.certificates import CLUSTER, Certificates

H1 = of_host(CLUSTER, "h1")
CALL_S = 20.0


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path / "pki")


@pytest.fixture
async def server(certificates: Certificates) -> AsyncIterator[str]:
    made, service = channels.aio_server(), health.HealthService()
    service.add_to(made)
    port = channels.listen(made, "127.0.0.1:0", Credentials(certificates.host("h1")))
    await made.start()
    await service.set(True)
    yield f"127.0.0.1:{port}"
    await made.stop(0)


async def ask(channel: aio.Channel) -> grpc.StatusCode:
    try:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)  # pyright: ignore
    except aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def served(address: str, mine: Path) -> bytes | None:
    """The certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=mine / "ca.pem")
    context.load_cert_chain(mine / "cert.pem", mine / "key.pem")
    context.set_alpn_protocols(["h2"])
    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port)), CALL_S) as plain,
        context.wrap_socket(plain, server_hostname=H1.server_name) as made,
    ):
        return made.getpeercert(binary_form=True)


async def test_only_certificates_of_the_cluster_talk(certificates: Certificates, server: str, tmp_path: Path) -> None:
    ours = Credentials(certificates.role("coordinator"))
    async with channels.tls_channel(server, ours, H1) as channel:
        assert await ask(channel) is grpc.StatusCode.OK
    async with channels.tls_channel(server, ours, of_host(CLUSTER, "h2")) as channel:
        assert await ask(channel) is grpc.StatusCode.UNAVAILABLE, "another host is expected there"
    async with channels.aio_channel(server, alone=True) as channel:
        assert await ask(channel) is not grpc.StatusCode.OK, "plaintext"
    other = tmp_path / "other"
    Authority.create(tmp_path / "other-ca", CLUSTER, utc_now()).issue(of_role(CLUSTER, "admin"), other, utc_now())
    shutil.copy(tmp_path / "pki/role/coordinator/ca.pem", other / "ca.pem")
    async with channels.tls_channel(server, Credentials(other), H1) as channel:
        assert await ask(channel) is not grpc.StatusCode.OK, "signed by another authority"
    nobody = grpc.ssl_channel_credentials((other / "ca.pem").read_bytes())
    options = [("grpc.ssl_target_name_override", H1.server_name)]
    async with aio.secure_channel(server, nobody, options=options) as channel:
        assert await ask(channel) is not grpc.StatusCode.OK, "no certificate"


async def test_a_renewal_disturbs_no_connection(certificates: Certificates, server: str, tmp_path: Path) -> None:
    mine = certificates.role("api")
    async with channels.tls_channel(server, Credentials(mine), H1) as warm:
        assert await ask(warm) is grpc.StatusCode.OK
        before = await asyncio.to_thread(served, server, mine)
        authority = Authority(tmp_path / "pki/ca")
        for held in (tmp_path / "pki/host/h1", mine):
            authority.renew(held, utc_now())
        assert await ask(warm) is grpc.StatusCode.OK
        async with channels.tls_channel(server, Credentials(mine), H1) as fresh:
            assert await ask(fresh) is grpc.StatusCode.OK
        assert await asyncio.to_thread(served, server, mine) != before, "new connections meet the new certificate"


def test_half_a_renewal_is_not_used(certificates: Certificates) -> None:
    held, other = certificates.host("h1"), certificates.host("h2")
    shutil.copy(other / "key.pem", held / "key.pem")
    with pytest.raises(PkiError, match="do not belong together"):
        Credentials(held)


def test_the_table_names_every_method() -> None:
    services = [*agent_pb2.DESCRIPTOR.services_by_name.values(), *orchestrator_pb2.DESCRIPTOR.services_by_name.values()]
    assert set(METHODS) == {f"/{each.full_name}/{method.name}" for each in services for method in each.methods}


@pytest.mark.parametrize(
    ("role", "method", "may"),
    [
        ("viewer", "OrchestratorService/ListGuests", True),
        ("viewer", "OrchestratorService/StopGuest", False),
        ("scheduler", "OrchestratorService/CreateEvacuation", False),
        ("operator", "OrchestratorService/DeclareHostDead", False),
        ("admin", "AgentService/EndGuest", False),
        ("zookeeper", "OrchestratorService/ListGuests", False),
        ("admin", "OrchestratorService/NoSuchCall", False),
    ],
)
def test_a_role_may_call_what_the_table_says(role: str, method: str, may: bool) -> None:
    assert may_call(of_role(CLUSTER, role), f"/drover.v1.{method}") is may


def test_a_host_is_heard_by_its_peers_only() -> None:
    assert {method for method in METHODS if may_call(H1, method)} == {m for m in METHODS if "PeerService" in m}
