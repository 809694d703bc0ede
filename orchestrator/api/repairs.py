"""`drover repair`: asks the ledger and every agent concerned, explains, and does what is safe if it is asked to."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from uuid import uuid4

import structlog

from orchestrator.api.asking import ask
from orchestrator.api.calls import Caller, Tools, write
from orchestrator.api.reads import GuestRead, guest_uuid, read_guest
from orchestrator.core import handover, repair
from orchestrator.core.agent import AgentStatus
from orchestrator.core.errors import AbortReason, DroverError, RefusalReason, invalid
from orchestrator.core.handover import GuestRecord
from orchestrator.core.placement import HostInput
from orchestrator.core.records import GuestSpec, HostRecord, MigrationState, WantRun
from orchestrator.core.repair import Action, Examination, HostSeen, Known, Lost, Offer
from orchestrator.core.text import handful, quoted
from orchestrator.ledger import paths
from orchestrator.ledger.gather import each
from orchestrator.ledger.ledger import op_set
from orchestrator.ledger.store import Delete, Done, Op
from orchestrator.rpc.agent_client import CALL_S
from protos.drover.v1 import orchestrator_pb2 as pb

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Look:
    uuid: str
    name: str
    found: Examination
    read: GuestRead | None
    """None: the ledger has no record of it."""


class Repairs:
    """The call that explains a guest which seems stuck, and does what is safe."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def repair(self, request: pb.RepairGuestRequest, caller: Caller) -> pb.RepairGuestResponse:
        """What is the case, after the action if one was asked for. Raises NOTHING_SAFE for one that is not offered now,
        OUTCOME_UNKNOWN when the guest moved meanwhile, NOT_FOUND when neither the ledger nor an agent knows the guest.
        """
        look = await self._look(request.name, caller)
        if request.action:
            offer = _chosen(look.found, request.action)
            await self._do(offer, look, caller)
            log.warning("repair", guest=look.name, action=offer.action, host=offer.host, by=caller.by)
            look = await self._look(look.uuid, caller)
        return _view(look)

    async def _look(self, name: str, caller: Caller) -> _Look:
        try:
            return await self._look_at(await guest_uuid(self._tools.ledger, name), caller)
        except DroverError as error:
            if error.reason is not RefusalReason.NOT_FOUND:
                raise
        return await self._look_for(name, caller)

    async def _look_at(self, uuid: str, caller: Caller) -> _Look:
        read, spec = await self._read(uuid)
        return _Look(uuid, read.record.name, repair.examine(await self._known(read, spec, caller)), read)

    async def _read(self, uuid: str) -> tuple[GuestRead, GuestSpec | None]:
        """The guest, and its specification unless the ledger has lost that. Raises NOT_FOUND when it has no record."""
        found = await self._tools.ledger.read_guest(uuid)
        spec = await self._tools.ledger.read(GuestSpec, paths.guest_spec(uuid))
        if found is None or spec is not None:
            read = await read_guest(self._tools.ledger, uuid)
            return read, read.spec
        record, version, mzxid = found
        want = await self._tools.ledger.read(WantRun, paths.want_run(uuid))
        wish, wish_version = want if want is not None else (None, -1)
        return GuestRead(uuid, record, version, mzxid, GuestSpec(record.name), wish, wish_version), None

    async def _look_for(self, name: str, caller: Caller) -> _Look:
        """A guest that the ledger does not know, as the live agents have it, each asked once within a bound."""
        snapshot = await self._tools.index.snapshot()
        asked = [host.input for host in snapshot.hosts.values() if not host.input.certified_dead]

        async def one(host: HostInput) -> AgentStatus | None:
            status = await ask(self._tools, host.record, caller) if host.live else None
            return status if isinstance(status, AgentStatus) else None

        answers = await each(asked, one)
        said = dict(zip((host.record.name for host in asked), answers, strict=True))
        for path in snapshot.unreadable:  # where an agent is that cannot be asked is not known either
            if path.startswith(f"{paths.HOSTS}/"):
                said.setdefault(path.removeprefix(f"{paths.HOSTS}/"), None)
        found = repair.named(name, [status for status in answers if status is not None])
        if len(found) > 1:
            raise invalid([("name", f"is the name of several guests: name one by its uuid: {handful(sorted(found))}")])
        if not found:
            raise _unknown(name, [host for host, status in said.items() if status is None])
        (uuid, called) = next(iter(found.items()))
        if await self._tools.ledger.read_guest(uuid) is not None:
            return await self._look_at(uuid, caller)
        bearer = await self._tools.ledger.read(str, paths.name(called))
        seen = tuple(repair.seen(host, status, uuid) for host, status in said.items())
        lost = Lost(uuid, called, seen, name_taken=bearer is not None and bearer[0] != uuid)
        return _Look(uuid, called, repair.examine_lost(lost), None)

    async def _known(self, read: GuestRead, spec: GuestSpec | None, caller: Caller) -> Known:
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
            spec,
            want_run=read.want_run is None or read.want_run.run,
            migration=migration[0] if migration else None,
            hosts={one.host: one for one in seen},
            owner_certified=certificate is not None,
        )

    async def _host(self, name: str, read: GuestRead, caller: Caller) -> HostSeen:
        host = await self._tools.ledger.read(HostRecord, paths.host(name))
        status = await ask(self._tools, host[0], caller) if host is not None else None
        return repair.seen(name, status if isinstance(status, AgentStatus) else None, read.uuid)

    async def _do(self, offer: Offer, look: _Look, caller: Caller) -> None:
        if offer.host:
            await self._let(offer, look.uuid, caller)
        elif look.read is not None:
            await self._write(offer, look.read, caller)

    async def _let(self, offer: Offer, uuid: str, caller: Caller) -> None:
        host = await self._tools.ledger.read(HostRecord, paths.host(offer.host))
        if host is None:
            raise DroverError(RefusalReason.OUTCOME_UNKNOWN, f"host {offer.host} was removed meanwhile: look again")
        agent = self._tools.agents.at(host[0].control_address, offer.host)
        if offer.action is Action.RESTORE_RECORD:
            await agent.restore_record(uuid, caller.remaining_s(CALL_S))
        else:
            await agent.nudge(uuid, caller.remaining_s(CALL_S))

    async def _write(self, offer: Offer, read: GuestRead, caller: Caller) -> None:
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


def _unknown(name: str, silent: list[str]) -> DroverError:
    also = f"; {handful(silent)} did not say what is there" if silent else ""
    said = f"there is no guest {quoted(name)} in the ledger, nor with an agent that answers{also}"
    return DroverError(RefusalReason.NOT_FOUND, said, field="name")


def _view(look: _Look) -> pb.RepairGuestResponse:
    return pb.RepairGuestResponse(
        guest=look.name,
        guest_uuid=look.uuid,
        findings=look.found.findings,
        offers=[pb.RepairOffer(action=offer.action, message=offer.says) for offer in look.found.offers],
        otherwise=look.found.otherwise,
    )
