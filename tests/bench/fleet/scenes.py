"""The figures, each scene with a control plane of its own."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from deploy.lab.devices import PROGRAM
from orchestrator import wire
from orchestrator.coordinator.driver import RESYNC_S
from orchestrator.core.handover import Ownership
from orchestrator.core.placement import GuestInput, choose, need_of
from orchestrator.core.records import DeviceSpec, ShimKind
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.zookeeper import ZooKeeperStore
from protos.drover.v1 import orchestrator_pb2 as pb
from tests.bench.fleet import fill, moves
from tests.bench.fleet.figures import Figure, at_most, beside, failed, percentile
from tests.bench.fleet.plane import Counted, Limits, Plane, running

HOSTS, GUESTS = 1_000, 10_000
REST_S = 75.0
"""Longer than whatever agents do once a minute."""
SETTLE_S = 15.0
FAIL_OVERS = 3
COMMAND_S = 120.0
"""A command of the command line that takes longer is ended."""
WATCHES = 150
"""Of one caller."""


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
        await settle(plane, guests, SETTLE_S)
        await take("at_rest", lambda: at_rest(plane, REST_S if scale >= 0.5 else REST_S / 3))
        await take("placement", lambda: placement(plane, guests))
        await take("lists", lambda: lists(plane, guests))
        await take("watches", lambda: watches(plane, _many(1_000, scale, 50)))
        await take("start", lambda: start(plane, _many(1_000, scale, 20), guests), 480.0)


async def settle(plane: Plane, guests: int, least_s: float) -> None:
    """Whatever is looked at only once has been looked at: every worker has driven something, and it is quiet."""
    await _moved(plane, range(min(12, guests)), guests)
    await asyncio.sleep(least_s)
    last = float("inf")
    for _ in range(12):
        before = await plane.counted()
        await asyncio.sleep(5.0 if least_s else 1.0)
        now = (await plane.counted()).since(before).per_s
        if now > 0.8 * last:
            return
        last = now


async def at_rest(plane: Plane, seconds: float) -> list[Figure]:
    """Nothing moves, and nobody looks."""
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
    spent = ""
    try:
        await moves.until(plane, ids, moves.begun, 240.0)
    finally:
        took_s, now = time.monotonic() - began, plane.cpu_s()
        spent = ", ".join(f"{role} {now.get(role, 0) - cpu.get(role, 0):.1f}" for role in now)
        print(f"  {took_s:.1f} s of {os.cpu_count()} cores until they had begun, CPU s: {spent}", flush=True)
        await plane.go()
    ended = await _ended(plane, ids)
    return [
        at_most(f"start {count} migrations until each is PREPARING", took_s, "s", 15, f"CPU s: {spent}"),
        beside("start: until the API had taken them all", asked_s, "s"),
        beside("start: until all were over", time.monotonic() - began, "s", ended),
    ]


async def _ended(plane: Plane, ids: Sequence[str]) -> str:
    """How they ended, or had so far: it is no part of a figure that was taken before."""
    try:
        followed = await moves.until(plane, ids, moves.over, 60 + len(ids) / 10)
    except TimeoutError as error:
        return f"not all were over afterwards: {error}"
    return f"ended {dict(followed.phases())}; {await moves.repeated(plane, followed)}"


async def lists(plane: Plane, guests: int) -> list[Figure]:
    """A page of guests, as the API gives it."""
    paged = "page_size" in pb.ListGuestsRequest.DESCRIPTOR.fields_by_name
    request: Any = pb.ListGuestsRequest()
    if paged:
        request.page_size = 100
    took_ms: list[float] = []
    said = ""
    for _ in range(60 if paged else 10):
        begun = time.monotonic()
        answer = await plane.api.ListGuests(request, timeout=60.0)
        took_ms.append((time.monotonic() - begun) * 1000)
        said = f"{len(answer.guests)} of {guests} guests in each answer"
    return [at_most("ListGuests: page of 100, p95", percentile(took_ms[1:], 0.95), "ms", 50, said)]


async def watches(plane: Plane, count: int) -> list[Figure]:
    """Streams that nothing is sent on: half of them for guests, half for migrations."""
    async with plane.callers(1 + count // WATCHES) as stubs:

        async def follow(number: int) -> None:
            stub = stubs[number % len(stubs)]
            if number % 2:
                call = stub.WatchGuests(pb.WatchGuestsRequest(names=[fill.guest_name(number)]), timeout=600.0)
            else:
                call = stub.WatchMigrations(pb.WatchMigrationsRequest(), timeout=600.0)
            async for _ in call:
                pass

        following = [asyncio.create_task(follow(number)) for number in range(count)]
        await asyncio.sleep(SETTLE_S)
        before, begun = plane.cpu_s()["api"], time.monotonic()
        await asyncio.sleep(10.0)
        percent = (plane.cpu_s()["api"] - before) / (time.monotonic() - begun) * 100
        ended = sum(task.done() for task in following)
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
    said = f"{ended} of them had ended" if ended else ""
    return [at_most(f"{count} watches: CPU of the API", percent, "% of a core", 5, said)]


# --- what one migration costs -----------------------------------------------------------------------------------------


async def clean(scale: float, take: Take) -> None:
    hosts, guests = 8, 80
    async with running() as plane:
        await fill.fill_guests(plane.store, hosts, guests)
        await plane.start_agents(hosts, guests)
        await plane.start_control()
        await asyncio.sleep(SETTLE_S / 3)
        await take("clean", lambda: clean_migrations(plane, _many(400, scale, 40), guests))


async def clean_migrations(plane: Plane, count: int, guests: int) -> list[Figure]:
    """Nothing goes wrong. Writes are counted by ZooKeeper's transaction numbers."""
    await _moved(plane, range(guests // 2), guests)  # whatever happens only once
    before, cpu = await plane.counted(), plane.cpu_s()
    await _moved(plane, range(count), guests)
    spent, now = (await plane.counted()).since(before), plane.cpu_s()
    _tell_writes(plane, before, count)
    each = {role: (now[role] - cpu.get(role, 0.0)) / count * 1000 for role in now}
    others = ", ".join(f"{role} {each[role]:.1f}" for role in each if role != "coordinator")
    return [
        at_most("clean migration: coordinator CPU", each["coordinator"], "ms", 20, f"others: {others}"),
        at_most("clean migration: quorum writes, no device", spent.writes / count, "writes", 8),
        beside("clean migration: reads, no device", spent.reads / count, "reads"),
    ]


async def one_device(scale: float, take: Take) -> None:
    """With one companion device each: a real process of the lab's beside each light VMM."""
    hosts, guests = 4, 12
    async with running() as plane:
        await fill.make_tree(plane.store)
        await plane.start_agents(hosts, 0, program=PROGRAM)
        await plane.start_control()
        for number in range(guests):
            spec = replace(fill.guest_spec(number), devices=(DeviceSpec("dpu", ShimKind.COMPANION),))
            request = pb.CreateGuestRequest(spec=wire.guest_spec_to_proto(spec), host=fill.host_name(number % hosts))
            await plane.api.CreateGuest(request, timeout=60.0)
        await take("device", lambda: device_migrations(plane, _many(60, scale, 12), guests))


async def device_migrations(plane: Plane, count: int, guests: int) -> list[Figure]:
    await _moved(plane, range(guests), guests)
    before = await plane.counted()
    await _moved(plane, range(count), guests)
    spent = (await plane.counted()).since(before)
    _tell_writes(plane, before, count)
    return [at_most("clean migration: quorum writes, 1 device", spent.writes / count, "writes", 10)]


def _tell_writes(plane: Plane, before: Counted, count: int) -> None:
    for kind, number in plane.writes_since(before).most_common(24):
        print(f"    {number / count:6.2f} per migration: {kind}", flush=True)


async def _moved(plane: Plane, numbers: range, guests: int) -> None:
    """Migrations one after the other of each guest, as many side by side as there are guests."""
    for first in range(0, len(numbers), guests):
        some = [number % guests for number in numbers[first : first + guests]]
        ids = await moves.create(plane, some)
        followed = await moves.until(plane, ids, moves.over, 120.0)
        if set(followed.phases()) != {"SUCCEEDED"}:
            raise RuntimeError(f"migrations did not succeed: {dict(followed.phases())}")


# --- many in flight ---------------------------------------------------------------------------------------------------


async def in_flight(scale: float, take: Take) -> None:
    most = _many(3_000, scale, 60)
    hosts = max(6, most // 50)
    async with running(Limits(max_concurrent=most, max_per_source=max(8, 2 * most // hosts)), heap_mib=512) as plane:
        await fill.fill_guests(plane.store, hosts, most)
        await plane.start_agents(hosts, most)
        await plane.start_control(seats=2)
        await asyncio.sleep(SETTLE_S / 3)
        counts = sorted({max(6, round(most * part)) for part in (1 / 30, 0.1, 1 / 3, 1)})
        await take("flat", lambda: flat(plane, counts), 600.0)
        await take("fail_over", lambda: fail_over(plane, counts[-2]), 300.0)


async def flat(plane: Plane, counts: Sequence[int]) -> list[Figure]:
    """Each number of migrations is under way for a while, all at the same time, and then ends well.

    What the coordinator does at rest is taken off.
    """
    found: list[Figure] = []
    cpu_ms: list[float] = []
    writes: list[float] = []
    memory: list[float] = []
    await _moved(plane, range(counts[0]), counts[-1])
    await asyncio.sleep(2.0)
    rest = await _cpu_at_rest(plane, 8.0)
    for count in counts:
        try:
            cost = await _cost_of(plane, count, rest)
        except TimeoutError as error:  # those that were taken stand all the same
            found.append(failed(f"{count} in flight", error))
            await plane.go()
            break
        cpu_ms.append(cost[0].value or 0.0)
        memory.append(cost[1].value or 0.0)
        writes.append(cost[2].value or 0.0)
        found += cost
        for one in cost:
            print(f"  {one.name}: {one.value} {one.unit} {one.note}", flush=True)
    if len(cpu_ms) < 2:
        return found
    each = [(b - a) * 1024 / (m - n) for a, b, n, m in zip(memory, memory[1:], counts, counts[1:], strict=False)]
    said = "KiB per further migration: " + ", ".join(f"{one:.0f}" for one in each)
    ratios = [
        at_most("in flight: CPU per migration, most / least", max(cpu_ms) / min(cpu_ms), "x", 1.2),
        at_most("in flight: writes per migration, most / least", max(writes) / min(writes), "x", 1.2),
    ]
    if len(cpu_ms) < len(counts):
        ratios = [replace(one, met=False, note=f"only up to {counts[len(cpu_ms) - 1]}") for one in ratios]
    return [*found, *ratios, beside("in flight: memory of one more", each[-1], "KiB", said)]


async def _cost_of(plane: Plane, count: int, rest: float) -> list[Figure]:
    """CPU per migration, memory and writes per migration with so many under way. Raises TimeoutError."""
    await plane.tell_agents("hold")
    before, cpu = await plane.counted(), plane.cpu_s()["coordinator"]
    ids = await moves.create(plane, range(count), dict(moves.LONG))
    await moves.until(plane, ids, moves.begun, 60 + count / 20)
    await asyncio.sleep(10.0)
    memory = plane.rss_mib()["coordinator"]
    await plane.go()
    followed = await moves.until(plane, ids, moves.over, 60 + count / 10)
    spent = (await plane.counted()).since(before)
    busy_s = plane.cpu_s()["coordinator"] - cpu - rest * spent.seconds
    _tell_writes(plane, before, count)
    said = "" if set(followed.phases()) == {"SUCCEEDED"} else f"ended {dict(followed.phases())}"
    said += f"; {repeated}" if (repeated := await moves.repeated(plane, followed)) else ""
    return [
        beside(f"{count} in flight: coordinator CPU per migration", max(0.1, busy_s / count * 1000), "ms", said),
        beside(f"{count} in flight: coordinator RSS", memory, "MiB"),
        beside(f"{count} in flight: writes per migration", spent.writes / count, "writes"),
    ]


async def _cpu_at_rest(plane: Plane, seconds: float) -> float:
    """Of the coordinator, as a part of one core."""
    before, begun = plane.cpu_s()["coordinator"], time.monotonic()
    await asyncio.sleep(seconds)
    return (plane.cpu_s()["coordinator"] - before) / (time.monotonic() - begun)


async def fail_over(plane: Plane, count: int) -> list[Figure]:
    """SIGKILL for everything of the leader's Ray while all are in pre-copy; nobody helps but whoever restarts Ray."""
    await plane.tell_agents("hold")
    ids = await moves.create(plane, range(count), dict(moves.LONG))
    await moves.until(plane, ids, moves.begun, 60 + count / 20)
    await asyncio.sleep(3.0)
    leads_s, adopted_s = await _until_adopted(plane, count)
    await asyncio.sleep(RESYNC_S + 1.0)  # every driver has looked at everything since
    adopted = await moves.until(plane, ids, moves.begun, 60.0)
    again = sum(state.attempt > 1 for state in adopted.states.values())
    said = f"before their pre-copies ended; {await moves.repeated(plane, adopted)}" if again else ""
    for one in (adopted_s, adopted_s - leads_s, again):
        print(f"  {one:.1f}", flush=True)
    await plane.go()
    said += await _ended(plane, ids)
    return [
        at_most(f"fail-over with {count} in flight: all re-adopted, after the kill", adopted_s, "s", 15),
        at_most("fail-over: all re-adopted, after the successor leads", adopted_s - leads_s, "s", 5),
        at_most("fail-over: transfers restarted", again, "transfers", 0, said),
    ]


async def _until_adopted(plane: Plane, count: int) -> tuple[float, float]:
    """Seconds from the kill until another leads, and until its workers drive all `count` migrations.

    What was killed is started again only then: it would be on a machine of its own.
    """
    leads = await plane.leading()
    successor = next((seat for seat in plane.seats if seat != leads), leads)
    async with plane.asking(successor) as asking:
        epoch = await plane.epoch()
        plane.down |= {leads.ray_head} if successor != leads else set()
        killed = time.monotonic()
        await plane.kill_ray(leads)
        asking.go()

        async def led() -> bool:
            return await plane.epoch() > epoch and await plane.leads()

        try:
            await plane.until(led, 60.0, "another leader")
            leads_s = time.monotonic() - killed
            return leads_s, await asking.until_driving(count, 60.0) - killed
        finally:
            plane.down.clear()


# --- what ended long ago ----------------------------------------------------------------------------------------------


async def ended(scale: float, take: Take) -> None:
    """The same commands with few and with many migrations that ended: each in a control plane of its own."""
    many = _many(100_000, scale, 1_000)
    if_few: dict[str, float] = {}

    async def few() -> list[Figure]:
        if_few.update(await _with_ended(100))
        return []

    async def compared() -> list[Figure]:
        if_many = await _with_ended(many)
        return [
            at_most(
                f"{many} ended: {what}", took / if_few[what], "x", 1.5, f"{took:.2f} s, with 100: {if_few[what]:.2f} s"
            )
            for what, took in if_many.items()
            if what in if_few
        ]

    await take("ended", few, 300.0)
    await take("ended", compared, 660.0)


async def _with_ended(count: int) -> dict[str, float]:
    """Seconds of each command as a user waits for it, and of a fail-over with ten under way: medians."""
    hosts, guests, under_way, times = 4, 40, 20, 5
    took: dict[str, list[float]] = {}

    def note(what: str, seconds: float) -> None:
        took.setdefault(what, []).append(seconds)

    async with running(heap_mib=2_048) as plane:
        await fill.fill_guests(plane.store, hosts, guests)
        await fill.fill_ended(plane.store, range(count), guests)
        await plane.start_agents(hosts, guests)
        await plane.start_control(seats=2)
        prefix = fill.migration_id(count // 2)[:13]
        await _command_s(plane, "migration", "list")  # what is read once is read now
        for _ in range(times):
            note("migration list", await _command_s(plane, "migration", "list"))
            note("explain PREFIX", await _command_s(plane, "explain", prefix))
        await plane.tell_agents("hold")
        ids = await moves.create(plane, range(under_way), dict(moves.LONG))
        await moves.until(plane, ids, moves.begun, 60.0)
        for number in range(times):
            note("migration cancel PREFIX", await _command_s(plane, "migration", "cancel", ids[number][:13]))
        for _ in range(FAIL_OVERS):
            await plane.all_seated()
            await asyncio.sleep(3.0)
            note("fail-over", (await _until_adopted(plane, under_way - times))[1])
    return {what: statistics.median(seconds) for what, seconds in took.items()}


async def _command_s(plane: Plane, *words: str) -> float:
    """The command line in a process of its own, with what it takes to start. Raises RuntimeError with its words."""
    command = [sys.executable, "-m", "orchestrator.cli.main", "--api", f"unix:{plane.layout.api_socket}", *words]
    begun = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(COMMAND_S):
            said, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return COMMAND_S
    if process.returncode != 0:
        raise RuntimeError(f"drover {' '.join(words)}: {said.decode(errors='replace')[-300:]}")
    return time.monotonic() - begun


SCENES: dict[Callable[[float, Take], Awaitable[None]], tuple[str, ...]] = {
    fleet: ("at_rest", "placement", "lists", "watches", "start"),
    clean: ("clean",),
    one_device: ("device",),
    in_flight: ("flat", "fail_over"),
    ended: ("ended",),
}
