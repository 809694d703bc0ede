"""Guests whose record says that they are on their way, in a migration that there is not, or that is over.

No coordinator leaves such a record: opening an attempt and settling it are one transaction with the migration's state.
But somebody may have written to ZooKeeper by hand, or restored a part of it. Nobody would ever end that attempt then,
while the guest can neither be moved nor be given up. Ending it is the compare-and-set that every party may make at any
time (H6), and it gives nobody the guest: it stays its owner's, who runs it, or lets it run on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from uuid import uuid4

import structlog

from orchestrator.coordinator.driver import epoch_write
from orchestrator.coordinator.ports import AgentDirectory
from orchestrator.core import handover
from orchestrator.core.errors import AbortReason, DroverError
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.records import HostRecord, MigrationState
from orchestrator.core.shards import Share
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.ledger import op_set
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import Check, Create, Delete, Op, Store, StoreUnavailable

log = structlog.get_logger(__name__)

PASS_S = 15.0
"""Between two looks. An attempt that is ended in one of them is closed in the next: whoever conducts it, if anybody
does, hears of its end in between."""
_ENDABLE = frozenset({Ownership.OPEN, Ownership.ABORTED})
"""COMMITTED is the destination's to end: it alone knows whether the guest runs there."""
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z-]{1,63}")
"""What a migration may be called. Of anything else there is none, and no path to ask for it."""


class Orphans:
    """Of one leadership."""

    def __init__(
        self, store: Store, index: Index, agents: AgentDirectory, epoch: int, *, share: Share = Share()
    ) -> None:
        self._store = store
        self._index = index
        self._agents = agents
        self._epoch = epoch
        self._share = share

    async def look(self, is_driven: Callable[[str], bool]) -> None:
        """One look at every guest of the shard; costs no read while each is in a migration that `is_driven`.

        Raises Deposed, StoreUnavailable. A record that cannot be read, and any write that lost a race, waits for the
        next look.
        """
        guests = (await self._index.guests()).items()
        found = [
            uuid
            for uuid, entry in guests
            if entry.input.record.phase in _ENDABLE
            and self._share.has(uuid)
            and not is_driven(entry.input.record.migration)
        ]
        for uuid in found:
            try:
                await self._end(uuid)
            except BadRecord as error:
                log.error("a guest on its way cannot be looked at", guest=uuid, error=str(error))

    async def _end(self, uuid: str) -> None:
        """Abort it, or close what was aborted. The migration is read behind the record, so that one which has opened
        the attempt is not missed."""
        node = await self._store.read(paths.guest(uuid))
        if node is None or not node.data:
            return
        record = decode(GuestRecord, node.data, path=paths.guest(uuid))
        if record.phase not in _ENDABLE:
            return
        await self._store.barrier()
        named = _NAME.fullmatch(record.migration) is not None
        over = await self._is_over(record.migration) if named else []
        if over is None:
            return
        writer = f"coordinator-{uuid4().hex}"
        if record.phase is Ownership.OPEN:
            ended = handover.abort(record, record.migration, record.attempt, AbortReason.CANCELLED, writer=writer)
        else:
            ended = handover.close(record, record.migration, writer=writer)
        ops: list[Op] = [op_set(paths.guest(uuid), ended, node.version), *over]
        if named:
            ops += await self._promise(record)
        if await epoch_write(self._store, self._epoch, ops, self._share.shard):
            log.warning(
                "a guest was in a migration that there is not, or that is over",
                guest=record.name, uuid=uuid, migration=record.migration, attempt=record.attempt,
                writer=record.writer, phase=ended.phase,
            )  # fmt: skip
            await self._nudge(uuid, record)

    async def _is_over(self, migration: str) -> list[Op] | None:
        """What a transaction has to check for that. None: it is under way, and its driver's."""
        state, spec = paths.migration_state(migration), paths.migration(migration)
        node = await self._store.read(state)
        if node is None:
            if await self._store.read(spec) is not None:
                return None  # half of it: somebody is to look at it
            await self._store.ensure(paths.shard(spec))
            return [Create(spec, b""), Delete(spec, 0)]
        if node.data and decode(MigrationState, node.data, path=state).phase.terminal:
            return [Check(state, node.version)]
        return None

    async def _promise(self, record: GuestRecord) -> list[Op]:
        """Room that its destination keeps for the migration."""
        if record.destination is None:
            return []
        path = paths.reservation(record.destination.host, record.migration)
        node = await self._store.read(path)
        return [] if node is None else [Delete(path, node.version)]

    async def _nudge(self, uuid: str, record: GuestRecord) -> None:
        """Agents also watch the record; this only saves them the delay of the watch."""
        for host in {ref.host for ref in (record.owner, record.destination) if ref is not None}:
            path = paths.host(host)
            try:
                node = await self._store.read(path)
                if node is not None and node.data:
                    address = decode(HostRecord, node.data, path=path).control_address
                    await self._agents.at(address, host).nudge(uuid)
            except (DroverError, StoreUnavailable, BadRecord) as error:
                log.info("an agent is not told", host=host, error=str(error))
