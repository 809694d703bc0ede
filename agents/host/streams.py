"""With whom this host exchanges memory and disks, and what it proves itself with: the identity that its calls show.

QEMU wants the files of an identity under names of its own. Here they are links, so that a certificate which is renewed
is renewed for QEMU too; it reads them at the beginning of each stream.
"""

from __future__ import annotations

from pathlib import Path

from agents.config import AgentConfig
from agents.engine.base import StreamTls
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.pki.files import identity_of, read_pem
from orchestrator.pki.names import of_host

_LINKS = {
    "ca-cert.pem": "ca.pem",
    "server-cert.pem": "cert.pem",
    "server-key.pem": "key.pem",
    "client-cert.pem": "cert.pem",
    "client-key.pem": "key.pem",
}


class Streams:
    """The files of this host's identity are in `files`; `directory`, which is made, is for QEMU. Raises OSError and
    PkiError."""

    def __init__(self, files: Path, directory: Path) -> None:
        self._cluster = identity_of(read_pem(files).cert).cluster
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        for link, file in _LINKS.items():
            target = (files / file).absolute()
            path = directory / link
            if path.is_symlink() and path.readlink() == target:
                continue
            made = directory / f"{link}.new"
            made.unlink(missing_ok=True)
            made.symlink_to(target)
            made.replace(path)

    def from_host(self, source: str) -> StreamTls:
        """What comes from that host, and from no other one."""
        # GnuTLS writes a subject in the order that it is encoded in, unlike RFC 4514 and ZooKeeper.
        subject = ",".join(reversed(of_host(self._cluster, source).subject.split(",")))
        return StreamTls(self._directory, subject)

    def to_host(self, destination: str) -> StreamTls:
        """What goes to that host, and to no other one."""
        return StreamTls(self._directory, of_host(self._cluster, destination).server_name)


def streams_of(config: AgentConfig) -> Streams | None:
    """None: the host has no identity, or its guests are libvirt's, which sends their memory by itself. Raises OSError
    and PkiError."""
    if config.tls is None or config.engine != "qemu":
        return None
    return Streams(config.tls.directory, config.dir / "tls")


def agreed(streams: Streams | None, destination: str, *, offered: bool) -> StreamTls | None:
    """At the source: what the stream goes out by; None where neither host has an identity.

    Nothing goes unprotected because one of two says so. Raises FEATURE_NOT_AVAILABLE.
    """
    if streams is None and not offered:
        return None
    if streams is None:
        said = f"{destination} takes memory by TLS only, and this host has no certificate (`tls` of its agent)"
        raise DroverError(RefusalReason.FEATURE_NOT_AVAILABLE, said)
    if not offered:
        said = f"{destination} takes memory without TLS only: its agent has no certificate (`tls`)"
        raise DroverError(RefusalReason.FEATURE_NOT_AVAILABLE, said)
    return streams.to_host(destination)
