"""What every engine promises of devices that are added and taken away while a guest runs: the fake, and real QEMU."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.engine.base import DeviceGone, DiskFile, EngineError, EngineEvent, EngineStatus, RunState, Vmm, VmmSpec
from agents.engine.qemu.engine import QemuEngine
from agents.engine.qemu.vmm import QemuVmm
from agents.guest import machine, plugging
from agents.guest.machine import Facts
from orchestrator.core.records import DiskCache, DiskFormat, DiskSpec, LiveDevice, LiveMachine, NicSpec, PoolKind
from tests.contract.test_engine import Pair, image, no_qemu, options, until
from tests.fakes.engine import FakeEngine, FakeVmm

pytestmark = pytest.mark.timeout(60)
DISK, NIC = DiskSpec("d", "p", "d.img", DiskFormat.RAW), NicSpec("n", "net")


class Plug(Pair):
    """A guest with room for more, and what it is at each end."""

    def __init__(self, engine: QemuEngine | FakeEngine, directory: Path, kind: str) -> None:
        super().__init__(engine, directory)
        self.kind = kind
        self.image = directory / "d.img"
        self.image.touch()
        self.image.open("r+b").truncate(1 << 20)

    def born(self) -> LiveMachine:
        spec = replace(self.spec("s").spec, vcpus=1, max_vcpus=3, max_memory_mib=1024)
        return machine.born(spec, Facts(self.kind, "tcg", {}, lambda _: "02:00:00:00:00:01"))

    def with_machine(self, inc: str, listed: LiveMachine, *, path: Path | None = None) -> VmmSpec:
        disk = DiskFile("d", path or self.image, DISK.format, DiskCache.WRITEBACK, False, PoolKind.SHARED_FILE)
        spec = self.spec(inc)
        return replace(spec, machine=listed, spec=replace(spec.spec, nics=(NIC,)), disks=(disk,))

    async def started(self, listed: LiveMachine) -> Vmm:
        """With nothing of the disk and the card yet."""
        spec = self.with_machine("s", listed)
        vmm = await self.engine.start(replace(spec, disks=(), spec=replace(spec.spec, nics=())))
        self.vmms.append(vmm)
        return vmm

    async def incoming(self, listed: LiveMachine, inc: str) -> Vmm:
        vmm = await self.engine.prepare_incoming(self.with_machine(inc, listed), "m", 1)
        self.vmms.append(vmm)
        return vmm


QEMU = [pytest.mark.qemu, no_qemu]


@pytest.fixture(params=["fake", pytest.param("pc-i440fx-8.2", marks=QEMU), pytest.param("pc-q35-8.2", marks=QEMU)])
async def plug(request: pytest.FixtureRequest) -> AsyncIterator[Plug]:
    directory = Path(tempfile.mkdtemp(prefix="dp-"))
    kind = "pc" if request.param == "fake" else request.param
    made = Plug(FakeEngine() if request.param == "fake" else QemuEngine(image()), directory, kind)
    try:
        yield made
    finally:
        for vmm in made.vmms:
            await vmm.destroy()
        shutil.rmtree(directory)


async def places(vmm: Vmm) -> Any:
    """Everything on the guest's buses, its memory and its CPUs, as QEMU sees them."""
    if not isinstance(vmm, QemuVmm):
        return dict(await vmm.devices())

    def told(devices: list[dict[str, Any]], behind: tuple[int, ...] = ()) -> list[Any]:
        """By the slots that lead there: the guest's firmware numbers the buses, in its own time."""
        found: list[Any] = []
        for each in devices:
            where = (*behind, each["slot"], each["function"])
            found.append((where, each["qdev_id"], each["id"]))
            found += told(each.get("pci_bridge", {}).get("devices", []), where)
        return found

    buses = sorted(str(entry) for bus in await vmm._execute("query-pci") for entry in told(bus["devices"]))
    modules = [each["data"] for each in await vmm._execute("query-memory-devices")]
    memory = sorted((each["id"], each["addr"], each["size"], each["slot"]) for each in modules)
    cpus = sorted(str(each["props"]) for each in await vmm._execute("query-cpus-fast"))
    blocks = await vmm._execute("query-block")
    drives = sorted((each["qdev"], each["inserted"]["node-name"]) for each in blocks if "inserted" in each)
    return buses, memory, cpus, drives, sorted((await vmm.devices()).items())


async def added(plug: Plug, vmm: Vmm, listed: LiveMachine, *more: LiveDevice) -> LiveMachine:
    for device in more:
        there = await vmm.attach(device, plug.with_machine(vmm.metadata.inc, listed))
        listed = plugging.attached(listed, [there])
    vmm.described(plug.with_machine(vmm.metadata.inc, listed))
    return listed


async def test_what_was_added_moves_along_and_sits_where_it_sat(plug: Plug) -> None:
    listed = plug.born()
    source = await plug.started(listed)
    listed = await added(plug, source, listed, plugging.disk(listed, DISK))
    listed = await added(plug, source, listed, plugging.nic(listed, NIC, "02:00:00:00:00:02"))
    for mib in (64 + 128, 64 + 128 + 256):
        listed = await added(plug, source, listed, plugging.module(listed, mib))
    listed = await added(plug, source, listed, *plugging.sockets(listed, 3))
    assert {"disk-d", "nic-n", "dimm0", "dimm1", "vcpu1", "vcpu2"} <= set(await source.devices())
    assert all(device.address for device in listed.devices if device.memory_mib)
    assert await source.unmigratable() == ()
    destination = await plug.incoming(listed, "d")
    await source.start_outgoing(options(destination))
    await until(source, lambda state: state.status is EngineStatus.PARKED, 20)
    await source.proceed()
    await until(destination, lambda state: state.status is EngineStatus.COMPLETED, 20)
    assert await places(destination) == await places(source)
    await source.destroy()
    await destination.resume()
    assert (await destination.state()).run_state is RunState.RUNNING
    assert await destination.unmigratable() == ()


@pytest.mark.qemu
@no_qemu
@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
async def test_memory_is_added_only_under_an_accelerator_that_notices_every_write(accelerator: str) -> None:
    against = (await QemuEngine(image(), accelerator=accelerator).probe())["against_memory"]
    assert bool(against) is (accelerator == "tcg")


async def test_what_cannot_be_added_leaves_nothing_behind(plug: Plug) -> None:
    listed = plug.born()
    source = await plug.started(listed)
    before = await places(source)
    if isinstance(plug.engine, FakeEngine):
        plug.engine.script.fail_attach = "no such file"
    missing = plug.with_machine("s", listed, path=plug.directory / "none.img")
    with pytest.raises(EngineError):
        await source.attach(plugging.disk(listed, DISK), missing)
    assert await places(source) == before
    taken = replace(plugging.disk(listed, DISK), driver="no-such-device")
    if isinstance(plug.engine, FakeEngine):
        plug.engine.script.fail_attach = "no such device"
    with pytest.raises(EngineError):
        await source.attach(taken, plug.with_machine("s", listed))
    assert await places(source) == before
    await added(plug, source, listed, plugging.disk(listed, DISK))  # what stood behind it has gone as well


async def test_a_guest_that_does_not_let_go_keeps_all_of_the_device(plug: Plug) -> None:
    """The tiny guest has no system that could be asked."""
    listed = plug.born()
    source = await plug.started(listed)
    disk = plugging.disk(listed, DISK)
    listed = await added(plug, source, listed, disk)
    before = await source.devices()
    heard: list[EngineEvent] = []
    source.subscribe(heard.append)
    if isinstance(plug.engine, FakeEngine):
        plug.engine.script.holds_on = True
    for _ in range(2):  # it may be asked again
        assert await source.let_go(disk, 0.3) is False
    assert await source.devices() == before
    with pytest.raises(EngineError):
        await source.drop(disk)
    if isinstance(source, QemuVmm):
        await source._execute("system_reset")  # as a guest that restarts: QEMU takes back what it was asked for
        await until_gone(source, heard)
    elif isinstance(source, FakeVmm):
        source.lets_go(disk.id)
    assert DeviceGone(disk.id) in heard
    await source.drop(disk)
    assert disk.id not in await source.devices()
    await added(plug, source, plugging.detached(listed, disk.id), disk)


async def until_gone(vmm: QemuVmm, heard: list[EngineEvent]) -> None:
    async with asyncio.timeout(20):
        while not any(isinstance(event, DeviceGone) for event in heard):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
