"""The guests that concern this host, as the ledger lists them below the host (`ledger/markers.py`).

Told by a watch: at rest nothing is read. A guest that leaves is taken off the list by its keeper, as it is forgotten;
what else does not concern the host any more goes later, many at a time, so that few writes are spent on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from orchestrator.core.handover import GuestRecord
from orchestrator.ledger import paths
from orchestrator.ledger.gather import each
from orchestrator.ledger.markers import concerns
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import Check, Create, Delete, Done, Op, Store

BATCH = 50
"""Guests per transaction."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A guest's record."""

    version: int
    concerns: bool
    """It gives the guest to this host, or may come to."""


class Concerned:
    """`woken` is set when the list changed."""

    def __init__(self, host: str, store: Store) -> None:
        self._host = host
        self._store = store
        self._end: Callable[[], None] = lambda: None
        self.woken = asyncio.Event()

    def start(self) -> None:
        """Watch the list, on the running event loop; `woken` is set soon for the first time."""
        self._end = self._store.watch_children(paths.host_guests(self._host), lambda _names: self.woken.set())

    def close(self) -> None:
        """End the watch. What was to be taken off the list stays on it for the next agent."""
        self._end()

    async def listed(self) -> set[str]:
        """Uuids. Raises StoreUnavailable."""
        return set(await self._store.children(paths.host_guests(self._host)))

    async def add(self, uuids: Iterable[str]) -> set[str]:
        """List those again whose records give them to the host, as in a ledger that was restored. Returns those for
        which it is to be tried again. Raises StoreUnavailable."""
        if not (wanted := set(uuids)):
            return set()
        await self._make_root()

        async def one(uuid: str) -> list[Op]:
            node = await self._concerning(uuid)
            if node is None or not node.concerns:
                return []
            return [Check(paths.guest(uuid), node.version), Create(paths.host_guest(self._host, uuid), b"")]

        return await self._write({uuid: ops for uuid, ops in zip(wanted, await each(wanted, one), strict=True) if ops})

    async def drop(self, uuids: Iterable[str]) -> set[str]:
        """Take those off the list whose records give them to others. Returns those for which it is to be tried again,
        since they moved meanwhile. Raises StoreUnavailable."""
        wanted = set(uuids)

        async def one(uuid: str) -> list[Op]:
            path = paths.host_guest(self._host, uuid)
            mark, node = await self._store.read(path), await self._concerning(uuid)
            if mark is None or (node is not None and node.concerns):
                return []
            if node is None:  # its life ended long ago, or the ledger lost it; whoever writes it again lists it again
                return [Delete(path, mark.version)]
            return [Check(paths.guest(uuid), node.version), Delete(path, mark.version)]

        return await self._write({uuid: ops for uuid, ops in zip(wanted, await each(wanted, one), strict=True) if ops})

    async def _make_root(self) -> None:
        """Never below a host that is not there."""
        path = paths.host_guests(self._host)
        if await self._store.read(path) is None:
            host = await self._store.read(paths.host(self._host))
            if host is not None:
                await self._store.multi([Check(paths.host(self._host), host.version), Create(path, b"")])

    async def _concerning(self, uuid: str) -> _Known | None:
        """None: there is no record. One that cannot be read may concern anybody."""
        path = paths.guest(uuid)
        node = await self._store.read(path)
        if node is None:
            return None
        try:
            record = decode(GuestRecord, node.data, path=path)
        except BadRecord:
            return _Known(node.version, concerns=True)
        return _Known(node.version, concerns(record, self._host))

    async def _write(self, wanted: dict[str, list[Op]]) -> set[str]:
        """Each guest's operations or none of them. Returns the guests whose are not written for certain."""
        left: set[str] = set()
        for batch in _batches(wanted):
            ops = [op for uuid in batch for op in wanted[uuid]]
            if not isinstance(await self._store.multi(ops), Done):
                left.update(batch)
        return left


def _batches(uuids: Iterable[str]) -> list[list[str]]:
    todo = list(uuids)
    return [todo[start : start + BATCH] for start in range(0, len(todo), BATCH)]
