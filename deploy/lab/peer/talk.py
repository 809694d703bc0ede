"""One guest that is talked with: a numbered message each few milliseconds, over UDP and over one TCP connection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from deploy.lab.peer.outage import Outage, outage_ms

ECHO_PORT, CONTROL_PORT = 7, 8
STAMPS = 120_000
"""Answers that are remembered: ten minutes at 200 a second."""
CONNECT_S = 3.0
RETRY_S = 0.2
_MESSAGE = struct.Struct("!QQ")
_MASK = (1 << 64) - 1
_MULTIPLIER = 2654435761


def _message(number: int) -> bytes:
    return _MESSAGE.pack(number, number * _MULTIPLIER & _MASK)


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, talk: Talk) -> None:
        self._talk = talk

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._talk.heard_udp(data)

    def error_received(self, exc: Exception) -> None:
        """Nobody is at that address just now (ICMP): that is what an outage looks like."""


class Talk:
    """With one guest, until `close`."""

    def __init__(self, address: str, every_ms: float) -> None:
        self.address = address
        self.every_ms = every_ms
        self._udp: deque[int] = deque(maxlen=STAMPS)
        self._tcp: deque[int] = deque(maxlen=STAMPS)
        self._wrong = 0
        self._breaks = 0
        self._tasks = [asyncio.create_task(self._over_udp()), asyncio.create_task(self._over_tcp())]

    @property
    def answers(self) -> tuple[int, int]:
        """By UDP and by TCP, as far as they are remembered."""
        return len(self._udp), len(self._tcp)

    def outage(self, start_ns: int, end_ns: int) -> Outage:
        """In a window of this machine's monotonic clock."""
        udp, tcp = (outage_ms(tuple(stamps), self.every_ms, start_ns, end_ns) for stamps in (self._udp, self._tcp))
        return Outage(udp, tcp, self._wrong, self._breaks)

    def heard_udp(self, data: bytes) -> None:
        """A datagram came back."""
        if len(data) == _MESSAGE.size and data == _message(_MESSAGE.unpack(data)[0]):
            self._udp.append(time.monotonic_ns())
        else:
            self._wrong += 1

    async def _over_udp(self) -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: _Udp(self), remote_addr=(self.address, ECHO_PORT))
        try:
            await self._each_tick(transport.sendto)
        finally:
            transport.close()

    async def _over_tcp(self) -> None:
        """Connects again when the connection breaks, which is counted."""
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(CONNECT_S):
                    reader, writer = await asyncio.open_connection(self.address, ECHO_PORT)
                writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sending = asyncio.create_task(self._each_tick(writer.write))
                try:
                    await self._read(reader)
                finally:
                    sending.cancel()
                    writer.close()
                    self._breaks += 1
            await asyncio.sleep(RETRY_S)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        number = 0
        while True:
            try:
                data = await reader.readexactly(_MESSAGE.size)
            except asyncio.IncompleteReadError:
                return
            if data != _message(number):
                self._wrong += 1
                return  # nothing after it can be told from what was lost
            number += 1
            self._tcp.append(time.monotonic_ns())

    async def _each_tick(self, send: Callable[[bytes], Any]) -> None:
        """Messages in order, at their times; those of a time that this process slept through are left out."""
        loop = asyncio.get_running_loop()
        due, number, every_s = loop.time(), 0, self.every_ms / 1000
        while True:
            with contextlib.suppress(OSError):
                send(_message(number))
            number += 1
            due = max(due + every_s, loop.time())
            await asyncio.sleep(due - loop.time())

    async def ask(self, letter: str) -> int:
        """Give the guest a letter (deploy/lab/linux_guest/README.md); its newest promise when that was done.

        Raises OSError and TimeoutError.
        """
        async with asyncio.timeout(60):
            reader, writer = await asyncio.open_connection(self.address, CONTROL_PORT)
            try:
                writer.write(letter.encode())
                answer = await reader.readline()
            finally:
                writer.close()
        word, _, promised = answer.decode().strip().partition(" ")
        if word != letter or not promised.isdigit():
            raise OSError(f"the guest answered {answer!r}")
        return int(promised)

    async def close(self) -> None:
        """End both conversations."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
