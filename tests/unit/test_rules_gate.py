"""R5-R15, R28: when the guest may be stopped (docs/rules.md). First QEMU's number, then our ledger."""

from __future__ import annotations

import pytest

from agents.handover.source import SourceState, source_step
from agents.handover.words import Acked, Do, Requested, RequestsWritten, Seen
from deploy.lab.devices.qemu_acks import RETURN_PATH, AckSetup, DeviceAccount, QemuSource, QemuStage, Query
from orchestrator.core.ids import AckRequest, AttemptRef, HostRef
from orchestrator.core.switchover import AckLedger, AckMode
from tests.oracle.pair import Pair, begun, lacking, last_look, served, setup, stopped_for_switchover

A1, A2, B1 = AckRequest("a", 1), AckRequest("a", 2), AckRequest("b", 1)


@pytest.mark.rule("R5")
def test_with_acks_off_nobody_waits() -> None:
    source = begun("a", mode=AckMode.OFF, initial_bytes=1 << 20).query(Query.EXACT)
    assert (source.requests, source.may_switch_over) == (0, True)
    assert not source.read("a", 1 << 20).marks("a"), "the destination would die of a marker"
    legacy = QemuSource(AckSetup(frozenset({RETURN_PATH}), legacy=True)).migrate([DeviceAccount("a")])
    assert (legacy.pending, legacy.may_switch_over) == (1, True), "counted, and of no consequence"
    ours = AckLedger(mode=AckMode.OFF).request(A1)
    assert ours.gate_open
    assert ours.pending == ()


@pytest.mark.rule("R6")
@pytest.mark.parametrize("mode", [AckMode.LEGACY, AckMode.PER_DEVICE])
def test_a_stopped_guest_has_nothing_to_wait_for(mode: AckMode) -> None:
    source = begun("a", mode=mode).query(Query.EXACT)
    assert (source.pending, source.may_switch_over) == (1, False)
    assert source.stop().may_switch_over
    ours = AckLedger(mode=mode).request(A1)
    assert not ours.gate_open
    assert ours.stop_by_wish().gate_open


@pytest.mark.rule("R7")
def test_the_legacy_ack_comes_once_and_is_never_revoked() -> None:
    source = begun("a", "b", mode=AckMode.LEGACY).query(Query.EXACT)
    assert (source.pending, source.requests, source.may_switch_over) == (1, 0, False)
    source = source.iterate("a").iterate("b").acked()
    assert source.may_switch_over
    source = source.look("a", 4096, reinit=True).query(Query.EXACT).read("a", 4096)
    assert (source.may_switch_over, source.marks("a")) == (True, False)


@pytest.mark.rule("R7")
def test_a_legacy_destination_without_devices_acknowledges_at_once() -> None:
    pair = Pair(setup(AckMode.LEGACY), setup(AckMode.LEGACY))
    assert (pair.acks, pair.source.may_switch_over) == (1, False)
    pair.deliver()
    assert pair.source.may_switch_over


@pytest.mark.rule("R7")
def test_one_ack_is_all_of_them_in_our_legacy_mode() -> None:
    silent = AckLedger(mode=AckMode.LEGACY)
    assert not silent.gate_open, "whether or not anybody asked"
    ours = silent.request(A1).request(B1)
    assert (ours.gate_open, ours.pending) == (False, (A1, B1))
    ours = ours.ack(B1)
    assert (ours.gate_open, ours.pending) == (True, ())
    assert ours.request(A2).gate_open


@pytest.mark.rule("R8")
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_the_gate_opens_with_the_last_ack(devices: int) -> None:
    names = "abcd"[:devices]
    source = begun(*names).query(Query.EXACT)
    for name in names:
        assert not source.may_switch_over
        source = source.iterate(name).acked()
    assert source.may_switch_over
    ours = AckLedger()
    for name in names:
        ours = ours.request(AckRequest(name, 1))
    for name in names:
        assert not ours.gate_open
        ours = ours.ack(AckRequest(name, 1))
    assert ours.gate_open


@pytest.mark.rule("R10")
def test_each_device_with_pre_copy_asks_even_without_initial_data() -> None:
    source = begun("a", initial_bytes=0).query(Query.ESTIMATE)
    assert (source.requests, source.marks("a")) == (1, True)
    plain = QemuSource(setup(AckMode.PER_DEVICE)).migrate([DeviceAccount("a", precopy=False)]).query(Query.EXACT)
    assert (plain.pending, plain.marks("a"), plain.may_switch_over) == (0, False, True)
    assert AckLedger().gate_open


@pytest.mark.rule("R10")
def test_a_device_of_a_stopped_guest_never_asks() -> None:
    source = QemuSource(setup(AckMode.PER_DEVICE)).stop().migrate([DeviceAccount("a")]).query(Query.ESTIMATE)
    assert (source.pending, source.marks("a"), source.gets_last_look("a")) == (0, False, False)
    ended = source.switch_over().query(Query.FINAL).finish()
    assert (ended.stage, ended.running) == (QemuStage.COMPLETED, False)


@pytest.mark.rule("R11")
def test_each_request_needs_an_ack() -> None:
    source = begun("a", "b").query(Query.EXACT).iterate("a").acked()
    assert (source.pending, source.may_switch_over) == (1, False)


@pytest.mark.rule("R11")
def test_our_ack_answers_its_own_device_only() -> None:
    ours = AckLedger().request(A1).request(B1).ack(B1).ack(B1)
    assert ours.pending == (A1,)
    assert ours.ack(A1).gate_open


@pytest.mark.rule("R12")
def test_reinit_closes_the_gate_until_a_second_ack() -> None:
    source = served(begun("a", initial_bytes=1 << 20), "a")
    assert source.may_switch_over
    source = source.look("a", 4096, reinit=True).query(Query.EXACT)
    assert (source.pending, source.may_switch_over) == (1, False)
    assert not source.marks("a"), "new initial data is left"
    source = source.read("a", 4096).iterate("a").acked()
    assert (source.markers, source.acks, source.may_switch_over) == (2, 2, True)
    ours = AckLedger().request(A1).ack(A1).request(A2)
    assert not ours.gate_open
    assert ours.ack(A2).gate_open


@pytest.mark.rule("R13")
def test_reinit_before_the_marker_is_covered_by_it() -> None:
    source = begun("a", initial_bytes=1 << 20).query(Query.EXACT).read("a", 4096).iterate("a")
    source = source.look("a", 2 << 20, reinit=True).query(Query.EXACT)
    assert (source.pending, source.requests) == (1, 1)
    source = source.read("a", 2 << 20).iterate("a")
    assert (source.markers, source.acked().may_switch_over) == (1, True)


@pytest.mark.rule("R13")
def test_reinit_between_marker_and_ack_needs_both_acks() -> None:
    source = begun("a").query(Query.EXACT).iterate("a")
    source = source.look("a", 4096, reinit=True).query(Query.EXACT)
    assert source.pending == 2
    source = source.acked()
    assert not source.may_switch_over, "that was the ACK of the old data"
    assert source.read("a", 4096).iterate("a").acked().may_switch_over


@pytest.mark.rule("R13")
def test_our_ack_of_an_older_generation_answers_nothing_newer_even_twice() -> None:
    ours = AckLedger().request(A1).request(A2).ack(A1).ack(A1)
    assert ours.pending == (A2,)
    assert not ours.gate_open
    assert ours.ack(A2).gate_open
    assert AckLedger().request(A2).request(A1).ack(A2).gate_open, "an older request that comes late asks for nothing"


@pytest.mark.rule("R14")
def test_growth_without_the_flag_is_no_request() -> None:
    source = served(begun("a"), "a")
    grown = source.look("a", 2 << 20).query(Query.EXACT)
    assert (grown.pending, grown.may_switch_over, grown.device("a").initial_bytes) == (0, True, 2 << 20)
    unable = lacking(source, "a", "reinit").look("a", 2 << 20, reinit=True).query(Query.EXACT)
    assert unable.pending == 0, "the flags of a device that did not opt in mean nothing"
    assert not lacking(source, "a", "reinit").gets_last_look("a")


@pytest.mark.rule("R15")
def test_stop_and_cont_leave_a_vfio_device_that_can_never_be_acknowledged() -> None:
    source = begun("a", initial_bytes=1 << 20).query(Query.EXACT)
    stopped = last_look(source.stop(), "a").query(Query.EXACT)
    assert stopped.may_switch_over
    again = stopped.cont()
    assert not again.may_switch_over
    assert not again.read("a", 1 << 20).marks("a"), "the marker can never leave"
    with pytest.raises(ValueError, match="not in PRE_COPY"):
        again.look("a", 0)


@pytest.mark.rule("R15")
def test_our_gate_is_evaluated_anew_when_the_guest_runs_again() -> None:
    ours = AckLedger().request(A1).stop_by_wish()
    assert ours.gate_open
    assert not ours.resume_by_wish().gate_open
    assert ours.resume_by_wish().ack(A1).gate_open


@pytest.mark.rule("R28")
def test_a_request_that_the_exact_query_found_closes_the_gate_of_its_own_iteration() -> None:
    source = served(begun("a"), "a").query(Query.ESTIMATE)
    assert source.switches_over(1000, 1000), "if the gate were evaluated before the exact query"
    found = source.look("a", 300_000, reinit=True).query(Query.EXACT)
    assert not found.switches_over(1000, 1000)
    with pytest.raises(ValueError, match="1 ACKs are pending"):
        found.switch_over()


@pytest.mark.rule("R28")
def test_our_gate_closes_when_the_request_is_reported_and_opens_when_it_is_durable_too() -> None:
    state = SourceState(AttemptRef("g", "m", 1), HostRef("h", "1"), "i")
    for event in (Seen.BEGIN, Seen.BOUND, Seen.VITALS_GOOD, Seen.ACTIVE):
        state, commands = source_step(state, event)
    assert Do.RELEASE in commands
    state, commands = source_step(state, Requested(A1))
    assert Do.HOLD in commands
    state, commands = source_step(state, Acked(A1))
    assert Do.RELEASE not in commands, "acknowledged, and nobody else could know of it"
    state, commands = source_step(state, RequestsWritten((A1,), (A1,), 1))
    assert Do.RELEASE in commands


@pytest.mark.rule("R8")
def test_a_decision_needs_the_threshold_as_well() -> None:
    source = served(begun("a"), "a")
    assert not source.switches_over(1001, 1000)
    assert stopped_for_switchover(source).stage is QemuStage.DEVICE
