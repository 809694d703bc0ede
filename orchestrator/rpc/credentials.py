"""Mutual TLS from an identity's directory. Blocking reads of small files.

A server takes up a new certificate with the next connection; a client's channel keeps the one that it was made with.
A directory in which key and certificate do not belong together (a renewal is under way) leaves the old ones in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import grpc

from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.pki.files import Pem, PkiError, denied, identity_of, read_pem, serial_text, show, stamp, utc_now
from orchestrator.pki.names import Identity, Kind


class Credentials:
    """Of one holder. Raises PkiError when what lies there cannot be used."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stamp = self._seen_last = self._seen()
        self._pem = _usable(directory)
        self.identity: Identity = identity_of(self._pem.cert)

    def server(self) -> grpc.ServerCredentials:
        """Asks every client for a certificate; follows the files."""
        fetch = cast(Any, self._changed)  # its type does not know that None means: as before
        return grpc.dynamic_ssl_server_credentials(_configuration(self._pem), fetch, require_client_authentication=True)

    def channel(self) -> grpc.ChannelCredentials:
        """As the files are now, or as they were while they cannot be used."""
        with contextlib.suppress(PkiError):
            self._pem = _usable(self._directory)
        return grpc.ssl_channel_credentials(self._pem.ca, self._pem.key, self._pem.cert)

    def version(self) -> Hashable:
        """Another one once a channel made now would be another one: a look at three files."""
        with contextlib.suppress(PkiError):
            self._seen_last = self._seen()
        return self._seen_last

    def denied(self) -> frozenset[str]:
        """Serial numbers that are refused now. Raises PkiError."""
        return denied(self._directory)

    def _seen(self) -> Any:
        try:
            return stamp(self._directory)
        except OSError as error:
            raise PkiError(f"{self._directory} cannot be read: {error.strerror or error}") from error

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """In a thread of gRPC's, for each new connection; None: nothing to take up."""
        try:
            now = self._seen()
            if now == self._stamp:
                return None
            made = _configuration(_usable(self._directory))
        except PkiError:
            return None
        self._stamp = now
        return made


def caller(context: grpc.ServicerContext | Any) -> tuple[Identity, str]:
    """Who calls, and the serial number of its certificate. Raises PkiError for a caller without one of ours."""
    found = cast(dict[str, list[bytes]], context.auth_context() or {}).get("x509_pem_cert", [])
    if not found:
        raise PkiError("the caller has shown no certificate")
    return _read_caller(found[0])


@lru_cache(maxsize=1024)
def _read_caller(pem: bytes) -> tuple[Identity, str]:
    """Calls come again and again with the same one, some of them in a blackout."""
    from cryptography import x509

    return identity_of(pem), serial_text(x509.load_pem_x509_certificate(pem).serial_number)


def calling_host(context: Any) -> str:
    """The host whose agent calls; empty: this server asks for no certificates. Raises NOT_PERMITTED for others.

    `Guard` has let the caller in, so it shows a certificate wherever the server asks for one."""
    if "x509_pem_cert" not in (context.auth_context() or {}):
        return ""
    identity, _ = caller(context)
    if identity.kind is not Kind.HOST:
        raise DroverError(RefusalReason.NOT_PERMITTED, f"{identity} is no host")
    return identity.name


def credentials_of(directory: Path | None) -> Credentials | None:
    """None: without. Raises PkiError."""
    return None if directory is None else Credentials(directory)


def _usable(directory: Path) -> Pem:
    found = show(directory, utc_now())
    if any("is not the key of" in each for each in found.problems):
        raise PkiError(f"{directory}: key and certificate do not belong together")
    return read_pem(directory)


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca)
