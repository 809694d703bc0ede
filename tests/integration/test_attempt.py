"""One attempt end to end: both session machines and their shells, real QEMU, real ZooKeeper.

The devices are in memory and the two agents talk within this process; everything that decides, the VMMs, the stream
between them and the ledger are the real parts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from agents.engine.base import HoldStart, OutgoingOptions, RunState, Vmm, VmmSpec, stream_of
from agents.engine.qemu.engine import QemuEngine
from agents.handover.destination import DestinationStage
from agents.handover.destination_shell import DestinationShell
from agents.handover.source import SourceStage
from agents.handover.source_shell import SourceShell
from deploy.lab.workload import Workload, boot_of
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import Ownership
from orchestrator.core.liveness import Liveness
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import GuestSpec, Requests, TimelineEntry
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.zookeeper import ZooKeeperStore
from tests.contract.test_engine import image, no_qemu
from tests.fakes.attempt import Coming, D, Leaving, Moves, S
from tests.fakes.shims import FakeDestinationShim, FakeSourceShim
from tests.fakes.zookeeper import ZooKeeperServer, missing

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.zookeeper,
    pytest.mark.integration,
    no_qemu,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
LINK = 1 << 30


@dataclass(kw_only=True)
class Lab(Moves):
    """With devices in memory."""

    engine: QemuEngine
    directory: Path
    vmm: Vmm = field(init=False)
    """The guest's on host-1."""
    vmms: list[Vmm] = field(default_factory=list[Vmm])

    def spec(self, inc: str) -> VmmSpec:
        guest = GuestSpec("g", memory_mib=64, boot=boot_of(Workload(dirty_mib=1, dirty_pages_per_s=100), seed=0))
        return VmmSpec(self.guest, inc, guest, self.directory, self.directory / f"{inc}.con", None, "127.0.0.1")

    async def born(self) -> None:
        await super().born()
        self.vmm = await self.engine.start(self.spec("s"))
        self.vmms.append(self.vmm)

    async def run(
        self,
        source_shims: Sequence[FakeSourceShim] = (),
        destination_shims: Sequence[FakeDestinationShim] = (),
        policy: MigrationPolicy = MigrationPolicy(),
    ) -> tuple[SourceShell, DestinationShell]:
        ref = await self.opened()
        inc = f"i{ref.attempt}"
        copy = await self.engine.prepare_incoming(self.spec(inc), self.migration, ref.attempt)
        self.vmms.append(copy)
        hold = HoldStart.TRICKLE if source_shims else HoldStart.OPEN
        options = OutgoingOptions(stream_of(copy.metadata), hold, 0, LINK, 300)
        here, there = Leaving(self.vmm, source_shims), Coming(inc, copy, destination_shims)
        await self.conducted(ref, here, there, policy, options, self.directory)
        return self.source, self.destination


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
    made = Lab(store=store, engine=QemuEngine(image()), directory=tmp_path)
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
    assert source.vmm.liveness() is Liveness.GONE
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
        assert destination.vmm.liveness() is Liveness.GONE
        pauses.append(blackout_ms(source.timeline))
    print(f"guest stopped for {pauses} ms by its late ACKs")
    source, destination = await lab.run([shim], [FakeDestinationShim("dpu")])
    assert source.state.stage is SourceStage.ENDED_COMMITTED
    assert (await lab.record()).attempt == times + 1
    assert (await destination.vmm.state()).run_state is RunState.RUNNING


async def test_a_guest_that_ended_before_its_session_listened_arrives_ended(lab: Lab) -> None:
    """No event tells the session, so it gives the guest away: it ends at the destination, and is not tried again."""
    console = lab.directory / "s.con"
    reader, writer = await asyncio.open_unix_connection(console)
    await reader.readline()  # it is up
    writer.write(b"p")
    await writer.drain()
    async with asyncio.timeout(20):
        while (await lab.vmm.state()).run_state is not RunState.ENDED:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    source, destination = await lab.run([FakeSourceShim("dpu")], [FakeDestinationShim("dpu")])
    writer.close()
    assert source.state.stage is SourceStage.ENDED_COMMITTED
    assert destination.state.stage is DestinationStage.ENDED_DONE
    record = await lab.record()
    assert (record.phase, record.owner) == (Ownership.IDLE, D)
    assert (await destination.vmm.state()).run_state is RunState.ENDED
    assert [entry.event for entry in destination.timeline].count("guest_ended") == 1
    assert source.vmm.liveness() is Liveness.GONE


async def test_a_device_that_cannot_validate_never_becomes_the_guest(lab: Lab) -> None:
    source, destination = await lab.run([FakeSourceShim("dpu")], [FakeDestinationShim("dpu", spoil=True)])
    assert source.state.stage is SourceStage.ENDED_ABORTED
    record = await lab.record()
    assert (record.phase, record.owner) == (Ownership.ABORTED, S)
    assert (await source.vmm.state()).run_state is RunState.RUNNING
    assert destination.vmm.liveness() is Liveness.GONE


async def test_an_ack_that_never_comes_ends_at_its_deadline(lab: Lab) -> None:
    policy = replace(MigrationPolicy(), ack_timeout_ms=500)
    source, _ = await lab.run([FakeSourceShim("dpu")], [FakeDestinationShim("other")], policy)
    assert (await lab.record()).reason is AbortReason.ACK_TIMEOUT
    assert (await source.vmm.state()).run_state is RunState.RUNNING
