"""Guests with hardware under real QEMU: the machine that is built is the machine that was listed, at both ends."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from agents.config import AgentConfig, FirmwareConfig, IdentityConfig, PoolConfig
from agents.engine.base import (
    DiskLocked,
    DisplayAt,
    EngineError,
    EngineStatus,
    EngineTimeout,
    HoldStart,
    ImageNotFound,
    OutgoingOptions,
    RunState,
    Vmm,
    stream_of,
)
from agents.engine.qemu.engine import QemuEngine
from agents.engine.qemu.vmm import QemuVmm
from agents.guest import hardware
from agents.guest.files import GuestFiles
from agents.guest.hardware import Hardware
from agents.host.commands import ran
from agents.host.pools import cpu_definitions
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import (
    Boot,
    CloudInit,
    Cpu,
    DiskFormat,
    DiskSpec,
    Display,
    Firmware,
    GuestSpec,
    LiveMachine,
    NicSpec,
    PoolKind,
    Tpm,
)
from tests.contract.test_engine import image, until
from tests.fakes.ninep import Mounter
from tests.fakes.rfb import NotLetIn, viewer
from tests.fakes.swtpm import key_of, tpm, tpm_of_theirs

pytestmark = [pytest.mark.qemu]
OVMF = Path("/usr/share/OVMF")
UUID = "6b1f3f2a-9d1c-4a51-8a3e-0d6f3c1b2a49"
LINK = 1 << 30
TOOLS = ("qemu-system-x86_64", "qemu-img")

if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
    pytest.skip(f"not installed: {', '.join(missing)} (make system)", allow_module_level=True)


class Ends:
    """Two hosts that see one shared pool, and what a guest is at each of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.engine = QemuEngine(image())
        self.pool = directory / "shared"
        self.pool.mkdir()
        self.vmms: list[tuple[Vmm, Hardware]] = []

        self.vnc_listen = ""

    def files(self, host: str, spec: GuestSpec) -> GuestFiles:
        here = self.directory / host
        firmware = FirmwareConfig()
        if (OVMF / "OVMF_CODE_4M.fd").is_file():
            firmware = FirmwareConfig(uefi_code=OVMF / "OVMF_CODE_4M.fd", uefi_vars=OVMF / "OVMF_VARS_4M.fd")
        config = AgentConfig(
            host=host,
            address="127.0.0.1",
            zookeeper="127.0.0.1:1",
            dir=here,
            console_dir=here,
            volatile_dir=here / "volatile",
            identity=IdentityConfig(),
            memory_mib=1024,
            pools={"shared": PoolConfig(path=self.pool, kind=PoolKind.SHARED_FILE)},
            firmware=firmware,
            extra_args_allowed=("-device virtio-rng-pci",),
            vnc_listen=self.vnc_listen,
            images=self.directory,
        )
        return GuestFiles(config, UUID, spec)

    async def born(self, spec: GuestSpec) -> tuple[QemuVmm, LiveMachine]:
        files = self.files("a", spec)
        files.make()
        found = await hardware.born(files, "s", await self.engine.probe())
        assert found is not None
        assert found.machine is not None
        vmm = await self.engine.start(found.into(files.vmm_spec("s")))
        self.vmms.append((vmm, found))
        return vmm, found.machine

    async def prepared(self, spec: GuestSpec, machine: LiveMachine, inc: str = "d") -> QemuVmm:
        files = self.files("b", spec)
        files.make()
        found = await hardware.make(files, inc, machine)
        vmm = await self.engine.prepare_incoming(found.into(files.vmm_spec(inc)), "m", 1)
        self.vmms.append((vmm, found))
        return vmm

    async def close(self) -> None:
        for vmm, found in self.vmms:
            await vmm.destroy()
            await found.remove()


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    directory = Path(tempfile.mkdtemp(prefix="dh-"))
    made = Ends(directory)
    try:
        yield made
    finally:
        await made.close()
        shutil.rmtree(directory)


async def machine_of(vmm: QemuVmm) -> dict[str, Any]:
    """Every device that has a name, with its kind and its place."""
    found: dict[str, Any] = {}
    for each in await vmm._execute("qom-list", {"path": "/machine/peripheral"}):
        if not each["type"].startswith("child<"):
            continue
        path = f"/machine/peripheral/{each['name']}"
        known = {entry["name"] for entry in await vmm._execute("qom-list", {"path": path})}
        places = {
            name: await vmm._execute("qom-get", {"path": path, "property": name})
            for name in ("addr", "parent_bus", "mac", "host_mtu", "bootindex", "num-queues", "vectors")
            if name in known
        }
        found[each["name"]] = (each["type"], places)
    found[""] = await vmm._execute("qom-get", {"path": "/machine", "property": "type"})
    cpus = await vmm._execute("query-cpus-fast")
    found["cpu"] = [await vmm._execute("qom-get", {"path": each["qom-path"], "property": "type"}) for each in cpus]
    return found


async def seen_by_guest(vmm: QemuVmm) -> list[tuple[Any, ...]]:
    """Everything on the PCI buses, as the guest numbers them."""

    def places(devices: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        for each in devices:
            kind = (each["id"]["vendor"], each["id"]["device"])
            found.append((each["bus"], each["slot"], each["function"], each["qdev_id"], *kind))
            found += places(each.get("pci_bridge", {}).get("devices", []))
        return found

    return sorted(place for bus in await vmm._execute("query-pci") for place in places(bus["devices"]))


ROOT = DiskSpec("root", "shared", "root.qcow2", size_bytes=16 << 20)
DATA = DiskSpec("data", "shared", "data.raw", DiskFormat.RAW, size_bytes=4 << 20)
CARDS = (NicSpec("eth0", "lab"), NicSpec("eth1", "lab", "52:54:00:12:34:56", 4, 9000))
KINDS = {
    "disks": GuestSpec("g", disks=(ROOT, DATA)),
    "threads": GuestSpec("g", vcpus=2, disks=(replace(ROOT, iothread=True), replace(DATA, iothread=True))),
    "cpu": GuestSpec("g", vcpus=2, cpu=Cpu("Nehalem"), extra_args=("-device virtio-rng-pci",)),
    "cpu of the host": GuestSpec("g", vcpus=2, cpu=Cpu("max")),
    "cards": GuestSpec("g", vcpus=2, nics=CARDS),
    "bios": GuestSpec(
        "g",
        boot=Boot(firmware=Firmware.BIOS),
        disks=(DATA, DiskSpec("r", "shared", "r", boot=True, size_bytes=1 << 20)),
    ),
    "cloud-init": GuestSpec("g", disks=(ROOT,), cloud_init=CloudInit("#cloud-config\n")),
    "many": GuestSpec(
        "g", disks=tuple(DiskSpec(f"d{n}", "shared", f"d{n}", size_bytes=1 << 20) for n in range(16)), nics=CARDS
    ),
    "uefi": GuestSpec("g", memory_mib=128, boot=Boot(firmware=Firmware.UEFI), disks=(ROOT,)),
    "tpm": GuestSpec("g", disks=(ROOT,), tpm=Tpm()),
    "screen": GuestSpec("g", disks=(ROOT,), display=Display(vnc=True)),
    "extras": GuestSpec(
        "g",
        vcpus=2,
        disks=(ROOT,),
        # A file system of the host's that the guest has not mounted moves; QEMU refuses once it is mounted.
        extra_args=(
            "-device virtio-balloon-pci",
            "-device VGA,romfile=",
            "-virtfs local,path=/tmp,mount_tag=t,security_model=none",
        ),
    ),
}


def lacking(kind: str) -> str:
    if kind == "uefi" and not (OVMF / "OVMF_CODE_4M.fd").is_file():
        return "no UEFI firmware (ovmf)"
    return "no swtpm" if kind == "tpm" and not shutil.which("swtpm") else ""


async def moved(source: QemuVmm, destination: QemuVmm) -> None:
    """Everything is at the destination, and neither runs."""
    await source.start_outgoing(OutgoingOptions(stream_of(destination.metadata), HoldStart.OPEN, 0, LINK, 300))
    await until(source, lambda s: s.status is EngineStatus.PARKED, 30)
    await source.proceed()
    await until(source, lambda s: s.status is EngineStatus.COMPLETED, 15)
    await until(destination, lambda s: s.run_state is RunState.PAUSED, 15)


@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.parametrize("kind", KINDS)
async def test_both_ends_are_the_machine_that_was_listed_and_the_guest_moves(
    ends: Ends, kind: str, machine: str
) -> None:
    if said := lacking(kind):
        pytest.skip(said)
    if kind == "uefi" and machine == "pc":
        pytest.skip("this build of UEFI is for q35")
    spec = GuestSpec(
        **{**{n: getattr(KINDS[kind], n) for n in GuestSpec.__slots__ if n != "newer"}, "machine": machine}
    )
    source, listed = await ends.born(spec)
    destination = await ends.prepared(spec, listed)
    there = await machine_of(source)
    assert there == await machine_of(destination)
    assert there.pop("") == f"{listed.type}-machine"
    assert there.pop("cpu") == [f"{listed.cpu}-x86_64-cpu"] * listed.vcpus  # QEMU would move it to any other
    assert listed.type != machine  # versioned
    assert set(there) == {device.id for device in listed.devices}
    assert await source.unmigratable() == ()
    await moved(source, destination)
    assert await seen_by_guest(source) == await seen_by_guest(destination)
    await destination.resume()
    assert (await destination.state()).run_state is RunState.RUNNING


ANOTHER: dict[str, Callable[[LiveMachine], LiveMachine]] = {
    "machine type": lambda machine: replace(machine, type="pc-q35-9.2"),
    "vCPUs": lambda machine: replace(machine, vcpus=1),
    "memory": lambda machine: replace(machine, memory_mib=96),
    "a device less": lambda machine: replace(
        machine, devices=tuple(device for device in machine.devices if device.id != "nic-eth0")
    ),
}
"""Machines that are not the guest's."""


@pytest.mark.parametrize("what", ANOTHER)
async def test_another_machine_at_the_destination_loses_the_attempt_and_not_the_guest(ends: Ends, what: str) -> None:
    """Nothing before the stream tells: which is why both ends are made from one list."""
    spec = GuestSpec("g", machine="q35", vcpus=2, nics=(NicSpec("eth0", "lab"),))
    source, listed = await ends.born(spec)
    destination = await ends.prepared(spec, ANOTHER[what](listed))
    assert await source.unmigratable() == ()
    await source.start_outgoing(OutgoingOptions(stream_of(destination.metadata), HoldStart.OPEN, 0, LINK, 300))
    state = await until(source, lambda s: s.status in (EngineStatus.PARKED, EngineStatus.FAILED), 30)
    if state.status is EngineStatus.PARKED:
        with suppress(EngineError):  # it may fail on its own just now
            await source.proceed()
    await until(source, lambda s: s.status is EngineStatus.FAILED and s.run_state is RunState.RUNNING, 30)


async def test_a_device_program_that_never_answers_ends_the_start_and_leaves_nothing(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shared file system (vhost-user-fs) whose daemon hangs: QEMU waits for it before it answers anybody."""
    monkeypatch.setattr("agents.engine.qemu.vmm._CONNECT_S", 3.0)
    at = ends.directory / "fs.sock"
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(at))
        daemon.listen(1)
        told = (
            "-object memory-backend-memfd,id=shared,size=64M,share=on",
            "-numa node,memdev=shared",
            f"-chardev socket,id=fs,path={at}",
            "-device vhost-user-fs-pci,chardev=fs,tag=t",
        )
        spec = GuestSpec("g", machine="q35", disks=(ROOT,), extra_args=told)
        files = ends.files("a", spec)
        files.make()
        found = await hardware.born(files, "s", await ends.engine.probe())
        assert found is not None
        with pytest.raises(EngineTimeout):
            await ends.engine.start(found.into(files.vmm_spec("s")))
        await found.remove()
    assert not list(_processes_of(files.directory))


def _processes_of(directory: Path) -> Iterator[bytes]:
    """Command lines that name it."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(directory).encode() in (words := path.read_bytes()):
                yield words


SYSTEM = "eeeeeeee-1111-4222-8333-abcdefabcdef"


async def test_a_guest_reads_the_uuid_of_the_system_that_it_had_elsewhere(ends: Ends) -> None:
    spec = GuestSpec("g", system_uuid=SYSTEM)
    source, listed = await ends.born(spec)
    destination = await ends.prepared(spec, listed)
    for vmm in (source, destination):
        assert await vmm._execute("query-uuid") == {"UUID": SYSTEM}


async def test_variables_are_copied_at_birth_and_never_again(ends: Ends) -> None:
    if said := lacking("uefi"):
        pytest.skip(said)
    variables = (OVMF / "OVMF_VARS_4M.fd").read_bytes()
    # The end of the store is spare space, where the firmware writes nothing.
    theirs = variables[:-8] + b"THEIRS!!"
    (ends.directory / "theirs.fd").write_bytes(theirs)
    spec = GuestSpec("g", memory_mib=128, machine="q35", boot=Boot(firmware=Firmware.UEFI, nvram="theirs.fd"))
    source, listed = await ends.born(spec)
    here = ends.files("a", spec).directory / "s.nvram"
    assert here.read_bytes()[-8:] == b"THEIRS!!"
    assert (ends.directory / "theirs.fd").read_bytes() == theirs
    (ends.directory / "theirs.fd").unlink()  # nobody asks for it again
    destination = await ends.prepared(spec, listed)
    await moved(source, destination)
    await destination.resume()
    assert (ends.files("b", spec).directory / "d.nvram").read_bytes()[-8:] == b"THEIRS!!"


@pytest.mark.parametrize("content", [None, b"of another build"])
async def test_variables_that_are_not_here_or_do_not_fit_are_refused(ends: Ends, content: bytes | None) -> None:
    if said := lacking("uefi"):
        pytest.skip(said)
    if content is not None:
        (ends.directory / "theirs.fd").write_bytes(content)
    spec = GuestSpec("g", memory_mib=128, machine="q35", boot=Boot(firmware=Firmware.UEFI, nvram="theirs.fd"))
    with pytest.raises(ImageNotFound if content is None else DroverError) as refused:
        await ends.born(spec)
    if isinstance(refused.value, DroverError):
        assert refused.value.reason is RefusalReason.FIRMWARE_NOT_AVAILABLE
    assert not list(ends.files("a", spec).directory.glob("s.*"))


async def test_a_guest_has_the_keys_of_the_tpm_that_it_had_elsewhere(ends: Ends, tmp_path: Path) -> None:
    """After the move too: the state goes along in the VMM's stream."""
    if said := lacking("tpm"):
        pytest.skip(said)
    given, key = tpm_of_theirs(tmp_path)
    (ends.directory / "g.permall").write_bytes(given.read_bytes())
    spec = GuestSpec("g", tpm=Tpm(state="g.permall"))
    source, listed = await ends.born(spec)
    assert (ends.directory / "g.permall").read_bytes() == given.read_bytes()
    destination = await ends.prepared(spec, listed)
    await moved(source, destination)
    await destination.resume()
    await destination.destroy()
    kept = tmp_path / "kept"
    (vmm, found), *_ = [each for each in ends.vmms if each[0] is destination]
    assert vmm is destination
    assert found.tpm is not None
    await found.tpm.destroy(keep=kept)
    with tpm(f"backend-uri=file://{kept}", tmp_path) as asked:
        assert key_of(asked) == key


async def test_a_screen_is_served_at_both_ends_of_a_move(ends: Ends) -> None:
    """The destination serves its own from the start; what is on it goes along in the card's memory."""
    spec = GuestSpec("g", machine="q35", boot=Boot(firmware=Firmware.BIOS), display=Display(vnc=True))
    source, listed = await ends.born(spec)
    here = await source.open_display("", 60)
    assert here.socket is not None
    assert here.socket.parent == ends.files("a", spec).directory
    async with viewer(here.socket) as (greeting, size):
        assert greeting.startswith("RFB 003.")
        assert size > (0, 0)
        destination = await ends.prepared(spec, listed)
        await moved(source, destination)
    await destination.resume()
    there = await destination.open_display("", 60)
    assert there.socket is not None
    assert there.socket != here.socket
    async with viewer(there.socket) as (greeting, _):
        assert greeting.startswith("RFB 003.")
    await destination.destroy()
    assert not there.socket.exists()


async def test_at_an_address_a_viewer_needs_the_password_of_the_moment(ends: Ends) -> None:
    ends.vnc_listen = "127.0.0.1"
    source, _ = await ends.born(GuestSpec("g", display=Display(vnc=True)))
    where = Endpoint("127.0.0.1", await _port(source))
    with pytest.raises(NotLetIn):  # nobody has asked for a password yet
        async with viewer(where):
            pass
    with pytest.raises(EngineError):
        await source.open_display("", 60)
    assert await source.open_display("secret01", 60) == DisplayAt(endpoint=where)
    async with viewer(where, "secret01") as (greeting, _):
        assert greeting.startswith("RFB 003.")
        assert await source.open_display("another2", 60) == DisplayAt(endpoint=where)
        with pytest.raises(NotLetIn):
            async with viewer(where, "secret01"):
                pass
        async with viewer(where, "another2"):
            pass
    await source.open_display("another2", 0)
    with pytest.raises(NotLetIn):  # as soon as the second is over
        await _looks_on(where, "another2")


async def test_two_guests_of_a_host_have_a_port_each(ends: Ends) -> None:
    ends.vnc_listen = "::1" if _has_ipv6() else "127.0.0.1"
    source, _ = await ends.born(GuestSpec("g", display=Display(vnc=True)))
    spec = GuestSpec("h", display=Display(vnc=True))
    files = ends.files("a", spec)
    found = await hardware.born(files, "other", await ends.engine.probe())
    assert found is not None
    other = await ends.engine.start(found.into(files.vmm_spec("other")))
    ends.vmms.append((other, found))
    assert await _port(source) != await _port(cast(QemuVmm, other))


async def _looks_on(where: Endpoint, password: str) -> None:
    async with asyncio.timeout(30):
        while True:
            async with viewer(where, password):
                await asyncio.sleep(0.1)


async def _port(vmm: QemuVmm) -> int:
    (server,) = await vmm._execute("query-vnc-servers")
    return int(server["server"][0]["service"])


def _has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


async def test_a_device_that_somebody_added_by_hand_stands_in_the_way(ends: Ends) -> None:
    source, _ = await ends.born(GuestSpec("g", machine="q35", disks=(ROOT,)))
    await source._execute("device_add", {"driver": "virtio-rng-pci", "id": "mine", "bus": "port2"})
    ((reason, said),) = await source.unmigratable()
    assert reason is RefusalReason.DEVICE_NOT_MIGRATABLE
    assert "mine (virtio-rng-pci) is no part of its machine" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-device nvme,serial=x",), "nvme"),
        (("-object memory-backend-ram,id=shm,size=1M,share=on", "-device ivshmem-plain,memdev=shm"), "ivshmem"),
        (("-blockdev driver=vvfat,node-name=fat,dir={dir},rw=on", "-device virtio-blk-pci,drive=fat"), "vvfat"),
        (("-drive file={dir}/d.vmdk,format=vmdk,if=virtio",), "vmdk"),
    ],
)
async def test_a_device_that_qemu_does_not_move_is_said_of_a_guest_at_rest(
    ends: Ends, arguments: tuple[str, ...], said: str
) -> None:
    (directory := ends.directory / "fat").mkdir()
    await ran("qemu-img", "create", "-q", "-f", "vmdk", str(directory / "d.vmdk"), "1M", timeout_s=30)
    told = tuple(argument.format(dir=directory) for argument in arguments)
    source, _ = await ends.born(GuestSpec("g", disks=(ROOT,), extra_args=told))
    found = await source.unmigratable()
    assert {reason for reason, _ in found} == {RefusalReason.DEVICE_NOT_MIGRATABLE}
    assert any(said in sentence for _, sentence in found)


async def test_a_directory_of_the_host_stands_in_the_way_once_it_is_mounted(ends: Ends) -> None:
    at = ends.directory / "qtest"
    told = (
        f"-virtfs local,path={ends.pool},mount_tag=t,security_model=none",
        f"-qtest unix:{at},server=on,wait=off",
        "-qtest-log none",
    )
    source, _ = await ends.born(GuestSpec("g", disks=(ROOT,), extra_args=told))
    assert await source.unmigratable() == ()
    guest = await Mounter.at(at)
    try:
        async with asyncio.timeout(60):
            while not await guest.is_set_up():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await source.pause()
        await guest.mount()
    finally:
        guest.close()
    ((reason, said),) = await source.unmigratable()
    assert reason is RefusalReason.DEVICE_NOT_MIGRATABLE
    assert "VirtFS" in said


async def test_a_job_of_somebody_else_on_a_disk_is_said_until_it_is_over(ends: Ends) -> None:
    """QEMU says nothing of it in blocked-reasons, and the job ends with the move."""
    source, _ = await ends.born(GuestSpec("g", disks=(ROOT,)))
    await source._execute("blockdev-add", {"driver": "null-co", "node-name": "away", "size": 16 << 20})
    job = {"job-id": "nightly", "device": "disk-root", "target": "away", "sync": "full", "speed": 1}
    # A mirror that is ready goes on until it is told to end.
    await source._execute("blockdev-mirror", job)
    assert not (await source._execute("query-migrate")).get("blocked-reasons")
    ((reason, said),) = await source.unmigratable()
    assert reason is RefusalReason.BLOCK_JOB_RUNNING
    assert "nightly" in said
    await source._execute("block-job-cancel", {"device": "nightly", "force": True})
    async with asyncio.timeout(10):
        while await source.unmigratable():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


class Holder:
    """Somebody else who has an image open, by QEMU's own lock bytes."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR)
        # l_type, l_whence, l_start, l_len, l_pid. A shared lock of byte 201 says that nobody else may write.
        fcntl.fcntl(self._file, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 201, 1, 0))

    def let_go(self) -> None:
        with suppress(OSError):
            os.close(self._file)


async def test_an_image_that_is_locked_after_the_seal_is_waited_for_and_nothing_is_lost(ends: Ends) -> None:
    """Nobody holds a lock between the seal and the take-over: a backup tool may open the image just then."""
    spec = GuestSpec("g", disks=(ROOT, DATA))
    source, machine = await ends.born(spec)
    destination = await ends.prepared(spec, machine)
    await moved(source, destination)
    holder = Holder(ends.pool / "data.raw")
    try:
        for _ in range(2):
            with pytest.raises(DiskLocked):
                await destination.resume()
            assert (await destination.state()).run_state is RunState.PAUSED
    finally:
        holder.let_go()
    await destination.resume()
    assert (await destination.state()).run_state is RunState.RUNNING
    with pytest.raises(DiskLocked):  # the second defence: the source cannot run beside it
        await source.resume()
    assert (await source.state()).run_state is not RunState.RUNNING


async def test_an_image_that_another_guest_has_open_is_refused_at_birth(ends: Ends) -> None:
    await ends.born(GuestSpec("g", disks=(DATA,)))
    files = ends.files("a", GuestSpec("h", disks=(DATA,)))
    found = await hardware.born(files, "other", await ends.engine.probe())
    assert found is not None
    with pytest.raises(DiskLocked):
        await ends.engine.start(found.into(files.vmm_spec("other")))
    await found.remove()


async def test_an_image_without_a_size_must_be_there_and_one_that_was_made_goes_with_its_failed_birth(
    ends: Ends,
) -> None:
    spec = GuestSpec("g", disks=(ROOT, DiskSpec("old", "shared", "old.qcow2")))
    with pytest.raises(DroverError) as refused:
        await ends.born(spec)
    assert refused.value.reason is RefusalReason.DISK_NOT_FOUND
    assert list(ends.pool.iterdir()) == []
    assert not [path for path in ends.files("a", spec).directory.iterdir() if path.name != "guest.json"]


async def test_a_cpu_that_cannot_be_given_in_full_does_not_start(ends: Ends) -> None:
    with pytest.raises(EngineError, match="support requested feature"):
        await ends.born(GuestSpec("g", cpu=Cpu("Skylake-Server")))


async def test_a_cpu_of_the_hosts_own_moves_between_equal_hosts_only(ends: Ends) -> None:
    spec = GuestSpec("g", cpu=Cpu("max"))
    _, machine = await ends.born(spec)
    config, here = ends.files("b", spec).config, cpu_definitions(await ends.engine.probe())
    assert machine.cpu_definition == here["max"]
    assert {"sse2", "lm", "qemu=" + (await ends.engine.probe())["version"]} <= set(here["max"].split())
    hardware.must_agree(config, spec, machine, here)
    older = " ".join(word for word in here["max"].split() if word != "avx2") + " family=6"
    with pytest.raises(DroverError, match="more: family=6; less: avx2") as refused:
        hardware.must_agree(config, spec, machine, {"max": older})
    assert refused.value.reason is RefusalReason.CPU_NOT_AVAILABLE
    with pytest.raises(DroverError, match="not known"):  # born under an agent that noted nothing down
        hardware.must_agree(config, spec, replace(machine, cpu_definition=""), here)


async def test_firmware_of_another_build_is_refused(ends: Ends) -> None:
    if said := lacking("uefi"):
        pytest.skip(said)
    spec = GuestSpec("g", memory_mib=128, boot=Boot(firmware=Firmware.UEFI), disks=(ROOT,), machine="q35")
    _, machine = await ends.born(spec)
    config = ends.files("b", spec).config
    hardware.must_agree(config, spec, machine)
    other = ends.directory / "other.fd"
    other.write_bytes(b"another build")
    changed = config.model_copy(update={"firmware": FirmwareConfig(uefi_code=other, uefi_vars=other)})
    with pytest.raises(DroverError) as refused:
        hardware.must_agree(changed, spec, machine)
    assert refused.value.reason is RefusalReason.FIRMWARE_NOT_AVAILABLE


async def test_the_hardware_of_an_earlier_agent_is_found_again(ends: Ends) -> None:
    if said := lacking("tpm"):
        pytest.skip(said)
    spec = GuestSpec("g", disks=(ROOT,), tpm=Tpm(), cloud_init=CloudInit("#cloud-config\n"))
    _, machine = await ends.born(spec)
    ends.vmms[0][1].detach()
    files = ends.files("a", spec)
    found = hardware.adopt(files, "s")
    assert found is not None
    assert found.machine == machine
    vmm, _ = ends.vmms.pop()
    await vmm.destroy()
    await found.remove()
    assert {path.name for path in files.directory.iterdir()} <= {"guest.json", "s.log"}
