"""Who may write what, on a real ZooKeeper by TLS: with the certificate of another host nothing of a guest moves."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from kazoo.exceptions import NoAuthError
from kazoo.security import OPEN_ACL_UNSAFE

from orchestrator.cli import main
from orchestrator.cli.exits import Exit
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.ledger import layout, paths
from orchestrator.ledger.kazoo_client import secured
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.records import encode
from orchestrator.ledger.store import Check, Create, Delete, Done, OutcomeUnknown, SetData, StoreUnavailable
from orchestrator.ledger.zookeeper import ZooKeeperStore
from orchestrator.pki.names import of_role
from tests.fakes.certificates import CLUSTER, Certificates
from tests.fakes.zookeeper import ZooKeeperServer, missing

pytestmark = [pytest.mark.zookeeper, pytest.mark.asyncio(loop_scope="module")]

SERVER = of_role(CLUSTER, "zookeeper").server_name
UUID, MIGRATION = "5f3c0000-0000-0000-0000-000000000001", "aa000000-0000-0000-0000-000000000002"
RECORD = GuestRecord("web", Ownership.IDLE, HostRef("host-1", "boot-1"))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def identities(authority: Certificates) -> dict[str, Path]:
    hosts = {name: authority.host(name) for name in ("host-1", "host-2", "host-3")}
    return {**hosts, "api": authority.role("api"), "coordinator": authority.role("coordinator")}


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, authority: Certificates) -> Iterator[ZooKeeperServer]:
    if missing():
        pytest.skip(missing())
    identity = authority.role("zookeeper", ["127.0.0.1"])
    running = ZooKeeperServer(tmp_path_factory.mktemp("zk") / "server", tls=identity)
    running.start()
    yield running
    running.kill()


def store(server: ZooKeeperServer, identity: Path) -> ZooKeeperStore:
    return ZooKeeperStore(server.hosts, session_timeout_s=8, tls=identity)


class Clients:
    """Everybody's store, and a tree with one guest of host-1's in it."""

    def __init__(self, stores: dict[str, ZooKeeperStore]) -> None:
        self.stores = stores

    def __getitem__(self, name: str) -> ZooKeeperStore:
        return self.stores[name]

    async def version(self, path: str) -> int:
        node = await self["api"].read(path)
        assert node is not None, path
        return node.version


async def made(api: ZooKeeperStore) -> None:
    """What the control plane makes: roots, three enrolled hosts, a guest of host-1's with a migration."""
    await Ledger(api).init_tree()
    for host in ("host-1", "host-2", "host-3"):
        for path in (paths.host(host), paths.fences(host)):
            await api.ensure(path)
    for path in (paths.guest(UUID), paths.migration(MIGRATION)):
        await api.ensure(paths.shard(path))
    if await api.read(paths.guest(UUID)) is None:
        ops = [
            Create(paths.guest(UUID), encode(RECORD)),
            Create(paths.guest_spec(UUID), b"{}"),
            Create(paths.name("web"), encode(UUID)),
            Create(paths.migration(MIGRATION), b"{}"),
            Create(paths.migration_state(MIGRATION), b"{}"),
            Create(paths.requests(MIGRATION), b"{}", writers=("host-1",)),
        ]
        assert isinstance(await api.multi(ops), Done)
    await api.grant(paths.guest(UUID), {"host-1"})


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def clients(secure: ZooKeeperServer, identities: dict[str, Path]) -> AsyncIterator[Clients]:
    stores = {name: store(secure, identity) for name, identity in identities.items()}
    try:
        await stores["api"].start(30)
        await made(stores["api"])
        for one in stores.values():
            await one.start(30)
        yield Clients(stores)
    finally:
        await asyncio.gather(*(one.close() for one in stores.values()))


NODES = {
    "record": paths.guest(UUID),
    "spec": paths.guest_spec(UUID),
    "name": paths.name("web"),
    "migration": paths.migration(MIGRATION),
    "state": paths.migration_state(MIGRATION),
    "requests": paths.requests(MIGRATION),
    "another host": paths.host("host-1"),
    "layout": paths.LAYOUT,
    "barrier": paths.BARRIER,
    **{f"root {root}": root for root in paths.ROOTS if root != paths.BARRIER},
}


async def test_another_host_changes_nothing(clients: Clients) -> None:
    for what, path in NODES.items():
        await nothing_changes(clients, what, path)


async def nothing_changes(clients: Clients, what: str, path: str) -> None:
    host = clients["host-3"]
    version = await clients.version(path)
    assert await host.read(path) is not None, f"everybody reads {what}"
    alone = await host.multi([SetData(path, b"stolen", version)])
    behind = await host.multi([Check(paths.guest(UUID), -1), SetData(path, b"stolen", version)])
    gone = await host.multi([Delete(path, version)])
    for refused in (alone, gone):
        assert isinstance(refused, OutcomeUnknown), refused
        assert not refused.sent
    assert not isinstance(behind, Done)
    if what != "barrier":
        below = await host.multi([Create(f"{path}/evil", b"")])
        assert isinstance(below, OutcomeUnknown), below
    client = host._client
    with pytest.raises(NoAuthError):
        await asyncio.to_thread(client.set_acls, path, OPEN_ACL_UNSAFE)
    assert await clients.version(path) == version


async def test_the_owner_writes_its_guest_and_gives_itself_no_more(clients: Clients) -> None:
    owner, path = clients["host-1"], paths.guest(UUID)
    await clients["coordinator"].grant(path, {"host-1"})
    written = await owner.multi([SetData(path, encode(RECORD), await clients.version(path))])
    assert isinstance(written, Done)
    requests = paths.requests(MIGRATION)
    assert isinstance(await owner.multi([SetData(requests, b"{}", await clients.version(requests))]), Done)
    client = owner._client
    with pytest.raises(NoAuthError):
        await asyncio.to_thread(client.set_acls, path, OPEN_ACL_UNSAFE)
    refused = await owner.multi([Create(f"{path}/more", b"")])
    assert isinstance(refused, OutcomeUnknown), refused


async def test_a_destination_writes_while_the_attempt_lasts(clients: Clients) -> None:
    coordinator, destination, path = clients["coordinator"], clients["host-2"], paths.guest(UUID)
    await coordinator.grant(path, {"host-1"})
    version = await clients.version(path)
    refused = await destination.multi([SetData(path, encode(RECORD), version)])
    assert isinstance(refused, OutcomeUnknown)
    await coordinator.grant(path, {"host-1", "host-2"})
    assert await clients.version(path) == version, "the compare-and-set of an attempt is not disturbed"
    moved = replace(RECORD, owner=HostRef("host-2", "boot-2"))
    assert isinstance(await destination.multi([SetData(path, encode(moved), version)]), Done)
    await coordinator.grant(path, {"host-2"})
    late = await clients["host-1"].multi([SetData(path, encode(RECORD), version + 1)])
    assert isinstance(late, OutcomeUnknown), "the former owner has no word any more"
    assert isinstance(await destination.multi([SetData(path, encode(RECORD), version + 1)]), Done)


async def test_a_grant_that_changes_nothing_is_no_write(clients: Clients) -> None:
    path = paths.guest(UUID)
    client = clients["api"]._client
    await clients["coordinator"].grant(path, {"host-1"})
    before = (await asyncio.to_thread(client.exists, path)).aversion
    await clients["coordinator"].grant(path, {"host-1"})
    assert (await asyncio.to_thread(client.exists, path)).aversion == before
    await clients["coordinator"].grant(paths.guest("ee000000-0000-0000-0000-00000000000f"), {"host-1"})


async def test_a_host_has_its_own_nodes_and_no_other_hosts(clients: Clients) -> None:
    host = clients["host-2"]
    live = Create(paths.live("host-2"), b"{}", ephemeral=True)
    listed = Create(paths.host_guests("host-2"), b"")
    assert isinstance(await host.multi([SetData(paths.host("host-2"), b"", 0), live, listed]), Done)
    mark = paths.host_guest("host-2", UUID)
    assert isinstance(await clients["coordinator"].multi([Create(mark, b"")]), Done)
    assert isinstance(await host.multi([Delete(mark, 0)]), Done)
    assert isinstance(await host.multi([Create(paths.fence("host-2", "boot"), b"{}")]), Done)
    for stranger in (
        Create(paths.host("host-9"), b"{}"),
        Create(paths.live("host-1"), b"{}", ephemeral=True),
        Create(paths.fence("host-1", "boot"), b"{}"),
        Create(paths.host_guests("host-1"), b""),
        Create(paths.name("squatted"), b'"x"'),
        Create(f"{paths.GUESTS}/5f/5f00", b"{}"),
    ):
        assert isinstance(await host.multi([stranger]), OutcomeUnknown), stranger


async def test_a_host_is_one_once_the_admin_has_enrolled_it(
    clients: Clients, secure: ZooKeeperServer, authority: Certificates, identities: dict[str, Path]
) -> None:
    def enroll(host: str, identity: Path) -> int:
        where = ["--zookeeper", secure.hosts, "--chroot", paths.CHROOT, "--tls", str(identity)]
        return main.run(["host", "enroll", host, *where])

    admin, own = authority.role("admin"), store(secure, authority.host("host-9"))
    try:
        await own.start(30)
        assert await asyncio.to_thread(enroll, "host-9", identities["host-1"]) == Exit.UNREACHABLE
        assert await asyncio.to_thread(enroll, "host 9", admin) == Exit.USAGE
        with pytest.raises(StoreUnavailable):
            await own.ensure(paths.host("host-9"))
        for _ in range(2):
            assert await asyncio.to_thread(enroll, "host-9", admin) == Exit.OK
        written = [SetData(paths.host("host-9"), b"{}", 0)]
        assert not isinstance(await clients["host-1"].multi(written), Done)
        assert isinstance(await own.multi(written), Done)
    finally:
        await own.close()


async def test_nobody_is_let_in_without_a_certificate_of_the_authority(
    secure: ZooKeeperServer, tmp_path: Path, identities: dict[str, Path]
) -> None:
    other = Certificates(tmp_path / "other").role("admin")
    (other / "ca.pem").write_bytes((identities["api"] / "ca.pem").read_bytes())
    for refused in (ZooKeeperStore(secure.hosts, session_timeout_s=4), store(secure, other)):
        with pytest.raises(StoreUnavailable):
            await refused.start(1.5)
        await refused.close()


async def test_a_server_of_another_authority_is_not_told_anything(
    secure: ZooKeeperServer, tmp_path: Path, identities: dict[str, Path]
) -> None:
    stranger = Certificates(tmp_path / "other").role("coordinator")
    misled = ZooKeeperStore(secure.hosts, session_timeout_s=4, tls=stranger)
    with pytest.raises(StoreUnavailable, match="certificate verify failed"):
        await misled.start(1.5)


async def test_a_server_is_asked_how_it_is_by_tls(secure: ZooKeeperServer, identities: dict[str, Path]) -> None:
    context = secured(identities["api"])

    def asked() -> bytes:
        with (
            socket.create_connection((secure.address, secure.port), 10) as plain,
            context.wrap_socket(plain, server_hostname=SERVER) as connection,
        ):
            connection.sendall(b"srvr")
            return b"".join(iter(lambda: connection.recv(4096), b""))

    assert b"Mode: standalone" in await asyncio.to_thread(asked)


async def test_much_comes_and_goes_by_tls(clients: Clients) -> None:
    """More than one TLS record each way, many at a time: nothing waits for what was received already."""
    api = clients["api"]
    large = b"x" * 300_000
    path = f"{paths.REQUESTS}/large"
    assert isinstance(await api.multi([Create(path, large)]), Done)
    found = await asyncio.gather(*(api.read(path, 10) for _ in range(40)), *(api.barrier(10) for _ in range(20)))
    assert [one.data for one in found[:40] if one is not None] == [large] * 40
    assert isinstance(await api.multi([Delete(path, 0)]), Done)


async def test_the_layout_is_written_by_the_control_plane(clients: Clients) -> None:
    await layout.must_be_ours(clients["host-1"])
