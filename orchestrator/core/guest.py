"""Whether a guest can be what its specification says: everything that is wrong with it, field by field."""

from __future__ import annotations

import re

from orchestrator.core.policy import policy_errors
from orchestrator.core.records import DeviceSpec, GuestSpec, ShimKind, Workload
from orchestrator.core.scenario import Scenario, outside_errors
from orchestrator.core.text import quoted

Problem = tuple[str, str]
"""Field, relative to the specification, and a sentence."""

MAX_DEVICES = 8
"""Of each kind: the built-in guest image rings at most so many companions, and so many devices inside the VMM."""
MAX_LABELS = 64
IMAGE_MIB = 6
"""Memory below the region that the guest dirties, and above what it checks."""
MAX_DEVICE_BYTES = 1 << 30

_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LABEL_KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_./-]{0,61}[A-Za-z0-9])?")
_MACHINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WORDS = "must be lower-case letters, digits and hyphens, 1 to 63 of them, with a letter or digit at both ends"


def name_error(name: str) -> str:
    """What is wrong with the name of a guest, host or device; empty when nothing is."""
    return "" if _DNS_LABEL.fullmatch(name) else f"{_WORDS}, not {quoted(name)}"


def guest_errors(spec: GuestSpec) -> list[Problem]:
    """Everything that is wrong with a specification; empty when it is sound.

    Scenario texts are not looked at (they are YAML; see `orchestrator.scenario_text`).
    """
    bad: list[Problem] = []
    if wrong := name_error(spec.name):
        bad.append(("name", wrong))
    bad += _range("memory_mib", spec.memory_mib, 16, 1 << 20, "MiB")
    bad += _range("vcpus", spec.vcpus, 1, 255)
    if not _MACHINE.fullmatch(spec.machine):
        bad.append(("machine", f"must be the name of a machine type such as pc or q35, not {quoted(spec.machine)}"))
    bad += [(f"workload.{field}", said) for field, said in _workload(spec.workload, spec.memory_mib)]
    bad += _devices(spec.devices)
    bad += _labels(spec.labels)
    bad += [(f"policy.{field}", said) for field, said in policy_errors(spec.policy)]
    return bad


def _range(field: str, value: int, low: int, high: int, unit: str = "") -> list[Problem]:
    if low <= value <= high:
        return []
    return [(field, f"must be between {low} and {high}{f' {unit}' if unit else ''}, not {value}")]


def _workload(workload: Workload, memory_mib: int) -> list[Problem]:
    bad = _range("dirty_mib", workload.dirty_mib, 1, 2048, "MiB")
    bad += _range("dirty_pages_per_s", workload.dirty_pages_per_s, 0, 10_000_000)
    bad += _range("static_mib", workload.static_mib, 0, 2048, "MiB")
    bad += _range("heartbeat_hz", workload.heartbeat_hz, 1, 100)
    bad += _range("doorbell_hz", workload.doorbell_hz, 1, 100)
    asked = workload.dirty_mib + workload.static_mib
    if not bad and asked + IMAGE_MIB > memory_mib:
        needs = f"dirty_mib and static_mib take {asked} MiB and the guest itself {IMAGE_MIB} MiB"
        bad.append(("dirty_mib", f"{needs}: more than its memory of {memory_mib} MiB"))
    return bad


def _devices(devices: tuple[DeviceSpec, ...]) -> list[Problem]:
    bad: list[Problem] = []
    for kind in ShimKind:
        count = sum(device.shim is kind for device in devices)
        if count > MAX_DEVICES:
            bad.append(("devices", f"at most {MAX_DEVICES} {kind.value} devices per guest, not {count}"))
    seen: set[str] = set()
    for index, device in enumerate(devices):
        where = f"devices[{index}]"
        bad += [(f"{where}.{field}", said) for field, said in _device(device)]
        if device.name in seen:
            bad.append((f"{where}.name", f"there is another device {quoted(device.name)}: names must differ"))
        seen.add(device.name)
    return bad


def _device(device: DeviceSpec) -> list[Problem]:
    bad: list[Problem] = []
    if wrong := name_error(device.name):
        bad.append(("name", wrong))
    if device.shim is ShimKind.VFIO and device.dma != "none":
        bad.append(
            ("dma", f"must be none, not {quoted(device.dma)}: the emulated device writes no memory of the guest")
        )
    if device.shim is ShimKind.COMPANION and device.dma != "none":
        bad.append(
            (
                "dma",
                f"a companion device must say none, not {quoted(device.dma)}: QEMU cannot be told of pages it wrote",
            )
        )
    bad += _range("initial_bytes", device.initial_bytes, 0, MAX_DEVICE_BYTES, "bytes")
    bad += _range("stop_copy_bytes", device.stop_copy_bytes, 0, MAX_DEVICE_BYTES, "bytes")
    bad += _range("dirty_bytes_per_s", device.dirty_bytes_per_s, 0, MAX_DEVICE_BYTES, "bytes/s")
    if device.shim is ShimKind.NET and device.scenario:
        bad.append(("scenario", "only companion and vfio devices follow a scenario, not net"))
    return bad


def scenario_problems(shim: ShimKind, scenario: Scenario) -> list[Problem]:
    """What a scenario asks of a device that only another kind of device can do."""
    return outside_errors(scenario) if shim is not ShimKind.VFIO else []


def _labels(labels: dict[str, str]) -> list[Problem]:
    bad: list[Problem] = []
    if len(labels) > MAX_LABELS:
        bad.append(("labels", f"at most {MAX_LABELS} labels, not {len(labels)}"))
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            bad.append((f"labels[{quoted(key, 80)}]", "a key is 1 to 63 letters, digits, '.', '-', '_' and '/'"))
        if len(value) > 253:
            bad.append((f"labels[{quoted(key, 80)}]", f"a value has at most 253 characters, not {len(value)}"))
    return bad
