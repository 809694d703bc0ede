"""Migrations and evacuations through the real API: what is written for the coordinator, what is answered, refusals.

Where it says "driven", the coordinator's production driver works on what the API wrote.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import wire
from orchestrator.api import checks
from orchestrator.api.calls import digest
from orchestrator.coordinator.evacuations import EvacuationRunner
from orchestrator.coordinator.worker import Worker
from orchestrator.core import handover
from orchestrator.core.agent import AgentSample, AttemptStatus, Progress
from orchestrator.core.errors import AbortReason, DroverError, FailureReason, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.obstacles import certain
from orchestrator.core.policy import MigrationPolicy, OnTimeout
from orchestrator.core.records import (
    AttemptReport,
    Attempts,
    EvacuationPhase,
    EvacuationSpec,
    GuestSpec,
    MigrationPhase,
    MigrationSpec,
    MigrationState,
    TimelineEntry,
)
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Op, StoreUnavailable, Versioned, WriteResult
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import orchestrator_pb2 as pb
from tests.fakes.api import ApiCluster, api_cluster, until
from tests.fakes.coordination import MemoryStore, World

R = RefusalReason
P = MigrationPhase
EPOCH = 3
QUICK = MigrationPolicy(backoff_initial_ms=1, backoff_max_ms=2)
WEB = GuestSpec("web", policy=QUICK)
D = HostRef("h2", "boot-h2")


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    store.tree.nodes[paths.epoch()] = Versioned(b"", EPOCH, 0)
    return store


@pytest.fixture
def world(store: MemoryStore) -> World:
    return World(store)


@pytest.fixture
async def api(store: MemoryStore, tmp_path: Path) -> AsyncIterator[ApiCluster]:
    async with api_cluster(store, tmp_path) as cluster:
        await cluster.call(cluster.client.create_guest, WEB, "h1")
        yield cluster


@pytest.fixture
def client(api: ApiCluster) -> OrchestratorClient:
    return api.client


@pytest.fixture
async def web(api: ApiCluster, client: OrchestratorClient) -> str:
    return (await api.call(client.get_guest, "web")).uuid


async def drive(world: World, *migrations: str) -> None:
    """The coordinator's work on these migrations, to their ends."""
    worker = Worker(world.store, world)
    async with asyncio.timeout(10):
        await asyncio.gather(*(worker.drive(name, EPOCH) for name in migrations))


def edit(world: World, uuid: str, change: Callable[[GuestRecord], GuestRecord]) -> GuestRecord:
    record = change(world.record(uuid))
    node = world.store.tree.nodes[paths.guest(uuid)]
    world.store.tree.nodes[paths.guest(uuid)] = replace(node, data=encode(record), version=node.version + 1)
    world.store.tree.notify(paths.guest(uuid))
    return record


def at(world: World, uuid: str, name: str, where: str) -> None:
    """Bring the migration to a point of its life, as agents and coordinator would."""
    steps: list[Callable[[GuestRecord], GuestRecord]] = [
        lambda record: handover.open_attempt(record, name, 1, D, epoch=EPOCH, writer="c"),
        lambda record: handover.bind(record, name, 1, "inc", writer="a"),
    ]
    if where in ("aborted", "retry"):
        late = AbortReason.LATE_SWITCHOVER_ACK
        steps.append(lambda record: handover.abort(record, name, 1, late, ("nic",), writer="a"))
    if where in ("committed", "arrived"):
        steps.append(lambda record: handover.commit(record, name, 1, "inc", writer="a"))
    if where == "arrived":
        steps.append(lambda record: handover.done(record, name, 1, "inc", writer="b"))
    for step in steps[:1] if where == "open" else steps:
        edit(world, uuid, step)
    phase = P.RETRY_WAIT if where == "retry" else P.PREPARING
    world.edit_state(name, lambda state: replace(state, phase=phase, attempt=1, source="h1", destination="h2"))
    if where == "retry":
        report = AttemptReport(1, "ABORTED", AbortReason.LATE_SWITCHOVER_ACK, ("nic",))
        world.put(paths.attempts(name), Attempts((report,)))


# --- ask --------------------------------------------------------------------------------------------------------------


async def test_what_the_coordinator_finds(api: ApiCluster, client: OrchestratorClient, world: World, web: str) -> None:
    migration = await api.call(client.create_migration, "web", "h2", {"max_attempts": 7}, request_id="r1")
    name = migration.name
    assert (wire.word(migration, "phase"), migration.source, migration.destination) == ("PENDING", "h1", "h2")
    assert (migration.guest, migration.guest_uuid, migration.attempt) == ("web", web, 0)
    spec = decode(MigrationSpec, world.store.tree.nodes[paths.migration(name)].data)
    assert (spec.id, spec.guest, spec.guest_name, spec.destination) == (name, web, "web", "h2")
    assert spec.policy == replace(QUICK, max_attempts=7)
    assert world.state(name) == MigrationState()
    assert world.attempts(name) == ()
    (created,) = [ops for ops in world.store.writes if any(op.path == paths.migration(name) for op in ops)]
    assert [op.path for op in created] == [
        paths.request_id("r1"),
        paths.guest(web),
        paths.newest_migration(web),
        paths.migration(name),
        paths.migration_state(name),
        paths.attempts(name),
        paths.active_migration(name),
    ]


async def test_a_migration_driven_to_its_end_is_explained_for_ever(
    api: ApiCluster, client: OrchestratorClient, world: World, web: str
) -> None:
    world.ends = [AbortReason.LATE_SWITCHOVER_ACK, None]
    name = (await api.call(client.create_migration, "web")).name
    await drive(world, name)
    done = await api.call(client.get_migration, name)
    assert (wire.word(done, "phase"), done.source, done.attempt) == ("SUCCEEDED", "h1", 2)
    assert [(report.outcome, report.reason) for report in done.attempts] == [
        ("ABORTED", "LATE_SWITCHOVER_ACK"),
        ("COMMITTED", ""),
    ]
    assert done.HasField("end_time")
    assert done.end_time.ToNanoseconds() >= done.create_time.ToNanoseconds()
    guest = await api.call(client.get_guest, "web")
    assert (guest.host, guest.migration) == (done.destination, "")
    world.put(paths.guest(web), replace(world.record(web), phase=Ownership.GONE))
    assert await api.call(client.get_migration, name) == done


async def test_time_lines_are_for_who_asks_for_one_migration(
    api: ApiCluster, client: OrchestratorClient, world: World
) -> None:
    name = (await api.call(client.create_migration, "web")).name
    report = AttemptReport(1, "ABORTED", timeline=(TimelineEntry(1.0, "h1", "freeze"),))
    world.put(paths.attempts(name), Attempts((report,)))
    assert (await api.call(client.get_migration, name)).attempts[0].timeline[0].event == "freeze"
    (listed,) = await api.call(client.list_migrations)
    assert len(listed.attempts) == 1
    assert not listed.attempts[0].timeline


async def test_a_repeated_request_is_the_same_migration(
    api: ApiCluster, client: OrchestratorClient, world: World
) -> None:
    made = await asyncio.gather(*(api.call(client.create_migration, "web", request_id="r1") for _ in range(6)))
    assert len({migration.name for migration in made}) == 1
    await drive(world, made[0].name)
    again = await api.call(client.create_migration, "web", request_id="r1")
    assert (again.name, wire.word(again, "phase")) == (made[0].name, "SUCCEEDED")
    error = await api.refused(client.create_migration, "web", "h3", request_id="r1")
    assert (error.reason, error.field) == (R.REQUEST_ID_REUSED, "request_id")


async def test_an_id_of_one_kind_of_request_does_not_serve_another(api: ApiCluster, client: OrchestratorClient) -> None:
    await api.call(client.create_migration, "web", request_id="r1")
    for asked in (
        api.refused(client.create_evacuation, "h1", request_id="r1"),
        api.refused(client.create_guest, GuestSpec("other"), request_id="r1"),
    ):
        assert (await asked).reason is R.REQUEST_ID_REUSED


@pytest.mark.parametrize("applied", [False, True])
async def test_a_lost_answer_is_settled_by_the_request_record(
    api: ApiCluster, client: OrchestratorClient, world: World, applied: bool
) -> None:
    world.store.fail_next = [applied]
    name = (await api.call(client.create_migration, "web")).name
    assert [each.name for each in await api.call(client.list_migrations)] == [name]


async def test_an_answer_that_stays_lost_is_said_to_be_unknown(
    api: ApiCluster, client: OrchestratorClient, world: World
) -> None:
    async def barrier(timeout_s: float = 2.0) -> None:
        await asyncio.sleep(0)
        raise StoreUnavailable("no quorum")

    world.store.fail_next, world.store.barrier = [True], barrier
    client.timeout_s = 0.6
    error = await api.refused(client.create_migration, "web", request_id="r1")
    assert error.reason is R.OUTCOME_UNKNOWN
    del world.store.barrier
    client.timeout_s = 5
    again = await api.call(client.create_migration, "web", request_id="r1")
    assert [each.name for each in await api.call(client.list_migrations)] == [again.name]


async def test_validate_only_says_where_it_would_go(api: ApiCluster, client: OrchestratorClient, world: World) -> None:
    await api.call(client.create_guest, GuestSpec("big", memory_mib=500), "h2")
    writes = len(world.store.writes)
    shown = await api.call(client.create_migration, "web", policy={"max_attempts": 2}, validate_only=True)
    assert (shown.name, shown.source, shown.destination, shown.policy.max_attempts) == ("", "h1", "h3", 2)
    assert len(world.store.writes) == writes


@pytest.mark.parametrize("validate_only", [False, True])
@pytest.mark.parametrize(
    ("guest", "destination", "policy", "reason", "field"),
    [
        ("nobody", "", {}, R.NOT_FOUND, "guest"),
        ("No/body", "", {}, R.INVALID_ARGUMENT, "guest"),
        ("web", "h7", {}, R.NOT_FOUND, "destination"),
        ("web", "h/7", {}, R.INVALID_ARGUMENT, "destination"),
        ("web", "h1", {}, R.INVALID_ARGUMENT, "destination"),
        ("web", "cordoned", {}, R.HOST_CORDONED, "destination"),
        ("web", "silent", {}, R.HOST_NOT_LIVE, "destination"),
        ("web", "small", {}, R.NO_CAPACITY, "destination"),
        ("web", "", {"max_attempts": 0}, R.INVALID_ARGUMENT, "policy.max_attempts"),
        ("web", "", {"gate_wait_ms": 5001}, R.INVALID_ARGUMENT, "policy.gate_wait_ms"),
        ("web", "", {"backoff_max_ms": 0}, R.INVALID_ARGUMENT, "policy.backoff_initial_ms"),
    ],
)
async def test_migrations_that_cannot_be(
    api: ApiCluster,
    client: OrchestratorClient,
    guest: str,
    destination: str,
    policy: dict[str, object],
    reason: RefusalReason,
    field: str,
    validate_only: bool,
) -> None:
    await api.host("cordoned")
    await api.call(client.cordon_host, "cordoned")
    await api.host("silent", live=False)
    await api.host("small", memory_mib=10)
    error = await api.refused(client.create_migration, guest, destination, policy, validate_only=validate_only)
    assert (error.reason, error.field) == (reason, field)
    assert await api.call(client.list_migrations) == []


@pytest.mark.parametrize("destination", ["cordoned", "silent", "small"])
async def test_a_migration_that_may_wait_is_taken_where_time_may_bring_a_place(
    api: ApiCluster, client: OrchestratorClient, destination: str
) -> None:
    await api.host("cordoned")
    await api.call(client.cordon_host, "cordoned")
    await api.host("silent", live=False)
    await api.host("small", memory_mib=10)
    waits = {"wait_for_capacity": True}
    assert wire.word(await api.call(client.create_migration, "web", destination, waits), "phase") == "PENDING"
    assert (await api.refused(client.create_migration, "web", "h7", waits)).reason is R.NOT_FOUND


async def test_a_part_of_a_policy_is_judged_together_with_the_guests_own(
    api: ApiCluster, client: OrchestratorClient
) -> None:
    patient = MigrationPolicy(switchover_timeout_ms=20_000, backoff_max_ms=60_000)
    await api.call(client.create_guest, GuestSpec("slow", policy=patient))
    made = await api.call(
        client.create_migration, "slow", policy={"gate_wait_ms": 10_000, "backoff_initial_ms": 30_000}
    )
    assert wire.policy_from_proto(made.policy) == replace(patient, gate_wait_ms=10_000, backoff_initial_ms=30_000)


async def test_everything_that_is_wrong_is_said_at_once(api: ApiCluster, client: OrchestratorClient) -> None:
    error = await api.refused(
        client.create_migration, "w/eb", "h/1", {"max_attempts": 0, "ack_timeout_ms": 0}, request_id="/"
    )
    assert [field for field, _ in error.violations] == [
        "request_id",
        "guest",
        "destination",
        "policy.ack_timeout_ms",
        "policy.max_attempts",
    ]


@pytest.mark.parametrize("where", ["open", "bound", "committed", "aborted"])
async def test_a_guest_in_a_migration_gets_no_second_one(
    api: ApiCluster, client: OrchestratorClient, world: World, web: str, where: str
) -> None:
    name = (await api.call(client.create_migration, "web")).name
    at(world, web, name, where)
    error = await api.refused(client.create_migration, "web")
    assert (error.reason, error.details) == (R.GUEST_IS_MIGRATING, {"migration": name})
    assert (await api.call(client.get_guest, "web")).migration == name


async def test_a_guest_whose_migration_has_not_begun_gets_no_second_one(
    api: ApiCluster, client: OrchestratorClient, web: str
) -> None:
    """No coordinator is here, so nothing begins; a caller that asks twice must not move the guest twice."""
    asked = await asyncio.gather(*(api.call(client.create_migration, "web") for _ in range(4)), return_exceptions=True)
    made = [each for each in asked if not isinstance(each, BaseException)]
    refused = [each for each in asked if isinstance(each, DroverError)]
    assert (len(made), len(refused)) == (1, 3)
    assert {each.reason for each in refused} == {R.GUEST_IS_MIGRATING}
    error = await api.refused(client.create_migration, "web", validate_only=True)
    assert error.details == {"migration": made[0].name}
    await api.call(client.cancel_migration, made[0].name)
    assert (await api.call(client.create_migration, "web")).name != made[0].name


# --- look -------------------------------------------------------------------------------------------------------------


async def test_lists(api: ApiCluster, client: OrchestratorClient, world: World) -> None:
    clock = iter(range(1, 100))
    api.server.tools.wall_s = lambda: float(next(clock))
    await api.call(client.create_guest, GuestSpec("db", policy=QUICK), "h2")
    first = (await api.call(client.create_migration, "web")).name
    await drive(world, first)
    second = (await api.call(client.create_migration, "db")).name
    third = (await api.call(client.create_migration, "web")).name
    names = [migration.name for migration in await api.call(client.list_migrations)]
    assert names == [third, second, first]
    assert [each.name for each in await api.call(client.list_migrations, "web")] == [third, first]
    for _ in range(2):  # the second time from memory
        active = await api.call(client.list_migrations, active_only=True)
        assert [each.name for each in active] == [third, second]
    assert (await api.refused(client.list_migrations, "nobody")).field == "guest"


@pytest.mark.parametrize("name", ["nobody", "a/b", "", "..", "x" * 200])
async def test_migrations_that_there_are_not(api: ApiCluster, client: OrchestratorClient, name: str) -> None:
    for method in (client.get_migration, client.cancel_migration, client.get_evacuation, client.cancel_evacuation):
        assert (await api.refused(method, name)).reason is R.NOT_FOUND


async def test_samples_show_until_the_agent_falls_silent(
    api: ApiCluster, client: OrchestratorClient, world: World, web: str
) -> None:
    name = (await api.call(client.create_migration, "web")).name
    at(world, web, name, "bound")
    await api.hearing("h1")
    agent, fleet = api.agents["h1"], api.server.tools.fleet
    sample = AttemptStatus(AttemptRef(web, name, 1), P.SWITCHOVER, Progress(remaining_bytes=7, gate_open=True))
    agent.say(AgentSample(attempts=(sample,)))
    await until(lambda: fleet.attempt("h1", name, 1) is not None)
    shown = await api.call(client.get_migration, name)
    assert (wire.word(shown, "phase"), shown.progress.remaining_bytes) == ("SWITCHOVER", 7)
    assert fleet.attempt("h1", name, 2) is None, "never a sample of another attempt"
    aborted = edit(world, web, lambda record: handover.abort(record, name, 1, AbortReason.CANCELLED, writer="a"))
    shown = await api.call(client.get_migration, name)
    assert (wire.word(shown, "phase"), shown.HasField("progress")) == ("ABORTING", False)
    edit(world, web, lambda _record: replace(aborted, phase=Ownership.OPEN))
    await agent.stop()
    await until(lambda: not fleet.hears("h1"))
    shown = await api.call(client.get_migration, name)
    assert (wire.word(shown, "phase"), shown.HasField("progress")) == ("PRECOPY", False)


async def test_a_sample_of_an_attempt_that_ended_is_forgotten(
    api: ApiCluster, client: OrchestratorClient, world: World, web: str
) -> None:
    name = (await api.call(client.create_migration, "web")).name
    at(world, web, name, "bound")
    await api.hearing("h1")
    sample = AttemptStatus(AttemptRef(web, name, 1), P.SWITCHOVER, Progress())
    fleet = api.server.tools.fleet
    api.agents["h1"].say(AgentSample(attempts=(sample,)))
    await until(lambda: fleet.attempt("h1", name, 1) is not None)
    api.agents["h1"].say(AgentSample(attempts=(replace(sample, ended=True),)))
    await until(lambda: fleet.attempt("h1", name, 1) is None)


# --- cancel -----------------------------------------------------------------------------------------------------------


async def test_cancel_before_the_first_attempt(api: ApiCluster, client: OrchestratorClient, world: World) -> None:
    name = (await api.call(client.create_migration, "web")).name
    cancelled = await api.call(client.cancel_migration, name)
    assert (wire.word(cancelled, "phase"), cancelled.failure) == ("CANCELLED", FailureReason.CANCELLED)
    assert cancelled.cancel_requested
    assert cancelled.HasField("end_time")
    await drive(world, name)
    assert world.state(name).phase is P.CANCELLED
    assert world.calls == []


@pytest.mark.parametrize("where", ["open", "bound"])
@pytest.mark.rule("H6")
async def test_cancel_of_an_open_attempt_is_the_records_compare_and_set(
    api: ApiCluster, client: OrchestratorClient, world: World, web: str, where: str
) -> None:
    name = (await api.call(client.create_migration, "web")).name
    at(world, web, name, where)
    cancelled = await api.call(client.cancel_migration, name)
    assert (wire.word(cancelled, "phase"), cancelled.cancel_requested) == ("ABORTING", True)
    record = world.record(web)
    assert (record.phase, record.reason) == (Ownership.ABORTED, AbortReason.CANCELLED)
    for host in ("h1", "h2"):
        await until(lambda host=host: ("Nudge", web) in api.agents[host].calls)
    await drive(world, name)
    ended = await api.call(client.get_migration, name)
    assert (wire.word(ended, "phase"), ended.attempts[0].reason) == ("CANCELLED", "CANCELLED")
    assert world.record(web).phase is Ownership.IDLE


@pytest.mark.rule("H6")
async def test_cancel_between_abort_and_report_lets_the_report_be_taken(
    api: ApiCluster, client: OrchestratorClient, world: World, web: str
) -> None:
    name = (await api.call(client.create_migration, "web")).name
    at(world, web, name, "aborted")
    cancelled = await api.call(client.cancel_migration, name)
    assert (wire.word(cancelled, "phase"), cancelled.cancel_requested) == ("ABORTING", True)
    await drive(world, name)
    ended = await api.call(client.get_migration, name)
    assert (wire.word(ended, "phase"), ended.attempts[0].reason) == ("CANCELLED", "LATE_SWITCHOVER_ACK")


@pytest.mark.rule("H6")
async def test_cancel_in_retry_wait_closes_the_record_at_once(
    api: ApiCluster, client: OrchestratorClient, world: World, web: str
) -> None:
    name = (await api.call(client.create_migration, "web")).name
    at(world, web, name, "retry")
    world.promise("h2", **{name: 64, "other": 1})
    cancelled = await api.call(client.cancel_migration, name)
    assert (wire.word(cancelled, "phase"), cancelled.attempts[0].reason) == ("CANCELLED", "LATE_SWITCHOVER_ACK")
    assert world.record(web).phase is Ownership.IDLE
    assert world.reserved("h2") == {"other": 1}
    await api.call(client.create_migration, "web")  # the guest is free for another one


@pytest.mark.parametrize(("where", "has_zxid"), [("committed", True), ("arrived", False)])
@pytest.mark.rule("H6")
async def test_cancel_after_the_commit_is_refused_with_its_zxid(
    api: ApiCluster, client: OrchestratorClient, world: World, web: str, where: str, has_zxid: bool
) -> None:
    name = (await api.call(client.create_migration, "web")).name
    at(world, web, name, where)
    before = world.record(web)
    error = await api.refused(client.cancel_migration, name)
    assert (error.reason, error.details["destination"]) == (R.ALREADY_COMMITTED, "h2")
    assert ("zxid" in error.details) is has_zxid
    if has_zxid:
        assert error.details["zxid"] == str(world.store.tree.nodes[paths.guest(web)].mzxid)
    assert world.record(web) == before


async def test_a_cancelled_migration_may_be_cancelled_again_and_an_ended_one_not(
    api: ApiCluster, client: OrchestratorClient, world: World
) -> None:
    name = (await api.call(client.create_migration, "web")).name
    first = await api.call(client.cancel_migration, name)
    assert await api.call(client.cancel_migration, name) == first
    done = (await api.call(client.create_migration, "web")).name
    await drive(world, done)
    assert (await api.refused(client.cancel_migration, done)).reason is R.ALREADY_COMMITTED
    failed = (await api.call(client.create_migration, "web")).name
    world.edit_state(failed, lambda state: replace(state, phase=P.FAILED, failure=FailureReason.NO_CAPACITY))
    error = await api.refused(client.cancel_migration, failed)
    assert error.reason is R.ALREADY_ENDED
    assert "NO_CAPACITY" in error.message


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.rule("H6")
async def test_a_cancel_whose_answer_is_lost_is_read_behind_a_barrier(
    api: ApiCluster, client: OrchestratorClient, world: World, web: str, applied: bool
) -> None:
    name = (await api.call(client.create_migration, "web")).name
    at(world, web, name, "bound")
    world.store.fail_next = [applied]
    assert (await api.call(client.cancel_migration, name)).cancel_requested
    assert world.record(web).reason is AbortReason.CANCELLED


@pytest.mark.rule("H6")
async def test_a_cancel_that_loses_against_the_commit_says_so(
    api: ApiCluster, client: OrchestratorClient, world: World, web: str
) -> None:
    """The commit arrives between the cancel's read and its write."""
    name = (await api.call(client.create_migration, "web")).name
    at(world, web, name, "bound")
    multi = world.store.multi

    async def commit_first(ops: Sequence[Op], timeout_s: float = 2.0) -> WriteResult:
        world.store.multi = multi
        edit(world, web, lambda record: handover.commit(record, name, 1, "inc", writer="a"))
        return await multi(ops, timeout_s)

    world.store.multi = commit_first
    assert (await api.refused(client.cancel_migration, name)).reason is R.ALREADY_COMMITTED
    assert world.record(web).owner == D


@pytest.mark.rule("H6")
async def test_cancels_at_any_instant_of_a_driven_migration_are_true(
    api: ApiCluster, client: OrchestratorClient, world: World, web: str
) -> None:
    """Whatever the cancel answers is what the migration came to."""
    seen: set[str] = set()
    for number in range(12):
        owner = world.record(web).owner
        name = (await api.call(client.create_migration, "web")).name
        world.hold = asyncio.Event() if number % 3 else None
        world.ends = [AbortReason.LATE_SWITCHOVER_ACK, None] if number % 2 else [None]
        driving = asyncio.create_task(drive(world, name))
        await asyncio.sleep(0.003 * (number // 2))
        if number == 9:
            await driving
        asked = asyncio.create_task(api.call(client.cancel_migration, name))
        if number % 3 == 1:
            await asyncio.wait({asked})
        if world.hold is not None:
            world.hold.set()
        try:
            await asked
            answer = "CANCELLED"
        except DroverError as error:
            answer = error.reason
        await driving
        assert all(name not in world.reserved(host) for host in ("h1", "h2", "h3"))
        phase = world.state(name).phase
        seen.add(answer)
        if answer == "CANCELLED":
            assert (phase, world.record(web).owner) == (P.CANCELLED, owner)
        else:
            assert (answer, phase) == (R.ALREADY_COMMITTED, P.SUCCEEDED)
    assert seen == {"CANCELLED", R.ALREADY_COMMITTED}


# --- evacuations ------------------------------------------------------------------------------------------------------


async def evacuate(api: ApiCluster, world: World, job: str) -> None:
    """The coordinator's work on a job and its migrations."""
    runner = EvacuationRunner(world.store, Index(world.store), EPOCH, asyncio.Event(), api.server.tools.agents)
    worker = Worker(world.store, world)
    async with asyncio.timeout(15):
        while not await runner.turn(job):
            names = [guest.migration for guest in world.job(job).guests if guest.migration]
            await asyncio.gather(*(worker.drive(name, EPOCH) for name in names))


async def test_an_evacuation_driven_to_its_end(api: ApiCluster, client: OrchestratorClient, world: World) -> None:
    await api.call(client.create_guest, GuestSpec("db", memory_mib=200, policy=QUICK), "h1")
    answer = await api.call(client.create_evacuation, "h1", 2, {"max_attempts": 9})
    job = answer.evacuation.name
    assert [(each.guest, each.memory_mib, each.destination) for each in answer.verdicts] == [
        ("db", 200, "h2"),
        ("web", 64, "h3"),
    ]
    host = await api.call(client.get_host, "h1")
    assert (host.cordoned, host.cordon_reason) == (True, f"evacuation {job}")
    await evacuate(api, world, job)
    done = await api.call(client.get_evacuation, job)
    assert (wire.word(done, "phase"), done.safe_to_power_off) == ("SUCCEEDED", True)
    assert sorted((each.guest, wire.word(each, "phase")) for each in done.guests) == [
        ("db", "SUCCEEDED"),
        ("web", "SUCCEEDED"),
    ]
    for each in done.guests:
        policy = wire.policy_from_proto((await api.call(client.get_migration, each.migration)).policy)
        assert policy == replace(QUICK, max_attempts=9), "only what was asked for differs from the guest's own"
    assert [each.name for each in await api.call(client.list_evacuations)] == [job]
    await api.call(client.uncordon_host, "h1")
    assert not (await api.call(client.get_evacuation, job)).safe_to_power_off


async def test_validate_only_says_who_can_move_and_who_cannot(
    api: ApiCluster, client: OrchestratorClient, world: World, web: str
) -> None:
    for name, memory_mib in (("large", 700), ("huge", 180)):
        await api.call(client.create_guest, GuestSpec(name, memory_mib=memory_mib), "h1")
    for host in ("h2", "h3"):
        await api.call(client.create_guest, GuestSpec(f"on-{host}", memory_mib=800), host)
    moving = (await api.call(client.create_migration, "web")).name
    at(world, web, moving, "bound")
    writes = len(world.store.writes)
    answer = await api.call(client.create_evacuation, "h1", validate_only=True)
    assert (answer.evacuation.name, answer.evacuation.max_concurrent) == ("", 4)
    verdicts = {each.guest: each for each in answer.verdicts}
    assert list(verdicts) == ["large", "huge", "web"]
    assert verdicts["large"].reason == R.NO_CAPACITY
    assert "h2 has 224 MiB free" in verdicts["large"].message
    assert (verdicts["huge"].destination, verdicts["huge"].reason) == ("h2", "")
    assert (verdicts["web"].destination, verdicts["web"].message) == ("h2", f"in migration {moving} already")
    assert len(world.store.writes) == writes


async def test_a_repeated_request_is_the_same_evacuation(
    api: ApiCluster, client: OrchestratorClient, world: World
) -> None:
    made = await asyncio.gather(*(api.call(client.create_evacuation, "h1", request_id="r1") for _ in range(5)))
    assert len({answer.evacuation.name for answer in made}) == 1
    assert len(await api.call(client.list_evacuations)) == 1
    error = await api.refused(client.create_evacuation, "h1", 3, request_id="r1")
    assert error.reason is R.REQUEST_ID_REUSED
    error = await api.refused(client.create_evacuation, "h1")
    assert (error.reason, error.details) == (R.ALREADY_EXISTS, {"evacuation": made[0].evacuation.name})
    await evacuate(api, world, made[0].evacuation.name)
    assert (await api.call(client.create_evacuation, "h1", request_id="r1")).evacuation.safe_to_power_off
    assert (await api.call(client.create_evacuation, "h1")).evacuation.name != made[0].evacuation.name


async def test_an_evacuation_leaves_a_cordon_of_the_operator_as_it_is(
    api: ApiCluster, client: OrchestratorClient
) -> None:
    await api.call(client.cordon_host, "h1", "disk is failing")
    await api.call(client.create_evacuation, "h1")
    assert (await api.call(client.get_host, "h1")).cordon_reason == "disk is failing"


@pytest.mark.parametrize("validate_only", [False, True])
@pytest.mark.parametrize(
    ("host", "max_concurrent", "policy", "reason", "field"),
    [
        ("h7", 0, {}, R.NOT_FOUND, "host"),
        ("h/1", 0, {}, R.INVALID_ARGUMENT, "host"),
        ("h1", 1001, {}, R.INVALID_ARGUMENT, "max_concurrent"),
        ("h1", 0, {"max_attempts": 101}, R.INVALID_ARGUMENT, "policy.max_attempts"),
        ("h1", 0, {"backoff_max_ms": 0}, R.INVALID_ARGUMENT, "policy.backoff_initial_ms"),
    ],
)
async def test_evacuations_that_cannot_be(
    api: ApiCluster,
    client: OrchestratorClient,
    host: str,
    max_concurrent: int,
    policy: dict[str, object],
    reason: RefusalReason,
    field: str,
    validate_only: bool,
) -> None:
    error = await api.refused(client.create_evacuation, host, max_concurrent, policy, validate_only=validate_only)
    assert (error.reason, error.field) == (reason, field)
    assert not any(each.cordoned for each in await api.call(client.list_hosts))


async def test_cancel_of_an_evacuation(api: ApiCluster, client: OrchestratorClient, world: World) -> None:
    job = (await api.call(client.create_evacuation, "h1")).evacuation.name
    world.store.fail_next = [True]
    assert (await api.call(client.cancel_evacuation, job)).cancel_requested
    assert (await api.call(client.cancel_evacuation, job)).cancel_requested
    await evacuate(api, world, job)
    ended = await api.call(client.cancel_evacuation, job)
    assert (wire.word(ended, "phase"), ended.safe_to_power_off) == ("CANCELLED", False)
    assert world.record(ended.guests[0].guest_uuid).owner.host == "h1"
    second = (await api.call(client.create_evacuation, "h1")).evacuation.name
    await evacuate(api, world, second)
    error = await api.refused(client.cancel_evacuation, second)
    assert (error.reason, error.details) == (R.ALREADY_ENDED, {"phase": EvacuationPhase.SUCCEEDED})


async def test_an_evacuation_shows_its_guests_progress(
    api: ApiCluster, client: OrchestratorClient, world: World, web: str
) -> None:
    job = (await api.call(client.create_evacuation, "h1")).evacuation.name
    runner = EvacuationRunner(world.store, Index(world.store), EPOCH, asyncio.Event(), api.server.tools.agents)
    await runner.turn(job)
    name = world.job(job).guests[0].migration
    at(world, web, name, "bound")
    await runner.turn(job)
    await api.hearing("h1")
    sample = AttemptStatus(AttemptRef(web, name, 1), P.PRECOPY, Progress(transferred_bytes=42))
    api.agents["h1"].say(AgentSample(attempts=(sample,)))
    await until(lambda: api.server.tools.fleet.attempt("h1", name, 1) is not None)
    (guest,) = (await api.call(client.get_evacuation, job)).guests
    assert (wire.word(guest, "phase"), guest.progress.transferred_bytes) == ("PRECOPY", 42)


async def test_a_watch_of_too_many_names_is_refused(api: ApiCluster, client: OrchestratorClient) -> None:
    error = await api.refused(lambda: next(client.watch_migrations(["m"] * 1001)))
    assert (error.reason, error.field) == (R.INVALID_ARGUMENT, "names")


def test_the_digest_of_a_request_is_of_its_content() -> None:
    first = pb.CreateMigrationRequest(request_id="a", guest="web")
    assert digest("M", first) == digest("M", pb.CreateMigrationRequest(request_id="b", guest="web"))
    assert digest("M", first) != digest("M", pb.CreateMigrationRequest(request_id="a", guest="db"))
    assert digest("M", first) != digest("N", first)
    assert first.request_id == "a"


def test_overrides_survive_the_ledger() -> None:
    spec = EvacuationSpec("j", "h", policy={"auto_converge": True, "max_attempts": 1, "on_timeout": "suspend"})
    assert decode(EvacuationSpec, encode(spec)) == spec
    assert decode(EvacuationSpec, encode(spec)).policy["auto_converge"] is True
    message = wire.policy_patch(spec.policy)
    assert message is not None
    assert wire.policy_from_proto(message).on_timeout is OnTimeout.SUSPEND


# --- what only the guest's host knows ---------------------------------------------------------------------------------

NVME = (R.DEVICE_NOT_MIGRATABLE, "State blocked by non-migratable device '0000:00:05.0/nvme'")


async def test_what_only_its_host_knows_is_said_before_anything_is_written(
    api: ApiCluster, client: OrchestratorClient, world: World, web: str
) -> None:
    api.agents["h1"].obstacles[web] = (NVME, (R.BLOCK_JOB_RUNNING, "job backup works on a disk"))
    writes = len(world.store.writes)
    found = await api.call(client.check_placement, "web")
    assert found.destination, "where it could go is one thing, and whether it can leave another"
    assert [each.reason for each in found.obstacles] == ["DEVICE_NOT_MIGRATABLE", "BLOCK_JOB_RUNNING"]

    error = await api.refused(client.create_migration, "web", validate_only=True)
    assert error.reason is R.DEVICE_NOT_MIGRATABLE
    assert "nvme" in error.message
    assert "job backup" in error.message

    answer = await api.call(client.create_evacuation, "h1", validate_only=True)
    assert [(each.guest, each.reason, each.destination) for each in answer.verdicts] == [
        ("web", "DEVICE_NOT_MIGRATABLE", "")
    ]
    assert len(world.store.writes) == writes

    api.agents["h1"].obstacles.clear()
    assert (await api.call(client.create_migration, "web", validate_only=True)).destination


@pytest.mark.parametrize("silent", ["down", "old", "slow"])
async def test_an_agent_that_says_nothing_proves_nothing(
    api: ApiCluster, client: OrchestratorClient, web: str, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told that something was not checked, and nobody is refused for it."""
    agent = api.agents["h1"]
    if silent == "down":
        await agent.stop()
    elif silent == "old":
        agent.refusals["CheckGuests"] = DroverError(R.INTERNAL, "there is no such call")
    else:
        monkeypatch.setattr(checks, "CHECK_S", 0.1)
        agent.delays_s["CheckGuests"] = 5.0
    (told,) = (await api.call(client.check_placement, "web")).obstacles
    assert told.reason in ("AGENT_UNREACHABLE", "OUTCOME_UNKNOWN")
    assert not certain((R(told.reason), told.message))
    assert (await api.call(client.create_migration, "web", validate_only=True)).destination
    (verdict,) = (await api.call(client.create_evacuation, "h1", validate_only=True)).verdicts
    assert verdict.destination
