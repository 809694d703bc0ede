"""Proof that locks on a shared pool's files are seen across hosts: the source holds one, the destination looks for it.

A shared image's second defence is its locks. They are worth nothing where each host has its own: with a mount without
locks (`nolock`, `local_lock`), or a copy of the pool's volume behind the same name. One direction proves both: a host
that keeps its locks to itself neither shows its own nor sees another's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from agents.config import AgentConfig
from agents.host import byte_locks
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.ids import HostRef
from orchestrator.core.records import GuestSpec, PoolKind

_PROBE = ".drover-lock"
_HELD_S = 8.0
"""So long the source holds it: longer than the destination may take for its look."""
_GOOD_FOR_S = 3_600.0
"""What was proven is believed for so long: a pool may be mounted anew."""
_MOST = 256
_BYTE = 201
"""On which QEMU locks an image to say "nobody else may write"."""


def wanted(config: AgentConfig, spec: GuestSpec) -> frozenset[str]:
    """The shared pools whose locks are to keep a second writer off one of the guest's disks."""
    names = {disk.pool for disk in spec.disks if not disk.read_only}
    pools = {name: config.pools[name] for name in names if name in config.pools}
    return frozenset(n for n, pool in pools.items() if pool.kind is PoolKind.SHARED_FILE and pool.locks == "required")


class PoolLocks:
    """Of one host: those that it holds for others to see, and what it has seen of others'."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._seen: OrderedDict[tuple[str, HostRef], float] = OrderedDict()

    async def held(self, spec: GuestSpec) -> tuple[str, ...]:
        """The pools in which a lock is held from now on, for a few seconds. One that cannot be written to is left out:
        no image in it can be, either."""
        found: list[str] = []
        for name in sorted(wanted(self._config, spec)):
            with contextlib.suppress(OSError):
                probe = probe_of(self._config.pools[name].path, self._config.host)
                descriptor = await asyncio.to_thread(hold, probe)
                asyncio.get_running_loop().call_later(_HELD_S, _let_go, descriptor)
                found.append(name)
        return tuple(found)

    def unproven(self, spec: GuestSpec, source: HostRef) -> bool:
        """There is a pool whose locks were not seen between these power cycles of the two hosts."""
        return any(not self._is_known(name, source) for name in wanted(self._config, spec))

    async def must_be_seen(self, spec: GuestSpec, source: HostRef, held: Iterable[str]) -> None:
        """At the destination, while `source` holds locks in the pools `held`. Raises POOL_NOT_FENCED."""
        for name in sorted(wanted(self._config, spec) & frozenset(held)):
            if self._is_known(name, source):
                continue
            pool = self._config.pools[name].path
            if not await asyncio.to_thread(is_locked, probe_of(pool, source.host)):
                said = f"{self._config.host} does not see the locks that {source.host} holds in pool {name} ({pool})"
                hint = "is it mounted without locks, or is one of the two a copy? Mend it, or accept `locks: none`"
                raise DroverError(RefusalReason.POOL_NOT_FENCED, f"{said}: {hint}")
            self._seen[name, source] = time.monotonic()
            while len(self._seen) > _MOST:
                self._seen.popitem(last=False)

    def _is_known(self, pool: str, source: HostRef) -> bool:
        return time.monotonic() - self._seen.get((pool, source), float("-inf")) < _GOOD_FOR_S


def probe_of(pool: Path, host: str) -> Path:
    """The file on which that host shows its locks."""
    return pool / f"{_PROBE}.{host}"


def hold(probe: Path) -> int:
    """Lock it; the lock ends with the descriptor that is returned. Blocking. Raises OSError."""
    descriptor = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        byte_locks.lock_shared(descriptor, _BYTE, 1)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _let_go(descriptor: int) -> None:
    """In a thread: to close a file gives its lock back, which waits for whoever serves the pool."""
    threading.Thread(target=os.close, args=(descriptor,), name="lock of a pool", daemon=True).start()


def is_locked(probe: Path) -> bool:
    """Somebody else's lock is seen on it. Blocking. A file that is not there, or that cannot be asked, shows none."""
    try:
        descriptor = os.open(probe, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return byte_locks.is_locked(descriptor, _BYTE, 1)
    except OSError:
        return False
    finally:
        os.close(descriptor)
