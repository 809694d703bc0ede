"""Repeat-safe creation: the request's record is made in the transaction that makes what it asks for."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.api.calls import Caller, Tools, write
from orchestrator.api.decisions import repeated
from orchestrator.core.records import RequestRecord
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import op_create
from orchestrator.ledger.store import Conflict, Done, Op


@dataclass(frozen=True, slots=True)
class Request:
    """One create call. A caller that gave no id gets one: it tells our own write from others after a lost answer."""

    id: str
    digest: str

    @classmethod
    def of(cls, request_id: str, digest: str) -> Request:
        """The call with its caller's id, or with one of our own where that is empty; `digest` stands for its
        content."""
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
