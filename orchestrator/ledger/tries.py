"""Looking and writing until a write is not lost to somebody else's.

Every write checks the versions it was made from, so of two writers at once one has to look again. Most races end with
the second try; the bound is for a node that never rests.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

TRIES = 20


async def _at_once() -> None: ...


class Tries:
    """The bound of one loop: `while True`, whose body begins with `another`, looks, writes, and returns once it won."""

    def __init__(
        self,
        lost: Callable[[], Exception],
        *,
        pause: Callable[[], Awaitable[None]] = _at_once,
        at_most: int = TRIES,
    ) -> None:
        """`lost` makes what is raised after `at_most` tries. `pause` stands between two, and may raise to end them."""
        self._lost = lost
        self._pause = pause
        self._left = at_most
        self._begun = False

    async def another(self) -> None:
        """Wait for the next try; the first comes at once. Raises what `lost` makes, or what `pause` raises."""
        if self._begun:
            await self._pause()
        if not self._left:
            raise self._lost()
        self._begun, self._left = True, self._left - 1
