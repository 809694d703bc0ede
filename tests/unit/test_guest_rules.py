"""Everything that is wrong with a guest's specification is said, by field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.core.guest import guest_errors, name_error
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import (
    Boot,
    CloudInit,
    Cpu,
    DeviceSpec,
    DiskSpec,
    Firmware,
    GuestSpec,
    NicSpec,
    OnHostDeath,
    ShimKind,
    Tpm,
)

NIC = DeviceSpec("nic", ShimKind.COMPANION)
SOUND = GuestSpec("web-1", devices=(NIC, DeviceSpec("eth0", ShimKind.NET, dma="")), labels={"team": "a/b", "t.r": ""})
BOOT = Boot("vmlinuz-6.1.0+a_b", "initrd.img", "ro root=/dev/sda1 id=${uuid} host=${name} price=$5,x")

BAD_IMAGES = (
    "/etc/shadow",
    "../vmlinuz",
    "..",
    ".",
    ".hidden",
    "a/b",
    "-kernel",
    "a,b",
    "a b",
    "a\nb",
    "x" * 129,
    "\u00e9",
)


ROOT = DiskSpec("root", "fast", "root.qcow2", size_bytes=1 << 30)
CARD = NicSpec("eth0", "prod", "52:54:00:12:34:56")
BIOS = Boot(firmware=Firmware.BIOS)


def with_disk(**changes: Any) -> GuestSpec:
    return replace(SOUND, disks=(replace(ROOT, **changes),))


def with_card(**changes: Any) -> GuestSpec:
    return replace(SOUND, devices=(), nics=(replace(CARD, **changes),))


def fields(spec: GuestSpec) -> list[str]:
    return [field for field, _ in guest_errors(spec)]


def test_a_sound_guest() -> None:
    assert fields(SOUND) == []
    assert fields(GuestSpec("a")) == []
    assert fields(replace(SOUND, boot=BOOT)) == []


def test_what_keeps_state_on_its_host_is_not_started_elsewhere() -> None:
    restart = replace(SOUND, on_host_death=OnHostDeath.RESTART)
    assert fields(restart) == ["on_host_death"]
    assert fields(replace(restart, devices=(DeviceSpec("eth0", ShimKind.NET, dma=""),))) == []
    assert fields(replace(restart, devices=(DeviceSpec("card", ShimKind.VFIO), NIC))) == ["on_host_death"]


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a.b", "a/b", "ä", "x" * 64, "a\n", "../a"])
def test_names_that_are_no_dns_labels(name: str) -> None:
    assert "1 to 63" in name_error(name)
    assert fields(replace(SOUND, name=name)) == ["name"]


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (replace(SOUND, memory_mib=15), "memory_mib"),
        (replace(SOUND, memory_mib=2**21), "memory_mib"),
        (replace(SOUND, vcpus=0), "vcpus"),
        (replace(SOUND, vcpus=256), "vcpus"),
        (replace(SOUND, machine="pc,accel=kvm"), "machine"),
        *[(replace(SOUND, boot=Boot(kernel=name)), "boot.kernel") for name in BAD_IMAGES],
        *[(replace(SOUND, boot=Boot(initrd=name)), "boot.initrd") for name in BAD_IMAGES],
        (replace(SOUND, boot=Boot(append="x" * 2048)), "boot.append"),
        (replace(SOUND, boot=Boot(append="\u00e9" * 1024)), "boot.append"),
        (replace(SOUND, boot=Boot(append="a\nb")), "boot.append"),
        (replace(SOUND, boot=Boot(append="a\0b")), "boot.append"),
        (replace(SOUND, boot=Boot(append="id=${host}")), "boot.append"),
        (replace(SOUND, boot=Boot(append="id=${uuid")), "boot.append"),
        (replace(SOUND, devices=(NIC, NIC)), "devices[1].name"),
        (replace(SOUND, devices=(replace(NIC, name="N"),)), "devices[0].name"),
        (replace(SOUND, devices=(replace(NIC, dma="full"),)), "devices[0].dma"),
        (replace(SOUND, devices=(replace(NIC, initial_bytes=-1),)), "devices[0].initial_bytes"),
        (replace(SOUND, devices=(replace(NIC, stop_copy_bytes=2**31),)), "devices[0].stop_copy_bytes"),
        (replace(SOUND, devices=(replace(NIC, dirty_bytes_per_s=-1),)), "devices[0].dirty_bytes_per_s"),
        (replace(SOUND, devices=(DeviceSpec("e", ShimKind.NET, options={"a": ""}),)), "devices[0].options"),
        (replace(SOUND, devices=(replace(NIC, options={f"o{n}": "" for n in range(33)}),)), "devices[0].options"),
        (replace(SOUND, devices=(replace(NIC, options={"o": "é" * 8192}),)), "devices[0].options"),
        (replace(SOUND, devices=(replace(NIC, options={"a b": "c"}),)), "devices[0].options['a b']"),
        (replace(SOUND, devices=tuple(replace(NIC, name=f"nic{n}") for n in range(9))), "devices"),
        (replace(SOUND, cpu=Cpu("Nehalem,+vmx")), "cpu.model"),
        *[(with_disk(image=name), "disks[0].image") for name in (*BAD_IMAGES, "")],
        (with_disk(image="root.qcow2.moved-01234567"), "disks[0].image"),
        (with_disk(name="Root"), "disks[0].name"),
        (with_disk(pool="../fast"), "disks[0].pool"),
        (with_disk(size_bytes=(1 << 20) - 512), "disks[0].size_bytes"),
        (with_disk(size_bytes=-1), "disks[0].size_bytes"),
        (with_disk(size_bytes=(64 << 40) + 512), "disks[0].size_bytes"),
        (with_disk(size_bytes=(1 << 30) + 1), "disks[0].size_bytes"),
        (with_disk(read_only=True), "disks[0].size_bytes"),
        (with_disk(boot=True), "disks[0].boot"),
        (replace(SOUND, disks=(ROOT, replace(ROOT, image="b.qcow2"))), "disks[1].name"),
        (replace(SOUND, disks=(ROOT, replace(ROOT, name="b"))), "disks[1].image"),
        (replace(SOUND, disks=tuple(replace(ROOT, name=f"d{n}", image=f"{n}") for n in range(17))), "disks"),
        (
            replace(SOUND, boot=BIOS, disks=(replace(ROOT, boot=True), replace(ROOT, name="b", image="b", boot=True))),
            "disks[1].boot",
        ),
        (replace(SOUND, boot=replace(BIOS, kernel="vmlinuz")), "boot.kernel"),
        (replace(SOUND, boot=replace(BIOS, append="quiet")), "boot.append"),
        (with_card(name=""), "nics[0].name"),
        (with_card(network="br0,ifname=x"), "nics[0].network"),
        (with_card(mac="52:54:00:12:34"), "nics[0].mac"),
        (with_card(mac="53:54:00:12:34:56"), "nics[0].mac"),
        (with_card(mac="00:00:00:00:00:00"), "nics[0].mac"),
        (with_card(queues=0), "nics[0].queues"),
        (with_card(queues=17), "nics[0].queues"),
        (with_card(mtu=575), "nics[0].mtu"),
        (with_card(mtu=9217), "nics[0].mtu"),
        (replace(SOUND, devices=(), nics=(CARD, replace(CARD, mac=""))), "nics[1].name"),
        (replace(SOUND, devices=(), nics=(CARD, replace(CARD, name="eth1"))), "nics[1].mac"),
        (replace(SOUND, nics=(CARD,)), "nics"),
        (replace(SOUND, tpm=Tpm("1.2")), "tpm.version"),
        (replace(SOUND, tpm=Tpm(state="../g.permall")), "tpm.state"),
        (replace(SOUND, boot=Boot(nvram="g.fd")), "boot.nvram"),
        (replace(SOUND, boot=Boot(firmware=Firmware.UEFI, nvram="/etc/passwd")), "boot.nvram"),
        (replace(SOUND, system_uuid="EEEEEEEE-1111-4222-8333-ABCDEFABCDEF"), "system_uuid"),
        (replace(SOUND, cloud_init=CloudInit(" ")), "cloud_init.user_data"),
        (replace(SOUND, cloud_init=CloudInit("#", meta_data="a\0b")), "cloud_init.meta_data"),
        (replace(SOUND, cloud_init=CloudInit("#", "é" * (32 << 10))), "cloud_init.user_data"),
        *[
            (replace(SOUND, extra_args=(text,)), "extra_args[0]")
            for text in ("", "device x", "-a b c", "-a  b", "-a\nb", "-" + "a" * 512)
        ],
        (replace(SOUND, extra_args=("-a",) * 17), "extra_args"),
        (replace(SOUND, labels={"": "x"}), "labels['']"),
        (replace(SOUND, labels={"a": "x" * 254}), "labels['a']"),
        (replace(SOUND, labels={f"k{n}": "" for n in range(65)}), "labels"),
        (replace(SOUND, policy=MigrationPolicy(max_attempts=0)), "policy.max_attempts"),
    ],
)
def test_each_mistake_names_its_field(spec: GuestSpec, field: str) -> None:
    assert fields(spec) == [field]


def test_sound_hardware() -> None:
    seed = replace(ROOT, name="seed", image="seed.iso", size_bytes=0, read_only=True)
    disks = (replace(ROOT, boot=True), seed, replace(seed, name="seed-2"))
    cards = (CARD, NicSpec("eth1", "prod"), NicSpec("eth2", "prod", queues=2, mtu=9000))
    spec = GuestSpec("a", boot=BIOS, cpu=Cpu("host"), disks=disks, nics=cards, tpm=Tpm(), cloud_init=CloudInit("#"))
    assert fields(replace(spec, extra_args=("-device virtio-rng-pci", "-no-hpet"))) == []


def test_a_tpm_keeps_state_on_its_host() -> None:
    assert fields(GuestSpec("a", tpm=Tpm(), on_host_death=OnHostDeath.RESTART)) == ["on_host_death"]


def test_everything_at_once() -> None:
    bad = GuestSpec(
        "WEB", vcpus=0, devices=(replace(NIC, dma="x", name=""),), policy=MigrationPolicy(total_timeout_ms=0)
    )
    assert fields(bad) == ["name", "vcpus", "devices[0].name", "devices[0].dma", "policy.total_timeout_ms"]
