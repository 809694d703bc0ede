"""Placement: the reason for each host, the choice, and what a plan promises."""

from __future__ import annotations

import pytest

from orchestrator.core.errors import RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.placement import (
    GuestInput,
    HostInput,
    HostView,
    Need,
    choose,
    host_views,
    judge,
    obstacles,
    pack,
    plan,
)
from orchestrator.core.records import Cordon, GuestSpec, HostRecord, Reservations

NEED = Need("g", "web", "h1", 100, "pc")


def view(name: str, memory: int = 1000, **other: object) -> HostView:
    return HostView(HostRef(name, "b"), memory, **other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (view("h1"), RefusalReason.INVALID_ARGUMENT),
        (view("h2", cordoned=True, cordon_reason="disk"), RefusalReason.HOST_CORDONED),
        (view("h2", machine_types=("q35",)), RefusalReason.MACHINE_TYPE_MISMATCH),
        (view("h2", accelerator="kvm"), RefusalReason.MACHINE_TYPE_MISMATCH),
        (view("h2", switchover_ack="new"), RefusalReason.MACHINE_TYPE_MISMATCH),
        (view("h2", used_mib=500, reserved_mib=401), RefusalReason.NO_CAPACITY),
        (view("h2", live=False), RefusalReason.HOST_NOT_LIVE),
    ],
)
def test_each_obstacle_has_its_reason(host: HostView, reason: RefusalReason) -> None:
    verdict = judge(host, NEED, source=view("h1", accelerator="tcg"))
    assert (verdict.eligible, verdict.reason) == (False, reason)
    assert verdict.message


def test_exactly_enough_memory_is_enough() -> None:
    assert judge(view("h2", memory=100), NEED).eligible
    assert not judge(view("h2", memory=99), NEED).eligible


def test_most_memory_left_wins_and_shunned_hosts_come_last() -> None:
    hosts = [view("h1"), view("h2", 500), view("h3", 900)]
    first, second = choose(hosts, NEED), choose(hosts, NEED, avoid=["h3"])
    assert first.destination == HostRef("h3", "b")
    assert second.destination == HostRef("h2", "b")
    only = choose(hosts, NEED, avoid=["h2", "h3"])
    assert only.destination == HostRef("h3", "b")


def test_a_silent_host_that_would_do_makes_the_answer_transient() -> None:
    choice = choose([view("h1"), view("h2", live=False)], NEED)
    assert choice.destination is None
    assert choice.transient
    assert not choose([view("h1"), view("h2", 10)], NEED).transient


def test_a_refusal_grows_with_the_reasons_and_not_with_the_hosts() -> None:
    few = choose([view("h1"), view("h2", 10), view("h3", cordoned=True)], NEED)
    assert few.message == "no host can take web (100 MiB): h2 has 10 MiB free, web needs 100 MiB; h3 is cordoned"
    hosts = [view("h1"), *(view(f"s{n:03}", 10) for n in range(200))]
    hosts += [view("z", cordoned=True, cordon_reason="w" * 1000)]
    many = choose(hosts, NEED)
    assert obstacles(many.verdicts) == {
        RefusalReason.NO_CAPACITY: 200,
        RefusalReason.HOST_CORDONED: 1,
    }
    assert len(many.message) < 600
    assert "201 hosts (200 NO_CAPACITY, 1 HOST_CORDONED), among them: s000 has 10 MiB free" in many.message
    assert "z is cordoned" in many.message
    assert len(many.verdicts) == 202


@pytest.mark.parametrize(
    ("others", "reason", "passing"),
    [
        ([view("h2", cordoned=True), view("h3", cordoned=True)], RefusalReason.HOST_CORDONED, True),
        ([view("h2", machine_types=("q35",))], RefusalReason.MACHINE_TYPE_MISMATCH, False),
        ([view("h2", live=False)], RefusalReason.HOST_NOT_LIVE, True),
        ([view("h2", used_mib=950), view("h3", cordoned=True)], RefusalReason.NO_CAPACITY, True),
        ([view("h2", 99)], RefusalReason.NO_CAPACITY, False),
        ([view("h2", 99, cordoned=True), view("h3", machine_types=("q35",))], RefusalReason.NO_CAPACITY, False),
        ([], RefusalReason.NO_CAPACITY, True),
    ],
)
def test_the_only_reason_is_the_reason_and_time_may_mend_what_is_passing(
    others: list[HostView], reason: RefusalReason, passing: bool
) -> None:
    choice = choose([view("h1"), *others], NEED)
    assert (choice.destination, choice.reason, choice.passing) == (None, reason, passing)


def test_a_preferred_host_is_taken_if_it_can_be_and_is_not_shunned() -> None:
    hosts = [view("h1"), view("h2", 500), view("h3", 900)]
    assert choose(hosts, NEED, prefer="h2").destination == HostRef("h2", "b")
    assert choose(hosts, NEED, prefer="h2", avoid=["h2"]).destination == HostRef("h3", "b")
    assert choose([*hosts[:1], view("h2", 50), hosts[2]], NEED, prefer="h2").destination == HostRef("h3", "b")


def test_a_packing_that_exists_is_found() -> None:
    needs = [Need(f"g{n}", f"g{n}", "s", mib) for n, mib in enumerate([6, 4, 4])]
    assert pack([view("s", 100, cordoned=True), view("a", 8), view("b", 6)], needs) == {"g0": "b", "g1": "a", "g2": "a"}


def test_memory_is_spread_where_that_suffices() -> None:
    needs = [Need(f"g{n}", f"g{n}", "s", 100) for n in range(4)]
    places = pack([view("s"), view("a"), view("b")], needs)
    assert sorted(places.values()) == ["a", "a", "b", "b"]


def test_a_promise_to_the_migration_itself_is_not_in_its_way() -> None:
    (h1,) = host_views([host("h1", m=100, other=50)], [], but="m")
    assert (h1.reserved_mib, h1.arrivals) == (50, 1)


def test_unknown_destination_is_named() -> None:
    choice = choose([view("h1")], NEED, wanted="h9")
    assert choice.reason is RefusalReason.NOT_FOUND
    assert "h9" in choice.message


def test_plan_counts_arrivals_and_keeps_order() -> None:
    needs = [Need(f"g{n}", f"g{n}", "h1", mib) for n, mib in enumerate([100, 400, 300, 300])]
    planned = plan([view("h1"), view("h2", 500), view("h3", 500)], needs)
    assert [p.need.guest for p in planned] == ["g0", "g1", "g2", "g3"]
    assert [p.choice.destination is not None for p in planned] == [True, True, True, False]


def host(name: str, **promised: int) -> HostInput:
    record = HostRecord(name, "b", "c", "p", 1000, 1000)
    return HostInput(record, True, Cordon(), Reservations(memory_mib=promised))


def guest(uuid: str, record: GuestRecord) -> GuestInput:
    return GuestInput(uuid, record, GuestSpec(uuid, 100))


def test_a_committed_guest_takes_memory_at_both_ends_but_not_twice() -> None:
    here, there = HostRef("h1", "b"), HostRef("h2", "b")
    moved = GuestRecord("a", Ownership.COMMITTED, there, migration="m", attempt=1, inc="i", source=here)
    h1, h2 = host_views([host("h1"), host("h2", m=100)], [guest("a", moved)])
    assert (h1.used_mib, h2.used_mib, h2.reserved_mib, h2.arrivals) == (100, 100, 0, 0)


def test_an_open_guest_takes_memory_at_its_source_and_is_promised_at_its_destination() -> None:
    here, there = HostRef("h1", "b"), HostRef("h2", "b")
    moving = GuestRecord("a", Ownership.OPEN, here, migration="m", attempt=1, destination=there)
    h1, h2 = host_views([host("h1"), host("h2", m=100)], [guest("a", moving)])
    assert (h1.used_mib, h2.used_mib, h2.reserved_mib, h2.arrivals) == (100, 0, 100, 1)


def test_crashed_and_gone_guests_take_nothing() -> None:
    here = HostRef("h1", "b")
    (h1,) = host_views([host("h1")], [guest(p, GuestRecord(p, p, here)) for p in (Ownership.CRASHED, Ownership.GONE)])
    assert h1.used_mib == 0
