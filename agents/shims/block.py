"""The local disks of a guest at its source, within one attempt: brought up to date, drained, marked.

How each is copied, `core.disks` decides from what both ends know. Shared disks have no part in this: their images stay
where they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from agents.engine.base import DiskCopies, DiskFailed, DiskReady, DiskTarget, EngineError, EngineEvent, StreamTls
from orchestrator.core.agent import DiskProgress
from orchestrator.core.disks import Copying, ImageThere, SourceSide, SyncPoint, copying


class DiskTrouble(Exception):
    """One disk cannot be copied; `disk` is its name. The guest is as it was."""

    def __init__(self, disk: str, said: str) -> None:
        super().__init__(f"disk {disk}: {said}")
        self.disk = disk


class SourceDisks:
    """Of one attempt. `inc` names the sync point that its drain makes; `tls` is what they go out by."""

    def __init__(self, copies: DiskCopies, inc: str, tls: StreamTls | None = None) -> None:
        self._tls = tls
        self._copies = copies
        self._inc = inc
        self._ready: dict[str, asyncio.Future[None]] = {}
        self._sizes: Mapping[str, int] = {}
        self._limit = 0
        self.copied: dict[str, Copying] = {}
        """How each was brought up to date, for the report."""

    def heard(self, event: EngineEvent) -> None:
        """What the VMM says of its disks."""
        if not isinstance(event, DiskReady | DiskFailed):
            return
        waiting = self._ready.get(event.disk)
        if waiting is None or waiting.done():
            return
        if isinstance(event, DiskReady):
            waiting.set_result(None)
        else:
            waiting.set_exception(DiskTrouble(event.disk, event.error))

    def limit(self, bytes_per_s: int) -> None:
        """What all of them together may send while the guest runs; 0: no bound."""
        self._limit = bytes_per_s

    @property
    def sent(self) -> Mapping[str, int]:
        """Bytes of each disk that were sent in this attempt; complete once it is drained."""
        return self._copies.sent()

    async def progress(self) -> tuple[DiskProgress, ...]:
        """How far each disk has come; none before it is known how it is copied. Raises EngineError."""
        if not self.copied:
            return ()
        seen = await self._copies.progress()
        return tuple(
            DiskProgress(disk, how, one.copied_bytes, one.remaining_bytes, one.ready)
            for disk, how in sorted(self.copied.items())
            if (one := seen.get(disk)) is not None
        )

    async def sync(self, images: Iterable[ImageThere]) -> None:
        """Every disk is up to date, but for what is being written. Not bounded; cancel it. Raises DiskTrouble."""
        there = {image.disk: image for image in images}
        try:
            known, self._sizes = await self._copies.known(), await self._copies.sizes()
        except EngineError as error:
            raise DiskTrouble(",".join(sorted(there)), str(error)) from error
        for disk in known:
            if disk not in there:
                raise DiskTrouble(disk, "the destination has no image for it")
        if known and self._limit:
            self._copies.limit(max(1, self._limit // len(known)))
        works = [asyncio.ensure_future(self._synced(disk, known[disk], there[disk])) for disk in known]
        try:
            await asyncio.gather(*works)
        finally:
            for work in works:  # the first failure ends the attempt: no other disk goes on into the next one
                work.cancel()

    async def _synced(self, disk: str, here: SourceSide, there: ImageThere) -> None:
        if there.size_bytes != self._sizes[disk]:
            said = f"it has {self._sizes[disk]} bytes here, and its image at the destination {there.size_bytes}"
            raise DiskTrouble(disk, said)
        how = self.copied[disk] = copying(here, there.side)
        try:
            await self._copies.connect_disk(DiskTarget(disk, there.side.image, there.endpoint, self._tls))
            if how is Copying.INCREMENT:
                await self._copies.increment(disk, here.since)
                return
            self._ready[disk] = asyncio.get_running_loop().create_future()
            await self._copies.start_mirror(disk)
            await self._ready[disk]
        except EngineError as error:
            raise DiskTrouble(disk, str(error)) from error
        finally:
            self._ready.pop(disk, None)

    async def drain(self, bound_s: float) -> tuple[SyncPoint, ...]:
        """The guest stands still: the rest is sent, and what is written from here on is noted. Raises DiskTrouble."""
        try:
            await self._copies.drain(bound_s)
            await self._copies.mark(self._inc)
        except EngineError as error:
            raise DiskTrouble(",".join(sorted(self._sizes)), str(error)) from error
        return tuple(SyncPoint(disk, self._inc, size) for disk, size in sorted(self._sizes.items()))
