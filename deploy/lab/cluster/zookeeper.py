"""ZooKeeper as children of the local cluster: one server or an ensemble, own data, every write on disk before it is
answered."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
from collections.abc import Sequence
from pathlib import Path

from deploy.lab.cluster import zookeeper_tls
from deploy.lab.cluster.identities import CLUSTER
from deploy.lab.cluster.layout import Layout, LocalClusterError, Places, Server, StopReason
from orchestrator.pki.names import Role, of_role

TICK_MS = 500
"""Sessions may be 2 to 20 ticks long: 1 to 10 s."""

_JAR_FOLDERS = (Path("/usr/share/java"), Path("/usr/share/zookeeper"), Path("/usr/share/zookeeper/lib"))
_MAIN = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
_SERVER = of_role(CLUSTER, Role.ZOOKEEPER).server_name
_HINT = "deploy/install-system.sh installs it"


def _jar(name: str) -> Path | None:
    return next((path for folder in _JAR_FOLDERS if (path := folder / name).exists()), None)


def require() -> None:
    """Raises LocalClusterError naming what ZooKeeper lacks on this machine."""
    if shutil.which("java") is None:
        raise LocalClusterError(
            f"a Java runtime (the command java), which runs ZooKeeper, is missing; {_HINT}",
            reason=StopReason.MISSING_SOFTWARE,
            part="zookeeper",
        )
    if _jar("zookeeper.jar") is None:
        folders = ", ".join(map(str, _JAR_FOLDERS))
        raise LocalClusterError(
            f"ZooKeeper (zookeeper.jar in {folders}) is missing; {_HINT}",
            reason=StopReason.MISSING_SOFTWARE,
            part="zookeeper",
        )


def prepare(layout: Layout, places: Places, server: Server, *, tls: bool = False) -> None:
    """Write its configuration; `tls`: by the identities that `identities` has made.

    Data of an earlier start stays: a restarted server goes on where the killed one was.
    """
    data = layout.zookeeper(server) / "data"
    data.mkdir(parents=True, exist_ok=True)
    lines = [
        f"tickTime={TICK_MS}",
        f"dataDir={data}",
        *_client_port(layout, places, server, tls=tls),
        "initLimit=10",
        "syncLimit=5",
        "standaloneEnabled=true",
        # Sixty connections per address is the default, and here the whole control plane has one address.
        "maxClientCnxns=0",
        # Fifty may wait to be accepted by default: of a fleet that comes back at once, the others try again in vain.
        "clientPortListenBacklog=4096",
        "admin.enableServer=false",
        "4lw.commands.whitelist=srvr,stat,mntr,wchs,cons,dump",
        # Snapshots and logs before the last three go, once an hour.
        "autopurge.purgeInterval=1",
        "autopurge.snapRetainCount=3",
        # KiB written at once to a fresh log: the default of 64 MiB would take longer than everything else here.
        "preAllocSize=1024",
    ]
    if tls and server.number:
        zookeeper_tls.write_key_store(layout.zookeeper(server), layout.quorum_identity, zookeeper_tls.QUORUM_KEY_STORE)
        lines += zookeeper_tls.quorum(layout.zookeeper(server), layout.quorum_identity)
    if server.number:
        (data / "myid").write_text(f"{server.number}\n")
        lines += [
            f"server.{one.number}={one.address}:{places.quorum_port}:{places.election_port}"
            for one in places.zookeepers
        ]
    (layout.zookeeper(server) / "zoo.cfg").write_text("\n".join(lines) + "\n")


def _client_port(layout: Layout, places: Places, server: Server, *, tls: bool) -> list[str]:
    if not tls:
        return [f"clientPort={places.zookeeper_port}", f"clientPortAddress={server.address}"]
    identity = layout.identity("role", "zookeeper")
    zookeeper_tls.write_key_store(layout.zookeeper(server), identity)
    return zookeeper_tls.client_port(layout.zookeeper(server), identity, server.address, places.zookeeper_port)


def command(layout: Layout, server: Server) -> list[str]:
    """The server's command line; `prepare` comes first."""
    named = ("zookeeper.jar", "slf4j-simple.jar", *zookeeper_tls.JARS)
    jars = [path for name in named if (path := _jar(name))]
    return [
        "java",
        "-Xms16m",
        "-Xmx128m",
        # It starts in half a second with these, and in two without.
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-Xshare:auto",
        # Else every JVM keeps a file in /tmp, and leaves it there when it is killed.
        "-XX:-UsePerfData",
        "-Dzookeeper.forceSync=yes",
        # A server that is silent must not hold up the election of another leader: 5 s is the default.
        "-Dzookeeper.cnxTimeout=1000",
        "-Dzookeeper.jmx.log4j.disable=true",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=info",
        "-Dorg.slf4j.simpleLogger.showDateTime=true",
        "-Djava.net.preferIPv4Stack=true",
        # The jar's manifest names the others that it needs.
        "-cp",
        ":".join([str(layout.zookeeper(server)), *map(str, jars)]),
        _MAIN,
        str(layout.zookeeper(server) / "zoo.cfg"),
    ]


async def srvr(address: str, port: int, timeout_s: float = 1.0, tls: ssl.SSLContext | None = None) -> str | None:
    """Ask the server how it is. None: it serves; otherwise what is wrong."""
    try:
        answer = await _ask("srvr", address, port, timeout_s, tls)
    except OSError as error:
        return _short(error)
    return None if "Mode:" in answer else "not serving yet"


async def has_ephemeral(
    path: str, addresses: Sequence[str], port: int, timeout_s: float = 1.0, tls: ssl.SSLContext | None = None
) -> str | None:
    """Does a session that is connected hold this node? None: yes. Asked with four-letter words: it needs no session.

    The session of a process that was killed goes on for seconds, its connection does not. Of an ensemble every server
    knows the node, and only one has the connection.
    """
    asked = [_ask(word, address, port, timeout_s, tls) for word in ("dump", "cons") for address in addresses]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    told = [answer for answer in answers if isinstance(answer, str)]
    if not told:
        error = answers[0]
        return f"ZooKeeper: {_short(error) if isinstance(error, OSError) else error!r}"
    holder = next(filter(None, (_holder(answer, path) for answer in told)), None)
    connected = holder is not None and any(f"sid={holder}," in answer for answer in told)
    return None if connected else "not registered"


def _holder(dump: str, path: str) -> str | None:
    """The session that holds an ephemeral node: a dump has its id ("0x10a:") above the paths of its nodes."""
    session = None
    for line in map(str.strip, dump.splitlines()):
        if line.startswith("0x"):
            session = line.rstrip(":")
        elif line == path:
            return session
    return None


async def _ask(word: str, address: str, port: int, timeout_s: float, tls: ssl.SSLContext | None) -> str:
    # A handshake costs a server that has just started much of a second.
    async with asyncio.timeout(timeout_s if tls is None else 5 * timeout_s):
        name = None if tls is None else _SERVER
        reader, writer = await asyncio.open_connection(address, port, ssl=tls, server_hostname=name)
        try:
            writer.write(word.encode())
            return (await reader.read(-1)).decode(errors="replace")
        finally:
            writer.close()


def _short(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "does not answer"
    return os.strerror(error.errno).lower() if error.errno else str(error)
