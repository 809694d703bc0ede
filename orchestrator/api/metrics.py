"""What one API process tells a Prometheus (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

from orchestrator.ledger import paths
from orchestrator.ledger.store import SessionState, Store
from orchestrator.metrics import LedgerProbe, OfThisProcess


class ApiMetrics:
    """One set per process."""

    def __init__(self, registry: CollectorRegistry, store: Store, watches: Callable[[], int]) -> None:
        self.registry = registry
        self._requests = Counter(
            "drover_requests", "Calls that have ended, watches among them", ("method", "code"), registry=registry
        )
        Gauge("drover_watches", "Watches under way", registry=registry).set_function(watches)
        Gauge("drover_ledger_connected", "1: the session with ZooKeeper stands", registry=registry).set_function(
            lambda: store.session is SessionState.CONNECTED
        )
        self.ledger = LedgerProbe(registry, lambda: store.read(paths.epoch()))
        registry.register(OfThisProcess())

    def answered(self, method: str, code: str) -> None:
        """A call of a method that there is has ended."""
        self._requests.labels(method.rpartition("/")[2], code).inc()
