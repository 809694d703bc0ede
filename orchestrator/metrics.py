"""What every process of Drover tells a Prometheus about itself, and how it is served (docs/metrics.md)."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator

import structlog
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator import descriptors
from orchestrator.core.endpoint import split_address
from orchestrator.exposition import Exposition
from orchestrator.tasks import failures
from orchestrator.telemetry import lost_lines

log = structlog.get_logger(__name__)

PROBE_S = 5.0
AGAIN_S = 5.0
_LEDGER_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


LAG_S = 0.5
_LAG_KEPT = 120


class LoopLag:
    """How late the event loop was, looked at every LAG_S: everything that it serves was as late. `look` is a task's."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=_LAG_KEPT)

    async def look(self) -> None:
        """One look. Never raises."""
        loop = asyncio.get_running_loop()
        due_s = loop.time() + LAG_S
        await asyncio.sleep(LAG_S)
        self._seen.append(max(0.0, loop.time() - due_s))

    @property
    def worst_s(self) -> float:
        """Of the last minute; 0 before the first look."""
        return max(self._seen, default=0.0)


lag = LoopLag()
"""Of this process: it has one event loop."""


class OfThisProcess(Collector):
    """What the process counts by itself, wherever it happens."""

    def collect(self) -> Iterator[Metric]:
        """All counters and gauges, read at this moment. Blocks on nothing."""
        tasks = CounterMetricFamily(
            "drover_task_failures", "Exceptions that ended a turn of a background task, or it", labels=("task",)
        )
        for name, count in list(failures.items()):
            tasks.add_metric([name], count)
        yield tasks
        lost = "Log lines that could not be written: a full disk, or one that is too slow"
        yield CounterMetricFamily("drover_log_lines_lost", lost, value=lost_lines())
        late = "The longest that the event loop was late, in the last minute"
        yield GaugeMetricFamily("drover_loop_lag_seconds", late, value=lag.worst_s)
        reserve = "1: descriptors have run out, and those that are kept back are in use"
        yield GaugeMetricFamily("drover_descriptor_reserve_used", reserve, value=int(descriptors.reserve.released))


class LedgerProbe:
    """How long the ledger takes for a small read, asked for every PROBE_S whatever else is asked of it."""

    def __init__(
        self,
        registry: CollectorRegistry,
        read: Callable[[], Awaitable[object]],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._clock_s = clock_s
        self._took = Histogram(
            "drover_ledger_read_seconds",
            "A small read of ZooKeeper, or how long it was until that failed",
            ("outcome",),
            buckets=_LEDGER_S,
            registry=registry,
        )

    async def look(self) -> None:
        """One read. Raises nothing that the read raises: it is counted."""
        began_s = self._clock_s()
        try:
            await self._read()
        except Exception:
            outcome = "FAILED"
        else:
            outcome = "OK"
        self._took.labels(outcome).observe(self._clock_s() - began_s)


async def serve(registry: CollectorRegistry, address: str, port: int) -> Exposition:
    """A port that is in use costs the metrics and nothing else. The caller closes what it gets."""
    exposition = Exposition(registry)
    try:
        await exposition.start(address, port)
    except OSError as error:
        log.error("metrics are not served", address=address, port=port, error=str(error))
    return exposition


async def serve_on(registry: CollectorRegistry, listen: str) -> None:
    """At `host:port`, until cancelled. While the port is in use it is tried again every AGAIN_S: a process that was
    restarted may find its predecessor there."""
    host, port = split_address(listen)
    told = False
    while True:
        exposition = Exposition(registry)
        try:
            await exposition.start(host, port)
        except OSError as error:
            if not told:
                log.error("metrics are not served yet, trying again", listen=listen, error=str(error))
            told = True
            await asyncio.sleep(AGAIN_S)
            continue
        try:
            await asyncio.Event().wait()
        finally:
            await exposition.close()
