"""Proof that a shared pool is one directory: a file in it with a word that nobody could guess.

Two hosts may have different directories behind one name (a mount that is missing, another export). A guest that moved
between them would find another image, or none. So the source says which word it reads, and the destination reads too.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from pathlib import Path

from agents.config import AgentConfig
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import GuestSpec, PoolKind

_TOKEN = ".drover-pool"
_LOOK_S = 2.0
_looks: dict[Path, threading.Lock] = {}
"""One thread at a time looks into a pool: of a file system that does not answer no more than one waits for ever, and
the agent's threads are there for its other guests."""


def token(pool: Path) -> str:
    """Of the directory behind a shared pool, made by whoever looks first. Blocking. Raises OSError."""
    path = pool / _TOKEN
    if not path.exists():
        fresh = pool / f"{_TOKEN}.{secrets.token_hex(8)}"
        try:
            fresh.write_text(secrets.token_hex(16))
            path.hardlink_to(fresh)  # whole, or somebody else's
        except FileExistsError:
            pass
        finally:
            fresh.unlink(missing_ok=True)
    return path.read_text().strip()


def tokens(config: AgentConfig, spec: GuestSpec) -> dict[str, str]:
    """Of the shared pools that the guest's disks are in, by name; one that cannot be told is left out. Blocking."""
    found: dict[str, str] = {}
    for name in sorted({disk.pool for disk in spec.disks}):
        pool = config.pools.get(name)
        if pool is not None and pool.kind is PoolKind.SHARED_FILE:
            look = _looks.setdefault(pool.path, threading.Lock())
            if not look.acquire(timeout=_LOOK_S):
                continue
            try:
                found[name] = token(pool.path)
            except OSError:  # read-only here: its locks, or its images' names, have to do
                continue
            finally:
                look.release()
    return found


def must_be_the_same(config: AgentConfig, spec: GuestSpec, there: Mapping[str, str]) -> None:
    """At the destination, with what the source reads. Blocking. Raises POOL_NOT_FOUND."""
    here = tokens(config, spec)
    for name, word in there.items():
        if name in here and here[name] != word:
            said = (
                f"pool {name} of {config.host} is not the directory that the source of guest {spec.name} has under it"
            )
            hint = f"is {config.pools[name].path} mounted there, and from the same server?"
            raise DroverError(RefusalReason.POOL_NOT_FOUND, f"{said}: {hint}")
