"""Certificates for tests: the authority of a cluster, and the directories of whoever is in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.pki import authority
from orchestrator.pki.files import utc_now
from orchestrator.pki.names import Identity, of_host, of_role

CLUSTER = "lab"


class Certificates:
    """Below `directory`, as those of a cluster on one machine."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._authority = authority.Authority.create(directory / "ca", CLUSTER, utc_now())

    def host(self, name: str, ips: Sequence[str] = ()) -> Path:
        """Directory of the identity of that host's agent."""
        return self._issued(of_host(CLUSTER, name), ips)

    def role(self, name: str, ips: Sequence[str] = ()) -> Path:
        return self._issued(of_role(CLUSTER, name), ips)

    def _issued(self, identity: Identity, ips: Sequence[str]) -> Path:
        made = self._directory / identity.kind / identity.name
        self._authority.issue(identity, made, utc_now(), ips=ips)
        return made
