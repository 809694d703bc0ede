"""Which migrations there are, in which order, and which of them are over: remembered, because that does not change.

A ledger keeps its migrations for ever. What a list or a watch needs of each is a few words, kept here for all of them;
reading all of every migration for each list is what neither the ledger nor the callers have time for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.core.records import MigrationSpec, MigrationState
from orchestrator.ledger import paths
from orchestrator.ledger.gather import each
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.records import BadRecord, decode


@dataclass(slots=True)
class Line:
    """One migration."""

    name: str
    order: int
    """zxid of its creation: the ledger's own order, whatever the clocks of those who wrote there."""
    guest: str
    """Uuid; empty for one that cannot be read."""
    over: bool = False


class History:
    """Shared by everybody who lists or watches migrations in one process."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lines: dict[str, Line] = {}

    async def all(self) -> list[Line]:
        """Every migration as it is now, newest first. Reads those that are new, and the state of those not over yet."""
        names = set(await self._ledger.list_migrations())
        for gone in self._lines.keys() - names:
            del self._lines[gone]
        return sorted(await self.of(names), key=lambda line: -line.order)

    async def of(self, names: Iterable[str]) -> list[Line]:
        """These; what there is not is left out. Raises StoreUnavailable."""
        return [line for line in await each(names, self._look) if line is not None]

    def is_over(self, name: str) -> bool:
        """Certainly; False says nothing."""
        known = self._lines.get(name)
        return known is not None and known.over

    async def _look(self, name: str) -> Line | None:
        known = self._lines.get(name)
        if known is not None and known.over:
            return known
        if known is None:
            path = paths.migration(name)
            node = await self._ledger.store.read(path)
            if node is None:
                return None
            try:
                guest = decode(MigrationSpec, node.data, path=path).guest
            except BadRecord:
                guest = ""
            known = Line(name, node.mzxid, guest)
        try:
            found = await self._ledger.read(MigrationState, paths.migration_state(name))
        except BadRecord:
            found = None
        known.over = found is not None and found[0].phase.terminal
        return self._lines.setdefault(name, known) if known.guest else known
