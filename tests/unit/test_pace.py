"""Devices keep to the transfer's bound while the guest runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from agents.engine.base import HoldStart, OutgoingOptions, VmmSpec
from agents.handover.ledger import AttemptLedger
from agents.handover.pace import Pace
from agents.handover.peer import DestinationPeer
from agents.handover.source import SourceState
from agents.handover.source_shell import SourceShell
from agents.shims.base import Frame, FrameKind
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import GuestSpec
from tests.fakes.coordination import MemoryStore
from tests.fakes.engine import FakeEngine


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.floats(0, 2)), max_size=50), st.integers(1_000, 10_000_000))
def test_no_stretch_of_time_carries_more_than_the_rate(pieces: list[tuple[int, float]], rate: int) -> None:
    pace, now, sent = Pace(rate), 0.0, 0
    first: float | None = None
    for size, pause_s in pieces:
        now += pause_s
        now += pace.wait_s(size, now)
        first = now if first is None else first
        assert sent <= (now - first) * rate + 1e-3 * rate
        sent += size
    assert Pace(0).wait_s(1 << 30, 0.0) == 0.0


class _Peer:
    def __init__(self) -> None:
        self.frames: list[Frame] = []

    async def send_frame(self, frame: Frame) -> None:
        self.frames.append(frame)


async def test_a_piece_that_waits_for_its_turn_goes_at_once_when_the_guest_stops(tmp_path: Path) -> None:
    """The bound is for pre-copy: a stopped guest waits for what is left, and waits no longer than it must."""
    ref, here = AttemptRef("g", "m", 1), HostRef("s", "1")
    vmm = await FakeEngine().start(VmmSpec("g", "s", GuestSpec("web"), tmp_path, tmp_path / "con", None))
    peer = _Peer()
    shell = SourceShell(
        SourceState(ref, here, "i"),
        vmm,
        (),
        AttemptLedger(MemoryStore(), ref, here, "i", "w"),
        cast(DestinationPeer, peer),
        MigrationPolicy(max_bandwidth_mbps=1),
        OutgoingOptions(Endpoint("127.0.0.1", 1), HoldStart.OPEN, 0, 1, 1),
        1,
    )
    piece = Frame("dpu", 1, FrameKind.PRECOPY, data=b"x" * 10_000_000)
    await shell.send(piece)
    waiting = asyncio.create_task(shell.send(piece))
    await asyncio.sleep(0.05)
    assert len(peer.frames) == 1, "80 s at this rate"
    shell.lift_pace()
    async with asyncio.timeout(5):
        await waiting
    assert len(peer.frames) == 2
