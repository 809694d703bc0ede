"""What a certificate makes of guests, and how a declaration proceeds: over a ledger in memory, also with crashes of the
coordinator between any two writes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.coordinator.deaths import DeathRunner
from orchestrator.coordinator.driver import Deposed
from orchestrator.core import death, handover
from orchestrator.core.death import Fate, Restart, restart_step
from orchestrator.core.errors import AbortReason, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership, Refused
from orchestrator.core.ids import HostRef
from orchestrator.core.records import (
    Certificate,
    DeathPhase,
    DeviceSpec,
    FencerEntry,
    FencerTable,
    GuestSpec,
    HostDeath,
    OnHostDeath,
    Proof,
    ShimKind,
    WantRun,
)
from orchestrator.fencing.base import Fenced, Fencers, Power
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.records import decode
from orchestrator.ledger.store import Versioned
from tests.fakes.coordination import World

EPOCH = 3
R = RefusalReason
H1 = HostRef("h1", "boot-h1")
H2 = HostRef("h2", "boot-h2")
HERE = GuestRecord("g", Ownership.IDLE, H1)
OPEN = handover.open_attempt(HERE, "m", 1, H2, epoch=1, writer="w")
BOUND = handover.bind(OPEN, "m", 1, "i", writer="w")
COMMITTED = handover.commit(BOUND, "m", 1, "i", writer="w")
ABORTED = handover.abort(BOUND, "m", 1, AbortReason.CANCELLED, writer="w")
RESTART = GuestSpec("g", on_host_death=OnHostDeath.RESTART)


class Switch:
    """A fencer on command."""

    def __init__(self, answer: Fenced | None = None) -> None:
        self.answer = answer or Fenced(Power.OFF, "off")
        self.asked: list[str] = []
        self.hold: asyncio.Event | None = None

    async def power_off(self, host: str) -> Fenced:
        self.asked.append(host)
        if self.hold is not None:
            await self.hold.wait()
        return self.answer


@pytest.fixture
def world() -> World:
    world = World()
    for host in ("h1", "h2", "h3"):
        world.host(host)
    for root in paths.ROOTS:
        world.store.tree.nodes[root] = Versioned(b"", 0, 0)
    world.store.tree.nodes[paths.epoch()] = Versioned(b"", EPOCH, 0)
    return world


def fencers(switch: Switch, *hosts: str) -> Fencers:
    return Fencers(((FencerEntry("ipmi", "exec", hosts or ("h*",)), switch),))


def guest(world: World, uuid: str, host: str = "h1", **spec: object) -> None:
    world.guest(uuid, host)
    known = GuestSpec(f"n-{uuid}", **spec)  # pyright: ignore[reportArgumentType]
    world.put(paths.guest_spec(uuid), known)
    world.put(paths.name(f"n-{uuid}"), uuid)
    world.put(paths.want_run(uuid), WantRun())


def goes_dark(world: World, host: str) -> None:
    world.store.tree.nodes.pop(paths.live(host))
    world.silent.add(host)


def declare(world: World, host: str = "h1", **values: object) -> None:
    path = paths.death(host)
    version = world.store.tree.nodes[path].version + 1 if path in world.store.tree.nodes else 0
    declared = HostDeath(host, f"boot-{host}", requested_by="ann", **values)  # pyright: ignore[reportArgumentType]
    world.put(path, declared)
    world.store.tree.nodes[path] = replace(world.store.tree.nodes[path], version=version)


def declaration(world: World, host: str = "h1") -> HostDeath:
    return decode(HostDeath, world.store.tree.nodes[paths.death(host)].data)


def certificate(world: World, host: str = "h1") -> Certificate | None:
    node = world.store.tree.nodes.get(paths.fence(host, f"boot-{host}"))
    return decode(Certificate, node.data) if node else None


def certify(world: World, host: str = "h1", boot_id: str = "") -> None:
    world.store.tree.nodes[paths.fences(host)] = Versioned(b"", 0, 0)
    world.store.tree.nodes[paths.fence(host, boot_id or f"boot-{host}")] = Versioned(b"", 0, 0)


def runner(world: World, switch: Switch | None = None) -> DeathRunner:
    known = fencers(switch) if switch else Fencers()
    return DeathRunner(world.store, world, Index(world.store), EPOCH, known, wall_s=lambda: 1.0)


@contextlib.asynccontextmanager
async def running(world: World, switch: Switch | None = None) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(runner(world, switch).run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def over(world: World, host: str = "h1") -> Callable[[], bool]:
    return lambda: declaration(world, host).phase.terminal


def lives(world: World, name: str) -> list[GuestRecord]:
    """Of all lives under a name, those that may run."""
    found = [
        decode(GuestRecord, node.data)
        for path, node in world.store.tree.nodes.items()
        if path.startswith(paths.GUESTS + "/") and path.count("/") == 3
    ]
    live = (Ownership.STARTING, Ownership.IDLE, Ownership.OPEN, Ownership.COMMITTED, Ownership.ABORTED)
    return [record for record in found if record.name == name and record.phase in live]


# --- decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.rule("H11")
@pytest.mark.parametrize("record", [HERE, OPEN, BOUND, ABORTED, replace(HERE, phase=Ownership.STARTING)])
def test_only_a_certificate_of_that_power_cycle_ends_a_guest(record: GuestRecord) -> None:
    with pytest.raises(Refused, match="no certificate"):
        handover.host_died(record, certificate=False, writer="w")
    assert death.after_certificates(record, {HostRef("h1", "boot-before")}, writer="w") is None
    assert death.after_certificates(record, set(), writer="w") is None
    ended = death.after_certificates(record, {H1}, writer="w")
    assert ended is not None
    assert (ended.phase, ended.host_died, ended.owner) == (Ownership.CRASHED, True, H1)


def test_a_guest_that_was_committed_to_a_dead_host_is_not_given_back() -> None:
    ended = death.after_certificates(COMMITTED, {H2}, writer="w")
    assert ended is not None
    assert (ended.phase, ended.owner, ended.source) == (Ownership.CRASHED, H2, H1)
    assert death.after_certificates(COMMITTED, {H1}, writer="w") is None, "it belongs to the destination by now"


def test_an_attempt_towards_a_dead_host_is_aborted_and_the_guest_stays() -> None:
    for record in (OPEN, BOUND):
        aborted = death.after_certificates(record, {H2}, writer="w")
        assert aborted is not None
        assert (aborted.phase, aborted.owner, aborted.reason) == (Ownership.ABORTED, H1, AbortReason.DESTINATION_LOST)


@pytest.mark.parametrize(
    ("record", "spec", "expected"),
    [
        (HERE, GuestSpec("g"), Fate.LOST),
        (HERE, RESTART, Fate.RESTARTED),
        (HERE, replace(RESTART, devices=(DeviceSpec("nic", ShimKind.COMPANION),)), Fate.LOST),
        (HERE, replace(RESTART, devices=(DeviceSpec("eth", ShimKind.NET),)), Fate.RESTARTED),
        (replace(HERE, owner=H2), RESTART, None),
        (replace(HERE, phase=Ownership.CRASHED), RESTART, None),
        (COMMITTED, RESTART, None),
        (handover.open_attempt(replace(HERE, owner=H2), "m", 1, H1, epoch=1, writer="w"), RESTART, Fate.STAYS),
    ],
)
def test_what_becomes_of_a_guest(record: GuestRecord, spec: GuestSpec, expected: Fate | None) -> None:
    found = death.fate("u", record, spec, H1)
    assert (found.fate if found else None) is expected


def test_a_guest_that_crashed_by_itself_is_not_started_again() -> None:
    crashed = handover.crashed(HERE, writer="w")
    assert restart_step(crashed, RESTART, None, name_is_ours=True) is Restart.NOTHING
    with pytest.raises(Refused):
        handover.succeeded_by(crashed, "u2", writer="w")
    assert death.standing(crashed, RESTART) == "crashed on h1"


def test_the_course_of_a_restart() -> None:
    dead = handover.host_died(HERE, certificate=True, writer="w")
    assert restart_step(dead, RESTART, None, name_is_ours=True) is Restart.CREATE
    assert restart_step(dead, RESTART, None, name_is_ours=False) is Restart.CLOSE
    followed = handover.succeeded_by(dead, "u2", writer="w")
    born = handover.birth("g", H2, writer="w")
    assert restart_step(followed, RESTART, born, name_is_ours=True) is Restart.START
    refused = handover.gone(born, writer="w")
    assert restart_step(followed, RESTART, refused, name_is_ours=True) is Restart.CREATE
    tried = replace(followed, restarts=death.MAX_RESTARTS)
    assert restart_step(tried, RESTART, refused, name_is_ours=True) is Restart.NOTHING
    ran = handover.started(born, writer="w")
    stopped = handover.gone(ran, writer="w")
    for record in (ran, stopped):
        assert restart_step(followed, RESTART, record, name_is_ours=True) is Restart.CLOSE


def test_a_confirmation_is_of_exactly_what_was_seen() -> None:
    guests = [("u1", 3), ("u2", 1)]
    token = death.confirmation(H1, 4, guests, 1000)
    assert token == death.confirmation(H1, 4, reversed(guests), 1000)
    assert death.issued_at_s(token) == 1000
    others = {
        death.confirmation(H2, 4, guests, 1000),
        death.confirmation(HostRef("h1", "other"), 4, guests, 1000),
        death.confirmation(H1, 5, guests, 1000),
        death.confirmation(H1, 4, [("u1", 4), ("u2", 1)], 1000),
        death.confirmation(H1, 4, guests[:1], 1000),
        death.confirmation(H1, 4, guests, 1001),
    }
    assert len(others | {token}) == 7
    assert [death.issued_at_s(text) for text in ("", "no", "-1-2")] == [None, None, None]


def test_the_first_fencer_that_fits_serves_a_host() -> None:
    table = FencerTable((FencerEntry("rack", "redfish", ("rack1-*",)), FencerEntry("rest", "exec", ("*",))))
    assert [death.fencer_of(table, host) for host in ("rack1-7", "rack2-1")] == ["rack", "rest"]
    assert death.fencer_of(FencerTable(), "h1") == ""


# --- declarations -----------------------------------------------------------------------------------------------------


@pytest.mark.rule("H11")
async def test_a_fencer_that_confirms_ends_the_host_and_its_guests(world: World) -> None:
    guest(world, "g1")
    guest(world, "g2", "h2")
    goes_dark(world, "h1")
    declare(world)
    switch = Switch()
    async with running(world, switch):
        await until(over(world))
    done = declaration(world)
    assert (done.phase, done.crashed, done.fencer) == (DeathPhase.DONE, 1, "ipmi")
    assert switch.asked == ["h1"]
    known = certificate(world)
    assert known is not None
    assert (known.proof, known.by) == (Proof.FENCER, "ann, confirmed by ipmi")
    assert (world.record("g1").phase, world.record("g1").host_died) == (Ownership.CRASHED, True)
    assert world.record("g2").phase is Ownership.IDLE
    table = decode(FencerTable, world.store.tree.nodes[paths.FENCERS].data)
    assert [entry.name for entry in table.entries] == ["ipmi"]


@pytest.mark.rule("H11")
@pytest.mark.parametrize("power", [Power.NOT_OFF, Power.UNKNOWN])
async def test_a_fencer_that_does_not_confirm_changes_nothing(world: World, power: Power) -> None:
    guest(world, "g1")
    goes_dark(world, "h1")
    declare(world)
    async with running(world, Switch(Fenced(power, "the board is silent"))):
        await until(over(world))
    assert (declaration(world).phase, declaration(world).failure) == (DeathPhase.FAILED, R.NOT_FENCED)
    assert "the board is silent" in declaration(world).message
    assert certificate(world) is None
    assert world.record("g1").phase is Ownership.IDLE


async def test_a_fencer_that_raises_proves_nothing(world: World) -> None:
    class Broken(Switch):
        async def power_off(self, host: str) -> Fenced:
            raise RuntimeError("no such module")

    goes_dark(world, "h1")
    declare(world)
    async with running(world, Broken()):
        await until(over(world))
    assert declaration(world).failure == R.NOT_FENCED
    assert certificate(world) is None


async def test_a_host_that_no_fencer_serves(world: World) -> None:
    goes_dark(world, "h1")
    declare(world)
    async with running(world):
        await until(over(world))
    assert declaration(world).failure == R.FENCER_REQUIRED
    assert certificate(world) is None


@pytest.mark.parametrize("on_word", [False, True])
async def test_a_host_whose_session_lives_is_never_declared_dead(world: World, on_word: bool) -> None:
    guest(world, "g1")
    declare(world, on_word=on_word)
    switch = Switch()
    async with running(world, switch):
        await until(over(world))
    assert declaration(world).failure == R.HOST_ALIVE
    assert switch.asked == []
    assert certificate(world) is None


async def test_a_session_that_comes_back_between_look_and_certificate(world: World) -> None:
    """The look says silent; the certificate's own transaction finds the session."""
    guest(world, "g1")
    live = world.store.tree.nodes[paths.live("h1")]
    goes_dark(world, "h1")
    declare(world, on_word=True)
    real = world.store.multi

    async def multi(ops, timeout_s: float = 2.0):
        if any(op.path == paths.fence("h1", "boot-h1") for op in ops):
            world.store.tree.nodes[paths.live("h1")] = live
        return await real(ops, timeout_s)

    world.store.multi = multi
    async with running(world):
        await until(over(world))
    assert declaration(world).failure == R.HOST_ALIVE
    assert certificate(world) is None
    assert paths.live("h1") in world.store.tree.nodes


async def test_a_host_that_has_booted_again_is_not_what_was_declared_dead(world: World) -> None:
    goes_dark(world, "h1")
    declare(world)
    path = paths.host("h1")
    world.store.tree.nodes[path] = replace(
        world.store.tree.nodes[path], data=world.store.tree.nodes[path].data.replace(b"boot-h1", b"boot-new")
    )
    async with running(world, switch := Switch()):
        await until(over(world))
    assert declaration(world).failure == R.CONFIRMATION_STALE
    assert switch.asked == []


async def test_on_the_operators_word_no_fencer_is_asked_and_who_said_it_is_kept(world: World) -> None:
    guest(world, "g1")
    goes_dark(world, "h1")
    declare(world, on_word=True)
    async with running(world, switch := Switch()):
        await until(over(world))
    assert declaration(world).phase is DeathPhase.DONE
    assert switch.asked == []
    assert certificate(world) == Certificate(Proof.OPERATOR, "ann", 1.0)
    assert world.record("g1").phase is Ownership.CRASHED
    assert paths.live("h1") not in world.store.tree.nodes


async def test_a_slow_fencer_keeps_no_other_host_waiting(world: World) -> None:
    for host in ("h1", "h2"):
        goes_dark(world, host)
        declare(world, host, on_word=host == "h2")
    switch = Switch()
    switch.hold = asyncio.Event()
    async with running(world, switch):
        await until(over(world, "h2"))
        assert declaration(world).phase is DeathPhase.FENCING
        switch.hold.set()
        await until(over(world))


async def test_the_next_leader_asks_the_fencer_again(world: World) -> None:
    guest(world, "g1")
    goes_dark(world, "h1")
    declare(world)
    switch = Switch()
    switch.hold = asyncio.Event()
    async with running(world, switch):
        await until(lambda: switch.asked == ["h1"])
    assert certificate(world) is None
    switch.hold = None
    async with running(world, switch):
        await until(over(world))
    assert switch.asked == ["h1", "h1"]
    assert world.record("g1").phase is Ownership.CRASHED


@pytest.mark.rule("H12")
async def test_a_deposed_leader_certifies_nothing(world: World) -> None:
    goes_dark(world, "h1")
    declare(world)
    switch = Switch()
    switch.hold = asyncio.Event()
    async with running(world, switch) as task:
        await until(lambda: switch.asked == ["h1"])
        world.store.tree.nodes[paths.epoch()] = Versioned(b"", EPOCH + 1, 0)
        switch.hold.set()
        with pytest.raises(Deposed):
            async with asyncio.timeout(5):
                await task
    assert certificate(world) is None


# --- records ----------------------------------------------------------------------------------------------------------


async def test_attempts_from_and_towards_a_dead_host(world: World) -> None:
    """One leaves it, one goes there, one was committed there, one had left it for good."""
    dead, other = H1, H2
    records = {
        "leaving": handover.bind(
            handover.open_attempt(replace(HERE, name="n-leaving"), "m1", 1, other, epoch=1, writer="w"),
            "m1", 1, "i", writer="w",
        ),
        "coming": handover.open_attempt(replace(HERE, name="n-coming", owner=H2), "m2", 1, dead, epoch=1, writer="w"),
        "committed": replace(COMMITTED, name="n-committed", owner=H1, destination=H1, source=H2),
        "left": replace(COMMITTED, name="n-left"),
    }  # fmt: skip
    for uuid, record in records.items():
        guest(world, uuid, record.owner.host)
        world.put(paths.guest(uuid), record)
    goes_dark(world, "h1")
    certify(world)
    async with running(world):
        await until(lambda: world.record("committed").phase is Ownership.CRASHED)
        await until(lambda: world.record("coming").phase is Ownership.ABORTED)
    assert world.record("leaving").phase is Ownership.CRASHED
    assert world.record("coming").owner == H2
    assert world.record("left") == records["left"]


async def test_a_commit_that_arrives_after_the_certificate(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.coordinator.deaths.NET_S", 0.05)
    guest(world, "g1", "h2")
    certify(world)
    async with running(world):
        await asyncio.sleep(0.1)
        world.put(paths.guest("g1"), replace(COMMITTED, owner=H1, destination=H1, source=H2))
        await until(lambda: world.record("g1").phase is Ownership.CRASHED)


async def test_a_record_that_cannot_be_read_keeps_nobody_waiting(world: World) -> None:
    guest(world, "g1")
    world.store.tree.nodes[paths.guest("bad")] = Versioned(b"{", 0, 0)
    goes_dark(world, "h1")
    declare(world, on_word=True)
    async with running(world):
        await until(over(world))
    assert world.record("g1").phase is Ownership.CRASHED


# --- restarts ---------------------------------------------------------------------------------------------------------


async def test_a_guest_is_started_elsewhere_under_its_name(world: World) -> None:
    guest(world, "g1", on_host_death=OnHostDeath.RESTART, labels={"a": "b"})
    world.put(paths.want_run("g1"), WantRun(run=False, by="ann", sequence=4))
    goes_dark(world, "h1")
    declare(world)
    async with running(world, Switch()):
        await until(lambda: world.record("g1").phase is Ownership.GONE)
    born = decode(str, world.store.tree.nodes[paths.name("n-g1")].data)
    assert born == death.successor_uuid("g1", 1) == world.record("g1").successor
    record = world.record(born)
    assert (record.phase, record.owner) == (Ownership.IDLE, H2)
    spec = decode(GuestSpec, world.store.tree.nodes[paths.guest_spec(born)].data)
    assert spec == GuestSpec("n-g1", on_host_death=OnHostDeath.RESTART, labels={"a": "b"})
    assert decode(WantRun, world.store.tree.nodes[paths.want_run(born)].data).run is False
    assert len(lives(world, "n-g1")) == 1


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"on_host_death": OnHostDeath.RESTART, "devices": (DeviceSpec("nic", ShimKind.COMPANION),)},
        {"on_host_death": OnHostDeath.RESTART, "devices": (DeviceSpec("card", ShimKind.VFIO),)},
    ],
)
async def test_who_stays_where_they_crashed(world: World, spec: dict[str, Any]) -> None:
    guest(world, "g1", **spec)
    goes_dark(world, "h1")
    declare(world)
    async with running(world, Switch()):
        await until(over(world))
        await asyncio.sleep(0.05)
    assert world.record("g1").phase is Ownership.CRASHED
    assert world.starts == []


async def test_a_restart_waits_for_room_and_then_happens(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.coordinator.deaths.PENDING_S", 0.02)
    guest(world, "g1", on_host_death=OnHostDeath.RESTART, memory_mib=900)
    for uuid, host in (("a", "h2"), ("b", "h3")):
        guest(world, uuid, host, memory_mib=500)
    goes_dark(world, "h1")
    certify(world)
    async with running(world):
        await until(lambda: world.record("g1").host_died)
        await asyncio.sleep(0.1)
        assert world.starts == []
        world.put(paths.guest("b"), handover.gone(world.record("b"), writer="w"))
        await until(lambda: world.record("g1").phase is Ownership.GONE)
    assert [host for _, host in world.starts] == ["h3"]


async def test_many_restarts_never_fill_a_host_twice(world: World) -> None:
    """1,024 MiB each on h2 and h3, guests of 300 MiB: six fit, two wait."""
    for number in range(8):
        guest(world, f"g{number}", on_host_death=OnHostDeath.RESTART, memory_mib=300)
    goes_dark(world, "h1")
    certify(world)
    async with running(world):
        await until(lambda: len(world.starts) == 6)
        await asyncio.sleep(0.1)
    where = [host for _, host in world.starts]
    assert sorted(where) == ["h2"] * 3 + ["h3"] * 3


async def test_a_host_that_refuses_a_guest_is_followed_by_another(world: World) -> None:
    guest(world, "g1", on_host_death=OnHostDeath.RESTART)
    world.broken = {"h2"}
    goes_dark(world, "h1")
    certify(world)
    async with running(world):
        await until(lambda: world.record("g1").phase is Ownership.GONE)
    assert [host for _, host in world.starts] == ["h2", "h3"]
    assert [record.owner.host for record in lives(world, "n-g1")] == ["h3"]


async def test_tries_are_bounded_and_the_guest_is_not_forgotten(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.coordinator.deaths.PENDING_S", 0.02)
    guest(world, "g1", on_host_death=OnHostDeath.RESTART)
    world.broken = {"h2", "h3"}
    goes_dark(world, "h1")
    certify(world)
    async with running(world):
        await until(lambda: len(world.starts) == death.MAX_RESTARTS)
        await asyncio.sleep(0.1)
    record = world.record("g1")
    assert (record.phase, record.restarts) == (Ownership.CRASHED, death.MAX_RESTARTS)
    assert "failed" in death.standing(record, GuestSpec("n-g1", on_host_death=OnHostDeath.RESTART))


async def test_a_guest_that_cannot_be_read_keeps_no_other_from_starting(world: World) -> None:
    for uuid in ("g1", "g3"):
        guest(world, uuid, on_host_death=OnHostDeath.RESTART)
    world.store.tree.nodes[paths.name("n-g1")] = Versioned(b"{", 0, 0)
    goes_dark(world, "h1")
    certify(world)
    async with running(world):
        await until(lambda: world.record("g3").phase is Ownership.GONE)
    assert len(lives(world, "n-g3")) == 1
    assert world.record("g1").host_died


async def test_a_name_that_was_given_away_is_left_alone(world: World) -> None:
    guest(world, "g1", on_host_death=OnHostDeath.RESTART)
    world.put(paths.name("n-g1"), "somebody-else")
    goes_dark(world, "h1")
    certify(world)
    async with running(world):
        await until(lambda: world.record("g1").phase is Ownership.GONE)
    assert world.starts == []
    assert decode(str, world.store.tree.nodes[paths.name("n-g1")].data) == "somebody-else"


@pytest.mark.parametrize("lost", range(8))
@pytest.mark.parametrize("applied", [False, True])
async def test_every_write_may_lose_its_answer_and_the_guest_is_started_once(
    world: World, lost: int, applied: bool
) -> None:
    guest(world, "g1", on_host_death=OnHostDeath.RESTART)
    goes_dark(world, "h1")
    declare(world)
    real, count = world.store.multi, 0

    async def multi(ops, timeout_s: float = 2.0):
        nonlocal count
        count += 1
        if count == lost + 1:
            world.store.fail_next = [applied]
        return await real(ops, timeout_s)

    world.store.multi = multi
    async with running(world, Switch()):
        await until(lambda: declaration(world).phase is DeathPhase.DONE)
        await until(lambda: world.record("g1").phase is Ownership.GONE)
    assert len(lives(world, "n-g1")) == 1
    assert decode(str, world.store.tree.nodes[paths.name("n-g1")].data) == death.successor_uuid("g1", 1)


@pytest.mark.parametrize("crash_after", range(1, 9))
async def test_the_leader_crashes_after_any_write_and_the_guest_is_started_once(world: World, crash_after: int) -> None:
    """Each leader is cut off after so many of its writes; the next goes on from what it left."""
    guest(world, "g1", on_host_death=OnHostDeath.RESTART)
    guest(world, "g2", on_host_death=OnHostDeath.RESTART)
    goes_dark(world, "h1")
    declare(world)
    real = world.store.multi

    left = crash_after

    async def multi(ops, timeout_s: float = 2.0):
        nonlocal left
        if left == 0:
            await asyncio.Event().wait()
        left -= 1
        return await real(ops, timeout_s)

    world.store.multi = multi
    async with running(world, Switch()):
        with contextlib.suppress(TimeoutError):
            await until(lambda: left == 0, 1.0)
        await asyncio.sleep(0.01)
    world.store.multi = real
    async with running(world, Switch()):
        await until(lambda: declaration(world).phase is DeathPhase.DONE)
        await until(lambda: all(world.record(uuid).phase is Ownership.GONE for uuid in ("g1", "g2")))
    for name in ("n-g1", "n-g2"):
        assert len(lives(world, name)) == 1


async def test_two_leaders_at_once_start_a_guest_once(world: World) -> None:
    """The old one does not know yet that it was followed: the names decide."""
    guest(world, "g1", on_host_death=OnHostDeath.RESTART)
    goes_dark(world, "h1")
    certify(world)
    async with running(world), running(world):
        await until(lambda: world.record("g1").phase is Ownership.GONE)
    assert len(lives(world, "n-g1")) == 1


async def test_certificates_are_kept_within_bounds(world: World) -> None:
    guest(world, "g1", "h2")
    for number in range(20):
        certify(world, "h1", f"old-{number}")
        path = paths.fence("h1", f"old-{number}")
        world.store.tree.nodes[path] = Versioned(b"", 0, 100 + number)
    world.put(paths.guest("g1"), replace(HERE, owner=HostRef("h1", "old-0"), phase=Ownership.CRASHED))
    async with running(world):
        await until(lambda: len(world.store.tree.children(paths.fences("h1"))) <= death.KEPT_CERTIFICATES + 1)
    left = world.store.tree.children(paths.fences("h1"))
    assert set(left) == {"old-0", *(f"old-{number}" for number in range(12, 20))}
