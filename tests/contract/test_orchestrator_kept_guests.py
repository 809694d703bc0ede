"""The contract of OrchestratorService: guests that are kept, and start again as themselves."""

from __future__ import annotations

from orchestrator import wire
from orchestrator.core.records import (
    GuestSpec,
)
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import types_pb2 as types
from tests.contract.orchestrator_subject import WEB, R, Subject


async def test_a_guest_that_is_kept_starts_again_as_itself(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    kept = await api.call(client.stop_and_keep_guest, "web")
    assert (wire.word(kept, "ownership"), wire.word(kept, "run_state")) == ("STOPPED", "ENDED")
    assert await api.call(client.stop_and_keep_guest, "web") == kept
    assert "kept" in (await api.call(client.get_guest, "web")).message
    assert (await api.refused(client.create_guest, WEB, "h2")).reason is R.ALREADY_EXISTS, "its name is its own"
    assert (await api.refused(client.create_migration, "web")).reason is R.GUEST_NOT_RUNNING

    again = await api.call(client.start_guest_again, "web")
    assert (again.uuid, again.host, again.want_run) == (web.uuid, web.host, True)
    assert (wire.word(again, "ownership"), wire.word(again, "run_state")) == ("IDLE", "RUNNING")
    assert (await api.call(client.start_guest_again, "web")).uuid == web.uuid, "a second start is no error"
    assert [each.name for each in await api.call(client.list_guests)] == ["web"]


async def test_a_guest_that_is_kept_can_be_ended_for_good(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.call(client.stop_and_keep_guest, "web")
    await api.call(client.stop_guest, "web")
    assert not await api.call(client.list_guests)
    for call in (client.start_guest_again, client.stop_and_keep_guest):
        assert (await api.refused(call, web.uuid)).reason is R.GUEST_NOT_RUNNING
    assert (await api.refused(client.start_guest_again, "web")).reason is R.NOT_FOUND


async def test_what_is_kept_takes_no_memory_and_needs_some_to_start(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.call(client.stop_and_keep_guest, "web")
    await api.call(client.create_guest, GuestSpec("big", memory_mib=1024), "h1")
    assert (await api.refused(client.start_guest_again, "web")).reason is R.NO_CAPACITY
    assert wire.word(await api.call(client.get_guest, "web"), "ownership") == "STOPPED"
    await api.call(client.stop_guest, "big")
    await api.call(client.cordon_host, "h1")
    assert (await api.refused(client.start_guest_again, "web")).reason is R.HOST_CORDONED
    await api.call(client.uncordon_host, "h1")
    await api.call(client.start_guest_again, "web")
