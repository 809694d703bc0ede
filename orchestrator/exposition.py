"""Serves metrics to a Prometheus, from the event loop: a bounded number of connections, each for a bounded time.

Strangers reach this port. Each connection costs one descriptor and no thread, and is over after `ANSWER_S`, whether its
request came or not; what is beyond `MAX_CONNECTIONS` is closed at once.
"""

from __future__ import annotations

import asyncio
import contextlib

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

log = structlog.get_logger(__name__)

MAX_CONNECTIONS = 16
ANSWER_S = 5.0
"""For one connection, from its beginning to its end."""
_MAX_REQUEST = 8192


class Exposition:
    """`GET /metrics` (or `/`) of one registry. `start` once, `close` once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._server: asyncio.Server | None = None
        self._open = 0
        self._collecting = asyncio.Lock()

    async def start(self, address: str, port: int) -> int:
        """The port, also where 0 was asked for. Raises OSError when the address cannot be used."""
        self._server = await asyncio.start_server(self._connected, address, port, limit=_MAX_REQUEST)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Take no more connections; those that are open end by themselves within ANSWER_S."""
        if self._server is not None:
            self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._open += 1
        try:
            async with asyncio.timeout(ANSWER_S):
                writer.write(await self._answer(reader))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # it did not ask, not in time, or does not listen: nothing of ours is lost
        except Exception:
            log.exception("metrics could not be told")
        finally:
            self._open -= 1
            with contextlib.suppress(RuntimeError):
                writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request, *lines = head.split("\r\n")
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if method not in ("GET", "HEAD") or path not in ("/", "/metrics"):
            return _response("404 Not Found", "text/plain; charset=utf-8", b"ask for GET /metrics\n")
        accept = next((value for line in lines if (value := _header(line, "accept")) is not None), "")
        encode, kind = choose_encoder(accept)
        async with self._collecting:
            body = await asyncio.to_thread(encode, self._registry)
        return _response("200 OK", kind, body, head_only=method == "HEAD")


def _header(line: str, name: str) -> str | None:
    key, colon, value = line.partition(":")
    return value.strip() if colon and key.strip().lower() == name else None


def _response(status: str, kind: str, body: bytes, *, head_only: bool = False) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + (b"" if head_only else body)
