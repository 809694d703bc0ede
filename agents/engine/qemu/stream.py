"""The connection that a guest's memory goes out through: made here, and handed to QEMU as an open descriptor.

QEMU leaves Nagle's algorithm on for its migration stream. What it writes in one go is less than one segment where the
path takes large ones; the kernel then keeps the next piece back until the one before it is acknowledged, and the
destination's kernel acknowledges with a delay of 40 ms. That happens at the end of a migration, while the guest stands
still (docs/adr/0032-the-agent-opens-the-stream.md).

And QEMU takes for sent what the kernel has taken, which is megabytes: what waits there when the guest is stopped goes
out before the end does. Here the kernel takes little more than the link carries away.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from agents.engine.base import EngineError
from orchestrator.core.endpoint import Endpoint

_INT_MAX = (1 << 31) - 1
_QUEUED_MS = 1
_QUEUED_LEAST_BYTES = 128 << 10
"""A few of QEMU's writes: fewer, and it would be woken for each of them."""


async def opened(endpoint: Endpoint, link_bytes_per_s: int, timeout_s: float, greeting: bytes = b"") -> socket.socket:
    """A connection without delays, in the blocking mode that QEMU expects; the caller closes it. It has said
    `greeting`.

    What is written waits in this host's kernel for about a millisecond of `link_bytes_per_s` and no longer.
    Raises EngineError when nobody takes it in time.
    """
    family = socket.AF_INET6 if ":" in endpoint.ip else socket.AF_INET
    with contextlib.ExitStack() as unless_opened:
        made = unless_opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        queued_bytes = max(_QUEUED_LEAST_BYTES, link_bytes_per_s * _QUEUED_MS // 1000)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, min(queued_bytes, _INT_MAX))
        try:
            async with asyncio.timeout(timeout_s):
                loop = asyncio.get_running_loop()
                await loop.sock_connect(made, (endpoint.ip, endpoint.port))
                await loop.sock_sendall(made, greeting)
        except TimeoutError:
            said = f"the destination does not take the stream at {endpoint}: no answer in {timeout_s:g} s"
            raise EngineError(said) from None
        except OSError as error:
            raise EngineError(f"the destination does not take the stream at {endpoint}: {error.strerror}") from error
        made.setblocking(True)
        unless_opened.pop_all()
    return made
