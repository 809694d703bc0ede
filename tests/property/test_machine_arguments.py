"""A guest's machine and the command line that builds it are one to one, whatever hardware the guest has."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.engine.base import DiskFile, FirmwareFiles, Tap, VmmSpec
from agents.engine.boot_images import Images
from agents.engine.qemu import arguments
from agents.engine.qemu.process import Launch, command_line
from agents.guest import machine, plugging
from agents.guest.machine import Facts
from orchestrator import wire_hardware
from orchestrator.core.guest import guest_errors
from orchestrator.core.records import (
    Boot,
    CloudInit,
    DiskCache,
    DiskFormat,
    DiskSpec,
    Display,
    Firmware,
    GuestSpec,
    LiveDevice,
    LiveMachine,
    NicSpec,
    PoolKind,
    Tpm,
)
from orchestrator.ledger.records import decode, encode

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,6}[a-z0-9])?", fullmatch=True)
TYPES = ("pc-q35-10.0", "pc-i440fx-10.0")


@st.composite
def specs(draw: st.DrawFn) -> GuestSpec:
    """Guests that are sound, of every kind of hardware."""
    firmware = draw(st.sampled_from(Firmware))
    disks = tuple(
        DiskSpec(
            name,
            draw(NAMES),
            f"{name}.img",
            draw(st.sampled_from(DiskFormat)),
            cache=draw(st.sampled_from(DiskCache)),
            read_only=draw(st.booleans()),
            boot=number == 0 and firmware is not Firmware.DIRECT,
            iothread=draw(st.booleans()),
        )
        for number, name in enumerate(draw(st.lists(NAMES, max_size=16, unique=True)))
    )
    nics = tuple(
        NicSpec(name, draw(NAMES), "", draw(st.integers(1, 16)), draw(st.sampled_from([0, 576, 9216])))
        for name in draw(st.lists(NAMES, max_size=8, unique=True))
    )
    return GuestSpec(
        "g",
        vcpus=draw(st.integers(1, 255)),
        boot=Boot(firmware=firmware),
        disks=disks,
        nics=nics,
        tpm=draw(st.none() | st.just(Tpm())),
        cloud_init=draw(st.none() | st.just(CloudInit("#cloud-config"))),
        display=Display(draw(st.booleans())),
    )


def facts(machine_type: str, accelerator: str = "tcg") -> Facts:
    return Facts(machine_type, accelerator, {}, lambda name: f"02:00:00:00:00:{len(name):02x}")


def vmm(spec: GuestSpec, machine_type: str, here: str) -> VmmSpec:
    """As the host `here` has it."""
    files = tuple(
        DiskFile(disk.name, Path(f"/{here},1/{disk.image}"), disk.format, disk.cache, disk.read_only, PoolKind.LOCAL)
        for disk in spec.disks
    )
    return VmmSpec(
        "u",
        "i",
        spec,
        Path(f"/{here}"),
        Path("/c"),
        None,
        machine=machine.born(spec, facts(machine_type)),
        disks=files,
        taps=tuple(Tap(nic.name, f"tap-{here}-{n}") for n, nic in enumerate(spec.nics)),
        firmware=FirmwareFiles(None, Path("/code"), Path(f"/{here}/nvram")),
        tpm_path=Path(f"/{here}/tpm") if spec.tpm else None,
        seed_path=Path(f"/{here}/seed") if spec.cloud_init else None,
    )


def started(spec: VmmSpec, *, incoming: bool) -> list[str]:
    return command_line(Launch("q", Images(Path(__file__)), "tcg", reconnect_ms=True), spec, incoming=incoming)


@settings(deadline=None)
@given(specs(), st.sampled_from(TYPES))
def test_the_list_is_read_back_from_the_command_line(spec: GuestSpec, machine_type: str) -> None:
    assert guest_errors(spec) == []
    listed = machine.born(spec, facts(machine_type))
    assert arguments.devices_of(arguments.device_arguments(listed)) == listed.devices


@settings(deadline=None)
@given(specs(), st.sampled_from(TYPES))
def test_the_two_ends_differ_in_what_stands_behind_the_devices_and_in_nothing_else(
    spec: GuestSpec, machine_type: str
) -> None:
    guest_sees = ("-M", "-m", "-smp", "-cpu", "-device")

    def seen(words: list[str]) -> list[tuple[str, str]]:
        return [(word, value) for word, value in pairwise(words) if word in guest_sees]

    source = started(vmm(spec, machine_type, "a"), incoming=False)
    assert seen(source) == seen(started(vmm(spec, machine_type, "b"), incoming=True))


@settings(deadline=None)
@given(specs(), st.sampled_from(TYPES))
def test_every_thread_that_a_disk_names_is_made_before_it(spec: GuestSpec, machine_type: str) -> None:
    words = started(vmm(spec, machine_type, "a"), incoming=True)
    made = [value.partition("id=")[2] for word, value in pairwise(words) if word == "-object"]
    named = [value for value in words if ",iothread=" in value]
    assert sorted(made) == sorted(f"io-{disk.name}" for disk in spec.disks if disk.iothread)
    assert len(named) == len(made)
    assert not named or words.index(named[0]) > max(n for n, word in enumerate(words) if word == "-object")


@settings(deadline=None)
@given(specs(), st.sampled_from(TYPES))
def test_every_device_has_a_place_of_its_own_and_something_behind_it(spec: GuestSpec, machine_type: str) -> None:
    listed = machine.born(spec, facts(machine_type)).devices
    assert len({device.id for device in listed}) == len(listed)
    places = [(device.bus, device.address) for device in listed if device.bus]
    assert len(set(places)) == len(places)
    buses = {"pcie.0", "pci.0", *(device.id for device in listed)}
    assert {device.bus for device in listed if device.bus} <= buses
    assert {machine.disk_of(device) for device in listed} - {""} == {disk.name for disk in spec.disks}
    assert {machine.nic_of(device) for device in listed} - {""} == {nic.name for nic in spec.nics}


@settings(deadline=None)
@given(specs(), st.sampled_from(TYPES))
def test_the_machine_is_kept_as_it_is(spec: GuestSpec, machine_type: str) -> None:
    listed = machine.born(spec, facts(machine_type))
    assert decode(type(listed), encode(listed)) == listed


@settings(deadline=None)
@given(specs(), st.sampled_from(TYPES), st.data())
def test_what_was_added_or_taken_away_is_noticed(spec: GuestSpec, machine_type: str, data: st.DataObject) -> None:
    listed = machine.born(spec, facts(machine_type))
    found = {device.id: device.driver for device in listed.devices}
    assert arguments.strangers(listed, found) == []
    assert arguments.strangers(listed, {**found, "mine": "virtio-rng-pci"}) != []
    if found:
        gone = data.draw(st.sampled_from(sorted(found)))
        assert arguments.strangers(listed, {name: kind for name, kind in found.items() if name != gone}) != []
        assert arguments.strangers(listed, {**found, gone: "e1000"}) != []


def test_what_an_image_lies_on_is_opened_to_read_only() -> None:
    disk = DiskFile(
        "d", Path("/p/i"), DiskFormat.QCOW2, DiskCache.NONE, False, PoolKind.LOCAL, base=Path("/p/b"),
        base_format=DiskFormat.RAW,
    )  # fmt: skip
    base_file, base, file, top = arguments.disk_nodes(disk)
    assert (base_file["filename"], base_file["read-only"], base["driver"], base["read-only"]) == (
        "/p/b", True, "raw", True,
    )  # fmt: skip
    assert (file["filename"], top["backing"], top["node-name"]) == ("/p/i", base["node-name"], "disk-d")


def test_a_comma_in_a_value_is_one_value() -> None:
    odd = LiveDevice("a", "d", "b", "0x1", {"p": "x,y,,z", "q": ""}, "disk:r")
    assert arguments.devices_of(["-device", arguments.device_argument(odd)]) == (odd,)


@pytest.mark.parametrize(
    ("kind", "locks", "locking"),
    [
        (PoolKind.SHARED_FILE, True, "on"),
        (PoolKind.SHARED_FILE, False, "auto"),
        (PoolKind.LOCAL, True, "auto"),
        (PoolKind.BLOCK, True, "auto"),
    ],
)
def test_a_shared_image_is_locked_or_not_opened(kind: PoolKind, locks: bool, locking: str) -> None:
    disk = DiskFile("d", Path("/p/i"), DiskFormat.RAW, DiskCache.NONE, False, kind, locks=locks)
    file, top = arguments.disk_nodes(disk)
    assert (file["locking"], file["driver"]) == (locking, "host_device" if kind is PoolKind.BLOCK else "file")
    assert file["cache"] == {"direct": True, "no-flush": False}
    assert (top["node-name"], top["file"]) == ("disk-d", "disk-d-file")


# --- a machine that changes while it runs ----------------------------------------------------------------------------


@st.composite
def changes(draw: st.DrawFn) -> tuple[GuestSpec, LiveMachine, list[LiveMachine]]:
    """A guest with room for more, and its machine after each of some changes."""
    spec = replace(draw(specs()), vcpus=draw(st.integers(1, 4)), max_vcpus=8, memory_mib=64, max_memory_mib=64 + 4096)
    spec = replace(spec, disks=spec.disks[:4], nics=spec.nics[:3])
    now = machine.born(spec, facts(draw(st.sampled_from(TYPES))))
    seen: list[LiveMachine] = []
    for number in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["disk", "nic", "memory", "vcpus", "detach"]))
        movable = [device.id for device in now.devices if machine.disk_of(device) or machine.nic_of(device)]
        try:
            match kind:
                case "disk":
                    more = [plugging.disk(now, DiskSpec(f"h{number}", "p", f"h{number}.img"))]
                case "nic":
                    more = [plugging.nic(now, NicSpec(f"h{number}", "n"), f"02:00:00:00:01:{number:02x}")]
                case "memory":
                    more = [plugging.module(now, plugging.memory_mib(now) + 128 * draw(st.integers(1, 4)))]
                case "vcpus":
                    more = list(plugging.sockets(now, plugging.vcpus(now) + draw(st.integers(1, 3))))
                case _:
                    more = []
                    if movable:
                        now = plugging.detached(now, draw(st.sampled_from(movable)))
        except machine.MachineError:
            continue  # no place, or no room: said, and nothing has changed
        now = plugging.attached(now, more)
        seen.append(now)
    return spec, now, seen


def at(spec: GuestSpec, listed: LiveMachine, here: str) -> VmmSpec:
    """The guest's VMM at the host `here`, which has read the list from a note, or from a message."""
    disks = [name for device in listed.devices if (name := machine.disk_of(device))]
    nics = [name for device in listed.devices if (name := machine.nic_of(device))]
    grown = replace(
        spec,
        disks=tuple(DiskSpec(name, "p", f"{name}.img") for name in disks),
        nics=tuple(NicSpec(name, "n") for name in nics),
    )
    read = wire_hardware.machine_from_proto(wire_hardware.machine_to_proto(decode(LiveMachine, encode(listed))))
    return replace(vmm(grown, listed.type, here), machine=read)


@settings(deadline=None, max_examples=30)
@given(changes())
def test_both_ends_build_the_same_machine_after_any_changes(
    changed: tuple[GuestSpec, LiveMachine, list[LiveMachine]],
) -> None:
    spec, now, _ = changed
    guest_sees = ("-M", "-m", "-smp", "-cpu", "-device", "-object")

    def seen(words: list[str]) -> list[tuple[str, str]]:
        return [(word, value) for word, value in pairwise(words) if word in guest_sees]

    source = seen(started(at(spec, now, "a"), incoming=False))
    assert source == seen(started(at(spec, now, "b"), incoming=True))
    listed = arguments.devices_of([word for pair in source for word in pair])
    assert listed == tuple(replace(device, memory_mib=0) for device in now.devices)


@settings(deadline=None, max_examples=30)
@given(changes())
def test_what_is_there_stays_where_it_is_and_places_are_given_once(
    changed: tuple[GuestSpec, LiveMachine, list[LiveMachine]],
) -> None:
    _, _, seen = changed
    for before, after in pairwise(seen):
        known = {device.id: device for device in before.devices}
        assert all(known[device.id] == device for device in after.devices if device.id in known)
    for each in seen:
        assert len({device.id for device in each.devices}) == len(each.devices)
        places = [(device.bus, device.address) for device in each.devices if device.bus]
        assert len(set(places)) == len(places)
        assert plugging.memory_mib(each) <= each.max_memory_mib
        assert plugging.vcpus(each) <= each.max_vcpus
        slots = [device.properties["slot"] for device in each.devices if device.memory_mib]
        assert len(set(slots)) == len(slots)


def test_a_device_that_was_asked_to_leave_is_part_of_the_machine_until_it_has_left() -> None:
    listed = machine.born(GuestSpec("g", disks=(DiskSpec("d", "p", "d.img"),)), facts("pc-q35-10.0"))
    asked = plugging.leaving(listed, "disk-d")
    there = {device.id: device.driver for device in asked.devices}
    assert arguments.device_arguments(asked) == arguments.device_arguments(listed)
    assert (arguments.strangers(asked, there), plugging.gone(asked, there)) == ([], [])
    del there["disk-d"]
    assert [device.id for device in plugging.gone(asked, there)] == ["disk-d"]
    assert plugging.gone(listed, there) == []  # nobody was asked: somebody took it away by hand
    assert "disk-d" not in {device.id for device in plugging.detached(asked, "disk-d").devices}
