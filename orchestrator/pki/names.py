"""PURE. What the holder of a certificate is called: by us, by ZooKeeper and QEMU, and by TLS.

Three spellings of one identity, each because of who reads it:

- the URI `spiffe://drover/<cluster>/host/<host>` or `/role/<role>` (`/role/<role>/<user>` where several people have one
  role): everything of ours goes by it;
- the subject `CN=<name>,OU=host|role,O=<cluster>`: ZooKeeper 3.8 and QEMU's `authz-simple` see nothing else;
- the server name `<name>.<host|role>.<cluster>.drover`: what a client's TLS compares, for addresses change and several
  hosts may stand behind one. A host cannot be called so that it passes for a role.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

SCHEME = "spiffe://drover/"
_WORD = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_USER = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._@-]{0,61}[A-Za-z0-9])?")


class Kind(StrEnum):
    """Of an identity."""

    HOST = "host"
    """The agent of one host."""
    ROLE = "role"
    """A part of the control plane, or somebody who uses it."""


class Role(StrEnum):
    """What one is there to do. ZooKeeper goes by it; no gRPC service asks for it yet."""

    COORDINATOR = "coordinator"
    API = "api"
    ZOOKEEPER = "zookeeper"
    """A server of the ensemble: it calls nobody of us."""
    ADMIN = "admin"
    """Enrols and removes hosts, makes tokens, repairs: everything that an operator may not."""
    OPERATOR = "operator"
    """Guests, migrations, evacuations."""
    SCHEDULER = "scheduler"
    """A cloud scheduler: creates and moves guests, empties no host."""
    VIEWER = "viewer"
    """Reads."""
    CHAOS = "chaos"
    """Injects faults, where the cluster allows it at all, and reads."""
    FENCER = "fencer"
    """Says that a host is dead, and reads."""


class BadName(ValueError):
    """What was given is no name that a certificate can carry. The text says which and why."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Of one cluster. Raises BadName."""

    cluster: str
    kind: Kind
    name: str
    """Of the host, or the role."""
    user: str = ""
    """Whose certificate of a role it is; empty: that of the role itself. Only named in logs: rights follow the role."""

    def __post_init__(self) -> None:
        if not _WORD.fullmatch(self.cluster):
            raise BadName(f"{self.cluster!r} is no name of a cluster: a-z, 0-9 and -, at most 63")
        if self.kind is Kind.HOST and not _HOST.fullmatch(self.name):
            raise BadName(f"{self.name!r} is no name of a host: letters, digits, . _ and -, at most 63")
        if self.kind is Kind.ROLE and self.name not in set(Role):
            raise BadName(f"{self.name!r} is no role: {', '.join(Role)}")
        if self.user and (self.kind is Kind.HOST or not _USER.fullmatch(self.user)):
            raise BadName(f"{self.user!r} cannot name the holder of a role: letters, digits, . _ @ and -, at most 63")

    @property
    def uri(self) -> str:
        """The URI in its certificate."""
        return "/".join(filter(None, (f"{SCHEME}{self.cluster}", self.kind, self.name, self.user)))

    @property
    def subject(self) -> str:
        """As RFC 4514 writes it, which is how ZooKeeper names it. Every holder of a role has the same."""
        return f"CN={self.name},OU={self.kind},O={self.cluster}"

    @property
    def server_name(self) -> str:
        """What its certificate is good for as a server, and a client asks for."""
        return f"{self.name}.{self.kind}.{self.cluster}.drover".lower()

    def __str__(self) -> str:
        """As operators read it: host/h1, role/operator/alice."""
        return "/".join(filter(None, (self.kind, self.name, self.user)))


def of_host(cluster: str, name: str) -> Identity:
    """Of the agent of that host. Raises BadName."""
    return Identity(cluster, Kind.HOST, name)


def of_role(cluster: str, role: str, user: str = "") -> Identity:
    """Of a part of the control plane, or a user. Raises BadName."""
    return Identity(cluster, Kind.ROLE, role, user)


def read_uri(uri: str) -> Identity:
    """The identity that a certificate's URI names. Raises BadName for any other."""
    cluster, *rest = uri.removeprefix(SCHEME).split("/")
    if not uri.startswith(SCHEME) or len(rest) not in (2, 3) or rest[0] not in set(Kind) or "" in rest:
        raise BadName(f"{uri[:200]!r} is no identity of ours: {SCHEME}<cluster>/host/<name> or /role/<role>")
    return Identity(cluster, Kind(rest[0]), rest[1], rest[2] if len(rest) == 3 else "")


def read_short(cluster: str, text: str) -> Identity:
    """From what an operator types: host/h1, role/operator, role/operator/alice. Raises BadName."""
    return read_uri(f"{SCHEME}{cluster}/{text}")
