"""The source's half: libvirt's own client migrates the domain through two relays of ours, and its last word is kept.

`migrate3` of the public API makes every call (Begin, Prepare, Perform, Finish, Confirm). Its connection to this host's
daemon goes through a relay that lets no Confirm pass: the source is ended, or runs again, by the ledger's word and by
calls of our own. Its connection to the destination goes to the agent there, where Finish waits for COMMIT.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agents.engine.base import EngineError, HoldStart, OutgoingOptions
from agents.engine.libvirt.binding import Daemon
from agents.engine.libvirt.domain import Places, moved
from agents.engine.libvirt.incoming import greet
from agents.engine.libvirt.packets import Packet, Procedure, Verdict, at_source
from agents.engine.libvirt.relay import LIMIT_BYTES, Relay, Stream
from orchestrator.core.endpoint import Endpoint, join_address

_CONNECT_S = 5.0
_MIB = 1 << 20


class Outgoing:
    """One migration. `on_sealed` is called when libvirt has sent everything; `on_end` once, when its client has
    returned or the destination has gone, with what was said. Both on the event loop."""

    def __init__(
        self,
        daemon: Daemon,
        uuid: str,
        options: OutgoingOptions,
        sockets: tuple[Path, Path],
        on_sealed: Callable[[], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._daemon = daemon
        self._uuid = uuid
        self._options = options
        self._sockets = sockets
        self._on_sealed = on_sealed
        self._on_end = on_end
        self.sealed = False
        self.is_over = False
        """The destination's connection or libvirt's client has ended."""
        self._here = Relay(at_source, self._kept, self._replied)
        self._there = Relay(lambda _: Verdict.PASS, lambda _: None, lambda _: None)
        self._servers: list[asyncio.Server] = []
        self._client: asyncio.Future[None] | None = None
        self._telling: list[asyncio.Task[None]] = []

    async def begin(self, stream: Endpoint, daemon_socket: Path) -> None:
        """Returns when the destination's agent has taken the connection. Raises EngineError; nothing has begun then."""
        try:
            async with asyncio.timeout(_CONNECT_S):
                there = await asyncio.open_connection(stream.ip, stream.port, limit=LIMIT_BYTES)
        except (TimeoutError, OSError) as error:
            said = f"the destination does not take the stream at {stream}: {error or 'no answer'}"
            raise EngineError(said) from error
        try:
            places = await greet(*there, self._options.copy)
            here = await asyncio.open_unix_connection(daemon_socket, limit=LIMIT_BYTES)
            await self._listen(self._sockets[0], self._here, here)
            await self._listen(self._sockets[1], self._there, there)
        except (EngineError, OSError) as error:
            there[1].transport.abort()
            self.cut()
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"libvirt's daemon cannot be reached at {daemon_socket}: {error}") from error
        if self._options.hold is HoldStart.OPEN:
            self._here.let_go(Procedure.PERFORM)
        self._client = self._daemon.in_thread(lambda: self._migrate(places, stream.ip))
        self._telling = [
            asyncio.ensure_future(self._told(self._client)),
            asyncio.ensure_future(self._lost()),
        ]

    def release(self) -> None:
        """The gate is open: the copying of memory begins, unless it has begun. Idempotent."""
        self._here.let_go(Procedure.PERFORM)

    def cut(self) -> None:
        """The end of libvirt's client, whatever it was about to say. The daemon here first: it lets go of the domain,
        which stays as it is. Idempotent."""
        self._here.cut()
        self._there.cut()
        for server in self._servers:
            server.close()

    async def over(self, timeout_s: float) -> bool:
        """Cut, and libvirt's client has returned. False: it has not within `timeout_s`."""
        self.cut()
        if self._client is not None:
            await asyncio.wait({self._client}, timeout=timeout_s)
            return self._client.done()
        return True

    async def _listen(self, path: Path, relay: Relay, other: Stream) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            server.close()  # one client, once
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            await relay.run((reader, writer), other)

        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(serve, path, limit=LIMIT_BYTES)
        self._servers.append(server)

    def _kept(self, packet: Packet) -> None:
        """A Confirm stays where it is. A Perform waits for the gate."""

    def _replied(self, packet: Packet) -> None:
        if packet.procedure != Procedure.PERFORM:
            return
        if packet.ok:
            self.sealed = True
            self._on_sealed()

    async def _told(self, client: asyncio.Future[None]) -> None:
        error = ""
        try:
            await asyncio.shield(client)
        except EngineError as raised:
            error = str(raised)
        self._end(self._here.why or error)

    async def _lost(self) -> None:
        """A client whose Confirm is kept would never say that the destination has gone."""
        await self._there.closed.wait()
        if self.sealed:
            self._end("the destination has ended the migration")

    def _end(self, error: str) -> None:
        if not self.is_over:
            self.is_over = True
            self.cut()
            self._on_end(error or "libvirt has ended the migration")

    def _migrate(self, places: Places, address: str) -> None:
        """In a thread. Raises EngineError with libvirt's words."""
        libvirt = self._daemon.libvirt
        opened: list[Any] = []
        try:
            for path in self._sockets:
                opened.append(libvirt.open(f"qemu+unix:///system?socket={path.absolute()}"))
            here, there = opened
            domain = here.lookupByUUIDString(self._uuid)
            flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PAUSED | libvirt.VIR_MIGRATE_CHANGE_PROTECTION
            # Whether both hosts have the same image, and without a cache of their own, is for pools to say: libvirt
            # would only look at the kind of file system.
            flags |= libvirt.VIR_MIGRATE_UNSAFE
            values: dict[str, Any] = {
                libvirt.VIR_MIGRATE_PARAM_URI: f"tcp://{join_address(address, 0).rpartition(':')[0]}",
                libvirt.VIR_MIGRATE_PARAM_DEST_NAME: places.name,
                libvirt.VIR_MIGRATE_PARAM_DEST_XML: moved(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE), places),
                libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: max(1, self._options.link_bytes_per_s // _MIB),
            }
            if self._options.auto_converge:
                flags |= libvirt.VIR_MIGRATE_AUTO_CONVERGE
            if self._options.multifd_channels > 1:
                flags |= libvirt.VIR_MIGRATE_PARALLEL
                values[libvirt.VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS] = self._options.multifd_channels
            domain.migrate3(there, values, flags)
        except libvirt.libvirtError as error:
            raise EngineError(f"libvirt: {error}") from None
        finally:
            for connection in opened:
                with contextlib.suppress(libvirt.libvirtError):
                    connection.close()
