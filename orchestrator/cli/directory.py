"""Where the API of a cluster on this machine listens: one socket in one directory. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGED = Path("/run/drover-api/api.sock")
"""Where the API of the packages listens (deploy/packages)."""


def default_dir() -> Path:
    """The directory used when none is named: $DROVER_DIR, else ~/.drover."""
    return Path(os.environ.get("DROVER_DIR") or Path.home() / ".drover")


def resolved(directory: Path | str) -> Path:
    """The same path whichever way the directory is spelt."""
    return Path(directory).expanduser().resolve()


def api_sockets(directory: Path | str) -> tuple[Path, ...]:
    """The sockets of all APIs in a cluster's directory; where there is none that of this host's packages, and without
    it the one at which a first would listen."""
    found = sorted(resolved(directory).glob("api*.sock"), key=lambda path: (len(path.name), path.name))
    if not found and PACKAGED.exists():
        return (PACKAGED,)
    return tuple(found) or (api_socket(directory),)


def api_socket(directory: Path | str) -> Path:
    """The API's UNIX socket in a cluster's directory."""
    return resolved(directory) / "api.sock"
