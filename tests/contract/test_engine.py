"""What every engine promises (agents/engine/base.py), run against the fake and against real QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.engine.base import (
    EngineError,
    EngineEvent,
    EngineStatus,
    GuestEnded,
    GuestHasEnded,
    HoldStart,
    ImageNotFound,
    OutgoingOptions,
    RunState,
    RunStateChanged,
    Vmm,
    VmmDied,
    VmmSpec,
    VmmState,
    stream_of,
)
from agents.engine.boot_images import Images
from agents.engine.qemu import process
from agents.engine.qemu.engine import QemuEngine
from agents.engine.qemu.vmm import QemuVmm
from deploy.lab.workload import Workload, boot_of
from orchestrator.core.liveness import Liveness
from orchestrator.core.records import Boot, GuestSpec
from tests.fakes.engine import FakeEngine, FakeVmm

ROOT = Path(__file__).parents[2]
LINK = 1 << 30
no_qemu = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no QEMU")


def image() -> Path:
    found = Path(os.environ.get("DROVER_GUEST_IMAGE", str(ROOT / "build" / "guest.elf")))
    if found.is_file():
        return found
    build = ROOT / "deploy" / "lab" / "guest_image" / "build.sh"
    if not build.is_file():
        pytest.skip("no guest image: run make")
    found.parent.mkdir(exist_ok=True)
    subprocess.run(["sh", str(build), str(found)], check=True, capture_output=True)
    return found


class Pair:
    """A running guest and how to make destinations for it; everything is destroyed at the end."""

    def __init__(self, engine: QemuEngine | FakeEngine, directory: Path) -> None:
        self.engine = engine
        self.directory = directory
        self.vmms: list[Vmm] = []

    listen = "127.0.0.1"

    def spec(self, inc: str, memory_mib: int = 64, static_mib: int = 0) -> VmmSpec:
        workload = Workload(dirty_mib=1, dirty_pages_per_s=100, static_mib=static_mib)
        guest = GuestSpec(name="g", memory_mib=memory_mib, boot=boot_of(workload, seed=0))
        return VmmSpec("guest-1", inc, guest, self.directory, self.directory / f"{inc}.con", None, self.listen)

    async def source(self, **sizes: int) -> Vmm:
        vmm = await self.engine.start(self.spec("s", **sizes))
        self.vmms.append(vmm)
        return vmm

    async def destination(self, inc: str = "d", **sizes: int) -> Vmm:
        vmm = await self.engine.prepare_incoming(self.spec(inc, **sizes), "m", 1)
        self.vmms.append(vmm)
        return vmm

    async def parked(self) -> tuple[Vmm, Vmm]:
        source, destination = await self.source(), await self.destination()
        await source.start_outgoing(options(destination))
        await until(source, lambda s: s.status is EngineStatus.PARKED)
        return source, destination


def options(destination: Vmm, hold: HoldStart = HoldStart.OPEN, tail: int = 0) -> OutgoingOptions:
    return OutgoingOptions(stream_of(destination.metadata), hold, tail, LINK, 300)


async def until(vmm: Vmm, holds: Callable[[VmmState], bool], timeout_s: float = 30.0) -> VmmState:
    async with asyncio.timeout(timeout_s):
        while not holds(now := await vmm.state()):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        return now


def kill(vmm: Vmm) -> None:
    if isinstance(vmm, FakeVmm):
        vmm.die()
    else:
        os.kill(vmm.metadata.pid, signal.SIGKILL)


async def power_off(pair: Pair, vmm: Vmm) -> None:
    """As its own operating system does."""
    if isinstance(vmm, FakeVmm):
        vmm.end_guest("shutdown")
        return
    reader, writer = await asyncio.open_unix_connection(pair.directory / f"{vmm.metadata.inc}.con")
    await reader.readline()  # it is up
    writer.write(b"p")
    await writer.drain()
    writer.close()


def freeze(pair: Pair, vmm: Vmm) -> None:
    if isinstance(pair.engine, FakeEngine):
        pair.engine.script.keep_in_device = True
    else:
        os.kill(vmm.metadata.pid, signal.SIGSTOP)


@pytest.fixture(params=["fake", pytest.param("qemu", marks=[pytest.mark.qemu, no_qemu])])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    directory = Path(tempfile.mkdtemp(prefix="de-"))
    made = Pair(FakeEngine() if request.param == "fake" else QemuEngine(image()), directory)
    try:
        yield made
    finally:
        for vmm in made.vmms:
            await vmm.destroy()
        shutil.rmtree(directory)


async def test_an_image_that_is_not_here_is_refused_before_anything_is_started(pair: Pair) -> None:
    spec = pair.spec("s")
    spec = replace(spec, spec=replace(spec.spec, boot=Boot(kernel="vmlinuz-9")))
    with pytest.raises(ImageNotFound):
        await pair.engine.start(spec)
    with pytest.raises(ImageNotFound):
        await pair.engine.prepare_incoming(spec, "m", 1)
    assert list(pair.directory.iterdir()) == []


async def test_clean_hand_over(pair: Pair) -> None:
    source, destination = await pair.parked()
    assert (await source.state()).run_state is RunState.FINISHING
    began = time.monotonic()
    await source.proceed()
    sealed = await until(source, lambda s: s.status is EngineStatus.COMPLETED)
    print(f"proceed -> completed {(time.monotonic() - began) * 1e3:.1f} ms")
    sealed = await until(source, lambda s: s.run_state is RunState.SEALED)
    assert sealed.status is EngineStatus.COMPLETED
    loaded = await until(destination, lambda s: s.run_state is RunState.PAUSED)
    assert loaded.status is EngineStatus.COMPLETED
    await destination.resume()
    assert (await destination.state()).run_state is RunState.RUNNING


@pytest.mark.parametrize("start", [HoldStart.TRICKLE, HoldStart.TAIL])
async def test_hold_keeps_the_guest_running_until_release(pair: Pair, start: HoldStart) -> None:
    sizes: dict[str, Any] = {"memory_mib": 64} if start is HoldStart.TRICKLE else {"memory_mib": 256, "static_mib": 160}
    source, destination = await pair.source(**sizes), await pair.destination(**sizes)
    await asyncio.sleep(0.3)
    await source.start_outgoing(options(destination, start, 100 << 20))
    await asyncio.sleep(1.0)
    assert await source.state() == VmmState(RunState.RUNNING, EngineStatus.ACTIVE)
    await source.release()
    await until(source, lambda s: s.status is EngineStatus.PARKED)


async def test_abort_in_active_leaves_the_guest_running(pair: Pair) -> None:
    source, destination = await pair.source(), await pair.destination()
    await source.start_outgoing(options(destination, HoldStart.TRICKLE))
    assert await source.abort() == VmmState(RunState.RUNNING, EngineStatus.CANCELLED, (await source.state()).error)


async def test_abort_when_parked_lets_the_guest_run_again(pair: Pair) -> None:
    source, _ = await pair.parked()
    seen: list[EngineEvent] = []
    source.subscribe(seen.append)
    began = time.time()
    after = await source.abort()
    print(f"abort from parked {(time.time() - began) * 1e3:.1f} ms, RESUME after", end=" ")
    resumes = [event for event in seen if isinstance(event, RunStateChanged)]
    print([f"{(event.at_s - began) * 1e3:.1f} ms" for event in resumes])
    assert (after.run_state, after.status) == (RunState.RUNNING, EngineStatus.CANCELLED)
    assert [event.running for event in resumes] == [True]


async def test_abort_after_proceed_with_a_frozen_destination(pair: Pair) -> None:
    source, destination = await pair.parked()
    freeze(pair, destination)
    await source.proceed()
    await asyncio.sleep(0.05)
    after = await source.abort()
    assert (after.run_state, after.status) == (RunState.RUNNING, EngineStatus.CANCELLED)


async def test_abort_of_a_sealed_source_says_so_and_resume_brings_it_back(pair: Pair) -> None:
    source, destination = await pair.parked()
    await source.proceed()
    await until(source, lambda s: s.run_state is RunState.SEALED)
    after = await source.abort()
    assert (after.run_state, after.status) == (RunState.SEALED, EngineStatus.COMPLETED)
    await destination.destroy()
    await source.resume()
    assert (await source.state()).run_state is RunState.RUNNING


async def test_destination_lost_while_parked_fails_and_the_guest_runs(pair: Pair) -> None:
    source, destination = await pair.parked()
    await destination.destroy()
    await source.proceed()
    after = await until(source, lambda s: s.status is EngineStatus.FAILED and s.run_state is RunState.RUNNING)
    assert after.error


async def test_paused_guest_arrives_paused_and_an_abort_leaves_it_paused(pair: Pair) -> None:
    source = await pair.source()
    await source.pause()
    first = await pair.destination("d1")
    await source.start_outgoing(options(first))
    await until(source, lambda s: s.status is EngineStatus.PARKED)
    assert (await source.abort()).run_state is RunState.PAUSED
    second = await pair.destination("d2")
    await source.start_outgoing(options(second))
    await until(source, lambda s: s.status is EngineStatus.PARKED)
    await source.proceed()
    await until(second, lambda s: s.run_state is RunState.PAUSED)


async def test_adopt_after_detach_and_not_a_recycled_pid(pair: Pair) -> None:
    source = await pair.source()
    metadata = source.metadata
    await source.detach()
    assert await pair.engine.adopt(replace(metadata, start_time=metadata.start_time + 1), pair.spec("s")) is None
    adopted = await pair.engine.adopt(metadata, pair.spec("s"))
    assert adopted is not None
    pair.vmms[:] = [adopted]
    assert (await adopted.state()).run_state is RunState.RUNNING


async def test_a_guest_that_ended_before_its_stop_arrives_ended(pair: Pair) -> None:
    """And the destination tells that from a guest that cannot be started just now."""
    source, destination = await pair.source(), await pair.destination()
    await power_off(pair, source)
    await until(source, lambda now: now.run_state is RunState.ENDED)
    await source.start_outgoing(options(destination))
    await until(source, lambda now: now.status is EngineStatus.PARKED)
    await source.proceed()
    await until(destination, lambda now: now.status is EngineStatus.COMPLETED)
    assert (await until(destination, lambda now: now.run_state is not RunState.INCOMING)).run_state is RunState.ENDED
    with pytest.raises(GuestHasEnded):
        await destination.resume()


async def test_a_guest_that_shuts_down_says_so_and_never_runs_again(pair: Pair) -> None:
    source = await pair.source()
    told: list[EngineEvent] = []
    source.subscribe(told.append)
    await power_off(pair, source)
    await until(source, lambda now: now.run_state is RunState.ENDED)
    assert any(isinstance(event, GuestEnded) for event in told)
    with pytest.raises(GuestHasEnded):
        await source.resume()
    assert (await source.state()).run_state is RunState.ENDED


async def test_death_is_told_and_destroy_is_idempotent(pair: Pair) -> None:
    source = await pair.source()
    seen: list[EngineEvent] = []
    source.subscribe(seen.append)
    kill(source)
    async with asyncio.timeout(20):
        while VmmDied() not in seen:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert source.liveness() is Liveness.GONE
    await source.destroy()
    await source.destroy()


async def test_memory_mismatch_is_explained_by_the_destination(pair: Pair) -> None:
    source, destination = await pair.source(), await pair.destination(memory_mib=96)
    await source.start_outgoing(options(destination))
    assert (await until(destination, lambda s: s.status is EngineStatus.FAILED)).error


async def test_unknown_machine_is_refused_with_the_words_of_the_vmm(pair: Pair) -> None:
    spec = pair.spec("x")
    with pytest.raises(EngineError, match="nonsense"):
        await pair.engine.start(replace(spec, spec=replace(spec.spec, machine="nonsense")))


@no_qemu
async def test_a_guest_that_runs_again_has_its_downtime_limit_again(tmp_path: Path) -> None:
    pair = Pair(QemuEngine(image=image()), tmp_path)
    source, destination = await pair.source(), await pair.destination()
    assert isinstance(source, QemuVmm)

    async def limit_ms() -> int:
        return (await source._execute("query-migrate-parameters"))["downtime-limit"]

    try:
        await source.start_outgoing(options(destination, HoldStart.TRICKLE))
        await source.pause()
        assert await limit_ms() == 1, "held, whatever stands still"
        await source.release()
        assert await limit_ms() == 2_000_000
        await source.hold()
        await source.resume()
        await source.release()
        assert await limit_ms() == options(destination).downtime_limit_ms
    finally:
        await asyncio.gather(*(vmm.destroy() for vmm in pair.vmms))


def vmms_of(directory: Path) -> list[int]:
    """Processes that name this directory on their command line."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(directory) in entry.read_bytes():
                found.append(int(entry.parent.name))
    return found


@no_qemu
async def test_a_vmm_that_cannot_be_noted_down_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full: its successor would not know of it, and the guest would be said not to have started."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    pair = Pair(QemuEngine(image=image()), tmp_path)
    command = process.command_line(process.Launch("qemu", Images(image()), "tcg", True), pair.spec("s"), incoming=False)
    assert "-S" in command, "and before it is noted down it does not run"
    monkeypatch.setattr(process, "write_metadata", full)
    with pytest.raises(EngineError, match="No space left"):
        await pair.source()
    assert vmms_of(tmp_path) == []


@no_qemu
async def test_a_caller_that_is_cut_off_leaves_no_vmm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even while the process is being made, in a thread that nothing stops."""
    popen = process.popen

    def slow(*words: Any, **how: Any) -> subprocess.Popen[bytes]:
        time.sleep(0.2)
        return popen(*words, **how)

    pair = Pair(QemuEngine(image=image()), tmp_path)
    await pair.engine.probe()
    monkeypatch.setattr(process, "popen", slow)
    starting = asyncio.create_task(pair.source())
    await asyncio.sleep(0.05)
    starting.cancel()
    assert isinstance((await asyncio.gather(starting, return_exceptions=True))[0], asyncio.CancelledError)
    await asyncio.sleep(0.3)
    assert vmms_of(tmp_path) == []


_KILLED_BEFORE_THE_NOTE = """
import asyncio, os, pathlib, signal, sys
from agents.engine.base import VmmSpec
from agents.engine.qemu import process
from agents.engine.qemu.engine import QemuEngine
from orchestrator.core.records import GuestSpec
directory = pathlib.Path(sys.argv[1])
process.write_metadata = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
spec = VmmSpec("guest-1", "s", GuestSpec("g"), directory, directory / "s.con", None, "127.0.0.1")
asyncio.run(QemuEngine(pathlib.Path(sys.argv[2])).start(spec))
"""


@no_qemu
def test_a_vmm_whose_agent_was_killed_before_it_noted_it_down_does_not_stay(tmp_path: Path) -> None:
    """Nobody would find it: it would hold its guest's images for ever."""
    command = [sys.executable, "-c", _KILLED_BEFORE_THE_NOTE, str(tmp_path), str(image())]
    killed = subprocess.run(command, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    until_s = time.monotonic() + 20
    while left := vmms_of(tmp_path):
        assert time.monotonic() < until_s, left
        time.sleep(0.05)


@no_qemu
async def test_a_vmm_whose_agent_was_killed_before_it_set_it_going_is_found_standing(tmp_path: Path) -> None:
    """Noted down already: the next agent finds it, and its keeper sets it going."""
    engine = QemuEngine(image=image())
    spec = Pair(engine, tmp_path).spec("s")
    left = await engine._spawn(spec, "owner", "", 0)
    await left.connect()
    await left.detach()
    found = await engine.adopt(left.metadata, spec)
    assert found is not None
    try:
        assert (await found.state()).run_state is RunState.PAUSED
        await found.resume()
        assert (await found.state()).run_state is RunState.RUNNING
    finally:
        await found.destroy()


@no_qemu
async def test_an_agent_killed_while_it_destroys_a_vmm_leaves_a_note_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(QemuEngine(image=image()), tmp_path)
    vmm = await pair.source()
    removed: list[str] = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **how: (removed.append(path.name), unlink(path, **how)))
    await vmm.destroy()
    assert removed[-1] == "s.json"
    assert "s.con" in removed


@no_qemu
@pytest.mark.parametrize(("ends_early", "answers"), [(1, True), (9, False)])
async def test_a_probe_that_qemu_does_not_survive_is_made_once_more(
    tmp_path: Path, ends_early: int, answers: bool
) -> None:
    binary, count = tmp_path / "qemu", tmp_path / "count"
    count.touch()
    binary.write_text(f"""#!/bin/sh
echo >> {count}
[ $(wc -l < {count}) -gt {ends_early} ] || {{ echo out of luck >&2; exit 3; }}
exec qemu-system-x86_64 "$@"
""")
    binary.chmod(0o755)
    engine = QemuEngine(image=tmp_path / "none", binary=str(binary))
    if answers:
        assert (await engine.probe())["switchover_ack"] in ("legacy", "per-device")
    else:
        with pytest.raises(EngineError, match="out of luck"):
            await engine.probe()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "[::1]"])
async def test_a_stream_goes_over_either_kind_of_address(pair: Pair, address: str) -> None:
    pair.listen = address
    source, destination = await pair.parked()
    assert stream_of(destination.metadata).ip == address.strip("[]")
    await source.proceed()
    await until(source, lambda s: s.status is EngineStatus.COMPLETED)


async def test_without_a_destination_nothing_is_sent(pair: Pair) -> None:
    source = await pair.source()
    with pytest.raises(EngineError, match="no destination"):
        await source.start_outgoing(OutgoingOptions(None, HoldStart.OPEN, 0, LINK, 300))
    assert (await source.state()).run_state is RunState.RUNNING
