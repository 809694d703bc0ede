"""What a coordinator tells a Prometheus (docs/metrics.md): collected from its parts when somebody looks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator.coordinator.supervisor import Status
from orchestrator.metrics import OfThisProcess


class Workers(Protocol):
    """What is told of a pool of workers."""

    replaced: int

    @property
    def well(self) -> tuple[int, int]:
        """How many answer, and how many there are."""
        ...


class Leading(Protocol):
    """What is told of its leadership, of one shard of the fleet or of all."""

    @property
    def status(self) -> Status:
        """Where it stands now; of several shards together."""
        ...

    def set_aside(self) -> Counter[tuple[str, ...]]:
        """How many are quarantined, by the labels of `drover_quarantined`."""
        ...

    def queued(self) -> Counter[tuple[str, ...]]:
        """How many wait for their turn, by the labels of `drover_migrations_waiting`."""
        ...


class OfTheCoordinator(Collector):
    """`supervisor` and `workers` answer None before they are there."""

    def __init__(self, supervisor: Callable[[], Leading | None], workers: Callable[[], Workers | None]) -> None:
        self._supervisor = supervisor
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        """All metrics of the coordinator at this moment, also while it does not lead. Blocks on nothing."""
        supervisor, workers = self._supervisor(), self._workers()
        status = supervisor.status if supervisor is not None else Status()
        yield _gauge("drover_leader", "1: this coordinator leads", int(status.leading))
        yield _gauge("drover_leader_epoch", "Of its leadership, or of its last one; -1: none yet", status.epoch)
        yield _gauge("drover_migrations_driven", "Migrations that its workers drive", status.driving)
        yield _gauge("drover_evacuations_driven", "Evacuations that it carries out", status.jobs)
        yield _gauge("drover_migrations_adopted", "Taken up by this leader since it began", status.adopted)
        ended = CounterMetricFamily("drover_migrations_ended", "Migrations that it saw end", labels=("phase",))
        for phase, number in list(status.finished.items()):
            ended.add_metric([phase], number)
        yield ended
        yield _labelled(
            "drover_quarantined",
            "Set aside and tried again; `error` is the kind of the reason, `drover health` has all of it",
            ("kind", "error"),
            supervisor.set_aside() if supervisor is not None else Counter(),
        )
        yield _labelled(
            "drover_migrations_waiting",
            "Migrations that wait for their turn: SOURCE, too many leave their source; CLUSTER, too many are under way",
            ("turn",),
            supervisor.queued() if supervisor is not None else Counter(),
        )
        well, size = workers.well if workers is not None else (0, 0)
        yield _gauge("drover_workers", "Worker processes that there are to be", size)
        yield _gauge("drover_workers_well", "Those of them that answered when they were last asked", well)
        replaced = workers.replaced if workers is not None else 0
        yield CounterMetricFamily("drover_workers_replaced", "Workers that were silent and replaced", value=replaced)


def register(
    registry: CollectorRegistry, supervisor: Callable[[], Leading | None], workers: Callable[[], Workers | None]
) -> None:
    """All that a coordinator tells, but for its ledger (`orchestrator.metrics.LedgerProbe`)."""
    registry.register(OfThisProcess())
    registry.register(OfTheCoordinator(supervisor, workers))


def _gauge(name: str, said: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, said, value=value)


def _labelled(name: str, said: str, labels: tuple[str, ...], counts: Counter[tuple[str, ...]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, said, labels=labels)
    for values, number in counts.items():
        family.add_metric(values, number)
    return family
