"""Repairs of guests that are stuck, or that the ledger has lost."""

# ruff: noqa: N802 (the methods have the names that the service gives them)

from __future__ import annotations

from collections.abc import Iterable

from orchestrator import wire
from orchestrator.core import repair
from orchestrator.core.agent import AgentStatus
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.ids import HostRef
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_parts.state import State

R = RefusalReason


class Repairs(State):
    async def RepairGuest(self, request: pb.RepairGuestRequest, context: object) -> pb.RepairGuestResponse:
        await self._called("RepairGuest", request)
        action = request.action
        lost = next((each for each in self.lost.values() if request.name in (each.name, each.uuid)), None)
        if lost is not None:
            if not action:
                return self._lost(lost)
            self._need_offered(action, self._lost(lost).offers)
            self.guests[lost.name] = self.lost.pop(lost.name)
            action = ""
        guest = self._guest(request.name)
        offers = self.offers.get(guest.name, [])
        if action:
            self._need_offered(action, offers)
        left = [] if action else offers
        return pb.RepairGuestResponse(
            guest=guest.name,
            guest_uuid=guest.uuid,
            findings=[f"the ledger says {wire.word(guest, 'ownership')}, owner {guest.host}"],
            offers=left,
            otherwise="" if left else "nothing is wrong with it",
        )

    @staticmethod
    def _need_offered(action: str, offers: Iterable[pb.RepairOffer]) -> None:
        if action not in [offer.action for offer in offers]:
            raise DroverError(R.NOTHING_SAFE, f"{action!r} is not safe now", field="action")

    def _lost(self, guest: types.Guest) -> pb.RepairGuestResponse:
        hosts = [
            repair.seen(each.name, self._agent(each) if each.state == types.HOST_STATE_LIVE else None, guest.uuid)
            for each in self.hosts.values()
        ]
        found = repair.examine_lost(repair.Lost(guest.uuid, guest.name, tuple(hosts), guest.name in self.guests))
        return pb.RepairGuestResponse(
            guest=guest.name,
            guest_uuid=guest.uuid,
            findings=found.findings,
            offers=[pb.RepairOffer(action=offer.action, message=offer.says) for offer in found.offers],
            otherwise=found.otherwise,
        )

    def _agent(self, host: types.Host) -> AgentStatus | None:
        said = self.agents.get(host.name, AgentStatus(HostRef(host.name, host.boot_id), 0, complete=True))
        return said if isinstance(said, AgentStatus) else None
