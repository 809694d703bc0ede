"""`make soak MINUTES=20`: a cluster at work for as long as one likes, and what grew meanwhile; JSON in build/.

Migrations, evacuations, births and ends of guests, and a restart of every part in turn, without end. Memory,
descriptors and threads of each process, znodes, logs and journals are looked at all the while. A part that was
restarted begins anew: its slope is that of the stretches between the restarts, each without its beginning.

    python -m tests.bench.soak [--minutes 20] [--light] [--report FILE]

`--light`: light agents (tests/bench/fleet) in place of QEMU and network namespaces.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc.aio

from deploy.lab.cluster import teardown
from deploy.lab.cluster.layout import Layout
from deploy.lab.workload import Workload, boot_of
from orchestrator import wire
from orchestrator.core.records import GuestSpec
from orchestrator.rpc import channels
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1.orchestrator_pb2_grpc import OrchestratorServiceStub
from tests.bench.ending import ends_well
from tests.bench.fleet import fill, plane
from tests.bench.fleet.figures import ROOT, Figure, at_most, beside, write
from tests.bench.fleet.plane import Plane, is_actor, rss_of
from tests.bench.guard import guarded
from tests.fakes.cluster import Cluster, make_config, running_cluster, short_directory
from tests.fakes.zookeeper import metrics_of

MIB_PER_H = 1.0
"""Of memory: what a part may grow in an hour, after it has warmed up."""
_SIDE_BY_SIDE = 6
_CALL_S = 10.0
_END_S = 120.0
_LOOK_S = 0.25
_OVER = ("SUCCEEDED", "FAILED", "CANCELLED")
PARTS = ("agent", "api", "worker", "coordinator", "ray", "zookeeper")
"""What is restarted, in this order."""


class Ground(Protocol):
    """What the soak happens on."""

    api: str
    layout: Layout
    hosts: tuple[str, ...]

    def roles(self) -> Iterator[tuple[str, int]]: ...

    def metrics(self) -> dict[str, str]:
        """ZooKeeper's. Raises ConnectionError."""
        ...

    async def restart(self, part: str) -> None: ...


class LightGround:
    def __init__(self, on: Plane, hosts: int) -> None:
        self._plane = on
        self.api = f"unix:{on.layout.api_socket}"
        self.layout = on.layout
        self.hosts = tuple(fill.host_name(number) for number in range(hosts))

    def roles(self) -> Iterator[tuple[str, int]]:
        return self._plane.roles()

    def metrics(self) -> dict[str, str]:
        return self._plane.zookeeper.metrics()

    async def restart(self, part: str) -> None:
        match part:
            case "agent":
                for one in self._plane.agents:
                    await one.tell(f"restart {random.choice(one.hosts)}")
            case "zookeeper":
                self._plane.zookeeper.kill()
                await asyncio.to_thread(self._plane.zookeeper.start)
            case "api":
                self._plane.running["api"].terminate()
            case "ray":
                await self._plane.kill_ray()
            case _:
                _kill_actor(self.layout, part)


class RealGround:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.api = cluster.api
        self.layout = cluster.layout
        self.hosts = tuple(place.name for place in cluster.places.hosts)

    def roles(self) -> Iterator[tuple[str, int]]:
        for part in self._cluster.status().parts:
            if part.pid is not None and part.kind != "ray":
                yield ("agents" if part.kind == "agent" else part.kind), part.pid
        for identity in teardown.find_ray(self.layout):
            yield ("coordinator" if is_actor(identity.pid) else "ray"), identity.pid

    def metrics(self) -> dict[str, str]:
        places = self._cluster.places
        address, port = places.zookeepers[0].address, places.zookeeper_port
        return self._cluster.inside(lambda: metrics_of(address, port))

    async def restart(self, part: str) -> None:
        match part:
            case "agent":
                await asyncio.to_thread(self._cluster.kill, f"agent-{random.choice(self.hosts)}")
            case "worker" | "coordinator":
                _kill_actor(self.layout, part)
            case _:
                await asyncio.to_thread(self._cluster.kill, part)


def _kill_actor(layout: Layout, part: str) -> None:
    title = b"ray::MigrationWorker" if part == "worker" else b"ray::Coordinator"
    for identity in teardown.find_ray(layout):
        with contextlib.suppress(OSError):
            if title in Path(f"/proc/{identity.pid}/cmdline").read_bytes():
                os.kill(identity.pid, signal.SIGKILL)
                return


# --- the work ---------------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What is asked of the cluster; whatever is refused or gets lost with a part is counted, and asked again."""

    ground: Ground
    guests: list[str]
    boot: Callable[[str], GuestSpec]
    counts: Counter[str] = field(default_factory=Counter[str])
    over: bool = False

    def __post_init__(self) -> None:
        self._channel = channels.aio_channel(self.ground.api)
        self._api: Any = OrchestratorServiceStub(self._channel)
        self._busy: set[str] = set()

    async def close(self) -> None:
        await self._channel.close()

    async def for_ever(self, what: str, work: Callable[[], Awaitable[None]], every_s: float) -> None:
        while not self.over:
            try:
                await work()
            except (grpc.aio.AioRpcError, ConnectionError, TimeoutError) as error:
                code = error.code().name if isinstance(error, grpc.aio.AioRpcError) else type(error).__name__
                self.counts[f"{what}: {code}"] += 1
            await asyncio.sleep(every_s)

    async def migrate(self) -> None:
        free = [guest for guest in self.guests if guest not in self._busy]
        if not free:
            return
        guest = random.choice(free)
        self._busy.add(guest)
        try:
            request = pb.CreateMigrationRequest(request_id=str(uuid.uuid4()), guest=guest)
            made = await self._api.CreateMigration(request, timeout=_CALL_S)
            ended = await self._until_over(
                lambda: self._api.GetMigration(pb.GetMigrationRequest(name=made.name), timeout=_CALL_S)
            )
            self.counts[f"migrations {wire.word(ended, 'phase')}"] += 1
            self.counts["attempts"] += ended.attempt
        finally:
            self._busy.discard(guest)

    async def evacuate(self) -> None:
        host = random.choice(self.ground.hosts)
        request = pb.CreateEvacuationRequest(request_id=str(uuid.uuid4()), host=host)
        try:
            made = (await self._api.CreateEvacuation(request, timeout=_CALL_S)).evacuation
            ended = await self._until_over(
                lambda: self._api.GetEvacuation(pb.GetEvacuationRequest(name=made.name), timeout=_CALL_S)
            )
            self.counts[f"evacuations {wire.word(ended, 'phase')}"] += 1
        finally:
            # What it raises must not take the place of what ended the evacuation: that may be the end of the soak.
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self._api.UncordonHost(pb.UncordonHostRequest(name=host), timeout=_CALL_S, wait_for_ready=True)

    async def be_born_and_end(self) -> None:
        name = f"s{uuid.uuid4().hex[:8]}"
        spec = wire.guest_spec_to_proto(self.boot(name))
        await self._api.CreateGuest(pb.CreateGuestRequest(request_id=str(uuid.uuid4()), spec=spec), timeout=60.0)
        self.counts["guests born"] += 1
        await asyncio.sleep(2.0)
        await self._api.StopGuest(pb.StopGuestRequest(name=name), timeout=60.0)
        self.counts["guests ended"] += 1

    async def _until_over(self, read: Callable[[], Awaitable[Any]]) -> Any:
        async with asyncio.timeout(_END_S):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    found = await read()
                    if wire.word(found, "phase") in _OVER:
                        return found
                await asyncio.sleep(_LOOK_S)

    async def missing(self) -> list[str]:
        """Guests that should be there and are not, once nothing is asked any more."""
        found = await self._api.ListGuests(pb.ListGuestsRequest(), timeout=30.0, wait_for_ready=True)
        return sorted(set(self.guests) - {guest.name for guest in found.guests})


# --- what is looked at ------------------------------------------------------------------------------------------------

Point = tuple[float, float]


@dataclass
class Series:
    """One quantity of one role, process by process."""

    unit: str
    points: dict[int, list[Point]] = field(default_factory=lambda: defaultdict(list))

    def slope_per_h(self, warm_s: float) -> float | None:
        """Of all stretches together, each about its own mean and without its first `warm_s`. None: too short."""
        across = along = 0.0
        for points in self.points.values():
            rest = [point for point in points if point[0] >= points[0][0] + warm_s]
            if len(rest) < 4:
                continue
            mean_x, mean_y = (sum(values) / len(rest) for values in zip(*rest, strict=True))
            across += sum((x - mean_x) * (y - mean_y) for x, y in rest)
            along += sum((x - mean_x) ** 2 for x, _ in rest)
        return across / along * 3600 if along else None

    @property
    def last(self) -> float:
        """Of the processes that were looked at last."""
        newest = max(points[-1][0] for points in self.points.values())
        return sum(points[-1][1] for points in self.points.values() if points[-1][0] == newest)


class Watch:
    """Looks at everything that may grow."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._began = time.monotonic()
        self.series: dict[str, Series] = {}

    def look(self) -> None:
        at_s = time.monotonic() - self._began
        for role, pid in self._ground.roles():
            if role == "asking":
                continue
            self._note(f"{role}: RSS", "MiB", pid, at_s, rss_of(pid))
            self._note(f"{role}: descriptors", "", pid, at_s, _entries(pid, "fd"))
            self._note(f"{role}: threads", "", pid, at_s, _entries(pid, "task"))
        with contextlib.suppress(ConnectionError):
            found = self._ground.metrics()
            for name, what in (
                ("znode_count", "znodes"),
                ("watch_count", "watches"),
                ("num_alive_connections", "sessions"),
            ):
                self._note(f"ledger: {what}", "", 0, at_s, float(found.get(f"zk_{name}", 0)))
            self._note("ledger: data", "MiB", 0, at_s, float(found.get("zk_approximate_data_size", 0)) / (1 << 20))
        for what, mib in _sizes(self._ground.layout.dir).items():
            self._note(what, "MiB", 0, at_s, mib)

    def _note(self, name: str, unit: str, pid: int, at_s: float, value: float) -> None:
        if value:
            self.series.setdefault(name, Series(unit)).points[pid].append((at_s, value))


def _entries(pid: int, what: str) -> int:
    with contextlib.suppress(OSError):
        return sum(1 for _ in Path(f"/proc/{pid}/{what}").iterdir())
    return 0


def _sizes(directory: Path) -> dict[str, float]:
    """MiB of files that may grow, by what they are."""
    found: dict[str, float] = {}
    for folder, _, names in os.walk(directory):
        inside = Path(folder).relative_to(directory).parts
        if "journal" in inside:
            what = "files: journals"
        elif inside and inside[0].startswith(("zk", "zookeeper")):
            what = "files: ZooKeeper's"
        elif inside and inside[0].startswith("ray"):
            what = "files: Ray's"
        elif inside and inside[0] == "logs":
            what = "files: logs"
        else:
            what = "files: others"
        for name in names:
            with contextlib.suppress(OSError):
                found[what] = found.get(what, 0.0) + Path(folder, name).lstat().st_size / (1 << 20)
    return found


def figures_of(watch: Watch, warm_s: float, migrations: int, seconds: float) -> list[Figure]:
    """Slopes, the steepest first among those of one unit; memory of the parts beside its target."""
    found: list[Figure] = []
    for name, series in sorted(watch.series.items()):
        slope = series.slope_per_h(warm_s)
        if slope is None:
            continue
        each = f", {slope * seconds / 3600 / migrations * 1024:+.2f} KiB per migration" if migrations else ""
        note = f"{series.last:.1f} {series.unit} at the end".replace("  ", " ") + (each if series.unit else "")
        unit = f"{series.unit or '1'}/h"
        if name in ("agents: RSS", "api: RSS", "coordinator: RSS"):
            found.append(at_most(name, slope, unit, MIB_PER_H, note))
        else:
            found.append(beside(name, slope, unit, note))
    return found


# --- both together ----------------------------------------------------------------------------------------------------


async def soak(
    ground: Ground, guests: Sequence[str], boot: Callable[[str], GuestSpec], seconds: float
) -> dict[str, Any]:
    """Work for so long. `figures` and `counts` of the report."""
    work, watch = Work(ground, list(guests), boot), Watch(ground)
    every_s = min(150.0, max(5.0, seconds / 12))
    parts = itertools.cycle(PARTS)

    async def restart() -> None:
        await asyncio.sleep(every_s)
        part = next(parts)
        await ground.restart(part)
        work.counts[f"restarts of {part}"] += 1

    async def look() -> None:
        await asyncio.to_thread(watch.look)

    jobs = [
        *(("migration", work.migrate, 0.05) for _ in range(_SIDE_BY_SIDE)),
        ("evacuation", work.evacuate, 2.0),
        ("guest", work.be_born_and_end, 1.0),
        ("restart", restart, 0.0),
        ("look", look, min(5.0, max(0.5, seconds / 240))),
    ]
    tasks = [asyncio.create_task(work.for_ever(*job)) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        work.over = True
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=4 * _CALL_S)
    try:
        await asyncio.sleep(min(10.0, seconds / 4))
        missing = await work.missing()
    finally:
        await work.close()
    moved = work.counts["migrations SUCCEEDED"]
    warm_s = min(120.0, seconds / 10)
    return {
        "figures": figures_of(watch, warm_s, moved, seconds),
        "counts": dict(sorted(work.counts.items())),
        "missing": missing,
        "warm_up_s": warm_s,
    }


@contextlib.asynccontextmanager
async def light_ground(hosts: int, guests: int) -> AsyncGenerator[LightGround]:
    """With its guests, named as `fill` names them."""
    async with plane.running() as on:
        await fill.fill_guests(on.store, hosts, guests)
        await on.start_agents(hosts, guests)
        await on.tell_agents("precopy 0.2")
        await on.start_control()
        yield LightGround(on, hosts)


async def _light(seconds: float) -> dict[str, Any]:
    hosts, guests = 6, 60
    ends_well()
    async with light_ground(hosts, guests) as ground:
        names = [fill.guest_name(number) for number in range(guests)]
        return await soak(ground, names, lambda name: GuestSpec(name, memory_mib=fill.MEMORY_MIB), seconds)


async def _real(seconds: float) -> dict[str, Any]:
    ends_well()
    quiet = Workload(dirty_mib=1, dirty_pages_per_s=50, heartbeat_hz=20)
    directory = short_directory()

    def boot(name: str) -> GuestSpec:
        return GuestSpec(name, memory_mib=32, boot=boot_of(quiet))

    try:
        with guarded(directory), running_cluster(make_config(directory, hosts=3, bandwidth="10gbit")) as cluster:
            ground = RealGround(cluster)
            names = [f"g{number}" for number in range(8)]
            channel = channels.aio_channel(ground.api)
            stub: Any = OrchestratorServiceStub(channel)
            for name in names:
                await stub.CreateGuest(pb.CreateGuestRequest(spec=wire.guest_spec_to_proto(boot(name))), timeout=60.0)
            await channel.close()
            return await soak(ground, names, boot, seconds)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--light", action="store_true", help="light agents in place of QEMU and namespaces")
    parser.add_argument("--report", type=Path, default=ROOT / "build" / "soak.json")
    asked = parser.parse_args()
    seconds = asked.minutes * 60
    if asked.light:
        plane.isolate()
    report = asyncio.run(_light(seconds) if asked.light else _real(seconds))
    for what, count in report["counts"].items():
        print(f"{count:8} {what}")
    print(f"guests that are missing: {', '.join(report['missing']) or 'none'}")
    figures = report.pop("figures")
    write(asked.report, figures, minutes=asked.minutes, light=asked.light, **report)
    grew = [one for one in figures if one.value is not None and one.value > 0 and one.met is not True]
    print("what grew:", json.dumps([asdict(one)["name"] for one in grew]) if grew else "nothing")


if __name__ == "__main__":
    main()
