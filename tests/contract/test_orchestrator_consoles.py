"""The contract of OrchestratorService: sessions with guests' consoles, and where their screens are."""

from __future__ import annotations

import asyncio

from orchestrator.core.records import Display, GuestSpec, Pool, PoolKind
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import types_pb2 as types
from tests.contract.orchestrator_subject import R, Subject
from tests.fakes.api import until


class Listener:
    """One session, read in a thread of its own."""

    def __init__(self, client: OrchestratorClient, guest: str) -> None:
        self.session = client.attach_console(guest)
        self.heard = bytearray()
        self.hosts: list[str] = []
        self.messages: list[str] = []
        self.reading = asyncio.create_task(asyncio.to_thread(self._read))

    def _read(self) -> None:
        for said in self.session:
            self.heard += said.data
            self.hosts += [said.host] if said.host else []
            self.messages += [said.message] if said.message else []

    async def leave(self) -> None:
        self.session.close()
        async with asyncio.timeout(10):
            await self.reading


async def test_a_console_is_heard_and_typed_on_by_several(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    one, other = Listener(client, "web"), Listener(client, web.uuid)
    try:
        await until(lambda: one.hosts == ["h1"] and other.hosts == ["h1"])
        await api.says_on_console(web, b"login: ")
        await until(lambda: bytes(one.heard) == bytes(other.heard) == b"login: ")
        one.session.type(b"root\n")
        await until(lambda: api.typed(web) == b"root\n")
        other.session.type(b"x" * 9000)
        await until(lambda: len(api.typed(web)) == 9005)
    finally:
        await one.leave()
        await other.leave()


async def test_a_session_goes_with_the_guest_and_ends_with_it(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    listener = Listener(client, "web")
    await until(lambda: listener.hosts == ["h1"])
    migration = await api.call(client.create_migration, "web", "h2")
    await api.begin(migration.name)
    await api.end(migration.name)
    await until(lambda: listener.hosts == ["h1", "h2"])
    await api.says_on_console(web, b"still here")
    await until(lambda: bytes(listener.heard) == b"still here")
    listener.session.type(b"yes")
    await until(lambda: api.typed(web).endswith(b"yes"))
    await api.call(client.stop_guest, "web")
    async with asyncio.timeout(10):
        await listener.reading
    assert "web has ended" in listener.messages[-1]


async def test_a_console_that_there_is_not(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    assert (await api.refused(lambda: list(client.attach_console("none")))).reason is R.NOT_FOUND
    assert (await api.refused(lambda: list(client.attach_console("")))).reason is R.INVALID_ARGUMENT
    await api.call(client.stop_and_keep_guest, "web")
    assert (await api.refused(lambda: list(client.attach_console("web")))).reason is R.GUEST_NOT_RUNNING


async def test_a_screen_is_where_the_guest_is(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    for host in ("h1", "h2"):
        await api.pool(host, Pool("fast", PoolKind.LOCAL))  # of this version
    seen = await api.call(client.create_guest, GuestSpec("seen", display=Display(vnc=True)), "h1")
    found = await api.call(client.open_display, "seen")
    assert (found.host, found.socket) == ("h1", f"/run/h1/{seen.uuid}.vnc")
    migration = await api.call(client.create_migration, "seen", "h2")
    await api.begin(migration.name)
    await api.end(migration.name)
    found = await api.call(client.open_display, seen.uuid)
    assert (found.host, found.socket) == ("h2", f"/run/h2/{seen.uuid}.vnc")


async def test_a_screen_that_there_is_not(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    assert (await api.refused(client.open_display, "web")).reason is R.DISPLAY_NOT_AVAILABLE
    assert (await api.refused(client.open_display, "none")).reason is R.NOT_FOUND
    await api.call(client.stop_and_keep_guest, "web")
    assert (await api.refused(client.open_display, "web")).reason is R.GUEST_NOT_RUNNING
