"""AgentService in the words of the core: a deadline on every call, DroverError on every failure."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from grpc import aio

from orchestrator import wire, wire_agent, wire_hardware
from orchestrator.core.agent import (
    AgentSample,
    AgentStatus,
    AttemptSeen,
    ConductOrder,
    DisplayAddress,
    GuestStatus,
    PrepareOrder,
    VmmExamined,
    WishApplied,
)
from orchestrator.core.changes import MachineChange
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.ids import AttemptRef
from orchestrator.core.migration import Prepared
from orchestrator.core.offers import Obstacle
from orchestrator.core.records import GuestSpec
from orchestrator.core.restore import HostHeld
from orchestrator.pki.names import BadName, of_host
from orchestrator.rpc.channels import aio_channel, tls_channel
from orchestrator.rpc.credentials import Credentials
from orchestrator.rpc.errors import from_rpc_error
from orchestrator.tasks import Tasks
from protos.drover.v1 import agent_pb2 as pb
from protos.drover.v1 import types_pb2
from protos.drover.v1.agent_pb2_grpc import AgentServiceStub

if TYPE_CHECKING:  # stands in the type stubs only
    from protos.drover.v1.agent_pb2_grpc import AgentServiceAsyncStub

CALL_S = 3.0
START_GUEST_S = 30.0
END_GUEST_S = 15.0
CHANGE_MACHINE_S = 30.0
EXAMINE_S = 30.0
PREPARE_MARGIN_S = 1.0
CONSOLE_S = 24 * 3600.0
WATCH_S = 600.0
"""A watch is renewed that often, so that neither side can keep one that the other has forgotten."""

T = TypeVar("T")


class AgentClient:
    """One agent; passes for `orchestrator.coordinator.ports.AgentPort`. Connects with the first call, inside a loop.

    Every call raises DroverError: the agent's own refusal, AGENT_UNREACHABLE when it could not be reached,
    OUTCOME_UNKNOWN when it did not answer in time. After the latter two nothing is known of the call's effect; all
    calls are idempotent and may be repeated. `timeout_s` shortens or lengthens a call's own bound.
    """

    def __init__(self, address: str, credentials: Credentials | None = None, host: str = "") -> None:
        """With credentials by mutual TLS, and only to the agent of that host."""
        self.address = address
        self._credentials, self._host = credentials, host
        self._channel: aio.Channel | None = None
        self._made: AgentServiceAsyncStub | None = None
        self._shown: Hashable = None
        self._left = Tasks("connections with certificates from before")

    @property
    def _stub(self) -> AgentServiceAsyncStub:
        shown = self._credentials.version() if self._credentials is not None else None
        if self._made is not None and shown != self._shown and self._channel is not None:
            # The new connection is for new calls; those under way go on over the old one.
            self._left.spawn(self._channel.close(CONSOLE_S), "close")
            self._made = None
        if self._made is None:
            self._channel, self._shown = self._connected(), shown
            self._made = AgentServiceStub(self._channel)
        return self._made

    def _connected(self) -> aio.Channel:
        if self._credentials is None:
            return aio_channel(self.address)
        try:
            server = of_host(self._credentials.identity.cluster, self._host)
        except BadName as error:
            said = f"nobody says which host the agent at {self.address} is of"
            raise DroverError(RefusalReason.AGENT_UNREACHABLE, said) from error
        return tls_channel(self.address, self._credentials, server)

    async def close(self) -> None:
        """Calls under way end as cancelled."""
        channel, self._channel, self._made = self._channel, None, None
        await self._left.close()
        if channel is not None:
            await channel.close()

    async def _call(self, call: Callable[..., Awaitable[T]], request: Any, timeout_s: float) -> T:
        try:
            return await call(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._failed(error) from error

    def _failed(self, error: grpc.RpcError) -> Exception:
        return from_rpc_error(error, peer=f"the agent at {self.address}")

    async def get_agent(self, timeout_s: float = CALL_S) -> AgentStatus:
        """Everything the agent has now."""
        return wire_agent.agent_status_from_proto(
            await self._call(self._stub.GetAgent, pb.GetAgentRequest(), timeout_s)
        )

    async def list_copies(self, timeout_s: float = CALL_S) -> HostHeld:
        """Every process of a guest on the agent's host, as its VMM says now."""
        return wire_agent.held_from_proto(await self._call(self._stub.ListCopies, pb.ListCopiesRequest(), timeout_s))

    async def rejoin_ledger(self, incarnation: str, timeout_s: float = CALL_S) -> None:
        """Let the agent believe the ledger of that incarnation, whatever it has known before."""
        await self._call(self._stub.RejoinLedger, pb.RejoinLedgerRequest(incarnation=incarnation), timeout_s)

    async def start_guest(self, guest: str, timeout_s: float = START_GUEST_S) -> GuestStatus:
        """Execute a guest whose record is STARTING there. Once the agent refuses, the record is GONE."""
        answer = await self._call(self._stub.StartGuest, pb.StartGuestRequest(guest_uuid=guest), timeout_s)
        return wire_agent.guest_status_from_proto(answer.guest)

    async def restore_record(self, guest: str, timeout_s: float = CALL_S) -> GuestStatus:
        """Write the record of a guest that the ledger has lost again, from what runs on the agent's host."""
        request = pb.RestoreRecordRequest(guest_uuid=guest)
        response = await self._call(self._stub.RestoreRecord, request, timeout_s)
        return wire_agent.guest_status_from_proto(response.guest)

    async def end_guest(self, guest: str, timeout_s: float = END_GUEST_S) -> None:
        """Kill the VMM of an idle guest and record its end."""
        await self._call(self._stub.EndGuest, pb.EndGuestRequest(guest_uuid=guest), timeout_s)

    async def keep_guest(self, guest: str, *, only_ended: bool = False, timeout_s: float = END_GUEST_S) -> None:
        """End its VMM, and record that nothing of it is left there and that it is kept. `only_ended`: BUSY if it
        runs."""
        await self._call(self._stub.KeepGuest, pb.KeepGuestRequest(guest_uuid=guest, only_ended=only_ended), timeout_s)

    async def apply_want_run(self, guest: str, sequence: int, timeout_s: float = CALL_S) -> WishApplied:
        """The wish in the ledger has this sequence number by now: read it, apply it if the hand-over allows."""
        request = pb.ApplyWantRunRequest(guest_uuid=guest, sequence=sequence)
        return wire_agent.wish_applied_from_proto(await self._call(self._stub.ApplyWantRun, request, timeout_s))

    async def prepare_destination(
        self,
        attempt: AttemptRef,
        *,
        epoch: int,
        source_peer: Endpoint,
        timeout_ms: int,
        multifd_channels: int,
        shard: int = 0,
    ) -> Prepared:
        """A paused VMM that waits for the stream of this attempt. The same attempt gets the same answer."""
        order = PrepareOrder(attempt, epoch, source_peer, timeout_ms, multifd_channels, shard)
        timeout_s = timeout_ms / 1000 + PREPARE_MARGIN_S
        request = wire_agent.prepare_order_to_proto(order)
        return wire_agent.prepared_from_proto(await self._call(self._stub.PrepareDestination, request, timeout_s))

    async def conduct_attempt(self, order: ConductOrder) -> None:
        """Returns when the source has accepted: the transfer is its own from then on."""
        await self._call(self._stub.ConductAttempt, wire_agent.conduct_order_to_proto(order), CALL_S)

    async def get_attempt(self, migration: str, attempt: int) -> AttemptSeen:
        """What the agent knows of an attempt: under way, its report, or nothing."""
        request = pb.GetAttemptRequest(migration=migration, attempt=attempt)
        return wire_agent.attempt_seen_from_proto(await self._call(self._stub.GetAttempt, request, CALL_S))

    async def nudge(self, guest: str, timeout_s: float = CALL_S) -> None:
        """The guest's records changed: look now instead of at the next watch."""
        await self._call(self._stub.Nudge, pb.NudgeRequest(guest_uuid=guest), timeout_s)

    async def watch_agent(self, timeout_s: float = WATCH_S) -> AsyncIterator[AgentSample]:
        """Everything the agent has, then changes and samples as they come, until `timeout_s` is over.

        Ends normally at that bound: call again. Raises DroverError when the agent goes away earlier.
        """
        stream = self._stub.WatchAgent(pb.WatchAgentRequest(), timeout=timeout_s)
        try:
            async for message in stream:
                yield wire_agent.agent_sample_from_proto(message)
        except aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise self._failed(error) from error
        finally:
            with contextlib.suppress(Exception):
                stream.cancel()

    async def check_guests(self, guests: Sequence[str], timeout_s: float = CALL_S) -> dict[str, tuple[Obstacle, ...]]:
        """What stands against moving them, by uuid, as far as only their host knows; those that are not there are left
        out."""
        answer = await self._call(self._stub.CheckGuests, pb.CheckGuestsRequest(guest_uuids=guests), timeout_s)
        return {each.guest_uuid: tuple(map(wire.obstacle_from_proto, each.obstacles)) for each in answer.guests}

    async def hold_console(
        self, guest: str, inc: str, typed: AsyncIterator[bytes], timeout_s: float = CONSOLE_S
    ) -> AsyncGenerator[tuple[bytes, int]]:
        """The console of one copy (`inc` empty: of the guest's own): data, and how much was lost before it. The first
        one is empty: from there on everything is heard. Ends when the VMM has ended, or `typed` has; raises DroverError
        when the agent goes away, or has no such copy."""

        async def requests() -> AsyncIterator[pb.HoldConsoleRequest]:
            yield pb.HoldConsoleRequest(guest_uuid=guest, inc=inc)
            async for data in typed:
                yield pb.HoldConsoleRequest(data=data)

        stream = self._stub.HoldConsole(requests(), timeout=timeout_s)
        try:
            async for answer in stream:
                yield answer.data, answer.lost_bytes
        except grpc.RpcError as error:
            raise self._failed(error) from error
        finally:
            with contextlib.suppress(Exception):
                stream.cancel()

    async def list_pool_images(
        self, pool: str, after: str, page_size: int, timeout_s: float = CALL_S
    ) -> tuple[list[types_pb2.Image], bool]:
        """Images of a pool after that name, and whether there are more."""
        request = pb.ListPoolImagesRequest(pool=pool, after=after, page_size=page_size)
        answer = await self._call(self._stub.ListPoolImages, request, timeout_s)
        return list(answer.images), answer.more

    async def receive_image(self, parts: AsyncIterator[pb.ReceiveImageRequest], timeout_s: float) -> types_pb2.Image:
        """Bring an image in; it is there and durable when this returns. Nothing more is taken from `parts` once the
        agent has refused it."""
        stopped = asyncio.Event()

        async def until_stopped() -> AsyncIterator[pb.ReceiveImageRequest]:
            async for part in parts:
                if stopped.is_set():
                    return
                yield part

        stream = self._stub.ReceiveImage(until_stopped(), timeout=timeout_s)
        try:
            async for answer in stream:
                if not answer.stop:
                    return answer.image
                stopped.set()
        except grpc.RpcError as error:
            raise self._failed(error) from error
        finally:
            with contextlib.suppress(Exception):
                stream.cancel()
        raise DroverError(RefusalReason.OUTCOME_UNKNOWN, f"the agent at {self.address} did not say what came of it")

    async def examine_vmm(
        self, name: str, pid: int, qmp: str, wished: GuestSpec | None, timeout_s: float = EXAMINE_S
    ) -> VmmExamined:
        """Which guest a VMM is that somebody else started there, and what stands against taking it over."""
        request = pb.ExamineVmmRequest(name=name, pid=pid, qmp=qmp)
        if wished is not None:
            request.wished.CopyFrom(wire.guest_spec_to_proto(wished))
        answer = await self._call(self._stub.ExamineVmm, request, timeout_s)
        return VmmExamined(
            wire.guest_spec_from_proto(answer.spec),
            answer.start_time,
            answer.running,
            tuple(map(wire.obstacle_from_proto, answer.obstacles)),
        )

    async def release_vmm(self, guest: str, timeout_s: float = CALL_S) -> None:
        """Give the process of a guest that was adopted, and has not moved, back to whoever started it."""
        await self._call(self._stub.ReleaseVmm, pb.ReleaseVmmRequest(guest_uuid=guest), timeout_s)

    async def pass_instruction(self, guest: str, device: str, instruction: str, timeout_s: float = CALL_S) -> str:
        """Tell a device of a guest something in its own program's words; what the program says to it."""
        request = pb.PassInstructionRequest(guest_uuid=guest, device=device, instruction=instruction)
        return (await self._call(self._stub.PassInstruction, request, timeout_s)).answer

    async def open_display(self, guest: str, timeout_s: float = CALL_S) -> DisplayAddress:
        """Where the screen of a guest that runs there is served, and what lets a viewer in."""
        answer = await self._call(self._stub.OpenVmmDisplay, pb.OpenVmmDisplayRequest(guest_uuid=guest), timeout_s)
        return wire_agent.display_from_proto(answer.display)

    async def change_machine(
        self, guest: str, change: MachineChange, reservations: int = 0, timeout_s: float = CHANGE_MACHINE_S
    ) -> GuestSpec:
        """Add to a guest's machine, or take from it; what the guest is afterwards. See `MachineChange`."""
        request = wire_hardware.machine_change_to_proto(guest, change, reservations)
        return wire.guest_spec_from_proto((await self._call(self._stub.ChangeMachine, request, timeout_s)).spec)


class AgentClients:
    """All agents by address: one channel each, kept."""

    def __init__(self, credentials: Credentials | None = None) -> None:
        self._credentials = credentials
        self._clients: dict[tuple[str, str], AgentClient] = {}

    def at(self, control_address: str, host: str = "") -> AgentClient:
        """The agent that serves there; connects when it is first called. `host`: whose certificate it must have, where
        there are certificates."""
        key = (control_address, host if self._credentials is not None else "")
        client = self._clients.get(key)
        if client is None:
            client = self._clients[key] = AgentClient(control_address, self._credentials, host)
        return client

    async def close(self) -> None:
        """End every channel; calls under way end as cancelled."""
        clients, self._clients = list(self._clients.values()), {}
        await asyncio.gather(*(client.close() for client in clients), return_exceptions=True)
