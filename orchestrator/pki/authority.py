"""The authority of one cluster: it signs who is who, and says which of its certificates are refused. Blocking.

Its directory (0700) holds `ca.pem`, `ca.key` (0600), `cluster.json` and `issued.json`: what it has signed that has not
ended yet, so that it can be named and revoked. Whoever has `ca.key` is everybody: keep it off the hosts.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from orchestrator.pki.files import (
    CA,
    Pem,
    PkiError,
    denied,
    make_private,
    other_names,
    serial_text,
    show,
    write_denied,
    write_pem,
)
from orchestrator.pki.names import Identity, Kind, of_role
from orchestrator.whole import write_whole

CA_KEY = "ca.key"
CA_DAYS = 3650
LEAF_HOURS = 24
"""Short, for a certificate that was stolen is worth little then; whoever serves renews it on the way."""
MAX_LEAF_HOURS = 24 * 825
MAX_ISSUED = 100_000
BACKDATED = timedelta(minutes=5)
"""Clocks of hosts differ; a certificate must hold at once everywhere."""
_BOTH_WAYS = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
_CLUSTER, _ISSUED, _LOCK = "cluster.json", "issued.json", "lock"


@dataclass(frozen=True, slots=True)
class Issued:
    """One certificate that was signed and has not ended."""

    serial: str
    uri: str
    not_after: str
    """ISO 8601, UTC."""
    revoked: bool = False


class Authority:
    """Open for as long as the object lives; commands side by side take turns by a lock on its directory."""

    def __init__(self, directory: Path) -> None:
        """Raises PkiError when there is none, or it cannot be read."""
        self.directory = directory
        try:
            self._key = load_pem_private_key((directory / CA_KEY).read_bytes(), None)
            self.ca = (directory / CA).read_bytes()
            self._cert = x509.load_pem_x509_certificates(self.ca)[0]
            self.cluster = str(cast(dict[str, Any], json.loads((directory / _CLUSTER).read_bytes()))["cluster"])
        except FileNotFoundError as error:
            raise PkiError(f"{directory} holds no authority: {error.filename} is missing; `drover pki init`") from error
        except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
            raise PkiError(f"the authority in {directory} cannot be read: {error}") from error

    @classmethod
    def create(cls, directory: Path, cluster: str, now: datetime, *, days: int = CA_DAYS) -> Authority:
        """A new one. Raises PkiError when something lies there already, BadName, OSError."""
        subject_of = of_role(cluster, "admin")  # the cluster's name is checked before anything is written
        if (directory / CA_KEY).exists() or (directory / CA).exists():
            raise PkiError(f"{directory} holds an authority already: a second one would be trusted by nobody")
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, subject_of.cluster),
                x509.NameAttribute(NameOID.COMMON_NAME, "drover authority"),
            ]
        )
        cert = (
            _builder(name, name, key.public_key(), now, now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        make_private(directory)
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_whole(directory / _CLUSTER, json.dumps({"cluster": cluster}).encode(), durable=True, mode=0o600)
        write_whole(directory / CA_KEY, secret, durable=True, mode=0o600)
        write_whole(directory / CA, cert.public_bytes(Encoding.PEM), durable=True, mode=0o600)
        return cls(directory)

    def issue(
        self,
        identity: Identity,
        directory: Path,
        now: datetime,
        *,
        hours: float = LEAF_HOURS,
        dns: Sequence[str] = (),
        ips: Sequence[str] = (),
    ) -> Issued:
        """A new key and its certificate, written for its holder, with the deny list. Raises PkiError, OSError."""
        key = ec.generate_private_key(ec.SECP256R1())
        cert, noted = self._signed(identity, key.public_key(), now, hours, dns, ips)
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_pem(directory, Pem(self.ca, cert, secret))
        write_denied(directory, denied(self.directory))
        return noted

    def renew(self, directory: Path, now: datetime, *, hours: float = LEAF_HOURS) -> Issued:
        """A new key and certificate for the identity and the names of the one that lies there, also if that has ended.

        Raises PkiError, also for one that was revoked: whoever took it would have it renewed. OSError."""
        found = show(directory, now)
        if found.serial in denied(self.directory):
            raise PkiError(f"the certificate of {found.identity} in {directory} is revoked: `drover pki issue`")
        dns, ips = other_names(directory)
        return self.issue(found.identity, directory, now, hours=hours, dns=dns, ips=ips)

    def sign(
        self,
        request: bytes,
        identity: Identity,
        now: datetime,
        *,
        hours: float = LEAF_HOURS,
        dns: Sequence[str] = (),
        ips: Sequence[str] = (),
    ) -> bytes:
        """The certificate (PEM) for a key that its holder keeps. Of the request (PEM) only the key counts: who it is
        for is said by `identity`. Raises PkiError, OSError."""
        try:
            asked = x509.load_pem_x509_csr(request)
        except ValueError as error:
            raise PkiError(f"what was sent is no request for a certificate: {error}") from error
        key = asked.public_key()
        if not asked.is_signature_valid or not isinstance(key, ec.EllipticCurvePublicKey):
            raise PkiError("a request must be signed by the key that it is for, and that be one of an elliptic curve")
        return self._signed(identity, key, now, hours, dns, ips)[0]

    def revoke(self, serials: Iterable[str]) -> frozenset[str]:
        """All that are refused from now on, wherever the deny list of this directory goes. Raises PkiError, OSError."""
        with self._alone():
            found = denied(self.directory) | frozenset(serials)
            write_denied(self.directory, found)
        return found

    def issued(self, now: datetime) -> list[Issued]:
        """What has not ended, oldest first. Raises PkiError."""
        try:
            noted = [Issued(**each) for each in json.loads((self.directory / _ISSUED).read_bytes())]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            raise PkiError(f"{self.directory / _ISSUED} cannot be read: {error}") from error
        refused = denied(self.directory)
        held = [each for each in noted if datetime.fromisoformat(each.not_after) > now]
        return [Issued(each.serial, each.uri, each.not_after, each.serial in refused) for each in held]

    def _signed(
        self,
        identity: Identity,
        key: ec.EllipticCurvePublicKey,
        now: datetime,
        hours: float,
        dns: Sequence[str],
        ips: Sequence[str],
    ) -> tuple[bytes, Issued]:
        if identity.cluster != self.cluster:
            raise PkiError(f"this is the authority of {self.cluster}, not of {identity.cluster}")
        if not 0 < hours <= MAX_LEAF_HOURS:
            raise PkiError(f"a certificate lasts more than 0 and at most {MAX_LEAF_HOURS} hours, not {hours:g}")
        ends = min(now + timedelta(hours=hours), self._cert.not_valid_after_utc)
        if ends <= now:
            raise PkiError("the authority itself has ended: `drover pki init` in a new directory, then trust both")
        builder = _builder(_subject(identity), self._cert.subject, key, now, ends)
        cert = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(_names(identity, dns, ips)), critical=False)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(cast(Any, self._key).public_key()), critical=False
            )
            .sign(cast(Any, self._key), hashes.SHA256())
        )
        noted = Issued(serial_text(cert.serial_number), identity.uri, cert.not_valid_after_utc.isoformat())
        self._note(noted, now)
        return cert.public_bytes(Encoding.PEM), noted

    def _note(self, issued: Issued, now: datetime) -> None:
        with self._alone():
            held = [*self.issued(now), issued]
            if len(held) > MAX_ISSUED:
                raise PkiError(f"{MAX_ISSUED} certificates have not ended: make them shorter")
            data = json.dumps([asdict(each) for each in held]).encode()
            write_whole(self.directory / _ISSUED, data, durable=True, mode=0o600)

    @contextmanager
    def _alone(self) -> Generator[None]:
        descriptor = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # held for one small file; who dies gives it back
            yield
        finally:
            os.close(descriptor)


def make_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A request (PEM) for a certificate of that key."""
    empty = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return empty.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(ends)
    )


def _subject(identity: Identity) -> x509.Name:
    """Written from the general to the special, which RFC 4514 turns round."""
    parts = [
        (NameOID.ORGANIZATION_NAME, identity.cluster),
        (NameOID.ORGANIZATIONAL_UNIT_NAME, str(identity.kind)),
        (NameOID.COMMON_NAME, identity.name),
    ]
    return x509.Name([x509.NameAttribute(kind, text) for kind, text in parts])


def _names(identity: Identity, dns: Sequence[str], ips: Sequence[str]) -> list[x509.GeneralName]:
    own = [identity.server_name, *dns]
    if identity.kind is Kind.HOST and identity.name.lower() not in own:
        own.append(identity.name.lower())
    try:
        return [
            x509.UniformResourceIdentifier(identity.uri),
            *(x509.DNSName(each) for each in own),
            *(x509.IPAddress(ipaddress.ip_address(each)) for each in ips),
        ]
    except ValueError as error:
        raise PkiError(f"a certificate cannot carry that name: {error}") from error


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=not signs,  # QEMU takes no certificate without it
        data_encipherment=False,
        key_agreement=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
