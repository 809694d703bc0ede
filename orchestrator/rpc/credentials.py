"""Mutual TLS from an identity's directory. Blocking reads of small files.

A server takes up a new certificate with the next connection; a client's channel keeps the one that it was made with.
A directory in which key and certificate do not belong together (a renewal is under way) leaves the old ones in place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import grpc

from orchestrator.pki.files import Pem, PkiError, denied, identity_of, read_pem, serial_text, show, stamp, utc_now
from orchestrator.pki.names import Identity


class Credentials:
    """Of one holder. Raises PkiError when what lies there cannot be used."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stamp = self._seen()
        self._pem = _usable(directory)
        self.identity: Identity = identity_of(self._pem.cert)

    def server(self) -> grpc.ServerCredentials:
        """Asks every client for a certificate; follows the files."""
        fetch = cast(Any, self._changed)  # its type does not know that None means: as before
        return grpc.dynamic_ssl_server_credentials(_configuration(self._pem), fetch, require_client_authentication=True)

    def channel(self) -> grpc.ChannelCredentials:
        """As the files are now, whatever they were before. Raises PkiError."""
        pem = _usable(self._directory)
        return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)

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
    from cryptography import x509

    found = cast(dict[str, list[bytes]], context.auth_context() or {}).get("x509_pem_cert", [])
    if not found:
        raise PkiError("the caller has shown no certificate")
    cert = x509.load_pem_x509_certificate(found[0])
    return identity_of(found[0]), serial_text(cert.serial_number)


def _usable(directory: Path) -> Pem:
    found = show(directory, utc_now())
    if any("is not the key of" in each for each in found.problems):
        raise PkiError(f"{directory}: key and certificate do not belong together")
    return read_pem(directory)


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca)
