"""The images in this host's pools: which there are, and how one is brought in.

An import is written under a name of its own, made durable, and given its own name at the very end, so that an image of
that name is whole or not there. What a cut import leaves is removed at once, by the next agent at the latest.

A pool may be on a file system that does not answer. Whoever asks for its images waits for a bounded time, and all looks
together take a few threads of their own: guests do not wait for any of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import heapq
import os
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog

from agents.config import AgentConfig, PoolConfig
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.core.images import (
    CHUNK_BYTES,
    HEADER_BYTES,
    ImageHeader,
    ImageImport,
    content_error,
    header_of,
    import_errors,
)
from orchestrator.core.naming import MOVED_AWAY, file_error
from orchestrator.core.records import PoolKind
from orchestrator.whole import flush

log = structlog.get_logger(__name__)

T = TypeVar("T")

LOOK_S = 10.0
"""For one look at a pool, or one write to it."""
SYNC_S = 120.0
"""For making an image durable that was written without waiting."""
QUIET_S = 60.0
"""Whoever brings an image in and sends nothing for so long has given up."""
MAX_IMPORTS = 4
"""At a time."""
MAX_LISTED = 1_000
MAX_LOOKED_AT = 100_000
"""Files of one pool."""
WRITE_BYTES = 1 << 20
LEFT_S = 86_400.0
"""What another host's import left in a shared pool is removed once nothing was written to it for so long."""

_UNDER_WAY = re.compile(r"\.(?P<host>[a-z0-9-]+)\.[0-9a-f]{16}\.import")


@dataclass(frozen=True, slots=True)
class FoundImage:
    """One image of a pool."""

    name: str
    header: ImageHeader
    used_bytes: int
    """Of the pool."""


class PoolImages:
    """Of one host. `close` it with the agent."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._threads = ThreadPoolExecutor(MAX_IMPORTS + 2, "images")
        self._imports = 0
        self._under_way: set[Path] = set()

    def close(self) -> None:
        """Waits for nothing: a pool may never answer."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _within(self, pool: str, seconds: float, work: Callable[[], T]) -> T:
        """Raises POOL_NOT_FOUND when the pool does not answer, or cannot be read or written."""
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except TimeoutError:
            said = f"pool {pool} of {self._config.host} did not answer within {seconds:g} s"
            raise DroverError(RefusalReason.POOL_NOT_FOUND, said) from None
        except OSError as error:
            where = f"pool {pool} of {self._config.host}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DroverError(RefusalReason.POOL_FULL, f"{where} has no room left: {error.strerror}") from error
            raise DroverError(RefusalReason.POOL_NOT_FOUND, f"{where}: {error}") from error

    def _pool(self, name: str) -> PoolConfig:
        pool = self._config.pools.get(name)
        if pool is None:
            raise DroverError(RefusalReason.POOL_NOT_FOUND, f"{self._config.host} has no pool {name}", field="pool")
        if pool.kind is PoolKind.BLOCK:
            said = f"pool {name} of {self._config.host} has volumes, no image files: use the tools of its storage"
            raise DroverError(RefusalReason.POOL_NOT_FOUND, said, field="pool")
        return pool

    # --- looking ------------------------------------------------------------------------------------------------------

    async def listed(self, pool: str, after: str = "", size: int = MAX_LISTED) -> tuple[list[FoundImage], bool]:
        """The first `size` images after that name, and whether there are more. Raises POOL_NOT_FOUND."""
        path = self._pool(pool).path
        return await self._within(pool, LOOK_S, lambda: _listed(path, after, size))

    # --- bringing in --------------------------------------------------------------------------------------------------

    async def receive(self, image: ImageImport, parts: AsyncIterator[tuple[bytes, bytes]]) -> FoundImage:
        """`parts`: data, and in the last one the SHA-256 of everything. Returns once the image is durable.

        Raises INVALID_ARGUMENT, ALREADY_EXISTS, POOL_NOT_FOUND, POOL_FULL and BUSY; nothing is left in the pool then.
        """
        if bad := import_errors(image):
            raise invalid(bad)
        pool = self._pool(image.pool)
        if self._imports >= MAX_IMPORTS:
            said = f"{self._config.host} takes in {MAX_IMPORTS} images already: try again when one of them is there"
            raise DroverError(RefusalReason.BUSY, said)
        self._imports += 1
        try:
            await self._within(image.pool, LOOK_S, lambda: self._must_have_room(pool.path, image))
            return await self._received(pool.path, image, _Incoming(image, parts))
        finally:
            self._imports -= 1

    def _must_have_room(self, pool: Path, image: ImageImport) -> None:
        """Blocking."""
        if (pool / image.name).exists():
            raise _taken(image, self._config.host)
        found = os.statvfs(pool)
        free = found.f_bavail * found.f_frsize
        if image.size_bytes > free:
            said = f"pool {image.pool} of {self._config.host} has {free} bytes free, the image takes {image.size_bytes}"
            raise DroverError(RefusalReason.POOL_FULL, said)

    async def _received(self, pool: Path, image: ImageImport, incoming: _Incoming) -> FoundImage:
        first = await incoming.start()
        if wrong := content_error(image, first):
            raise DroverError(RefusalReason.INVALID_ARGUMENT, wrong, field="image.format")
        path = pool / f".{self._config.host}.{secrets.token_hex(8)}.import"
        self._under_way.add(path)
        try:
            await self._filled(path, image, incoming)
            await self._within(image.pool, SYNC_S, lambda: _named(path, pool / image.name, image, self._config.host))
        finally:
            # Not awaited where the caller is cut off: the thread does it all the same.
            self._threads.submit(_removed, path).add_done_callback(lambda _: self._under_way.discard(path))
        log.info("image brought in", pool=image.pool, image=image.name, bytes=image.size_bytes)
        return await self._within(image.pool, LOOK_S, lambda: _found(pool / image.name))

    async def _filled(self, path: Path, image: ImageImport, incoming: _Incoming) -> None:
        file = _File(path)
        try:
            await self._within(image.pool, LOOK_S, lambda: file.create(image.size_bytes))
            at = 0
            async for block in incoming.blocks():
                await self._within(image.pool, SYNC_S, lambda at=at, block=block: file.write(block, at))
                at += len(block)
            await self._within(image.pool, SYNC_S, file.sync)
        finally:
            if file.close():  # nothing is done with it just now
                self._threads.submit(file.close_now)

    def sweep(self) -> None:
        """Remove what imports left that nobody carries on: this host's own, and old ones of others. Blocking."""
        for name, pool in self._config.pools.items():
            if pool.kind is PoolKind.BLOCK:
                continue
            try:
                for path in pool.path.glob(".*.import"):
                    if path not in self._under_way and self._is_left(path):
                        path.unlink(missing_ok=True)
                        log.info("what a cut import left is removed", pool=name, file=path.name)
            except OSError as error:
                log.warning("what imports left cannot be removed", pool=name, error=str(error))

    def _is_left(self, path: Path) -> bool:
        known = _UNDER_WAY.fullmatch(path.name)
        if known is None:
            return False
        return known["host"] == self._config.host or time.time() - path.stat().st_mtime > LEFT_S


class _Incoming:
    """The data of one import as it comes, in blocks, checked against what was said of it."""

    def __init__(self, image: ImageImport, parts: AsyncIterator[tuple[bytes, bytes]]) -> None:
        self._image = image
        self._parts = parts
        self._digest = hashlib.sha256()
        self._told = b""
        self._seen = 0
        self._held = bytearray()

    async def start(self) -> bytes:
        """The first HEADER_BYTES, or everything. Raises as `blocks`."""
        while len(self._held) < min(HEADER_BYTES, self._image.size_bytes) and await self._more():
            pass
        return bytes(self._held[:HEADER_BYTES])

    async def blocks(self) -> AsyncIterator[bytes]:
        """Raises INVALID_ARGUMENT for too much, too little or other data, and for a sender that sends nothing."""
        more = True
        while more:
            while more and len(self._held) < WRITE_BYTES:
                more = await self._more()
            block = bytes(self._held)
            self._held.clear()
            if block:
                yield block
        if self._seen != self._image.size_bytes:
            raise _wrong(f"{self._seen} bytes came of the {self._image.size_bytes} that the image has")
        if self._told != self._digest.digest():
            raise _wrong("what came has another SHA-256 than what was sent: bring it in again")

    async def _more(self) -> bool:
        """False: that was all."""
        if self._told:
            return False
        try:
            async with asyncio.timeout(QUIET_S):
                data, self._told = await anext(self._parts)
        except StopAsyncIteration:
            raise _wrong(f"the data ended after {self._seen} bytes, without its SHA-256") from None
        except TimeoutError:
            raise _wrong(f"nothing came for {QUIET_S:g} s, after {self._seen} bytes") from None
        self._seen += len(data)
        if len(data) > CHUNK_BYTES:
            raise _wrong(f"at most {CHUNK_BYTES} bytes at a time, not {len(data)}")
        if self._seen > self._image.size_bytes:
            raise _wrong(f"more than the {self._image.size_bytes} bytes that the image has")
        self._digest.update(data)
        self._held += data
        return not self._told


def _wrong(said: str) -> DroverError:
    return DroverError(RefusalReason.INVALID_ARGUMENT, said, field="data")


def _taken(image: ImageImport, host: str) -> DroverError:
    said = f"there is an image {image.name} in pool {image.pool} of {host} already: choose another name"
    return DroverError(RefusalReason.ALREADY_EXISTS, said, field="image.name")


# --- files; all of it blocks ------------------------------------------------------------------------------------------


def _listed(pool: Path, after: str, size: int) -> tuple[list[FoundImage], bool]:
    names: list[str] = []
    with os.scandir(pool) as entries:
        for number, entry in enumerate(entries):
            if number >= MAX_LOOKED_AT:
                raise OSError(errno.E2BIG, f"there are more than {MAX_LOOKED_AT} files in it", str(pool))
            if entry.name > after and _is_image(entry):
                names.append(entry.name)
    size = size if 0 < size <= MAX_LISTED else MAX_LISTED
    first = heapq.nsmallest(size + 1, names)
    found = [image for name in first[:size] if (image := _found_or_gone(pool / name)) is not None]
    return found, len(first) > size


def _is_image(entry: os.DirEntry[str]) -> bool:
    """A file under a name that a guest could give, and none that is on its way in or out."""
    if file_error(entry.name, "") or MOVED_AWAY.fullmatch(entry.name):
        return False
    return entry.is_file(follow_symlinks=False)


def _found_or_gone(path: Path) -> FoundImage | None:
    try:
        return _found(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return FoundImage(path.name, header_of(b"", 0).told(f"it cannot be read: {error.strerror}"), 0)


def _found(path: Path) -> FoundImage:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        return FoundImage(
            path.name, header_of(os.pread(descriptor, HEADER_BYTES, 0), status.st_size), status.st_blocks * 512
        )
    finally:
        os.close(descriptor)


class _File:
    """One image that comes in. Whoever waits for the pool may give up, and closes it then, while a thread is still at
    it: the descriptor is closed behind that thread, never under it, where its number could soon be another file's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._guard = threading.Lock()
        """For the two words below; nobody does anything with the file meanwhile."""
        self._at_it = False
        self._over = False

    def create(self, size_bytes: int) -> None:
        """Of that size, without content."""
        with self._using():
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._descriptor, size_bytes)

    def write(self, block: bytes, at: int) -> None:
        """Zeros stay a hole."""
        if not any(block):
            return
        with self._using():
            done = 0
            while done < len(block):
                done += os.pwrite(self._descriptor, memoryview(block)[done:], at + done)

    def sync(self) -> None:
        """Once it returns the content is durable."""
        with self._using():
            os.fsync(self._descriptor)

    @contextlib.contextmanager
    def _using(self) -> Generator[None]:
        with self._guard:
            if self._over:
                raise OSError(errno.EBADF, "it was given up", str(self._path))
            self._at_it = True
        try:
            yield
        finally:
            with self._guard:
                self._at_it = False
                over = self._over
            if over:
                self.close_now()

    def close(self) -> bool:
        """Nothing is begun with it any more. True: nothing is under way, and `close_now` is the caller's. Does not
        wait."""
        with self._guard:
            self._over = True
            return not self._at_it

    def close_now(self) -> None:
        """Idempotent. The pool may be on another machine."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _named(path: Path, name: Path, image: ImageImport, host: str) -> None:
    """Never over one that is there."""
    try:
        name.hardlink_to(path)
    except FileExistsError:
        raise _taken(image, host) from None
    flush(name.parent)


def _removed(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # the next sweep tries again
        log.warning("what an import left cannot be removed yet", file=str(path), error=str(error))
