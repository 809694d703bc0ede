"""Migrations of a bench: asked for through the API, followed in the ledger, where looking costs the API nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from orchestrator.core.records import Attempts, MigrationState
from orchestrator.ledger import paths
from orchestrator.ledger.records import decode
from orchestrator.ledger.store import Store, StoreUnavailable
from orchestrator.wire import policy_patch
from protos.drover.v1 import orchestrator_pb2 as pb
from tests.bench.fleet import fill
from tests.bench.fleet.plane import Plane

AT_ONCE = 32
CALL_S = 30.0
LONG = {
    "total_timeout_ms": 3_600_000,
    "precopy_timeout_ms": 3_600_000,
    "prepare_timeout_ms": 120_000,
    "switchover_timeout_ms": 60_000,
}
"""For many at a time: all of their agents are on the cores of one machine, where an attempt may wait for its turn."""


@dataclass
class Followed:
    """States of migrations as they stand in the ledger: read once, and again when one moved."""

    store: Store
    states: dict[str, MigrationState] = field(default_factory=dict[str, MigrationState])
    _moved: set[str] = field(default_factory=set[str])

    @contextlib.contextmanager
    def watching(self, ids: Sequence[str]) -> Iterator[None]:
        by_path = {paths.migration_state(one): one for one in ids}
        self._moved = set(ids)

        def announced(path: str | None) -> None:
            if path is None:
                self._moved.update(ids)
            elif path in by_path:
                self._moved.add(by_path[path])

        end = self.store.watch_tree(paths.MIGRATIONS, announced)
        try:
            yield
        finally:
            end()

    async def look(self) -> None:
        """Read those that moved, a bounded number at a time. Raises StoreUnavailable, and they count as moved again."""
        moved, self._moved = self._moved, set()
        turn = asyncio.Semaphore(AT_ONCE)

        async def one(migration: str) -> None:
            async with turn:
                node = await self.store.read(paths.migration_state(migration), 10.0)
                if node is not None and node.data:
                    self.states[migration] = decode(MigrationState, node.data)

        try:
            await asyncio.gather(*(one(migration) for migration in moved))
        except BaseException:
            self._moved |= moved
            raise

    def phases(self) -> Counter[str]:
        return Counter(str(state.phase) for state in self.states.values())


async def create(plane: Plane, guests: Sequence[int], policy: dict[str, object] | None = None) -> list[str]:
    """One migration of each guest, to wherever there is room; their ids. Raises what the API raises."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(guest: int) -> str:
        request = pb.CreateMigrationRequest(
            request_id=str(uuid.uuid4()), guest=fill.guest_name(guest), policy=policy_patch(policy)
        )
        async with turn:
            made = await plane.api.CreateMigration(request, timeout=CALL_S)
        return str(made.name).rpartition("/")[2]

    return list(await asyncio.gather(*(one(guest) for guest in guests)))


async def until(
    plane: Plane, ids: Sequence[str], are: Callable[[MigrationState], bool], timeout_s: float, every_s: float = 0.1
) -> Followed:
    """Until each is as it should be. Raises TimeoutError that says how far they got."""
    followed = Followed(plane.store)
    deadline = time.monotonic() + timeout_s
    with followed.watching(ids):
        while True:
            with contextlib.suppress(StoreUnavailable):
                await followed.look()
            if len(followed.states) == len(ids) and all(map(are, followed.states.values())):
                return followed
            if time.monotonic() > deadline:
                said = Counter(state.message for state in followed.states.values() if state.message).most_common(3)
                raise TimeoutError(f"{len(ids)} within {timeout_s:g} s: {dict(followed.phases())}, {said}")
            await asyncio.sleep(every_s)


async def repeated(plane: Plane, followed: Followed) -> str:
    """How many had more than one attempt, and why the ones before the last ended; empty when none had."""
    again = [one for one, state in followed.states.items() if state.attempt > 1]
    why: Counter[str] = Counter()
    for one in again:
        node = await plane.store.read(paths.attempts(one), 10.0)
        reports = decode(Attempts, node.data).reports if node is not None and node.data else ()
        why.update(
            f"{each.outcome} {each.reason or ''} {each.message}".strip()
            for each in reports
            if each.outcome != "COMMITTED"
        )
    return f"{len(again)} had more than one attempt: {dict(why.most_common(3))}" if again else ""


def begun(state: MigrationState) -> bool:
    """PREPARING or later."""
    return state.attempt > 0


def over(state: MigrationState) -> bool:
    return state.phase.terminal
