"""Those who wait for a whole round of reading: one that began after they asked, and did not fail."""

from __future__ import annotations

import asyncio
import contextlib

from orchestrator.ledger.store import StoreUnavailable

Taken = list[asyncio.Future[None]]
"""Those whom the round under way will answer."""


class Askers:
    """Of one reader, which waits for `wake` before each round. Everything runs on one event loop."""

    def __init__(self) -> None:
        self.wake = asyncio.Event()
        """Set by whoever has something to read, and by whoever asks."""
        self._asked: Taken = []
        self._hurry = asyncio.Event()

    @property
    def any(self) -> bool:
        """Somebody waits for a round that has not begun."""
        return bool(self._asked)

    async def answered(self, timeout_s: float, what: str) -> None:
        """Ask, and wait for the answer. Raises StoreUnavailable when there is none in time: `what` was not seen."""
        asked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        self.wake.set()
        self._hurry.set()
        try:
            async with asyncio.timeout(timeout_s):
                await asked
        except TimeoutError as error:
            raise StoreUnavailable(f"{what} was not seen within {timeout_s:g} s") from error

    async def linger(self, seconds: float) -> None:
        """Wait until somebody asks, but not longer: what moves meanwhile is read in one round."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._asked:
                    await self._hurry.wait()
                    self._hurry.clear()

    def take(self) -> Taken:
        """A round begins."""
        taken, self._asked = self._asked, []
        return taken

    def put_back(self, taken: Taken) -> None:
        """It failed: the next one is for them."""
        self._asked = taken + self._asked

    @staticmethod
    def answer(taken: Taken) -> None:
        """It is over."""
        for one in taken:
            if not one.done():
                one.set_result(None)
