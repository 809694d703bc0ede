"""Local disks on their way, with real QEMU and a real storage daemon, whose target may be full, lost or frozen.

The guest's writes are made by the monitor (`qemu-io`), so no guest has to boot, and each is known to the byte.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from agents.disks.daemon import DiskDaemon
from agents.disks.images import Images, make
from agents.engine.base import (
    DiskCopied,
    DiskFailed,
    DiskFile,
    DiskReady,
    DiskTarget,
    EngineError,
    EngineEvent,
    EngineStatus,
    HoldStart,
    OutgoingOptions,
    RunState,
    StreamTls,
    stream_of,
)
from agents.engine.qemu.arguments import disk_nodes
from agents.engine.qemu.engine import QemuEngine
from agents.engine.qemu.vmm import QemuVmm
from orchestrator.core.disks import Copying, SourceSide, copying
from orchestrator.core.disks import DestinationSide as There
from orchestrator.core.records import DiskCache, DiskFormat, PoolKind
from orchestrator.proc import stat_of
from tests.contract.test_engine import Pair, image

SIZE = 64 << 20
LINK = 1 << 30
DEVICE = "/machine/peripheral/vd-root/virtio-backend"
pytestmark = [
    pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="no qemu-storage-daemon"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no QEMU"),
]


class Lab:
    """A guest with one disk at S, and a daemon with its image at D."""

    def __init__(self, directory: Path) -> None:
        self.here, self.there = directory / "s", directory / "d"
        for each in (self.here, self.there):
            each.mkdir()
        self.engine = QemuEngine(image())
        self.pair = Pair(self.engine, directory)
        self.images = Images(self.there / "disks.json")
        self.daemons: list[DiskDaemon] = []
        self.vmms: list[QemuVmm] = []
        self.events: list[EngineEvent] = []
        self.happened = asyncio.Event()

    def disk(self, where: Path) -> DiskFile:
        return DiskFile(
            "root", where / "root.qcow2", DiskFormat.QCOW2, DiskCache.WRITEBACK, False, PoolKind.LOCAL, SIZE
        )

    async def source(self) -> QemuVmm:
        disk = self.disk(self.here)
        await make(disk, disk.path, timeout_s=10)
        vmm = await self.engine.start(replace(self.pair.spec("s"), disks=(disk,)))
        self.vmms.append(vmm)
        await _with_disk(vmm, disk)
        vmm.subscribe(self._heard)
        await self.write(vmm, 0, 8, 1)
        return vmm

    async def destination(self, inc: str = "d") -> QemuVmm:
        disk = self.disk(self.there)
        vmm = await self.engine.prepare_incoming(replace(self.pair.spec(inc), disks=(disk,)), "m", 1)
        self.vmms.append(vmm)
        await _with_disk(vmm, disk)
        return vmm

    async def target(self, disk: DiskFile | None = None, tls: StreamTls | None = None) -> tuple[DiskDaemon, DiskTarget]:
        disk = disk or self.disk(self.there)
        made = await self.images.made(disk)
        daemon = await DiskDaemon.start(self.there, "127.0.0.1", 1, tls)
        self.daemons.append(daemon)
        await daemon.export(disk, self.images.opened("root").image)
        return daemon, DiskTarget("root", made.image, daemon.endpoint)

    async def mirrored(self) -> tuple[QemuVmm, DiskDaemon, DiskTarget]:
        source, (daemon, target) = await self.source(), await self.target()
        await source.disks.connect_disk(target)
        await source.disks.start_mirror("root")
        await self.until(DiskReady)
        return source, daemon, target

    async def write(self, vmm: QemuVmm, at_mib: int, mib: int, pattern: int) -> None:
        """Through the guest's own device, so that whatever stands between it and the image sees it."""
        line = f'qemu-io -d {DEVICE} "write -P {pattern} {at_mib}M {mib}M"'
        log = self.pair.directory / f"{vmm.metadata.inc}.log"
        before = len(log.read_text())
        said = str(await vmm._execute("human-monitor-command", {"command-line": line}, timeout_s=10.0))
        said += log.read_text()[before:]  # QEMU prints what came of it
        assert f"wrote {mib << 20}/{mib << 20} bytes" in said, said

    async def until(self, kind: type, within_s: float = 30.0) -> EngineEvent:
        async with asyncio.timeout(within_s):
            while True:
                found = next((event for event in self.events if isinstance(event, kind)), None)
                if found is not None:
                    self.events.remove(found)
                    return found
                self.happened.clear()
                await self.happened.wait()

    def _heard(self, event: EngineEvent) -> None:
        self.events.append(event)
        self.happened.set()

    async def started(self, source: QemuVmm, inc: str = "d") -> QemuVmm:
        destination = await self.destination(inc)
        stream = stream_of(destination.metadata)
        await source.start_outgoing(OutgoingOptions(stream, HoldStart.OPEN, 1 << 20, LINK, 300))
        return destination

    async def parked(self, source: QemuVmm, inc: str = "d") -> QemuVmm:
        destination = await self.started(source, inc)
        async with asyncio.timeout(30):
            while (await source.state()).status is not EngineStatus.PARKED:  # noqa: ASYNC110 - as the engine does
                await asyncio.sleep(0.01)
        return destination

    async def sealed(self, source: QemuVmm) -> None:
        await source.proceed()
        async with asyncio.timeout(30):
            while (await source.state()).run_state is not RunState.SEALED:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def identical(self) -> bool:
        found = run("qemu-img", "compare", "-U", self.disk(self.here).path, self.disk(self.there).path)
        assert found in (0, 1)
        return found == 0

    async def close(self) -> None:
        for vmm in self.vmms:
            await vmm.destroy()
        for daemon in self.daemons:
            await daemon.destroy()


def run(*command: str | Path) -> int:
    """Its exit status."""
    return subprocess.run(command, capture_output=True, check=False).returncode


async def _with_disk(vmm: QemuVmm, disk: DiskFile) -> None:
    """As the command line of a guest with hardware has it."""
    nodes = await vmm._execute("query-named-block-nodes", {"flat": True})
    if any(node["node-name"] == disk.node for node in nodes):
        return
    for node in disk_nodes(disk):
        await vmm._execute("blockdev-add", node)
    device = {"driver": "virtio-blk-pci", "id": f"vd-{disk.name}", "drive": disk.node}
    await vmm._execute("device_add", device)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    made = Lab(tmp_path)
    yield made
    await made.close()


async def test_a_daemon_whose_agent_died_before_it_noted_it_down_is_ended(lab: Lab) -> None:
    daemon = await DiskDaemon.start(lab.there, "127.0.0.1", 1)
    pid = process_of(daemon)
    await daemon.detach()
    (lab.there / "storage.note").unlink()
    assert await DiskDaemon.adopt(lab.there) is None
    async with asyncio.timeout(20):
        while (stat := stat_of(pid)) is not None and not stat.zombie:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    again = await DiskDaemon.start(lab.there, "127.0.0.1", 1)
    await again.destroy()


def process_of(daemon: DiskDaemon) -> int:
    return daemon._process.pid


async def test_a_mirror_that_was_drained_leaves_equal_images(lab: Lab) -> None:
    source, daemon, target = await lab.mirrored()
    await lab.write(source, 4, 4, 2)
    await lab.parked(source)
    began = time.monotonic()
    await source.disks.drain(5.0)
    await source.disks.mark("one")
    drained = time.monotonic()
    await lab.sealed(source)
    await daemon.release("root", target.image)
    print(f"drain and mark {(drained - began) * 1e3:.1f} ms")
    assert lab.identical()
    assert (await source.disks.known())["root"] == SourceSide("", "one")


async def test_a_late_ack_costs_no_byte_of_the_disk(lab: Lab) -> None:
    """The attempt is ended before the drain: the mirror runs on, and the next attempt finds it ready."""
    source, daemon, target = await lab.mirrored()
    first = await lab.parked(source)
    assert (await source.abort()).run_state is RunState.RUNNING
    await first.destroy()
    known = (await source.disks.known())["root"]
    assert copying(known, There(target.image)) is Copying.GOES_ON
    before = (await source._execute("query-block-jobs"))[0]["offset"]
    await source.disks.connect_disk(target)
    await source.disks.start_mirror("root")
    await lab.until(DiskReady)
    assert (await source._execute("query-block-jobs"))[0]["offset"] == before
    assert (await source.disks.progress())["root"] == DiskCopied(0, 0, True), "it goes on: nothing is sent again"
    await lab.write(source, 20, 1, 3)
    await lab.parked(source, "e")
    await source.disks.drain(5.0)
    assert source.disks.sent()["root"] == 1 << 20, "what was written since, and nothing again"
    await lab.sealed(source)
    await daemon.release("root", target.image)
    assert lab.identical()


async def test_an_abort_behind_the_drain_costs_an_increment(lab: Lab) -> None:
    source, daemon, target = await lab.mirrored()
    first = await lab.parked(source)
    await source.disks.drain(5.0)
    await source.disks.mark("one")
    await daemon.release("root", target.image)
    assert (await source.abort()).run_state is RunState.RUNNING
    await first.destroy()
    await lab.write(source, 30, 2, 4)
    known = (await source.disks.known())["root"]
    assert copying(known, There(target.image, "one")) is Copying.INCREMENT
    await daemon.export(lab.disk(lab.there), target.image)
    await source.disks.connect_disk(target)
    await source.disks.increment("root", "one")
    assert (await source.disks.progress())["root"] == DiskCopied(2 << 20, 0, True)
    await lab.write(source, 33, 1, 5)
    await lab.parked(source, "e")
    await source.disks.drain(5.0)
    await source.disks.mark("two")
    assert source.disks.sent()["root"] == 3 << 20
    await lab.sealed(source)
    await daemon.release("root", target.image)
    assert lab.identical()
    assert (await source.disks.known())["root"].since == "two"


async def test_a_bound_of_the_bandwidth_holds_while_the_guest_runs(lab: Lab) -> None:
    source, (_, target) = await lab.source(), await lab.target()
    source.disks.limit(16 << 20)
    await source.disks.connect_disk(target)
    began = time.monotonic()
    await source.disks.start_mirror("root")
    (job,) = await source._execute("query-block-jobs")
    assert job["speed"] == 16 << 20
    seen = [(await source.disks.progress())["root"]]
    async with asyncio.timeout(60):
        while not (one := (await source.disks.progress())["root"]).ready:
            seen.append(one)
            await asyncio.sleep(0.05)
    await lab.until(DiskReady, 60.0)
    assert (one.copied_bytes, one.remaining_bytes) == (SIZE, 0)
    assert any(0 < each.copied_bytes < SIZE for each in seen)
    assert all(each.copied_bytes + each.remaining_bytes == SIZE for each in seen if each.remaining_bytes)
    assert [each.copied_bytes for each in seen] == sorted(each.copied_bytes for each in seen)
    assert time.monotonic() - began > 2, "64 MiB at 16 MiB/s, holes included"


async def test_a_daemon_that_dies_ends_the_mirror_and_nothing_else(lab: Lab) -> None:
    source, daemon, _ = await lab.mirrored()
    os.kill(process_of(daemon), signal.SIGKILL)
    await lab.write(source, 10, 1, 6)
    failed = await lab.until(DiskFailed)
    assert isinstance(failed, DiskFailed)
    assert failed.disk == "root"
    assert (await source.state()).run_state is RunState.RUNNING
    assert (await source.disks.known())["root"] == SourceSide("", "")


async def test_a_full_destination_ends_the_mirror_and_nothing_else(lab: Lab, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if run("mount", "-t", "tmpfs", "-o", "size=2m", "none", small):
        pytest.skip("needs the right to mount")
    try:
        source = await lab.source()
        _, target = await lab.target(replace(lab.disk(lab.there), path=small / "root.qcow2"))
        await source.disks.connect_disk(target)
        await source.disks.start_mirror("root")
        failed = await lab.until(DiskFailed)
        assert isinstance(failed, DiskFailed)
        assert "No space" in failed.error
        assert (await source.state()).run_state is RunState.RUNNING
    finally:
        await lab.close()
        run("umount", small)


async def test_a_target_that_is_frozen_while_the_guest_runs_stops_nothing(lab: Lab) -> None:
    source, daemon, _ = await lab.mirrored()
    os.kill(process_of(daemon), signal.SIGSTOP)
    try:
        await lab.write(source, 10, 1, 6)
        assert (await source.state()).run_state is RunState.RUNNING
        await source.disks.forget()
        assert not await source._execute("query-block-jobs")
    finally:
        os.kill(process_of(daemon), signal.SIGCONT)


async def test_a_target_that_is_frozen_at_the_freeze_is_cut_off_and_the_guest_runs_on(lab: Lab) -> None:
    """QEMU waits for the mirror in the stop of the guest, and answers nobody: it would stand for good."""
    source, daemon, _ = await lab.mirrored()
    os.kill(process_of(daemon), signal.SIGSTOP)
    try:
        await lab.write(source, 10, 1, 6)
        destination = await lab.started(source)
        failed = await lab.until(DiskFailed)
        assert isinstance(failed, DiskFailed)
        assert (await source.abort()).run_state is RunState.RUNNING
        await lab.write(source, 11, 1, 7)
        await destination.destroy()
    finally:
        os.kill(process_of(daemon), signal.SIGCONT)


async def test_an_abort_frees_a_guest_that_stands_for_a_frozen_target(lab: Lab) -> None:
    """Nothing but `abort` itself acts: it names the block node before it waits for QMP."""
    source, daemon, _ = await lab.mirrored()
    source.disks.close()
    os.kill(process_of(daemon), signal.SIGSTOP)
    try:
        await lab.write(source, 10, 1, 6)
        await lab.started(source)
        await asyncio.sleep(1.0)
        began = time.monotonic()
        assert (await source.abort()).run_state is RunState.RUNNING
        print(f"abort with a frozen target {(time.monotonic() - began) * 1e3:.0f} ms")
        await lab.write(source, 11, 1, 7)
    finally:
        os.kill(process_of(daemon), signal.SIGCONT)


async def test_a_drain_has_a_bound(lab: Lab) -> None:
    source, daemon, _ = await lab.mirrored()
    await lab.parked(source)
    os.kill(process_of(daemon), signal.SIGSTOP)
    try:
        with pytest.raises(EngineError):
            await source.disks.drain(0.5)
        assert (await source.abort()).run_state is RunState.RUNNING
        await lab.write(source, 11, 1, 7)
    finally:
        os.kill(process_of(daemon), signal.SIGCONT)


async def test_an_agent_that_was_restarted_reads_from_qemu_where_a_mirror_goes(lab: Lab) -> None:
    source, daemon, target = await lab.mirrored()
    await source.detach()
    lab.vmms.remove(source)
    found = await lab.engine.adopt(source.metadata, replace(lab.pair.spec("s"), disks=(lab.disk(lab.here),)))
    assert found is not None
    lab.vmms.append(found)
    assert (await found.disks.known())["root"] == SourceSide(target.image, "")
    await daemon.detach()
    lab.daemons.remove(daemon)
    again = await DiskDaemon.adopt(lab.there)
    assert again is not None
    lab.daemons.append(again)
    assert await again.exported() == {target.image}
