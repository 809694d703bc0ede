"""The collector against consoles that the test itself speaks for."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.lab.cluster import consoles
from deploy.lab.cluster.collector import Collector
from deploy.lab.cluster.consoles import GATHER_MOST_NS, LINE_MOST_BYTES
from deploy.lab.cluster.layout import Layout

HONEST_NS = 50_000_000
"""Far above what a stamp is late on a busy machine, far below what a test waits between two bytes."""


class Guest:
    """The VMM's end of a console."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(5)
        self.connection = self._listener.accept()[0]
        self.connection.settimeout(5)

    def say(self, text: bytes) -> int:
        """As QEMU does, byte by byte; the time when the first one left."""
        begun = time.monotonic_ns()
        for byte in text:
            self.connection.send(bytes((byte,)))
        return begun

    def end(self) -> None:
        self.connection.close()
        self._listener.close()


class Rig:
    def __init__(self, directory: Path) -> None:
        self.layout = Layout.of(directory)
        self._ends = contextlib.ExitStack()
        self._collector = Collector(self.layout)
        self._thread = threading.Thread(target=self._collector.run)
        self._thread.start()
        until(self._listens)

    def _listens(self) -> bool:
        """The socket is there a moment before anybody listens."""
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(self.layout.dir / "collector.sock"))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
        return True

    def guest(self, name: str) -> Guest:
        guest = Guest(self.layout.console / f"{name}.sock")
        self._ends.callback(guest.end)
        return guest

    def client(self) -> socket.socket:
        connection = self._ends.enter_context(socket.socket(socket.AF_UNIX))
        connection.settimeout(5)
        connection.connect(str(self.layout.dir / "collector.sock"))
        return connection

    def written(self, name: str, count: int) -> list[tuple[int, str]]:
        """The lines of a file, once there are so many; the stamp apart. Lags of a busy machine do not count."""
        path = self.layout.serial / f"{name}.log"
        lines: list[tuple[int, str]] = []

        def enough() -> bool:
            words = [line.split(" ", 1) for line in path.read_text().splitlines()] if path.exists() else []
            lines[:] = [(int(stamp), text) for stamp, text in words if not text.startswith("LAG")]
            return len(lines) >= count

        until(enough)
        return lines

    def texts(self, name: str, count: int) -> list[str]:
        return [text for _, text in self.written(name, count)]

    def stop(self) -> None:
        self._collector.stop()
        self._thread.join(5)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.stop()
        self._ends.close()


def until(true: Callable[[], object], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "never became true"
        time.sleep(0.005)


def ask(connection: socket.socket, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """Send all at once, then read as many answers."""
    connection.sendall(b"".join(json.dumps(request).encode() + b"\n" for request in requests))
    with connection.makefile("rb") as replies:
        return [json.loads(replies.readline()) for _ in requests]


@pytest.fixture
def rig() -> Iterator[Rig]:
    directory = Path(tempfile.mkdtemp(prefix="dc", dir="/tmp"))
    rig = Rig(directory)
    yield rig
    rig.close()
    shutil.rmtree(directory)


def test_a_line_has_the_time_of_its_first_byte_however_late_the_rest_comes(rig: Rig) -> None:
    guest = rig.guest("host-1.web.a")
    swift = guest.say(b"swift\n")
    time.sleep(4 * GATHER_MOST_NS / 1e9)
    slow = guest.say(b"sl")
    time.sleep(0.2)
    guest.say(b"ow\n")
    (_, connected), (swift_ns, one), (slow_ns, two) = rig.written("host-1.web.a", 3)
    assert (connected, one, two) == ("CONNECTED", "swift", "slow")
    assert 0 <= swift_ns - swift < HONEST_NS
    assert 0 <= slow_ns - slow < HONEST_NS


def test_files_of_vmms_that_ended_are_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consoles, "FILES_KEPT", 2)
    monkeypatch.setattr(consoles, "SWEEP_S", 0.0)
    rig._collector._consoles._sweep_s = 0.0
    for age, name in enumerate(("e.log", "d.log", "c.log.1", "b.log", "a.log")):
        file = rig.layout.serial / f"host-1.old.{name}"
        file.write_text("1 x\n")
        os.utime(file, (1_000 - age, 1_000 - age))
    rig.guest("host-1.web.a").say(b"one\n")
    rig.texts("host-1.web.a", 2)
    kept = {"host-1.old.e.log", "host-1.old.d.log", "host-1.web.a.log"}
    until(lambda: {path.name for path in rig.layout.serial.iterdir()} == kept)


def test_two_lines_at_once_keep_their_order(rig: Rig) -> None:
    rig.guest("host-1.web.a").connection.sendall(b"one\r\ntwo\nthree\n")
    lines = rig.written("host-1.web.a", 4)
    assert [text for _, text in lines] == ["CONNECTED", "one", "two", "three"]
    assert [stamp for stamp, _ in lines] == sorted(stamp for stamp, _ in lines)


def test_a_guest_cannot_speak_for_the_collector_nor_break_the_file(rig: Rig) -> None:
    rig.guest("host-1.web.a").connection.sendall(b"EOF\n\x1b[2J\xff\n" + b"x" * (LINE_MOST_BYTES + 1))
    lines = rig.texts("host-1.web.a", 4)
    assert lines[1:3] == ["? EOF", r"\x1b[2J\xff"]
    assert lines[3] == "TORN " + "x" * (LINE_MOST_BYTES + 1)


def test_the_end_of_a_console_is_noted_and_its_return_too(rig: Rig) -> None:
    guest = rig.guest("host-1.web.a")
    guest.say(b"whole\nhal")
    guest.end()
    assert rig.texts("host-1.web.a", 4) == ["CONNECTED", "whole", "TORN hal", "EOF"]
    rig.guest("host-1.web.a").say(b"back\n")
    assert rig.texts("host-1.web.a", 6)[4:] == ["CONNECTED", "back"]
    rig.stop()
    assert rig.texts("host-1.web.a", 7)[6:] == ["DETACHED"]


def test_what_was_said_until_the_end_is_written(rig: Rig) -> None:
    rig.guest("host-1.web.a").say(b"last\nnever end")
    rig.stop()
    assert rig.texts("host-1.web.a", 4) == ["CONNECTED", "last", "TORN never end", "DETACHED"]


def test_requests_of_one_client_are_answered_in_order(rig: Rig) -> None:
    guest = rig.guest("host-1.web.a")
    guest.say(b"hello\n")
    rig.written("host-1.web.a", 2)
    send, unknown, listed = ask(rig.client(), {"op": "send", "guest": "web", "text": "+"}, {"op": "x"}, {"op": "list"})
    assert send["console"] == "host-1.web.a"
    assert guest.connection.recv(9) == b"+"
    assert "unknown op 'x'" in unknown["error"]
    assert [(each["host"], each["connected"], each["last_line"]) for each in listed["consoles"]] == [
        ("host-1", True, "hello")
    ]


def test_an_answer_may_come_from_where_the_guest_went(rig: Rig) -> None:
    source, destination = rig.guest("host-1.web.a"), rig.guest("host-2.web.b")
    source.say(b"here\n")
    rig.written("host-1.web.a", 2)
    rig.written("host-2.web.b", 1)
    gone, patient = rig.client(), rig.client()
    question = {"op": "ask", "guest": "web", "text": "v", "expect": "V ", "timeout_s": 5}
    gone.sendall(json.dumps(question).encode() + b"\n")
    assert source.connection.recv(9) == b"v"
    gone.close()  # nobody waits any more, and nothing breaks
    patient.sendall(json.dumps(question).encode() + b"\n" + b'{"op": "tail", "guest": "web", "lines": 1}\n')
    assert source.connection.recv(9) == b"v"
    destination.say(b"H 1\nV ok 00000400\n")
    with patient.makefile("rb") as replies:
        answer, tail = json.loads(replies.readline()), json.loads(replies.readline())
    assert (answer["console"], answer["line"]) == ("host-2.web.b", "V ok 00000400")
    assert tail["lines"] == [f"{answer['ns']} V ok 00000400"]
    assert "V ok 00000400" in rig.texts("host-2.web.b", 3)


def test_a_client_that_makes_no_sense_is_left(rig: Rig) -> None:
    client = rig.client()
    with contextlib.suppress(OSError):
        client.sendall(b"x" * (200 << 10))
    with contextlib.suppress(ConnectionResetError):
        assert client.recv(9) == b""
    assert ask(rig.client(), {"op": "list"}) == [{"ok": True, "consoles": []}]


def test_a_client_that_does_not_read_costs_nobody_else(rig: Rig) -> None:
    guest = rig.guest("host-1.web.a")
    for _ in range(200):
        guest.connection.sendall(b"y" * 2000 + b"\n")
    until(lambda: len(rig.texts("host-1.web.a", 1)) == 201)
    lazy = rig.client()
    lazy.setblocking(False)
    question = b'{"op": "tail", "guest": "web", "lines": 200}\n'
    with contextlib.suppress(BlockingIOError):
        for _ in range(10):
            lazy.send(question)
    assert ask(rig.client(), {"op": "list"})[0]["ok"]
    lazy.settimeout(5)
    with lazy.makefile("rb") as replies:
        assert all(len(json.loads(replies.readline())["lines"]) == 200 for _ in range(10))


def test_a_console_is_lent_in_both_directions_while_it_is_heard(rig: Rig) -> None:
    guest = rig.guest("host-1.web.a")
    guest.say(b"one\n")
    rig.written("host-1.web.a", 2)
    borrower = rig.client()
    borrower.sendall(b"attach host-1.web.a\ntyped")
    with borrower.makefile("rb") as said:
        assert said.readline() == b"ok\n"
        assert guest.connection.recv(100) == b"typed"
        guest.say(b"two\npart")
        assert said.read(8) == b"two\npart"
        assert rig.texts("host-1.web.a", 3)[2] == "two"
        guest.end()
        assert said.read() == b"", "it ends with the console"
    absent = rig.client()
    absent.sendall(b"attach host-9.web.a\n")
    assert absent.recv(100) == b""
