"""What a guest is told on its kernel's command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents.engine.base import VmmSpec
from agents.engine.qemu.process import kernel_arguments
from orchestrator.core.records import DeviceSpec, GuestSpec, ShimKind, Workload

STANDARD = Workload()


def arguments(workload: Workload = STANDARD, seed: int = 0, devices: tuple[DeviceSpec, ...] = ()) -> dict[str, int]:
    guest = GuestSpec("g", workload=workload, devices=devices)
    spec = VmmSpec("guest-1", "s", guest, Path("/x"), Path("/x/con"), None, seed=seed)
    return {key: int(value) for key, value in (word.split("=") for word in kernel_arguments(spec).split())}


@pytest.mark.parametrize(("hz", "ticks"), [(1, 100), (10, 10), (50, 2), (100, 1)])
def test_doorbells_are_counted_in_ticks(hz: int, ticks: int) -> None:
    assert arguments(Workload(doorbell_hz=hz))["devhz"] == ticks


def test_the_devices_start_from_the_guests_seed_and_only_companions_are_rung() -> None:
    devices = (DeviceSpec("dpu", ShimKind.COMPANION), DeviceSpec("nic", ShimKind.NET))
    told = arguments(seed=0xFFFFFFFF, devices=devices)
    assert (told["seed"], told["dev"]) == (0xFFFFFFFF, 1)
