"""A real QEMU that was started by hand: examined, the machine tried out, taken over, and moved to one of ours."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from agents.config import AgentConfig
from agents.engine.base import (
    ADOPTED_QMP,
    NODE_OF,
    PATH_OF,
    EngineError,
    EngineStatus,
    HoldStart,
    MonitorBusy,
    OutgoingOptions,
    RunState,
    VmmMetadata,
    VmmSpec,
    stream_of,
)
from agents.engine.qemu.engine import QemuEngine
from agents.engine.qemu.qmp import QmpConnection
from agents.guest import adopting
from agents.guest.copies import named
from agents.guest.hardware import disk_files, firmware_of
from agents.host.commands import ran
from deploy.lab.workload import Workload, boot_of
from orchestrator.core.errors import RefusalReason
from orchestrator.core.records import Boot, Firmware
from orchestrator.proc import start_time_of
from tests.contract.test_engine import LINK, image, no_qemu, until
from tests.fakes.config import agent_config

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120), no_qemu]

OVMF = Path("/usr/share/OVMF")
CODE, BLANK = OVMF / "OVMF_CODE_4M.fd", OVMF / "OVMF_VARS_4M.fd"
UUID = "0d1b3c5e-0000-4000-8000-00000000abcd"


@dataclass
class Hand:
    """The process, and the agent's configuration that would take it over."""

    process: subprocess.Popen[bytes]
    directory: Path
    config: AgentConfig
    engine: QemuEngine

    @property
    def qmp(self) -> Path:
        return self.directory / "hand.qmp"

    async def found(self) -> adopting.Found:
        return await adopting.examine(self.engine, self.config, "g", (self.process.pid, str(self.qmp)))

    def spec(self, found: adopting.Found, inc: str) -> VmmSpec:
        spec, machine = found.examined.spec, found.examined.machine
        disks = disk_files(self.config, spec)
        console = self.directory / f"{inc}.con"
        made = VmmSpec("guest-1", inc, spec, self.directory, console, None, "127.0.0.1", machine=machine)
        made = replace(made, firmware=firmware_of(self.config, machine, self.directory / f"{inc}.nvram"))
        return replace(made, disks=disks)


@contextlib.asynccontextmanager
async def by_hand(directory: Path, *more: str, boots: Sequence[str] | None = None) -> AsyncIterator[Hand]:
    """A q35 with a disk in a pool that hosts share, behind a port; without `-no-shutdown`. `boots`: in place of the
    kernel of guests that name none."""
    pool, qmp = directory / "pool", directory / "hand.qmp"
    pool.mkdir()
    with (pool / "a.raw").open("wb") as disk:
        disk.truncate(4 << 20)
    config = agent_config(directory)
    pools = {"shared": {"path": str(pool), "kind": "shared-file"}}
    config = AgentConfig.model_validate(
        {
            **config.model_dump(),
            "accelerator": "tcg",
            "guest_image": image(),
            "pools": pools,
            "firmware": {"uefi_code": CODE, "uefi_vars": BLANK} if CODE.is_file() else {},
        }
    )
    append = boot_of(Workload(dirty_mib=1, dirty_pages_per_s=100), seed=0).append
    command = ["qemu-system-x86_64", "-accel", "tcg", "-M", "q35", "-m", "64", "-nodefaults", "-display", "none"]
    command += ["-serial", "null", "-uuid", UUID, "-qmp", f"unix:{qmp},server=on,wait=off"]
    command += ["-device", "pcie-root-port,id=p1,chassis=1,port=0x10", "-device", "virtio-balloon-pci"]
    command += ["-drive", f"file={pool / 'a.raw'},format=raw,if=none,id=d0,cache=none"]
    command += ["-device", "virtio-blk-pci,drive=d0,bus=p1"]
    command += [*(boots if boots is not None else ("-kernel", str(image()), "-append", append)), *more]
    process = _started(command, directory / "hand.log")
    engine = QemuEngine(image())
    try:
        async with asyncio.timeout(30):
            while not await _answers(engine, process.pid, qmp):
                assert process.poll() is None, (directory / "hand.log").read_text()
        yield Hand(process, directory, config, engine)
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


def _started(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)


async def _answers(engine: QemuEngine, pid: int, qmp: Path) -> bool:
    with contextlib.suppress(EngineError):
        await engine.look_at(pid, qmp)
        return True
    await asyncio.sleep(0.05)
    return False


async def test_it_is_taken_over_and_moves_to_a_vmm_of_ours(tmp_path: Path) -> None:
    async with by_hand(tmp_path) as hand:
        found = await hand.found()
        assert (found.examined.machine.uuid, found.examined.machine.serials) == (UUID, 1)
        await taken_and_moved(hand, found)


async def taken_and_moved(hand: Hand, found: adopting.Found) -> None:
    """Its agent dies in between, and another one comes."""
    assert found.examined.obstacles == ()
    extra = {ADOPTED_QMP: str(hand.qmp), **found.at_its_end}
    extra |= {NODE_OF + disk: node for disk, node in found.examined.nodes.items()}
    extra |= {PATH_OF + device: path for device, path in found.examined.paths.items()}
    metadata = VmmMetadata("guest-1", "s", hand.process.pid, found.start_time, "owner", extra=extra)
    spec = hand.spec(found, "s")
    source = await hand.engine.take_over(metadata, replace(spec, disks=named(spec.disks, metadata)))
    assert await source.unmigratable() == ()
    await source.detach()
    again = await hand.engine.adopt(metadata, replace(spec, disks=named(spec.disks, metadata)))
    assert again is not None
    destination = await hand.engine.prepare_incoming(hand.spec(found, "d"), "m", 1)
    try:
        await again.start_outgoing(OutgoingOptions(stream_of(destination.metadata), HoldStart.OPEN, 0, LINK, 300))
        await until(again, lambda state: state.status is EngineStatus.PARKED)
        await again.proceed()
        # QEMU tells the end of the migration a moment before the guest's own state.
        sealed = await until(again, lambda state: state.run_state is RunState.SEALED)
        assert sealed.status is EngineStatus.COMPLETED
        await until(destination, lambda state: state.status is EngineStatus.COMPLETED)
        await destination.resume()
        assert (await destination.state()).run_state is RunState.RUNNING
        await again.destroy()
        await asyncio.to_thread(hand.process.wait, 30)  # our child: whoever of us reaps it first
        assert start_time_of(hand.process.pid) is None
    finally:
        await destination.destroy()


@pytest.mark.parametrize("how", ["drive", "machine"])
async def test_one_that_boots_by_uefi_is_taken_over_with_its_variables(tmp_path: Path, how: str) -> None:
    if not CODE.is_file():
        pytest.skip("no UEFI firmware (ovmf)")
    theirs = tmp_path / "theirs.fd"
    # The end of the store is spare space, where the firmware writes nothing.
    theirs.write_bytes(BLANK.read_bytes()[:-8] + b"THEIRS!!")
    boots = ["-drive", f"if=pflash,format=raw,readonly=on,file={CODE}", "-drive", f"if=pflash,format=raw,file={theirs}"]
    if how == "machine":
        nodes = {"code": f"{CODE},read-only=on", "vars": str(theirs)}
        boots = [
            word
            for name, file in nodes.items()
            for word in ("-blockdev", f"driver=file,node-name={name},filename={file}")
        ]
        boots += ["-M", "q35,pflash0=code,pflash1=vars"]
    async with by_hand(tmp_path, boots=boots) as hand:
        found = await hand.found()
        assert (found.examined.spec.boot, found.variables) == (Boot(firmware=Firmware.UEFI), theirs)
        await taken_and_moved(hand, found)
    assert (tmp_path / "d.nvram").read_bytes()[-8:] == b"THEIRS!!"


async def test_uefi_of_another_build_is_refused_by_name(tmp_path: Path) -> None:
    if not CODE.is_file():
        pytest.skip("no UEFI firmware (ovmf)")
    theirs, code = tmp_path / "theirs.fd", tmp_path / "code.fd"
    theirs.write_bytes(BLANK.read_bytes())
    code.write_bytes(CODE.read_bytes()[:-1] + b"!")
    boots = ["-drive", f"if=pflash,format=raw,readonly=on,file={code}", "-drive", f"if=pflash,format=raw,file={theirs}"]
    async with by_hand(tmp_path, boots=boots) as hand:
        ((reason, said),) = (await hand.found()).examined.obstacles
        assert reason is RefusalReason.FIRMWARE_NOT_AVAILABLE
        assert "code.fd is not the one that guests of this host are given" in said


async def test_given_back_its_monitor_is_free_and_it_runs_on(tmp_path: Path) -> None:
    async with by_hand(tmp_path) as hand:
        found = await hand.found()
        extra = {ADOPTED_QMP: str(hand.qmp), **found.at_its_end}
        metadata = VmmMetadata("guest-1", "s", hand.process.pid, found.start_time, "owner", extra=extra)
        vmm = await hand.engine.take_over(metadata, hand.spec(found, "s"))
        with pytest.raises(MonitorBusy):
            await hand.engine.look_at(hand.process.pid, hand.qmp)
        await hand.engine.let_go(vmm)
        assert (await hand.found()).examined.running
        assert not (tmp_path / "s.json").exists()


async def test_a_device_that_is_plugged_in_is_found(tmp_path: Path) -> None:
    async with by_hand(tmp_path, "-device", "pcie-root-port,id=p2,chassis=2,port=0x11") as hand:
        assert (await hand.found()).examined.obstacles == ()
        monitor = QmpConnection("somebody")
        await monitor.connect(hand.qmp, 5.0)
        await monitor.execute("device_add", {"driver": "virtio-rng-pci", "id": "later", "bus": "p2"})
        await monitor.close()
        assert [reason for reason, _ in (await hand.found()).examined.obstacles] == [RefusalReason.NOT_ADOPTABLE]


async def test_only_the_trial_shows_what_an_option_adds(tmp_path: Path) -> None:
    async with by_hand(tmp_path, "-usb") as hand:
        against = (await hand.found()).examined.obstacles
        assert {reason for reason, _ in against} == {RefusalReason.NOT_ADOPTABLE}
        assert "uhci" in " ".join(said for _, said in against)


async def test_a_socket_of_another_process_is_not_asked(tmp_path: Path) -> None:
    async with by_hand(tmp_path) as hand:
        with pytest.raises(EngineError, match="is that of process"):
            await hand.engine.look_at(1, hand.qmp)


RAW = "-drive file={image},format=raw,"
REFUSED = {
    "ide": f"{RAW}if=ide",
    "sata": f"-device ich9-ahci,id=ahci {RAW}if=none,id=more -device ide-hd,drive=more,bus=ahci.0",
    "scsi": f"-device virtio-scsi-pci,id=scsi {RAW}if=none,id=more -device scsi-hd,drive=more,bus=scsi.0",
    "chain": "-drive file={chain},format=qcow2,if=none,id=more,cache=none -device virtio-blk-pci,drive=more",
}


@pytest.mark.parametrize("kind", REFUSED)
async def test_a_disk_that_no_other_host_is_given_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    below, chain = tmp_path / "below.qcow2", tmp_path / "chain.qcow2"
    with (tmp_path / "more.raw").open("wb") as image:
        image.truncate(1 << 20)
    await ran("qemu-img", "create", "-q", "-f", "qcow2", str(below), "1M", timeout_s=60)
    await ran("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(below), str(chain), timeout_s=60)
    more = [word.format(image=tmp_path / "more.raw", chain=chain) for word in REFUSED[kind].split()]
    reason = RefusalReason.DISK_NOT_MIGRATABLE if kind == "chain" else RefusalReason.DEVICE_NOT_MIGRATABLE
    said = "chain.qcow2 of device anon2 stands on another image" if kind == "chain" else "behind virtio"
    async with by_hand(tmp_path, *more) as hand:
        against = (await hand.found()).examined.obstacles
        assert any(each is reason and said in sentence for each, sentence in against), against
        assert (await hand.found()).examined.running
