"""Both accountings of ACKs under histories of every kind, held to what they mean by functions that share no code."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import pytest
from hypothesis import event as report
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.handover.source import SourceStage, SourceState, source_step
from agents.handover.words import (
    Acked,
    Command,
    Commit,
    Event,
    LoadedReport,
    Quiesced,
    Requested,
    RequestsSeen,
    RequestsWritten,
    Seen,
)
from deploy.lab.devices.qemu_acks import UNDERFLOW, QemuStage, Query, late_text
from orchestrator.core.errors import AbortReason
from orchestrator.core.ids import AckRequest, AttemptRef, HostRef
from orchestrator.core.switchover import AckLedger, AckMode
from tests.oracle.pair import Pair, setup

# --- our ledger -------------------------------------------------------------------------------------------------------


class What(StrEnum):
    ASK = "ask"
    ACK = "ack"
    STOP = "stop"
    RESUME = "resume"
    FREEZE = "freeze"


@dataclass(frozen=True)
class Moment:
    what: What
    entry: AckRequest | None = None


ENTRIES = st.builds(AckRequest, st.sampled_from("abc"), st.integers(1, 4))
ASKED = st.builds(Moment, st.sampled_from([What.ASK, What.ACK]), ENTRIES)
WISHES = st.sampled_from([Moment(What.STOP), Moment(What.RESUME)])
BEFORE = st.lists(ASKED | WISHES, max_size=20)
"""Up to the freeze."""
BETWEEN = st.lists(ASKED | WISHES, max_size=6)
"""From the freeze to the check. Wishes come then as well, and are queued."""


def played(history: list[Moment], mode: AckMode = AckMode.PER_DEVICE) -> AckLedger:
    ledger = AckLedger(mode=mode)
    for moment in history:
        match moment.what:
            case What.ASK:
                assert moment.entry is not None
                ledger = ledger.request(moment.entry)
            case What.ACK:
                assert moment.entry is not None
                ledger = ledger.ack(moment.entry)
            case What.STOP:
                ledger = ledger.stop_by_wish()
            case What.RESUME:
                ledger = ledger.resume_by_wish()
            case What.FREEZE:
                ledger = ledger.freeze()
    return ledger


def unanswered(history: list[Moment]) -> set[AckRequest]:
    """Each device's newest request, unless an ACK of that generation or a newer one is there."""
    asked = {moment.entry for moment in history if moment.what is What.ASK and moment.entry}
    acked = {moment.entry for moment in history if moment.what is What.ACK and moment.entry}
    newest = {
        each for each in asked if not any(o.device == each.device and o.generation > each.generation for o in asked)
    }
    return {
        each for each in newest if not any(a.device == each.device and a.generation >= each.generation for a in acked)
    }


def stopped_before(history: list[Moment]) -> bool:
    wishes = [moment.what for moment in history if moment.what in (What.STOP, What.RESUME)]
    return bool(wishes) and wishes[-1] is What.STOP


def late_by_definition(history: list[Moment]) -> set[AckRequest]:
    """Neither acknowledged nor in the baseline at the check, which is the end of the history.

    Of a guest that was stopped before the freeze nothing is late: what was pending is the baseline, and for what comes
    after the stop there is no downtime left to protect either.
    """
    frozen = history.index(Moment(What.FREEZE))
    return set() if stopped_before(history[:frozen]) else unanswered(history)


@given(BEFORE, BETWEEN)
def test_the_verdict_at_the_check_is_the_definition_of_late(before: list[Moment], between: list[Moment]) -> None:
    history = [*before, Moment(What.FREEZE), *between]
    late = late_by_definition(history)
    report(f"late: {len(late)}")
    assert set(played(history).late) == late


@given(BEFORE)
def test_the_gate_opens_exactly_when_nothing_is_pending_or_the_guest_is_stopped(history: list[Moment]) -> None:
    ledger = played(history)
    assert set(ledger.pending) == unanswered(history)
    assert ledger.gate_open == (not unanswered(history) or stopped_before(history))
    assert played(history, AckMode.OFF).gate_open
    answered = any(moment.what is What.ACK for moment in history)
    assert played(history, AckMode.LEGACY).gate_open == (answered or stopped_before(history))


@given(BEFORE, ENTRIES)
def test_an_ack_changes_nothing_for_another_device_or_a_newer_generation(
    history: list[Moment], ack: AckRequest
) -> None:
    before, after = played(history), played([*history, Moment(What.ACK, ack)])
    gone = set(before.pending) - set(after.pending)
    assert set(after.pending) <= set(before.pending)
    assert all(each.device == ack.device and each.generation <= ack.generation for each in gone)


@given(BEFORE, BETWEEN)
def test_what_was_asked_for_while_stopped_is_named_and_only_that(before: list[Moment], between: list[Moment]) -> None:
    history = [*before, Moment(What.FREEZE), *between]
    ledger = played(history)
    if not stopped_before(before):
        assert ledger.while_stopped == ()
    else:
        assert set(ledger.pending) <= set(ledger.while_stopped)


@given(BEFORE, st.sampled_from([AckMode.OFF, AckMode.LEGACY]))
def test_only_devices_that_may_ask_again_are_ever_late(history: list[Moment], mode: AckMode) -> None:
    assert played([*history, Moment(What.FREEZE)], mode).late == ()


# --- the attempt: late until COMMIT -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """By a device, in the words of a shim, or through the ledger (`through`)."""

    entry: AckRequest
    through: bool


AFTER_FREEZE = st.lists(st.builds(Asked, ENTRIES, st.booleans()), max_size=4)


class Attempt:
    """A source session up to its end, with a ledger beside it that accepts what comes through it, or does not yet."""

    def __init__(self, *, paused: bool) -> None:
        self.state = SourceState(AttemptRef("g", "m", 1), HostRef("h", "1"), "i")
        self.commands: list[Command] = []
        self.version = 0
        self.play(Seen.BEGIN, Seen.BOUND, Seen.VITALS_GOOD, Seen.ACTIVE)
        for device in "abc":
            self.ask(AckRequest(device, 1))
            self.play(Acked(AckRequest(device, 1)))
        if paused:
            self.play(Seen.PAUSED)
        self.play(Seen.PARKED)
        assert self.state.stage is SourceStage.FREEZING

    def play(self, *events: Event) -> None:
        for event in events:
            self.state, commands = source_step(self.state, event)
            self.commands += commands

    def ask(self, entry: AckRequest) -> None:
        """By a device: the session writes it down itself."""
        self.play(Requested(entry))
        self.version += 1
        self.play(RequestsWritten((entry,), (entry,), self.version))


@given(st.booleans(), AFTER_FREEZE, st.lists(ENTRIES, max_size=3), AFTER_FREEZE)
def test_an_attempt_ends_late_exactly_when_something_was_late(
    paused: bool, quiescing: list[Asked], queried: list[AckRequest], afterwards: list[Asked]
) -> None:
    """Nobody is acknowledged any more: late is then a newer generation up to the check, or the ledger until COMMIT."""
    attempt = Attempt(paused=paused)
    frozen_at = attempt.version
    for asked in quiescing:
        if asked.through:
            attempt.version += 1
            attempt.play(RequestsSeen((asked.entry,), attempt.version))
        else:
            attempt.play(Requested(asked.entry))
    attempt.play(Quiesced(tuple(queried)))
    for asked in afterwards:
        if asked.through:
            attempt.version += 1
            attempt.play(RequestsSeen((asked.entry,), attempt.version))
        else:
            attempt.play(Requested(asked.entry))
    attempt.play(Seen.COMPLETED, Seen.SHIMS_SENT, LoadedReport("i", True))

    newer = [asked.entry for asked in quiescing if not asked.through] + queried
    by_check = any(entry.generation > 1 for entry in newer)
    through_ledger = any(asked.through for asked in (*quiescing, *afterwards))
    late = not paused and (by_check or through_ledger)
    report(f"paused: {paused}, late: {late}")
    commits = [command for command in attempt.commands if isinstance(command, Commit)]
    if late:
        assert attempt.state.reason is AbortReason.LATE_SWITCHOVER_ACK
        assert not commits
    else:
        assert attempt.state.reason is None
        assert commits == [Commit(None if paused else frozen_at)], "what it did not see, the commit itself refuses"


# --- QEMU's number ----------------------------------------------------------------------------------------------------


class Step(StrEnum):
    TURN = "turn"
    LOAD = "load"
    DELIVER = "deliver"
    REINIT = "reinit"
    GROW = "grow"
    READ = "read"


STEPS = st.lists(st.tuples(st.sampled_from(Step), st.integers(0, 3)), max_size=25)
MODES = st.sampled_from([AckMode.LEGACY, AckMode.PER_DEVICE])


def run(pair: Pair, steps: list[tuple[Step, int]]) -> None:
    names = [each.name for each in pair.source.devices]
    for step, number in steps:
        name = names[number % len(names)]
        match step:
            case Step.TURN:
                pair.turn()
            case Step.LOAD:
                pair.load()
            case Step.DELIVER:
                pair.deliver(min(1, pair.acks))
            case Step.REINIT:
                pair.source = pair.source.look(name, 4096, reinit=True)
            case Step.GROW:
                pair.source = pair.source.look(name, 8192)
            case Step.READ:
                pair.source = pair.source.read(name, 4096)
        source = pair.source
        preset = int(source.mode is AckMode.LEGACY)
        assert source.pending == preset + source.requests - source.acks
        assert source.may_switch_over == (source.pending == 0)
        assert source.error == ""


@given(MODES, st.integers(1, 4), STEPS)
def test_every_request_is_answered_once_and_then_the_gate_is_open(
    mode: AckMode, devices: int, steps: list[tuple[Step, int]]
) -> None:
    """Between ends of one mode nothing is lost and nothing is answered twice, in whatever order things arrive."""
    pair = Pair(setup(mode), setup(mode), *(f"vf{n}" for n in range(devices)))
    run(pair, steps)
    for _ in range(2):
        pair.turn()
        pair.load()
        pair.deliver()
    source = pair.source
    report(f"{mode}: {source.requests} requests")
    assert source.may_switch_over
    assert all(each.marked for each in source.devices)
    if mode is AckMode.PER_DEVICE:
        assert source.markers == source.acks == source.requests >= devices
    else:
        assert (source.markers, source.acks, source.requests) == (devices, 1, 0)


@given(st.integers(2, 4), STEPS)
def test_a_legacy_source_counts_below_zero_when_every_device_is_acknowledged(
    devices: int, steps: list[tuple[Step, int]]
) -> None:
    pair = Pair(setup(AckMode.LEGACY), setup(AckMode.PER_DEVICE), *(f"vf{n}" for n in range(devices)))
    quiet = [step for step in steps if step[0] is not Step.DELIVER]
    run(pair, quiet)
    for _ in range(2):
        pair.turn()
        pair.load()
    pair.deliver()
    assert pair.source.error == UNDERFLOW
    assert not pair.source.may_switch_over


@settings(max_examples=200)
@given(
    st.sampled_from(AckMode),
    st.integers(1, 4),
    STEPS,
    st.lists(st.sampled_from(["well", "reinit", "failed"]), min_size=4, max_size=4),
    st.booleans(),
)
def test_the_final_query_fails_exactly_for_what_the_last_looks_found(
    mode: AckMode, devices: int, steps: list[tuple[Step, int]], looks: list[str], stopped: bool
) -> None:
    """Stopped by the operator: the same looks, but an ordinary query has collected what they found before."""
    pair = Pair(setup(mode), setup(mode), *(f"vf{n}" for n in range(devices)))
    if mode is not AckMode.OFF:
        run(pair, steps)
        for _ in range(2):
            pair.turn()
            pair.load()
            pair.deliver()
    source = pair.source.stop() if stopped else pair.source.switch_over()
    late = 0
    for device, look in zip(source.devices, looks, strict=False):
        if source.gets_last_look(device.name):
            late += look != "well"
            left = 4096 if look == "reinit" else device.initial_bytes
            source = (
                source.failed_look(device.name)
                if look == "failed"
                else source.look(device.name, left, reinit=look == "reinit")
            )
        source = source.quiesce(device.name)
    if stopped:
        source = source.query(Query.EXACT)
        assert source.may_switch_over
        source = source.switch_over()
    ended = source.query(Query.FINAL)
    report(f"{mode}, stopped: {stopped}, late: {late}")
    failed = late > 0 and not stopped
    assert (ended.stage is QemuStage.FAILED) == failed
    assert ended.error == (late_text(late) if failed else "")
    assert ended.running == failed, (
        "a guest that the switchover stopped runs again; one that the operator stopped does not"
    )


@pytest.mark.parametrize("mode", AckMode)
def test_the_looks_at_the_stop_are_made_in_per_device_mode_only(mode: AckMode) -> None:
    pair = Pair(setup(mode), setup(mode), "vf0")
    assert pair.source.gets_last_look("vf0") == (mode is AckMode.PER_DEVICE)
