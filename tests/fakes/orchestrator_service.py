"""A small OrchestratorService in memory, behind a real gRPC server: what a client of the API sees, without a cluster.

`serve` runs it in a thread of its own, with the interceptor that the real API has, so that deadlines and errors cross
the wire as they do there. Nothing happens by itself: a test sets the resources, and `frames` says what a watch tells.
"""

# ruff: noqa: N802 (the methods have the names that the service gives them)

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from grpc import aio

from orchestrator import wire
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.guest import guest_errors
from orchestrator.rpc.channels import aio_server, listen
from orchestrator.rpc.errors import Errors
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from protos.drover.v1.orchestrator_pb2_grpc import (
    OrchestratorServiceServicer,
    add_OrchestratorServiceServicer_to_server,
)

T = TypeVar("T")
R = RefusalReason

Frame = types.Migration | types.Evacuation | DroverError | float
"""What a watch does next: tell this, end with this error, or wait so many seconds."""


@dataclass
class FakeOrchestrator(OrchestratorServiceServicer):
    """Resources by name, and every request that came."""

    hosts: dict[str, types.Host] = field(default_factory=dict[str, types.Host])
    guests: dict[str, types.Guest] = field(default_factory=dict[str, types.Guest])
    migrations: dict[str, types.Migration] = field(default_factory=dict[str, types.Migration])
    evacuations: dict[str, types.Evacuation] = field(default_factory=dict[str, types.Evacuation])
    verdicts: list[pb.PlacementVerdict] = field(default_factory=list[pb.PlacementVerdict])
    failures: dict[str, DroverError] = field(default_factory=dict[str, DroverError])
    """Raised by the method of this name."""
    delays_s: dict[str, float] = field(default_factory=dict[str, float])
    frames: list[list[Frame]] = field(default_factory=list[list[Frame]])
    """One list per subscription; the last one is told again to whoever comes after."""
    calls: list[tuple[str, Any]] = field(default_factory=list[tuple[str, Any]])
    wish: int = pb.WISH_STATE_APPLIED
    chaos: bool = True

    async def _called(self, name: str, request: Any) -> None:
        self.calls.append((name, request))
        if name in self.delays_s:
            await asyncio.sleep(self.delays_s[name])
        if name in self.failures:
            raise self.failures[name]

    def requests(self, name: str) -> list[Any]:
        return [request for called, request in self.calls if called == name]

    @staticmethod
    def _known(resources: dict[str, T], name: str, what: str) -> T:
        if name not in resources:
            raise DroverError(R.NOT_FOUND, f"there is no {what} {name!r}")
        return resources[name]

    # --- hosts

    async def GetHost(self, request: pb.GetHostRequest, context: object) -> types.Host:
        await self._called("GetHost", request)
        return self._known(self.hosts, request.name, "host")

    async def ListHosts(self, request: pb.ListHostsRequest, context: object) -> pb.ListHostsResponse:
        await self._called("ListHosts", request)
        return pb.ListHostsResponse(hosts=self.hosts.values())

    async def CordonHost(self, request: pb.CordonHostRequest, context: object) -> types.Host:
        await self._called("CordonHost", request)
        host = self._known(self.hosts, request.name, "host")
        host.cordoned, host.cordon_reason = True, request.reason
        return host

    async def UncordonHost(self, request: pb.UncordonHostRequest, context: object) -> types.Host:
        await self._called("UncordonHost", request)
        host = self._known(self.hosts, request.name, "host")
        host.cordoned, host.cordon_reason = False, ""
        return host

    # --- guests

    async def CreateGuest(self, request: pb.CreateGuestRequest, context: object) -> types.Guest:
        await self._called("CreateGuest", request)
        if wrong := guest_errors(wire.guest_spec_from_proto(request.spec)):
            raise DroverError(R.INVALID_ARGUMENT, "the guest is wrong", violations=wrong)
        if request.spec.name in self.guests:
            raise DroverError(R.ALREADY_EXISTS, f"there is a guest {request.spec.name!r} already")
        guest = types.Guest(
            name=request.spec.name,
            uuid=f"uuid-{request.spec.name}",
            spec=request.spec,
            host=request.host or "host-1",
            ownership=types.OWNERSHIP_PHASE_IDLE,
            run_state=types.RUN_STATE_RUNNING,
            want_run=True,
        )
        if not request.validate_only:
            self.guests[guest.name] = guest
        return guest

    async def GetGuest(self, request: pb.GetGuestRequest, context: object) -> types.Guest:
        await self._called("GetGuest", request)
        return self._known(self.guests, request.name, "guest")

    async def ListGuests(self, request: pb.ListGuestsRequest, context: object) -> pb.ListGuestsResponse:
        await self._called("ListGuests", request)
        found = [guest for guest in self.guests.values() if request.host in ("", guest.host)]
        return pb.ListGuestsResponse(guests=found)

    async def PauseGuest(self, request: pb.PauseGuestRequest, context: object) -> pb.ChangeRunStateResponse:
        await self._called("PauseGuest", request)
        return self._wished(request.name, run=False)

    async def ResumeGuest(self, request: pb.ResumeGuestRequest, context: object) -> pb.ChangeRunStateResponse:
        await self._called("ResumeGuest", request)
        return self._wished(request.name, run=True)

    def _wished(self, name: str, *, run: bool) -> pb.ChangeRunStateResponse:
        guest = self._known(self.guests, name, "guest")
        guest.want_run = run
        if self.wish == pb.WISH_STATE_APPLIED:
            guest.run_state = types.RUN_STATE_RUNNING if run else types.RUN_STATE_PAUSED
        return pb.ChangeRunStateResponse(guest=guest, wish=pb.WishState.ValueType(self.wish))

    async def StopGuest(self, request: pb.StopGuestRequest, context: object) -> types.Guest:
        await self._called("StopGuest", request)
        guest = self._known(self.guests, request.name, "guest")
        guest.run_state = types.RUN_STATE_ENDED
        return self.guests.pop(request.name)

    async def WatchGuests(
        self, request: pb.WatchGuestsRequest, context: object
    ) -> AsyncIterator[pb.WatchGuestsResponse]:
        await self._called("WatchGuests", request)
        for name in request.names or list(self.guests):
            yield pb.WatchGuestsResponse(guest=self._known(self.guests, name, "guest"))

    # --- migrations

    async def CreateMigration(self, request: pb.CreateMigrationRequest, context: object) -> types.Migration:
        await self._called("CreateMigration", request)
        guest = self._known(self.guests, request.guest, "guest")
        migration = types.Migration(
            name="5" * 32,
            guest=guest.name,
            guest_uuid=guest.uuid,
            source=guest.host,
            destination=request.destination or "host-2",
            phase=types.MIGRATION_PHASE_PENDING,
        )
        if not request.validate_only:
            self.migrations[migration.name] = migration
        return migration

    async def GetMigration(self, request: pb.GetMigrationRequest, context: object) -> types.Migration:
        await self._called("GetMigration", request)
        return self._known(self.migrations, request.name, "migration")

    async def ListMigrations(self, request: pb.ListMigrationsRequest, context: object) -> pb.ListMigrationsResponse:
        await self._called("ListMigrations", request)
        found = [each for each in self.migrations.values() if request.guest in ("", each.guest)]
        return pb.ListMigrationsResponse(
            migrations=[each for each in found if not (request.active_only and each.end_time.seconds)]
        )

    async def CancelMigration(self, request: pb.CancelMigrationRequest, context: object) -> types.Migration:
        await self._called("CancelMigration", request)
        migration = self._known(self.migrations, request.name, "migration")
        migration.phase, migration.failure = types.MIGRATION_PHASE_CANCELLED, "CANCELLED"
        return migration

    async def WatchMigrations(
        self, request: pb.WatchMigrationsRequest, context: object
    ) -> AsyncIterator[pb.WatchMigrationsResponse]:
        await self._called("WatchMigrations", request)
        async for frame in self._play():
            if isinstance(frame, types.Migration):
                self.migrations[frame.name] = frame
                yield pb.WatchMigrationsResponse(migration=frame)

    async def _play(self) -> AsyncIterator[Frame]:
        for frame in self.frames.pop(0) if len(self.frames) > 1 else self.frames[0] if self.frames else []:
            if isinstance(frame, float):
                await asyncio.sleep(frame)
            elif isinstance(frame, DroverError):
                raise frame
            else:
                yield frame

    # --- evacuations

    async def CreateEvacuation(
        self, request: pb.CreateEvacuationRequest, context: object
    ) -> pb.CreateEvacuationResponse:
        await self._called("CreateEvacuation", request)
        self._known(self.hosts, request.host, "host")
        evacuation = types.Evacuation(
            name="e" * 32,
            host=request.host,
            phase=types.EVACUATION_PHASE_PENDING,
            max_concurrent=request.max_concurrent or 4,
            policy=request.policy,
        )
        if request.validate_only:
            return pb.CreateEvacuationResponse(verdicts=self.verdicts)
        self.evacuations[evacuation.name] = evacuation
        return pb.CreateEvacuationResponse(evacuation=evacuation, verdicts=self.verdicts)

    async def GetEvacuation(self, request: pb.GetEvacuationRequest, context: object) -> types.Evacuation:
        await self._called("GetEvacuation", request)
        return self._known(self.evacuations, request.name, "evacuation")

    async def ListEvacuations(self, request: pb.ListEvacuationsRequest, context: object) -> pb.ListEvacuationsResponse:
        await self._called("ListEvacuations", request)
        return pb.ListEvacuationsResponse(evacuations=self.evacuations.values())

    async def CancelEvacuation(self, request: pb.CancelEvacuationRequest, context: object) -> types.Evacuation:
        await self._called("CancelEvacuation", request)
        evacuation = self._known(self.evacuations, request.name, "evacuation")
        evacuation.cancel_requested, evacuation.phase = True, types.EVACUATION_PHASE_CANCELLING
        return evacuation

    async def WatchEvacuations(
        self, request: pb.WatchEvacuationsRequest, context: object
    ) -> AsyncIterator[pb.WatchEvacuationsResponse]:
        await self._called("WatchEvacuations", request)
        async for frame in self._play():
            if isinstance(frame, types.Evacuation):
                self.evacuations[frame.name] = frame
                yield pb.WatchEvacuationsResponse(evacuation=frame)

    # --- chaos

    async def InjectLateAck(self, request: pb.InjectLateAckRequest, context: object) -> pb.InjectLateAckResponse:
        await self._called("InjectLateAck", request)
        if not self.chaos:
            raise DroverError(R.CHAOS_DISABLED, "this cluster does not allow chaos")
        self._known(self.guests, request.guest, "guest")
        ask = f"{{at: {request.at}, times: {request.times}, bytes: {request.bytes}}}"
        return pb.InjectLateAckResponse(scenario=f"asks:\n- {ask}\n")


@contextlib.contextmanager
def serve(service: FakeOrchestrator, address: str) -> Iterator[str]:
    """The service behind a server at `address` (`unix:PATH` or `127.0.0.1:0`) while the context lasts."""
    loop = asyncio.new_event_loop()
    worker = threading.Thread(target=loop.run_forever, name="fake-api", daemon=True)
    worker.start()

    async def start() -> tuple[aio.Server, str]:
        server = aio_server([Errors(require_deadline=True)])
        add_OrchestratorServiceServicer_to_server(service, server)
        port = listen(server, address)
        await server.start()
        return server, address if address.startswith("unix:") else f"127.0.0.1:{port}"

    server, listening = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield listening
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        worker.join(10)


def host(name: str, **values: Any) -> types.Host:
    """A live host of 8 GiB."""
    given: dict[str, Any] = {
        "state": types.HOST_STATE_LIVE,
        "boot_id": f"boot-{name}",
        "memory_mib": 8192,
        "memory_used_mib": 768,
        "bandwidth_mbps": 1000,
        "engine": "QEMU 10.0.3",
        "accelerator": "tcg",
        **values,
    }
    return types.Host(name=name, **given)


def unix_address(folder: Path) -> str:
    return f"unix:{folder / 'api.sock'}"
