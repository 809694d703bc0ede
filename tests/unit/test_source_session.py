"""Cases of the source's machine that the exploration cannot tell apart, each found by a run of the real parts."""

from __future__ import annotations

from dataclasses import replace

from agents.handover.source import SourceStage, SourceState, source_step
from agents.handover.words import (
    Acked,
    CancelTimer,
    Command,
    Commit,
    DevicesLost,
    Do,
    FoundLate,
    LoadedReport,
    Note,
    Quiesced,
    Rang,
    RecordRead,
    Requested,
    RequestsSeen,
    RequestsWritten,
    Seen,
    StartTimer,
    Timer,
    WantRunSeen,
    WriteAbort,
)
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AckRequest, AttemptRef, HostRef


def rings(state: SourceState, timer: Timer) -> Rang:
    """The ring of the timer as it runs."""
    number = state.timers.number(timer)
    assert number is not None, f"{timer} does not run"
    return Rang(timer, number)


def started(commands: list[Command]) -> list[Timer]:
    return [command.timer for command in commands if isinstance(command, StartTimer)]


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


# --- devices inside the VMM -------------------------------------------------------------------------------------------


def inside(*events: object) -> SourceState:
    """In pre-copy, with devices inside the VMM and none outside."""
    state = SourceState(AttemptRef("g", "m", 1), HostRef("h", "1"), "i", has_devices=False, inside=True)
    return after(state, Seen.BEGIN, Seen.BOUND, Seen.VITALS_GOOD, Seen.ACTIVE, *events)[0]


def aborts(commands: list[Command]) -> list[WriteAbort]:
    return [command for command in commands if isinstance(command, WriteAbort)]


def test_nothing_waits_in_pre_switchover_when_only_the_vmm_can_look() -> None:
    state, commands = after(inside(), Seen.PARKED)
    assert state.stage is SourceStage.LAST_PASS
    assert Do.PROCEED in commands
    assert Do.QUIESCE not in commands


def test_the_engines_verdict_is_a_late_ack_with_its_names() -> None:
    state, commands = after(inside(Seen.PARKED), FoundLate(("nic",)), Seen.SHIMS_BACK, Seen.ENGINE_OVER)
    assert state.stage is SourceStage.RECORDING
    assert aborts(commands) == [WriteAbort(AbortReason.LATE_SWITCHOVER_ACK, ("nic",))]


def test_the_engines_verdict_is_the_cause_of_what_was_heard_before_it() -> None:
    """The destination only sees its stream break, and may say so first."""
    for symptom in (Seen.DEST_FAILED, Seen.ENGINE_FAILED):
        _, commands = after(inside(Seen.PARKED), symptom, Seen.SHIMS_BACK, FoundLate(("nic",)), Seen.ENGINE_OVER)
        assert aborts(commands) == [WriteAbort(AbortReason.LATE_SWITCHOVER_ACK, ("nic",))]
    parked = inside(Seen.PARKED)
    _, commands = after(parked, rings(parked, Timer.SWITCHOVER), Seen.SHIMS_BACK, FoundLate(("nic",)), Seen.ENGINE_OVER)
    assert aborts(commands) == [WriteAbort(AbortReason.SWITCHOVER_TIMEOUT)]


def test_a_lost_device_is_what_the_attempt_came_to() -> None:
    events = (FoundLate(("nic",)), Seen.SHIMS_BACK, DevicesLost(("gpu",)), Seen.ENGINE_OVER)
    state, commands = after(inside(Seen.PARKED), *events)
    assert aborts(commands) == [WriteAbort(AbortReason.DEVICE_RESET, ("gpu",))]
    assert state.lost == ("gpu",)


def test_a_lost_device_is_told_though_its_guest_has_shut_down() -> None:
    """Under an agent that came later and found both; the exploration shows it within wide bounds only."""
    state = replace(begun(), stage=SourceStage.ROLLING_BACK, restarted=True)
    for event in (DevicesLost(("nic",)), Seen.ENGINE_OVER):
        state, _ = source_step(state, event)
    assert state.stage is SourceStage.RESUMING
    state, commands = source_step(state, Seen.GUEST_ENDED)
    assert commands == (WriteAbort(AbortReason.DEVICE_RESET, ("nic",)),)


def test_a_guest_that_has_shut_down_needs_no_operator() -> None:
    state = replace(begun(), stage=SourceStage.RESUMING, reason=AbortReason.SOURCE_RESTARTED, restarted=True)
    state, commands = source_step(state, Seen.GUEST_ENDED)
    assert commands[-1] == WriteAbort(AbortReason.GUEST_ENDED)


def test_a_wish_to_run_ends_the_attempt_before_it_is_fulfilled() -> None:
    paused, _ = after(inside(), WantRunSeen(False), Seen.PAUSED)
    assert paused.paused
    state, commands = after(paused, WantRunSeen(True))
    assert Do.RESUME not in commands
    assert state.reason is AbortReason.GUEST_RESUMED
    state, commands = after(state, Seen.SHIMS_BACK, Seen.ENGINE_OVER)
    assert commands[-1] is Do.RESUME
    _, commands = after(state, Seen.RESUMED)
    assert aborts(commands) == [WriteAbort(AbortReason.GUEST_RESUMED)]


def test_without_devices_inside_the_guest_runs_on_within_its_attempt() -> None:
    state, _ = after(begun(), Seen.ACTIVE, WantRunSeen(False), Seen.PAUSED)
    state, commands = after(state, WantRunSeen(True))
    assert commands == [Do.RESUME]
    assert state.stage is SourceStage.PRECOPY


def test_a_guest_that_policy_stopped_in_vain_runs_again() -> None:
    suspending, _ = after(replace(begun(), suspend_on_timeout=True), Seen.ACTIVE)
    state, commands = after(suspending, rings(suspending, Timer.PRECOPY))
    assert started(commands) == [Timer.SUSPENDED]
    assert commands[-1] is Do.PAUSE
    state, _ = after(state, Seen.PAUSED)
    state, _ = after(state, rings(state, Timer.SUSPENDED))
    assert state.reason is AbortReason.NOT_CONVERGING
    _, commands = after(state, Seen.SHIMS_BACK, Seen.ENGINE_OVER)
    assert commands[-1] is Do.RESUME


# --- time -------------------------------------------------------------------------------------------------------------


def test_each_closing_of_the_gate_has_its_own_full_time() -> None:
    """The timer of the first closing ran on and ended the second after a moment, however young that was."""
    first, again = AckRequest("a", 1), AckRequest("a", 2)
    state, commands = after(begun(), Requested(first), Seen.ACTIVE)
    assert started(commands) == [Timer.ACK]
    old = rings(state, Timer.ACK)
    state, commands = after(state, RequestsWritten((first,), (first,), 1), Acked(first))
    assert state.released
    assert CancelTimer(Timer.ACK, old.number) in commands
    state, commands = after(state, Requested(again))
    assert started(commands) == [Timer.ACK]
    dropped, commands = after(state, old)
    assert (dropped, commands) == (state, [])
    state, _ = after(state, rings(state, Timer.ACK))
    assert (state.reason, state.devices) == (AbortReason.ACK_TIMEOUT, ("a",))


def test_one_missing_ack_is_not_given_more_time_by_another() -> None:
    state, _ = after(begun(), Requested(FIRST), Seen.ACTIVE)
    state, commands = after(state, Requested(SECOND), Acked(FIRST))
    assert not [command for command in commands if isinstance(command, StartTimer | CancelTimer)]


def test_the_bound_of_pre_copy_holds_again_after_a_pause() -> None:
    """It rang while the guest was paused, was dropped, and nothing bounded the attempt any more."""
    state, _ = after(begun(), Seen.ACTIVE)
    old = rings(state, Timer.PRECOPY)
    state, commands = after(state, WantRunSeen(False), Seen.PAUSED)
    assert CancelTimer(Timer.PRECOPY, old.number) in commands
    state, commands = after(state, old, WantRunSeen(True), Seen.RESUMED)
    assert started(commands) == [Timer.PRECOPY]
    state, _ = after(state, rings(state, Timer.PRECOPY))
    assert state.reason is AbortReason.NOT_CONVERGING


def test_the_switchover_timeout_counts_from_the_freeze() -> None:
    """From the check on, a device that took its time over its stop was not bounded by it."""
    state, commands = after(begun(), Seen.ACTIVE, Seen.PARKED)
    assert state.stage is SourceStage.FREEZING
    assert Timer.SWITCHOVER in started(commands)
    ring = rings(state, Timer.SWITCHOVER)
    checked, commands = after(state, Quiesced(()))
    assert started(commands) == []
    for standing in (state, checked):
        aborted, commands = after(standing, ring)
        assert aborted.reason is AbortReason.SWITCHOVER_TIMEOUT
        assert commands[-1] is Do.ROLL_BACK_SHIMS
    submitted, commands = after(checked, Seen.COMPLETED, Seen.SHIMS_SENT, LoadedReport("i", True))
    assert CancelTimer(Timer.SWITCHOVER, ring.number) in commands
    assert after(submitted, ring) == (submitted, []), "no timer ends what is submitted (H5)"
