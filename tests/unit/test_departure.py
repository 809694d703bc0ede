"""What an agent keeps of an attempt that left: the destination's half of the story belongs to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from grpc import aio

from agents.engine.base import HoldStart, OutgoingOptions, VmmSpec
from agents.guest.copies import Copy
from agents.handover import departure as departing
from agents.handover.departure import Departure
from agents.handover.ledger import AttemptLedger
from agents.handover.peer import DestinationClient
from agents.handover.source import SourceStage, SourceState
from agents.handover.source_shell import SourceShell
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import GuestSpec, TimelineEntry
from orchestrator.rpc import channels
from tests.fakes.coordination import MemoryStore
from tests.fakes.engine import FakeEngine

HERE, REF = HostRef("s", "1"), AttemptRef("g", "m", 1)
LOST = TimelineEntry(1.0, "d", "devices_lost", "nic")


@pytest.fixture
async def channel() -> AsyncIterator[aio.Channel]:
    async with channels.aio_channel("127.0.0.1:1") as made:
        yield made


async def over(directory: Path, channel: aio.Channel, stage: SourceStage) -> Departure:
    """An attempt whose end the ledger has told already."""
    vmm = await FakeEngine().start(VmmSpec("g", "s", GuestSpec("web"), directory, directory / "con", None))
    ledger = AttemptLedger(MemoryStore(), REF, HERE, "i", "w")
    peer = DestinationClient(channel, REF, "i")
    options = OutgoingOptions(Endpoint("127.0.0.1", 1), HoldStart.OPEN, 0, 1, 1)
    state = SourceState(REF, HERE, "i", stage=stage)
    runner = SourceShell(state, vmm, (), ledger, peer, MigrationPolicy(), options, 1)
    return Departure(runner, cast(Copy, None), peer, "d")


async def test_a_device_that_lost_its_state_is_reported_though_the_ledger_told_the_end_first(
    tmp_path: Path, channel: aio.Channel
) -> None:
    departure = await over(tmp_path, channel, SourceStage.ENDED_COMMITTED)
    conducted = asyncio.create_task(departure.conduct())
    await asyncio.sleep(0.05)
    assert not conducted.done()
    departure.done([LOST])
    assert (await conducted).devices == ("nic",)


@pytest.mark.parametrize("stage", [SourceStage.ENDED_ABORTED, SourceStage.ENDED_COMMITTED])
async def test_a_destination_that_tells_nothing_holds_up_nobody(
    tmp_path: Path, channel: aio.Channel, stage: SourceStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(departing, "_TOLD_S", 0.05)
    report = await (await over(tmp_path, channel, stage)).conduct()
    assert report.outcome == stage.name.removeprefix("ENDED_")
