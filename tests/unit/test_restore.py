"""An import of a backup into an empty ledger: what is written, in which order, and what stands against it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest

from orchestrator.core.errors import DroverError, FailureReason, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import (
    Certificate,
    DeathPhase,
    EvacuationPhase,
    EvacuationSpec,
    EvacuationState,
    GuestSpec,
    HostDeath,
    HostRecord,
    Incarnation,
    Leader,
    MigrationPhase,
    MigrationSpec,
    MigrationState,
    RequestRecord,
    Reservation,
    WantRun,
)
from orchestrator.core.restore import Fate, Held, HeldGuestCopy, HostHeld
from orchestrator.ledger import backup, paths
from orchestrator.ledger.backup import Backup
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.records import decode
from orchestrator.restore.importing import Import
from orchestrator.rpc.agent_client import AgentClients
from tests.fakes.coordination import MemoryStore, World

WEB, DB, NEW = (f"0f0e0d0c-0b0a-4987-8654-32100000000{number}" for number in range(3))
H1, H2 = HostRef("host-1", "boot-host-1"), HostRef("host-2", "boot-host-2")


def guest(world: World, uuid: str, record: GuestRecord, *, run: bool = True) -> None:
    world.put(paths.name(record.name), uuid)
    world.put(paths.guest(uuid), record)
    world.put(paths.guest_spec(uuid), GuestSpec(record.name))
    world.put(paths.want_run(uuid), WantRun(run, "ops", 3))
    world.put(paths.host_guest(record.owner.host, uuid), "")


async def old_ledger() -> World:
    """Two guests on host-1, one of them about to move, a job and a death under way."""
    world = World(MemoryStore())
    await Ledger(world.store).init_tree()
    world.host("host-1")
    world.host("host-2")
    guest(world, WEB, GuestRecord("web", Ownership.IDLE, H1, inc="i1"))
    guest(world, DB, GuestRecord("db", Ownership.OPEN, H1, "m1", 1, H2, "i9"))
    world.put(paths.migration("m1"), MigrationSpec("m1", DB, "db"))
    world.put(paths.migration_state("m1"), MigrationState(MigrationPhase.PRECOPY, 1))
    world.put(paths.active_migration("m1"), DB)
    world.put(paths.reservation("host-2", "m1"), Reservation(64))
    world.put(paths.evacuation("e1"), EvacuationSpec("e1", "host-1"))
    world.put(paths.evacuation_state("e1"), EvacuationState(EvacuationPhase.RUNNING, safe_to_power_off=True, safe_at=0))
    world.put(paths.active_evacuation("e1"), "host-1")
    world.put(paths.request_id("r1"), RequestRecord("migrations/m1", "d"))
    world.put(paths.death("host-2"), HostDeath("host-2", "boot-host-2", DeathPhase.FENCING))
    world.put(paths.INCARNATION, Incarnation("old"))
    world.put(paths.epoch(), Leader("coordinator", "x"))
    node = world.store.tree.nodes[paths.epoch()]
    world.store.tree.nodes[paths.epoch()] = replace(node, version=7)
    return world


async def exported() -> Backup:
    return backup.parse(backup.lines(await backup.take((await old_ledger()).store, time_s=1.0)))


class Agents:
    """What hosts say; each believes the ledger that is announced to it."""

    def __init__(self, store: MemoryStore, *hosts: HostHeld, silent: Sequence[str] = ()) -> None:
        self.store = store
        self.hosts = {f"{host.host.host}:1": host for host in hosts}
        self.silent = {f"{name}:1" for name in silent}
        self.restored: list[tuple[str, str]] = []

    def at(self, address: str, host: str = "") -> _At:
        return _At(self, address)


class _At:
    def __init__(self, agents: Agents, address: str) -> None:
        self.agents, self.address = agents, address

    async def list_copies(self, timeout_s: float = 1.0) -> HostHeld:
        if self.address in self.agents.silent:
            raise DroverError(RefusalReason.AGENT_UNREACHABLE, "no answer")
        held = self.agents.hosts[self.address]
        node = await self.agents.store.read(paths.INCARNATION)
        named = decode(Incarnation, node.data) if node else None
        follows = named is not None and held.incarnation in named.follows and held.host.host in named.hosts
        return replace(held, incarnation=named.id) if named is not None and follows else held

    async def restore_record(self, guest: str) -> None:
        self.agents.restored.append((self.address, guest))


def copy(uuid: str, name: str, host: HostRef, inc: str, **state: bool) -> HeldGuestCopy:
    return HeldGuestCopy(uuid, name, Held(host, inc, **state))


def host(ref: HostRef, *copies: HeldGuestCopy, epoch: int = 0, complete: bool = True) -> HostHeld:
    return HostHeld(ref, complete, "old", {0: epoch}, copies)


async def run_of(store: MemoryStore, agents: Agents, held: Backup, dead: Sequence[str] = ()) -> Import:
    await Ledger(store).init_tree()
    for name in {held.host.host for held in agents.hosts.values()}:
        if paths.host(name) not in store.tree.nodes:
            World(store).host(name)
    return Import(store, cast(AgentClients, agents), held, dead=dead, time_s=2.0)


def read(store: MemoryStore, kind: type, path: str) -> object:
    return decode(kind, store.tree.nodes[path].data, path=path)


MOVED = (
    host(H1, copy(DB, "db", H1, "i8", running=True), epoch=30),
    host(H2, copy(WEB, "web", H2, "i2", running=True), copy(NEW, "new", H2, "i3", running=True), epoch=12),
)
"""web has moved since the backup, db has not after all, new was made since."""


async def test_every_guest_is_where_it_runs_and_nothing_of_the_lost_ledger_goes_on() -> None:
    store = MemoryStore()
    agents = Agents(store, *MOVED)
    run = await run_of(store, agents, await exported())
    outcome = await run.look()
    assert paths.GUESTS not in {path.rpartition("/")[0] for path in store.tree.nodes}, "a look changes nothing"
    await run.carry_out(outcome, outcome.token)
    assert outcome.left == []

    for uuid, where, inc in ((WEB, H2, "i2"), (DB, H1, "i8")):
        record = cast(GuestRecord, read(store, GuestRecord, paths.guest(uuid)))
        assert (record.phase, record.owner, record.inc, record.migration) == (Ownership.IDLE, where, inc, "")
        assert paths.host_guest(where.host, uuid) in store.tree.nodes
    assert paths.host_guest("host-1", WEB) not in store.tree.nodes
    assert agents.restored == [("host-2:1", NEW)]
    assert read(store, str, paths.name("new")) == NEW

    for name in ("host-1", "host-2"):
        assert cast(HostRecord, read(store, HostRecord, paths.host(name))).name == name, "as its agent registered it"
    state = cast(MigrationState, read(store, MigrationState, paths.migration_state("m1")))
    assert (state.phase, state.failure) == (MigrationPhase.FAILED, FailureReason.LEDGER_RESTORED)
    job = cast(EvacuationState, read(store, EvacuationState, paths.evacuation_state("e1")))
    assert (job.phase, job.safe_to_power_off, job.safe_at) == (EvacuationPhase.FAILED, False, -1)
    death = cast(HostDeath, read(store, HostDeath, paths.death("host-2")))
    assert death.phase is DeathPhase.FAILED, "nobody's power is cut for an order of another time"
    nodes = store.tree.nodes
    assert not store.tree.children(paths.ACTIVE_MIGRATIONS)
    assert store.tree.children(paths.ENDED_EVACUATIONS) == ("e1",)
    assert not store.tree.children(paths.reservations("host-2"))
    assert paths.request_id("r1") in nodes, "a request that was carried out is not carried out again"
    assert nodes[paths.epoch()].version > 30, "no agent has seen it"
    named = cast(Incarnation, read(store, Incarnation, paths.INCARNATION))
    assert named.follows == ("old",)
    assert named.hosts == ("host-1", "host-2")
    assert paths.RESTORE not in nodes


async def test_a_host_that_does_not_answer_stands_against_it_unless_its_power_is_off() -> None:
    store = MemoryStore()
    held = await exported()
    agents = Agents(store, MOVED[0], silent=["host-2"])
    with pytest.raises(DroverError, match="host-2: no answer") as refused:
        await (await run_of(store, agents, held)).look()
    assert refused.value.reason is RefusalReason.HOST_NOT_LIVE
    run = await run_of(store, agents, held, dead=["host-2"])
    outcome = await run.look()
    await run.carry_out(outcome, outcome.token)
    fates = {one.name: (one.fate, one.where) for one in outcome.plan.found}
    assert fates == {"web": (Fate.CRASHED, "host-1"), "db": (Fate.OWNED, "host-1")}
    assert isinstance(read(store, Certificate, paths.fence("host-2", "boot-host-2")), Certificate)


async def test_what_is_not_known_gets_no_record_and_its_name_stays_taken() -> None:
    store = MemoryStore()
    between = host(H1, copy(WEB, "web", H1, "i1", sealed=True)), host(H2, copy(WEB, "web", H2, "i2", incoming=True))
    run = await run_of(store, Agents(store, *between), await exported())
    outcome = await run.look()
    await run.carry_out(outcome, outcome.token)
    assert paths.guest(WEB) not in store.tree.nodes
    assert read(store, str, paths.name("web")) == WEB
    (left,) = outcome.left
    assert "handed over" in left
    assert "drover repair web" in left


async def test_it_goes_on_where_it_was_cut_off() -> None:
    store = MemoryStore()
    held = await exported()
    for cut in range(1, 12):
        run = await run_of(store, Agents(store, *MOVED), held)
        store.fail_next = [True] * cut
        outcome = await run.look()
        try:
            await run.carry_out(outcome, outcome.token)
            break
        except DroverError as error:
            if error.reason is not RefusalReason.LEDGER_UNREACHABLE:
                raise
            store.fail_next = []
            store.expire()
    store.fail_next = []
    assert paths.INCARNATION in store.tree.nodes
    assert cast(GuestRecord, read(store, GuestRecord, paths.guest(WEB))).owner == H2


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (paths.name("web"), "not empty"),
        (paths.seat("coordinator"), "coordinator runs"),
        (paths.leader(), "coordinator runs"),
        (paths.RESTORE, "another backup"),
    ],
)
async def test_it_is_refused_where_something_is_or_leads(harm: str, said: str) -> None:
    store = MemoryStore()
    run = await run_of(store, Agents(store, *MOVED), await exported())
    World(store).put(harm, Leader("coordinator", "x"))
    before = dict(store.tree.nodes)
    with pytest.raises(DroverError, match=said) as refused:
        await run.look()
    assert refused.value.reason is RefusalReason.INVALID_ARGUMENT
    assert dict(store.tree.nodes) == before


async def test_what_was_confirmed_must_still_be_so() -> None:
    store = MemoryStore()
    agents = Agents(store, *MOVED)
    run = await run_of(store, agents, await exported())
    outcome = await run.look()
    agents.hosts["host-1:1"] = host(H1)
    again = await run.look()
    with pytest.raises(DroverError) as refused:
        await run.carry_out(again, outcome.token)
    assert refused.value.reason is RefusalReason.CONFIRMATION_STALE
    assert paths.guest(WEB) not in store.tree.nodes


async def test_no_coordinator_leads_meanwhile() -> None:
    store = MemoryStore()
    run = await run_of(store, Agents(store, *MOVED), await exported())
    outcome = await run.look()
    seen: list[bool] = []
    put = run._put

    async def watched(nodes: dict[str, bytes]) -> None:
        if paths.RESTORE not in nodes:
            seen.append(paths.leader() in store.tree.nodes)
        await put(nodes)

    run._put = watched  # pyright: ignore[reportAttributeAccessIssue]
    await run.carry_out(outcome, outcome.token)
    assert seen == [True]
    store.expire()
    assert paths.leader() not in store.tree.nodes
    await asyncio.sleep(0)
