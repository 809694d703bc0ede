"""One bound for a step of several commands."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from agents.engine.base import EngineTimeout


@contextlib.asynccontextmanager
async def bounded(what: str, timeout_s: float) -> AsyncGenerator[None, None]:
    """Raises EngineTimeout, which says `what` is not over."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise EngineTimeout(f"{what}: not over after {timeout_s:g} s") from error
