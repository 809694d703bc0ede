"""The API's configuration file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.ledger import paths
from orchestrator.ledger.records import decode


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """`api.json`."""

    listen: tuple[str, ...]
    """Addresses to serve at, `host:port` or `unix:PATH`."""
    zookeeper: str
    """host:port[,host:port...]"""
    chroot: str = paths.CHROOT
    chaos: bool = False
    """Whether devices may be made to misbehave on request."""
    log_level: str = "info"


def load(path: Path) -> ApiConfig:
    """Raises OSError, or BadRecord with the field that is wrong."""
    return decode(ApiConfig, path.read_bytes(), path=str(path))
