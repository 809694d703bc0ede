"""Turns a tree of layout 1 or 2 into one of layout 3, before the leader does anything else.

Node by node, in transactions that check the epoch and the versions of what they move, so that it goes on from wherever
a crash left it; what is done already is found done. The last of each layout's writes `/layout`. Meanwhile nobody else
touches the tree: APIs and agents of this version wait for that node, and the upgrade waits until no agent has a
session. Guests run on all the time: that takes no agent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

import structlog

from orchestrator.coordinator.driver import STORE_RETRY_S, epoch_write
from orchestrator.core.death import hosts_of
from orchestrator.core.handover import GuestRecord
from orchestrator.core.records import (
    Cordon,
    EvacuationSpec,
    EvacuationState,
    MigrationSpec,
    MigrationState,
    Reservations,
)
from orchestrator.ledger import layout, paths
from orchestrator.ledger.gather import each, members
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.ledger.store import Create, Delete, Op, SetData, Store, StoreUnavailable, Versioned

log = structlog.get_logger(__name__)

MAX_OPS = 100
MAX_BYTES = 400_000
"""Of one transaction; ZooKeeper takes a megabyte."""
AGAIN_S = 1.0
_SOME = 5

_PLACES: dict[str, Callable[[str], str]] = {
    paths.GUESTS: paths.guest,
    paths.EVACUATIONS: paths.evacuation,
    paths.REQUESTS: paths.request_id,
}


class Upgrade:
    """`tell` is called at each step with what it does or waits for; with nothing once that is over."""

    def __init__(self, store: Store, epoch: int, tell: Callable[[str], None]) -> None:
        self._store = store
        self._epoch = epoch
        self._tell = tell
        self._doing = f"the upgrade of the ledger to layout {layout.OURS}"

    async def run(self) -> None:
        """Until the tree has our layout. Raises Deposed, and WrongLayout for a tree of a newer one."""
        while True:
            try:
                await layout.must_be_ours(self._store)
                self._tell("")
                return
            except layout.WrongLayout as wrong:
                if wrong.newer:
                    raise
            except StoreUnavailable:
                await asyncio.sleep(STORE_RETRY_S)
                continue
            try:
                await self._look()
            except StoreUnavailable:
                await asyncio.sleep(STORE_RETRY_S)

    async def _look(self) -> None:
        """All that is left to do; cut off anywhere, the next look goes on. Raises StoreUnavailable."""
        hosts = await self._store.children(paths.HOSTS)
        live = [host for host in hosts if await self._store.read(paths.live(host)) is not None]
        if live:
            some = ", ".join(live[:_SOME]) + (" and others" if len(live) > _SOME else "")
            self._tell(f"the end of the older version's agents on {some}, to upgrade the ledger: their guests run on")
            await asyncio.sleep(AGAIN_S)
            return
        log.info("upgrading the ledger", to=layout.OURS)
        if await layout.of_tree(self._store) < 2:
            for root in paths.ROOTS:
                await self._store.ensure(root)
            for root, place in _PLACES.items():
                await self._move_all(root, place)
            await self._mark_guests(set(hosts))
            await self._mark_active()
        for host in hosts:
            await self._split_reservations(host)
        await self._write([await layout.put(self._store)])

    # --- shards -------------------------------------------------------------------------------------------------------

    async def _move_all(self, root: str, place: Callable[[str], str]) -> None:
        """In the order in which they were made: so they stay in the ledger's own order. What has a shard's name goes
        first, since it is in that shard's place."""

        async def one(name: str) -> tuple[str, Versioned] | None:
            node = await self._store.read(f"{root}/{name}")
            return (name, node) if node is not None and node.data else None

        found = await each(await self._store.children(root), one)
        old = [pair for pair in found if pair is not None]
        for name, _ in sorted(old, key=lambda pair: (len(pair[0]) != 2, pair[1].mzxid)):
            await self._move(f"{root}/{name}", place(name))

    async def _move(self, old: str, new: str) -> None:
        """With its children; one transaction as a rule, several for what is large."""
        node = await self._store.read(old)
        if node is None:
            return
        shard = paths.shard(new)
        if shard != old:
            await self._store.ensure(shard)
        there = await self._store.read(new)
        groups: list[list[Op]] = []
        if shard == old:  # in its own shard's place, and without children: a request
            groups = [[Delete(old, node.version), Create(old, b""), Create(new, node.data)]]
        else:
            if there is None:
                groups.append([Create(new, node.data)])
            elif there.data != node.data:
                groups.append([SetData(new, node.data, there.version)])
            for child in await self._store.children(old):
                groups += await self._move_child(f"{old}/{child}", f"{new}/{child}")
            groups.append([Delete(old, node.version)])
        for ops in packed(groups):
            await self._write(ops)

    async def _move_child(self, old: str, new: str) -> list[list[Op]]:
        node, there = await self._store.read(old), await self._store.read(new)
        if node is None:
            return []
        put: list[Op] = [Create(new, node.data)] if there is None else [SetData(new, node.data, there.version)]
        return [[*put, Delete(old, node.version)]]

    # --- the guests of the hosts, and what is not over ----------------------------------------------------------------

    async def _mark_guests(self, hosts: set[str]) -> None:
        """A guest whose record cannot be read may be anybody's."""
        known = {host: set(await self._store.children(paths.host_guests(host))) for host in hosts}
        roots = [host for host in hosts if await self._store.read(paths.host_guests(host)) is None]
        await self._write_all([Create(paths.host_guests(host), b"")] for host in roots)

        async def one(uuid: str) -> list[Op]:
            node = await self._store.read(paths.guest(uuid))
            if node is None:
                return []
            try:
                concerned = hosts_of(decode(GuestRecord, node.data, path=paths.guest(uuid))) & hosts
            except BadRecord:
                concerned = hosts
            return [Create(paths.host_guest(host, uuid), b"") for host in concerned if uuid not in known[host]]

        found = await each(await members(self._store, paths.GUESTS), one)
        await self._write_all([op] for ops in found for op in ops)

    async def _mark_active(self) -> None:
        migrations = await each(await members(self._store, paths.MIGRATIONS), self._migration)
        jobs = await each(await members(self._store, paths.EVACUATIONS), self._job)
        await self._write_all(ops for ops in (*migrations, *jobs) if ops)

    async def _migration(self, name: str) -> list[Op]:
        """One that cannot be read may not be over."""
        path, state, spec = paths.active_migration(name), paths.migration_state(name), paths.migration(name)
        guest = ""
        node = await self._store.read(state)
        try:
            if node is None or decode(MigrationState, node.data, path=state).phase.terminal:
                return []
            made = await self._store.read(spec)
            guest = decode(MigrationSpec, made.data if made else b"", path=spec).guest
        except BadRecord as error:
            log.warning("taken for one that is not over", migration=name, error=str(error))
        return [] if await self._store.read(path) is not None else [Create(path, encode(guest))]

    async def _job(self, name: str) -> list[Op]:
        """As a migration; one that is over counts while its host is cordoned."""
        head, spec = (
            await self._store.read(paths.evacuation_state(name)),
            await self._store.read(paths.evacuation(name)),
        )
        host, path = "", paths.active_evacuation(name)
        if head is None or spec is None:
            return []
        try:
            host = decode(EvacuationSpec, spec.data, path=paths.evacuation(name)).host
            if decode(EvacuationState, head.data, path=paths.evacuation_state(name)).phase.terminal:
                path = paths.ended_evacuation(name)
                cordon = await self._store.read(paths.cordon(host))
                if cordon is None or not cordon.data or not decode(Cordon, cordon.data, path=paths.cordon(host)).on:
                    return []
        except BadRecord as error:
            log.warning("taken for one that is not over", evacuation=name, error=str(error))
        return [] if await self._store.read(path) is not None else [Create(path, encode(host))]

    # --- what hosts have promised -------------------------------------------------------------------------------------

    async def _split_reservations(self, host: str) -> None:
        """A node for each promise. One that cannot be read would be lost: it stops the upgrade until somebody mends or
        empties it."""
        above = paths.reservations(host)
        node = await self._store.read(above)
        if node is None or not node.data:
            return
        try:
            promised = decode(Reservations, node.data, path=above).each()
        except BadRecord as error:
            self._tell(f"{error}: mend it, or empty it once no migration to {host} is under way")
            await asyncio.sleep(AGAIN_S)
            raise StoreUnavailable("what a host has promised cannot be read") from error
        there = await self._store.children(above)
        left = {migration: one for migration, one in promised.items() if migration not in there}
        await self._write_all(
            [Create(paths.reservation(host, migration), encode(one))] for migration, one in left.items()
        )
        await self._write([SetData(above, b"", node.version)])

    async def _write_all(self, groups: Iterable[list[Op]]) -> None:
        for ops in packed(groups):
            await self._write(ops)

    async def _write(self, ops: list[Op]) -> None:
        """Raises StoreUnavailable when it is not certain that this was written: nothing that follows may be."""
        self._tell(self._doing)
        if not await epoch_write(self._store, self._epoch, ops):
            raise StoreUnavailable("a step of the upgrade is not certain: all is looked at again")


def packed(groups: Iterable[list[Op]]) -> Iterator[list[Op]]:
    """Transactions of whole groups, in their order."""
    batch: list[Op] = []
    room = MAX_BYTES
    for ops in groups:
        size = sum(len(op.data) for op in ops if isinstance(op, Create | SetData))
        if batch and (len(batch) + len(ops) > MAX_OPS or size > room):
            yield batch
            batch, room = [], MAX_BYTES
        batch = [*batch, *ops]
        room -= size
    if batch:
        yield batch
