"""What a session's shell does when time is up: the guest runs on, whatever device or engine it was waiting for."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from agents.engine.base import HoldStart, OutgoingOptions, RunState, VmmSpec, stream_of
from agents.handover import source_shell
from agents.handover.destination import DestinationStage, prepared_destination
from agents.handover.destination_shell import DestinationShell
from agents.handover.ledger import AttemptLedger
from agents.handover.source import SourceStage
from agents.shims.base import FinalQuery, SendFrame
from orchestrator.core import handover
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import Ownership
from orchestrator.core.liveness import Liveness
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import GuestSpec
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger, op_set
from tests.fakes.attempt import Coming, D, Leaving, Link, Moves
from tests.fakes.coordination import MemoryStore
from tests.fakes.engine import FakeEngine, FakeVmm
from tests.fakes.shims import FakeDestinationShim, FakeSourceShim

FOREVER_S = 60.0
POLICY = replace(MigrationPolicy(), switchover_timeout_ms=150)


@dataclass
class Stuck(FakeSourceShim):
    """A device that does not come to an end of the calls in `stuck`."""

    stuck: frozenset[str] = field(default_factory=frozenset[str])

    async def hook(self, name: str) -> None:
        await self._maybe(name)
        await super().hook(name)

    async def quiesce(self) -> FinalQuery:
        await self._maybe("quiesce")
        return await super().quiesce()

    async def stop_copy(self) -> None:
        await self._maybe("stop_copy")
        await super().stop_copy()

    async def roll_back(self) -> None:
        await self._maybe("roll_back")
        await super().roll_back()

    async def _maybe(self, what: str) -> None:
        if what in self.stuck:
            await asyncio.sleep(FOREVER_S)


def spec(inc: str, directory: Path) -> VmmSpec:
    return VmmSpec("g", inc, GuestSpec("g"), directory, directory / f"{inc}.con", None)


async def moved(directory: Path, shim: Stuck) -> tuple[Moves, FakeVmm]:
    engine = FakeEngine()
    store = MemoryStore()
    await store.start()
    moves = Moves(store=store)
    await moves.born()
    vmm = await engine.start(spec("s", directory))
    ref = await moves.opened()
    copy = await engine.prepare_incoming(spec("i1", directory), moves.migration, 1)
    options = OutgoingOptions(stream_of(copy.metadata), HoldStart.TRICKLE, 0, 1 << 30, 300)
    there = Coming("i1", copy, [FakeDestinationShim(shim.device)])
    await moves.conducted(ref, Leaving(vmm, [shim]), there, POLICY, options, directory)
    return moves, vmm


@pytest.mark.parametrize("stuck", ["freeze", "quiesce", "final_query", "stop_copy"])
async def test_a_guest_does_not_stand_longer_than_policy_says(tmp_path: Path, stuck: str) -> None:
    """The timer began at the check only, and the shell waited for the device whatever rang."""
    began = time.monotonic()
    moves, vmm = await moved(tmp_path, Stuck("dpu", stuck=frozenset({stuck})))
    assert time.monotonic() - began < FOREVER_S / 2
    assert moves.source.state.stage is SourceStage.ENDED_ABORTED
    record = await moves.record()
    assert (record.phase, record.reason) == (Ownership.ABORTED, AbortReason.SWITCHOVER_TIMEOUT)
    assert vmm.run is RunState.RUNNING
    told = [entry.event for entry in moves.source.timeline]
    assert told.index("abort") < told.index("given_up"), "cut short by the abort, not by a bound of the call"


async def test_a_device_that_finds_no_way_back_does_not_keep_the_guest_standing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_shell, "_ROLL_BACK_S", 0.1)
    moves, vmm = await moved(tmp_path, Stuck("dpu", stuck=frozenset({"quiesce", "roll_back"})))
    assert (await moves.record()).reason is AbortReason.DEVICE_RESET
    assert vmm.run is RunState.RUNNING


@dataclass
class Faulty(Stuck):
    """A device whose program nobody thought of."""

    async def run_precopy(self, send: SendFrame) -> None:
        raise RuntimeError("not foreseen")


async def test_what_nobody_foresaw_in_a_task_ends_the_session_loudly(tmp_path: Path) -> None:
    """It was lost with its task, and the attempt waited for the device. The keeper ends it as after a restart (H7)."""
    with pytest.raises(ExceptionGroup) as told:
        await moved(tmp_path, Faulty("dpu"))
    assert told.group_contains(RuntimeError, match="not foreseen")


# --- a destination that nobody conducts -------------------------------------------------------------------------------


async def waiting(directory: Path, *, bound: bool) -> tuple[Moves, DestinationShell, asyncio.Task[object]]:
    store = MemoryStore()
    await store.start()
    moves = Moves(store=store)
    await moves.born()
    ref = await moves.opened()
    if bound:
        found = await Ledger(store).read_guest(moves.guest)
        assert found is not None
        record = handover.bind(found[0], moves.migration, 1, "i1", writer="s")
        await store.multi([op_set(paths.guest(moves.guest), record, found[1])])
    vmm = await FakeEngine().prepare_incoming(spec("i1", directory), moves.migration, 1)

    async def want_run() -> bool:
        return True

    state, first = prepared_destination(ref, D, "i1", has_devices=False)
    ledger = AttemptLedger(store, ref, D, "i1", "w")
    runner = DestinationShell(state, vmm, (), ledger, Link(), directory / "marker", want_run, unclaimed_ms=50)
    return moves, runner, asyncio.create_task(runner.run(first))


async def test_a_prepared_destination_that_nobody_conducts_ends_by_itself(tmp_path: Path) -> None:
    moves, runner, over = await waiting(tmp_path, bound=False)
    async with asyncio.timeout(20):
        await over
    assert runner.state.stage is DestinationStage.ENDED_DISCARDED
    assert runner.vmm.liveness() is Liveness.GONE
    record = await moves.record()
    assert (record.phase, record.reason) == (Ownership.ABORTED, AbortReason.PREPARE_TIMEOUT)


async def test_a_destination_whose_attempt_is_conducted_waits_for_its_source(tmp_path: Path) -> None:
    moves, runner, over = await waiting(tmp_path, bound=True)
    await asyncio.sleep(0.3)
    assert not over.done()
    assert runner.state.stage is DestinationStage.WAITING
    assert (await moves.record()).phase is Ownership.OPEN
    over.cancel()
