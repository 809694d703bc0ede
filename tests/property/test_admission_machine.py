"""The queue in front of the places, under histories of every kind: limits hold, no place is wasted, nobody starves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.admission import Admission, Ticket

SOURCES = ("h1", "h2", "h3")
JOBS = ("", "e1", "e2")
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from(SOURCES), st.sampled_from(JOBS)),
        st.tuples(st.just("hold"), st.sampled_from(SOURCES), st.sampled_from(JOBS)),
        st.tuples(st.just("end"), st.integers(0, 50), st.none()),
        st.tuples(st.just("withdraw"), st.integers(0, 50), st.none()),
    ),
    max_size=60,
)


def _apply(queue: Admission, number: int, event: tuple[str, str | int, str | None]) -> Ticket | None:
    """The ticket that was held without a turn, if this was that."""
    what, value, job = event
    if what in ("add", "hold"):
        ticket = Ticket(f"m{number}", str(value), job or "")
        (queue.add if what == "add" else queue.hold)(ticket)
        return ticket if what == "hold" else None
    those = queue.running() if what == "end" else queue.waiting()
    if those:
        queue.leave(those[int(value) % len(those)].migration)
    return None


@given(events=EVENTS, cluster=st.integers(1, 6), per_source=st.integers(1, 3))
def test_limits_hold_and_no_place_stays_empty_while_somebody_may_take_it(
    events: list, cluster: int, per_source: int
) -> None:
    queue = Admission(max_concurrent=cluster, max_per_source=per_source)
    held: set[str] = set()
    for number, event in enumerate(events):
        if (ticket := _apply(queue, number, event)) is not None:
            held.add(ticket.migration)
        before = len(queue.waiting())
        admitted = list(queue.admit())
        running, waiting = queue.running(), queue.waiting()
        leaving = {source: sum(t.source == source for t in running) for source in SOURCES}
        assert len(waiting) == before - len(admitted)
        if admitted:
            assert len(running) <= cluster
            assert all(leaving[ticket.source] <= per_source for ticket in admitted)
        for ticket in waiting:
            assert len(running) >= cluster or leaving[ticket.source] >= per_source
            assert ticket.source in queue.why(ticket.migration) or "cluster" in queue.why(ticket.migration)
    for ticket in queue.running():
        queue.leave(ticket.migration)
    while queue.waiting():
        for ticket in list(queue.admit()):
            queue.leave(ticket.migration)
    assert queue.running() == ()
    assert list(queue.admit()) == []


@given(
    ahead=st.lists(st.tuples(st.sampled_from(SOURCES), st.sampled_from(JOBS)), max_size=30),
    mine=st.tuples(st.sampled_from(SOURCES), st.sampled_from(JOBS)),
    rush=st.lists(st.tuples(st.sampled_from(SOURCES), st.sampled_from(JOBS)), min_size=1, max_size=12),
    cluster=st.integers(1, 4),
)
def test_nobody_starves_however_fast_others_come(
    ahead: list[tuple[str, str]], mine: tuple[str, str], rush: list[tuple[str, str]], cluster: int
) -> None:
    """Others join as fast as places come free. Bound: one round of the rings for each that is before in line."""
    queue = Admission(max_concurrent=cluster, max_per_source=cluster)
    for number, (source, job) in enumerate(ahead):
        queue.add(Ticket(f"a{number}", source, job))
    queue.add(Ticket("mine", *mine))
    bound = (ahead.count(mine) + 1) * len(SOURCES) * len(JOBS) + cluster
    admitted = [ticket.migration for ticket in queue.admit()]
    number = 0
    while "mine" not in admitted:
        assert len(admitted) <= bound, admitted
        for source, job in rush:
            queue.add(Ticket(f"r{number}", source, job))
            number += 1
        queue.leave(queue.running()[0].migration)
        admitted += [ticket.migration for ticket in queue.admit()]


def test_one_source_with_many_leaves_the_others_their_places() -> None:
    queue = Admission(max_concurrent=3, max_per_source=1)
    for n in range(4):
        queue.add(Ticket(f"a{n}", "h1"))
    assert [t.migration for t in queue.admit()] == ["a0"]
    queue.add(Ticket("b", "h2"))
    assert [t.migration for t in queue.admit()] == ["b"]
    assert queue.why("a1") == "waiting for a place: 1 of at most 1 migrations are leaving h1 already"


def test_turns_go_round_sources_and_jobs() -> None:
    queue = Admission(max_concurrent=1, max_per_source=1)
    for n in range(3):
        queue.add(Ticket(f"big{n}", "h1", "evacuation"))
    queue.add(Ticket("user", "h1"))
    queue.add(Ticket("other", "h2", "evacuation-2"))
    order = []
    while queue.waiting():
        order += [t.migration for t in queue.admit()]
        queue.leave(order[-1])
    assert order == ["big0", "other", "user", "big1", "big2"]


def test_a_withdrawal_costs_nobody_a_turn() -> None:
    queue = Admission(max_concurrent=1, max_per_source=1)
    for name, source in (("a0", "h1"), ("a1", "h1"), ("b0", "h2")):
        queue.add(Ticket(name, source))
    queue.leave("a0")
    assert [t.migration for t in queue.admit()] == ["a1"]


def test_what_runs_beyond_the_limits_takes_places_all_the_same() -> None:
    queue = Admission(max_concurrent=2, max_per_source=2)
    for n in range(3):
        queue.hold(Ticket(f"old{n}", "h1"))
    queue.add(Ticket("new", "h2"))
    assert list(queue.admit()) == []
    queue.leave("old0")
    assert list(queue.admit()) == []
    queue.leave("old1")
    assert [t.migration for t in queue.admit()] == ["new"]
