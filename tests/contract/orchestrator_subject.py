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

from orchestrator import wire
from orchestrator.coordinator.evacuations import EvacuationRunner
from orchestrator.coordinator.worker import Worker
from orchestrator.core.agent import AgentStatus, CopyStatus, GuestTrouble, Trouble
from orchestrator.core.errors import AbortReason, DroverError, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.images import ImageImport
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import (
    AttemptReport,
    Attempts,
    DeviceSpec,
    DiskFormat,
    DiskSpec,
    GuestSpec,
    HostFeature,
    HostRecord,
    Leader,
    Pool,
    PoolKind,
    Quarantined,
    QuarantineList,
    ShimKind,
)
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import SetData, Versioned
from orchestrator.rpc.channels import channel
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from protos.drover.v1.orchestrator_pb2_grpc import OrchestratorServiceStub
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
        self.service.hosts[host].pools.append(wire.pool_to_proto(pool))
        self.service.images |= {(pool.name, host, each.name): each for each in images}

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
        guest = self.service.guests[moving.guest]
        guest.ownership, guest.migration = types.OWNERSHIP_PHASE_IDLE, ""
        if moving.phase == types.MIGRATION_PHASE_CANCELLED:
            return
        moving.end_time.GetCurrentTime()
        if failed:
            moving.failure, moving.phase = "ATTEMPTS_EXHAUSTED", types.MIGRATION_PHASE_FAILED
        else:
            guest.host = moving.destination = moving.destination or "h2"
            moving.phase = types.MIGRATION_PHASE_SUCCEEDED

    async def report(self, migration: str, report: AttemptReport) -> None:
        self.service.migrations[migration].attempts.append(wire.report_to_proto(report))

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


# --- again ------------------------------------------------------------------------------------------------------------


async def test_a_guest_that_is_kept_starts_again_as_itself(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    kept = await api.call(client.stop_and_keep_guest, "web")
    assert (wire.word(kept, "ownership"), wire.word(kept, "run_state")) == ("STOPPED", "ENDED")
    assert await api.call(client.stop_and_keep_guest, "web") == kept
    assert "kept" in (await api.call(client.get_guest, "web")).message
    assert (await api.refused(client.create_guest, WEB, "h2")).reason is R.ALREADY_EXISTS, "its name is its own"
    assert (await api.refused(client.create_migration, "web")).reason is R.GUEST_NOT_RUNNING

    again = await api.call(client.start_guest_again, "web")
    assert (again.uuid, again.host, again.want_run) == (web.uuid, web.host, True)
    assert (wire.word(again, "ownership"), wire.word(again, "run_state")) == ("IDLE", "RUNNING")
    assert (await api.call(client.start_guest_again, "web")).uuid == web.uuid, "a second start is no error"
    assert [each.name for each in await api.call(client.list_guests)] == ["web"]


async def test_a_guest_that_is_kept_can_be_ended_for_good(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.call(client.stop_and_keep_guest, "web")
    await api.call(client.stop_guest, "web")
    assert not await api.call(client.list_guests)
    for call in (client.start_guest_again, client.stop_and_keep_guest):
        assert (await api.refused(call, web.uuid)).reason is R.GUEST_NOT_RUNNING
    assert (await api.refused(client.start_guest_again, "web")).reason is R.NOT_FOUND


async def test_what_is_kept_takes_no_memory_and_needs_some_to_start(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.call(client.stop_and_keep_guest, "web")
    await api.call(client.create_guest, GuestSpec("big", memory_mib=1024), "h1")
    assert (await api.refused(client.start_guest_again, "web")).reason is R.NO_CAPACITY
    assert wire.word(await api.call(client.get_guest, "web"), "ownership") == "STOPPED"
    await api.call(client.stop_guest, "big")
    await api.call(client.cordon_host, "h1")
    assert (await api.refused(client.start_guest_again, "web")).reason is R.HOST_CORDONED
    await api.call(client.uncordon_host, "h1")
    await api.call(client.start_guest_again, "web")


# --- images -----------------------------------------------------------------------------------------------------------

FAST, SHARED = Pool("fast", PoolKind.LOCAL), Pool("shared", PoolKind.SHARED_FILE)


def an_image(name: str, pool: str, host: str) -> types.Image:
    return types.Image(name=name, pool=pool, host=host, format=types.DISK_FORMAT_RAW, size_bytes=1024, used_bytes=512)


def places_of(images: Sequence[types.Image]) -> list[tuple[str, str, str]]:
    return [(each.pool, each.host, each.name) for each in images]


async def test_images_come_by_pool_host_and_name_and_those_of_a_shared_pool_once(
    api: Subject, client: OrchestratorClient
) -> None:
    for where in ("h1", "h2"):
        await api.pool(where, FAST, an_image("b", "fast", where), an_image("a", "fast", where))
        await api.pool(where, SHARED, an_image("base", "shared", where))
    found = await api.call(client.list_images)
    all_of_them = [("fast", "h1", "a"), ("fast", "h1", "b"), ("fast", "h2", "a"), ("fast", "h2", "b")]
    assert places_of(found) == [*all_of_them, ("shared", "h1", "base")]
    assert places_of(await api.call(client.list_images, "h2")) == [*all_of_them[2:], ("shared", "h2", "base")]
    assert places_of(await api.call(client.list_images, pool="shared")) == [("shared", "h1", "base")]
    assert places_of(await api.call(client.list_images, limit=3)) == all_of_them[:3]
    assert (await api.refused(client.list_images, "h9")).reason is R.NOT_FOUND
    assert (await api.refused(client.list_images, pool="other")).reason is R.NOT_FOUND
    assert (await api.refused(client.list_images, "H 1", "..")).reason is R.INVALID_ARGUMENT


async def test_pages_of_images_leave_nothing_out(api: Subject, client: OrchestratorClient, kind: str) -> None:
    for where in ("h1", "h2", "h3"):
        await api.pool(where, FAST, *(an_image(f"i{number}", "fast", where) for number in range(4)))
    stub = OrchestratorServiceStub(channel(client.address))
    request, seen = pb.ListImagesRequest(page_size=3), list[types.Image]()
    for _ in range(20):
        answer = await asyncio.to_thread(stub.ListImages, request, timeout=5)
        assert len(answer.images) <= 3
        seen += answer.images
        request.page_token = answer.next_page_token
        if not request.page_token:
            break
    assert places_of(seen) == [("fast", where, f"i{number}") for where in ("h1", "h2", "h3") for number in range(4)]


async def test_an_image_says_which_guests_have_disks_of_it(api: Subject, client: OrchestratorClient) -> None:
    for where in ("h1", "h2"):
        await api.pool(where, FAST, an_image("data", "fast", where))
        await api.pool(where, SHARED, an_image("data", "shared", where))
    for name, where in (("one", "h1"), ("two", "h2")):
        disks = tuple(DiskSpec(pool.name, pool.name, "data", DiskFormat.RAW) for pool in (FAST, SHARED))
        await api.call(client.create_guest, GuestSpec(name, disks=disks), where)
    found = {(each.pool, each.host): list(each.guests) for each in await api.call(client.list_images)}
    assert found == {("fast", "h1"): ["one"], ("fast", "h2"): ["two"], ("shared", "h1"): ["one", "two"]}


async def test_an_image_is_brought_in_whole_or_not_at_all(api: Subject, client: OrchestratorClient) -> None:
    for where in ("h1", "h2"):
        await api.pool(where, FAST)
        await api.pool(where, SHARED)
    content = bytes(range(256)) * 2048
    image = ImageImport("new.raw", "fast", DiskFormat.RAW, len(content))
    made = await api.call(client.import_image, image, [content[:9], content[9:]], "h2")
    assert (made.pool, made.host, made.name, made.size_bytes) == ("fast", "h2", "new.raw", len(content))
    assert places_of(await api.call(client.list_images)) == [("fast", "h2", "new.raw")]

    again = await api.refused(client.import_image, image, [content], "h2")
    assert again.reason is R.ALREADY_EXISTS
    nowhere = await api.refused(client.import_image, image, [content])
    assert (nowhere.reason, nowhere.field) == (R.INVALID_ARGUMENT, "image.host")
    short = await api.refused(client.import_image, replace(image, name="short"), [content[:512]], "h1")
    assert short.reason is R.INVALID_ARGUMENT
    other = await api.refused(
        client.import_image, replace(image, name="other", format=DiskFormat.QCOW2), [content], "h1"
    )
    assert other.reason is R.INVALID_ARGUMENT
    for wrong in (replace(image, name="../x"), replace(image, name="x.moved-00000000"), replace(image, size_bytes=0)):
        assert (await api.refused(client.import_image, wrong, [content], "h1")).reason is R.INVALID_ARGUMENT
    assert (
        await api.refused(client.import_image, replace(image, pool="no"), [content], "h1")
    ).reason is R.POOL_NOT_FOUND
    assert (await api.refused(client.import_image, image, [content], "h9")).reason is R.NOT_FOUND

    anywhere = await api.call(client.import_image, replace(image, pool="shared"), [content])
    assert anywhere.pool == "shared"
    assert len(await api.call(client.list_images)) == 2
