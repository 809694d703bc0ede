"""A small OrchestratorService in memory, behind a real gRPC server: what a client of the API sees, without a cluster.

`serve` runs it in a thread of its own, with the interceptor that the real API has, so that deadlines and errors cross
the wire as they do there. It judges requests with the product's own pure parts and passes the contract suite of the API
(tests/contract/test_orchestrator_*.py). Nothing happens by itself: a test sets the resources, watches tell them,
and `frames`, where given, is told by the watches of migrations and evacuations instead.
"""

# ruff: noqa: N802 (the methods have the names that the service gives them)

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import Message
from grpc import aio

from orchestrator import wire, wire_hardware
from orchestrator.api import (
    adoptions,
    decisions,
    evacuations,
    guests,
    hosts,
    images,
    limits,
    lists,
    migrations,
    placements,
    views,
)
from orchestrator.api.calls import digest
from orchestrator.api.listing import Field, Kind, Listing
from orchestrator.api.reads import no_place, not_found
from orchestrator.core import changes, repair
from orchestrator.core.agent import AgentStatus, VmmExamined
from orchestrator.core.death import issued_at_s
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.core.guest import name_error
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.images import HEADER_BYTES, content_error, header_of
from orchestrator.core.offers import Offer
from orchestrator.core.placement import GuestInput, HostView, choose, need_for, plan
from orchestrator.core.records import GuestSpec, HostFeature, Pool, PoolKind, RequestRecord
from orchestrator.rpc.channels import MAX_REQUEST_BYTES, aio_server, listen
from orchestrator.rpc.errors import Errors
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from protos.drover.v1.orchestrator_pb2_grpc import (
    OrchestratorServiceServicer,
    add_OrchestratorServiceServicer_to_server,
)

T = TypeVar("T")
M = TypeVar("M", bound=Message)
R = RefusalReason

LOOK_S = 0.02
"""Between two looks of a watch at what it watches."""

Frame = types.Migration | types.Evacuation | DroverError | float
"""What a watch does next: tell this, end with this error, or wait so many seconds."""


@dataclass
class FakeOrchestrator(OrchestratorServiceServicer):
    """Resources by name, and every request that came."""

    hosts: dict[str, types.Host] = field(default_factory=dict[str, types.Host])
    guests: dict[str, types.Guest] = field(default_factory=dict[str, types.Guest])
    migrations: dict[str, types.Migration] = field(default_factory=dict[str, types.Migration])
    evacuations: dict[str, types.Evacuation] = field(default_factory=dict[str, types.Evacuation])
    offers: dict[str, list[pb.RepairOffer]] = field(default_factory=dict[str, list[pb.RepairOffer]])
    """What a repair offers, by guest."""
    deaths: dict[str, types.HostDeath] = field(default_factory=dict[str, types.HostDeath])
    health: pb.ClusterHealth = field(default_factory=lambda: pb.ClusterHealth(leader="coordinator"))
    unreadable: list[pb.Unreadable] = field(default_factory=list[pb.Unreadable])
    obstacles: list[types.Obstacle] = field(default_factory=list[types.Obstacle])
    """Of every guest, at its own host."""
    """Of every list."""
    gone: list[types.Guest] = field(default_factory=list[types.Guest])
    verdicts: list[pb.PlacementVerdict] = field(default_factory=list[pb.PlacementVerdict])
    """Of every evacuation; empty: what free memory says."""
    failures: dict[str, DroverError] = field(default_factory=dict[str, DroverError])
    """Raised by the method of this name."""
    delays_s: dict[str, float] = field(default_factory=dict[str, float])
    frames: list[list[Frame]] = field(default_factory=list[list[Frame]])
    """One list per subscription; the last one is told again to whoever comes after."""
    calls: list[tuple[str, Any]] = field(default_factory=list[tuple[str, Any]])
    made: dict[str, RequestRecord] = field(default_factory=dict[str, RequestRecord])
    """By request_id."""
    agents: dict[str, AgentStatus | DroverError] = field(default_factory=dict[str, AgentStatus | DroverError])
    """What a host's agent says is there; of other hosts it answers that nothing is."""
    lost: dict[str, types.Guest] = field(default_factory=dict[str, types.Guest])
    """Guests whose records the ledger has lost, by name."""
    history: list[pb.HistoryEntry] | None = None
    """What is forgotten; None: no history is kept."""
    images: dict[tuple[str, str, str], types.Image] = field(default_factory=dict[tuple[str, str, str], types.Image])
    """By pool, host and name."""
    listening: dict[str, list[asyncio.Queue[bytes]]] = field(default_factory=dict[str, list[asyncio.Queue[bytes]]])
    """Sessions with the consoles of guests, by name."""
    loop: asyncio.AbstractEventLoop = field(init=False)
    """That it is served on."""
    typed: dict[str, bytearray] = field(default_factory=dict[str, bytearray])
    """On their consoles."""
    edits: dict[str, int] = field(default_factory=dict[str, int])
    """How often guests were edited, by uuid."""
    vmms: dict[tuple[str, int], VmmExamined | DroverError] = field(
        default_factory=dict[tuple[str, int], VmmExamined | DroverError]
    )
    """What an examination of a process comes to that somebody else has started, by host and pid."""
    adopted: dict[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])
    """Hosts and pids of the processes that were taken over, by the guests' uuids."""
    released: set[str] = field(default_factory=set[str])
    """Guests whose processes were given back, by uuid."""
    wish: int = pb.WISH_STATE_APPLIED
    instructions: bool = True

    async def _called(self, name: str, request: Any) -> None:
        self.calls.append((name, request))
        if name in self.delays_s:
            await asyncio.sleep(self.delays_s[name])
        if name in self.failures:
            raise self.failures[name]

    def requests(self, name: str) -> list[Any]:
        return [request for called, request in self.calls if called == name]

    @staticmethod
    def _known(resources: dict[str, T], name: str, what: str, field: str = "name") -> T:
        if name not in resources:
            raise not_found(what, name, field=field)
        return resources[name]

    def _earlier(self, method: str, request: Any) -> str:
        """The name of what this request made before; empty: nothing. Raises REQUEST_ID_REUSED."""
        found = None if request.validate_only else self.made.get(request.request_id)
        return decisions.repeated(found, request.request_id, digest(method, request)).rpartition("/")[2]

    def _remember(self, method: str, request: Any, operation: str) -> None:
        if request.request_id:
            self.made[request.request_id] = RequestRecord(operation, digest(method, request))

    async def GetClusterHealth(self, request: pb.GetClusterHealthRequest, context: object) -> pb.ClusterHealth:
        await self._called("GetClusterHealth", request)
        return self.health

    async def ExportHistory(self, request: pb.ExportHistoryRequest, context: object) -> AsyncIterator[pb.HistoryEntry]:
        await self._called("ExportHistory", request)
        if request.kind not in ("", "migrations", "evacuations", "guests"):
            raise DroverError(R.INVALID_ARGUMENT, f"there is no kind {request.kind!r}", field="kind")
        if self.history is None:
            raise DroverError(R.NO_HISTORY, "no history is kept")
        for one in self.history:
            if request.kind in ("", one.kind) and one.name.startswith(request.name_prefix):
                yield one

    # --- hosts

    def _host(self, name: str) -> types.Host:
        hosts._check_name(name)
        return self._known(self.hosts, name, "host")

    async def GetHost(self, request: pb.GetHostRequest, context: object) -> types.Host:
        await self._called("GetHost", request)
        found = types.Host()
        found.CopyFrom(self._host(request.name))
        if request.ask_agent:
            nothing = AgentStatus(HostRef(found.name, found.boot_id), 0, complete=True)
            owners = {each.uuid: each.host for each in self.guests.values()}
            found.agent.CopyFrom(views.host_agent(self.agents.get(found.name, nothing), owners))
        return found

    async def ListHosts(self, request: pb.ListHostsRequest, context: object) -> pb.ListHostsResponse:
        await self._called("ListHosts", request)
        page = lists.page(_HOSTS, self.hosts.values(), request)
        return pb.ListHostsResponse(hosts=page.rows, unreadable=self.unreadable, next_page_token=page.next_page_token)

    async def CordonHost(self, request: pb.CordonHostRequest, context: object) -> types.Host:
        await self._called("CordonHost", request)
        host = self._host(request.name)
        host.cordoned, host.cordon_reason = True, request.reason or host.cordon_reason
        return host

    async def UncordonHost(self, request: pb.UncordonHostRequest, context: object) -> types.Host:
        await self._called("UncordonHost", request)
        host = self._host(request.name)
        host.cordoned, host.cordon_reason = False, ""
        for evacuation in self.evacuations.values():
            if evacuation.host == host.name:
                evacuation.safe_to_power_off = False
        return host

    async def DeclareHostDead(self, request: pb.DeclareHostDeadRequest, context: object) -> types.HostDeath:
        await self._called("DeclareHostDead", request)
        host = self._host(request.name)
        if host.state == types.HOST_STATE_LIVE:
            raise DroverError(R.HOST_ALIVE, f"the session of the agent of {host.name} lives")
        death = self.deaths.setdefault(host.name, types.HostDeath(host=host.name, boot_id=host.boot_id))
        if host.state == types.HOST_STATE_DEAD:
            death.phase = types.HOST_DEATH_PHASE_DONE
            return death
        if not request.confirmation_token:
            plan = types.HostDeath()
            plan.CopyFrom(death)
            plan.phase, plan.confirmation_token = types.HOST_DEATH_PHASE_PLANNED, f"token-{host.name}"
            return plan
        if issued_at_s(request.confirmation_token) is None and not request.confirmation_token.startswith("token-"):
            raise invalid([("confirmation_token", "is no token of this call")])
        if request.confirmation_token != f"token-{host.name}":
            raise DroverError(R.CONFIRMATION_STALE, f"{host.name} or its guests have changed")
        if not death.fencer and not request.on_operators_word:
            raise DroverError(R.FENCER_REQUIRED, f"no fencer is configured for {host.name}")
        host.state = types.HOST_STATE_DEAD
        death.phase, death.message = types.HOST_DEATH_PHASE_DONE, f"{host.name} is dead"
        death.on_operators_word, death.requested_by = request.on_operators_word, request.requested_by
        return death

    async def GetHostDeath(self, request: pb.GetHostDeathRequest, context: object) -> types.HostDeath:
        await self._called("GetHostDeath", request)
        hosts._check_name(request.name)
        return self._known(self.deaths, request.name, "declaration of the death of")

    async def RemoveHost(self, request: pb.RemoveHostRequest, context: object) -> pb.RemoveHostResponse:
        await self._called("RemoveHost", request)
        host = self._host(request.name)
        if host.state == types.HOST_STATE_LIVE:
            raise DroverError(R.HOST_ALIVE, f"the session of the agent of {host.name} lives")
        there = [each.name for each in self.guests.values() if each.host == host.name]
        if there:
            raise DroverError(R.HOST_NOT_EMPTY, f"{len(there)} guests are recorded on {host.name}")
        if host.state != types.HOST_STATE_DEAD and not host.cordoned:
            raise DroverError(R.HOST_NOT_EMPTY, f"{host.name} is silent, but neither cordoned nor declared dead")
        del self.hosts[host.name]
        return pb.RemoveHostResponse()

    # --- images

    def _pools(self, name: str, kind: types.PoolKind.ValueType | None = None) -> list[str]:
        return [
            host.name
            for host in self.hosts.values()
            for pool in host.pools
            if pool.name == name and kind in (None, pool.kind)
        ]

    def _used(self, image: types.Image) -> list[str]:
        local = image.host in self._pools(image.pool, types.POOL_KIND_LOCAL)
        return sorted(
            guest.name
            for guest in self.guests.values()
            for disk in guest.spec.disks
            if (disk.pool, disk.image) == (image.pool, image.name) and (not local or guest.host == image.host)
        )

    async def ListImages(self, request: pb.ListImagesRequest, context: object) -> pb.ListImagesResponse:
        await self._called("ListImages", request)
        at, after = images.check(request)
        if request.host:
            self._host(request.host)
        if request.pool and not self._pools(request.pool):
            raise not_found("pool", request.pool, field="pool")
        found: list[types.Image] = []
        for key in sorted(self.images):
            pool, host, _ = key
            first = request.host or min(self._pools(pool))
            if host == first or (host in self._pools(pool, types.POOL_KIND_LOCAL) and not request.host):
                found.append(self.images[key])
        found = [each for each in found if request.pool in ("", each.pool)]
        if at is not None:
            found = [each for each in found if (each.pool, each.host, each.name) > (at.pool, at.host, after)]
        size = request.page_size or 100
        answer = pb.ListImagesResponse(images=found[:size])
        for each in answer.images:
            each.guests.extend(self._used(each))
        if len(found) > size:
            last = answer.images[-1]
            answer.next_page_token = f"{last.pool}/{last.host}/{last.name}"
        return answer

    async def ImportImage(self, request_iterator: AsyncIterator[pb.ImportImageRequest], context: object) -> types.Image:
        first = await anext(request_iterator)
        await self._called("ImportImage", first.image)
        image = images.check_import(first)
        if first.image.host:
            self._known(self.hosts, first.image.host, "host", "image.host")
        having = [name for name in self._pools(image.pool) if first.image.host in ("", name)]
        if not having:
            raise DroverError(R.POOL_NOT_FOUND, f"no host has a pool {image.pool}", field="image.pool")
        if len(having) > 1 and self._pools(image.pool, types.POOL_KIND_LOCAL):
            raise invalid([("image.host", "is missing")])
        host, data, told = having[0], first.data, first.sha256
        async for each in request_iterator:
            data, told = data + each.data, each.sha256
        if (image.pool, host, image.name) in self.images:
            raise DroverError(R.ALREADY_EXISTS, f"there is an image {image.name}", field="image.name")
        if wrong := content_error(image, data[:HEADER_BYTES]):
            raise DroverError(R.INVALID_ARGUMENT, wrong, field="image.format")
        if len(data) != image.size_bytes or told != hashlib.sha256(data).digest():
            raise DroverError(R.INVALID_ARGUMENT, "what came is not what was to come", field="data")
        header = header_of(data[:HEADER_BYTES], len(data))
        made = types.Image(
            name=image.name,
            pool=image.pool,
            host=host,
            format=wire_hardware.disk_format_to_proto(header.format),
            size_bytes=header.size_bytes,
            used_bytes=len(data),
        )
        self.images[image.pool, host, image.name] = made
        return made

    def _views(self) -> list[HostView]:
        return [
            HostView(
                HostRef(each.name, each.boot_id),
                each.memory_mib,
                each.memory_used_mib,
                each.memory_reserved_mib,
                live=each.state == types.HOST_STATE_LIVE,
                cordoned=each.cordoned,
                cordon_reason=each.cordon_reason,
                machine_types=tuple(each.machine_types),
                offer=Offer(
                    each.name,
                    {pool.name: Pool(pool.name, PoolKind[types.PoolKind.Name(pool.kind)[10:]]) for pool in each.pools},
                    features=frozenset(HostFeature),
                ),
            )
            for each in self.hosts.values()
        ]

    def _place(self, spec: GuestSpec, source: str, wanted: str, field: str) -> str:
        choice = choose(self._views(), need_for(spec, source=source), wanted=wanted)
        if choice.destination is None:
            raise no_place(choice, field=field if wanted else "")
        return choice.destination.host

    # --- guests

    def _guest(self, name: str, field: str = "name") -> types.Guest:
        """By name, or by the uuid of a life."""
        if wrong := name_error(name):
            raise invalid([(field, wrong)])
        return self.guests[name] if name in self.guests else self._known(self._lives(), name, "guest", field)

    def _lives(self) -> dict[str, types.Guest]:
        return {each.uuid: each for each in (*self.guests.values(), *self.gone)}

    def _carry(self, guest: types.Guest, sign: int) -> None:
        if host := self.hosts.get(guest.host):
            host.guests += sign
            host.memory_used_mib += sign * guest.spec.memory_mib

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

    async def AdoptGuest(self, request: pb.AdoptGuestRequest, context: object) -> pb.AdoptGuestResponse:
        await self._called("AdoptGuest", request)
        wished = adoptions.check(request)
        if earlier := self._earlier("AdoptGuest", request):
            return self._adopted(request, self._guest(earlier))
        if request.name in self.guests:
            raise DroverError(R.ALREADY_EXISTS, f"there is a guest {request.name} already", field="name")
        found = self._examined(request)
        spec = replace(found.spec, name=request.name)
        if wished is not None:
            spec = replace(spec, labels=wished.labels, policy=wished.policy, on_host_death=wished.on_host_death)
        against = list(found.obstacles)
        choice = choose(self._views(), need_for(spec, source=request.host), wanted=request.destination)
        if choice.destination is None:
            error = no_place(choice)
            against.append((error.reason, f"no other host can take it: {error.message}"))
        told = wire.guest_spec_to_proto(spec)
        guest = types.Guest(name=spec.name, spec=told, host=request.host, want_run=found.running)
        if request.validate_only:
            return pb.AdoptGuestResponse(guest=guest, obstacles=map(wire.obstacle_to_proto, against))
        if against:
            raise adoptions._refused(request, against)
        self._place(spec, "", request.host, "host")
        guest.uuid = str(uuid.uuid4())
        guest.etag = self._etag(guest)
        guest.ownership = types.OWNERSHIP_PHASE_IDLE
        guest.run_state = types.RUN_STATE_RUNNING if found.running else types.RUN_STATE_PAUSED
        self.guests[guest.name] = guest
        self.adopted[guest.uuid] = (request.host, request.pid)
        self._carry(guest, 1)
        self._remember("AdoptGuest", request, f"guests/{guest.uuid}")
        return self._adopted(request, guest)

    def _examined(self, request: pb.AdoptGuestRequest) -> VmmExamined:
        self._known(self.hosts, request.host, "host", "host")
        process = (request.host, request.pid)
        found = self.vmms.get(process, not_found("process", str(request.pid), field="pid"))
        if isinstance(found, DroverError):
            raise found
        if process in self.adopted.values():
            raise DroverError(R.ALREADY_EXISTS, f"process {request.pid} is a guest already", field="pid")
        return found

    def process_ends(self, guest: types.Guest) -> None:
        """That it was adopted in, if it was."""
        if guest.uuid in self.adopted:
            self.vmms.pop(self.adopted[guest.uuid], None)

    def _adopted(self, request: pb.AdoptGuestRequest, guest: types.Guest) -> pb.AdoptGuestResponse:
        """And its first move asked for, once."""
        decisions.need_alive(record_of(guest))
        move = pb.CreateMigrationRequest(
            request_id=str(uuid.uuid5(uuid.NAMESPACE_OID, request.request_id)),
            guest=request.name,
            destination=request.destination,
        )
        try:
            migration = self._created(move)
        except DroverError as error:
            raise adoptions._stays(guest, error) from error
        return pb.AdoptGuestResponse(guest=guest, migration=migration)

    async def ReleaseGuest(self, request: pb.ReleaseGuestRequest, context: object) -> types.Guest:
        await self._called("ReleaseGuest", request)
        guest = self._guest(request.name)
        if guest.uuid in self.released:
            return guest
        if guest.uuid not in self.adopted:
            raise DroverError(R.NOT_ADOPTABLE, f"guest {guest.name} was started by Drover")
        moving = self.migrations.get(guest.migration)
        if moving is not None and not over(moving):
            self._cancelled(moving)
            guest.ownership, guest.migration = types.OWNERSHIP_PHASE_IDLE, ""
        if guest.ownership != types.OWNERSHIP_PHASE_IDLE:
            raise DroverError(R.GUEST_NOT_RUNNING, f"guest {guest.name} is {wire.word(guest, 'ownership')}")
        if guest.host != self.adopted[guest.uuid][0]:
            raise DroverError(R.NOT_ADOPTABLE, f"guest {guest.name} has moved: its process is Drover's own")
        del self.adopted[guest.uuid]
        self.released.add(guest.uuid)
        return self._ended(guest)

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

    async def StopAndKeepGuest(self, request: pb.StopAndKeepGuestRequest, context: object) -> types.Guest:
        await self._called("StopAndKeepGuest", request)
        guest = self._guest(request.name)
        if guest.ownership == types.OWNERSHIP_PHASE_GONE:
            raise DroverError(R.GUEST_NOT_RUNNING, f"guest {guest.name} has ended for good")
        if guest.ownership != types.OWNERSHIP_PHASE_STOPPED:
            if guest.ownership != types.OWNERSHIP_PHASE_CRASHED:
                self._carry(guest, -1)
            guest.ownership, guest.run_state = types.OWNERSHIP_PHASE_STOPPED, types.RUN_STATE_ENDED
            guest.want_run, guest.message = False, f"stopped, and kept on {guest.host}"
            self.process_ends(guest)
        return guest

    async def StartGuestAgain(self, request: pb.StartGuestAgainRequest, context: object) -> types.Guest:
        await self._called("StartGuestAgain", request)
        guest = self._guest(request.name)
        if guest.ownership == types.OWNERSHIP_PHASE_GONE:
            raise DroverError(R.GUEST_NOT_RUNNING, f"guest {guest.name} has ended for good")
        if guest.run_state == types.RUN_STATE_ENDED:
            if guest.ownership == types.OWNERSHIP_PHASE_IDLE:
                self._carry(guest, -1)
            self._place(wire.guest_spec_from_proto(guest.spec), "", guest.host, "")
            guest.ownership, guest.run_state = types.OWNERSHIP_PHASE_IDLE, types.RUN_STATE_RUNNING
            guest.want_run, guest.message = True, ""
            self._carry(guest, 1)
        return guest

    async def EditGuest(self, request: pb.EditGuestRequest, context: object) -> types.Guest:
        await self._called("EditGuest", request)
        spec = guests.checked_edit(request)
        guest = self._guest(request.name)
        if request.etag and request.etag != self._etag(guest):
            raise DroverError(R.EDIT_STALE, f"guest {guest.name} was edited meanwhile", field="etag")
        guests.must_be_editable(record_of(guest), wire.guest_spec_from_proto(guest.spec), spec)
        edited = types.Guest()
        edited.CopyFrom(guest)
        edited.spec.CopyFrom(wire.guest_spec_to_proto(spec))
        if not request.validate_only and edited.spec != guest.spec:
            self.edits[guest.uuid] = self.edits.get(guest.uuid, 0) + 1
            guest.spec.CopyFrom(edited.spec)
            edited = guest
        edited.etag = guest.etag = self._etag(guest)
        return edited

    def _etag(self, guest: types.Guest) -> str:
        return f"{guest.uuid}.{self.edits.get(guest.uuid, 0)}"

    async def AttachConsole(
        self, request_iterator: AsyncIterator[pb.AttachConsoleRequest], context: object
    ) -> AsyncIterator[pb.AttachConsoleResponse]:
        first = await anext(request_iterator)
        await self._called("AttachConsole", first)
        if not first.guest:
            raise invalid([("guest", "is missing")])
        guest = self._guest(first.guest, "guest")
        over = (types.OWNERSHIP_PHASE_STOPPED, types.OWNERSHIP_PHASE_CRASHED, types.OWNERSHIP_PHASE_GONE)
        if guest.ownership in over:
            raise DroverError(R.GUEST_NOT_RUNNING, f"guest {guest.name} does not run")
        said: asyncio.Queue[bytes] = asyncio.Queue()
        self.listening.setdefault(guest.name, []).append(said)
        self.typed.setdefault(guest.name, bytearray()).extend(first.data)

        async def type_on() -> None:
            async for each in request_iterator:
                self.typed[guest.name] += each.data

        typing = asyncio.create_task(type_on())
        try:
            host = ""
            while guest.ownership not in over and not typing.done():
                if guest.host != host:
                    host = guest.host
                    yield pb.AttachConsoleResponse(host=host)
                if said.empty():
                    await asyncio.sleep(LOOK_S)
                else:
                    yield pb.AttachConsoleResponse(data=said.get_nowait())
            if not typing.done():
                yield pb.AttachConsoleResponse(message=f"guest {guest.name} has ended")
        finally:
            typing.cancel()
            self.listening[guest.name].remove(said)

    async def WatchGuests(
        self, request: pb.WatchGuestsRequest, context: object
    ) -> AsyncIterator[pb.WatchGuestsResponse]:
        await self._called("WatchGuests", request)
        uuids = [self._guest(name, "names").uuid for name in request.names]
        async for guest in follow(self._lives, uuids, lambda guest: guest.ownership == types.OWNERSHIP_PHASE_GONE):
            yield pb.WatchGuestsResponse(guest=guest)

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

    # --- migrations

    async def CreateMigration(self, request: pb.CreateMigrationRequest, context: object) -> types.Migration:
        await self._called("CreateMigration", request)
        return self._created(request)

    def _created(self, request: pb.CreateMigrationRequest) -> types.Migration:
        migrations.check(request)
        if earlier := self._earlier("CreateMigration", request):
            return self.migrations[earlier]
        guest = self._guest(request.guest, "guest")
        decisions.need_movable(record_of(guest))
        for other in self.migrations.values():
            if other.guest_uuid == guest.uuid and not over(other):
                said = f"guest {guest.name} is in migration {other.name} already"
                raise DroverError(R.GUEST_IS_MIGRATING, said, details={"migration": other.name})
        spec = wire.guest_spec_from_proto(guest.spec)
        best = ""
        if request.destination or request.validate_only:
            best = self._place(spec, guest.host, request.destination, "destination")
        if bad := migrations.policy_violations(request.policy, [spec.policy]):
            raise invalid(bad)
        migration = types.Migration(
            guest=guest.name,
            guest_uuid=guest.uuid,
            source=guest.host,
            destination=best,
            policy=wire.policy_to_proto(wire.policy_from_proto(request.policy, spec.policy)),
        )
        if not request.validate_only:
            migration.name = name_of("5", len(self.migrations))
            migration.phase = types.MIGRATION_PHASE_PENDING
            migration.create_time.GetCurrentTime()
            self.migrations[migration.name] = migration
            self._remember("CreateMigration", request, f"migrations/{migration.name}")
        return migration

    async def GetMigration(self, request: pb.GetMigrationRequest, context: object) -> types.Migration:
        await self._called("GetMigration", request)
        return self._known(self.migrations, request.name, "migration")

    async def ListMigrations(self, request: pb.ListMigrationsRequest, context: object) -> pb.ListMigrationsResponse:
        await self._called("ListMigrations", request)
        of = self._guest(request.guest, "guest").uuid if request.guest else ""
        found = [
            _without_time_lines(each)
            for each in self.migrations.values()
            if of in ("", each.guest_uuid) and not (request.active_only and over(each))
        ]
        page = lists.page(_MIGRATIONS, found, request)
        return pb.ListMigrationsResponse(
            migrations=page.rows, unreadable=self.unreadable, next_page_token=page.next_page_token
        )

    async def CancelMigration(self, request: pb.CancelMigrationRequest, context: object) -> types.Migration:
        await self._called("CancelMigration", request)
        return self._cancelled(self._known(self.migrations, request.name, "migration"))

    @staticmethod
    def _cancelled(migration: types.Migration) -> types.Migration:
        if migration.phase == types.MIGRATION_PHASE_FAILED:
            raise DroverError(R.ALREADY_ENDED, f"migration {migration.name} has failed: {migration.failure}")
        if migration.phase in _COMMITTED:
            said = f"migration {migration.name} has committed"
            raise DroverError(R.ALREADY_COMMITTED, said, details={"destination": migration.destination})
        if not over(migration):
            migration.phase, migration.failure = types.MIGRATION_PHASE_CANCELLED, "CANCELLED"
            migration.cancel_requested = True
            migration.end_time.GetCurrentTime()
        return migration

    async def WatchMigrations(
        self, request: pb.WatchMigrationsRequest, context: object
    ) -> AsyncIterator[pb.WatchMigrationsResponse]:
        await self._called("WatchMigrations", request)
        async for migration in self._watch(self.migrations, request.names):
            yield pb.WatchMigrationsResponse(migration=_without_time_lines(migration))

    async def _watch(self, resources: dict[str, M], names: Sequence[str]) -> AsyncIterator[M]:
        for name in names:
            self._known(resources, name, "resource", "names")
        if not self.frames:
            async for each in follow(lambda: resources, names, over):
                yield each
            return
        for frame in self.frames.pop(0) if len(self.frames) > 1 else self.frames[0]:
            if isinstance(frame, float):
                await asyncio.sleep(frame)
            elif isinstance(frame, DroverError):
                raise frame
            else:
                told: Any = frame
                resources[told.name] = told
                yield told

    # --- evacuations

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

    async def AttachToGuest(self, request: pb.AttachToGuestRequest, context: object) -> types.Guest:
        await self._called("AttachToGuest", request)
        return self._changed(request.guest, wire_hardware.attachment_from_proto(request))

    async def DetachFromGuest(self, request: pb.DetachFromGuestRequest, context: object) -> types.Guest:
        await self._called("DetachFromGuest", request)
        return self._changed(request.guest, wire_hardware.detachment_from_proto(request))

    def _changed(self, name: str, change: changes.MachineChange) -> types.Guest:
        guest = self._guest(name, "guest")
        decisions.need_movable(record_of(guest))
        spec = changes.changed(wire.guest_spec_from_proto(guest.spec), change)
        guest.spec.CopyFrom(wire.guest_spec_to_proto(spec))
        return guest

    # --- devices

    async def InstructDevice(self, request: pb.InstructDeviceRequest, context: object) -> pb.InstructDeviceResponse:
        await self._called("InstructDevice", request)
        if not self.instructions:
            raise DroverError(R.INSTRUCTIONS_DISABLED, "this cluster lets nobody instruct devices")
        guests.check_instruction(request)
        guests.need_device(wire.guest_spec_from_proto(self._guest(request.guest, "guest").spec), request.device)
        return pb.InstructDeviceResponse(answer=f"{request.device} was told: {request.instruction}")


_COMMITTED = (types.MIGRATION_PHASE_COMMITTED, types.MIGRATION_PHASE_FINALIZING, types.MIGRATION_PHASE_SUCCEEDED)


def over(resource: Message) -> bool:
    return wire.word(resource, "phase") in ("SUCCEEDED", "FAILED", "CANCELLED")


def created_at_s(time: types.Migration | types.Evacuation) -> float:
    return time.create_time.ToNanoseconds() / 1e9


_HOSTS = Listing[types.Host](
    {
        "name": Field(Kind.TEXT, lambda row: row.name),
        "cordoned": Field(Kind.BOOL, lambda row: row.cordoned),
        "memory_mib": Field(Kind.NUMBER, lambda row: row.memory_mib),
    },
    key="name",
    order_by="name",
)
_GUESTS = Listing[types.Guest](
    {
        "name": Field(Kind.TEXT, lambda row: row.name),
        "uuid": Field(Kind.TEXT, lambda row: row.uuid),
        "host": Field(Kind.TEXT, lambda row: row.host),
        "run_state": Field(Kind.TEXT, lambda row: wire.word(row, "run_state")),
        "memory_mib": Field(Kind.NUMBER, lambda row: row.spec.memory_mib),
        "labels": Field(Kind.MAP, lambda row: row.spec.labels),
    },
    key="uuid",
    order_by="name",
)
_MIGRATIONS = Listing[types.Migration](
    {
        "name": Field(Kind.TEXT, lambda row: row.name),
        "guest": Field(Kind.TEXT, lambda row: row.guest),
        "phase": Field(Kind.TEXT, lambda row: wire.word(row, "phase")),
        "active": Field(Kind.BOOL, lambda row: not over(row)),
        "order": Field(Kind.NUMBER, created_at_s),
    },
    key="name",
    order_by="order desc",
)
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


def name_of(digit: str, number: int) -> str:
    """Of the first, second, ... resource of a kind."""
    return f"{int(digit * 32, 16) + number:032x}"


def record_of(guest: types.Guest) -> GuestRecord:
    """As much of the guest's record as it shows."""
    stopped = guest.ownership == types.OWNERSHIP_PHASE_STOPPED
    phase = Ownership.CRASHED if stopped else Ownership(wire.word(guest, "ownership"))
    return GuestRecord(guest.name, phase, HostRef(guest.host, ""), guest.migration, stopped=stopped)


def _without_etag(guest: types.Guest) -> types.Guest:
    listed = deepcopy(guest)
    listed.etag = ""
    return listed


def _without_time_lines(migration: types.Migration) -> types.Migration:
    short = deepcopy(migration)
    for attempt in short.attempts:
        attempt.ClearField("timeline")
    return short


async def follow(
    look: Callable[[], dict[str, M]], names: Sequence[str], over: Callable[[M], bool]
) -> AsyncIterator[M]:
    """Each as it is and again when it changed; with `names` until each of these is over."""
    told: dict[str, M] = {}
    while True:
        now = {name: deepcopy(each) for name, each in dict(look()).items() if not names or name in names}
        for name, each in now.items():
            if told.get(name) != each and (names or name in told or not over(each)):
                told[name] = each
                yield each
        if names and all(over(each) for each in now.values()):
            return
        await asyncio.sleep(LOOK_S)


@contextlib.contextmanager
def serve(service: FakeOrchestrator, address: str) -> Iterator[str]:
    """The service behind a server at `address` (`unix:PATH` or `127.0.0.1:0`) while the context lasts."""
    loop = service.loop = asyncio.new_event_loop()
    worker = threading.Thread(target=loop.run_forever, name="fake-api", daemon=True)
    worker.start()

    async def start() -> tuple[aio.Server, str]:
        server = aio_server(
            [Errors(require_deadline=True, check=limits.check, slow_reader_s=30.0)], max_request_bytes=MAX_REQUEST_BYTES
        )
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
