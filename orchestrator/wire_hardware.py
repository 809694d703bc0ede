"""Disks, network cards, devices and machines between protos and the core: what a guest has, what a host offers it."""

from __future__ import annotations

from typing import Any

from orchestrator.core.changes import MachineChange
from orchestrator.core.images import ImageImport
from orchestrator.core.records import (
    Boot,
    DeviceSpec,
    DiskCache,
    DiskFormat,
    DiskSpec,
    Firmware,
    HostSpace,
    LiveDevice,
    LiveMachine,
    Network,
    NetworkKind,
    NicSpec,
    Pool,
    PoolFence,
    PoolKind,
    ShimKind,
)
from orchestrator.wire_words import is_set, meant, unknown_word, wrong
from protos.drover.v1 import agent_pb2, orchestrator_pb2, types_pb2

_SHIM_KIND = {value: types_pb2.ShimKind.Value(f"SHIM_KIND_{value.name}") for value in ShimKind}
_FIRMWARE = {value: types_pb2.Firmware.Value(f"FIRMWARE_{value.name}") for value in Firmware}
_DISK_FORMAT = {value: types_pb2.DiskFormat.Value(f"DISK_FORMAT_{value.name}") for value in DiskFormat}
_DISK_CACHE = {value: types_pb2.DiskCache.Value(f"DISK_CACHE_{value.name}") for value in DiskCache}
_POOL_KIND = {value: types_pb2.PoolKind.Value(f"POOL_KIND_{value.name}") for value in PoolKind}
_POOL_FENCE = {value: types_pb2.PoolFence.Value(f"POOL_FENCE_{value.name}") for value in PoolFence}
_NETWORK_KIND = {value: types_pb2.NetworkKind.Value(f"NETWORK_KIND_{value.name}") for value in NetworkKind}
_SHIM_KIND_OF = {number: value for value, number in _SHIM_KIND.items()}
_DEVICE_SIZES = ("initial_bytes", "stop_copy_bytes", "dirty_bytes_per_s")


def device_to_proto(device: DeviceSpec) -> types_pb2.DeviceSpec:
    """The device with all its sizes set, in bytes."""
    return types_pb2.DeviceSpec(
        name=device.name,
        shim=_SHIM_KIND[device.shim],
        dma=device.dma,
        initial_bytes=device.initial_bytes,
        stop_copy_bytes=device.stop_copy_bytes,
        dirty_bytes_per_s=device.dirty_bytes_per_s,
        options=device.options,
        driver=device.driver,
    )


def device_from_proto(message: types_pb2.DeviceSpec, *, field: str = "device") -> DeviceSpec:
    """Sizes that are not set get their defaults. Raises INVALID_ARGUMENT for a kind of shim that this version does
    not know; `field` names the device in that error."""
    shim = _SHIM_KIND_OF.get(message.shim)
    if shim is None:
        raise unknown_word(f"{field}.shim", message.shim or "", ShimKind)
    given: dict[str, Any] = {name: getattr(message, name) for name in _DEVICE_SIZES if is_set(message, name)}
    if message.dma:
        given["dma"] = message.dma
    given |= {"options": dict(message.options), "driver": message.driver}
    return DeviceSpec(name=message.name, shim=shim, **given)


def disk_to_proto(disk: DiskSpec) -> types_pb2.DiskSpec:
    """One disk of a guest, its size in bytes."""
    return types_pb2.DiskSpec(
        name=disk.name,
        pool=disk.pool,
        image=disk.image,
        format=_DISK_FORMAT[disk.format],
        size_bytes=disk.size_bytes,
        cache=_DISK_CACHE[disk.cache],
        read_only=disk.read_only,
        boot=disk.boot,
        iothread=disk.iothread,
        base=disk.base,
        base_format=_DISK_FORMAT[disk.base_format],
    )


def disk_from_proto(message: types_pb2.DiskSpec, *, field: str = "disk") -> DiskSpec:
    """Raises INVALID_ARGUMENT for words that this version does not know; `field` names the disk in that error."""
    return DiskSpec(
        name=message.name,
        pool=message.pool,
        image=message.image,
        format=meant(_DISK_FORMAT, message.format, DiskFormat.QCOW2, f"{field}.format"),
        size_bytes=message.size_bytes,
        cache=meant(_DISK_CACHE, message.cache, DiskCache.NONE, f"{field}.cache"),
        read_only=message.read_only,
        boot=message.boot,
        iothread=message.iothread,
        base=message.base,
        base_format=meant(_DISK_FORMAT, message.base_format, DiskFormat.QCOW2, f"{field}.base_format"),
    )


def image_import_from_proto(
    name: str, pool: str, format: int, size_bytes: int, *, field: str = "format"
) -> ImageImport:
    """What is to be brought in; of a format that is not set it is qcow2. Raises INVALID_ARGUMENT for a format that this
    version does not know."""
    return ImageImport(name, pool, meant(_DISK_FORMAT, format, DiskFormat.QCOW2, field), size_bytes)


def image_import_to_proto(image: ImageImport, host: str) -> types_pb2.ImageImport:
    """What is to be brought in, and at which host."""
    return types_pb2.ImageImport(
        name=image.name, pool=image.pool, host=host, format=_DISK_FORMAT[image.format], size_bytes=image.size_bytes
    )


def disk_format_to_proto(format: DiskFormat) -> types_pb2.DiskFormat.ValueType:
    """How a disk's image is laid out."""
    return _DISK_FORMAT[format]


def nic_to_proto(nic: NicSpec) -> types_pb2.NicSpec:
    """One network card of a guest."""
    return types_pb2.NicSpec(name=nic.name, network=nic.network, mac=nic.mac, queues=nic.queues, mtu=nic.mtu)


def nic_from_proto(message: types_pb2.NicSpec) -> NicSpec:
    """A number of queues that is not set is 1."""
    return NicSpec(message.name, message.network, message.mac, message.queues or 1, message.mtu)


def boot_to_proto(boot: Boot) -> types_pb2.Boot:
    """What a guest boots."""
    firmware = _FIRMWARE[boot.firmware]
    return types_pb2.Boot(
        kernel=boot.kernel, initrd=boot.initrd, append=boot.append, firmware=firmware, nvram=boot.nvram
    )


def boot_from_proto(message: types_pb2.Boot, *, field: str = "boot") -> Boot:
    """Raises INVALID_ARGUMENT for a firmware that this version does not know."""
    firmware = meant(_FIRMWARE, message.firmware, Firmware.DIRECT, f"{field}.firmware")
    return Boot(message.kernel, message.initrd, message.append, firmware, message.nvram)


def machine_to_proto(machine: LiveMachine) -> agent_pb2.LiveMachine:
    """A guest's machine, for the agent of the host that it moves to."""
    return agent_pb2.LiveMachine(
        type=machine.type,
        cpu=machine.cpu,
        memory_mib=machine.memory_mib,
        vcpus=machine.vcpus,
        firmware=_FIRMWARE[machine.firmware],
        firmware_sha256=machine.firmware_sha256,
        devices=[
            agent_pb2.LiveDevice(
                id=device.id,
                driver=device.driver,
                bus=device.bus,
                address=device.address,
                properties=device.properties,
                backend=device.backend,
                memory_mib=device.memory_mib,
                leaving=device.leaving,
            )
            for device in machine.devices
        ],
        max_memory_mib=machine.max_memory_mib,
        max_vcpus=machine.max_vcpus,
        base_sha256=machine.base_sha256,
        serials=machine.serials,
        uuid=machine.uuid,
        cpu_definition=machine.cpu_definition,
    )


def machine_from_proto(message: agent_pb2.LiveMachine) -> LiveMachine:
    """Raises INVALID_ARGUMENT for a firmware that this version does not know: it could not build the machine."""
    return LiveMachine(
        message.type,
        message.cpu,
        message.memory_mib,
        message.vcpus,
        meant(_FIRMWARE, message.firmware, Firmware.DIRECT, "machine.firmware"),
        dict(message.firmware_sha256),
        tuple(map(_live_device, message.devices)),
        message.max_memory_mib,
        message.max_vcpus,
        dict(message.base_sha256),
        message.serials if message.HasField("serials") else 2,
        message.uuid,
        message.cpu_definition,
    )


def _live_device(each: agent_pb2.LiveDevice) -> LiveDevice:
    properties = dict(each.properties)
    return LiveDevice(
        each.id, each.driver, each.bus, each.address, properties, each.backend, each.memory_mib, each.leaving
    )


def machine_change_to_proto(uuid: str, change: MachineChange, reservations: int) -> agent_pb2.ChangeMachineRequest:
    """What the agent of a guest's host is to do. Raises INVALID_ARGUMENT when a number does not fit its field."""
    request = agent_pb2.ChangeMachineRequest(guest_uuid=uuid, reservations_version=reservations)
    try:
        if change.disk is not None:
            request.attach_disk.CopyFrom(disk_to_proto(change.disk))
        elif change.nic is not None:
            request.attach_nic.CopyFrom(nic_to_proto(change.nic))
        elif change.memory_mib:
            request.memory_mib = change.memory_mib
        elif change.vcpus:
            request.vcpus = change.vcpus
        elif change.detach_disk:
            request.detach_disk = change.detach_disk
        else:
            request.detach_nic = change.detach_nic
    except (ValueError, OverflowError) as error:
        raise wrong("change", f"a number is too large: {error}") from error
    return request


def machine_change_from_proto(message: agent_pb2.ChangeMachineRequest) -> MachineChange:
    """Raises INVALID_ARGUMENT for a change that this version does not know."""
    match message.WhichOneof("change"):
        case "attach_disk":
            return MachineChange(disk=disk_from_proto(message.attach_disk, field="disk"))
        case "attach_nic":
            return MachineChange(nic=nic_from_proto(message.attach_nic))
        case "memory_mib":
            return MachineChange(memory_mib=message.memory_mib)
        case "vcpus":
            return MachineChange(vcpus=message.vcpus)
        case "detach_disk":
            return MachineChange(detach_disk=message.detach_disk)
        case "detach_nic":
            return MachineChange(detach_nic=message.detach_nic)
        case _:
            raise wrong("change", "one of them must be set, and known to this version")


def attachment_from_proto(message: orchestrator_pb2.AttachToGuestRequest) -> MachineChange:
    """Raises INVALID_ARGUMENT when nothing is to be added, or what this version does not know."""
    match message.WhichOneof("what"):
        case "disk":
            return MachineChange(disk=disk_from_proto(message.disk, field="disk"))
        case "nic":
            return MachineChange(nic=nic_from_proto(message.nic))
        case "memory_mib" if message.memory_mib > 0:
            return MachineChange(memory_mib=message.memory_mib)
        case "vcpus" if message.vcpus > 0:
            return MachineChange(vcpus=message.vcpus)
        case _:
            raise wrong("what", "say a disk, a nic, memory_mib or vcpus, more than 0")


def detachment_from_proto(message: orchestrator_pb2.DetachFromGuestRequest) -> MachineChange:
    """Raises INVALID_ARGUMENT when nothing is named."""
    if not (message.disk or message.nic):
        raise wrong("what", "name a disk or a nic")
    return MachineChange(detach_disk=message.disk, detach_nic=message.nic)


def pool_to_proto(pool: Pool, space: HostSpace | None = None) -> types_pb2.Pool:
    """A pool of a host's. `space`: what moved since the host's record was written."""
    space = space or HostSpace()
    return types_pb2.Pool(
        name=pool.name,
        kind=_POOL_KIND[pool.kind],
        fence=_POOL_FENCE[pool.fence],
        accepts_no_locks=pool.accepts_no_locks,
        size_bytes=pool.size_bytes,
        free_bytes=space.free_bytes.get(pool.name, pool.free_bytes),
        bases=space.bases.get(pool.name, {}),
    )


def network_to_proto(network: Network) -> types_pb2.Network:
    """A network of a host's."""
    return types_pb2.Network(name=network.name, kind=_NETWORK_KIND[network.kind], mtu=network.mtu)
