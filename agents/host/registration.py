"""The host's place in the ledger: its record, its live node, the certificate that its former power cycle is over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from agents.config import AgentConfig
from agents.engine import base as engine
from orchestrator.core.ids import HostRef
from orchestrator.core.records import Cordon, HostRecord, Reservations
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger, op_create
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Create, Delete, Done, Op, SetData, Store, StoreUnavailable

log = structlog.get_logger(__name__)

RETRY_S = 0.2


class Registration:
    """Takes the host's place once (`register`), and again in each new session (`live_again`)."""

    def __init__(self, config: AgentConfig, here: HostRef, mover: engine.MigrationEngine, store: Store) -> None:
        self._config = config
        self._here = here
        self._mover = mover
        self._store = store

    async def live_again(self) -> None:
        while True:
            with contextlib.suppress(StoreUnavailable):
                if await self._store.read(paths.live(self._here.host)) is None:
                    await self._store.multi([Create(paths.live(self._here.host), b"", ephemeral=True)])
                else:
                    return
            await asyncio.sleep(RETRY_S)

    async def register(self) -> None:
        await Ledger(self._store).init_tree()
        await self._store.barrier()
        probed = await self._mover.probe()
        config = self._config
        record = HostRecord(
            name=self._here.host,
            boot_id=self._here.boot_id,
            control_address=f"{config.address}:{config.control_port}",
            peer_address=f"{config.address}:{config.peer_port}",
            memory_mib=config.memory_mib,
            bandwidth_mbps=config.bandwidth_mbps,
            engine=f"qemu {probed['version']}",
            machine_types=tuple(probed["machine_types"].split(",")),
            accelerator=probed["accelerator"],
            switchover_ack=probed["switchover_ack"],
        )
        await self._until_written(lambda: self._register_ops(record))
        await self._drop_old_live()
        await self.live_again()

    async def _register_ops(self, record: HostRecord) -> list[Op]:
        path = paths.host(record.name)
        node = await self._store.read(path)
        if node is None:
            return [
                op_create(path, record),
                op_create(paths.cordon(record.name), Cordon()),
                op_create(paths.reservations(record.name), Reservations()),
            ]
        ops: list[Op] = []
        if node.data:
            before = decode(HostRecord, node.data, path=path)
            if before.boot_id != record.boot_id:
                await self._certify(before)
        if encode(record) != node.data:
            ops.append(SetData(path, encode(record), node.version))
        for child, content in (
            (paths.cordon(record.name), Cordon()),
            (paths.reservations(record.name), Reservations()),
        ):
            if await self._store.read(child) is None:
                ops.append(op_create(child, content))
        return ops

    async def _certify(self, before: HostRecord) -> None:
        """The host itself came back with another boot_id: proof that its former power cycle is over (H11)."""
        path = paths.fence(before.name, before.boot_id)
        await self._store.ensure(path)
        log.info("former power cycle is over", boot_id=before.boot_id)

    async def _drop_old_live(self) -> None:
        """The session of a predecessor may last some seconds longer than it; its node is not ours."""
        path = paths.live(self._here.host)
        node = await self._store.read(path)
        if node is not None:
            await self._store.multi([Delete(path, node.version)])

    async def _until_written(self, make: Callable[[], Awaitable[list[Op]]]) -> None:
        while True:
            ops = await make()
            if not ops or isinstance(await self._store.multi(ops), Done):
                return
            await self._store.barrier()
