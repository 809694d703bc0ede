"""PURE. What the lab's guests are told to do: `workload` and `linux` of a guest file, as a kernel's command line.

The small image is in deploy/lab/guest_image, the Linux guest in deploy/lab/linux_guest; their READMEs have every word
of their command lines. To the product a guest's command line is text like any other (`boot.append`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from uuid import UUID

from orchestrator.core.records import Boot, DeviceSpec, ShimKind

IMAGE_MIB = 6
"""Memory below the region that the guest dirties, and above what it checks."""
_BASE_MIB = 4
_TIMER_HZ = 100


@dataclass(frozen=True, slots=True)
class Workload:
    """What the image does. Rates per second of virtual time."""

    dirty_mib: int = 4
    """Size of the region that is dirtied."""
    dirty_pages_per_s: int = 400
    static_mib: int = 0
    """Filled once, never written again, checked by verify."""
    heartbeat_hz: int = 50
    doorbell_hz: int = 10
    """Of each companion and vfio device."""


def boot_of(workload: Workload, devices: Sequence[DeviceSpec] = (), *, seed: int | None = None) -> Boot:
    """What a guest boots that is to do this and to ring these devices.

    The devices start from 32 bits of the guest's uuid, or from `seed`, so that one guest's are never taken for
    another's.
    """
    rate = max(1, round(workload.dirty_pages_per_s / _TIMER_HZ)) if workload.dirty_pages_per_s > 0 else 0
    keys: dict[str, object] = {
        "base": _BASE_MIB,
        "pages": workload.dirty_mib * 256,
        "rate": rate,
        "hz": _TIMER_HZ,
        "hb": max(1, round(_TIMER_HZ / max(1, workload.heartbeat_hz))),
        "fill": 1,
        "res": workload.static_mib,
        "dev": sum(1 for device in devices if device.shim is ShimKind.COMPANION),
        "pci": sum(1 for device in devices if device.shim is ShimKind.VFIO),
        "devhz": max(1, round(_TIMER_HZ / max(1, workload.doorbell_hz))),
        **({"uuid": "${uuid}"} if seed is None else {"seed": seed}),
    }
    return Boot(append=" ".join(f"{key}={value}" for key, value in keys.items()))


def checked_pages(boot: Boot) -> int:
    """Pages that such a guest checks in a full verify."""
    words = dict(word.split("=", 1) for word in boot.append.split())
    return int(words["pages"]) + int(words["res"]) * 256


def workload_problems(workload: Workload, memory_mib: int) -> list[tuple[str, str]]:
    """Key and a sentence for everything that is wrong with a workload in a guest with so much memory."""
    bounds = {
        "dirty_mib": (1, 2048, " MiB"),
        "dirty_pages_per_s": (0, 10_000_000, ""),
        "static_mib": (0, 2048, " MiB"),
        "heartbeat_hz": (1, _TIMER_HZ, ""),
        "doorbell_hz": (1, _TIMER_HZ, ""),
    }
    bad = [
        (key, f"must be between {low} and {high}{unit}, not {getattr(workload, key)}")
        for key, (low, high, unit) in bounds.items()
        if not low <= getattr(workload, key) <= high
    ]
    asked = workload.dirty_mib + workload.static_mib
    if not bad and asked + IMAGE_MIB > memory_mib:
        needs = f"dirty_mib and static_mib take {asked} MiB and the guest itself {IMAGE_MIB} MiB"
        bad.append(("dirty_mib", f"{needs}: more than its memory of {memory_mib} MiB"))
    return bad


# --- Linux ------------------------------------------------------------------------------------------------------------

LINUX_KERNEL, LINUX_INITRD = "linux-vmlinuz", "linux-initrd"
"""What `make linux-guest` calls the files that it makes."""
LINUX_NETWORK = "10.78.0.0/16"
"""Where the Linux guests' addresses are."""
MAX_LINUX_DISKS = 4
_LINUX_MIB = 88
"""What the kernel needs to boot, without the memory that the probe checks."""
_LINUX_WORDS = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on cryptomgr.notests no_timer_check"
    " tsc=reliable clocksource=hpet"
)
"""The clock is one whose rate is known, as the TSC's has to be measured: a guest that gets no CPU in the middle of that
measures too little, and all its life takes a second for many. `tsc=reliable` keeps the kernel from watching over it."""


@dataclass(frozen=True, slots=True)
class LinuxWorkload:
    """What the probe in the Linux guest does. Rates per second of virtual time."""

    records_per_s: int = 25
    """Records of 4 KiB, each written to every disk and synced before it counts as promised."""
    load_mib: int = 0
    """Size of the region of each disk that the write load goes over."""
    load_kib_per_s: int = 0
    """The write load on each disk, in random blocks of 64 KiB."""
    mem_mib: int = 8
    """Memory that is filled with a pattern and checked by verify."""
    pages_per_s: int = 200
    """Pages of it that are visited, and so dirtied."""
    heartbeat_hz: int = 50
    address: str = ""
    """On its first network card; empty: one that follows from the guest's uuid (`linux_address`)."""


def linux_address(uuid: str) -> str:
    """The IPv4 address that a Linux guest takes by itself: any two have different ones, but for one case in 64516."""
    digits = UUID(uuid).int >> 96
    return f"10.78.{1 + (digits >> 16) % 254}.{1 + (digits & 0xFFFF) % 254}"


def linux_boot_of(workload: LinuxWorkload, disks: int) -> Boot:
    """What a Linux guest boots that is to do this, and to write to its first `disks` disks."""
    keys: dict[str, object] = {
        "records_per_s": workload.records_per_s,
        "load_mib": workload.load_mib if disks else 0,
        "load_kib_per_s": workload.load_kib_per_s if disks else 0,
        "mem_mib": workload.mem_mib,
        "pages_per_s": workload.pages_per_s,
        "heartbeat_hz": workload.heartbeat_hz,
        "uuid": "${uuid}",
        **({"disks": ",".join(f"vd{'abcd'[number]}" for number in range(disks))} if disks else {}),
        **({"address": workload.address} if workload.address else {}),
    }
    told = " ".join(f"probe.{key}={value}" for key, value in keys.items())
    return Boot(kernel=LINUX_KERNEL, initrd=LINUX_INITRD, append=f"{_LINUX_WORDS} {told}")


def is_linux(boot: Boot) -> bool:
    """It is one of ours."""
    return boot.kernel == LINUX_KERNEL


def linux_problems(workload: LinuxWorkload, memory_mib: int, disks: int) -> list[tuple[str, str]]:
    """Key and a sentence for everything that is wrong with a Linux guest with so much memory and so many disks."""
    bounds = {
        "records_per_s": (1, 1000),
        "load_mib": (0, 65536),
        "load_kib_per_s": (0, 1 << 20),
        "mem_mib": (1, 2048),
        "pages_per_s": (0, 1_000_000),
        "heartbeat_hz": (1, 100),
    }
    bad = [
        (key, f"must be between {low} and {high}, not {getattr(workload, key)}")
        for key, (low, high) in bounds.items()
        if not low <= getattr(workload, key) <= high
    ]
    if not bad and workload.mem_mib + _LINUX_MIB > memory_mib:
        needs = f"mem_mib takes {workload.mem_mib} MiB and Linux itself {_LINUX_MIB} MiB"
        bad.append(("mem_mib", f"{needs}: more than its memory of {memory_mib} MiB"))
    if disks > MAX_LINUX_DISKS:
        bad.append(("", f"the probe writes to at most {MAX_LINUX_DISKS} disks, not {disks}"))
    if (workload.load_mib or workload.load_kib_per_s) and not disks:
        bad.append(("load_mib", "there is no disk to write to"))
    elif bool(workload.load_mib) != bool(workload.load_kib_per_s):
        bad.append(("load_mib", "and load_kib_per_s are given together or not at all"))
    if workload.address and not _is_address(workload.address):
        bad.append(("address", f"must be an IPv4 address such as 10.78.0.21, not {workload.address!r}"))
    return bad


def _is_address(text: str) -> bool:
    try:
        return bool(IPv4Address(text))
    except ValueError:
        return False
