"""Sessions with guests' consoles: one stream to the caller, and behind it one to the agent of each host that the guest
is on, or is about to come to.

The guest record says where that is, and a watch says when it moves. The console of a copy that is to become the guest
is held before the guest runs there, so that of a migration nothing is lost. What is typed goes to the owner's copy.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

import structlog

from orchestrator.api.calls import Caller, Tools
from orchestrator.api.reads import guest_uuid, read_guest
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.text import clip
from orchestrator.ledger import paths
from orchestrator.ledger.records import BadRecord
from orchestrator.ledger.store import StoreUnavailable
from protos.drover.v1 import orchestrator_pb2 as pb

log = structlog.get_logger(__name__)

WAITING = 16
"""Messages, of at most 16 KiB, for the caller and for each agent. Whoever does not take them in makes the other side
wait, which drops."""
AGAIN_S = 0.3
"""Between two tries to hold the console of a copy."""
LOOK_S = 5.0
"""The record is looked at this often, whatever the watch says."""
LAST_WORDS_S = 1.0
"""For what a console has said at the end of its VMM."""


def hosts_of(record: GuestRecord) -> dict[str, str]:
    """Where consoles are to be held: host -> `inc` of the copy, empty for the one that is the guest."""
    if record.phase in (Ownership.CRASHED, Ownership.GONE):
        return {}
    found = {record.owner.host: ""}
    if record.phase is Ownership.OPEN and record.destination is not None and record.inc:
        found[record.destination.host] = record.inc
    if record.phase is Ownership.COMMITTED:
        found[record.owner.host] = record.inc
        if record.source is not None:
            found[record.source.host] = ""
    return found


@dataclass
class _Line:
    """To the agent of one host."""

    typed: asyncio.Queue[bytes] = field(default_factory=lambda: asyncio.Queue[bytes](WAITING))
    held: asyncio.Event = field(default_factory=asyncio.Event)
    """The console is held: what is typed arrives."""
    task: asyncio.Task[None] | None = None


class Consoles:
    """The calls about consoles."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def attach(
        self, requests: AsyncIterator[pb.AttachConsoleRequest], caller: Caller
    ) -> AsyncGenerator[pb.AttachConsoleResponse]:
        """Until nothing of the guest runs any more, or the caller ends the requests. Raises INVALID_ARGUMENT,
        NOT_FOUND, and GUEST_NOT_RUNNING when nothing runs from the start."""
        first = await anext(requests, None)
        if first is None or not first.guest:
            raise invalid([("guest", "is missing: the first message names the guest")])
        uuid = await guest_uuid(self._tools.ledger, first.guest, field="guest")
        record = (await read_guest(self._tools.ledger, uuid)).record
        if not hosts_of(record):
            said = f"guest {record.name} does not run: start it, or look at its guest file"
            raise DroverError(RefusalReason.GUEST_NOT_RUNNING, said)
        log.info("console", guest=record.name, by=caller.by)
        session = _Session(self._tools, uuid, record)
        follows = asyncio.ensure_future(session.follow())
        types = asyncio.ensure_future(session.type_on(first.data, requests))
        try:
            async for said in _until_done(session.said, {follows, types}):
                yield said
            for task in (follows, types):
                if task.done():
                    task.result()
        finally:
            for task in (follows, types):
                task.cancel()
            await session.close()
            await asyncio.wait({follows, types}, timeout=1.0)


async def _until_done(
    said: asyncio.Queue[pb.AttachConsoleResponse], working: set[asyncio.Task[None]]
) -> AsyncIterator[pb.AttachConsoleResponse]:
    """What there is to say, until one of those who work for it has ended."""
    while True:
        getting = asyncio.ensure_future(said.get())
        try:
            await asyncio.wait({getting, *working}, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                break
            yield getting.result()
        finally:
            getting.cancel()
    while not said.empty():
        yield said.get_nowait()


class _Session:
    def __init__(self, tools: Tools, uuid: str, record: GuestRecord) -> None:
        self._tools = tools
        self._uuid = uuid
        self._record = record
        self._lines: dict[str, _Line] = {}
        self._moved = asyncio.Event()
        self._told = ""
        """The host that the caller was told last."""
        self.said: asyncio.Queue[pb.AttachConsoleResponse] = asyncio.Queue(WAITING)
        """For the caller."""

    async def close(self) -> None:
        lines, self._lines = self._lines, {}
        tasks = [line.task for line in lines.values() if line.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)

    # --- where the guest is -------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Hold the consoles that the record speaks of, until it speaks of none."""
        unwatch = self._tools.store.watch(paths.guest(self._uuid), lambda _: self._moved.set())
        try:
            while wanted := hosts_of(self._record):
                for host in [host for host in self._lines if host not in wanted]:
                    if (task := self._lines.pop(host).task) is not None:
                        task.cancel()
                for host, inc in wanted.items():
                    if host not in self._lines:
                        line = self._lines[host] = _Line()
                        line.task = asyncio.ensure_future(self._hold(line, host, inc))
                await self._tell()
                await self._look()
            await self._last_words()
        finally:
            unwatch()

    async def _look(self) -> None:
        """Wait until the record has moved, and read it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await self._moved.wait()
        self._moved.clear()
        with contextlib.suppress(StoreUnavailable, BadRecord):  # what it said before holds until it is readable
            self._record = (await read_guest(self._tools.ledger, self._uuid)).record

    async def _tell(self) -> None:
        """Which host it is on, when that is another one."""
        host = self._record.owner.host
        line = self._lines.get(host)
        if host != self._told and line is not None and line.held.is_set():
            self._told = host
            await self.said.put(pb.AttachConsoleResponse(host=host))

    async def _last_words(self) -> None:
        tasks = [line.task for line in self._lines.values() if line.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_WORDS_S)
        what = "has ended" if self._record.phase is Ownership.GONE else "does not run any more"
        await self.said.put(pb.AttachConsoleResponse(message=f"guest {self._record.name} {what}"))

    # --- one host -----------------------------------------------------------------------------------------------------

    async def _hold(self, line: _Line, host: str, inc: str) -> None:
        """Pass on what the console there says. It is tried again until the record speaks of the host no more."""
        while True:
            inc = hosts_of(self._record).get(host, inc)
            try:
                await self._heard(line, host, inc)
            except (DroverError, StoreUnavailable, BadRecord) as error:
                if self._told == host:
                    said = clip(f"{host} does not let us in at the console just now: {error}", 300)
                    await self.said.put(pb.AttachConsoleResponse(message=said))
                    self._told = ""
            line.held.clear()
            self._moved.set()
            await asyncio.sleep(AGAIN_S)

    async def _heard(self, line: _Line, host: str, inc: str) -> None:
        agent = await self._tools.agent(host)

        async def typed() -> AsyncIterator[bytes]:
            while True:
                yield await line.typed.get()

        async with contextlib.aclosing(agent.hold_console(self._uuid, inc, typed())) as output:
            async for data, lost in output:
                if not line.held.is_set():
                    line.held.set()
                    self._moved.set()
                if data or lost:
                    await self.said.put(pb.AttachConsoleResponse(data=data, lost_bytes=lost))

    # --- what is typed ------------------------------------------------------------------------------------------------

    async def type_on(self, first: bytes, requests: AsyncIterator[pb.AttachConsoleRequest]) -> None:
        """To the owner's copy, in order. While its console is not held nothing more is taken from the caller."""
        await self._type(first)
        async for each in requests:
            if each.guest:
                raise invalid([("guest", "stands in the first message only")])
            await self._type(each.data)

    async def _type(self, data: bytes) -> None:
        while data:
            line = self._lines.get(self._record.owner.host)
            if line is not None and line.held.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(AGAIN_S):
                        await line.typed.put(data)
                        return
            else:
                await asyncio.sleep(AGAIN_S / 10)
