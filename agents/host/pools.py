"""What this host offers to guests' hardware: its pools, networks and firmware, as they are now."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

import structlog

from agents.config import AgentConfig, PoolConfig
from agents.disks import images
from orchestrator.core.records import Pool, PoolKind

log = structlog.get_logger(__name__)


def published(config: AgentConfig) -> tuple[Pool, ...]:
    """The pools of this host with their size and room. Blocking. One that is not there has neither."""
    return tuple(_pool(name, each) for name, each in sorted(config.pools.items()))


def _pool(name: str, config: PoolConfig) -> Pool:
    size, free = room(config)
    return Pool(name, config.kind, config.fence, config.locks == "none", size, free)


def room(config: PoolConfig) -> tuple[int, int]:
    """Bytes of the pool in all, and free ones; 0 where that cannot be told, as of block volumes. Blocking."""
    if config.kind is PoolKind.BLOCK:
        return 0, 0
    try:
        found = os.statvfs(config.path)
    except OSError:
        return 0, 0
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def sweep(config: AgentConfig) -> None:
    """Remove the images of disks that have moved away, once their pool's time of grace is over. Blocking; what cannot
    be removed is tried again by the next call."""
    for name, pool in config.pools.items():
        if pool.kind is not PoolKind.LOCAL:
            continue
        try:
            for gone in images.sweep(pool.path, pool.grace_s):
                log.info("the image of a disk that moved away is removed", pool=name, image=gone.name)
        except OSError as error:
            log.warning("images of disks that moved away cannot be removed", pool=name, error=str(error))


def firmware_hashes(config: AgentConfig) -> dict[str, str]:
    """SHA-256 of each file of firmware that is configured and there, by role. Blocking."""
    files = {
        "uefi_code": config.firmware.uefi_code,
        "uefi_vars": config.firmware.uefi_vars,
        "bios": config.firmware.bios,
    }
    found = {role: _digest(path) for role, path in files.items() if path is not None}
    return {role: digest for role, digest in found.items() if digest}


def _digest(path: Path) -> str:
    try:
        status = path.stat()
        return _digest_of(path, status.st_mtime_ns, status.st_size)
    except OSError:
        return ""


@functools.lru_cache(maxsize=16)
def _digest_of(path: Path, mtime_ns: int, size: int) -> str:
    """Read once for each content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
