"""Placements of one worker: judged one at a time, written side by side."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from orchestrator.coordinator.placing import Placing
from orchestrator.coordinator.worker import Worker
from orchestrator.core.ids import HostRef
from orchestrator.core.placement import GUEST_OVERHEAD_MIB, GuestInput, HostInput, HostView, Need, choose, host_views
from orchestrator.core.records import Cordon, GuestSpec, HostRecord, Reservations
from orchestrator.ledger import paths
from orchestrator.ledger.records import decode
from orchestrator.ledger.store import Conflict, Op, SetData, WriteResult
from tests.fakes.coordination import MemoryStore, Tree, World

HOSTS, GUESTS = 12, 10


def views(**free_mib: int) -> list[HostView]:
    return [HostView(HostRef(name, "b"), free) for name, free in free_mib.items()]


NEED = Need("u", "g", "source", 64)


def chosen(hosts: list[HostView], salt: str, later: tuple[str, ...] = ()) -> str:
    choice = choose(hosts, NEED, salt=salt, later=later)
    assert choice.destination is not None
    return choice.destination.host


def test_who_places_with_a_salt_of_his_own_does_not_choose_what_others_choose() -> None:
    equals = views(**{f"h{number}": 640 + number for number in range(10)})
    picked = Counter(chosen(equals, f"m{number}") for number in range(1_000))
    assert len(picked) == 10
    assert max(picked.values()) < 200
    assert chosen(equals, "m1") == chosen(list(reversed(equals)), "m1"), "the same for the same salt"


def test_room_for_more_such_guests_comes_before_everything_else() -> None:
    assert {chosen(views(a=640, b=704, c=650), f"m{number}") for number in range(50)} == {"b"}
    assert {chosen(views(a=640, b=704), f"m{number}", later=("b",)) for number in range(50)} == {"b"}
    assert {chosen(views(a=640, b=650), f"m{number}", later=("b",)) for number in range(50)} == {"a"}


async def test_a_host_that_is_written_for_is_waited_for() -> None:
    placing, told = Placing(), list[str]()

    async def wait() -> None:
        await placing.idle("h1")
        told.append("idle")

    placing.look()
    with placing.writing("h1"):
        assert placing.busy == {"h1"}
        await placing.idle("h2")
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="h1"), placing.writing("h1"):
            pass
        assert not told
    await waiting
    assert placing.busy == {"h1"}, "what was seen before is not what it has promised now"
    placing.look()
    assert not placing.busy


async def _opened(hosts: int, *, were_there: bool = False) -> tuple[int, int]:
    """The most attempts that were being opened at one time, and how many writes were refused; so many destinations.
    `were_there`: the guests were there lately, which each finds out by a write that is refused."""
    world = World(hold=asyncio.Event())
    world.host("source", 4096)
    world.put(paths.epoch(), "")
    for number in range(hosts):
        world.host(f"h{number:02}", 4096)
    for number in range(GUESTS):
        world.guest(f"g{number}", "source")
        world.migration(f"m{number}", f"g{number}")
        for host in (f"h{at:02}" for at in range(hosts if were_there else 0)):
            world.put(paths.host_guest(host, f"g{number}"), "")
    real, opening, most, lost = world.store.multi, 0, 0, 0

    async def slow(ops, timeout_s: float = 2.0):
        nonlocal opening, most, lost
        if not any(op.path.endswith("/resv") for op in ops):
            return await real(ops, timeout_s)
        opening += 1
        most = max(most, opening)
        await asyncio.sleep(0.05)
        opening -= 1
        result = await real(ops, timeout_s)
        lost += isinstance(result, Conflict)
        return result

    read = world.store.read

    async def slow_read(path, timeout_s: float = 2.0):
        if path.startswith(f"{paths.HOSTS}/") and "/guests/" in path:  # between a driver's choice and its write
            await asyncio.sleep(0.03)
        return await read(path, timeout_s)

    world.store.multi, world.store.read = slow, slow_read
    worker = Worker(world.store, world)
    driving = [asyncio.create_task(worker.drive(f"m{number}", 0)) for number in range(GUESTS)]
    async with asyncio.timeout(10):
        while len(world.calls) < GUESTS:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    for task in driving:
        task.cancel()
    worker.stop()
    await asyncio.gather(*driving, return_exceptions=True)
    await world.close()
    return most, lost


async def test_attempts_to_different_hosts_are_opened_side_by_side() -> None:
    most, lost = await _opened(HOSTS)
    assert most > 3
    assert lost == 0


async def test_attempts_to_one_host_are_opened_one_after_the_other() -> None:
    assert await _opened(1) == (1, 0)


@pytest.mark.parametrize("hosts", [1, HOSTS])
async def test_a_guest_that_was_at_its_destination_lately_costs_one_refused_write(hosts: int) -> None:
    """Its next try looks its node up, during which placements on the same host are written."""
    _, refused = await _opened(hosts, were_there=True)
    assert refused == GUESTS


class Session(MemoryStore):
    """One worker's: what it writes takes a while to get there, and what was refused is kept."""

    def __init__(self, tree: Tree) -> None:
        super().__init__(tree)
        self.refused: list[tuple[Op, ...]] = []
        self.after: Callable[[], None] = lambda: None

    async def multi(self, ops: Sequence[Op], timeout_s: float = 2.0) -> WriteResult:
        await asyncio.sleep(0.01)
        result = await super().multi(ops, timeout_s)
        if isinstance(result, Conflict):
            self.refused.append(tuple(ops))
        self.after()
        return result


def no_host_is_crowded(world: World, hosts: Sequence[str]) -> None:
    """What is promised and what is there, from the nodes themselves, is never more than a host has."""
    nodes = world.store.tree.nodes
    guests = [
        GuestInput(uuid, world.record(uuid), decode(GuestSpec, nodes[paths.guest_spec(uuid)].data))
        for uuid in {paths.guest_of(path) for path in nodes}
        if uuid and nodes[paths.guest(uuid)].data
    ]
    for host in hosts:
        record = decode(HostRecord, nodes[paths.host(host)].data)
        promised = Reservations(world.reserved(host))
        (view,) = host_views([HostInput(record, True, Cordon(), promised)], guests)
        assert view.free_mib >= 0, (host, promised)


@pytest.mark.parametrize("hosts", [1, 3])
async def test_two_workers_refuse_each_other_no_more_than_once_per_migration(hosts: int) -> None:
    """The worst case: whatever they do is done on the same hosts, where not all have room. Nobody loses a race for
    giving room back, and no room is given twice."""
    guests, room = 24, 18
    world = World()
    world.host("source", 4096)
    world.put(paths.epoch(), "")
    for number in range(hosts):
        world.host(f"h{number}", room // hosts * (64 + GUEST_OVERHEAD_MIB))
    for number in range(guests):
        world.guest(f"g{number}", "source")
        world.migration(f"m{number}", f"g{number}")
    sessions = [Session(world.store.tree) for _ in range(2)]
    for session in sessions:
        session.after = lambda: no_host_is_crowded(world, [f"h{number}" for number in range(hosts)])
    workers = [Worker(session, world, lane=lane, lanes=2) for lane, session in enumerate(sessions)]
    async with asyncio.timeout(60):
        ended = await asyncio.gather(*(workers[number % 2].drive(f"m{number}", 0) for number in range(guests)))
    await world.close()
    assert Counter(ended) == {"SUCCEEDED": room, "FAILED": guests - room}
    refused = [ops for session in sessions for ops in session.refused]
    opening = [ops for ops in refused if any(isinstance(op, SetData) and op.path.endswith("/resv") for op in ops)]
    assert opening == refused, "only what takes room"
    assert len(refused) <= guests
