"""A kazoo client with watches on whole subtrees, which ZooKeeper has had since 3.6 and kazoo 2.11 does not know.

Such a watch stays until the connection ends, and one object serves however many nodes there are below it: a view of ten
thousand guests costs no read while nothing moves. What is added to kazoo is one request, and one look at each event.
"""

# kazoo ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false, reportAttributeAccessIssue=false
# pyright: reportUnknownLambdaType=false, reportUntypedBaseClass=false, reportPrivateUsage=false

from __future__ import annotations

import socket
import ssl
import struct
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kazoo import client as kazoo_client
from kazoo.client import KazooClient
from kazoo.protocol.paths import _prefix_root
from kazoo.protocol.serialization import write_string

from orchestrator.ledger.kazoo_connection import Connection, Handler
from orchestrator.pki.files import CA, CERT, KEY

_PERSISTENT_RECURSIVE = 1
CONNECT_S = 1.5
"""For a server to answer a connection; several of them fit into a session's time."""


def _rooted(root: str, path: str, trailing: bool = False) -> str:
    """As kazoo's, which takes both to pieces and puts them together again for each operation."""
    plain = path.startswith("/") and not path.endswith("/") and "//" not in path and "/." not in path
    if not plain or trailing or (root and (not root.startswith("/") or root.endswith("/"))):
        return str(_prefix_root(root, path, trailing))
    return root + path


kazoo_client._prefix_root = _rooted

TreeListener = Callable[[str], None]
"""Called with the path, below the chroot, of a node that was created, changed or deleted; on kazoo's connection thread,
before the answer to any later request is handed on. That order is what makes a view built from it consistent."""


@dataclass(frozen=True, slots=True)
class _AddWatch:
    """The request `addWatch` of ZooKeeper's protocol."""

    type: ClassVar[int] = 106
    path: str

    def serialize(self) -> bytearray:
        data = bytearray(write_string(self.path))
        data.extend(struct.pack("!i", _PERSISTENT_RECURSIVE))
        return data

    @classmethod
    def deserialize(cls, _bytes: bytes, _offset: int) -> bool:
        return True


class _Watchers(defaultdict[str, set[Any]]):
    """kazoo's watchers of nodes' contents. kazoo takes those of a node out when an event says that it moved: the one
    place that sees every event, in order."""

    def __init__(self, moved: Callable[[str], None]) -> None:
        super().__init__(set)
        self._moved = moved

    def pop(self, path: str, *default: Any) -> Any:
        self._moved(path)
        return super().pop(path, *default)


def secured(directory: Path) -> ssl.SSLContext:
    """What a client with the identity in `directory` proves itself with, and how it examines a server: by our authority
    alone, and by its name. Read anew for each connection, since certificates are renewed.

    Raises OSError (also ssl.SSLError) for files that cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(directory / CA)
    context.load_cert_chain(directory / CERT, directory / KEY)
    return context


class _Handler(Handler):
    """Connects within CONNECT_S, and knows which server was tried last, and why that was in vain.

    By itself kazoo gives a server that does not even answer the connection the whole time of the session, which is
    over then: one host without power would end the session of every client that tries it first.
    """

    def __init__(self, tls: Path | None, server_name: str) -> None:
        super().__init__()
        self._tls = tls
        self._server_name = server_name
        self.tried: tuple[str, int] | None = None
        self.failed = ""

    def create_connection(self, address: tuple[str, int], timeout: float = CONNECT_S, **kwargs: Any) -> Any:
        self.tried = tuple(address[:2])
        bound_s = min(timeout, CONNECT_S)
        try:
            if self._tls is None:
                made = super().create_connection(address=address, timeout=bound_s, **kwargs)
            else:
                made = self._secure_connection(address, bound_s, self._tls)
        except OSError as error:
            self.failed = str(error)
            raise
        self.failed = ""
        return made

    def _secure_connection(self, address: tuple[str, int], bound_s: float, tls: Path) -> ssl.SSLSocket:
        """kazoo's own would trust every authority that the system does."""
        context = secured(tls)
        made = socket.create_connection(address, bound_s)
        try:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return context.wrap_socket(made, server_hostname=self._server_name)
        except BaseException:
            made.close()
            raise


class TreeClient(KazooClient):
    """`KazooClient` with `add_tree_watch_async` and `on_tree`; of several servers it tries the one that failed last.

    `tls`: directory of the identity with which it connects by TLS, to servers of that name only; None: unprotected.
    """

    def __init__(self, *args: Any, tls: Path | None = None, server_name: str = "", **kwargs: Any) -> None:
        self._tree_listeners: list[tuple[str, TreeListener]] = []
        self._connecting = _Handler(tls, server_name)
        super().__init__(*args, handler=self._connecting, **kwargs)
        retry: Any = self._conn_retry
        self._connection = Connection(self, retry.copy(), logger=self.logger)
        expand = self._connection._expand_client_hosts

        def others_first() -> list[tuple[str, str, int]]:
            return sorted(expand(), key=lambda server: tuple(server[1:3]) == self._connecting.tried)

        self._connection._expand_client_hosts = others_first
        self._data_watchers = _Watchers(self._moved)

    def _reset_watchers(self) -> None:
        super()._reset_watchers()
        self._data_watchers = _Watchers(self._moved)

    @property
    def why_not(self) -> str:
        """What was in the way of the newest connection; empty when it was made."""
        return self._connecting.failed

    def on_tree(self, root: str, listener: TreeListener) -> Callable[[], None]:
        """Tell of every event below `root`, and of `root`. The server sends them once `add_tree_watch_async` has been
        answered on the present connection. Returns a function that ends it."""
        entry = (root.rstrip("/"), listener)
        self._tree_listeners = [*self._tree_listeners, entry]

        def end() -> None:
            self._tree_listeners = [one for one in self._tree_listeners if one is not entry]

        return end

    def add_tree_watch_async(self, root: str) -> Any:
        """Ask the server for the events below `root`, which need not exist. Holds for the present connection."""
        result = self.handler.async_result()
        chroot = str(self.chroot or "")
        self._call(_AddWatch(chroot + root if root != "/" else chroot or "/"), result)
        return result

    def _moved(self, path: str) -> None:
        """On the connection thread."""
        below = path[len(self.chroot or "") :] or "/"
        for root, listener in self._tree_listeners:
            if below == root or below.startswith(f"{root}/"):
                listener(below)
