"""R1-R4, R9, R22, R29: what must hold before the first byte, and when an attempt begins again (docs/rules.md)."""

from __future__ import annotations

import pytest

from deploy.lab.devices.qemu_acks import (
    IN_PROGRESS,
    PAUSE,
    POSTCOPY,
    RETURN_PATH,
    SWITCHOVER_ACK,
    UNDERFLOW,
    DeviceAccount,
    QemuRefusal,
    QemuSource,
    QemuStage,
    Query,
    StreamRefused,
    late_text,
)
from orchestrator.core import handover
from orchestrator.core.errors import AbortReason, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AckRequest, HostRef
from orchestrator.core.placement import HostView, Need, choose
from orchestrator.core.switchover import AckLedger, AckMode
from tests.oracle.pair import Pair, begun, served, setup, stopped_for_switchover

OFF, LEGACY, NEW = setup(AckMode.OFF), setup(AckMode.LEGACY), setup(AckMode.PER_DEVICE)


@pytest.mark.rule("R1")
def test_the_ack_needs_its_return_path() -> None:
    source = QemuSource()
    with pytest.raises(QemuRefusal, match=r"^Capability 'switchover-ack' requires capability 'return-path'$"):
        source.configure(SWITCHOVER_ACK, PAUSE)
    assert source.configure(SWITCHOVER_ACK, RETURN_PATH).mode is AckMode.PER_DEVICE


@pytest.mark.rule("R2")
@pytest.mark.parametrize("parked", [False, True])
def test_capabilities_do_not_change_under_a_migration(parked: bool) -> None:
    source = served(begun("a", more=(PAUSE,) if parked else ()), "a")
    busy = [source, stopped_for_switchover(source)]
    for each in busy:
        with pytest.raises(QemuRefusal, match=IN_PROGRESS):
            each.configure(RETURN_PATH)
        with pytest.raises(QemuRefusal, match=IN_PROGRESS):
            each.migrate(())
    assert source.cancel().configure(RETURN_PATH).mode is AckMode.OFF


@pytest.mark.rule("R2")
@pytest.mark.parametrize("mode", AckMode)
def test_the_mode_of_a_ledger_stays(mode: AckMode) -> None:
    asked = AckRequest("a", 1)
    ledger = AckLedger(mode=mode).request(asked).ack(asked).stop_by_wish().resume_by_wish().freeze().pass_check()
    assert ledger.mode is mode


@pytest.mark.rule("R3")
def test_an_ack_at_the_source_only_kills_the_destination() -> None:
    pair = Pair(NEW, OFF, "vf0")
    pair.turn()
    with pytest.raises(StreamRefused, match=r"^vf0: Received INIT_DATA_SENT but switchover ack is not used$"):
        pair.load()


@pytest.mark.rule("R3")
def test_an_ack_at_the_destination_only_is_as_if_it_were_off() -> None:
    pair = Pair(OFF, NEW, "vf0")
    pair.turn()
    pair.load()
    assert (pair.source.pending, pair.acks, pair.source.may_switch_over) == (0, 0, True)


@pytest.mark.rule("R4")
def test_a_legacy_destination_answers_two_requests_once() -> None:
    pair = Pair(NEW, LEGACY, "vf0", "vf1")
    pair.turn()
    pair.load()
    pair.deliver()
    assert (pair.source.acks, pair.source.pending) == (1, 1)
    pair.turn()
    assert not pair.markers, "nothing can come any more"
    assert not pair.source.may_switch_over


@pytest.mark.rule("R4")
def test_a_legacy_source_gets_one_ack_too_many_and_may_run_beside_its_copy() -> None:
    pair = Pair(LEGACY, NEW, "vf0", "vf1")
    pair.turn()
    pair.load()
    pair.deliver(1)
    assert pair.source.may_switch_over
    early = pair.source.acked()
    assert (early.pending, early.error, early.may_switch_over) == (2**32 - 1, UNDERFLOW, False)
    late = stopped_for_switchover(pair.source).query(Query.FINAL).acked()
    assert late.stage is QemuStage.DEVICE, "the destination has everything, and would run"
    ended = late.finish()
    assert (ended.stage, ended.running, ended.error) == (QemuStage.FAILED, True, UNDERFLOW)


@pytest.mark.rule("R4")
def test_a_host_of_another_mode_is_no_destination() -> None:
    hosts = [
        HostView(HostRef("h1", "b"), 1024, switchover_ack="per-device"),
        HostView(HostRef("h2", "b"), 1024, switchover_ack="legacy"),
    ]
    choice = choose(hosts, Need("g", "g", "h1", 64, "pc-i440fx-11.1", inside=True))
    assert choice.destination is None
    refused = next(verdict for verdict in choice.verdicts if verdict.host == "h2")
    assert refused.reason is RefusalReason.MACHINE_TYPE_MISMATCH


@pytest.mark.rule("R4")
def test_a_machine_type_for_which_both_ends_count_in_the_same_way_may_go() -> None:
    hosts = [
        HostView(HostRef("h1", "b"), 1024, switchover_ack="per-device"),
        HostView(HostRef("h2", "b"), 1024, switchover_ack="legacy"),
    ]
    assert choose(hosts, Need("g", "g", "h1", 64, "pc-i440fx-11.0", inside=True)).destination == HostRef("h2", "b")


@pytest.mark.rule("R9")
@pytest.mark.parametrize(("mode", "preset"), [(AckMode.OFF, 0), (AckMode.LEGACY, 1), (AckMode.PER_DEVICE, 0)])
def test_nothing_of_an_earlier_migration_counts(mode: AckMode, preset: int) -> None:
    first = begun("a", mode=mode).query(Query.ESTIMATE).iterate("a").cancel()
    again = first.migrate([DeviceAccount("a")])
    assert (again.pending, again.requests, again.acks, again.final) == (preset, 0, 0, None)
    assert not again.device("a").marked


@pytest.mark.rule("R9")
def test_an_ack_of_an_earlier_attempt_answers_nothing() -> None:
    """Generations go on where ledgers begin anew."""
    assert not AckLedger().request(AckRequest("a", 2)).ack(AckRequest("a", 1)).gate_open


@pytest.mark.rule("R22")
def test_after_a_late_ack_the_next_migration_may_start_at_once() -> None:
    failed = stopped_for_switchover(served(begun("a"), "a"), "a").query(Query.FINAL)
    assert failed.error == late_text(1)
    again = served(failed.migrate([DeviceAccount("a")]), "a")
    assert stopped_for_switchover(again).query(Query.FINAL).finish().stage is QemuStage.COMPLETED


@pytest.mark.rule("R22")
def test_a_late_ack_leads_to_another_attempt_with_a_process_of_its_own() -> None:
    here, there = HostRef("s", "1"), HostRef("d", "1")
    idle = GuestRecord("g", Ownership.IDLE, here)
    opened = handover.open_attempt(idle, "m", 1, there, epoch=1, writer="w")
    bound = handover.bind(opened, "m", 1, "first", writer="w")
    late = handover.abort(bound, "m", 1, AbortReason.LATE_SWITCHOVER_ACK, ("a",), writer="w")
    assert handover.may_retry(late)
    again = handover.open_attempt(late, "m", 2, there, epoch=1, writer="w")
    assert (again.attempt, again.inc) == (2, ""), "the process of the first attempt is not bound again"


@pytest.mark.rule("R29")
def test_post_copy_and_vfio_devices_exclude_each_other() -> None:
    source = QemuSource(setup(AckMode.PER_DEVICE, POSTCOPY))
    with pytest.raises(QemuRefusal, match=r"^vf0: VFIO migration is not supported with postcopy migration$"):
        source.migrate([DeviceAccount("vf0")])
    assert source.migrate(()).stage is QemuStage.ACTIVE
