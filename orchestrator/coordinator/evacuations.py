"""Carries out what `core.evacuation` decides: reads the facts, stores the state, creates and cancels migrations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import structlog

from orchestrator.coordinator.driver import STORE_RETRY_S, epoch_write
from orchestrator.core import evacuation
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.placement import need_of
from orchestrator.core.policy import override
from orchestrator.core.records import (
    Cordon,
    EvacuationSpec,
    EvacuationState,
    MigrationPhase,
    MigrationSpec,
    MigrationState,
)
from orchestrator.ledger import paths
from orchestrator.ledger.inventory import Inventory
from orchestrator.ledger.migrations import creation
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.ledger.store import SetData, Store, StoreUnavailable

log = structlog.get_logger(__name__)

TURN_S = 0.5


class EvacuationRunner:
    """All jobs of one leadership. `nudged` is set by whoever knows that a migration ended."""

    def __init__(
        self,
        store: Store,
        inventory: Inventory,
        epoch: int,
        nudged: asyncio.Event,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._inventory = inventory
        self._epoch = epoch
        self._nudged = nudged
        self._wall_s = wall_s

    async def run(self, job: str) -> None:
        """Until the job is over. Raises Deposed, BadRecord."""
        while True:
            try:
                if await self.turn(job):
                    return
            except StoreUnavailable:
                await asyncio.sleep(STORE_RETRY_S)
                continue
            self._nudged.clear()
            try:
                async with asyncio.timeout(TURN_S):
                    await self._nudged.wait()
            except TimeoutError:
                pass

    async def turn(self, job: str) -> bool:
        """One look and what follows from it. True: the job is over."""
        spec_node = await self._store.read(paths.evacuation(job))
        node = await self._store.read(paths.evacuation_state(job))
        if spec_node is None or node is None:
            return False
        spec = decode(EvacuationSpec, spec_node.data, path=paths.evacuation(job))
        state = decode(EvacuationState, node.data, path=paths.evacuation_state(job))
        if state.phase.terminal:
            return True
        facts = await self._facts(spec, state)
        step = evacuation.step(spec, state, facts)
        new = replace(step.state, epoch=self._epoch)
        if new.phase.terminal:
            new = replace(new, end_time_s=self._wall_s())
        if new != state and not await self._store_state(job, new, node.version):
            return False  # cancelled meanwhile, perhaps: look again before anything is done
        for command in step.commands:
            await self._carry_out(command, spec)
        return new.phase.terminal

    async def _store_state(self, job: str, state: EvacuationState, version: int) -> bool:
        write = SetData(paths.evacuation_state(job), encode(state), version)
        return await epoch_write(self._store, self._epoch, [write])

    async def _facts(self, spec: EvacuationSpec, state: EvacuationState) -> evacuation.Facts:
        """Migrations first: one that ended is never seen with a guest record from before its end."""
        migrations: dict[str, MigrationState] = {}
        for guest in state.guests:
            if not guest.migration:
                continue
            if guest.phase is MigrationPhase.SUCCEEDED:
                known = MigrationState(guest.phase, guest.attempts, destination=guest.destination)
                migrations[guest.migration] = known
                continue
            node = await self._store.read(paths.migration_state(guest.migration))
            if node is not None:
                migrations[guest.migration] = decode(MigrationState, node.data)
        snapshot = await self._inventory.snapshot()
        entry = snapshot.hosts.get(spec.host)
        guests = [
            evacuation.GuestOnHost(guest.uuid, guest.spec.name, guest.spec.memory_mib, guest.record, need_of(guest))
            for guest in snapshot.guests.values()
            if evacuation.concerns(guest.record, spec.host)
        ]
        return evacuation.Facts(
            cordoned=entry is not None and entry.input.cordon.on,
            guests=guests,
            migrations=migrations,
            reserved=entry is not None and bool(entry.input.reservations.memory_mib),
            hosts=snapshot.views(),
        )

    async def _carry_out(self, command: evacuation.Command, spec: EvacuationSpec) -> None:
        match command:
            case evacuation.CordonHost():
                await self._cordon(spec)
            case evacuation.CreateMigration():
                await self._create(command, spec)
            case evacuation.CancelMigration():
                await self._cancel(command.id)

    async def _cordon(self, spec: EvacuationSpec) -> None:
        path = paths.cordon(spec.host)
        node = await self._store.read(path)
        if node is None:
            log.warning("host to be emptied is not registered", host=spec.host, evacuation=spec.id)
            return
        content = encode(Cordon(on=True, why=f"evacuation {spec.id}", by=spec.requested_by or "coordinator"))
        await epoch_write(self._store, self._epoch, [SetData(path, content, node.version)])

    async def _create(self, command: evacuation.CreateMigration, spec: EvacuationSpec) -> None:
        guest_spec = await self._inventory.spec(command.guest)
        if guest_spec is None or await self._store.read(paths.migration(command.id)) is not None:
            return
        migration = MigrationSpec(
            id=command.id,
            guest=command.guest,
            guest_name=command.name,
            preferred=command.preferred,
            policy=override(guest_spec.policy, spec.policy),
            evacuation=spec.id,
            requested_by=spec.requested_by,
            create_time_s=self._wall_s(),
        )
        try:
            ops = await creation(self._store, migration)
        except DroverError as error:
            if error.reason is not RefusalReason.GUEST_IS_MIGRATING:
                raise
            log.info("waiting for another migration of a guest", guest=command.name, **error.details)
            return
        await epoch_write(self._store, self._epoch, ops)

    async def _cancel(self, migration: str) -> None:
        """The migration's own driver sees the wish and aborts; after the commit it lets the guest arrive."""
        path = paths.migration_state(migration)
        node = await self._store.read(path)
        if node is None:
            return
        state = decode(MigrationState, node.data, path=path)
        if state.cancel_requested or state.phase.terminal:
            return
        wish = SetData(path, encode(replace(state, cancel_requested=True)), node.version)
        await epoch_write(self._store, self._epoch, [wish])

    # --- after the end ----------------------------------------------------------------------------------------------

    async def refresh_ended(self) -> None:
        """Keep "safe to power off" true or false for jobs that are over, while their host stays cordoned."""
        try:
            jobs = await self._store.children(paths.EVACUATIONS)
            for job in jobs:
                await self._refresh_one(job)
        except StoreUnavailable:
            return
        except BadRecord as error:
            log.error("evacuation cannot be read", error=str(error))

    async def _refresh_one(self, job: str) -> None:
        spec_node = await self._store.read(paths.evacuation(job))
        node = await self._store.read(paths.evacuation_state(job))
        if spec_node is None or node is None:
            return
        state = decode(EvacuationState, node.data, path=paths.evacuation_state(job))
        if not state.phase.terminal:
            return
        spec = decode(EvacuationSpec, spec_node.data, path=paths.evacuation(job))
        cordon = await self._store.read(paths.cordon(spec.host))
        on = cordon is not None and bool(cordon.data) and decode(Cordon, cordon.data).on
        if not on and not state.safe_to_power_off:
            return  # the usual case of an old job costs four reads
        facts = await self._facts(spec, replace(state, guests=()))
        safe = evacuation.safe_to_power_off(spec.host, facts)
        if safe != state.safe_to_power_off:
            await self._store_state(job, replace(state, safe_to_power_off=safe), node.version)
