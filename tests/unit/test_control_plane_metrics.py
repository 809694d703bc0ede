"""What API and coordinator tell a Prometheus of themselves."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest

from orchestrator.coordinator.metrics import register
from orchestrator.coordinator.quarantine import Quarantine
from orchestrator.coordinator.supervisor import Status, Supervisor
from orchestrator.core.admission import Admission, Ticket
from orchestrator.core.errors import DroverError
from orchestrator.exposition import Exposition
from orchestrator.ledger.records import BadRecord
from orchestrator.ledger.store import StoreUnavailable
from orchestrator.metrics import LedgerProbe, serve_on
from orchestrator.tasks import failures
from tests.fakes.api import api_cluster
from tests.fakes.coordination import MemoryStore


def told(registry: CollectorRegistry) -> dict[str, float]:
    """Sample by sample, as a Prometheus reads it."""
    lines = generate_latest(registry).decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


async def test_the_api_counts_calls_by_method_and_code(tmp_path: Path) -> None:
    async with api_cluster(MemoryStore(), tmp_path) as api:
        await api.call(api.client.list_guests)
        await api.call(api.client.list_guests)
        for name in ("nobody", "No/body"):
            with pytest.raises(DroverError):
                await api.call(api.client.get_guest, name)
        metrics = api.server.metrics
        await metrics.ledger.look()
        seen = told(metrics.registry)
        assert seen['drover_requests_total{code="OK",method="ListGuests"}'] == 2
        assert seen['drover_requests_total{code="NOT_FOUND",method="GetGuest"}'] == 1
        assert seen['drover_requests_total{code="INVALID_ARGUMENT",method="GetGuest"}'] == 1
        assert seen["drover_watches"] == 0
        assert seen["drover_ledger_connected"] == 1
        assert seen['drover_ledger_read_seconds_count{outcome="OK"}'] >= 1
        assert "drover_descriptor_reserve_used" in seen


async def test_a_ledger_that_does_not_answer_is_counted_and_raises_nothing() -> None:
    registry = CollectorRegistry()

    async def read() -> None:
        raise StoreUnavailable("away")

    await LedgerProbe(registry, read).look()
    assert told(registry)['drover_ledger_read_seconds_count{outcome="FAILED"}'] == 1


class FakeSupervisor:
    def __init__(self, quarantine: Quarantine, admission: Admission) -> None:
        self.status = Status(leading=True, epoch=7, driving=3, finished={"SUCCEEDED": 5})
        self._quarantine = quarantine
        self._places = admission

    set_aside: Callable[..., Counter[tuple[str, ...]]] = Supervisor.set_aside
    queued: Callable[..., Counter[tuple[str, ...]]] = Supervisor.queued


class FakeWorkers:
    replaced = 4
    well = (1, 2)


def test_a_coordinator_tells_what_it_leads_what_is_set_aside_and_who_waits_for_what() -> None:
    quarantine, admission = Quarantine(), Admission(max_concurrent=2, max_per_source=1)
    quarantine.fail("migrations/a", BadRecord("/migs/a: phase FLOATING"))
    quarantine.fail("migrations/b", BadRecord("/migs/b: phase FLOATING"))
    quarantine.fail("evacuations/c", KeyError("x"))
    for number, source in enumerate(("h1", "h1", "h2", "h3")):
        admission.add(Ticket(f"m{number}", source, ""))
    assert len(list(admission.admit())) == 2
    registry = CollectorRegistry()
    failures["a test"] += 1
    supervisor = FakeSupervisor(quarantine, admission)
    register(registry, lambda: supervisor, FakeWorkers)
    seen = told(registry)
    assert (seen["drover_leader"], seen["drover_leader_epoch"], seen["drover_migrations_driven"]) == (1, 7, 3)
    assert seen['drover_quarantined{error="BadRecord",kind="migrations"}'] == 2
    assert seen['drover_quarantined{error="KeyError",kind="evacuations"}'] == 1
    assert seen['drover_migrations_waiting{turn="SOURCE"}'] == 1
    assert seen['drover_migrations_waiting{turn="CLUSTER"}'] == 1
    assert (seen["drover_workers"], seen["drover_workers_well"], seen["drover_workers_replaced_total"]) == (2, 1, 4)
    assert seen['drover_migrations_ended_total{phase="SUCCEEDED"}'] == 5
    assert seen['drover_task_failures_total{task="a test"}'] >= 1


def test_a_coordinator_that_is_only_starting_tells_that_it_does_not_lead() -> None:
    registry = CollectorRegistry()
    register(registry, lambda: None, lambda: None)
    seen = told(registry)
    assert (seen["drover_leader"], seen["drover_leader_epoch"], seen["drover_workers"]) == (0, -1, 0)


async def test_a_port_that_its_predecessor_still_has_is_taken_as_soon_as_it_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orchestrator.metrics.AGAIN_S", 0.01)
    before = Exposition(CollectorRegistry())
    port = await before.start("127.0.0.1", 0)
    registry = CollectorRegistry()
    register(registry, lambda: None, lambda: None)
    serving = asyncio.create_task(serve_on(registry, f"127.0.0.1:{port}"))
    await asyncio.sleep(0.1)
    assert not serving.done()
    await before.close()
    answer = b""
    async with asyncio.timeout(10):
        while b"drover_leader" not in answer:
            await asyncio.sleep(0.02)
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                continue
            writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
            answer = await reader.read(-1)
            writer.close()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
