"""What the fake of the API holds, and what its parts share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeVar

from google.protobuf.message import Message

from orchestrator import wire
from orchestrator.api import decisions, hosts
from orchestrator.api.calls import digest
from orchestrator.api.reads import no_place, not_found
from orchestrator.core.agent import AgentStatus, VmmExamined
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.core.guest import name_error
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.offers import Offer
from orchestrator.core.placement import HostView, choose, need_for
from orchestrator.core.records import GuestSpec, HostFeature, Pool, PoolKind, RequestRecord
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from protos.drover.v1.orchestrator_pb2_grpc import OrchestratorServiceServicer

T = TypeVar("T")
M = TypeVar("M", bound=Message)
R = RefusalReason

LOOK_S = 0.02
"""Between two looks of a watch at what it watches."""

Frame = types.Migration | types.Evacuation | DroverError | float
"""What a watch does next: tell this, end with this error, or wait so many seconds."""


@dataclass
class State(OrchestratorServiceServicer):
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
    """Of every list."""
    obstacles: list[types.Obstacle] = field(default_factory=list[types.Obstacle])
    """Of every guest, at its own host."""
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

    def _host(self, name: str) -> types.Host:
        hosts._check_name(name)
        return self._known(self.hosts, name, "host")

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


def over(resource: Message) -> bool:
    return wire.word(resource, "phase") in ("SUCCEEDED", "FAILED", "CANCELLED")


def created_at_s(time: types.Migration | types.Evacuation) -> float:
    return time.create_time.ToNanoseconds() / 1e9


def name_of(digit: str, number: int) -> str:
    """Of the first, second, ... resource of a kind."""
    return f"{int(digit * 32, 16) + number:032x}"


def record_of(guest: types.Guest) -> GuestRecord:
    """As much of the guest's record as it shows."""
    stopped = guest.ownership == types.OWNERSHIP_PHASE_STOPPED
    phase = Ownership.CRASHED if stopped else Ownership(wire.word(guest, "ownership"))
    return GuestRecord(guest.name, phase, HostRef(guest.host, ""), guest.migration, stopped=stopped)


async def follow(look: Callable[[], dict[str, M]], names: Sequence[str], over: Callable[[M], bool]) -> AsyncIterator[M]:
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
