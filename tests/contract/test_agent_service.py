"""The contract of AgentService: the fake agents of the API's and the coordinator's tests pass the real one's cases.

The real agent (over a fake engine and a ledger in memory) and the API's fake are asked through the real client over
gRPC, the coordinator's fake through the port that this client implements. Each fake is held to what it claims to do:
the API's to births, deaths, wishes and watches, the coordinator's to attempts.
"""

from __future__ import annotations

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import pytest
from prometheus_client import CollectorRegistry

from agents.__main__ import Peers
from agents.agent import Agent
from agents.config import PoolConfig
from agents.engine.base import MigrationEngine
from agents.host.metrics import Metrics
from agents.serving.control import AgentServicer, translate
from orchestrator import wire_hardware
from orchestrator.coordinator.ports import AgentPort
from orchestrator.core import handover
from orchestrator.core.agent import AgentSample, AttemptSeen, ConductOrder, GuestStatus, RunState, VmmExamined
from orchestrator.core.changes import MachineChange, changed
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import AbortReason, DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.migration import Prepared
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import (
    Adopted,
    Boot,
    DiskFormat,
    DiskSpec,
    Display,
    GuestSpec,
    HostRecord,
    Incarnation,
    OnHostDeath,
    PoolKind,
    WantRun,
)
from orchestrator.core.restore import Held
from orchestrator.ledger import paths
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Done, SetData, Versioned
from orchestrator.proc import start_time_of
from orchestrator.rpc.agent_client import AgentClient
from orchestrator.rpc.channels import aio_server, listen
from orchestrator.rpc.errors import Errors
from protos.drover.v1 import agent_pb2 as pb
from protos.drover.v1 import types_pb2
from protos.drover.v1.agent_pb2_grpc import add_AgentServiceServicer_to_server
from tests.fakes.adopting import AdoptingFake, started_by_hand
from tests.fakes.agent import FakeAgent
from tests.fakes.config import agent_config, agent_identity
from tests.fakes.coordination import World
from tests.fakes.engine import FakeEngine

T = TypeVar("T")
R = RefusalReason
HERE, THERE = HostRef("h2", "boot-h2"), HostRef("h1", "boot-h1")
G = "0f0e0d0c-0b0a-4987-8654-321001234567"
UNKNOWN = "00000000-0b0a-4987-8654-321001234567"
REF = AttemptRef(G, "abcdef012345", 1)
PEER = Endpoint("127.0.0.1", 7702)
IDLE = GuestRecord("web", Ownership.IDLE, HERE)
BIRTH = handover.birth("web", HERE, writer="api")
LEAVING = handover.open_attempt(IDLE, REF.migration, 1, THERE, epoch=0, writer="c")
ARRIVING = handover.open_attempt(replace(IDLE, owner=THERE), REF.migration, 1, HERE, epoch=0, writer="c")


@pytest.fixture
def world() -> World:
    world = World()
    world.store.tree.nodes[paths.epoch()] = Versioned(b"", 0, 0)  # its version is the epoch
    for root in paths.ROOTS:
        world.put(root, WantRun())
    world.put(paths.host(THERE.host), HostRecord(THERE.host, THERE.boot_id, "127.0.0.1:1", str(PEER), 1024, 1000))
    world.put(paths.name("web"), G)
    world.put(paths.guest_spec(G), GuestSpec("web"))
    world.put(paths.want_run(G), WantRun())
    return world


async def write(world: World, path: str, record: object) -> None:
    """A write that watches see."""
    node = world.store.tree.nodes[path]
    assert isinstance(await world.store.multi([SetData(path, encode(record), node.version)]), Done)


@asynccontextmanager
async def real(world: World, engine: FakeEngine, directory: Path) -> AsyncIterator[AgentClient]:
    """The agent of h2 behind its servicer."""
    (directory / "fast").mkdir(exist_ok=True)
    fast = PoolConfig(path=directory / "fast", kind=PoolKind.LOCAL)
    config = agent_config(directory).model_copy(update={"pools": {"fast": fast}})
    peers, stores = Peers(), (world.store, type(world.store)(world.store.tree))
    agent = Agent(
        config, agent_identity(HERE), cast(MigrationEngine, engine), stores, peers, Metrics(CollectorRegistry())
    )
    server = aio_server([Errors(require_deadline=False, translate=translate)])
    add_AgentServiceServicer_to_server(AgentServicer(agent), server)
    client = AgentClient(f"127.0.0.1:{listen(server, '127.0.0.1:0')}")
    await agent.start()
    await server.start()
    try:
        yield client
    finally:
        await client.close()
        await server.stop(None)
        await agent.stop()
        await peers.close()


async def refused(call: Awaitable[object]) -> RefusalReason:
    with pytest.raises(DroverError) as caught:
        await call
    return caught.value.reason


# --- guests: what the API relies on -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByHand:
    """A VMM that somebody else has started on h2, and what is done to it."""

    pid: int
    be_odd: Callable[[], None]
    """No other host would build its machine."""
    be_busy: Callable[[], None]
    """Somebody is connected to its monitor."""


class Host:
    """The agent of h2, and what is done to it."""

    def __init__(
        self,
        client: AgentClient,
        world: World,
        fail_start: Callable[[], None],
        shut_down: Callable[[], None],
        by_hand: ByHand,
    ) -> None:
        self.client = client
        self.world = world
        self.by_hand = by_hand
        self.fail_start = fail_start
        """The next guest cannot be started."""
        self.shut_down = shut_down
        """The guest powers itself off."""

    async def born(self) -> GuestStatus:
        self.world.put(paths.guest(G), BIRTH)
        return await self.client.start_guest(G)

    async def examined(self, *, wished: GuestSpec | None = None, name: str = "web") -> VmmExamined:
        return await self.client.examine_vmm(name, self.by_hand.pid, "/run/q", wished)

    async def adopted(self, *, later_s: int = 0) -> GuestStatus:
        """`later_s`: its specification names a process under the same pid that was started so much later."""
        found = await self.examined()
        taken = Adopted(self.by_hand.pid, found.start_time + later_s, "/run/q")
        self.world.put(paths.guest_spec(G), replace(found.spec, adopted=taken))
        return await self.born()

    async def change(self, change: MachineChange) -> GuestSpec:
        return await self.client.change_machine(G, change, self.promised)

    @property
    def promised(self) -> int:
        """Version of what the host has promised."""
        return self.world.store.tree.nodes[paths.reservations(HERE.host)].version

    @property
    def spec(self) -> GuestSpec:
        return decode(GuestSpec, self.world.store.tree.nodes[paths.guest_spec(G)].data)

    async def wish(self, run: bool, sequence: int) -> None:
        await write(self.world, paths.want_run(G), WantRun(run, "op", sequence))

    async def import_image(self, name: str, content: bytes, *, sha256: bytes = b"") -> types_pb2.Image:
        async def parts() -> AsyncIterator[pb.ReceiveImageRequest]:
            what = wire_hardware.disk_format_to_proto(DiskFormat.RAW)
            yield pb.ReceiveImageRequest(pool="fast", name=name, format=what, size_bytes=len(content))
            for at in range(0, len(content), 4096):
                yield pb.ReceiveImageRequest(data=content[at : at + 4096])
            yield pb.ReceiveImageRequest(sha256=sha256 or hashlib.sha256(content).digest())

        return await self.client.receive_image(parts(), 10)

    @property
    def name_is_taken(self) -> bool:
        return paths.name("web") in self.world.store.tree.nodes


@pytest.fixture
def process() -> Iterator[int]:
    """Pid of a VMM that somebody else has started."""
    with started_by_hand() as made:
        yield made.pid


@pytest.fixture(params=["fake", "agent"])
async def host(request: pytest.FixtureRequest, world: World, tmp_path: Path, process: int) -> AsyncIterator[Host]:
    if request.param == "agent":
        engine = AdoptingFake()
        async with real(world, engine, tmp_path) as client:

            def shut_down() -> None:
                (vmm,) = engine.processes.values()
                vmm.end_guest("shutdown")

            by_hand = ByHand(process, engine.built["ram"].clear, lambda: setattr(engine, "is_busy", True))
            fail_start = partial(setattr, engine.script, "fail_start", "no memory")
            yield Host(client, world, fail_start, shut_down, by_hand)
        return
    fake = FakeAgent("h2", world.store)
    fake.images["fast"] = {}
    start_time = start_time_of(process)
    assert start_time is not None
    seen = VmmExamined(GuestSpec("hand"), start_time, True, ())
    fake.vmms[process] = seen
    await fake.start()
    client = AgentClient(fake.address)
    no_memory = DroverError(R.INTERNAL, "no memory")

    def say_so() -> None:
        fake.say(AgentSample(guests=(GuestStatus(G, "web", "inc", RunState.ENDED),)))

    odd = replace(seen, obstacles=((R.NOT_ADOPTABLE, "it is odd"),))
    busy = DroverError(R.MONITOR_BUSY, "it does not greet")
    by_hand = ByHand(process, lambda: fake.vmms.update({process: odd}), lambda: fake.vmms.update({process: busy}))
    yield Host(client, world, lambda: fake.refusals.update(StartGuest=no_memory), say_so, by_hand)
    await client.close()
    await fake.stop()


async def test_a_guest_is_kept_without_a_copy_and_born_again(host: Host) -> None:
    await host.born()
    assert await refused(host.client.keep_guest(G, only_ended=True)) is R.BUSY, "it runs"
    host.shut_down()
    await until_ended(host)
    await host.client.keep_guest(G, only_ended=True)
    await host.client.keep_guest(G)
    kept = host.world.record(G)
    assert (kept.phase, kept.stopped, kept.owner) == (Ownership.CRASHED, True, HERE)
    assert host.name_is_taken
    assert not (await host.client.get_agent()).copies
    assert await refused(host.client.start_guest(G)) is R.GUEST_NOT_RUNNING, "nobody has said that it starts"

    await write(host.world, paths.guest(G), handover.start_again(kept, HERE, writer="api"))
    assert (await host.client.start_guest(G)).run_state is RunState.RUNNING
    assert (host.world.record(G).phase, host.world.record(G).starts) == (Ownership.IDLE, 1)


async def test_a_start_that_fails_is_no_end_of_a_guest_that_has_run(host: Host) -> None:
    await host.born()
    await host.client.keep_guest(G)
    await write(host.world, paths.guest(G), handover.start_again(host.world.record(G), HERE, writer="api"))
    host.fail_start()
    assert await refused(host.client.start_guest(G)) is R.INTERNAL
    assert host.world.record(G).stopped
    assert host.name_is_taken


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (replace(IDLE, owner=THERE), R.GUEST_IS_MIGRATING),
        (ARRIVING, R.GUEST_IS_MIGRATING),
        (handover.gone(IDLE, writer="a"), R.GUEST_NOT_RUNNING),
    ],
    ids=["elsewhere", "arriving", "gone"],
)
async def test_only_a_guest_at_rest_here_is_kept(host: Host, record: GuestRecord, reason: RefusalReason) -> None:
    host.world.put(paths.guest(G), record)
    assert await refused(host.client.keep_guest(G)) is reason
    assert host.world.record(G) == record


async def until_ended(host: Host) -> None:
    async with asyncio.timeout(10):
        while [each.run_state for each in (await host.client.get_agent()).guests] != [RunState.ENDED]:  # noqa: ASYNC110 - bounded
            await asyncio.sleep(0.01)


async def test_what_a_host_holds_is_told_to_who_restores_a_ledger(host: Host) -> None:
    before = await host.client.list_copies()
    assert (before.host, before.complete, before.copies) == (HERE, True, ())
    status = await host.born()
    (copy,) = (await host.client.list_copies()).copies
    assert (copy.guest, copy.name, copy.held) == (G, "web", Held(HERE, status.inc, running=True))


async def test_a_ledger_is_believed_by_the_id_that_it_has(host: Host) -> None:
    assert await refused(host.client.rejoin_ledger("other")) is R.INVALID_ARGUMENT
    host.world.put(paths.INCARNATION, Incarnation("this"))
    assert await refused(host.client.rejoin_ledger("other")) is R.INVALID_ARGUMENT
    await host.client.rejoin_ledger("this")
    assert (await host.client.list_copies()).incarnation == "this"


async def test_images_are_brought_in_and_listed(host: Host) -> None:
    content = b"x" * 65536
    for name in ("c", "a", "b"):
        made = await host.import_image(name, content)
        assert (made.host, made.pool, made.name, made.size_bytes) == ("h2", "fast", name, len(content))
    first, more = await host.client.list_pool_images("fast", "", 2)
    assert ([each.name for each in first], more) == (["a", "b"], True)
    rest, more = await host.client.list_pool_images("fast", "b", 2)
    assert ([each.name for each in rest], more) == (["c"], False)
    assert await refused(host.client.list_pool_images("slow", "", 2)) is R.POOL_NOT_FOUND
    assert await refused(host.import_image("a", content * 16)) is R.ALREADY_EXISTS
    assert await refused(host.import_image("d", content, sha256=bytes(32))) is R.INVALID_ARGUMENT
    assert [each.name for each in (await host.client.list_pool_images("fast", "", 9))[0]] == ["a", "b", "c"]


async def test_a_guest_that_was_started_runs_once(host: Host) -> None:
    status = await host.born()
    assert (status.guest, status.name, status.run_state) == (G, "web", RunState.RUNNING)
    assert status.inc
    assert status.pid > 0
    assert host.world.record(G).phase is Ownership.IDLE
    assert await host.client.start_guest(G) == status
    seen = await host.client.get_agent()
    assert (seen.host, seen.guests) == (HERE, (status,))


@pytest.mark.parametrize(
    "record",
    [
        replace(BIRTH, owner=THERE),
        replace(IDLE, owner=THERE),
        handover.crashed(IDLE, writer="a"),
        handover.gone(IDLE, writer="a"),
    ],
    ids=["born-elsewhere", "elsewhere", "crashed", "gone"],
)
async def test_a_guest_that_is_not_to_run_here_is_not_started(host: Host, record: GuestRecord) -> None:
    host.world.put(paths.guest(G), record)
    assert await refused(host.client.start_guest(G)) is R.GUEST_NOT_RUNNING
    assert host.world.record(G) == record
    assert all(guest.run_state is RunState.ENDED for guest in (await host.client.get_agent()).guests)


async def test_a_guest_that_cannot_be_started_is_gone_and_its_name_is_free(host: Host) -> None:
    host.fail_start()
    assert await refused(host.born()) is R.INTERNAL
    assert host.world.record(G).phase is Ownership.GONE
    assert not host.name_is_taken


async def test_a_guest_whose_image_is_not_here_says_so(world: World, tmp_path: Path) -> None:
    world.put(paths.guest_spec(G), GuestSpec("web", boot=Boot(kernel="vmlinuz-9")))
    world.put(paths.guest(G), BIRTH)
    async with real(world, FakeEngine(), tmp_path) as client:
        assert await refused(client.start_guest(G)) is R.IMAGE_NOT_FOUND
        assert world.record(G).phase is Ownership.GONE
        assert paths.name("web") not in world.store.tree.nodes
    world.put(paths.guest(G), ARRIVING)
    async with real(world, FakeEngine(), tmp_path) as client:
        prepared = client.prepare_destination(REF, epoch=0, source_peer=PEER, timeout_ms=1000, multifd_channels=0)
        assert await refused(prepared) is R.IMAGE_NOT_FOUND


async def test_a_guest_that_was_ended_is_gone_and_its_name_is_free(host: Host) -> None:
    await host.born()
    for _ in range(2):
        await host.client.end_guest(G)
        assert host.world.record(G).phase is Ownership.GONE
        assert not host.name_is_taken
    assert (await host.client.get_agent()).guests == ()


@pytest.mark.parametrize("owner", [HERE, THERE])
async def test_the_end_of_a_guest_that_is_gone_is_no_error(host: Host, owner: HostRef) -> None:
    """And the name may belong to another life by then."""
    host.world.put(paths.guest(G), handover.gone(replace(IDLE, owner=owner), writer="a"))
    host.world.put(paths.name("web"), "another")
    await host.client.end_guest(G)
    assert host.name_is_taken


async def test_a_crashed_guest_can_be_ended(host: Host) -> None:
    host.world.put(paths.guest(G), handover.crashed(IDLE, writer="a"))
    await host.client.end_guest(G)
    assert host.world.record(G).phase is Ownership.GONE


async def test_a_guest_that_is_leaving_is_not_ended(host: Host) -> None:
    await host.born()
    await write(host.world, paths.guest(G), LEAVING)
    assert await refused(host.client.end_guest(G)) is R.GUEST_IS_MIGRATING
    assert host.world.record(G) == LEAVING


@pytest.mark.parametrize("record", [BIRTH, replace(IDLE, owner=THERE)], ids=["starting", "elsewhere"])
async def test_a_guest_that_is_not_at_rest_here_is_not_ended(host: Host, record: GuestRecord) -> None:
    host.world.put(paths.guest(G), record)
    assert await refused(host.client.end_guest(G)) is R.GUEST_IS_MIGRATING
    assert host.world.record(G) == record


async def test_a_wish_is_applied_to_a_guest_at_rest(host: Host) -> None:
    await host.born()
    for sequence, (run, state) in enumerate(((False, RunState.PAUSED), (True, RunState.RUNNING)), 1):
        await host.wish(run, sequence)
        for _ in range(2):
            applied = await host.client.apply_want_run(G, sequence)
            assert (applied.applied, applied.run_state) == (True, state)
        assert [guest.run_state for guest in (await host.client.get_agent()).guests] == [state]


async def test_a_guest_that_has_shut_down_takes_no_wish_and_can_be_ended(host: Host) -> None:
    await host.born()
    host.shut_down()
    for sequence, run in enumerate((False, True), 1):
        await host.wish(run, sequence)
        applied = await host.client.apply_want_run(G, sequence)
        assert (applied.applied, applied.run_state) == (False, RunState.ENDED)
    await host.client.end_guest(G)
    assert host.world.record(G).phase is Ownership.GONE


async def test_guests_that_are_not_here(host: Host) -> None:
    for call in (host.client.start_guest, host.client.end_guest):
        assert await refused(call(UNKNOWN)) is R.NOT_FOUND
    assert await refused(host.client.apply_want_run(UNKNOWN, 0)) is R.NOT_FOUND
    host.world.put(paths.guest(G), replace(IDLE, owner=THERE))
    assert await refused(host.client.apply_want_run(G, 0)) is R.NOT_FOUND
    await host.client.nudge(G)


async def test_a_watch_begins_with_everything_and_tells_what_changed(host: Host) -> None:
    async for nothing in host.client.watch_agent(timeout_s=5):
        assert nothing == AgentSample()
        break
    status = await host.born()
    told: list[GuestStatus] = []
    async with asyncio.timeout(20):
        async for sample in host.client.watch_agent():
            told += sample.guests
            if told == [status]:
                await host.wish(False, 1)
                await host.client.apply_want_run(G, 1)
            if told[-1].run_state is RunState.PAUSED:
                break
    assert told[0] == status


async def test_a_watch_does_not_begin_with_a_guest_that_has_ended(host: Host) -> None:
    await host.born()
    await host.client.end_guest(G)
    async for first in host.client.watch_agent(timeout_s=5):
        assert first == AgentSample()
        break


# --- guests that somebody else has started ----------------------------------------------------------------------------


async def test_an_examination_tells_of_the_guest_and_changes_nothing(host: Host) -> None:
    before = dict(host.world.store.tree.nodes)
    wished = GuestSpec("shop", labels={"tier": "db"}, on_host_death=OnHostDeath.RESTART)
    found = await host.examined(wished=wished, name="shop")
    assert (found.start_time, found.running) == (start_time_of(host.by_hand.pid), True)
    assert (found.spec.name, found.spec.labels, found.spec.memory_mib) == ("shop", {"tier": "db"}, 64)
    assert (found.spec.on_host_death, found.spec.adopted) == (OnHostDeath.RESTART, None)
    assert found.obstacles == ()
    host.by_hand.be_odd()
    assert {reason for reason, _ in (await host.examined()).obstacles} == {R.NOT_ADOPTABLE}
    now = host.world.store.tree.nodes
    assert all(path.startswith("/hosts/") for path in now if now[path] != before.get(path))
    assert (await host.client.get_agent()).guests == ()


async def test_a_screen_is_served_while_its_guest_is_here(host: Host) -> None:
    host.world.put(paths.guest_spec(G), GuestSpec("web", display=Display(vnc=True)))
    await host.born()
    found = await host.client.open_display(G)
    assert (found.host, found.socket.endswith(".vnc")) == (HERE.host, True)
    assert (found.address, found.password) == ("", "")  # others do not reach the socket
    await host.client.end_guest(G)
    assert await refused(host.client.open_display(G)) in (R.GUEST_NOT_RUNNING, R.NOT_FOUND)


async def test_a_guest_without_a_screen_is_refused_one(host: Host) -> None:
    assert await refused(host.client.open_display(UNKNOWN)) is R.NOT_FOUND
    await host.born()
    assert await refused(host.client.open_display(G)) is R.DISPLAY_NOT_AVAILABLE


async def test_what_cannot_be_examined_is_refused(host: Host) -> None:
    examine = host.client.examine_vmm
    assert await refused(examine("web", 1, "/run/q", None)) is R.INVALID_ARGUMENT
    assert await refused(examine("web", host.by_hand.pid, "q", None)) is R.INVALID_ARGUMENT
    assert await refused(examine("web", 1 << 22, "/run/q", None)) is R.NOT_FOUND
    host.by_hand.be_busy()
    assert await refused(host.examined()) is R.MONITOR_BUSY


async def test_a_guest_that_is_adopted_is_born_in_the_process_that_there_is(host: Host) -> None:
    status = await host.adopted()
    assert (status.pid, status.run_state) == (host.by_hand.pid, RunState.RUNNING)
    assert await host.client.start_guest(G) == status
    assert (host.world.record(G).phase, (await host.client.get_agent()).guests) == (Ownership.IDLE, (status,))
    assert await refused(host.examined(name="other")) is R.ALREADY_EXISTS
    assert await refused(host.client.change_machine(G, MachineChange(vcpus=2))) is R.NOT_ADOPTABLE, (
        "not before it moved"
    )


async def test_another_process_under_the_same_pid_is_not_taken_over(host: Host) -> None:
    assert await refused(host.adopted(later_s=1)) is R.NOT_FOUND
    assert host.world.record(G).phase is Ownership.GONE
    assert not host.name_is_taken
    await host.examined()


async def test_what_is_given_back_is_no_guest_and_can_be_adopted_again(host: Host) -> None:
    await host.adopted()
    for _ in range(2):
        await host.client.release_vmm(G)
        assert (host.world.record(G).phase, host.world.record(G).released) == (Ownership.GONE, True)
        assert not host.name_is_taken
    assert (await host.client.get_agent()).guests == ()
    assert (await host.examined()).obstacles == ()


async def test_a_guest_that_was_started_here_is_given_back_to_nobody(host: Host) -> None:
    await host.born()
    assert await refused(host.client.release_vmm(G)) is R.NOT_ADOPTABLE
    assert host.world.record(G).phase is Ownership.IDLE
    assert await refused(host.client.release_vmm(UNKNOWN)) is R.NOT_FOUND


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (replace(IDLE, owner=THERE), R.GUEST_IS_MIGRATING),
        (LEAVING, R.GUEST_IS_MIGRATING),
        (handover.crashed(IDLE, writer="a"), R.GUEST_NOT_RUNNING),
        (handover.gone(IDLE, writer="a"), R.GUEST_NOT_RUNNING),
    ],
    ids=["elsewhere", "leaving", "crashed", "gone"],
)
async def test_only_a_guest_at_rest_here_is_given_back(host: Host, record: GuestRecord, reason: RefusalReason) -> None:
    host.world.put(paths.guest(G), record)
    assert await refused(host.client.release_vmm(G)) is reason
    assert host.world.record(G) == record


# --- machines that run ------------------------------------------------------------------------------------------------

GROWING = GuestSpec("web", memory_mib=64, max_memory_mib=1024, max_vcpus=4)
DATA = DiskSpec("data", "fast", "data.img", DiskFormat.RAW)


@pytest.fixture
async def growing(host: Host) -> Host:
    """With a guest that has room for more, and an image in the host's pool."""
    if paths.reservations("h2") not in host.world.store.tree.nodes:  # a real agent has made it
        host.world.put(paths.reservations("h2"), {})
    host.world.put(paths.guest_spec(G), GROWING)
    await host.import_image(DATA.image, b"x" * 65536)
    await host.born()
    return host


async def test_what_is_attached_is_recorded_and_what_is_detached_as_well(growing: Host) -> None:
    wanted = GROWING
    for change in (MachineChange(disk=DATA), MachineChange(memory_mib=64 + 256), MachineChange(vcpus=3)):
        wanted = changed(wanted, change)
        for _ in range(2):  # may be repeated
            assert await growing.change(change) == wanted == growing.spec
    assert await growing.change(MachineChange(detach_disk="data")) == replace(wanted, disks=()) == growing.spec
    assert await refused(growing.change(MachineChange(detach_disk="data"))) is R.NOT_FOUND
    assert (await growing.client.list_pool_images("fast", "", 2))[0], "its image stays"


async def test_a_change_that_makes_no_sense_changes_nothing(growing: Host) -> None:
    await growing.change(MachineChange(disk=DATA))
    before = growing.spec
    for change, reason in (
        (MachineChange(memory_mib=65), R.INVALID_ARGUMENT),
        (MachineChange(vcpus=5), R.INVALID_ARGUMENT),
        (MachineChange(disk=replace(DATA, image="other.img")), R.ALREADY_EXISTS),
        (MachineChange(detach_nic="none"), R.NOT_FOUND),
    ):
        assert await refused(growing.change(change)) is reason
    assert growing.spec == before


async def test_memory_that_the_host_has_promised_meanwhile_is_not_given_away(growing: Host) -> None:
    more = MachineChange(memory_mib=64 + 256)
    seen = growing.promised
    with pytest.raises(DroverError) as stale:
        await growing.client.change_machine(G, more, seen + 7)
    assert (stale.value.reason, stale.value.details) == (R.OUTCOME_UNKNOWN, {"moved": "reservations"})
    assert growing.spec == GROWING
    await growing.change(more)
    assert growing.promised > seen, "whoever placed by it looks again"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (replace(IDLE, owner=THERE), R.GUEST_NOT_RUNNING),
        (LEAVING, R.GUEST_IS_MIGRATING),
        (handover.crashed(IDLE, writer="a"), R.GUEST_NOT_RUNNING),
    ],
    ids=["elsewhere", "leaving", "crashed"],
)
async def test_only_the_machine_of_a_guest_at_rest_is_changed(
    growing: Host, record: GuestRecord, reason: RefusalReason
) -> None:
    await write(growing.world, paths.guest(G), record)
    assert await refused(growing.change(MachineChange(vcpus=2))) is reason
    assert growing.spec == GROWING


# --- attempts: what the coordinator relies on -------------------------------------------------------------------------


class Side(ABC):
    """One host as the coordinator sees it."""

    def __init__(self, port: AgentPort, world: World) -> None:
        self.port = port
        self.world = world
        self.elect(0)

    def elect(self, epoch: int) -> None:
        """Another coordinator leads."""
        self.world.store.tree.nodes[paths.epoch()] = Versioned(b"", epoch, 0)

    @abstractmethod
    async def runs(self) -> None:
        """The guest runs here."""

    @abstractmethod
    def fail_transfer(self) -> None:
        """The next attempt ends with ENGINE_FAILED."""

    async def prepare(self, ref: AttemptRef = REF, epoch: int = 0) -> Prepared:
        return await self.port.prepare_destination(
            ref, epoch=epoch, source_peer=PEER, timeout_ms=5_000, multifd_channels=0
        )

    async def conduct(self, ref: AttemptRef = REF, epoch: int = 0) -> None:
        prepared = Prepared("inc", replace(PEER, port=9), PEER)
        await self.port.conduct_attempt(ConductOrder(ref, epoch, prepared, THERE, MigrationPolicy()))


class RealSide(Side):
    def __init__(self, client: AgentClient, world: World, engine: FakeEngine) -> None:
        super().__init__(client, world)
        self.client = client
        self.engine = engine

    async def runs(self) -> None:
        self.world.put(paths.guest(G), BIRTH)
        await self.client.start_guest(G)

    def fail_transfer(self) -> None:
        self.engine.script.fail_outgoing = "no route"


class FakeSide(Side):
    async def runs(self) -> None:
        self.world.put(paths.guest(G), IDLE)

    def fail_transfer(self) -> None:
        self.world.ends = [AbortReason.ENGINE_FAILED]


@pytest.fixture(params=["fake", "agent"])
async def side(request: pytest.FixtureRequest, world: World, tmp_path: Path) -> AsyncIterator[Side]:
    if request.param == "agent":
        engine = FakeEngine()
        async with real(world, engine, tmp_path) as client:
            yield RealSide(client, world, engine)
        return
    yield FakeSide(world.at("h2:1"), world)
    await world.close()


STALE = [
    (lambda record: record, replace(REF, attempt=2)),
    (lambda record: record, replace(REF, migration="fedcba543210")),
    (lambda record: replace(record, phase=Ownership.IDLE), REF),
    (lambda record: handover.abort(record, REF.migration, 1, AbortReason.CANCELLED, writer="a"), REF),
]
"""What became of the record, and the attempt that it does not wait for."""
stale = pytest.mark.parametrize(("change", "ref"), STALE, ids=["other attempt", "other migration", "idle", "aborted"])


async def test_a_destination_is_prepared_once_per_attempt(side: Side) -> None:
    side.world.put(paths.guest(G), ARRIVING)
    prepared = await side.prepare()
    assert all((prepared.inc, prepared.stream, prepared.peer))
    assert await side.prepare() == prepared
    assert side.world.record(G) == ARRIVING, "the source binds it"


@stale
async def test_a_destination_is_not_prepared_for_a_stale_attempt(
    side: Side, change: Callable[[GuestRecord], GuestRecord], ref: AttemptRef
) -> None:
    side.world.put(paths.guest(G), change(ARRIVING))
    assert await refused(side.prepare(ref)) is R.STALE_ATTEMPT


async def test_a_destination_is_not_prepared_when_another_one_is_bound(side: Side) -> None:
    side.world.put(paths.guest(G), handover.bind(ARRIVING, REF.migration, 1, "another", writer="a"))
    assert await refused(side.prepare()) is R.STALE_ATTEMPT


@stale
async def test_a_stale_attempt_is_not_conducted(
    side: Side, change: Callable[[GuestRecord], GuestRecord], ref: AttemptRef
) -> None:
    await side.runs()
    await write(side.world, paths.guest(G), change(LEAVING))
    assert await refused(side.conduct(ref)) is R.STALE_ATTEMPT
    assert await side.port.get_attempt(ref.migration, ref.attempt) == AttemptSeen(known=False)


async def test_a_guest_that_there_is_not_goes_nowhere(side: Side) -> None:
    ref = replace(REF, guest=UNKNOWN)
    assert await refused(side.prepare(ref)) is R.NOT_FOUND
    assert await refused(side.conduct(ref)) is R.NOT_FOUND


async def test_an_attempt_is_conducted_once_and_its_report_stays(side: Side) -> None:
    await side.runs()
    await write(side.world, paths.guest(G), LEAVING)
    side.fail_transfer()
    await side.conduct()
    seen = await side.port.get_attempt(REF.migration, 1)
    assert seen.known, "from its acceptance on"
    async with asyncio.timeout(10):
        while not seen.ended:
            await side.conduct()
            seen = await side.port.get_attempt(REF.migration, 1)
            await asyncio.sleep(0.01)
    assert seen.known
    assert seen.report is not None
    assert (seen.report.attempt, seen.report.outcome, seen.report.reason) == (1, "ABORTED", AbortReason.ENGINE_FAILED)
    record = side.world.record(G)
    assert (record.phase, record.inc, record.reason) == (Ownership.ABORTED, "inc", AbortReason.ENGINE_FAILED)
    await side.conduct()
    assert await side.port.get_attempt(REF.migration, 1) == seen
    assert side.world.record(G) == record


async def test_an_attempt_that_nobody_conducted_is_unknown(side: Side) -> None:
    assert await side.port.get_attempt("abcdef012345", 7) == AttemptSeen(known=False)
    await side.port.nudge(G)


async def test_a_coordinator_that_was_followed_by_another_is_refused(side: Side) -> None:
    """Also when the other one's call was refused for another reason."""
    side.world.put(paths.guest(G), ARRIVING)
    side.elect(3)
    prepared = await side.prepare(epoch=3)
    assert await refused(side.prepare(epoch=2)) is R.STALE_EPOCH
    assert await refused(side.conduct(epoch=2)) is R.STALE_EPOCH
    assert await side.prepare(epoch=3) == prepared
    side.elect(4)
    assert await refused(side.prepare(replace(REF, attempt=9), epoch=4)) is R.STALE_ATTEMPT
    assert await refused(side.prepare(epoch=3)) is R.STALE_EPOCH


@pytest.mark.rule("H12")
async def test_an_epoch_that_was_given_to_nobody_is_refused_and_harms_nobody(side: Side) -> None:
    side.world.put(paths.guest(G), ARRIVING)
    side.elect(3)
    assert await refused(side.prepare(epoch=2**62)) is R.STALE_EPOCH
    assert await refused(side.conduct(epoch=4)) is R.STALE_EPOCH
    await side.prepare(epoch=3)


@pytest.mark.rule("H12")
async def test_a_ledger_that_was_restored_is_followed_to_its_lower_epoch(side: Side) -> None:
    side.world.put(paths.guest(G), ARRIVING)
    side.elect(30)
    prepared = await side.prepare(epoch=30)
    side.elect(7)
    assert await side.prepare(epoch=7) == prepared
    assert await refused(side.prepare(epoch=30)) is R.STALE_EPOCH
