"""Companion devices in their process: with a real guest that checks every answer, and with agents that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from agents.engine.base import EngineStatus, HoldStart, OutgoingOptions, RunState, Vmm, VmmSpec, stream_of
from agents.engine.qemu.engine import QemuEngine
from agents.shims.base import DestinationShim, Frame, FrameKind, OptionsRefused, Refusal, ShimError, SourceShim
from agents.shims.client import BLACKOUT_S
from agents.shims.companion import DeviceProcess, DevicesSpec
from deploy.lab.devices import PROGRAM
from deploy.lab.devices.device import hash32
from deploy.lab.devices.scenario_text import late_ack, options_of
from deploy.lab.workload import Workload, boot_of
from orchestrator.core.ids import AckRequest
from orchestrator.core.liveness import Liveness
from orchestrator.core.records import DeviceSpec, GuestSpec, ShimKind
from tests.contract.test_engine import image, no_qemu, until

SEED = 0xC0FFEE11


def device(name: str = "dpu", scenario: str = "", dirty_bytes_per_s: int = 0) -> DeviceSpec:
    return DeviceSpec(name, ShimKind.COMPANION, options=options_of(scenario), dirty_bytes_per_s=dirty_bytes_per_s)


@dataclass
class Lab:
    """Device processes (and VMMs) in one directory; all of them are ended with the test."""

    directory: Path
    processes: list[DeviceProcess] = field(default_factory=list[DeviceProcess])
    vmms: list[Vmm] = field(default_factory=list[Vmm])

    def spec(self, inc: str, *devices: DeviceSpec) -> DevicesSpec:
        return DevicesSpec("guest-1", inc, self.directory, devices or (device(),), SEED, PROGRAM)

    async def start(self, inc: str, *devices: DeviceSpec, incoming: bool = False) -> DeviceProcess:
        made = await DeviceProcess.start(self.spec(inc, *devices), incoming=incoming)
        self.processes.append(made)
        return made

    async def end(self) -> None:
        for vmm in self.vmms:
            await vmm.destroy()
        for process in self.processes:
            await process.destroy()
        shutil.rmtree(self.directory, ignore_errors=True)


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    made = Lab(Path(tempfile.mkdtemp(prefix="dc-")))
    try:
        yield made
    finally:
        await made.end()


async def wait_for(holds: Callable[[], object], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# --- a real guest -----------------------------------------------------------------------------------------------------


class Console:
    """A guest's first serial port: its newest heartbeat."""

    def __init__(self) -> None:
        self.rings = self.device_errors = self.retries = self.page_errors = 0
        self.complaints: list[str] = []
        self._task: asyncio.Task[None] | None = None

    async def connect(self, path: Path) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        self._task = asyncio.create_task(self._read(reader, writer))

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while line := await reader.readline():
                words = line.decode().split()
                if words and words[0] == "H" and len(words) == 7:
                    self.page_errors, self.rings, self.device_errors, self.retries = (int(w, 16) for w in words[3:])
                elif words and words[0] in "DE":
                    self.complaints.append(line.decode().strip())


class Guest:
    """A guest with devices under real QEMU, and how it is moved to the next VMM with its devices' states."""

    def __init__(self, lab: Lab, *devices: DeviceSpec) -> None:
        self.lab = lab
        self.engine = QemuEngine(image())
        workload = Workload(dirty_mib=1, dirty_pages_per_s=100, doorbell_hz=50)
        self.spec = GuestSpec("g", memory_mib=32, boot=boot_of(workload, devices, seed=SEED), devices=devices)

    def vmm_spec(self, process: DeviceProcess) -> VmmSpec:
        inc = process.spec.inc
        return VmmSpec(
            "guest-1",
            inc,
            self.spec,
            self.lab.directory,
            self.lab.directory / f"{inc}.con",
            process.com_path,
            "127.0.0.1",
        )

    async def born(self) -> tuple[DeviceProcess, Vmm, Console]:
        process = await self.lab.start("s", *self.spec.devices)
        vmm = await self.engine.start(self.vmm_spec(process))
        self.lab.vmms.append(vmm)
        console = Console()
        await console.connect(self.lab.directory / "s.con")
        return process, vmm, console

    async def awaited(self, inc: str) -> tuple[DeviceProcess, Vmm, Console]:
        process = await self.lab.start(inc, *self.spec.devices, incoming=True)
        vmm = await self.engine.prepare_incoming(self.vmm_spec(process), "m", 1)
        self.lab.vmms.append(vmm)
        console = Console()
        await console.connect(self.lab.directory / f"{inc}.con")
        return process, vmm, console

    async def park(self, source: Vmm, destination: Vmm) -> None:
        await source.start_outgoing(OutgoingOptions(stream_of(destination.metadata), HoldStart.OPEN, 0, 1 << 30, 300))
        await until(source, lambda now: now.status is EngineStatus.PARKED)

    async def seal(self, source: Vmm, destination: Vmm) -> None:
        await source.proceed()
        await until(source, lambda now: now.run_state is RunState.SEALED)
        await until(destination, lambda now: now.run_state is RunState.PAUSED)


async def saved(shim: SourceShim, session: int) -> list[Frame]:
    """Take the state of a device whose guest is stopped."""
    await shim.quiesce()
    await shim.stop_copy()
    return [frame async for frame in shim.stop_copy_frames()]


async def loaded(shim: DestinationShim, session: int, frames: Sequence[Frame]) -> None:
    for frame in frames:
        await shim.load(frame)
    await shim.validate()
    await shim.activate()


@pytest.mark.qemu
@no_qemu
@pytest.mark.parametrize("stale", [False, True], ids=["sound", "stale"])
async def test_a_guest_finds_its_devices_as_it_left_them_or_says_so(lab: Lab, stale: bool) -> None:
    guest = Guest(lab, device("dpu", dirty_bytes_per_s=500_000), device("vgpu"))
    devices, vmm, console = await guest.born()
    await wait_for(lambda: console.rings > 20)
    sources = devices.source_shims()

    # An attempt that is rolled back: the guest runs on with its devices, and what was taken is old from now on.
    first_devices, first_vmm, _ = await guest.awaited("d1")
    old: list[list[Frame]] = []
    sent: list[list[Frame]] = [[], []]
    acks: list[AckRequest] = []
    for shim, copy, frames in zip(sources, first_devices.destination_shims(), sent, strict=True):
        await copy.begin_load(1)
        await shim.begin(1, acks.append)

        async def send(frame: Frame, frames: list[Frame] = frames) -> None:
            frames.append(frame)

        running = asyncio.create_task(shim.run_precopy(send))
        await wait_for(lambda frames=frames: any(frame.kind is FrameKind.INITIAL_SENT for frame in frames))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    await guest.park(vmm, first_vmm)
    for shim, frames in zip(sources, sent, strict=True):
        old.append([*frames, *await saved(shim, 1)])
    await asyncio.gather(*(shim.roll_back() for shim in sources))
    await vmm.abort()
    answered = console.rings
    await wait_for(lambda: console.rings > answered + 20)
    assert (console.device_errors, console.page_errors, console.complaints) == (0, 0, [])

    second_devices, second_vmm, second_console = await guest.awaited("d2")
    copies = second_devices.destination_shims()
    for shim, copy in zip(sources, copies, strict=True):
        await copy.begin_load(1 if stale else 2)
        await shim.begin(2, acks.append)
    await guest.park(vmm, second_vmm)
    fresh = [await saved(shim, 2) for shim in sources]
    await guest.seal(vmm, second_vmm)
    for copy, frames in zip(copies, old if stale else fresh, strict=True):
        await loaded(copy, 1 if stale else 2, frames)
    rings = console.rings
    await second_vmm.resume()
    # A doorbell that was on its way is rung again after 2 s, hence both devices have answered after so many.
    await wait_for(lambda: second_console.rings > rings + 150)
    expected = 2 if stale else 0  # the guest takes over a wrong answer, so each device is found out once
    assert (second_console.device_errors, second_console.page_errors) == (expected, 0), second_console.complaints


# --- doorbells --------------------------------------------------------------------------------------------------------


class Port:
    """Rings doorbells as the guest does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, process: DeviceProcess) -> Port:
        return cls(*await asyncio.open_unix_connection(process.com_path))

    def say(self, text: str) -> None:
        self._writer.write(text.encode())

    def ring(self, index: int, n: int) -> None:
        self.say(f"R {index:x} {n:08x}\n")

    async def answer(self, timeout_s: float = 2.0) -> str:
        async with asyncio.timeout(timeout_s):
            return (await self._reader.readline()).decode()

    async def silent(self, for_s: float = 0.1) -> bool:
        try:
            said = await self.answer(for_s)
        except TimeoutError:
            return True
        return not said


def first_word(index: int) -> int:
    return hash32((0xD0000000 + index) ^ SEED)


async def test_a_device_answers_as_the_guest_expects_and_twice_the_same(lab: Lab) -> None:
    port = await Port.connect(await lab.start("s", device("a"), device("b")))
    words = [first_word(0), first_word(1)]
    for n in (1, 2, 3):
        for index in (0, 1):
            words[index] = hash32(words[index] ^ n)
            for _ in range(2):
                port.ring(index, n)
                assert await port.answer() == f"A {index} {n:08x} {words[index]:08x}\n"


async def test_torn_lines_and_doorbells_of_nobody_are_dropped(lab: Lab) -> None:
    port = await Port.connect(await lab.start("s"))
    port.say("R 0 0000R 7 00000001\nx\nR 0 zz\n\nA 0 1 2\nR 0 0000\n R 0 00000001\n")
    assert (await port.answer()).startswith("A 0 00000000")
    assert (await port.answer()).startswith("A 0 00000001")
    assert await port.silent()


async def test_a_stopped_device_is_silent_and_answers_once_after_the_way_back(lab: Lab) -> None:
    process = await lab.start("s")
    port, shim = await Port.connect(process), process.source_shims()[0]
    await shim.begin(1, lambda entry: None)
    port.ring(0, 1)
    assert await port.answer()
    await shim.quiesce()
    await shim.stop_copy()
    port.ring(0, 2)
    port.ring(0, 2)
    assert await port.silent()
    await shim.roll_back()
    assert (await port.answer()).startswith("A 0 00000002")
    assert await port.silent()


async def test_a_retired_device_and_one_that_is_not_activated_never_speak(lab: Lab) -> None:
    source, destination = await lab.start("s"), await lab.start("d", incoming=True)
    ports = [await Port.connect(source), await Port.connect(destination)]
    shim, copy = source.source_shims()[0], destination.destination_shims()[0]
    await copy.begin_load(1)
    await shim.begin(1, lambda entry: None)
    for frame in await saved(shim, 1):
        await copy.load(frame)
    await copy.validate()
    await shim.retire()
    for port in ports:
        port.ring(0, 1)
    assert [await port.silent() for port in ports] == [True, True]
    await copy.activate()
    assert await ports[1].answer() == f"A 0 00000001 {hash32(first_word(0) ^ 1):08x}\n"
    assert await ports[0].silent()


async def test_a_vmm_that_connects_anew_takes_the_port_over(lab: Lab) -> None:
    process = await lab.start("s")
    first = await Port.connect(process)
    first.ring(0, 1)
    assert await first.answer()
    second = await Port.connect(process)
    second.ring(0, 1)
    assert (await second.answer()).startswith("A 0 00000001")
    assert await first.silent()


# --- agents that come and go ------------------------------------------------------------------------------------------


async def test_adopt_finds_the_process_and_only_that(lab: Lab) -> None:
    process = await lab.start("s")
    assert await DeviceProcess.adopt(lab.spec("other")) is None
    with pytest.raises(ShimError, match="adopt"):
        await DeviceProcess.start(process.spec, incoming=False)
    await process.detach()
    adopted = await DeviceProcess.adopt(process.spec)
    assert adopted is not None
    lab.processes[:] = [adopted]
    assert adopted.liveness() is Liveness.ALIVE
    metadata = process.spec.path("devices.json")
    metadata.write_text(metadata.read_text().replace('"start_time": ', '"start_time": 1'))
    assert await DeviceProcess.adopt(process.spec) is None


async def test_destroy_removes_everything_and_is_idempotent(lab: Lab) -> None:
    process = await lab.start("s")
    await process.destroy()
    await process.destroy()
    assert process.liveness() is Liveness.GONE
    assert list(lab.directory.iterdir()) == []
    assert await DeviceProcess.adopt(process.spec) is None


async def test_a_process_that_hangs_is_destroyed_all_the_same(lab: Lab) -> None:
    process = await lab.start("s")
    os.kill(process.pid, signal.SIGSTOP)
    began = time.monotonic()
    await process.destroy()
    assert process.liveness() is Liveness.GONE
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("vanishes", ["directory", "metadata"])
async def test_it_ends_by_itself_when_it_cannot_be_found_any_more(lab: Lab, vanishes: str) -> None:
    process = await lab.start("s")
    if vanishes == "directory":
        shutil.rmtree(lab.directory)
    else:
        process.spec.path("devices.json").unlink()
    await wait_for(lambda: process.liveness() is Liveness.GONE)


async def test_calls_fail_at_once_when_the_process_is_gone(lab: Lab) -> None:
    process = await lab.start("s")
    shim = process.source_shims()[0]
    await shim.begin(1, lambda entry: None)
    os.kill(process.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(ShimError, match="gone"):
        await shim.quiesce()
    assert time.monotonic() - began < BLACKOUT_S


async def test_calls_are_bounded_when_the_process_hangs(lab: Lab) -> None:
    process = await lab.start("s")
    shim = process.source_shims()[0]
    await shim.begin(1, lambda entry: None)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(ShimError, match="not answered in 2 s"):
        await shim.quiesce()
    os.kill(process.pid, signal.SIGCONT)


async def test_a_bad_description_is_explained_and_nothing_is_left(lab: Lab) -> None:
    with pytest.raises(OptionsRefused, match=r"device dpu: scenario.asks\[0\].at: must be one of precopy"):
        await lab.start("s", device(scenario="asks: [{at: teatime}]"))
    wrong = replace(device("vgpu", scenario="lacks: [p2p]"), options={"colour": "red", "scenario": "lacks: [p2p]"})
    with pytest.raises(OptionsRefused) as caught:
        await lab.start("s", device(), wrong)
    assert [(one.device, one.option) for one in caught.value.wrong] == [("vgpu", "colour"), ("vgpu", "scenario.lacks")]
    long = DevicesSpec("guest-1", "s", lab.directory / ("x" * 100), (device(),), SEED, PROGRAM)
    with pytest.raises(ShimError, match="shorter"):
        await DeviceProcess.start(long, incoming=False)
    assert list(lab.directory.iterdir()) == []


async def test_a_session_is_begun_anew_by_whoever_did_not_begin_it(lab: Lab) -> None:
    source, destination = await lab.start("s"), await lab.start("d", incoming=True)
    forgotten: list[Frame] = []

    async def forget(frame: Frame) -> None:
        forgotten.append(frame)

    first = source.source_shims()[0]
    await first.begin(1, lambda entry: None)
    running = asyncio.create_task(first.run_precopy(forget))
    await wait_for(lambda: forgotten)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    requests, acks = await attempt(source, destination, 1)
    assert requests == acks == [AckRequest("dpu", 2)]


async def test_a_broken_connection_loses_neither_calls_nor_requests(lab: Lab) -> None:
    """Another socket stands between agent and device, and breaks after so many bytes, again and again."""
    process = await lab.start("s", device(scenario="asks: [{at: gate_open, times: always}]"))
    budget = [700]

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(real)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            left = budget[0]
            budget[0] += 13
            while left > 0 and (data := await source.read(min(left, 300))):
                left -= len(data)
                sink.write(data)
            for end in (writer, inner_writer):
                end.close()

        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer), return_exceptions=True)

    real = lab.directory / "real"
    path = process.spec.path("ctl")
    path.rename(real)
    breaking = await asyncio.start_unix_server(relay, path)
    try:
        await process.detach()
        adopted = await DeviceProcess.adopt(process.spec)
        assert adopted is not None
        lab.processes[:] = [adopted]
        shim = adopted.source_shims()[0]
        requests: list[AckRequest] = []
        await shim.begin(1, requests.append)
        for _ in range(40):
            await shim.hook("gate_open")
        query = await shim.quiesce()
        assert query.newest == AckRequest("dpu", 41), "each hook happened once"
        assert requests[-1] == AckRequest("dpu", 41)
    finally:
        breaking.close()
        path.unlink(missing_ok=True)
        real.rename(path)


# --- scenarios on the real path ---------------------------------------------------------------------------------------


async def attempt(
    source: DeviceProcess, destination: DeviceProcess, session: int, hooks: Sequence[str] = ()
) -> tuple[list[AckRequest], list[AckRequest]]:
    """Take the device all the way, or raise ShimError where it fails. Returns requests and ACKs."""
    shim, copy = source.source_shims()[0], destination.destination_shims()[0]
    requests: list[AckRequest] = []
    acks: list[AckRequest] = []

    async def send(frame: Frame) -> None:
        if (ack := await copy.load(frame)) is not None:
            acks.append(ack)

    await copy.begin_load(session)
    await shim.begin(session, requests.append)
    running = asyncio.create_task(shim.run_precopy(send))
    try:
        await asyncio.wait({running}, timeout=0.15)
        if running.done():
            running.result()
        if "freeze" in hooks:
            await shim.hook("freeze")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    await shim.quiesce()
    await shim.stop_copy()
    async for frame in shim.stop_copy_frames():
        await send(frame)
    await copy.validate()
    if "after_commit" in hooks:
        await shim.hook("after_commit")
    await copy.activate()
    await shim.retire()
    return requests, acks


@pytest.mark.parametrize(
    ("call", "where"),
    [
        ("quiesce", "source"),
        ("last_look", "source"),
        ("stop_copy", "source"),
        ("load", "both"),
        ("validate", "both"),
    ],
)
async def test_a_scripted_failure_happens_once_and_the_next_attempt_succeeds(lab: Lab, call: str, where: str) -> None:
    wrong = device(scenario=f"faults: [{{call: {call}}}]")
    source = await lab.start("s", wrong)
    with pytest.raises(ShimError):
        await attempt(source, await lab.start("d1", wrong, incoming=True), 1)
    await source.source_shims()[0].roll_back()
    await attempt(source, await lab.start("d2", wrong, incoming=True), 2)


async def test_a_device_that_is_slow_over_the_last_look_is_quiesced_by_then(lab: Lab) -> None:
    source = await lab.start("s", device(scenario="delays: [{call: last_look, ms: 300, times: 1}]"))
    shim = source.source_shims()[0]
    await shim.begin(1, lambda entry: None)
    asking = asyncio.create_task(shim.quiesce())

    state = ""
    async with asyncio.timeout(20):
        while state != "PRE_COPY_P2P":
            assert not asking.done(), "it answered before it was quiesced"
            (told,) = (await source._client.describe_all()).devices
            state = told.state
    await asking
    await shim.roll_back()


async def test_a_failing_activation_is_retried_in_place(lab: Lab) -> None:
    wrong = device(scenario="faults: [{call: activate, times: 2}]")
    source, destination = await lab.start("s", wrong), await lab.start("d", wrong, incoming=True)
    with pytest.raises(ShimError, match="activate"):
        await attempt(source, destination, 1)
    with pytest.raises(ShimError, match="activate"):
        await destination.destination_shims()[0].activate()
    await destination.destination_shims()[0].activate()


async def test_a_device_that_never_acknowledges(lab: Lab) -> None:
    mute = device(scenario="faults: [{call: ack}]")
    source = await lab.start("s", mute)
    requests, acks = await attempt(source, await lab.start("d", mute, incoming=True), 1)
    assert (len(requests), acks) == (1, [])


async def test_a_way_back_that_needs_a_reset_says_so_to_every_agent_and_loses_the_state(lab: Lab) -> None:
    source = await lab.start("s", device(scenario="faults: [{call: roll_back}]"))
    port, shim = await Port.connect(source), source.source_shims()[0]
    port.ring(0, 1)
    assert await port.answer()
    await shim.begin(1, lambda entry: None)
    await shim.quiesce()
    await shim.stop_copy()
    for teller in (shim, source.source_shims()[0]):
        with pytest.raises(ShimError) as caught:
            await teller.roll_back()
        assert caught.value.reset
    port.ring(0, 2)
    assert await port.answer() == f"A 0 00000002 {hash32(first_word(0) ^ 2):08x}\n", "as if the first never was"
    await shim.begin(2, lambda entry: None)
    await shim.roll_back()


async def test_delays_are_kept_and_a_slow_call_that_is_overtaken_does_no_harm(lab: Lab) -> None:
    slow = device(scenario="delays: [{call: load, ms: 300, times: 1}, {call: stop_copy, ms: 400, times: 1}]")
    source, destination = await lab.start("s", slow), await lab.start("d", slow, incoming=True)
    shim, copy = source.source_shims()[0], destination.destination_shims()[0]
    acks: list[float] = []

    async def send(frame: Frame) -> None:
        if await copy.load(frame) is not None:
            acks.append(time.monotonic())

    await copy.begin_load(1)
    await shim.begin(1, lambda entry: None)
    began = time.monotonic()
    running = asyncio.create_task(shim.run_precopy(send))
    await wait_for(lambda: acks)
    assert 0.25 < acks[0] - began < 1.5
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await shim.quiesce()
    stopping = asyncio.create_task(shim.stop_copy())
    await asyncio.sleep(0.05)
    await shim.roll_back()
    with pytest.raises(ShimError, match="overtaken"):
        await stopping
    port = await Port.connect(source)
    port.ring(0, 1)
    assert await port.answer(), "the device runs"


async def test_what_a_scenario_used_up_goes_with_the_device(lab: Lab) -> None:
    scripted = device(scenario="asks: [{at: freeze, times: 2}, {at: after_commit, times: 1}, {after_ms: 20, times: 1}]")
    hosts = [await lab.start(f"h{n}", scripted, incoming=n > 0) for n in range(4)]
    counts: list[int] = []
    for n in range(3):
        requests, _ = await attempt(hosts[n], hosts[n + 1], n + 1, ("freeze", "after_commit"))
        counts.append(len(requests))
    # First, timed, freeze, after commit; then first and freeze; then nothing but the first.
    assert counts == [4, 2, 1]


async def test_an_injected_request_happens_as_scripted_and_travels_too(lab: Lab) -> None:
    first, second, third = [await lab.start(f"h{n}", incoming=n > 0) for n in range(3)]
    told = await first.instruct("dpu", late_ack("freeze", 2, 4096))
    assert told == "asks:\n- {at: freeze, bytes: 4096, times: 2}\n"
    requests, _ = await attempt(first, second, 1, ("freeze",))
    assert [entry.generation for entry in requests] == [1, 2]
    told = await second.instruct("dpu", late_ack("after_check"))
    assert told == "asks:\n- {at: freeze, bytes: 4096, times: 2}\n- {at: after_check}\n"
    requests, _ = await attempt(second, third, 1, ("freeze",))
    assert [entry.generation for entry in requests] == [3, 4]


@pytest.mark.parametrize(
    ("name", "instruction", "refusal", "says"),
    [
        ("nic", late_ack("freeze"), None, "nic"),
        ("dpu", late_ack("teatime"), Refusal.WRONG, "one of precopy"),
        ("dpu", late_ack("freeze", 0), Refusal.WRONG, "between 1"),
        ("dpu", late_ack("freeze", 1, -1), Refusal.WRONG, "between 0"),
        ("dpu", "reset yourself", Refusal.WRONG, "must be a mapping"),
        ("dpu", "faults: [{call: quiesce}]", Refusal.WRONG, "one ask and nothing else"),
        ("dpu", "asks: [{at: freeze}, {at: precopy}]", Refusal.WRONG, "one ask and nothing else"),
    ],
)
async def test_instructions_that_make_no_sense_are_refused(
    lab: Lab, name: str, instruction: str, refusal: Refusal | None, says: str
) -> None:
    process = await lab.start("s", device(scenario="asks: [{at: precopy}]"))
    with pytest.raises(ShimError, match=says) as caught:
        await process.instruct(name, instruction)
    assert caught.value.refusal is refusal
    told = await process.instruct("dpu", late_ack("freeze"))
    assert told == "asks:\n- {at: precopy}\n- {at: freeze}\n", "a refused instruction left something behind"


async def test_a_device_that_is_not_the_guests_takes_no_instruction_now(lab: Lab) -> None:
    process = await lab.start("d", incoming=True)
    with pytest.raises(ShimError, match="not the guest's device yet") as caught:
        await process.instruct("dpu", late_ack("freeze"))
    assert caught.value.refusal is Refusal.UNWILLING


# --- figures ----------------------------------------------------------------------------------------------------------


async def test_calls_of_the_blackout_take_about_a_millisecond(lab: Lab) -> None:
    """Printed (-s): they are on the guest's way back after a late ACK. The bound is ten times what was measured."""
    shim = (await lab.start("s")).source_shims()[0]
    took: dict[str, list[float]] = {"quiesce": [], "stop_copy": [], "roll_back": []}
    for session in range(1, 101):
        await shim.begin(session, lambda entry: None)
        for call in (shim.quiesce, shim.stop_copy, shim.roll_back):
            began = time.perf_counter()
            await call()
            took[call.__name__].append((time.perf_counter() - began) * 1e3)
    for name, times in took.items():
        print(f"{name}: p50 {statistics.median(times):.2f} ms, p95 {statistics.quantiles(times, n=20)[18]:.2f} ms")
        assert statistics.median(times) < 10


def rss_mib(process: DeviceProcess, what: str) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{what}:"))) >> 10


async def test_much_state_moves_fast_and_leaves_no_copies_behind(lab: Lab) -> None:
    """Printed (-s): throughput through both processes and this one, memory of an idle and of a large device."""
    small = await lab.start("small")
    big = device(scenario=f"initial_bytes: {64 << 20}\nstop_copy_bytes: {1 << 20}")
    source, destination = await lab.start("s", big), await lab.start("d", big, incoming=True)
    shim, copy = source.source_shims()[0], destination.destination_shims()[0]
    acked = asyncio.Event()

    async def send(frame: Frame) -> None:
        if await copy.load(frame) is not None:
            acked.set()

    await copy.begin_load(1)
    await shim.begin(1, lambda entry: None)
    began = time.perf_counter()
    running = asyncio.create_task(shim.run_precopy(send))
    async with asyncio.timeout(30):
        await acked.wait()
    took = time.perf_counter() - began
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    began = time.perf_counter()
    for frame in await saved(shim, 1):
        await copy.load(frame)
    await copy.validate()
    rest_ms = (time.perf_counter() - began) * 1e3
    peaks = [rss_mib(one, "VmHWM") for one in (small, source, destination)]
    print(f"64 MiB in {took:.2f} s, 1 MiB of stop-copy until validated {rest_ms:.1f} ms, peaks {peaks} MiB")
    assert peaks[0] < 60
    assert max(peaks[1:]) < peaks[0] + 65 + 64


async def test_a_device_process_starts_fast(lab: Lab) -> None:
    took: list[float] = []
    for number in range(8):
        began = time.perf_counter()
        await lab.start(f"s{number}")
        took.append((time.perf_counter() - began) * 1e3)
    print(f"start to first answer: p50 {statistics.median(took):.0f} ms, worst {max(took):.0f} ms")
    assert statistics.median(took) < 1500
