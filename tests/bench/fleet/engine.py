"""The fake engine with a stream between processes: a VMM is an object, its guest's memory one word over TCP.

What agents see of it is what they see of QEMU: an address to send to, notes on the disk by which a later agent finds
the VMM again, states and events in the same order. Pre-copy lasts as long as the bench says.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import dataclass, field, replace

from agents.engine import base
from agents.engine.base import EngineError, EngineStatus, HoldStart, RunState, VmmMetadata, VmmState
from agents.engine.qemu.process import metadata_path, write_metadata
from orchestrator.core.endpoint import Endpoint
from tests.fakes.engine import FakeEngine, FakeVmm

UNDER_WAY = frozenset({EngineStatus.SETUP, EngineStatus.ACTIVE, EngineStatus.PARKED, EngineStatus.DEVICE})
FILLED = 1 << 24
"""Pids from here on are of guests that were there before the engine: it finds each of them running."""
_CONNECT_S = 5.0
_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Precopy:
    """How long pre-copies last, of all engines of one process."""

    seconds: float = 0.0
    held: bool = False
    """None ends until `go`."""
    _waiting: set[LightVmm] = field(default_factory=set["LightVmm"])

    def begin(self, vmm: LightVmm) -> None:
        if self.held:
            self._waiting.add(vmm)
        else:
            asyncio.get_running_loop().call_later(self.seconds, vmm.converge)

    def forget(self, vmm: LightVmm) -> None:
        self._waiting.discard(vmm)

    def go(self, per_s: float) -> None:
        """Let those that wait end, so many per second: thousands of guests never stand still at the same moment."""
        self.held = False
        waiting, self._waiting = self._waiting, set()
        for number, vmm in enumerate(waiting):
            asyncio.get_running_loop().call_later(number / per_s, vmm.converge)


class LightVmm(FakeVmm):
    """See `base.Vmm`."""

    engine: LightEngine

    def __init__(self, engine: LightEngine, metadata: VmmMetadata, spec: base.VmmSpec, run: RunState) -> None:
        super().__init__(engine, metadata, spec, run)
        self._server: asyncio.Server | None = None
        self._stream: _Streams | None = None
        self._talk: asyncio.Task[None] | None = None

    def _called(self, name: str) -> None:
        """What was called is not kept: a soak calls for hours."""
        if self._dead:
            raise EngineError(f"{name}: the process is gone")

    # --- incoming -----------------------------------------------------------------------------------------------------

    async def listen(self, address: str) -> None:
        self._server = await asyncio.start_server(self._receive, address, 0)
        port = int(self._server.sockets[0].getsockname()[1])
        self._metadata = replace(self._metadata, endpoint=f"tcp:{Endpoint(address, port)}")

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One stream, from its first word to the last."""
        try:
            memory = await reader.readline()
            if self.status is not EngineStatus.NONE or memory.strip() != str(self.spec.spec.memory_mib).encode():
                return
            self._set_status(EngineStatus.ACTIVE)
            ended = await reader.readline()
            if ended and self.status is EngineStatus.ACTIVE:
                self.run = RunState.ENDED if ended == b"ended\n" else RunState.PAUSED
                self._set_status(EngineStatus.COMPLETED)
                writer.write(b"loaded\n")
                await writer.drain()
            elif self.status is EngineStatus.ACTIVE:
                self._set_status(EngineStatus.FAILED, "the stream ended early")
        except (OSError, ValueError):
            if self.status is EngineStatus.ACTIVE:
                self._set_status(EngineStatus.FAILED, "the stream broke")
        finally:
            writer.close()
            self._close_server()

    # --- outgoing -----------------------------------------------------------------------------------------------------

    async def start_outgoing(self, options: base.OutgoingOptions) -> None:
        self._called("start_outgoing")
        if options.stream is None:
            raise EngineError("there is no destination to send to")
        try:
            async with asyncio.timeout(_CONNECT_S):
                reader, writer = await asyncio.open_connection(options.stream.ip, options.stream.port)
        except (OSError, TimeoutError) as error:
            raise EngineError(f"the destination does not take the stream at {options.stream}: {error!r}") from error
        self.error, self._late = "", 0
        self._set_status(EngineStatus.SETUP)
        self._stream = reader, writer
        writer.write(f"{self.spec.spec.memory_mib}\n".encode())
        self._talk = asyncio.create_task(self._until_loaded(reader))
        self._set_status(EngineStatus.ACTIVE)
        if options.hold is HoldStart.OPEN:
            self.engine.precopy.begin(self)

    async def _until_loaded(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            if await reader.readline() == b"loaded\n" and self.status is EngineStatus.DEVICE:
                self.run = RunState.SEALED
                self._set_status(EngineStatus.COMPLETED)
        if self.status in UNDER_WAY:
            self._fail("the destination ended the stream")
        self._end_stream()

    async def release(self) -> None:
        self._called("release")
        if self.status is EngineStatus.ACTIVE:
            self.engine.precopy.begin(self)

    async def proceed(self) -> None:
        self._called("proceed")
        if self.status is not EngineStatus.PARKED or self._stream is None:
            raise EngineError(f"not parked but {self.status}")
        self._set_status(EngineStatus.DEVICE)
        self._stream[1].write(b"ended\n" if self._before is RunState.ENDED else b"rest\n")

    async def abort(self, timeout_s: float = 5.0) -> VmmState:
        answer = await super().abort(timeout_s)
        self._end_stream()
        return answer

    def _end_stream(self) -> None:
        self.engine.precopy.forget(self)
        if self._stream is not None:
            self._stream[1].close()
            self._stream = None

    # --- the process --------------------------------------------------------------------------------------------------

    async def promote(self) -> None:
        await super().promote()
        write_metadata(metadata_path(self.spec), self._metadata)

    def die(self) -> None:
        self._end_stream()
        self._close_server()
        if self._talk is not None:
            self._talk.cancel()
        metadata_path(self.spec).unlink(missing_ok=True)
        super().die()

    def _close_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


@dataclass
class LightEngine(FakeEngine):
    """Of one host. Its VMMs outlive the agent, within this process."""

    precopy: Precopy = field(default_factory=Precopy)
    _pids: itertools.count[int] = field(default_factory=lambda: itertools.count(1000))

    async def start(self, spec: base.VmmSpec) -> LightVmm:
        return self._noted(self._new(spec, "owner", RunState.RUNNING))

    async def prepare_incoming(self, spec: base.VmmSpec, migration: str, attempt: int) -> LightVmm:
        vmm = self._new(spec, "incoming", RunState.INCOMING, migration, attempt)
        await vmm.listen(spec.listen_address)
        return self._noted(vmm)

    async def adopt(self, metadata: VmmMetadata, spec: base.VmmSpec) -> FakeVmm | None:
        if metadata.pid >= FILLED and metadata.pid not in self.processes and metadata.role == "owner":
            self.processes[metadata.pid] = LightVmm(self, metadata, spec, RunState.RUNNING)
        return await super().adopt(metadata, spec)

    def _noted(self, vmm: LightVmm) -> LightVmm:
        write_metadata(metadata_path(vmm.spec), vmm.metadata)
        return vmm

    def _new(self, spec: base.VmmSpec, role: str, run: RunState, migration: str = "", attempt: int = 0) -> LightVmm:
        pid = next(self._pids)
        machine = spec.spec.machine
        made = VmmMetadata(spec.guest, spec.inc, pid, start_time_of(pid), role, migration, attempt, machine=machine)
        vmm = LightVmm(self, made, spec, run)
        self.processes[pid] = vmm
        return vmm


def start_time_of(pid: int) -> int:
    """Of a VMM that is no process."""
    return pid * 7
