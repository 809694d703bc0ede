"""A whole move over 1 Gbit/s: 256 MiB of memory that is filled and a local disk of 1 GiB that is written full.

Turn and turn about between the same two hosts of the local cluster, over the same limited link: through the API, the
coordinator and both agents; and by the fewest QMP commands that do the same (an NBD server in the destination's VMM, a
mirror until it is ready, the migration parked, the mirror ended, the rest), with nothing between them.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

from agents.engine.base import DiskFile, EngineError, VmmSpec
from agents.engine.qemu.arguments import disk_nodes
from agents.engine.qemu.engine import QemuEngine
from agents.engine.qemu.vmm import QemuVmm
from deploy.lab.cluster.network import command_in
from deploy.lab.workload import Workload, boot_of
from orchestrator import wire
from orchestrator.core.records import DiskCache, DiskFormat, DiskSpec, GuestSpec, PoolKind
from tests.bench.guests.disks import hosts, over
from tests.bench.guests.registry import Asked, Figure, NotHere, Scene, at_most, beside, spread
from tests.contract.test_engine import image
from tests.integration.handover import scene as lab

MEMORY_MIB, FILLED_MIB = 256, 224
DISK_BYTES = 1 << 30
LINK_BYTES_PER_S = 125_000_000
FULL = Workload(dirty_mib=2, dirty_pages_per_s=200, static_mib=FILLED_MIB)
_FILLED_S = 5.0
"""For the guest to write all of its memory once."""
_BOUND_S = 180.0


def _write_full(path: Path) -> None:
    with path.open("wb") as file:
        for _ in range(DISK_BYTES >> 24):
            file.write(os.urandom(1 << 24))


def _through_us(scene: lab.Scene, guest: lab.Born) -> float:
    began = time.monotonic()
    ended = over(scene, scene.migrate(guest, scene.there))
    took_s = time.monotonic() - began
    if wire.word(ended, "phase") != "SUCCEEDED":
        raise RuntimeError(f"a move ended {wire.word(ended, 'phase')}: {ended.message}")
    for left in (scene.layout.host(scene.here) / "pools" / "fast").glob("*.moved-*"):
        left.unlink()
    return took_s


def _engine(scene: lab.Scene, host: str, directory: Path) -> tuple[QemuEngine, str]:
    """QEMU in that host's network, and the host's address there."""
    place = next(place for place in scene.cluster.places.hosts if place.name == host)
    wrapper = directory / f"qemu-{host}"
    inside = " ".join(command_in(place.namespace, ["qemu-system-x86_64"]))
    wrapper.write_text(f'#!/bin/sh\nexec {inside} "$@"\n')
    wrapper.chmod(0o755)
    return QemuEngine(image(), str(wrapper)), place.address


def _spec(directory: Path, inc: str, path: Path, address: str) -> VmmSpec:
    disk = DiskFile("root", path, DiskFormat.RAW, DiskCache.NONE, False, PoolKind.LOCAL, DISK_BYTES)
    spec = GuestSpec("g", memory_mib=MEMORY_MIB, boot=boot_of(FULL, seed=0))
    made = VmmSpec("bare", inc, spec, directory, directory / f"{inc}.con", None, address)
    return replace(made, disks=(disk,))


async def _with_disk(vmm: QemuVmm, disk: DiskFile) -> None:
    for node in disk_nodes(disk):
        await vmm._execute("blockdev-add", node)
    await vmm._execute("device_add", {"driver": "virtio-blk-pci", "id": "vd", "drive": disk.node})


@asynccontextmanager
async def _pair(scene: lab.Scene, full: Path) -> AsyncIterator[tuple[QemuVmm, QemuVmm, str]]:
    directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="bw-"))
    vmms: list[QemuVmm] = []
    try:
        source_engine, here = _engine(scene, scene.here, directory)
        destination_engine, there = _engine(scene, scene.there, directory)
        empty = directory / "root.raw"
        with empty.open("wb") as file:
            file.truncate(DISK_BYTES)
        source_spec, destination_spec = _spec(directory, "s", full, here), _spec(directory, "d", empty, there)
        source = await source_engine.start(source_spec)
        vmms.append(source)
        await _with_disk(source, source_spec.disks[0])
        await asyncio.sleep(_FILLED_S)
        destination = await destination_engine._spawn(destination_spec, "incoming", "m", 1)
        vmms.append(destination)
        await destination.connect()
        await _with_disk(destination, destination_spec.disks[0])
        yield source, destination, there
    finally:
        for vmm in vmms:
            with suppress(EngineError):
                await vmm.destroy()
        await asyncio.to_thread(shutil.rmtree, directory, True)


async def _until(vmm: QemuVmm, command: str, holds: str) -> None:
    """A status of a job or of the migration, looked at as often as that costs nothing."""
    async with asyncio.timeout(_BOUND_S):
        while True:
            told = await vmm._execute(command)
            now = told if isinstance(told, dict) else (told[0] if told else {"status": "gone"})
            if now.get("status") == holds:
                return
            await asyncio.sleep(0.005)


async def _by_hand(scene: lab.Scene, full: Path) -> float:
    """Seconds of the bare sequence, from the first command to the guest that runs at the destination."""
    async with _pair(scene, full) as (source, destination, there):
        s, d = source._execute, destination._execute
        address = {"type": "inet", "host": there, "port": str(30_000 + secrets.randbelow(20_000))}
        began = time.monotonic()
        flat = {name: value for name, value in address.items() if name != "type"}
        await d("nbd-server-start", {"addr": {"type": "inet", "data": flat}})
        export = {"type": "nbd", "id": "e", "node-name": "disk-root", "name": "root", "writable": True}
        await d("block-export-add", export)
        await source.set_capabilities({"events": True, "return-path": True, "pause-before-switchover": True})
        await destination.set_capabilities({"events": True, "return-path": True})
        await s("migrate-set-parameters", {"max-bandwidth": LINK_BYTES_PER_S, "downtime-limit": 300})
        await d("migrate-incoming", {"uri": f"tcp:{there}:0"})
        stream = (await d("query-migrate"))["socket-address"][0]
        await s("blockdev-add", {"driver": "nbd", "node-name": "copy", "server": address, "export": "root"})
        await s("blockdev-mirror", {"job-id": "m", "device": "disk-root", "target": "copy", "sync": "full"})
        await _until(source, "query-block-jobs", "ready")
        await s("migrate", {"uri": f"tcp:{there}:{stream['port']}"})
        await _until(source, "query-migrate", "pre-switchover")
        await s("block-job-cancel", {"device": "m", "force": False})
        await _until(source, "query-block-jobs", "gone")
        await s("blockdev-del", {"node-name": "copy"})
        await s("migrate-continue", {"state": "pre-switchover"})
        await _until(source, "query-migrate", "completed")
        await _until(destination, "query-migrate", "completed")
        await d("block-export-del", {"id": "e", "mode": "hard"})
        await d("cont")
        return time.monotonic() - began


def _taken(rounds: int) -> tuple[list[float], list[float]]:
    ours, hand = [], []
    with hosts() as scene, tempfile.TemporaryDirectory(prefix="bw-") as kept:
        if no_limit := [note for note in scene.cluster.places.notes if "bandwidth limit" in note]:
            raise NotHere(f"the link would not be one of 1 Gbit/s: {no_limit[0]}")
        full = Path(kept) / "full.raw"
        _write_full(full)
        name = f"w-{secrets.token_hex(4)}.raw"
        shutil.copy(full, scene.layout.host(scene.here) / "pools" / "fast" / name)
        disk = DiskSpec("root", "fast", name, DiskFormat.RAW, size_bytes=DISK_BYTES)
        guest = scene.guest(memory_mib=MEMORY_MIB, workload=FULL, disks=[disk])
        time.sleep(_FILLED_S)
        for _ in range(rounds):
            ours.append(_through_us(scene, guest))
            scene.here, scene.there = scene.there, scene.here
            hand.append(asyncio.run(_by_hand(scene, full)))
        scene.end_guests([guest])
    return ours, hand


async def whole(asked: Asked) -> list[Figure]:
    """6 rounds of the two."""
    ours, hand = await asyncio.to_thread(_taken, asked.many(6))
    name = "whole move of 256 MiB and a local disk of 1 GiB at 1 Gbit/s"
    ratio = statistics.median(a / b for a, b in zip(ours, hand, strict=True))
    found = [
        beside(f"{name}, median", statistics.median(ours), "s", spread(ours)),
        beside("the same by a bare QMP script, median", statistics.median(hand), "s", spread(hand)),
        at_most("through us by the bare script, median of the rounds", ratio, "", 1.05),
    ]
    if shutil.which("virsh") is None:
        found.append(Figure("by virsh migrate --copy-storage-all", None, "", "<= 1", None, "libvirt is not installed"))
    return found


FIGURES = {"disk_whole": Scene(whole, timeout_s=900)}
