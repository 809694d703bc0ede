"""Everything that is wrong with a guest's specification is said, by field."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core.guest import guest_errors, name_error
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import DeviceSpec, GuestSpec, ShimKind, Workload

NIC = DeviceSpec("nic", ShimKind.COMPANION)
SOUND = GuestSpec("web-1", devices=(NIC, DeviceSpec("eth0", ShimKind.NET, dma="")), labels={"team": "a/b", "t.r": ""})


def fields(spec: GuestSpec) -> list[str]:
    return [field for field, _ in guest_errors(spec)]


def test_a_sound_guest() -> None:
    assert fields(SOUND) == []
    assert fields(GuestSpec("a")) == []


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a.b", "a/b", "ä", "x" * 64, "a\n", "../a"])
def test_names_that_are_no_dns_labels(name: str) -> None:
    assert "1 to 63" in name_error(name)
    assert fields(replace(SOUND, name=name)) == ["name"]


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (replace(SOUND, memory_mib=15, workload=Workload(dirty_mib=1)), "memory_mib"),
        (replace(SOUND, memory_mib=2**21), "memory_mib"),
        (replace(SOUND, vcpus=0), "vcpus"),
        (replace(SOUND, vcpus=256), "vcpus"),
        (replace(SOUND, machine="pc,accel=kvm"), "machine"),
        (replace(SOUND, workload=Workload(dirty_mib=0)), "workload.dirty_mib"),
        (replace(SOUND, workload=Workload(dirty_pages_per_s=-1)), "workload.dirty_pages_per_s"),
        (replace(SOUND, workload=Workload(static_mib=-1)), "workload.static_mib"),
        (replace(SOUND, workload=Workload(heartbeat_hz=0)), "workload.heartbeat_hz"),
        (replace(SOUND, workload=Workload(doorbell_hz=101)), "workload.doorbell_hz"),
        (replace(SOUND, workload=Workload(dirty_mib=40, static_mib=20)), "workload.dirty_mib"),
        (replace(SOUND, devices=(NIC, NIC)), "devices[1].name"),
        (replace(SOUND, devices=(replace(NIC, name="N"),)), "devices[0].name"),
        (replace(SOUND, devices=(replace(NIC, dma="full"),)), "devices[0].dma"),
        (replace(SOUND, devices=(replace(NIC, initial_bytes=-1),)), "devices[0].initial_bytes"),
        (replace(SOUND, devices=(replace(NIC, stop_copy_bytes=2**31),)), "devices[0].stop_copy_bytes"),
        (replace(SOUND, devices=(replace(NIC, dirty_bytes_per_s=-1),)), "devices[0].dirty_bytes_per_s"),
        (replace(SOUND, devices=(DeviceSpec("e", ShimKind.NET, scenario="asks: []"),)), "devices[0].scenario"),
        (replace(SOUND, devices=tuple(replace(NIC, name=f"nic{n}") for n in range(9))), "devices"),
        (replace(SOUND, labels={"": "x"}), "labels['']"),
        (replace(SOUND, labels={"a": "x" * 254}), "labels['a']"),
        (replace(SOUND, labels={f"k{n}": "" for n in range(65)}), "labels"),
        (replace(SOUND, policy=MigrationPolicy(max_attempts=0)), "policy.max_attempts"),
    ],
)
def test_each_mistake_names_its_field(spec: GuestSpec, field: str) -> None:
    assert fields(spec) == [field]


def test_everything_at_once() -> None:
    bad = GuestSpec(
        "WEB", vcpus=0, devices=(replace(NIC, dma="x", name=""),), policy=MigrationPolicy(total_timeout_ms=0)
    )
    assert fields(bad) == ["name", "vcpus", "devices[0].name", "devices[0].dma", "policy.total_timeout_ms"]
