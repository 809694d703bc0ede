"""Whatever raises while a guest is kept, sampled, adopted or scanned: it is tried again, counted, and said."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from agents.guest.keeper import HostedGuest
from agents.host.metrics import Metrics
from orchestrator.core.agent import Trouble
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.records import GuestSpec, WantRun
from orchestrator.ledger import paths
from orchestrator.ledger.records import BadRecord
from orchestrator.ledger.store import Versioned
from orchestrator.tasks import failures
from tests.unit.test_lost_ledger import HERE, G, House, until

ERRORS = (
    TimeoutError("the device process is not dead after 2 s"),
    ZeroDivisionError("division by zero"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("a fault of ours"),
    AssertionError(),
    BadRecord("/guests/x: unreadable"),
)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("RETRY_S", 0.02), ("RESYNC_S", 0.1)):
        monkeypatch.setattr(f"agents.guest.keeper.{name}", seconds)


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.mark.parametrize("error", ERRORS, ids=repr)
async def test_a_keeper_goes_on(house: House, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    await house.agent.start()
    await house.born()
    with monkeypatch.context() as patched:

        async def fail(_: HostedGuest) -> None:
            raise error

        patched.setattr(HostedGuest, "_keep_once", fail)
        await house.looked()
        wanted = Trouble.UNREADABLE if isinstance(error, BadRecord) else Trouble.NOT_KEPT
        await until(lambda: house.trouble() is wanted)
        (trouble,) = house.agent.status().troubles
        assert (trouble.guest, trouble.name) == (G, "web")
        assert trouble.message
    await until(lambda: house.trouble() is None)
    (vmm,) = house.mover.processes.values()
    vmm.die()
    await until(lambda: house.world.record(G).phase is Ownership.CRASHED)
    await house.agent.stop()


async def test_a_guest_that_cannot_be_adopted_stops_nobody_else(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    await house.agent.start()
    await house.born()
    await house.agent.stop()
    other = "1f0e0d0c-0b0a-4987-8654-321001234567"
    house.world.put(paths.guest(other), GuestRecord("db", Ownership.STARTING, HERE))
    house.world.put(paths.guest_spec(other), GuestSpec("db"))
    house.world.put(paths.want_run(other), WantRun())
    before = failures["keeper"]
    with monkeypatch.context() as patched:

        async def fail(_: HostedGuest) -> None:
            raise ZeroDivisionError

        patched.setattr(HostedGuest, "adopt_left", fail)
        house.agent = house.made()
        await house.agent.start()
        assert house.trouble() is Trouble.NOT_KEPT
        assert not house.agent.status().complete
    assert failures["keeper"] > before
    await house.agent.start_guest(other)
    await until(lambda: house.agent.status().complete)
    assert {copy.name for copy in house.agent.status().copies} == {"web", "db"}
    await house.agent.stop()


async def test_one_unreadable_record_hides_no_other_from_the_scan(house: House) -> None:
    await house.agent.start()
    for uuid, data in (("a" * 32, b"{"), ("b" * 32, None)):
        house.world.put(paths.guest(uuid), GuestRecord(uuid, Ownership.IDLE, HERE))
        house.world.put(paths.guest_spec(uuid), GuestSpec(uuid))
        house.world.put(paths.want_run(uuid), WantRun())
        if data is not None:
            for path in (paths.guest(uuid), paths.guest_spec(uuid)):
                house.world.store.tree.nodes[path] = Versioned(data, 0, 0)
    await house.agent._scan(set())
    await until(lambda: house.world.record("b" * 32).phase is Ownership.CRASHED)
    await house.agent.stop()


def test_what_failed_is_told_to_whoever_reads_the_metrics() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.gauges(guests=lambda: 1, under_way=lambda: 0, quorum_age_s=lambda: 0.0, not_kept=lambda: 2)
    failures["keeper"] += 1
    value = registry.get_sample_value
    assert (value("drover_task_failures_total", {"task": "keeper"}) or 0) >= 1
    assert value("drover_log_lines_lost_total") is not None
    assert value("drover_guests_not_kept") == 2
