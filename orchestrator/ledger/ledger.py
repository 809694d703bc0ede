"""Typed reads and writes over a `Store`: records instead of bytes, and the pattern for writes of unknown outcome."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from orchestrator.core.handover import GuestRecord
from orchestrator.ledger import layout, paths
from orchestrator.ledger.gather import members
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Create, SetData, Store, WriteResult

T = TypeVar("T")


def op_create(path: str, record: object) -> Create:
    """Part of a transaction: a new persistent node that holds the record."""
    return Create(path, encode(record))


def op_set(path: str, record: object, version: int) -> SetData:
    """Part of a transaction: replace the record of a node that still has this version."""
    return SetData(path, encode(record), version)


class Ledger:
    """Reads raise StoreUnavailable or BadRecord; writes answer as `Store.multi` does."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def init_tree(self) -> None:
        """Create the roots where missing; may be repeated. Raises WrongLayout in a tree of another layout, which
        is not touched."""
        await layout.must_be_ours(self.store)
        for root in paths.ROOTS:
            await self.store.ensure(root)

    async def read(self, kind: type[T], path: str) -> tuple[T, int] | None:
        """The record and its node's version; None: there is no such node."""
        found = await self.store.read(path)
        return None if found is None else (decode(kind, found.data, path=path), found.version)

    async def read_guest(self, uuid: str) -> tuple[GuestRecord, int, int] | None:
        """Record, version and mzxid."""
        path = paths.guest(uuid)
        found = await self.store.read(path)
        return None if found is None else (decode(GuestRecord, found.data, path=path), found.version, found.mzxid)

    async def list_guests(self) -> tuple[str, ...]:
        """Uuids of all lives, sorted, also of those that are over."""
        return await members(self.store, paths.GUESTS)

    async def list_hosts(self) -> tuple[str, ...]:
        """Names of all registered hosts, sorted."""
        return await self.store.children(paths.HOSTS)

    async def list_evacuations(self) -> tuple[str, ...]:
        """Ids of all evacuations that are not forgotten."""
        return await members(self.store, paths.EVACUATIONS)

    async def list_migrations(self) -> tuple[str, ...]:
        """Ids of all migrations that are not forgotten."""
        return await members(self.store, paths.MIGRATIONS)

    async def list_requests(self) -> tuple[str, ...]:
        """Request ids, sorted."""
        return await members(self.store, paths.REQUESTS)

    async def cas(self, path: str, record: object, version: int) -> WriteResult:
        """Replace one record if its node still has this version; how that ended must be looked at."""
        return await self.store.multi([op_set(path, record, version)])

    async def settle(self, read_again: Callable[[], Awaitable[T]]) -> T:
        """After OutcomeUnknown: a barrier, then the read; the caller decides by the writer or request id it finds."""
        await self.store.barrier()
        return await read_again()
