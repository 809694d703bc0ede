"""The agent over a fake engine and a ledger in memory: calls that meet a keeper just ending, calls that are cut off."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from agents.__main__ import Peers
from agents.agent import Agent
from agents.config import AgentConfig, PoolConfig
from agents.engine import base as engine
from agents.guest import keeper
from agents.guest.files import GuestFiles
from agents.handover import preflight
from agents.host.metrics import Metrics
from orchestrator import descriptors
from orchestrator.core import handover
from orchestrator.core.agent import ConductOrder, PrepareOrder, RunState
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.migration import Prepared
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import DeviceSpec, DiskSpec, GuestSpec, HostRecord, PoolKind, ShimKind, WantRun
from orchestrator.ledger import paths
from tests.fakes.config import agent_config, agent_identity
from tests.fakes.coordination import MemoryStore, World
from tests.fakes.engine import FakeEngine, FakeVmm

HERE, THERE = HostRef("h2", "boot-h2"), HostRef("h1", "boot-h1")
G = "0f0e0d0c-0b0a-4987-8654-321001234567"
REF = AttemptRef(G, "abcdef012345", 1)
PEER, STREAM = Endpoint("127.0.0.1", 1), Endpoint("127.0.0.1", 9)
needs_tool = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img")
ORDER = PrepareOrder(REF, 0, PEER, 5_000)


class SlowEngine(FakeEngine):
    """Starting a guest takes until `go`; a `deaf` one's processes do not answer whoever adopts them."""

    go: asyncio.Event
    deaf = False
    fails = ""
    """What every start of a guest ends with."""

    async def adopt(self, metadata: engine.VmmMetadata, spec: engine.VmmSpec) -> FakeVmm | None:
        if self.deaf:
            raise engine.EngineTimeout("no answer")
        return await super().adopt(metadata, spec)

    async def start(self, spec: engine.VmmSpec) -> FakeVmm:
        await self.go.wait()
        if self.fails:
            raise engine.EngineError(self.fails)
        return await super().start(spec)


@pytest.fixture
def world() -> World:
    world = World(MemoryStore())
    for root in paths.ROOTS:
        world.put(root, WantRun())
    world.put(paths.host(THERE.host), HostRecord(THERE.host, THERE.boot_id, "127.0.0.1:2", str(PEER), 1, 1))
    world.put(paths.epoch(), WantRun())  # its version is the epoch: 0
    world.put(paths.guest_spec(G), GuestSpec("web"))
    world.put(paths.want_run(G), WantRun())
    return world


@pytest.fixture
def mover() -> SlowEngine:
    mover = SlowEngine()
    mover.go = asyncio.Event()
    return mover


@pytest.fixture
def config(tmp_path: Path) -> AgentConfig:
    return agent_config(tmp_path)


def made(config: AgentConfig, world: World, mover: SlowEngine) -> Agent:
    stores = (world.store, MemoryStore(world.store.tree))
    return Agent(
        config, agent_identity(HERE), cast(engine.MigrationEngine, mover), stores, Peers(), Metrics(CollectorRegistry())
    )


@pytest.fixture
async def agent(config: AgentConfig, world: World, mover: SlowEngine) -> AsyncIterator[Agent]:
    agent = made(config, world, mover)
    await agent.start()
    yield agent
    await agent.stop()


def on_its_way_here(world: World) -> None:
    idle = GuestRecord("web", Ownership.IDLE, THERE)
    opened = handover.open_attempt(idle, REF.migration, REF.attempt, HERE, epoch=0, writer="c")
    world.put(paths.guest(G), opened)


async def test_nothing_is_taken_on_while_descriptors_have_run_out(
    agent: Agent, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_its_way_here(world)
    monkeypatch.setattr(descriptors.reserve, "look", lambda: None)
    monkeypatch.setattr(descriptors.reserve, "released", True)
    for call in (agent.prepare_destination(ORDER), agent.start_guest(G)):
        with pytest.raises(DroverError, match="no descriptors left") as caught:
            await call
        assert caught.value.reason is RefusalReason.NO_CAPACITY
    monkeypatch.setattr(descriptors.reserve, "released", False)
    await agent.prepare_destination(ORDER)


async def test_a_destination_is_never_prepared_by_a_keeper_that_has_just_ended(agent: Agent, world: World) -> None:
    """The guest left this host and comes back at once: its old keeper forgets it while the call waits for its turn.
    The copy would have nobody, and the next scan would declare a running guest crashed."""
    world.put(paths.guest(G), GuestRecord("web", Ownership.IDLE, THERE))
    old = await agent._host(G)
    forget = old._forget

    def then_it_comes_back() -> None:
        forget()
        on_its_way_here(world)

    old._forget = then_it_comes_back
    async with old._turn:
        old.wake()
        await asyncio.sleep(0.01)
        preparing = asyncio.create_task(agent.prepare_destination(ORDER))
        await asyncio.sleep(0.01)
    prepared = await preparing
    assert old.forgotten
    keeper = agent._known(G)
    assert list(keeper.copies) == [prepared.inc]
    assert await agent.prepare_destination(ORDER) == prepared


async def test_a_birth_goes_on_when_its_caller_is_cut_off(agent: Agent, world: World, mover: SlowEngine) -> None:
    """Else the guest stays STARTING for ever, and its name taken."""
    world.put(paths.guest(G), handover.birth("web", HERE, writer="api"))
    calling = asyncio.create_task(agent.start_guest(G))
    await asyncio.sleep(0.02)
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)
    mover.go.set()
    async with asyncio.timeout(5):
        while world.record(G).phase is not Ownership.IDLE:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    (status,) = agent.status().guests
    assert status.run_state is RunState.RUNNING


async def left_by_an_earlier_agent(config: AgentConfig, world: World, mover: SlowEngine) -> GuestFiles:
    """A guest that runs here, with its files."""
    world.put(paths.guest(G), GuestRecord("web", Ownership.IDLE, HERE))
    files = GuestFiles(config, G, GuestSpec("web"))
    files.make()
    mover.go.set()
    vmm = await mover.start(files.vmm_spec("i1"))
    (files.directory / "i1.json").write_text(json.dumps(asdict(vmm.metadata)))
    return files


async def until_it_runs(agent: Agent) -> None:
    async with asyncio.timeout(20):
        while [each.run_state for each in agent.status().guests] != [RunState.RUNNING]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_vmm_that_does_not_answer_is_not_dead(config: AgentConfig, world: World, mover: SlowEngine) -> None:
    """Nothing is decided about its guest before it answers: not that it crashed, and not its end."""
    await left_by_an_earlier_agent(config, world, mover)
    mover.deaf = True
    agent = made(config, world, mover)
    await agent.start()
    await asyncio.sleep(0.1)
    with pytest.raises(DroverError) as refused:
        await agent.end_guest(G)
    assert refused.value.reason is RefusalReason.BUSY
    assert world.record(G).phase is Ownership.IDLE
    assert [each.run_state for each in agent.status().guests] in ([], [RunState.UNKNOWN])
    mover.deaf = False
    await until_it_runs(agent)
    await agent.stop()


@pytest.mark.parametrize("lost", ["guest.json", "i1.json"])
async def test_a_note_that_cannot_be_read_loses_no_guest(
    config: AgentConfig, world: World, mover: SlowEngine, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.agent.FIRST_SCAN_S", 1.0)  # a start waits so long for a look that cannot succeed
    files = await left_by_an_earlier_agent(config, world, mover)
    note = files.directory / lost
    whole = note.read_bytes()
    note.write_bytes(whole[:10])
    agent = made(config, world, mover)
    await agent.start()
    await asyncio.sleep(0.1)
    assert world.record(G).phase is Ownership.IDLE
    assert len(mover.processes) == 1
    note.write_bytes(whole)
    agent.nudge(G)
    await until_it_runs(agent)
    await agent.stop()


async def leaving(agent: Agent, world: World, mover: SlowEngine, prepared: Prepared) -> ConductOrder:
    """A guest that runs here, and an open attempt to move it."""
    world.put(paths.guest(G), handover.birth("web", HERE, writer="api"))
    mover.go.set()
    await agent.start_guest(G)
    opened = handover.open_attempt(world.record(G), REF.migration, REF.attempt, THERE, epoch=0, writer="c")
    world.put(paths.guest(G), opened)
    return ConductOrder(REF, 0, prepared, THERE, MigrationPolicy())


async def test_what_would_load_as_another_machine_is_refused_while_nothing_has_happened(
    agent: Agent, world: World, mover: SlowEngine
) -> None:
    order = await leaving(agent, world, mover, Prepared("inc", STREAM, PEER, "pc-i440fx-11.1", "none"))
    with pytest.raises(DroverError, match="machine type differs: pc here") as caught:
        await agent.conduct_attempt(order)
    assert caught.value.reason is RefusalReason.MACHINE_TYPE_MISMATCH
    assert world.record(G).inc == ""


async def test_the_mode_of_acks_matters_only_where_devices_inside_the_vmm_ask_for_them(
    agent: Agent, world: World, mover: SlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = Prepared("inc", STREAM, PEER, "pc", "per-device")
    await leaving(agent, world, mover, prepared)
    (own,) = agent._known(G).copies.values()
    await preflight.must_be_movable(mover, "h2", "web", own, prepared)
    monkeypatch.setattr(type(own), "in_vmm", lambda _self: object())
    with pytest.raises(DroverError, match="switchover-ack mode differs") as caught:
        await preflight.must_be_movable(mover, "h2", "web", own, prepared)
    assert caught.value.reason is RefusalReason.MACHINE_TYPE_MISMATCH


async def test_a_device_whose_state_would_stay_behind_is_refused(agent: Agent, world: World, mover: SlowEngine) -> None:
    mover.script.unmigratable = ((RefusalReason.DEVICE_NOT_MIGRATABLE, "device vu0 is a vfio-user-pci"),)
    order = await leaving(agent, world, mover, Prepared("inc", STREAM, PEER))
    with pytest.raises(DroverError, match="vu0") as caught:
        await agent.conduct_attempt(order)
    assert caught.value.reason is RefusalReason.DEVICE_NOT_MIGRATABLE


async def test_what_stands_against_a_guest_can_be_asked_before_any_attempt(
    agent: Agent, world: World, mover: SlowEngine
) -> None:
    job = (RefusalReason.BLOCK_JOB_RUNNING, "job backup works on a disk")
    mover.script.unmigratable = (job,)
    await leaving(agent, world, mover, Prepared("inc", STREAM, PEER))
    before = len(world.store.writes)
    assert await agent.check_guests([G, "somebody-else"]) == {G: (job,)}
    (own,) = agent._known(G).copies.values()
    assert isinstance(own.vmm, FakeVmm)
    own.vmm.end_guest("poweroff")
    ((reason, _),) = (await agent.check_guests([G]))[G]
    assert reason is RefusalReason.GUEST_NOT_RUNNING
    assert len(world.store.writes) == before
    with pytest.raises(DroverError, match="at most"):
        await agent.check_guests(["u"] * 1_001)


async def test_a_host_that_cannot_give_a_guest_its_devices_refuses_it(agent: Agent, world: World) -> None:
    """No preload is configured here."""
    world.put(paths.guest_spec(G), GuestSpec("web", devices=(DeviceSpec("nic", ShimKind.VFIO),)))
    on_its_way_here(world)
    with pytest.raises(DroverError, match="inside its VMM") as caught:
        await agent.prepare_destination(ORDER)
    assert caught.value.reason is RefusalReason.DEVICE_NOT_MIGRATABLE


@pytest.mark.parametrize(
    ("prepared", "destination", "reason"),
    [
        (Prepared("inc", Endpoint("192.0.2.66", 9), PEER), THERE, RefusalReason.WRONG_ENDPOINT),
        (Prepared("inc", STREAM, Endpoint("192.0.2.66", 1)), THERE, RefusalReason.WRONG_ENDPOINT),
        (Prepared("inc", STREAM, Endpoint("127.0.0.1", 2)), THERE, RefusalReason.WRONG_ENDPOINT),
        (Prepared("inc", STREAM, PEER), HostRef("h3", "boot-h3"), RefusalReason.STALE_ATTEMPT),
        (Prepared("inc", STREAM, PEER), HostRef("h1", "another"), RefusalReason.STALE_ATTEMPT),
    ],
)
async def test_a_guest_goes_only_where_its_destination_has_registered(
    agent: Agent,
    world: World,
    mover: SlowEngine,
    prepared: Prepared,
    destination: HostRef,
    reason: RefusalReason,
) -> None:
    """Whoever reached the agent's port, or a destination alone, could have any guest's memory sent anywhere."""
    order = replace(await leaving(agent, world, mover, prepared), destination=destination)
    with pytest.raises(DroverError) as caught:
        await agent.conduct_attempt(order)
    assert caught.value.reason is reason
    assert world.record(G).phase is Ownership.OPEN
    assert world.record(G).inc == "", "nothing is bound"
    assert agent.status().attempts == ()
    assert [each.run_state for each in agent.status().guests] == [RunState.RUNNING]


@pytest.mark.parametrize("registered", [None, "127.0.0.1:3", "exec:id:1", "h1:1"])
async def test_a_destination_speaks_only_to_what_the_source_has_registered(
    agent: Agent, world: World, mover: SlowEngine, registered: str | None
) -> None:
    on_its_way_here(world)
    world.store.tree.nodes.pop(paths.host(THERE.host))
    if registered is not None:
        world.put(paths.host(THERE.host), HostRecord(THERE.host, THERE.boot_id, "127.0.0.1:2", registered, 1, 1))
    with pytest.raises(DroverError) as caught:
        await agent.prepare_destination(ORDER)
    assert caught.value.reason is RefusalReason.WRONG_ENDPOINT
    assert mover.processes == {}, "no VMM was started"


async def test_what_is_prepared_is_at_the_registered_address(agent: Agent, world: World, config: AgentConfig) -> None:
    on_its_way_here(world)
    prepared = await agent.prepare_destination(ORDER)
    assert prepared.peer == Endpoint(config.address, config.peer_port)
    assert prepared.stream.ip == config.address


async def test_memory_that_a_copy_still_holds_is_not_given_away(
    agent: Agent, world: World, mover: SlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger may count a guest elsewhere already: what its copy takes here is known to this agent alone."""
    monkeypatch.setattr("agents.agent.MEMORY_S", 0.2)
    big = G[:-1] + "8"
    world.put(paths.guest_spec(big), GuestSpec("big", memory_mib=1000))
    world.put(paths.want_run(big), WantRun())
    world.put(paths.guest(big), handover.birth("big", HERE, writer="api"))
    mover.go.set()
    await agent.start_guest(big)
    on_its_way_here(world)
    with pytest.raises(DroverError, match="hold 1000 of 1024 MiB") as caught:
        await agent.prepare_destination(ORDER)
    assert caught.value.reason is RefusalReason.NO_CAPACITY
    waiting = asyncio.create_task(agent.prepare_destination(ORDER))
    await agent.end_guest(big)
    prepared = await waiting
    assert await agent.prepare_destination(ORDER) == prepared, "its own copy does not stand in its way"


async def test_no_guest_is_born_into_memory_that_a_copy_still_holds(
    agent: Agent, world: World, mover: SlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records counted it as free: the host was filled beyond what it has. The name is free again at once."""
    monkeypatch.setattr("agents.agent.MEMORY_S", 0.2)
    big, small = G[:-1] + "8", G[:-1] + "9"
    for uuid, name, memory_mib in ((big, "big", 1000), (small, "small", 64)):
        world.put(paths.name(name), uuid)
        world.put(paths.guest_spec(uuid), GuestSpec(name, memory_mib=memory_mib))
        world.put(paths.want_run(uuid), WantRun())
        world.put(paths.guest(uuid), handover.birth(name, HERE, writer="api"))
    mover.go.set()
    await agent.start_guest(big)
    with pytest.raises(DroverError, match="hold 1000 of 1024 MiB") as caught:
        await agent.start_guest(small)
    assert caught.value.reason is RefusalReason.NO_CAPACITY
    assert world.record(small).phase is Ownership.GONE
    assert paths.name("small") not in world.store.tree.nodes
    assert len(mover.processes) == 1
    assert (await agent.start_guest(big)).run_state is RunState.RUNNING, "its own copy does not stand in its way"


# --- images of guests that are not born -------------------------------------------------------------------------------


@pytest.fixture
def pooled(tmp_path: Path) -> AgentConfig:
    pool = tmp_path / "pool"
    pool.mkdir()
    return agent_config(tmp_path).model_copy(update={"pools": {"fast": PoolConfig(path=pool, kind=PoolKind.LOCAL)}})


ROOT = DiskSpec("root", "fast", "root.qcow2", size_bytes=1 << 20)


def to_be_born(world: World) -> None:
    world.put(paths.guest(G), handover.birth("web", HERE, writer="api"))
    world.put(paths.guest_spec(G), GuestSpec("web", disks=(ROOT,)))


@needs_tool
async def test_an_image_goes_with_the_birth_that_it_was_made_for(
    pooled: AgentConfig, world: World, mover: SlowEngine
) -> None:
    """It would keep the guest's next life, and any guest that brings an image of that name, away from this host."""
    to_be_born(world)
    mover.fails, agent = "no such CPU", made(pooled, world, mover)
    mover.go.set()
    await agent.start()
    with pytest.raises(DroverError, match="no such CPU"):
        await agent.start_guest(G)
    assert world.record(G).phase is Ownership.GONE
    assert list(pooled.pools["fast"].path.iterdir()) == []
    await agent.stop()


@needs_tool
async def test_an_agent_that_is_killed_at_a_birth_leaves_its_images_to_its_successor(
    pooled: AgentConfig, world: World, mover: SlowEngine
) -> None:
    to_be_born(world)
    first = made(pooled, world, mover)
    await first.start()
    calling = asyncio.create_task(first.start_guest(G))
    image = pooled.pools["fast"].path / "root.qcow2"
    async with asyncio.timeout(20):
        while not image.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    calling.cancel()
    await first.stop()
    assert image.exists()
    second = made(pooled, world, mover)
    await second.start()
    async with asyncio.timeout(20):
        while world.record(G).phase is not Ownership.GONE or (pooled.dir / "guests" / G[:16]).exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert list(pooled.pools["fast"].path.iterdir()) == []
    await second.stop()


@needs_tool
async def test_a_guest_that_has_run_leaves_its_image(pooled: AgentConfig, world: World, mover: SlowEngine) -> None:
    to_be_born(world)
    mover.go.set()
    agent = made(pooled, world, mover)
    await agent.start()
    await agent.start_guest(G)
    await agent.end_guest(G)
    assert [path.name for path in pooled.pools["fast"].path.iterdir()] == ["root.qcow2"]
    await agent.stop()


@needs_tool
async def test_an_image_that_somebody_else_put_there_is_left(
    pooled: AgentConfig, world: World, mover: SlowEngine
) -> None:
    to_be_born(world)
    image = pooled.pools["fast"].path / "root.qcow2"
    image.write_text("data")
    mover.fails, agent = "no such CPU", made(pooled, world, mover)
    mover.go.set()
    await agent.start()
    with pytest.raises(DroverError, match="no such CPU"):
        await agent.start_guest(G)
    assert image.read_text() == "data"
    await agent.stop()


async def stopped_here(config: AgentConfig, world: World, mover: SlowEngine) -> Agent:
    """The agent of a guest that has run here, and is kept without running."""
    GuestFiles(config, G, GuestSpec("web")).make()
    had = GuestRecord("web", Ownership.CRASHED, HERE, stopped=True)
    world.put(paths.guest(G), had)
    mover.go.set()
    agent = made(config, world, mover)
    await agent.start()
    async with asyncio.timeout(20):
        while (known := agent._guests.get(G)) is None or known.record != had:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return agent


async def looked(agent: Agent) -> None:
    """Its keeper has had its look, several times."""
    for _ in range(5):
        agent.nudge(G)
        await asyncio.sleep(0.02)


def start_again(world: World) -> None:
    world.put(paths.guest(G), handover.start_again(world.record(G), HERE, writer="api"))


async def test_a_stopped_guest_whose_record_says_that_it_is_to_start_waits_for_the_call(
    config: AgentConfig, world: World, mover: SlowEngine
) -> None:
    """The keeper hears of the record before the call comes that starts it."""
    agent = await stopped_here(config, world, mover)
    await looked(agent)
    start_again(world)
    await looked(agent)
    assert world.record(G).phase is Ownership.STARTING
    await agent.start_guest(G)
    assert world.record(G).phase is Ownership.IDLE
    await agent.stop()


async def test_a_guest_is_not_started_again_while_a_process_of_it_is_left(
    config: AgentConfig, world: World, mover: SlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a start which failed, and which could not be ended in time."""
    monkeypatch.setattr(keeper, "START_S", 2.0)
    agent = await stopped_here(config, world, mover)
    await looked(agent)
    start_again(world)
    left: list[int] = []

    async def starts(self: SlowEngine, spec: engine.VmmSpec) -> None:
        left.append(4711)
        raise engine.EngineError("destroy: not over after 5 s")

    monkeypatch.setattr(GuestFiles, "vmms", lambda _, **_of: list(left))
    with monkeypatch.context() as patched:
        patched.setattr(SlowEngine, "start", starts)
        with pytest.raises(DroverError, match="destroy: not over"):
            await agent.start_guest(G)
    with pytest.raises(DroverError, match="process 4711 of it runs here"):
        await agent.start_guest(G)
    await looked(agent)
    assert not world.record(G).stopped, "nobody may say that nothing of it is left"
    left.clear()
    async with asyncio.timeout(30):
        while not world.record(G).stopped:
            await looked(agent)
    start_again(world)
    assert (await agent.start_guest(G)).run_state is RunState.RUNNING
    await agent.stop()


async def test_a_start_that_nobody_asks_for_is_given_up(
    config: AgentConfig, world: World, mover: SlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever wrote it died: the guest is stopped as before, and can be started."""
    monkeypatch.setattr(keeper, "START_S", 0.2)
    agent = await stopped_here(config, world, mover)
    await looked(agent)
    start_again(world)
    async with asyncio.timeout(30):
        while not world.record(G).stopped:
            await looked(agent)
    await agent.stop()


@needs_tool
async def test_an_image_for_a_disk_that_was_added_goes_with_the_start_that_failed(
    pooled: AgentConfig, world: World, mover: SlowEngine
) -> None:
    """The guest has run before, and stays as it was."""
    agent = await stopped_here(pooled, world, mover)
    await looked(agent)
    mover.fails = "no such CPU"
    world.put(paths.guest_spec(G), GuestSpec("web", disks=(ROOT,)))
    start_again(world)
    with pytest.raises(DroverError, match="no such CPU"):
        await agent.start_guest(G)
    assert world.record(G).stopped
    assert list(pooled.pools["fast"].path.iterdir()) == []
    await agent.stop()


@needs_tool
async def test_a_start_that_its_agent_did_not_finish_can_be_repeated(
    pooled: AgentConfig, world: World, mover: SlowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed before the image of the added disk was made: that is no disk that the guest has run on."""
    agent = await stopped_here(pooled, world, mover)
    await looked(agent)
    world.put(paths.guest_spec(G), GuestSpec("web", disks=(ROOT,)))
    start_again(world)

    async def killed(*_: object) -> None:
        raise asyncio.CancelledError

    with monkeypatch.context() as patched:
        patched.setattr(preflight, "must_suit", killed)
        with pytest.raises(asyncio.CancelledError):
            await agent.start_guest(G)
        await agent.stop()
    monkeypatch.setattr(keeper, "START_S", 0.2)
    agent = made(pooled, world, mover)
    await agent.start()
    async with asyncio.timeout(30):
        while not world.record(G).stopped:
            await looked(agent)
    start_again(world)
    assert (await agent.start_guest(G)).run_state is RunState.RUNNING
    assert [path.name for path in pooled.pools["fast"].path.iterdir()] == [ROOT.image]
    files = agent._known(G).files
    assert not files.births.before.exists(), "a guest that runs has run with what it has"
    await agent.stop()


def test_what_a_guest_has_run_with_is_known_until_it_runs_again(config: AgentConfig) -> None:
    files = GuestFiles(config, G, GuestSpec("web", memory_mib=64))
    files.make()
    assert files.ran_with() == files.spec
    edited = files.with_spec(GuestSpec("web", memory_mib=128))
    edited.note()
    edited.births.failed()
    assert edited.ran_with() == files.spec
    edited.births.succeeded()
    assert edited.ran_with() == edited.spec
    edited.births.before.write_bytes(b"half a no")
    assert edited.ran_with() == edited.spec, "as strict as it can be: nothing is made in place of what may be missing"
    edited.remove()
    assert not edited.directory.exists()
