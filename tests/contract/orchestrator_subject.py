"""What the contract of OrchestratorService is proved on: the fake that the CLI is tested with, and the real API.

Both are asked through the real client over gRPC. Behind the real API stand a ledger in memory, fake agents and, where a
migration or an evacuation has to go on, the coordinator's production driver; behind the fake the test sets what came of
it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from orchestrator import wire, wire_attempts, wire_hardware
from orchestrator.coordinator.evacuations import EvacuationRunner
from orchestrator.coordinator.worker import Worker
from orchestrator.core.agent import AgentStatus, CopyStatus, GuestTrouble, Trouble, VmmExamined
from orchestrator.core.errors import AbortReason, DroverError, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import (
    AttemptReport,
    Attempts,
    DeviceSpec,
    GuestSpec,
    HostFeature,
    HostRecord,
    Leader,
    Pool,
    Quarantined,
    QuarantineList,
    ShimKind,
)
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import SetData, Versioned
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from tests.fakes.agent import FakeConsole
from tests.fakes.api import ApiCluster, Calling, api_cluster, until
from tests.fakes.coordination import World
from tests.fakes.orchestrator_service import FakeOrchestrator, host, serve

P = ParamSpec("P")
T = TypeVar("T")
R = RefusalReason
QUICK = MigrationPolicy(backoff_initial_ms=1, backoff_max_ms=2, max_attempts=1)
WEB = GuestSpec("web", devices=(DeviceSpec("nic", ShimKind.COMPANION), DeviceSpec("eth", ShimKind.NET)), policy=QUICK)


class Subject(Calling, ABC):
    """One API with hosts h1, h2 and h3 of 1 GiB, a client of it, and what the rest of Drover does behind it."""

    def __init__(self, client: OrchestratorClient) -> None:
        self.client = client

    @abstractmethod
    async def host(self, name: str, memory_mib: int = 1024, *, live: bool = True) -> None: ...

    @abstractmethod
    async def says(
        self, host: str, *copies: CopyStatus, troubles: Sequence[GuestTrouble] = (), complete: bool = True
    ) -> None:
        """What the agent of the host has from now on."""

    @abstractmethod
    async def pool(self, host: str, pool: Pool, *images: types.Image) -> None:
        """The host has a pool with these images. Its other pools stay."""

    @abstractmethod
    async def by_hand(self, host: str, pid: int, found: VmmExamined | DroverError) -> None:
        """Somebody has started a VMM there; what an examination of it comes to."""

    @abstractmethod
    async def says_on_console(self, guest: types.Guest, data: bytes) -> None:
        """As soon as a session hears it, the guest says this where it is."""

    @abstractmethod
    def typed(self, guest: types.Guest) -> bytes:
        """On the console of the guest where it is."""

    @abstractmethod
    async def loses(self, guest: types.Guest) -> None:
        """The ledger loses all that it has of the guest, whose agent says so."""

    @abstractmethod
    async def falls_silent(self, host: str) -> None:
        """The agent of the host answers nobody any more."""

    @abstractmethod
    def wishes_get(self, how_far: str) -> None:
        """How far the wishes of guests on h1 get from now on."""

    @abstractmethod
    async def begin(self, migration: str) -> None:
        """Its first attempt is under way, towards the only host or the best one."""

    @abstractmethod
    async def end(self, migration: str, *, failed: bool = False) -> None:
        """It comes to its end: the guest is moved unless it `failed` or was cancelled."""

    @abstractmethod
    async def report(self, migration: str, report: AttemptReport) -> None:
        """One more attempt has ended."""

    @abstractmethod
    def leads(self, name: str) -> None:
        """The coordinator of this name; empty: none does."""

    @abstractmethod
    def quarantines(self, resource: str, reason: str, since_s: float) -> None:
        """The leader sets this aside, and three others that it does not list."""

    @abstractmethod
    async def empty(self, evacuation: str) -> None:
        """The evacuation comes to its end, with every guest moved unless it was cancelled."""


def _copies(guest: types.Guest) -> list[CopyStatus]:
    return [CopyStatus(guest.uuid, guest.name, "i", guest.spec.memory_mib, 4711)]


def _no_record(guest: types.Guest) -> GuestTrouble:
    return GuestTrouble(guest.uuid, guest.name, Trouble.NO_RECORD, "the ledger has lost its record")


class Real(Subject):
    """The coordinator's part is played by its own driver."""

    def __init__(self, cluster: ApiCluster, world: World) -> None:
        super().__init__(cluster.client)
        self.cluster = cluster
        self.world = world
        self.driving: dict[str, asyncio.Task[None]] = {}

    async def host(self, name: str, memory_mib: int = 1024, *, live: bool = True) -> None:
        await self.cluster.host(name, memory_mib, live=live)

    async def says(
        self, host: str, *copies: CopyStatus, troubles: Sequence[GuestTrouble] = (), complete: bool = True
    ) -> None:
        agent = self.cluster.agents[host]
        agent.copies, agent.troubles, agent.complete = list(copies), list(troubles), complete

    async def pool(self, host: str, pool: Pool, *images: types.Image) -> None:
        self.cluster.agents[host].images[pool.name] = {each.name: each for each in images}
        node = await self.world.store.read(paths.host(host))
        assert node is not None
        record = decode(HostRecord, node.data)
        record = replace(record, pools=(*record.pools, pool), features=tuple(HostFeature))
        await self.world.store.multi([SetData(paths.host(host), encode(record), node.version)])

    async def by_hand(self, host: str, pid: int, found: VmmExamined | DroverError) -> None:
        self.cluster.agents[host].vmms[pid] = found

    def _console(self, guest: types.Guest) -> FakeConsole:
        record = self.world.record(guest.uuid)
        agent, moved = self.cluster.agents[record.owner.host], (guest.uuid, record.inc)
        return agent.consoles[moved] if moved in agent.consoles else agent.console(guest.uuid)

    async def says_on_console(self, guest: types.Guest, data: bytes) -> None:
        await until(lambda: bool(self._console(guest).sessions))
        self._console(guest).say(data)

    def typed(self, guest: types.Guest) -> bytes:
        return bytes(self._console(guest).typed)

    async def loses(self, guest: types.Guest) -> None:
        uuid = guest.uuid
        for path in (paths.want_run(uuid), paths.guest_spec(uuid), paths.guest(uuid), paths.name(guest.name)):
            self.world.store.tree.nodes.pop(path, None)
        self.cluster.agents[guest.host].lost[uuid] = wire.guest_spec_from_proto(guest.spec)
        await self.says(guest.host, *_copies(guest), troubles=[_no_record(guest)])

    async def falls_silent(self, host: str) -> None:
        self.cluster.agents[host].delays_s["GetAgent"] = 60

    def wishes_get(self, how_far: str) -> None:
        agent = self.cluster.agents["h1"]
        agent.queue_wishes = how_far == "QUEUED"
        if how_far == "RECORDED":
            agent.refusals["ApplyWantRun"] = DroverError(R.AGENT_UNREACHABLE, "no answer")

    async def _drive(self, migration: str) -> None:
        worker = Worker(self.world.store, self.world)
        async with asyncio.timeout(10):
            await worker.drive(migration, 0)

    async def begin(self, migration: str) -> None:
        guest = (await self.call(self.client.get_migration, migration)).guest_uuid
        self.world.hold = asyncio.Event()
        self.driving[migration] = asyncio.create_task(self._drive(migration))
        await until(lambda: self.world.record(guest).phase is Ownership.OPEN and self.world.record(guest).inc != "")

    async def end(self, migration: str, *, failed: bool = False) -> None:
        self.world.ends = [AbortReason.ACK_TIMEOUT if failed else None]
        if self.world.hold is not None:
            self.world.hold.set()
        await (self.driving.pop(migration, None) or self._drive(migration))

    async def report(self, migration: str, report: AttemptReport) -> None:
        self.world.put(paths.attempts(migration), Attempts((report,)))

    def leads(self, name: str) -> None:
        self.world.store.tree.nodes.pop(paths.leader(), None)
        if name:
            self.world.put(paths.leader(), Leader(name, "id"))

    def quarantines(self, resource: str, reason: str, since_s: float) -> None:
        self.world.put(paths.quarantine(), QuarantineList((Quarantined(resource, reason, since_s),), left_out=3))

    async def empty(self, evacuation: str) -> None:
        store, agents = self.world.store, self.cluster.server.tools.agents
        runner = EvacuationRunner(store, Index(store), 0, asyncio.Event(), agents)
        async with asyncio.timeout(10):
            while not await runner.turn(evacuation):
                names = [guest.migration for guest in self.world.job(evacuation).guests if guest.migration]
                await asyncio.gather(*(self._drive(name) for name in names))


class Fake(Subject):
    """The test sets what came of it; what ends a watch is set last."""

    def __init__(self, client: OrchestratorClient, service: FakeOrchestrator) -> None:
        super().__init__(client)
        self.service = service

    async def host(self, name: str, memory_mib: int = 1024, *, live: bool = True) -> None:
        state = types.HOST_STATE_LIVE if live else types.HOST_STATE_SILENT
        self.service.hosts[name] = host(
            name, state=state, memory_mib=memory_mib, memory_used_mib=0, machine_types=["pc"]
        )

    async def says(
        self, host: str, *copies: CopyStatus, troubles: Sequence[GuestTrouble] = (), complete: bool = True
    ) -> None:
        ref = HostRef(host, f"boot-{host}")
        self.service.agents[host] = AgentStatus(ref, 0, copies=copies, complete=complete, troubles=tuple(troubles))

    async def pool(self, host: str, pool: Pool, *images: types.Image) -> None:
        self.service.hosts[host].pools.append(wire_hardware.pool_to_proto(pool))
        self.service.images |= {(pool.name, host, each.name): each for each in images}

    async def by_hand(self, host: str, pid: int, found: VmmExamined | DroverError) -> None:
        self.service.vmms[host, pid] = found

    async def says_on_console(self, guest: types.Guest, data: bytes) -> None:
        await until(lambda: bool(self.service.listening.get(guest.name)))
        for said in self.service.listening[guest.name]:
            self.service.loop.call_soon_threadsafe(said.put_nowait, data)

    def typed(self, guest: types.Guest) -> bytes:
        return bytes(self.service.typed.get(guest.name, b""))

    async def loses(self, guest: types.Guest) -> None:
        self.service.lost[guest.name] = self.service.guests.pop(guest.name)
        await self.says(guest.host, *_copies(guest), troubles=[_no_record(guest)])

    async def falls_silent(self, host: str) -> None:
        self.service.agents[host] = DroverError(R.OUTCOME_UNKNOWN, "no answer in time")

    def wishes_get(self, how_far: str) -> None:
        self.service.wish = pb.WishState.Value(f"WISH_STATE_{how_far}")

    async def begin(self, migration: str) -> None:
        moving = self.service.migrations[migration]
        moving.destination, moving.attempt = moving.destination or "h2", 1
        guest = self.service.guests[moving.guest]
        guest.ownership, guest.migration = types.OWNERSHIP_PHASE_OPEN, migration
        moving.phase = types.MIGRATION_PHASE_PRECOPY

    async def end(self, migration: str, *, failed: bool = False) -> None:
        moving = self.service.migrations[migration]
        guest = self.service.guests.get(moving.guest)
        if guest is None or guest.uuid != moving.guest_uuid:
            moving.failure, moving.phase = "GUEST_GONE", types.MIGRATION_PHASE_FAILED
            moving.end_time.GetCurrentTime()
            return
        guest.ownership, guest.migration = types.OWNERSHIP_PHASE_IDLE, ""
        if moving.phase == types.MIGRATION_PHASE_CANCELLED:
            return
        moving.end_time.GetCurrentTime()
        if failed:
            moving.failure, moving.phase = "ATTEMPTS_EXHAUSTED", types.MIGRATION_PHASE_FAILED
        else:
            self.service.process_ends(guest)
            guest.host = moving.destination = moving.destination or "h2"
            moving.phase = types.MIGRATION_PHASE_SUCCEEDED

    async def report(self, migration: str, report: AttemptReport) -> None:
        self.service.migrations[migration].attempts.append(wire_attempts.report_to_proto(report))

    def leads(self, name: str) -> None:
        self.service.health.leader = name

    def quarantines(self, resource: str, reason: str, since_s: float) -> None:
        self.service.health.quarantined.add(resource=resource, reason=reason, since=wire.timestamp(since_s))
        self.service.health.quarantined_left_out = 3

    async def empty(self, evacuation: str) -> None:
        job = self.service.evacuations[evacuation]
        job.end_time.GetCurrentTime()
        job.safe_to_power_off = not job.cancel_requested
        job.phase = types.EVACUATION_PHASE_CANCELLED if job.cancel_requested else types.EVACUATION_PHASE_SUCCEEDED


@asynccontextmanager
async def subject(kind: str, directory: Path, *, instructions: bool = True) -> AsyncIterator[Subject]:
    async with AsyncExitStack() as stack:
        if kind == "fake":
            service = FakeOrchestrator(instructions=instructions)
            address = stack.enter_context(serve(service, f"unix:{directory}/api.sock"))
            made: Subject = Fake(stack.enter_context(OrchestratorClient(address, timeout_s=5)), service)
            for name in ("h1", "h2", "h3"):
                await made.host(name)
        else:
            world = World()
            world.store.tree.nodes[paths.epoch()] = Versioned(b"", 0, 0)
            stack.push_async_callback(world.close)
            cluster = await stack.enter_async_context(api_cluster(world.store, directory, instructions=instructions))
            made = Real(cluster, world)
        yield made


def phase(resource: types.Migration | types.Evacuation) -> str:
    return wire.word(resource, "phase")


async def everything(api: Subject) -> list[list[Any]]:
    client = api.client
    return [
        await api.call(client.list_hosts),
        await api.call(client.list_guests),
        await api.call(client.list_migrations),
        await api.call(client.list_evacuations),
    ]
