"""PURE. What a guest's hardware asks of a host, what a host offers, and what stands between the two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from orchestrator.core.errors import RefusalReason
from orchestrator.core.hardware import can_grow, has_hardware, takes_state
from orchestrator.core.records import (
    DiskCache,
    Firmware,
    GuestSpec,
    HostFeature,
    HostRecord,
    HostSpace,
    Network,
    Pool,
    PoolFence,
    PoolKind,
)
from orchestrator.core.text import handful, quoted


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """What one disk asks of a host. In the form in which placements compare guests."""

    pool: str
    size_bytes: int
    writable: bool
    cached: bool
    base: str = ""
    """The image that its own lies on."""
    iothread: bool = False


@dataclass(frozen=True, slots=True)
class HardwareNeed:
    """What a guest's hardware asks of a host, the same for guests that ask for the same."""

    any: bool = False
    """It asks for anything at all."""
    disks: tuple[DiskNeed, ...] = ()
    networks: tuple[tuple[str, int], ...] = ()
    """Name, and the MTU that a card tells the guest."""
    cpu: str = ""
    firmware: Firmware = Firmware.DIRECT
    tpm: bool = False
    extra_args: tuple[str, ...] = ()
    room: bool = False
    """For more memory or vCPUs while it runs."""
    threads: bool = False
    """A disk has a thread of its own."""
    screen: bool = False
    taken: bool = False
    """It begins with something that it had elsewhere."""


NONE = HardwareNeed()


def hardware_need(spec: GuestSpec) -> HardwareNeed:
    """Of a guest with this specification."""
    disks = (
        DiskNeed(
            disk.pool, disk.size_bytes, not disk.read_only, disk.cache is not DiskCache.NONE, disk.base, disk.iothread
        )
        for disk in spec.disks
    )
    return HardwareNeed(
        has_hardware(spec),
        tuple(sorted(disks, key=str)),
        tuple(sorted({(nic.network, nic.mtu) for nic in spec.nics})),
        spec.cpu.model,
        spec.boot.firmware,
        spec.tpm is not None,
        spec.extra_args,
        can_grow(spec),
        any(disk.iothread for disk in spec.disks),
        spec.display.vnc,
        takes_state(spec),
    )


def more_than(need: HardwareNeed, before: HardwareNeed) -> HardwareNeed:
    """What of a guest's disks is not in its host's pools yet."""
    return replace(need, disks=tuple(disk for disk in need.disks if disk not in before.disks))


@dataclass(frozen=True, slots=True)
class Offer:
    """What a host gives to guests' hardware."""

    name: str
    pools: Mapping[str, Pool] = field(default_factory=dict[str, Pool])
    networks: Mapping[str, Network] = field(default_factory=dict[str, Network])
    cpu_models: frozenset[str] = frozenset()
    cpu_definitions: Mapping[str, str] = field(default_factory=dict[str, str])
    firmware: Mapping[str, str] = field(default_factory=dict[str, str])
    extra_args: frozenset[str] = frozenset()
    features: frozenset[str] = frozenset()
    free_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    """Of its pools, less what is promised to migrations on their way there."""
    bases: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    """Pool -> the images that others may lie on -> SHA-256."""


NOTHING = Offer("")


def offer_of(record: HostRecord, space: HostSpace | None, promised: Iterable[Mapping[str, int]]) -> Offer:
    """`promised`: bytes by pool, of each migration on its way there."""
    free = {pool.name: pool.free_bytes for pool in record.pools}
    free |= {name: size for name, size in (space.free_bytes if space else {}).items() if name in free}
    for pools in promised:
        for name, size in pools.items():
            free[name] = free.get(name, 0) - size
    return Offer(
        record.name,
        {pool.name: pool for pool in record.pools},
        {network.name: network for network in record.networks},
        frozenset(record.cpu_models),
        record.cpu_definitions,
        record.firmware,
        frozenset(record.extra_args),
        frozenset(record.features),
        free,
        space.bases if space else {},
    )


def local_bytes(need: HardwareNeed, offer: Offer) -> dict[str, int]:
    """What a guest's disks take of the host's local pools, by pool. A disk without a size counts for nothing: only its
    image says how large it is."""
    taken: dict[str, int] = {}
    for disk in need.disks:
        pool = offer.pools.get(disk.pool)
        if pool is not None and pool.kind is PoolKind.LOCAL and disk.size_bytes:
            taken[disk.pool] = taken.get(disk.pool, 0) + disk.size_bytes
    return taken


def local_disks(spec: GuestSpec, record: HostRecord) -> list[str]:
    """Names of the guest's disks that it can write to and whose pool is the host's own, as "disk root"."""
    local = {pool.name for pool in record.pools if pool.kind is PoolKind.LOCAL}
    return [f"disk {disk.name}" for disk in spec.disks if disk.pool in local and not disk.read_only]


def for_another_life(spec: GuestSpec) -> GuestSpec:
    """The specification of a guest that is started again elsewhere: its images must be there, and none is made in the
    place of one that is not. The process that it once was adopted from is not its own, and the variables that it once
    began with were copied where it was first started."""
    disks = tuple(replace(disk, size_bytes=0) for disk in spec.disks)
    return replace(spec, adopted=None, disks=disks, boot=replace(spec.boot, nvram=""))


Obstacle = tuple[RefusalReason, str]
"""Why a host cannot take a guest, and a sentence."""

UNNAMED_CPUS = frozenset({"host", "max", "base"})
"""Models that are another CPU on each host."""


def lasting_obstacle(need: HardwareNeed, guest: str, offer: Offer, source: Offer | None) -> Obstacle | None:
    """What a host lacks for a guest's hardware, other than room; None: nothing. `source`: where it runs now, if it
    does."""
    if not need.any:
        return None
    if HostFeature.HARDWARE not in offer.features:
        said = f"{offer.name}'s agent is of a version that knows no disks, network cards or firmware: upgrade it"
        return RefusalReason.FEATURE_NOT_AVAILABLE, said
    if need.threads and HostFeature.DISK_THREADS not in offer.features:
        said = f"{offer.name}'s agent is of a version that knows no disks with a thread of their own: upgrade it"
        return RefusalReason.FEATURE_NOT_AVAILABLE, said
    found = [_pool_obstacle(disk, guest, offer, source) for disk in need.disks]
    found += [_base_obstacle(disk, guest, offer, source) for disk in need.disks if disk.base]
    found += [_network_obstacle(name, mtu, guest, offer, source) for name, mtu in need.networks]
    found += [_cpu_obstacle(need.cpu, guest, offer, source), _firmware_obstacle(need.firmware, guest, offer, source)]
    if need.tpm and HostFeature.TPM not in offer.features:
        found.append((RefusalReason.TPM_NOT_AVAILABLE, f"{offer.name} has no program that emulates a TPM (swtpm)"))
    if need.room and HostFeature.HOTPLUG not in offer.features:
        said = f"{offer.name}'s agent is of a version that builds no machine with room for more: upgrade it"
        found.append((RefusalReason.FEATURE_NOT_AVAILABLE, said))
    if need.screen and HostFeature.SCREENS not in offer.features:
        said = f"{offer.name}'s agent is of a version that gives guests no screen: upgrade it"
        found.append((RefusalReason.FEATURE_NOT_AVAILABLE, said))
    if need.taken and HostFeature.TAKEN_STATE not in offer.features:
        said = f"{offer.name}'s agent is of a version that takes over no uuid, UEFI variables or TPM state: upgrade it"
        found.append((RefusalReason.FEATURE_NOT_AVAILABLE, said))
    for argument in need.extra_args:
        if argument not in offer.extra_args:
            said = f"{offer.name} does not allow {quoted(argument)} (extra_args_allowed)"
            found.append((RefusalReason.EXTRA_ARGS_NOT_ALLOWED, said))
    return next((each for each in found if each is not None), None)


def passing_obstacle(need: HardwareNeed, guest: str, offer: Offer) -> Obstacle | None:
    """Room in local pools, which may come; None: there is enough."""
    for pool, size in local_bytes(need, offer).items():
        free = max(0, offer.free_bytes.get(pool, 0))
        if size > free:
            said = f"pool {pool} of {offer.name} has {free >> 20} MiB free, the disks of {guest} need {size >> 20} MiB"
            return RefusalReason.POOL_FULL, said
    return None


def _pool_obstacle(disk: DiskNeed, guest: str, offer: Offer, source: Offer | None) -> Obstacle | None:
    pool = offer.pools.get(disk.pool)
    if pool is None:
        return RefusalReason.POOL_NOT_FOUND, f"{offer.name} has no pool {disk.pool}, which a disk of {guest} is in"
    there = source.pools.get(disk.pool) if source is not None else None
    if source is not None and there is not None and there.kind is not pool.kind:
        said = f"pool {disk.pool} is {pool.kind.value} on {offer.name} and {there.kind.value} on {source.name}"
        return RefusalReason.POOL_NOT_FOUND, said
    unfenced = pool.kind is PoolKind.BLOCK and pool.fence is PoolFence.NONE and not pool.accepts_no_locks
    if unfenced and disk.writable:
        said = f"nothing keeps a second host from writing to volumes of pool {disk.pool} of {offer.name} (fence, locks)"
        return RefusalReason.POOL_NOT_FENCED, said
    if disk.cached and disk.writable and pool.kind is not PoolKind.LOCAL:
        said = f"a disk of {guest} in the shared pool {disk.pool} of {offer.name} has a cache, and must have none"
        return RefusalReason.DISK_NOT_MIGRATABLE, said
    if source is not None and pool.kind is PoolKind.LOCAL and disk.writable and not disk.size_bytes:
        said = f"a disk of {guest} in the local pool {disk.pool} has no size: nobody can make its image on {offer.name}"
        return RefusalReason.DISK_NOT_MIGRATABLE, said
    if source is not None and pool.kind is PoolKind.LOCAL and disk.writable and disk.iothread:
        return RefusalReason.DISK_NOT_MIGRATABLE, thread_in_the_way(guest, disk.pool)
    return None


def thread_in_the_way(guest: str, pool: str) -> str:
    """Why a disk in a local pool that has a thread of its own does not move: a QEMU that loses the target of a mirror
    while it stops such a guest ends with a failed assertion (job_set_aio_context), and the guest with it."""
    said = f"a disk of {guest} in the local pool {pool} has a thread of its own (iothread)"
    return f"{said}: QEMU would abort, and the guest with it, if the destination were lost as the guest is stopped"


def _base_obstacle(disk: DiskNeed, guest: str, offer: Offer, source: Offer | None) -> Obstacle | None:
    here = offer.bases.get(disk.pool, {}).get(disk.base, "")
    if not here:
        said = f"pool {disk.pool} of {offer.name} has no base {disk.base}, which a disk of {guest} lies on"
        hint = "put it there and name it in the pool's `bases`; if that is done, its content is still being read"
        return RefusalReason.BASE_NOT_AVAILABLE, f"{said}: {hint}"
    there = source.bases.get(disk.pool, {}).get(disk.base, "") if source is not None else ""
    if source is not None and there and here != there:
        where = f"on {offer.name} ({here[:12]}) than on {source.name} ({there[:12]})"
        said = f"base {disk.base} in pool {disk.pool} has another content {where}: a disk of {guest} lies on it"
        return RefusalReason.BASE_NOT_AVAILABLE, said
    return None


def _network_obstacle(name: str, mtu: int, guest: str, offer: Offer, source: Offer | None) -> Obstacle | None:
    network = offer.networks.get(name)
    if network is None:
        said = f"{offer.name} has no network {name}, which a card of {guest} is in"
        return RefusalReason.NETWORK_NOT_FOUND, said
    there = source.networks.get(name) if source is not None else None
    if source is not None and there is not None and there.mtu != network.mtu:
        said = f"network {name} has an MTU of {network.mtu} on {offer.name} and of {there.mtu} on {source.name}"
        return RefusalReason.NETWORK_NOT_FOUND, said
    if mtu > network.mtu:
        said = f"network {name} of {offer.name} has an MTU of {network.mtu}, a card of {guest} is to have {mtu}"
        return RefusalReason.NETWORK_NOT_FOUND, said
    return None


def _cpu_obstacle(model: str, guest: str, offer: Offer, source: Offer | None) -> Obstacle | None:
    if model in UNNAMED_CPUS and source is not None:
        here, there = offer.cpu_definitions.get(model, ""), source.cpu_definitions.get(model, "")
        if said := cpu_difference(here, there):
            told = f"{guest} sees the CPU {model} of {source.name}, and that of {offer.name} is another one"
            return RefusalReason.CPU_NOT_AVAILABLE, f"{told} ({said}): start it anew with a named model"
        return None
    known = model in offer.cpu_models or model in offer.cpu_definitions
    if model and offer.cpu_models and not known:
        said = f"{offer.name} cannot give all of the CPU model {model}, which {guest} is to see"
        return RefusalReason.CPU_NOT_AVAILABLE, said
    return None


def cpu_difference(here: str, there: str) -> str:
    """What of a CPU (`cpu_definition`) is another one at a destination than at the source, as a clause; empty: nothing,
    and both say what it is."""
    if not here or not there:
        return "what it is there is not known" if there else "what it is at its own host is not known"
    one, other = set(here.split()), set(there.split())
    more, less = sorted(one - other), sorted(other - one)
    said = [f"more: {handful(more, ', ')}"] if more else []
    return "; ".join([*said, *([f"less: {handful(less, ', ')}"] if less else [])])


_ROLES = {Firmware.UEFI: "uefi_code", Firmware.BIOS: "bios"}


def _firmware_obstacle(firmware: Firmware, guest: str, offer: Offer, source: Offer | None) -> Obstacle | None:
    role = _ROLES.get(firmware, "")
    here, there = offer.firmware.get(role, ""), source.firmware.get(role, "") if source is not None else ""
    if firmware is Firmware.UEFI and not here:
        return RefusalReason.FIRMWARE_NOT_AVAILABLE, f"{offer.name} has no UEFI firmware, which {guest} is started by"
    if role and source is not None and here != there:
        said = f"the {firmware.value} firmware of {offer.name} is another build than that of {source.name}"
        return RefusalReason.FIRMWARE_NOT_AVAILABLE, f"{said}: install the same on both"
    return None
