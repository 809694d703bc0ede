"""The console collector: stamps what the guests say, so that evidence does not rest on our own logs.

`python -m deploy.lab.cluster.collector --dir DIR` is one process per cluster. It connects to each VMM's serial socket
`console/<host>.<guest>.<inc>.sock` as it appears and appends to `serial/<host>.<guest>.<inc>.log` one line per line of
the guest, `<monotonic_ns> <text>`, stamped when its first byte arrived. Lines of its own between them:

    CONNECTED     lines follow; what the VMM said before is lost
    EOF           the VMM closed the console
    DETACHED      the collector ended (a new one goes on in the same file)
    TORN <text>   a connection ended within this line
    LAG <ms>      the collector got no CPU: stamps within the last <ms> may be late

A guest's line that looks like one of these is written with `? ` before it. A line that follows another one within 4 ms
is stamped when both are read, up to 4 ms late; the lines of a heart that beats at 200 Hz or slower are not concerned.

It answers on `collector.sock` (console_client.py): list the consoles, send text to a guest, ask and wait for an answer,
show the last lines. To a line `attach <host>.<guest>.<inc>` it answers `ok`, and passes bytes on from there in both
directions: the agents borrow the consoles so (their `console_server`). One loop over one epoll does everything: an
event loop of a library would cost more than the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import click

from deploy.lab.cluster.consoles import RECENT_LINES, Console, Consoles
from deploy.lab.cluster.layout import Layout, LocalClusterError
from orchestrator import descriptors

LOOK_NS = 20_000_000
FLUSH_NS = 50_000_000
LAG_MS = 5
"""Below this the collector's own delay is not worth a line: evidence.TOLERANCE_NS allows for it."""
ASK_MOST_S = 600.0
REQUEST_MOST_BYTES = 64 << 10
UNSENT_MOST_BYTES = 256 << 10
"""For one that has borrowed a console and does not take in what it says."""
_ATTACH = b"attach "

log = logging.getLogger("collector")


@dataclass(slots=True)
class BadRequestError(Exception):
    """What is wrong with a request, for whoever sent it."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(slots=True)
class Client:
    """Whoever asks: one connection, one request at a time."""

    connection: socket.socket
    received: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    waits: Wait | None = None
    borrowed: Console | None = None
    """What it is attached to; then its connection carries nothing else."""

    @property
    def busy(self) -> bool:
        """Its request waits for a line, or its answer is not sent yet: it may ask for nothing more now."""
        return self.waits is not None or bool(self.unsent)


@dataclass(slots=True)
class Wait:
    """For a guest's next line with a prefix."""

    asked: Console
    prefix: str
    timeout_s: float
    deadline_ns: int


class Collector:
    """All consoles of one cluster, and those who ask about them. `run` until `stop`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._epoll = select.epoll()
        self._consoles = Consoles(layout, self._epoll, self._heard)
        self._socket = layout.collector_socket
        self._clients: dict[int, Client] = {}
        self._stopping = False

    def stop(self, *_: object) -> None:
        """End `run` within LOOK_NS; also a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Collect until `stop`. Then everything is written and closed; sockets of the VMMs are left as they are."""
        self._layout.console.mkdir(parents=True, exist_ok=True)
        self._layout.serial.mkdir(parents=True, exist_ok=True)
        self._socket.unlink(missing_ok=True)  # ours: the lock is held
        with socket.socket(socket.AF_UNIX) as listener:
            listener.setblocking(False)
            listener.bind(str(self._socket))
            self._socket.chmod(0o600)
            listener.listen()
            self._epoll.register(listener.fileno(), select.EPOLLIN)
            try:
                self._turn(listener)
            finally:
                self._socket.unlink(missing_ok=True)
                self._consoles.close()

    def _turn(self, listener: socket.socket) -> None:
        look_ns = 0
        flush_ns = time.monotonic_ns() + FLUSH_NS
        while not self._stopping:
            due_ns = min(look_ns, flush_ns, self._consoles.due_ns or flush_ns)
            events = self._epoll.poll(max(0, due_ns - time.monotonic_ns()) / 1e9)
            now = time.monotonic_ns()
            for descriptor, event in events:
                if self._consoles.reported(descriptor, now):
                    continue
                if descriptor == listener.fileno():
                    self._accept(listener)
                else:
                    self._attend(descriptor, event)
            self._consoles.read(now)
            if now >= flush_ns:
                late_ms = (now - flush_ns) / 1e6
                self._consoles.flush(round(late_ms + FLUSH_NS / 1e6) if late_ms > LAG_MS else 0)
                self._expire(now)
                flush_ns = now + FLUSH_NS
            if now >= look_ns:
                look_ns = now + self._look()

    def _look(self) -> int:
        """For new consoles; nanoseconds until the next time."""
        try:
            self._consoles.look()
        except OSError as error:
            log.error("cannot read %s: %s", self._layout.console, error)
            return 1_000_000_000
        return LOOK_NS

    # --- those who ask

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            connection.setblocking(False)
            self._clients[connection.fileno()] = Client(connection)
            self._epoll.register(connection.fileno(), select.EPOLLIN)

    def _attend(self, descriptor: int, event: int) -> None:
        client = self._clients[descriptor]
        try:
            if event & select.EPOLLOUT:
                self._send(client)
            if event & ~select.EPOLLOUT:
                data = client.connection.recv(REQUEST_MOST_BYTES)
                client.received += data
                if not data or len(client.received) > REQUEST_MOST_BYTES:
                    raise ConnectionError
            self._serve(client)
            self._type_on(client)
        except BlockingIOError:
            pass
        except OSError:  # it went away, or sent a line without end
            self._drop(client)

    def _serve(self, client: Client) -> None:
        """Answer what was asked, in order. Raises OSError."""
        while not client.busy and client.borrowed is None and b"\n" in client.received:
            line, _, client.received = client.received.partition(b"\n")
            if line.startswith(_ATTACH):
                self._lend(client, line.removeprefix(_ATTACH).decode(errors="replace"))
                continue
            try:
                reply = self._answer(client, bytes(line))
            except BadRequestError as error:
                reply = {"ok": False, "error": error.reason}
            if reply is not None:
                self._reply(client, reply)

    def _lend(self, client: Client, name: str) -> None:
        """Raises OSError when there is no such console, or nobody holds it yet."""
        console = self._consoles.known.get(f"{name}.sock")
        if console is None or not console.connected:
            raise ConnectionError(f"no console {name}")
        client.borrowed = console
        console.borrowers.append(lambda data: self._lent(client, data))
        client.unsent += b"ok\n"
        self._send(client)

    def _lent(self, client: Client, data: bytes) -> bool:
        """What a console said; empty: it is closed. False: nobody listens any more."""
        if self._clients.get(client.connection.fileno()) is not client:
            return False
        client.unsent += data
        try:
            self._send(client)
            if not data:
                raise ConnectionError
        except OSError:
            self._drop(client)
            return False
        del client.unsent[:-UNSENT_MOST_BYTES]  # of one that takes nothing in, the oldest
        return True

    def _type_on(self, client: Client) -> None:
        """Raises OSError when the VMM takes no input any more."""
        if client.borrowed is not None and client.received:
            data = bytes(client.received)
            client.received.clear()
            client.borrowed.type(data)

    def _drop(self, client: Client) -> None:
        self._clients.pop(client.connection.fileno(), None)
        client.connection.close()

    def _reply(self, client: Client, reply: dict[str, Any]) -> None:
        client.unsent += json.dumps(reply).encode() + b"\n"
        self._send(client)

    def _send(self, client: Client) -> None:
        with contextlib.suppress(BlockingIOError):
            del client.unsent[: client.connection.send(client.unsent)]
        more = select.EPOLLOUT if client.unsent else 0
        self._epoll.modify(client.connection.fileno(), select.EPOLLIN | more)

    def _finish(self, client: Client, reply: dict[str, Any]) -> None:
        """Answer an `ask`, and go on with what the client asked after it."""
        client.waits = None
        try:
            self._reply(client, reply)
            self._serve(client)
        except OSError:
            self._clients.pop(client.connection.fileno(), None)
            client.connection.close()

    def _heard(self, console: Console, ns: int, text: str) -> None:
        if not self._clients:
            return
        for client in list(self._clients.values()):
            wait = client.waits
            if wait and wait.asked.vmm.guest == console.vmm.guest and text.startswith(wait.prefix):
                console.file.flush()  # whoever has the answer may read it in the file
                self._finish(client, {"ok": True, "console": console.vmm.name, "ns": ns, "line": text})

    def _expire(self, now_ns: int) -> None:
        for client in list(self._clients.values()):
            wait = client.waits
            if wait and now_ns >= wait.deadline_ns:
                reason = (
                    f"guest {wait.asked.vmm.guest} gave no line {wait.prefix!r} within {wait.timeout_s} s "
                    f"(asked on {wait.asked.vmm.name}; is it paused?)"
                )
                self._finish(client, {"ok": False, "error": reason})

    # --- answers

    def _answer(self, client: Client, line: bytes) -> dict[str, Any] | None:
        """None: later. Raises BadRequestError."""
        try:
            request = json.loads(line)
        except ValueError as error:
            raise BadRequestError(f"not JSON: {error}") from None
        if not isinstance(request, dict):
            raise BadRequestError('a JSON object is wanted, such as {"op": "list"}')
        fields = cast("dict[str, Any]", request)
        match fields.get("op"):
            case "list":
                return {"ok": True, "consoles": [_describe(console) for console in self._consoles.known.values()]}
            case "send":
                console = self._choose(fields)
                _type(console, _text(fields, "text"))
                return {"ok": True, "console": console.vmm.name, "ns": time.monotonic_ns()}
            case "ask":
                client.waits = self._ask(fields)
                return None
            case "tail":
                return self._tail(fields)
            case other:
                raise BadRequestError(f"unknown op {other!r}: known are list, send, ask, tail")

    def _ask(self, fields: dict[str, Any]) -> Wait:
        """Send, and wait for the guest's next line with the prefix: it may come from another host if it moves."""
        prefix, text = _text(fields, "expect"), _text(fields, "text")
        timeout_s = fields.get("timeout_s", 30)
        if not isinstance(timeout_s, int | float) or not 0 < timeout_s <= ASK_MOST_S:
            raise BadRequestError(f"timeout_s must be a number above 0 and at most {ASK_MOST_S:.0f}, not {timeout_s!r}")
        console = self._choose(fields)
        _type(console, text)
        return Wait(console, prefix, timeout_s, time.monotonic_ns() + int(timeout_s * 1e9))

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
        of_guest = [console for console in self._consoles.known.values() if console.vmm.guest == guest]
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


def _type(console: Console, text: str) -> None:
    try:
        console.send(text)
    except OSError as error:
        raise BadRequestError(f"the console {console.vmm.name} takes no input: {error}") from None


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
        descriptors.raise_limit()  # one for each console
        collector = Collector(layout)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, collector.stop)
        collector.run()


if __name__ == "__main__":
    main()
