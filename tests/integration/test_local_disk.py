"""Attempts of a guest with a local disk: both sessions and their shells, real QEMU, a real storage daemon, ZooKeeper.

What the guest writes is made by the monitor, so every write is known; the images are compared byte by byte while the
guest stands between seal and take-over, or after it has moved.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from agents.disks.daemon import DiskDaemon
from agents.disks.images import Images
from agents.disks.local import LocalImages
from agents.engine.base import (
    DiskFile,
    HoldStart,
    OutgoingOptions,
    RunState,
    VmmSpec,
    stream_of,
)
from agents.engine.qemu.engine import QemuEngine
from agents.engine.qemu.vmm import QemuVmm
from agents.handover.destination import DestinationStage
from agents.handover.source import SourceStage
from agents.handover.source_shell import SourceShell
from deploy.lab.workload import Workload, boot_of
from orchestrator.core.disks import SyncPoint
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import Ownership
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import DiskCache, DiskFormat, GuestSpec, PoolKind
from orchestrator.ledger.zookeeper import ZooKeeperStore
from tests.contract.test_engine import image, no_qemu
from tests.contract.test_engine_disks import DEVICE, _with_disk, run
from tests.fakes.attempt import Coming, Leaving, Moves
from tests.fakes.shims import FakeDestinationShim, FakeSourceShim
from tests.fakes.zookeeper import ZooKeeperServer, missing

SIZE = 64 << 20
LINK = 1 << 30
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.zookeeper,
    pytest.mark.integration,
    no_qemu,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="no qemu-storage-daemon"),
]


@dataclass(kw_only=True)
class Lab(Moves):
    """A guest with one local disk on host-1; host-2 has a directory for its image."""

    engine: QemuEngine
    directory: Path
    vmm: QemuVmm = field(init=False)
    images: LocalImages = field(init=False)
    vmms: list[QemuVmm] = field(default_factory=list[QemuVmm])
    compared: list[int] = field(default_factory=list[int])
    """What `qemu-img compare` said when the destination's vCPUs were about to start."""

    def disk(self, host: str) -> DiskFile:
        path = self.directory / host / "root.qcow2"
        return DiskFile("root", path, DiskFormat.QCOW2, DiskCache.WRITEBACK, False, PoolKind.LOCAL, SIZE)

    def spec(self, inc: str, host: str) -> VmmSpec:
        guest = GuestSpec("g", memory_mib=64, boot=boot_of(Workload(dirty_mib=1, dirty_pages_per_s=100), seed=0))
        spec = VmmSpec(self.guest, inc, guest, self.directory, self.directory / f"{inc}.con", None, "127.0.0.1")
        return replace(spec, disks=(self.disk(host),))

    async def born(self) -> None:
        await super().born()
        for host in ("host-1", "host-2"):
            (self.directory / host).mkdir()
        run("qemu-img", "create", "-q", "-f", "qcow2", self.disk("host-1").path, str(SIZE))
        self.vmm = await self.engine.start(self.spec("s", "host-1"))
        self.vmms.append(self.vmm)
        await _with_disk(self.vmm, self.disk("host-1"))
        await self.write(0, 8, 1)
        self.images = self.made_images()

    def made_images(self) -> LocalImages:
        return LocalImages(self.directory / "host-2", [self.disk("host-2")], "127.0.0.1")

    @property
    def daemon(self) -> DiskDaemon:
        assert self.images._daemon is not None
        return self.images._daemon

    async def write(self, at_mib: int, mib: int, pattern: int) -> None:
        log = self.directory / f"{self.vmm.metadata.inc}.log"
        before = len(log.read_text())
        line = f'qemu-io -d {DEVICE} "write -P {pattern} {at_mib}M {mib}M"'
        await self.vmm._execute("human-monitor-command", {"command-line": line}, timeout_s=10.0)
        assert f"wrote {mib << 20}/{mib << 20} bytes" in log.read_text()[before:]

    def compare(self) -> int:
        return run("qemu-img", "compare", "-U", self.disk("host-1").path, self.disk("host-2").path)

    async def moved(
        self,
        during: Callable[[], Awaitable[None]] | None = None,
        *,
        late: bool = False,
        policy: MigrationPolicy = MigrationPolicy(),
    ) -> SourceShell:
        ref = await self.opened()
        inc = f"i{ref.attempt}"
        await self.images.ready()
        copy = await self.engine.prepare_incoming(self.spec(inc, "host-2"), self.migration, ref.attempt)
        self.vmms.append(copy)
        await _with_disk(copy, self.disk("host-2"))
        resume = copy.resume

        async def compared_first() -> None:
            self.compared.append(self.compare())
            await resume()

        copy.resume = compared_first  # the guest stands, sealed, and nobody writes
        source_shims = [FakeSourceShim("x", late_at="final_query", late_times=1)] if late else []
        options = OutgoingOptions(stream_of(copy.metadata), HoldStart.OPEN, 0, LINK, 300)
        here = Leaving(self.vmm, source_shims, disks=("root",))
        there = Coming(inc, copy, [FakeDestinationShim("x")] if late else [], images=self.images)
        await self.conducted(ref, here, there, policy, options, self.directory, during=during)
        return self.source

    def noted(self, event: str) -> list[str]:
        return [entry.detail for entry in self.source.timeline if entry.event == event]


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
    await made.images.discard()
    await store.close()


def committed(lab: Lab) -> None:
    assert lab.source.state.stage is SourceStage.ENDED_COMMITTED
    assert lab.destination.state.stage is DestinationStage.ENDED_DONE
    assert lab.compared[-1] == 0, "the images differ while the guest stands"


@pytest.mark.rule("H15")
@pytest.mark.rule("H16")
async def test_a_guest_moves_with_its_local_disk(lab: Lab) -> None:
    await lab.moved()
    committed(lab)
    assert lab.noted("disk_copied") == ["root: full"]
    events = [entry.event for entry in lab.source.timeline]
    assert events.index("disks_ready") < events.index("check_passed") < events.index("drained")
    assert events.index("drained") < events.index("engine completed")
    assert await DiskDaemon.adopt(lab.directory / "host-2") is None, "its daemon has ended"
    assert not Images(lab.directory / "host-2" / "storage.images").known()


async def test_a_late_ack_copies_nothing_twice(lab: Lab) -> None:
    await lab.moved(late=True)
    assert lab.source.state.stage is SourceStage.ENDED_ABORTED
    assert lab.source.state.reason is AbortReason.LATE_SWITCHOVER_ACK
    sent = (await lab.vmm._execute("query-block-jobs"))[0]["offset"]
    await lab.moved()
    committed(lab)
    assert lab.noted("disk_copied") == ["root: goes_on"]
    assert sent >= 8 << 20


async def test_an_abort_behind_the_drain_sends_what_was_written_since(lab: Lab) -> None:
    """Its destination dies once everything is drained and released, beside the last pass."""
    release = lab.images.release

    async def dies_then(points: Sequence[SyncPoint]) -> tuple[SyncPoint, ...]:
        done = await release(points)
        lab.vmms[-1]._process.kill()
        await lab.vmms[-1]._process.dead.wait()
        return done

    lab.images.release = dies_then
    await lab.moved()
    lab.images.release = release
    assert lab.source.state.stage is SourceStage.ENDED_ABORTED
    assert (await lab.vmm.state()).run_state is RunState.RUNNING
    await lab.write(30, 1, 7)
    await lab.moved()
    committed(lab)
    assert lab.noted("disk_copied") == ["root: increment"]


async def test_a_daemon_that_dies_ends_the_attempt_and_the_next_one_copies_anew(lab: Lab) -> None:
    async def dies() -> None:
        while not lab.noted("disks_ready"):  # noqa: ASYNC110 - nothing tells it
            await asyncio.sleep(0.002)
        os.kill(lab.daemon._process.pid, signal.SIGKILL)

    await lab.moved(dies, policy=MigrationPolicy(switchover_timeout_ms=3000))
    assert lab.source.state.stage is SourceStage.ENDED_ABORTED
    assert lab.source.state.reason in (
        AbortReason.DISK_MIRROR_FAILED,
        AbortReason.DISK_DRAIN,
        AbortReason.DESTINATION_LOST,
        AbortReason.ENGINE_FAILED,  # QEMU flushes all disks as it stops the guest, and may find out first
    )
    assert (await lab.vmm.state()).run_state is RunState.RUNNING
    assert (await lab.record()).phase is Ownership.ABORTED
    await lab.write(20, 1, 5)
    await lab.moved()
    committed(lab)
    assert lab.noted("disk_copied") == ["root: full"]


async def test_a_restarted_destination_agent_finds_its_daemon_and_the_mirror_goes_on(lab: Lab) -> None:
    await lab.moved(late=True)
    await lab.images.detach()
    lab.images = lab.made_images()
    await lab.moved()
    committed(lab)
    assert lab.noted("disk_copied") == ["root: goes_on"]


async def test_a_daemon_that_does_not_answer_is_replaced(lab: Lab) -> None:
    await lab.moved(late=True)
    frozen = lab.daemon._process.pid
    os.kill(frozen, signal.SIGSTOP)
    await lab.moved()
    committed(lab)
    assert lab.noted("disk_copied") == ["root: full"]
