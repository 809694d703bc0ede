"""PURE. Whether a guest's disks, network cards, CPU and firmware can be what its specification says.

What only a host knows (whether there is such a pool, how large it is) is for placement and the host's agent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from orchestrator.core.naming import MOVED_AWAY, file_error, name_error
from orchestrator.core.records import CloudInit, DiskFormat, DiskSpec, Firmware, GuestSpec, NicSpec, PoolKind, ShimKind
from orchestrator.core.text import quoted

Problem = tuple[str, str]
"""Field, relative to the specification, and a sentence."""

MAX_DISKS = 16
MAX_NICS = 8
MAX_QUEUES = 16
MAX_MEMORY_MIB = 1 << 20
MAX_VCPUS = 255
MODULES = 16
"""Slots for modules of memory, in a machine that has room for them."""
MODULE_MIB = 128
"""Memory is added in multiples of this: a Linux guest takes no less."""
MIN_DISK_BYTES, MAX_DISK_BYTES = 1 << 20, 64 << 40
SECTOR_BYTES = 512
MIN_MTU, MAX_MTU = 576, 9216
MAX_CLOUD_INIT_BYTES = 64 << 10
"""All files of a data source together."""
MAX_EXTRA_ARGS = 16
MAX_EXTRA_ARG_BYTES = 253

_IMAGES = "the hosts' directory of images"
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_CPU = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def has_hardware(spec: GuestSpec) -> bool:
    """The guest asks for more than the memory, kernel and shim devices that hosts of every version give."""
    firmware = spec.boot.firmware is not Firmware.DIRECT
    devices = spec.disks or spec.nics or spec.tpm or spec.cloud_init or spec.extra_args
    return bool(devices or spec.cpu.model or firmware or can_grow(spec) or spec.display.vnc or spec.system_uuid)


def beyond_libvirt(spec: GuestSpec) -> tuple[str, ...]:
    """What of the guest no host gives that runs its guests by libvirt, each thing by its name; empty: nothing. Whether
    it gives the disks depends on their pools: see `disks_beyond_libvirt`."""
    named = [f"disk {disk.name} on the base {disk.base}" for disk in spec.disks if disk.base]
    named += [f"disk {disk.name} with a thread of its own" for disk in spec.disks if disk.iothread]
    named += [f"network card {nic.name} of several queues" for nic in spec.nics if nic.queues > 1]
    others = {
        f"firmware {spec.boot.firmware}": spec.boot.firmware is not Firmware.DIRECT,
        "a TPM": spec.tpm is not None,
        "a cloud-init disk": spec.cloud_init is not None,
        f"CPU model {spec.cpu.model}": bool(spec.cpu.model),
        "room for more memory or vCPUs": can_grow(spec),
        "a screen": spec.display.vnc,
        "a system uuid": bool(spec.system_uuid),
        "extra_args": bool(spec.extra_args),
    }
    named += [f"device {device.name} inside the VMM" for device in spec.devices if device.shim is ShimKind.VFIO]
    return (*named, *(name for name, has in others.items() if has))


def disks_beyond_libvirt(disks: Iterable[tuple[str, str]], pools: Mapping[str, PoolKind]) -> tuple[str, ...]:
    """Which of these disks, each with the name of its pool, a host with these pools does not give that runs its guests
    by libvirt. A pool that the host does not have at all is for others to refuse."""
    what = {PoolKind.LOCAL: "in the local pool", PoolKind.BLOCK: "on a volume of pool"}
    where = {name: what[kind] for name, kind in pools.items() if kind in what}
    return tuple(f"disk {name} {where[pool]} {pool}" for name, pool in disks if pool in where)


def disk_pools(spec: GuestSpec) -> tuple[tuple[str, str], ...]:
    """The names of its disks and of their pools."""
    return tuple((disk.name, disk.pool) for disk in spec.disks)


def takes_state(spec: GuestSpec) -> bool:
    """It begins with something that it had elsewhere: a uuid of its system, UEFI variables, a TPM."""
    return bool(spec.system_uuid or spec.boot.nvram or (spec.tpm is not None and spec.tpm.state))


def can_grow(spec: GuestSpec) -> bool:
    """Its machine has room for more memory or vCPUs."""
    return spec.max_memory_mib > 0 or spec.max_vcpus > 0


def hardware_errors(spec: GuestSpec) -> list[Problem]:
    """Everything that is wrong with a guest's hardware; empty when it is sound."""
    bad = _boot(spec) + _growth(spec)
    if spec.cpu.model and not _CPU.fullmatch(spec.cpu.model):
        said = "must be the name of a CPU model such as Nehalem or EPYC, without features"
        bad.append(("cpu.model", f"{said}, not {quoted(spec.cpu.model)}"))
    bad += _disks(spec.disks)
    bad += _nics(spec.nics)
    if spec.nics and any(device.shim is ShimKind.NET for device in spec.devices):
        bad.append(("nics", "a guest has cards in networks (nics) or devices of shim net, not both"))
    if spec.tpm is not None and spec.tpm.version != "2.0":
        bad.append(("tpm.version", f"must be 2.0, not {quoted(spec.tpm.version)}"))
    if spec.tpm is not None and spec.tpm.state and (said := file_error(spec.tpm.state, _IMAGES)):
        bad.append(("tpm.state", said))
    if spec.system_uuid and not _UUID.fullmatch(spec.system_uuid):
        said = "must be a uuid in lower case, such as 6b1f3f2a-9d1c-4a51-8a3e-0d6f3c1b2a49"
        bad.append(("system_uuid", f"{said}, not {quoted(spec.system_uuid)}"))
    if spec.cloud_init is not None:
        bad += [(f"cloud_init.{field}", said) for field, said in _cloud_init(spec.cloud_init)]
    return bad + _extra_args(spec.extra_args)


def _growth(spec: GuestSpec) -> list[Problem]:
    bad: list[Problem] = []
    if spec.max_memory_mib and not spec.memory_mib <= spec.max_memory_mib <= MAX_MEMORY_MIB:
        said = f"must be between the guest's memory, {spec.memory_mib} MiB, and {MAX_MEMORY_MIB} MiB, or left out"
        bad.append(("max_memory_mib", f"{said}, not {spec.max_memory_mib}"))
    if spec.max_vcpus and not spec.vcpus <= spec.max_vcpus <= MAX_VCPUS:
        said = f"must be between the guest's vCPUs, {spec.vcpus}, and {MAX_VCPUS}, or left out"
        bad.append(("max_vcpus", f"{said}, not {spec.max_vcpus}"))
    return bad


def _boot(spec: GuestSpec) -> list[Problem]:
    boot = spec.boot
    first = [index for index, disk in enumerate(spec.disks) if disk.boot]
    bad = [(f"disks[{index}].boot", "another disk is the first to boot from already") for index in first[1:]]
    if boot.nvram and boot.firmware is not Firmware.UEFI:
        bad.append(("boot.nvram", "has the variables of a guest that is started by UEFI: say boot.firmware: uefi"))
    elif boot.nvram and (said := file_error(boot.nvram, _IMAGES)):
        bad.append(("boot.nvram", said))
    if boot.firmware is Firmware.DIRECT:
        said = "the guest's kernel is started directly: leave it out, or say boot.firmware: bios or uefi"
        return bad + [(f"disks[{index}].boot", said) for index in first[:1]]
    for field in ("kernel", "initrd", "append"):
        if getattr(boot, field):
            said = f"must be left out with boot.firmware {boot.firmware.value}, which finds its own kernel on a disk"
            bad.append((f"boot.{field}", said))
    return bad


def _disks(disks: Sequence[DiskSpec]) -> list[Problem]:
    bad = _how_many("disks", len(disks), MAX_DISKS)
    bad += _same_names("disks", "disk", (disk.name for disk in disks))
    first: dict[tuple[str, str], int] = {}
    for index, disk in enumerate(disks):
        bad += [(f"disks[{index}].{field}", said) for field, said in _disk(disk)]
        before = first.setdefault((disk.pool, disk.image), index)
        if before != index and not (disk.read_only and disks[before].read_only):
            said = f"is the image of disk {quoted(disks[before].name)} as well: an image has one writer"
            bad.append((f"disks[{index}].image", said))
    written = {(disk.pool, disk.image) for disk in disks if not disk.read_only}
    for index, disk in enumerate(disks):
        if disk.base and (disk.pool, disk.base) in written:
            bad.append((f"disks[{index}].base", "is an image that the guest writes to: nothing may lie on it"))
    return bad


def _disk(disk: DiskSpec) -> list[Problem]:
    bad: list[Problem] = []
    if wrong := name_error(disk.name):
        bad.append(("name", wrong))
    if wrong := name_error(disk.pool):
        bad.append(("pool", f"names a pool of the hosts' and {wrong}"))
    if wrong := file_error(disk.image, "the pool"):
        bad.append(("image", wrong))
    elif MOVED_AWAY.fullmatch(disk.image):
        said = "is what an image is called whose guest has moved away, and such images are removed"
        bad.append(("image", f"{said}: give it another name"))
    if disk.base and (said := _base(disk)):
        bad.append(("base", said))
    if not disk.size_bytes:
        return bad
    if disk.read_only:
        bad.append(("size_bytes", "must be left out of a read-only disk: its image must be there"))
    elif not MIN_DISK_BYTES <= disk.size_bytes <= MAX_DISK_BYTES:
        bad.append(("size_bytes", f"must be between 1 MiB and 64 TiB, not {disk.size_bytes} bytes"))
    elif disk.size_bytes % SECTOR_BYTES:
        bad.append(("size_bytes", f"must be a multiple of {SECTOR_BYTES} bytes, not {disk.size_bytes}"))
    return bad


def _base(disk: DiskSpec) -> str:
    """What is wrong with the image that a disk's own is to lie on; empty: nothing."""
    if wrong := file_error(disk.base, "the pool"):
        return wrong
    if MOVED_AWAY.fullmatch(disk.base):
        return "is what an image is called whose guest has moved away, and such images are removed"
    if disk.format is not DiskFormat.QCOW2:
        return "is only for an image of format qcow2: a raw one lies on nothing"
    return "must be left out of a read-only disk: its image says what it lies on" if disk.read_only else ""


def _nics(nics: Sequence[NicSpec]) -> list[Problem]:
    bad = _how_many("nics", len(nics), MAX_NICS)
    bad += _same_names("nics", "network card", (nic.name for nic in nics))
    macs: set[str] = set()
    for index, nic in enumerate(nics):
        where = f"nics[{index}]"
        if wrong := name_error(nic.name):
            bad.append((f"{where}.name", wrong))
        if wrong := name_error(nic.network):
            bad.append((f"{where}.network", f"names a network of the hosts' and {wrong}"))
        if nic.mac and (wrong := _mac(nic.mac)):
            bad.append((f"{where}.mac", wrong))
        elif nic.mac and nic.mac in macs:
            bad.append((f"{where}.mac", "another card of the guest has this address"))
        macs.add(nic.mac)
        if not 1 <= nic.queues <= MAX_QUEUES:
            bad.append((f"{where}.queues", f"must be between 1 and {MAX_QUEUES}, not {nic.queues}"))
        if nic.mtu and not MIN_MTU <= nic.mtu <= MAX_MTU:
            bad.append((f"{where}.mtu", f"must be between {MIN_MTU} and {MAX_MTU}, or left out, not {nic.mtu}"))
    return bad


def _mac(mac: str) -> str:
    if not _MAC.fullmatch(mac):
        return f"must be an address such as 52:54:00:12:34:56, in lower case, not {quoted(mac)}"
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        return f"must be the address of one card, not of a group or of none ({mac})"
    return ""


def _cloud_init(files: CloudInit) -> list[Problem]:
    bad: list[Problem] = []
    texts = {"user_data": files.user_data, "meta_data": files.meta_data, "network_config": files.network_config}
    if not files.user_data.strip():
        bad.append(("user_data", "must say something, such as a line #cloud-config"))
    size = sum(len(text.encode(errors="replace")) for text in texts.values())
    if size > MAX_CLOUD_INIT_BYTES:
        bad.append(("user_data", f"all files together have at most {MAX_CLOUD_INIT_BYTES} bytes, not {size}"))
    return bad + [(field, "must be text, without NUL") for field, text in texts.items() if "\0" in text]


def _extra_args(arguments: Sequence[str]) -> list[Problem]:
    bad = _how_many("extra_args", len(arguments), MAX_EXTRA_ARGS)
    for index, argument in enumerate(arguments):
        where = f"extra_args[{index}]"
        if wrong := extra_arg_error(argument):
            bad.append((where, wrong))
    return bad


def extra_arg_error(argument: str) -> str:
    """What is wrong with an additional option of the VMM; empty when nothing is. Whether it is allowed is another
    question."""
    words = argument.split(" ")
    if not argument.startswith("-") or len(words) > 2 or not all(words) or not argument.isprintable():
        return f"must be one option with at most one value, such as -device virtio-rng-pci, not {quoted(argument)}"
    if len(argument.encode(errors="replace")) > MAX_EXTRA_ARG_BYTES:
        return f"must have at most {MAX_EXTRA_ARG_BYTES} bytes"
    return ""


def _how_many(field: str, count: int, most: int) -> list[Problem]:
    return [(field, f"at most {most} per guest, not {count}")] if count > most else []


def _same_names(field: str, what: str, names: Iterable[str]) -> list[Problem]:
    seen: set[str] = set()
    bad: list[Problem] = []
    for index, name in enumerate(names):
        if name in seen:
            bad.append((f"{field}[{index}].name", f"there is another {what} {quoted(name)}: names must differ"))
        seen.add(name)
    return bad
