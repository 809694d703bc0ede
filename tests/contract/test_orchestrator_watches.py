"""The contract of OrchestratorService: watches, each of which ends with what it watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from orchestrator import wire
from orchestrator.core.records import (
    GuestSpec,
)
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import types_pb2 as types
from tests.contract.orchestrator_subject import R, Subject, T, phase


async def told(api: Subject, watch: Iterator[T], holds: Callable[[T], bool]) -> T:
    """What the watch says first that `holds`."""
    while True:
        message = await api.call(next, watch)
        if holds(message):
            return message


async def ends(api: Subject, watch: Iterator[T]) -> bool:
    return await api.call(next, watch, None) is None


async def test_a_watch_of_guests_ends_when_each_is_gone(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    watch = client.watch_guests(["web", web.uuid])
    first = await api.call(next, watch)
    assert (first.uuid, first.host, first.want_run) == (web.uuid, "h1", True)
    await api.call(client.pause_guest, "web")
    await told(api, watch, lambda guest: not guest.want_run)
    await api.call(client.stop_guest, "web")
    gone = await told(api, watch, lambda guest: wire.word(guest, "ownership") == "GONE")
    assert wire.word(gone, "run_state") == "ENDED"
    assert await ends(api, watch)


async def test_a_watch_of_a_migration_ends_with_it(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    name = (await api.call(client.create_migration, "web", "h2")).name
    watch = client.watch_migrations([name])
    assert phase(await api.call(next, watch)) == "PENDING"
    await api.begin(name)
    assert (await told(api, watch, lambda each: phase(each) == "PRECOPY")).attempt == 1
    await api.end(name)
    assert (await told(api, watch, lambda each: phase(each) == "SUCCEEDED")).HasField("end_time")
    assert await ends(api, watch)
    again = client.watch_migrations([name])
    assert phase(await api.call(next, again)) == "SUCCEEDED", "what is over is told to who names it"
    assert await ends(api, again)


async def test_a_watch_of_several_ends_with_the_last(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.call(client.create_guest, GuestSpec("db"), "h2")
    names = [(await api.call(client.create_migration, guest)).name for guest in ("web", "db")]
    watch = client.watch_migrations(names)
    assert {(await api.call(next, watch)).name for _ in names} == set(names)
    for name in names:
        await api.call(client.cancel_migration, name)
        assert phase(await told(api, watch, lambda each, name=name: each.name == name)) == "CANCELLED"
    assert await ends(api, watch)


async def test_a_watch_of_all_tells_what_is_not_over_and_what_comes(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    over = (await api.call(client.create_migration, "web")).name
    await api.call(client.cancel_migration, over)
    first = (await api.call(client.create_migration, "web")).name
    guests, migrations = client.watch_guests(), client.watch_migrations()
    assert (await api.call(next, migrations)).name == first
    assert (await api.call(next, guests)).name == "web"
    await api.call(client.create_guest, GuestSpec("db"), "h1")
    await told(api, guests, lambda guest: guest.name == "db")
    second = (await api.call(client.create_migration, "db")).name
    assert (await api.call(next, migrations)).name == second
    await api.call(client.cancel_migration, first)
    ended = await api.call(next, migrations)
    assert (ended.name, phase(ended)) == (first, "CANCELLED")
    await api.call(client.stop_guest, "web")
    await told(api, guests, lambda guest: (guest.name, wire.word(guest, "ownership")) == ("web", "GONE"))


async def test_a_watch_of_an_evacuation_ends_with_it(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    job = (await api.call(client.create_evacuation, "h1")).evacuation.name
    watch, all_of_them = client.watch_evacuations([job]), client.watch_evacuations()
    for each in (watch, all_of_them):
        assert phase(await api.call(next, each)) == "PENDING"
    await api.empty(job)
    assert (await told(api, watch, lambda each: phase(each) == "SUCCEEDED")).safe_to_power_off
    assert await ends(api, watch)
    await told(api, all_of_them, lambda each: phase(each) == "SUCCEEDED")


@pytest.mark.parametrize("names", [["nobody"], ["web", "nobody"]])
async def test_a_watch_of_names_that_there_are_not_is_refused(
    api: Subject, client: OrchestratorClient, web: types.Guest, names: list[str]
) -> None:
    for method in (client.watch_guests, client.watch_migrations, client.watch_evacuations):
        error = await api.refused(next, method(names))
        assert (error.reason, error.field) == (R.NOT_FOUND, "names")
    error = await api.refused(next, client.watch_migrations(["m"] * 1001))
    assert (error.reason, error.field) == (R.INVALID_ARGUMENT, "names")
