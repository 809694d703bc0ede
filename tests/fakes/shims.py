"""A device in memory, with both of its ends: asks for one ACK at the start, and late ones where the test says so."""

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
    _session: int = 0
    _sent: bytes = b""
    _report: Callable[[AckRequest], None] | None = None

    async def begin(self, session: int, on_request: Callable[[AckRequest], None]) -> None:
        self._session, self._report, self._sent, self.state = session, on_request, b"", "PRE_COPY"
        self._ask()

    def _ask(self) -> None:
        self.generation += 1
        if self._report is not None:
            self._report(AckRequest(self.device, self.generation))

    async def run_precopy(self, send: SendFrame) -> None:
        answered = 0
        while True:
            if answered < self.generation:
                answered = self.generation
                data = f"{self.device} initial {answered}".encode() * 100
                self._sent += data
                await send(Frame(self.device, self._session, FrameKind.PRECOPY, answered, data))
                await send(Frame(self.device, self._session, FrameKind.INITIAL_SENT, answered))
            await asyncio.sleep(0.01)

    async def hook(self, name: str) -> None:
        self.calls.append(name)
        if name == self.late_at and self.late_times:
            self.late_times -= 1
            self._ask()

    async def quiesce(self) -> FinalQuery:
        self.state = "PRE_COPY_P2P"
        return FinalQuery(AckRequest(self.device, self.generation), 4)

    async def stop_copy(self) -> None:
        self.state = "STOP_COPY"

    async def stop_copy_frames(self) -> AsyncIterator[Frame]:
        if self.state != "STOP_COPY":
            raise ShimError(f"{self.device} is {self.state}")
        self._sent += b"rest"
        yield Frame(self.device, self._session, FrameKind.STOP_COPY, data=b"rest")
        total, summed = len(self._sent), digest(self._sent)
        yield Frame(self.device, self._session, FrameKind.END, total_bytes=total, digest=summed)

    async def roll_back(self) -> None:
        self.state = "RUNNING"

    async def retire(self) -> None:
        self.state = "RETIRED"


@dataclass
class FakeDestinationShim:
    """See `DestinationShim`. `spoil` loses a byte, so that validation must refuse."""

    device: str
    spoil: bool = False
    state: str = "RUNNING"
    _session: int = 0
    _data: bytes = b""
    _end: Frame | None = None

    async def begin_load(self, session: int) -> None:
        self._session, self._data, self._end, self.state = session, b"", None, "RESUMING"

    async def load(self, frame: Frame) -> AckRequest | None:
        if frame.kind is FrameKind.INITIAL_SENT:
            return AckRequest(self.device, frame.generation)
        if frame.kind is FrameKind.END:
            self._end = frame
        self._data += frame.data[:-1] if self.spoil and frame.kind is FrameKind.STOP_COPY else frame.data
        return None

    async def validate(self) -> Load:
        if self._end is None or self._end.digest != digest(self._data):
            raise ShimError(f"{self.device}: what was loaded is not what was sent")
        self.state = "STOP"
        return Load(self.device, self._session, len(self._data), digest(self._data))

    async def activate(self) -> None:
        self.state = "RUNNING"

    async def discard(self) -> None:
        self.state = "RESET"
