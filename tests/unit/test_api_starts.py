"""Guests that are started again through the API: once, however many ask, and never while nobody knows what is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import wire
from orchestrator.core import handover
from orchestrator.core.agent import AgentSample, GuestStatus, RunState
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import GuestSpec, HostRecord
from orchestrator.ledger import paths
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Done, SetData
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.api import ApiCluster, api_cluster
from tests.fakes.coordination import MemoryStore

R = RefusalReason
WEB = GuestSpec("web")


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


def read(store: MemoryStore, uuid: str) -> GuestRecord:
    return decode(GuestRecord, store.tree.nodes[paths.guest(uuid)].data)


async def write(store: MemoryStore, path: str, content: object) -> None:
    node = store.tree.nodes[path]
    assert isinstance(await store.multi([SetData(path, encode(content), node.version)]), Done)


def calls(api: ApiCluster, method: str) -> int:
    return sum(called == method for called, _ in api.agents["h1"].calls)


async def test_two_who_start_it_at_once_start_it_once(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    await api.call(client.stop_and_keep_guest, "web")
    started = await asyncio.gather(*(api.call(client.start_guest_again, "web") for _ in range(4)))
    assert {each.uuid for each in started} == {guest.uuid}
    record = read(store, guest.uuid)
    assert (record.phase, record.starts) == (Ownership.IDLE, 1)


async def test_a_guest_that_shut_down_is_cleared_away_before_it_starts(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    api.agents["h1"].say(AgentSample(guests=(GuestStatus(guest.uuid, "web", "inc", RunState.ENDED),)))
    again = await api.call(client.start_guest_again, "web")
    assert (again.uuid, wire.word(again, "run_state")) == (guest.uuid, "RUNNING")
    assert calls(api, "KeepGuest") == 1
    assert read(store, guest.uuid).starts == 1


async def test_a_guest_that_runs_is_left_alone(api: ApiCluster, client: OrchestratorClient, store: MemoryStore) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    assert (await api.call(client.start_guest_again, "web")).uuid == guest.uuid
    assert calls(api, "KeepGuest") == 0
    assert read(store, guest.uuid).starts == 0


@pytest.mark.parametrize("crashed", [False, True], ids=["idle", "crashed"])
async def test_nothing_is_started_while_its_host_is_silent(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore, crashed: bool
) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    if crashed:
        await write(store, paths.guest(guest.uuid), handover.crashed(read(store, guest.uuid), writer="h1"))
    silent = DroverError(R.AGENT_UNREACHABLE, "no answer")
    api.agents["h1"].refusals |= {"ApplyWantRun": silent, "KeepGuest": silent}
    before = read(store, guest.uuid)
    assert (await api.refused(client.start_guest_again, "web")).reason is R.AGENT_UNREACHABLE
    assert read(store, guest.uuid) == before


async def test_a_crash_is_no_proof_that_nothing_is_left(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    """Its agent says so first; here it cannot, since a process of the guest does not end."""
    guest = await api.call(client.create_guest, WEB, "h1")
    await write(store, paths.guest(guest.uuid), handover.crashed(read(store, guest.uuid), writer="h1"))
    api.agents["h1"].refusals["KeepGuest"] = DroverError(R.BUSY, "process 4711 of it runs here")
    assert (await api.refused(client.start_guest_again, "web")).reason is R.BUSY
    assert read(store, guest.uuid).phase is Ownership.CRASHED
    assert calls(api, "StartGuest") == 1, "its birth"


async def test_a_start_that_its_agent_refuses_keeps_it(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    await api.call(client.stop_and_keep_guest, "web")
    api.agents["h1"].refusals["StartGuest"] = DroverError(R.DISK_NOT_FOUND, "its image is not there")
    assert (await api.refused(client.start_guest_again, "web")).reason is R.DISK_NOT_FOUND
    assert read(store, guest.uuid).stopped
    del api.agents["h1"].refusals["StartGuest"]
    assert (await api.call(client.start_guest_again, "web")).uuid == guest.uuid


async def test_a_host_that_booted_meanwhile_starts_it_in_its_new_power_cycle(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    await api.call(client.stop_and_keep_guest, "web")
    host = decode(HostRecord, store.tree.nodes[paths.host("h1")].data)
    await write(store, paths.host("h1"), replace(host, boot_id="boot-2"))
    await api.call(client.start_guest_again, "web")
    assert read(store, guest.uuid).owner == HostRef("h1", "boot-2")
