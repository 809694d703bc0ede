"""PURE. What is added to a machine that runs, and what is taken away: where it goes, and what is left.

A place is chosen here and never by the VMM, out of what the birth has left free: a root port of a q35 machine, a
slot of a pc, a socket. So the list stays all that is needed to build the same machine at another host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from agents.guest.machine import FIRST_SLOT, SLOTS, MachineError, disk_device, is_q35, nic_device
from orchestrator.core.hardware import MODULE_MIB, MODULES
from orchestrator.core.records import DiskSpec, GuestSpec, LiveDevice, LiveMachine, NicSpec, ShimKind

_PORT = "pcie-root-port"
_MODULE, _VCPU = "dimm", "vcpu"


def memory_mib(machine: LiveMachine) -> int:
    """Of the guest now."""
    return machine.memory_mib + sum(device.memory_mib for device in machine.devices)


def vcpus(machine: LiveMachine) -> int:
    """Of the guest now."""
    return machine.vcpus + sum(_is_vcpu(device) for device in machine.devices)


def disk(machine: LiveMachine, spec: DiskSpec) -> LiveDevice:
    """A disk, in its place. Raises MachineError when there is none left, and for what only a birth can give."""
    if spec.iothread or spec.base:
        raise MachineError("a disk that is added while the guest runs has no `iothread` and no `base`: leave them out")
    return _placed(machine, disk_device(spec, vcpus(machine)))


def nic(machine: LiveMachine, spec: NicSpec, mac: str) -> LiveDevice:
    """A network card, in its place. Raises MachineError when there is none left."""
    return _placed(machine, nic_device(spec, mac))


def module(machine: LiveMachine, wanted_mib: int) -> LiveDevice:
    """The module of memory that makes it `wanted_mib` in all. Where the guest sees it follows from its slot, and is
    noted down once it is there. Raises MachineError."""
    more = wanted_mib - memory_mib(machine)
    if not machine.max_memory_mib:
        raise MachineError("it was born without room for more memory: give it `max_memory` and start it anew")
    if wanted_mib > machine.max_memory_mib:
        raise MachineError(f"its `max_memory` is {machine.max_memory_mib} MiB")
    if more <= 0 or more % MODULE_MIB:
        said = f"it has {memory_mib(machine)} MiB: what is added is {MODULE_MIB} MiB or a multiple of that"
        raise MachineError(f"{said}, not {more} MiB")
    taken = {device.id for device in machine.devices}
    slot = next((n for n in range(MODULES) if f"{_MODULE}{n}" not in taken), None)
    if slot is None:
        raise MachineError(f"its {MODULES} slots for modules of memory are taken: start it anew with more memory")
    name = f"{_MODULE}{slot}"
    return LiveDevice(name, "pc-dimm", properties={"slot": str(slot)}, backend=f"memory:{name}", memory_mib=more)


def sockets(machine: LiveMachine, wanted: int) -> tuple[LiveDevice, ...]:
    """The vCPUs that make it `wanted` in all. Raises MachineError."""
    have = vcpus(machine)
    if not machine.max_vcpus:
        raise MachineError("it was born without sockets for more vCPUs: give it `max_vcpus` and start it anew")
    if wanted > machine.max_vcpus:
        raise MachineError(f"its `max_vcpus` is {machine.max_vcpus}")
    if wanted <= have:
        raise MachineError(f"it has {have} vCPUs, and none is taken away while it runs")
    return tuple(_vcpu(machine, number) for number in range(have, wanted))


def _vcpu(machine: LiveMachine, number: int) -> LiveDevice:
    """Each in a socket of its own, as the machine was laid out at its birth."""
    where = {"socket-id": str(number), "core-id": "0", "thread-id": "0"}
    return LiveDevice(f"{_VCPU}{number}", f"{machine.cpu}-x86_64-cpu", properties=where)


def _is_vcpu(device: LiveDevice) -> bool:
    return device.driver.endswith("-x86_64-cpu")


def attached(machine: LiveMachine, devices: Sequence[LiveDevice]) -> LiveMachine:
    """With these at the end of the list."""
    return replace(machine, devices=(*machine.devices, *devices))


def detached(machine: LiveMachine, name: str) -> LiveMachine:
    """Without the device of that id; its place is free."""
    return replace(machine, devices=tuple(device for device in machine.devices if device.id != name))


def leaving(machine: LiveMachine, name: str) -> LiveMachine:
    """The guest was asked to let go of the device of that id."""
    devices = (replace(device, leaving=True) if device.id == name else device for device in machine.devices)
    return replace(machine, devices=tuple(devices))


def gone(machine: LiveMachine, found: Mapping[str, str]) -> list[LiveDevice]:
    """Devices that the guest was asked for and has let go of; `found`: what its VMM has, id -> driver."""
    return [device for device in machine.devices if device.leaving and device.id not in found]


def places_are_ours(spec: GuestSpec, machine: LiveMachine) -> bool:
    """The VMM has chosen no place by itself that another list could change: on a pc, devices of shim net or vfio, and
    those of additional arguments, sit in the first slots that the list leaves free."""
    by_itself = any(device.shim in (ShimKind.NET, ShimKind.VFIO) for device in spec.devices)
    by_itself = by_itself or any("-device" in argument for argument in spec.extra_args)
    return is_q35(machine.type) or not by_itself


def _placed(machine: LiveMachine, device: LiveDevice) -> LiveDevice:
    taken = {(each.bus, each.address) for each in machine.devices}
    if is_q35(machine.type):
        buses = {each.bus for each in machine.devices}
        port = next((each.id for each in machine.devices if each.driver == _PORT and each.id not in buses), None)
        if port is None:
            raise MachineError("its root ports are all taken: detach something, or start it anew with it")
        return replace(device, bus=port, address="0x0")
    for slot in range(FIRST_SLOT, SLOTS):
        if ("pci.0", address := f"0x{slot:x}") not in taken:
            return replace(device, bus="pci.0", address=address)
    raise MachineError("its slots are all taken: detach something, or start it anew as q35")
