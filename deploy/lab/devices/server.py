"""All devices of one VMM behind their sockets: what a call does to a device, and the doorbells of the guest.

Not the process itself (device_process.py), nor the protocol that the calls come in by (serving.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator
from typing import Any

from agents.shims.inside import InVmmDevice
from deploy.lab.devices.device import Device, DeviceError, DeviceState
from deploy.lab.devices.scenario import Call, Hook, scenario_mapping
from deploy.lab.devices.vfio.endpoint import Endpoint
from orchestrator.core.errors import DroverError

_FRAME_BYTES = 256 << 10
_DIRTY_PAUSE_S = 0.05
"""How long dirty data is collected before it is sent, unless there is much of it."""
_DIRTY_AT_ONCE_BYTES = 64 << 10
_MAX_WAIT_S = 5.0
_KEPT_CALLS = 512
_MAX_UNSENT_ANSWERS = 65_536
_MAX_UNTOLD = 1_024

Reply = tuple[dict[str, Any], bytes]


class CallError(Exception):
    """A call was refused or failed."""

    def __init__(self, message: str, *, reset: bool = False, unknown: bool = False, wrong: bool = False) -> None:
        super().__init__(message)
        self.reset = reset
        self.wrong = wrong
        """What was asked for makes no sense, whatever state the device is in."""
        self.unknown = unknown
        """There is no such device."""


class Hosted:
    """One device, and what the calls of an attempt need to know besides it."""

    def __init__(self, device: Device, *, live: bool) -> None:
        self.device = device
        self.live = live
        """It is the guest's device: newborn, or activated."""
        self.ended = ""
        """`retired` or `discarded`."""
        self.lost = False
        """The last session ended with a reset. Said until the next session begins, to whoever asks."""
        self.session: int | None = None
        self.begun_by = ""
        self.course = 0
        """Goes up with each begin and each end of a session: a slow call that was overtaken notices."""
        self.seq = 0
        self.frame: Reply = ({"frame": ""}, b"")
        self.end_sent = False
        self.dirty_sent_at = 0.0
        self.expected: tuple[int, str] | None = None
        """Total bytes and digest, as END says."""
        self.loaded: dict[str, Any] | None = None
        self.stop_copy_bytes: int | None = None
        """As the one final query found it: a repeated one is answered alike."""
        self.published: tuple[int | None, int] = (None, 0)
        self.wake = asyncio.Event()
        self.timer: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        """Of the device, as in the guest's specification."""
        return self.device.identity.name

    def new_course(self, session: int | None) -> None:
        """A session begins, or ends (None). Nothing of the one before is answered any more."""
        self.session = session
        self.course += 1
        self.seq, self.frame, self.end_sent = 0, ({"frame": ""}, b""), False
        self.expected = self.loaded = self.stop_copy_bytes = None

    def must_be_in(self, session: object) -> None:
        """Raises CallError unless this is the session under way."""
        if self.ended:
            raise CallError(f"{self.name} was {self.ended}")
        if self.session is None or session != self.session:
            raise CallError(f"{self.name}: session {session} is over or never began")

    def must_be_live(self) -> None:
        """Raises CallError unless it is the guest's device and was not ended."""
        if self.ended:
            raise CallError(f"{self.name} was {self.ended}")
        if not self.live:
            raise CallError(f"{self.name} is not the guest's device yet: load and activate it first")

    def next_frame(self, now: float) -> Reply | None:
        """What comes next in the stream; None: nothing at the moment."""
        device = self.device
        if device.state is DeviceState.STOP_COPY:
            if data := self._gather(now):
                return {"frame": "stop_copy", "generation": 0}, data
            if not self.end_sent:
                self.end_sent = True
                return {"frame": "end", "total": device.sent_bytes, "digest": device.sent_digest.hex()}, b""
            return {"frame": "over"}, b""
        if device.state is not DeviceState.PRE_COPY:
            return {"frame": "over"}, b""
        if device.initial_bytes_left() or self._dirty_is_due(now):
            self.dirty_sent_at = now
            if data := self._gather(now):
                return {"frame": "precopy", "generation": device.asked or 0}, data
        marker = device.take_marker()
        return None if marker is None else ({"frame": "initial_sent", "generation": marker}, b"")

    def _dirty_is_due(self, now: float) -> bool:
        dirty = self.device.readable_bytes(now)
        return dirty >= _DIRTY_AT_ONCE_BYTES or (dirty > 0 and now - self.dirty_sent_at >= _DIRTY_PAUSE_S)

    def _gather(self, now: float) -> bytes:
        pieces: list[bytes] = []
        left = _FRAME_BYTES
        with contextlib.suppress(DeviceError):
            while left > 0 and (piece := self.device.read(left, now)):
                pieces.append(piece)
                left -= len(piece)
        return b"".join(pieces)

    def next_look(self, now: float, until: float) -> float:
        """When something may be there to send, at the latest."""
        times = [until]
        if self.device.readable_bytes(now) or self.device.gets_dirty:
            times.append(max(now, self.dirty_sent_at) + _DIRTY_PAUSE_S)
        if (due := self.device.next_due()) is not None:
            times.append(due)
        return min(times)


class DeviceServer:
    """All devices of one VMM behind their two sockets."""

    def __init__(self, guest: str, inc: str, hosted: list[Hosted], endpoints: list[Endpoint]) -> None:
        self.guest, self.inc = guest, inc
        self.over = asyncio.Event()
        self._endpoints = endpoints
        self._by_name = {one.name: one for one in hosted}
        self._by_index = {one.device.identity.index: one for one in hosted}
        self._port: asyncio.StreamWriter | None = None
        self._watchers: set[asyncio.Queue[tuple[str, int, int]]] = set()
        self._calls: OrderedDict[str, asyncio.Task[Reply | CallError]] = OrderedDict()

    # --- doorbells ----------------------------------------------------------------------------------------------------

    async def serve_port(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One VMM at a time: a new connection takes the place of the old."""
        if self._port is not None:
            self._port.close()
        self._port = writer
        for hosted in self._by_index.values():
            self._answer(hosted)
        try:
            while line := await reader.readline():
                self._ring(line)
        except (ConnectionError, ValueError):
            pass
        finally:
            writer.close()
            if self._port is writer:
                self._port = None

    def _ring(self, line: bytes) -> None:
        """A torn line is dropped; a capital R begins a new one whatever came before."""
        match = _DOORBELL.fullmatch(line[line.rfind(b"R") :].strip()) if b"R" in line else None
        hosted = self._by_index.get(int(match[1], 16)) if match else None
        if match is None or hosted is None or hosted.ended:
            return
        hosted.device.ring(int(match[2], 16))
        self._answer(hosted)

    def _answer(self, hosted: Hosted) -> None:
        """Say what the device may say. With nobody there, or nobody reading, doorbells wait or are rung again."""
        port = self._port
        if port is None or port.is_closing() or port.transport.get_write_buffer_size() > _MAX_UNSENT_ANSWERS:
            return
        for n, answer in [] if hosted.ended else hosted.device.take_answers():
            port.write(f"A {hosted.device.identity.index:x} {n:08x} {answer:08x}\n".encode())

    # --- control: what serving.py speaks gRPC for ---------------------------------------------------------------------

    async def call(self, name: str, device: str, header: dict[str, Any], body: bytes = b"", key: str = "") -> Reply:
        """One call, once: a key that was seen before is that same call. Raises CallError.

        Pieces of state have no key: the last one is kept by its number instead, because they are large.
        """
        call = self._calls.get(key) if key else None
        if call is None:
            call = asyncio.ensure_future(self._carry_out(name, device, header, body))
            if key:
                self._calls[key] = call
                while len(self._calls) > _KEPT_CALLS:
                    self._calls.popitem(last=False)
        # Shielded: the caller may be gone when it ends, and asks again with the same key.
        outcome = await asyncio.shield(call)
        if isinstance(outcome, CallError):
            raise outcome
        return outcome

    async def _carry_out(self, name: str, device: str, header: dict[str, Any], body: bytes) -> Reply | CallError:
        hosted = self._by_name.get(device)
        try:
            if name == "instruct":
                return self._instruct(device, header), b""
            if hosted is None:
                raise CallError(f"there is no device {device!r} here", unknown=True)
            return await _CALLS[name](self, hosted, header, body)
        except CallError as error:
            log(f"{device} {name}: {error}")
            return error
        except (DeviceError, KeyError, TypeError, ValueError) as error:
            log(f"{device} {name}: {error}")
            return CallError(f"{device}: {error}")
        finally:
            if hosted is not None:
                self._after(hosted)

    def look(self) -> list[InVmmDevice]:
        """What the devices inside the VMM tell of themselves."""
        return [endpoint.look(now_s()) for endpoint in self._endpoints]

    def hosted(self) -> list[Hosted]:
        """The devices outside the VMM."""
        return list(self._by_name.values())

    def asked(self, device: str) -> tuple[int, int] | None:
        """(session, generation) of the device's newest request in the session under way; None: there is none."""
        one = self._by_name.get(device)
        if one is None or one.session is None or one.device.asked is None:
            return None
        return one.session, one.device.asked

    @contextlib.contextmanager
    def watching(self) -> Generator[asyncio.Queue[tuple[str, int, int]]]:
        """Requests as they are made: (device, session, generation), the newest of each session under way first."""
        queue: asyncio.Queue[tuple[str, int, int]] = asyncio.Queue(_MAX_UNTOLD)
        for name in self._by_name:
            if (asked := self.asked(name)) is not None:
                queue.put_nowait((name, *asked))
        self._watchers.add(queue)
        try:
            yield queue
        finally:
            self._watchers.discard(queue)

    def _after(self, hosted: Hosted) -> None:
        """Whatever just happened to the device: tell of requests, answer doorbells, wake readers, set the timer."""
        device = hosted.device
        asked = device.asked
        if hosted.session is not None and asked is not None and (hosted.session, asked) != hosted.published:
            hosted.published = (hosted.session, asked)
            for queue in self._watchers:
                if queue.full():  # nobody reads: the newest generations are what counts
                    queue.get_nowait()
                queue.put_nowait((hosted.name, hosted.session, asked))
        self._answer(hosted)
        hosted.wake.set()
        hosted.wake.clear()
        if hosted.timer is not None:
            hosted.timer.cancel()
            hosted.timer = None
        if (due := device.next_due()) is not None:
            hosted.timer = asyncio.get_running_loop().call_at(due, self._due, hosted)

    def _due(self, hosted: Hosted) -> None:
        if not hosted.ended:
            hosted.device.advance(now_s())
            self._after(hosted)

    async def _delay(self, hosted: Hosted, call: Call) -> None:
        """The scripted slowness of a call. Raises CallError when the session ended meanwhile."""
        if ms := hosted.device.take_delay(call):
            course = hosted.course
            await asyncio.sleep(ms / 1000)
            if hosted.course != course:
                raise CallError(f"{hosted.name}: {call.value} was overtaken by the end of its session")

    # --- calls: the source --------------------------------------------------------------------------------------------

    async def _begin(self, hosted: Hosted, header: dict[str, Any], body: bytes) -> Reply:
        hosted.must_be_live()
        session, device = int(header["session"]), hosted.device
        by = str(header["by"])
        if (hosted.session, hosted.begun_by) == (session, by) and device.state is DeviceState.PRE_COPY:
            return {}, b""
        if device.state not in (DeviceState.RUNNING, DeviceState.PRE_COPY):
            raise CallError(f"{hosted.name} is in {device.state.name} of another session: roll it back first")
        device.set_state(DeviceState.RUNNING, now_s())
        device.set_state(DeviceState.PRE_COPY, now_s())
        hosted.new_course(session)
        hosted.begun_by, hosted.lost = by, False
        log(f"{hosted.name} begins session {session}, generation {device.generation}")
        return {}, b""

    async def _read(self, hosted: Hosted, header: dict[str, Any], body: bytes) -> Reply:
        seq = int(header["seq"])
        if header["stopped"] and hosted.device.state is not DeviceState.STOP_COPY:
            raise CallError(f"{hosted.name} is in {hosted.device.state.name}, not in STOP_COPY")
        until = now_s() + min(int(header["wait_ms"]) / 1000, _MAX_WAIT_S)
        while True:
            if hosted.ended or header["session"] != hosted.session:
                return {"frame": "over"}, b""
            if seq == hosted.seq:
                return hosted.frame
            if seq != hosted.seq + 1:
                raise CallError(f"{hosted.name}: frame {seq} asked for after {hosted.seq}")
            now = now_s()
            frame = hosted.next_frame(now)
            if frame is not None:
                if frame[0]["frame"] != "over":
                    hosted.seq, hosted.frame = seq, frame
                return frame
            if now >= until:
                return {"frame": ""}, b""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(hosted.next_look(now, until)):
                    await hosted.wake.wait()

    async def _hook(self, hosted: Hosted, header: dict[str, Any], body: bytes) -> Reply:
        if not hosted.ended and hosted.session is not None:
            hosted.device.hook(Hook(header["hook"]), now_s())
        return {}, b""

    async def _quiesce(self, hosted: Hosted, header: dict[str, Any], body: bytes) -> Reply:
        session, device = header["session"], hosted.device
        if session is None and hosted.session is None:
            hosted.must_be_live()  # a guest that was paused: the device never began pre-copy
        else:
            hosted.must_be_in(session)
        if device.state in (DeviceState.PRE_COPY, DeviceState.RUNNING):
            await self._delay(hosted, Call.QUIESCE)
            began = device.state is DeviceState.PRE_COPY
            device.set_state(DeviceState.PRE_COPY_P2P if began else DeviceState.RUNNING_P2P, now_s())
            await self._delay(hosted, Call.LAST_LOOK)
            if device.take_fault(Call.LAST_LOOK):
                raise CallError(f"{hosted.name}: last_look failed (the scenario says so)")
        if hosted.stop_copy_bytes is None:
            hosted.stop_copy_bytes = device.stop_copy_length(now_s())
        return {"newest": device.asked, "stop_copy_bytes": hosted.stop_copy_bytes}, b""

    async def _stop_copy(self, hosted: Hosted, header: dict[str, Any], body: bytes) -> Reply:
        session, device = header["session"], hosted.device
        if hosted.session is None and device.state is DeviceState.RUNNING_P2P and session is not None:
            hosted.must_be_live()
            hosted.new_course(int(session))
        hosted.must_be_in(session)
        if device.state is DeviceState.STOP_COPY:
            return {}, b""
        if device.state not in (DeviceState.PRE_COPY_P2P, DeviceState.RUNNING_P2P):
            raise CallError(f"{hosted.name} is in {device.state.name}: quiesce it first")
        await self._delay(hosted, Call.STOP_COPY)
        device.set_state(DeviceState.STOP_COPY, now_s())
        return {}, b""

    async def _roll_back(self, hosted: Hosted, header: dict[str, Any], body: bytes) -> Reply:
        hosted.must_be_live()
        device = hosted.device
        if hosted.session is not None or device.state is not DeviceState.RUNNING:
            hosted.new_course(None)
            try:
                device.set_state(DeviceState.RUNNING, now_s())
            except DeviceError as error:
                device.reset()
                hosted.lost = True
                log(f"{hosted.name} was reset: {error}")
        if hosted.lost:
            raise CallError(f"{hosted.name} came back by a reset only: it lost its state", reset=True)
        return {}, b""

    async def _retire(self, hosted: Hosted, header: dict[str, Any], body: bytes) -> Reply:
        self._end(hosted, "retired")
        return {}, b""

    def _end(self, hosted: Hosted, how: str) -> None:
        if hosted.ended:
            return
        hosted.new_course(None)
        hosted.ended, hosted.live = how, False
        log(f"{hosted.name} is {how}")

    # --- calls: the destination ---------------------------------------------------------------------------------------

    async def _begin_load(self, hosted: Hosted, header: dict[str, Any], body: bytes) -> Reply:
        if hosted.live or hosted.ended == "retired":
            raise CallError(f"{hosted.name} is or was the guest's device here: nothing can be loaded into it")
        hosted.ended = ""
        device = hosted.device
        if device.state is not DeviceState.STOP or device.has_content:
            device.reset()
        device.set_state(DeviceState.RESUMING, now_s())
        hosted.new_course(int(header["session"]))
        return {}, b""

    async def _load(self, hosted: Hosted, header: dict[str, Any], body: bytes) -> Reply:
        if hosted.ended or hosted.session is None or header["session"] != hosted.session:
            log(f"{hosted.name} drops a frame of session {header['session']}")
            return {"ack": False}, b""
        device = hosted.device
        match header["kind"]:
            case "initial_sent":
                await self._delay(hosted, Call.LOAD)
                return {"ack": not device.load_plan.never_acks}, b""
            case "end":
                hosted.expected = (int(header["total"]), str(header["digest"]))
            case _:
                device.write(body)
        return {"ack": False}, b""

    async def _validate(self, hosted: Hosted, header: dict[str, Any], body: bytes) -> Reply:
        hosted.must_be_in(header["session"])
        device = hosted.device
        if hosted.loaded is None:
            await self._delay(hosted, Call.VALIDATE)
            loaded = {"bytes": device.loaded_bytes, "digest": device.loaded_digest.hex()}
            if hosted.expected is None:
                raise CallError(f"{hosted.name}: the end of its state did not arrive")
            if hosted.expected != (loaded["bytes"], loaded["digest"]):
                raise CallError(f"{hosted.name}: what was loaded is not what was sent")
            device.set_state(DeviceState.STOP, now_s())
            hosted.loaded = loaded
        return hosted.loaded, b""

    async def _activate(self, hosted: Hosted, header: dict[str, Any], body: bytes) -> Reply:
        if hosted.live:
            return {}, b""
        if hosted.ended or hosted.device.state is not DeviceState.STOP or not hosted.device.has_content:
            raise CallError(f"{hosted.name} holds no validated state: it cannot be activated")
        await self._delay(hosted, Call.ACTIVATE)
        hosted.device.set_state(DeviceState.RUNNING, now_s())
        hosted.new_course(None)
        hosted.live = True
        log(f"{hosted.name} is activated, generation {hosted.device.generation}")
        return {}, b""

    async def _discard(self, hosted: Hosted, header: dict[str, Any], body: bytes) -> Reply:
        if not hosted.ended:
            hosted.device.reset()
        self._end(hosted, "discarded")
        return {}, b""

    # --- calls: instructions ------------------------------------------------------------------------------------------

    def _instruct(self, name: str, header: dict[str, Any]) -> dict[str, Any]:
        from deploy.lab.devices.scenario_text import parse_instruction  # late: the process starts without YAML

        device = self._live_device(name)
        try:
            made = parse_instruction(header["instruction"])
        except DroverError as error:
            raise CallError("; ".join(f"{field}: {said}" for field, said in error.violations), wrong=True) from None
        try:
            device.inject(made, now_s())
        except DroverError as error:
            raise CallError(str(error)) from None
        log(f"{name} was instructed: {made}")
        return {"scenario": scenario_mapping(device.scenario)}

    def _live_device(self, name: str) -> Device:
        for endpoint in self._endpoints:
            if endpoint.name == name:
                if not endpoint.live:
                    raise CallError(f"{name} is not the guest's device yet: its state has to arrive first")
                return endpoint.device
        hosted = self._by_name.get(name)
        if hosted is None:
            raise CallError(f"there is no device {name!r} here", unknown=True)
        hosted.must_be_live()
        return hosted.device


_DOORBELL = re.compile(rb"R ([0-7]) ([0-9a-f]{1,8})")
_Handler = Callable[[DeviceServer, Hosted, dict[str, Any], bytes], Awaitable[Reply]]
_CALLS: dict[str, _Handler] = {
    name: getattr(DeviceServer, f"_{name}")
    for name in ("begin read hook quiesce stop_copy roll_back retire begin_load load validate activate discard".split())
}


def now_s() -> float:
    """The clock of everything here: the event loop's."""
    return asyncio.get_running_loop().time()


def log(text: str) -> None:
    """A line in the log of the process, which its agent reads when something went wrong."""
    with contextlib.suppress(OSError):  # a full disk costs the line
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
        sys.stderr.flush()
