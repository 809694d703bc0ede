"""Whatever raises while a guest is kept, sampled, adopted or scanned: it is tried again, counted, and said."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from agents.guest.keeper import HostedGuest
from agents.host.metrics import Metrics
from orchestrator.core.agent import Trouble
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.records import GuestSpec, WantRun
from orchestrator.ledger import paths
from orchestrator.ledger.records import BadRecord
from orchestrator.ledger.store import Versioned
from orchestrator.tasks import failures
from tests.unit.test_lost_ledger import HERE, THERE, G, House, until

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


@pytest.mark.parametrize("step", ["_clear", "files"])
async def test_an_agent_that_is_killed_while_a_guest_is_ended_leaves_no_copy_behind(
    house: House, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Its record says GONE, and its VMM stands paused: the next agent discards it, since its name is free."""
    await house.agent.start()
    await house.born()
    (vmm,) = house.mover.processes.values()
    with monkeypatch.context() as patched:

        def killed(*_: object) -> None:
            raise asyncio.CancelledError

        async def ended(_: HostedGuest) -> None:
            pass

        patched.setattr(HostedGuest, "_keep_once", ended)
        owner = HostedGuest if step == "_clear" else type(vmm)
        patched.setattr(owner, step if step == "_clear" else "destroy", killed)
        with pytest.raises(asyncio.CancelledError):
            await house.agent._known(G).end()
        await house.agent.stop()
    assert house.world.record(G).phase is Ownership.GONE
    assert list(house.mover.processes.values()) == [vmm], "the copy is there"
    house.agent = house.made()
    await house.agent.start()
    await until(lambda: not house.mover.processes)
    await until(lambda: house.agent._guests[G].forgotten)
    assert not vmm.spec.directory.exists()
    assert not house.agent.status().copies
    await house.agent.stop()


async def test_a_duty_that_cannot_be_done_is_told_once_and_when_it_changes(house: House) -> None:
    """It filled the log with a line every few seconds, for as long as the record stayed wrong."""
    await house.agent.start()
    await house.born()
    right = house.world.record(G)
    with capture_logs() as lines:
        house.world.put(paths.guest(G), replace(right, owner=THERE))
        house.agent.nudge(G)
        await until(lambda: house.trouble() is Trouble.NOT_KEPT)
        for _ in range(5):
            await house.looked()

        def told() -> list[str]:
            return [line["do"] for line in lines if line["event"] == "keeping"]

        assert told() == ["refuse_owner"]
        assert [line["event"] for line in lines].count("a guest is not kept: trying again") == 1
        house.world.put(paths.guest(G), right)
        house.agent.nudge(G)
        await until(lambda: house.trouble() is None)
        house.world.put(paths.guest(G), replace(right, owner=THERE))
        house.agent.nudge(G)
        await until(lambda: told() == ["refuse_owner"] * 2)
    assert len(house.mover.processes) == 1
    await house.agent.stop()


async def test_one_unreadable_record_hides_no_other_from_the_scan(house: House) -> None:
    await house.agent.start()
    for uuid, data in (("a" * 32, b"{"), ("b" * 32, None)):
        house.world.put(paths.guest(uuid), GuestRecord(uuid, Ownership.IDLE, HERE))
        house.world.put(paths.guest_spec(uuid), GuestSpec(uuid))
        house.world.put(paths.host_guest(HERE.host, uuid), "")
        house.world.put(paths.want_run(uuid), WantRun())
        if data is not None:
            for path in (paths.guest(uuid), paths.guest_spec(uuid)):
                house.world.store.tree.nodes[path] = Versioned(data, 0, 0)
    await house.agent._scan({}, 0.0)
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
