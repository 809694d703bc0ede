"""PURE. What the lab's guest image is told to do: `workload` of a guest file, as the image's command line.

The image is in deploy/lab/guest_image; its README has every word of its command line. To the product a guest's command
line is text like any other (`boot.append`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
