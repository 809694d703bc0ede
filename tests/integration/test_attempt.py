"""One attempt end to end: both session machines and their shells, real QEMU, real ZooKeeper.

The devices are in memory and the two agents talk within this process; everything that decides, the VMMs, the stream
between them and the ledger are the real parts.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from agents.attempt_ledger import AttemptLedger
from agents.destination_runner import DestinationRunner
from agents.destination_session import DestinationStage, DestinationState
from agents.engine.base import HoldStart, OutgoingOptions, RunState, Vmm, VmmSpec
from agents.engine.qemu.engine import QemuEngine
from agents.session import Seen
from agents.shims.base import Frame, Load
from agents.source_runner import SourceRunner
from agents.source_session import SourceStage, SourceState
from orchestrator.core import handover
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AckRequest, AttemptRef, HostRef
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import GuestSpec, Requests, TimelineEntry, Workload
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger, op_create, op_set
from orchestrator.ledger.store import Done
from orchestrator.ledger.zookeeper import ZooKeeperStore
from tests.contract.test_engine import image, no_qemu
from tests.fakes.shims import FakeDestinationShim, FakeSourceShim
from tests.fakes.zookeeper import ZooKeeperServer, missing

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.zookeeper,
    pytest.mark.integration,
    no_qemu,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
S, D = HostRef("host-1", "boot-1"), HostRef("host-2", "boot-2")
LINK = 1 << 30


@dataclass
class Link:
    """Both directions between the two agents of an attempt."""

    source: SourceRunner | None = None
    destination: DestinationRunner | None = None

    async def ping(self) -> bool:
        return self.destination is not None

    async def send_frame(self, frame: Frame) -> None:
        assert self.destination is not None
        await self.destination.frame(frame)

    async def go(self, zxid: int, want_run: bool) -> bool:
        assert self.destination is not None
        self.destination.go(self.destination.state.inc, want_run)
        return self.destination.started.is_set()

    async def ack(self, entry: AckRequest) -> None:
        assert self.source is not None
        self.source.acked(entry)

    async def loaded(self, inc: str, loads: tuple[Load, ...]) -> None:
        assert self.source is not None
        self.source.loaded(inc, loads)

    async def failed(self, inc: str) -> None:
        assert self.source is not None
        self.source.feed(Seen.DEST_FAILED)

    async def done(self, inc: str) -> None:
        assert self.source is not None
        self.source.feed(Seen.DONE_KNOWN)


@dataclass
class Lab:
    """A guest on host-1 and what it takes to try to move it to host-2."""

    store: ZooKeeperStore
    engine: QemuEngine
    directory: Path
    guest: str = field(default_factory=lambda: uuid.uuid4().hex)
    migration: str = field(default_factory=lambda: uuid.uuid4().hex)
    attempt: int = 0
    source: Vmm | None = None
    vmms: list[Vmm] = field(default_factory=list[Vmm])

    def spec(self, inc: str) -> VmmSpec:
        guest = GuestSpec("g", memory_mib=64, workload=Workload(dirty_mib=1, dirty_pages_per_s=100))
        return VmmSpec(self.guest, inc, guest, self.directory, self.directory / f"{inc}.con", None, "127.0.0.1")

    async def born(self) -> None:
        ledger = Ledger(self.store)
        await ledger.init_tree()
        await self.store.ensure(paths.migration(self.migration))
        result = await self.store.multi(
            [
                op_create(paths.guest(self.guest), GuestRecord("g", Ownership.IDLE, S)),
                op_create(paths.requests(self.migration), Requests()),
                op_create(paths.acks(self.migration), Requests()),
            ]
        )
        assert isinstance(result, Done), result
        self.source = await self.engine.start(self.spec("s"))
        self.vmms.append(self.source)

    async def record(self) -> GuestRecord:
        found = await Ledger(self.store).read_guest(self.guest)
        assert found is not None
        return found[0]

    async def run(
        self,
        source_shims: Sequence[FakeSourceShim] = (),
        destination_shims: Sequence[FakeDestinationShim] = (),
        policy: MigrationPolicy = MigrationPolicy(),
    ) -> tuple[SourceRunner, DestinationRunner]:
        """One attempt, opened as the coordinator opens it."""
        self.attempt += 1
        inc = f"i{self.attempt}"
        found = await Ledger(self.store).read_guest(self.guest)
        assert found is not None
        opened = handover.open_attempt(found[0], self.migration, self.attempt, D, epoch=1, writer="test")
        assert isinstance(await self.store.multi([op_set(paths.guest(self.guest), opened, found[1])]), Done)
        copy = await self.engine.prepare_incoming(self.spec(inc), self.migration, self.attempt)
        self.vmms.append(copy)
        ref, link, devices = AttemptRef(self.guest, self.migration, self.attempt), Link(), bool(source_shims)
        assert self.source is not None
        hold = HoldStart.TRICKLE if devices else HoldStart.OPEN
        link.source = SourceRunner(
            SourceState(ref, S, inc, has_devices=devices),
            self.source,
            source_shims,
            AttemptLedger(self.store, ref, S, inc, "agent-1"),
            link,
            policy,
            OutgoingOptions(copy.metadata.endpoint, hold, 0, LINK, 300),
            self.attempt,
        )

        async def want_run() -> bool:
            return True

        link.destination = DestinationRunner(
            DestinationState(ref, D, inc, has_devices=devices),
            copy,
            destination_shims,
            AttemptLedger(self.store, ref, D, inc, "agent-2"),
            link,
            self.directory / f"{inc}.marker",
            want_run,
        )
        await link.destination.begin(self.attempt)
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(link.source.run())
            group.create_task(link.destination.run())
        return link.source, link.destination


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooKeeperServer]:
    running = ZooKeeperServer(tmp_path_factory.mktemp("zk") / "server")
    running.start()
    yield running
    running.kill()


@pytest.fixture
async def lab(server: ZooKeeperServer, tmp_path: Path) -> AsyncIterator[Lab]:
    store = ZooKeeperStore(server.hosts, session_timeout_s=4)
    await store.start()
    made = Lab(store, QemuEngine(image()), tmp_path)
    await made.born()
    yield made
    for vmm in made.vmms:
        await vmm.destroy()
    await store.close()


def blackout_ms(timeline: Sequence[TimelineEntry]) -> float:
    stopped = next(entry.at_ms for entry in timeline if entry.event == "vcpus stopped")
    return next(entry.at_ms for entry in timeline if entry.event == "vcpus run" and entry.at_ms > stopped) - stopped


async def test_a_clean_attempt_gives_the_guest_away_once(lab: Lab) -> None:
    source, destination = await lab.run()
    assert source.state.stage is SourceStage.ENDED_COMMITTED
    assert destination.state.stage is DestinationStage.ENDED_DONE
    record = await lab.record()
    assert (record.phase, record.owner, record.inc) == (Ownership.IDLE, D, "i1")
    assert not source.vmm.alive()
    assert (await destination.vmm.state()).run_state is RunState.RUNNING
    assert source.ledger.writes + destination.ledger.writes == 3, "bind, COMMIT, DONE"


@pytest.mark.parametrize("devices", [1, 3])
async def test_devices_move_with_their_guest(lab: Lab, devices: int) -> None:
    shims = [FakeSourceShim(f"dev{n}") for n in range(devices)]
    copies = [FakeDestinationShim(f"dev{n}") for n in range(devices)]
    source, destination = await lab.run(shims, copies)
    assert source.state.stage is SourceStage.ENDED_COMMITTED
    assert [shim.state for shim in shims] == ["RETIRED"] * devices
    assert [copy.state for copy in copies] == ["RUNNING"] * devices
    assert (await destination.vmm.state()).run_state is RunState.RUNNING
    stored = await Ledger(lab.store).read(Requests, paths.requests(lab.migration))
    assert stored is not None
    assert [entry.device for entry in stored[0].entries] == [f"dev{n}" for n in range(devices)]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("hook", ["freeze", "final_query"])
async def test_a_late_ack_aborts_the_guest_runs_on_and_the_retry_succeeds(lab: Lab, hook: str, times: int) -> None:
    shim = FakeSourceShim("dpu", late_at=hook, late_times=times)
    pauses: list[float] = []
    for attempt in range(1, times + 1):
        source, destination = await lab.run([shim], [FakeDestinationShim("dpu")])
        assert source.state.stage is SourceStage.ENDED_ABORTED
        record = await lab.record()
        assert (record.phase, record.attempt, record.owner) == (Ownership.ABORTED, attempt, S)
        assert (record.reason, record.devices) == (AbortReason.LATE_SWITCHOVER_ACK, ("dpu",))
        assert (await source.vmm.state()).run_state is RunState.RUNNING
        assert shim.state == "RUNNING"
        assert not destination.vmm.alive()
        pauses.append(blackout_ms(source.timeline))
    print(f"guest stopped for {pauses} ms by its late ACKs")
    source, destination = await lab.run([shim], [FakeDestinationShim("dpu")])
    assert source.state.stage is SourceStage.ENDED_COMMITTED
    assert (await lab.record()).attempt == times + 1
    assert (await destination.vmm.state()).run_state is RunState.RUNNING


async def test_a_device_that_cannot_validate_never_becomes_the_guest(lab: Lab) -> None:
    source, destination = await lab.run([FakeSourceShim("dpu")], [FakeDestinationShim("dpu", spoil=True)])
    assert source.state.stage is SourceStage.ENDED_ABORTED
    record = await lab.record()
    assert (record.phase, record.owner) == (Ownership.ABORTED, S)
    assert (await source.vmm.state()).run_state is RunState.RUNNING
    assert not destination.vmm.alive()


async def test_an_ack_that_never_comes_ends_at_its_deadline(lab: Lab) -> None:
    policy = replace(MigrationPolicy(), ack_timeout_ms=500)
    source, _ = await lab.run([FakeSourceShim("dpu")], [FakeDestinationShim("other")], policy)
    assert (await lab.record()).reason is AbortReason.ACK_TIMEOUT
    assert (await source.vmm.state()).run_state is RunState.RUNNING
