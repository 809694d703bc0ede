"""QEMU that somebody else started: what it says of itself, and the machine that would be built in its place.

Its monitor is a socket that serves one client at a time. Who is second connects and is never greeted, so a monitor
without a greeting is one that answers to somebody else. The same connection takes commands out of band.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, cast

from agents.engine.base import PATH_OF, EngineError, MonitorBusy, VmmMetadata, VmmSpec
from agents.engine.qemu import process
from agents.engine.qemu.qmp import QmpConnection
from agents.host import processes

Execute = Callable[..., Awaitable[Any]]

_GREETING_S = 3.0
_ASK_S = 5.0
_TRIAL_S = 20.0
_PERIPHERAL, _ANONYMOUS, _UNATTACHED = "/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"
_QUERIES = (
    "query-version",
    "query-status",
    "query-uuid",
    "query-migrate",
    "query-migrate-capabilities",
    "query-block",
    "query-block-jobs",
    "query-chardev",
    "query-memory-devices",
    "query-fdsets",
)
_OF_THE_MACHINE = ("type", "smp", "memory", "memory-backend")
_OF_A_DEVICE = ("parent_bus", "addr", "netdev", "mac")


async def look_at(pid: int, monitor: Path) -> Mapping[str, Any]:
    """See `AdoptingEngine.look_at`."""
    await asyncio.to_thread(_must_be_free, pid, monitor)
    connection = await _connected(monitor)
    try:
        answers = {name: await connection.execute(name, timeout_s=_ASK_S) for name in _QUERIES}
        answers["accelerator"] = "kvm" if (await connection.execute("query-kvm"))["enabled"] else "tcg"
        answers["own-monitor"] = _label(answers["query-chardev"], pid, monitor)
        return {**answers, **await _shape(connection.execute)}
    finally:
        await connection.close()


def _must_be_free(pid: int, monitor: Path) -> None:
    """Blocking. Raises MonitorBusy, and EngineError when it is not that process that listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
        asked.settimeout(_GREETING_S)
        try:
            asked.connect(str(monitor))
        except OSError as error:
            raise EngineError(f"nothing answers at the monitor {monitor}: {error.strerror or error}") from error
        credentials = asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        listener = struct.unpack("3i", credentials)[0]
        if listener != pid:
            raise EngineError(f"the monitor {monitor} is that of process {listener}, not of {pid}")
        try:
            greeting = asked.recv(64)
        except TimeoutError as error:
            said = "it does not greet: somebody else is connected to it, and it serves one at a time"
            raise MonitorBusy(f"the monitor {monitor} answers to somebody else: {said}") from error
        except OSError as error:
            raise EngineError(f"the monitor {monitor}: {error}") from error
    if not greeting.startswith(b'{"QMP"'):
        raise EngineError(f"{monitor} is no QMP monitor: start QEMU with -qmp unix:PATH,server=on,wait=off")


async def _connected(monitor: Path) -> QmpConnection:
    """The look before has just let go of it, which QEMU may not have noticed yet."""
    for again in (True, True, False):
        connection = QmpConnection("adopted")
        try:
            await connection.connect(monitor, _GREETING_S)
            return connection
        except EngineError as error:
            await connection.close()
            if not again:
                raise MonitorBusy(f"the monitor {monitor} answers to somebody else: {error}") from error
    raise MonitorBusy(f"the monitor {monitor} answers to somebody else")


def _label(chardevs: list[Mapping[str, Any]], pid: int, monitor: Path) -> str:
    """Of the monitor that we are connected to."""
    for each in chardevs:
        where = str(each["filename"]).removeprefix("unix:").split(",")[0]
        with contextlib.suppress(OSError):
            if (Path(f"/proc/{pid}/cwd") / where).samefile(monitor):
                return str(each["label"])
    return ""


async def _shape(execute: Execute) -> dict[str, Any]:
    """The machine as far as it must be the same at both ends."""

    async def get(path: str, name: str) -> Any:
        with contextlib.suppress(EngineError):
            return await execute("qom-get", {"path": path, "property": name}, timeout_s=_ASK_S)
        return None

    async def children(path: str) -> dict[str, str]:
        entries = await execute("qom-list", {"path": path}, timeout_s=_ASK_S)
        return {
            str(each["name"]): str(each["type"])[6:-1] for each in entries if str(each["type"]).startswith("child<")
        }

    devices: dict[str, dict[str, Any]] = {}
    for place in (_PERIPHERAL, _ANONYMOUS):
        for name, kind in (await children(place)).items():
            path = f"{place}/{name}"
            found = {each: await get(path, each) for each in _OF_A_DEVICE}
            devices[path] = {"type": kind, **{each: value for each, value in found.items() if value is not None}}
    unattached = [kind for name, kind in (await children(_UNATTACHED)).items() if name.startswith("device[")]
    cpus = await execute("query-cpus-fast", timeout_s=_ASK_S)
    said = str(await execute("human-monitor-command", {"command-line": "info ramblock"}, timeout_s=_ASK_S))
    machine = {name: value for name in _OF_THE_MACHINE if (value := await get("/machine", name)) is not None}
    words = cast("list[dict[str, object]]", await get(str(cpus[0]["qom-path"]), "feature-words") or [])
    return {
        "machine": machine,
        "devices": devices,
        "unattached": sorted(unattached),
        "ram": ram_blocks(said),
        "features": sorted(str(sorted(word.items())) for word in words),
    }


def ram_blocks(said: str) -> dict[str, int]:
    """Name -> bytes of every piece of memory that a migration sends, from `info ramblock`."""
    found: dict[str, int] = {}
    for line in said.splitlines():
        before, _, sizes = line.strip().partition(" KiB ")
        words = sizes.split()
        if len(words) >= 3 and words[2].startswith("0x"):
            found[before.rpartition(" ")[0].strip()] = int(words[2], 16)
    return found


async def tried_out(command: list[str], spec: VmmSpec) -> Mapping[str, Any]:
    """See `AdoptingEngine.try_out`."""
    child = await processes.spawned(lambda: process.popen_leashed(command, process.log_path(spec)))
    connection: QmpConnection | None = None
    try:
        async with asyncio.timeout(_TRIAL_S):
            while connection is None:
                fresh = QmpConnection("trial")
                try:
                    await fresh.connect(process.qmp_path(spec), 2.0)
                    connection = fresh
                except EngineError:
                    await fresh.close()
                    if child.poll() is not None:
                        words = processes.tail_of(process.log_path(spec))
                        raise EngineError(f"QEMU ended at its start: {words}") from None
                    await asyncio.sleep(0.01)
            return await _shape(connection.execute)
    except TimeoutError as error:
        raise EngineError(f"a QEMU that was tried out did not answer in {_TRIAL_S:g} s") from error
    finally:
        if connection is not None:
            await connection.close()
        await asyncio.to_thread(processes.end_leashed, child)


async def strangers(execute: Execute, metadata: VmmMetadata) -> list[str]:
    """What was plugged in or taken out since it was adopted: the other end is built from the note of then."""
    known = {value for name, value in metadata.extra.items() if name.startswith(PATH_OF)}
    found: set[str] = set()
    for place in (_PERIPHERAL, _ANONYMOUS):
        entries = await execute("qom-list", {"path": place})
        found |= {f"{place}/{each['name']}" for each in entries if str(each["type"]).startswith("child<")}
    more = [f"device {path.rpartition('/')[2]} was added after the guest was adopted" for path in found - known]
    less = [f"device {path.rpartition('/')[2]} was taken out after the guest was adopted" for path in known - found]
    return sorted(more) + sorted(less)
