"""R16-R21, R23-R27, R30, R31: the check between the stop and the last data (docs/rules.md)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agents.engine.qemu.verdict import late_devices
from agents.handover.source import SourceStage, SourceState, source_step
from agents.handover.words import (
    Acked,
    Command,
    Commit,
    Do,
    LoadedReport,
    Note,
    Quiesced,
    RecordSeen,
    Requested,
    RequestsSeen,
    RequestsWritten,
    Seen,
    WriteAbort,
)
from deploy.lab.devices.qemu_acks import PAUSE, QemuSource, QemuStage, Query, late_text
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AckRequest, AttemptRef, HostRef
from orchestrator.core.switchover import AckLedger, AckMode
from tests.oracle import variants
from tests.oracle.pair import begun, lacking, last_look, served, stopped_for_switchover

A1, A2, B1, B2 = AckRequest("a", 1), AckRequest("a", 2), AckRequest("b", 1), AckRequest("b", 2)


def finals(source: QemuSource) -> QemuSource:
    return source.query(Query.FINAL)


def step(state: SourceState, *events: object) -> tuple[SourceState, list[Command]]:
    seen: list[Command] = []
    for event in events:
        state, commands = source_step(state, event)  # type: ignore[arg-type]
        seen += commands
    return state, seen


def frozen(*, paused: bool = False) -> SourceState:
    """An attempt whose devices a and b were acknowledged, and whose engine has stopped the guest."""
    state = SourceState(AttemptRef("g", "m", 1), HostRef("h", "1"), "i")
    state, _ = step(state, Seen.BEGIN, Seen.BOUND, Seen.VITALS_GOOD, Requested(A1), Requested(B1), Seen.ACTIVE)
    state, _ = step(state, RequestsWritten((A1, B1), (A1, B1), 1), Acked(A1), Acked(B1))
    state, _ = step(state, *([Seen.PAUSED] if paused else []), Seen.PARKED)
    assert state.stage is SourceStage.FREEZING
    return state


# --- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.rule("R16")
def test_the_final_query_stands_between_the_stop_and_the_end() -> None:
    ready = served(begun("a", more=(PAUSE,)), "a")
    with pytest.raises(ValueError, match="not in stage active"):
        ready.query(Query.FINAL)
    parked = stopped_for_switchover(ready)
    with pytest.raises(ValueError, match="not in stage pre-switchover"):
        parked.query(Query.FINAL)
    checked = finals(parked.proceed())
    assert (checked.stage, checked.final) == (QemuStage.DEVICE, variants.Final(0, 0, 0))


@pytest.mark.rule("R16")
def test_our_last_pass_starts_behind_the_check_and_the_devices_are_asked_before_it() -> None:
    state = SourceState(AttemptRef("g", "m", 1), HostRef("h", "1"), "i")
    state, _ = step(state, Seen.BEGIN, Seen.BOUND, Seen.VITALS_GOOD, Seen.ACTIVE)
    state, commands = step(state, Seen.PARKED)
    assert Do.QUIESCE in commands
    assert Do.PROCEED not in commands
    _, commands = step(state, Quiesced(()))
    assert Do.PROCEED in commands


# --- late or not ------------------------------------------------------------------------------------------------------


@pytest.mark.rule("R17", "R26")
@pytest.mark.parametrize("late", ["a", "b", "ab", "abcd"])
def test_what_the_final_query_collects_fails_the_switchover(late: str) -> None:
    source = finals(stopped_for_switchover(served(begun(*"abcd"), *"abcd"), *late))
    assert (source.stage, source.pending) == (QemuStage.FAILED, len(late))
    assert source.error == f"Switchover ACK was requested by {len(late)} devices during switchover"


@pytest.mark.rule("R17", "R26")
def test_a_late_request_is_one_abort_with_the_names_of_all_devices() -> None:
    state, commands = step(frozen(), Requested(A2), Quiesced((A2, B2)))
    assert (state.reason, state.devices) == (AbortReason.LATE_SWITCHOVER_ACK, ("a", "b"))
    assert commands.count(Do.ROLL_BACK_SHIMS) == 1
    assert Do.PROCEED not in commands


@pytest.mark.rule("R17")
@pytest.mark.parametrize("count", [1, 2, 17])
def test_only_qemus_whole_sentence_is_taken_for_a_late_ack(count: int) -> None:
    assert late_devices(late_text(count)) == count
    others = (
        "",
        f"{late_text(count)}.",
        f"vf0: {late_text(count)}",
        late_text(count).lower(),
        "Switchover ACK was requested by some devices during switchover",
        "Switchover ack pending num underflowed",
    )
    assert [late_devices(other) for other in others] == [None] * len(others)


@pytest.mark.rule("R18")
def test_a_guest_that_was_stopped_with_acks_pending_completes() -> None:
    source = begun("a", initial_bytes=1 << 20).query(Query.EXACT)
    stopped = last_look(source.stop(), "a").query(Query.EXACT)
    ended = finals(stopped.switch_over())
    assert ended.final == variants.Final(before=1, collected=0, pending=1)
    assert ended.finish().stage is QemuStage.COMPLETED
    ours = AckLedger().request(A1).stop_by_wish().freeze()
    assert (ours.pending, ours.late, ours.while_stopped) == ((A1,), (), (A1,))


@pytest.mark.rule("R18")
def test_what_the_look_at_the_operators_stop_found_is_not_late() -> None:
    """The operator's stop has the same last look; an ordinary query collects it, with the gate open already."""
    source = served(begun("a"), "a").stop()
    source = last_look(source, "a", late=True).query(Query.EXACT)
    assert (source.pending, source.may_switch_over) == (1, True)
    assert finals(source.switch_over()).finish().stage is QemuStage.COMPLETED


@pytest.mark.rule("R19")
@pytest.mark.parametrize("mode", [AckMode.OFF, AckMode.LEGACY])
def test_without_per_device_acks_nothing_is_late(mode: AckMode) -> None:
    source = begun("a", mode=mode).query(Query.EXACT).iterate("a")
    source = source.acked() if mode is AckMode.LEGACY else source
    assert not source.gets_last_look("a")
    ended = finals(stopped_for_switchover(source, "a"))
    assert (ended.stage, ended.error) == (QemuStage.DEVICE, "")
    assert AckLedger(mode=mode).ack(B1).request(A1).freeze().late == ()


# --- R20: the superseded first version --------------------------------------------------------------------------------


@pytest.mark.rule("R20")
def test_the_first_version_fails_a_guest_that_the_operator_stopped() -> None:
    source = begun("a", initial_bytes=1 << 20).query(Query.EXACT)
    ended = finals(last_look(source.stop(), "a").query(Query.EXACT).switch_over())
    assert ended.final is not None
    assert variants.first_version(ended.final) == late_text(1), "wrong: nobody asked during the switchover"
    assert variants.merged(ended.final) == ended.error == ""


@pytest.mark.rule("R20")
def test_the_first_version_is_right_about_a_request_in_the_gap() -> None:
    ended = finals(stopped_for_switchover(served(begun("a"), "a"), "a"))
    assert ended.final is not None
    assert variants.first_version(ended.final) == variants.merged(ended.final) == ended.error == late_text(1)


@pytest.mark.rule("R20")
def test_the_first_version_of_our_check_would_abort_where_ours_goes_on() -> None:
    state = SourceState(AttemptRef("g", "m", 1), HostRef("h", "1"), "i")
    state, _ = step(state, Seen.BEGIN, Seen.BOUND, Seen.VITALS_GOOD, Requested(A1), Seen.ACTIVE)
    state, _ = step(state, RequestsWritten((A1,), (A1,), 1), Seen.PAUSED, Seen.PARKED)
    assert state.acks.pending == (A1,), "the first version aborts over this"
    state, commands = step(state, Quiesced((A1,)))
    assert Do.PROCEED in commands
    assert state.reason is None


# --- what a failure leaves --------------------------------------------------------------------------------------------


@pytest.mark.rule("R21")
@pytest.mark.parametrize("ran", [True, False])
def test_a_guest_that_ran_runs_again_and_one_that_was_stopped_stays_so(ran: bool) -> None:
    source = served(begun("a"), "a")
    source = source if ran else source.stop()
    failed = finals(stopped_for_switchover(source, "a"))
    assert (failed.stage, failed.running, failed.error) == (QemuStage.FAILED, ran, late_text(1))


@pytest.mark.rule("R21")
def test_our_abort_brings_back_the_devices_then_the_guest_then_says_so() -> None:
    state, commands = step(frozen(), Quiesced((A2,)))
    assert commands[-1] is Do.ROLL_BACK_SHIMS
    state, commands = step(state, Seen.SHIMS_BACK)
    assert commands == [Do.ABORT_ENGINE]
    state, commands = step(state, Seen.ENGINE_OVER)
    assert commands == [WriteAbort(AbortReason.LATE_SWITCHOVER_ACK, ("a",))]
    state, _ = step(state, Seen.ABORT_RECORDED)
    assert state.stage is SourceStage.ENDED_ABORTED


@pytest.mark.rule("R23")
def test_a_cancel_before_the_check_wins_over_what_looks_have_found() -> None:
    parked = stopped_for_switchover(served(begun("a", more=(PAUSE,)), "a"), "a")
    cancelled = parked.cancel()
    assert (cancelled.stage, cancelled.running, cancelled.error) == (QemuStage.CANCELLED, True, "")
    assert cancelled.final is None


@pytest.mark.rule("R23")
def test_our_cancel_before_the_check_is_the_reason() -> None:
    cancelled = GuestRecord("g", Ownership.ABORTED, HostRef("h", "1"), "m", 1, reason=AbortReason.CANCELLED)
    state, commands = step(frozen(), RecordSeen(cancelled), Quiesced((A2,)))
    assert state.reason is AbortReason.CANCELLED
    assert Do.PROCEED not in commands
    _, commands = step(state, Seen.SHIMS_BACK, Seen.ENGINE_OVER)
    assert not [each for each in commands if isinstance(each, WriteAbort)], "it is written down already"


# --- when a request is still seen -------------------------------------------------------------------------------------


@pytest.mark.rule("R24")
def test_what_the_last_look_found_survives_the_pause_and_what_comes_later_is_never_seen() -> None:
    ready = served(begun("a", more=(PAUSE,)), "a")
    assert finals(stopped_for_switchover(ready, "a").proceed()).error == late_text(1)
    parked = stopped_for_switchover(ready)
    with pytest.raises(ValueError, match="not in PRE_COPY"):
        parked.look("a", 4096, reinit=True)
    assert finals(parked.proceed()).error == ""


@pytest.mark.rule("R24")
@pytest.mark.parametrize("lack", ["reinit", "p2p"])
def test_a_device_that_lacks_a_feature_is_not_looked_at_last(lack: str) -> None:
    ready = lacking(served(begun("a", "b"), "a", "b"), "a", lack)
    assert not ready.gets_last_look("a")
    assert finals(stopped_for_switchover(ready, "a")).error == ""
    assert finals(stopped_for_switchover(ready, "a", "b")).error == late_text(1)


@pytest.mark.rule("R24")
@pytest.mark.parametrize("how", ["while quiescing", "in the final query", "through the ledger"])
def test_whatever_is_asked_for_until_our_check_counts(how: str) -> None:
    match how:
        case "while quiescing":
            events = [Requested(A2), Quiesced((A1, B1))]
        case "in the final query":
            events = [Quiesced((A2, B1))]
        case _:
            events = [RequestsSeen((A2,), 2), Quiesced((A1, B1))]
    state, commands = step(frozen(), *events)
    assert (state.reason, state.devices) == (AbortReason.LATE_SWITCHOVER_ACK, ("a",))
    assert Do.PROCEED not in commands


@pytest.mark.rule("R25")
def test_a_pause_between_decision_and_stop_protects_from_nothing_in_qemu() -> None:
    """Whoever stops the guest: the look at the stop leaves its request to the final query."""
    decided = served(begun("a"), "a").switch_over()
    paused = replace(decided, live=False)
    failed = finals(last_look(paused, "a", late=True))
    assert (failed.error, failed.running) == (late_text(1), False)


@pytest.mark.rule("R25")
def test_we_never_abort_a_guest_that_was_stopped_on_purpose() -> None:
    state, commands = step(frozen(paused=True), Requested(A2), Quiesced((A2, B2)))
    assert Do.PROCEED in commands
    assert state.acks.while_stopped == (A2, B2), "but it is said who asked"
    state, commands = step(state, Seen.COMPLETED, Seen.SHIMS_SENT, LoadedReport("i", True))
    assert Commit(None) in commands, "and no request can refuse the commit"


@pytest.mark.rule("R27")
def test_an_ack_cannot_mask_a_request_in_the_final_query() -> None:
    source = begun("a", "b", initial_bytes=1 << 20).query(Query.EXACT)
    source = source.read("b", 1 << 20).iterate("b").stop()
    source = last_look(source, "a").query(Query.EXACT).switch_over()
    assert source.before == 2
    ended = finals(last_look(source.acked(), "b", late=True))
    assert ended.final is not None
    assert ended.final == variants.Final(before=2, collected=1, pending=2)
    assert variants.amended(ended.final) == "", "the amended version of the thread sees nothing grow"
    assert ended.error == late_text(1)


@pytest.mark.rule("R27")
def test_our_ack_of_one_device_masks_no_request_of_another() -> None:
    ours = AckLedger().request(A1).ack(A1).request(B1).freeze()
    assert ours.request(A2).ack(B1).late == (A2,)


@pytest.mark.rule("R30")
def test_after_the_check_a_device_is_served_in_stop_copy() -> None:
    state, commands = step(frozen(), Quiesced((A1, B1)))
    assert state.stage is SourceStage.LAST_PASS
    state, commands = step(state, Requested(A2))
    assert commands == [Note("request_too_late", "a/2")]
    assert (state.stage, state.acks.pending) == (SourceStage.LAST_PASS, ())
    checked = finals(stopped_for_switchover(served(begun("a"), "a")))
    with pytest.raises(ValueError, match="not in PRE_COPY"):
        checked.look("a", 4096, reinit=True)


@pytest.mark.rule("R30")
def test_a_request_through_the_ledger_wins_until_the_commit() -> None:
    state, _ = step(frozen(), Quiesced((A1, B1)))
    aborted, commands = step(state, RequestsSeen((A2,), 2))
    assert (aborted.reason, aborted.devices) == (AbortReason.LATE_SWITCHOVER_ACK, ("a",))
    _, commands = step(state, Seen.COMPLETED, Seen.SHIMS_SENT, LoadedReport("i", True))
    assert Commit(1) in commands, "and the commit itself fails if one is accepted that nobody has told us of"


# --- R31 --------------------------------------------------------------------------------------------------------------


@pytest.mark.rule("R31")
@pytest.mark.parametrize("marked", [True, False])
def test_a_last_look_that_fails_counts_as_a_request(marked: bool) -> None:
    source = served(begun("a"), "a") if marked else begun("a", initial_bytes=1 << 20).query(Query.EXACT).stop()
    source = source.switch_over() if marked else source
    failed = source.failed_look("a").quiesce("a")
    assert failed.device("a").asks
    assert not failed.device("a").marked, "at an operator's stop another marker may still leave"
    if marked:
        assert finals(failed).error == late_text(1)
    else:
        assert failed.query(Query.EXACT).pending == 2


@pytest.mark.rule("R31")
def test_a_look_in_pre_copy_that_fails_is_taken_for_no_data_left() -> None:
    source = begun("a", initial_bytes=1 << 20).query(Query.EXACT).failed_look("a")
    assert (source.device("a").asks, source.marks("a")) == (False, True)


@pytest.mark.rule("R31")
def test_a_final_query_that_fails_is_no_late_request_of_ours() -> None:
    state, commands = step(frozen(), Seen.SHIM_FAILED)
    assert (state.reason, state.devices) == (AbortReason.SHIM_FAILED, ())
    assert Do.ROLL_BACK_SHIMS in commands
    assert Do.PROCEED not in commands
