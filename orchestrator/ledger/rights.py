"""PURE. Who may write which node of the ledger, where the ledger knows who asks (TLS).

A part of the control plane may write everything. A host's agent writes the records of the guests that are its own or on
their way to it, the requests of the migrations that it is the source of, and its own host's nodes: whoever holds a
host's certificate reaches no further than that host. Everybody with a certificate reads everything.

ZooKeeper asks for the right to create and to delete at the node above, and for the right to write at the node itself;
it asks for nothing of what lies above. So a node is described by two sets of hosts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import IntFlag

from orchestrator.core.death import hosts_of
from orchestrator.core.handover import GuestRecord
from orchestrator.ledger import paths
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.pki.names import Role, of_host, of_role

CONTROL = (Role.COORDINATOR, Role.API, Role.ADMIN)
"""Roles that may write everything, and change who may."""


class Right(IntFlag):
    """ZooKeeper's permissions."""

    READ = 1
    WRITE = 2
    CREATE = 4
    DELETE = 8
    ADMIN = 16
    ALL = 31


@dataclass(frozen=True, slots=True)
class Rights:
    """Of one node, beyond those of the control plane."""

    writers: frozenset[str] = frozenset()
    """Hosts that may replace its content."""
    makers: frozenset[str] = frozenset()
    """Hosts that may make and remove nodes below it."""
    anybody: Right = Right.READ
    """What everybody with a certificate may do."""


def of(path: str, content: bytes = b"", writers: Collection[str] = ()) -> Rights:
    """The rights of the node at `path`. `content` is what it is created with: a guest's record says whose it is.
    `writers`: hosts that the caller names, for nodes whose place does not say it."""
    if path == paths.BARRIER:
        return Rights(anybody=Right.READ | Right.CREATE)
    parts = path.split("/")[1:]
    root = f"/{parts[0]}"
    if root == paths.HOSTS and len(parts) > 1:
        own = frozenset({parts[1]})
        # Whether a host takes guests is the operator's word, not the host's.
        return Rights() if parts[2:] == ["cordon"] else Rights(own, own)
    if root == paths.FENCE and len(parts) > 1:
        return Rights(makers=frozenset({parts[1]})) if len(parts) == 2 else Rights()
    if root == paths.GUESTS and len(parts) == 3:
        return Rights(frozenset(writers) or _hosts_of(content))
    return Rights(frozenset(writers))


def _hosts_of(content: bytes) -> frozenset[str]:
    try:
        return frozenset(hosts_of(decode(GuestRecord, content)))
    except BadRecord:
        return frozenset()


def listed(cluster: str, rights: Rights) -> tuple[tuple[str, str, int], ...]:
    """As ZooKeeper keeps them: scheme, id, permissions. The same rights always give the same list."""
    every = Right.READ | Right.WRITE | Right.CREATE | Right.DELETE | Right.ADMIN
    found = [("x509", of_role(cluster, role).subject, int(every)) for role in CONTROL]
    for host in sorted(rights.writers | rights.makers):
        may = Right.WRITE if host in rights.writers else Right(0)
        may |= Right.CREATE | Right.DELETE if host in rights.makers else Right(0)
        found.append(("x509", of_host(cluster, host).subject, int(may)))
    return (*found, ("world", "anyone", int(rights.anybody)))
