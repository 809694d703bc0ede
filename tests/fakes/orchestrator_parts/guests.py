"""Guests: births, wishes, ends."""

# ruff: noqa: N802 (the methods have the names that the service gives them)

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from copy import deepcopy

from orchestrator import wire
from orchestrator.api import decisions, guests, lists, placements
from orchestrator.api.listing import Field, Kind, Listing
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.placement import need_for
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_parts.state import State, follow, record_of

R = RefusalReason


class Guests(State):
    async def CreateGuest(self, request: pb.CreateGuestRequest, context: object) -> types.Guest:
        await self._called("CreateGuest", request)
        spec = guests.checked(request)
        if earlier := self._earlier("CreateGuest", request):
            guest = self._guest(earlier)
            decisions.need_alive(record_of(guest))
            return guest
        if spec.name in self.guests:
            raise DroverError(R.ALREADY_EXISTS, f"there is a guest {spec.name!r} already", field="spec.name")
        host = self._place(spec, "", request.host, "host")
        guest = types.Guest(name=spec.name, spec=request.spec, host=host, want_run=True)
        if not request.validate_only:
            guest.uuid = str(uuid.uuid4())
            guest.etag = self._etag(guest)
            guest.ownership, guest.run_state = types.OWNERSHIP_PHASE_IDLE, types.RUN_STATE_RUNNING
            self.guests[guest.name] = guest
            self._carry(guest, 1)
            self._remember("CreateGuest", request, f"guests/{guest.uuid}")
        return guest

    async def CheckPlacement(self, request: pb.CheckPlacementRequest, context: object) -> pb.CheckPlacementResponse:
        await self._called("CheckPlacement", request)
        need = placements.check(request)
        if need is None:
            guest = self._guest(request.guest, "guest")
            need = need_for(wire.guest_spec_from_proto(guest.spec), guest=guest.uuid, source=guest.host)
        found = placements.answer(request, self._views(), need)
        found.obstacles.extend(self.obstacles if need.source else ())
        return found

    async def GetGuest(self, request: pb.GetGuestRequest, context: object) -> types.Guest:
        await self._called("GetGuest", request)
        return self._guest(request.name)

    async def ListGuests(self, request: pb.ListGuestsRequest, context: object) -> pb.ListGuestsResponse:
        await self._called("ListGuests", request)
        if request.host:
            self._known(self.hosts, request.host, "host", "host")
        found = [guest for guest in self.guests.values() if request.host in ("", guest.host)]
        page = lists.page(_GUESTS, [_without_etag(guest) for guest in found], request)
        return pb.ListGuestsResponse(guests=page.rows, unreadable=self.unreadable, next_page_token=page.next_page_token)

    async def PauseGuest(self, request: pb.PauseGuestRequest, context: object) -> pb.ChangeRunStateResponse:
        await self._called("PauseGuest", request)
        return self._wished(request.name, run=False)

    async def ResumeGuest(self, request: pb.ResumeGuestRequest, context: object) -> pb.ChangeRunStateResponse:
        await self._called("ResumeGuest", request)
        return self._wished(request.name, run=True)

    def _wished(self, name: str, *, run: bool) -> pb.ChangeRunStateResponse:
        guest = self._guest(name)
        decisions.need_alive(record_of(guest))
        guest.want_run = run
        if self.wish == pb.WISH_STATE_APPLIED:
            guest.run_state = types.RUN_STATE_RUNNING if run else types.RUN_STATE_PAUSED
        return pb.ChangeRunStateResponse(guest=guest, wish=pb.WishState.ValueType(self.wish))

    async def StopGuest(self, request: pb.StopGuestRequest, context: object) -> types.Guest:
        await self._called("StopGuest", request)
        guest = self._guest(request.name)
        if guest.ownership == types.OWNERSHIP_PHASE_GONE:
            return guest
        self.process_ends(guest)
        return self._ended(guest)

    def _ended(self, guest: types.Guest) -> types.Guest:
        guest.ownership, guest.run_state = types.OWNERSHIP_PHASE_GONE, types.RUN_STATE_ENDED
        guest.want_run = False
        self._carry(guest, -1)
        self.gone.append(self.guests.pop(guest.name))
        return guest

    def process_ends(self, guest: types.Guest) -> None:
        """That it was adopted in, if it was."""
        if guest.uuid in self.adopted:
            self.vmms.pop(self.adopted[guest.uuid], None)

    def _etag(self, guest: types.Guest) -> str:
        return f"{guest.uuid}.{self.edits.get(guest.uuid, 0)}"

    async def WatchGuests(
        self, request: pb.WatchGuestsRequest, context: object
    ) -> AsyncIterator[pb.WatchGuestsResponse]:
        await self._called("WatchGuests", request)
        uuids = [self._guest(name, "names").uuid for name in request.names]
        async for guest in follow(self._lives, uuids, lambda guest: guest.ownership == types.OWNERSHIP_PHASE_GONE):
            yield pb.WatchGuestsResponse(guest=guest)


_GUESTS = Listing[types.Guest](
    {
        "name": Field(Kind.TEXT, lambda row: row.name),
        "uuid": Field(Kind.TEXT, lambda row: row.uuid),
        "host": Field(Kind.TEXT, lambda row: row.host),
        "ownership": Field(Kind.TEXT, lambda row: wire.word(row, "ownership")),
        "run_state": Field(Kind.TEXT, lambda row: wire.word(row, "run_state")),
        "memory_mib": Field(Kind.NUMBER, lambda row: row.spec.memory_mib),
        "labels": Field(Kind.MAP, lambda row: row.spec.labels),
    },
    key="uuid",
    order_by="name",
)


def _without_etag(guest: types.Guest) -> types.Guest:
    listed = deepcopy(guest)
    listed.etag = ""
    return listed
