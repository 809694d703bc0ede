"""The local disks of a guest that is to come here: images, and the daemon through which its source fills them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import structlog

from agents.disks.daemon import DiskDaemon, open_daemon
from agents.disks.images import DiskError, Images
from agents.engine.base import DiskFile, StreamTls
from orchestrator.core.disks import DestinationSide, ImageThere, SyncPoint
from orchestrator.core.endpoint import Endpoint

log = structlog.get_logger(__name__)


def images_of(directory: Path) -> Images:
    """What is known of the images of the guest whose directory this is."""
    return Images(directory / "storage.images")


def local(disks: Sequence[DiskFile]) -> tuple[DiskFile, ...]:
    """Those whose content travels with their guest."""
    return tuple(disk for disk in disks if not disk.shared and not disk.read_only)


class LocalImages:
    """Of one guest at this host; outlives copies and attempts. All calls raise DiskError and may be repeated."""

    def __init__(self, directory: Path, disks: Sequence[DiskFile], listen_ip: str, ip: str = "") -> None:
        """`ip`: what other hosts reach `listen_ip` by, where that is not the same."""
        self._directory = directory
        self._disks = local(disks)
        self._listen_ip = listen_ip
        self._ip = ip or listen_ip
        self._images = images_of(directory)
        self._daemon: DiskDaemon | None = None

    async def ready(self, tls: StreamTls | None = None) -> None:
        """Every disk has an image that its source can write to, and with `tls` nobody else: the one of an attempt
        before, if it is worth anything, or a new one."""
        daemon, exported = await self._answering(tls)
        if tls is not None:
            await daemon.only_from(tls)
        for disk in self._disks:
            known = self._images.known().get(disk.name)
            if known is not None and known.image in exported:
                continue
            if known is None or not known.is_whole or not disk.path.exists():
                known = await self._images.made(disk)
            await asyncio.to_thread(self._images.opened, disk.name)
            await daemon.export(disk, known.image)

    async def _answering(self, tls: StreamTls | None) -> tuple[DiskDaemon, frozenset[str]]:
        """The daemon, and what it exports. One that is dead, or that does not answer, is ended, and another is started:
        what the first had open is made anew."""
        if self._daemon is not None and self._daemon.secure != (tls is not None):
            await self._ended()
        daemon = self._daemon = self._daemon or await open_daemon(self._directory, self._listen_ip, self._disks, tls)
        try:
            return daemon, await daemon.exported()
        except DiskError as error:
            log.warning(
                "a storage daemon does not answer: it is ended", directory=str(self._directory), error=str(error)
            )
        await self._ended()
        daemon = self._daemon = await open_daemon(self._directory, self._listen_ip, self._disks, tls)
        return daemon, await daemon.exported()

    def there(self) -> tuple[ImageThere, ...]:
        """What the source has to know. After `ready`."""
        if self._daemon is None:
            raise DiskError("nobody takes the disks")
        known = self._images.known()
        endpoint = Endpoint(self._ip, self._daemon.endpoint.port)
        return tuple(
            ImageThere(disk.name, DestinationSide(image.image, image.since), image.size_bytes, endpoint)
            for disk in self._disks
            if (image := known.get(disk.name)) is not None
        )

    async def release(self, points: Sequence[SyncPoint]) -> tuple[SyncPoint, ...]:
        """The source has drained them: they are closed, and the guest's own. Returns what is there now."""
        if self._daemon is None:
            raise DiskError("nobody has written the disks")
        known = self._images.known()
        for point in points:
            image = known[point.disk]
            if image.since != point.sync or image.written:
                await self._daemon.release(point.disk, image.image)
                self._images.released([point.disk], point.sync)
        now = self._images.known()
        return tuple(SyncPoint(point.disk, now[point.disk].since, now[point.disk].size_bytes) for point in points)

    async def finish(self) -> None:
        """The guest runs here: its images are its own."""
        await self._ended()
        self._images.forget()

    async def discard(self) -> None:
        """It goes elsewhere: nothing of it is left here. Raises OSError as well."""
        await self._ended()
        await asyncio.to_thread(self._images.discard)

    @property
    def anything(self) -> bool:
        """Something was made here for a guest that was to come."""
        return self._images.noted or (self._directory / "storage.note").exists()

    async def detach(self) -> None:
        """Leave the daemon to a later agent."""
        if self._daemon is not None:
            await self._daemon.detach()
            self._daemon = None

    async def _ended(self) -> None:
        daemon, self._daemon = self._daemon or await DiskDaemon.adopt(self._directory), None
        if daemon is not None:
            await daemon.destroy()
