"""Repeat-safe creation: the request's record is made in the transaction that makes what it asks for."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from orchestrator.api.calls import Caller, Tools, write
from orchestrator.api.decisions import repeated
from orchestrator.core.records import RequestRecord
from orchestrator.ledger import paths
from orchestrator.ledger.gather import each, members
from orchestrator.ledger.ledger import op_create, op_set
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import Conflict, Delete, Done, Op, Store, StoreUnavailable

log = structlog.get_logger(__name__)

KEEP_S = 7 * 86_400.0
TICK_S = 1_800.0
KEPT_TICKS = int(KEEP_S / TICK_S) + 1
"""Between the first and the last of so many moves lie KEEP_S at least."""
SWEEP_S = 300.0


@dataclass(frozen=True, slots=True)
class Ticks:
    """`/reqclock`: zxids of the latest moves of the count but the very last, which is the node's own."""

    zxids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One create call. A caller that gave no id gets one: it tells our own write from others after a lost answer."""

    id: str
    digest: str

    @classmethod
    def of(cls, request_id: str, digest: str) -> Request:
        return cls(request_id or f"api-{uuid.uuid4().hex}", digest)

    async def earlier(self, tools: Tools) -> str:
        """The resource that this request created before; empty: none. Raises REQUEST_ID_REUSED."""
        found = await tools.ledger.read(RequestRecord, paths.request_id(self.id))
        return repeated(found[0] if found else None, self.id, self.digest)

    async def create(self, tools: Tools, operation: str, ops: Sequence[Op], caller: Caller) -> str:
        """Make it: the resource that stands for this request afterwards, `operation` or that of an earlier call with
        the same id. Empty: something that `ops` depends on moved; nothing was written. Raises as `write` does."""
        record = RequestRecord(operation, self.digest, tools.wall_s())
        path = paths.request_id(self.id)
        await tools.store.ensure(paths.shard(path))
        result = await write(tools, [op_create(path, record), *ops], caller)
        if isinstance(result, Done):
            return operation
        if isinstance(result, Conflict) and result.index > 0:
            return ""
        return await self.earlier(tools)


async def sweep_requests(store: Store, before: int) -> int:
    """Forget the requests that were written before this zxid. Returns how many."""

    async def one(name: str) -> bool:
        path = paths.request_id(name)
        node = await store.read(path)
        if node is None or node.mzxid >= before:
            return False
        return isinstance(await store.multi([Delete(path, node.version)]), Done)

    return sum(await each(await members(store, paths.REQUESTS), one))


class RequestClock:
    """How old requests are, without anybody's wall clock: the ledger counts intervals, and orders them.

    Each API of a ledger moves the count on once it has seen it stand still for TICK_S on its own monotonic clock; the
    zxids of the moves say which requests came before which of them. So an interval lasts TICK_S at least, and the count
    stands still while no API runs: an id is kept too long rather than too short.
    """

    def __init__(self, store: Store, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock_s = clock_s
        self._seen = -2
        """Version of the count."""
        self._since_s = 0.0

    async def look(self) -> int:
        """Moves the count on when it is time. Returns the zxid before which requests are older than KEEP_S; 0: none
        can be. Raises StoreUnavailable, BadRecord."""
        path = paths.REQUEST_CLOCK
        node = await self._store.read(path)
        version = node.version if node is not None else -1
        known: tuple[int, ...] = decode(Ticks, node.data, path=path).zxids if node is not None and node.data else ()
        if version != self._seen:
            self._seen, self._since_s = version, self._clock_s()
        elif self._clock_s() - self._since_s >= TICK_S:
            moved = Ticks((*known, node.mzxid)[-KEPT_TICKS:] if node is not None and node.data else ())
            write = op_create(path, moved) if node is None else op_set(path, moved, node.version)
            await self._store.multi([write])  # whoever was first: it has moved, which the next look sees
        return min(known) if len(known) == KEPT_TICKS else 0


async def sweep_for_ever(tools: Tools) -> None:
    clock = RequestClock(tools.store)
    while True:
        try:
            before = await clock.look()
            if before and (forgotten := await sweep_requests(tools.store, before)):
                log.info("old requests forgotten", count=forgotten)
        except StoreUnavailable as error:
            log.warning("ledger is not reachable", error=str(error))
        except BadRecord as error:
            log.error("the count of intervals cannot be read: no request is forgotten", error=str(error))
        await asyncio.sleep(SWEEP_S)
