"""A real ZooKeeper for a test: one server on loopback with its own data, which survives `kill` and `start`."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from deploy.lab.cluster import zookeeper_tls
from orchestrator.core.endpoint import join_address

CLASS_PATH = tuple(f"/usr/share/java/{jar}" for jar in ("zookeeper.jar", "slf4j-simple.jar", *zookeeper_tls.JARS))

SMALL_MIB = 64
"""Of heap: such a server has little to do and is to start quickly."""


def missing() -> str:
    """What keeps a ZooKeeper from starting here; empty when nothing does."""
    if shutil.which("java") is None:
        return "java is not installed (deploy/install-system.sh)"
    return "" if Path(CLASS_PATH[0]).exists() else "ZooKeeper is not installed (deploy/install-system.sh)"


class ZooKeeperServer:
    def __init__(
        self,
        directory: Path,
        address: str = "127.0.0.1",
        inside: Sequence[str] = (),
        *,
        heap_mib: int = 64,
        tls: Path | None = None,
    ) -> None:
        """`inside` begins the command that runs it in a namespace; then `address` is one of there. `tls`: directory of
        the identity that it serves with; then nobody is let in without a certificate."""
        self.address, self._inside, self._heap_mib, self._tls = address, tuple(inside), heap_mib, tls
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind(("::" if ":" in address else address, 0))
            self.port: int = probe.getsockname()[1]
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None
        (directory / "data").mkdir(parents=True)
        (directory / "zoo.cfg").write_text(
            f"tickTime=500\ninitLimit=10\nsyncLimit=5\nmaxClientCnxns=0\nadmin.enableServer=false\n"
            f"4lw.commands.whitelist=*\npreAllocSize=1024\nclientPortListenBacklog=4096\ndataDir={directory}/data\n"
            + (
                f"clientPort={self.port}\nclientPortAddress={address}\n"
                if tls is None
                else "\n".join(zookeeper_tls.client_port(directory, tls, address, self.port)) + "\n"
            )
        )
        if tls is not None:
            zookeeper_tls.write_key_store(directory, tls)

    @property
    def hosts(self) -> str:
        return join_address(self.address, self.port)

    def start(self) -> None:
        command = f"java -Xmx{self._heap_mib}m -Xms16m -XX:+UseSerialGC -Dzookeeper.jmx.log4j.disable=true"
        if self._heap_mib <= SMALL_MIB:
            command += " -XX:TieredStopAtLevel=1"
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(*self._inside, *command.split(), "-cp", ":".join(CLASS_PATH)),
                    "org.apache.zookeeper.server.quorum.QuorumPeerMain",
                    str(self.directory / "zoo.cfg"),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if self._inside:
            return  # out of reach from here: whoever connects waits
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if (self._tls is not None and self._accepts()) or b"Mode:" in self._ask(b"srvr"):
                return
            time.sleep(0.05)
        raise RuntimeError((self.directory / "log").read_text()[-2000:])

    def _accepts(self) -> bool:
        """Some time before it serves; who connects waits for the rest."""
        try:
            with socket.create_connection((self.address, self.port), 0.5):
                return True
        except OSError:
            return False

    def metrics(self) -> dict[str, str]:
        """The server's own counters. Raises ConnectionError when it does not answer."""
        return metrics_of(self.address, self.port)

    def zxid(self) -> int:
        """Of the newest transaction, counted from the first of all. Raises as `metrics`."""
        return int(_told(self.address, self.port, b"srvr")["Zxid:"], 16) & 0xFFFFFFFF

    def _ask(self, word: bytes) -> bytes:
        return _asked(self.address, self.port, word, 0.5)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def metrics_of(address: str, port: int) -> dict[str, str]:
    """A server's own counters, by the names it has for them. Raises ConnectionError when it does not answer."""
    return _told(address, port, b"mntr")


def _told(address: str, port: int, word: bytes) -> dict[str, str]:
    lines = _asked(address, port, word, 5.0).decode().splitlines()
    if not lines:
        raise ConnectionError(f"ZooKeeper at {join_address(address, port)} does not answer to {word.decode()}")
    pairs = (line.replace("\t", " ").partition(" ") for line in lines)
    return {name: value.strip() for name, _, value in pairs}


def _asked(address: str, port: int, word: bytes, timeout_s: float) -> bytes:
    """Empty when there is no answer."""
    try:
        with socket.create_connection((address, port), timeout_s) as connection:
            connection.sendall(word)
            return b"".join(iter(lambda: connection.recv(65536), b""))
    except OSError:
        return b""
