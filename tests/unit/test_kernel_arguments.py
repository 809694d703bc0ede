"""What a guest is told on its kernel's command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agents.engine.base import EngineError, VmmSpec
from agents.engine.qemu.process import Launch, command_line, environment, kernel_arguments
from orchestrator.core.records import DeviceSpec, GuestSpec, ShimKind, Workload

STANDARD = Workload()


def arguments(workload: Workload = STANDARD, seed: int = 0, devices: tuple[DeviceSpec, ...] = ()) -> dict[str, int]:
    guest = GuestSpec("g", workload=workload, devices=devices)
    spec = VmmSpec("guest-1", "s", guest, Path("/x"), Path("/x/con"), None, seed=seed)
    return {key: int(value) for key, value in (word.split("=") for word in kernel_arguments(spec).split())}


@pytest.mark.parametrize(("hz", "ticks"), [(1, 100), (10, 10), (50, 2), (100, 1)])
def test_doorbells_are_counted_in_ticks(hz: int, ticks: int) -> None:
    assert arguments(Workload(doorbell_hz=hz))["devhz"] == ticks


def test_the_devices_start_from_the_guests_seed_and_each_kind_is_rung_in_its_way() -> None:
    kinds = (ShimKind.COMPANION, ShimKind.NET, ShimKind.VFIO, ShimKind.VFIO)
    devices = tuple(DeviceSpec(f"d{n}", kind) for n, kind in enumerate(kinds))
    told = arguments(seed=0xFFFFFFFF, devices=devices)
    assert (told["seed"], told["dev"], told["pci"]) == (0xFFFFFFFF, 1, 2)


def test_a_device_inside_the_vmm_is_never_left_out_in_silence(tmp_path: Path) -> None:
    guest = GuestSpec("g", devices=(DeviceSpec("nic", ShimKind.VFIO),))
    spec = VmmSpec("guest-1", "s", guest, Path("/x"), Path("/x/con"), None)
    launch = Launch("qemu-system-x86_64", Path("/x/guest.elf"), "tcg", reconnect_ms=True)
    with pytest.raises(EngineError, match="no device process"):
        environment(launch, spec)
    spec = replace(spec, vfio_path=Path("/x/s.vfio"))
    with pytest.raises(EngineError, match="need the preload"):
        environment(launch, spec)
    preload = tmp_path / "preload.so"
    preload.touch()
    assert environment(replace(launch, vfio_preload=preload), spec) == {
        "LD_PRELOAD": str(preload),
        "DROVER_VFIO": "1:/x/s.vfio",
    }
    words = command_line(launch, spec, incoming=False)
    (described,) = [word for word in words if word.startswith("vfio-pci,")]
    assert "id=vfio-nic,fd=401" in described
