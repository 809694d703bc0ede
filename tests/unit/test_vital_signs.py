"""What it costs the ledger that the gate opens only while a quorum is seen alive."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from pathlib import Path

from agents.engine.base import HoldStart, OutgoingOptions, VmmSpec, stream_of
from agents.handover.source import SourceStage
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import GuestSpec
from orchestrator.ledger.store import Op, WriteResult
from tests.fakes.attempt import Coming, Leaving, Moves
from tests.fakes.coordination import MemoryStore
from tests.fakes.engine import FakeEngine

LONG_S = 1.6
"""Several beats, and longer than a proof of a quorum holds."""


class Aging(MemoryStore):
    """Its proofs of a quorum age, as those of a real store."""

    answered_s = -math.inf

    @property
    def quorum_age_s(self) -> float:
        return time.monotonic() - self.answered_s

    async def barrier(self, timeout_s: float = 2.0) -> None:
        await super().barrier(timeout_s)
        self.answered_s = time.monotonic()

    async def multi(self, ops: Sequence[Op], timeout_s: float = 2.0) -> WriteResult:
        result = await super().multi(ops, timeout_s)
        self.answered_s = time.monotonic()
        return result


async def test_a_quorum_is_asked_for_only_while_the_gate_is_shut(tmp_path: Path) -> None:
    """The bind was the first proof. Once the gate is open it stays so whatever the pulse, so nobody needs another."""
    engine, store = FakeEngine(), Aging()
    moves = Moves(store=store)
    await moves.born()
    ref = await moves.opened()
    store.answered_s, store.barriers = -math.inf, 0

    def spec(inc: str) -> VmmSpec:
        return VmmSpec("g", inc, GuestSpec("g"), tmp_path, tmp_path / inc, None)

    vmm = await engine.start(spec("s"))
    copy = await engine.prepare_incoming(spec("i1"), moves.migration, 1)
    options = OutgoingOptions(stream_of(copy.metadata), HoldStart.TRICKLE, 0, 1 << 30, 300)

    async def release() -> None:
        """It copies on for long."""

    vmm.release = release
    beats: list[int] = []

    async def during() -> None:
        while not moves.source.state.released:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        beats.append(store.barriers)
        await asyncio.sleep(LONG_S)
        beats.append(store.barriers)
        vmm.converge()

    await moves.conducted(ref, Leaving(vmm), Coming("i1", copy), MigrationPolicy(), options, tmp_path, during=during)
    assert moves.source.state.stage is SourceStage.ENDED_COMMITTED
    assert beats == [0, 0]
