"""The port to the agent at the other end of an attempt. Calls are idempotent, bounded, and raise `PeerUnavailable`."""

from __future__ import annotations

from typing import Protocol

from agents.shims.base import Frame, Load
from orchestrator.core.ids import AckRequest


class PeerUnavailable(Exception):
    """No answer in time: the call may have arrived. Repeat it or let the ledger decide."""


class DestinationPeer(Protocol):
    """What a source says to its destination, for one attempt and `inc`."""

    async def ping(self) -> bool:
        """The peer answers and knows the attempt."""
        ...

    async def send_frame(self, frame: Frame) -> None: ...

    async def go(self, want_run: bool) -> bool:
        """True: answered once the guest had been started there (or left stopped, as wished)."""
        ...


class SourcePeer(Protocol):
    """What a destination says to its source."""

    async def ack(self, entry: AckRequest) -> None: ...

    async def loaded(self, inc: str, loads: tuple[Load, ...]) -> None: ...

    async def failed(self, inc: str) -> None: ...

    async def done(self, inc: str) -> None: ...
