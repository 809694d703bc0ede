"""The destination's half: one connection of the source's, relayed to this host's daemon. Its Finish waits for COMMIT.

The source's agent connects and says which copy it means; it is told what of the domain is this host's own. From then on
the connection carries what libvirt's client has to say to this daemon, and nothing else passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from agents.engine.base import EngineError, EngineTimeout
from agents.engine.libvirt.domain import Places
from agents.engine.libvirt.packets import Packet, Procedure, at_destination
from agents.engine.libvirt.relay import LIMIT_BYTES, Relay, Stream

HELLO_S = 5.0


class Stage(StrEnum):
    """How far the copy has come."""

    WAITING = "waiting"
    MADE = "made"
    """libvirt has started its VMM, which listens."""
    LOADED = "loaded"
    """The source has sent everything; Finish is kept."""
    FINISHED = "finished"
    """It stands on its own, stopped: its migration has ended."""
    BROKEN = "broken"
    """Its migration has ended without that: libvirt removes it."""


class Incoming:
    """Listens for one attempt. `on_stage` is called on the event loop, with what went wrong for BROKEN."""

    def __init__(self, token: str, places: Places, on_stage: Callable[[Stage, str], None]) -> None:
        self.stage = Stage.WAITING
        self._token = token
        self._places = places
        self._on_stage = on_stage
        self._relay = Relay(at_destination, self._kept, self._replied)
        self._finished = asyncio.Event()
        self._settled = asyncio.Event()
        """No Prepare is under way."""
        self._settled.set()
        self._server: asyncio.Server | None = None
        self._taken = False
        self._serving: set[asyncio.Task[None]] = set()

    async def listen(self, address: str, daemon_socket: Path) -> int:
        """Returns the port. Raises OSError."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._serving.add(task)
            try:
                await self._serve((reader, writer), daemon_socket)
            finally:
                writer.transport.abort()
                self._serving.discard(task)

        self._server = await asyncio.start_server(serve, address, 0, limit=LIMIT_BYTES, backlog=4)
        return int(self._server.sockets[0].getsockname()[1])

    async def finish(self, timeout_s: float = 10.0) -> None:
        """COMMITTED: let the copy stand on its own. Idempotent. Raises EngineError: then it never ran, nor will."""
        if self.stage in (Stage.WAITING, Stage.MADE):
            raise EngineError("the guest is not loaded yet: there is nothing to take over")
        if self.stage is Stage.LOADED:
            self._relay.let_go(Procedure.FINISH)
            done = asyncio.ensure_future(self._finished.wait())
            over = asyncio.ensure_future(self._relay.closed.wait())
            try:
                await asyncio.wait({done, over}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                done.cancel()
                over.cancel()
        if self.stage is Stage.LOADED:
            raise EngineTimeout(f"libvirt has not ended the migration in {timeout_s:g} s")
        if self.stage is not Stage.FINISHED:
            raise EngineError("libvirt has given up the copy before it could be taken over; it never ran")

    async def end(self) -> None:
        """Let nobody in and cut what is there; libvirt removes a copy that is not finished. Idempotent."""
        if self._server is not None:
            self._server.close()
        if self._relay.under_way(Procedure.PREPARE):
            # libvirt would make the copy after we had gone, and nobody would be left to make it go.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HELLO_S):
                    await self._settled.wait()
        self._relay.cut()
        tasks = [task for task in self._serving if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, client: Stream, daemon_socket: Path) -> None:
        try:
            async with asyncio.timeout(HELLO_S):
                said = json.loads(await client[0].readline())
                answer = self._answer(said)
                client[1].write(json.dumps(answer).encode() + b"\n")
                await client[1].drain()
                if "error" in answer:
                    return
                daemon = await asyncio.open_unix_connection(daemon_socket, limit=LIMIT_BYTES)
        except (TimeoutError, OSError, ValueError) as error:
            if self._taken:
                self._now(Stage.BROKEN, f"the source's connection could not be taken: {error}")
            return
        await self._relay.run(client, daemon)
        self._settled.set()
        if self.stage is not Stage.FINISHED:
            self._now(Stage.BROKEN, self._relay.why or "the source has ended the migration")

    def _answer(self, said: object) -> dict[str, object]:
        if not isinstance(said, dict) or said.get("copy") != self._token:  # pyright: ignore[reportUnknownMemberType]
            return {"error": "this is another copy"}
        if self._taken:
            return {"error": "this copy has its source already"}
        self._taken = True
        return self._places.told()

    def _kept(self, packet: Packet) -> None:
        if packet.procedure == Procedure.FINISH:
            self._now(Stage.LOADED, "")

    def _replied(self, packet: Packet) -> None:
        if packet.procedure == Procedure.PREPARE:
            self._settled.set()
            if packet.ok:
                self._now(Stage.MADE, "")
        elif packet.procedure == Procedure.FINISH and packet.ok:
            self._now(Stage.FINISHED, "")
            self._finished.set()

    def _now(self, stage: Stage, why: str) -> None:
        if self.stage not in (Stage.FINISHED, Stage.BROKEN):
            self.stage = stage
            self._on_stage(stage, why)


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str) -> Places:
    """From the source: ask for the copy `token`. Raises EngineError."""
    try:
        async with asyncio.timeout(HELLO_S):
            writer.write(json.dumps({"copy": token}).encode() + b"\n")
            await writer.drain()
            line = await reader.readline()
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"the destination refuses: {answer['error']}")
        return Places(**answer)
    except (TimeoutError, OSError, ValueError, TypeError, KeyError) as error:
        raise EngineError(f"the destination does not take the stream: {error or 'no answer'}") from error
