"""The process that writes a guest's local images at its destination: qemu-storage-daemon, one per guest and host.

It outlives attempts, VMMs and the agent, as a device process does: an abort replaces the waiting VMM, and the source's
mirrors go on. It ends when the guest runs here, or goes elsewhere. Its NBD server takes one connection for each disk,
and each export has the id of its image as its name; see docs/storage.md for what that does not protect from.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Generator, Sequence
from pathlib import Path

from agents.disks.images import DiskError
from agents.engine.base import DiskFile, EngineError, StreamTls
from agents.engine.qemu import tls as secure
from agents.engine.qemu.qmp import QmpConnection
from agents.host.processes import Watched, gated, let_in, note_down, spawned, tail_of
from agents.host.scopes import scoped
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.liveness import Liveness, LivenessUnknown
from orchestrator.core.records import DiskCache

_PROGRAM = "qemu-storage-daemon"
_START_S = 8.0
_END_S = 5.0
_RELEASE_S = 5.0
_MAX_SOCKET_PATH = 107
_STRANGERS = 64
"""Connections beside those of the disks, where strangers are turned away: QEMU counts them until they are, which takes
it ten seconds for one that says nothing."""


class DiskDaemon:
    """Handle to the process; see the module. Every call is bounded and raises DiskError."""

    def __init__(self, directory: Path, watched: Watched, endpoint: Endpoint, *, secure: bool = False) -> None:
        self.secure = secure
        """It lets in nobody without the certificate of its sender."""
        self._directory = directory
        self._process = watched
        self._qmp = QmpConnection("disks", None)
        self.endpoint = endpoint
        """Where its NBD server listens."""

    @classmethod
    async def start(cls, directory: Path, ip: str, disks: int, tls: StreamTls | None = None) -> DiskDaemon:
        """One that listens at `ip` and exports nothing yet; with `tls` only one sender is let in. Raises DiskError; no
        process is left then."""
        if len(os.fsencode(_path(directory, "qmp"))) > _MAX_SOCKET_PATH:
            raise DiskError(f"{_path(directory, 'qmp')}: too long for a socket, use a shorter state directory")
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        try:
            with socket.create_server((ip, 0), family=family, backlog=disks + 1) as listening:
                port = int(listening.getsockname()[1])
                child = await spawned(lambda: _spawn(directory, listening.fileno(), disks, tls))
        except OSError as error:
            raise DiskError(f"cannot listen at {ip} for disks: {error}") from error
        try:
            watched, start_time = await Watched.adopt_child(child)
        except LivenessUnknown as error:
            raise DiskError(f"{_PROGRAM} cannot be watched, and was ended: {error}") from error
        started = cls(directory, watched, Endpoint(ip, port), secure=tls is not None)
        try:
            note = {"pid": child.pid, "start_time": start_time, "ip": ip, "port": port, "tls": tls is not None}
            note_down(_path(directory, "note"), note)
            let_in(child)
            await started._connected(_START_S)
        except (OSError, DiskError) as error:
            words = tail_of(_path(directory, "log"))
            await started.destroy()
            raise DiskError(f"{_PROGRAM} did not start: {error} {words}".strip()) from error
        return started

    @classmethod
    async def adopt(cls, directory: Path) -> DiskDaemon | None:
        """The one that an earlier agent started here. None: there is none, or it is gone, or it did not answer and was
        ended."""
        try:
            note = json.loads(_path(directory, "note").read_text())
            watched = Watched.find(int(note["pid"]), int(note["start_time"]))
            endpoint = Endpoint(note["ip"], int(note["port"]))
        except FileNotFoundError:
            await _end_unnoted(directory)
            return None
        except (OSError, ValueError, KeyError, TypeError, LivenessUnknown) as error:
            raise DiskError(f"{_path(directory, 'json')}: the note of a storage daemon: {error}") from error
        if watched is None:
            return None
        found = cls(directory, watched, endpoint, secure=bool(note.get("tls")))
        try:
            await found._connected(_START_S / 2)
        except DiskError:  # of no use to anybody: what it has open is made anew
            await found.destroy()
            return None
        return found

    def liveness(self) -> Liveness:
        """Of the process."""
        return self._process.liveness()

    async def exported(self) -> frozenset[str]:
        """Ids of the images that can be written to now."""
        with _as_disk_error("exports"):
            return frozenset(str(each["id"]) for each in await self._qmp.execute("query-block-exports"))

    async def only_from(self, tls: StreamTls) -> None:
        """From now on only that sender. Raises DiskError."""
        with _as_disk_error("its sender"):
            await secure.anew(self._qmp.execute, secure.sender(tls, secure.NBD_CLIENT))

    async def export(self, disk: DiskFile, image: str) -> None:
        """Open the disk's image and let one connection write to it, under the name `image`. Raises DiskError."""
        await self.release(disk.name, image)  # what is left of one that was given up in the middle
        direct = disk.cache is DiskCache.NONE
        cache: dict[str, object] = {"direct": direct, "no-flush": False}
        node: dict[str, object] = {"driver": disk.format.value, "node-name": f"n-{disk.name}", "cache": cache}
        node["file"] = {"driver": "file", "filename": str(disk.path), "cache": cache, "discard": "unmap"}
        node["discard"] = "unmap"
        if disk.base is not None:
            below = {"driver": "file", "filename": str(disk.base), "cache": cache, "read-only": True}
            node["backing"] = {"driver": disk.base_format.value, "file": below, "cache": cache, "read-only": True}
        export = {"type": "nbd", "id": image, "node-name": f"n-{disk.name}", "name": image, "writable": True}
        with _as_disk_error(f"disk {disk.name}"):
            await self._qmp.execute("blockdev-add", node)
            await self._qmp.execute("block-export-add", export)

    async def release(self, disk: str, image: str) -> None:
        """Nobody writes to it any more, everything is in the file, and it is open to others. Raises DiskError."""
        with _as_disk_error(f"disk {disk}"):
            if image in await self.exported():
                await self._qmp.execute("block-export-del", {"id": image, "mode": "hard"})
            async with asyncio.timeout(_RELEASE_S):
                while image in await self.exported():  # noqa: ASYNC110 - the event tells no more
                    await asyncio.sleep(0.002)
            nodes = {node["node-name"] for node in await self._qmp.execute("query-named-block-nodes", {"flat": True})}
            if f"n-{disk}" in nodes:
                await self._qmp.execute("blockdev-del", {"node-name": f"n-{disk}"}, timeout_s=_RELEASE_S)

    async def destroy(self) -> None:
        """It has ended, and so has what it wrote. Idempotent. Raises DiskError when it does not end."""
        if self.liveness() is not Liveness.GONE:
            with contextlib.suppress(EngineError):
                await self._qmp.execute("quit", timeout_s=1.0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._process.dead.wait()
        self._process.kill()
        if self.liveness() is not Liveness.GONE:
            try:
                async with asyncio.timeout(_END_S):
                    await self._process.dead.wait()
            except TimeoutError:
                raise DiskError(f"{_PROGRAM} {self._process.pid} was killed and has not ended") from None
        await self.detach()
        for suffix in ("qmp", "log", "note", "note.tmp"):
            _path(self._directory, suffix).unlink(missing_ok=True)

    async def detach(self) -> None:
        """Leave it to a later agent."""
        await self._qmp.close()
        self._process.close()

    async def _connected(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    with contextlib.suppress(EngineError):
                        await self._qmp.connect(_path(self._directory, "qmp"), 2.0)
                        return
                    if self.liveness() is Liveness.GONE:
                        raise DiskError(tail_of(_path(self._directory, "log")) or "it has ended")
                    await self._qmp.close()
                    self._qmp = QmpConnection("disks", None)
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise DiskError(f"no answer in {timeout_s:g} s") from None


async def open_daemon(directory: Path, ip: str, disks: Sequence[DiskFile], tls: StreamTls | None = None) -> DiskDaemon:
    """The daemon that runs for this guest, or a new one; one that lets in others than it has to is ended. Raises
    DiskError."""
    found = await DiskDaemon.adopt(directory)
    if found is not None and found.secure == (tls is not None):
        return found
    if found is not None:
        await found.destroy()
    return await DiskDaemon.start(directory, ip, len(disks), tls)


async def _end_unnoted(directory: Path) -> None:
    """One whose note is lost would hold its port for ever. Raises nothing: without an answer there is none, or the next
    start says what is in its way."""
    qmp = QmpConnection("disks", None)
    with contextlib.suppress(EngineError):
        await qmp.connect(_path(directory, "qmp"), 1.0)
        await qmp.execute("quit", timeout_s=1.0)
    await qmp.close()


def _path(directory: Path, suffix: str) -> Path:
    return directory / f"storage.{suffix}"


@contextlib.contextmanager
def _as_disk_error(what: str) -> Generator[None]:
    try:
        yield
    except (EngineError, TimeoutError) as error:
        raise DiskError(f"{what}: {error or 'no end in time'}") from error


def _spawn(directory: Path, descriptor: int, disks: int, tls: StreamTls | None) -> subprocess.Popen[bytes]:
    """One that begins once it is noted down (`let_in`). Blocking. The session of its own lets it outlive this process.

    Raises DiskError.
    """
    if shutil.which(_PROGRAM) is None:
        raise DiskError(f"there is no program {_PROGRAM}: install qemu-system-common")
    monitor = f"socket,id=qmp,path={str(_path(directory, 'qmp')).replace(',', ',,')},server=on,wait=off"
    server = f"addr.type=fd,addr.str={descriptor},max-connections={disks if tls is None else disks + _STRANGERS}"
    command = [_PROGRAM, "--chardev", monitor, "--monitor", "chardev=qmp"]
    if tls is not None:
        objects = (secure.server_credentials(tls, secure.NBD_SERVER), secure.sender(tls, secure.NBD_CLIENT))
        command += [word for each in objects for word in ("--object", json.dumps(each))]
        server += f",tls-creds={secure.NBD_SERVER},tls-authz={secure.NBD_CLIENT}"
    command += ["--nbd-server", server]
    with _path(directory, "log").open("ab") as log:
        try:
            return subprocess.Popen(
                gated(scoped(command, directory.name, "storage")),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(descriptor,),
            )
        except OSError as error:
            raise DiskError(f"cannot run {_PROGRAM}: {error}; install qemu-system-common") from error
