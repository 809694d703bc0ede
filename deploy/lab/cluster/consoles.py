"""The consoles of a cluster's VMMs as the collector hears them: finding, connecting, stamping, reading, writing down.

Nothing here blocks or waits, and nothing raises for what a VMM or a disk does. The caller turns the one loop: it waits
on the epoll that it shares with `Consoles`, tells it which descriptors reported and when, and calls `read` in time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from deploy.lab.cluster.evidence import Vmm
from deploy.lab.cluster.layout import Layout

GATHER_LEAST_NS, GATHER_MOST_NS = 1_500_000, 4_000_000
"""QEMU hands over a line byte by byte, in less than a millisecond, and reading each byte would cost more than all else.
A line that has begun is stamped and left alone for the first of these; then it is read in one go when something wakes
the collector anyway, at the latest after the second."""
RETRY_FIRST_S, RETRY_MOST_S = 0.02, 1.0
LINE_MOST_BYTES = 4096
UNWRITTEN_MOST_BYTES = 4 << 20
FILE_MOST_BYTES = 32 << 20
"""Of one VMM's lines, three hours of a heart that beats fifty times a second; and as much of those before."""
RECENT_LINES = 200
FILES_KEPT = 1_000
"""Of VMMs that ended, whose last lines are not kept any more."""
SWEEP_S = 30.0
ENDED_KEPT = 500
FOLDER_CLOCK_NS = 50_000_000
"""Longer than a tick of the clock that a folder's time of change is taken from."""

OWN_WORDS = ("CONNECTED", "EOF", "DETACHED", "TORN", "LAG")
_ONCE = select.EPOLLIN | select.EPOLLONESHOT

log = logging.getLogger("collector")


class LineFile:
    """Appends stamped lines to one file, gathered until `flush`. Never truncates, never raises.

    A file that has grown beyond `most_bytes` becomes `<name>.1`, in place of the one before, and a new one is begun.
    """

    def __init__(self, path: Path, most_bytes: int = FILE_MOST_BYTES) -> None:
        self._path = path
        self._most_bytes = most_bytes
        self._size = 0
        self._fd: int | None = None
        self._unwritten = bytearray()
        self._failing = False

    def add(self, ns: int, text: str) -> None:
        """Keep one line for the next `flush`; `ns` is its stamp. With UNWRITTEN_MOST_BYTES unwritten, it is dropped."""
        if len(self._unwritten) < UNWRITTEN_MOST_BYTES:
            self._unwritten += f"{ns} {text}\n".encode("ascii", "backslashreplace")

    def flush(self) -> None:
        """Hand over to the kernel what is gathered. A full disk keeps it in memory, bounded, for the next time."""
        if not self._unwritten:
            return
        try:
            if self._fd is None:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
                self._size = os.fstat(self._fd).st_size
                self._end_cut_line()
            written = os.write(self._fd, self._unwritten)
            del self._unwritten[:written]
            self._failing = False
            self._size += written
            if self._size > self._most_bytes and not self._unwritten:
                self._begin_anew()
        except OSError as error:
            if not self._failing:
                log.error("cannot write %s: %s", self._path, error)
            self._failing = True

    def close(self) -> None:
        """Write what can be written and let go of the file; `add` and `flush` open it again."""
        self.flush()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _begin_anew(self) -> None:
        """Between two lines. Raises OSError."""
        self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        self.close()

    def _end_cut_line(self) -> None:
        """A predecessor that was killed may have left half a line; nothing may be glued to it."""
        with contextlib.suppress(OSError), self._path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read(1) != b"\n":
                self._unwritten[:0] = b"\n"


class Console:
    """One VMM's console: its connection, its file and what it said last."""

    def __init__(self, vmm: Vmm, file: LineFile, on_line: Callable[[Console, int, str], None]) -> None:
        self.vmm = vmm
        self.file = file
        self.recent: deque[tuple[int, str]] = deque(maxlen=RECENT_LINES)
        self.inode = 0
        self.next_try_s = 0.0
        self.retry_s = RETRY_FIRST_S
        self.connection: socket.socket | None = None
        self.borrowers: list[Callable[[bytes], bool]] = []
        """Told all that the console says, as it comes, and `b""` when it is closed; False: they listen no more."""
        self._on_line = on_line
        self._partial = b""
        self._partial_ns = 0

    @property
    def connected(self) -> bool:
        """There is a connection to the VMM's console now."""
        return self.connection is not None

    @property
    def last_ns(self) -> int:
        """Stamp of the newest line that was heard; 0: none yet."""
        return self.recent[-1][0] if self.recent else 0

    def mark(self, text: str) -> None:
        """Write a line of the collector's own."""
        self.file.add(time.monotonic_ns(), text)

    def connect(self, path: Path) -> bool:
        """False: nobody answers, or too many wait (a full queue refuses); to be tried later, and later each time."""
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        try:
            # A link: names of guests are longer than the kernel lets paths of sockets be.
            connection.connect(str(path.readlink() if path.is_symlink() else path))
        except OSError as error:
            connection.close()
            if RETRY_MOST_S / 2 < self.retry_s < RETRY_MOST_S:  # once, on the way to the longest wait
                log.warning("no answer from %s: %s", path, error)
            self._put_off()
            return False
        self.connection = connection
        self._partial = b""
        self.mark("CONNECTED")
        return True

    def send(self, text: str) -> None:
        """Type text. Raises OSError when the VMM does not take it."""
        assert self.connection, "only a connected console takes input"
        self.connection.sendall(text.encode("ascii", "replace"))

    def type(self, data: bytes) -> None:
        """Type bytes, for one that has borrowed it; what the VMM does not take in at once is lost. Raises OSError."""
        if self.connection is not None:
            with contextlib.suppress(BlockingIOError):
                self.connection.send(data)

    def _lend(self, data: bytes) -> None:
        if self.borrowers:
            self.borrowers = [borrower for borrower in self.borrowers if borrower(data)]

    def read(self, begun_ns: int, buffer: bytearray) -> bool:
        """Take what has come; it began to come at `begun_ns`. False: the VMM closed the console."""
        assert self.connection, "only a connected console is read"
        try:
            count = self.connection.recv_into(buffer)
        except BlockingIOError:
            return True
        except OSError:
            count = 0
        if not count:
            self.close("EOF")
            return False
        if self.borrowers:
            self._lend(bytes(buffer[:count]))
        stamp = self._partial_ns if self._partial else begun_ns
        *lines, self._partial = (self._partial + buffer[:count]).split(b"\n")
        for line in lines:
            self._take(stamp, line)
            stamp = time.monotonic_ns()  # the next one came after the first: when is not known, but before now
        self._partial_ns = stamp
        if lines:
            self.retry_s = RETRY_FIRST_S
        if len(self._partial) > LINE_MOST_BYTES:
            self._end_torn()
        return True

    def close(self, why: str) -> None:
        """Note the end of the connection: EOF, or DETACHED if the collector ends and the VMM does not."""
        if self.connection:
            self._lend(b"")
            self.borrowers.clear()
            self._end_torn()
            self.mark(why)
            self.connection.close()
            self.connection = None
            self._put_off()
        self.file.close()

    def _put_off(self) -> None:
        self.next_try_s = time.monotonic() + self.retry_s
        self.retry_s = min(self.retry_s * 2, RETRY_MOST_S)

    def _take(self, ns: int, line: bytes) -> None:
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
            self._partial = b""


class Consoles:
    """All consoles of one cluster."""

    def __init__(self, layout: Layout, epoll: select.epoll, on_line: Callable[[Console, int, str], None]) -> None:
        self.known: dict[str, Console] = {}
        """By the name of the socket; also those of VMMs that ended."""
        self._layout = layout
        self._epoll = epoll
        self._on_line = on_line
        self._heard: dict[int, Console] = {}
        self._begun: deque[tuple[int, int]] = deque()
        """Stamp and descriptor of those that reported and are not read yet, the oldest first."""
        self._buffer = bytearray(LINE_MOST_BYTES)
        self._present: set[str] = set()
        self._refused: set[str] = set()
        self._listed_ns = -1
        self._sweep_s = 0.0

    # --- hearing: each descriptor reports once (EPOLLONESHOT), and is asked again after it was read

    def reported(self, descriptor: int, now_ns: int) -> bool:
        """Stamp the first byte of a line, or of the end. False: this descriptor is no console's."""
        if descriptor not in self._heard:
            return False
        self._begun.append((now_ns, descriptor))
        return True

    @property
    def due_ns(self) -> int | None:
        """When `read` must be called at the latest; None while nothing waits for it."""
        return self._begun[0][0] + GATHER_MOST_NS if self._begun else None

    def read(self, now_ns: int) -> None:
        """Read those whose line has had the time to come whole."""
        until_ns = now_ns - GATHER_LEAST_NS
        while self._begun and self._begun[0][0] <= until_ns:
            stamp, descriptor = self._begun.popleft()
            if self._heard[descriptor].read(stamp, self._buffer):
                self._epoll.modify(descriptor, _ONCE)
            else:
                del self._heard[descriptor]  # closing it took it out of the epoll

    # --- finding

    def look(self) -> None:
        """List the folder if anything in it changed, and try those that are not connected. Raises OSError."""
        # A folder that changed within the last tick of the kernel's clock may change again under the same time.
        changed_ns = self._layout.console.stat().st_mtime_ns
        if changed_ns != self._listed_ns:
            settled = time.time_ns() - changed_ns > FOLDER_CLOCK_NS
            self._listed_ns = changed_ns if settled else -1
            present = {entry.name: entry.inode() for entry in os.scandir(self._layout.console)}
            self._present = {name for name, inode in present.items() if self._see(name, inode)}
            self._forget()
            self._refused &= present.keys()
        now = time.monotonic()
        for name in self._present:
            console = self.known[name]
            if not console.connected and now >= console.next_try_s and console.connect(self._layout.console / name):
                assert console.connection
                descriptor = console.connection.fileno()
                self._heard[descriptor] = console
                self._epoll.register(descriptor, _ONCE)

    def _see(self, name: str, inode: int) -> bool:
        """Is it a console?"""
        console = self.known.get(name)
        if console is None:
            vmm = Vmm.of_file(name) if name.endswith(".sock") else None
            if vmm is None:
                if name not in self._refused:
                    self._refused.add(name)
                    log.warning("skipped %r: not <host>.<guest>.<inc>.sock of letters, digits, - and _", name)
                return False
            console = Console(vmm, LineFile(self._layout.serial / f"{vmm.name}.log"), self._on_line)
            self.known[name] = console
        if console.inode != inode:  # a new socket under a known name deserves a prompt try
            console.inode, console.next_try_s, console.retry_s = inode, 0.0, RETRY_FIRST_S
        return True

    def _forget(self) -> None:
        """Keep the last lines of some VMMs that ended, and the files of more, not of all that ever lived."""
        gone = [name for name, each in self.known.items() if name not in self._present and not each.connected]
        for name in gone[: max(0, len(gone) - ENDED_KEPT)]:
            del self.known[name]
        if time.monotonic() >= self._sweep_s:
            self._sweep_s = time.monotonic() + SWEEP_S
            self._sweep()

    def _sweep(self) -> None:
        """The oldest files beyond FILES_KEPT, of VMMs that are not there any more. Raises OSError."""
        known = {f"{console.vmm.name}.log" for console in self.known.values()}
        ended: list[tuple[float, str]] = []
        for entry in os.scandir(self._layout.serial):
            if entry.name.removesuffix(".1") not in known:
                ended.append((entry.stat().st_mtime, entry.name))
        for _, name in sorted(ended)[: max(0, len(ended) - FILES_KEPT)]:
            (self._layout.serial / name).unlink(missing_ok=True)

    # --- writing

    def flush(self, lag_ms: int = 0) -> None:
        """Write down what was heard. `lag_ms`: how long the collector stood still, which is noted where it matters."""
        for console in self.known.values():
            if lag_ms and console.connected:
                console.mark(f"LAG {lag_ms}")
            console.file.flush()

    def close(self) -> None:
        """Read what has come until now, and end. The VMMs' sockets are left as they are."""
        now = time.monotonic_ns()
        self.read(now + GATHER_LEAST_NS)
        for console in list(self._heard.values()):
            console.read(now, self._buffer)
        for console in self.known.values():
            console.close("DETACHED")
