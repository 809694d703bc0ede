"""The console collector: stamps what the guests say, so that evidence does not rest on our own logs.

`python -m orchestrator.local.collector --dir DIR` is one process per cluster. It connects to each VMM's serial socket
`console/<host>.<guest>.<inc>.sock` as it appears and appends to `serial/<host>.<guest>.<inc>.log` one line per line of
the guest, `<monotonic_ns> <text>`, stamped when its first byte arrived. Lines of its own between them:

    CONNECTED     lines follow; what the VMM said before is lost
    EOF           the VMM closed the console
    DETACHED      the collector ended (a new one goes on in the same file)
    TORN <text>   a connection ended within this line
    LAG <ms>      the collector got no CPU: stamps within the last <ms> may be late

A guest's line that looks like one of these is written with `? ` before it. It answers on `collector.sock`
(console_client.py): list the consoles, send text to a guest, ask and wait for an answer, show the last lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import click

from orchestrator.local.evidence import Vmm
from orchestrator.local.layout import Layout, LocalClusterError

SCAN_S = 0.02
FLUSH_S = 0.05
LAG_MS = 5
"""Below this the collector's own delay is not worth a line: evidence.TOLERANCE_NS allows for it."""
GATHER_S = 0.004
"""QEMU hands over a line byte by byte; one that has begun is left alone for up to this long and then read in one go."""
RETRY_FIRST_S, RETRY_MOST_S = 0.02, 1.0
CONNECT_TIMEOUT_S = 1.0
ASK_MOST_S = 600.0
LINE_MOST_BYTES = 4096
UNWRITTEN_MOST_BYTES = 4 << 20
RECENT_LINES = 200
ENDED_KEPT = 500

OWN_WORDS = ("CONNECTED", "EOF", "DETACHED", "TORN", "LAG")

log = logging.getLogger("collector")


class LineFile:
    """Appends stamped lines to one file, gathered until `flush`. Never truncates, never raises."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None
        self._unwritten = bytearray()
        self._failing = False

    def add(self, ns: int, text: str) -> None:
        if len(self._unwritten) < UNWRITTEN_MOST_BYTES:
            self._unwritten += f"{ns} {text}\n".encode("ascii", "backslashreplace")

    def flush(self) -> None:
        """Hand over to the kernel what is gathered. A full disk keeps it in memory, bounded, for the next time."""
        if not self._unwritten:
            return
        try:
            if self._fd is None:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
                self._end_cut_line()
            del self._unwritten[: os.write(self._fd, self._unwritten)]
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.error("cannot write %s: %s", self._path, error)
            self._failing = True

    def close(self) -> None:
        self.flush()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _end_cut_line(self) -> None:
        """A predecessor that was killed may have left half a line; nothing may be glued to it."""
        with contextlib.suppress(OSError), self._path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read(1) != b"\n":
                self._unwritten[:0] = b"\n"


class Resting:
    """Connections that are not read for a moment. They wake together: one timer for all of them."""

    def __init__(self) -> None:
        self._transports: list[asyncio.Transport] = []

    def add(self, transport: asyncio.Transport) -> None:
        if not self._transports:
            asyncio.get_running_loop().call_later(GATHER_S, self._wake)
        self._transports.append(transport)

    def _wake(self) -> None:
        transports, self._transports = self._transports, []
        for transport in transports:
            if not transport.is_closing():
                transport.resume_reading()


class Console(asyncio.BufferedProtocol):
    """One VMM's console: its connection, its file and what it said last."""

    def __init__(
        self, vmm: Vmm, file: LineFile, resting: Resting, on_line: Callable[[Console, int, str], None]
    ) -> None:
        self.vmm = vmm
        self.file = file
        self.recent: deque[tuple[int, str]] = deque(maxlen=RECENT_LINES)
        self.inode = 0
        self.connecting = False
        self.next_try_s = 0.0
        self.retry_s = RETRY_FIRST_S
        self._on_line = on_line
        self._resting = resting
        self._transport: asyncio.Transport | None = None
        self._buffer = memoryview(bytearray(LINE_MOST_BYTES))
        self._partial = bytearray()
        self._partial_ns = 0
        self._leaving = False

    @property
    def connected(self) -> bool:
        return self._transport is not None

    @property
    def last_ns(self) -> int:
        return self.recent[-1][0] if self.recent else 0

    def send(self, text: str) -> None:
        assert self._transport, "only connected consoles are chosen"
        self._transport.write(text.encode("ascii", "replace"))

    def mark(self, text: str) -> None:
        """Write a line of the collector's own."""
        self.file.add(time.monotonic_ns(), text)

    def leave(self) -> None:
        """The collector ends: close without claiming that the VMM did."""
        self._leaving = True
        if self._transport:
            self._transport.abort()

    def put_off(self) -> None:
        """The VMM does not answer: try again later and later."""
        self.next_try_s = time.monotonic() + self.retry_s
        self.retry_s = min(self.retry_s * 2, RETRY_MOST_S)

    # --- asyncio.BufferedProtocol: an ordinary one costs a fresh buffer of 256 KiB for each read

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._partial.clear()
        self.mark("CONNECTED")

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        now = time.monotonic_ns()
        data = bytes(self._buffer[:nbytes])
        if not self._partial:
            self._partial_ns = now
        self._partial += data
        if b"\n" in data:
            stamp = self._partial_ns
            *lines, self._partial = self._partial.split(b"\n")
            for line in lines:
                self._take(stamp, line)
                stamp = now
            self._partial_ns = now
            self.retry_s = RETRY_FIRST_S
        elif len(self._partial) > LINE_MOST_BYTES:
            self._end_torn()
        if self._partial:
            self._gather()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_torn()
        self.mark("DETACHED" if self._leaving else "EOF")
        self.file.close()
        self._transport = None
        self.put_off()

    def _take(self, ns: int, line: bytearray) -> None:
        text = line.decode("ascii", "backslashreplace").rstrip("\r")
        if not text.isprintable():
            text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
        if text.startswith(OWN_WORDS):
            text = "? " + text
        self.file.add(ns, text)
        self.recent.append((ns, text))
        self._on_line(self, ns, text)

    def _end_torn(self) -> None:
        if self._partial:
            text = self._partial.decode("ascii", "backslashreplace")
            self.file.add(self._partial_ns, "TORN " + "".join(c if c.isprintable() else "?" for c in text))
            self._partial.clear()

    def _gather(self) -> None:
        """Sleep through the bytes of a line that has begun: its stamp is taken, and each byte read would cost."""
        if self._transport and self._transport.is_reading():
            self._transport.pause_reading()
            self._resting.add(self._transport)


@dataclass(slots=True)
class _Waiter:
    guest: str
    prefix: str
    answer: asyncio.Future[tuple[Console, int, str]]


@dataclass(slots=True)
class BadRequestError(Exception):
    """What is wrong with a request, for whoever sent it."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(slots=True)
class Collector:
    """All consoles of one cluster. `run` until cancelled or `stop`ped."""

    layout: Layout
    consoles: dict[str, Console] = field(default_factory=dict[str, Console])
    _refused: set[str] = field(default_factory=set[str])
    _waiters: list[_Waiter] = field(default_factory=list[_Waiter])
    _resting: Resting = field(default_factory=Resting)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def socket(self) -> Path:
        return self.layout.dir / "collector.sock"

    def stop(self) -> None:
        self._stop.set()

    async def run(self) -> None:
        """Collect until `stop`. Then everything is written and closed; sockets of the VMMs are left as they are."""
        self.layout.console.mkdir(parents=True, exist_ok=True)
        self.layout.serial.mkdir(parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)  # ours: the lock is held
        server = await asyncio.start_unix_server(self._serve, self.socket)
        self.socket.chmod(0o600)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._scan(group)), group.create_task(self._flush())]
                await self._stop.wait()
                for task in tasks:
                    task.cancel()
        finally:
            server.close()
            self.socket.unlink(missing_ok=True)
            for console in self.consoles.values():
                console.leave()
            await asyncio.sleep(0)  # the transports tell of their end in the next turn of the loop
            for console in self.consoles.values():
                console.file.close()

    # --- finding and reading consoles

    async def _scan(self, group: asyncio.TaskGroup) -> None:
        while True:
            try:
                present = {entry.name: entry.inode() for entry in os.scandir(self.layout.console)}
            except OSError as error:
                log.error("cannot read %s: %s", self.layout.console, error)
                present = {}
                await asyncio.sleep(1)
            for name, inode in present.items():
                self._see(name, inode, group)
            self._forget(present)
            await asyncio.sleep(SCAN_S)

    def _see(self, name: str, inode: int, group: asyncio.TaskGroup) -> None:
        console = self.consoles.get(name)
        if console is None:
            vmm = Vmm.of_file(name) if name.endswith(".sock") else None
            if vmm is None:
                if name not in self._refused:
                    self._refused.add(name)
                    log.warning("skipped %r: not <host>.<guest>.<inc>.sock of letters, digits, - and _", name)
                return
            file = LineFile(self.layout.serial / f"{vmm.name}.log")
            console = Console(vmm, file, self._resting, self._heard)
            self.consoles[name] = console
        if console.inode != inode:  # a new socket under a known name deserves a prompt try
            console.inode, console.next_try_s, console.retry_s = inode, 0.0, RETRY_FIRST_S
        if not console.connected and not console.connecting and time.monotonic() >= console.next_try_s:
            console.connecting = True
            group.create_task(self._connect(name, console))

    async def _connect(self, name: str, console: Console) -> None:
        path = str(self.layout.console / name)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await asyncio.get_running_loop().create_unix_connection(lambda: console, path)
        except (OSError, TimeoutError) as error:
            if RETRY_MOST_S / 2 < console.retry_s < RETRY_MOST_S:  # once, on the way to the longest wait
                log.warning("no answer from %s: %s", path, error or "timeout")
            console.put_off()
        finally:
            console.connecting = False

    def _forget(self, present: dict[str, int]) -> None:
        """Keep the last lines of some VMMs that ended, not of all that ever lived."""
        gone = [name for name, console in self.consoles.items() if name not in present and not console.connected]
        for name in gone[: max(0, len(gone) - ENDED_KEPT)]:
            del self.consoles[name]
        self._refused &= present.keys()

    async def _flush(self) -> None:
        before = time.monotonic()
        while True:
            await asyncio.sleep(FLUSH_S)
            now = time.monotonic()
            late_ms = (now - before - FLUSH_S) * 1000
            for console in self.consoles.values():
                if late_ms > LAG_MS and console.connected:
                    console.mark(f"LAG {round((now - before) * 1000)}")
                console.file.flush()
            before = now

    def _heard(self, console: Console, ns: int, text: str) -> None:
        for waiter in self._waiters:
            if waiter.guest == console.vmm.guest and text.startswith(waiter.prefix) and not waiter.answer.done():
                waiter.answer.set_result((console, ns, text))

    # --- answering

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                try:
                    reply = await self._answer(line)
                except BadRequestError as error:
                    reply = {"ok": False, "error": error.reason}
                writer.write(json.dumps(reply).encode() + b"\n")
                async with asyncio.timeout(10):
                    await writer.drain()
        except (OSError, TimeoutError, ValueError):
            pass  # the client went away, does not read, or sent a line without end
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except ValueError as error:
            raise BadRequestError(f"not JSON: {error}") from None
        if not isinstance(request, dict):
            raise BadRequestError('a JSON object is wanted, such as {"op": "list"}')
        fields = cast("dict[str, Any]", request)
        match fields.get("op"):
            case "list":
                return {"ok": True, "consoles": [_describe(console) for console in self.consoles.values()]}
            case "send":
                console = self._choose(fields)
                console.send(_text(fields, "text"))
                return {"ok": True, "console": console.vmm.name, "ns": time.monotonic_ns()}
            case "ask":
                return await self._ask(fields)
            case "tail":
                return self._tail(fields)
            case other:
                raise BadRequestError(f"unknown op {other!r}: known are list, send, ask, tail")

    async def _ask(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Send, and wait for the guest's next line with the prefix: it may come from another host if it moves."""
        prefix, text = _text(fields, "expect"), _text(fields, "text")
        timeout_s = fields.get("timeout_s", 30)
        if not isinstance(timeout_s, int | float) or not 0 < timeout_s <= ASK_MOST_S:
            raise BadRequestError(f"timeout_s must be a number above 0 and at most {ASK_MOST_S:.0f}, not {timeout_s!r}")
        console = self._choose(fields)
        waiter = _Waiter(console.vmm.guest, prefix, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            console.send(text)
            async with asyncio.timeout(timeout_s):
                source, ns, line = await waiter.answer
        except TimeoutError:
            raise BadRequestError(
                f"guest {console.vmm.guest} gave no line {prefix!r} within {timeout_s} s (asked on {console.vmm.name}; "
                "is it paused?)"
            ) from None
        finally:
            self._waiters.remove(waiter)
        source.file.flush()  # whoever has the answer may read it in the file
        return {"ok": True, "console": source.vmm.name, "ns": ns, "line": line}

    def _tail(self, fields: dict[str, Any]) -> dict[str, Any]:
        count = fields.get("lines", 20)
        if not isinstance(count, int) or not 0 < count <= RECENT_LINES:
            raise BadRequestError(f"lines must be 1 to {RECENT_LINES}, not {count!r}")
        console = self._choose(fields, ended_too=True)
        return {
            "ok": True,
            "console": console.vmm.name,
            "lines": [f"{n} {t}" for n, t in list(console.recent)[-count:]],
        }

    def _choose(self, fields: dict[str, Any], *, ended_too: bool = False) -> Console:
        """The console meant: of several VMMs of a guest the one that spoke last, since that one runs."""
        guest = _text(fields, "guest")
        of_guest = [console for console in self.consoles.values() if console.vmm.guest == guest]
        matching = [
            console
            for console in of_guest
            if fields.get("host") in (None, console.vmm.host)
            and fields.get("inc") in (None, console.vmm.inc)
            and (console.connected or ended_too)
        ]
        if not matching:
            raise BadRequestError(f"no console of guest {guest} is connected as asked; {_known(of_guest)}")
        return max(matching, key=lambda console: (console.last_ns, console.connected))


def _known(consoles: Iterable[Console]) -> str:
    names = [f"{each.vmm.name} ({'connected' if each.connected else 'ended'})" for each in consoles]
    return "known of it: " + (", ".join(names) or "none")


def _text(fields: dict[str, Any], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise BadRequestError(f"{key} must be a text of 1 to 256 characters, not {value!r}")
    return value


def _describe(console: Console) -> dict[str, Any]:
    ns, text = console.recent[-1] if console.recent else (0, None)
    return {
        "host": console.vmm.host,
        "guest": console.vmm.guest,
        "inc": console.vmm.inc,
        "connected": console.connected,
        "last_line": text,
        "age_ms": round((time.monotonic_ns() - ns) / 1e6, 1) if text is not None else None,
    }


async def _collect(layout: Layout) -> None:
    collector = Collector(layout)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, collector.stop)
    await collector.run()


@click.command()
@click.option("--dir", "directory", required=True, type=click.Path(path_type=Path), help="directory of the cluster")
def main(directory: Path) -> None:
    """Collect the consoles of one local cluster until SIGTERM."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s collector %(levelname)s %(message)s")
    layout = Layout.of(directory)
    try:
        layout.check()
    except LocalClusterError as error:
        raise click.ClickException(str(error)) from None
    layout.dir.mkdir(parents=True, exist_ok=True)
    with (layout.dir / "collector.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise click.ClickException(f"a collector for {layout.dir} already runs: stop it first") from None
        with contextlib.suppress(OSError):  # a late stamp is noise in the evidence; without the right to it, so be it
            os.setpriority(os.PRIO_PROCESS, 0, -10)
        asyncio.run(_collect(layout))


if __name__ == "__main__":
    main()
