"""The devices inside one VMM, behind the socket that the preload in that VMM connects to."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable, Sequence

from deploy.lab.devices.vfio import layout
from deploy.lab.devices.vfio.endpoint import NEVER, Answer, Endpoint, Question
from deploy.lab.devices.vfio.layout import Kind

_CHANNELS = 2
"""Of each device: its doorbell has a connection of its own."""


class VfioServer:
    """Questions of one connection are answered in turn, those of different ones at any time."""

    def __init__(self, endpoints: Sequence[Endpoint], clock_s: Callable[[], float]) -> None:
        self._endpoints = endpoints
        self._clock_s = clock_s
        self._connected = [0] * len(endpoints)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until the VMM closes it. A device that this process does not have is answered ENODEV."""
        place: int | None = None
        try:
            first = await _read(reader)
            place = self._place(first)
            if place is None:
                writer.write(_packed(Answer(-errno.ENODEV)))
                await writer.drain()
                return
            self._connected[place] += 1
            endpoint = self._endpoints[place]
            writer.write(_packed(endpoint.answer(first, self._clock_s())))
            while True:
                await self._one(endpoint, await _read(reader), reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            if place is not None:
                self._connected[place] -= 1
            with contextlib.suppress(ConnectionError):
                writer.close()

    def _place(self, hello: Question) -> int | None:
        known = hello.kind is Kind.HELLO and hello.number < len(self._endpoints)
        return hello.number if known and self._connected[hello.number] < _CHANNELS else None

    async def _one(
        self, endpoint: Endpoint, question: Question, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if ms := endpoint.delay_ms(question):
            await asyncio.sleep(ms / 1000)
        answer = endpoint.answer(question, self._clock_s())
        if answer.hold_ms == NEVER:
            await reader.read(1)  # nothing comes while an answer is due: only the end of the VMM
            return
        if answer.hold_ms:
            await asyncio.sleep(answer.hold_ms / 1000)
        writer.write(_packed(answer))
        await writer.drain()


async def _read(reader: asyncio.StreamReader) -> Question:
    """Raises ConnectionError when the other side speaks something else."""
    kind, number, length, offset = layout.QUESTION.unpack(await reader.readexactly(layout.QUESTION.size))
    if length > layout.MAX_PAYLOAD or not Kind.HELLO <= kind <= Kind.BAR_WRITE:
        raise ConnectionError("this is no preload of ours")
    return Question(Kind(kind), number, offset, await reader.readexactly(length) if length else b"")


def _packed(answer: Answer) -> bytes:
    flags = layout.OPENS_SESSION if answer.opens_session else 0
    return layout.ANSWER.pack(answer.result, flags, len(answer.payload), 0) + answer.payload
