"""Linux guests with disks and a card, and the judge of what they leave on images, bridges and hosts.

The guest writes records and says, heartbeat by heartbeat, up to which one they are synced: promised. The images are
raw, so that they can be read from outside whatever became of the guest.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lab.cluster import network, parts
from deploy.lab.cluster.network import command_in
from deploy.lab.cluster.processes import Identity
from deploy.lab.linux_guest.image import check, seed_of
from deploy.lab.workload import LINUX_INITRD, LinuxWorkload, linux_boot_of
from orchestrator.core.handover import Ownership
from orchestrator.core.records import DeviceSpec, DiskFormat, DiskSpec, NicSpec
from tests.integration.handover.scene import Born, Scene, consoles

SIZE = 16 << 20
MEMORY_MIB = 112
SETTLE_S = 30.0
_ACCESS = 0o3


def must_be_here(scene: Scene) -> None:
    """Skips where there is no Linux guest, or no network for its card."""
    images, script = parts.linux_guest(scene.cluster.config.layout)
    if why := network.obstacle():
        pytest.skip(f"no network namespaces: {why}")
    made = subprocess.run([script, str(images)], capture_output=True, text=True, timeout=400, check=False)
    if not (Path(images) / LINUX_INITRD).is_file():
        pytest.skip(made.stderr.strip())


def linux_guest(scene: Scene, *devices: DeviceSpec, local: bool = True, shared: bool = True) -> Born:
    """One that has promised something on each of its disks."""
    name = secrets.token_hex(4)
    disks = [DiskSpec("root", "fast", f"l-{name}.raw", DiskFormat.RAW, size_bytes=SIZE)] if local else []
    disks += [DiskSpec("data", "shared", f"s-{name}.raw", DiskFormat.RAW, size_bytes=SIZE)] if shared else []
    workload = LinuxWorkload(records_per_s=40, load_mib=4, load_kib_per_s=400, mem_mib=2, pages_per_s=50)
    boot = linux_boot_of(workload, disks=len(disks))
    guest = scene.guest(
        *devices, memory_mib=MEMORY_MIB, machine="q35", disks=disks, nics=(NicSpec("eth0", "lab"),), boot=boot
    )
    scene.reach(lambda: promised(scene, guest) > 5, f"{guest.name} has promised something", 120.0)
    return guest


def promised(scene: Scene, guest: Born) -> int:
    """The newest promise that anybody heard of, from whatever host."""
    logs = consoles(scene.layout, guest.name)
    return max((beat.device_rings for log in logs for beat in log.beats[-1:]), default=0)


def image_of(scene: Scene, disk: DiskSpec, host: str) -> Path:
    """Where the disk's image is, or would be, as that host sees it."""
    pool = scene.layout.shared_pool if disk.pool == "shared" else scene.layout.host(host) / "pools" / disk.pool
    return pool / disk.image


def daemons(scene: Scene, guest: Born) -> dict[str, Identity]:
    """Storage daemons of the guest that are noted down, by host."""
    found: dict[str, Identity] = {}
    for note in scene.layout.hosts.glob(f"*/guests/{guest.uuid[:16]}/storage.note"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            raw = json.loads(note.read_text())
            host = note.relative_to(scene.layout.hosts).parts[0]
            found[host] = Identity(int(raw["pid"]), int(raw["start_time"]))
    return found


def judge_disks(scene: Scene, guest: Born) -> str:
    """No promise was lost, each image has at most one writer, and nothing is left where the guest is not. Returns what
    was found, for people."""
    record = scene.record(guest)
    owner, gone = record.owner.host, record.phase is Ownership.CRASHED
    hosts = (scene.here, scene.there, scene.third)

    def settled() -> bool:
        elsewhere = [host for host in hosts if host != owner]
        left = [d for d in guest.spec.disks if d.pool != "shared" for h in elsewhere if image_of(scene, d, h).exists()]
        return not left and not daemons(scene, guest)

    scene.reach(
        settled, f"{guest.name}: images and daemons where it is not ({owner}, {daemons(scene, guest)})", SETTLE_S
    )
    count = 0 if gone else 1
    told: list[str] = []
    for disk in guest.spec.disks:
        path = image_of(scene, disk, owner)
        now = promised(scene, guest)
        verdict = check(lambda at, size, path=path: _read(path, at, size), seed_of(guest.uuid), now)
        assert verdict.kept, f"{disk.name} on {owner}: {verdict.missing[:5]} of {now} promised records are not there"
        writers = [pid for host in hosts for pid in open_to_write(image_of(scene, disk, host))]
        assert len(set(writers)) == count, f"{disk.name}: written by {writers}"
        told.append(f"{disk.name} {verdict.newest}/{now}")
    scene.reach(
        lambda: {host: len(taps(scene, host)) for host in hosts} == {host: count * (host == owner) for host in hosts},
        f"one tap of {guest.name} on {owner if count else 'no host'}",
        SETTLE_S,
    )
    return ", ".join(told)


def _read(path: Path, at: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(size)


def open_to_write(path: Path) -> Iterator[int]:
    """Processes that have the file open to write."""
    if not path.exists():
        return
    wanted = path.stat()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for entry in os.scandir(process / "fd"):
                with contextlib.suppress(OSError):
                    found = Path(entry.path).stat()
                    if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino) and _writes(process, entry.name):
                        yield int(process.name)


def _writes(process: Path, descriptor: str) -> bool:
    told = (process / "fdinfo" / descriptor).read_text().splitlines()
    flags = next(int(line.split()[1], 8) for line in told if line.startswith("flags:"))
    return flags & _ACCESS != os.O_RDONLY


def taps(scene: Scene, host: str) -> list[str]:
    """Names of the taps of guests on a host, whoever has them open."""
    place = next(place for place in scene.cluster.places.hosts if place.name == host)
    command = command_in(place.namespace, ["ip", "-json", "link", "show"])
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
    return sorted(link["ifname"] for link in json.loads(told) if link.get("ifalias", "").startswith("drover "))
