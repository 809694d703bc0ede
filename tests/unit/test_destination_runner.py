"""What the destination's shell does on its own: the marker is evidence, so it is not written without need."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest

from agents.engine.base import HoldStart, OutgoingOptions, RunState, VmmSpec, stream_of
from agents.handover.destination import DestinationStage, DestinationState
from agents.handover.destination_shell import DestinationShell
from agents.handover.ledger import AttemptLedger
from agents.handover.peer import SourcePeer
from agents.handover.words import Do, Seen
from orchestrator.core.handover import Ownership
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import GuestSpec
from tests.fakes.attempt import Coming, D, Leaving, Moves
from tests.fakes.coordination import MemoryStore
from tests.fakes.engine import FakeEngine

HERE, REF = HostRef("d", "1"), AttemptRef("g", "m", 1)


async def test_no_marker_is_written_for_a_vmm_that_is_dead(tmp_path: Path) -> None:
    """Killed just before the commit: whoever hears of that only afterwards can still prove that it never ran here."""
    engine = FakeEngine()
    spec = VmmSpec("g", "i", GuestSpec("web"), tmp_path, tmp_path / "con", None)
    vmm = await engine.prepare_incoming(spec, "m", 1)

    async def want_run() -> bool:
        return True

    ledger = AttemptLedger(MemoryStore(), REF, HERE, "i", "w")
    peer, marker = cast(SourcePeer, None), tmp_path / "marker"
    runner = DestinationShell(DestinationState(REF, HERE, "i"), vmm, (), ledger, peer, marker, want_run)
    runner._began = 0.0
    vmm._dead = True
    assert await runner._write_marker() is Seen.MARKER_FAILED
    assert not marker.exists()
    vmm._dead = False
    assert await runner._write_marker() is Seen.MARKER_WRITTEN
    assert marker.exists()


async def test_a_retry_holds_up_no_other_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It slept in the lane: a marker, a DONE, a discard waited for it."""
    monkeypatch.setattr("agents.handover.shell.RETRY_S", 3600.0)
    engine, store = FakeEngine(), MemoryStore()
    await store.start()
    vmm = await engine.prepare_incoming(VmmSpec("g", "i", GuestSpec("web"), tmp_path, tmp_path / "c", None), "m", 1)

    async def want_run() -> bool:
        return True

    ledger = AttemptLedger(store, REF, HERE, "i", "w")
    peer, marker = cast(SourcePeer, None), tmp_path / "marker"
    shell = DestinationShell(DestinationState(REF, HERE, "i"), vmm, (), ledger, peer, marker, want_run)
    seen: list[object] = []
    monkeypatch.setattr(shell, "feed", seen.append)
    working = asyncio.create_task(shell._carry_out())
    shell._queue(Do.READ)  # the ledger has no such guest, or does not answer: it is to be asked again later
    store.down = True
    for command in (Do.RETRY_LATER, Do.RETRY_LATER, Do.WRITE_MARKER):
        shell._queue(command)
    async with asyncio.timeout(20):
        while Seen.MARKER_WRITTEN not in seen:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert seen == [Seen.MARKER_WRITTEN]
    assert shell._retry is not None, "one retry is on its way"
    shell._retry_due()
    assert seen == [Seen.MARKER_WRITTEN, Seen.RETRY_DUE]
    working.cancel()
    await shell._close()


async def test_a_guest_that_arrived_ended_is_done_and_not_tried_again(tmp_path: Path) -> None:
    """It powered itself off as it was stopped: `cont` was refused ten times a second, for ever, in COMMITTED."""
    engine, store = FakeEngine(), MemoryStore()
    await store.start()
    moves = Moves(store=store)
    await moves.born()
    vmm = await engine.start(VmmSpec("g", "s", GuestSpec("web"), tmp_path, tmp_path / "con", None))
    vmm.ends_unheard = True
    ref = await moves.opened()
    there = VmmSpec("g", "i1", GuestSpec("web"), tmp_path, tmp_path / "con", None)
    copy = await engine.prepare_incoming(there, moves.migration, 1)
    options = OutgoingOptions(stream_of(copy.metadata), HoldStart.OPEN, 0, 1 << 30, 300)
    await moves.conducted(ref, Leaving(vmm), Coming("i1", copy), MigrationPolicy(), options, tmp_path)
    assert moves.destination.state.stage is DestinationStage.ENDED_DONE
    assert copy.calls.count("resume") == 1
    assert copy.run is RunState.ENDED
    assert copy.metadata.role == "owner"
    record = await moves.record()
    assert (record.phase, record.owner, record.inc) == (Ownership.IDLE, D, "i1")
    assert "guest_ended" in [entry.event for entry in moves.destination.timeline]


async def test_a_copy_that_cannot_be_had_any_more_gets_no_marker(tmp_path: Path) -> None:
    """It never ran then, and the guest is given back: a marker would declare it crashed."""
    engine = FakeEngine()
    vmm = await engine.prepare_incoming(VmmSpec("g", "i", GuestSpec("web"), tmp_path, tmp_path / "c", None), "m", 1)

    async def want_run() -> bool:
        return True

    ledger = AttemptLedger(MemoryStore(), REF, HERE, "i", "w")
    peer, marker = cast(SourcePeer, None), tmp_path / "marker"
    shell = DestinationShell(DestinationState(REF, HERE, "i"), vmm, (), ledger, peer, marker, want_run)
    shell._began = 0.0
    engine.script.fail_take_over = "given up"
    assert await shell._write_marker() is Seen.MARKER_FAILED
    assert not marker.exists()
    assert await shell._write_marker() is Seen.MARKER_WRITTEN
    assert vmm.calls.count("take_over") == 2
