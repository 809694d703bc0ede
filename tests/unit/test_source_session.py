"""Cases of the source's machine that the exploration cannot tell apart, each found by a run of the real parts."""

from __future__ import annotations

from agents.session import (
    Acked,
    Command,
    Commit,
    Do,
    LoadedReport,
    Note,
    Quiesced,
    RecordRead,
    Requested,
    RequestsSeen,
    RequestsWritten,
    Seen,
    WriteAbort,
)
from agents.source_session import SourceStage, SourceState, source_step
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AckRequest, AttemptRef, HostRef

FIRST, SECOND = AckRequest("a", 1), AckRequest("b", 1)


def begun() -> SourceState:
    state = SourceState(AttemptRef("g", "m", 1), HostRef("h", "1"), "i")
    for event in (Seen.BEGIN, Seen.BOUND, Seen.VITALS_GOOD):
        state, _ = source_step(state, event)
    return state


def after(state: SourceState, *events: object) -> tuple[SourceState, list[Command]]:
    seen: list[Command] = []
    for event in events:
        state, commands = source_step(state, event)  # type: ignore[arg-type]
        seen += commands
    return state, seen


def test_the_gate_stays_closed_until_every_device_could_ask() -> None:
    """Devices begin one after the other: the first may be acknowledged before the second has asked."""
    written = RequestsWritten((FIRST,), (FIRST,), 1)
    state, commands = after(begun(), Requested(FIRST), written, Acked(FIRST))
    assert Do.RELEASE not in commands
    state, commands = after(state, Requested(SECOND), Seen.ACTIVE)
    assert Do.RELEASE not in commands
    _, commands = after(state, RequestsWritten((SECOND,), (FIRST, SECOND), 2), Acked(SECOND))
    assert Do.RELEASE in commands


def test_a_gate_that_stayed_closed_names_the_devices_whose_requests_are_not_durable_yet() -> None:
    state, _ = after(begun(), Seen.ACTIVE)
    assert state.released
    state, commands = after(state, Requested(FIRST), Acked(FIRST), Seen.PARKED)
    assert state.stage is SourceStage.ROLLING_BACK
    assert (state.reason, state.devices) == (AbortReason.LATE_SWITCHOVER_ACK, ("a",))
    assert Note("abort", "LATE_SWITCHOVER_ACK a") in commands


def test_the_commit_checks_the_version_of_requests_that_were_there_before_pre_copy() -> None:
    """A request of the attempt before is seen while this one is bound: its version is older than the freeze."""
    state = SourceState(AttemptRef("g", "m", 2), HostRef("h", "1"), "i", has_devices=False)
    early = RequestsSeen((), 3)
    state, _ = after(state, Seen.BEGIN, early, Seen.BOUND, Seen.ACTIVE, Seen.VITALS_GOOD, Seen.PARKED)
    _, commands = after(state, Seen.COMPLETED, LoadedReport("i", True))
    assert Commit(3) in commands


def test_a_request_that_beat_the_commit_is_the_reason_that_is_written_down() -> None:
    state, _ = after(begun(), Seen.ACTIVE, Seen.PARKED, Quiesced(()), Seen.COMPLETED, Seen.SHIMS_SENT)
    state, commands = after(state, LoadedReport("i", True))
    assert Commit(0) in commands
    open_still = GuestRecord("g", Ownership.OPEN, state.here, "m", 1, HostRef("d", "1"), "i")
    _, commands = after(state, Seen.LEDGER_REFUSED, RecordRead(open_still, 1))
    assert [command for command in commands if isinstance(command, WriteAbort)] == [
        WriteAbort(AbortReason.LATE_SWITCHOVER_ACK, ())
    ]
