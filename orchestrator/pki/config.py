"""The section `tls` of every configuration file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Tls:
    """With whose certificate this process speaks to others, and whom it believes."""

    directory: Path
    """Of its identity: `ca.pem`, `cert.pem` and `key.pem` (docs/security.md). Renewed files are read at the next
    connection."""


def directory_of(tls: Tls | None) -> Path | None:
    """None: it has no identity."""
    return None if tls is None else tls.directory
