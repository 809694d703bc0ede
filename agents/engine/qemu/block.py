"""QEMU's half of moving local disks: a mirror into the destination's NBD export, or passes over a dirty bitmap.

Names follow from the disk's: the node `copy-<disk>` is the way to the destination's image, whose id is the export's
name, so that an agent that was restarted reads from QEMU where a mirror goes. A bitmap is called `sync-<inc>` by the
attempt in whose drain it was added.

A target that hangs can stop QEMU itself: with a frozen one it waits in the stop of the guest, its monitor answers
nobody, and the guest stands. Only `yank`, out of band, frees it (docs/storage.md). So QEMU is asked something trivial
as long as it has a target, and one that does not answer is freed by cutting the targets off.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import structlog

from agents.engine import base
from agents.engine.base import EngineError, EngineTimeout
from agents.engine.qemu import tls
from orchestrator.core.disks import SourceSide

log = structlog.get_logger(__name__)

Execute = Callable[..., Awaitable[Any]]
_GUARD_S = 0.25
_POLL_S = 0.01
_ANSWER_S = 1.5
"""A QEMU with a target that does not answer for so long is taken to hang in it: that costs a copy, never a guest."""
_YANK_S = 1.0
_CONNECT_S = 8.0
_OPEN_S = 5
_GRANULARITY_BYTES = 65536
_MIRROR, _PASS, _SYNC = "mirror-", "pass-", "sync-"


def own_job(job: str) -> bool:
    """It moves a disk in a migration of ours, and may outlive the attempt that began it."""
    return job.startswith((_MIRROR, _PASS))


class QemuDisks(base.DiskCopies):
    """The local disks of one VMM on their way. `execute` is QMP's main connection, `yank` the one out of band."""

    def __init__(self, disks: Sequence[base.DiskFile], execute: Execute, yank: Execute, emit: base.EventSink) -> None:
        self._nodes: dict[str, str] = {}
        self._based: frozenset[str] = frozenset()
        self.of(disks)
        self._execute = execute
        self._yank = yank
        self._emit = emit
        self._images: dict[str, str] = {}
        """Disk -> image that its copy node leads to."""
        self._mirrors: set[str] = set()
        self._passes: dict[str, str] = {}
        """Disk -> bitmap that what is left to send is read from, in place of a mirror."""
        self._ends: dict[str, asyncio.Future[str]] = {}
        """Job -> its error, empty for a good end; for jobs that somebody waits for."""
        self._guard: asyncio.Task[None] | None = None
        self._bytes_per_s = 0
        self._sent: dict[str, int] = {}
        self._passed: set[str] = set()
        """Disks whose pass while the guest runs is over; what is written since then goes in the drain."""
        self._before: dict[str, int] = {}
        """Disk -> what its mirror had copied when this attempt found it."""

    def limit(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s

    def sent(self) -> Mapping[str, int]:
        return dict(self._sent)

    async def progress(self) -> Mapping[str, base.DiskCopied]:
        jobs = {}
        if self.connected:
            jobs = {job["device"]: job for job in await self._execute("query-block-jobs")}
        return {disk: self._progress_of(disk, jobs) for disk in self._sent}

    def _progress_of(self, disk: str, jobs: Mapping[str, Mapping[str, Any]]) -> base.DiskCopied:
        job = jobs.get(_MIRROR + disk, jobs.get(_PASS + disk))
        if job is None:
            return base.DiskCopied(self._sent[disk], 0, disk in self._passed or disk not in self._images)
        copied, length = int(job["offset"]), int(job["len"])
        passed = self._sent[disk] if job["device"] == _PASS + disk else -self._before.get(disk, 0)
        return base.DiskCopied(max(0, copied + passed), max(0, length - copied), bool(job.get("ready")))

    def of(self, disks: Sequence[base.DiskFile]) -> None:
        """The VMM has these disks from now on."""
        self._nodes = {disk.name: disk.node for disk in disks if not disk.shared and not disk.read_only}
        self._based = frozenset(disk.name for disk in disks if disk.base is not None)

    @property
    def connected(self) -> bool:
        """There is a target that QEMU could hang in."""
        return bool(self._images)

    async def known(self) -> Mapping[str, SourceSide]:
        if not self._nodes:
            return {}
        nodes = {node["node-name"]: node for node in await self._execute("query-named-block-nodes", {"flat": True})}
        jobs = {job["device"] for job in await self._execute("query-block-jobs")}
        self._mirrors = {disk for disk in self._nodes if _MIRROR + disk in jobs}
        self._images = {disk: _image(nodes[_copy(disk)]) for disk in self._nodes if _copy(disk) in nodes}
        self._watch()
        found: dict[str, SourceSide] = {}
        for disk, node in self._nodes.items():
            bitmaps = _bitmaps(nodes[node]) if node in nodes else ()
            syncs = [str(bitmap["name"]).removeprefix(_SYNC) for bitmap in bitmaps if _is_sync(bitmap)]
            mirrors_to = self._images.get(disk, "") if disk in self._mirrors else ""
            found[disk] = SourceSide(mirrors_to, syncs[-1] if len(syncs) == 1 else "")
        return found

    async def connect_disk(self, target: base.DiskTarget) -> None:
        disk = target.disk
        self._passed.discard(disk)
        self._sent[disk] = self._before[disk] = 0
        if self._images.get(disk) == target.image and disk in self._mirrors:
            return
        await self._disconnect(disk)
        server = {"type": "inet", "host": target.endpoint.ip, "port": str(target.endpoint.port)}
        node: dict[str, object] = {"driver": "nbd", "node-name": _copy(disk), "server": server, "export": target.image}
        node |= await tls.disk_options(self._execute, target.tls)
        self._images[disk] = target.image
        self._watch()
        try:
            await self._execute("blockdev-add", {**node, "open-timeout": _OPEN_S}, timeout_s=_CONNECT_S)
        except EngineError:
            self._images.pop(disk, None)
            raise

    async def start_mirror(self, disk: str) -> None:
        job = _MIRROR + disk
        if disk in self._mirrors:
            states = {each["device"]: each for each in await self._execute("query-block-jobs")}
            if job not in states:
                self._mirrors.discard(disk)
                raise EngineError(f"the mirror of disk {disk} has ended")
            self._before[disk] = int(states[job]["offset"])
            await self._execute("block-job-set-speed", {"device": job, "speed": self._bytes_per_s})
            if states[job].get("ready"):
                self._emit(base.DiskReady(disk))
            return
        await self._drop_bitmaps(disk)
        self._mirrors.add(disk)
        # What lies below the image is at the destination already.
        sync = "top" if disk in self._based else "full"
        arguments = {"job-id": job, "device": self._nodes[disk], "target": _copy(disk), "sync": sync}
        arguments |= {"speed": self._bytes_per_s}
        errors = {"on-source-error": "report", "on-target-error": "report", "copy-mode": "background"}
        try:
            await self._execute("blockdev-mirror", {**arguments, **errors})
        except EngineError:
            self._mirrors.discard(disk)
            raise

    async def increment(self, disk: str, since: str) -> None:
        self._passes[disk] = _SYNC + since
        await self._pass(disk)
        self._passed.add(disk)

    async def drain(self, bound_s: float) -> None:
        self._bytes_per_s = 0  # the guest waits for it
        disks = sorted(self._mirrors | set(self._passes))
        works = [asyncio.ensure_future(self._drained(disk)) for disk in disks]
        try:
            async with asyncio.timeout(bound_s):
                await asyncio.gather(*works)
        except TimeoutError:
            await self.cut()
            raise EngineTimeout(f"disks {', '.join(disks)} were not drained in {bound_s:g} s") from None
        finally:
            for work in works:  # the first failure ends the attempt: nothing of it goes on into the next one
                work.cancel()

    async def _drained(self, disk: str) -> None:
        if disk in self._passes:
            await self._pass(disk)
            del self._passes[disk]
        else:
            job = _MIRROR + disk
            ended = self._end_of(job)
            await self._execute("block-job-set-speed", {"device": job, "speed": 0})
            # Not forced: a mirror that is ready ends with its target equal to its source.
            await self._execute("block-job-cancel", {"device": job, "force": False})
            if error := await ended:
                raise EngineError(f"the mirror of disk {disk} has failed: {error}")
        await self._execute("blockdev-del", {"node-name": _copy(disk)})
        self._images.pop(disk, None)

    async def _pass(self, disk: str) -> None:
        """What the bitmap has; cleared only by a pass that succeeded, so an interrupted one loses nothing."""
        job = _PASS + disk
        while await self._is_job(job):  # noqa: ASYNC110 - of an attempt that was ended before it was over
            await asyncio.sleep(_POLL_S)
        ended = self._end_of(job)
        arguments = {"job-id": job, "device": self._nodes[disk], "target": _copy(disk), "sync": "bitmap"}
        bitmap = {"bitmap": self._passes[disk], "bitmap-mode": "on-success", "on-target-error": "report"}
        arguments |= {"speed": self._bytes_per_s}
        await self._execute("blockdev-backup", {**arguments, **bitmap})
        if error := await ended:
            raise EngineError(f"a pass over disk {disk} has failed: {error}")

    async def _is_job(self, job: str) -> bool:
        return any(each["device"] == job for each in await self._execute("query-block-jobs"))

    async def mark(self, sync: str) -> None:
        actions: list[dict[str, object]] = []
        for disk, node in self._nodes.items():
            actions += [_action("remove", node, bitmap) for bitmap in await self._bitmaps(disk)]
            actions.append(_action("add", node, _SYNC + sync, granularity=_GRANULARITY_BYTES, persistent=False))
        if actions:
            await self._execute("transaction", {"actions": actions})

    async def sizes(self) -> Mapping[str, int]:
        nodes = {node["node-name"]: node for node in await self._execute("query-named-block-nodes", {"flat": True})}
        return {disk: int(nodes[node]["image"]["virtual-size"]) for disk, node in self._nodes.items() if node in nodes}

    async def forget(self) -> None:
        for disk in self._nodes:
            await self._disconnect(disk)
            await self._drop_bitmaps(disk)

    async def _disconnect(self, disk: str) -> None:
        """No job and no node is left. A target that hangs is cut off first, or QEMU would wait for it."""
        self._passes.pop(disk, None)
        nodes = {node["node-name"] for node in await self._execute("query-named-block-nodes", {"flat": True})}
        if _copy(disk) not in nodes:
            self._mirrors.discard(disk)
            self._images.pop(disk, None)
            return
        jobs = {each["device"] for each in await self._execute("query-block-jobs")} & {_MIRROR + disk, _PASS + disk}
        ends = {job: self._end_of(job) for job in jobs}
        self._mirrors.discard(disk)  # its end is our own wish: no failure
        await self.cut(disk)
        for job, ended in ends.items():
            with contextlib.suppress(EngineError):
                await self._execute("block-job-cancel", {"device": job, "force": True})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ANSWER_S):
                    await ended
        await self._execute("blockdev-del", {"node-name": _copy(disk)})
        self._images.pop(disk, None)

    async def _bitmaps(self, disk: str) -> list[str]:
        nodes = await self._execute("query-named-block-nodes", {"flat": True})
        bitmaps = [bitmap for node in nodes if node["node-name"] == self._nodes[disk] for bitmap in _bitmaps(node)]
        return [str(bitmap["name"]) for bitmap in bitmaps if _is_sync(bitmap)]

    async def _drop_bitmaps(self, disk: str) -> None:
        for bitmap in await self._bitmaps(disk):
            await self._execute("block-dirty-bitmap-remove", {"node": self._nodes[disk], "name": bitmap})

    async def cut(self, *disks: str) -> None:
        """Out of band: every target is lost for QEMU, at once. Raises nothing: one that is not there is no trouble."""
        for disk in disks or tuple(self._nodes):
            with contextlib.suppress(EngineError):
                instance = {"type": "block-node", "node-name": _copy(disk)}
                await self._yank("yank", {"instances": [instance]}, timeout_s=_YANK_S, oob=True)

    async def free(self, timeout_s: float) -> None:
        """Cut the targets off if QEMU does not answer in time, before anybody waits for it."""
        if not self.connected:
            return
        try:
            await self._execute("query-status", timeout_s=timeout_s)
        except EngineTimeout:
            log.warning("QEMU hangs with disks on their way: they are cut off", disks=sorted(self._images))
            await self.cut()
        except EngineError:
            return

    def on_event(self, name: str, data: Mapping[str, Any]) -> None:
        """Of a block job."""
        job = str(data.get("device", ""))
        disk = job.removeprefix(_MIRROR)
        if name == "BLOCK_JOB_READY" and disk in self._mirrors:
            self._count(job, int(data.get("offset", 0)))
            self._emit(base.DiskReady(disk))
        if name not in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"):
            return
        self._count(job, int(data.get("offset", 0)))
        error = str(data.get("error", "")) or ("cancelled" if name == "BLOCK_JOB_CANCELLED" else "")
        waited = self._ends.pop(job, None)
        if waited is not None and not waited.done():
            waited.set_result(error)
        if job != disk and disk in self._mirrors:
            self._mirrors.discard(disk)
            if waited is None or error:
                self._emit(base.DiskFailed(disk, error or "the mirror has ended"))

    def _count(self, job: str, copied: int) -> None:
        """A mirror has copied so much by now, or a pass has ended that has."""
        if job.startswith(_PASS):
            disk = job.removeprefix(_PASS)
            self._sent[disk] = self._sent.get(disk, 0) + copied
        elif job.startswith(_MIRROR):
            disk = job.removeprefix(_MIRROR)
            self._sent[disk] = copied - self._before.get(disk, 0)

    def close(self) -> None:
        """Watch no longer; what is under way in QEMU goes on."""
        if self._guard is not None:
            self._guard.cancel()
            self._guard = None

    def _end_of(self, job: str) -> asyncio.Future[str]:
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._ends[job] = ended
        return ended

    def _watch(self) -> None:
        if self.connected and (self._guard is None or self._guard.done()):
            self._guard = asyncio.create_task(self._guarded())

    async def _guarded(self) -> None:
        while self.connected:
            await self.free(_ANSWER_S)
            await asyncio.sleep(_GUARD_S)


def _copy(disk: str) -> str:
    return f"copy-{disk}"


def _image(node: Mapping[str, Any]) -> str:
    return str(node.get("file", "")).rpartition("/")[2]


def _bitmaps(node: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return node.get("dirty-bitmaps", ())


def _is_sync(bitmap: Mapping[str, Any]) -> bool:
    return str(bitmap.get("name", "")).startswith(_SYNC)


def _action(what: str, node: str, bitmap: str, **more: object) -> dict[str, object]:
    return {"type": f"block-dirty-bitmap-{what}", "data": {"node": node, "name": bitmap, **more}}
