"""An agent behind a real gRPC server that works on a ledger in memory: births, deaths, wishes, samples on command.

It keeps the contract of AgentService as far as the API can see it (tests/contract/test_agent_service.py): a guest that
it refuses to start is GONE and its name is free; it ends idle and crashed guests only; a watch begins with everything
and then tells what changes and what is said; it takes over the `vmms` that it knows, and gives them back. Calls of the
coordinator are only noted.
"""

# Handlers are named as the .proto names the calls.
# ruff: noqa: N802

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator import wire, wire_agent, wire_hardware, wire_words
from orchestrator.core import handover
from orchestrator.core.agent import (
    AgentSample,
    AgentStatus,
    CopyStatus,
    GuestStatus,
    GuestTrouble,
    RunState,
    VmmExamined,
)
from orchestrator.core.changes import changed
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.images import HEADER_BYTES, content_error, header_of
from orchestrator.core.migration import Prepared
from orchestrator.core.offers import Obstacle
from orchestrator.core.records import GuestSpec, HostRecord, Incarnation, WantRun
from orchestrator.core.restore import Held, HeldGuestCopy, HostHeld
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import op_create
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Delete, Done, Op, SetData, Store
from orchestrator.rpc.channels import aio_server, listen
from orchestrator.rpc.errors import Errors
from protos.drover.v1 import agent_pb2 as pb
from protos.drover.v1 import types_pb2
from protos.drover.v1.agent_pb2_grpc import AgentServiceServicer, add_AgentServiceServicer_to_server


@dataclass
class FakeConsole:
    """Of one copy: what was typed there, and those who listen."""

    typed: bytearray = field(default_factory=bytearray)
    sessions: list[asyncio.Queue[bytes]] = field(default_factory=list[asyncio.Queue[bytes]])

    def say(self, data: bytes) -> None:
        for said in self.sessions:
            said.put_nowait(data)


@dataclass
class FakeAgent(AgentServiceServicer):
    """`start` it; `address` says where. `refusals` and `delays_s` are by method."""

    host: str
    store: Store
    refusals: dict[str, DroverError] = field(default_factory=dict[str, DroverError])
    delays_s: dict[str, float] = field(default_factory=dict[str, float])
    queue_wishes: bool = False
    copies: list[CopyStatus] = field(default_factory=list[CopyStatus])
    troubles: list[GuestTrouble] = field(default_factory=list[GuestTrouble])
    complete: bool = True
    incarnation: str = ""
    """Of the ledger that it believes."""
    obstacles: dict[str, tuple[Obstacle, ...]] = field(default_factory=dict[str, tuple[Obstacle, ...]])
    """What stands against moving guests, by uuid."""
    lost: dict[str, GuestSpec] = field(default_factory=dict[str, GuestSpec])
    """What it knows of guests whose records the ledger has lost, by uuid."""
    images: dict[str, dict[str, types_pb2.Image]] = field(default_factory=dict[str, dict[str, types_pb2.Image]])
    """What its pools have, by name."""
    received: dict[str, bytes] = field(default_factory=dict[str, bytes])
    """The content of images that were brought in."""
    vmms: dict[int, VmmExamined | DroverError] = field(default_factory=dict[int, VmmExamined | DroverError])
    """What an examination of a process comes to that somebody else has started, by pid."""
    adopted: dict[str, int] = field(default_factory=dict[str, int])
    """Pids of the processes that it has taken over, by guest."""
    consoles: dict[tuple[str, str], FakeConsole] = field(default_factory=dict[tuple[str, str], FakeConsole])
    """By guest and `inc`."""
    calls: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    sample: AgentSample = field(default_factory=AgentSample)
    """What a new watch begins with."""
    watches: list[asyncio.Queue[AgentSample]] = field(default_factory=list[asyncio.Queue[AgentSample]])
    address: str = ""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One birth or death at a time, as in a real agent."""

    async def start(self) -> None:
        self._server = aio_server([Errors(require_deadline=True)])
        add_AgentServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{listen(self._server, self.address or '127.0.0.1:0')}"
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    def record(self, memory_mib: int = 1024) -> HostRecord:
        return HostRecord(
            self.host, f"boot-{self.host}", self.address, "127.0.0.1:7702", memory_mib, 1000, machine_types=("pc",)
        )

    def _told(self, uuid: str) -> GuestStatus | None:
        return next((guest for guest in self.sample.guests if guest.guest == uuid), None)

    def say(self, sample: AgentSample) -> None:
        """To every watch, now and at the start of later ones."""
        guests = {each.guest: each for each in (*self.sample.guests, *sample.guests)}
        attempts = {each.ref.migration: each for each in (*self.sample.attempts, *sample.attempts)}
        self.sample = AgentSample(tuple(guests.values()), tuple(attempts.values()))
        for queue in self.watches:
            queue.put_nowait(sample)

    async def _called(self, method: str, about: str) -> None:
        self.calls.append((method, about))
        await asyncio.sleep(self.delays_s.get(method, 0))
        if method in self.refusals:
            raise self.refusals[method]

    async def _read(self, uuid: str) -> tuple[GuestRecord, int]:
        node = await self.store.read(paths.guest(uuid))
        if node is None:
            raise DroverError(RefusalReason.NOT_FOUND, f"there is no guest {uuid}")
        return decode(GuestRecord, node.data), node.version

    async def _not_started(self, uuid: str) -> None:
        record, version = await self._read(uuid)
        if not record.starts:
            await self._bury(uuid)
            return
        kept = handover.stopped(record, by=record.owner, nothing_left=True, writer=self.host)
        assert isinstance(await self.store.multi([SetData(paths.guest(uuid), encode(kept), version)]), Done)

    async def _bury(self, uuid: str, change: Callable[..., GuestRecord] = handover.gone) -> None:
        record, version = await self._read(uuid)
        name = await self.store.read(paths.name(record.name))
        ops: list[Op] = [SetData(paths.guest(uuid), encode(change(record, writer=self.host)), version)]
        if name is not None and decode(str, name.data) == uuid:
            ops.append(Delete(paths.name(record.name), name.version))
        assert isinstance(await self.store.multi(ops), Done)

    # --- AgentService -------------------------------------------------------------------------------------------------

    async def ListCopies(self, request: pb.ListCopiesRequest, context: Any) -> pb.ListCopiesResponse:
        await self._called("ListCopies", "")
        here = HostRef(self.host, f"boot-{self.host}")
        held = tuple(
            HeldGuestCopy(each.guest, each.name, Held(here, each.inc, running=each.run_state is RunState.RUNNING))
            for each in self.sample.guests
        )
        return wire_agent.held_to_proto(HostHeld(here, self.complete, self.incarnation, copies=held))

    async def RejoinLedger(self, request: pb.RejoinLedgerRequest, context: Any) -> pb.RejoinLedgerResponse:
        await self._called("RejoinLedger", request.incarnation)
        node = await self.store.read(paths.INCARNATION)
        found = decode(Incarnation, node.data).id if node is not None and node.data else "none"
        if found != request.incarnation:
            said = f"{self.host} reads incarnation {found} in the ledger, not {request.incarnation}"
            raise DroverError(RefusalReason.INVALID_ARGUMENT, said, field="incarnation")
        self.incarnation = request.incarnation
        return pb.RejoinLedgerResponse()

    async def GetAgent(self, request: pb.GetAgentRequest, context: Any) -> pb.GetAgentResponse:
        await self._called("GetAgent", "")
        return wire_agent.agent_status_to_proto(
            AgentStatus(
                HostRef(self.host, f"boot-{self.host}"),
                0,
                self.sample.guests,
                self.sample.attempts,
                copies=tuple(self.copies),
                complete=self.complete,
                troubles=tuple(self.troubles),
            )
        )

    async def StartGuest(self, request: pb.StartGuestRequest, context: Any) -> pb.StartGuestResponse:
        uuid = request.guest_uuid
        try:
            await self._called("StartGuest", uuid)
        except DroverError:
            await self._not_started(uuid)
            raise
        async with self.turn:
            record, version = await self._read(uuid)
            pid, state = 4711, RunState.RUNNING
            if record.owner.host != self.host or record.phase in (Ownership.CRASHED, Ownership.GONE):
                raise DroverError(RefusalReason.GUEST_NOT_RUNNING, f"{record.phase}, owner {record.owner.host}")
            if record.phase is Ownership.STARTING:
                pid, state = await self._process(uuid)
                started = SetData(paths.guest(uuid), encode(handover.started(record, writer=self.host)), version)
                assert isinstance(await self.store.multi([started]), Done)
        status = self._told(uuid)
        if status is None:
            status = GuestStatus(uuid, record.name, "inc", state, pid)
            self.say(AgentSample(guests=(status,)))
        elif status.run_state is RunState.STARTING:
            status = replace(status, inc="inc", run_state=RunState.RUNNING)  # the sample that says so comes later
        return pb.StartGuestResponse(guest=wire_agent.guest_status_to_proto(status))

    async def _process(self, uuid: str) -> tuple[int, RunState]:
        """That it is born in. Of a guest that is adopted: the one that its specification names, or no other."""
        node = await self.store.read(paths.guest_spec(uuid))
        taken = decode(GuestSpec, node.data).adopted if node is not None else None
        if taken is None:
            return 4711, RunState.RUNNING
        found = self.vmms.get(taken.pid)
        if not isinstance(found, VmmExamined) or found.start_time != taken.start_time:
            await self._bury(uuid)
            raise DroverError(RefusalReason.NOT_FOUND, f"process {taken.pid} is another one", field="pid")
        self.adopted[uuid] = taken.pid
        return taken.pid, RunState.RUNNING if found.running else RunState.PAUSED

    def _process_ends(self, uuid: str) -> None:
        self.vmms.pop(self.adopted.pop(uuid, 0), None)

    async def ExamineVmm(self, request: pb.ExamineVmmRequest, context: Any) -> pb.ExamineVmmResponse:
        await self._called("ExamineVmm", request.name)
        pid = request.pid
        if pid in self.adopted.values():
            raise DroverError(RefusalReason.ALREADY_EXISTS, f"process {pid} is a guest already", field="pid")
        if pid < 2 or not request.qmp.startswith("/"):
            raise DroverError(RefusalReason.INVALID_ARGUMENT, "a pid, and the whole path of a socket, are needed")
        found = self.vmms.get(pid, DroverError(RefusalReason.NOT_FOUND, f"there is no process {pid}", field="pid"))
        if isinstance(found, DroverError):
            raise found
        spec = replace(found.spec, name=request.name)
        if request.HasField("wished"):
            wished = wire.guest_spec_from_proto(request.wished)
            spec = replace(spec, labels=wished.labels, policy=wished.policy, on_host_death=wished.on_host_death)
        return pb.ExamineVmmResponse(
            spec=wire.guest_spec_to_proto(spec),
            start_time=found.start_time,
            running=found.running,
            obstacles=map(wire.obstacle_to_proto, found.obstacles),
        )

    async def ReleaseVmm(self, request: pb.ReleaseVmmRequest, context: Any) -> pb.ReleaseVmmResponse:
        uuid = request.guest_uuid
        await self._called("ReleaseVmm", uuid)
        async with self.turn:
            record, _ = await self._read(uuid)
            if record.released:
                return pb.ReleaseVmmResponse()
            if record.phase in (Ownership.GONE, Ownership.CRASHED):
                raise DroverError(RefusalReason.GUEST_NOT_RUNNING, f"guest {record.name} is {record.phase}")
            if record.owner.host != self.host or record.phase is not Ownership.IDLE:
                raise DroverError(RefusalReason.GUEST_IS_MIGRATING, f"{record.phase}, owner {record.owner.host}")
            if uuid not in self.adopted:
                raise DroverError(RefusalReason.NOT_ADOPTABLE, f"guest {record.name} is in no process of others")
            await self._bury(uuid, handover.released)
            del self.adopted[uuid]
            self.sample = replace(self.sample, guests=tuple(g for g in self.sample.guests if g.guest != uuid))
        return pb.ReleaseVmmResponse()

    async def OpenVmmDisplay(self, request: pb.OpenVmmDisplayRequest, context: Any) -> pb.OpenVmmDisplayResponse:
        uuid = request.guest_uuid
        await self._called("OpenVmmDisplay", uuid)
        record, _ = await self._read(uuid)
        if record.owner.host != self.host or record.phase in (Ownership.GONE, Ownership.CRASHED):
            raise DroverError(RefusalReason.GUEST_NOT_RUNNING, f"{record.phase}, owner {record.owner.host}")
        node = await self.store.read(paths.guest_spec(uuid))
        assert node is not None
        if not decode(GuestSpec, node.data).display.vnc:
            raise DroverError(RefusalReason.DISPLAY_NOT_AVAILABLE, f"guest {record.name} has no screen")
        found = types_pb2.DisplayAddress(host=self.host, socket=f"/run/{self.host}/{uuid}.vnc")
        return pb.OpenVmmDisplayResponse(display=found)

    async def ChangeMachine(self, request: pb.ChangeMachineRequest, context: Any) -> pb.ChangeMachineResponse:
        uuid = request.guest_uuid
        await self._called("ChangeMachine", uuid)
        async with self.turn:
            record, _ = await self._read(uuid)
            if uuid in self.adopted:
                raise DroverError(RefusalReason.NOT_ADOPTABLE, f"guest {record.name} has not moved since its adoption")
            if record.owner.host != self.host or record.phase in (Ownership.GONE, Ownership.CRASHED):
                raise DroverError(RefusalReason.GUEST_NOT_RUNNING, f"{record.phase}, owner {record.owner.host}")
            if record.phase is not Ownership.IDLE:
                raise DroverError(RefusalReason.GUEST_IS_MIGRATING, f"its record says {record.phase}")
            path = paths.guest_spec(uuid)
            node = await self.store.read(path)
            assert node is not None
            before = decode(GuestSpec, node.data)
            spec = changed(before, wire_hardware.machine_change_from_proto(request))
            promised = await self.store.read(paths.reservations(self.host))
            ops: list[Op] = [SetData(path, encode(spec), node.version)]
            if spec.memory_mib > before.memory_mib and promised is not None:
                if promised.version != request.reservations_version:
                    said = f"what {self.host} has promised has changed: look again"
                    raise DroverError(RefusalReason.OUTCOME_UNKNOWN, said, details={"moved": "reservations"})
                ops.append(SetData(paths.reservations(self.host), promised.data, promised.version))
            assert isinstance(await self.store.multi(ops), Done)
        return pb.ChangeMachineResponse(spec=wire.guest_spec_to_proto(spec))

    async def RestoreRecord(self, request: pb.RestoreRecordRequest, context: Any) -> pb.RestoreRecordResponse:
        """Only of guests that the test has called `lost`."""
        uuid = request.guest_uuid
        await self._called("RestoreRecord", uuid)
        async with self.turn:
            if await self.store.read(paths.guest(uuid)) is None and uuid in self.lost:
                return await self._restored(uuid, self.lost.pop(uuid))
            record, _ = await self._read(uuid)
            raise DroverError(RefusalReason.ALREADY_EXISTS, f"guest {record.name}: the ledger has its record")

    async def _restored(self, uuid: str, spec: GuestSpec) -> pb.RestoreRecordResponse:
        owner = HostRef(self.host, f"boot-{self.host}")
        await self.store.ensure(paths.shard(paths.guest(uuid)))
        ops = [
            op_create(paths.name(spec.name), uuid),
            op_create(paths.guest(uuid), handover.restored(spec.name, owner, writer=self.host)),
            op_create(paths.guest_spec(uuid), spec),
            op_create(paths.want_run(uuid), WantRun(True)),
        ]
        assert isinstance(await self.store.multi(ops), Done)
        self.troubles = [trouble for trouble in self.troubles if trouble.guest != uuid]
        status = GuestStatus(uuid, spec.name, "inc", RunState.RUNNING, 4711)
        self.say(AgentSample(guests=(status,)))
        return pb.RestoreRecordResponse(guest=wire_agent.guest_status_to_proto(status))

    async def EndGuest(self, request: pb.EndGuestRequest, context: Any) -> pb.EndGuestResponse:
        await self._called("EndGuest", request.guest_uuid)
        async with self.turn:
            record, _ = await self._read(request.guest_uuid)
            if record.phase is Ownership.GONE:
                return pb.EndGuestResponse()
            if record.owner.host != self.host or record.phase not in (Ownership.IDLE, Ownership.CRASHED):
                raise DroverError(RefusalReason.GUEST_IS_MIGRATING, f"{record.phase}, owner {record.owner.host}")
            await self._bury(request.guest_uuid)
            self._process_ends(request.guest_uuid)
            left = tuple(guest for guest in self.sample.guests if guest.guest != request.guest_uuid)
            self.sample = replace(self.sample, guests=left)
        return pb.EndGuestResponse()

    async def KeepGuest(self, request: pb.KeepGuestRequest, context: Any) -> pb.KeepGuestResponse:
        uuid = request.guest_uuid
        await self._called("KeepGuest", uuid)
        async with self.turn:
            record, version = await self._read(uuid)
            if record.stopped:
                return pb.KeepGuestResponse()
            if record.phase is Ownership.GONE:
                raise DroverError(RefusalReason.GUEST_NOT_RUNNING, f"guest {record.name} has ended")
            if record.owner.host != self.host or record.phase not in (Ownership.IDLE, Ownership.CRASHED):
                raise DroverError(RefusalReason.GUEST_IS_MIGRATING, f"{record.phase}, owner {record.owner.host}")
            known = self._told(uuid)
            runs = known is not None and known.run_state is not RunState.ENDED
            if request.only_ended and record.phase is Ownership.IDLE and runs:
                raise DroverError(RefusalReason.BUSY, f"guest {record.name} runs by now")
            here = HostRef(self.host, f"boot-{self.host}")
            if record.phase is Ownership.IDLE:
                record = handover.crashed(record, writer=self.host)
            kept = handover.stopped(record, by=here, nothing_left=True, writer=self.host)
            assert isinstance(await self.store.multi([SetData(paths.guest(uuid), encode(kept), version)]), Done)
            self._process_ends(uuid)
            self.sample = replace(self.sample, guests=tuple(g for g in self.sample.guests if g.guest != uuid))
        return pb.KeepGuestResponse()

    async def ApplyWantRun(self, request: pb.ApplyWantRunRequest, context: Any) -> pb.ApplyWantRunResponse:
        uuid = request.guest_uuid
        await self._called("ApplyWantRun", uuid)
        record, _ = await self._read(uuid)
        if record.owner.host != self.host:
            raise DroverError(RefusalReason.NOT_FOUND, f"guest {uuid} is not on {self.host}")
        node = await self.store.read(paths.want_run(uuid))
        wish = decode(WantRun, node.data) if node else WantRun()
        assert wish.sequence >= request.sequence
        now = RunState.RUNNING if wish.run != self.queue_wishes else RunState.PAUSED
        known = self._told(uuid)
        if known is not None and known.run_state is RunState.ENDED:
            return pb.ApplyWantRunResponse(run_state=wire_words.run_state_to_proto(RunState.ENDED))
        if known is not None and known.run_state is not now:
            self.say(AgentSample(guests=(replace(known, run_state=now),)))
        return pb.ApplyWantRunResponse(applied=not self.queue_wishes, run_state=wire_words.run_state_to_proto(now))

    async def PrepareDestination(
        self, request: pb.PrepareDestinationRequest, context: Any
    ) -> pb.PrepareDestinationResponse:
        order = wire_agent.prepare_order_from_proto(request)
        await self._called("PrepareDestination", order.attempt.guest)
        return wire_agent.prepared_to_proto(
            Prepared(f"inc-{order.attempt.attempt}", Endpoint("127.0.0.1", 1), Endpoint("127.0.0.1", 7702))
        )

    async def ConductAttempt(self, request: pb.ConductAttemptRequest, context: Any) -> pb.ConductAttemptResponse:
        order = wire_agent.conduct_order_from_proto(request)
        await self._called("ConductAttempt", f"{order.attempt.guest} {order.destination.host} {order.previous_reason}")
        return pb.ConductAttemptResponse()

    async def GetAttempt(self, request: pb.GetAttemptRequest, context: Any) -> pb.GetAttemptResponse:
        await self._called("GetAttempt", request.migration)
        return pb.GetAttemptResponse()

    async def Nudge(self, request: pb.NudgeRequest, context: Any) -> pb.NudgeResponse:
        await self._called("Nudge", request.guest_uuid)
        return pb.NudgeResponse()

    async def WatchAgent(self, request: pb.WatchAgentRequest, context: Any) -> AsyncIterator[pb.WatchAgentResponse]:
        await self._called("WatchAgent", "")
        queue: asyncio.Queue[AgentSample] = asyncio.Queue()
        self.watches.append(queue)
        try:
            yield wire_agent.agent_sample_to_proto(self.sample)
            while True:
                yield wire_agent.agent_sample_to_proto(await queue.get())
        finally:
            self.watches.remove(queue)

    async def CheckGuests(self, request: pb.CheckGuestsRequest, context: Any) -> pb.CheckGuestsResponse:
        await self._called("CheckGuests", " ".join(request.guest_uuids))
        found = {uuid: self.obstacles.get(uuid, ()) for uuid in request.guest_uuids}
        return pb.CheckGuestsResponse(
            guests=[
                pb.GuestChecked(guest_uuid=uuid, obstacles=map(wire.obstacle_to_proto, each))
                for uuid, each in found.items()
            ]
        )

    def _pool(self, pool: str) -> dict[str, types_pb2.Image]:
        if pool not in self.images:
            raise DroverError(RefusalReason.POOL_NOT_FOUND, f"{self.host} has no pool {pool}", field="pool")
        return self.images[pool]

    def console(self, uuid: str, inc: str = "") -> FakeConsole:
        """Of a copy; `inc` empty: of the one that is the guest here."""
        return self.consoles.setdefault((uuid, inc), FakeConsole())

    async def HoldConsole(
        self, request_iterator: AsyncIterator[pb.HoldConsoleRequest], context: Any
    ) -> AsyncIterator[pb.HoldConsoleResponse]:
        first = await anext(request_iterator)
        await self._called("HoldConsole", f"{first.guest_uuid} {first.inc}".rstrip())
        record, _ = await self._read(first.guest_uuid)
        coming = record.destination is not None and record.destination.host == self.host
        if record.owner.host != self.host and not (coming and first.inc):
            raise DroverError(RefusalReason.NOT_FOUND, f"guest {record.name} is not on {self.host}")
        console = self.console(first.guest_uuid, first.inc)
        said: asyncio.Queue[bytes] = asyncio.Queue()
        console.sessions.append(said)

        async def type_on() -> None:
            async for each in request_iterator:
                console.typed += each.data

        typing = asyncio.create_task(type_on())
        try:
            yield pb.HoldConsoleResponse(attached=True)
            while True:
                yield pb.HoldConsoleResponse(data=await said.get())
        finally:
            console.sessions.remove(said)
            typing.cancel()

    async def ListPoolImages(self, request: pb.ListPoolImagesRequest, context: Any) -> pb.ListPoolImagesResponse:
        await self._called("ListPoolImages", request.pool)
        names = sorted(name for name in self._pool(request.pool) if name > request.after)
        size = request.page_size or 1000
        return pb.ListPoolImagesResponse(
            images=[self.images[request.pool][name] for name in names[:size]], more=len(names) > size
        )

    async def ReceiveImage(
        self, request_iterator: AsyncIterator[pb.ReceiveImageRequest], context: Any
    ) -> AsyncIterator[pb.ReceiveImageResponse]:
        first = await anext(request_iterator)
        try:
            await self._called("ReceiveImage", first.name)
            image = wire_hardware.image_import_from_proto(first.name, first.pool, first.format, first.size_bytes)
            pool, data, told = self._pool(first.pool), first.data, first.sha256
            if first.name in pool:
                raise DroverError(RefusalReason.ALREADY_EXISTS, f"there is an image {first.name}", field="image.name")
            async for each in request_iterator:
                data, told = data + each.data, each.sha256
            if wrong := content_error(image, data[:HEADER_BYTES]):
                raise DroverError(RefusalReason.INVALID_ARGUMENT, wrong, field="image.format")
            if len(data) != image.size_bytes or told != hashlib.sha256(data).digest():
                raise DroverError(RefusalReason.INVALID_ARGUMENT, "not what was to come", field="data")
        except DroverError:
            yield pb.ReceiveImageResponse(stop=True)
            async for _ in request_iterator:
                pass
            raise
        self.received[first.name] = data
        header = header_of(data[:HEADER_BYTES], len(data))
        pool[first.name] = types_pb2.Image(
            name=first.name,
            pool=first.pool,
            host=self.host,
            format=wire_hardware.disk_format_to_proto(header.format),
            size_bytes=header.size_bytes,
            used_bytes=len(data),
        )
        yield pb.ReceiveImageResponse(image=pool[first.name])

    async def PassInstruction(self, request: pb.PassInstructionRequest, context: Any) -> pb.PassInstructionResponse:
        await self._called("PassInstruction", request.guest_uuid)
        return pb.PassInstructionResponse(answer=f"{request.device} was told: {request.instruction}")
