"""The Linux test guest without booting it: what it is told, its initramfs, its disk judged from outside, its build."""

from __future__ import annotations

import gzip
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.lab.linux_guest import image, pack
from deploy.lab.workload import LinuxWorkload, linux_address, linux_boot_of, linux_problems
from orchestrator.cli import guest_file
from orchestrator.core.guest import guest_errors

SCRIPT = Path(__file__).parents[2] / "deploy" / "lab" / "linux_guest" / "build.sh"
SEED = image.seed_of("1f2e3d4c-0000-4000-8000-000000000000")
UNAVAILABLE = 69
SOUND = LinuxWorkload()


# --- what it is told --------------------------------------------------------------------------------------------------


def test_a_guest_file_says_linux() -> None:
    (spec,) = guest_file.load([("g.yaml", "name: g\nmemory: 128MiB\nlinux: {mem_mib: 4, address: 10.78.0.9}")])
    assert spec.boot == linux_boot_of(LinuxWorkload(mem_mib=4, address="10.78.0.9"), disks=0)
    assert guest_errors(spec) == []
    assert "probe.uuid=${uuid}" in spec.boot.append


def test_linux_is_all_that_the_guest_boots() -> None:
    with pytest.raises(guest_file.GuestFileError, match="leave all but one out"):
        guest_file.load([("g.yaml", "name: g\nmemory: 128MiB\nlinux: {}\nboot: {kernel: other}")])


@pytest.mark.parametrize(
    ("workload", "disks", "key"),
    [
        (replace(SOUND, records_per_s=0), 0, "records_per_s"),
        (replace(SOUND, heartbeat_hz=101), 0, "heartbeat_hz"),
        (replace(SOUND, mem_mib=100), 0, "mem_mib"),
        (replace(SOUND, load_mib=8, load_kib_per_s=100), 0, "load_mib"),
        (replace(SOUND, load_mib=8), 1, "load_mib"),
        (replace(SOUND, address="here"), 0, "address"),
        (SOUND, 5, ""),
    ],
)
def test_what_it_cannot_do(workload: LinuxWorkload, disks: int, key: str) -> None:
    assert [found for found, _ in linux_problems(workload, 128, disks)] == [key]


def test_it_can_do_what_nothing_speaks_against() -> None:
    assert linux_problems(replace(SOUND, load_mib=8, load_kib_per_s=100), 128, 2) == []
    assert linux_boot_of(SOUND, 2).append.endswith(" probe.disks=vda,vdb")


def test_the_address_follows_from_the_uuid() -> None:
    assert linux_address("00000000-0000-4000-8000-000000000000") == "10.78.1.1"
    assert linux_address("00fe0001-0000-4000-8000-000000000000") == "10.78.1.2"
    assert linux_address("ffffffff-0000-4000-8000-000000000000") == "10.78.4.4"


# --- its disk, from outside -------------------------------------------------------------------------------------------


def disk_with(numbers: range, seed: int = SEED) -> bytearray:
    disk = bytearray(image.RING_AT + image.SLOTS * image.PAGE)
    for number in numbers:
        at = image.RING_AT + number % image.SLOTS * image.PAGE
        disk[at : at + image.PAGE] = image.record(number, seed)
    return disk


def judged(disk: bytearray, promised: int) -> image.Verdict:
    return image.check(lambda at, size: bytes(disk[at : at + size]), SEED, promised)


def test_a_disk_with_every_promised_record() -> None:
    verdict = judged(disk_with(range(1, 21)), promised=18)
    assert verdict.kept
    assert (verdict.checked, verdict.newest) == (18, 20)


def test_a_ring_that_went_round_holds_its_last_records() -> None:
    numbers = range(501, 501 + image.SLOTS)
    assert judged(disk_with(numbers), promised=numbers[-1]).kept
    # What came after the newest promise may be there already.
    assert judged(disk_with(numbers), promised=numbers[-1] - 3).kept


def test_a_record_that_never_came() -> None:
    disk = disk_with(range(1, 20))
    assert judged(disk, promised=20).missing == (20,)


def test_a_torn_record_and_one_of_another_guest_are_missing() -> None:
    disk = disk_with(range(1, 11))
    disk[image.RING_AT + 7 * image.PAGE + 4000] ^= 1
    at = image.RING_AT + 9 * image.PAGE
    disk[at : at + image.PAGE] = image.record(9, SEED + 1)
    assert judged(disk, promised=10).missing == (7, 9)


def test_a_disk_of_an_hour_ago_has_lost_what_came_since() -> None:
    verdict = judged(disk_with(range(1, 900)), promised=2000)
    assert verdict.newest == 899
    assert len(verdict.missing) == image.SLOTS


# --- its initramfs ----------------------------------------------------------------------------------------------------


def module(*needs: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0name=x\0"


def test_modules_come_after_those_that_they_need(tmp_path: Path) -> None:
    kernel = tmp_path / "lib" / "modules" / "6.1" / "kernel" / "drivers"
    kernel.mkdir(parents=True)
    needs = {
        "virtio_net": ["net_failover"],
        "net_failover": ["failover"],
        "failover": [],
        "virtio-rng": [],
        "virtio_blk": [],
    }
    for name, names in needs.items():
        (kernel / f"{name}.ko").write_bytes(module(*names) + name.encode())
    made = gzip.decompress(pack.initramfs(tmp_path, b"the probe"))
    places = [made.index(b"name=x\0" + name) for name in (b"virtio_blk", b"failover", b"net_failover", b"virtio_net")]
    assert places == sorted(places)
    assert b"virtio-rng" not in made
    assert b"the probe" in made
    with pytest.raises(LookupError):
        pack.initramfs(tmp_path / "nothing", b"")


# --- where it cannot be made ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "script", "says"),
    [
        ("uname", "echo aarch64", "this machine is aarch64"),
        ("apt-cache", "exit 100", "have no linux-image-cloud-amd64"),
        ("apt-get", "echo 'E: no network here'; exit 100", "no network here"),
    ],
)
def test_it_is_left_out_with_a_word(tmp_path: Path, name: str, script: str, says: str) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    scripts = {"apt-cache": "echo '  Depends: linux-image-1.2-cloud-amd64'", "apt-get": "exit 0", name: script}
    for tool, text in scripts.items():
        (tools / tool).write_text(f"#!/bin/sh\n{text}\n")
        (tools / tool).chmod(0o755)
    made = subprocess.run(
        [str(SCRIPT), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": f"{tools}:/usr/bin:/bin"},
        check=False,
    )
    assert made.returncode == UNAVAILABLE, made.stderr
    assert says in made.stderr
    assert made.stderr.strip().splitlines()[-1].startswith("linux-guest: the Linux test guest is left out: ")
    assert not (tmp_path / "out" / "linux-initrd").exists()
