"""The contract of OrchestratorService: QEMUs that somebody else has started become guests, and are given back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator import wire
from orchestrator.core.agent import VmmExamined
from orchestrator.core.errors import DroverError
from orchestrator.core.records import GuestSpec
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import orchestrator_pb2 as pb
from tests.contract.orchestrator_subject import QUICK, R, Subject, everything, phase

PID, QMP = 4242, "/run/hand.qmp"
HAND = VmmExamined(GuestSpec("hand", policy=QUICK), 77, True, ())
SHOP = GuestSpec("shop", labels={"tier": "db"}, policy=QUICK)


@pytest.fixture(autouse=True)
async def by_hand(api: Subject) -> None:
    """Runs on h1."""
    await api.by_hand("h1", PID, HAND)


async def adopt(api: Subject, destination: str = "", *, validate_only: bool = False) -> pb.AdoptGuestResponse:
    return await api.call(
        api.client.adopt_guest, "shop", "h1", PID, QMP, SHOP, destination, validate_only=validate_only
    )


async def test_a_guest_that_is_adopted_is_on_its_way_at_once(api: Subject, client: OrchestratorClient) -> None:
    answer = await adopt(api, "h3")
    guest = answer.guest
    assert (guest.name, guest.host, guest.want_run, dict(guest.spec.labels)) == ("shop", "h1", True, {"tier": "db"})
    assert (wire.word(guest, "ownership"), wire.word(guest, "run_state")) == ("IDLE", "RUNNING")
    assert not answer.obstacles
    assert (answer.migration.guest_uuid, answer.migration.source) == (guest.uuid, "h1")
    assert [each.name for each in await api.call(client.list_migrations)] == [answer.migration.name]
    assert (await api.call(client.get_host, "h1")).memory_used_mib == guest.spec.memory_mib

    await api.begin(answer.migration.name)
    await api.end(answer.migration.name)
    assert (await api.call(client.get_guest, "shop")).host == "h3"
    refusal = await api.refused(client.release_guest, "shop")
    assert refusal.reason is R.NOT_ADOPTABLE, "its process is Drover's own"


async def test_what_would_be_is_told_and_nothing_is_done(api: Subject, client: OrchestratorClient) -> None:
    before = await everything(api)
    answer = await adopt(api, validate_only=True)
    assert (answer.guest.uuid, answer.guest.name, answer.guest.host) == ("", "shop", "h1")
    assert answer.guest.spec.memory_mib == HAND.spec.memory_mib
    assert not answer.HasField("migration")
    assert not answer.obstacles
    await api.by_hand("h1", PID, replace(HAND, running=False))
    assert not (await adopt(api, validate_only=True)).guest.want_run
    assert await everything(api) == before


async def test_everything_against_it_is_told_at_once(api: Subject, client: OrchestratorClient) -> None:
    before = await everything(api)
    against = ((R.NOT_ADOPTABLE, "it has a balloon"), (R.POOL_NOT_FOUND, "/srv is in no pool"))
    await api.by_hand("h1", PID, replace(HAND, spec=replace(HAND.spec, memory_mib=4096), obstacles=against))
    told = (await adopt(api, validate_only=True)).obstacles
    reasons = ["NOT_ADOPTABLE", "POOL_NOT_FOUND", "NO_CAPACITY"]
    assert [each.reason for each in told] == reasons
    refusal = await api.refused(client.adopt_guest, "shop", "h1", PID, QMP)
    assert (refusal.reason, [reason for reason, _ in refusal.violations]) == (R.NOT_ADOPTABLE, reasons)
    assert "it has a balloon; /srv is in no pool; no other host can take it" in refusal.message
    assert await everything(api) == before


async def test_the_destination_must_be_able_to_take_it(api: Subject, client: OrchestratorClient) -> None:
    before = await everything(api)
    await api.call(client.cordon_host, "h2", "disks")
    assert [each.reason for each in (await adopt(api, "h2", validate_only=True)).obstacles] == ["HOST_CORDONED"]
    assert (await api.refused(client.adopt_guest, "shop", "h1", PID, QMP, None, "h2")).reason is R.HOST_CORDONED
    assert not (await adopt(api, validate_only=True)).obstacles, "h3 can"
    await api.call(client.uncordon_host, "h2")
    assert await everything(api) == before


async def test_requests_that_make_no_sense(api: Subject, client: OrchestratorClient) -> None:
    refusal = await api.refused(client.adopt_guest, "Shop!", "h1", 1, "q", None, "h1")
    assert refusal.reason is R.INVALID_ARGUMENT
    assert {field for field, _ in refusal.violations} == {"name", "destination", "pid", "qmp"}
    for call, reason, field in (
        (("shop", "h9", PID, QMP), R.NOT_FOUND, "host"),
        (("shop", "h1", PID + 1, QMP), R.NOT_FOUND, "pid"),
        (("shop", "h2", PID, QMP), R.NOT_FOUND, "pid"),
    ):
        found = await api.refused(client.adopt_guest, *call)
        assert (found.reason, found.field) == (reason, field)
    assert (await api.refused(client.adopt_guest, "shop", "h1", PID, QMP, None, "h9")).reason is R.NOT_FOUND
    await api.by_hand("h1", PID, DroverError(R.MONITOR_BUSY, "somebody is connected", field="qmp"))
    assert (await api.refused(client.adopt_guest, "shop", "h1", PID, QMP)).reason is R.MONITOR_BUSY
    assert not await api.call(client.list_guests)


async def test_a_request_that_is_repeated_adopts_and_moves_once(api: Subject, client: OrchestratorClient) -> None:
    said = "6e2b9a52-6a1d-4f0f-9df5-0b5a3a8f7c11"

    async def ask(name: str = "shop", pid: int = PID) -> pb.AdoptGuestResponse:
        return await api.call(client.adopt_guest, name, "h1", pid, QMP, request_id=said)

    first = await ask()
    again = await ask()
    assert (again.guest.uuid, again.migration.name) == (first.guest.uuid, first.migration.name)
    assert (await api.refused(client.adopt_guest, "shop", "h1", PID + 1, QMP, request_id=said)).reason is (
        R.REQUEST_ID_REUSED
    )
    assert (await api.refused(client.adopt_guest, "shop", "h1", PID, QMP)).reason is R.ALREADY_EXISTS
    assert (await api.refused(client.adopt_guest, "other", "h1", PID, QMP)).reason is R.ALREADY_EXISTS
    assert len(await api.call(client.list_migrations)) == 1


async def test_what_has_not_moved_is_given_back_and_can_be_adopted_again(
    api: Subject, client: OrchestratorClient
) -> None:
    answer = await adopt(api)
    await api.begin(answer.migration.name)
    await api.end(answer.migration.name, failed=True)
    gone = await api.call(client.release_guest, "shop")
    assert (gone.uuid, wire.word(gone, "ownership")) == (answer.guest.uuid, "GONE")
    assert not await api.call(client.list_guests)
    assert (await api.refused(client.release_guest, "shop")).reason is R.NOT_FOUND, "the name is free"
    assert wire.word(await api.call(client.release_guest, gone.uuid), "ownership") == "GONE", "it was done"
    assert (await api.call(client.get_host, "h1")).memory_used_mib == 0
    assert (await adopt(api)).guest.uuid != gone.uuid


async def test_a_move_that_has_not_begun_ends_with_the_release(api: Subject, client: OrchestratorClient) -> None:
    answer = await adopt(api)
    await api.call(client.release_guest, "shop")
    await api.end(answer.migration.name)
    ended = await api.call(client.get_migration, answer.migration.name)
    assert (phase(ended), ended.failure) == ("FAILED", "GUEST_GONE")
    again = await adopt(api)
    assert again.migration.name != answer.migration.name


async def test_only_what_was_adopted_is_given_back(api: Subject, client: OrchestratorClient) -> None:
    await api.call(client.create_guest, GuestSpec("web"), "h2")
    assert (await api.refused(client.release_guest, "web")).reason is R.NOT_ADOPTABLE
    assert (await api.refused(client.release_guest, "nobody")).reason is R.NOT_FOUND
    assert (await api.refused(client.release_guest, "No name")).reason is R.INVALID_ARGUMENT
    answer = await adopt(api)
    await api.begin(answer.migration.name)
    await api.end(answer.migration.name, failed=True)
    await api.call(client.stop_guest, "shop")
    assert (await api.refused(client.release_guest, answer.guest.uuid)).reason is R.GUEST_NOT_RUNNING
    assert phase(await api.call(client.get_migration, answer.migration.name)) == "FAILED"
