"""Evacuations."""

# ruff: noqa: N802 (the methods have the names that the service gives them)

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from orchestrator import wire
from orchestrator.api import evacuations, lists, migrations, views
from orchestrator.api.listing import Field, Kind, Listing
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.core.placement import GuestInput, need_for, plan
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_parts.state import State, created_at_s, name_of, over, record_of

R = RefusalReason


class Evacuations(State):
    async def CreateEvacuation(
        self, request: pb.CreateEvacuationRequest, context: object
    ) -> pb.CreateEvacuationResponse:
        await self._called("CreateEvacuation", request)
        evacuations.check(request)
        if earlier := self._earlier("CreateEvacuation", request):
            return pb.CreateEvacuationResponse(
                evacuation=self.evacuations[earlier], verdicts=self._verdicts(request.host)
            )
        host = self._known(self.hosts, request.host, "host", "host")
        verdicts = self._verdicts(host.name)
        own = [wire.policy_from_proto(each.spec.policy) for each in self.guests.values() if each.host == host.name]
        if bad := migrations.policy_violations(request.policy, own or None):
            raise invalid(bad)
        evacuation = types.Evacuation(
            host=host.name,
            phase=types.EVACUATION_PHASE_PENDING,
            max_concurrent=request.max_concurrent or evacuations.DEFAULT_CONCURRENT,
            policy=request.policy,
        )
        if not request.validate_only:
            for other in self.evacuations.values():
                if other.host == host.name and not over(other):
                    said = f"evacuation {other.name} is emptying {host.name} already"
                    raise DroverError(R.ALREADY_EXISTS, said, details={"evacuation": other.name})
            evacuation.name = name_of("e", len(self.evacuations))
            evacuation.create_time.GetCurrentTime()
            self.evacuations[evacuation.name] = evacuation
            self._remember("CreateEvacuation", request, f"evacuations/{evacuation.name}")
            if not host.cordoned:
                host.cordoned, host.cordon_reason = True, f"evacuation {evacuation.name}"
        return pb.CreateEvacuationResponse(evacuation=evacuation, verdicts=verdicts)

    def _verdicts(self, host: str) -> Iterable[pb.PlacementVerdict]:
        if self.verdicts:
            return self.verdicts
        leaving = [
            GuestInput(each.uuid, record_of(each), wire.guest_spec_from_proto(each.spec))
            for each in self.guests.values()
            if each.host == host
        ]
        leaving.sort(key=lambda each: (-each.spec.memory_mib, each.record.name))
        needs = [need_for(each.spec, guest=each.uuid, source=host) for each in leaving]
        return [views.verdict(*each) for each in zip(leaving, plan(self._views(), needs), strict=True)]

    async def GetEvacuation(self, request: pb.GetEvacuationRequest, context: object) -> types.Evacuation:
        await self._called("GetEvacuation", request)
        return self._known(self.evacuations, request.name, "evacuation")

    async def ListEvacuations(self, request: pb.ListEvacuationsRequest, context: object) -> pb.ListEvacuationsResponse:
        await self._called("ListEvacuations", request)
        page = lists.page(_EVACUATIONS, self.evacuations.values(), request)
        return pb.ListEvacuationsResponse(
            evacuations=page.rows, unreadable=self.unreadable, next_page_token=page.next_page_token
        )

    async def CancelEvacuation(self, request: pb.CancelEvacuationRequest, context: object) -> types.Evacuation:
        await self._called("CancelEvacuation", request)
        evacuation = self._known(self.evacuations, request.name, "evacuation")
        if over(evacuation) and evacuation.phase != types.EVACUATION_PHASE_CANCELLED:
            phase = wire.word(evacuation, "phase")
            raise DroverError(R.ALREADY_ENDED, f"evacuation {evacuation.name} is over", details={"phase": phase})
        evacuation.cancel_requested = True
        return evacuation

    async def WatchEvacuations(
        self, request: pb.WatchEvacuationsRequest, context: object
    ) -> AsyncIterator[pb.WatchEvacuationsResponse]:
        await self._called("WatchEvacuations", request)
        async for evacuation in self._watch(self.evacuations, request.names):
            yield pb.WatchEvacuationsResponse(evacuation=evacuation)


_EVACUATIONS = Listing[types.Evacuation](
    {
        "name": Field(Kind.TEXT, lambda row: row.name),
        "host": Field(Kind.TEXT, lambda row: row.host),
        "phase": Field(Kind.TEXT, lambda row: wire.word(row, "phase")),
        "active": Field(Kind.BOOL, lambda row: not over(row)),
        "order": Field(Kind.NUMBER, created_at_s),
    },
    key="name",
    order_by="order desc",
)
