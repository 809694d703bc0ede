"""kazoo's connection at a tenth of the system calls: what an operation on ZooKeeper costs is mostly what kazoo does
around it.

By itself kazoo makes a selector for each time it waits, waits before each send and twice before each answer, sends and
receives one packet at a time, and hands each result to a thread of its own, which wakes the event loop for it. Here
packets that wait are sent as one, what has arrived is received at once, and results are handed on where they were
received. What kazoo decides (sessions, pings, time-outs, the order of answers and events) stays kazoo's.

A TLS connection keeps what it has decrypted to itself, and what it receives need not be for us: nobody waits for its
socket while it has something, and nobody waits for a packet because its socket had something.
"""

# kazoo ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false, reportAttributeAccessIssue=false
# pyright: reportUntypedBaseClass=false, reportPrivateUsage=false

from __future__ import annotations

import logging
import select
import ssl
import struct
from collections.abc import Callable, Sequence
from typing import Any

from kazoo.exceptions import ConnectionDropped
from kazoo.handlers.threading import SequentialThreadingHandler
from kazoo.protocol.connection import AUTH_XID, CLOSE_RESPONSE, ConnectionHandler
from kazoo.protocol.serialization import Auth

log = logging.getLogger(__name__)

_RECEIVED_BYTES = 64 << 10
"""At a time; a packet that is larger is received piece by piece."""
_SENT_BYTES = 64 << 10
"""Packets are sent together up to this size: what comes back meanwhile need not wait for more of them."""
_LENGTH = struct.Struct("!i")
_HEADER = struct.Struct("!iii")
"""Length of what follows, number of the request, its type."""
_NOTHING_YET = (BlockingIOError, ssl.SSLWantReadError)
_NOT_NOW = (BlockingIOError, ssl.SSLWantWriteError)


class Wake:
    """The end of kazoo's socket pair that is written to when there is something to send: written to once, however many
    operations wait until the connection looks."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._rung = False

    def send(self, data: bytes) -> int:
        """Wake the connection's thread, unless it is about to look anyway. May be called on any thread, after the
        operation was put into kazoo's queue."""
        if self._rung:
            return len(data)
        self._rung = True
        return int(self._socket.send(data))

    def heard(self) -> None:
        """On the connection's thread, before it looks into the queue: what is put there from now on wakes it again."""
        self._rung = False

    def close(self) -> None:
        """As a socket does."""
        self._socket.close()


class Connection(ConnectionHandler):
    """`ConnectionHandler` whose sends and receives take what there is, instead of one packet each."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._socket: Any
        super().__init__(*args, **kwargs)
        self._received = bytearray()
        self._ahead = False
        """Of what follows the packet that is waited for something may be received as well."""

    def start(self) -> None:
        """As kazoo's."""
        if self.connection_closed.is_set():
            self._read_sock, write_sock = self.handler.create_socket_pair()
            self._write_sock = Wake(write_sock)
            self.connection_closed.clear()
        super().start()

    def _connect(self, *args: Any, **kwargs: Any) -> Any:
        self._received.clear()
        self._ahead = False  # nobody looks into `_received` before the next packet comes
        timeouts = super()._connect(*args, **kwargs)
        self._ahead = True
        return timeouts

    def _read(self, length: int, timeout: float) -> bytes:
        while len(self._received) < length:
            self._receive(_RECEIVED_BYTES if self._ahead else length - len(self._received), timeout)
        found = bytes(self._received[:length])
        del self._received[:length]
        return found

    def _receive(self, at_most: int, timeout: float) -> None:
        """Something more, once there is something."""
        with self._socket_error_handling():
            try:
                data = self._socket.recv(at_most)
            except _NOTHING_YET:
                if not self.handler.select([self._socket], [], [], timeout)[0]:
                    raise self.handler.timeout_exception("socket time-out during read") from None
                return
            if not data:
                raise ConnectionDropped("socket connection broken")
            self._received += data

    def _write(self, msg: bytes, timeout: float) -> None:
        rest = memoryview(msg)
        with self._socket_error_handling():
            while rest:
                try:
                    rest = rest[self._socket.send(rest) :]
                except _NOT_NOW:
                    if not self.handler.select([], [self._socket], [], timeout)[1]:
                        raise self.handler.timeout_exception("socket time-out during write") from None

    def _read_socket(self, read_timeout: float) -> Any:
        """One packet at least, and those that came with it. Nothing, where TLS received something of its own: kazoo
        would wait for a packet, and send nothing meanwhile."""
        if isinstance(self._socket, ssl.SSLSocket) and not self._received and not self._is_there():
            return None
        response = super()._read_socket(read_timeout)
        while response != CLOSE_RESPONSE and self._has_packet():
            response = super()._read_socket(read_timeout)
        return response

    def _is_there(self) -> bool:
        """Something was received for us. Never waits."""
        with self._socket_error_handling():
            try:
                data = self._socket.recv(_RECEIVED_BYTES)
            except _NOTHING_YET:
                return False
            if not data:
                raise ConnectionDropped("socket connection broken")
            self._received += data
        return True

    def _has_packet(self) -> bool:
        size = _LENGTH.size
        return len(self._received) >= size and len(self._received) >= size + _LENGTH.unpack_from(self._received)[0]

    def _send_request(self, read_timeout: float, connect_timeout: float) -> None:
        """All that wait in kazoo's queue, as far as they fit into one packet."""
        self._read_sock.recv(64)
        self._write_sock.heard()
        queue, pending, packets = self.client._queue, self.client._pending, bytearray()
        while queue and len(packets) < _SENT_BYTES:
            request, result = queue[0]
            xid = AUTH_XID
            if request.type != Auth.type:
                xid = self._xid = (self._xid % 2147483647) + 1
            content = request.serialize()
            packets += _HEADER.pack(len(content) + 8, xid, request.type)
            packets += content
            # Before it leaves: from here on only the server, or the end of the connection, answers it.
            pending.append((request, result, xid))
            queue.popleft()
        if queue:
            self._write_sock.send(b"\0")
        self._write(bytes(packets), connect_timeout)


class AtOnce:
    """In place of a queue and the thread behind it: what is put is done, by whoever puts it."""

    def put(self, work: Callable[[], object]) -> None:
        """Never raises."""
        try:
            work()
        except Exception:
            log.exception("kazoo's callback failed")


class Handler(SequentialThreadingHandler):
    """Kazoo's threads without those that hand on results and events: everything that this store is told of is handed
    to an event loop at once."""

    def __init__(self) -> None:
        super().__init__()
        self.completion_queue = self.callback_queue = AtOnce()

    def start(self) -> None:
        """As kazoo's."""
        self._running = True

    def stop(self) -> None:
        """As kazoo's."""
        self._running = False

    def select(
        self, reads: Sequence[Any], writes: Sequence[Any], _: Sequence[Any], timeout: float | None = None
    ) -> Any:
        """What of them is ready; waits for one of them to be. Raises ValueError for a socket that is closed.

        kazoo takes an empty answer for a server that is silent, and gives the connection up. So it is asked once more
        before it is believed: this thread may have been kept from running since the wait was over.
        """
        decrypted = [one for one in reads if isinstance(one, ssl.SSLSocket) and one.pending()]
        if decrypted:  # the kernel's part of the socket may be empty; whatever else is ready is found the next time
            return [one for one in reads if one in decrypted or _is_readable(one)], [], []
        poll = select.poll()
        for one in reads:
            poll.register(one, select.POLLIN)
        for one in writes:
            poll.register(one, select.POLLOUT)
        found = poll.poll(None if timeout is None else max(0.0, timeout) * 1000) or poll.poll(0)
        ready = {fd for fd, _ in found}
        return [one for one in reads if one.fileno() in ready], [one for one in writes if one.fileno() in ready], []


def _is_readable(one: Any) -> bool:
    poll = select.poll()
    poll.register(one, select.POLLIN)
    return bool(poll.poll(0))
