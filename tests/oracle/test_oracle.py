"""Real QEMU 11.1 against the machines: named cases of the rules first, then plans that Hypothesis makes.

Every run is compared step by step with our machine of QEMU's accounting and with our ledger (replay.py), its end with
what the plan foretells (plans.py), and QEMU's looks with the devices' own log (runs.py).

`DROVER_SEED=n` repeats the plans of an earlier run, `DROVER_LONG=1` makes 200 instead of 20 (`make oracle`).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from agents.engine.base import EngineError, EngineStatus, HoldStart, OutgoingOptions, RunState, stream_of
from deploy.lab.devices.qemu_acks import (
    IN_PROGRESS,
    POSTCOPY,
    RETURN_PATH,
    SWITCHOVER_ACK,
    UNDERFLOW,
    Final,
    QemuStage,
    late_text,
)
from deploy.lab.devices.scenario import Ask, Call, Delay, Fault, Hook, Lack, Scenario
from deploy.lab.devices.vfio.endpoint import Entry
from orchestrator.core.switchover import AckMode
from tests.fakes import vfio_rig
from tests.oracle import trace, variants
from tests.oracle.lab import HELD, LINK, OPEN, OVER, Lab
from tests.oracle.pair import setup
from tests.oracle.plans import Ending, Plan, Stop, plans
from tests.oracle.replay import Replay
from tests.oracle.runs import Run, Verdict, carry_out, check_waiting, judge

pytestmark = [pytest.mark.qemu]
NEW, LEGACY, OFF = AckMode.PER_DEVICE, AckMode.LEGACY, AckMode.OFF
SLOW_MS = 1500
"""Longer than QEMU takes from its first byte to the switchover, on a busy machine too."""


@dataclass
class Bench:
    """A lab and the event loop that it lives in."""

    lab: Lab
    do: Callable[[Coroutine[Any, Any, Any]], Any]

    def run(self, plan: Plan) -> tuple[Run, Verdict]:
        run = self.do(carry_out(self.lab, plan))
        return run, judge(run)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    lab = Lab(vfio_rig.qemu("11.1"))
    try:
        with asyncio.Runner() as runner:
            yield Bench(lab, runner.run)
    finally:
        lab.close()


def device(*asks: Ask, **other: Any) -> Scenario:
    return Scenario(**({"initial_bytes": 65_536, "stop_copy_bytes": 16_384, "asks": asks} | other))


LATE = Ask(at=Hook.FREEZE, bytes=4096)
AGAIN = Ask(at=Hook.GATE_OPEN, bytes=4096, times=2)
MIDWAY = Ask(after_ms=150, bytes=4096)
READS = (Delay(Call.READ, 100),)
SLOW = (Delay(Call.LOAD, SLOW_MS),)


def case(plan: Plan, *rules: str, id: str) -> Any:
    return pytest.param(plan, id=id, marks=[pytest.mark.rule(rule) for rule in rules])


CASES = [
    case(Plan(NEW, (device(),)), "R8", id="one device"),
    case(Plan(NEW, (device(),) * 4), "R8", "R11", id="four devices"),
    case(Plan(NEW, (device(initial_bytes=0),) * 2), "R10", id="no initial data"),
    case(Plan(NEW, (device(lacks=(Lack.PRE_COPY,)),)), "R10", id="no pre-copy"),
    case(Plan(NEW, (device(LATE),), stop=Stop.BEFORE), "R6", "R10", id="stopped before"),
    case(Plan(NEW, (device(AGAIN), device()), reopened=(0, 1)), "R12", "R28", id="asks again and again"),
    case(Plan(NEW, (device(Ask(at=Hook.PRECOPY, bytes=8192)),)), "R13", id="REINIT before the marker"),
    case(Plan(NEW, (device(MIDWAY, initial_bytes=4 << 20, delays=READS),)), "R13", id="REINIT while data is left"),
    case(Plan(NEW, (device(AGAIN, delays=SLOW),)), "R13", id="REINIT between marker and ACK"),
    case(Plan(NEW, (device(AGAIN, LATE, lacks=(Lack.REINIT,)),)), "R14", "R24", id="cannot say REINIT"),
    case(Plan(NEW, (device(LATE, lacks=(Lack.P2P,)),)), "R24", id="no P2P, so no last look"),
    case(Plan(NEW, (device(LATE),)), "R16", "R17", "R21", id="late"),
    case(Plan(NEW, (device(LATE), device(), device(LATE), device())), "R17", "R26", id="two of four late"),
    case(Plan(NEW, (device(LATE),), stop=Stop.ACKED), "R18", id="asks at the operator's stop"),
    case(Plan(LEGACY, (device(AGAIN, LATE), device())), "R7", "R19", id="legacy"),
    case(Plan(LEGACY, (device(),), stop=Stop.BEFORE), "R6", id="legacy, stopped before"),
    case(Plan(OFF, (device(AGAIN, LATE), device())), "R5", "R19", id="off"),
    case(Plan(OFF, (device(AGAIN, LATE),), old_machine=True), "R5", "R19", id="off, where it would be legacy"),
    case(Plan(OFF, (device(lacks=(Lack.PRE_COPY,)),), old_machine=True), "R5", id="off, and acknowledged at once"),
    case(Plan(NEW, (device(LATE),), ending=Ending.CANCEL), "R23", id="late, but cancelled"),
    case(Plan(NEW, (device(LATE),), ending=Ending.CONTINUE), "R24", id="late, parked meanwhile"),
    case(Plan(NEW, (device(Ask(at=Hook.FINAL_QUERY, bytes=8192)),)), "R24", "R30", id="asks in P2P"),
    case(Plan(NEW, (device(Ask(at=Hook.AFTER_CHECK, bytes=8192)),)), "R30", id="asks in STOP_COPY"),
    case(Plan(NEW, (device(faults=(Fault(Call.LAST_LOOK),)),)), "R31", id="last look fails"),
    case(Plan(NEW, (device(faults=(Fault(Call.QUERY, times=2),)),)), "R31", id="looks in pre-copy fail"),
    case(Plan(NEW, (device(faults=(Fault(Call.SIZE),)),)), "R31", id="size unknown at first"),
]


@pytest.mark.parametrize("plan", CASES)
def test_qemu_does_what_the_rules_say(bench: Bench, plan: Plan) -> None:
    _, verdict = bench.run(plan)
    print(f"{verdict.steps} steps, {verdict.machine.stage}, final query: {verdict.final}")
    assert verdict.steps > 10


@pytest.mark.rule("R31")
def test_a_look_that_failed_lets_the_marker_leave_before_the_data(bench: Bench) -> None:
    initial = 4 << 20
    run, verdict = bench.run(Plan(NEW, (device(initial_bytes=initial, faults=(Fault(Call.QUERY),)),)))
    events = trace.events_of(run.output)
    marker = next(place for place, event in enumerate(events) if isinstance(event, trace.Marker))
    sent = sum(event.bytes for event in events[:marker] if isinstance(event, trace.Read))
    print(f"{sent} of {initial} bytes had left before the marker")
    assert verdict.machine.stage is QemuStage.COMPLETED
    assert sent < initial


@pytest.mark.rule("R31")
def test_new_data_that_is_told_of_after_a_failed_look_is_a_request_of_its_own(bench: Bench) -> None:
    """For the marker has left already, as above; else it would belong to the first (R13)."""
    asks = Ask(at=Hook.PRECOPY, bytes=8192)
    for faults, requests in (((), 1), ((Fault(Call.QUERY),), 2)):
        _, verdict = bench.run(Plan(NEW, (device(asks, initial_bytes=4 << 20, faults=faults),)))
        machine = verdict.machine
        assert (machine.stage, machine.requests, machine.acks) == (QemuStage.COMPLETED, requests, requests)


# --- R20: the superseded first version, on QEMU's side ----------------------------------------------------------------


def calls(log: tuple[Entry, ...], *names: str) -> list[tuple[str, str]]:
    return [(entry.call, entry.asked) for entry in log if entry.call in names]


@pytest.mark.rule("R18", "R20")
def test_the_first_version_would_fail_what_qemu_completes(bench: Bench) -> None:
    """The operator stops the guest while its device's ACK is pending. By the device's log nobody asks afterwards."""
    run, verdict = bench.run(Plan(NEW, (device(delays=SLOW),), stop=Stop.PENDING))
    assert verdict.final is not None
    assert verdict.final == Final(before=1, collected=0, pending=1)
    assert variants.first_version(verdict.final) == late_text(1), "the first version fails it"
    assert (run.status, run.error, run.loaded) == ("completed", "", True)
    looks = [entry for entry in run.log if entry.call in ("PRECOPY_INFO", "LAST_LOOK")]
    assert not any(entry.answer["reinit"] for entry in looks)
    states = [asked for _, asked in calls(run.log, "SET_STATE")]
    assert states[-2:] == ["STOP_COPY", "STOP"], "the device was given away, and never ran again here"


@pytest.mark.rule("R17", "R20")
def test_the_first_version_is_right_where_a_real_device_asked_in_the_gap(bench: Bench) -> None:
    run, verdict = bench.run(Plan(NEW, (device(LATE),)))
    assert verdict.final is not None
    assert verdict.final == Final(before=0, collected=1, pending=1)
    assert variants.first_version(verdict.final) == variants.merged(verdict.final) == run.error == late_text(1)
    asked = [place for place, entry in enumerate(run.log) if entry.call == "LAST_LOOK" and entry.answer["reinit"]]
    assert len(asked) == 1
    states = [asked for _, asked in calls(run.log[asked[0] :], "SET_STATE")]
    assert states[:3] == ["PRE_COPY_P2P", "STOP_COPY", "RUNNING"], "it asked, was frozen all the same, and came back"


# --- set-up -----------------------------------------------------------------------------------------------------------


async def _capabilities(lab: Lab) -> list[set[str]]:
    """Of both ends, in an attempt as the product starts it."""
    async with lab.pair((device(),), OFF) as pair:
        options = OutgoingOptions(stream_of(pair.destination.vmm.metadata), HoldStart.OPEN, 0, LINK, 300)
        await pair.source.vmm.start_outgoing(options)
        ends = [await end.qmp("query-migrate-capabilities") for end in (pair.source, pair.destination)]
        return [{entry["capability"] for entry in end if entry["state"]} for end in ends]


@pytest.mark.rule("R1", "R3", "R29")
def test_both_ends_get_the_same_acks_with_their_return_path_and_no_post_copy(bench: Bench) -> None:
    source, destination = bench.do(_capabilities(bench.lab))
    assert {SWITCHOVER_ACK, RETURN_PATH} <= source & destination
    assert POSTCOPY not in source | destination


async def _refusals(lab: Lab) -> list[str]:
    said: list[str] = []
    async with lab.pair((device(),), NEW) as pair:
        changes = [{RETURN_PATH: False}]
        for change in changes:
            with pytest.raises(EngineError) as refused:
                await pair.source.vmm.set_capabilities(change)
            said.append(str(refused.value))
        await pair.source.vmm.set_capabilities({POSTCOPY: True})
        uri = {"uri": pair.destination.vmm.metadata.endpoint}
        with pytest.raises(EngineError) as refused:
            await pair.source.qmp("migrate", dict(uri))
        said.append(str(refused.value))
        await pair.source.vmm.set_capabilities({POSTCOPY: False})
        await pair.source.qmp("migrate-set-parameters", {"max-bandwidth": 4096})
        await pair.source.qmp("migrate", dict(uri))
        await pair.source.reached(EngineStatus.ACTIVE)
        with pytest.raises(EngineError) as refused:
            await pair.source.vmm.set_capabilities({POSTCOPY: True})
        said.append(str(refused.value))
    return said


@pytest.mark.rule("R1", "R2", "R29")
def test_what_qemu_refuses_it_refuses_in_the_machines_words(bench: Bench) -> None:
    without, postcopy, busy = bench.do(_refusals(bench.lab))
    assert "Capability 'switchover-ack' requires capability 'return-path'" in without
    assert "VFIO migration is not supported with postcopy migration" in postcopy
    assert IN_PROGRESS in busy


@dataclass
class Mismatch:
    source: str
    """Its log."""
    destination: str
    status: str
    error: str
    runs: bool
    copy_is_whole: bool


async def _mismatched(lab: Lab, scenarios: tuple[Scenario, ...], source: AckMode, destination: AckMode) -> Mismatch:
    """Until it is over, or until the source has asked in vain for a while after its last ACK."""
    async with lab.pair(scenarios, source, (source is LEGACY, destination is LEGACY)) as pair:
        await pair.source.qmp("migrate-set-parameters", dict(OPEN))
        await pair.source.qmp("migrate", {"uri": pair.destination.vmm.metadata.endpoint})
        if destination is LEGACY:
            await pair.source.said("source_return_path_thread_switchover_acked")
            asked = pair.source.output().count("exact=1")
            await pair.source.said("exact=1", asked + 50)
        else:
            await pair.source.reached(*OVER)
        info = await pair.source.qmp("query-migrate")
        here = await pair.source.vmm.state()
        there = await pair.destination.vmm.state()
        return Mismatch(
            pair.source.output(),
            pair.destination.output(),
            info["status"],
            info.get("error-desc", ""),
            here.run_state is RunState.RUNNING,
            (there.status, there.run_state) == (EngineStatus.COMPLETED, RunState.PAUSED),
        )


def _replayed(found: Mismatch, mode: AckMode) -> Replay:
    accounts = Plan(mode, (device(),) * 2).accounts()
    approvals = trace.approvals_of(found.destination)
    return Replay(setup(mode), accounts, approvals).play(trace.events_of(found.source))


@pytest.mark.rule("R4")
def test_a_legacy_destination_keeps_a_source_of_today_waiting(bench: Bench) -> None:
    found = bench.do(_mismatched(bench.lab, (device(),) * 2, NEW, LEGACY))
    machine = _replayed(found, NEW).machine
    assert (found.status, machine.requests, machine.acks, machine.pending) == ("active", 2, 1, 1)


@pytest.mark.rule("R4")
def test_a_legacy_source_runs_again_beside_a_whole_copy(bench: Bench) -> None:
    """Only that our destinations start paused keeps the copy from running as well."""
    found = bench.do(_mismatched(bench.lab, (device(), device(delays=SLOW)), LEGACY, NEW))
    machine = _replayed(found, LEGACY).machine
    assert (found.status, found.error, found.runs) == ("failed", UNDERFLOW, True)
    assert (machine.stage, machine.running, machine.pending) == (QemuStage.FAILED, True, 2**32 - 1)
    assert found.copy_is_whole


# --- what takes more than one command ---------------------------------------------------------------------------------


async def _again(lab: Lab) -> tuple[list[str], str, list[str]]:
    """A late ACK, and at once the next migration, to another process."""
    errors: list[str] = []
    async with lab.pair((device(LATE), device()), NEW) as pair:
        await pair.source.qmp("migrate-set-parameters", dict(OPEN))
        approvals: list[str] = []
        for _ in range(2):
            pair.source.statuses.clear()
            await pair.source.qmp("migrate", {"uri": pair.destination.vmm.metadata.endpoint})
            await pair.source.reached(*OVER)
            await pair.source.settled()
            errors.append((await pair.source.qmp("query-migrate")).get("error-desc", ""))
            approvals += trace.approvals_of(pair.destination.output())
            if len(errors) == 1:
                await pair.new_destination()
        return errors, pair.source.output(), approvals


@pytest.mark.rule("R9", "R22")
def test_after_a_late_ack_the_next_migration_starts_anew(bench: Bench) -> None:
    errors, output, approvals = bench.do(_again(bench.lab))
    replay = Replay(setup(NEW), Plan(NEW, (device(),) * 2).accounts(), approvals).play(trace.events_of(output))
    assert errors == [late_text(1), ""]
    assert replay.finals == [Final(before=0, collected=1, pending=1), Final(before=0, collected=0, pending=0)]
    assert (replay.machine.stage, replay.machine.requests) == (QemuStage.COMPLETED, 2)


async def _stopped_and_continued(lab: Lab) -> tuple[str, str]:
    """In the middle of the device's initial data, of which a MiB leaves with each turn."""
    async with lab.pair((device(initial_bytes=24 << 20, delays=READS),), NEW) as pair:
        await pair.source.qmp("migrate-set-parameters", dict(HELD))
        await pair.source.qmp("migrate", {"uri": pair.destination.vmm.metadata.endpoint})
        await pair.source.said("vfio_save_iterate")
        await pair.source.qmp("stop")
        await pair.source.qmp("cont")
        await pair.source.qmp("migrate-set-parameters", dict(OPEN))
        asked = pair.source.output().count("exact=1")
        await pair.source.said("exact=1", asked + 100)
        before = (await pair.source.qmp("query-migrate"))["status"]
        await pair.source.qmp("migrate_cancel")
        await pair.source.reached(*OVER)
        return before, pair.source.output()


@pytest.mark.rule("R15")
def test_a_guest_continued_in_pre_copy_waits_for_an_ack_that_cannot_come(bench: Bench) -> None:
    status, output = bench.do(_stopped_and_continued(bench.lab))
    machine = Replay(setup(NEW), Plan(NEW, (device(),)).accounts()).play(trace.events_of(output)).machine
    assert (status, machine.stage) == ("active", QemuStage.CANCELLED)
    assert (machine.requests, machine.acks, machine.markers, machine.pending) == (1, 0, 0, 1)


STOPPED_MIDWAY = device(initial_bytes=24 << 20, delays=READS)
"""With the marker of another device as the signal: most of its initial data is unsent when the operator stops."""
UNKNOWN = replace(STOPPED_MIDWAY, faults=(Fault(Call.SIZE),))


@pytest.mark.rule("R31")
@pytest.mark.parametrize("mode", [NEW, LEGACY])
def test_a_guest_stopped_before_an_unknown_size_is_asked_anew_waits_for_ever(bench: Bench, mode: AckMode) -> None:
    run, verdict = bench.run(Plan(mode, (device(), UNKNOWN), stop=Stop.PENDING))
    print(f"{verdict.replay.in_vain} estimates in vain, {verdict.machine.pending} ACKs pending")
    assert run.waited
    assert verdict.replay.in_vain > 1000
    assert verdict.machine.pending == 1, "which matters to nobody: the guest is stopped"
    assert (run.status, run.runs, verdict.final) == ("cancelled", False, None)
    sizes = [entry.answer for entry in run.log if (entry.device, entry.call) == ("d1", "DATA_SIZE")]
    assert [list(answer) for answer in sizes] == [["errno", "why"]], "asked once, at the begin, and never again"


@pytest.mark.rule("R31")
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(Plan(NEW, (device(), STOPPED_MIDWAY), stop=Stop.PENDING), id="size known"),
        pytest.param(Plan(NEW, (device(delays=SLOW, faults=(Fault(Call.SIZE),)),), stop=Stop.PENDING), id="all sent"),
    ],
)
def test_a_stopped_guest_waits_for_nothing_else(bench: Bench, plan: Plan) -> None:
    run, verdict = bench.run(plan)
    assert (run.waited, run.status, verdict.machine.stage) == (False, "completed", QemuStage.COMPLETED)


async def _let_go(lab: Lab) -> tuple[str, Replay]:
    async with lab.pair((device(), UNKNOWN), NEW) as pair:
        await pair.source.qmp("migrate-set-parameters", dict(OPEN))
        await pair.source.qmp("migrate", {"uri": pair.destination.vmm.metadata.endpoint})
        await pair.source.said("vfio_send_init_data_flag")
        await pair.source.qmp("stop")
        await pair.source.asks_in_vain()
        await pair.source.qmp("migrate-set-parameters", {"downtime-limit": 2_000_000})
        await pair.source.reached(*OVER)
        status = (await pair.source.settled()).status.value
        replay = Replay(setup(NEW), Plan(NEW, (device(), UNKNOWN)).accounts())
        return status, replay.play(trace.events_of(pair.source.output()))


@pytest.mark.rule("R31")
def test_what_waits_for_an_unknown_size_completes_with_a_limit_beyond_it(bench: Bench) -> None:
    status, replay = bench.do(_let_go(bench.lab))
    assert (status, replay.machine.stage, replay.in_vain) == ("completed", QemuStage.COMPLETED, 0)
    assert replay.threshold_bytes > 100 << 30


# --- plans that nobody thought of -------------------------------------------------------------------------------------


def _explore(bench: Bench, capsys: pytest.CaptureFixture[str], runs: int) -> None:
    """What fails is not made smaller: a plan costs a second, and may have failed by the luck of a thread."""
    seed = int(os.environ.get("DROVER_SEED") or secrets.randbelow(1 << 32))
    tally: Counter[str] = Counter()
    began = time.monotonic()

    @hypothesis.seed(seed)
    @settings(
        max_examples=runs,
        deadline=None,
        database=None,
        print_blob=False,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(plans())
    def one(plan: Plan) -> None:
        run, verdict = bench.run(plan)
        tally["waited in vain"] += run.waited
        tally.update(["runs", str(plan.mode), f"stopped {plan.stop}", str(verdict.machine.stage)])
        tally["steps"] += verdict.steps

    with capsys.disabled():
        print(f"\n  oracle: repeat with DROVER_SEED={seed}", flush=True)
        one()
        took_s = (time.monotonic() - began) / max(1, tally["runs"])
        counts = ", ".join(f"{tally[name]} {name}" for name in sorted(tally, key=lambda name: -tally[name]))
        print(f"  oracle: {counts}; {took_s:.2f} s a run", flush=True)
    assert tally["runs"] >= runs


@pytest.mark.timeout(600)
def test_whatever_is_planned_qemu_and_the_machines_agree(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    _explore(bench, capsys, 20)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.skipif("DROVER_LONG" not in os.environ, reason="200 runs of real QEMU: make oracle")
def test_two_hundred_plans(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    _explore(bench, capsys, int(os.environ.get("DROVER_RUNS", "200")))


# --- the oracle itself ------------------------------------------------------------------------------------------------


def _altered(output: str, old: str, new: str) -> str:
    assert old in output
    return output.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("collected switchover ack pending=2", "collected switchover ack pending=1", "collected by the estimate query"),
        ("total switchover ack pending=2", "total switchover ack pending=3", "pending after the estimate query"),
        ("vfio_send_init_data_flag", "nothing", "the marker of vfio-d0 left"),
        ("migration_thread_low_pending", "nothing", "the switchover was decided"),
        ("request switchover ack 1, exact 0", "request switchover ack 0, exact 0", "asks in the estimate query"),
        ("migrate_set_state new state failed", "migrate_set_state new state completed", "not in stage failed"),
        ("_request_switchover_ack  (vfio-d1)", "_request_switchover_ack  (vfio-d0)", "asks in a look"),
        ("switchover_ack_pending_num 0", "switchover_ack_pending_num 7", "pending after an ACK"),
    ],
)
def test_a_step_that_differs_is_noticed(bench: Bench, old: str, new: str, said: str) -> None:
    run, _ = bench.run(Plan(NEW, (device(), device(LATE))))
    with pytest.raises((AssertionError, trace.UnknownTraceError), match=said):
        judge(replace(run, output=_altered(run.output, old, new)))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("exact=1, final=0", "exact=0, final=0", "an exact query follows the estimate: QEMU False, our machine True"),
        ("exact=0, final=0", "exact=1, final=0", "an exact query follows the estimate: QEMU True, our machine False"),
    ],
)
def test_a_query_of_the_wrong_kind_is_noticed(bench: Bench, old: str, new: str, said: str) -> None:
    run, _ = bench.run(Plan(NEW, (device(), STOPPED_MIDWAY)))
    first, rest = run.output.split("qemu_savevm_query_pending", 1)  # the very first query has none before it
    second, rest = rest.split("qemu_savevm_query_pending", 1)
    begin = "qemu_savevm_query_pending".join((first, second, ""))
    with pytest.raises(AssertionError, match=said):
        judge(replace(run, output=begin + _altered(rest, old, new)))


def test_a_wait_in_vain_that_was_not_seen_is_noticed(bench: Bench) -> None:
    plan = Plan(NEW, (device(), UNKNOWN), stop=Stop.PENDING)
    run, verdict = bench.run(plan)
    with pytest.raises(AssertionError, match="waited in vain: QEMU False, our machine True"):
        check_waiting(replace(run, waited=False), verdict.replay)
    with pytest.raises(AssertionError, match="QEMU waits in vain"):
        check_waiting(replace(run, plan=replace(plan, devices=(device(), STOPPED_MIDWAY))), verdict.replay)


def test_a_wait_in_vain_that_the_machine_does_not_know_is_noticed(bench: Bench) -> None:
    run, _ = bench.run(Plan(NEW, (device(delays=SLOW, faults=(Fault(Call.SIZE),)),), stop=Stop.PENDING))
    with pytest.raises(AssertionError, match="waited in vain: QEMU True, our machine False"):
        judge(replace(run, waited=True))


@pytest.mark.parametrize("what", ["plan", "log", "status"])
def test_an_end_that_differs_is_noticed(bench: Bench, what: str) -> None:
    plan = Plan(NEW, (device(), device(LATE)))
    run, _ = bench.run(plan)
    changed = {
        "plan": lambda: replace(run, plan=replace(plan, devices=(device(AGAIN), device(LATE)))),
        "log": lambda: replace(run, log=tuple(entry for entry in run.log if entry.call != "LAST_LOOK")),
        "status": lambda: replace(run, status="completed"),
    }
    with pytest.raises(AssertionError):
        judge(changed[what]())
