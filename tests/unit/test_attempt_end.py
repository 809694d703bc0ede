"""What follows when an attempt is over, at its source: the report, which has the destination's half, and the copy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from grpc import aio
from prometheus_client import CollectorRegistry

from agents.engine.base import HoldStart, OutgoingOptions, VmmSpec
from agents.guest.copies import Copy
from agents.guest.files import GuestFiles
from agents.handover import attempt as attempts
from agents.handover.attempt import Departure
from agents.handover.ledger import AttemptLedger
from agents.handover.peer import GrpcDestinationPeer
from agents.handover.source import SourceStage, SourceState
from agents.handover.source_shell import SourceShell
from agents.host.journal import Journal
from agents.host.metrics import Metrics
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import AttemptReport, GuestSpec, TimelineEntry
from orchestrator.rpc import channels
from tests.fakes.config import agent_config
from tests.fakes.coordination import MemoryStore
from tests.fakes.engine import FakeEngine

HERE, REF = HostRef("s", "1"), AttemptRef("g", "m", 1)
LOST = TimelineEntry(1.0, "d", "devices_lost", "nic")


@pytest.fixture
async def channel() -> AsyncIterator[aio.Channel]:
    async with channels.aio_channel("127.0.0.1:1") as made:
        yield made


def kept(departure: Departure) -> AttemptReport:
    report = departure.journal.report("m", 1)
    assert report is not None
    return report


async def over(directory: Path, channel: aio.Channel, stage: SourceStage) -> Departure:
    """An attempt whose end the ledger has told already."""
    vmm = await FakeEngine().start(VmmSpec("g", "s", GuestSpec("web"), directory, directory / "con", None))
    ledger = AttemptLedger(MemoryStore(), REF, HERE, "i", "w")
    peer = GrpcDestinationPeer(channel, REF, "i")
    options = OutgoingOptions(Endpoint("127.0.0.1", 1), HoldStart.OPEN, 0, 1, 1)
    state = SourceState(REF, HERE, "i", stage=stage)
    shell = SourceShell(state, vmm, (), ledger, peer, MigrationPolicy(), options, 1)
    files = GuestFiles(agent_config(directory, "s"), "g", GuestSpec("web"))
    copy = Copy(files, vmm, None, running=True)
    journal, metrics = Journal(directory / "journal"), Metrics(CollectorRegistry())
    return Departure(shell, copy, peer, "d", journal, metrics, lambda: None)


async def test_a_device_that_lost_its_state_is_reported_though_the_ledger_told_the_end_first(
    tmp_path: Path, channel: aio.Channel
) -> None:
    departure = await over(tmp_path, channel, SourceStage.ENDED_COMMITTED)
    conducted = asyncio.create_task(departure.conduct())
    await asyncio.sleep(0.05)
    assert not conducted.done()
    assert departure.journal.report("m", 1) is None
    departure.done([LOST])
    await conducted
    assert kept(departure).devices == ("nic",)


@pytest.mark.parametrize("stage", [SourceStage.ENDED_ABORTED, SourceStage.ENDED_COMMITTED])
async def test_a_destination_that_tells_nothing_holds_up_nobody(
    tmp_path: Path, channel: aio.Channel, stage: SourceStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_TOLD_S", 0.05)
    departure = await over(tmp_path, channel, stage)
    await departure.conduct()
    assert kept(departure).outcome == stage.name.removeprefix("ENDED_")


async def test_an_attempt_that_is_over_gives_its_copy_back(tmp_path: Path, channel: aio.Channel) -> None:
    departure = await over(tmp_path, channel, SourceStage.ENDED_ABORTED)
    assert departure.copy.in_session
    await departure.conduct()
    assert not departure.copy.in_session


async def test_nothing_is_left_of_a_copy_that_is_dead_when_its_attempt_is_over(
    tmp_path: Path, channel: aio.Channel
) -> None:
    departure = await over(tmp_path, channel, SourceStage.ENDED_ABORTED)
    marker = departure.copy.files.marker(departure.copy.inc)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    await departure.copy.vmm.destroy()
    await departure.conduct()
    assert not marker.exists()


async def test_a_restarted_agent_keeps_the_report_that_the_earlier_one_made(
    tmp_path: Path, channel: aio.Channel
) -> None:
    departure = await over(tmp_path, channel, SourceStage.ENDED_ABORTED)
    earlier = replace(departure.report(), message="of the earlier agent")
    departure.journal.keep("m", earlier)
    await departure.conduct(())
    assert kept(departure) == earlier


async def test_an_attempt_whose_shell_failed_is_over_as_well(
    tmp_path: Path, channel: aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "FAILED_S", 0.0)
    departure = await over(tmp_path, channel, SourceStage.NEW)

    async def fail(first: object) -> SourceState:
        raise ZeroDivisionError

    monkeypatch.setattr(departure.shell, "run", fail)
    await departure.conduct()
    assert not departure.copy.in_session
    assert departure.journal.report("m", 1) is None


async def test_a_sampler_goes_on(tmp_path: Path, channel: aio.Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "FAILED_S", 0.01)
    monkeypatch.setattr(attempts, "_SAMPLE_S", 0.01)
    departure = await over(tmp_path, channel, SourceStage.NEW)
    samples, enough = 0, asyncio.Event()

    async def sample() -> None:
        nonlocal samples
        samples += 1
        if samples < 3:
            raise TimeoutError
        if samples == 4:
            enough.set()

    monkeypatch.setattr(departure, "sample", sample)
    conducted = asyncio.create_task(departure.conduct())
    async with asyncio.timeout(10):
        await enough.wait()
    conducted.cancel()
    await asyncio.wait({conducted})
    seen = samples
    await asyncio.sleep(0.05)
    assert samples == seen, "it ends with its attempt"
