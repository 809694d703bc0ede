"""What a QEMU that somebody else started is, and everything that stands against taking it over.

`adopted/by_hand.json` is what a QEMU 10.0.2 said of itself, with its command line; each test changes what its case is
about, in the words that QEMU has for it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.engine.qemu.foreign import ram_blocks
from agents.guest import examine
from agents.guest.duty import Copy, Do, duty
from agents.guest.examine import Examined, Here, Process
from orchestrator.core import handover
from orchestrator.core.errors import RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership, Refused
from orchestrator.core.ids import HostRef
from orchestrator.core.obstacles import REMEDIES
from orchestrator.core.records import (
    Boot,
    Cpu,
    DiskCache,
    DiskFormat,
    DiskSpec,
    Firmware,
    GuestSpec,
    LiveDevice,
    NicSpec,
    OnHostDeath,
)

R = RefusalReason
RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "adopted" / "by_hand.json").read_text())
HERE = Here(
    "tcg",
    images={"/srv/vms/a.qcow2": ("fast", "a.qcow2"), "/srv/vms/b.raw": ("fast", "b.raw")},
    boots={"/srv/boot/vmlinuz": "linux"},
    networks={"tap7": "prod"},
)


class Qemu:
    """What is known of one process; to be changed by a test."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = copy.deepcopy(RECORDED["answers"])
        self.arguments: list[str] = list(RECORDED["arguments"])
        self.here = HERE
        self.process = Process(4711, 99, ())
        self.wished: GuestSpec | None = None

    def told(self, old: str, new: str) -> None:
        assert any(old in word for word in self.arguments), old
        self.arguments = [word.replace(old, new) for word in self.arguments]

    def block(self, number: int) -> dict[str, Any]:
        return self.answers["query-block"][number]["inserted"]

    def examined(self) -> Examined:
        process = replace(self.process, arguments=tuple(self.arguments))
        return examine.examine("shop", process, self.answers, self.here, self.wished)

    def against(self) -> list[tuple[RefusalReason, str]]:
        return list(self.examined().obstacles)


def test_is_the_guest_that_it_runs() -> None:
    found = Qemu().examined()
    assert found.obstacles == ()
    disk0 = DiskSpec("disk0", "fast", "a.qcow2", DiskFormat.QCOW2, 32 << 20, DiskCache.NONE)
    anon1 = DiskSpec("anon1", "fast", "b.raw", DiskFormat.RAW, 16 << 20, DiskCache.NONE)
    assert found.spec == GuestSpec(
        "shop",
        memory_mib=64,
        vcpus=1,
        machine="pc-q35-10.0",
        boot=Boot("linux", "", "console=ttyS0"),
        cpu=Cpu("qemu64"),
        disks=(disk0, anon1),
        nics=(NicSpec("anon0", "prod", "52:54:00:12:34:56"),),
        system_uuid="12345678-1234-1234-1234-123456789abc",
    )
    assert found.running
    assert found.nodes == {"disk0": "d0", "anon1": "#block161"}


def test_keeps_each_device_where_it_is() -> None:
    machine = Qemu().examined().machine
    assert (machine.uuid, machine.serials, machine.cpu) == ("12345678-1234-1234-1234-123456789abc", 1, "qemu64")
    assert machine.devices == (
        LiveDevice("p1", "pcie-root-port", "pcie.0", "0x1", {"chassis": "1", "port": "0x10"}),
        LiveDevice("disk0", "virtio-blk-pci", "p1", "0x0", {}, "disk:disk0"),
        LiveDevice(
            "anon0", "virtio-net-pci", "pcie.0", "0x2", {"romfile": "", "mac": "52:54:00:12:34:56"}, "nic:anon0"
        ),
        LiveDevice("anon1", "virtio-blk-pci", "pcie.0", "0x3", {}, "disk:anon1"),
    )


def test_takes_from_the_operator_what_cannot_be_seen() -> None:
    qemu = Qemu()
    qemu.wished = GuestSpec(
        "shop",
        labels={"tier": "db"},
        on_host_death=OnHostDeath.LEAVE,
        disks=(DiskSpec("root", "fast", "a.qcow2"),),
        nics=(NicSpec("eth0", "prod", "52:54:00:12:34:56"),),
    )
    found = qemu.examined()
    assert found.obstacles == ()
    assert found.spec.labels == {"tier": "db"}
    assert [disk.name for disk in found.spec.disks] == ["root", "anon1"]
    assert [nic.name for nic in found.spec.nics] == ["eth0"]


def test_reads_json_devices_and_paused_guests() -> None:
    qemu = Qemu()
    qemu.told(
        "virtio-blk-pci,drive=d0,id=disk0,bus=p1", '{"driver":"virtio-blk-pci","drive":"d0","id":"disk0","bus":"p1"}'
    )
    qemu.answers["query-status"]["status"] = "paused"
    found = qemu.examined()
    assert found.obstacles == ()
    assert not found.running
    assert {device.id for device in found.machine.devices} == {"p1", "disk0", "anon0", "anon1"}


def test_a_device_that_was_taken_out_is_left_out() -> None:
    qemu = Qemu()
    qemu.arguments += ["-device", "virtio-balloon-pci,id=balloon"]
    found = qemu.examined()
    assert found.obstacles == ()
    assert "balloon" not in {device.id for device in found.machine.devices}


def _more(*words: str) -> Callable[[Qemu], None]:
    return lambda qemu: qemu.arguments.extend(words)


def _told(old: str, new: str) -> Callable[[Qemu], None]:
    return lambda qemu: qemu.told(old, new)


def _said(name: str, value: object) -> Callable[[Qemu], None]:
    return lambda qemu: qemu.answers.__setitem__(name, value)


def _here(**changes: Any) -> Callable[[Qemu], None]:
    return lambda qemu: setattr(qemu, "here", replace(HERE, **changes))


def _process(**changes: Any) -> Callable[[Qemu], None]:
    return lambda qemu: setattr(qemu, "process", replace(qemu.process, **changes))


def _image(**changes: Any) -> Callable[[Qemu], None]:
    return lambda qemu: qemu.block(1).update(changes)


def _monitor(label: str, where: str) -> Callable[[Qemu], None]:
    def change(qemu: Qemu) -> None:
        qemu.answers["query-chardev"].append({"frontend-open": True, "filename": where, "label": label})

    return change


def _device(path: str, **state: Any) -> Callable[[Qemu], None]:
    return lambda qemu: qemu.answers["devices"].__setitem__(path, state)


def _capability(name: str) -> Callable[[Qemu], None]:
    return lambda qemu: qemu.answers["query-migrate-capabilities"].append({"capability": name, "state": True})


def _uefi(
    *, code: dict[str, Any] | None = None, variables: dict[str, Any] | None = None, **here: Any
) -> Callable[[Qemu], None]:
    """A process with UEFI, as this host has it."""

    def change(qemu: Qemu) -> None:
        qemu.arguments += ["-drive", "if=pflash,format=raw,readonly=on,file=/srv/CODE.fd"]
        qemu.arguments += ["-drive", "if=pflash,format=raw,file=/srv/VARS.fd"]
        read_only = {"file": "/srv/CODE.fd", "ro": True, "drv": "raw", **(code or {})}
        own = {"file": "/srv/VARS.fd", "ro": False, "drv": "raw", **(variables or {})}
        qemu.answers["query-block"] += [
            {"device": "pflash0", "qdev": examine.CODE, "inserted": read_only},
            {"device": "pflash1", "qdev": examine.VARIABLES, "inserted": own},
        ]
        qemu.here = replace(qemu.here, **{"uefi_sha256": "c0de", "same_variables": True, **here})

    return change


CASES: dict[str, tuple[Callable[[Qemu], None], RefusalReason, str]] = {
    "ended": (_said("query-status", {"status": "shutdown"}), R.GUEST_NOT_RUNNING, "shutdown"),
    "moving": (_said("query-migrate", {"status": "active"}), R.GUEST_IS_MIGRATING, "active"),
    "blocked": (
        _said("query-migrate", {"blocked-reasons": ["non-migratable device: /machine/peripheral/x/nvme"]}),
        R.DEVICE_NOT_MIGRATABLE,
        "nvme",
    ),
    "job": (_said("query-block-jobs", [{"device": "backup0", "type": "backup"}]), R.BLOCK_JOB_RUNNING, "backup0"),
    "capability": (_capability("postcopy-ram"), R.NOT_ADOPTABLE, "postcopy-ram"),
    "tap by descriptor": (_told("ifname=tap7", "fd=35"), R.NOT_ADOPTABLE, "open descriptor"),
    "monitor by descriptor": (_more("-chardev", "socket,id=mon,fd=31,server=on"), R.NOT_ADOPTABLE, "open descriptor"),
    "sets of descriptors": (_more("-add-fd", "set=1,fd=7"), R.NOT_ADOPTABLE, "open descriptor"),
    "descriptors later": (_said("query-fdsets", [{"fdset-id": 1, "fds": []}]), R.NOT_ADOPTABLE, "-add-fd"),
    "monitor on a terminal": (_monitor("compat_monitor1", "stdio"), R.MONITOR_BUSY, "stdio"),
    "monitor in use": (_monitor("compat_monitor1", "unix:/run/other,server=on <-> "), R.MONITOR_BUSY, "/run/other"),
    "secret": (_more("-object", "secret,id=masterKey0,format=raw,file=/x"), R.NOT_ADOPTABLE, "-object secret"),
    "word without option": (_more("/srv/vms/c.img"), R.NOT_ADOPTABLE, "c.img"),
    "option": (_more("-rtc", "base=localtime"), R.EXTRA_ARGS_NOT_ALLOWED, "-rtc base=localtime"),
    "screen": (_more("-vga", "std"), R.EXTRA_ARGS_NOT_ALLOWED, "-vga std"),
    "snapshot": (_more("-snapshot"), R.EXTRA_ARGS_NOT_ALLOWED, "-snapshot"),
    "machine option": (_told("q35", "q35,smm=off"), R.NOT_ADOPTABLE, "smm=off"),
    "uefi by machine, not there": (_told("q35", "q35,pflash0=code"), R.FIRMWARE_NOT_AVAILABLE, "pflash0"),
    "uefi by drive, not there": (
        _more("-drive", "if=pflash,format=raw,readonly=on,file=/srv/CODE.fd"),
        R.FIRMWARE_NOT_AVAILABLE,
        "not made of code that it only reads",
    ),
    "uefi in one piece": (_uefi(code={"ro": False}), R.FIRMWARE_NOT_AVAILABLE, "not made of code that it only reads"),
    "uefi without variables": (_uefi(variables={"ro": True}), R.FIRMWARE_NOT_AVAILABLE, "variables of its own"),
    "uefi in qcow2": (_uefi(variables={"drv": "qcow2"}), R.FIRMWARE_NOT_AVAILABLE, "VARS.fd of its UEFI firmware"),
    "other uefi": (_uefi(uefi_sha256=""), R.FIRMWARE_NOT_AVAILABLE, "firmware.uefi_code"),
    "other variables": (_uefi(same_variables=False), R.FIRMWARE_NOT_AVAILABLE, "VARS.fd are of another size"),
    "uefi and a kernel": (_uefi(), R.NOT_ADOPTABLE, "a kernel, and UEFI as well"),
    "other bios": (_here(same_bios=False), R.FIRMWARE_NOT_AVAILABLE, "firmware.bios"),
    "kernel": (_here(boots={}), R.IMAGE_NOT_FOUND, "/srv/boot/vmlinuz"),
    "cpu host": (_more("-cpu", "host"), R.CPU_NOT_AVAILABLE, "`host`"),
    "cpu max": (_more("-cpu", "max"), R.CPU_NOT_AVAILABLE, "`max`"),
    "other accelerator": (_said("accelerator", "kvm"), R.CPU_NOT_AVAILABLE, "kvm"),
    "memory object": (
        lambda qemu: qemu.answers["machine"].__setitem__("memory-backend", "/objects/m0"),
        R.NOT_ADOPTABLE,
        "memory-backend",
    ),
    "memory slots": (_more("-m", "64,slots=2,maxmem=1G"), R.FEATURE_NOT_AVAILABLE, "slots"),
    "odd memory": (
        lambda qemu: qemu.answers["machine"]["memory"].__setitem__("size", (64 << 20) + 4096),
        R.FEATURE_NOT_AVAILABLE,
        "whole MiB",
    ),
    "topology": (
        lambda qemu: qemu.answers["machine"]["smp"].update(cpus=2, maxcpus=2, threads=2),
        R.FEATURE_NOT_AVAILABLE,
        "laid out",
    ),
    "image in no pool": (
        _here(images={"/srv/vms/a.qcow2": ("fast", "a.qcow2")}),
        R.POOL_NOT_FOUND,
        "/srv/vms/b.raw",
    ),
    "backing file": (_image(backing_file_depth=1), R.DISK_NOT_MIGRATABLE, "another image"),
    "format": (_image(drv="vmdk"), R.DISK_NOT_MIGRATABLE, "vmdk"),
    "encrypted": (_image(encrypted=True), R.DISK_NOT_MIGRATABLE, "secret"),
    "throttled": (_image(iops=100), R.DISK_NOT_MIGRATABLE, "throttled"),
    "ide": (_told("if=virtio", "if=ide"), R.DEVICE_NOT_MIGRATABLE, "behind ide"),
    "network of the user": (_told("tap,id=n0,ifname=tap7", "user,id=n0"), R.NETWORK_NOT_FOUND, "kind user"),
    "vhost": (_told("ifname=tap7", "ifname=tap7,vhost=on"), R.NETWORK_NOT_FOUND, "vhost"),
    "no bridge": (_here(networks={}), R.NETWORK_NOT_FOUND, "tap7"),
    "other namespace": (_process(same_network=False), R.NETWORK_NOT_FOUND, "namespace"),
    "plugged in": (
        _device("/machine/peripheral/late", type="virtio-rng-pci", parent_bus="/machine/q35/pcie.0", addr=40),
        R.NOT_ADOPTABLE,
        "late",
    ),
    "exchanged": (
        _device("/machine/peripheral/disk0", type="virtio-rng-pci", parent_bus="/machine/q35/pcie.0", addr=40),
        R.NOT_ADOPTABLE,
        "disk0",
    ),
    "behind a nameless bridge": (
        _device(
            "/machine/peripheral/disk0",
            type="virtio-blk-pci",
            parent_bus="/machine/peripheral-anon/device[4]/pcie.1",
            addr=0,
        ),
        R.NOT_ADOPTABLE,
        "without an id",
    ),
    "no name for a guest": (
        lambda qemu: setattr(qemu, "wished", GuestSpec("shop", labels={"": "x"})),
        R.NOT_ADOPTABLE,
        "labels",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_is_refused_with_the_reason(case: str) -> None:
    qemu = Qemu()
    change, reason, said = CASES[case]
    change(qemu)
    found = qemu.against()
    assert any(found_reason is reason and said in sentence for found_reason, sentence in found), found
    assert all(each in REMEDIES for each, _ in found), "an obstacle that nobody can do anything about"


def test_uefi_is_part_of_the_machine_and_no_disk() -> None:
    qemu = Qemu()
    _uefi(same_bios=False)(qemu)  # which is no matter then
    at = qemu.arguments.index("-kernel")
    del qemu.arguments[at : at + 2]
    while "-append" in qemu.arguments:
        at = qemu.arguments.index("-append")
        del qemu.arguments[at : at + 2]
    found = qemu.examined()
    assert found.obstacles == ()
    assert found.spec.boot == Boot(firmware=Firmware.UEFI)
    assert (found.machine.firmware, found.machine.firmware_sha256) == (Firmware.UEFI, {"uefi_code": "c0de"})
    assert [disk.image for disk in found.spec.disks] == ["a.qcow2", "b.raw"]


def test_refuses_with_all_reasons_at_once() -> None:
    qemu = Qemu()
    for case in ("secret", "backing file", "cpu host", "no bridge", "option"):
        CASES[case][0](qemu)
    reasons = {reason for reason, _ in qemu.against()}
    assert reasons >= {R.NOT_ADOPTABLE, R.DISK_NOT_MIGRATABLE, R.CPU_NOT_AVAILABLE, R.NETWORK_NOT_FOUND}
    assert R.EXTRA_ARGS_NOT_ALLOWED in reasons


def test_an_option_that_the_host_allows_goes_along() -> None:
    qemu = Qemu()
    qemu.arguments += ["-rtc", "base=localtime"]
    qemu.here = replace(HERE, extra_args=("-rtc base=localtime",))
    found = qemu.examined()
    assert found.obstacles == ()
    assert found.spec.extra_args == ("-rtc base=localtime",)


def test_a_monitor_that_nobody_is_connected_to_is_no_obstacle() -> None:
    qemu = Qemu()
    _monitor("compat_monitor1", "disconnected:unix:/run/other,server=on")(qemu)
    assert qemu.against() == []


# --- the machine that would be built ----------------------------------------------------------------------------------


def _built(live: dict[str, Any]) -> dict[str, Any]:
    built = copy.deepcopy(live)
    names = {"/machine/peripheral-anon/device[0]": "anon0", "/machine/peripheral-anon/device[1]": "anon1"}
    for path, name in names.items():
        built["devices"][f"/machine/peripheral/{name}"] = built["devices"].pop(path)
    return built


def test_the_machine_that_would_be_built_is_the_same() -> None:
    qemu = Qemu()
    assert examine.differences(qemu.answers, _built(qemu.answers), qemu.examined()) == []


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        (lambda built: built["unattached"].append("isa-fdc"), R.NOT_ADOPTABLE, "isa-fdc"),
        (lambda built: built["unattached"].remove("isa-serial"), R.NOT_ADOPTABLE, "isa-serial"),
        (lambda built: built["devices"]["/machine/peripheral/anon0"].update(addr=24), R.NOT_ADOPTABLE, "anon0"),
        (lambda built: built["devices"].pop("/machine/peripheral/disk0"), R.NOT_ADOPTABLE, "disk0"),
        (lambda built: built["ram"].pop("pc.rom"), R.NOT_ADOPTABLE, "pc.rom"),
        (lambda built: built["ram"].update({"pc.bios": 131072}), R.NOT_ADOPTABLE, "pc.bios"),
        (lambda built: built["features"].pop(), R.CPU_NOT_AVAILABLE, "enforce"),
    ],
)
def test_a_machine_that_would_be_another_one_is_refused(
    change: Callable[[dict[str, Any]], None], reason: RefusalReason, said: str
) -> None:
    qemu = Qemu()
    built = _built(qemu.answers)
    change(built)
    found = examine.differences(qemu.answers, built, qemu.examined())
    assert [each for each, sentence in found if said in sentence] == [reason], found


def test_pieces_of_memory_are_read_from_the_monitors_table() -> None:
    said = (
        "              Block Name    PSize              Offset               Used              Total        HVA  RO\r\n"
        "                  pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x7f  rw\r\n"
        "    /rom@etc/acpi/tables    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000 0x7f  ro\r\n"
    )
    assert ram_blocks(said) == {"pc.ram": 64 << 20, "/rom@etc/acpi/tables": 2 << 20}


# --- given back -------------------------------------------------------------------------------------------------------

HOST = HostRef("host-1", "boot")
RECORD = GuestRecord("shop", Ownership.IDLE, HOST)


def test_a_guest_is_released_from_idle_only() -> None:
    gone = handover.released(RECORD, writer="w")
    assert (gone.phase, gone.released) == (Ownership.GONE, True)
    for phase in Ownership:
        if phase is not Ownership.IDLE:
            with pytest.raises(Refused):
                handover.released(replace(RECORD, phase=phase), writer="w")


@pytest.mark.parametrize(
    ("record", "copy_", "do"),
    [
        (handover.released(RECORD, writer=""), Copy("a", False, adopted=True, running=True), Do.LET_GO),
        (replace(RECORD, phase=Ownership.GONE, never_ran=True), Copy("a", False, adopted=True), Do.LET_GO),
        (replace(RECORD, phase=Ownership.GONE), Copy("a", False, adopted=True, running=True), Do.DISCARD),
        (replace(RECORD, phase=Ownership.CRASHED), Copy("a", False, adopted=True, running=True), Do.DISCARD),
        (handover.released(RECORD, writer=""), Copy("a", False, adopted=True, sealed=True), Do.DISCARD),
        (handover.released(RECORD, writer=""), Copy("a", False, running=True), Do.DISCARD),
        (RECORD, Copy("a", False, adopted=True, running=True), Do.NOTHING),
    ],
)
def test_only_a_released_process_is_let_go(record: GuestRecord, copy_: Copy, do: Do) -> None:
    assert duty(record, HOST, [copy_], marker=False, want_run=True).do is do
