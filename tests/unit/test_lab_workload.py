"""What the lab's guest image is told on its command line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deploy.lab.workload import Workload, boot_of, checked_pages, workload_problems
from orchestrator.core.guest import command_line_of, guest_errors
from orchestrator.core.records import Boot, DeviceSpec, GuestSpec, ShimKind

SOUND = Workload()


def arguments(boot: Boot) -> dict[str, str]:
    return dict(word.split("=") for word in boot.append.split())


@pytest.mark.parametrize(("hz", "ticks"), [(1, 100), (10, 10), (50, 2), (100, 1)])
def test_doorbells_are_counted_in_ticks(hz: int, ticks: int) -> None:
    assert arguments(boot_of(Workload(doorbell_hz=hz)))["devhz"] == str(ticks)


def test_each_kind_of_device_is_rung_in_its_way() -> None:
    kinds = (ShimKind.COMPANION, ShimKind.NET, ShimKind.VFIO, ShimKind.VFIO)
    told = arguments(boot_of(SOUND, [DeviceSpec(f"d{n}", kind) for n, kind in enumerate(kinds)]))
    assert (told["dev"], told["pci"]) == ("1", "2")


def test_the_devices_start_from_the_guest_s_uuid_or_from_a_seed() -> None:
    boot = boot_of(SOUND)
    assert guest_errors(GuestSpec("g", boot=boot)) == []
    line = command_line_of(boot, name="g", uuid="1f2e3d4c-0000-0000-0000-000000000000")
    assert "uuid=1f2e3d4c-" in line
    assert "seed" not in line
    assert arguments(boot_of(SOUND, seed=7))["seed"] == "7"


def test_what_a_full_verify_checks() -> None:
    assert checked_pages(boot_of(Workload(dirty_mib=3, static_mib=5))) == 8 * 256


@pytest.mark.parametrize(
    ("workload", "key"),
    [
        (replace(SOUND, dirty_mib=0), "dirty_mib"),
        (replace(SOUND, dirty_pages_per_s=-1), "dirty_pages_per_s"),
        (replace(SOUND, static_mib=-1), "static_mib"),
        (replace(SOUND, heartbeat_hz=0), "heartbeat_hz"),
        (replace(SOUND, doorbell_hz=101), "doorbell_hz"),
        (replace(SOUND, dirty_mib=40, static_mib=20), "dirty_mib"),
    ],
)
def test_a_workload_that_cannot_be(workload: Workload, key: str) -> None:
    assert [found for found, _ in workload_problems(workload, 64)] == [key]
    assert workload_problems(SOUND, 64) == []
