"""What the lab adds to guest files: the keys `workload` and `linux` of a guest, the key `scenario` of a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from deploy.lab.devices.scenario_text import OPTION, scenario_of
from deploy.lab.workload import LinuxWorkload, Workload, boot_of, linux_boot_of, linux_problems, workload_problems
from orchestrator.cli.guest_file import Mib, Model, model_of
from orchestrator.core.errors import DroverError
from orchestrator.core.records import DeviceSpec, Firmware, GuestSpec, ShimKind
from orchestrator.core.text import quoted

Problems = list[tuple[str, str]]


class WorkloadKey:
    """See `orchestrator.cli.guest_file.Key`; found by the entry point `workload` of the group `drover.guest_file`."""

    model: type[Model] = model_of(Workload, dirty_mib=Mib, static_mib=Mib)

    @staticmethod
    def apply(spec: GuestSpec, given: Model) -> tuple[GuestSpec, Problems]:
        """The guest with a command line for the lab's image, and what is wrong, by field of the guest."""
        workload = Workload(**given.model_dump(exclude_unset=True))
        bad = [(f"workload.{key}", said) for key, said in workload_problems(workload, spec.memory_mib)]
        if spec.disks or spec.boot.firmware is not Firmware.DIRECT:
            bad.append(("workload", "is for the lab's own image, which has no disks and is booted directly"))
        if spec.boot.append:
            bad.append(("workload", "writes the guest's command line, and so does boot.append: leave one of them out"))
        return replace(spec, boot=replace(spec.boot, append=boot_of(workload, spec.devices).append)), bad


class LinuxKey:
    """The same, for guests that boot the lab's Linux (deploy/lab/linux_guest)."""

    model: type[Model] = model_of(LinuxWorkload, load_mib=Mib, mem_mib=Mib)

    @staticmethod
    def apply(spec: GuestSpec, given: Model) -> tuple[GuestSpec, Problems]:
        """The guest with kernel, initrd and command line, and what is wrong, by field of the guest."""
        workload = LinuxWorkload(**given.model_dump(exclude_unset=True))
        disks = sum(not disk.read_only for disk in spec.disks)
        found = linux_problems(workload, spec.memory_mib, disks)
        bad = [(f"linux.{key}" if key else "linux", said) for key, said in found]
        boot = spec.boot
        if boot.kernel or boot.initrd or boot.append:
            bad.append(("linux", "says what the guest boots, as workload and boot do: leave all but one out"))
        ours = linux_boot_of(workload, disks)
        return replace(spec, boot=replace(boot, kernel=ours.kernel, initrd=ours.initrd, append=ours.append)), bad


class ScenarioKey:
    """See `orchestrator.cli.guest_file.DeviceKey`; found by the entry point `devices.scenario`."""

    @staticmethod
    def apply(device: DeviceSpec, given: Any, beside: Path) -> tuple[DeviceSpec, Problems]:
        """The device with the scenario as its option. A scenario is a mapping, or the name of a file beside the guest
        file."""
        if device.shim not in (ShimKind.COMPANION, ShimKind.VFIO):
            return device, [("", f"only companion and vfio devices follow a scenario, not {device.shim.value}")]
        if OPTION in device.options:
            return device, [("", f"is the option {OPTION}, and that is given below options: leave one of them out")]
        file = ""
        if isinstance(given, str) and given:
            path = beside / given
            try:
                text = path.read_text()
            except (OSError, ValueError) as error:
                said = getattr(error, "strerror", None) or error
                return device, [
                    ("", f"cannot read {path}: {said}; write the name of a scenario file, or the scenario itself")
                ]
            file = f"{path}: "
        elif isinstance(given, dict):
            text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True) if given else ""
        else:
            return device, [("", f"must be a scenario, or the name of a scenario file, not {quoted(str(given))}")]
        options = {**device.options, OPTION: text}
        return replace(device, options=options), _problems(device, text, file)


def _problems(device: DeviceSpec, text: str, file: str) -> Problems:
    """By place in the scenario; what is wrong with one in a file of its own is told as a whole."""
    try:
        scenario_of({OPTION: text}, in_vmm=device.shim is ShimKind.VFIO)
    except DroverError as error:
        found = [(field.removeprefix(OPTION).removeprefix("."), said) for field, said in error.violations]
        if not file:
            return found
        return [("", f"{file}{field}{': ' if field else ''}{said}") for field, said in found]
    return []
