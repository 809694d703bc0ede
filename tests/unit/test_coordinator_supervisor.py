"""Driver, worker and supervisor over a ledger and agents in memory: what the records come to, also after crashes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator.api.decisions import cancelled_state
from orchestrator.coordinator import driver, places
from orchestrator.coordinator.pool import WorkerLost
from orchestrator.coordinator.supervisor import Limits, Supervisor, TokenBucket
from orchestrator.coordinator.worker import Worker
from orchestrator.core import evacuation, handover
from orchestrator.core import migration as machine
from orchestrator.core.agent import CopyStatus
from orchestrator.core.errors import AbortReason, DroverError, FailureReason, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import (
    Cordon,
    EvacuationPhase,
    GuestSpec,
    HostDeath,
    HostRecord,
    MigrationPhase,
    MigrationState,
    OnHostDeath,
    Requests,
    WaitingFor,
)
from orchestrator.ledger import paths
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Done, SetData, Versioned
from tests.fakes.coordination import MemoryStore, World

EPOCH = 3
LATE = AbortReason.LATE_SWITCHOVER_ACK


@pytest.fixture
def world() -> World:
    world = World()
    for host in ("h1", "h2", "h3"):
        world.host(host)
    world.store.tree.nodes[paths.epoch()] = Versioned(b"", EPOCH, 0)
    world.guest("g1", "h1")
    world.migration("m1", "g1")
    return world


def worker(world: World) -> Worker:
    return Worker(world.store, world)


async def drive(world: World, migration: str = "m1") -> str:
    async with asyncio.timeout(10):
        return await worker(world).drive(migration, EPOCH)


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_clean_migration_arrives_and_leaves_no_reservation(world: World) -> None:
    assert await drive(world) == "SUCCEEDED"
    record = world.record("g1")
    assert record.phase is Ownership.IDLE
    assert record.owner.host == "h2"
    assert world.reserved("h2") == {}
    assert [r.outcome for r in world.attempts("m1")] == ["COMMITTED"]
    assert world.attempts("m1")[0].transferred_bytes == 7


async def test_clean_migration_takes_two_writes_of_the_coordinator(world: World) -> None:
    """OPEN and the verdict; bind, COMMIT and DONE are the agents'."""
    await drive(world)
    assert len(world.store.writes) == 5


async def test_late_acks_are_retried_and_reported(world: World) -> None:
    world.ends = [LATE, LATE, LATE]
    assert await drive(world) == "SUCCEEDED"
    reports = world.attempts("m1")
    assert [r.reason for r in reports] == [LATE, LATE, LATE, None]
    assert reports[0].devices == ("d0",)
    assert reports[0].zxid > 0


async def test_attempts_are_bounded_and_the_guest_stays(world: World) -> None:
    world.ends = [LATE] * 9
    world.migration("m1", "g1", policy=MigrationPolicy(max_attempts=2, backoff_initial_ms=1, backoff_max_ms=1))
    assert await drive(world) == "FAILED"
    assert world.state("m1").failure is FailureReason.ATTEMPTS_EXHAUSTED
    record = world.record("g1")
    assert (record.phase, record.owner.host) == (Ownership.IDLE, "h1")
    assert world.reserved("h2") == {} == world.reserved("h3")


@pytest.mark.parametrize(
    ("reason", "failure"),
    [
        (AbortReason.NOT_CONVERGING, FailureReason.NOT_CONVERGING),
        (AbortReason.DEVICE_RESET, FailureReason.DEVICE_RESET),
        (AbortReason.GUEST_ENDED, FailureReason.GUEST_ENDED),
    ],
)
async def test_ends_that_another_attempt_would_repeat(
    world: World, reason: AbortReason, failure: FailureReason
) -> None:
    world.ends = [reason]
    assert await drive(world) == "FAILED"
    assert world.state("m1").failure is failure
    assert len(world.attempts("m1")) == 1


async def test_no_capacity_says_why_for_each_host(world: World) -> None:
    world.guest("g1", "h1", memory_mib=4096)
    assert await drive(world) == "FAILED"
    state = world.state("m1")
    assert state.failure is FailureReason.NO_CAPACITY
    assert "h2 has 1024 MiB free" in state.message
    assert "h3 has 1024 MiB free" in state.message


async def test_named_destination_is_kept(world: World) -> None:
    world.migration("m1", "g1", destination="h3")
    assert await drive(world) == "SUCCEEDED"
    assert world.record("g1").owner.host == "h3"


async def test_cordoned_destination_is_refused(world: World) -> None:
    world.migration("m1", "g1", destination="h3")
    world.put(paths.cordon("h3"), Cordon(on=True, why="disk"))
    assert await drive(world) == "FAILED"
    assert world.state("m1").failure is FailureReason.DESTINATION_NOT_ELIGIBLE
    assert "cordoned (disk)" in world.state("m1").message


async def test_what_a_destination_refuses_with_reaches_report_and_message(world: World) -> None:
    world.refuse = DroverError(RefusalReason.HOST_DISK_FULL, "h2 has no room left in /var/lib/drover")
    world.migration("m1", "g1", policy=MigrationPolicy(max_attempts=1))
    assert await drive(world) == "FAILED"
    (report,) = world.attempts("m1")
    assert report.reason is AbortReason.PREPARE_FAILED
    assert report.message == "HOST_DISK_FULL: h2 has no room left in /var/lib/drover"
    assert report.message in world.state("m1").message


async def test_what_a_destination_refused_with_outlives_the_driver(world: World) -> None:
    said = "HOST_DISK_FULL: h2 has no room left in /var/lib/drover"
    world.refuse = DroverError(RefusalReason.HOST_DISK_FULL, "h2 has no room left in /var/lib/drover")
    first = asyncio.create_task(worker(world).drive("m1", EPOCH))
    await until(lambda: world.record("g1").phase is Ownership.ABORTED)
    first.cancel()
    world.refuse = None
    assert await drive(world) == "SUCCEEDED"
    assert world.attempts("m1")[0].message == said


async def test_refused_prepare_ends_the_attempt_and_avoids_that_host(world: World) -> None:
    world.refuse = DroverError(RefusalReason.MACHINE_TYPE_MISMATCH, "no such machine")
    task = asyncio.create_task(drive(world))
    await until(lambda: ("prepare", "h3", 2) in world.calls)
    world.refuse = None
    assert await task == "SUCCEEDED"
    assert world.attempts("m1")[0].reason is AbortReason.PREPARE_FAILED


async def test_refusal_that_no_attempt_can_mend(world: World) -> None:
    world.refuse = DroverError(RefusalReason.RETRY_NEEDS_RUN, "paused due to previous migration")
    assert await drive(world) == "FAILED"
    assert world.state("m1").failure is FailureReason.RETRY_NEEDS_RUN


async def test_silent_destination_ends_in_prepare_timeout(world: World) -> None:
    world.silent = {"h2"}
    policy = MigrationPolicy(prepare_timeout_ms=50, backoff_initial_ms=1, backoff_max_ms=1)
    world.migration("m1", "g1", policy=policy)
    assert await drive(world) == "SUCCEEDED"
    assert world.attempts("m1")[0].reason is AbortReason.PREPARE_TIMEOUT
    assert world.record("g1").owner.host == "h3"


async def test_cancel_before_the_first_attempt(world: World) -> None:
    world.edit_state("m1", lambda s: replace(s, cancel_requested=True))
    assert await drive(world) == "CANCELLED"
    assert world.calls == []


async def test_cancel_in_precopy_never_opens_another_attempt(world: World) -> None:
    world.hold = asyncio.Event()
    task = asyncio.create_task(drive(world))
    await until(lambda: bool(world.record("g1").inc))
    world.edit_state("m1", lambda s: replace(s, cancel_requested=True))
    assert await task == "CANCELLED"
    assert (world.record("g1").phase, world.record("g1").attempt) == (Ownership.IDLE, 1)
    world.hold.set()
    await asyncio.sleep(0.01)
    assert world.record("g1").owner.host == "h1"


async def test_abort_written_as_cancelled_by_somebody_else_is_final(world: World) -> None:
    world.hold = asyncio.Event()
    task = asyncio.create_task(drive(world))
    await until(lambda: bool(world.record("g1").inc))
    await world._write("g1", lambda r: handover.abort(r, "m1", 1, AbortReason.CANCELLED, writer="api"))
    assert await task == "CANCELLED"


async def test_total_timeout_aborts_an_attempt_that_hangs(world: World) -> None:
    world.hold = asyncio.Event()
    world.migration("m1", "g1", policy=MigrationPolicy(total_timeout_ms=80))
    assert await drive(world) == "FAILED"
    assert world.state("m1").failure is FailureReason.TOTAL_TIMEOUT
    assert world.record("g1").owner.host == "h1"


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("lost", range(3))
async def test_a_lost_answer_changes_nothing(world: World, lost: int, applied: bool) -> None:
    """The coordinator's nth write ends as outcome unknown, applied or not."""
    world.ends = [LATE]
    real, count = world.store.multi, 0

    async def multi(ops, timeout_s: float = 2.0):
        nonlocal count
        count += 1
        if count == lost + 1:
            world.store.fail_next = [applied]
        return await real(ops, timeout_s)

    world.store.multi = multi
    assert await drive(world) == "SUCCEEDED"
    assert [r.attempt for r in world.attempts("m1")] == [1, 2]
    assert world.reserved("h2") == {}


@pytest.mark.parametrize("crash_after", [0.0, 0.001, 0.002, 0.004, 0.008, 0.015])
async def test_driver_crashes_at_any_instant_and_the_next_goes_on(world: World, crash_after: float) -> None:
    world.ends = [LATE, LATE]
    for _ in range(4):
        task = asyncio.create_task(drive(world))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(crash_after):
                await asyncio.shield(task)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert await drive(world) == "SUCCEEDED"
    assert [r.attempt for r in world.attempts("m1")] == [1, 2, 3]
    assert len(world.conducting) == 3


async def test_bound_attempt_is_adopted_and_not_restarted(world: World) -> None:
    world.hold = asyncio.Event()
    first = worker(world)
    task = asyncio.create_task(first.drive("m1", EPOCH))
    await until(lambda: bool(world.record("g1").inc))
    first.stop()
    await task
    calls = list(world.calls)
    second = asyncio.create_task(drive(world))
    await asyncio.sleep(0.02)
    assert world.calls == calls
    world.hold.set()
    assert await second == "SUCCEEDED"


@pytest.mark.rule("H12")
async def test_stale_epoch_can_write_nothing(world: World) -> None:
    world.store.tree.nodes[paths.epoch()] = Versioned(b"", EPOCH + 1, 0)
    assert await drive(world) == "DEPOSED"
    assert world.store.writes == []


@pytest.mark.rule("H12")
async def test_an_agent_that_calls_our_epoch_stale_deposes_nobody(world: World) -> None:
    """The ledger says that it stands: that agent's fault ends the attempt, and the next one goes on."""
    real = world.call

    def call(what: str, host: str, attempt: int, epoch: int, shard: int = 0) -> None:
        world.misread_epoch = EPOCH + 1 if attempt == 1 else None
        real(what, host, attempt, epoch, shard)

    world.call = call
    assert await drive(world) == "SUCCEEDED"
    assert world.attempts("m1")[0].reason is AbortReason.PREPARE_FAILED


@pytest.mark.rule("H12")
async def test_an_agent_that_read_a_newer_epoch_is_right(world: World) -> None:
    """Our call was under way while another coordinator was elected."""
    real = world.call

    def call(what: str, host: str, attempt: int, epoch: int, shard: int = 0) -> None:
        world.store.tree.nodes[paths.epoch()] = Versioned(b"", EPOCH + 1, 0)
        real(what, host, attempt, epoch, shard)

    world.call = call
    assert await drive(world) == "DEPOSED"


@pytest.mark.rule("H12")
async def test_a_worker_follows_a_ledger_that_was_restored(world: World) -> None:
    """Its epochs begin at a lower number again."""
    one = worker(world)
    world.store.tree.nodes[paths.epoch()] = Versioned(b"", EPOCH + 9, 0)
    assert await one.drive("m1", EPOCH + 9) == "SUCCEEDED"
    world.guest("g2", "h1")
    world.migration("m2", "g2")
    assert await one.drive("m2", EPOCH) == "DEPOSED"
    world.store.tree.nodes[paths.epoch()] = Versioned(b"", EPOCH, 0)
    assert await one.drive("m2", EPOCH) == "SUCCEEDED"


# --- supervisor -------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def leading(world: World, store: MemoryStore | None = None, name: str = "c", limits: Limits | None = None):
    store = store or world.store
    drivers = Worker(store, world)
    supervisor = Supervisor(store, drivers.drive, agents=world, name=name, limits=limits or Limits())
    task = asyncio.create_task(supervisor.run())
    try:
        yield supervisor
    finally:
        task.cancel()
        drivers.stop()
        await asyncio.gather(task, return_exceptions=True)


async def test_supervisor_finds_and_finishes_migrations(world: World) -> None:
    world.guest("g2", "h1")
    async with leading(world) as supervisor:
        await until(lambda: world.state("m1").phase.terminal)
        world.migration("m2", "g2")
        world.store.tree.notify(paths.migration("m2"))
        await until(lambda: world.state("m2").phase is MigrationPhase.SUCCEEDED)
        assert supervisor.status.epoch == EPOCH + 1


@pytest.mark.rule("H12")
async def test_one_leader_and_the_next_has_a_higher_epoch(world: World) -> None:
    other = MemoryStore(world.store.tree)
    async with leading(world, name="a") as a, leading(world, other, name="b") as b:
        await until(lambda: a.status.leading)
        await asyncio.sleep(0.3)
        assert not b.status.leading
        world.store.down = True
        world.store.expire()
        await until(lambda: b.status.leading)
        assert b.status.epoch > EPOCH + 1
        await until(lambda: not a.status.leading)


async def test_new_process_on_the_same_seat_need_not_wait_for_the_session(world: World) -> None:
    async with leading(world, name="seat") as a:
        await until(lambda: a.status.leading)
        async with leading(world, MemoryStore(world.store.tree), name="seat") as b:
            await until(lambda: b.status.leading)
            assert b.status.epoch > a.status.epoch


async def test_election_whose_answer_was_lost_is_recognised(world: World) -> None:
    world.store.fail_next = [True]
    supervisor = Supervisor(world.store, worker(world).drive, agents=world)
    assert await supervisor.elect() == EPOCH + 1


async def test_worker_death_hands_the_migration_to_another(world: World) -> None:
    drivers, deaths = Worker(world.store, world), [1, 2]

    async def dispatch(migration: str, epoch: int) -> str:
        if deaths:
            deaths.pop()
            raise WorkerLost("killed")
        return await drivers.drive(migration, epoch)

    task = asyncio.create_task(Supervisor(world.store, dispatch, agents=world).run())
    await until(lambda: world.state("m1").phase is MigrationPhase.SUCCEEDED)
    task.cancel()


# --- the queue --------------------------------------------------------------------------------------------------------


async def test_a_source_that_waits_for_its_own_place_holds_no_other(world: World) -> None:
    for n in range(2, 5):
        world.guest(f"g{n}", "h1")
        world.migration(f"m{n}", f"g{n}")
    world.guest("o", "h2")
    world.migration("mo", "o")
    world.hold = asyncio.Event()
    async with leading(world, limits=Limits(max_concurrent=3, max_per_source=1)) as supervisor:
        await until(lambda: bool(world.record("o").inc))
        assert supervisor.status.driving == 2
        waiting = [name for name in ("m1", "m2", "m3", "m4") if world.state(name).phase is MigrationPhase.PENDING]
        assert len(waiting) == 3
        await until(lambda: all(world.state(name).waiting_for is WaitingFor.PLACE for name in waiting))
        assert "1 of at most 1 migrations are leaving h1 already" in world.state(waiting[0]).message
        assert world.state(waiting[0]).spent_ms > 0
        world.hold.set()
        await until(lambda: all(world.state(name).phase.terminal for name in ("m1", "m2", "m3", "m4", "mo")))
    assert {world.state(name).phase for name in waiting} == {MigrationPhase.SUCCEEDED}
    assert world.state(waiting[0]).waiting_for is None


async def test_a_driver_that_takes_over_in_an_attempt_goes_on_counting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time since the attempt was opened was lost with each driver: no budget ran out while they were replaced."""
    monkeypatch.setattr(driver, "SPENT_S", 0.1)
    monkeypatch.setattr(driver, "SPENT_PART", 0.0)
    world.hold = asyncio.Event()
    for least_ms in (300, 600):
        async with leading(world):
            await until(lambda: bool(world.record("g1").inc))
            await until(lambda least_ms=least_ms: world.state("m1").spent_ms > least_ms)
        opened = world.state("m1").opened_spent_ms
        assert opened is not None
        assert opened < 300
    assert world.state("m1").attempt == 1, "it is the same attempt"
    async with leading(world):
        world.hold.set()
        await until(lambda: world.state("m1").phase.terminal)
    assert world.state("m1").phase is MigrationPhase.SUCCEEDED


async def test_the_total_timeout_runs_while_a_migration_waits_and_from_one_coordinator_to_the_next(
    world: World,
) -> None:
    world.guest("g2", "h1")
    world.hold = asyncio.Event()
    limits = Limits(max_concurrent=1)
    async with leading(world, limits=limits):
        await until(lambda: bool(world.record("g1").inc))
        world.migration("m2", "g2", policy=MigrationPolicy(total_timeout_ms=2_500))
        world.store.tree.notify(paths.migration("m2"))
        await until(lambda: world.state("m2").waiting_for is WaitingFor.PLACE)
    spent = world.state("m2").spent_ms
    assert spent >= 1_000
    async with leading(world, limits=limits):
        await until(lambda: world.state("m2").phase.terminal)
    assert world.state("m2").failure is FailureReason.TOTAL_TIMEOUT
    assert world.state("m2").spent_ms >= 2_500
    assert world.record("g2").phase is Ownership.IDLE
    assert not world.state("m1").phase.terminal


async def test_a_cancelled_migration_leaves_the_queue(world: World) -> None:
    world.guest("g2", "h1")
    world.hold = asyncio.Event()
    async with leading(world, limits=Limits(max_concurrent=1)) as supervisor:
        await until(lambda: bool(world.record("g1").inc))
        world.migration("m2", "g2")
        world.store.tree.notify(paths.migration("m2"))
        await until(lambda: world.state("m2").waiting_for is WaitingFor.PLACE)
        world.edit_state("m2", lambda s: cancelled_state(s, wall_s=1.0))
        await until(lambda: supervisor.status.finished.get("CANCELLED") == 1)
        assert world.state("m2").message == "cancelled on request"


def make_room(world: World, host: str, memory_mib: int) -> None:
    """Another host record in place of the old one, as an agent with another configuration writes it."""
    path = paths.host(host)
    node = world.store.tree.nodes[path]
    record = replace(decode(HostRecord, node.data), memory_mib=memory_mib)
    assert isinstance(world.store._apply([SetData(path, encode(record), node.version)]), Done)


def fill(world: World, *hosts: str) -> None:
    for host in hosts:
        world.guest(f"filler-{host}", host, memory_mib=1000)


async def test_a_migration_waits_for_room_without_holding_a_place(world: World) -> None:
    fill(world, "h2", "h3")
    world.migration("m1", "g1", policy=MigrationPolicy(wait_for_capacity=True))
    world.guest("small", "h1", memory_mib=8)
    async with leading(world, limits=Limits(max_concurrent=1)):
        await until(lambda: world.state("m1").waiting_for is WaitingFor.ROOM)
        assert "waiting for room" in world.state("m1").message
        world.migration("m2", "small")
        world.store.tree.notify(paths.migration("m2"))
        await until(lambda: world.state("m2").phase is MigrationPhase.SUCCEEDED)
        assert world.state("m1").phase is MigrationPhase.PENDING
        make_room(world, "h3", 2048)
        await until(lambda: world.state("m1").phase is MigrationPhase.SUCCEEDED)
    assert world.record("g1").owner.host == "h3"


async def test_the_wait_for_room_ends_with_the_total_timeout(world: World) -> None:
    fill(world, "h2", "h3")
    world.migration("m1", "g1", policy=MigrationPolicy(wait_for_capacity=True, total_timeout_ms=2_000))
    async with leading(world):
        await until(lambda: world.state("m1").phase.terminal)
    state = world.state("m1")
    assert state.failure in (FailureReason.TOTAL_TIMEOUT, FailureReason.NO_CAPACITY)
    assert state.spent_ms >= 2_000


async def test_a_retry_keeps_the_memory_that_is_promised_to_it(world: World) -> None:
    world.ends = [LATE]
    world.migration("m1", "g1", policy=MigrationPolicy(backoff_initial_ms=400, backoff_max_ms=400))
    task = asyncio.create_task(drive(world))
    await until(lambda: world.state("m1").phase is MigrationPhase.RETRY_WAIT)
    assert world.reserved("h2") == {"m1": 64}
    assert await task == "SUCCEEDED"
    assert world.record("g1").owner.host == "h2"
    assert world.reserved("h2") == {} == world.reserved("h3")


async def test_the_promise_moves_with_the_destination(world: World) -> None:
    world.ends = [AbortReason.DESTINATION_LOST]
    world.migration("m1", "g1", policy=MigrationPolicy(backoff_initial_ms=400, backoff_max_ms=400))
    task = asyncio.create_task(drive(world))
    await until(lambda: world.state("m1").phase is MigrationPhase.RETRY_WAIT)
    world.hold = asyncio.Event()
    await until(lambda: world.record("g1").attempt == 2 and bool(world.record("g1").inc))
    assert (world.reserved("h2"), world.reserved("h3")) == ({}, {"m1": 64})
    world.hold.set()
    assert await task == "SUCCEEDED"
    assert world.reserved("h2") == {} == world.reserved("h3")


async def test_a_retry_that_finds_no_room_gives_back_its_promise(world: World) -> None:
    world.ends = [LATE]
    policy = MigrationPolicy(backoff_initial_ms=400, backoff_max_ms=400, wait_for_capacity=True)
    world.migration("m1", "g1", policy=policy)
    async with leading(world):
        await until(lambda: world.state("m1").phase is MigrationPhase.RETRY_WAIT)
        for host in ("h2", "h3"):
            world.put(paths.cordon(host), Cordon(on=True, why="repair"))
        await until(lambda: world.state("m1").waiting_for is WaitingFor.ROOM)
        assert world.reserved("h2") == {}
        assert world.state("m1").phase is MigrationPhase.RETRY_WAIT
        world.put(paths.cordon("h3"), Cordon())
        await until(lambda: world.state("m1").phase is MigrationPhase.SUCCEEDED)
    assert [r.attempt for r in world.attempts("m1")] == [1, 2]


def silence(world: World, host: str) -> None:
    world.store.tree.nodes.pop(paths.live(host))
    world.store.tree.notify(paths.live(host))


async def test_a_migration_waits_for_its_sources_agent_and_promises_nothing(world: World) -> None:
    silence(world, "h1")
    async with leading(world):
        await until(lambda: world.state("m1").waiting_for is WaitingFor.SOURCE)
        assert "the agent of h1" in world.state("m1").message
        assert world.reserved("h2") == {} == world.reserved("h3")
        assert world.calls == []
        world.put(paths.live("h1"), Cordon())
        world.store.tree.notify(paths.live("h1"))
        await until(lambda: world.state("m1").phase is MigrationPhase.SUCCEEDED)


async def test_an_attempt_whose_source_falls_silent_blames_no_destination(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SOURCE_PATIENCE_MS", 800.0)
    world.silent = {"h1"}
    async with leading(world):
        await until(lambda: ("conduct", "h1", 1) in world.calls)
        silence(world, "h1")
        await until(lambda: world.state("m1").phase.terminal)
    assert world.state("m1").failure is FailureReason.SOURCE_UNREACHABLE
    assert [r.reason for r in world.attempts("m1")] == [AbortReason.SOURCE_UNREACHABLE]
    assert world.reserved("h2") == {} == world.reserved("h3")
    assert (world.record("g1").phase, world.record("g1").owner.host) == (Ownership.IDLE, "h1")


async def test_the_evacuation_of_a_dead_host_ends_and_names_what_is_left(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SOURCE_PATIENCE_MS", 500.0)
    monkeypatch.setattr(evacuation, "SILENT_MS", 1_000.0)
    world.store.tree.nodes.pop(paths.migration("m1"))
    world.put(paths.guest("st"), GuestRecord("n-st", Ownership.STARTING, HostRef("h1", "boot-h1")))
    world.put(paths.guest_spec("st"), GuestSpec("n-st"))
    silence(world, "h1")
    world.evacuation("e1", "h1")
    async with leading(world):
        await until(lambda: world.job("e1").phase.terminal)
    job = world.job("e1")
    assert (job.phase, job.failure) == (EvacuationPhase.FAILED, FailureReason.SOURCE_UNREACHABLE)
    assert "n-st (still starting)" in job.message
    assert not job.safe_to_power_off
    assert world.reserved("h2") == {} == world.reserved("h3")


async def test_an_evacuation_finds_the_packing_that_exists(world: World) -> None:
    world.store.tree.nodes.pop(paths.migration("m1"))
    world.guest("g1", "h1", memory_mib=600)
    world.guest("g2", "h1", memory_mib=400)
    world.guest("g3", "h1", memory_mib=400)
    make_room(world, "h2", 800)
    make_room(world, "h3", 600)
    world.evacuation("e1", "h1", max_concurrent=1)
    async with leading(world):
        await until(lambda: world.job("e1").phase.terminal)
    assert world.job("e1").phase is EvacuationPhase.SUCCEEDED
    assert world.record("g1").owner.host == "h3"


async def test_a_migration_committed_to_a_dead_host_gives_its_places_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "COMMITTED_HOLD_S", 0.3)
    world.guest("g2", "h1")
    lost = GuestRecord(
        "n-g1", Ownership.COMMITTED, HostRef("h2", "b"), "m1", 1, HostRef("h2", "b"), "inc", HostRef("h1", "boot-h1")
    )
    world.put(paths.guest("g1"), lost)
    world.edit_state("m1", lambda s: replace(s, phase=MigrationPhase.PREPARING, attempt=1, source="h1"))
    world.migration("m2", "g2")
    async with leading(world, limits=Limits(max_concurrent=1)):
        await until(lambda: world.state("m2").phase is MigrationPhase.SUCCEEDED)
    assert not world.state("m1").phase.terminal


async def test_evacuation_empties_the_host(world: World) -> None:
    world.store.tree.nodes.pop(paths.migration("m1"))
    for n in range(2, 7):
        world.guest(f"g{n}", "h1", memory_mib=60 * n)
    world.ends = [LATE, LATE]
    world.evacuation("e1", "h1")
    async with leading(world):
        await until(lambda: world.job("e1").phase.terminal)
        job = world.job("e1")
        assert job.phase is EvacuationPhase.SUCCEEDED
        assert job.safe_to_power_off
        assert {world.record(f"g{n}").owner.host for n in range(1, 7)} == {"h2", "h3"}
        path = paths.cordon("h1")
        assert job.safe_at == world.store.tree.nodes[path].version
        for cordon in (Cordon(), Cordon(on=True)):
            write = SetData(path, encode(cordon), world.store.tree.nodes[path].version)
            assert isinstance(world.store._apply([write]), Done)
        await until(lambda: world.job("e1").safe_at == world.store.tree.nodes[path].version)


async def test_evacuation_survives_its_coordinator(world: World) -> None:
    world.store.tree.nodes.pop(paths.migration("m1"))
    for n in range(2, 6):
        world.guest(f"g{n}", "h1")
    world.evacuation("e1", "h1", max_concurrent=2)
    world.hold = asyncio.Event()
    async with leading(world):
        await until(lambda: sum(bool(world.record(f"g{n}").inc) for n in range(1, 6)) == 2)
        await asyncio.sleep(0.1)
        assert len(world.conducting) == 2
    async with leading(world):
        world.hold.set()
        await until(lambda: world.job("e1").phase.terminal)
    assert world.job("e1").phase is EvacuationPhase.SUCCEEDED
    assert len(world.conducting) == 5
    assert all(guest.tries == 1 for guest in world.job("e1").guests)


async def test_cancelled_evacuation_cancels_what_is_under_way(world: World) -> None:
    world.store.tree.nodes.pop(paths.migration("m1"))
    world.hold = asyncio.Event()
    world.evacuation("e1", "h1")
    async with leading(world):
        await until(lambda: bool(world.record("g1").inc))
        await asyncio.sleep(0.05)
        path = paths.evacuation_state("e1")
        wish = encode(replace(world.job("e1"), cancel_requested=True))
        world.store._apply([SetData(path, wish, world.store.tree.nodes[path].version)])
        await until(lambda: world.job("e1").phase is EvacuationPhase.CANCELLED)
    assert world.record("g1").owner.host == "h1"
    assert world.job("e1").guests[0].phase is MigrationPhase.CANCELLED


async def test_token_bucket_holds_its_rate() -> None:
    bucket = TokenBucket(rate=200.0, burst=2)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    await asyncio.gather(*(bucket.take() for _ in range(22)))
    assert 0.09 <= loop.time() - begin < 1.0


async def test_power_is_not_safe_while_a_copy_is_left_and_the_agent_says_so(world: World) -> None:
    """The records say that the guest has left; its stopped copy still holds memory and disks."""
    world.store.tree.nodes.pop(paths.migration("m1"))
    world.copies["h1"] = [CopyStatus("g1", "n-g1", "inc", 64, 4711)]
    world.evacuation("e1", "h1")
    async with leading(world):
        await until(lambda: world.record("g1").owner.host != "h1" and "copies" in world.job("e1").message)
        assert not world.job("e1").phase.terminal
        assert not world.job("e1").safe_to_power_off
        world.copies["h1"] = []
        world.unsure.add("h1")
        await until(lambda: "nobody has said" in world.job("e1").message)
        assert not world.job("e1").safe_to_power_off
        world.unsure.clear()
        await until(lambda: world.job("e1").phase is EvacuationPhase.SUCCEEDED)
    assert world.job("e1").safe_to_power_off


async def test_an_evacuation_of_a_host_that_dies_says_who_was_lost(world: World) -> None:
    world.store.tree.nodes.pop(paths.migration("m1"))
    world.hold = asyncio.Event()
    for root in (paths.FENCE, paths.DEATHS, paths.FENCERS):
        world.store.tree.nodes[root] = Versioned(b"", 0, 0)
    world.guest("g2", "h1")
    path = paths.guest_spec("g2")
    world.put(path, replace(decode(GuestSpec, world.store.tree.nodes[path].data), on_host_death=OnHostDeath.RESTART))
    world.put(paths.name("n-g2"), "g2")
    world.evacuation("e1", "h1")
    async with leading(world):
        await until(lambda: all(world.record(uuid).inc for uuid in ("g1", "g2")))
        world.store.tree.nodes.pop(paths.live("h1"))
        world.silent.add("h1")
        world.put(paths.death("h1"), HostDeath("h1", "boot-h1", on_word=True, requested_by="ann"))
        await until(lambda: world.job("e1").phase.terminal)
    job = world.job("e1")
    assert (job.phase, job.failure) == (EvacuationPhase.FAILED, FailureReason.HOST_DIED)
    assert job.message == "0 of 2 guests had left h1 when it died; crashed with it: n-g1; to start elsewhere: n-g2"
    assert job.safe_to_power_off, "a certificate says that nothing runs there"
    assert world.reserved("h2") == {} == world.reserved("h3")


@pytest.mark.rule("H13")
async def test_a_record_from_before_open_is_never_taken_for_an_arrival(world: World) -> None:
    """A server that lags by the length of one read shows the guest idle and the migration under way."""
    old = world.store.tree.nodes[paths.guest("g1")]
    opened = handover.open_attempt(world.record("g1"), "m1", 1, HostRef("h2", "boot-h2"), epoch=EPOCH, writer="dead")
    world.put(paths.guest("g1"), opened)
    under_way = MigrationState(MigrationPhase.PREPARING, 1, "h1", "h2", epoch=EPOCH)
    before = world.store.tree.nodes[paths.migration_state("m1")]
    real, lags = world.store.read, True

    async def barrier(timeout_s: float = 2.0) -> None:
        nonlocal lags
        lags = False

    async def read(path: str, timeout_s: float = 2.0) -> Versioned | None:
        return old if lags and path == paths.guest("g1") else await real(path, timeout_s)

    world.store.tree.nodes[paths.migration_state("m1")] = Versioned(encode(under_way), before.version + 1, 1)
    world.store.read, world.store.barrier = read, barrier
    world.store.watch = lambda path, callback: world.store._watch((path, False, callback), lambda: None)
    assert await drive(world) == "SUCCEEDED"
    assert world.record("g1").owner.host == "h2"
    assert [report.outcome for report in world.attempts("m1")] == ["COMMITTED"]


@pytest.mark.rule("H13")
async def test_a_migration_that_nobody_has_begun_costs_no_barrier(world: World) -> None:
    """What its driver does first is a compare-and-set, which proves that nothing had been missed."""
    assert await drive(world) == "SUCCEEDED"
    assert world.store.barriers == 0


@pytest.mark.rule("H13")
async def test_a_driver_that_sees_nothing_of_its_predecessor_goes_on_where_that_one_was(world: World) -> None:
    """Its server lags behind the one through which the first attempt was opened."""
    over = asyncio.Event()
    taken_over = World(MemoryStore(world.store.tree), hold=over)
    predecessor = asyncio.create_task(worker(taken_over).drive("m1", EPOCH))
    world.store.lag()
    await until(lambda: bool(world.record("g1").inc))
    predecessor.cancel()
    successor = asyncio.create_task(drive(world))
    await until(lambda: world.store._old is None)
    over.set()
    assert await successor == "SUCCEEDED"
    assert [(report.attempt, report.outcome) for report in world.attempts("m1")] == [(1, "COMMITTED")]
    assert not world.calls, "the attempt was conducted already"


async def test_who_loses_a_race_for_room_looks_again_without_a_barrier(world: World) -> None:
    """The conflict was an answer of the quorum: what moved was told before it."""
    real, lost = world.store.multi, False

    async def multi(ops, timeout_s: float = 2.0):
        nonlocal lost
        if not lost and any(op.path == paths.reservations("h2") for op in ops):
            lost = True
            node = world.store.tree.nodes[paths.reservations("h2")]
            world.store.tree.nodes[paths.reservations("h2")] = replace(node, version=node.version + 1)
        return await real(ops, timeout_s)

    world.store.multi = multi
    assert await drive(world) == "SUCCEEDED"
    assert lost
    assert world.store.barriers == 0


async def test_nodes_that_are_there_already_are_looked_up_after_a_guess_that_failed(world: World) -> None:
    """As in a ledger that somebody mended by hand."""
    world.put(paths.requests("m1"), Requests())
    world.put(paths.acks("m1"), Requests())
    assert await drive(world) == "SUCCEEDED"


def test_what_is_spent_is_written_down_as_often_as_the_budgets_are_short() -> None:
    """Three thousand migrations with an hour each would be three hundred writes per second."""
    assert driver.spent_every_s(MigrationPolicy()) == driver.SPENT_S
    long = MigrationPolicy(total_timeout_ms=3_600_000, precopy_timeout_ms=3_600_000)
    assert driver.spent_every_s(long) == 360
    assert driver.spent_every_s(replace(long, precopy_timeout_ms=200_000)) == 20
