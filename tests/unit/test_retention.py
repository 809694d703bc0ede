"""What is forgotten of what is over, when, and what never is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.coordinator.driver import Deposed
from orchestrator.coordinator.retention import Keeping
from orchestrator.core.handover import Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import (
    Certificate,
    Cordon,
    EvacuationGuest,
    EvacuationPhase,
    EvacuationState,
    Leader,
    MigrationPhase,
    MigrationState,
    RequestRecord,
)
from orchestrator.core.retention import Bound, Ended, Kept, Retention, surplus
from orchestrator.history import Entry, HistoryConfig, HistoryFile, entry
from orchestrator.ledger import clock as clock_module
from orchestrator.ledger import paths
from orchestrator.ledger.clock import TICK_S, LedgerClock
from orchestrator.ledger.index import Index
from orchestrator.ledger.records import BadRecord, encode
from orchestrator.ledger.store import Create, Done, SetData, StoreUnavailable, Versioned
from tests.fakes.coordination import World

EPOCH = 0
HOUR = 3600.0


# --- what may go ------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 50), st.floats(0, 100)), max_size=30),
    st.integers(0, 10),
    st.floats(1, 60),
    st.sets(st.integers(0, 29)),
)
def test_what_goes_is_too_old_or_one_too_many_and_never_needed(
    given_: list[tuple[int, float]], count: int, age: float, needed_: set[int]
) -> None:
    ended = [Ended(f"n{n}", order, age_h) for n, (order, age_h) in enumerate(given_)]
    needed = {f"n{n}" for n in needed_}
    bound = Bound(age, count, min_age_h=1.0)
    gone = surplus(ended, bound, needed=needed)
    left = [one for one in ended if one.name not in gone]
    assert not needed & set(gone)
    assert all(one.age_h >= 1.0 for one in ended if one.name in gone), "never at once"
    assert all(one.age_h < max(age, 1.0) for one in left if one.name not in needed)
    old_enough = [one for one in left if one.name not in needed and one.age_h >= 1.0]
    young = [one for one in left if one.name not in needed and one.age_h < 1.0]
    assert not old_enough or len(old_enough) + len(young) <= max(count, len(young) + count)
    order = {one.name: one.order for one in ended}
    assert [order[name] for name in gone] == sorted(order[name] for name in gone), "the oldest first"


def test_bounds_that_make_no_sense_are_named() -> None:
    bad = Retention(migrations=Bound(1, -1, 2), removals_per_s=0)
    assert bad.problems() == [
        "migrations: max_count is -1: it is 0 or more",
        "migrations: max_age_h (1) is less than min_age_h (2)",
        "removals_per_s is 0: it is more than 0",
    ]
    assert not Retention().problems()
    assert all(Retention().of(kind).max_age_h <= clock_module.MAX_AGE_H for kind in Kept)


# --- the clock --------------------------------------------------------------------------------------------------------


class Clock:
    """A monotonic clock of one process."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


async def test_an_age_is_never_more_than_the_time_that_passed() -> None:
    world = World()
    clocks = [(LedgerClock(world.store, time_s), time_s) for time_s in (Clock(), Clock(1_000_000.0))]
    world.put("/first", Cordon())
    first = world.store.tree.zxid
    passed_s, second, second_at_s = 0.0, 0, 0.0
    for turn in range(500):
        for clock, time_s in clocks:
            await clock.look()
            assert clock.age_h(first) * HOUR <= passed_s
            assert not second or clock.age_h(second) * HOUR <= passed_s - second_at_s
            time_s.now_s += 300.0
        passed_s += 300.0
        if turn == 250:
            world.put("/second", Cordon())
            second, second_at_s = world.store.tree.zxid, passed_s
    ages = [clock.age_h(first) * HOUR for clock, _ in clocks]
    assert min(ages) >= 0.8 * passed_s, "and not much less"
    assert all(0 < clock.age_h(second) < clock.age_h(first) for clock, _ in clocks)
    assert all(clock.age_h(1 << 60) == 0 for clock, _ in clocks)


async def test_many_processes_and_restarts_make_no_interval_shorter() -> None:
    world = World()
    times = [Clock(1000.0 * number) for number in range(5)]
    clocks = [LedgerClock(world.store, each) for each in times]
    for _ in range(12 * 24):
        for clock, now in zip(clocks, times, strict=True):
            await clock.look()
            now.now_s += 300.0
        clocks[0] = LedgerClock(world.store, times[0])  # begins to count anew each time
    moves = world.store.tree.nodes[paths.LEDGER_CLOCK].version + 1
    assert 24 < moves <= 48, "half an hour each, at least"


async def test_a_count_that_cannot_be_read_forgets_nothing() -> None:
    world = World()
    world.store.tree.nodes[paths.LEDGER_CLOCK] = Versioned(b'{"zxids": 7}', 3, 9)
    clock = LedgerClock(world.store)
    with pytest.raises(BadRecord):
        await clock.look()
    assert clock.age_h(1) == 0


# --- forgetting -------------------------------------------------------------------------------------------------------


class Scene:
    """A ledger with a leader, and a clock that a test can turn."""

    def __init__(self, directory: Path, retention: Retention, *, history: bool = True) -> None:
        self.world = World()
        self.store = self.world.store
        for root in paths.ROOTS:
            self.world.put(root, Cordon())
        self.world.put(paths.epoch(), Leader("me", "1"))
        for name in ("h1", "h2"):
            self.world.host(name)
        self.file = HistoryFile(HistoryConfig(str(directory / "history.jsonl")))
        self.index = Index(self.store)
        self.keeping = Keeping(self.store, self.index, EPOCH, retention, self.file if history else None)
        self.ticks: list[int] = []

    def wait(self, hours: float) -> None:
        """As much of the ledger's time passes."""
        for _ in range(int(hours * HOUR / TICK_S) + 1):
            self.store.tree.zxid += 1
            self.ticks.append(self.store.tree.zxid)
        self.store.tree.zxid += 1
        content = encode(clock_module.Ticks(tuple(self.ticks)))
        self.store.tree.nodes[paths.LEDGER_CLOCK] = Versioned(content, len(self.ticks), self.store.tree.zxid)

    def migration(self, name: str, guest: str, phase: MigrationPhase = MigrationPhase.SUCCEEDED) -> None:
        self.world.migration(name, guest)
        self.world.put(paths.migration_state(name), MigrationState(phase, end_time_s=1.0))
        self.world.put(paths.requests(name), Cordon())

    def gone(self, uuid: str) -> None:
        self.world.guest(uuid, "h1")
        record = replace(self.world.record(uuid), phase=Ownership.GONE)
        self.world.put(paths.guest(uuid), record)

    def there(self, path: str) -> bool:
        return path in self.store.tree.nodes

    def lines(self) -> list[str]:
        try:
            return [f"{one.kind}/{one.name}" for one in self.file.entries()]
        except FileNotFoundError:
            return []


QUICK = Retention(
    migrations=Bound(48, 3, 1),
    evacuations=Bound(48, 3, 1),
    guests=Bound(48, 3, 1),
    requests=Bound(48, 3, 1),
    certificates=Bound(48, 3, 1),
    removals_per_s=1e6,
)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    made = Scene(tmp_path, QUICK)
    yield made
    await made.keeping.close()
    await made.index.close()


async def test_migrations_go_by_number_and_by_age_and_are_written_down_first(scene: Scene) -> None:
    scene.world.guest("g1", "h1")
    for number in range(5):
        scene.migration(f"aa{number}", "g1")
    scene.migration("aarun", "g1", MigrationPhase.PRECOPY)
    await scene.keeping.run()
    assert all(scene.there(paths.migration(f"aa{number}")) for number in range(5)), "not at once, however many"
    scene.wait(2)
    await scene.keeping.run()
    assert [n for n in range(5) if scene.there(paths.migration(f"aa{n}"))] == [2, 3, 4]
    left = [path for path in scene.store.tree.nodes if path.startswith(f"{paths.migration('aa0')}")]
    assert not left, "with all that was below"
    assert scene.lines() == ["migrations/aa0", "migrations/aa1"]
    found = scene.file.find("migrations", "aa0")
    assert found is not None
    assert json.loads(found.content("state") or b"")["phase"] == "SUCCEEDED"
    scene.wait(49)
    await scene.keeping.run()
    assert not [n for n in range(5) if scene.there(paths.migration(f"aa{n}"))]
    assert scene.there(paths.migration("aarun")), "what is under way stays, however old"
    assert scene.keeping.counts.removed == {Kept.MIGRATIONS: 5}


async def test_what_something_that_lives_names_stays(scene: Scene) -> None:
    for number in range(3):
        scene.world.guest(f"g{number}", "h1")
        scene.migration(f"aa{number}", f"g{number}")
    record = replace(scene.world.record("g1"), phase=Ownership.COMMITTED, migration="aa1")
    scene.world.put(paths.guest("g1"), record)
    scene.world.evacuation("job", "h1")
    rows = (EvacuationGuest("g2", "n-g2", 64, migration="aa2"),)
    scene.world.put(paths.evacuation_state("job"), EvacuationState(EvacuationPhase.RUNNING, guests=rows))
    scene.wait(100)
    await scene.keeping.run()
    assert [n for n in range(3) if scene.there(paths.migration(f"aa{n}"))] == [1, 2]
    scene.world.put(paths.evacuation_state("job"), EvacuationState(EvacuationPhase.SUCCEEDED, guests=rows))
    scene.world.put(paths.cordon("h1"), Cordon(on=True))
    scene.wait(100)
    await scene.keeping.run()
    assert [n for n in range(3) if scene.there(paths.migration(f"aa{n}"))] == [1]
    assert scene.there(paths.evacuation("job")), "its host is still cordoned, and it says whether it may be powered off"
    scene.world.put(paths.cordon("h1"), Cordon())
    await scene.keeping.run()
    assert not scene.there(paths.evacuation("job"))


async def test_a_guest_that_may_be_left_somewhere_stays(scene: Scene) -> None:
    for uuid in ("u1", "u2", "u3"):
        scene.gone(uuid)
    scene.world.put(paths.host_guests("h2"), Cordon())
    scene.world.put(f"{paths.host_guests('h2')}/u2", Cordon())
    scene.migration("aa1", "u3", MigrationPhase.PREPARING)
    scene.wait(100)
    await scene.keeping.run()
    assert [uuid for uuid in ("u1", "u2", "u3") if scene.there(paths.guest(uuid))] == ["u2", "u3"]
    assert not scene.there(paths.guest_spec("u1"))
    assert scene.lines() == ["guests/u1"]
    del scene.store.tree.nodes[f"{paths.host_guests('h2')}/u2"]
    await scene.keeping.run()
    assert not scene.there(paths.guest("u2"))
    assert "u2" not in await scene.index.gone(), "nor in memory"


async def test_requests_and_certificates_go_without_a_line(scene: Scene) -> None:
    scene.world.put(paths.request_id("old"), RequestRecord("guests/1", "d"))
    scene.world.guest("g1", "h1")
    record = replace(scene.world.record("g1"), owner=HostRef("h1", "boot-lost"))
    scene.world.put(paths.guest("g1"), record)
    scene.world.put(paths.fences("h1"), Cordon())
    for boot_id in ("boot-lost", "boot-h1", "boot-old"):
        scene.world.put(paths.fence("h1", boot_id), Certificate())
    scene.wait(100)
    scene.world.put(paths.request_id("new"), RequestRecord("guests/2", "d"))
    await scene.keeping.run()
    assert not scene.there(paths.request_id("old"))
    assert scene.there(paths.request_id("new"))
    left = [boot_id for boot_id in ("boot-lost", "boot-h1", "boot-old") if scene.there(paths.fence("h1", boot_id))]
    assert left == ["boot-lost", "boot-h1"], "a guest, or the host as it is registered, still names those"
    assert not scene.lines()


async def test_what_moved_meanwhile_stays(scene: Scene) -> None:
    """Between the last look and the transaction."""
    scene.world.guest("g1", "h1")
    scene.migration("aa1", "g1")
    scene.wait(100)
    doomed = await scene.keeping._migration("aa1")
    assert doomed is not None
    scene.world.edit_state("aa1", lambda state: replace(state, message="somebody was here"))
    await scene.keeping._remove(Kept.MIGRATIONS, [doomed])
    assert scene.there(paths.migration("aa1"))
    again = await scene.keeping._migration("aa1")
    assert again is not None
    assert isinstance(await scene.store.multi([Create(f"{paths.migration('aa1')}/child", b"")]), Done)
    await scene.keeping._remove(Kept.MIGRATIONS, [again])
    assert scene.there(paths.migration_state("aa1"))
    assert scene.keeping.counts.removed == {}


async def test_nothing_goes_that_could_not_be_written_down(scene: Scene, tmp_path: Path) -> None:
    scene.world.guest("g1", "h1")
    scene.migration("aa1", "g1")
    scene.wait(100)
    (tmp_path / "history.jsonl").mkdir()
    with pytest.raises(OSError, match="directory"):
        await scene.keeping.run()
    assert scene.there(paths.migration("aa1"))
    assert scene.keeping.counts.failures == 1
    (tmp_path / "history.jsonl").rmdir()
    await scene.keeping.run()
    assert not scene.there(paths.migration("aa1"))


async def test_what_is_not_over_is_put_back_into_the_active_set(scene: Scene) -> None:
    scene.world.guest("g1", "h1")
    scene.migration("aa1", "g1")
    scene.migration("aa2", "g1", MigrationPhase.PRECOPY)
    scene.store.tree.nodes.pop(paths.active_migration("aa2"), None)
    scene.store.tree.nodes.pop(paths.active_migration("aa1"), None)
    await scene.keeping.run()
    assert scene.there(paths.active_migration("aa2"))
    assert not scene.there(paths.active_migration("aa1"))


async def test_a_leader_that_was_deposed_forgets_nothing(scene: Scene) -> None:
    scene.world.guest("g1", "h1")
    scene.migration("aa1", "g1")
    scene.wait(100)
    assert isinstance(await scene.store.multi([SetData(paths.epoch(), b"{}", 0)]), Done)
    with pytest.raises(Deposed):
        await scene.keeping.run()
    assert scene.there(paths.migration("aa1"))


async def test_without_the_ledger_nothing_is_forgotten(scene: Scene) -> None:
    scene.migration("aa1", "g1")
    scene.wait(100)
    scene.store.down = True
    with pytest.raises(StoreUnavailable):
        await scene.keeping.run()
    scene.store.down = False
    await scene.keeping.run()
    assert not scene.there(paths.migration("aa1"))


async def test_a_pass_at_rest_reads_next_to_nothing(scene: Scene) -> None:
    scene.world.guest("g1", "h1")
    for number in range(3):
        scene.migration(f"aa{number}", "g1")
    scene.gone("u1")
    await scene.keeping.run()
    reads = 0
    read, children = scene.store.read, scene.store.children

    async def counted(path: str, timeout_s: float = 2.0) -> Versioned | None:
        nonlocal reads
        reads += 1
        return await read(path, timeout_s)

    async def listed(path: str, timeout_s: float = 2.0) -> tuple[str, ...]:
        nonlocal reads
        reads += 1
        return await children(path, timeout_s)

    scene.store.read, scene.store.children = counted, listed
    for _ in range(10):
        await scene.keeping.run()
    assert reads == 10, "the clock"


# --- the history file -------------------------------------------------------------------------------------------------


def lines(count: int, size: int = 0, start: int = 0) -> list[Entry]:
    nodes = {"": b'{"a":1}', "state": b"x" * size}
    return [entry("migrations", f"m{n}", nodes, n) for n in range(start, start + count)]


def test_the_history_is_rotated_and_bounded(tmp_path: Path) -> None:
    file = HistoryFile(HistoryConfig(str(tmp_path / "deep" / "h.jsonl"), max_bytes=2_000, files=3))
    for turn in range(30):
        file.append(lines(2, 300, turn * 2))
    found = sorted(path.name for path in (tmp_path / "deep").iterdir())
    assert found == ["h.jsonl", "h.jsonl.1", "h.jsonl.2"]
    assert sum(path.stat().st_size for path in (tmp_path / "deep").iterdir()) <= 3 * 2_000
    names = [one.name for one in file.entries()]
    assert names == [f"m{n}" for n in range(60 - len(names), 60)], "the newest, in order"
    assert (tmp_path / "deep" / "h.jsonl").stat().st_mode & 0o777 == 0o600


def test_what_is_found_in_the_history(tmp_path: Path) -> None:
    file = HistoryFile(HistoryConfig(str(tmp_path / "h.jsonl")))
    assert file.find("migrations", "m1") is None
    file.append([entry("migrations", "abc1", {"": b'{"v":1}', "req": b"", "raw": b"\xff{"}, 5)])
    file.append([entry("guests", "abc1", {"": b"{}"}, 6), entry("migrations", "abc2", {"": b"{}"}, 7)])
    file.append([entry("migrations", "abc1", {"": b'{"v":2}'}, 5)])
    found = file.find("migrations", "abc1")
    assert found is not None
    assert (found.content(""), found.content("req"), found.order) == (b'{"v": 2}', None, 5)
    assert file.names("migrations", "abc") == ["abc1", "abc2"]
    assert file.names("migrations", "abc2") == ["abc2"]
    with (tmp_path / "h.jsonl").open("ab") as raw:
        raw.write(b'not json\n{"kind":1}\n{"kind":"migrations","name":"cut')
    file.append([entry("migrations", "after", {"": b"{}"}, 9)])
    assert [one.name for one in file.entries()][-2:] == ["abc1", "after"], "what a full disk cut off stays alone"


async def test_a_reader_and_a_writer_at_once(tmp_path: Path) -> None:
    file = HistoryFile(HistoryConfig(str(tmp_path / "h.jsonl"), max_bytes=5_000, files=4))

    def write() -> None:
        for turn in range(200):
            file.append(lines(1, 100, turn))

    writing = asyncio.ensure_future(asyncio.to_thread(write))
    while not writing.done():
        names = await asyncio.to_thread(lambda: [one.name for one in file.entries()])
        order = [int(name[1:]) for name in names]
        assert order == sorted(order), "a rotation under its eyes turns nothing round"
    await writing


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (HistoryConfig("relative"), "absolute"),
        (HistoryConfig("/x", max_bytes=10), "at least 1000000"),
        (HistoryConfig("/x", files=0), "1 to 1000"),
    ],
)
def test_a_history_that_cannot_be_is_refused(config: HistoryConfig, said: str) -> None:
    assert len(config.problems()) == 1
    assert said in config.problems()[0]
    assert not HistoryConfig().problems()
