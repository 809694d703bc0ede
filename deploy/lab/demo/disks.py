"""The Linux guests' disks after the cluster has gone: images set aside, and every promise looked for in them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.lab.cluster.layout import Layout
from deploy.lab.cluster.parts import SHARED_POOL
from deploy.lab.linux_guest.image import Verdict, check, seed_of
from orchestrator.core.records import DiskFormat, DiskSpec

CONVERT_S = 60.0


@dataclass(frozen=True, slots=True)
class Taken:
    """One disk's image. `raw` is None when it could not be taken, and then `why` says so."""

    pool: str
    raw: Path | None
    why: str = ""


def take(layout: Layout, owner: str, guest: str, disks: Sequence[DiskSpec], into: Path) -> tuple[Taken, ...]:
    """Copies of the images at the guest's owner, as raw files in a directory that is there."""
    return tuple(_taken(layout, owner, guest, disk, into) for disk in disks)


def _taken(layout: Layout, owner: str, guest: str, disk: DiskSpec, into: Path) -> Taken:
    pool = layout.shared_pool if disk.pool == SHARED_POOL else layout.local_pool(owner)
    image, raw = pool / disk.image, into / f"{guest}.{disk.name}.raw"
    try:
        if disk.format is DiskFormat.RAW:
            shutil.copyfile(image, raw)
        else:
            command = ["qemu-img", "convert", "-f", disk.format.value, "-O", "raw", str(image), str(raw)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=CONVERT_S)
    except subprocess.CalledProcessError as error:
        return Taken(disk.pool, None, str(error.stderr).strip()[-200:])
    except (OSError, subprocess.TimeoutExpired) as error:
        return Taken(disk.pool, None, str(error))
    return Taken(disk.pool, raw)


def judge(taken: Taken, uuid: str, promised: int) -> Verdict | None:
    """Of one image, given the newest promise that was heard; None: there is none to judge."""
    if taken.raw is None:
        return None
    with taken.raw.open("rb") as file:

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        return check(read, seed_of(uuid), promised)
