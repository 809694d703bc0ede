"""PURE. A guest's machine as one list of live devices: put together once, at the guest's birth, and kept from then on.

Both ends of a migration build the machine from the list and never from the specification: what a device is and where it
sits is decided once, by the version of Drover that the guest was born under.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.core.hardware import can_grow
from orchestrator.core.records import DiskSpec, Firmware, GuestSpec, LiveDevice, LiveMachine, NicSpec

SPARE_PORTS = 4
"""Root ports of a q35 machine that are kept free for what is added while the guest runs."""
MAX_DISK_QUEUES = 4
IOTHREAD = "iothread"
"""Property of a device: the thread of its own, which is made before it."""
_FIRST_PORT_SLOT, _FUNCTIONS = 2, 8
_VIDEO_SLOT = 1
"""Of a q35: a graphics card is no PCI Express device, and sits beside the root ports."""
FIRST_SLOT, SLOTS = 2, 32
"""Of a pc, for disks and cards; below them are its bridge and its chipset."""
_DISK, _NIC, SEED, TPM, VIDEO = "disk", "nic", "seed", "tpm", "video"


class MachineError(Exception):
    """The machine cannot be put together; the text says why."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the host of its birth adds to a guest's specification."""

    machine_type: str
    """Versioned."""
    accelerator: str
    firmware_sha256: Mapping[str, str]
    """Of the files that the guest is started with, by role."""
    mac_of: Callable[[str], str]
    """The address of a network card that has none of its own, by the card's name."""
    base_sha256: Mapping[str, str] = field(default_factory=dict[str, str])
    cpu_definitions: Mapping[str, str] = field(default_factory=dict[str, str])
    """What models that are another CPU on each host are here."""
    """Of the images that disks' own lie on, by disk."""


def born(spec: GuestSpec, facts: Facts) -> LiveMachine:
    """The machine of a new guest. Raises MachineError."""
    machine = LiveMachine(
        type=facts.machine_type,
        cpu=spec.cpu.model or ("Nehalem" if facts.accelerator == "kvm" else "qemu64"),
        memory_mib=spec.memory_mib,
        vcpus=spec.vcpus,
        firmware=spec.boot.firmware,
        firmware_sha256=dict(facts.firmware_sha256) if spec.boot.firmware is not Firmware.DIRECT else {},
        max_memory_mib=spec.max_memory_mib if spec.max_memory_mib > spec.memory_mib else 0,
        max_vcpus=spec.max_vcpus if spec.max_vcpus > spec.vcpus else 0,
        base_sha256=dict(facts.base_sha256),
        uuid=spec.system_uuid,
        cpu_definition=facts.cpu_definitions.get(spec.cpu.model, ""),
    )
    if can_grow(spec) and not machine.type.startswith("pc"):
        raise MachineError(f"a machine of type {machine.type} cannot be given more while it runs: choose pc or q35")
    wanted = [_disk(disk, spec) for disk in spec.disks]
    wanted += [nic_device(nic, nic.mac or facts.mac_of(nic.name)) for nic in spec.nics]
    if spec.cloud_init is not None:
        wanted.append(LiveDevice(SEED, "virtio-blk-pci", properties={"num-queues": "1"}, backend=SEED))
    video = LiveDevice(VIDEO, "VGA", properties={"vgamem_mb": "16"})
    if is_q35(machine.type):
        places = _ports(wanted)
        if spec.display.vnc:
            places.append(replace(video, bus="pcie.0", address=f"0x{_VIDEO_SLOT:x}"))
    else:
        places = _slots([*wanted, *([video] if spec.display.vnc else [])], machine.type)
    if spec.tpm is not None:
        places.append(LiveDevice(TPM, "tpm-crb", backend=TPM))
    return replace(machine, devices=tuple(places))


def is_q35(machine_type: str) -> bool:
    """Its devices sit behind root ports of a PCI Express bus."""
    return "q35" in machine_type


def _disk(disk: DiskSpec, spec: GuestSpec) -> LiveDevice:
    device = disk_device(disk, spec.vcpus)
    if spec.boot.firmware is Firmware.DIRECT:
        return device
    others = [each for each in spec.disks if not each.boot]
    first = "1" if disk.boot else str(2 + others.index(disk))
    return replace(device, properties={**device.properties, "bootindex": first})


def disk_device(disk: DiskSpec, vcpus: int) -> LiveDevice:
    """A disk that has no place yet."""
    properties = {"num-queues": str(min(vcpus, MAX_DISK_QUEUES))}
    if disk.iothread:
        properties[IOTHREAD] = f"io-{disk.name}"
    return LiveDevice(f"{_DISK}-{disk.name}", "virtio-blk-pci", properties=properties, backend=f"{_DISK}:{disk.name}")


def nic_device(nic: NicSpec, mac: str) -> LiveDevice:
    """A network card that has no place yet."""
    # No option ROM: its size is part of the machine, and another build of it at the other end fails the load.
    properties = {"mac": mac, "romfile": ""}
    if nic.queues > 1:
        properties |= {"mq": "on", "vectors": str(2 * nic.queues + 2)}
    if nic.mtu:
        properties["host_mtu"] = str(nic.mtu)
    return LiveDevice(f"{_NIC}-{nic.name}", "virtio-net-pci", properties=properties, backend=f"{_NIC}:{nic.name}")


def _ports(wanted: Sequence[LiveDevice]) -> list[LiveDevice]:
    """A root port for each device, and some to spare; all ports first, so that every bus is there."""
    ports: list[LiveDevice] = []
    for number in range(len(wanted) + SPARE_PORTS):
        slot, function = _FIRST_PORT_SLOT + number // _FUNCTIONS, number % _FUNCTIONS
        properties = {"chassis": str(number + 1), "port": str(number)}
        if function == 0:
            properties["multifunction"] = "on"
        address = f"0x{slot:x}.0x{function:x}"
        ports.append(LiveDevice(f"port{number}", "pcie-root-port", "pcie.0", address, properties))
    return ports + [replace(device, bus=f"port{number}", address="0x0") for number, device in enumerate(wanted)]


def _slots(wanted: Sequence[LiveDevice], machine_type: str) -> list[LiveDevice]:
    if wanted and not machine_type.startswith("pc"):
        raise MachineError(f"a machine of type {machine_type} cannot be given disks and cards: choose pc or q35")
    if len(wanted) > SLOTS - FIRST_SLOT:
        raise MachineError(f"a machine of type {machine_type} has room for {SLOTS - FIRST_SLOT} devices: choose q35")
    return [replace(device, bus="pci.0", address=f"0x{FIRST_SLOT + n:x}") for n, device in enumerate(wanted)]


def disk_of(device: LiveDevice) -> str:
    """Name of the disk that stands behind a device; empty: none does."""
    return _behind(device, _DISK)


def nic_of(device: LiveDevice) -> str:
    """Name of the network card that a device is; empty: it is none."""
    return _behind(device, _NIC)


def _behind(device: LiveDevice, kind: str) -> str:
    found, _, name = device.backend.partition(":")
    return name if found == kind else ""
