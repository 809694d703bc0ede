"""Where certificates lie, and what is read of them. Blocking.

A holder's directory (0700): `ca.pem` (whom it trusts; several certificates while an authority is replaced), `cert.pem`
(its own, and what lies between that and the authority), `key.pem` (0600) and `deny.json` (serial numbers that are
refused although they have not ended). Any PEM will do: an existing PKI may fill it as well as `drover pki issue`.

The library is loaded when a certificate is read: guests may wait for an agent that starts, and most need none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from orchestrator.pki.names import SCHEME, BadName, Identity, Kind, read_uri
from orchestrator.whole import write_whole

if TYPE_CHECKING:
    from cryptography import x509

CA, CERT, KEY, DENY = "ca.pem", "cert.pem", "key.pem", "deny.json"
MAX_PEM_BYTES = 1 << 20
MAX_DENIED = 10_000


class PkiError(Exception):
    """A certificate, a key or a directory of them cannot be used. The text says which, and what to do."""


@dataclass(frozen=True, slots=True)
class Pem:
    """What TLS needs to speak for an identity."""

    ca: bytes
    cert: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Shown:
    """What a certificate says, and what is wrong with it as it lies there."""

    identity: Identity
    serial: str
    """Hexadecimal, as `drover pki revoke` takes it."""
    not_before: datetime
    not_after: datetime
    issuer: str
    problems: tuple[str, ...]


def read_pem(directory: Path) -> Pem:
    """Raises PkiError."""
    return Pem(*(_read(directory / name) for name in (CA, CERT, KEY)))


def write_pem(directory: Path, pem: Pem) -> None:
    """Each file whole or as it was; the key before the certificate that needs it. Raises OSError."""
    make_private(directory)
    write_whole(directory / CA, pem.ca, durable=True, mode=0o600)
    write_whole(directory / KEY, pem.key, durable=True, mode=0o600)
    write_whole(directory / CERT, pem.cert, durable=True, mode=0o600)


def make_private(directory: Path) -> None:
    """A directory that nobody else may enter. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.chmod(0o700)


def identity_of(cert: bytes) -> Identity:
    """Of the first certificate in a PEM. Raises PkiError when it has no URI of ours, or more than one."""
    return _identity(_loaded(cert, CERT)[0])


def other_names(directory: Path) -> tuple[list[str], list[str]]:
    """DNS names and addresses that the certificate there carries besides those every certificate of it has.

    Raises PkiError."""
    from cryptography import x509

    cert, *_ = _loaded(_read(directory / CERT), str(directory / CERT))
    identity = _identity(cert)
    always = {identity.server_name, identity.name.lower() if identity.kind is Kind.HOST else ""}
    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        ips = [str(each) for each in names.get_values_for_type(x509.IPAddress)]
    except x509.ExtensionNotFound:
        ips = []
    return [each for each in _dns(cert) if each not in always], ips


def show(directory: Path, now: datetime) -> Shown:
    """What lies there. Raises PkiError for what cannot be read as a certificate of ours at all."""
    pem = read_pem(directory)
    cert, *_ = _loaded(pem.cert, str(directory / CERT))
    trusted = _loaded(pem.ca, str(directory / CA))
    return Shown(
        _identity(cert),
        serial_text(cert.serial_number),
        cert.not_valid_before_utc,
        cert.not_valid_after_utc,
        cert.issuer.rfc4514_string(),
        tuple(_problems(directory, pem, cert, trusted, now)),
    )


def _problems(
    directory: Path, pem: Pem, cert: x509.Certificate, trusted: list[x509.Certificate], now: datetime
) -> Iterable[str]:
    if now >= cert.not_valid_after_utc:
        yield f"it ended at {cert.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC: renew it"
    if now < cert.not_valid_before_utc:
        yield f"it begins at {cert.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC: look at the clock of this host"
    if not _belongs(cert, pem.key):
        yield f"{KEY} is not the key of {CERT}: issue both again"
    if len(_loaded(pem.cert, CERT)) == 1 and not any(_signed(cert, each) for each in trusted):
        yield f"none of the certificates in {CA} has signed it: whoever trusts only those refuses it"
    if all(now >= each.not_valid_after_utc for each in trusted):
        yield f"every certificate in {CA} has ended: the authority must be renewed"
    if serial_text(cert.serial_number) in denied(directory):
        yield "it is revoked: issue a new one"
    if _identity(cert).server_name not in _dns(cert):
        yield f"its names lack DNS:{_identity(cert).server_name}: as a server it is refused"
    mode = (directory / KEY).stat().st_mode & 0o077
    if mode:
        yield f"others may read {KEY}: chmod 600 it"


def denied(directory: Path) -> frozenset[str]:
    """Serial numbers that are refused. Raises PkiError: a list that cannot be read is not an empty one."""
    path = directory / DENY
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise PkiError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        found = cast(dict[str, Any], json.loads(data))["serials"]
        return frozenset(str(each) for each in found)
    except (ValueError, TypeError, KeyError) as error:
        raise PkiError(f'{path} is no deny list, {{"serials": ["0a1b..."]}}: {error}') from error


def write_denied(directory: Path, serials: Iterable[str]) -> None:
    """Raises OSError, and PkiError beyond MAX_DENIED."""
    found = sorted(set(serials))
    if len(found) > MAX_DENIED:
        raise PkiError(f"{len(found)} serial numbers are too many for a deny list: replace the authority")
    write_whole(directory / DENY, json.dumps({"serials": found}, indent=1).encode(), durable=True, mode=0o600)


def serial_text(serial: int) -> str:
    """As it is shown, typed and denied."""
    return f"{serial:x}"


def stamp(directory: Path) -> tuple[tuple[int, int, int], ...]:
    """Changes whenever one of the files does. Raises OSError."""
    found = ((directory / name).stat() for name in (CA, CERT, KEY))
    return tuple((each.st_ino, each.st_mtime_ns, each.st_size) for each in found)


def utc_now() -> datetime:
    """What certificates are compared with."""
    return datetime.now(UTC)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PEM_BYTES + 1)
    except OSError as error:
        said = f"{path} cannot be read: {error.strerror or error}; `drover pki issue` makes it"
        raise PkiError(said) from error
    if len(data) > MAX_PEM_BYTES:
        raise PkiError(f"{path} is larger than {MAX_PEM_BYTES >> 20} MiB: that is no certificate")
    return data


def _loaded(pem: bytes, what: str) -> list[x509.Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise PkiError(f"{what} holds no certificate in PEM: {error}") from error


def _identity(cert: x509.Certificate) -> Identity:
    from cryptography import x509

    uris = [each for each in _sans(cert, x509.UniformResourceIdentifier) if each.startswith(SCHEME)]
    if len(uris) != 1:
        raise PkiError(
            f"the certificate {cert.subject.rfc4514_string()} must carry one URI {SCHEME}..., not {len(uris)}"
        )
    try:
        return read_uri(uris[0])
    except BadName as error:
        raise PkiError(str(error)) from error


def _dns(cert: x509.Certificate) -> list[str]:
    from cryptography import x509

    return _sans(cert, x509.DNSName)


def _sans(cert: x509.Certificate, kind: type[x509.DNSName] | type[x509.UniformResourceIdentifier]) -> list[str]:
    from cryptography import x509

    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(kind)


def _belongs(cert: x509.Certificate, key: bytes) -> bool:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    try:
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError):
        return False
    wanted = cert.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == wanted


def _signed(cert: x509.Certificate, by: x509.Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        cert.verify_directly_issued_by(by)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
