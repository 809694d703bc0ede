"""A device in memory, with both of its ends: asks for one ACK at the start, and late ones where the test says so.

Both pass the contract suite of the real shims (tests/contract/test_shims.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from hashlib import blake2b

from agents.shims.base import FinalQuery, Frame, FrameKind, Load, SendFrame, ShimError
from orchestrator.core.ids import AckRequest


def digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


@dataclass
class FakeSourceShim:
    """See `SourceShim`. `late_at` names a hook at which the device asks once more, `late_times` times."""

    device: str
    late_at: str = ""
    late_times: int = 0
    generation: int = 0
    state: str = "RUNNING"
    calls: list[str] = field(default_factory=list[str])
    _session: int | None = None
    _sent: bytes = b""
    _answered: int = 0
    _initial: bytes = b""
    """Initial data that is not sent yet."""
    _report: Callable[[AckRequest], None] | None = None

    async def begin(self, session: int, on_request: Callable[[AckRequest], None]) -> None:
        if self.state == "PRE_COPY" and session == self._session:
            self._report = on_request
            return
        if self.state not in ("RUNNING", "PRE_COPY"):
            raise ShimError(f"{self.device} is {self.state}: roll it back first")
        self._session, self._report, self._sent, self.state = session, on_request, b"", "PRE_COPY"
        self._answered, self._initial = self.generation, b""
        self._ask()

    def _ask(self) -> None:
        self.generation += 1
        self._initial += f"{self.device} initial {self.generation}".encode() * 100
        if self._report is not None:
            self._report(AckRequest(self.device, self.generation))

    async def run_precopy(self, send: SendFrame) -> None:
        if self._session is None:
            raise ShimError(f"{self.device}: no session was begun")
        while self.state == "PRE_COPY":
            if self._initial:
                data, self._initial = self._initial, b""
                await self._hand_over(send, FrameKind.PRECOPY, data)
            elif self._answered < self.generation:
                self._answered = self.generation
                await self._hand_over(send, FrameKind.INITIAL_SENT)
            await asyncio.sleep(0.01)

    async def _hand_over(self, send: SendFrame, kind: FrameKind, data: bytes = b"") -> None:
        """A frame that is on its way goes all the way, even when pre-copy ends meanwhile."""
        self._sent += data

        async def sent() -> None:
            await send(Frame(self.device, self._session or 0, kind, self._answered, data))

        sending = asyncio.ensure_future(sent())
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            await asyncio.wait({sending}, timeout=2)
            raise

    async def hook(self, name: str) -> None:
        self.calls.append(name)
        if name == self.late_at and self.late_times and self._session is not None:
            self.late_times -= 1
            self._ask()

    async def quiesce(self) -> FinalQuery:
        if self.state in ("PRE_COPY", "RUNNING"):
            self.state = "PRE_COPY_P2P" if self.state == "PRE_COPY" else "RUNNING_P2P"
        elif self.state not in ("PRE_COPY_P2P", "RUNNING_P2P", "STOP_COPY"):
            raise ShimError(f"{self.device} is {self.state}")
        newest = None if self._session is None else AckRequest(self.device, self.generation)
        return FinalQuery(newest, len(self._initial) + 4)

    async def stop_copy(self) -> None:
        if self.state not in ("PRE_COPY_P2P", "RUNNING_P2P", "STOP_COPY"):
            raise ShimError(f"{self.device} is {self.state}: quiesce it first")
        self._session = self._session or 0
        self.state = "STOP_COPY"

    async def stop_copy_frames(self) -> AsyncIterator[Frame]:
        if self.state != "STOP_COPY":
            raise ShimError(f"{self.device} is {self.state}")
        data, self._initial = self._initial + b"rest", b""
        self._sent += data
        yield Frame(self.device, self._session or 0, FrameKind.STOP_COPY, data=data)
        total, summed = len(self._sent), digest(self._sent)
        yield Frame(self.device, self._session or 0, FrameKind.END, total_bytes=total, digest=summed)

    async def roll_back(self) -> None:
        if self.state == "RETIRED":
            raise ShimError(f"{self.device} was retired")
        self.state, self._session = "RUNNING", None

    async def retire(self) -> None:
        self.state, self._session = "RETIRED", None


@dataclass
class FakeDestinationShim:
    """See `DestinationShim`. `spoil` loses a byte, so that validation must refuse."""

    device: str
    spoil: bool = False
    state: str = "STOP"
    _session: int | None = None
    _data: bytes = b""
    _end: Frame | None = None
    _load: Load | None = None

    async def begin_load(self, session: int) -> None:
        if self.state == "RUNNING":
            raise ShimError(f"{self.device} is the guest's: nothing can be loaded into it")
        self._session, self._data, self._end, self._load, self.state = session, b"", None, None, "RESUMING"

    async def load(self, frame: Frame) -> AckRequest | None:
        if self.state != "RESUMING" or frame.session != self._session:
            return None
        if frame.kind is FrameKind.INITIAL_SENT:
            return AckRequest(self.device, frame.generation)
        if frame.kind is FrameKind.END:
            self._end = frame
        self._data += frame.data[:-1] if self.spoil and frame.kind is FrameKind.STOP_COPY else frame.data
        return None

    async def validate(self) -> Load:
        if self._load is None:
            sound = self._end is not None and self._end.digest == digest(self._data)
            if self.state != "RESUMING" or self._session is None or not sound:
                raise ShimError(f"{self.device}: what was loaded is not what was sent")
            self.state, self._load = "STOP", Load(self.device, self._session, len(self._data), digest(self._data))
        return self._load

    async def activate(self) -> None:
        if self.state != "RUNNING" and self._load is None:
            raise ShimError(f"{self.device} holds no validated state")
        self.state = "RUNNING"

    async def discard(self) -> None:
        self.state, self._session, self._load = "RESET", None, None
