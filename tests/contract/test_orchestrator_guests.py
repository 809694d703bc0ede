"""The contract of OrchestratorService: guests, from their birth to their end, and what is had back of a lost one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator import wire
from orchestrator.core.agent import CopyStatus
from orchestrator.core.errors import RefusalReason
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import (
    Boot,
    DeviceSpec,
    GuestSpec,
    ShimKind,
)
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import types_pb2 as types
from tests.contract.orchestrator_subject import WEB, R, Subject


async def test_a_guest_runs_when_it_was_created(api: Subject, client: OrchestratorClient) -> None:
    made = await api.call(client.create_guest, WEB, "h2")
    assert (made.name, made.host, made.want_run, made.migration) == ("web", "h2", True, "")
    assert (wire.word(made, "ownership"), wire.word(made, "run_state")) == ("IDLE", "RUNNING")
    assert wire.guest_spec_from_proto(made.spec) == WEB
    for name in ("web", made.uuid):
        assert (await api.call(client.get_guest, name)).uuid == made.uuid


async def test_a_guest_that_is_well_needs_no_repair(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    looked = await api.call(client.repair_guest, "web")
    assert (looked.guest, looked.guest_uuid, list(looked.offers)) == ("web", web.uuid, [])
    assert looked.findings[0].startswith("the ledger says IDLE, owner h1")
    assert looked.otherwise == "nothing is wrong with it"
    assert (await api.refused(client.repair_guest, "web", "bury")).reason is R.NOTHING_SAFE
    assert (await api.refused(client.repair_guest, "none")).reason is R.NOT_FOUND


async def test_a_guest_whose_record_was_lost_is_found_and_has_it_written_again(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.loses(web)
    assert (await api.refused(client.get_guest, "web")).reason is R.NOT_FOUND
    for name in ("web", web.uuid):
        looked = await api.call(client.repair_guest, name)
        assert (looked.guest, looked.guest_uuid, looked.otherwise) == ("web", web.uuid, "")
        assert looked.findings[0] == f"the ledger has no record of guest web ({web.uuid})"
        assert [offer.action for offer in looked.offers] == ["restore-record"]
    assert (await api.refused(client.repair_guest, "web", "bury")).reason is R.NOTHING_SAFE
    assert (await api.refused(client.get_guest, "web")).reason is R.NOT_FOUND, "a look changes nothing"
    done = await api.call(client.repair_guest, "web", "restore-record")
    assert done.findings[0].startswith("the ledger says IDLE, owner h1")
    had = await api.call(client.get_guest, "web")
    assert (had.uuid, had.host, had.spec) == (web.uuid, "h1", web.spec)
    assert (await api.refused(client.repair_guest, "web", "restore-record")).reason is R.NOTHING_SAFE


async def test_a_lost_record_is_not_written_again_while_the_guest_may_run_elsewhere(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.loses(web)
    copy = CopyStatus(web.uuid, "web", "j", 128, 9)

    async def refused(because: str) -> None:
        looked = await api.call(client.repair_guest, "web")
        assert (list(looked.offers), because in looked.otherwise) == ([], True), looked
        assert (await api.refused(client.repair_guest, "web", "restore-record")).reason is R.NOTHING_SAFE

    await api.says("h2", copy)
    await refused("h1, h2 have processes of it")
    await api.says("h2", complete=False)
    await refused("it may run on h2")
    await api.says("h2")
    await api.host("h9", live=False)
    await refused("it may run on h9")


async def test_its_host_is_chosen_by_free_memory(api: Subject, client: OrchestratorClient) -> None:
    homes = [(await api.call(client.create_guest, replace(WEB, name=f"web-{n}"))).host for n in range(4)]
    assert homes == ["h1", "h2", "h3", "h1"]


async def test_guests_are_listed_by_name_and_of_one_host(api: Subject, client: OrchestratorClient) -> None:
    for name, where in (("c", "h1"), ("a", "h2"), ("b", "h1"), ("d", "h1")):
        await api.call(client.create_guest, replace(WEB, name=name), where)
    await api.call(client.stop_guest, "d")
    assert [each.name for each in await api.call(client.list_guests)] == ["a", "b", "c"]
    assert [each.name for each in await api.call(client.list_guests, "h1")] == ["b", "c"]
    assert await api.call(client.list_guests, "h3") == []
    error = await api.refused(client.list_guests, "h7")
    assert (error.reason, error.field) == (R.NOT_FOUND, "host")


@pytest.mark.parametrize(
    ("name", "reason"), [("no", R.NOT_FOUND), ("", R.INVALID_ARGUMENT), ("a/b", R.INVALID_ARGUMENT)]
)
async def test_guests_that_there_are_not(
    api: Subject, client: OrchestratorClient, name: str, reason: RefusalReason
) -> None:
    for method in (client.get_guest, client.pause_guest, client.resume_guest, client.stop_guest):
        error = await api.refused(method, name)
        assert (error.reason, error.field) == (reason, "name")


@pytest.mark.parametrize("validate_only", [False, True])
@pytest.mark.parametrize(
    ("spec", "where", "reason", "fields"),
    [
        (WEB, "", R.ALREADY_EXISTS, ["spec.name"]),
        (GuestSpec("db"), "h7", R.NOT_FOUND, ["host"]),
        (GuestSpec("db"), "cordoned", R.HOST_CORDONED, ["host"]),
        (GuestSpec("db"), "silent", R.HOST_NOT_LIVE, ["host"]),
        (GuestSpec("db", memory_mib=2000), "h1", R.NO_CAPACITY, ["host"]),
        (GuestSpec("db", memory_mib=2000), "", R.NO_CAPACITY, []),
        (GuestSpec("db", machine="q35"), "h1", R.MACHINE_TYPE_MISMATCH, ["host"]),
        (
            GuestSpec(
                "-",
                vcpus=300,
                boot=Boot(initrd="/etc/shadow"),
                devices=(DeviceSpec("nic", ShimKind.COMPANION, dma="all", options={"-": "x"}),),
                policy=MigrationPolicy(max_attempts=0),
            ),
            "h/1",
            R.INVALID_ARGUMENT,
            [
                "request_id",
                "host",
                "spec.name",
                "spec.vcpus",
                "spec.boot.initrd",
                "spec.devices[0].dma",
                "spec.devices[0].options['-']",
                "spec.policy.max_attempts",
            ],
        ),
    ],
    ids=["taken", "unknown", "cordoned", "silent", "full", "too-big", "machine", "wrong"],
)
async def test_guests_that_cannot_be(
    api: Subject,
    client: OrchestratorClient,
    web: types.Guest,
    spec: GuestSpec,
    where: str,
    reason: RefusalReason,
    fields: list[str],
    validate_only: bool,
) -> None:
    await api.host("cordoned")
    await api.host("silent", live=False)
    await api.call(client.cordon_host, "cordoned")
    request_id = "a/b" if reason is R.INVALID_ARGUMENT else "r1"
    error = await api.refused(client.create_guest, spec, where, validate_only=validate_only, request_id=request_id)
    assert (error.reason, [field for field, _ in error.violations]) == (reason, fields)
    assert [each.name for each in await api.call(client.list_guests)] == ["web"]


@pytest.mark.parametrize("how_far", ["APPLIED", "QUEUED", "RECORDED"])
async def test_a_wish_is_durable_and_says_how_far_it_got(
    api: Subject, client: OrchestratorClient, web: types.Guest, how_far: str
) -> None:
    api.wishes_get(how_far)
    for method, run, state in ((client.pause_guest, False, "PAUSED"), (client.resume_guest, True, "RUNNING")):
        answer = await api.call(method, "web")
        assert (wire.word(answer, "wish"), answer.guest.want_run) == (how_far, run)
        if how_far == "APPLIED":
            assert wire.word(answer.guest, "run_state") == state
        assert (await api.call(client.get_guest, "web")).want_run is run


async def test_a_stopped_guest_is_gone_for_good_and_its_name_is_free(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    gone = await api.call(client.stop_guest, "web")
    assert (gone.uuid, wire.word(gone, "ownership"), wire.word(gone, "run_state")) == (web.uuid, "GONE", "ENDED")
    assert (await api.refused(client.get_guest, "web")).reason is R.NOT_FOUND
    assert await api.call(client.get_guest, web.uuid) == gone
    assert await api.call(client.stop_guest, web.uuid) == gone, "a second stop is no error"
    assert (await api.refused(client.pause_guest, web.uuid)).reason is R.GUEST_NOT_RUNNING
    assert (await api.refused(client.create_migration, web.uuid)).reason is R.GUEST_NOT_RUNNING
    assert (await api.call(client.create_guest, WEB)).uuid != web.uuid
