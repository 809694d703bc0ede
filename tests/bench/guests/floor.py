"""The blackout of a quiet guest over loopback, STOP at the source to RESUME at the destination by QEMU's own stamps.

Turn and turn about, each move with fresh QEMUs: through both sessions with a real ZooKeeper, the stream opened by us or
(as it was before) by QEMU; and by plain QMP over a unix socket, parked before the switchover as ours is.

The packets of loopback are as large as a path's can be: there the end of a migration met Nagle's algorithm and delayed
acknowledgements (docs/adr/0032-the-agent-opens-the-stream.md).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

from agents.engine.base import EngineError, EngineEvent, HoldStart, OutgoingOptions, RunStateChanged, VmmSpec, stream_of
from agents.engine.base import EngineStatus as Status
from agents.engine.qemu.engine import QemuEngine
from agents.engine.qemu.vmm import QemuVmm
from agents.handover.destination import DestinationStage
from deploy.lab.workload import Workload, boot_of
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import GuestSpec
from orchestrator.ledger.zookeeper import ZooKeeperStore
from tests.bench.guests.registry import Asked, Figure, NotHere, Scene, at_least, at_most, beside, spread
from tests.contract.test_engine import image
from tests.fakes.attempt import Coming, Leaving, Moves
from tests.fakes.zookeeper import ZooKeeperServer, missing

LINK = 10_000 * 125_000
MEMORY_MIB = 64
QUIET = Workload(dirty_mib=2, dirty_pages_per_s=200, heartbeat_hz=100)
_BEATS_S = 0.3
"""A guest that has just started writes all its memory; then it is quiet."""
_NICENESS = -10
"""As an agent has it (agents/__main__.py)."""


@dataclass(frozen=True)
class Hosts:
    """Whose engines make the VMMs; where the destination's listens; what the link between them is said to carry."""

    source: QemuEngine
    destination: QemuEngine
    address: str = "127.0.0.1"
    link_bytes_per_s: int = LINK


class Pair:
    """One move's VMMs, in a directory of their own, and when their vCPUs stopped and ran."""

    def __init__(self, hosts: Hosts, directory: Path) -> None:
        self.hosts = hosts
        self.directory = directory
        self.vmms: list[QemuVmm] = []
        self._stamps: list[tuple[QemuVmm, bool, float]] = []

    def spec(self, guest: str, inc: str) -> VmmSpec:
        spec = GuestSpec("g", memory_mib=MEMORY_MIB, boot=boot_of(QUIET, seed=0))
        return VmmSpec(guest, inc, spec, self.directory, self.directory / f"{inc}.con", None, self.hosts.address)

    async def source(self, guest: str) -> QemuVmm:
        made = self._watched(await self.hosts.source.start(self.spec(guest, "s")))
        reader, writer = await asyncio.open_unix_connection(self.directory / "s.con")
        async with asyncio.timeout(20):
            await reader.readline()
        writer.close()
        await asyncio.sleep(_BEATS_S)
        return made

    async def destination(self, guest: str) -> QemuVmm:
        return self._watched(await self.hosts.destination.prepare_incoming(self.spec(guest, "d"), "m", 1))

    def _watched(self, vmm: QemuVmm) -> QemuVmm:
        def seen(event: EngineEvent) -> None:
            if isinstance(event, RunStateChanged):
                self._stamps.append((vmm, event.running, event.at_s))

        vmm.subscribe(seen)
        self.vmms.append(vmm)
        return vmm

    def blackout_ms(self) -> float:
        source, destination = self.vmms
        stopped = [at_s for vmm, running, at_s in self._stamps if vmm is source and not running]
        ran = [at_s for vmm, running, at_s in self._stamps if vmm is destination and running]
        return (ran[-1] - stopped[-1]) * 1000


@asynccontextmanager
async def pair(hosts: Hosts) -> AsyncIterator[Pair]:
    made = Pair(hosts, Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="bg-")))
    try:
        yield made
    finally:
        for vmm in made.vmms:
            with suppress(EngineError):
                await vmm.destroy()
        await asyncio.to_thread(shutil.rmtree, made.directory, True)


async def _connects(vmm: QemuVmm, destination: Endpoint, _: OutgoingOptions) -> None:
    """In place of the engine's own: QEMU makes the connection, as for several channels."""
    await vmm._execute("migrate", vmm._where(destination.ip, destination.port, "migrate"))


async def through_sessions(hosts: Hosts, store: ZooKeeperStore, *, qemu_connects: bool) -> float:
    """A whole attempt. Raises RuntimeError when the guest was not handed over."""
    moves = Moves(store=store)
    await moves.born()
    async with pair(hosts) as made:
        source = await made.source(moves.guest)
        if qemu_connects:
            source._migrate = MethodType(_connects, source)
        ref = await moves.opened()
        destination = await made.destination(moves.guest)
        options = OutgoingOptions(stream_of(destination.metadata), HoldStart.OPEN, 0, hosts.link_bytes_per_s, 300)
        there = Coming("d", destination)
        await moves.conducted(ref, Leaving(source), there, MigrationPolicy(), options, made.directory)
        if moves.destination.state.stage is not DestinationStage.ENDED_DONE:
            raise RuntimeError(f"the attempt ended {moves.source.state.stage}")
        return made.blackout_ms()


async def by_hand(hosts: Hosts) -> float:
    """The same order of QMP commands, with nothing between them."""
    async with pair(hosts) as made:
        source, destination = (
            await made.source("g"),
            made._watched(await hosts.destination._spawn(made.spec("g", "d"), "incoming", "m", 1)),
        )
        await destination.connect()
        socket = {"uri": f"unix:{made.directory / 'stream'}"}
        await source.set_capabilities({"events": True, "return-path": True, "pause-before-switchover": True})
        await destination.set_capabilities({"events": True, "return-path": True})
        await source._execute("migrate-set-parameters", {"max-bandwidth": LINK, "downtime-limit": 300})
        statuses = {vmm: _statuses(vmm) for vmm in (source, destination)}
        await destination._execute("migrate-incoming", socket)
        await source._execute("migrate", socket)
        async with asyncio.timeout(20):
            await statuses[source](Status.PARKED)
            await source._execute("migrate-continue", {"state": "pre-switchover"})
            await statuses[source](Status.COMPLETED)
            await statuses[destination](Status.COMPLETED)
            await destination._execute("cont")
            await asyncio.sleep(0.05)
        return made.blackout_ms()


def _statuses(vmm: QemuVmm) -> Callable[[Status], Awaitable[bool]]:
    """Something to await for each status, from now on."""
    reached = {status: asyncio.Event() for status in Status}

    def seen(event: EngineEvent) -> None:
        if (status := getattr(event, "status", None)) is not None:
            reached[status].set()

    vmm.subscribe(seen)
    return lambda status: reached[status].wait()


def median_difference(one: list[float], other: list[float]) -> float:
    """Round by round: what keeps the machine busy keeps both."""
    return statistics.median(a - b for a, b in zip(one, other, strict=True))


@asynccontextmanager
async def ledger() -> AsyncIterator[ZooKeeperStore]:
    """A ZooKeeper of its own. Raises NotHere."""
    if why := missing() or ("" if shutil.which("qemu-system-x86_64") else "there is no QEMU"):
        raise NotHere(why)
    directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="bz-"))
    server = ZooKeeperServer(directory / "server", heap_mib=256)
    try:
        await asyncio.to_thread(server.start)
        store = ZooKeeperStore(server.hosts, session_timeout_s=8)
        await store.start()
        try:
            yield store
        finally:
            await store.close()
    finally:
        server.kill()
        await asyncio.to_thread(shutil.rmtree, directory, True)


def go_before_guests() -> None:
    """As an agent does, where that is allowed."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)


async def rounds(hosts: Hosts, count: int, *, hand: bool) -> tuple[list[float], list[float], list[float]]:
    """Blackouts in ms: with QEMU connecting, as it is, and by hand (empty without `hand`)."""
    before, ours, by = [], [], []
    async with ledger() as store:
        await through_sessions(hosts, store, qemu_connects=False)  # the first one finds everything cold
        for _ in range(count):
            before.append(await through_sessions(hosts, store, qemu_connects=True))
            ours.append(await through_sessions(hosts, store, qemu_connects=False))
            if hand:
                by.append(await by_hand(hosts))
    return before, ours, by


async def floor(asked: Asked) -> list[Figure]:
    """100 rounds of the three, over loopback."""
    go_before_guests()
    engine = QemuEngine(image())
    before, ours, hand = await rounds(Hosts(engine, engine), asked.many(100), hand=True)
    name = f"blackout, quiet {MEMORY_MIB} MiB guest, loopback, median"
    return [
        beside(f"{name}: QEMU connects", statistics.median(before), "ms", spread(before)),
        beside(f"{name}: as it is", statistics.median(ours), "ms", spread(ours)),
        beside(f"{name}: by hand over a unix socket", statistics.median(hand), "ms", spread(hand)),
        at_least("QEMU connects minus as it is, median of the rounds", median_difference(before, ours), "ms", 10),
        at_most("as it is minus by hand, median of the rounds", median_difference(ours, hand), "ms", 8),
    ]


FIGURES = {"floor": Scene(floor, timeout_s=1_500)}
