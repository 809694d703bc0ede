"""The contract of OrchestratorService: evacuations, and requests that are repeated or only ask."""

from __future__ import annotations

import pytest

from orchestrator.core.errors import RefusalReason
from orchestrator.core.records import (
    GuestSpec,
)
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import types_pb2 as types
from tests.contract.orchestrator_subject import WEB, R, Subject, everything, phase


async def test_an_evacuation_cordons_its_host_and_says_who_can_go_where(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.call(client.create_guest, GuestSpec("large", memory_mib=800), "h1")
    for where in ("h2", "h3"):
        await api.call(client.create_guest, GuestSpec(f"on-{where}", memory_mib=300), where)
    made = await api.call(client.create_evacuation, "h1", 2, {"max_attempts": 9})
    job = made.evacuation
    assert (job.host, phase(job), job.max_concurrent, job.policy.max_attempts) == ("h1", "PENDING", 2, 9)
    assert (job.safe_to_power_off, job.cancel_requested, job.HasField("create_time")) == (False, False, True)
    assert [(each.guest, each.memory_mib, each.destination, each.reason) for each in made.verdicts] == [
        ("large", 800, "", "NO_CAPACITY"),
        ("web", WEB.memory_mib, "h2", ""),
    ]
    cordoned = await api.call(client.get_host, "h1")
    assert (cordoned.cordoned, cordoned.cordon_reason) == (True, f"evacuation {job.name}")
    again = await api.call(client.get_evacuation, job.name)
    again.elapsed_ms = job.elapsed_ms  # the only thing that moves by itself
    assert again == job


async def test_a_host_is_emptied_once_at_a_time_and_evacuations_are_listed_newest_first(
    api: Subject, client: OrchestratorClient
) -> None:
    await api.call(client.cordon_host, "h1", "disks")
    first = (await api.call(client.create_evacuation, "h1")).evacuation.name
    assert (await api.call(client.get_host, "h1")).cordon_reason == "disks"
    error = await api.refused(client.create_evacuation, "h1")
    assert (error.reason, error.details) == (R.ALREADY_EXISTS, {"evacuation": first})
    await api.empty(first)
    second = (await api.call(client.create_evacuation, "h1")).evacuation.name
    third = (await api.call(client.create_evacuation, "h2")).evacuation
    assert (third.max_concurrent, third.policy.ListFields()) == (4, [])
    assert [each.name for each in await api.call(client.list_evacuations)] == [third.name, second, first]


@pytest.mark.parametrize("validate_only", [False, True])
@pytest.mark.parametrize(
    ("where", "at_once", "policy", "reason", "fields"),
    [
        ("h7", 0, {}, R.NOT_FOUND, ["host"]),
        ("h1", 0, {"backoff_max_ms": 0}, R.INVALID_ARGUMENT, ["policy.backoff_initial_ms"]),
        (
            "h/1",
            1001,
            {"max_attempts": 101},
            R.INVALID_ARGUMENT,
            ["host", "max_concurrent", "policy.max_attempts"],
        ),
    ],
)
async def test_evacuations_that_cannot_be(
    api: Subject,
    client: OrchestratorClient,
    web: types.Guest,
    where: str,
    at_once: int,
    policy: dict[str, object],
    reason: RefusalReason,
    fields: list[str],
    validate_only: bool,
) -> None:
    error = await api.refused(client.create_evacuation, where, at_once, policy, validate_only=validate_only)
    assert (error.reason, [field for field, _ in error.violations]) == (reason, fields)
    assert not any(each.cordoned for each in await api.call(client.list_hosts))


async def test_a_host_is_safe_to_power_off_until_it_is_uncordoned(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    job = (await api.call(client.create_evacuation, "h1")).evacuation.name
    await api.empty(job)
    ended = await api.call(client.get_evacuation, job)
    assert (phase(ended), ended.safe_to_power_off, ended.HasField("end_time")) == ("SUCCEEDED", True, True)
    await api.call(client.uncordon_host, "h1")
    assert not (await api.call(client.get_evacuation, job)).safe_to_power_off


async def test_cancel_of_an_evacuation(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    job = (await api.call(client.create_evacuation, "h1")).evacuation.name
    for _ in range(2):
        assert (await api.call(client.cancel_evacuation, job)).cancel_requested
    await api.empty(job)
    ended = await api.call(client.cancel_evacuation, job)
    assert (phase(ended), ended.safe_to_power_off) == ("CANCELLED", False)
    assert (await api.call(client.get_host, "h1")).cordoned
    second = (await api.call(client.create_evacuation, "h1")).evacuation.name
    await api.empty(second)
    error = await api.refused(client.cancel_evacuation, second)
    assert (error.reason, error.details) == (R.ALREADY_ENDED, {"phase": "SUCCEEDED"})


async def test_a_repeated_request_is_the_same_resource(api: Subject, client: OrchestratorClient) -> None:
    async def ask() -> list[str]:
        guest = await api.call(client.create_guest, WEB, "h1", request_id="r1")
        migration = await api.call(client.create_migration, "web", "h2", request_id="r2")
        job = await api.call(client.create_evacuation, "h3", request_id="r3")
        return [guest.name, migration.name, job.evacuation.name]

    names = await ask()
    assert await ask() == names
    assert [[each.name for each in kind] for kind in (await everything(api))[1:]] == [[name] for name in names]
    await api.end(names[1])
    again = await api.call(client.create_migration, "web", "h2", request_id="r2")
    assert (again.name, phase(again)) == (names[1], "SUCCEEDED")


async def test_a_request_id_serves_one_request(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    name = (await api.call(client.create_migration, "web", request_id="r1")).name
    for ask in (
        lambda: client.create_migration("web", "h3", request_id="r1"),
        lambda: client.create_guest(GuestSpec("db"), request_id="r1"),
        lambda: client.create_evacuation("h1", request_id="r1"),
    ):
        error = await api.refused(ask)
        assert (error.reason, error.field) == (R.REQUEST_ID_REUSED, "request_id")
        assert error.details == {"operation": f"migrations/{name}"}


async def test_validate_only_says_where_it_would_go_and_changes_nothing(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.call(client.create_guest, GuestSpec("big", memory_mib=500), "h2")
    before = await everything(api)
    guest = await api.call(client.create_guest, GuestSpec("db"), validate_only=True, request_id="r1")
    assert (guest.name, guest.uuid, guest.host) == ("db", "", "h3")
    moved = await api.call(client.create_migration, "web", validate_only=True, request_id="r1")
    assert (moved.name, moved.guest, moved.source, moved.destination) == ("", "web", "h1", "h3")
    planned = await api.call(client.create_evacuation, "h1", validate_only=True, request_id="r1")
    assert (planned.evacuation.name, planned.evacuation.max_concurrent) == ("", 4)
    assert [(each.guest, each.destination) for each in planned.verdicts] == [("web", "h3")]
    assert await everything(api) == before
    await api.call(client.create_evacuation, "h1", request_id="r1")
