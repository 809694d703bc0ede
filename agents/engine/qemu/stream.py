"""The connection that a guest's memory goes out through: made here, and handed to QEMU as an open descriptor.

QEMU leaves Nagle's algorithm on for its migration stream. What it writes in one go is less than one segment where the
path takes large ones; the kernel then keeps the next piece back until the one before it is acknowledged, and the
destination's kernel acknowledges with a delay of 40 ms. That happens at the end of a migration, while the guest stands
still (docs/adr/0032-the-agent-opens-the-stream.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from agents.engine.base import EngineError
from orchestrator.core.endpoint import Endpoint


async def opened(endpoint: Endpoint, timeout_s: float) -> socket.socket:
    """A connection without delays, in the blocking mode that QEMU expects; the caller closes it.

    Raises EngineError when nobody takes it in time.
    """
    family = socket.AF_INET6 if ":" in endpoint.ip else socket.AF_INET
    with contextlib.ExitStack() as unless_opened:
        made = unless_opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(made, (endpoint.ip, endpoint.port))
        except TimeoutError:
            said = f"the destination does not take the stream at {endpoint}: no answer in {timeout_s:g} s"
            raise EngineError(said) from None
        except OSError as error:
            raise EngineError(f"the destination does not take the stream at {endpoint}: {error.strerror}") from error
        made.setblocking(True)
        unless_opened.pop_all()
    return made
