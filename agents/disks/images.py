"""The images of a guest's local disks on this host: made for a copy that comes, taken out of use when it has gone.

What is known of them stands in a note in the guest's directory: an image that it does not name is somebody else's, and
is never touched. An image is worth something to a later attempt only from its release on, and once it is
opened again only as long as its writer lives: a note that says otherwise would be believed by a source (H16).
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from agents.engine.base import DiskFile
from agents.host.commands import CommandFailed, ran
from orchestrator.core.naming import MOVED_AWAY
from orchestrator.whole import write_whole

_TOOL = "qemu-img"
_MAKE_S = 30.0
_MOVED = ".moved-"


class DiskError(Exception):
    """An image, or who writes it, is not as it has to be; the text says what to do. Nothing was lost by it."""


@dataclass(frozen=True, slots=True)
class Image:
    """One image that was made here for a copy that comes."""

    image: str
    """Fresh for each that is made; its NBD export is called so too."""
    path: str
    size_bytes: int
    since: str = ""
    """The sync point that it was released at last."""
    written: bool = False
    """Somebody has it open to write: its content hangs on whether he closes it."""

    @property
    def is_whole(self) -> bool:
        """What it had at `since` is in the file. Otherwise it is worth nothing without its writer."""
        return bool(self.since) and not self.written


class Images:
    """Of one guest. `note` is the file that says what they are; it may not be there."""

    def __init__(self, note: Path) -> None:
        self._note = note

    def known(self) -> dict[str, Image]:
        """By disk. Raises DiskError for a note that cannot be read: nothing is made or removed then."""
        try:
            return {disk: Image(**each) for disk, each in json.loads(self._note.read_text()).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DiskError(f"{self._note}: what is known of the guest's images cannot be read: {error}") from error

    @property
    def noted(self) -> bool:
        """There is a note."""
        return self._note.exists()

    async def made(self, disk: DiskFile) -> Image:
        """A new, empty image in place of one that was made here before. Raises DiskError."""
        known = self.known()
        if disk.path.exists() and (disk.name not in known or known[disk.name].path != str(disk.path)):
            raise DiskError(
                f"disk {disk.name}: {disk.path} is there already and was not made for this guest's move: "
                "take it away, or give the disk another image name"
            )
        if disk.size_bytes <= 0:
            raise DiskError(f"disk {disk.name}: its size is not known here; say it in the guest's file (size)")
        image = Image(f"i{uuid.uuid4().hex}", str(disk.path), disk.size_bytes)
        self._write({**known, disk.name: image})
        await asyncio.to_thread(disk.path.unlink, missing_ok=True)  # of a large file it takes seconds
        try:
            await make(disk, disk.path, timeout_s=_MAKE_S)
        except CommandFailed as error:
            raise DiskError(f"disk {disk.name}: its image cannot be made: {error}") from error
        return image

    def opened(self, disk: str) -> Image:
        """It is about to be written to: from here on its content hangs on whoever writes it. Raises DiskError.

        Blocking: the note is on the disk when this returns. A host that lost power meanwhile would say that the image
        is whole, while its source has forgotten what it sent into it since (H16).
        """
        known = self.known()
        self._write({**known, disk: replace(known[disk], written=True)}, durable=True)
        return known[disk]

    def is_for_another(self, disk: DiskFile, inc: str) -> bool:
        """At the disk's place is an image that was made for a copy to come, and not the one that `inc` arrived with.
        Raises DiskError."""
        image = self.known().get(disk.name)
        return image is not None and image.path == str(disk.path) and (image.written or image.since != inc)

    def released(self, disks: Iterable[str], since: str) -> None:
        """Their writer has closed them at this sync point. Raises DiskError."""
        names = frozenset(disks)
        known = self.known().items()
        self._write(
            {disk: replace(each, since=since, written=False) if disk in names else each for disk, each in known}
        )

    def discard(self) -> None:
        """The guest goes elsewhere: what was made for it here is removed. Idempotent. Blocking.

        Raises DiskError, OSError.
        """
        for image in self.known().values():
            Path(image.path).unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        """They are the guest's own images now, or nobody's. Idempotent."""
        self._note.unlink(missing_ok=True)

    def _write(self, known: dict[str, Image], *, durable: bool = False) -> None:
        note = {disk: asdict(image) for disk, image in known.items()}
        try:
            write_whole(self._note, json.dumps(note).encode(), durable=durable)
        except OSError as error:
            raise DiskError(f"{self._note}: cannot note the guest's images: {error}") from error


async def make(disk: DiskFile, path: Path, *, timeout_s: float) -> None:
    """An empty image at `path` as the disk is described: nothing of what it lies on is in it. Raises CommandFailed."""
    below: list[str] = []
    if disk.base is not None:  # by its name alone: the pool has another path on each host
        below = ["-b", disk.base.name, "-F", disk.base_format.value]
    command = [_TOOL, "create", "-q", "-f", disk.format.value, *below, str(path), str(disk.size_bytes)]
    await ran(*command, timeout_s=timeout_s)


async def base_of(image: Path) -> str:
    """Name of the image that this one lies on, as it says itself; empty: on nothing. Raises CommandFailed."""
    told = json.loads(await ran(_TOOL, "info", "-U", "-f", "qcow2", "--output=json", str(image), timeout_s=_MAKE_S))
    return str(told.get("backing-filename", "")).rpartition("/")[2]


def retire(path: Path, inc: str) -> Path | None:
    """The guest has gone with what this image had: it gets another name at once and is removed later (`sweep`).

    Idempotent: returns None when it is not there. Raises OSError.
    """
    away = path.with_name(f"{path.name}{_MOVED}{inc[:8]}")
    try:
        path.rename(away)
    except FileNotFoundError:
        return None
    _stamp(away)
    return away


def sweep(pool: Path, grace_s: float) -> list[Path]:
    """Remove images that were taken out of use at least `grace_s` ago; returns them. Raises OSError.

    The stamp is a time of this machine since its start: no wall clock that was set removes what somebody may still
    want. After a restart it makes an image look younger than it is, or its time of grace begins anew.
    """
    over: list[Path] = []
    for path in pool.glob(f"*{_MOVED}*"):
        if not MOVED_AWAY.fullmatch(path.name):
            continue
        age_s = uptime_s() - path.stat().st_mtime
        if age_s < 0:
            _stamp(path)
        elif age_s >= grace_s:
            path.unlink(missing_ok=True)
            over.append(path)
    return over


def uptime_s() -> float:
    """Since this machine was started, asleep or not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _stamp(path: Path) -> None:
    now_s = uptime_s()
    os.utime(path, (now_s, now_s))
