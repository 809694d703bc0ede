"""What an agent tells a Prometheus: attempts and their ends, blackouts, ACK waits, device bytes (docs/metrics.md).

Counted from reports of attempts that are over, so that nothing is measured inside a blackout.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from agents.shims.inside import ASKS, INITIAL_SENT
from orchestrator.core.records import AttemptReport, DeviceSpec, TimelineEntry
from orchestrator.exposition import Exposition
from orchestrator.metrics import OfThisProcess, serve

_BLACKOUT_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10)
_WAIT_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60)


def ack_waits_s(timeline: tuple[TimelineEntry, ...]) -> list[float]:
    """Seconds from each request for an ACK to its acknowledgement, for those that were acknowledged."""
    asked: dict[str, float] = {}
    waits: list[float] = []
    for entry in timeline:
        if entry.event == "request":
            asked[entry.detail] = entry.at_ms
        elif entry.event == "ack" and entry.detail in asked:
            waits.append(max(0.0, entry.at_ms - asked.pop(entry.detail)) / 1000)
    return waits


def initial_data_waits_s(timeline: tuple[TimelineEntry, ...]) -> list[float]:
    """The same of devices inside the VMM, as far as it can be seen: until each had sent what the ACK is for."""
    asked: dict[str, float] = {}
    waits: list[float] = []
    for entry in sorted((entry for entry in timeline if entry.event == "device"), key=lambda entry: entry.at_ms):
        device, _, what = entry.detail.partition(": ")
        if what.startswith(ASKS):
            asked.setdefault(device, entry.at_ms)
        elif what == INITIAL_SENT and device in asked:
            waits.append((entry.at_ms - asked.pop(device)) / 1000)
    return waits


class Metrics:
    """One set per agent. `gauges` are asked when somebody looks."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._count_attempts(registry)
        self._count_bytes(registry)
        self._show_state(registry)
        registry.register(OfThisProcess())

    def _count_attempts(self, registry: CollectorRegistry) -> None:
        self._attempts = Counter(
            "drover_attempts", "Attempts that this host was the source of", ("outcome", "reason"), registry=registry
        )
        self._late = Counter(
            "drover_late_acks", "Devices that asked for an ACK after the switchover was decided", registry=registry
        )
        self._blackout = Histogram(
            "drover_blackout_seconds",
            "Guest stopped for the switchover: until it ran at the destination (COMMITTED) or here again (ABORTED)",
            ("outcome",),
            buckets=_BLACKOUT_S,
            registry=registry,
        )
        self._ack_wait = Histogram(
            "drover_ack_wait_seconds", "From a request for an ACK to the ACK", buckets=_WAIT_S, registry=registry
        )
        self._initial_wait = Histogram(
            "drover_initial_data_wait_seconds",
            "From a request for an ACK inside the VMM until the device had sent its initial data",
            buckets=_WAIT_S,
            registry=registry,
        )
        self._ledger_writes = Counter("drover_ledger_writes", "Writes of attempts to ZooKeeper", registry=registry)

    def _count_bytes(self, registry: CollectorRegistry) -> None:
        self._sent = Counter("drover_sent_bytes", "Sent by engines of attempts that are over", registry=registry)
        self._device_bytes = Counter(
            "drover_device_declared_bytes",
            "Initial and stop-copy bytes that the devices of committed attempts declare",
            ("kind",),
            registry=registry,
        )
        self._inside_bytes = Counter(
            "drover_device_sent_bytes",
            "Sent by devices inside the VMM: in pre-copy, and after the stop",
            ("kind",),
            registry=registry,
        )
        self._reinits = Counter(
            "drover_device_reinits", "Further ACKs that devices inside the VMM asked it for", registry=registry
        )

    def _show_state(self, registry: CollectorRegistry) -> None:
        self._guests = Gauge("drover_guests", "Guests that this host owns", registry=registry)
        self._under_way = Gauge(
            "drover_attempts_under_way", "Attempts that this host is the source of", registry=registry
        )
        self._quorum_age = Gauge(
            "drover_quorum_age_seconds", "Since ZooKeeper's quorum last answered this agent", registry=registry
        )
        self._mistakes = Gauge(
            "drover_invalid_transitions",
            "Events that no stage of a hand-over takes, since the agent began; each is in its log",
            registry=registry,
        )
        self._place_lost = Gauge(
            "drover_host_place_lost",
            "1: another agent has the host's place",
            registry=registry,
        )
        self._doubted = Gauge(
            "drover_ledger_doubted",
            "1: the ledger is another one than this host has known; nothing it says is believed",
            registry=registry,
        )
        self._not_kept = Gauge(
            "drover_guests_not_kept",
            "Guests of this host that the agent does nothing about just now",
            registry=registry,
        )

    def attempt_over(self, report: AttemptReport, devices: tuple[DeviceSpec, ...]) -> None:
        """Count one attempt, once, when its report is made."""
        self._attempts.labels(report.outcome, str(report.reason or "")).inc()
        if report.reason == "LATE_SWITCHOVER_ACK":
            self._late.inc(max(1, len(report.devices)))
        if report.blackout_ms:
            self._blackout.labels(report.outcome).observe(report.blackout_ms / 1000)
        for wait_s in ack_waits_s(report.timeline):
            self._ack_wait.observe(wait_s)
        for wait_s in initial_data_waits_s(report.timeline):
            self._initial_wait.observe(wait_s)
        self._sent.inc(report.transferred_bytes)
        self._ledger_writes.inc(report.ledger_writes)
        for device in report.device_progress:
            self._inside_bytes.labels("precopy").inc(device.precopy_sent_bytes)
            self._inside_bytes.labels("stop_copy").inc(device.stop_copy_sent_bytes)
            self._reinits.inc(device.reinits)
        if report.outcome == "COMMITTED":
            self._device_bytes.labels("initial").inc(sum(device.initial_bytes for device in devices))
            self._device_bytes.labels("stop_copy").inc(sum(device.stop_copy_bytes for device in devices))

    def gauges(
        self,
        *,
        guests: Callable[[], int],
        under_way: Callable[[], int],
        quorum_age_s: Callable[[], float],
        mistakes: Callable[[], int] = lambda: 0,
        place_lost: Callable[[], int] = lambda: 0,
        ledger_doubted: Callable[[], int] = lambda: 0,
        not_kept: Callable[[], int] = lambda: 0,
    ) -> None:
        """Where to ask for what is the case at the moment of a scrape; the calls must not block."""
        self._not_kept.set_function(not_kept)
        self._guests.set_function(guests)
        self._under_way.set_function(under_way)
        self._quorum_age.set_function(quorum_age_s)
        self._mistakes.set_function(mistakes)
        self._place_lost.set_function(place_lost)
        self._doubted.set_function(ledger_doubted)

    async def serve(self, address: str, port: int) -> Exposition:
        """A port that is in use costs the metrics and nothing else. The caller closes what it gets."""
        return await serve(self._registry, address, port)
