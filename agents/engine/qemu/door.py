"""Who is let in to an incoming QEMU where streams are protected: the one connection that knows which copy it is for.

QEMU itself takes connections one after another, and waits for the TLS of each with all of its thread: somebody who
connects and says nothing would hold up the stream, and QEMU with it. So this agent listens, hears many at a time, and
hands QEMU the connection that begins with the copy's `inc`, which only the two agents and the ledger know. What follows
on it is between the two QEMUs: TLS says there who each of them is.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Awaitable, Callable

import structlog

from orchestrator.tasks import Tasks

log = structlog.get_logger(__name__)

HEAR_S = 5.0
"""How long somebody may take to say which copy he is for."""
_MOST = 64
"""Heard at a time; whoever comes beyond these is turned away."""


def greeting(inc: str) -> bytes:
    """What the stream for that copy begins with."""
    return f"{inc}\n".encode()


class Door:
    """Of one copy. `take` is called once, with the connection, which it may keep no longer than until it returns."""

    def __init__(self, inc: str, take: Callable[[socket.socket], Awaitable[None]]) -> None:
        self._greeting = greeting(inc)
        self._take = take
        self._taken = False
        self._heard = 0
        self._listening: socket.socket | None = None
        self._tasks = Tasks("incoming stream")

    def open(self, ip: str) -> int:
        """Returns the port. Raises OSError."""
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        self._listening = socket.create_server((ip, 0), family=family, backlog=_MOST)
        self._listening.setblocking(False)
        self._tasks.spawn(self._listen(self._listening), "listen")
        return int(self._listening.getsockname()[1])

    async def close(self) -> None:
        """Nobody is let in any more. Idempotent."""
        listening, self._listening = self._listening, None
        if listening is not None:
            listening.close()
        await self._tasks.close()

    async def _listen(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # closed
            while not self._taken:
                connection, _ = await loop.sock_accept(listening)
                if self._heard >= _MOST or self._tasks.spawn(self._hear(connection), "hear") is None:
                    connection.close()
                    continue
                self._heard += 1

    async def _hear(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        try:
            with contextlib.closing(connection):
                async with asyncio.timeout(HEAR_S):
                    said = await self._said(connection)
                if not secrets.compare_digest(said, self._greeting) or self._taken:
                    return
                self._taken = True
                connection.setblocking(True)
                await self._take(connection)
        except (OSError, TimeoutError):
            log.warning("somebody at the port of an incoming stream did not say which one he is for")
        finally:
            self._heard -= 1

    async def _said(self, connection: socket.socket) -> bytes:
        """Not a byte more than the greeting: the rest is QEMU's."""
        loop, said = asyncio.get_running_loop(), b""
        while len(said) < len(self._greeting) and self._greeting.startswith(said):
            more = await loop.sock_recv(connection, len(self._greeting) - len(said))
            if not more:
                break
            said += more
        return said
