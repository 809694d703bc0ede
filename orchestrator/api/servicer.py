"""OrchestratorService on the wire: takes a call apart, passes it on, answers. Refusals are DroverErrors that
`orchestrator.rpc.errors.Errors` turns into statuses."""

# Handlers are named as the .proto names the calls.
# ruff: noqa: N802

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from orchestrator.api import past
from orchestrator.api.adoptions import Adoptions
from orchestrator.api.calls import Caller, Tools
from orchestrator.api.consoles import Consoles
from orchestrator.api.deaths import Deaths
from orchestrator.api.evacuations import Evacuations
from orchestrator.api.guests import Guests
from orchestrator.api.health import cluster_health
from orchestrator.api.hosts import Hosts
from orchestrator.api.images import Images
from orchestrator.api.lists import Lists
from orchestrator.api.migrations import Migrations
from orchestrator.api.placements import Placements
from orchestrator.api.reads import EvacuationRead, GuestRead, MigrationRead
from orchestrator.api.repairs import Repairs
from orchestrator.api.sources import EvacuationSource, GuestSource, MigrationSource
from orchestrator.api.watching import Feed, Streams
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.ledger.gather import each
from orchestrator.ledger.records import BadRecord
from orchestrator.ledger.store import StoreUnavailable
from orchestrator.telemetry import about
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2
from protos.drover.v1.orchestrator_pb2_grpc import OrchestratorServiceServicer

MARGIN_S = 0.2
"""Kept back from the caller's time, so that "outcome unknown" is said before the call is cut off."""


def translate(error: Exception) -> DroverError | None:
    """For `rpc.errors.Errors`: what a handler lets through."""
    if isinstance(error, StoreUnavailable):
        return DroverError(RefusalReason.LEDGER_UNREACHABLE, f"ZooKeeper does not answer the API: {error}")
    if isinstance(error, BadRecord):
        return DroverError(RefusalReason.INTERNAL, f"the ledger holds what this version cannot read: {error}")
    return None


def _caller(context: Any) -> Caller:
    now = asyncio.get_running_loop().time()
    return Caller(by=str(context.peer()), deadline_s=now + max(0.0, float(context.time_remaining()) - MARGIN_S))


class OrchestratorServicer(OrchestratorServiceServicer):
    """Holds nothing that the ledger does not have, apart from what can be read again at any time."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._streams = Streams()
        self._lists = Lists(tools)
        self._hosts = Hosts(tools)
        self._deaths = Deaths(tools)
        self._repairs = Repairs(tools)
        self._placements = Placements(tools)
        self._images = Images(tools)
        self._consoles = Consoles(tools)
        self._migrations = Migrations(tools)
        self._guests = Guests(tools, self._migrations)
        self._adoptions = Adoptions(tools, self._guests, self._migrations)
        self._evacuations = Evacuations(tools)
        self.guest_feed = Feed[GuestRead, types_pb2.Guest](GuestSource(tools), tools.store, tools.fleet)
        self.migration_feed = Feed[MigrationRead, types_pb2.Migration](MigrationSource(tools), tools.store, tools.fleet)
        self.evacuation_feed = Feed[EvacuationRead, types_pb2.Evacuation](
            EvacuationSource(tools), tools.store, tools.fleet
        )

    @property
    def streams_open(self) -> int:
        """Watches under way."""
        return self._streams.total

    async def close(self) -> None:
        """End what its lists watch."""
        await self._lists.close()

    async def GetClusterHealth(self, request: pb.GetClusterHealthRequest, context: Any) -> pb.ClusterHealth:
        return await cluster_health(self._tools.ledger)

    async def ExportHistory(self, request: pb.ExportHistoryRequest, context: Any) -> AsyncIterator[pb.HistoryEntry]:
        async with aclosing(past.export(self._tools, request)) as entries:
            async for entry in entries:
                yield entry

    # --- hosts --------------------------------------------------------------------------------------------------------

    async def GetHost(self, request: pb.GetHostRequest, context: Any) -> types_pb2.Host:
        if request.ask_agent:
            return await self._hosts.get_with_agent(request.name, _caller(context))
        return await self._hosts.get(request.name)

    async def ListHosts(self, request: pb.ListHostsRequest, context: Any) -> pb.ListHostsResponse:
        return await self._lists.hosts(request)

    async def CordonHost(self, request: pb.CordonHostRequest, context: Any) -> types_pb2.Host:
        return await self._hosts.cordon(request.name, request.reason, _caller(context))

    async def UncordonHost(self, request: pb.UncordonHostRequest, context: Any) -> types_pb2.Host:
        return await self._hosts.uncordon(request.name, _caller(context))

    async def RejoinHost(self, request: pb.RejoinHostRequest, context: Any) -> types_pb2.Host:
        return await self._hosts.rejoin(request.name, _caller(context))

    async def DeclareHostDead(self, request: pb.DeclareHostDeadRequest, context: Any) -> types_pb2.HostDeath:
        return await self._deaths.declare(request, _caller(context))

    async def GetHostDeath(self, request: pb.GetHostDeathRequest, context: Any) -> types_pb2.HostDeath:
        return await self._deaths.get(request.name)

    async def RemoveHost(self, request: pb.RemoveHostRequest, context: Any) -> pb.RemoveHostResponse:
        await self._deaths.remove(request.name, _caller(context))
        return pb.RemoveHostResponse()

    # --- placement ----------------------------------------------------------------------------------------------------

    async def CheckPlacement(self, request: pb.CheckPlacementRequest, context: Any) -> pb.CheckPlacementResponse:
        return await self._placements.check(request, _caller(context))

    # --- images -------------------------------------------------------------------------------------------------------

    async def ListImages(self, request: pb.ListImagesRequest, context: Any) -> pb.ListImagesResponse:
        return await self._images.list(request, _caller(context))

    async def ImportImage(
        self, request_iterator: AsyncIterator[pb.ImportImageRequest], context: Any
    ) -> types_pb2.Image:
        with self._streams.one(context.peer()):
            return await self._images.bring_in(request_iterator, _caller(context))

    # --- guests -------------------------------------------------------------------------------------------------------

    async def CreateGuest(self, request: pb.CreateGuestRequest, context: Any) -> types_pb2.Guest:
        with about(guest=request.spec.name):
            return await self._guests.create(request, _caller(context))

    async def AdoptGuest(self, request: pb.AdoptGuestRequest, context: Any) -> pb.AdoptGuestResponse:
        with about(guest=request.name, host=request.host):
            return await self._adoptions.adopt(request, _caller(context))

    async def ReleaseGuest(self, request: pb.ReleaseGuestRequest, context: Any) -> types_pb2.Guest:
        with about(guest=request.name):
            return await self._adoptions.release(request.name, _caller(context))

    async def GetGuest(self, request: pb.GetGuestRequest, context: Any) -> types_pb2.Guest:
        return await self._guests.get(request.name)

    async def ListGuests(self, request: pb.ListGuestsRequest, context: Any) -> pb.ListGuestsResponse:
        return await self._lists.guests(request)

    async def PauseGuest(self, request: pb.PauseGuestRequest, context: Any) -> pb.ChangeRunStateResponse:
        with about(guest=request.name):
            return await self._guests.want_run(request.name, False, _caller(context))

    async def ResumeGuest(self, request: pb.ResumeGuestRequest, context: Any) -> pb.ChangeRunStateResponse:
        with about(guest=request.name):
            return await self._guests.want_run(request.name, True, _caller(context))

    async def StopGuest(self, request: pb.StopGuestRequest, context: Any) -> types_pb2.Guest:
        with about(guest=request.name):
            return await self._guests.stop(request.name, _caller(context))

    async def StopAndKeepGuest(self, request: pb.StopAndKeepGuestRequest, context: Any) -> types_pb2.Guest:
        with about(guest=request.name):
            return await self._guests.stop(request.name, _caller(context), keep=True)

    async def StartGuestAgain(self, request: pb.StartGuestAgainRequest, context: Any) -> types_pb2.Guest:
        with about(guest=request.name):
            return await self._guests.start_again(request.name, _caller(context))

    async def EditGuest(self, request: pb.EditGuestRequest, context: Any) -> types_pb2.Guest:
        with about(guest=request.name):
            return await self._guests.edit(request, _caller(context))

    async def AttachConsole(
        self, request_iterator: AsyncIterator[pb.AttachConsoleRequest], context: Any
    ) -> AsyncIterator[pb.AttachConsoleResponse]:
        with self._streams.one(context.peer()):
            async with aclosing(self._consoles.attach(request_iterator, _caller(context))) as said:
                async for each in said:
                    yield each

    async def OpenDisplay(self, request: pb.OpenDisplayRequest, context: Any) -> pb.OpenDisplayResponse:
        with about(guest=request.guest):
            return await self._guests.open_display(request, _caller(context))

    async def WatchGuests(self, request: pb.WatchGuestsRequest, context: Any) -> AsyncIterator[pb.WatchGuestsResponse]:
        with self._streams.one(context.peer()):
            uuids = await each(request.names, lambda name: self._guests.uuid_of(name, field="names"))
            async with aclosing(self.guest_feed.stream(uuids)) as guests:
                async for guest in guests:
                    yield pb.WatchGuestsResponse(guest=guest)

    async def RepairGuest(self, request: pb.RepairGuestRequest, context: Any) -> pb.RepairGuestResponse:
        with about(guest=request.name):
            return await self._repairs.repair(request, _caller(context))

    # --- migrations ---------------------------------------------------------------------------------------------------

    async def CreateMigration(self, request: pb.CreateMigrationRequest, context: Any) -> types_pb2.Migration:
        with about(guest=request.guest):
            return await self._migrations.create(request, _caller(context))

    async def GetMigration(self, request: pb.GetMigrationRequest, context: Any) -> types_pb2.Migration:
        return await self._migrations.get(request.name)

    async def ListMigrations(self, request: pb.ListMigrationsRequest, context: Any) -> pb.ListMigrationsResponse:
        return await self._lists.migrations(request)

    async def CancelMigration(self, request: pb.CancelMigrationRequest, context: Any) -> types_pb2.Migration:
        with about(migration=request.name):
            return await self._migrations.cancel(request.name, _caller(context))

    async def WatchMigrations(
        self, request: pb.WatchMigrationsRequest, context: Any
    ) -> AsyncIterator[pb.WatchMigrationsResponse]:
        with self._streams.one(context.peer()):
            async with aclosing(self.migration_feed.stream(request.names)) as migrations:
                async for migration in migrations:
                    yield pb.WatchMigrationsResponse(migration=migration)

    # --- evacuations --------------------------------------------------------------------------------------------------

    async def CreateEvacuation(self, request: pb.CreateEvacuationRequest, context: Any) -> pb.CreateEvacuationResponse:
        return await self._evacuations.create(request, _caller(context))

    async def GetEvacuation(self, request: pb.GetEvacuationRequest, context: Any) -> types_pb2.Evacuation:
        return await self._evacuations.get(request.name)

    async def ListEvacuations(self, request: pb.ListEvacuationsRequest, context: Any) -> pb.ListEvacuationsResponse:
        return await self._lists.evacuations(request)

    async def CancelEvacuation(self, request: pb.CancelEvacuationRequest, context: Any) -> types_pb2.Evacuation:
        return await self._evacuations.cancel(request.name, _caller(context))

    async def WatchEvacuations(
        self, request: pb.WatchEvacuationsRequest, context: Any
    ) -> AsyncIterator[pb.WatchEvacuationsResponse]:
        with self._streams.one(context.peer()):
            async with aclosing(self.evacuation_feed.stream(request.names)) as evacuations:
                async for evacuation in evacuations:
                    yield pb.WatchEvacuationsResponse(evacuation=evacuation)

    async def AttachToGuest(self, request: pb.AttachToGuestRequest, context: Any) -> types_pb2.Guest:
        with about(guest=request.guest):
            return await self._guests.attach(request, _caller(context))

    async def DetachFromGuest(self, request: pb.DetachFromGuestRequest, context: Any) -> types_pb2.Guest:
        with about(guest=request.guest):
            return await self._guests.detach(request, _caller(context))

    # --- devices ------------------------------------------------------------------------------------------------------

    async def InstructDevice(self, request: pb.InstructDeviceRequest, context: Any) -> pb.InstructDeviceResponse:
        with about(guest=request.guest):
            answer = await self._guests.instruct(request, _caller(context))
        return pb.InstructDeviceResponse(answer=answer)
