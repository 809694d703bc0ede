"""The contract of OrchestratorService: hosts, devices, health, bounds. The rest stands beside (test_orchestrator_*)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from orchestrator import wire
from orchestrator.core.agent import CopyStatus, GuestTrouble, Trouble
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import (
    GuestSpec,
)
from orchestrator.rpc.channels import channel
from orchestrator.rpc.errors import from_rpc_error
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from protos.drover.v1.orchestrator_pb2_grpc import OrchestratorServiceStub
from tests.contract.orchestrator_subject import WEB, R, Subject, subject

# --- hosts ------------------------------------------------------------------------------------------------------------


async def test_hosts_come_by_name_with_what_they_carry(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.host("a9", live=False)
    hosts = {each.name: each for each in await api.call(client.list_hosts)}
    assert list(hosts) == ["a9", "h1", "h2", "h3"]
    assert [wire.word(hosts[name], "state") for name in ("a9", "h1")] == ["SILENT", "LIVE"]
    assert (hosts["h1"].memory_mib, hosts["h1"].memory_used_mib, hosts["h1"].guests) == (1024, WEB.memory_mib, 1)
    assert await api.call(client.get_host, "h1") == hosts["h1"]
    await api.call(client.stop_guest, "web")
    assert (await api.call(client.get_host, "h1")).memory_used_mib == 0


async def test_a_host_is_shown_with_what_its_agent_says_is_there(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    lost = "11111111-1111-4111-8111-111111111111"
    copies = [
        CopyStatus(web.uuid, "web", "i2", 128, 22, 23, incoming=True),
        CopyStatus(lost, "lost", "i1", 64, 21),
    ]
    trouble = GuestTrouble(lost, "lost", Trouble.NO_RECORD, "the ledger has lost its record")
    await api.says("h2", *copies, troubles=[trouble], complete=False)
    assert not (await api.call(client.get_host, "h2")).HasField("agent")
    agent = (await api.call(client.get_host, "h2", ask_agent=True)).agent
    assert (agent.answered, agent.complete, agent.message) == (True, False, "")
    assert [(each.guest, each.guest_uuid, each.owner, each.incoming) for each in agent.copies] == [
        ("lost", lost, "", False),
        ("web", web.uuid, "h1", True),
    ]
    assert [(each.memory_mib, each.pid, each.devices_pid) for each in agent.copies] == [(64, 21, 0), (128, 22, 23)]
    assert [(each.guest, each.guest_uuid, each.trouble, each.message) for each in agent.troubles] == [
        ("lost", lost, "NO_RECORD", trouble.message)
    ]
    agent = (await api.call(client.get_host, "h3", ask_agent=True)).agent
    assert (agent.answered, agent.complete, len(agent.copies), len(agent.troubles)) == (True, True, 0, 0)


async def test_a_silent_agent_is_said_to_be_silent_and_not_to_have_nothing(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.falls_silent("h1")
    shown = await api.call(client.get_host, "h1", ask_agent=True)
    assert (shown.guests, shown.agent.answered, shown.agent.complete) == (1, False, False)
    assert shown.agent.message != ""
    assert (await api.refused(client.get_host, "h7", ask_agent=True)).reason is R.NOT_FOUND


async def test_a_cordon_is_idempotent_and_keeps_its_reason(api: Subject, client: OrchestratorClient) -> None:
    assert (await api.call(client.cordon_host, "h1", "disks")).cordoned
    assert (await api.call(client.cordon_host, "h1")).cordon_reason == "disks"
    assert (await api.call(client.cordon_host, "h1", "fans")).cordon_reason == "fans"
    free = await api.call(client.uncordon_host, "h1")
    assert (free.cordoned, free.cordon_reason) == (False, "")
    assert await api.call(client.uncordon_host, "h1") == free
    assert await api.call(client.get_host, "h1") == free


async def test_a_host_that_lives_is_neither_dead_nor_removed(api: Subject, client: OrchestratorClient) -> None:
    assert (await api.refused(client.declare_host_dead, "h1")).reason is R.HOST_ALIVE
    assert (await api.refused(client.remove_host, "h1")).reason is R.HOST_ALIVE
    assert (await api.refused(client.get_host_death, "h1")).reason is R.NOT_FOUND
    for method in (client.declare_host_dead, client.remove_host, client.get_host_death):
        assert (await api.refused(method, "h77")).reason is R.NOT_FOUND
        assert (await api.refused(method, "a/b")).reason is R.INVALID_ARGUMENT


async def test_a_silent_host_is_declared_dead_with_a_token_and_ones_word(
    api: Subject, client: OrchestratorClient
) -> None:
    await api.host("h8", live=False)
    plan = await api.call(client.declare_host_dead, "h8")
    assert (wire.word(plan, "phase"), plan.fencer) == ("PLANNED", "")
    error = await api.refused(client.declare_host_dead, "h8", "rubbish", on_operators_word=True)
    assert (error.reason, error.field) == (R.INVALID_ARGUMENT, "confirmation_token")
    assert (await api.refused(client.declare_host_dead, "h8", plan.confirmation_token)).reason is R.FENCER_REQUIRED
    assert (await api.refused(client.remove_host, "h8")).reason is R.HOST_NOT_EMPTY
    await api.call(client.cordon_host, "h8")
    await api.call(client.remove_host, "h8")
    assert (await api.refused(client.get_host, "h8")).reason is R.NOT_FOUND


async def test_a_refusal_names_a_handful_of_hosts_and_counts_the_others(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    for number in range(60):
        await api.host(f"small-{number:03}", 16 if number >= 20 else 16_384)
        if number < 20:
            await api.call(client.cordon_host, f"small-{number:03}", "w" * 1000)
    error = await api.refused(client.create_guest, GuestSpec("big", memory_mib=9000))
    assert error.reason is R.NO_CAPACITY
    assert error.details == {"NO_CAPACITY": "43", "HOST_CORDONED": "20"}
    assert len(error.message) < 1000
    assert "63 hosts (43 NO_CAPACITY, 20 HOST_CORDONED)" in error.message
    for name in ("h2", "h3"):
        await api.call(client.cordon_host, name)
    error = await api.refused(client.create_migration, "web", validate_only=True)
    assert error.reason is R.NO_CAPACITY
    assert error.details == {"NO_CAPACITY": "40", "HOST_CORDONED": "22"}


async def test_the_verdict_on_every_host_is_a_field_of_an_answer(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    for number in range(7):
        await api.host(f"small-{number}", 16)
    await api.call(client.cordon_host, "h2", "fans")
    found = await api.call(client.check_placement, "web")
    assert (found.destination, found.reason, found.message) == ("h3", "", "")
    assert [each.host for each in found.verdicts] == ["h2", "h3", *(f"small-{number}" for number in range(7))]
    assert dict(found.reasons) == {"NO_CAPACITY": 7, "HOST_CORDONED": 1}
    cordoned, free, small, *_ = found.verdicts
    assert (cordoned.eligible, cordoned.reason, cordoned.passing) == (False, "HOST_CORDONED", True)
    assert "fans" in cordoned.message
    assert (free.eligible, free.memory_free_mib, free.reason, free.message) == (True, 1024, "", "")
    assert (small.eligible, small.memory_free_mib, small.reason) == (False, 16, "NO_CAPACITY")
    big = await api.call(client.check_placement, GuestSpec("big", memory_mib=9000))
    assert (big.destination, big.reason) == ("", "NO_CAPACITY")
    error = await api.refused(client.create_guest, GuestSpec("big", memory_mib=9000))
    assert big.message == error.message
    assert len(big.verdicts) == 10
    one = await api.call(client.check_placement, "web", "small-3")
    assert [(each.host, each.reason) for each in one.verdicts] == [("small-3", "NO_CAPACITY")]
    guest = await api.call(client.get_guest, "web")
    guest.etag = ""  # a list has none
    assert (await api.call(client.list_guests)) == [guest]


async def test_verdicts_come_by_pages(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    def page(size: int, token: str = "") -> pb.CheckPlacementResponse:
        request = pb.CheckPlacementRequest(guest="web", page_size=size, page_token=token)
        return client._stub.CheckPlacement(request, timeout=10)

    await api.host("h9", 16)
    first = await api.call(page, 2)
    assert [each.host for each in first.verdicts] == ["h2", "h3"]
    last = await api.call(page, 2, first.next_page_token)
    assert ([each.host for each in last.verdicts], last.next_page_token) == (["h9"], "")
    assert (
        (first.destination, dict(first.reasons)) == (last.destination, dict(last.reasons)) == ("h2", {"NO_CAPACITY": 1})
    )


@pytest.mark.parametrize(
    ("guest", "host", "reason", "field"),
    [
        ("nobody", "", R.NOT_FOUND, "guest"),
        ("No/body", "", R.INVALID_ARGUMENT, "guest"),
        ("", "", R.INVALID_ARGUMENT, "guest"),
        ("web", "h77", R.NOT_FOUND, "host"),
        ("web", "a/b", R.INVALID_ARGUMENT, "host"),
        (GuestSpec("x", memory_mib=-5), "", R.INVALID_ARGUMENT, "spec.memory_mib"),
    ],
)
async def test_placements_that_cannot_be_judged(
    api: Subject, client: OrchestratorClient, web: types.Guest, guest: str | GuestSpec, host: str, reason: R, field: str
) -> None:
    error = await api.refused(client.check_placement, guest, host)
    assert (error.reason, error.field) == (reason, field)


async def test_wrong_fields_are_counted_and_the_first_of_them_told(api: Subject, client: OrchestratorClient) -> None:
    labels = {f"bad key {number} {'x' * 200}": "v" for number in range(64)}
    error = await api.refused(client.create_guest, GuestSpec("lab", labels=labels))
    assert error.reason is R.INVALID_ARGUMENT
    assert error.message.startswith("64 fields are wrong")
    assert 5 < len(error.violations) <= 20
    assert error.details == {"violations_left_off": str(64 - len(error.violations))}
    error = await api.refused(client.get_guest, "n" * 100_000)
    assert (error.reason, error.field) == (R.INVALID_ARGUMENT, "name")
    assert len(error.message) < 400


@pytest.mark.parametrize(
    ("name", "reason"), [("h7", R.NOT_FOUND), ("", R.INVALID_ARGUMENT), ("h/1", R.INVALID_ARGUMENT)]
)
async def test_hosts_that_there_are_not(
    api: Subject, client: OrchestratorClient, name: str, reason: RefusalReason
) -> None:
    for method in (client.get_host, client.cordon_host, client.uncordon_host):
        error = await api.refused(method, name)
        assert (error.reason, error.field) == (reason, "name")


# --- devices ----------------------------------------------------------------------------------------------------------


async def test_an_instruction_goes_untouched_to_the_device_and_its_answer_comes_back(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    assert await api.call(client.instruct_device, "web", "nic", "blink: 3 \n") == "nic was told: blink: 3 \n"


@pytest.mark.parametrize(
    ("asked", "reason", "fields"),
    [
        (("nobody", "nic", "blink"), R.NOT_FOUND, ["guest"]),
        (("web", "disk", "blink"), R.NOT_FOUND, ["device"]),
        (("web", "eth", "blink"), R.INSTRUCTION_REFUSED, ["device"]),
        (("w/eb", "nic", " "), R.INVALID_ARGUMENT, ["guest", "instruction"]),
        (("web", "nic", "é" * 4096), R.INVALID_ARGUMENT, ["instruction"]),
    ],
    ids=["no guest", "no device", "takes none", "nothing said", "too long"],
)
async def test_instructions_that_cannot_be(
    api: Subject,
    client: OrchestratorClient,
    web: types.Guest,
    asked: tuple[str, str, str],
    reason: RefusalReason,
    fields: list[str],
) -> None:
    error = await api.refused(client.instruct_device, *asked)
    assert (error.reason, [field for field, _ in error.violations]) == (reason, fields)


async def test_health_says_who_leads_and_what_is_quarantined(api: Subject, client: OrchestratorClient) -> None:
    api.leads("coordinator-2")
    found = await api.call(client.get_cluster_health)
    assert (found.leader, list(found.quarantined), found.quarantined_left_out) == ("coordinator-2", [], 0)
    api.leads("")
    api.quarantines("migrations/m1", "BadRecord: of another version", 1_700_000_000.5)
    found = await api.call(client.get_cluster_health)
    assert found.leader == ""
    (one,) = found.quarantined
    assert (one.resource, one.reason) == ("migrations/m1", "BadRecord: of another version")
    assert (one.since.seconds, found.quarantined_left_out) == (1_700_000_000, 3)


async def test_devices_are_not_instructed_unless_the_cluster_allows_it(kind: str, tmp_path: Path) -> None:
    async with subject(kind, tmp_path, instructions=False) as calm:
        await calm.call(calm.client.create_guest, WEB, "h1")
        error = await calm.refused(calm.client.instruct_device, "web", "nic", "blink")
    assert error.reason is R.INSTRUCTIONS_DISABLED


# --- deadlines --------------------------------------------------------------------------------------------------------


async def test_a_request_that_is_too_large_is_refused_and_changes_nothing(
    api: Subject, client: OrchestratorClient
) -> None:
    """By the client before it is sent, and by the API when somebody else sends it."""
    names = ["x" * 128] * 3_000
    error = await api.refused(lambda: next(iter(client.watch_guests(names))))
    assert error.reason is R.INVALID_ARGUMENT
    assert "too large" in error.message

    def strangers() -> R:
        request = pb.CreateGuestRequest(spec=types.GuestSpec(name="x" * 300_000))
        with grpc.insecure_channel(client.address) as raw:
            stub = OrchestratorServiceStub(raw)
            with pytest.raises(grpc.RpcError) as caught:
                stub.CreateGuest(request, timeout=5)
        return from_rpc_error(caught.value).reason

    assert await asyncio.to_thread(strangers) is R.INVALID_ARGUMENT
    error = await api.refused(lambda: next(iter(client.watch_guests(["x"] * 1_001))))
    assert (error.reason, error.field) == (R.INVALID_ARGUMENT, "names")
    error = await api.refused(client.cordon_host, "h1", "w" * 1_025)
    assert (error.reason, error.field) == (R.INVALID_ARGUMENT, "reason")
    assert not (await api.call(client.get_host, "h1")).cordoned


async def test_a_call_without_a_deadline_is_refused(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    def ask(method: str, request: Any) -> DroverError:
        with channel(client.address) as raw:
            call = getattr(OrchestratorServiceStub(raw), method)
            with pytest.raises(grpc.RpcError) as caught:
                list(call(request))
        return from_rpc_error(caught.value)

    for method, request in (
        ("ListGuests", pb.ListGuestsRequest()),
        ("StopGuest", pb.StopGuestRequest(name="web")),
        ("WatchGuests", pb.WatchGuestsRequest()),
    ):
        assert (await api.call(ask, method, request)).reason is R.DEADLINE_REQUIRED
    assert [each.name for each in await api.call(client.list_guests)] == ["web"]
