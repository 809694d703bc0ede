"""What is changed of kazoo's connection: many packets in one send and one receive, and one wake for many calls."""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from kazoo.protocol.paths import _prefix_root
from kazoo.protocol.serialization import GetData

from orchestrator.ledger import kazoo_client
from orchestrator.ledger.kazoo_client import TreeClient
from orchestrator.ledger.kazoo_connection import AtOnce, Connection, Wake
from orchestrator.ledger.zookeeper import _Post

STAT = struct.pack("!qqqqiiiqiiq", 1, 2, 0, 0, 7, 0, 0, 0, 0, 0, 0)


class Asked:
    """A request that waits in kazoo's queue, with whoever asked."""

    def __init__(self, path: str) -> None:
        self.request = GetData(path, None)
        self.told: list[bytes] = []

    def set(self, answer: Any) -> None:
        self.told.append(answer[0])

    def set_exception(self, error: Exception) -> None:
        raise AssertionError(error)


class Pair:
    """A client's connection, and the socket of the server that it talks to."""

    def __init__(self) -> None:
        self.client: Any = TreeClient(hosts="nowhere:1")
        self.connection: Any = self.client._connection
        ours, self.server = socket.socketpair()
        ours.setblocking(False)
        self.connection._socket, self.connection._xid, self.connection._ahead = ours, 0, True
        self.connection._read_sock, wake = socket.socketpair()
        self.connection._write_sock = Wake(wake)

    def ask(self, *paths: str) -> list[Asked]:
        asked = [Asked(path) for path in paths]
        for one in asked:
            self.client._queue.append((one.request, one))
            self.connection._write_sock.send(b"\0")
        return asked

    def close(self) -> None:
        for one in (self.connection._socket, self.server, self.connection._read_sock, self.connection._write_sock):
            one.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    found = Pair()
    yield found
    found.close()


def frames(data: bytes) -> list[bytes]:
    """The packets that have been received as a whole."""
    found: list[bytes] = []
    while len(data) >= 4 and len(data) >= 4 + (length := struct.unpack_from("!i", data)[0]):
        found.append(data[4 : 4 + length])
        data = data[4 + length :]
    return found


def answer(xid: int, content: bytes) -> bytes:
    body = struct.pack("!iqi", xid, 100 + xid, 0) + struct.pack("!i", len(content)) + content + STAT
    return struct.pack("!i", len(body)) + body


def test_the_client_has_this_connection() -> None:
    client: Any = TreeClient(hosts="nowhere:1")
    assert isinstance(client._connection, Connection)


def test_whatever_waits_is_sent_at_once_in_its_order(pair: Pair) -> None:
    pair.ask(*(f"/guests/{number}" for number in range(50)))
    pair.connection._send_request(1.0, 1.0)
    sent = frames(pair.server.recv(1 << 20))
    assert [struct.unpack_from("!ii", one) for one in sent] == [(xid, GetData.type) for xid in range(1, 51)]
    assert [xid for _, _, xid in pair.client._pending] == list(range(1, 51))
    assert not pair.client._queue


def test_more_than_fits_into_one_send_is_sent_with_the_next(pair: Pair) -> None:
    asked = pair.ask(*(f"/{'x' * 9_000}{number}" for number in range(20)))
    received = bytearray()
    reading = threading.Thread(target=lambda: read_frames(pair.server, received, len(asked)), daemon=True)
    reading.start()
    turns = 0
    while pair.client._queue:
        ready, _, _ = pair.client.handler.select([pair.connection._read_sock], [], [], 0)
        assert ready, "something waits, and nobody is woken for it"
        pair.connection._send_request(1.0, 5.0)
        turns += 1
    reading.join(5.0)
    assert len(frames(bytes(received))) == len(asked)
    assert 1 < turns < len(asked)


def read_frames(server: socket.socket, received: bytearray, count: int) -> None:
    server.settimeout(5.0)
    while len(frames(bytes(received))) < count:
        received += server.recv(1 << 20)


def test_answers_that_came_together_are_all_taken(pair: Pair) -> None:
    """The connection waits for its socket, which has nothing more to say of what was received already."""
    asked = pair.ask("/a", "/b", "/c")
    pair.connection._send_request(1.0, 1.0)
    third = answer(3, b"third")
    pair.server.sendall(answer(1, b"first") + answer(2, b"second") + third[:10])
    pair.connection._read_socket(1.0)
    assert [one.told for one in asked] == [[b"first"], [b"second"], []]
    pair.server.sendall(third[10:])
    pair.connection._read_socket(1.0)
    assert asked[2].told == [b"third"]


def test_an_answer_larger_than_one_receive_is_taken_as_a_whole(pair: Pair) -> None:
    (asked,) = pair.ask("/large")
    pair.connection._send_request(1.0, 1.0)
    content = bytes(range(256)) * 3_500
    threading.Thread(target=lambda: pair.server.sendall(answer(1, content)), daemon=True).start()
    pair.connection._read_socket(5.0)
    assert asked.told == [content]


def test_nothing_of_an_old_connection_is_read_on_a_new_one(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.ask("/a")
    pair.connection._send_request(1.0, 1.0)
    pair.server.sendall(answer(1, b"first") + answer(2, b"second")[:10])
    pair.connection._read_socket(1.0)
    monkeypatch.setattr("kazoo.protocol.connection.ConnectionHandler._connect", lambda *_: (1.0, 1.0))
    pair.connection._connect("nowhere", "127.0.0.1", 1)
    assert not pair.connection._received


def test_what_came_while_the_thread_was_kept_from_running_is_noticed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kazoo gives up a connection when nothing came in time; a thread that wakes late has to look first."""

    class Late:
        """A poll whose wait is over before the packet comes, and that returns after it."""

        def __init__(self) -> None:
            self._poll = poll()

        def register(self, *args: Any) -> None:
            self._poll.register(*args)

        def poll(self, timeout_ms: float | None) -> list[tuple[int, int]]:
            found = self._poll.poll(timeout_ms)
            if timeout_ms:
                pair.server.send(b"answer")
            return found

    poll = select.poll
    monkeypatch.setattr(select, "poll", Late)
    ours = pair.connection._socket
    assert pair.client.handler.select([ours], [], [], 0.01)[0] == [ours]


def test_one_wake_for_many_calls(pair: Pair) -> None:
    pair.ask(*(f"/{number}" for number in range(2_000)))  # as many bytes would not fit, and block whoever calls
    assert pair.connection._read_sock.recv(4_096) == b"\0"
    pair.connection._write_sock.heard()
    pair.ask("/again")
    assert pair.connection._read_sock.recv(4_096) == b"\0"


def test_a_callback_that_fails_ends_nobody_elses() -> None:
    done: list[str] = []

    def fails() -> None:
        raise RuntimeError

    at_once = AtOnce()
    at_once.put(fails)
    at_once.put(lambda: done.append("the next"))
    assert done == ["the next"]


async def test_calls_come_to_the_loop_in_their_order_from_another_thread() -> None:
    post, seen, over = _Post(asyncio.get_running_loop()), deque[int](), asyncio.Event()

    def many() -> None:
        for number in range(20_000):
            post(seen.append, number)
        post(over.set)

    thread = threading.Thread(target=many)
    thread.start()
    await asyncio.wait_for(over.wait(), 20.0)
    thread.join()
    assert list(seen) == list(range(20_000))


async def test_a_call_that_fails_does_not_keep_the_others_from_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    post, over = _Post(asyncio.get_running_loop()), asyncio.Event()

    def fails() -> None:
        raise RuntimeError

    asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
    post(fails)
    post(over.set)
    await asyncio.wait_for(over.wait(), 5.0)


@pytest.mark.parametrize("root", ["", "/", "/drover/v1", "drover/v1", "/drover/v1/"])
@pytest.mark.parametrize("path", ["/", "", "/a", "/a/b-1", "a/b", "/a/", "//a", "/a//b", "/a.b", "/.a"])
def test_a_path_below_the_root_is_as_kazoo_makes_it(root: str, path: str) -> None:
    assert kazoo_client._rooted(root, path) == _prefix_root(root, path)


@pytest.mark.parametrize("path", ["/a/../b", "/./a", ".."])
def test_a_path_that_leaves_the_root_is_refused_as_by_kazoo(path: str) -> None:
    with pytest.raises(ValueError, match="relative paths"):
        kazoo_client._rooted("/drover/v1", path)
