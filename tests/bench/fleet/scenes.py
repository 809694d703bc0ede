"""The figures, each scene with a control plane of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from deploy.lab.devices import PROGRAM
from orchestrator.core.handover import Ownership
from orchestrator.core.placement import GuestInput, choose, need_of
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.zookeeper import ZooKeeperStore
from tests.bench.fleet import fill, moves
from tests.bench.fleet.figures import Figure, at_most, beside
from tests.bench.fleet.plane import Plane, running

HOSTS, GUESTS = 1_000, 10_000
REST_S = 75.0
"""Longer than whatever agents do once a minute."""
SETTLE_S = 15.0


class Take(Protocol):
    async def __call__(
        self, name: str, work: Callable[[], Awaitable[list[Figure]]], timeout_s: float = 300.0
    ) -> None: ...


def _many(count: int, scale: float, least: int) -> int:
    return max(least, round(count * scale))


# --- a fleet at rest, and what a start costs in it --------------------------------------------------------------------


async def fleet(scale: float, take: Take) -> None:
    hosts, guests = _many(HOSTS, scale, 10), _many(GUESTS, scale, 500)
    async with running(heap_mib=1024) as plane:
        begun = time.monotonic()
        await fill.fill_guests(plane.store, hosts, guests)
        filled_s = time.monotonic() - begun
        await plane.start_agents(hosts, guests)
        await plane.start_control()
        print(f"  {hosts} hosts, {guests} guests: {filled_s:.0f} s to write, {time.monotonic() - begun:.0f} s to start")
        await take("at_rest", lambda: at_rest(plane, REST_S if scale >= 0.5 else REST_S / 5))
        await take("placement", lambda: placement(plane, guests))
        await take("start", lambda: start(plane, _many(1_000, scale, 20), guests))


async def at_rest(plane: Plane, seconds: float) -> list[Figure]:
    """Nothing moves, and nobody looks."""
    await asyncio.sleep(SETTLE_S)
    before, cpu = await plane.counted(), plane.cpu_s()
    await asyncio.sleep(seconds)
    rates, now = (await plane.counted()).since(before), plane.cpu_s()
    pings = (await plane.counted()).pings - before.pings
    reads_per_s, writes_per_s = rates.reads / rates.seconds, rates.writes / rates.seconds
    said = f"{reads_per_s:.1f} reads, {writes_per_s:.1f} writes; pings {pings / seconds:.0f}"
    return [
        at_most("at rest: reads + writes per s, whole fleet", rates.per_s, "1/s", 50, said),
        *(
            beside(f"at rest: CPU of {role}", (now.get(role, 0) - cpu.get(role, 0)) / seconds * 100, "% of a core")
            for role in ("coordinator", "ray", "api", "zookeeper", "agents")
        ),
    ]


async def placement(plane: Plane, guests: int) -> list[Figure]:
    """Reads: of one migration at a time, counted at ZooKeeper. CPU: what a worker computes for one placement."""
    count = 20
    begun = await plane.counted()
    await asyncio.sleep(3.0)
    rest = (await plane.counted()).since(begun)
    before = await plane.counted()
    for guest in range(count):
        ids = await moves.create(plane, [guest])
        await moves.until(plane, ids, moves.over, 30.0, every_s=0.05)
    spent = (await plane.counted()).since(before)
    reads = max(0.0, spent.reads - rest.reads / rest.seconds * spent.seconds) / count
    return [
        at_most("placement: full scans", reads // guests, "scans", 0, f"{reads:.0f} reads for a whole migration"),
        at_most("placement: CPU", await _placement_cpu_ms(plane, count), "ms", 5, "snapshot, views and choice"),
        beside("migration alone: reads", reads, "reads"),
    ]


async def _placement_cpu_ms(plane: Plane, count: int) -> float:
    """With a record that moved before each, as after each migration."""
    store = ZooKeeperStore(plane.zookeeper.hosts)
    await store.start()
    index = Index(store)
    try:
        await index.snapshot()
        ledger = Ledger(plane.store)
        cpu_s = 0.0
        for number in range(count):
            uuid = fill.guest_uuid(number)
            found = await ledger.read_guest(uuid)
            spec = await index.spec(uuid)
            assert found is not None
            assert spec is not None
            if found[0].phase is Ownership.IDLE:
                await ledger.cas(paths.guest(uuid), found[0], found[1])
            await asyncio.sleep(0.05)
            begun = time.process_time()
            snapshot = await index.recent()
            choice = choose(snapshot.views(), need_of(GuestInput(uuid, found[0], spec)))
            cpu_s += time.process_time() - begun
            assert choice.destination is not None, choice.message
        return cpu_s / count * 1000
    finally:
        await index.close()
        await store.close()


async def start(plane: Plane, count: int, guests: int) -> list[Figure]:
    """All asked for at once; pre-copies do not end before all have begun."""
    await plane.tell_agents("hold")
    first = guests - count
    cpu, began = plane.cpu_s(), time.monotonic()
    ids = await moves.create(plane, range(first, first + count), dict(moves.LONG))
    asked_s = time.monotonic() - began
    try:
        await moves.until(plane, ids, moves.begun, 240.0)
        took_s = time.monotonic() - began
        now = plane.cpu_s()
    finally:
        await plane.tell_agents("go")
    spent = ", ".join(f"{role} {now.get(role, 0) - cpu.get(role, 0):.1f}" for role in now)
    await moves.until(plane, ids, moves.over, 120.0)
    return [
        at_most(f"start {count} migrations until each is PREPARING", took_s, "s", 15, f"CPU s: {spent}"),
        beside("start: until the API had taken them all", asked_s, "s"),
        beside("start: until all were over", time.monotonic() - began, "s"),
    ]


# --- what one migration costs -----------------------------------------------------------------------------------------


async def clean(scale: float, take: Take) -> None:
    hosts, guests = 8, 80
    async with running() as plane:
        await fill.fill_guests(plane.store, hosts, guests)
        await plane.start_agents(hosts, guests, program=PROGRAM)
        await plane.start_control()
        await asyncio.sleep(SETTLE_S / 3)
        await take("clean", lambda: clean_migrations(plane, _many(400, scale, 40), guests))


async def clean_migrations(plane: Plane, count: int, guests: int) -> list[Figure]:
    """Nothing goes wrong. Writes are counted by ZooKeeper's transaction numbers."""
    await _moved(plane, range(guests // 2), guests)  # whatever happens only once
    before, cpu = await plane.counted(), plane.cpu_s()
    await _moved(plane, range(count), guests)
    spent, now = (await plane.counted()).since(before), plane.cpu_s()
    each = {role: (now[role] - cpu.get(role, 0.0)) / count * 1000 for role in now}
    others = ", ".join(f"{role} {each[role]:.1f}" for role in each if role != "coordinator")
    return [
        at_most("clean migration: coordinator CPU", each["coordinator"], "ms", 20, f"others: {others}"),
        at_most("clean migration: quorum writes, no device", spent.writes / count, "writes", 8),
        beside("clean migration: reads, no device", spent.reads / count, "reads"),
    ]


async def _moved(plane: Plane, numbers: range, guests: int) -> None:
    """Migrations one after the other of each guest, as many side by side as there are guests."""
    for first in range(0, len(numbers), guests):
        some = [number % guests for number in numbers[first : first + guests]]
        ids = await moves.create(plane, some)
        followed = await moves.until(plane, ids, moves.over, 120.0)
        if set(followed.phases()) != {"SUCCEEDED"}:
            raise RuntimeError(f"migrations did not succeed: {dict(followed.phases())}")


SCENES: dict[Callable[[float, Take], Awaitable[None]], tuple[str, ...]] = {
    fleet: ("at_rest", "placement", "start"),
    clean: ("clean",),
}
