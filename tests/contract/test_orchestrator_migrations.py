"""The contract of OrchestratorService: migrations, one at a time and in lists, and their cancel."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import pytest

from orchestrator import wire
from orchestrator.core.errors import RefusalReason
from orchestrator.core.records import (
    AttemptReport,
    GuestSpec,
    TimelineEntry,
)
from orchestrator.rpc.channels import channel
from orchestrator.rpc.errors import from_rpc_error
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from protos.drover.v1.orchestrator_pb2_grpc import OrchestratorServiceStub
from tests.contract.orchestrator_subject import QUICK, R, Subject, phase


async def test_a_migration_that_was_asked_for(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    made = await api.call(client.create_migration, "web", "h3", {"max_attempts": 7})
    assert (phase(made), made.guest, made.guest_uuid, made.source) == ("PENDING", "web", web.uuid, "h1")
    assert (made.destination, made.attempt, made.failure, made.cancel_requested) == ("h3", 0, "", False)
    assert wire.policy_from_proto(made.policy) == replace(QUICK, max_attempts=7)
    assert (made.HasField("create_time"), made.HasField("end_time")) == (True, False)
    again = await api.call(client.get_migration, made.name)
    again.elapsed_ms = made.elapsed_ms  # the only thing that moves by itself
    assert again == made
    assert (await api.call(client.get_guest, "web")).migration == "", "no attempt has begun"


async def test_a_migration_that_ended_stays_and_its_guest_has_moved(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    name = (await api.call(client.create_migration, "web", "h2")).name
    await api.begin(name)
    assert (await api.call(client.get_guest, "web")).migration == name
    assert (await api.call(client.get_migration, name)).attempt == 1
    await api.end(name)
    moved = await api.call(client.get_guest, "web")
    assert (moved.uuid, moved.host, moved.migration) == (web.uuid, "h2", "")
    ended = await api.call(client.get_migration, name)
    assert (phase(ended), ended.source, ended.destination) == ("SUCCEEDED", "h1", "h2")
    assert ended.HasField("end_time")


@pytest.mark.parametrize("validate_only", [False, True])
@pytest.mark.parametrize(
    ("guest", "destination", "policy", "reason", "fields"),
    [
        ("nobody", "", {}, R.NOT_FOUND, ["guest"]),
        ("web", "h7", {}, R.NOT_FOUND, ["destination"]),
        ("web", "h1", {}, R.INVALID_ARGUMENT, ["destination"]),
        ("web", "cordoned", {}, R.HOST_CORDONED, ["destination"]),
        ("web", "silent", {}, R.HOST_NOT_LIVE, ["destination"]),
        ("web", "small", {}, R.NO_CAPACITY, ["destination"]),
        ("web", "", {"gate_wait_ms": 5001}, R.INVALID_ARGUMENT, ["policy.gate_wait_ms"]),
        (
            "w/eb",
            "h/1",
            {"max_attempts": 0, "ack_timeout_ms": 0},
            R.INVALID_ARGUMENT,
            ["guest", "destination", "policy.ack_timeout_ms", "policy.max_attempts"],
        ),
    ],
)
async def test_migrations_that_cannot_be(
    api: Subject,
    client: OrchestratorClient,
    web: types.Guest,
    guest: str,
    destination: str,
    policy: dict[str, object],
    reason: RefusalReason,
    fields: list[str],
    validate_only: bool,
) -> None:
    await api.host("cordoned")
    await api.host("silent", live=False)
    await api.host("small", memory_mib=10)
    await api.call(client.cordon_host, "cordoned")
    error = await api.refused(client.create_migration, guest, destination, policy, validate_only=validate_only)
    assert (error.reason, [field for field, _ in error.violations]) == (reason, fields)
    assert await api.call(client.list_migrations) == []


async def test_a_guest_in_a_migration_gets_no_second_one(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    first = (await api.call(client.create_migration, "web")).name
    for step in (None, api.begin):
        if step is not None:
            await step(first)
        for validate_only in (False, True):
            error = await api.refused(client.create_migration, "web", validate_only=validate_only)
            assert (error.reason, error.details) == (R.GUEST_IS_MIGRATING, {"migration": first})
    await api.end(first)
    assert (await api.call(client.create_migration, "web")).name != first


async def test_lists_are_filtered_ordered_and_paged(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    for number in range(12):
        labels = {"tier": "db" if number % 2 else "web"}
        await api.call(client.create_guest, GuestSpec(f"n-{number}", 16 + number, labels=labels, policy=QUICK), "h2")

    async def guests(**asked: Any) -> list[str]:
        return [each.name for each in await api.call(partial(client.list_guests, **asked))]

    assert await guests(filter="name = n-*") == [f"n-{number}" for number in range(12)], "numbers in their order"
    assert await guests(filter="labels.tier = db AND memory_mib >= 23") == ["n-7", "n-9", "n-11"]
    assert await guests(filter="name = n-*", order_by="memory_mib desc", limit=2) == ["n-11", "n-10"]
    assert await guests(filter="host = h1") == ["web"]
    asked = pb.ListGuestsRequest(page_size=5, filter="name = n-*", order_by="memory_mib desc")
    told: list[str] = []
    while True:
        answer = await api.call(lambda: client._call(client._stub.ListGuests, asked))
        told += [each.name for each in answer.guests]
        assert len(answer.guests) <= 5
        asked.page_token = answer.next_page_token
        if not asked.page_token:
            break
    assert told == [f"n-{number}" for number in range(11, -1, -1)]
    moved = (await api.call(client.create_migration, "web")).name
    job = (await api.call(client.create_evacuation, "h2")).evacuation.name
    found = await api.call(partial(client.list_migrations, filter=f'name = "{moved[:6]}*" AND active = true'))
    assert [each.name for each in found] == [moved]
    assert [each.name for each in await api.call(partial(client.list_evacuations, filter="host = h2"))] == [job]
    assert not await api.call(partial(client.list_evacuations, filter="host = h1"))
    assert [each.name for each in await api.call(partial(client.list_hosts, filter="cordoned = true"))] == ["h2"]


async def test_without_a_history_what_is_forgotten_is_gone(api: Subject, client: OrchestratorClient) -> None:
    assert (await api.refused(lambda: list(client.export_history()))).reason is R.NO_HISTORY
    refusal = await api.refused(lambda: list(client.export_history("colours")))
    assert (refusal.reason, refusal.field) == (R.INVALID_ARGUMENT, "kind")


@pytest.mark.parametrize("what", ["list_hosts", "list_guests", "list_migrations", "list_evacuations"])
async def test_what_a_list_cannot_do_is_refused(api: Subject, client: OrchestratorClient, what: str) -> None:
    for asked, field in (
        ({"filter": "colour = red"}, "filter"),
        ({"filter": "name = a OR"}, "filter"),
        ({"order_by": "colour"}, "order_by"),
    ):
        refusal = await api.refused(partial(getattr(client, what), **asked))
        assert (refusal.reason, refusal.field) == (R.INVALID_ARGUMENT, field)
        assert "name" in refusal.message
    method = {"list_hosts": "ListHosts", "list_guests": "ListGuests"}.get(what, "ListMigrations")
    request = getattr(pb, f"{method}Request")(page_token="none")
    refusal = await api.refused(lambda: client._call(getattr(client._stub, method), request))
    assert (refusal.reason, refusal.field) == (R.INVALID_ARGUMENT, "page_token")


async def test_migrations_are_listed_newest_first_of_a_guest_and_while_they_last(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.call(client.create_guest, GuestSpec("db", policy=QUICK), "h2")
    first = (await api.call(client.create_migration, "web")).name
    await api.end(first)
    second = (await api.call(client.create_migration, "db")).name
    third = (await api.call(client.create_migration, "web")).name

    async def names(guest: str = "", active_only: bool = False) -> list[str]:
        return [each.name for each in await api.call(client.list_migrations, guest, active_only=active_only)]

    assert await names() == [third, second, first]
    assert await names("web") == [third, first]
    assert await names(active_only=True) == [third, second]
    assert await names("web", active_only=True) == [third]
    await api.call(client.stop_guest, "db")
    await api.call(client.create_guest, GuestSpec("db"), "h2")
    assert await names("db") == [], "the new guest of this name never moved"
    error = await api.refused(client.list_migrations, "nobody")
    assert (error.reason, error.field) == (R.NOT_FOUND, "guest")


async def test_migrations_are_listed_page_by_page(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    made: list[str] = []
    for _ in range(5):
        made.append((await api.call(client.create_migration, "web")).name)
        await api.call(client.cancel_migration, made[-1])
        await api.end(made[-1])

    def page(token: str) -> pb.ListMigrationsResponse:
        with channel(client.address) as raw:
            request = pb.ListMigrationsRequest(page_size=2, page_token=token)
            return OrchestratorServiceStub(raw).ListMigrations(request, timeout=5)

    pages = [await asyncio.to_thread(page, "")]
    while pages[-1].next_page_token:
        pages.append(await asyncio.to_thread(page, pages[-1].next_page_token))
    assert [[each.name for each in one.migrations] for one in pages] == [made[:2:-1], made[2:0:-1], made[:1]]
    assert [each.name for each in await api.call(client.list_migrations, limit=3)] == made[:1:-1]
    for beginning in (made[2], made[2][:8]):
        found = await api.call(partial(client.list_migrations, filter=f'name = "{beginning}*"'))
        assert made[2] in [each.name for each in found]
        assert all(each.name.startswith(beginning) for each in found)
    assert await api.call(partial(client.list_migrations, filter='name = "nobody*"')) == []
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(page, "x")
    assert from_rpc_error(caught.value).field == "page_token"


async def test_time_lines_are_for_who_asks_for_one_migration(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    name = (await api.call(client.create_migration, "web")).name
    await api.report(name, AttemptReport(1, "ABORTED", timeline=(TimelineEntry(1.0, "h1", "freeze"),)))
    assert (await api.call(client.get_migration, name)).attempts[0].timeline[0].event == "freeze"
    (listed,) = await api.call(client.list_migrations)
    watched = await api.call(next, client.watch_migrations([name]))
    assert [(len(each.attempts), len(each.attempts[0].timeline)) for each in (listed, watched)] == [(1, 0)] * 2


@pytest.mark.parametrize("name", ["nobody", "a/b", "", "x" * 200])
async def test_migrations_and_evacuations_that_there_are_not(
    api: Subject, client: OrchestratorClient, name: str
) -> None:
    for method in (client.get_migration, client.cancel_migration, client.get_evacuation, client.cancel_evacuation):
        error = await api.refused(method, name)
        assert (error.reason, error.field) == (R.NOT_FOUND, "name")


async def test_a_cancel_before_the_first_attempt_ends_the_migration(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    name = (await api.call(client.create_migration, "web")).name
    cancelled = await api.call(client.cancel_migration, name)
    assert (phase(cancelled), cancelled.failure, cancelled.cancel_requested) == ("CANCELLED", "CANCELLED", True)
    assert cancelled.HasField("end_time")
    assert await api.call(client.cancel_migration, name) == cancelled
    assert (await api.call(client.create_migration, "web")).name != name


async def test_a_cancelled_attempt_never_commits(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    name = (await api.call(client.create_migration, "web", "h2")).name
    await api.begin(name)
    assert (await api.call(client.cancel_migration, name)).cancel_requested
    await api.end(name)
    ended = await api.call(client.get_migration, name)
    assert (phase(ended), ended.failure) == ("CANCELLED", "CANCELLED")
    assert (await api.call(client.get_guest, "web")).host == "h1"


@pytest.mark.parametrize("failed", [False, True])
async def test_a_cancel_of_what_is_over_is_refused(
    api: Subject, client: OrchestratorClient, web: types.Guest, failed: bool
) -> None:
    name = (await api.call(client.create_migration, "web", "h2")).name
    await api.end(name, failed=failed)
    before = await api.call(client.get_migration, name)
    error = await api.refused(client.cancel_migration, name)
    assert error.reason is (R.ALREADY_ENDED if failed else R.ALREADY_COMMITTED)
    assert error.details.get("destination") == (None if failed else "h2")
    assert await api.call(client.get_migration, name) == before
