"""The consoles of copies (COM1), each read by one connection and shared by everybody who has a session with it.

A VMM lets one connection in and drops what its guest says while there is none, so this agent connects while there are
sessions, and reads at once whatever comes: no session ever makes a guest wait. One that does not keep up loses what is
oldest, and is told how much.

Where a console server of the host holds the consoles (`console_server`), they are borrowed from it: it is told the name
of one in a line, answers `ok` in a line, and passes bytes on in both directions from there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from orchestrator.core.errors import DroverError, RefusalReason

log = structlog.get_logger(__name__)

READ_BYTES = 16 << 10
HELD_BYTES = 256 << 10
"""Of what a session has not taken in yet."""
TYPED_BYTES = 64 << 10
"""Of what the guest has not taken in yet; what is typed beyond is lost, and the session is told."""
MAX_SESSIONS = 16
"""With one console."""
CONNECT_S = 5.0
"""For the VMM, or the console server, to let us in."""
AGAIN_S = 0.05


@dataclass(frozen=True, slots=True)
class ConsoleAt:
    """Where the console of one copy is found."""

    socket: Path
    """The VMM's own."""
    server: Path | None = None
    """Of the host's console server, which holds it; None: nobody does."""
    name: str = ""
    """What the server knows it by."""


@dataclass(frozen=True, slots=True)
class ConsoleOutput:
    """Some of what a console said."""

    data: bytes
    lost_bytes: int = 0
    """Said before it, or typed, and lost."""


class Session:
    """One who reads and types. Made by `Console.attach`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._held = bytearray()
        self._lost = 0
        self._news = asyncio.Event()
        self.over = False
        """The console is closed: its VMM has ended."""

    def hear(self, data: bytes) -> None:
        """Never waits."""
        self._held += data
        if (excess := len(self._held) - HELD_BYTES) > 0:
            del self._held[:excess]
            self._lost += excess
        self._news.set()

    def lose(self, count: int) -> None:
        """Tell it that so many bytes were lost."""
        self._lost += count
        self._news.set()

    def end(self) -> None:
        """Nothing more comes."""
        self.over = True
        self._news.set()

    async def output(self) -> AsyncIterator[ConsoleOutput]:
        """What the console says, in pieces of at most READ_BYTES, until it is closed."""
        while True:
            if self._held or self._lost:
                data, lost = bytes(self._held[:READ_BYTES]), self._lost
                del self._held[:READ_BYTES]
                self._lost = 0
                yield ConsoleOutput(data, lost)
            elif self.over:
                return
            else:
                self._news.clear()
                await self._news.wait()

    def type(self, data: bytes) -> None:
        """Never waits. What the guest does not take in is lost, beyond TYPED_BYTES."""
        if not self._console.type(data):
            self.lose(len(data))


class Console:
    """Of one copy, while somebody has a session with it."""

    def __init__(self, at: ConsoleAt) -> None:
        self._at = at
        self._sessions: list[Session] = []
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def attach(self) -> AsyncGenerator[Session]:
        """Raises CONSOLE_NOT_AVAILABLE when nobody answers there, or all sessions are taken."""
        if len(self._sessions) >= MAX_SESSIONS:
            said = f"{MAX_SESSIONS} sessions with this console are open: end one of them"
            raise DroverError(RefusalReason.CONSOLE_NOT_AVAILABLE, said)
        session = Session(self)
        self._sessions.append(session)
        try:
            async with self._opening:
                if self._reading is not None and self._reading.done():  # others still hear its last words
                    await self._close()
                if self._reading is None:
                    await self._open()
            yield session
        finally:
            self._sessions.remove(session)
            if not self._sessions:
                await self._close()

    def type(self, data: bytes) -> bool:
        """False: the guest has not taken in what was typed before."""
        writer = self._writer
        if writer is None or writer.transport.get_write_buffer_size() > TYPED_BYTES:
            return False
        writer.write(data)
        return True

    async def _open(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                while True:
                    try:
                        reader, self._writer = await self._connected()
                        break
                    except OSError:
                        await asyncio.sleep(AGAIN_S)
        except TimeoutError:
            raise DroverError(
                RefusalReason.CONSOLE_NOT_AVAILABLE, f"nobody lets us in at the console: {self._at.socket}"
            ) from None
        self._reading = asyncio.ensure_future(self._read(reader))

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises OSError."""
        if self._at.server is None:
            return await asyncio.open_unix_connection(str(self._at.socket), limit=READ_BYTES)
        reader, writer = await asyncio.open_unix_connection(str(self._at.server), limit=READ_BYTES)
        try:
            writer.write(f"attach {self._at.name}\n".encode())
            if await reader.readline() != b"ok\n":
                raise OSError(f"the console server does not have {self._at.name}")
        except BaseException:
            writer.close()
            raise
        return reader, writer

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while data := await reader.read(READ_BYTES):
                for session in self._sessions:
                    session.hear(data)
        except OSError as error:
            log.info("console lost", console=str(self._at.socket), error=str(error))
        finally:
            for session in self._sessions:
                session.end()

    async def _close(self) -> None:
        reading, self._reading = self._reading, None
        writer, self._writer = self._writer, None
        if reading is not None:
            reading.cancel()
            await asyncio.wait({reading}, timeout=1.0)
        if writer is not None:
            writer.close()


class Consoles:
    """Those of one host, by `inc`, while somebody has a session with them."""

    def __init__(self) -> None:
        self._open: dict[str, Console] = {}
        self._count: dict[str, int] = {}

    @contextlib.asynccontextmanager
    async def attach(self, inc: str, at: ConsoleAt) -> AsyncGenerator[Session]:
        """See `Console.attach`."""
        console = self._open.setdefault(inc, Console(at))
        self._count[inc] = self._count.get(inc, 0) + 1
        try:
            async with console.attach() as session:
                yield session
        finally:
            self._count[inc] -= 1
            if not self._count[inc]:
                del self._count[inc], self._open[inc]
