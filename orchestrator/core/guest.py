"""Whether a guest can be what its specification says: everything that is wrong with it, field by field."""

from __future__ import annotations

import re

from orchestrator.core.hardware import Problem, hardware_errors
from orchestrator.core.naming import file_error, name_error
from orchestrator.core.policy import policy_errors
from orchestrator.core.records import Boot, DeviceSpec, GuestSpec, OnHostDeath, ShimKind
from orchestrator.core.text import quoted

MAX_DEVICES = 8
"""Of each kind: companions, devices inside the VMM, network cards."""
MAX_LABELS = 64
MAX_APPEND_BYTES = 2047
"""What an x86 kernel takes of its command line."""
MAX_DEVICE_BYTES = 1 << 30
MAX_OPTIONS = 32
MAX_OPTIONS_BYTES = 16 << 10
"""Names and values of all options of one device."""
MAX_INSTRUCTION_BYTES = 4 << 10

_OPTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_LABEL_KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_./-]{0,61}[A-Za-z0-9])?")
_PLACEHOLDER = re.compile(r"\$\{[^}]*\}?")
_MACHINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def guest_errors(spec: GuestSpec) -> list[Problem]:
    """Everything that is wrong with a specification; empty when it is sound.

    What a device's options say is not looked at: that is for the device's own program.
    """
    bad: list[Problem] = []
    if wrong := name_error(spec.name):
        bad.append(("name", wrong))
    bad += _range("memory_mib", spec.memory_mib, 16, 1 << 20, "MiB")
    bad += _range("vcpus", spec.vcpus, 1, 255)
    if not _MACHINE.fullmatch(spec.machine):
        bad.append(("machine", f"must be the name of a machine type such as pc or q35, not {quoted(spec.machine)}"))
    bad += [(f"boot.{field}", said) for field, said in boot_errors(spec.boot)]
    bad += hardware_errors(spec)
    bad += _devices(spec.devices)
    bad += _labels(spec.labels)
    bad += [(f"policy.{field}", said) for field, said in policy_errors(spec.policy)]
    if spec.on_host_death is OnHostDeath.RESTART and (state := local_state(spec)):
        bad.append(("on_host_death", f"must be leave: {state}, which a new life elsewhere would lack"))
    return bad


def local_state(spec: GuestSpec) -> str:
    """What of a guest exists on its host only, as a clause; empty: nothing, a new life needs nothing of the old one.

    Its disks are not looked at: which pools are one host's own, the host says.
    """
    if spec.tpm is not None:
        return "its TPM keeps its state on its host"
    names = [device.name for device in spec.devices if device.shim is not ShimKind.NET]
    if not names:
        return ""
    if len(names) == 1:
        return f"device {names[0]} keeps state on its host"
    return f"devices {', '.join(names)} keep state on its host"


def _range(field: str, value: int, low: int, high: int, unit: str = "") -> list[Problem]:
    if low <= value <= high:
        return []
    return [(field, f"must be between {low} and {high}{f' {unit}' if unit else ''}, not {value}")]


def boot_errors(boot: Boot) -> list[Problem]:
    """Everything that is wrong with what a guest boots, apart from what only its host knows: which images there are."""
    bad: list[Problem] = []
    for field, name in (("kernel", boot.kernel), ("initrd", boot.initrd)):
        if name and (wrong := file_error(name, "the hosts' directory of images")):
            bad.append((field, wrong))
    size = len(boot.append.encode(errors="replace"))
    if size > MAX_APPEND_BYTES:
        bad.append(("append", f"must have at most {MAX_APPEND_BYTES} bytes, not {size}"))
    elif boot.append and not boot.append.isprintable():
        bad.append(("append", "must be one line of printable characters"))
    for word in _PLACEHOLDER.findall(boot.append):
        if word not in {"${name}", "${uuid}"}:
            bad.append(("append", f"there is no {quoted(word)}; there are ${{name}} and ${{uuid}}"))
    return bad


def command_line_of(boot: Boot, *, name: str, uuid: str) -> str:
    """`append` with what it asks to have filled in."""
    return boot.append.replace("${name}", name).replace("${uuid}", uuid)


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
    if device.shim in (ShimKind.COMPANION, ShimKind.EXTERNAL) and device.dma != "none":
        said = f"device must say none, not {quoted(device.dma)}: QEMU cannot be told of pages it wrote"
        bad.append(("dma", f"a {device.shim.value} {said}"))
    bad += _external(device)
    bad += _range("initial_bytes", device.initial_bytes, 0, MAX_DEVICE_BYTES, "bytes")
    bad += _range("stop_copy_bytes", device.stop_copy_bytes, 0, MAX_DEVICE_BYTES, "bytes")
    bad += _range("dirty_bytes_per_s", device.dirty_bytes_per_s, 0, MAX_DEVICE_BYTES, "bytes/s")
    return [*bad, *_options(device)]


def _options(device: DeviceSpec) -> list[Problem]:
    """Of their form and size; their meaning is judged by the device's own program."""
    if device.shim is ShimKind.NET and device.options:
        return [("options", "a net device has no program that options could be for")]
    bad: list[Problem] = []
    if len(device.options) > MAX_OPTIONS:
        bad.append(("options", f"at most {MAX_OPTIONS} options, not {len(device.options)}"))
    for name in device.options:
        if not _OPTION.fullmatch(name):
            said = "a name is 1 to 63 letters, digits, '.', '-' and '_', with a letter or digit at both ends"
            bad.append((f"options[{quoted(name, 80)}]", said))
    size = sum(len(f"{name}{value}".encode(errors="replace")) for name, value in device.options.items())
    if size > MAX_OPTIONS_BYTES:
        bad.append(("options", f"at most {MAX_OPTIONS_BYTES} bytes of names and values, not {size}"))
    return bad


def _external(device: DeviceSpec) -> list[Problem]:
    if device.shim is not ShimKind.EXTERNAL:
        return [("driver", f"only external devices have it, not {device.shim.value}")] if device.driver else []
    if wrong := name_error(device.driver):
        return [("driver", f"names the hosts' program for the device and {wrong}")]
    return []


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
