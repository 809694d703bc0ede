"""What is looked at before an attempt begins: everything that could only fail later, or be lost without a word.

Refusals are typed and leave all as it was. What an outgoing migration is told of the link follows from the same facts.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

from agents.config import AgentConfig
from agents.engine.base import EngineError, HoldStart, MigrationEngine, OutgoingOptions, RunState
from agents.engine.qemu.hold import choose_hold
from agents.guest import hardware
from agents.guest.copies import Copy
from agents.guest.files import GuestFiles
from agents.host import pools
from orchestrator.core.agent import ConductOrder
from orchestrator.core.compatibility import ack_mode, not_by, other_engine
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import AbortReason, DroverError, RefusalReason
from orchestrator.core.hardware import beyond_libvirt, disk_pools, disks_beyond_libvirt, has_hardware
from orchestrator.core.ids import HostRef
from orchestrator.core.migration import Prepared
from orchestrator.core.obstacles import MAX_OBSTACLES
from orchestrator.core.offers import Obstacle, thread_in_the_way
from orchestrator.core.records import HostRecord

ROOM_BYTES, ROOM_FILES = 512 << 10, 32
"""In each of the agent's directories, for one more copy: notes, sockets, the logs of VMM and devices, a marker."""
HARDWARE_BYTES = 8 << 20
"""More, for a guest with hardware: UEFI variables, a TPM's state, a cloud-init disk."""


async def probed(engine: MigrationEngine, host: str) -> dict[str, str]:
    """What the host's VMM can do. Raises INTERNAL when it does not even start."""
    try:
        return await engine.probe()
    except EngineError as error:
        raise DroverError(RefusalReason.INTERNAL, f"{host}: {error}") from error


async def must_fit(engine: MigrationEngine, config: AgentConfig, files: GuestFiles) -> None:
    """Where a guest is to be. Raises DEVICE_NOT_MIGRATABLE, MACHINE_TYPE_MISMATCH, and what `hardware` does."""
    for device in files.spec.devices:
        if device.shim in ("companion", "external") and device.dma != "none":
            said = f"device {device.name} writes guest memory (dma: {device.dma}), which QEMU cannot be told of"
            raise DroverError(RefusalReason.DEVICE_NOT_MIGRATABLE, said)
    can = await probed(engine, config.host)
    if files.spec.machine not in can["machine_types"].split(","):
        raise DroverError(
            RefusalReason.MACHINE_TYPE_MISMATCH, f"{config.host} has no machine type {files.spec.machine}"
        )
    await must_suit(engine, config, files)
    if files.in_vmm and not (config.vfio_preload and can["devices_inside"]):
        inside = f"the devices that guest {files.spec.name} has inside its VMM"
        raise DroverError(
            RefusalReason.DEVICE_NOT_MIGRATABLE, f"{config.host} cannot give QEMU {can['version']} {inside}"
        )


async def must_suit(engine: MigrationEngine, config: AgentConfig, files: GuestFiles) -> None:
    """Where a guest is to be born: this host has what its hardware asks for. Raises what `hardware` does."""
    kinds = {name: pool.kind for name, pool in config.pools.items()}
    beyond = beyond_libvirt(files.spec) + disks_beyond_libvirt(disk_pools(files.spec), kinds)
    if said := not_by(config.engine, files.spec.name, beyond):
        raise DroverError(RefusalReason.FEATURE_NOT_AVAILABLE, f"{config.host}: {said}")
    if not has_hardware(files.spec):
        return
    can = await probed(engine, config.host)
    models = tuple(filter(None, can.get("cpu_models", "").split(",")))
    models += tuple(pools.cpu_definitions(can)) if models else ()
    await asyncio.to_thread(hardware.must_be_possible, config, files.spec, models)


def must_have_room(files: GuestFiles) -> None:
    """For the files of one more copy, in both directories. Raises HOST_DISK_FULL.

    From there on the copy needs no more: what it writes when it becomes the guest is reserved (`copies.prepare`).
    """
    config, wanted_bytes = files.config, ROOM_BYTES + (HARDWARE_BYTES if has_hardware(files.spec) else 0)
    for directory in (config.dir / "guests", config.volatile_dir):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            found = os.statvfs(directory)
        except OSError as error:
            raise DroverError(RefusalReason.HOST_DISK_FULL, f"{config.host}: {error}") from error
        # A file system that counts no blocks or no files (0 of 0) has no such bound.
        free = found.f_bavail * found.f_frsize if found.f_blocks else wanted_bytes
        files_free = found.f_favail if found.f_files else ROOM_FILES
        if free < wanted_bytes or files_free < ROOM_FILES:
            said = f"{config.host} has {free >> 10} KiB and room for {files_free} files left in {directory}"
            wanted = f"a guest needs {wanted_bytes >> 10} KiB and {ROOM_FILES} files: make room, or choose another host"
            raise DroverError(RefusalReason.HOST_DISK_FULL, f"{said}; {wanted}")


def must_be_of_one_engine(files: GuestFiles, source: HostRecord | None) -> None:
    """At the destination: two engines do not speak to each other. Raises MACHINE_TYPE_MISMATCH."""
    config = files.config
    if source is not None and (said := other_engine(source.engine, config.engine)):
        raise DroverError(RefusalReason.MACHINE_TYPE_MISMATCH, f"{config.host}: guest {files.spec.name}: {said}")


def must_have_networks(files: GuestFiles, source: HostRecord | None) -> None:
    """At the destination: a frame that the guest could send at its source must fit here, or connections hang after the
    move without a word. Raises NETWORK_NOT_FOUND."""
    config = files.config
    there = {network.name: network.mtu for network in source.networks} if source is not None else {}
    for nic in files.spec.nics:
        here = config.networks.get(nic.network)
        said = f"{config.host}: network card {nic.name} of guest {files.spec.name} is in the network {nic.network}"
        if here is None:
            raise DroverError(RefusalReason.NETWORK_NOT_FOUND, f"{said}, which this host does not have")
        if there.get(nic.network, here.mtu) != here.mtu:
            mtus = f"with an MTU of {here.mtu} here and {there[nic.network]} at its source"
            raise DroverError(RefusalReason.NETWORK_NOT_FOUND, f"{said}, {mtus}: they must be equal")


def no_room(error: Exception, host: str, directory: Path) -> DroverError | None:
    """The refusal for a start that failed because the disk was full after all; None for any other failure."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return DroverError(RefusalReason.HOST_DISK_FULL, f"{host} has no room left in {directory}: {error}")
        cause = cause.__cause__
    return None


async def obstacles(own: Copy | None) -> tuple[Obstacle, ...]:
    """What only the guest's host knows against moving it, before anybody asks for an attempt; changes nothing."""
    if own is None:
        return ((RefusalReason.GUEST_NOT_RUNNING, "no copy of it runs on its host"),)
    try:
        state = await own.vmm.state()
        found = await own.vmm.unmigratable()
    except EngineError as error:
        return ((RefusalReason.OUTCOME_UNKNOWN, f"its VMM does not say: {error}"),)
    if state.run_state is RunState.ENDED:
        return ((RefusalReason.GUEST_NOT_RUNNING, "it has shut down"),)
    if own.hardware is not None and own.hardware.machine is None:
        said = "the note of its machine is lost: the other end could not be built"
        found += ((RefusalReason.MACHINE_TYPE_MISMATCH, said),)
    return (found + _threads(own))[:MAX_OBSTACLES]


def _threads(own: Copy) -> tuple[Obstacle, ...]:
    """Local disks that cannot be mirrored without a danger for the guest."""
    spec = own.files.spec
    pools = {disk.name: disk.pool for disk in spec.disks}
    return tuple(
        (RefusalReason.DISK_NOT_MIGRATABLE, thread_in_the_way(spec.name, pools.get(disk.name, "")))
        for disk in own.local_disks
        if disk.iothread
    )


async def must_be_movable(engine: MigrationEngine, host: str, name: str, own: Copy, prepared: Prepared) -> None:
    """At the source, about the VMM that runs. Raises DEVICE_NOT_MIGRATABLE and MACHINE_TYPE_MISMATCH, and
    OUTCOME_UNKNOWN when the VMM does not answer."""
    try:
        obstacles = await own.vmm.unmigratable() + _threads(own)
    except EngineError as error:
        raise DroverError(RefusalReason.OUTCOME_UNKNOWN, f"guest {name}: {error}") from error
    if obstacles:
        said = "; ".join(sentence for _, sentence in obstacles)
        raise DroverError(obstacles[0][0], f"guest {name}: {said}")
    machine = own.vmm.metadata.machine
    _must_agree(name, "machine type", machine, prepared.machine)
    if own.in_vmm() is not None:  # nobody else's ACKs pass through QEMU
        mine = ack_mode((await probed(engine, host))["switchover_ack"], machine)
        _must_agree(name, "switchover-ack mode", mine, ack_mode(prepared.switchover_ack, prepared.machine))


def _must_agree(name: str, what: str, here: str, there: str) -> None:
    """What one of the two does not say is no reason to refuse."""
    if here and there and here != there:
        said = f"guest {name}: {what} differs: {here} here, {there} at the destination"
        raise DroverError(RefusalReason.MACHINE_TYPE_MISMATCH, said)


def must_be_registered(
    host: HostRef, record: HostRecord | None, peer: Endpoint, stream: Endpoint | None = None
) -> None:
    """What an order says of another host must be what that host has registered, or guests' memory goes to whoever
    wrote the order. Raises WRONG_ENDPOINT, and STALE_ATTEMPT when the host has lost power since."""
    if record is None:
        raise DroverError(RefusalReason.WRONG_ENDPOINT, f"{host.host} is not registered")
    if record.boot_id != host.boot_id:
        raise DroverError(RefusalReason.STALE_ATTEMPT, f"{host.host} lost power after it was chosen")
    try:
        registered = Endpoint.parse(record.peer_address)
    except ValueError as error:
        raise DroverError(RefusalReason.WRONG_ENDPOINT, f"{host.host} has registered no address: {error}") from error
    if peer != registered:
        said = f"{peer} is not the PeerService of {host.host}, which has registered {registered}"
        raise DroverError(RefusalReason.WRONG_ENDPOINT, said)
    if stream is not None and stream.ip != registered.ip:
        said = f"{stream} is not an address of {host.host}, which has registered {registered.ip}"
        raise DroverError(RefusalReason.WRONG_ENDPOINT, said)


def outgoing(
    order: ConductOrder, config: AgentConfig, files: GuestFiles, sharing: Callable[[], int], *, paused: bool
) -> OutgoingOptions:
    """`paused`: no gate is held for a guest that stands still. `sharing`: how many attempts share the link just now."""
    spec, policy = files.spec, order.policy
    link = min(config.bandwidth_mbps, policy.max_bandwidth_mbps or config.bandwidth_mbps) * 125_000
    hold, tail = HoldStart.OPEN, 0
    if files.outside and not paused:
        initial = sum(device.initial_bytes for device in files.outside)
        previous = AbortReason(order.previous_reason) if order.previous_reason else None
        hold, tail = choose_hold(spec.memory_mib << 20, initial, link, previous)
    # QEMU does not know of the devices' last bytes: they come out of the same budget.
    beside_ms = sum(device.stop_copy_bytes for device in files.outside) * 1000 // link
    return OutgoingOptions(
        stream=order.prepared.stream,
        hold=hold,
        tail_bytes=tail,
        link_bytes_per_s=link,
        downtime_limit_ms=max(1, policy.downtime_limit_ms - beside_ms),
        multifd_channels=policy.multifd_channels,
        auto_converge=policy.auto_converge,
        sharing=sharing,
        copy=order.prepared.inc,
    )
