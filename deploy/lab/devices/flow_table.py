"""An example of an external shim: a program for a whole host that holds a flow table for each device.

    python -m deploy.lab.devices.flow_table --socket /run/flows.sock

It speaks the shim protocol (protos/drover/v1/shim.proto) and uses nothing of Drover but the generated stubs: take it as
the beginning of one for your device. `FlowTable` is the device; `FlowTables` answers the calls. A table is a number of
flows that change by themselves, as a switch's do; what is moved is every flow, and again each that changed since.

Options of a device, all of them text: flows (200), changes_per_s (50), takes_instructions (true); and for tests
asks_again_at (a hook), asks_again (so often) and refuses (`validate`). With a wrong one there is no device.
Instructions, while it is the guest's device: `add N` flows, `ask HOOK N` (demand another ACK at the hook, N times).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct
from typing import Any

from grpc import StatusCode, aio

from protos.drover.v1 import shim_pb2 as pb
from protos.drover.v1.shim_pb2_grpc import ShimServiceServicer, add_ShimServiceServicer_to_server

Context = aio.ServicerContext[Any, Any]
Key = tuple[str, str, str]
"""Guest, inc, device."""

_FLOW = Struct("!QQ")
_PIECE_FLOWS = 4096
_KEPT_CALLS = 1024
_POLL_S = 0.02


class Refused(Exception):
    """The device cannot do that in its present state."""


class Wrong(Exception):
    """What the device was told makes no sense."""


MAX_FLOWS = 1_000_000
HOOKS = ("precopy", "gate_open", "freeze", "final_query", "after_check")


def _number(said: str, what: str, most: int) -> int:
    if not said.isascii() or not said.isdecimal() or len(said) > 12 or int(said) > most:
        raise Wrong(f"{what} must be a whole number from 0 to {most}, not {said[:40]!r}")
    return int(said)


def _one_of(said: str, what: str, known: tuple[str, ...]) -> str:
    if said not in known:
        raise Wrong(f"{what} must be one of {', '.join(known)}, not {said[:40]!r}")
    return said


@dataclass(frozen=True)
class Options:
    """What the guest's specification says of a flow table."""

    flows: int = 200
    changes_per_s: int = 50
    takes_instructions: bool = True
    asks_again_at: str = ""
    asks_again: int = 0
    refuses: str = ""

    @classmethod
    def read(cls, given: Mapping[str, str]) -> Options:
        """Raises Wrong with everything that is wrong: which option, and what is allowed."""
        readers: dict[str, Callable[[str, str], Any]] = {
            "flows": lambda said, name: _number(said, name, MAX_FLOWS),
            "changes_per_s": lambda said, name: _number(said, name, MAX_FLOWS),
            "takes_instructions": lambda said, name: _one_of(said, name, ("true", "false")) == "true",
            "asks_again_at": lambda said, name: _one_of(said, name, HOOKS),
            "asks_again": lambda said, name: _number(said, name, 1000),
            "refuses": lambda said, name: _one_of(said, name, ("validate",)),
        }
        found: dict[str, Any] = {}
        wrong: list[str] = []
        for name, said in given.items():
            try:
                if name not in readers:
                    raise Wrong(f"there is no option {name!r}; there are {', '.join(readers)}")
                found[name] = readers[name](said, f"option {name}")
            except Wrong as error:
                wrong.append(str(error))
        if wrong:
            raise Wrong("; ".join(wrong))
        return cls(**found)


class FlowTable:
    """One copy of one device, with the states of VFIO migration v2."""

    def __init__(self, options: Options, *, incoming: bool) -> None:
        self.flows = {} if incoming else {number: number * 7 + 1 for number in range(options.flows)}
        self.changes_per_s = options.changes_per_s
        self.takes_instructions = options.takes_instructions
        self.asks_again_at = options.asks_again_at
        self.asks_again = 0 if incoming else options.asks_again
        self.refuses = options.refuses
        self.state = "STOP" if incoming else "RUNNING"
        self.live = not incoming
        self.ended = ""
        self.generation = 0
        """Of the newest demand for an ACK; never goes back."""
        self.session: int | None = None
        self._begun_by = ""
        self._asked: int | None = None
        self._marked = 0
        self._initial: OrderedDict[int, None] = OrderedDict()
        """Flows that belong to the newest demand and are not read yet."""
        self._dirty: OrderedDict[int, None] = OrderedDict()
        self._changed_at: float | None = None
        self._seq = 0
        self._piece = pb.ReadStateResponse()
        self._sent = blake2b(digest_size=16)
        self._sent_bytes = 0
        self._end_sent = False
        self._incoming = bytearray()
        self._received_bytes = 0
        self._received = blake2b(digest_size=16)
        self._expected: tuple[int, bytes] | None = None
        self._valid: pb.ValidateResponse | None = None

    @property
    def asked(self) -> int | None:
        """Generation of the newest demand of the present session."""
        return self._asked if self.session is not None else None

    def change(self, now: float) -> None:
        """What the traffic did to the table since the last look. A stopped device changes nothing."""
        due = int((now - (self._changed_at or now)) * self.changes_per_s)
        if due or self._changed_at is None:
            self._changed_at = now
        if self.state not in ("RUNNING", "PRE_COPY"):
            return
        for n in range(min(due, len(self.flows))):
            number = (int(now * 1000) + n * 17) % len(self.flows)
            self.flows[number] = self.flows[number] * 3 + 1 & 0xFFFFFFFFFFFFFFFF
            self._dirty[number] = None

    def _must(self, allowed: bool, why: str) -> None:
        if self.ended:
            raise Refused(f"the device was {self.ended}")
        if not allowed:
            raise Refused(f"{why} (it is in {self.state})")

    def _new_session(self, session: int | None) -> None:
        self.session, self._asked, self._marked = session, None, 0
        self._seq, self._piece = 0, pb.ReadStateResponse()
        self._sent, self._sent_bytes, self._end_sent = blake2b(digest_size=16), 0, False
        self._initial.clear()

    def _ask(self) -> None:
        """Demand an ACK for all that is to be sent at this moment: that is this generation's initial data."""
        self.generation += 1
        self._asked = self.generation
        self._initial.update(self._dirty)
        self._dirty.clear()

    def instruct(self, instruction: str) -> str:
        """Do as told and say what is so now. Raises Refused when it takes no instructions, or not now, Wrong when it
        does not understand; it is as it was then."""
        if not self.takes_instructions:
            raise Refused("it takes no instructions: its option takes_instructions is false")
        match instruction.split():
            case ["add", count]:
                more = _number(count, "the number of flows", MAX_FLOWS - len(self.flows))
                self._must(self.live and self.state in ("RUNNING", "PRE_COPY"), "flows are added while it runs")
                added = {number: number * 7 + 1 for number in range(len(self.flows), len(self.flows) + more)}
                self.flows.update(added)
                self._dirty.update(dict.fromkeys(added))
                return f"{len(self.flows)} flows"
            case ["ask", hook, count]:
                hook, times = _one_of(hook, "the hook", HOOKS), _number(count, "the number of demands", 1000)
                self._must(self.live, "it is not the guest's device")
                self.asks_again_at, self.asks_again = hook, times
                return f"asks again at {hook}, {times} times"
            case _:
                raise Wrong(f"there is no instruction {instruction[:80]!r}; there are: add N, ask HOOK N")

    # --- the source ---

    def begin(self, session: int, by: str) -> None:
        """RUNNING -> PRE_COPY: a session with all flows to be sent, and its first demand for an ACK. The same
        `session` begun again by the same caller changes nothing."""
        if (self.session, self._begun_by, self.state) == (session, by, "PRE_COPY"):
            return
        self._must(self.live and self.state in ("RUNNING", "PRE_COPY"), "roll the other session back first")
        self._new_session(session)
        self._begun_by, self.state = by, "PRE_COPY"
        self._dirty = OrderedDict.fromkeys(self.flows)
        self._ask()

    def read(self, session: int, seq: int, stopped: bool) -> pb.ReadStateResponse:
        """The piece with that number; STATE_KIND_UNSPECIFIED: nothing yet."""
        if self.ended or session != self.session:
            return pb.ReadStateResponse(kind=pb.STATE_KIND_OVER)
        if stopped and self.state != "STOP_COPY":
            raise Refused(f"the device is in {self.state}, not in STOP_COPY")
        if seq == self._seq:
            return self._piece
        if seq != self._seq + 1:
            raise Refused(f"piece {seq} was asked for after {self._seq}")
        piece = self._next()
        if piece.kind not in (pb.STATE_KIND_UNSPECIFIED, pb.STATE_KIND_OVER):
            self._seq, self._piece = seq, piece
        return piece

    def _next(self) -> pb.ReadStateResponse:
        if self.state not in ("PRE_COPY", "STOP_COPY"):
            return pb.ReadStateResponse(kind=pb.STATE_KIND_OVER)
        if self.state == "PRE_COPY" and not self._initial and self._asked is not None and self._marked != self._asked:
            self._marked = self._asked
            return pb.ReadStateResponse(kind=pb.STATE_KIND_INITIAL_SENT, generation=self._marked)
        if data := self._take():
            kind = pb.STATE_KIND_PRECOPY if self.state == "PRE_COPY" else pb.STATE_KIND_STOP_COPY
            return pb.ReadStateResponse(kind=kind, generation=self._asked or 0, data=data)
        if self.state == "PRE_COPY":
            return pb.ReadStateResponse()
        if self._end_sent:
            return pb.ReadStateResponse(kind=pb.STATE_KIND_OVER)
        self._end_sent = True
        return pb.ReadStateResponse(kind=pb.STATE_KIND_END, total_bytes=self._sent_bytes, digest=self._sent.digest())

    def _take(self) -> bytes:
        queue = self._initial or self._dirty
        numbers = [queue.popitem(last=False)[0] for _ in range(min(len(queue), _PIECE_FLOWS))]
        data = b"".join(_FLOW.pack(number, self.flows[number]) for number in numbers)
        self._sent.update(data)
        self._sent_bytes += len(data)
        return data

    def hook(self, name: str) -> None:
        """The attempt has reached that point: demand another ACK if the options say so."""
        if not self.ended and self.session is not None and name == self.asks_again_at and self.asks_again > 0:
            self.asks_again -= 1
            self._ask()

    def quiesce(self, session: int | None) -> int:
        """Bytes that stop-copy will carry."""
        if session is None and self.session is None:
            self._must(self.live, "it is not the guest's device")
        else:
            self._must(session == self.session, f"session {session} is over or never began")
        self.state = {"PRE_COPY": "PRE_COPY_P2P", "RUNNING": "RUNNING_P2P"}.get(self.state, self.state)
        left = len(self.flows) if self.state == "RUNNING_P2P" else len(self._initial) + len(self._dirty)
        return left * _FLOW.size

    def stop_copy(self, session: int) -> None:
        """-> STOP_COPY: nothing changes any more. A paused guest's device begins its session here. Raises Refused."""
        if self.session is None and self.state == "RUNNING_P2P":
            self._new_session(session)
            self._dirty = OrderedDict.fromkeys(self.flows)
        self._must(session == self.session, f"session {session} is over or never began")
        self._must(self.state in ("PRE_COPY_P2P", "RUNNING_P2P", "STOP_COPY"), "quiesce it first")
        self.state = "STOP_COPY"

    def roll_back(self) -> None:
        """Any state -> RUNNING, the session is over, all flows kept. Raises Refused if it is not the guest's device."""
        self._must(self.live, "it is not the guest's device")
        self.state = "RUNNING"
        self._new_session(None)

    def end(self, how: str) -> None:
        """For good: `how` is retired or discarded. Later calls are refused; a second end changes nothing."""
        if not self.ended:
            self.ended, self.live, self.state = how, False, "STOP"
            self._new_session(None)

    # --- the destination ---

    def begin_load(self, session: int) -> None:
        """-> RESUMING, empty. Also of a device that was discarded. Raises Refused if it is the guest's device."""
        if self.ended == "discarded":
            self.ended = ""
        self._must(not self.live, "it is the guest's device: nothing can be loaded into it")
        self.state, self.flows = "RESUMING", {}
        self._new_session(session)
        self._incoming, self._received_bytes, self._received = bytearray(), 0, blake2b(digest_size=16)
        self._expected = self._valid = None

    def load(self, request: pb.LoadStateRequest) -> bool:
        """Is everything before this marker loaded?"""
        if self.ended or self.state != "RESUMING" or request.session != self.session:
            return False
        if request.kind == pb.STATE_KIND_END:
            self._expected = (request.total_bytes, request.digest)
        self._received.update(request.data)
        self._received_bytes += len(request.data)
        self._incoming += request.data
        whole = len(self._incoming) // _FLOW.size * _FLOW.size
        self.flows.update(_FLOW.iter_unpack(bytes(self._incoming[:whole])))
        del self._incoming[:whole]
        return request.kind == pb.STATE_KIND_INITIAL_SENT

    def validate(self, session: int) -> pb.ValidateResponse:
        """RESUMING -> STOP: what was loaded is what END said. Answers alike when repeated. Raises Refused."""
        self._must(session == self.session, f"session {session} is over or never began")
        if self._valid is None:
            loaded = (self._received_bytes, self._received.digest())
            self._must(self.state == "RESUMING", "nothing was loaded")
            self._must(self._expected == loaded and not self._incoming, "what was loaded is not what was sent")
            self._must(self.refuses != "validate", "it was told to refuse")
            self._valid, self.state = pb.ValidateResponse(bytes=loaded[0], digest=loaded[1]), "STOP"
        return self._valid

    def activate(self) -> None:
        """STOP -> RUNNING: it is the guest's device from here on. Raises Refused without a validated state."""
        if self.live:
            return
        self._must(self.state == "STOP" and self._valid is not None, "it holds no validated state")
        self.live, self.state = True, "RUNNING"
        self._new_session(None)


class FlowTables(ShimServiceServicer):
    """All flow tables of a host behind the shim protocol."""

    def __init__(self) -> None:
        self.tables: dict[Key, FlowTable] = {}
        self._answers: OrderedDict[str, Any] = OrderedDict()
        self._news = asyncio.Condition()

    async def _once(self, request: Any, context: Context, do: Callable[[FlowTable], Any]) -> Any:
        """Carry a call out, or answer a repeated one as before. A refusal becomes a status with its sentence."""
        if request.call_id in self._answers:
            return self._answers[request.call_id]
        table = await self._table(request.tag, context)
        table.change(asyncio.get_running_loop().time())
        try:
            answer = do(table)
        except Refused as error:
            await context.abort(StatusCode.FAILED_PRECONDITION, f"{request.tag.device}: {error}")
        except Wrong as error:
            await context.abort(StatusCode.INVALID_ARGUMENT, str(error))
        self._answers[request.call_id] = answer
        while len(self._answers) > _KEPT_CALLS:
            self._answers.popitem(last=False)
        async with self._news:
            self._news.notify_all()
        return answer

    async def _table(self, tag: pb.DeviceTag, context: Context) -> FlowTable:
        table = self.tables.get((tag.guest_uuid, tag.inc, tag.device))
        if table is None:
            await context.abort(StatusCode.NOT_FOUND, f"there is no device {tag.device} of {tag.guest_uuid}/{tag.inc}")
        assert table is not None
        return table

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        answer = pb.DescribeResponse(program="flow tables, an example")
        for (guest, inc, device), table in self.tables.items():
            tag = pb.DeviceTag(guest_uuid=guest, inc=inc, device=device)
            answer.devices.add(tag=tag, state=table.state, live=table.live, session=table.session, asked=table.asked)
        return answer

    async def WatchAckRequests(
        self, request: pb.WatchAckRequestsRequest, context: Context
    ) -> AsyncIterator[pb.WatchAckRequestsResponse]:
        told: dict[Key, int] = {}
        while True:
            for key, table in list(self.tables.items()):
                wanted = not request.guest_uuid or key[:2] == (request.guest_uuid, request.inc)
                if wanted and table.asked is not None and table.session is not None and told.get(key) != table.asked:
                    told[key] = table.asked
                    tag = pb.DeviceTag(guest_uuid=key[0], inc=key[1], device=key[2])
                    yield pb.WatchAckRequestsResponse(tag=tag, session=table.session, generation=table.asked)
            async with self._news:
                await self._news.wait()

    async def Instruct(self, request: pb.InstructRequest, context: Context) -> pb.InstructResponse:
        return await self._once(request, context, lambda t: pb.InstructResponse(answer=t.instruct(request.instruction)))

    async def LookInside(self, request: pb.LookInsideRequest, context: Context) -> Any:
        return pb.LookInsideResponse()

    async def End(self, request: pb.EndRequest, context: Context) -> Any:
        await context.abort(StatusCode.UNIMPLEMENTED, "this program serves all guests of the host")

    async def AttachDevice(self, request: pb.AttachDeviceRequest, context: Context) -> pb.AttachDeviceResponse:
        key = (request.tag.guest_uuid, request.tag.inc, request.tag.device)
        if key not in self.tables:
            try:
                self.tables[key] = FlowTable(Options.read(request.options), incoming=request.incoming)
            except Wrong as error:
                await context.abort(StatusCode.INVALID_ARGUMENT, str(error))
        return pb.AttachDeviceResponse()

    async def DetachDevice(self, request: pb.DetachDeviceRequest, context: Context) -> pb.DetachDeviceResponse:
        self.tables.pop((request.tag.guest_uuid, request.tag.inc, request.tag.device), None)
        return pb.DetachDeviceResponse()

    async def BeginSession(self, request: pb.BeginSessionRequest, context: Context) -> pb.BeginSessionResponse:
        def do(table: FlowTable) -> pb.BeginSessionResponse:
            table.begin(request.session, request.by)
            return pb.BeginSessionResponse(asked=table.asked)

        return await self._once(request, context, do)

    async def ReadState(self, request: pb.ReadStateRequest, context: Context) -> pb.ReadStateResponse:
        until = asyncio.get_running_loop().time() + min(request.wait_ms, 5_000) / 1000
        while True:
            table = await self._table(request.tag, context)
            now = asyncio.get_running_loop().time()
            table.change(now)
            try:
                piece = table.read(request.session, request.seq, request.stopped)
            except Refused as error:
                await context.abort(StatusCode.FAILED_PRECONDITION, str(error))
            if piece.kind != pb.STATE_KIND_UNSPECIFIED or now >= until:
                return piece
            await asyncio.sleep(_POLL_S)

    async def ReachHook(self, request: pb.ReachHookRequest, context: Context) -> pb.ReachHookResponse:
        def do(table: FlowTable) -> pb.ReachHookResponse:
            table.hook(request.hook)
            return pb.ReachHookResponse(session=table.session, asked=table.asked)

        return await self._once(request, context, do)

    async def Quiesce(self, request: pb.QuiesceRequest, context: Context) -> pb.QuiesceResponse:
        def do(table: FlowTable) -> pb.QuiesceResponse:
            left = table.quiesce(request.session if request.HasField("session") else None)
            return pb.QuiesceResponse(asked=table.asked, stop_copy_bytes=left)

        return await self._once(request, context, do)

    async def StopCopy(self, request: pb.StopCopyRequest, context: Context) -> pb.StopCopyResponse:
        return await self._once(request, context, lambda t: t.stop_copy(request.session) or pb.StopCopyResponse())

    async def RollBack(self, request: pb.RollBackRequest, context: Context) -> pb.RollBackResponse:
        return await self._once(request, context, lambda t: t.roll_back() or pb.RollBackResponse())

    async def Retire(self, request: pb.RetireRequest, context: Context) -> pb.RetireResponse:
        return await self._once(request, context, lambda t: t.end("retired") or pb.RetireResponse())

    async def BeginLoad(self, request: pb.BeginLoadRequest, context: Context) -> pb.BeginLoadResponse:
        return await self._once(request, context, lambda t: t.begin_load(request.session) or pb.BeginLoadResponse())

    async def LoadState(self, request: pb.LoadStateRequest, context: Context) -> pb.LoadStateResponse:
        return await self._once(request, context, lambda table: pb.LoadStateResponse(acknowledged=table.load(request)))

    async def Validate(self, request: pb.ValidateRequest, context: Context) -> pb.ValidateResponse:
        return await self._once(request, context, lambda table: table.validate(request.session))

    async def Activate(self, request: pb.ActivateRequest, context: Context) -> pb.ActivateResponse:
        return await self._once(request, context, lambda t: t.activate() or pb.ActivateResponse())

    async def Discard(self, request: pb.DiscardRequest, context: Context) -> pb.DiscardResponse:
        return await self._once(request, context, lambda t: t.end("discarded") or pb.DiscardResponse())


async def serve(tables: FlowTables, socket: str) -> aio.Server:
    """Serve at a unix socket that only this user may connect to; the caller stops it."""
    before = os.umask(0o077)
    try:
        server = aio.server()
        add_ShimServiceServicer_to_server(tables, server)
        server.add_insecure_port(f"unix:{socket}")
        await server.start()
    finally:
        os.umask(before)
    return server


async def _main(socket: str) -> None:
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    server = await serve(FlowTables(), socket)
    await over.wait()
    await server.stop(0.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Holds a flow table for each external device of a host's guests.")
    parser.add_argument("--socket", required=True, help="the unix socket to serve at")
    asyncio.run(_main(parser.parse_args().socket))
