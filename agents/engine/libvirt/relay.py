"""One connection between libvirt's client and a daemon, with calls on it that wait for our word."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from agents.engine.libvirt.packets import (
    LENGTH_BYTES,
    Kind,
    Packet,
    PacketError,
    Verdict,
    length_of,
    packet_of,
)

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LIMIT_BYTES = 1 << 20


class Relay:
    """Everything passes that `judge` lets pass; what it keeps waits for `let_go`, and what follows passes meanwhile.

    `on_kept` and `on_reply` are called on the event loop. `closed` is set once the connection is over, from whichever
    side, and `why` then says what was refused, if anything was.
    """

    def __init__(
        self,
        judge: Callable[[Packet], Verdict],
        on_kept: Callable[[Packet], None],
        on_reply: Callable[[Packet], None],
    ) -> None:
        self._judge = judge
        self._on_kept = on_kept
        self._on_reply = on_reply
        self._kept: dict[int, Packet] = {}
        self._free: set[int] = set()
        self._daemon: asyncio.StreamWriter | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._asked: set[int] = set()
        self.closed = asyncio.Event()
        self.why = ""

    async def run(self, client: Stream, daemon: Stream) -> None:
        """Until one of the two closes, something is refused, or `cut`."""
        self._daemon = daemon[1]
        self._writers = [client[1], daemon[1]]
        if self.closed.is_set():
            self.cut()
            return
        pumps = [
            asyncio.ensure_future(self._calls(client[0], daemon[1])),
            asyncio.ensure_future(self._replies(daemon[0], client[1])),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self.cut()

    def let_go(self, procedure: int) -> None:
        """This call passes: the one that is kept, or the one that is to come. Idempotent."""
        self._free.add(procedure)
        packet = self._kept.pop(procedure, None)
        if packet is not None and self._daemon is not None and not self.closed.is_set():
            self._asked.add(procedure)
            self._daemon.write(packet.data)

    def under_way(self, procedure: int) -> bool:
        """It has gone to the daemon, which has not answered."""
        return procedure in self._asked

    def cut(self) -> None:
        """The connection is over, at both ends at once. Idempotent."""
        self._kept.clear()
        for writer in self._writers:
            writer.transport.abort()
        self.closed.set()

    async def _calls(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                try:
                    packet = await _read(reader)
                except PacketError as error:
                    self.why = f"libvirt's client sent {error}"
                    return
                verdict = self._judge(packet) if packet.kind == Kind.CALL or packet.procedure else Verdict.PASS
                if verdict is Verdict.REFUSE:
                    self.why = f"libvirt's client made call {packet.procedure}, which has no place in a migration"
                    return
                if verdict is Verdict.KEEP and packet.procedure not in self._free:
                    self._kept[packet.procedure] = packet
                    self._on_kept(packet)
                    continue
                self._asked.add(packet.procedure)
                writer.write(packet.data)
                await writer.drain()

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                try:
                    packet = await _read(reader)
                except PacketError as error:
                    self.why = f"libvirt's daemon sent {error}"
                    return
                if packet.kind == Kind.REPLY and packet.procedure:
                    self._asked.discard(packet.procedure)
                    self._on_reply(packet)
                writer.write(packet.data)
                await writer.drain()


async def _read(reader: asyncio.StreamReader) -> Packet:
    prefix = await reader.readexactly(LENGTH_BYTES)
    return packet_of(prefix + await reader.readexactly(length_of(prefix)))
