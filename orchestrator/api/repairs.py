"""`drover repair`: asks the ledger and every agent concerned, explains, and does what is safe if it is asked to."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import structlog

from orchestrator.api.calls import Caller, Tools, write
from orchestrator.api.reads import GuestRead, guest_uuid, read_guest
from orchestrator.core import handover, repair
from orchestrator.core.errors import AbortReason, DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord
from orchestrator.core.records import HostRecord, MigrationState
from orchestrator.core.repair import Action, Examination, HostSeen, Known, Offer
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import op_set
from orchestrator.ledger.store import Delete, Done, Op
from orchestrator.rpc.agent_client import CALL_S
from protos.drover.v1 import orchestrator_pb2 as pb

log = structlog.get_logger(__name__)


class Repairs:
    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def repair(self, request: pb.RepairGuestRequest, caller: Caller) -> pb.RepairGuestResponse:
        """What is the case, after the action if one was asked for. Raises NOTHING_SAFE for one that is not offered now,
        OUTCOME_UNKNOWN when the guest moved meanwhile."""
        uuid = await guest_uuid(self._tools.ledger, request.name)
        read = await read_guest(self._tools.ledger, uuid)
        found = repair.examine(await self._known(read, caller))
        if request.action:
            offer = _chosen(found, request.action)
            await self._do(offer, read, caller)
            log.warning("repair", guest=read.record.name, action=offer.action, by=caller.by)
            read = await read_guest(self._tools.ledger, uuid)
            found = repair.examine(await self._known(read, caller))
        return _view(read, found)

    async def _known(self, read: GuestRead, caller: Caller) -> Known:
        record = read.record
        names = {ref.host for ref in (record.owner, record.source, record.destination) if ref is not None}
        seen = await asyncio.gather(*(self._host(name, read, caller) for name in sorted(names)))
        owner = record.owner
        certificate = await self._tools.store.read(paths.fence(owner.host, owner.boot_id))
        migration = (
            await self._tools.ledger.read(MigrationState, paths.migration_state(record.migration))
            if record.migration
            else None
        )
        return Known(
            record,
            read.spec,
            want_run=read.want_run is None or read.want_run.run,
            migration=migration[0] if migration else None,
            hosts={one.host: one for one in seen},
            owner_certified=certificate is not None,
        )

    async def _host(self, name: str, read: GuestRead, caller: Caller) -> HostSeen:
        host = await self._tools.ledger.read(HostRecord, paths.host(name))
        if host is None:
            return HostSeen(name, answered=False)
        try:
            agent = self._tools.agents.at(host[0].control_address)
            status = await agent.get_agent(caller.remaining_s(CALL_S))
        except DroverError as error:
            log.info("an agent does not say what it has", host=name, why=str(error))
            return HostSeen(name, answered=False)
        guest = next((one for one in status.guests if one.guest == read.uuid), None)
        trouble = next((one.message for one in status.troubles if one.guest == read.uuid), "")
        return HostSeen(
            name,
            answered=True,
            complete=status.complete,
            copies=tuple(copy for copy in status.copies if copy.guest == read.uuid),
            run_state=guest.run_state if guest else None,
            trouble=trouble,
        )

    async def _do(self, offer: Offer, read: GuestRead, caller: Caller) -> None:
        if offer.host:
            host = await self._tools.ledger.read(HostRecord, paths.host(offer.host))
            if host is not None:
                await self._tools.agents.at(host[0].control_address).nudge(read.uuid, caller.remaining_s(CALL_S))
            return
        ops: list[Op] = [op_set(paths.guest(read.uuid), _changed(offer.action, read.record), read.version)]
        if offer.action is Action.BURY:
            ops += await self._name_freed(read)
        if not isinstance(await write(self._tools, ops, caller), Done):
            said = f"guest {read.record.name} has changed meanwhile: look again"
            raise DroverError(RefusalReason.OUTCOME_UNKNOWN, said)

    async def _name_freed(self, read: GuestRead) -> list[Op]:
        path = paths.name(read.record.name)
        named = await self._tools.ledger.read(str, path)
        return [Delete(path, named[1])] if named is not None and named[0] == read.uuid else []


def _chosen(found: Examination, action: str) -> Offer:
    for offer in found.offers:
        if offer.action == action:
            return offer
    offered = ", ".join(offer.action for offer in found.offers)
    said = f"{action!r} is not safe now; " + (f"what is: {offered}" if offered else f"nothing is: {found.otherwise}")
    raise DroverError(RefusalReason.NOTHING_SAFE, said, field="action")


def _changed(action: Action, record: GuestRecord) -> GuestRecord:
    writer = f"api-{uuid4().hex}"
    if action is Action.BURY:
        return handover.gone(record, writer=writer)
    if action is Action.ABORT:
        return handover.abort(record, record.migration, record.attempt, AbortReason.CANCELLED, writer=writer)
    return handover.close(record, record.migration, writer=writer)


def _view(read: GuestRead, found: Examination) -> pb.RepairGuestResponse:
    return pb.RepairGuestResponse(
        guest=read.record.name,
        guest_uuid=read.uuid,
        findings=found.findings,
        offers=[pb.RepairOffer(action=offer.action, message=offer.says) for offer in found.offers],
        otherwise=found.otherwise,
    )
