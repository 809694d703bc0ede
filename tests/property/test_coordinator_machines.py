"""Properties of placement and of the evacuation job that hold for every cluster, not for the ones we thought of."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.errors import FailureReason
from orchestrator.core.evacuation import CancelMigration, CreateMigration, Facts, GuestOnHost, step
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.placement import HostView, Need, pack, plan
from orchestrator.core.records import EvacuationPhase, EvacuationSpec, EvacuationState, MigrationPhase, MigrationState
from orchestrator.core.text import NAMED

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


class Standstill:
    """A job whose guests stay as they are for ever.

    Its migrations end only as their own bounds make them, after 50 s, or when the job cancels them.
    """

    def __init__(self, phases: list[Ownership], total_s: int | None, limit: int) -> None:
        policy: dict[str, int | bool | str] = {} if total_s is None else {"total_timeout_ms": total_s * 1000}
        self.spec = EvacuationSpec("job", "h1", max_concurrent=limit, policy=policy)
        self.state = EvacuationState()
        there = HostRef("h2", "b")
        self.guests = [GuestOnHost(f"g{n}", f"g{n}", 8, _record(f"g{n}", p, there)) for n, p in enumerate(phases)]
        self.migrations: dict[str, MigrationState] = {}
        self.born: dict[str, int] = {}
        self.changed_s = 0

    def second(self, now_s: int, silent_s: int, *, cancelled: bool) -> None:
        """What the job decides at this second, and what comes of it."""
        self._time_out(now_s)
        state = replace(self.state, cancel_requested=cancelled)
        result = step(self.spec, state, self._facts(now_s, silent_s))
        if (result.state.phase, result.state.guests) != (state.phase, state.guests):
            self.changed_s = now_s
        self.state = result.state
        for command in result.commands:
            if isinstance(command, CreateMigration):
                self.migrations.setdefault(command.id, MigrationState())
                self.born.setdefault(command.id, now_s)
            elif isinstance(command, CancelMigration):
                ended = MigrationState(MigrationPhase.CANCELLED, failure=FailureReason.CANCELLED)
                self.migrations[command.id] = ended

    def _time_out(self, now_s: int) -> None:
        for name, at_s in self.born.items():
            if not self.migrations[name].phase.terminal and now_s - at_s >= 50:
                self.migrations[name] = MigrationState(MigrationPhase.FAILED, failure=FailureReason.TOTAL_TIMEOUT)

    def _facts(self, now_s: int, silent_s: int) -> Facts:
        return Facts(
            True,
            self.guests,
            dict(self.migrations),
            source_live=not silent_s,
            spent_ms=now_s * 1000.0,
            silent_ms=silent_s * 1000.0,
            stalled_ms=(now_s - self.changed_s) * 1000.0,
        )


@settings(max_examples=80, deadline=None)
@given(
    phases=st.lists(
        st.sampled_from([Ownership.STARTING, Ownership.IDLE, Ownership.OPEN, Ownership.COMMITTED, Ownership.ABORTED]),
        max_size=6,
    ),
    total_s=st.one_of(st.none(), st.integers(1, 200)),
    silent_from_s=st.one_of(st.none(), st.integers(0, 100)),
    cancel_at_s=st.one_of(st.none(), st.integers(0, 100)),
    limit=st.integers(1, 3),
)
def test_a_job_whose_guests_never_move_ends_all_the_same(
    phases: list[Ownership], total_s: int | None, silent_from_s: int | None, cancel_at_s: int | None, limit: int
) -> None:
    """Whatever state they stay in. With a guest in somebody else's migration, which nothing here ends, it takes a total
    timeout or a cancel."""
    job, now_s = Standstill(phases, total_s, limit), 0
    for now_s in range(1000):
        silent_s = 0 if silent_from_s is None else max(0, now_s - silent_from_s)
        job.second(now_s, silent_s, cancelled=cancel_at_s is not None and now_s >= cancel_at_s)
        if job.state.phase.terminal:
            break
    state = job.state
    elsewhere = any(phase in (Ownership.OPEN, Ownership.ABORTED) for phase in phases)
    if not elsewhere or total_s is not None or cancel_at_s is not None or silent_from_s is not None:
        assert state.phase.terminal
    if total_s is not None and state.phase is not EvacuationPhase.CANCELLED:
        assert now_s <= total_s + 31
    if state.phase is EvacuationPhase.FAILED:
        assert state.message.startswith(f"{len(phases)} of {len(phases)} guests remain on h1")
        assert len(phases) > NAMED or all(f"g{n} (" in state.message for n in range(len(phases)))
    assert not (state.safe_to_power_off and phases)


def _record(name: str, phase: Ownership, there: HostRef) -> GuestRecord:
    here = HostRef("h1", "b")
    if phase is Ownership.COMMITTED:
        return GuestRecord(name, phase, there, "other", 1, there, "inc", source=here)
    if phase in (Ownership.OPEN, Ownership.ABORTED):
        return GuestRecord(name, phase, here, "other", 1, there)
    return GuestRecord(name, phase, here)


ENDS = st.sampled_from(
    [
        (MigrationPhase.SUCCEEDED, None),
        (MigrationPhase.FAILED, FailureReason.ATTEMPTS_EXHAUSTED),
        (MigrationPhase.FAILED, FailureReason.NO_CAPACITY),
        (MigrationPhase.CANCELLED, FailureReason.CANCELLED),
    ]
)


@settings(max_examples=60, deadline=None)
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
        result = step(spec, state, Facts(True, record, migrations, empty=True))
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
