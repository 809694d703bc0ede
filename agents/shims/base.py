"""The port to the device shims: one per device and per end of a migration.

States are those of VFIO migration v2 (docs/shims.md). A shim that takes part obeys assumption A9: no outward effect
and no interrupt after STOP_COPY, validation without side effects, nothing outward before activation. The device itself
lives outside the VMM *and* outside the agent (a DPU; here a device process), so it survives a restart of the agent;
`roll_back` and `reset` therefore have to be callable by an agent that never saw the session begin.

All calls are bounded and raise `ShimError`. All are idempotent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from agents.shims.inside import InVmmDevice
from orchestrator.core.ids import AckRequest


class Refusal(StrEnum):
    """What a program that answered has against a call."""

    WRONG = "wrong"
    """What it was told is wrong, and will be the next time."""
    UNWILLING = "unwilling"
    """Not now, or not at all."""


class ShimError(Exception):
    """The device refused, failed or did not answer in time. `reset` tells whether it lost its state, `refusal` what its
    program has against the call; None: it failed."""

    def __init__(self, message: str, *, reset: bool = False, refusal: Refusal | None = None) -> None:
        super().__init__(message)
        self.reset = reset
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class WrongOption:
    """What a device's program has against one of the options of its specification."""

    device: str
    option: str
    """Its name and what in it is wrong, such as `colours[2]`; empty: the program named none."""
    message: str

    def __str__(self) -> str:
        return f"device {self.device}: {f'{self.option}: ' if self.option else ''}{self.message}"


class OptionsRefused(ShimError):
    """A device's program does not take the device's options: no device was made. There is at least one of `wrong`."""

    def __init__(self, wrong: Sequence[WrongOption]) -> None:
        super().__init__("; ".join(map(str, wrong)), refusal=Refusal.WRONG)
        self.wrong = tuple(wrong)


class FrameKind(StrEnum):
    """What a frame carries, in the order in which a device sends them; INITIAL_SENT and END carry no data."""

    PRECOPY = "precopy"
    INITIAL_SENT = "initial_sent"
    """All initial bytes of `generation` were sent."""
    STOP_COPY = "stop_copy"
    END = "end"
    """Total bytes and digest (blake2b-16) of all data of the session, in order."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One piece of one device's state on its way. Byte order is kept, segmentation is not."""

    device: str
    session: int
    kind: FrameKind
    generation: int = 0
    data: bytes = b""
    total_bytes: int = 0
    digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Load:
    """What a destination device has loaded and validated."""

    device: str
    session: int
    bytes: int
    digest: bytes


SendFrame = Callable[[Frame], Awaitable[None]]
"""Back-pressure: returns when the frame was handed to the channel."""


@dataclass(frozen=True, slots=True)
class FinalQuery:
    """Answer of the one look after the stop: the newest generation asked for, and what stop-copy will carry."""

    newest: AckRequest | None
    stop_copy_bytes: int


class InVmmDevices(Protocol):
    """The devices inside one VMM, as far as they can be asked about. Calls are bounded and raise ShimError."""

    async def look(self) -> tuple[InVmmDevice, ...]:
        """All of them, in the order of the guest's specification."""
        ...


class SourceShim(Protocol):
    """The device at the source. One session per attempt, generation counted by the device and never reset."""

    device: str

    async def begin(self, session: int, on_request: Callable[[AckRequest], None]) -> None:
        """RUNNING -> PRE_COPY. Requests (first, REINIT, scripted) are reported as the device makes them."""
        ...

    async def run_precopy(self, send: SendFrame) -> None:
        """Send initial and dirty data and INITIAL_SENT markers until cancelled or quiesced. Not bounded; cancel it."""
        ...

    async def hook(self, name: str) -> None:
        """The attempt reached a point that devices may care about: see `ShimService.ReachHook`."""
        ...

    async def quiesce(self) -> FinalQuery:
        """PRE_COPY -> PRE_COPY_P2P, then the final query. The guest is stopped. From RUNNING (paused guest) as well."""
        ...

    async def stop_copy(self) -> None:
        """PRE_COPY_P2P -> STOP_COPY."""
        ...

    def stop_copy_frames(self) -> AsyncIterator[Frame]:
        """The rest of the state, closed by END."""
        ...

    async def roll_back(self) -> None:
        """Any state -> RUNNING, session ended, device state kept. Raises ShimError(reset=True) if it needed a reset."""
        ...

    async def retire(self) -> None:
        """The guest is the destination's: end the device here."""
        ...


class DestinationShim(Protocol):
    """The device at the destination."""

    device: str

    async def begin_load(self, session: int) -> None:
        """-> RESUMING. Resets whatever an earlier attempt left."""
        ...

    async def load(self, frame: Frame) -> AckRequest | None:
        """Apply one frame. For INITIAL_SENT returns the ACK once everything before it is loaded."""
        ...

    async def validate(self) -> Load:
        """RESUMING -> STOP: integrate and check against END. After a ShimError nothing may be reported as loaded."""
        ...

    async def activate(self) -> None:
        """STOP -> RUNNING. Only after the marker is written."""
        ...

    async def discard(self) -> None:
        """Forget everything that was loaded (`reset`) and end the device here."""
        ...
