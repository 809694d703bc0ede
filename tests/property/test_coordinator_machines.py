"""Properties of placement and of the evacuation job that hold for every cluster, not for the ones we thought of."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.errors import FailureReason
from orchestrator.core.evacuation import CreateMigration, Facts, GuestOnHost, step
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.placement import HostView, Need, pack, plan
from orchestrator.core.records import EvacuationPhase, EvacuationSpec, EvacuationState, MigrationPhase, MigrationState

SIZES = st.lists(st.integers(1, 1000), max_size=12)


@given(hosts=st.lists(st.integers(0, 2000), min_size=1, max_size=5), guests=SIZES)
def test_a_plan_never_promises_memory_twice(hosts: list[int], guests: list[int]) -> None:
    views = [HostView(HostRef(f"h{n}", "b"), mib) for n, mib in enumerate(hosts)]
    needs = [Need(f"g{n}", f"g{n}", "h0", mib) for n, mib in enumerate(guests)]
    taken: dict[str, int] = {}
    for planned in plan(views, needs):
        if planned.choice.destination is None:
            assert planned.choice.message
            continue
        host = planned.choice.destination.host
        taken[host] = taken.get(host, 0) + planned.need.memory_mib
        assert host != "h0"
    assert all(taken.get(f"h{n}", 0) <= mib for n, mib in enumerate(hosts))


def _most(free: dict[str, int], sizes: list[int]) -> tuple[int, int]:
    """The most guests, and then the most memory, that can be placed at all: by trying everything."""
    if not sizes:
        return 0, 0
    best = _most(free, sizes[1:])
    for name, left in free.items():
        if left >= sizes[0]:
            count, memory = _most({**free, name: left - sizes[0]}, sizes[1:])
            best = max(best, (count + 1, memory + sizes[0]))
    return best


def _greedy(free: dict[str, int], sizes: list[int]) -> int:
    """How many find a place if each, the biggest first, takes the emptiest host."""
    left, placed = dict(free), 0
    for size in sorted(sizes, reverse=True):
        host = max(left, key=lambda name: left[name])
        if left[host] >= size:
            left[host] -= size
            placed += 1
    return placed


def _packed(free: list[int], sizes: list[int]) -> tuple[int, int]:
    views = [HostView(HostRef(f"h{n}", "b"), mib) for n, mib in enumerate(free)]
    needs = [Need(f"g{n}", f"g{n}", "s", mib) for n, mib in enumerate(sizes)]
    places = pack(views, needs)
    taken = {view.ref.host: 0 for view in views}
    for need in needs:
        if need.guest in places:
            taken[places[need.guest]] += need.memory_mib
    assert all(taken[view.ref.host] <= view.memory_mib for view in views)
    return len(places), sum(taken.values())


@settings(max_examples=200, deadline=None)
@given(free=st.lists(st.integers(0, 12), min_size=1, max_size=3), sizes=st.lists(st.integers(1, 8), max_size=6))
def test_small_packings_are_the_best_there_are(free: list[int], sizes: list[int]) -> None:
    assert _packed(free, sizes) == _most({f"h{n}": mib for n, mib in enumerate(free)}, sizes)


@settings(max_examples=60, deadline=None)
@given(free=st.lists(st.integers(0, 3000), min_size=1, max_size=8), sizes=st.lists(st.integers(1, 900), max_size=40))
def test_no_packing_is_worse_than_the_greedy_one(free: list[int], sizes: list[int]) -> None:
    assert _packed(free, sizes)[0] >= _greedy({f"h{n}": mib for n, mib in enumerate(free)}, sizes)


ENDS = st.sampled_from(
    [
        (MigrationPhase.SUCCEEDED, None),
        (MigrationPhase.FAILED, FailureReason.ATTEMPTS_EXHAUSTED),
        (MigrationPhase.FAILED, FailureReason.NO_CAPACITY),
        (MigrationPhase.CANCELLED, FailureReason.CANCELLED),
    ]
)


@settings(max_examples=60)
@given(sizes=SIZES, limit=st.integers(1, 4), data=st.data())
def test_every_job_ends_within_its_limit_and_tells_the_truth(sizes: list[int], limit: int, data: st.DataObject) -> None:
    """Migrations end in any order and way; the coordinator forgets commands once, as if it had crashed."""
    spec, state = EvacuationSpec("job", "h1", max_concurrent=limit), EvacuationState()
    here = {f"g{n}": size for n, size in enumerate(sizes)}
    migrations: dict[str, MigrationState] = {}
    owner: dict[str, str] = {}
    forgotten: set[str] = set()
    for _ in range(200):
        record = [GuestOnHost(g, g, m, GuestRecord(g, Ownership.IDLE, HostRef("h1", "b"))) for g, m in here.items()]
        result = step(spec, state, Facts(True, record, migrations))
        state = result.state
        if state.phase.terminal:
            break
        for command in result.commands:
            if isinstance(command, CreateMigration) and (command.id in forgotten or data.draw(st.booleans())):
                migrations.setdefault(command.id, MigrationState())
                owner[command.id] = command.guest
            elif isinstance(command, CreateMigration):
                forgotten.add(command.id)
        active = [name for name, durable in migrations.items() if not durable.phase.terminal]
        assert len(active) <= limit
        if active:
            name = data.draw(st.sampled_from(active))
            phase, failure = data.draw(ENDS)
            migrations[name] = replace(migrations[name], phase=phase, failure=failure)
            if phase is MigrationPhase.SUCCEEDED:
                here.pop(owner[name])
    assert state.phase.terminal
    assert (state.phase is EvacuationPhase.SUCCEEDED) == (not here)
    assert state.safe_to_power_off == (not here)
