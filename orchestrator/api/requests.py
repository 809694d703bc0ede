"""Repeat-safe creation: the request's record is made in the transaction that makes what it asks for."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from orchestrator.api.calls import Caller, Tools, write
from orchestrator.api.decisions import repeated
from orchestrator.core.records import RequestRecord
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import op_create
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import Conflict, Delete, Done, Op, Store, StoreUnavailable

log = structlog.get_logger(__name__)

KEEP_S = 7 * 86_400.0
SWEEP_S = 3_600.0


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
        result = await write(tools, [op_create(paths.request_id(self.id), record), *ops], caller)
        if isinstance(result, Done):
            return operation
        if isinstance(result, Conflict) and result.index > 0:
            return ""
        return await self.earlier(tools)


async def sweep_requests(store: Store, now_s: float) -> int:
    """Forget requests that nobody repeats any more. Returns how many."""
    forgotten = 0
    for name in await store.children(paths.REQUESTS):
        path = paths.request_id(name)
        node = await store.read(path)
        if node is None:
            continue
        try:
            old = now_s - decode(RequestRecord, node.data, path=path).create_time_s > KEEP_S
        except BadRecord as error:
            log.error("request record cannot be read", error=str(error))
            continue
        if old and isinstance(await store.multi([Delete(path, node.version)]), Done):
            forgotten += 1
    return forgotten


async def sweep_for_ever(tools: Tools) -> None:
    while True:
        try:
            if forgotten := await sweep_requests(tools.store, tools.wall_s()):
                log.info("old requests forgotten", count=forgotten)
        except StoreUnavailable as error:
            log.warning("ledger is not reachable", error=str(error))
        await asyncio.sleep(SWEEP_S)
