"""The metrics' port, to which strangers connect: bounded in number and in time, and still of use meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter

from orchestrator import exposition as served
from orchestrator.exposition import Exposition


async def asked(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(10):
        answer = await reader.read(-1)
    writer.close()
    return answer


GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_metrics_are_told() -> None:
    registry = CollectorRegistry()
    Counter("drover_tries", "Tries", registry=registry).inc(3)
    exposition = Exposition(registry)
    port = await exposition.start("127.0.0.1", 0)
    answer = await asked(port, GET)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"drover_tries_total 3.0" in answer
    assert b"drover_tries" not in await asked(port, b"HEAD / HTTP/1.0\r\n\r\n")
    for request in (b"POST /metrics HTTP/1.1\r\n\r\n", b"GET /etc/passwd HTTP/1.1\r\n\r\n", b"\0\0\r\n\r\n"):
        assert b" 404 " in await asked(port, request)
    openmetrics = await asked(port, GET[:-2] + b"Accept: application/openmetrics-text; version=1.0.0\r\n\r\n")
    assert b"application/openmetrics-text" in openmetrics
    await exposition.close()


async def test_the_descriptors_of_the_process_are_told() -> None:
    exposition = Exposition(REGISTRY)
    answer = await asked(await exposition.start("127.0.0.1", 0), GET)
    assert b"process_open_fds " in answer
    assert b"process_max_fds " in answer
    await exposition.close()


async def test_who_asks_for_nothing_takes_no_thread_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "ANSWER_S", 0.3)
    exposition = Exposition(CollectorRegistry())
    port = await exposition.start("127.0.0.1", 0)
    threads = threading.active_count()
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3 * served.MAX_CONNECTIONS)]
    idle[0][1].write(b"GET /met")
    async with asyncio.timeout(10):
        for reader, _ in idle:  # each of them is closed by the other side
            with contextlib.suppress(ConnectionError):
                assert await reader.read(-1) == b""
    assert threading.active_count() == threads
    assert (await asked(port, GET)).startswith(b"HTTP/1.1 200 OK\r\n")
    too_long = await asyncio.gather(asked(port, b"x" * 100_000), return_exceptions=True)
    assert too_long == [b""] or isinstance(too_long[0], ConnectionError)
    await exposition.close()
