"""Where the API of a cluster on this machine listens: one socket in one directory. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGED = Path("/run/drover-api/api.sock")
"""Where the API of the packages listens (deploy/packages)."""
PACKAGED_CONFIG = Path("/etc/drover/api.yaml")
"""Without it the packages' API is not run here."""
HOME = ".drover"
"""Below the home directory: where a local cluster is when nothing else is named."""


def default_dir() -> Path:
    """The directory used when none is named: $DROVER_DIR, else ~/.drover."""
    return Path(os.environ.get("DROVER_DIR") or Path.home() / HOME)


def resolved(directory: Path | str) -> Path:
    """The same path whichever way the directory is spelt."""
    return Path(directory).expanduser().resolve()


def api_sockets(directory: Path | str) -> tuple[Path, ...]:
    """The sockets of all APIs in a cluster's directory, else the one at which a first would listen. The packages' API
    of this host is meant where nobody named a directory and no local cluster is up, also while it restarts."""
    found = sorted(resolved(directory).glob("api*.sock"), key=lambda path: (len(path.name), path.name))
    unnamed = resolved(directory) == resolved(Path.home() / HOME)
    if not found and unnamed and (PACKAGED.exists() or PACKAGED_CONFIG.exists()):
        return (PACKAGED,)
    return tuple(found) or (api_socket(directory),)


def api_socket(directory: Path | str) -> Path:
    """The API's UNIX socket in a cluster's directory."""
    return resolved(directory) / "api.sock"
