"""What this host offers to guests' hardware: its pools, networks, firmware and CPU, as they are now."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import structlog

from agents.config import AgentConfig, PoolConfig
from agents.disks import images
from orchestrator.core.records import Pool, PoolKind
from orchestrator.whole import write_whole

log = structlog.get_logger(__name__)


def cpu_definitions(probed: Mapping[str, str]) -> dict[str, str]:
    """What CPU models that are another one on each host (`host`, `max`) are here, in words, by model: of what the
    engine's probe says."""
    found: dict[str, str] = json.loads(probed.get("cpu_definitions") or "{}")
    return found


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


_BASES = "bases.json"
_read: dict[str, tuple[list[int], str]] = {}
"""Path of a base -> what its file was when it was read, and its SHA-256."""


def bases(config: AgentConfig) -> dict[str, dict[str, str]]:
    """Pool -> its bases whose content has been read (`read_bases`) and has not changed since -> SHA-256. Blocking,
    reads no content."""
    found: dict[str, dict[str, str]] = {}
    for pool, each in config.pools.items():
        for name in each.bases:
            if digest := _known(each.path / name):
                found.setdefault(pool, {})[name] = digest
    return found


def read_bases(config: AgentConfig) -> None:
    """Read the content of each base that is not known yet. Blocking, for as long as large files take.

    What was read is noted down, so that a later agent need not read it again. A file that cannot be read has no
    content that anybody could rely on, and is left out.
    """
    note = config.dir / _BASES
    if not _read:
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            _read.update({path: (was, digest) for path, (was, digest) in json.loads(note.read_text()).items()})
    fresh = False
    for pool in config.pools.values():
        for path in (pool.path / name for name in pool.bases):
            if _known(path):
                continue
            try:
                was = _identity(path)
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if was == _identity(path):
                    _read[str(path)], fresh = (was, digest), True
            except OSError as error:
                log.warning("a base cannot be read: no guest's disk can lie on it", base=str(path), error=str(error))
    if fresh:
        try:
            write_whole(note, json.dumps(_read).encode())
        except OSError as error:
            log.warning("the content of bases is not noted down, and is read again by the next agent", error=str(error))


def _known(path: Path) -> str:
    was, digest = _read.get(str(path), ([], ""))
    try:
        return digest if was and was == _identity(path) else ""
    except OSError:
        return ""


def _identity(path: Path) -> list[int]:
    """Differs for another file, and for another content. Raises OSError."""
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


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
