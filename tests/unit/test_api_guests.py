"""Hosts and guests through the real API: what is written, what is answered, every refusal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from orchestrator import wire
from orchestrator.core import handover
from orchestrator.core.agent import AgentSample, GuestStatus, RunState
from orchestrator.core.errors import AbortReason, DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import (
    Adopted,
    Boot,
    DeviceSpec,
    DiskSpec,
    EvacuationSpec,
    EvacuationState,
    GuestSpec,
    HostFeature,
    MigrationPhase,
    NicSpec,
    OnHostDeath,
    Pool,
    PoolKind,
    ShimKind,
    WantRun,
)
from orchestrator.ledger import paths
from orchestrator.ledger.records import decode
from orchestrator.rpc import health
from orchestrator.rpc.channels import channel
from orchestrator.rpc.errors import from_rpc_error
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1.orchestrator_pb2_grpc import OrchestratorServiceStub
from tests.fakes.api import ApiCluster, api_cluster, until
from tests.fakes.coordination import MemoryStore, World

R = RefusalReason
WEB = GuestSpec("web", devices=(DeviceSpec("nic", ShimKind.COMPANION), DeviceSpec("eth", ShimKind.NET)))


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def world(store: MemoryStore) -> World:
    return World(store)


@pytest.fixture
async def api(store: MemoryStore, tmp_path: Path) -> AsyncIterator[ApiCluster]:
    async with api_cluster(store, tmp_path, instructions=True) as cluster:
        yield cluster


@pytest.fixture
def client(api: ApiCluster) -> OrchestratorClient:
    return api.client


def read(store: MemoryStore, uuid: str) -> GuestRecord:
    return decode(GuestRecord, store.tree.nodes[paths.guest(uuid)].data)


def nodes(store: MemoryStore, below: str) -> list[str]:
    return [path for path in store.tree.nodes if path.startswith(below + "/")]


# --- hosts ------------------------------------------------------------------------------------------------------------


async def test_hosts_show_what_they_carry(api: ApiCluster, client: OrchestratorClient, world: World) -> None:
    await api.call(client.create_guest, replace(WEB, memory_mib=100), "h2")
    world.promise("h2", m1=50)
    await api.host("h9", live=False)
    hosts = {host.name: host for host in await api.call(client.list_hosts)}
    assert list(hosts) == ["h1", "h2", "h3", "h9"]
    h2 = hosts["h2"]
    assert (h2.memory_mib, h2.memory_used_mib, h2.memory_reserved_mib, h2.guests) == (1024, 100, 50, 1)
    assert [wire.word(hosts[name], "state") for name in ("h1", "h9")] == ["LIVE", "SILENT"]
    assert await api.call(client.get_host, "h2") == h2


async def test_an_edit_of_a_guest_that_was_adopted_keeps_where_it_came_from(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore, world: World
) -> None:
    """No caller sees it, so none can give it back."""
    born = await api.call(client.create_guest, WEB, "h2")
    taken = replace(WEB, adopted=Adopted(4711, 12, "/run/web.qmp"))
    world.put(paths.guest_spec(born.uuid), taken)
    await api.call(client.edit_guest, "web", replace(WEB, labels={"team": "red"}))
    written = decode(GuestSpec, store.tree.nodes[paths.guest_spec(born.uuid)].data)
    assert written == replace(taken, labels={"team": "red"})


async def test_cordon_and_uncordon(api: ApiCluster, client: OrchestratorClient, store: MemoryStore) -> None:
    host = await api.call(client.cordon_host, "h1", "disk is failing")
    assert (host.cordoned, host.cordon_reason) == (True, "disk is failing")
    writes = len(store.writes)
    assert (await api.call(client.cordon_host, "h1")).cordon_reason == "disk is failing"
    assert len(store.writes) == writes
    host = await api.call(client.uncordon_host, "h1")
    assert (host.cordoned, host.cordon_reason) == (False, "")


async def test_uncordon_takes_back_that_a_host_may_be_powered_off(
    api: ApiCluster, client: OrchestratorClient, world: World
) -> None:
    await api.call(client.cordon_host, "h1")
    for job, host in (("job1", "h1"), ("job2", "h2")):
        world.put(paths.evacuation(job), EvacuationSpec(job, host))
        world.put(paths.evacuation_state(job), EvacuationState(safe_to_power_off=True, safe_at=1))
    await api.call(client.cordon_host, "h2")
    assert (await api.call(client.get_evacuation, "job1")).safe_to_power_off
    await api.call(client.uncordon_host, "h1")
    assert not (await api.call(client.get_evacuation, "job1")).safe_to_power_off
    assert (await api.call(client.get_evacuation, "job2")).safe_to_power_off
    await api.call(client.cordon_host, "h1")
    assert not (await api.call(client.get_evacuation, "job1")).safe_to_power_off


async def test_a_cordon_that_races_with_another_is_tried_again(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    store.fail_next = [False, True]
    assert (await api.call(client.cordon_host, "h1", "why")).cordoned
    assert store.fail_next == []


@pytest.mark.parametrize(
    ("name", "reason"), [("h7", R.NOT_FOUND), ("../names", R.INVALID_ARGUMENT), ("", R.INVALID_ARGUMENT)]
)
async def test_hosts_that_there_are_not(
    api: ApiCluster, client: OrchestratorClient, name: str, reason: RefusalReason
) -> None:
    for method in (client.get_host, client.cordon_host, client.uncordon_host):
        error = await api.refused(method, name)
        assert (error.reason, error.field) == (reason, "name")


# --- birth ------------------------------------------------------------------------------------------------------------


async def test_a_guest_is_born_in_one_transaction_and_then_started(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    guest = await api.call(client.create_guest, WEB, "h2", request_id="r1")
    assert (guest.host, wire.word(guest, "ownership"), wire.word(guest, "run_state")) == ("h2", "IDLE", "RUNNING")
    assert guest.want_run
    assert wire.guest_spec_from_proto(guest.spec) == WEB
    (birth,) = [ops for ops in store.writes if any(op.path == paths.guest(guest.uuid) for op in ops)][:1]
    assert [op.path for op in birth] == [
        paths.request_id("r1"),
        paths.name("web"),
        paths.guest(guest.uuid),
        paths.guest_spec(guest.uuid),
        paths.want_run(guest.uuid),
        paths.cordon("h2"),
        paths.reservations("h2"),
        paths.host_guest("h2", guest.uuid),
    ]
    assert api.agents["h2"].calls.count(("StartGuest", guest.uuid)) == 1
    assert await api.call(client.get_guest, "web") == guest
    assert await api.call(client.get_guest, guest.uuid) == guest


async def test_the_host_is_chosen_by_free_memory(api: ApiCluster, client: OrchestratorClient) -> None:
    homes = [(await api.call(client.create_guest, replace(WEB, name=f"web-{n}"))).host for n in range(6)]
    assert sorted(homes) == ["h1", "h1", "h2", "h2", "h3", "h3"]


async def test_a_repeated_request_is_the_same_guest(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    first = await api.call(client.create_guest, WEB, request_id="r1")
    assert await api.call(client.create_guest, WEB, request_id="r1") == first
    assert nodes(store, paths.NAMES) == [paths.name("web")]
    error = await api.refused(client.create_guest, replace(WEB, vcpus=2), request_id="r1")
    assert (error.reason, error.field) == (R.REQUEST_ID_REUSED, "request_id")
    assert error.details == {"operation": f"guests/{first.uuid}"}


async def test_the_same_request_many_times_at_once_is_one_guest(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    made = await asyncio.gather(*(api.call(client.create_guest, WEB, request_id="r1") for _ in range(8)))
    assert len({guest.uuid for guest in made}) == 1
    assert len(nodes(store, paths.NAMES)) == 1


async def test_many_guests_at_once_never_take_more_than_there_is(api: ApiCluster, client: OrchestratorClient) -> None:
    async def one(number: int) -> str:
        try:
            spec = GuestSpec(f"g{number}", memory_mib=400)
            return (await api.call(client.create_guest, spec)).host
        except DroverError as error:
            return error.reason

    homes = await asyncio.gather(*(one(number) for number in range(9)))
    assert sorted(homes) == ["NO_CAPACITY"] * 3 + ["h1"] * 2 + ["h2"] * 2 + ["h3"] * 2
    assert all(host.memory_used_mib == 800 for host in await api.call(client.list_hosts))


async def test_two_apis_that_saw_the_same_free_memory_cannot_both_take_it(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore, tmp_path: Path
) -> None:
    """Each API has a lock of its own, so only the host's reservations keep them apart."""
    (tmp_path / "second").mkdir()
    async with api_cluster(MemoryStore(store.tree), tmp_path / "second", hosts=0) as other:
        specs = [GuestSpec(f"g{number}", memory_mib=600) for number in range(2)]
        made = await asyncio.gather(
            api.call(client.create_guest, specs[0], "h1"),
            other.call(other.client.create_guest, specs[1], "h1"),
            return_exceptions=True,
        )
        (refusal,) = [each for each in made if isinstance(each, DroverError)]
        assert refusal.reason is R.NO_CAPACITY


@pytest.mark.parametrize("applied", [False, True])
async def test_a_lost_answer_of_the_birth_is_settled_by_the_request_record(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore, applied: bool
) -> None:
    store.fail_next = [applied]
    guest = await api.call(client.create_guest, WEB)
    assert wire.word(guest, "run_state") == "RUNNING"
    assert len(nodes(store, paths.NAMES)) == 1
    assert len([path for path in nodes(store, paths.GUESTS) if path.count("/") == 3]) == 1


async def test_an_agents_refusal_frees_the_name(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    api.agents["h1"].refusals["StartGuest"] = DroverError(R.INTERNAL, "QEMU says: no such machine")
    error = await api.refused(client.create_guest, WEB, "h1", request_id="r1")
    assert (error.reason, error.message) == (R.INTERNAL, "QEMU says: no such machine")
    assert nodes(store, paths.NAMES) == []
    error = await api.refused(client.create_guest, WEB, "h1", request_id="r1")
    assert error.reason is R.GUEST_NOT_RUNNING
    api.agents["h1"].refusals.clear()
    assert (await api.call(client.create_guest, WEB, "h1", request_id="r2")).host == "h1"


async def test_an_agent_that_does_not_answer_leaves_a_guest_that_the_same_request_starts(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    agent = api.agents["h1"]
    await agent.stop()
    error = await api.refused(client.create_guest, WEB, "h1", request_id="r1")
    assert error.reason in (R.AGENT_UNREACHABLE, R.OUTCOME_UNKNOWN)
    assert "same request_id" in error.message
    guest = await api.call(client.get_guest, "web")
    assert (wire.word(guest, "ownership"), wire.word(guest, "run_state")) == ("STARTING", "STARTING")
    await agent.start()
    await api.hearing("h1")
    again = await api.call(client.create_guest, WEB, "h1", request_id="r1")
    assert (again.uuid, wire.word(again, "ownership")) == (guest.uuid, "IDLE")


async def test_validate_only_changes_nothing(api: ApiCluster, client: OrchestratorClient, store: MemoryStore) -> None:
    writes = len(store.writes)
    guest = await api.call(client.create_guest, WEB, validate_only=True)
    assert (guest.name, guest.uuid, guest.host) == ("web", "", "h1")
    assert len(store.writes) == writes
    assert api.agents["h1"].calls == [("WatchAgent", "")] or api.agents["h1"].calls == []


@pytest.mark.parametrize("validate_only", [False, True])
@pytest.mark.parametrize(
    ("spec", "host", "reason", "field"),
    [
        (replace(WEB, name="taken"), "", R.ALREADY_EXISTS, "spec.name"),
        (WEB, "h7", R.NOT_FOUND, "host"),
        (WEB, "cordoned", R.HOST_CORDONED, "host"),
        (WEB, "silent", R.HOST_NOT_LIVE, "host"),
        (replace(WEB, memory_mib=2000), "h1", R.NO_CAPACITY, "host"),
        (replace(WEB, memory_mib=2000), "", R.NO_CAPACITY, ""),
        (replace(WEB, machine="q35"), "h1", R.MACHINE_TYPE_MISMATCH, "host"),
        (replace(WEB, name="Web"), "", R.INVALID_ARGUMENT, "spec.name"),
        (WEB, "no/host", R.INVALID_ARGUMENT, "host"),
        (replace(WEB, disks=(DiskSpec("root", "fast", "root"),)), "h1", R.FEATURE_NOT_AVAILABLE, "host"),
        (replace(WEB, disks=(DiskSpec("root", "other", "root"),)), "disks", R.POOL_NOT_FOUND, "host"),
        (
            replace(WEB, disks=(DiskSpec("root", "fast", "root"),), on_host_death=OnHostDeath.RESTART),
            "disks",
            R.INVALID_ARGUMENT,
            "spec.on_host_death",
        ),
        (
            replace(WEB, devices=(DeviceSpec("nic", ShimKind.COMPANION, options={"a/b": "c"}),)),
            "",
            R.INVALID_ARGUMENT,
            "spec.devices[0].options['a/b']",
        ),
    ],
)
async def test_guests_that_cannot_be(
    api: ApiCluster,
    client: OrchestratorClient,
    store: MemoryStore,
    spec: GuestSpec,
    host: str,
    reason: RefusalReason,
    field: str,
    validate_only: bool,
) -> None:
    await api.call(client.create_guest, replace(WEB, name="taken"))
    await api.host("cordoned")
    await api.call(client.cordon_host, "cordoned")
    await api.host("silent", live=False)
    await api.host("disks", pools=(Pool("fast", PoolKind.LOCAL),), features=(HostFeature.HARDWARE,))
    before = nodes(store, paths.GUESTS)
    error = await api.refused(client.create_guest, spec, host, validate_only=validate_only)
    assert (error.reason, error.field) == (reason, field)
    assert nodes(store, paths.GUESTS) == before


async def test_everything_that_is_wrong_is_said_at_once(api: ApiCluster, client: OrchestratorClient) -> None:
    spec = replace(
        WEB,
        name="-",
        vcpus=300,
        boot=Boot(initrd="/etc/shadow"),
        devices=(DeviceSpec("nic", ShimKind.COMPANION, dma="all", options={"-": "x"}),),
        policy=MigrationPolicy(max_attempts=0),
    )
    error = await api.refused(client.create_guest, spec, "h/1", request_id="a/b")
    assert [field for field, _ in error.violations] == [
        "request_id",
        "host",
        "spec.name",
        "spec.vcpus",
        "spec.boot.initrd",
        "spec.devices[0].dma",
        "spec.devices[0].options['-']",
        "spec.policy.max_attempts",
    ]


async def test_a_request_without_a_guest(api: ApiCluster) -> None:
    def ask() -> DroverError:
        with channel(api.address) as raw:
            try:
                OrchestratorServiceStub(raw).CreateGuest(pb.CreateGuestRequest(), timeout=5)
            except grpc.RpcError as error:
                return from_rpc_error(error)
            raise AssertionError("no error")

    assert (await api.call(ask)).field == "spec"


# --- look -------------------------------------------------------------------------------------------------------------


async def test_guests_are_listed_by_host_without_those_that_are_gone(
    api: ApiCluster, client: OrchestratorClient
) -> None:
    for name, host in (("c", "h1"), ("a", "h2"), ("b", "h1"), ("d", "h1")):
        await api.call(client.create_guest, replace(WEB, name=name), host)
    await api.call(client.stop_guest, "d")
    assert [guest.name for guest in await api.call(client.list_guests)] == ["a", "b", "c"]
    assert [guest.name for guest in await api.call(client.list_guests, "h1")] == ["b", "c"]
    error = await api.refused(client.list_guests, "h7")
    assert (error.reason, error.field) == (R.NOT_FOUND, "host")


async def test_a_run_state_is_unknown_while_the_agent_is_silent(api: ApiCluster, client: OrchestratorClient) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    await api.hearing("h1")
    agent = api.agents["h1"]
    agent.say(AgentSample(guests=(GuestStatus(guest.uuid, "web", "inc", RunState.STOPPED),)))
    fleet = api.server.tools.fleet
    await until(lambda: (told := fleet.guest("h1", guest.uuid)) is not None and told.run_state is RunState.STOPPED)
    assert wire.word(await api.call(client.get_guest, "web"), "run_state") == "STOPPED"
    await agent.stop()
    await until(lambda: not fleet.hears("h1"))
    assert wire.word(await api.call(client.get_guest, "web"), "run_state") == "UNKNOWN"
    await agent.start()
    await api.hearing("h1")
    assert wire.word(await api.call(client.get_guest, "web"), "run_state") == "STOPPED"


async def test_a_crashed_guest_says_where(api: ApiCluster, client: OrchestratorClient, world: World) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    world.put(paths.guest(guest.uuid), handover.crashed(read(world.store, guest.uuid), writer="a"))
    shown = await api.call(client.get_guest, "web")
    assert (wire.word(shown, "run_state"), shown.message) == ("ENDED", "crashed on h1")


@pytest.mark.parametrize(
    ("name", "reason"), [("nobody", R.NOT_FOUND), ("a/b", R.INVALID_ARGUMENT), ("", R.INVALID_ARGUMENT)]
)
async def test_guests_that_there_are_not(
    api: ApiCluster, client: OrchestratorClient, name: str, reason: RefusalReason
) -> None:
    for method in (client.get_guest, client.pause_guest, client.resume_guest, client.stop_guest):
        error = await api.refused(method, name)
        assert (error.reason, error.field) == (reason, "name")


# --- wishes -----------------------------------------------------------------------------------------------------------


async def test_a_wish_is_written_then_told(api: ApiCluster, client: OrchestratorClient, store: MemoryStore) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    paused = await api.call(client.pause_guest, "web")
    assert (wire.word(paused, "wish"), wire.word(paused.guest, "run_state")) == ("APPLIED", "PAUSED")
    assert not paused.guest.want_run
    assert (wish := decode(WantRun, store.tree.nodes[paths.want_run(guest.uuid)].data)).sequence == 1
    assert not wish.run
    version = store.tree.nodes[paths.guest(guest.uuid)].version
    resumed = await api.call(client.resume_guest, "web")
    assert resumed.guest.want_run
    assert store.tree.nodes[paths.guest(guest.uuid)].version == version, "a wish never moves the record"


async def test_a_wish_that_stands_is_told_again_and_not_written_again(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    await api.call(client.pause_guest, "web")
    writes = len(store.writes)
    await api.call(client.pause_guest, "web")
    assert len(store.writes) == writes
    assert api.agents["h1"].calls.count(("ApplyWantRun", guest.uuid)) == 2


async def test_a_wish_during_a_switchover_is_queued(api: ApiCluster, client: OrchestratorClient) -> None:
    await api.call(client.create_guest, WEB, "h1")
    api.agents["h1"].queue_wishes = True
    answer = await api.call(client.pause_guest, "web")
    assert (wire.word(answer, "wish"), wire.word(answer.guest, "run_state")) == ("QUEUED", "RUNNING")


async def test_a_guest_that_was_just_started_is_shown_as_its_agent_says(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    """Not as the last sample, which may have been taken while it started."""
    api.agents["h1"].delays_s["StartGuest"] = 0.3
    creating = asyncio.create_task(api.call(client.create_guest, WEB, "h1"))
    await until(lambda: any(name == "StartGuest" for name, _ in api.agents["h1"].calls))
    uuid = decode(str, store.tree.nodes[paths.name("web")].data)
    api.agents["h1"].say(AgentSample(guests=(GuestStatus(uuid, "web", "", RunState.STARTING),)))
    assert wire.word(await creating, "run_state") == "RUNNING"


@pytest.mark.parametrize("reason", [R.AGENT_UNREACHABLE, R.LEDGER_UNREACHABLE, R.NOT_FOUND])
async def test_a_wish_whose_agent_cannot_take_it_is_only_recorded(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore, reason: RefusalReason
) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    api.agents["h1"].refusals["ApplyWantRun"] = DroverError(reason, "no")
    answer = await api.call(client.pause_guest, "web")
    assert wire.word(answer, "wish") == "RECORDED"
    assert not decode(WantRun, store.tree.nodes[paths.want_run(guest.uuid)].data).run


async def test_a_wish_follows_a_guest_that_moves_meanwhile(
    api: ApiCluster, client: OrchestratorClient, world: World
) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    api.agents["h1"].refusals["ApplyWantRun"] = DroverError(R.NOT_FOUND, "it has left")
    api.agents["h1"].delays_s["ApplyWantRun"] = 0.2
    asked = asyncio.create_task(api.call(client.pause_guest, "web"))
    await until(lambda: ("ApplyWantRun", guest.uuid) in api.agents["h1"].calls)
    world.put(paths.guest(guest.uuid), replace(read(world.store, guest.uuid), owner=HostRef("h2", "boot-h2")))
    assert wire.word(await asked, "wish") == "APPLIED"
    assert ("ApplyWantRun", guest.uuid) in api.agents["h2"].calls


async def test_a_guest_that_ended_has_no_wishes(api: ApiCluster, client: OrchestratorClient, world: World) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    world.put(paths.guest(guest.uuid), handover.crashed(read(world.store, guest.uuid), writer="a"))
    assert (await api.refused(client.pause_guest, "web")).reason is R.GUEST_NOT_RUNNING
    await api.call(client.stop_guest, "web")
    assert (await api.refused(client.resume_guest, guest.uuid)).reason is R.GUEST_NOT_RUNNING


async def test_a_guest_that_has_shut_down_has_no_wishes_but_can_be_stopped(
    api: ApiCluster, client: OrchestratorClient
) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    api.agents["h1"].say(AgentSample(guests=(GuestStatus(guest.uuid, "web", "inc", RunState.ENDED),)))
    for wish in (client.resume_guest, client.pause_guest):
        error = await api.refused(wish, "web")
        assert (error.reason, "shut down" in error.message) == (R.GUEST_NOT_RUNNING, True)
    await api.call(client.stop_guest, "web")


# --- death ------------------------------------------------------------------------------------------------------------


async def test_a_stopped_guest_is_gone_and_its_name_is_free(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    gone = await api.call(client.stop_guest, "web")
    assert (wire.word(gone, "ownership"), wire.word(gone, "run_state")) == ("GONE", "ENDED")
    assert not decode(WantRun, store.tree.nodes[paths.want_run(guest.uuid)].data).run
    assert (await api.refused(client.get_guest, "web")).reason is R.NOT_FOUND
    assert (await api.call(client.stop_guest, guest.uuid)).uuid == guest.uuid, "a second stop is no error"
    assert (await api.call(client.create_guest, WEB)).uuid != guest.uuid


def opened(world: World, uuid: str, migration: str) -> GuestRecord:
    """The guest's first attempt towards h2 is under way."""
    record = handover.open_attempt(read(world.store, uuid), migration, 1, HostRef("h2", "boot-h2"), epoch=0, writer="c")
    bound = handover.bind(record, migration, 1, "inc", writer="a")
    world.put(paths.guest(uuid), bound)
    world.edit_state(
        migration,
        lambda state: replace(state, phase=MigrationPhase.PREPARING, attempt=1, source="h1", destination="h2"),
    )
    return bound


async def test_stopping_cancels_the_migration_and_waits_for_its_end(
    api: ApiCluster, client: OrchestratorClient, world: World
) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    migration = await api.call(client.create_migration, "web")
    opened(world, guest.uuid, migration.name)
    stopping = asyncio.create_task(api.call(client.stop_guest, "web"))
    await until(lambda: read(world.store, guest.uuid).phase is Ownership.ABORTED)
    assert read(world.store, guest.uuid).reason is AbortReason.CANCELLED
    assert ("EndGuest", guest.uuid) not in api.agents["h1"].calls
    closed = handover.close(read(world.store, guest.uuid), migration.name, writer="c")
    world.put(paths.guest(guest.uuid), closed)
    assert wire.word(await stopping, "ownership") == "GONE"


async def test_a_guest_that_committed_is_ended_where_it_arrives(
    api: ApiCluster, client: OrchestratorClient, world: World
) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    migration = await api.call(client.create_migration, "web")
    bound = opened(world, guest.uuid, migration.name)
    committed = handover.commit(bound, migration.name, 1, "inc", writer="a")
    world.put(paths.guest(guest.uuid), committed)
    stopping = asyncio.create_task(api.call(client.stop_guest, "web"))
    await until(lambda: ("ApplyWantRun", guest.uuid) in api.agents["h2"].calls)
    assert not stopping.done()
    world.put(paths.guest(guest.uuid), handover.done(committed, migration.name, 1, "inc", writer="b"))
    assert wire.word(await stopping, "ownership") == "GONE"
    assert ("EndGuest", guest.uuid) in api.agents["h2"].calls


async def test_a_stop_that_takes_too_long_says_that_the_wish_stands(
    api: ApiCluster, client: OrchestratorClient, world: World
) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    migration = await api.call(client.create_migration, "web")
    opened(world, guest.uuid, migration.name)

    def ask() -> DroverError:
        with channel(api.address) as raw:
            try:
                OrchestratorServiceStub(raw).StopGuest(pb.StopGuestRequest(name="web"), timeout=1.0)
            except grpc.RpcError as error:
                return from_rpc_error(error)
            raise AssertionError("no error")

    error = await api.call(ask)
    assert (error.reason, error.details) == (R.GUEST_IS_MIGRATING, {"ownership": "ABORTED"})
    assert not decode(WantRun, world.store.tree.nodes[paths.want_run(guest.uuid)].data).run


async def test_a_crashed_guest_is_buried_even_when_its_host_is_lost(
    api: ApiCluster, client: OrchestratorClient, world: World
) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    world.put(paths.guest(guest.uuid), handover.crashed(read(world.store, guest.uuid), writer="a"))
    await api.agents["h1"].stop()
    assert wire.word(await api.call(client.stop_guest, "web"), "ownership") == "GONE"
    assert nodes(world.store, paths.NAMES) == []


@pytest.mark.parametrize("refused", [False, True])
async def test_a_guest_that_nobody_finished_starting_can_be_stopped(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore, refused: bool
) -> None:
    agent = api.agents["h1"]
    await agent.stop()
    await api.refused(client.create_guest, WEB, "h1")
    await agent.start()
    await api.hearing("h1")
    if refused:
        agent.refusals["StartGuest"] = DroverError(R.INTERNAL, "no memory")
    assert wire.word(await api.call(client.stop_guest, "web"), "ownership") == "GONE"
    assert nodes(store, paths.NAMES) == []


async def test_a_guest_whose_agent_is_silent_is_not_declared_dead(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    guest = await api.call(client.create_guest, WEB, "h1")
    await api.agents["h1"].stop()
    assert (await api.refused(client.stop_guest, "web")).reason is R.AGENT_UNREACHABLE
    assert read(store, guest.uuid).phase is Ownership.IDLE


# --- devices ----------------------------------------------------------------------------------------------------------


async def test_an_instruction_goes_to_the_owners_agent(api: ApiCluster, client: OrchestratorClient) -> None:
    await api.call(client.create_guest, WEB, "h2")
    assert await api.call(client.instruct_device, "web", "nic", "blink 3") == "nic was told: blink 3"


# --- the ledger goes away ---------------------------------------------------------------------------------------------


async def test_without_the_ledger_calls_say_so_and_nothing_is_written(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    guest = await api.call(client.create_guest, WEB)
    assert await health.check(api.address) is None
    writes = len(store.writes)
    store.down = True
    assert (await api.refused(client.list_hosts)).reason is R.LEDGER_UNREACHABLE
    assert (await api.refused(client.list_guests)).reason is R.LEDGER_UNREACHABLE
    assert (await api.refused(client.list_migrations)).reason is R.LEDGER_UNREACHABLE
    assert (await api.refused(client.list_evacuations)).reason is R.LEDGER_UNREACHABLE
    assert (await api.refused(client.pause_guest, "web")).reason is R.LEDGER_UNREACHABLE
    assert (await api.refused(client.create_guest, replace(WEB, name="other"))).reason is R.LEDGER_UNREACHABLE
    store.down = False
    assert len(store.writes) == writes
    assert (await api.call(client.get_guest, "web")).uuid == guest.uuid


async def test_health_follows_the_session(api: ApiCluster, store: MemoryStore) -> None:
    assert await health.check(api.address) is None
    store.down = True
    store.expire()
    async with asyncio.timeout(5):
        while await health.check(api.address) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    store.down = False
    store.expire()
    async with asyncio.timeout(5):
        while await health.check(api.address) is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_an_unreadable_record_names_its_node_and_hides_no_other(
    api: ApiCluster, client: OrchestratorClient, world: World
) -> None:
    others = {host.name for host in await api.call(client.list_hosts)} - {"h1"}
    world.put(paths.cordon("h1"), {"on": "perhaps"})
    assert {host.name for host in await api.call(client.list_hosts)} == others
    error = await api.refused(client.get_host, "h1")
    assert error.reason is R.INTERNAL
    assert "/hosts/h1/cordon" in error.message


# --- machines that run ------------------------------------------------------------------------------------------------

GROWING = GuestSpec("web", memory_mib=64, max_memory_mib=1024, max_vcpus=4)
EXTRA = DiskSpec("data", "fast", "data.img")


@pytest.fixture
async def growing(api: ApiCluster, client: OrchestratorClient) -> str:
    """A guest with room for more, on a host that has a pool."""
    features = (HostFeature.HARDWARE, HostFeature.HOTPLUG)
    await api.host("grows", pools=(Pool("fast", PoolKind.LOCAL),), features=features)
    return str((await api.call(client.create_guest, GROWING, "grows")).uuid)


async def test_what_a_running_guest_is_given_is_counted(
    api: ApiCluster, client: OrchestratorClient, growing: str
) -> None:
    guest = await api.call(lambda: client.attach_to_guest("web", memory_mib=64 + 256))
    assert guest.spec.memory_mib == 64 + 256
    assert (await api.call(client.get_host, "grows")).memory_used_mib == 64 + 256
    await api.call(lambda: client.attach_to_guest("web", vcpus=3))
    await api.call(lambda: client.attach_to_guest("web", disk=EXTRA))
    guest = await api.call(client.get_guest, "web")
    assert (guest.spec.vcpus, [disk.name for disk in guest.spec.disks]) == (3, ["data"])
    again = await api.call(lambda: client.attach_to_guest("web", disk=EXTRA))
    assert again.spec == guest.spec
    guest = await api.call(lambda: client.detach_from_guest("web", disk="data"))
    assert not guest.spec.disks
    assert [about for method, about in api.agents["grows"].calls if method == "ChangeMachine"] == [growing] * 5


async def test_what_a_host_does_not_have_is_not_asked_of_its_agent(
    api: ApiCluster, client: OrchestratorClient, growing: str, world: World
) -> None:
    refusals = [
        (R.POOL_NOT_FOUND, lambda: client.attach_to_guest("web", disk=replace(EXTRA, pool="none"))),
        (R.NETWORK_NOT_FOUND, lambda: client.attach_to_guest("web", nic=NicSpec("n", "none"))),
        (R.INVALID_ARGUMENT, lambda: client.attach_to_guest("web", disk=replace(EXTRA, image="../x"))),
        (R.INVALID_ARGUMENT, lambda: client.attach_to_guest("web", memory_mib=65)),
        (R.INVALID_ARGUMENT, lambda: client.attach_to_guest("web")),
        (R.NOT_FOUND, lambda: client.attach_to_guest("nobody", vcpus=2)),
        (R.NOT_FOUND, lambda: client.detach_from_guest("web", nic="none")),
        (R.INVALID_ARGUMENT, lambda: client.detach_from_guest("web")),
    ]
    for reason, call in refusals:
        with pytest.raises(DroverError) as refused:
            await api.call(call)
        assert refused.value.reason is reason
    world.promise("grows", m1=900)
    with pytest.raises(DroverError, match="has 60 MiB free, web is to have 128 MiB more") as refused:
        await api.call(lambda: client.attach_to_guest("web", memory_mib=64 + 128))
    assert refused.value.reason is R.NO_CAPACITY
    assert "ChangeMachine" not in {method for method, _ in api.agents["grows"].calls}


async def test_what_the_agent_refuses_comes_through_and_a_race_for_memory_is_run_again(
    api: ApiCluster, client: OrchestratorClient, growing: str
) -> None:
    agent = api.agents["grows"]
    agent.refusals["ChangeMachine"] = DroverError(R.DEVICE_NOT_RELEASED, "guest web has not let go of disk-data")
    with pytest.raises(DroverError, match="has not let go") as refused:
        await api.call(lambda: client.attach_to_guest("web", vcpus=2))
    assert refused.value.reason is R.DEVICE_NOT_RELEASED
    moved = DroverError(R.OUTCOME_UNKNOWN, "look again", details={"moved": "reservations"})
    agent.refusals["ChangeMachine"] = moved
    agent.delays_s["ChangeMachine"] = 0.1
    call = asyncio.create_task(api.call(lambda: client.attach_to_guest("web", memory_mib=64 + 128)))
    while [method for method, _ in agent.calls].count("ChangeMachine") < 3:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    agent.refusals.clear()
    assert (await call).spec.memory_mib == 64 + 128
