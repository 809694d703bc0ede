"""What the times of a guest's answers prove about its outage, and the peer that takes them, with a real echo server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from deploy.lab.peer import talk
from deploy.lab.peer.outage import Gap, longest_gap, median, outage_ms
from deploy.lab.peer.talk import Talk

MS = 1_000_000


def stamps(*ms: float) -> list[int]:
    return [int(each * MS) for each in ms]


def test_the_longest_time_without_an_answer() -> None:
    heard = stamps(0, 10, 20, 110, 120, 150)
    assert longest_gap(heard, 0, 200 * MS) == Gap(20 * MS, 110 * MS)
    assert outage_ms(heard, 10, 0, 200 * MS) == 80


def test_only_the_window_counts_and_what_reaches_into_it() -> None:
    heard = stamps(0, 500, 510, 520, 600, 610)
    assert outage_ms(heard, 10, 505 * MS, 700 * MS) == 70
    assert outage_ms(heard, 10, 400 * MS, 700 * MS) == 490
    assert outage_ms(heard, 10, 700 * MS, 800 * MS) is None


def test_a_guest_that_never_answered_again_has_no_outage_that_could_be_told() -> None:
    assert outage_ms(stamps(0), 10, 0, MS) is None
    assert outage_ms([], 10, 0, MS) is None


def test_answers_that_come_at_once_are_no_outage() -> None:
    assert outage_ms(stamps(0, 9, 18), 10, 0, 20 * MS) == 0


def test_the_median_is_a_value_that_was_measured() -> None:
    assert median([3, 1, 2]) == 2
    assert median([4, 1]) == 1
    assert median([]) is None


# --- the peer ---------------------------------------------------------------------------------------------------------


class Echo:
    """A guest's echo server on loopback, that can be silent for a time."""

    def __init__(self) -> None:
        self.answering = asyncio.Event()
        self.answering.set()
        self.lies = False
        self._servers: list[asyncio.Server] = []
        self._datagrams: asyncio.DatagramTransport | None = None

    async def start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        echo = self

        class Datagrams(asyncio.DatagramProtocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.transport = transport

            def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
                if echo.answering.is_set():
                    self.transport.sendto(data, addr)  # pyright: ignore[reportAttributeAccessIssue]

        async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(4096):
                await self.answering.wait()
                writer.write(data[::-1] if self.lies else data)
            writer.close()

        async def control(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write((await reader.read(1)) + b" 1234\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(stream, "127.0.0.1", 0)
        asked = await asyncio.start_server(control, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setattr(talk, "ECHO_PORT", port)
        monkeypatch.setattr(talk, "CONTROL_PORT", asked.sockets[0].getsockname()[1])
        loop = asyncio.get_running_loop()
        self._datagrams, _ = await loop.create_datagram_endpoint(Datagrams, local_addr=("127.0.0.1", port))
        self._servers = [server, asked]

    def stop(self) -> None:
        for server in self._servers:
            server.close()
        if self._datagrams:
            self._datagrams.close()


@pytest.fixture
async def echo(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Echo]:
    made = Echo()
    await made.start(monkeypatch)
    yield made
    made.stop()


async def until_answers(watched: Talk, more: int = 5) -> None:
    before = watched.answers
    async with asyncio.timeout(20):
        while any(now < then + more for now, then in zip(watched.answers, before, strict=True)):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_silence_is_seen_both_ways(echo: Echo) -> None:
    watched = Talk("127.0.0.1", 5)
    try:
        await until_answers(watched)
        began_ns = time.monotonic_ns()
        echo.answering.clear()
        await asyncio.sleep(0.3)
        echo.answering.set()
        ended_ns = time.monotonic_ns()
        await until_answers(watched)
        seen = watched.outage(began_ns, ended_ns)
        assert seen.udp_ms is not None
        assert seen.tcp_ms is not None
        assert min(seen.udp_ms, seen.tcp_ms) > 200
        assert (seen.wrong, seen.breaks) == (0, 0)
    finally:
        await watched.close()


async def test_an_answer_that_is_not_what_was_sent_is_counted(echo: Echo) -> None:
    echo.lies = True
    watched = Talk("127.0.0.1", 5)
    try:
        async with asyncio.timeout(20):
            while not watched.outage(0, 1).wrong:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        await watched.close()


async def test_a_guest_is_asked_by_letter(echo: Echo) -> None:
    watched = Talk("127.0.0.1", 50)
    try:
        assert await watched.ask("z") == 1234
    finally:
        await watched.close()
