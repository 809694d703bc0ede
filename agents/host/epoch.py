"""Which coordinator this agent obeys: the one that the ledger names, and no other (H12).

A call carries its coordinator's epoch, and the shard of the fleet that it leads; each shard has an epoch of its own. An
epoch that this agent does not know yet proves nothing by itself: the
ledger is asked behind a barrier, and what it says counts, be it higher or lower than before (docs/adr/0015).
"""

from __future__ import annotations

import asyncio

import structlog

from agents.host.incarnation import Believed
from agents.host.journal import Journal
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import epoch_is_current
from orchestrator.core.shards import MAX_SHARDS
from orchestrator.ledger import paths
from orchestrator.ledger.store import Store, StoreUnavailable

log = structlog.get_logger(__name__)


class EpochGate:
    """One look at the ledger at a time for each shard, however many calls ask for one."""

    def __init__(self, host: str, store: Store, journal: Journal, believed: Believed) -> None:
        self._host = host
        self._store = store
        self._journal = journal
        self._believed = believed
        self._turns = [asyncio.Lock() for _ in range(MAX_SHARDS)]

    async def heed(self, offered: int, shard: int = 0) -> None:
        """Returns when the caller's epoch is the ledger's, for that shard.

        Raises STALE_EPOCH when it is not, OLD_RECORD for a ledger that is not believed, INVALID_ARGUMENT for no shard,
        LEDGER_UNREACHABLE when that cannot be found out now.
        """
        if not 0 <= shard < MAX_SHARDS:
            said = f"there is no shard {shard}: they are 0 to {MAX_SHARDS - 1}"
            raise DroverError(RefusalReason.INVALID_ARGUMENT, said, field="shard")
        if not self._believed.settled:
            await self._believed.must_believe()
        if offered == self._journal.epoch(shard):
            return
        async with self._turns[shard]:
            if offered == self._journal.epoch(shard):
                return
            current = await self._read(shard)
            if current != self._journal.epoch(shard):
                log.info("another coordinator leads", shard=shard, epoch=current, before=self._journal.epoch(shard))
                await self._journal.see_epoch(current, shard)
        if not epoch_is_current(current, offered):
            log.warning("call of a coordinator that does not lead refused", epoch=offered, current=current)
            was = "is over" if offered < current else "was never given to anybody"
            raise DroverError(
                RefusalReason.STALE_EPOCH, f"epoch {offered} {was}: {self._host} reads {current} in the ledger"
            )

    async def _read(self, shard: int) -> int:
        try:
            await self._store.barrier()
            node = await self._store.read(paths.epoch(shard))
        except StoreUnavailable as error:
            said = f"{self._host} cannot ask the ledger which coordinator leads: {error}"
            raise DroverError(RefusalReason.LEDGER_UNREACHABLE, said) from error
        return -1 if node is None else node.version
