"""A copy's console: shared by several, lost by none who keep up, and never a reason for a guest to wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agents.guest import console as consoles
from agents.guest.console import ConsoleAt, Consoles, Session
from orchestrator.core.errors import DroverError, RefusalReason

pytestmark = pytest.mark.timeout(30)


class Vmm:
    """The far end of a console: lets one connection in, as QEMU does."""

    def __init__(self) -> None:
        self.typed = bytearray()
        self.connections = 0
        self.writer: asyncio.StreamWriter | None = None
        self.greeting: Callable[[bytes], bytes] | None = None
        """Of a console server: what it answers to the first line."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.greeting is not None:
            writer.write(self.greeting(await reader.readline()))
        self.writer = writer
        while data := await reader.read(4096):
            self.typed += data
        self.writer = None
        writer.close()

    def say(self, data: bytes) -> None:
        assert self.writer is not None
        self.writer.write(data)

    def die(self) -> None:
        assert self.writer is not None
        self.writer.close()


@asynccontextmanager
async def listening(path: Path) -> AsyncIterator[Vmm]:
    vmm = Vmm()
    server = await asyncio.start_unix_server(vmm.serve, str(path))
    try:
        yield vmm
    finally:
        server.close()


async def heard(session: Session, count: int) -> bytes:
    data = bytearray()
    async with asyncio.timeout(10):
        async for said in session.output():
            data += said.data
            if len(data) >= count:
                break
    return bytes(data)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - bounded above
            await asyncio.sleep(0.005)


async def refused(attaching: Awaitable[object]) -> str:
    with pytest.raises(DroverError) as caught:
        await attaching
    assert caught.value.reason is RefusalReason.CONSOLE_NOT_AVAILABLE
    return caught.value.message


async def test_sessions_share_one_connection_and_the_last_one_lets_go(tmp_path: Path) -> None:
    at, known = ConsoleAt(tmp_path / "com1"), Consoles()
    async with listening(at.socket) as vmm:
        async with known.attach("i", at) as one:
            async with known.attach("i", at) as other:
                await until(lambda: vmm.writer is not None)
                vmm.say(b"hello")
                assert await heard(one, 5) == await heard(other, 5) == b"hello"
                one.type(b"a")
                other.type(b"b")
                await until(lambda: bytes(vmm.typed) == b"ab")
            assert vmm.connections == 1
            vmm.say(b"more")
            assert await heard(one, 4) == b"more"
        await until(lambda: vmm.writer is None)
        async with known.attach("i", at) as again:
            await until(lambda: vmm.writer is not None)
            vmm.say(b"new")
            assert await heard(again, 3) == b"new"
        assert vmm.connections == 2


async def test_who_does_not_keep_up_loses_the_oldest_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consoles, "HELD_BYTES", 1000)
    at = ConsoleAt(tmp_path / "com1")
    async with listening(at.socket) as vmm, Consoles().attach("i", at) as slow:
        await until(lambda: vmm.writer is not None)
        sent = bytes(range(250)) * 8
        vmm.say(sent)
        async with asyncio.timeout(10):
            while len(slow._held) + slow._lost < len(sent):  # noqa: ASYNC110 - bounded above
                await asyncio.sleep(0.005)
            async for said in slow.output():
                assert (said.data, said.lost_bytes) == (sent[-1000:], 1000)
                break


async def test_the_end_of_the_vmm_comes_after_its_last_words(tmp_path: Path) -> None:
    at = ConsoleAt(tmp_path / "com1")
    async with listening(at.socket) as vmm, Consoles().attach("i", at) as session:
        await until(lambda: vmm.writer is not None)
        vmm.say(b"bye")
        vmm.die()
        async with asyncio.timeout(10):
            assert [said.data async for said in session.output()] == [b"bye"]


async def test_what_waits_for_a_session_comes_in_small_pieces(tmp_path: Path) -> None:
    """So many messages on their way are so many bytes at most, for everybody in between."""
    at, said = ConsoleAt(tmp_path / "com1"), bytes(range(256)) * 512
    async with listening(at.socket) as vmm, Consoles().attach("i", at) as session:
        await until(lambda: vmm.writer is not None)
        vmm.say(said)
        await until(lambda: len(session._held) == len(said))
        vmm.die()
        async with asyncio.timeout(10):
            pieces = [each.data async for each in session.output()]
    assert b"".join(pieces) == said
    assert max(map(len, pieces)) <= consoles.READ_BYTES


async def test_who_comes_while_others_hear_the_last_words_gets_what_there_is_now(tmp_path: Path) -> None:
    """A console server that was started anew, say: nothing would ever come through the connection that was lost."""
    known, at = Consoles(), ConsoleAt(tmp_path / "com1")
    async with listening(at.socket) as vmm, known.attach("i", at) as first:
        await until(lambda: vmm.writer is not None)
        vmm.die()
        await until(lambda: first.over and vmm.writer is None)
        async with known.attach("i", at) as second:
            await until(lambda: vmm.writer is not None)
            vmm.say(b"anew")
            assert await heard(second, 4) == b"anew"


async def test_nobody_waits_for_ever_to_be_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consoles, "CONNECT_S", 0.1)
    known, at = Consoles(), ConsoleAt(tmp_path / "com1")
    assert "com1" in await refused(known.attach("i", at).__aenter__())
    async with listening(at.socket), known.attach("i", at):
        pass


async def test_there_are_only_so_many_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consoles, "MAX_SESSIONS", 1)
    known, at = Consoles(), ConsoleAt(tmp_path / "com1")
    async with listening(at.socket), known.attach("i", at):
        await refused(known.attach("i", at).__aenter__())


async def test_a_console_is_borrowed_from_the_one_who_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consoles, "CONNECT_S", 0.2)
    known = Consoles()
    at = ConsoleAt(tmp_path / "com1", tmp_path / "server", "h1.web.i")
    async with listening(tmp_path / "server") as server:
        server.greeting = lambda line: b"ok\nfirst words" if line == b"attach h1.web.i\n" else b"no\n"
        async with known.attach("i", at) as session:
            assert await heard(session, 11) == b"first words"
            session.type(b"x")
            await until(lambda: bytes(server.typed) == b"x")
        await refused(known.attach("j", ConsoleAt(tmp_path / "com1", tmp_path / "server", "h1.web.j")).__aenter__())
