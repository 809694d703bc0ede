"""Declaring a host dead through the real API, with the leader's own runner behind the same ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import wire
from orchestrator.api.deaths import CONFIRMATION_S
from orchestrator.coordinator.deaths import DeathRunner
from orchestrator.core.death import successor_uuid
from orchestrator.core.errors import RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import (
    Certificate,
    FencerEntry,
    GuestSpec,
    OnHostDeath,
    Proof,
    Reservation,
)
from orchestrator.fencing.base import Fenced, Fencers, Power
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.ledger import op_create
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Delete, Done, SetData, Versioned
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.api import ApiCluster, api_cluster, until
from tests.fakes.coordination import MemoryStore

R = RefusalReason
WEB = GuestSpec("web", on_host_death=OnHostDeath.RESTART)
DB = GuestSpec("db")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
async def api(store: MemoryStore, tmp_path: Path) -> AsyncIterator[ApiCluster]:
    async with api_cluster(store, tmp_path) as cluster:
        yield cluster


@pytest.fixture
def client(api: ApiCluster) -> OrchestratorClient:
    return api.client


class Switch:
    def __init__(self, power: Power = Power.OFF) -> None:
        self.power = power

    async def power_off(self, host: str) -> Fenced:
        return Fenced(self.power, "by hand")


@asynccontextmanager
async def leader(api: ApiCluster, switch: Switch | None = None) -> AsyncIterator[None]:
    """What the leading coordinator does about dead hosts."""
    store = api.store
    assert isinstance(store, MemoryStore)
    store.tree.nodes[paths.epoch()] = Versioned(b"", 1, 0)
    fencers = Fencers(((FencerEntry("ipmi", "exec", ("h*",)), switch),) if switch else ())
    runner = DeathRunner(store, api.server.tools.agents, Index(store), 1, fencers)
    task = asyncio.create_task(runner.run())
    try:
        await until(lambda: bool(store.tree.nodes.get(paths.FENCERS, Versioned(b"", 0, 0)).data))
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def dies(api: ApiCluster, host: str) -> None:
    node = await api.store.read(paths.live(host))
    assert node is not None
    assert isinstance(await api.store.multi([Delete(paths.live(host), node.version)]), Done)
    await api.agents[host].stop()


def record(store: MemoryStore, uuid: str) -> GuestRecord:
    return decode(GuestRecord, store.tree.nodes[paths.guest(uuid)].data)


async def test_a_look_changes_nothing_and_says_what_would_be(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    for spec in (WEB, DB):
        await api.call(client.create_guest, spec, "h1")
    await dies(api, "h1")
    async with leader(api, Switch()):
        writes = len(store.writes)
        plan = await api.call(client.declare_host_dead, "h1")
        assert len(store.writes) == writes
    assert [(each.guest, each.fate, each.message) for each in plan.guests] == [
        ("db", "LOST", "its policy says leave"),
        ("web", "RESTARTED", "its policy says restart"),
    ]
    assert (plan.lost, plan.restarted, plan.staying) == (1, 1, 0)
    assert (wire.word(plan, "phase"), plan.fencer) == ("PLANNED", "ipmi")
    assert plan.confirmation_token


@pytest.mark.rule("H11")
async def test_from_the_look_to_the_restarted_guest(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    web, db = [await api.call(client.create_guest, spec, "h1") for spec in (WEB, DB)]
    await dies(api, "h1")
    async with leader(api, Switch()):
        plan = await api.call(client.declare_host_dead, "h1")
        done = await api.call(client.declare_host_dead, "h1", plan.confirmation_token, requested_by="ann@desk")
        assert (wire.word(done, "phase"), done.crashed) == ("DONE", 2)
        assert done.requested_by.startswith("ann@desk at ")
        await until(lambda: record(store, web.uuid).phase is Ownership.GONE)
    now = await api.call(client.get_guest, "web")
    assert now.uuid == successor_uuid(web.uuid, 1) != web.uuid
    assert (now.host, wire.word(now, "ownership")) == ("h2", "IDLE")
    left = await api.call(client.get_guest, "db")
    assert (left.uuid, wire.word(left, "ownership")) == (db.uuid, "CRASHED")
    assert left.message == "its host h1 died; it is not started again: its policy says leave"
    assert wire.word(await api.call(client.get_host, "h1"), "state") == "DEAD"
    assert wire.word(await api.call(client.get_host_death, "h1"), "phase") == "DONE"
    again = await api.call(client.declare_host_dead, "h1")
    assert wire.word(again, "phase") == "DONE"
    await api.call(client.stop_guest, "db")
    await api.call(client.create_guest, DB)


async def test_on_the_operators_word(api: ApiCluster, client: OrchestratorClient, store: MemoryStore) -> None:
    await dies(api, "h1")
    async with leader(api):
        plan = await api.call(client.declare_host_dead, "h1")
        assert plan.fencer == ""
        error = await api.refused(client.declare_host_dead, "h1", plan.confirmation_token)
        assert error.reason is R.FENCER_REQUIRED
        assert paths.death("h1") not in store.tree.nodes
        done = await api.call(
            client.declare_host_dead, "h1", plan.confirmation_token, on_operators_word=True, requested_by="ann"
        )
    assert (wire.word(done, "phase"), done.on_operators_word) == ("DONE", True)
    known = decode(Certificate, store.tree.nodes[paths.fence("h1", "boot-h1")].data)
    assert known.proof is Proof.OPERATOR
    assert known.by.startswith("ann at ")


async def test_a_host_that_lives(api: ApiCluster, client: OrchestratorClient) -> None:
    error = await api.refused(client.declare_host_dead, "h1")
    assert error.reason is R.HOST_ALIVE


async def test_a_fencer_that_does_not_confirm(api: ApiCluster, client: OrchestratorClient, store: MemoryStore) -> None:
    await dies(api, "h1")
    async with leader(api, switch := Switch(Power.UNKNOWN)):
        plan = await api.call(client.declare_host_dead, "h1")
        error = await api.refused(client.declare_host_dead, "h1", plan.confirmation_token)
        assert (error.reason, "by hand" in error.message) == (R.NOT_FENCED, True)
        assert wire.word(await api.call(client.get_host_death, "h1"), "phase") == "FAILED"
        switch.power = Power.OFF
        done = await api.call(client.declare_host_dead, "h1", plan.confirmation_token)
    assert wire.word(done, "phase") == "DONE"


async def test_a_confirmation_of_something_else(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    guest = await api.call(client.create_guest, DB, "h1")
    await dies(api, "h1")
    plan = await api.call(client.declare_host_dead, "h1")
    for token in ("no", "zz-1", "x" * 250):
        error = await api.refused(client.declare_host_dead, "h1", token)
        assert (error.reason, error.field) == (R.INVALID_ARGUMENT, "confirmation_token")
    path = paths.guest(guest.uuid)
    node = store.tree.nodes[path]
    assert isinstance(await store.multi([SetData(path, node.data, node.version)]), Done)
    error = await api.refused(client.declare_host_dead, "h1", plan.confirmation_token, on_operators_word=True)
    assert error.reason is R.CONFIRMATION_STALE
    assert paths.death("h1") not in store.tree.nodes


async def test_a_confirmation_grows_old(api: ApiCluster, client: OrchestratorClient) -> None:
    await dies(api, "h1")
    plan = await api.call(client.declare_host_dead, "h1")
    tools = api.server.tools
    real = tools.wall_s
    for later_s in (CONFIRMATION_S + 2, -CONFIRMATION_S - 2):
        tools.wall_s = lambda later_s=later_s: real() + later_s
        error = await api.refused(client.declare_host_dead, "h1", plan.confirmation_token, on_operators_word=True)
        assert error.reason is R.CONFIRMATION_STALE


async def test_without_a_leader_it_is_written_down_and_waits(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    await dies(api, "h1")
    plan = await api.call(client.declare_host_dead, "h1")
    client.timeout_s = 1
    seen = await api.call(_declare_briefly, client, plan.confirmation_token)
    assert wire.word(seen, "phase") == "REQUESTED"
    async with leader(api):
        await until(lambda: paths.fence("h1", "boot-h1") in store.tree.nodes)


def _declare_briefly(client: OrchestratorClient, token: str):
    from protos.drover.v1 import orchestrator_pb2 as pb

    request = pb.DeclareHostDeadRequest(name="h1", confirmation_token=token, on_operators_word=True)
    return client._call(client._stub.DeclareHostDead, request, 1.0)


# --- removal ----------------------------------------------------------------------------------------------------------


async def test_a_host_is_forgotten_when_nothing_of_it_matters(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    await api.call(client.create_guest, DB, "h1")
    assert (await api.refused(client.remove_host, "h1")).reason is R.HOST_ALIVE
    await dies(api, "h1")
    error = await api.refused(client.remove_host, "h1")
    assert (error.reason, "db" in error.message) == (R.HOST_NOT_EMPTY, True)
    async with leader(api, Switch()):
        plan = await api.call(client.declare_host_dead, "h1")
        await api.call(client.declare_host_dead, "h1", plan.confirmation_token)
    assert (await api.refused(client.remove_host, "h1")).reason is R.HOST_NOT_EMPTY, "its guest is CRASHED there"
    await api.call(client.stop_guest, "db")
    await api.call(client.remove_host, "h1")
    assert not [path for path in store.tree.nodes if path.startswith(paths.host("h1"))]
    assert paths.death("h1") not in store.tree.nodes
    assert paths.fence("h1", "boot-h1") in store.tree.nodes, "the certificate stays true"
    assert (await api.refused(client.remove_host, "h1")).reason is R.NOT_FOUND


@pytest.mark.parametrize(
    ("phase", "host", "in_the_way"),
    [
        (Ownership.IDLE, "h1", False),
        (Ownership.CRASHED, "h1", False),
        (Ownership.IDLE, "h2", True),
        (Ownership.STARTING, "h2", True),
        (Ownership.OPEN, "h3", True),
        (Ownership.OPEN, "h1", False),
        (Ownership.COMMITTED, "h1", True),
        (Ownership.COMMITTED, "h3", False),
        (Ownership.GONE, "h2", False),
    ],
)
async def test_which_guests_keep_a_host_from_being_forgotten(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore, phase: Ownership, host: str, in_the_way: bool
) -> None:
    """One that has left does not, though its record goes on to say where from."""
    guest = await api.call(client.create_guest, DB, "h2")
    h1, h3 = (HostRef(name, f"boot-{name}") for name in ("h1", "h3"))
    node = store.tree.nodes[paths.guest(guest.uuid)]
    now = replace(decode(GuestRecord, node.data), phase=phase, source=h1, destination=h3)
    store.tree.nodes[paths.guest(guest.uuid)] = replace(node, data=encode(now), version=node.version + 1)
    await dies(api, host)
    await api.call(client.cordon_host, host, "old")
    if in_the_way:
        error = await api.refused(client.remove_host, host)
        assert (error.reason, "db" in error.message) == (R.HOST_NOT_EMPTY, True)
    else:
        await api.call(client.remove_host, host)


async def test_a_silent_host_is_only_forgotten_when_it_was_drained(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    await dies(api, "h1")
    error = await api.refused(client.remove_host, "h1")
    assert (error.reason, "neither cordoned" in error.message) == (R.HOST_NOT_EMPTY, True)
    await api.call(client.cordon_host, "h1", "old")
    promise = paths.reservation("h1", "m")
    await store.multi([op_create(promise, Reservation(64))])
    assert (await api.refused(client.remove_host, "h1")).reason is R.HOST_NOT_EMPTY
    await store.multi([Delete(promise, 0)])
    await api.call(client.remove_host, "h1")
    assert [host.name for host in await api.call(client.list_hosts)] == ["h2", "h3"]
