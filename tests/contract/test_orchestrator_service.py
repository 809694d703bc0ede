"""The contract of OrchestratorService: the fake that the CLI is tested with and the real API pass the same cases.

Both are asked through the real client over gRPC. Behind the real API stand a ledger in memory, fake agents and, where a
migration or an evacuation has to go on, the coordinator's production driver; behind the fake the test sets what came of
it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import grpc
import pytest

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
    Boot,
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
    TimelineEntry,
)
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import SetData, Versioned
from orchestrator.rpc.channels import channel
from orchestrator.rpc.errors import from_rpc_error
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


@pytest.fixture(params=["fake", "api"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def api(kind: str, tmp_path: Path) -> AsyncIterator[Subject]:
    async with subject(kind, tmp_path) as made:
        yield made


@pytest.fixture
def client(api: Subject) -> OrchestratorClient:
    return api.client


@pytest.fixture
async def web(api: Subject, client: OrchestratorClient) -> types.Guest:
    """Runs on h1."""
    return await api.call(client.create_guest, WEB, "h1")


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


# --- hosts ------------------------------------------------------------------------------------------------------------


async def test_hosts_come_by_name_with_what_they_carry(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.host("a9", live=False)
    hosts = {each.name: each for each in await api.call(client.list_hosts)}
    assert list(hosts) == ["a9", "h1", "h2", "h3"]
    assert [wire.word(hosts[name], "state") for name in ("a9", "h1")] == ["SILENT", "LIVE"]
    assert (hosts["h1"].memory_mib, hosts["h1"].memory_used_mib, hosts["h1"].guests) == (1024, WEB.memory_mib, 1)
    assert await api.call(client.get_host, "h1") == hosts["h1"]
    await api.call(client.stop_guest, "web")
    assert (await api.call(client.get_host, "h1")).memory_used_mib == 0


async def test_a_host_is_shown_with_what_its_agent_says_is_there(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    lost = "11111111-1111-4111-8111-111111111111"
    copies = [
        CopyStatus(web.uuid, "web", "i2", 128, 22, 23, incoming=True),
        CopyStatus(lost, "lost", "i1", 64, 21),
    ]
    trouble = GuestTrouble(lost, "lost", Trouble.NO_RECORD, "the ledger has lost its record")
    await api.says("h2", *copies, troubles=[trouble], complete=False)
    assert not (await api.call(client.get_host, "h2")).HasField("agent")
    agent = (await api.call(client.get_host, "h2", ask_agent=True)).agent
    assert (agent.answered, agent.complete, agent.message) == (True, False, "")
    assert [(each.guest, each.guest_uuid, each.owner, each.incoming) for each in agent.copies] == [
        ("lost", lost, "", False),
        ("web", web.uuid, "h1", True),
    ]
    assert [(each.memory_mib, each.pid, each.devices_pid) for each in agent.copies] == [(64, 21, 0), (128, 22, 23)]
    assert [(each.guest, each.guest_uuid, each.trouble, each.message) for each in agent.troubles] == [
        ("lost", lost, "NO_RECORD", trouble.message)
    ]
    agent = (await api.call(client.get_host, "h3", ask_agent=True)).agent
    assert (agent.answered, agent.complete, len(agent.copies), len(agent.troubles)) == (True, True, 0, 0)


async def test_a_silent_agent_is_said_to_be_silent_and_not_to_have_nothing(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.falls_silent("h1")
    shown = await api.call(client.get_host, "h1", ask_agent=True)
    assert (shown.guests, shown.agent.answered, shown.agent.complete) == (1, False, False)
    assert shown.agent.message != ""
    assert (await api.refused(client.get_host, "h7", ask_agent=True)).reason is R.NOT_FOUND


async def test_a_cordon_is_idempotent_and_keeps_its_reason(api: Subject, client: OrchestratorClient) -> None:
    assert (await api.call(client.cordon_host, "h1", "disks")).cordoned
    assert (await api.call(client.cordon_host, "h1")).cordon_reason == "disks"
    assert (await api.call(client.cordon_host, "h1", "fans")).cordon_reason == "fans"
    free = await api.call(client.uncordon_host, "h1")
    assert (free.cordoned, free.cordon_reason) == (False, "")
    assert await api.call(client.uncordon_host, "h1") == free
    assert await api.call(client.get_host, "h1") == free


async def test_a_host_that_lives_is_neither_dead_nor_removed(api: Subject, client: OrchestratorClient) -> None:
    assert (await api.refused(client.declare_host_dead, "h1")).reason is R.HOST_ALIVE
    assert (await api.refused(client.remove_host, "h1")).reason is R.HOST_ALIVE
    assert (await api.refused(client.get_host_death, "h1")).reason is R.NOT_FOUND
    for method in (client.declare_host_dead, client.remove_host, client.get_host_death):
        assert (await api.refused(method, "h77")).reason is R.NOT_FOUND
        assert (await api.refused(method, "a/b")).reason is R.INVALID_ARGUMENT


async def test_a_silent_host_is_declared_dead_with_a_token_and_ones_word(
    api: Subject, client: OrchestratorClient
) -> None:
    await api.host("h8", live=False)
    plan = await api.call(client.declare_host_dead, "h8")
    assert (wire.word(plan, "phase"), plan.fencer) == ("PLANNED", "")
    error = await api.refused(client.declare_host_dead, "h8", "rubbish", on_operators_word=True)
    assert (error.reason, error.field) == (R.INVALID_ARGUMENT, "confirmation_token")
    assert (await api.refused(client.declare_host_dead, "h8", plan.confirmation_token)).reason is R.FENCER_REQUIRED
    assert (await api.refused(client.remove_host, "h8")).reason is R.HOST_NOT_EMPTY
    await api.call(client.cordon_host, "h8")
    await api.call(client.remove_host, "h8")
    assert (await api.refused(client.get_host, "h8")).reason is R.NOT_FOUND


async def test_a_refusal_names_a_handful_of_hosts_and_counts_the_others(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    for number in range(60):
        await api.host(f"small-{number:03}", 16 if number >= 20 else 16_384)
        if number < 20:
            await api.call(client.cordon_host, f"small-{number:03}", "w" * 1000)
    error = await api.refused(client.create_guest, GuestSpec("big", memory_mib=9000))
    assert error.reason is R.NO_CAPACITY
    assert error.details == {"NO_CAPACITY": "43", "HOST_CORDONED": "20"}
    assert len(error.message) < 1000
    assert "63 hosts (43 NO_CAPACITY, 20 HOST_CORDONED)" in error.message
    for name in ("h2", "h3"):
        await api.call(client.cordon_host, name)
    error = await api.refused(client.create_migration, "web", validate_only=True)
    assert error.reason is R.NO_CAPACITY
    assert error.details == {"NO_CAPACITY": "40", "HOST_CORDONED": "22"}


async def test_the_verdict_on_every_host_is_a_field_of_an_answer(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    for number in range(7):
        await api.host(f"small-{number}", 16)
    await api.call(client.cordon_host, "h2", "fans")
    found = await api.call(client.check_placement, "web")
    assert (found.destination, found.reason, found.message) == ("h3", "", "")
    assert [each.host for each in found.verdicts] == ["h2", "h3", *(f"small-{number}" for number in range(7))]
    assert dict(found.reasons) == {"NO_CAPACITY": 7, "HOST_CORDONED": 1}
    cordoned, free, small, *_ = found.verdicts
    assert (cordoned.eligible, cordoned.reason, cordoned.passing) == (False, "HOST_CORDONED", True)
    assert "fans" in cordoned.message
    assert (free.eligible, free.memory_free_mib, free.reason, free.message) == (True, 1024, "", "")
    assert (small.eligible, small.memory_free_mib, small.reason) == (False, 16, "NO_CAPACITY")
    big = await api.call(client.check_placement, GuestSpec("big", memory_mib=9000))
    assert (big.destination, big.reason) == ("", "NO_CAPACITY")
    error = await api.refused(client.create_guest, GuestSpec("big", memory_mib=9000))
    assert big.message == error.message
    assert len(big.verdicts) == 10
    one = await api.call(client.check_placement, "web", "small-3")
    assert [(each.host, each.reason) for each in one.verdicts] == [("small-3", "NO_CAPACITY")]
    assert (await api.call(client.list_guests)) == [await api.call(client.get_guest, "web")]


async def test_verdicts_come_by_pages(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    def page(size: int, token: str = "") -> pb.CheckPlacementResponse:
        request = pb.CheckPlacementRequest(guest="web", page_size=size, page_token=token)
        return client._stub.CheckPlacement(request, timeout=10)

    await api.host("h9", 16)
    first = await api.call(page, 2)
    assert [each.host for each in first.verdicts] == ["h2", "h3"]
    last = await api.call(page, 2, first.next_page_token)
    assert ([each.host for each in last.verdicts], last.next_page_token) == (["h9"], "")
    assert (
        (first.destination, dict(first.reasons)) == (last.destination, dict(last.reasons)) == ("h2", {"NO_CAPACITY": 1})
    )


@pytest.mark.parametrize(
    ("guest", "host", "reason", "field"),
    [
        ("nobody", "", R.NOT_FOUND, "guest"),
        ("No/body", "", R.INVALID_ARGUMENT, "guest"),
        ("", "", R.INVALID_ARGUMENT, "guest"),
        ("web", "h77", R.NOT_FOUND, "host"),
        ("web", "a/b", R.INVALID_ARGUMENT, "host"),
        (GuestSpec("x", memory_mib=-5), "", R.INVALID_ARGUMENT, "spec.memory_mib"),
    ],
)
async def test_placements_that_cannot_be_judged(
    api: Subject, client: OrchestratorClient, web: types.Guest, guest: str | GuestSpec, host: str, reason: R, field: str
) -> None:
    error = await api.refused(client.check_placement, guest, host)
    assert (error.reason, error.field) == (reason, field)


async def test_wrong_fields_are_counted_and_the_first_of_them_told(api: Subject, client: OrchestratorClient) -> None:
    labels = {f"bad key {number} {'x' * 200}": "v" for number in range(64)}
    error = await api.refused(client.create_guest, GuestSpec("lab", labels=labels))
    assert error.reason is R.INVALID_ARGUMENT
    assert error.message.startswith("64 fields are wrong")
    assert 5 < len(error.violations) <= 20
    assert error.details == {"violations_left_off": str(64 - len(error.violations))}
    error = await api.refused(client.get_guest, "n" * 100_000)
    assert (error.reason, error.field) == (R.INVALID_ARGUMENT, "name")
    assert len(error.message) < 400


@pytest.mark.parametrize(
    ("name", "reason"), [("h7", R.NOT_FOUND), ("", R.INVALID_ARGUMENT), ("h/1", R.INVALID_ARGUMENT)]
)
async def test_hosts_that_there_are_not(
    api: Subject, client: OrchestratorClient, name: str, reason: RefusalReason
) -> None:
    for method in (client.get_host, client.cordon_host, client.uncordon_host):
        error = await api.refused(method, name)
        assert (error.reason, error.field) == (reason, "name")


# --- guests -----------------------------------------------------------------------------------------------------------


async def test_a_guest_runs_when_it_was_created(api: Subject, client: OrchestratorClient) -> None:
    made = await api.call(client.create_guest, WEB, "h2")
    assert (made.name, made.host, made.want_run, made.migration) == ("web", "h2", True, "")
    assert (wire.word(made, "ownership"), wire.word(made, "run_state")) == ("IDLE", "RUNNING")
    assert wire.guest_spec_from_proto(made.spec) == WEB
    for name in ("web", made.uuid):
        assert (await api.call(client.get_guest, name)).uuid == made.uuid


async def test_a_guest_that_is_well_needs_no_repair(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    looked = await api.call(client.repair_guest, "web")
    assert (looked.guest, looked.guest_uuid, list(looked.offers)) == ("web", web.uuid, [])
    assert looked.findings[0].startswith("the ledger says IDLE, owner h1")
    assert looked.otherwise == "nothing is wrong with it"
    assert (await api.refused(client.repair_guest, "web", "bury")).reason is R.NOTHING_SAFE
    assert (await api.refused(client.repair_guest, "none")).reason is R.NOT_FOUND


async def test_a_guest_whose_record_was_lost_is_found_and_has_it_written_again(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.loses(web)
    assert (await api.refused(client.get_guest, "web")).reason is R.NOT_FOUND
    for name in ("web", web.uuid):
        looked = await api.call(client.repair_guest, name)
        assert (looked.guest, looked.guest_uuid, looked.otherwise) == ("web", web.uuid, "")
        assert looked.findings[0] == f"the ledger has no record of guest web ({web.uuid})"
        assert [offer.action for offer in looked.offers] == ["restore-record"]
    assert (await api.refused(client.repair_guest, "web", "bury")).reason is R.NOTHING_SAFE
    assert (await api.refused(client.get_guest, "web")).reason is R.NOT_FOUND, "a look changes nothing"
    done = await api.call(client.repair_guest, "web", "restore-record")
    assert done.findings[0].startswith("the ledger says IDLE, owner h1")
    had = await api.call(client.get_guest, "web")
    assert (had.uuid, had.host, had.spec) == (web.uuid, "h1", web.spec)
    assert (await api.refused(client.repair_guest, "web", "restore-record")).reason is R.NOTHING_SAFE


async def test_a_lost_record_is_not_written_again_while_the_guest_may_run_elsewhere(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.loses(web)
    copy = CopyStatus(web.uuid, "web", "j", 128, 9)

    async def refused(because: str) -> None:
        looked = await api.call(client.repair_guest, "web")
        assert (list(looked.offers), because in looked.otherwise) == ([], True), looked
        assert (await api.refused(client.repair_guest, "web", "restore-record")).reason is R.NOTHING_SAFE

    await api.says("h2", copy)
    await refused("h1, h2 have processes of it")
    await api.says("h2", complete=False)
    await refused("it may run on h2")
    await api.says("h2")
    await api.host("h9", live=False)
    await refused("it may run on h9")


async def test_its_host_is_chosen_by_free_memory(api: Subject, client: OrchestratorClient) -> None:
    homes = [(await api.call(client.create_guest, replace(WEB, name=f"web-{n}"))).host for n in range(4)]
    assert homes == ["h1", "h2", "h3", "h1"]


async def test_guests_are_listed_by_name_and_of_one_host(api: Subject, client: OrchestratorClient) -> None:
    for name, where in (("c", "h1"), ("a", "h2"), ("b", "h1"), ("d", "h1")):
        await api.call(client.create_guest, replace(WEB, name=name), where)
    await api.call(client.stop_guest, "d")
    assert [each.name for each in await api.call(client.list_guests)] == ["a", "b", "c"]
    assert [each.name for each in await api.call(client.list_guests, "h1")] == ["b", "c"]
    assert await api.call(client.list_guests, "h3") == []
    error = await api.refused(client.list_guests, "h7")
    assert (error.reason, error.field) == (R.NOT_FOUND, "host")


@pytest.mark.parametrize(
    ("name", "reason"), [("no", R.NOT_FOUND), ("", R.INVALID_ARGUMENT), ("a/b", R.INVALID_ARGUMENT)]
)
async def test_guests_that_there_are_not(
    api: Subject, client: OrchestratorClient, name: str, reason: RefusalReason
) -> None:
    for method in (client.get_guest, client.pause_guest, client.resume_guest, client.stop_guest):
        error = await api.refused(method, name)
        assert (error.reason, error.field) == (reason, "name")


@pytest.mark.parametrize("validate_only", [False, True])
@pytest.mark.parametrize(
    ("spec", "where", "reason", "fields"),
    [
        (WEB, "", R.ALREADY_EXISTS, ["spec.name"]),
        (GuestSpec("db"), "h7", R.NOT_FOUND, ["host"]),
        (GuestSpec("db"), "cordoned", R.HOST_CORDONED, ["host"]),
        (GuestSpec("db"), "silent", R.HOST_NOT_LIVE, ["host"]),
        (GuestSpec("db", memory_mib=2000), "h1", R.NO_CAPACITY, ["host"]),
        (GuestSpec("db", memory_mib=2000), "", R.NO_CAPACITY, []),
        (GuestSpec("db", machine="q35"), "h1", R.MACHINE_TYPE_MISMATCH, ["host"]),
        (
            GuestSpec(
                "-",
                vcpus=300,
                boot=Boot(initrd="/etc/shadow"),
                devices=(DeviceSpec("nic", ShimKind.COMPANION, dma="all", options={"-": "x"}),),
                policy=MigrationPolicy(max_attempts=0),
            ),
            "h/1",
            R.INVALID_ARGUMENT,
            [
                "request_id",
                "host",
                "spec.name",
                "spec.vcpus",
                "spec.boot.initrd",
                "spec.devices[0].dma",
                "spec.devices[0].options['-']",
                "spec.policy.max_attempts",
            ],
        ),
    ],
    ids=["taken", "unknown", "cordoned", "silent", "full", "too-big", "machine", "wrong"],
)
async def test_guests_that_cannot_be(
    api: Subject,
    client: OrchestratorClient,
    web: types.Guest,
    spec: GuestSpec,
    where: str,
    reason: RefusalReason,
    fields: list[str],
    validate_only: bool,
) -> None:
    await api.host("cordoned")
    await api.host("silent", live=False)
    await api.call(client.cordon_host, "cordoned")
    request_id = "a/b" if reason is R.INVALID_ARGUMENT else "r1"
    error = await api.refused(client.create_guest, spec, where, validate_only=validate_only, request_id=request_id)
    assert (error.reason, [field for field, _ in error.violations]) == (reason, fields)
    assert [each.name for each in await api.call(client.list_guests)] == ["web"]


@pytest.mark.parametrize("how_far", ["APPLIED", "QUEUED", "RECORDED"])
async def test_a_wish_is_durable_and_says_how_far_it_got(
    api: Subject, client: OrchestratorClient, web: types.Guest, how_far: str
) -> None:
    api.wishes_get(how_far)
    for method, run, state in ((client.pause_guest, False, "PAUSED"), (client.resume_guest, True, "RUNNING")):
        answer = await api.call(method, "web")
        assert (wire.word(answer, "wish"), answer.guest.want_run) == (how_far, run)
        if how_far == "APPLIED":
            assert wire.word(answer.guest, "run_state") == state
        assert (await api.call(client.get_guest, "web")).want_run is run


async def test_a_stopped_guest_is_gone_for_good_and_its_name_is_free(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    gone = await api.call(client.stop_guest, "web")
    assert (gone.uuid, wire.word(gone, "ownership"), wire.word(gone, "run_state")) == (web.uuid, "GONE", "ENDED")
    assert (await api.refused(client.get_guest, "web")).reason is R.NOT_FOUND
    assert await api.call(client.get_guest, web.uuid) == gone
    assert await api.call(client.stop_guest, web.uuid) == gone, "a second stop is no error"
    assert (await api.refused(client.pause_guest, web.uuid)).reason is R.GUEST_NOT_RUNNING
    assert (await api.refused(client.create_migration, web.uuid)).reason is R.GUEST_NOT_RUNNING
    assert (await api.call(client.create_guest, WEB)).uuid != web.uuid


# --- migrations -------------------------------------------------------------------------------------------------------


async def test_a_migration_that_was_asked_for(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    made = await api.call(client.create_migration, "web", "h3", {"max_attempts": 7})
    assert (phase(made), made.guest, made.guest_uuid, made.source) == ("PENDING", "web", web.uuid, "h1")
    assert (made.destination, made.attempt, made.failure, made.cancel_requested) == ("h3", 0, "", False)
    assert wire.policy_from_proto(made.policy) == replace(QUICK, max_attempts=7)
    assert (made.HasField("create_time"), made.HasField("end_time")) == (True, False)
    again = await api.call(client.get_migration, made.name)
    again.elapsed_ms = made.elapsed_ms  # the only thing that moves by itself
    assert again == made
    assert (await api.call(client.get_guest, "web")).migration == "", "no attempt has begun"


async def test_a_migration_that_ended_stays_and_its_guest_has_moved(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    name = (await api.call(client.create_migration, "web", "h2")).name
    await api.begin(name)
    assert (await api.call(client.get_guest, "web")).migration == name
    assert (await api.call(client.get_migration, name)).attempt == 1
    await api.end(name)
    moved = await api.call(client.get_guest, "web")
    assert (moved.uuid, moved.host, moved.migration) == (web.uuid, "h2", "")
    ended = await api.call(client.get_migration, name)
    assert (phase(ended), ended.source, ended.destination) == ("SUCCEEDED", "h1", "h2")
    assert ended.HasField("end_time")


@pytest.mark.parametrize("validate_only", [False, True])
@pytest.mark.parametrize(
    ("guest", "destination", "policy", "reason", "fields"),
    [
        ("nobody", "", {}, R.NOT_FOUND, ["guest"]),
        ("web", "h7", {}, R.NOT_FOUND, ["destination"]),
        ("web", "h1", {}, R.INVALID_ARGUMENT, ["destination"]),
        ("web", "cordoned", {}, R.HOST_CORDONED, ["destination"]),
        ("web", "silent", {}, R.HOST_NOT_LIVE, ["destination"]),
        ("web", "small", {}, R.NO_CAPACITY, ["destination"]),
        ("web", "", {"gate_wait_ms": 5001}, R.INVALID_ARGUMENT, ["policy.gate_wait_ms"]),
        (
            "w/eb",
            "h/1",
            {"max_attempts": 0, "ack_timeout_ms": 0},
            R.INVALID_ARGUMENT,
            ["guest", "destination", "policy.ack_timeout_ms", "policy.max_attempts"],
        ),
    ],
)
async def test_migrations_that_cannot_be(
    api: Subject,
    client: OrchestratorClient,
    web: types.Guest,
    guest: str,
    destination: str,
    policy: dict[str, object],
    reason: RefusalReason,
    fields: list[str],
    validate_only: bool,
) -> None:
    await api.host("cordoned")
    await api.host("silent", live=False)
    await api.host("small", memory_mib=10)
    await api.call(client.cordon_host, "cordoned")
    error = await api.refused(client.create_migration, guest, destination, policy, validate_only=validate_only)
    assert (error.reason, [field for field, _ in error.violations]) == (reason, fields)
    assert await api.call(client.list_migrations) == []


async def test_a_guest_in_a_migration_gets_no_second_one(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    first = (await api.call(client.create_migration, "web")).name
    for step in (None, api.begin):
        if step is not None:
            await step(first)
        for validate_only in (False, True):
            error = await api.refused(client.create_migration, "web", validate_only=validate_only)
            assert (error.reason, error.details) == (R.GUEST_IS_MIGRATING, {"migration": first})
    await api.end(first)
    assert (await api.call(client.create_migration, "web")).name != first


async def test_lists_are_filtered_ordered_and_paged(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    for number in range(12):
        labels = {"tier": "db" if number % 2 else "web"}
        await api.call(client.create_guest, GuestSpec(f"n-{number}", 16 + number, labels=labels, policy=QUICK), "h2")

    async def guests(**asked: Any) -> list[str]:
        return [each.name for each in await api.call(partial(client.list_guests, **asked))]

    assert await guests(filter="name = n-*") == [f"n-{number}" for number in range(12)], "numbers in their order"
    assert await guests(filter="labels.tier = db AND memory_mib >= 23") == ["n-7", "n-9", "n-11"]
    assert await guests(filter="name = n-*", order_by="memory_mib desc", limit=2) == ["n-11", "n-10"]
    assert await guests(filter="host = h1") == ["web"]
    asked = pb.ListGuestsRequest(page_size=5, filter="name = n-*", order_by="memory_mib desc")
    told: list[str] = []
    while True:
        answer = await api.call(lambda: client._call(client._stub.ListGuests, asked))
        told += [each.name for each in answer.guests]
        assert len(answer.guests) <= 5
        asked.page_token = answer.next_page_token
        if not asked.page_token:
            break
    assert told == [f"n-{number}" for number in range(11, -1, -1)]
    moved = (await api.call(client.create_migration, "web")).name
    job = (await api.call(client.create_evacuation, "h2")).evacuation.name
    found = await api.call(partial(client.list_migrations, filter=f'name = "{moved[:6]}*" AND active = true'))
    assert [each.name for each in found] == [moved]
    assert [each.name for each in await api.call(partial(client.list_evacuations, filter="host = h2"))] == [job]
    assert not await api.call(partial(client.list_evacuations, filter="host = h1"))
    assert [each.name for each in await api.call(partial(client.list_hosts, filter="cordoned = true"))] == ["h2"]


async def test_without_a_history_what_is_forgotten_is_gone(api: Subject, client: OrchestratorClient) -> None:
    assert (await api.refused(lambda: list(client.export_history()))).reason is R.NO_HISTORY
    refusal = await api.refused(lambda: list(client.export_history("colours")))
    assert (refusal.reason, refusal.field) == (R.INVALID_ARGUMENT, "kind")


@pytest.mark.parametrize("what", ["list_hosts", "list_guests", "list_migrations", "list_evacuations"])
async def test_what_a_list_cannot_do_is_refused(api: Subject, client: OrchestratorClient, what: str) -> None:
    for asked, field in (
        ({"filter": "colour = red"}, "filter"),
        ({"filter": "name = a OR"}, "filter"),
        ({"order_by": "colour"}, "order_by"),
    ):
        refusal = await api.refused(partial(getattr(client, what), **asked))
        assert (refusal.reason, refusal.field) == (R.INVALID_ARGUMENT, field)
        assert "name" in refusal.message
    method = {"list_hosts": "ListHosts", "list_guests": "ListGuests"}.get(what, "ListMigrations")
    request = getattr(pb, f"{method}Request")(page_token="none")
    refusal = await api.refused(lambda: client._call(getattr(client._stub, method), request))
    assert (refusal.reason, refusal.field) == (R.INVALID_ARGUMENT, "page_token")


async def test_migrations_are_listed_newest_first_of_a_guest_and_while_they_last(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.call(client.create_guest, GuestSpec("db", policy=QUICK), "h2")
    first = (await api.call(client.create_migration, "web")).name
    await api.end(first)
    second = (await api.call(client.create_migration, "db")).name
    third = (await api.call(client.create_migration, "web")).name

    async def names(guest: str = "", active_only: bool = False) -> list[str]:
        return [each.name for each in await api.call(client.list_migrations, guest, active_only=active_only)]

    assert await names() == [third, second, first]
    assert await names("web") == [third, first]
    assert await names(active_only=True) == [third, second]
    assert await names("web", active_only=True) == [third]
    await api.call(client.stop_guest, "db")
    await api.call(client.create_guest, GuestSpec("db"), "h2")
    assert await names("db") == [], "the new guest of this name never moved"
    error = await api.refused(client.list_migrations, "nobody")
    assert (error.reason, error.field) == (R.NOT_FOUND, "guest")


async def test_migrations_are_listed_page_by_page(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    made: list[str] = []
    for _ in range(5):
        made.append((await api.call(client.create_migration, "web")).name)
        await api.call(client.cancel_migration, made[-1])
        await api.end(made[-1])

    def page(token: str) -> pb.ListMigrationsResponse:
        with channel(client.address) as raw:
            request = pb.ListMigrationsRequest(page_size=2, page_token=token)
            return OrchestratorServiceStub(raw).ListMigrations(request, timeout=5)

    pages = [await asyncio.to_thread(page, "")]
    while pages[-1].next_page_token:
        pages.append(await asyncio.to_thread(page, pages[-1].next_page_token))
    assert [[each.name for each in one.migrations] for one in pages] == [made[:2:-1], made[2:0:-1], made[:1]]
    assert [each.name for each in await api.call(client.list_migrations, limit=3)] == made[:1:-1]
    for beginning in (made[2], made[2][:8]):
        found = await api.call(partial(client.list_migrations, filter=f'name = "{beginning}*"'))
        assert made[2] in [each.name for each in found]
        assert all(each.name.startswith(beginning) for each in found)
    assert await api.call(partial(client.list_migrations, filter='name = "nobody*"')) == []
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.to_thread(page, "x")
    assert from_rpc_error(caught.value).field == "page_token"


async def test_time_lines_are_for_who_asks_for_one_migration(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    name = (await api.call(client.create_migration, "web")).name
    await api.report(name, AttemptReport(1, "ABORTED", timeline=(TimelineEntry(1.0, "h1", "freeze"),)))
    assert (await api.call(client.get_migration, name)).attempts[0].timeline[0].event == "freeze"
    (listed,) = await api.call(client.list_migrations)
    watched = await api.call(next, client.watch_migrations([name]))
    assert [(len(each.attempts), len(each.attempts[0].timeline)) for each in (listed, watched)] == [(1, 0)] * 2


@pytest.mark.parametrize("name", ["nobody", "a/b", "", "x" * 200])
async def test_migrations_and_evacuations_that_there_are_not(
    api: Subject, client: OrchestratorClient, name: str
) -> None:
    for method in (client.get_migration, client.cancel_migration, client.get_evacuation, client.cancel_evacuation):
        error = await api.refused(method, name)
        assert (error.reason, error.field) == (R.NOT_FOUND, "name")


async def test_a_cancel_before_the_first_attempt_ends_the_migration(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    name = (await api.call(client.create_migration, "web")).name
    cancelled = await api.call(client.cancel_migration, name)
    assert (phase(cancelled), cancelled.failure, cancelled.cancel_requested) == ("CANCELLED", "CANCELLED", True)
    assert cancelled.HasField("end_time")
    assert await api.call(client.cancel_migration, name) == cancelled
    assert (await api.call(client.create_migration, "web")).name != name


async def test_a_cancelled_attempt_never_commits(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    name = (await api.call(client.create_migration, "web", "h2")).name
    await api.begin(name)
    assert (await api.call(client.cancel_migration, name)).cancel_requested
    await api.end(name)
    ended = await api.call(client.get_migration, name)
    assert (phase(ended), ended.failure) == ("CANCELLED", "CANCELLED")
    assert (await api.call(client.get_guest, "web")).host == "h1"


@pytest.mark.parametrize("failed", [False, True])
async def test_a_cancel_of_what_is_over_is_refused(
    api: Subject, client: OrchestratorClient, web: types.Guest, failed: bool
) -> None:
    name = (await api.call(client.create_migration, "web", "h2")).name
    await api.end(name, failed=failed)
    before = await api.call(client.get_migration, name)
    error = await api.refused(client.cancel_migration, name)
    assert error.reason is (R.ALREADY_ENDED if failed else R.ALREADY_COMMITTED)
    assert error.details.get("destination") == (None if failed else "h2")
    assert await api.call(client.get_migration, name) == before


# --- evacuations ------------------------------------------------------------------------------------------------------


async def test_an_evacuation_cordons_its_host_and_says_who_can_go_where(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.call(client.create_guest, GuestSpec("large", memory_mib=800), "h1")
    for where in ("h2", "h3"):
        await api.call(client.create_guest, GuestSpec(f"on-{where}", memory_mib=300), where)
    made = await api.call(client.create_evacuation, "h1", 2, {"max_attempts": 9})
    job = made.evacuation
    assert (job.host, phase(job), job.max_concurrent, job.policy.max_attempts) == ("h1", "PENDING", 2, 9)
    assert (job.safe_to_power_off, job.cancel_requested, job.HasField("create_time")) == (False, False, True)
    assert [(each.guest, each.memory_mib, each.destination, each.reason) for each in made.verdicts] == [
        ("large", 800, "", "NO_CAPACITY"),
        ("web", WEB.memory_mib, "h2", ""),
    ]
    cordoned = await api.call(client.get_host, "h1")
    assert (cordoned.cordoned, cordoned.cordon_reason) == (True, f"evacuation {job.name}")
    again = await api.call(client.get_evacuation, job.name)
    again.elapsed_ms = job.elapsed_ms  # the only thing that moves by itself
    assert again == job


async def test_a_host_is_emptied_once_at_a_time_and_evacuations_are_listed_newest_first(
    api: Subject, client: OrchestratorClient
) -> None:
    await api.call(client.cordon_host, "h1", "disks")
    first = (await api.call(client.create_evacuation, "h1")).evacuation.name
    assert (await api.call(client.get_host, "h1")).cordon_reason == "disks"
    error = await api.refused(client.create_evacuation, "h1")
    assert (error.reason, error.details) == (R.ALREADY_EXISTS, {"evacuation": first})
    await api.empty(first)
    second = (await api.call(client.create_evacuation, "h1")).evacuation.name
    third = (await api.call(client.create_evacuation, "h2")).evacuation
    assert (third.max_concurrent, third.policy.ListFields()) == (4, [])
    assert [each.name for each in await api.call(client.list_evacuations)] == [third.name, second, first]


@pytest.mark.parametrize("validate_only", [False, True])
@pytest.mark.parametrize(
    ("where", "at_once", "policy", "reason", "fields"),
    [
        ("h7", 0, {}, R.NOT_FOUND, ["host"]),
        ("h1", 0, {"backoff_max_ms": 0}, R.INVALID_ARGUMENT, ["policy.backoff_initial_ms"]),
        (
            "h/1",
            1001,
            {"max_attempts": 101},
            R.INVALID_ARGUMENT,
            ["host", "max_concurrent", "policy.max_attempts"],
        ),
    ],
)
async def test_evacuations_that_cannot_be(
    api: Subject,
    client: OrchestratorClient,
    web: types.Guest,
    where: str,
    at_once: int,
    policy: dict[str, object],
    reason: RefusalReason,
    fields: list[str],
    validate_only: bool,
) -> None:
    error = await api.refused(client.create_evacuation, where, at_once, policy, validate_only=validate_only)
    assert (error.reason, [field for field, _ in error.violations]) == (reason, fields)
    assert not any(each.cordoned for each in await api.call(client.list_hosts))


async def test_a_host_is_safe_to_power_off_until_it_is_uncordoned(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    job = (await api.call(client.create_evacuation, "h1")).evacuation.name
    await api.empty(job)
    ended = await api.call(client.get_evacuation, job)
    assert (phase(ended), ended.safe_to_power_off, ended.HasField("end_time")) == ("SUCCEEDED", True, True)
    await api.call(client.uncordon_host, "h1")
    assert not (await api.call(client.get_evacuation, job)).safe_to_power_off


async def test_cancel_of_an_evacuation(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    job = (await api.call(client.create_evacuation, "h1")).evacuation.name
    for _ in range(2):
        assert (await api.call(client.cancel_evacuation, job)).cancel_requested
    await api.empty(job)
    ended = await api.call(client.cancel_evacuation, job)
    assert (phase(ended), ended.safe_to_power_off) == ("CANCELLED", False)
    assert (await api.call(client.get_host, "h1")).cordoned
    second = (await api.call(client.create_evacuation, "h1")).evacuation.name
    await api.empty(second)
    error = await api.refused(client.cancel_evacuation, second)
    assert (error.reason, error.details) == (R.ALREADY_ENDED, {"phase": "SUCCEEDED"})


# --- repeated requests, and requests that only ask --------------------------------------------------------------------


async def test_a_repeated_request_is_the_same_resource(api: Subject, client: OrchestratorClient) -> None:
    async def ask() -> list[str]:
        guest = await api.call(client.create_guest, WEB, "h1", request_id="r1")
        migration = await api.call(client.create_migration, "web", "h2", request_id="r2")
        job = await api.call(client.create_evacuation, "h3", request_id="r3")
        return [guest.name, migration.name, job.evacuation.name]

    names = await ask()
    assert await ask() == names
    assert [[each.name for each in kind] for kind in (await everything(api))[1:]] == [[name] for name in names]
    await api.end(names[1])
    again = await api.call(client.create_migration, "web", "h2", request_id="r2")
    assert (again.name, phase(again)) == (names[1], "SUCCEEDED")


async def test_a_request_id_serves_one_request(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    name = (await api.call(client.create_migration, "web", request_id="r1")).name
    for ask in (
        lambda: client.create_migration("web", "h3", request_id="r1"),
        lambda: client.create_guest(GuestSpec("db"), request_id="r1"),
        lambda: client.create_evacuation("h1", request_id="r1"),
    ):
        error = await api.refused(ask)
        assert (error.reason, error.field) == (R.REQUEST_ID_REUSED, "request_id")
        assert error.details == {"operation": f"migrations/{name}"}


async def test_validate_only_says_where_it_would_go_and_changes_nothing(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.call(client.create_guest, GuestSpec("big", memory_mib=500), "h2")
    before = await everything(api)
    guest = await api.call(client.create_guest, GuestSpec("db"), validate_only=True, request_id="r1")
    assert (guest.name, guest.uuid, guest.host) == ("db", "", "h3")
    moved = await api.call(client.create_migration, "web", validate_only=True, request_id="r1")
    assert (moved.name, moved.guest, moved.source, moved.destination) == ("", "web", "h1", "h3")
    planned = await api.call(client.create_evacuation, "h1", validate_only=True, request_id="r1")
    assert (planned.evacuation.name, planned.evacuation.max_concurrent) == ("", 4)
    assert [(each.guest, each.destination) for each in planned.verdicts] == [("web", "h3")]
    assert await everything(api) == before
    await api.call(client.create_evacuation, "h1", request_id="r1")


# --- watches ----------------------------------------------------------------------------------------------------------


async def told(api: Subject, watch: Iterator[T], holds: Callable[[T], bool]) -> T:
    """What the watch says first that `holds`."""
    while True:
        message = await api.call(next, watch)
        if holds(message):
            return message


async def ends(api: Subject, watch: Iterator[T]) -> bool:
    return await api.call(next, watch, None) is None


async def test_a_watch_of_guests_ends_when_each_is_gone(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    watch = client.watch_guests(["web", web.uuid])
    first = await api.call(next, watch)
    assert (first.uuid, first.host, first.want_run) == (web.uuid, "h1", True)
    await api.call(client.pause_guest, "web")
    await told(api, watch, lambda guest: not guest.want_run)
    await api.call(client.stop_guest, "web")
    gone = await told(api, watch, lambda guest: wire.word(guest, "ownership") == "GONE")
    assert wire.word(gone, "run_state") == "ENDED"
    assert await ends(api, watch)


async def test_a_watch_of_a_migration_ends_with_it(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    name = (await api.call(client.create_migration, "web", "h2")).name
    watch = client.watch_migrations([name])
    assert phase(await api.call(next, watch)) == "PENDING"
    await api.begin(name)
    assert (await told(api, watch, lambda each: phase(each) == "PRECOPY")).attempt == 1
    await api.end(name)
    assert (await told(api, watch, lambda each: phase(each) == "SUCCEEDED")).HasField("end_time")
    assert await ends(api, watch)
    again = client.watch_migrations([name])
    assert phase(await api.call(next, again)) == "SUCCEEDED", "what is over is told to who names it"
    assert await ends(api, again)


async def test_a_watch_of_several_ends_with_the_last(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    await api.call(client.create_guest, GuestSpec("db"), "h2")
    names = [(await api.call(client.create_migration, guest)).name for guest in ("web", "db")]
    watch = client.watch_migrations(names)
    assert {(await api.call(next, watch)).name for _ in names} == set(names)
    for name in names:
        await api.call(client.cancel_migration, name)
        assert phase(await told(api, watch, lambda each, name=name: each.name == name)) == "CANCELLED"
    assert await ends(api, watch)


async def test_a_watch_of_all_tells_what_is_not_over_and_what_comes(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    over = (await api.call(client.create_migration, "web")).name
    await api.call(client.cancel_migration, over)
    first = (await api.call(client.create_migration, "web")).name
    guests, migrations = client.watch_guests(), client.watch_migrations()
    assert (await api.call(next, migrations)).name == first
    assert (await api.call(next, guests)).name == "web"
    await api.call(client.create_guest, GuestSpec("db"), "h1")
    await told(api, guests, lambda guest: guest.name == "db")
    second = (await api.call(client.create_migration, "db")).name
    assert (await api.call(next, migrations)).name == second
    await api.call(client.cancel_migration, first)
    ended = await api.call(next, migrations)
    assert (ended.name, phase(ended)) == (first, "CANCELLED")
    await api.call(client.stop_guest, "web")
    await told(api, guests, lambda guest: (guest.name, wire.word(guest, "ownership")) == ("web", "GONE"))


async def test_a_watch_of_an_evacuation_ends_with_it(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    job = (await api.call(client.create_evacuation, "h1")).evacuation.name
    watch, all_of_them = client.watch_evacuations([job]), client.watch_evacuations()
    for each in (watch, all_of_them):
        assert phase(await api.call(next, each)) == "PENDING"
    await api.empty(job)
    assert (await told(api, watch, lambda each: phase(each) == "SUCCEEDED")).safe_to_power_off
    assert await ends(api, watch)
    await told(api, all_of_them, lambda each: phase(each) == "SUCCEEDED")


@pytest.mark.parametrize("names", [["nobody"], ["web", "nobody"]])
async def test_a_watch_of_names_that_there_are_not_is_refused(
    api: Subject, client: OrchestratorClient, web: types.Guest, names: list[str]
) -> None:
    for method in (client.watch_guests, client.watch_migrations, client.watch_evacuations):
        error = await api.refused(next, method(names))
        assert (error.reason, error.field) == (R.NOT_FOUND, "names")
    error = await api.refused(next, client.watch_migrations(["m"] * 1001))
    assert (error.reason, error.field) == (R.INVALID_ARGUMENT, "names")


# --- devices ----------------------------------------------------------------------------------------------------------


async def test_an_instruction_goes_untouched_to_the_device_and_its_answer_comes_back(
    api: Subject, client: OrchestratorClient, web: types.Guest
) -> None:
    assert await api.call(client.instruct_device, "web", "nic", "blink: 3 \n") == "nic was told: blink: 3 \n"


@pytest.mark.parametrize(
    ("asked", "reason", "fields"),
    [
        (("nobody", "nic", "blink"), R.NOT_FOUND, ["guest"]),
        (("web", "disk", "blink"), R.NOT_FOUND, ["device"]),
        (("web", "eth", "blink"), R.INSTRUCTION_REFUSED, ["device"]),
        (("w/eb", "nic", " "), R.INVALID_ARGUMENT, ["guest", "instruction"]),
        (("web", "nic", "é" * 4096), R.INVALID_ARGUMENT, ["instruction"]),
    ],
    ids=["no guest", "no device", "takes none", "nothing said", "too long"],
)
async def test_instructions_that_cannot_be(
    api: Subject,
    client: OrchestratorClient,
    web: types.Guest,
    asked: tuple[str, str, str],
    reason: RefusalReason,
    fields: list[str],
) -> None:
    error = await api.refused(client.instruct_device, *asked)
    assert (error.reason, [field for field, _ in error.violations]) == (reason, fields)


async def test_health_says_who_leads_and_what_is_quarantined(api: Subject, client: OrchestratorClient) -> None:
    api.leads("coordinator-2")
    found = await api.call(client.get_cluster_health)
    assert (found.leader, list(found.quarantined), found.quarantined_left_out) == ("coordinator-2", [], 0)
    api.leads("")
    api.quarantines("migrations/m1", "BadRecord: of another version", 1_700_000_000.5)
    found = await api.call(client.get_cluster_health)
    assert found.leader == ""
    (one,) = found.quarantined
    assert (one.resource, one.reason) == ("migrations/m1", "BadRecord: of another version")
    assert (one.since.seconds, found.quarantined_left_out) == (1_700_000_000, 3)


async def test_devices_are_not_instructed_unless_the_cluster_allows_it(kind: str, tmp_path: Path) -> None:
    async with subject(kind, tmp_path, instructions=False) as calm:
        await calm.call(calm.client.create_guest, WEB, "h1")
        error = await calm.refused(calm.client.instruct_device, "web", "nic", "blink")
    assert error.reason is R.INSTRUCTIONS_DISABLED


# --- deadlines --------------------------------------------------------------------------------------------------------


async def test_a_request_that_is_too_large_is_refused_and_changes_nothing(
    api: Subject, client: OrchestratorClient
) -> None:
    """By the client before it is sent, and by the API when somebody else sends it."""
    names = ["x" * 128] * 3_000
    error = await api.refused(lambda: next(iter(client.watch_guests(names))))
    assert error.reason is R.INVALID_ARGUMENT
    assert "too large" in error.message

    def strangers() -> R:
        request = pb.CreateGuestRequest(spec=types.GuestSpec(name="x" * 300_000))
        with grpc.insecure_channel(client.address) as raw:
            stub = OrchestratorServiceStub(raw)
            with pytest.raises(grpc.RpcError) as caught:
                stub.CreateGuest(request, timeout=5)
        return from_rpc_error(caught.value).reason

    assert await asyncio.to_thread(strangers) is R.INVALID_ARGUMENT
    error = await api.refused(lambda: next(iter(client.watch_guests(["x"] * 1_001))))
    assert (error.reason, error.field) == (R.INVALID_ARGUMENT, "names")
    error = await api.refused(client.cordon_host, "h1", "w" * 1_025)
    assert (error.reason, error.field) == (R.INVALID_ARGUMENT, "reason")
    assert not (await api.call(client.get_host, "h1")).cordoned


async def test_a_call_without_a_deadline_is_refused(api: Subject, client: OrchestratorClient, web: types.Guest) -> None:
    def ask(method: str, request: Any) -> DroverError:
        with channel(client.address) as raw:
            call = getattr(OrchestratorServiceStub(raw), method)
            with pytest.raises(grpc.RpcError) as caught:
                list(call(request))
        return from_rpc_error(caught.value)

    for method, request in (
        ("ListGuests", pb.ListGuestsRequest()),
        ("StopGuest", pb.StopGuestRequest(name="web")),
        ("WatchGuests", pb.WatchGuestsRequest()),
    ):
        assert (await api.call(ask, method, request)).reason is R.DEADLINE_REQUIRED
    assert [each.name for each in await api.call(client.list_guests)] == ["web"]
