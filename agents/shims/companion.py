"""The companion shim: a device whose state lives outside the VMM, held by a process of its own.

An agent starts that process, or finds the one that an earlier agent started, and speaks with it through its control
socket. Every call is bounded; a lost connection is made again and the call repeated under its key, so it happens once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import agents
from agents.host.processes import Watched, spawned, start_time_of, tail_of
from agents.shims import control
from agents.shims.base import (
    DestinationShim,
    FinalQuery,
    Frame,
    FrameKind,
    InVmmDevices,
    Load,
    SendFrame,
    ShimError,
    SourceShim,
)
from agents.shims.inside import DeviceEvent, InVmmDevice
from orchestrator.core.errors import DroverError
from orchestrator.core.ids import AckRequest
from orchestrator.core.records import DeviceSpec, ShimKind
from orchestrator.core.scenario import scenario_from, scenario_mapping
from orchestrator.scenario_text import format_scenario, parse_scenario

_BLACKOUT_S = 2.0
"""For what a stopped guest waits for."""
_CALL_S = 5.0
_ARRIVAL_S = 10.0
"""Validation and activation."""
_LOAD_S = 120.0
"""A device may take long over its initial data: the policy's ACK timeout ends that, this only ends a dead wait."""
_START_S = 10.0
_END_S = 2.0
_RECONNECT_S = 0.005
_READ_WAIT_MS = 1_000
_MAX_SOCKET_PATH = 107


@dataclass(frozen=True, slots=True)
class DevicesSpec:
    """All devices of one VMM process that a device process holds. `directory` is the guest's own and exists."""

    guest: str
    """Uuid."""
    inc: str
    directory: Path
    devices: tuple[DeviceSpec, ...]
    """Devices with other shims are left out. The order numbers them on the guest's second serial port."""
    seed: int
    """The guest's, 32 bits: what its devices start from (VmmSpec.seed)."""

    @property
    def companions(self) -> tuple[DeviceSpec, ...]:
        return tuple(device for device in self.devices if device.shim == ShimKind.COMPANION)

    @property
    def in_vmm(self) -> tuple[DeviceSpec, ...]:
        return tuple(device for device in self.devices if device.shim == ShimKind.VFIO)

    def path(self, suffix: str) -> Path:
        return self.directory / f"{self.inc}.{suffix}"


class _Client:
    """Calls to one device process over one connection, made when it is needed and made again when it breaks."""

    def __init__(self, spec: DevicesSpec, alive: Callable[[], bool]) -> None:
        self._spec = spec
        self._alive = alive
        self._me = uuid.uuid4().hex
        self._number = 0
        self._connecting = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[tuple[dict[str, Any], bytes]]] = {}
        self._closed = False
        self.listeners: dict[str, Callable[[int, int], None]] = {}
        """By device: told of (session, generation) of each request."""

    async def call(
        self,
        name: str,
        body: bytes = b"",
        *,
        timeout_s: float = _CALL_S,
        device: str = "",
        fields: Mapping[str, object] = MappingProxyType({}),
    ) -> tuple[dict[str, Any], bytes]:
        """The answer. Raises ShimError: refused, failed, process gone, or no answer in time."""
        who = device or "device process"
        self._number += 1
        number = self._number
        header = {"id": number, "key": f"{self._me}.{number}", "call": name, "device": device, **fields}
        frame = control.encode(header, body)
        try:
            async with asyncio.timeout(timeout_s):
                found, data = await self._repeat_until_answered(number, frame, who)
        except TimeoutError:
            raise ShimError(f"{who}: {name} was not answered in {timeout_s:g} s") from None
        finally:
            self._waiting.pop(number, None)
        if "error" in found:
            raise ShimError(str(found["error"]), reset=bool(found.get("reset")))
        return found, data

    async def _repeat_until_answered(self, number: int, frame: bytes, who: str) -> tuple[dict[str, Any], bytes]:
        while True:
            try:
                writer = await self._connected()
                answer = self._waiting[number] = asyncio.get_running_loop().create_future()
                writer.write(frame)
                await writer.drain()
                return await answer
            except OSError:
                if self._closed or not self._alive():
                    raise ShimError(f"{who}: its device process is gone") from None
                await asyncio.sleep(_RECONNECT_S)

    async def _connected(self) -> asyncio.StreamWriter:
        async with self._connecting:
            if self._writer is None or self._writer.is_closing():
                if self._closed:
                    raise ConnectionError("closed")
                reader, writer = await asyncio.open_unix_connection(self._spec.path("ctl"))
                try:
                    await self._greet(reader, writer)
                except BaseException:
                    writer.close()
                    raise
                self._writer = writer
                self._reader = asyncio.create_task(self._listen(reader, writer))
            return self._writer

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Make sure who answers, and learn of requests that were made while nobody listened."""
        writer.write(control.encode({"id": 0, "call": "hello"}))
        while True:
            header, _ = await control.read_frame(reader)
            if header.get("id") == 0:
                break
        if (header.get("guest"), header.get("inc")) != (self._spec.guest, self._spec.inc):
            raise ConnectionError(f"{self._spec.path('ctl')} belongs to another guest")
        devices = cast(dict[str, dict[str, Any]], header["devices"])
        for name, state in devices.items():
            if state["session"] is not None and state["asked"] is not None:
                self._tell(name, state["session"], state["asked"])

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                header, body = await control.read_frame(reader)
                if header.get("note") == "asked":
                    self._tell(header["device"], header["session"], header["generation"])
                    continue
                answer = self._waiting.get(int(header.get("id") or 0))
                if answer is not None and not answer.done():
                    answer.set_result((header, body))
        except OSError as error:
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(ConnectionError(str(error)))
        finally:
            writer.close()

    def _tell(self, device: str, session: int, generation: int) -> None:
        listener = self.listeners.get(device)
        if listener is not None:
            listener(session, generation)

    async def close(self) -> None:
        self._closed = True
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ConnectionError("closed"))


class CompanionSource:
    """See `SourceShim`."""

    def __init__(self, device: str, client: _Client) -> None:
        self.device = device
        self._client = client
        self._me = uuid.uuid4().hex
        self._session: int | None = None
        self._on_request: Callable[[AckRequest], None] | None = None
        self._seq = 0
        """Frames of this session that were handed to the channel."""
        self._broken = ""

    async def begin(self, session: int, on_request: Callable[[AckRequest], None]) -> None:
        if self._session != session:
            self._seq, self._broken = 0, ""
        self._session, self._on_request = session, on_request
        self._client.listeners[self.device] = self._asked
        await self._call("begin", session=session, by=self._me)

    def _asked(self, session: int, generation: int) -> None:
        if session == self._session and self._on_request is not None:
            self._on_request(AckRequest(self.device, generation))

    async def run_precopy(self, send: SendFrame) -> None:
        if self._session is None:
            raise ShimError(f"{self.device}: no session was begun")
        while (frame := await self._read(stopped=False)) is not None:
            await self._hand_over(send, frame)

    async def _hand_over(self, send: SendFrame, frame: Frame) -> None:
        """A frame that is on its way goes all the way even when pre-copy ends: never lost, never sent twice."""
        sending = asyncio.ensure_future(_awaited(send, frame))
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            await asyncio.wait({sending}, timeout=_BLACKOUT_S)
            if sending.done() and not sending.cancelled() and sending.exception() is None:
                self._seq += 1
            else:
                sending.cancel()
                self._broken = f"{self.device}: nobody knows whether a piece of its state was sent"
            raise
        self._seq += 1

    async def _read(self, *, stopped: bool) -> Frame | None:
        """The next frame; None when nothing more comes in the device's present state."""
        wait_ms, timeout_s = (0, _BLACKOUT_S) if stopped else (_READ_WAIT_MS, _CALL_S)
        while True:
            header, data = await self._call(
                "read",
                session=self._session,
                seq=self._seq + 1,
                wait_ms=wait_ms,
                stopped=stopped,
                timeout_s=timeout_s,
            )
            word = str(header["frame"])
            if word == "over":
                return None
            if word:
                return Frame(
                    self.device,
                    self._session or 0,
                    FrameKind(word),
                    int(header.get("generation", 0)),
                    data,
                    int(header.get("total", 0)),
                    bytes.fromhex(str(header.get("digest", ""))),
                )

    async def hook(self, name: str) -> None:
        await self._call("hook", hook=name)

    async def quiesce(self) -> FinalQuery:
        found, _ = await self._call("quiesce", session=self._session, timeout_s=_BLACKOUT_S)
        newest: int | None = found["newest"]
        request = None if newest is None else AckRequest(self.device, newest)
        return FinalQuery(request, int(found["stop_copy_bytes"]))

    async def stop_copy(self) -> None:
        if self._session is None:
            self._session = 0
        await self._call("stop_copy", session=self._session, timeout_s=_BLACKOUT_S)

    async def stop_copy_frames(self) -> AsyncIterator[Frame]:
        if self._broken:
            raise ShimError(self._broken)
        ended = False
        while not ended:
            frame = await self._read(stopped=True)
            if frame is None:
                raise ShimError(f"{self.device}: its session is over before all of its state was sent")
            self._seq += 1
            ended = frame.kind is FrameKind.END
            yield frame

    async def roll_back(self) -> None:
        await self._call("roll_back")
        self._session = None

    async def retire(self) -> None:
        await self._call("retire")
        self._session = None

    async def _call(self, name: str, *, timeout_s: float = _CALL_S, **fields: object) -> tuple[dict[str, Any], bytes]:
        return await self._client.call(name, timeout_s=timeout_s, device=self.device, fields=fields)


async def _awaited(send: SendFrame, frame: Frame) -> None:
    await send(frame)


class CompanionDestination:
    """See `DestinationShim`."""

    def __init__(self, device: str, client: _Client) -> None:
        self.device = device
        self._client = client
        self._session: int | None = None

    async def begin_load(self, session: int) -> None:
        await self._call("begin_load", session=session)
        self._session = session

    async def load(self, frame: Frame) -> AckRequest | None:
        found, _ = await self._call(
            "load",
            frame.data,
            session=frame.session,
            kind=frame.kind.value,
            generation=frame.generation,
            total=frame.total_bytes,
            digest=frame.digest.hex(),
            timeout_s=_LOAD_S,
        )
        return AckRequest(self.device, frame.generation) if found["ack"] else None

    async def validate(self) -> Load:
        session = self._session
        if session is None:
            raise ShimError(f"{self.device}: no load was begun")
        found, _ = await self._call("validate", session=session, timeout_s=_ARRIVAL_S)
        return Load(self.device, session, int(found["bytes"]), bytes.fromhex(str(found["digest"])))

    async def activate(self) -> None:
        await self._call("activate", timeout_s=_ARRIVAL_S)

    async def discard(self) -> None:
        await self._call("discard")

    async def _call(
        self, name: str, body: bytes = b"", *, timeout_s: float = _CALL_S, **fields: object
    ) -> tuple[dict[str, Any], bytes]:
        return await self._client.call(name, body, timeout_s=timeout_s, device=self.device, fields=fields)


class _InsideVmm:
    """See `InVmmDevices`."""

    def __init__(self, client: _Client) -> None:
        self._client = client

    async def look(self) -> tuple[InVmmDevice, ...]:
        found, _ = await self._client.call("look", timeout_s=_BLACKOUT_S)
        return tuple(map(_in_vmm_device, found["devices"]))


def _in_vmm_device(told: Mapping[str, Any]) -> InVmmDevice:
    plain = dict(told)
    events = tuple(DeviceEvent(**event) for event in plain.pop("events"))
    return InVmmDevice(**plain, events=events)


class DeviceProcess:
    """Handle to the process that holds a VMM's devices. It outlives the agent and the VMM."""

    def __init__(self, spec: DevicesSpec, watched: Watched) -> None:
        self.spec = spec
        self.com_path = spec.path("dev")
        """Unix socket that the VMM's second serial port connects to."""
        self.vfio_path = spec.path("vfio")
        """Unix socket that the preload of a VMM with devices inside it connects to."""
        self._process = watched
        self._client = _Client(spec, watched.alive)

    @classmethod
    async def start(cls, spec: DevicesSpec, *, incoming: bool) -> DeviceProcess:
        """Devices that wait for a load (`incoming`), or newborn ones. Raises ShimError; no process is left then."""
        if len(os.fsencode(spec.path("dev"))) > _MAX_SOCKET_PATH:
            raise ShimError(
                f"socket path {spec.path('dev')} is longer than {_MAX_SOCKET_PATH} bytes: use a shorter state directory"
            )
        if _known_process(spec) is not None:
            raise ShimError(f"the devices of {spec.guest} ({spec.inc}) are running already: adopt them")
        description = _description(spec, incoming=incoming)
        child = await spawned(lambda: _spawn(spec, description))
        child.returncode = 0  # from here the pid is watched by descriptor; Popen must neither reap nor warn
        started = cls(spec, Watched(child.pid, start_time_of(child.pid) or 0))
        try:
            await started._client.call("hello", timeout_s=_START_S)
        except BaseException as error:
            words = tail_of(spec.path("devices.log"))
            await started.destroy()
            if isinstance(error, ShimError):
                raise ShimError(f"the device process did not start: {error}; {words}") from None
            raise
        return started

    @classmethod
    async def adopt(cls, spec: DevicesSpec) -> DeviceProcess | None:
        """The process that an earlier agent started. None: it is gone. Raises ShimError when it does not answer."""
        known = _known_process(spec)
        if known is None:
            return None
        found = cls(spec, Watched(*known))
        try:
            await found._client.call("hello")
        except BaseException as error:
            await found.detach()
            if isinstance(error, ShimError) and not found.alive():
                return None
            raise
        return found

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        """The process exists (pid and start time)."""
        return self._process.alive()

    def source_shims(self) -> list[SourceShim]:
        """One per device, in the order of the specification. Each list is for one attempt."""
        return [CompanionSource(device.name, self._client) for device in self.spec.companions]

    def destination_shims(self) -> list[DestinationShim]:
        """One per device, in the order of the specification. Each list is for one attempt."""
        return [CompanionDestination(device.name, self._client) for device in self.spec.companions]

    def in_vmm(self) -> InVmmDevices | None:
        """The devices inside the VMM; None when there are none."""
        return _InsideVmm(self._client) if self.spec.in_vmm else None

    async def inject_late_ack(self, device: str, at: str, times: int, bytes: int) -> str:
        """Let the device ask for another ACK at a hook; returns the scenario that is now in force (YAML).

        `bytes` is new initial data that comes with each request. Raises ShimError for an unknown device or hook.
        """
        fields = {"at": at, "times": times, "bytes": bytes}
        found, _ = await self._client.call("inject", device=device, fields=fields)
        return format_scenario(scenario_from(found["scenario"]))

    async def destroy(self) -> None:
        """End the process and remove its files; returns when it is gone. Idempotent."""
        if self.alive():
            with contextlib.suppress(ShimError):
                await self._client.call("end", timeout_s=_END_S / 2)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await self._process.dead.wait()
        self._process.kill()
        if self.alive():
            async with asyncio.timeout(_END_S):
                await self._process.dead.wait()
        await self.detach()
        for suffix in ("dev", "ctl", "vfio", "devices.json", "devices.tmp", "devices.log", "vfio.log"):
            self.spec.path(suffix).unlink(missing_ok=True)

    async def detach(self) -> None:
        """Let go of the process and leave it as it is, for `adopt` by a later agent."""
        await self._client.close()
        self._process.close()


def _description(spec: DevicesSpec, *, incoming: bool) -> bytes:
    devices: list[dict[str, Any]] = []
    for device in (*spec.companions, *spec.in_vmm):
        try:
            scenario = parse_scenario(device.scenario, f"{device.name}.scenario")
        except DroverError as error:
            raise ShimError(str(error)) from None
        devices.append(
            {
                "name": device.name,
                "shim": device.shim.value,
                "initial_bytes": device.initial_bytes,
                "stop_copy_bytes": device.stop_copy_bytes,
                "dirty_bytes_per_s": device.dirty_bytes_per_s,
                "scenario": scenario_mapping(scenario),
            }
        )
    return json.dumps(
        {
            "guest": spec.guest,
            "inc": spec.inc,
            "directory": str(spec.directory.absolute()),
            "seed": spec.seed,
            "incoming": incoming,
            "devices": devices,
        }
    ).encode()


def _spawn(spec: DevicesSpec, description: bytes) -> subprocess.Popen[bytes]:
    """Blocking. The session of its own lets the devices outlive this process."""
    root = str(Path(agents.__file__ or "").resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "deploy.lab.devices.device_process"]
    with spec.path("devices.log").open("ab") as log:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
                env={**os.environ, "PYTHONPATH": path},
            )
        except OSError as error:
            raise ShimError(f"cannot run {sys.executable}: {error}") from error
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
        stdin.write(description)
    return child


def _known_process(spec: DevicesSpec) -> tuple[int, int] | None:
    """Pid and start time of the process that the metadata file names, if it is alive."""
    try:
        known = json.loads(spec.path("devices.json").read_text())
        pid, start_time = int(known["pid"]), int(known["start_time"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    ours = (known.get("guest"), known.get("inc")) == (spec.guest, spec.inc)
    return (pid, start_time) if ours and start_time_of(pid) == start_time else None
