"""PURE. QEMU's arguments for a guest's machine: the list of its live devices, and what stands behind them on this host.

The two ends of a migration differ in what stands behind a device (a path, a tap) and in nothing else: `-device`, `-M`,
`-cpu` follow from the list alone, and `devices_of` reads them back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from agents.engine.base import DiskFile, EngineError, VmmSpec
from orchestrator.core.hardware import MODULES, extra_arg_error
from orchestrator.core.records import DiskCache, DiskFormat, Firmware, LiveDevice, LiveMachine, NicSpec, PoolKind

Json = dict[str, object]

_SEED = "seed"


def machine_arguments(spec: VmmSpec, machine: LiveMachine) -> list[str]:
    """Machine type, CPU, memory and firmware."""
    options = [machine.type]
    blockdevs: list[Json] = []
    firmware = spec.firmware
    if machine.firmware is Firmware.UEFI:
        if firmware.uefi_code is None or firmware.nvram is None:
            raise EngineError(f"guest {spec.spec.name} is started by UEFI, and this host has none")
        blockdevs += _raw("firmware-code", _file("firmware-code", firmware.uefi_code, read_only=True))
        blockdevs += _raw("firmware-vars", _file("firmware-vars", firmware.nvram))
        options += ["pflash0=firmware-code", "pflash1=firmware-vars"]
    arguments = [word for each in blockdevs for word in ("-blockdev", _json(each))]
    if machine.firmware is Firmware.BIOS and firmware.bios is not None:
        arguments += ["-bios", str(firmware.bios)]
    arguments += ["-M", ",".join(options), "-cpu", f"{machine.cpu},enforce"]
    if machine.uuid:
        arguments += ["-uuid", machine.uuid]
    return [*arguments, "-m", _memory(machine), "-smp", _vcpus(machine)]


def _memory(machine: LiveMachine) -> str:
    if not machine.max_memory_mib:
        return str(machine.memory_mib)
    return f"size={machine.memory_mib}M,slots={MODULES},maxmem={machine.max_memory_mib}M"


def _vcpus(machine: LiveMachine) -> str:
    """A socket for each, where there are to be more: any other layout would leave QEMU the choice of a place."""
    if not machine.max_vcpus:
        return str(machine.vcpus)
    most = machine.max_vcpus
    return f"cpus={machine.vcpus},maxcpus={most},sockets={most},cores=1,threads=1"


def backend_arguments(spec: VmmSpec) -> list[str]:
    """What stands behind the devices: block nodes, taps, the TPM's socket."""
    nodes: list[Json] = [node for disk in spec.disks for node in disk_nodes(disk)]
    if spec.seed_path is not None:
        nodes += _raw(_SEED, _file(_SEED, spec.seed_path, read_only=True), read_only=True)
    arguments = [word for thread in _threads(spec) for word in ("-object", f"iothread,id={escaped(thread)}")]
    arguments += [word for node in nodes for word in ("-blockdev", _json(node))]
    taps = {tap.nic: tap.ifname for tap in spec.taps}
    for nic in spec.spec.nics:
        arguments += ["-netdev", _netdev(nic, taps.get(nic.name, ""))]
    for device in spec.machine.devices if spec.machine is not None else ():
        if device.memory_mib:
            arguments += ["-object", f"memory-backend-ram,id={memory_of(device)},size={device.memory_mib}M"]
    if spec.tpm_path is not None:
        socket = escaped(spec.tpm_path)
        arguments += [
            "-chardev",
            f"socket,id=tpm-socket,path={socket}",
            "-tpmdev",
            "emulator,id=tpm,chardev=tpm-socket",
        ]
    return arguments


def device_arguments(machine: LiveMachine) -> list[str]:
    """One `-device` for each live device, in their order."""
    return [word for device in machine.devices for word in ("-device", device_argument(device))]


def device_argument(device: LiveDevice) -> str:
    """What `-device` is told."""
    driver, *options = options_of(device).items()
    return ",".join([driver[1], *(f"{name}={escaped(value)}" for name, value in options)])


def options_of(device: LiveDevice) -> dict[str, str]:
    """What `-device` and `device_add` are told, by name; the driver first."""
    options = {"driver": device.driver, "id": device.id}
    if device.bus:
        options["bus"] = device.bus
    if device.address:
        options["addr"] = device.address
    options |= _backend(device.backend)
    return options | dict(sorted(device.properties.items()))


def devices_of(arguments: Sequence[str]) -> tuple[LiveDevice, ...]:
    """The live devices that a command line says, the other way round."""
    return tuple(_device(value) for option, value in pairwise(arguments) if option == "-device")


def strangers(machine: LiveMachine, found: Mapping[str, str]) -> list[str]:
    """What differs between the machine and the devices that its VMM has (id -> driver), one clause each.

    A device that somebody added or took away behind Drover's back would be missing, or too much, at the destination.
    """
    known = {device.id: device.driver for device in machine.devices}
    more = [f"device {name} ({found[name]}) is no part of its machine" for name in found if name not in known]
    less = [f"device {name} ({known[name]}) is no longer there" for name in known if name not in found]
    other = [
        f"device {name} is a {found[name]}, not a {known[name]}"
        for name in known
        if name in found and found[name] != known[name]
    ]
    return more + less + other


def disk_nodes(disk: DiskFile) -> list[Json]:
    """The block nodes of a disk, from the image's file up to what the guest's device writes to (`disk.node`)."""
    direct = disk.cache is DiskCache.NONE
    file = _file(disk.node, disk.path, read_only=disk.read_only, block=disk.kind is PoolKind.BLOCK)
    file |= {"cache": {"direct": direct, "no-flush": False}, "discard": "unmap"}
    # Where other hosts see the image, its locks are the second defence: no start where the file system has none.
    file["locking"] = "on" if disk.kind is PoolKind.SHARED_FILE and disk.locks else "auto"
    top: Json = {
        "driver": "raw" if disk.format is DiskFormat.RAW else "qcow2",
        "node-name": disk.node,
        "file": file["node-name"],
        "read-only": disk.read_only,
        "discard": "unmap",
        "cache": {"direct": direct, "no-flush": False},
    }
    if disk.base is None:
        return [file, top]
    # The base is opened to read only, whatever lies on it: no guest, and nobody who copies one, writes to it.
    base = _file(f"{disk.node}-base", disk.base, read_only=True)
    base |= {"cache": top["cache"], "locking": file["locking"]}
    below: Json = {
        "driver": disk.base_format.value,
        "node-name": f"{disk.node}-base",
        "file": base["node-name"],
        "read-only": True,
        "cache": top["cache"],
    }
    return [base, below, file, {**top, "backing": below["node-name"]}]


def extra_arguments(spec: VmmSpec) -> list[str]:
    """The guest's own options. Raises EngineError for one that no configuration can have allowed."""
    for argument in spec.spec.extra_args:
        if wrong := extra_arg_error(argument):
            raise EngineError(f"an option of guest {spec.spec.name} {wrong}")
    return [word for argument in spec.spec.extra_args for word in argument.split(" ")]


def _file(node: str, path: Path, *, read_only: bool = False, block: bool = False) -> Json:
    return {
        "driver": "host_device" if block else "file",
        "node-name": f"{node}-file",
        "filename": str(path),
        "read-only": read_only,
        "auto-read-only": False,
    }


def _threads(spec: VmmSpec) -> list[str]:
    """Those that devices of the machine name."""
    devices = spec.machine.devices if spec.machine is not None else ()
    return [device.properties["iothread"] for device in devices if "iothread" in device.properties]


def _raw(node: str, file: Json, *, read_only: bool | None = None) -> list[Json]:
    only = file["read-only"] if read_only is None else read_only
    return [file, {"driver": "raw", "node-name": node, "file": file["node-name"], "read-only": only}]


def _netdev(nic: NicSpec, ifname: str) -> str:
    """Without a tap the card is there and leads nowhere."""
    if not ifname:
        return f"hubport,id=nic-{nic.name},hubid=0"
    queues = f",queues={nic.queues}" if nic.queues > 1 else ""
    return f"tap,id=nic-{nic.name},ifname={escaped(ifname)},script=no,downscript=no{queues}"


_BACKENDS = {"disk": "drive", "nic": "netdev", "memory": "memdev", _SEED: "drive", "tpm": "tpmdev"}
_BEHIND = {"drive", "netdev", "memdev", "tpmdev"}


def memory_of(device: LiveDevice) -> str:
    """QEMU's name for the memory behind a module."""
    return _backend(device.backend)["memdev"]


def _backend(backend: str) -> dict[str, str]:
    """The property by which a device is joined to what stands behind it."""
    if not backend:
        return {}
    kind, _, name = backend.partition(":")
    return {_BACKENDS[kind]: f"{kind}-{name}" if name else kind}


def _behind(options: Mapping[str, str]) -> str:
    for key in _BEHIND & set(options):
        kind, _, name = options[key].partition("-")
        return f"{kind}:{name}" if name else kind
    return ""


def _device(argument: str) -> LiveDevice:
    driver, *words = _split(argument)
    options = dict(word.split("=", 1) for word in words)
    known = {"id", "bus", "addr", *_BEHIND}
    properties = {name: value for name, value in options.items() if name not in known}
    bus, address = options.get("bus", ""), options.get("addr", "")
    return LiveDevice(options["id"], driver, bus, address, properties, _behind(options))


def _split(argument: str) -> list[str]:
    """At single commas; two stand for one that is meant."""
    return [word.replace("\0", ",") for word in argument.replace(",,", "\0").split(",")]


def escaped(value: object) -> str:
    """As a part of an option of QEMU's, where a comma would end it."""
    return str(value).replace(",", ",,")


def _json(node: Json) -> str:
    return json.dumps(node, separators=(",", ":"))
