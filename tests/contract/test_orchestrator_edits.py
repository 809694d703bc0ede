"""The contract of OrchestratorService: what a guest is can be edited, and no edit is lost to another."""

from __future__ import annotations

from dataclasses import replace

from orchestrator import wire
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import GuestSpec, OnHostDeath
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import types_pb2 as types
from tests.contract.orchestrator_subject import R, Subject


def spec_of(guest: types.Guest) -> GuestSpec:
    return wire.guest_spec_from_proto(guest.spec)


async def test_what_no_vmm_is_made_of_changes_at_any_time(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    before = await api.call(client.get_guest, "web")
    wanted = replace(spec_of(before), labels={"team": "red"}, policy=MigrationPolicy(max_attempts=2))
    looked = await api.call(client.edit_guest, "web", wanted, before.etag, validate_only=True)
    assert spec_of(looked) == wanted
    assert await api.call(client.get_guest, "web") == before, "it was only asked"

    edited = await api.call(client.edit_guest, "web", wanted, before.etag)
    assert spec_of(edited) == spec_of(await api.call(client.get_guest, "web")) == wanted
    assert edited.etag != before.etag
    assert [each.name for each in await api.call(client.list_guests, filter='labels.team = "red"')] == ["web"]
    again = await api.call(client.edit_guest, "web", wanted, edited.etag)
    assert again.etag == edited.etag, "nothing was changed"


async def test_no_edit_is_lost_to_another(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    before = await api.call(client.get_guest, "web")
    await api.call(client.edit_guest, "web", replace(spec_of(before), labels={"by": "one"}), before.etag)
    late = await api.refused(client.edit_guest, "web", replace(spec_of(before), labels={"by": "other"}), before.etag)
    assert (late.reason, late.field) == (R.EDIT_STALE, "etag")
    assert dict((await api.call(client.get_guest, "web")).spec.labels) == {"by": "one"}


async def test_what_a_vmm_is_made_of_changes_while_there_is_none(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    wanted = replace(spec_of(await api.call(client.get_guest, "web")), memory_mib=128, vcpus=2)
    running = await api.refused(client.edit_guest, "web", wanted)
    assert running.reason is R.GUEST_IS_RUNNING
    assert [field for field, _ in running.violations] == ["spec.memory_mib", "spec.vcpus"]
    await api.call(client.stop_and_keep_guest, "web")
    await api.call(client.edit_guest, "web", wanted)
    again = await api.call(client.start_guest_again, "web")
    assert spec_of(again) == wanted
    assert (await api.call(client.get_host, "h1")).memory_used_mib == 128


async def test_what_no_edit_may_do(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    known = spec_of(await api.call(client.get_guest, "web"))
    renamed = await api.refused(client.edit_guest, "web", replace(known, name="other"))
    assert (renamed.reason, renamed.field) == (R.INVALID_ARGUMENT, "spec.name")
    wrong = await api.refused(client.edit_guest, "web", replace(known, on_host_death=OnHostDeath.RESTART))
    assert (wrong.reason, wrong.field) == (R.INVALID_ARGUMENT, "spec.on_host_death"), "its device keeps state there"
    assert (await api.refused(client.edit_guest, "none", replace(known, name="none"))).reason is R.NOT_FOUND
    await api.call(client.stop_guest, "web")
    assert (await api.refused(client.edit_guest, web.uuid, known)).reason is R.GUEST_NOT_RUNNING
