"""What `drover repair` finds and offers: decided purely, and carried out through the real API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import wire
from orchestrator.core import handover
from orchestrator.core.agent import AgentSample, AgentStatus, CopyStatus, GuestStatus, GuestTrouble, RunState, Trouble
from orchestrator.core.errors import AbortReason, DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import GuestSpec, MigrationPhase, MigrationState
from orchestrator.core.repair import Action, HostSeen, Known, Lost, examine, examine_lost, named
from orchestrator.ledger import paths
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Create, Delete, Done, Op, SetData
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.api import ApiCluster, api_cluster
from tests.fakes.coordination import MemoryStore

R = RefusalReason
H1, H2 = HostRef("h1", "boot-h1"), HostRef("h2", "boot-h2")
IDLE = GuestRecord("g", Ownership.IDLE, H1)
STARTING = replace(IDLE, phase=Ownership.STARTING)
OPEN = handover.open_attempt(IDLE, "m", 1, H2, epoch=1, writer="w")
BOUND = handover.bind(OPEN, "m", 1, "i", writer="w")
COMMITTED = handover.commit(BOUND, "m", 1, "i", writer="w")
ABORTED = handover.abort(BOUND, "m", 1, AbortReason.LATE_SWITCHOVER_ACK, writer="w")
DONE = handover.done(COMMITTED, "m", 1, "i", writer="w")
CRASHED = handover.crashed(IDLE, writer="w")
COPY = CopyStatus("u", "g", "i", 64, 4711)
NOTHING = HostSeen("h1", answered=True, complete=True)
RUNS = replace(NOTHING, copies=(COPY,), run_state=RunState.RUNNING)
SILENT = HostSeen("h1", answered=False)
OVER = MigrationState(MigrationPhase.FAILED)
UNDER_WAY = MigrationState(MigrationPhase.PRECOPY)


def known(
    record: GuestRecord, *hosts: HostSeen, migration: MigrationState | None = None, certified: bool = False
) -> Known:
    return Known(record, GuestSpec("g"), True, migration, {host.host: host for host in hosts}, certified)


@pytest.mark.parametrize(
    ("what", "offers", "otherwise"),
    [
        (known(IDLE, RUNS), [], "nothing is wrong"),
        (known(IDLE, SILENT), [], "only h1 knows whether it runs, and h1 is silent"),
        (known(IDLE, replace(RUNS, run_state=RunState.STOPPED)), [Action.RESUME], ""),
        (known(IDLE, replace(RUNS, trouble="its note cannot be read")), [Action.RESUME], ""),
        (known(IDLE, replace(RUNS, run_state=RunState.ENDED)), [], "shut down by itself"),
        (known(STARTING, NOTHING), [Action.BURY], ""),
        (known(replace(STARTING, starts=1), NOTHING), [], "finishes the start or ends it itself"),
        (known(STARTING, SILENT), [], "is silent"),
        (known(STARTING, replace(NOTHING, complete=False)), [], "at work on it"),
        (known(STARTING, replace(NOTHING, run_state=RunState.STARTING)), [], "at work on it"),
        (known(STARTING, replace(NOTHING, copies=(COPY,))), [], "at work on it"),
        (known(STARTING, NOTHING, certified=True), [], "at work on it"),
        (known(OPEN, RUNS, migration=OVER), [Action.ABORT], ""),
        (known(BOUND, RUNS), [Action.ABORT], ""),
        (known(BOUND, RUNS, migration=UNDER_WAY), [], "is under way"),
        (known(ABORTED, RUNS, migration=OVER), [Action.CLOSE], ""),
        (known(ABORTED, RUNS, migration=UNDER_WAY), [], "is under way"),
        (known(COMMITTED, RUNS, replace(RUNS, host="h2"), migration=OVER), [], "whose agent finishes it"),
        (known(DONE, RUNS, replace(RUNS, host="h2")), [Action.DISCARD], ""),
        (known(CRASHED, RUNS), [Action.DISCARD], ""),
        (known(CRASHED, SILENT), [], "`drover guest stop g` frees its name"),
        (known(handover.gone(IDLE, writer="w"), NOTHING), [], "its life is over"),
    ],
)
def test_only_what_is_safe_is_offered(what: Known, offers: list[Action], otherwise: str) -> None:
    found = examine(what)
    assert [offer.action for offer in found.offers] == offers
    assert otherwise in found.otherwise
    assert bool(found.otherwise) is not bool(offers)


HOLDS = HostSeen("h1", answered=True, copies=(COPY,), trouble="its record is lost", no_record=True)
EMPTY = HostSeen("h2", answered=True, complete=True)


@pytest.mark.parametrize(
    ("hosts", "otherwise"),
    [
        ((HOLDS, EMPTY), ""),
        ((HOLDS,), ""),
        ((replace(HOLDS, copies=(replace(COPY, pid=0),)), EMPTY), ""),  # it has shut down: its agent vouches for that
        ((HOLDS, replace(EMPTY, copies=(replace(COPY, pid=0),))), ""),  # what is left of a copy runs nowhere
        ((HOLDS, replace(EMPTY, copies=(COPY,))), "h1, h2 have processes"),
        ((HOLDS, replace(EMPTY, copies=(replace(COPY, pid=0, devices_pid=7),))), "h1, h2 have processes"),
        ((HOLDS, replace(EMPTY, copies=(replace(COPY, incoming=True),))), "h1, h2 have processes"),
        ((HOLDS, replace(HOLDS, host="h2")), "h1, h2 have processes"),
        ((HOLDS, replace(EMPTY, complete=False)), "it may run on h2"),
        ((HOLDS, HostSeen("h2", answered=False)), "it may run on h2"),
        ((replace(HOLDS, no_record=False, complete=True), EMPTY), "no agent has it and says"),
        ((replace(HOLDS, copies=(), complete=True), EMPTY), "no agent has it and says"),
        ((replace(HOLDS, copies=(replace(COPY, incoming=True),), complete=True), EMPTY), "no agent has it and says"),
    ],
)
def test_a_lost_record_is_written_again_only_where_nothing_can_run_elsewhere(
    hosts: tuple[HostSeen, ...], otherwise: str
) -> None:
    found = examine_lost(Lost("u", "g", hosts))
    assert [(offer.action, offer.host) for offer in found.offers] == (
        [] if otherwise else [(Action.RESTORE_RECORD, "h1")]
    )
    assert otherwise in found.otherwise
    assert bool(found.otherwise) is not bool(found.offers)


def test_a_lost_record_is_not_written_under_a_name_that_is_taken() -> None:
    found = examine_lost(Lost("u", "g", (HOLDS, EMPTY), name_taken=True))
    assert (found.offers, "another guest is called g" in found.otherwise) == ((), True)


def test_guests_are_found_by_name_or_uuid_and_lost_ones_first() -> None:
    lost = GuestTrouble("u2", "g", Trouble.NO_RECORD, "lost")
    status = AgentStatus(H1, 0, copies=(COPY, replace(COPY, guest="u2")), troubles=(lost,))
    assert named("g", [status]) == {"u2": "g"}
    assert named("u", [status]) == {"u": "g"}
    assert named("g", [replace(status, troubles=())]) == {"u": "g", "u2": "g"}
    assert named("other", [status]) == {}


def test_it_says_in_plain_words_what_is_where() -> None:
    other = HostSeen("h2", answered=True, copies=(replace(COPY, incoming=True),))
    said = examine(known(BOUND, RUNS, other, migration=UNDER_WAY)).findings
    assert said == (
        "the ledger says OPEN, owner h1 in power cycle boot-h1",
        "it is in attempt 1 of migration m towards h2; that migration is PRECOPY",
        "h1 has a copy (VMM 4711), RUNNING",
        "h2 has a copy that waits for an attempt (VMM 4711)",
        "the operator wants it to run",
    )


# --- through the API --------------------------------------------------------------------------------------------------


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
async def api(store: MemoryStore, tmp_path: Path) -> AsyncIterator[ApiCluster]:
    async with api_cluster(store, tmp_path) as cluster:
        yield cluster


@pytest.fixture
def client(api: ApiCluster) -> OrchestratorClient:
    return api.client


async def put(store: MemoryStore, record: GuestRecord) -> None:
    ops: list[Op] = [
        Create(paths.name("g"), encode("u1")),
        Create(paths.guest("u1"), encode(record)),
        Create(paths.guest_spec("u1"), encode(GuestSpec("g"))),
    ]
    await store.ensure(paths.shard(paths.guest("u1")))
    assert isinstance(await store.multi(ops), Done)


def now(store: MemoryStore) -> GuestRecord:
    return decode(GuestRecord, store.tree.nodes[paths.guest("u1")].data)


async def test_a_guest_that_never_started_is_buried(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    await put(store, STARTING)
    looked = await api.call(client.repair_guest, "g")
    assert [offer.action for offer in looked.offers] == ["bury"]
    assert now(store) == STARTING, "a look changes nothing"
    done = await api.call(client.repair_guest, "g", "bury")
    assert (now(store).phase, now(store).never_ran) == (Ownership.GONE, True)
    assert paths.name("g") not in store.tree.nodes
    assert done.otherwise == "its life is over; its name is free"


async def test_a_guest_whose_specification_is_lost_is_explained_and_what_is_safe_is_offered(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    await put(store, STARTING)
    spec = store.tree.nodes[paths.guest_spec("u1")]
    assert isinstance(await store.multi([Delete(paths.guest_spec("u1"), spec.version)]), Done)
    for name in ("g", "u1"):
        looked = await api.call(client.repair_guest, name)
        assert (looked.guest, looked.guest_uuid) == ("g", "u1")
        assert any("lost its specification" in said for said in looked.findings)
        assert any("STARTING, owner" in said for said in looked.findings)
        assert [offer.action for offer in looked.offers] == ["bury"]
    done = await api.call(client.repair_guest, "g", "bury")
    assert now(store).phase is Ownership.GONE
    assert done.otherwise == "its life is over; its name is free"


async def test_an_attempt_that_nobody_conducts_is_ended_and_closed(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    await put(store, BOUND)
    looked = await api.call(client.repair_guest, "g", "abort")
    assert [offer.action for offer in looked.offers] == ["close"]
    await api.call(client.repair_guest, "g", "close")
    assert (now(store).phase, now(store).owner) == (Ownership.IDLE, H1)


async def test_an_agent_is_asked_to_look_and_nothing_is_written(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    await put(store, IDLE)
    api.agents["h1"].sample = AgentSample((GuestStatus("u1", "g", "i", RunState.STOPPED, 4711),))
    writes = len(store.writes)
    assert [offer.action for offer in (await api.call(client.repair_guest, "g")).offers] == ["resume"]
    await api.call(client.repair_guest, "g", "resume")
    assert ("Nudge", "u1") in api.agents["h1"].calls
    assert len(store.writes) == writes


async def test_what_is_not_offered_is_refused(api: ApiCluster, client: OrchestratorClient, store: MemoryStore) -> None:
    await put(store, IDLE)
    api.agents["h1"].sample = AgentSample((GuestStatus("u1", "g", "i", RunState.RUNNING, 4711),))
    for action in ("bury", "abort", "close", "discard", "resume", "rubbish"):
        error = await api.refused(client.repair_guest, "g", action)
        assert (error.reason, "nothing is wrong with it" in error.message) == (R.NOTHING_SAFE, True)
    await api.agents["h1"].stop()
    looked = await api.call(client.repair_guest, "g")
    assert "h1 is silent" in looked.otherwise
    assert now(store) == IDLE
    assert (await api.refused(client.repair_guest, "none")).reason is R.NOT_FOUND
    assert wire.to_json(looked)["guest"] == "g"


def lose(api: ApiCluster, *uuids: str) -> None:
    agent = api.agents["h1"]
    agent.lost = {uuid: GuestSpec("g") for uuid in uuids}
    agent.copies = [replace(COPY, guest=uuid) for uuid in uuids]
    agent.troubles = [GuestTrouble(uuid, "g", Trouble.NO_RECORD, "its record is lost") for uuid in uuids]


async def test_the_agent_has_the_last_word_about_a_lost_record(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    lose(api, "u1")
    api.agents["h1"].refusals["RestoreRecord"] = DroverError(R.GUEST_IS_MIGRATING, "guest g: it was given to h2")
    error = await api.refused(client.repair_guest, "g", "restore-record")
    assert (error.reason, error.message) == (R.GUEST_IS_MIGRATING, "guest g: it was given to h2")
    assert paths.guest("u1") not in store.tree.nodes
    del api.agents["h1"].refusals["RestoreRecord"]
    await api.call(client.repair_guest, "g", "restore-record")
    assert (now(store).phase, now(store).owner) == (Ownership.IDLE, H1)


async def test_a_lost_guest_is_looked_for_on_live_hosts_within_a_bound(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    lose(api, "u1")
    api.agents["h2"].delays_s["GetAgent"] = 60
    looked = await api.call(client.repair_guest, "g")
    assert (list(looked.offers), "it may run on h2" in looked.otherwise) == ([], True)
    assert "silent, so that what they have of it is not known: h2" in looked.findings
    error = await api.refused(client.repair_guest, "other")
    assert (error.reason, "h2 did not say what is there" in error.message) == (R.NOT_FOUND, True)


async def test_several_lost_guests_of_one_name_are_told_apart_by_uuid(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    lose(api, "u1", "u2")
    error = await api.refused(client.repair_guest, "g")
    assert (error.reason, error.field, "u1, u2" in error.message) == (R.INVALID_ARGUMENT, "name", True)
    await put(store, IDLE)
    looked = await api.call(client.repair_guest, "u2")
    assert (list(looked.offers), "another guest is called g" in looked.otherwise) == ([], True)


async def test_a_host_whose_record_cannot_be_read_may_have_the_guest(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    lose(api, "u1")
    node = store.tree.nodes[paths.host("h2")]
    store._apply([SetData(paths.host("h2"), b"rubbish", node.version)])
    looked = await api.call(client.repair_guest, "g")
    assert (list(looked.offers), "it may run on h2" in looked.otherwise) == ([], True)


async def test_a_guest_that_moves_meanwhile_is_left_alone(
    api: ApiCluster, client: OrchestratorClient, store: MemoryStore
) -> None:
    await put(store, STARTING)
    real = api.server.tools.store.multi

    async def multi(ops, timeout_s: float = 2.0):
        node = store.tree.nodes[paths.guest("u1")]
        store._apply([SetData(paths.guest("u1"), encode(IDLE), node.version)])
        return await real(ops, timeout_s)

    store.multi = multi
    error = await api.refused(client.repair_guest, "g", "bury")
    assert error.reason is R.OUTCOME_UNKNOWN
    assert now(store) == IDLE
