"""What every device shim promises (agents/shims/base.py), run against the fakes and against real device processes."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

import pytest

from agents.shims.base import DestinationShim, Frame, FrameKind, Load, ShimError, SourceShim
from agents.shims.companion import DeviceProcess, DevicesSpec
from agents.shims.external import ExternalDevices
from deploy.lab.devices import PROGRAM
from deploy.lab.devices.scenario_text import options_of
from orchestrator.core.ids import AckRequest
from orchestrator.core.records import DeviceSpec, ShimKind
from tests.fakes.shims import FakeDestinationShim, FakeSourceShim

DEVICE = "dpu"


@dataclass
class FakePair:
    """Both ends of one device, in memory."""

    source_shim: FakeSourceShim = field(default_factory=lambda: FakeSourceShim(DEVICE))
    spoil: bool = False

    async def source(self, *, late_at: str = "", late_times: int = 0, spoil: bool = False) -> SourceShim:
        self.source_shim = FakeSourceShim(DEVICE, late_at, late_times)
        self.spoil = spoil
        return self.source_shim

    async def destination(self) -> DestinationShim:
        return FakeDestinationShim(DEVICE, spoil=self.spoil)

    async def source_of_a_later_agent(self) -> SourceShim:
        return self.source_shim

    async def end(self) -> None:
        pass


@dataclass
class CompanionPair:
    """Both ends of one device, each in a process of its own."""

    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ds-")))
    processes: list[DeviceProcess] = field(default_factory=list[DeviceProcess])
    scenario: str = ""

    def spec(self, inc: str) -> DevicesSpec:
        device = DeviceSpec(DEVICE, ShimKind.COMPANION, dirty_bytes_per_s=1_000_000, options=options_of(self.scenario))
        return DevicesSpec("guest-1", inc, self.directory, (device,), 77, PROGRAM)

    async def source(self, *, late_at: str = "", late_times: int = 0, spoil: bool = False) -> SourceShim:
        asks = f"asks: [{{at: {late_at}, times: {late_times}, bytes: 8192}}]\n" if late_at else ""
        self.scenario = asks + ("faults: [{call: validate}]\n" if spoil else "")
        self.processes.append(await DeviceProcess.start(self.spec("s"), incoming=False))
        return self.processes[-1].source_shims()[0]

    async def destination(self) -> DestinationShim:
        inc = f"d{len(self.processes)}"
        self.processes.append(await DeviceProcess.start(self.spec(inc), incoming=True))
        return self.processes[-1].destination_shims()[0]

    async def source_of_a_later_agent(self) -> SourceShim:
        await self.processes[0].detach()
        adopted = await DeviceProcess.adopt(self.processes[0].spec)
        assert adopted is not None
        self.processes[0] = adopted
        return adopted.source_shims()[0]

    async def end(self) -> None:
        for process in self.processes:
            await process.destroy()
        shutil.rmtree(self.directory)


@dataclass
class ExternalPair:
    """Both ends of one device, held by a program of each host that serves all of its guests (the lab's example)."""

    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="de-")))
    options: dict[str, str] = field(default_factory=dict[str, str])
    incs: int = 0
    held: list[ExternalDevices] = field(default_factory=list[ExternalDevices])
    programs: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])

    def _devices(self, inc: str) -> ExternalDevices:
        end = "source" if inc == "s" else "destination"
        spec = DeviceSpec(DEVICE, ShimKind.EXTERNAL, driver="flows", options=self.options)
        self.held.append(ExternalDevices("guest-1", inc, (spec,), {"flows": self.directory / end}))
        return self.held[-1]

    async def _program(self, end: str) -> None:
        path = self.directory / end
        if not path.exists():
            command = [sys.executable, "-m", "deploy.lab.devices.flow_table", "--socket", str(path)]
            self.programs.append(await asyncio.to_thread(subprocess.Popen, command))

    async def source(self, *, late_at: str = "", late_times: int = 0, spoil: bool = False) -> SourceShim:
        self.options = {"asks_again_at": late_at, "asks_again": str(late_times)} if late_at else {}
        self.options |= {"refuses": "validate"} if spoil else {}
        await self._program("source")
        devices = self._devices("s")
        await devices.attach(incoming=False)
        return devices.source_shims()[DEVICE]

    async def destination(self) -> DestinationShim:
        self.incs += 1
        await self._program("destination")
        devices = self._devices(f"d{self.incs}")
        await devices.attach(incoming=True)
        return devices.destination_shims()[DEVICE]

    async def source_of_a_later_agent(self) -> SourceShim:
        await self.held[0].detach()
        return self._devices("s").source_shims()[DEVICE]

    async def end(self) -> None:
        for devices in self.held:
            await devices.destroy()
        for program in self.programs:
            program.kill()
            await asyncio.to_thread(program.wait)
        shutil.rmtree(self.directory)


Pair = FakePair | CompanionPair | ExternalPair
PAIRS: dict[str, type[FakePair] | type[CompanionPair] | type[ExternalPair]] = {
    "fake": FakePair,
    "companion": CompanionPair,
    "external": ExternalPair,
}


@pytest.fixture(params=list(PAIRS))
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    made: Pair = PAIRS[request.param]()
    try:
        yield made
    finally:
        await made.end()


@dataclass
class Course:
    """One attempt's way from source to destination: what was asked for, acknowledged and sent."""

    source: SourceShim
    destination: DestinationShim | None
    session: int = 1
    requests: list[AckRequest] = field(default_factory=list[AckRequest])
    acks: list[AckRequest] = field(default_factory=list[AckRequest])
    frames: list[Frame] = field(default_factory=list[Frame])
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def begin(self) -> None:
        self.gate.set()
        if self.destination is not None:
            await self.destination.begin_load(self.session)
        await self.source.begin(self.session, self.requests.append)

    async def send(self, frame: Frame) -> None:
        await self.gate.wait()
        self.frames.append(frame)
        if self.destination is not None and (ack := await self.destination.load(frame)) is not None:
            self.acks.append(ack)

    @contextlib.asynccontextmanager
    async def precopy(self) -> AsyncGenerator[None, None]:
        running = asyncio.create_task(self.source.run_precopy(self.send))
        try:
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not holds():  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    async def stop(self) -> AckRequest | None:
        newest = (await self.source.quiesce()).newest
        await self.source.stop_copy()
        return newest

    async def send_the_rest(self) -> None:
        async for frame in self.source.stop_copy_frames():
            await self.send(frame)

    async def to_loaded(self) -> Load:
        """The whole way, from a fresh attempt to LOADED."""
        assert self.destination is not None
        await self.begin()
        async with self.precopy():
            await self.until(lambda: self.acks)
        await self.stop()
        await self.send_the_rest()
        return await self.destination.validate()


async def refused(call: Awaitable[object]) -> None:
    with pytest.raises(ShimError):
        await call


async def test_clean_way_and_the_end_says_what_was_sent(pair: Pair) -> None:
    course = Course(await pair.source(), await pair.destination())
    loaded = await course.to_loaded()
    assert [kind for kind in (frame.kind for frame in course.frames) if kind is FrameKind.END] == [FrameKind.END]
    end, data = course.frames[-1], b"".join(frame.data for frame in course.frames)
    assert (end.kind, end.total_bytes, end.digest) == (
        FrameKind.END,
        len(data),
        blake2b(data, digest_size=16).digest(),
    )
    assert loaded == Load(DEVICE, 1, end.total_bytes, end.digest)
    assert course.destination is not None
    assert await course.destination.validate() == loaded, "idempotent"
    await course.destination.activate()
    await course.destination.activate()
    await course.source.retire()
    await course.source.retire()
    await refused(course.source.roll_back())
    await refused(course.destination.begin_load(2))


async def test_frames_carry_device_and_session_and_initial_data_goes_before_its_marker(pair: Pair) -> None:
    course = Course(await pair.source(), await pair.destination(), session=7)
    await course.to_loaded()
    assert {(frame.device, frame.session) for frame in course.frames} == {(DEVICE, 7)}
    marker = next(n for n, frame in enumerate(course.frames) if frame.kind is FrameKind.INITIAL_SENT)
    assert any(frame.data for frame in course.frames[:marker])
    assert [frame.generation for frame in course.frames if frame.kind is FrameKind.INITIAL_SENT] == [1]


async def test_the_first_request_is_reported_by_begin_and_acknowledged_once_loaded(pair: Pair) -> None:
    course = Course(await pair.source(), await pair.destination())
    await course.begin()
    assert course.requests == [AckRequest(DEVICE, 1)]
    assert course.acks == []
    async with course.precopy():
        await course.until(lambda: course.acks)
    assert course.acks == [AckRequest(DEVICE, 1)]


async def test_generations_go_on_over_sessions(pair: Pair) -> None:
    source = await pair.source()
    for session in (1, 2, 3):
        course = Course(source, None, session)
        await course.begin()
        assert course.requests == [AckRequest(DEVICE, session)]
        assert await course.stop() == AckRequest(DEVICE, session)
        await source.roll_back()


async def test_begin_again_is_the_same_session(pair: Pair) -> None:
    course = Course(await pair.source(), None)
    await course.begin()
    await course.source.begin(1, course.requests.append)
    assert {entry.generation for entry in course.requests} == {1}


@pytest.mark.parametrize("hook", ["precopy", "gate_open", "freeze"])
async def test_a_late_request_is_reported_before_its_hook_returns_and_is_in_the_final_query(
    pair: Pair, hook: str
) -> None:
    course = Course(await pair.source(late_at=hook, late_times=2), None)
    await course.begin()
    await course.source.hook("after_check")
    assert course.requests == [AckRequest(DEVICE, 1)]
    await course.source.hook(hook)
    assert course.requests == [AckRequest(DEVICE, 1), AckRequest(DEVICE, 2)]
    assert await course.stop() == AckRequest(DEVICE, 2)


async def test_a_request_after_the_final_query_is_reported_as_well(pair: Pair) -> None:
    course = Course(await pair.source(late_at="final_query", late_times=1), None)
    await course.begin()
    assert (await course.source.quiesce()).newest == AckRequest(DEVICE, 1)
    await course.source.hook("final_query")
    assert course.requests[-1] == AckRequest(DEVICE, 2)
    await course.source.stop_copy()


async def test_late_requests_happen_as_often_as_scripted_over_all_sessions(pair: Pair) -> None:
    source = await pair.source(late_at="freeze", late_times=2)
    asked: list[int] = []
    for session in range(1, 5):
        course = Course(source, None, session)
        await course.begin()
        await source.hook("freeze")
        asked.append(len(course.requests))
        await source.roll_back()
    assert asked == [2, 2, 1, 1]


async def test_a_new_request_in_precopy_gets_an_ack_of_its_own(pair: Pair) -> None:
    course = Course(await pair.source(late_at="gate_open", late_times=1), await pair.destination())
    await course.begin()
    async with course.precopy():
        await course.until(lambda: course.acks)
        await course.source.hook("gate_open")
        await course.until(lambda: len(course.acks) == 2)
    assert course.acks == [AckRequest(DEVICE, 1), AckRequest(DEVICE, 2)]


async def test_requests_after_the_check_are_served_in_stop_copy(pair: Pair) -> None:
    course = Course(await pair.source(late_at="after_check", late_times=1), await pair.destination())
    await course.begin()
    await course.stop()
    await course.source.hook("after_check")
    await course.send_the_rest()
    assert course.destination is not None
    assert (await course.destination.validate()).bytes == course.frames[-1].total_bytes


async def test_back_pressure_and_cancels_lose_nothing(pair: Pair) -> None:
    course = Course(await pair.source(late_at="gate_open", late_times=5), await pair.destination())
    await course.begin()
    for wait_s in (0.0, 0.001, 0.003, 0.01, 0.03):
        async with course.precopy():
            await course.source.hook("gate_open")
            course.gate.clear()
            await asyncio.sleep(wait_s)
            asyncio.get_running_loop().call_later(0.02, course.gate.set)
        course.gate.set()
    await course.stop()
    await course.send_the_rest()
    assert course.destination is not None
    assert (await course.destination.validate()).bytes == sum(len(frame.data) for frame in course.frames)


async def test_precopy_ends_by_itself_once_the_device_is_quiesced(pair: Pair) -> None:
    course = Course(await pair.source(), None)
    await refused(course.source.run_precopy(course.send))
    await course.begin()
    running = asyncio.create_task(course.source.run_precopy(course.send))
    await course.until(lambda: course.frames)
    await course.source.quiesce()
    async with asyncio.timeout(20):
        await running


async def test_nothing_was_sent_in_precopy_and_everything_arrives_in_stop_copy(pair: Pair) -> None:
    course = Course(await pair.source(), await pair.destination())
    await course.begin()
    await course.stop()
    await course.send_the_rest()
    assert course.destination is not None
    await course.destination.validate()


async def test_a_guest_that_was_paused_need_not_have_begun(pair: Pair) -> None:
    course = Course(await pair.source(), await pair.destination(), session=0)
    assert course.destination is not None
    await course.destination.begin_load(0)
    course.gate.set()
    assert await course.stop() is None
    await course.send_the_rest()
    await course.destination.validate()


async def test_calls_repeated_in_the_blackout_change_nothing(pair: Pair) -> None:
    course = Course(await pair.source(), await pair.destination())
    await course.begin()
    first = await course.source.quiesce()
    assert await course.source.quiesce() == first
    await course.source.stop_copy()
    await course.source.stop_copy()
    assert await course.source.quiesce() == first
    await course.send_the_rest()


async def test_calls_out_of_order_are_refused(pair: Pair) -> None:
    course = Course(await pair.source(), await pair.destination())
    assert course.destination is not None
    await refused(course.destination.validate())
    await refused(course.destination.activate())
    await course.begin()
    await refused(course.source.stop_copy())
    await refused(anext(aiter(course.source.stop_copy_frames())))
    await refused(course.destination.validate())
    await course.stop()
    await refused(course.source.begin(2, course.requests.append))


@pytest.mark.parametrize("stage", ["begun", "sending", "quiesced", "stopped", "sent"])
async def test_roll_back_from_anywhere_and_the_next_attempt_succeeds(pair: Pair, stage: str) -> None:
    source = await pair.source()
    course = Course(source, await pair.destination())
    await course.begin()
    if stage == "sending":
        async with course.precopy():
            await course.until(lambda: course.acks)
    if stage in ("quiesced", "stopped", "sent"):
        await source.quiesce()
    if stage in ("stopped", "sent"):
        await source.stop_copy()
    if stage == "sent":
        await course.send_the_rest()
    await source.roll_back()
    await source.roll_back()
    assert course.destination is not None
    await course.destination.discard()
    again = Course(source, await pair.destination(), session=2)
    await again.to_loaded()


@pytest.mark.parametrize("stage", ["begun", "stopped"])
async def test_roll_back_by_an_agent_that_never_saw_the_session_begin(pair: Pair, stage: str) -> None:
    course = Course(await pair.source(), await pair.destination())
    await course.begin()
    if stage == "stopped":
        await course.stop()
    later = await pair.source_of_a_later_agent()
    await later.roll_back()
    again = Course(later, course.destination, session=1)
    await again.to_loaded()


async def test_segmentation_does_not_matter(pair: Pair) -> None:
    course = Course(await pair.source(), None)
    await course.begin()
    async with course.precopy():
        await course.until(lambda: any(frame.kind is FrameKind.INITIAL_SENT for frame in course.frames))
    await course.stop()
    await course.send_the_rest()
    destination = await pair.destination()
    await destination.begin_load(1)
    data = b"".join(frame.data for frame in course.frames)
    for start in range(0, 2000, 7):
        await destination.load(Frame(DEVICE, 1, FrameKind.PRECOPY, data=data[:2000][start : start + 7]))
    await destination.load(Frame(DEVICE, 1, FrameKind.STOP_COPY, data=data[2000:]))
    await destination.load(course.frames[-1])
    assert (await destination.validate()).bytes == len(data)


@pytest.mark.parametrize("lost", ["first", "last", "end", "swapped", "other_end"])
async def test_state_that_did_not_arrive_whole_is_never_loaded(pair: Pair, lost: str) -> None:
    course = Course(await pair.source(), None)
    await course.begin()
    await course.stop()
    await course.send_the_rest()
    *pieces, end = course.frames
    if lost in ("first", "last"):
        at = 0 if lost == "first" else -1
        cut = pieces[at].data[1:] if lost == "first" else pieces[at].data[:-1]
        pieces[at] = replace(pieces[at], data=cut)
    if lost == "swapped":
        data = pieces[-1].data
        pieces[-1] = replace(pieces[-1], data=data[:-2] + data[-1:] + data[-2:-1])
    if lost == "other_end":
        end = replace(end, digest=blake2b(b"other", digest_size=16).digest())
    destination = await pair.destination()
    await destination.begin_load(1)
    with contextlib.suppress(ShimError):
        for frame in pieces if lost == "end" else [*pieces, end]:
            await destination.load(frame)
    await refused(destination.validate())
    await refused(destination.activate())


async def test_a_spoiled_byte_is_found_by_validation_and_the_next_attempt_is_sound(pair: Pair) -> None:
    source = await pair.source(spoil=True)
    first = Course(source, await pair.destination())
    with pytest.raises(ShimError):
        await first.to_loaded()
    assert first.destination is not None
    await refused(first.destination.activate())
    await source.roll_back()


async def test_frames_of_another_session_are_dropped(pair: Pair) -> None:
    course = Course(await pair.source(), await pair.destination(), session=2)
    await course.begin()
    assert course.destination is not None
    assert await course.destination.load(Frame(DEVICE, 1, FrameKind.PRECOPY, data=b"stale")) is None
    assert await course.destination.load(Frame(DEVICE, 1, FrameKind.INITIAL_SENT, 1)) is None
    await course.stop()
    await course.send_the_rest()
    await course.destination.validate()


async def test_begin_load_forgets_what_an_earlier_attempt_left(pair: Pair) -> None:
    source, destination = await pair.source(), await pair.destination()
    first = Course(source, destination)
    await first.begin()
    async with first.precopy():
        await first.until(lambda: first.acks)
    await source.roll_back()
    await Course(source, destination, session=2).to_loaded()


async def test_discard_ends_a_load_at_any_time(pair: Pair) -> None:
    course = Course(await pair.source(), await pair.destination())
    await course.to_loaded()
    assert course.destination is not None
    await course.destination.discard()
    await course.destination.discard()
    await refused(course.destination.activate())
    await course.source.roll_back()
