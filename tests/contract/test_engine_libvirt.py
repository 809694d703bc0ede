"""What every engine promises (agents/engine/base.py), on two daemons of libvirt, and what is libvirt's own.

Late ACKs, a guest that is stopped on purpose, the death of a daemon around COMMIT: never two copies that run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agents.engine.base import (
    DiskFile,
    DiskLocked,
    EngineError,
    EngineEvent,
    EngineStatus,
    HoldStart,
    ImageNotFound,
    OutgoingOptions,
    RunState,
    RunStateChanged,
    Tap,
    Vmm,
    VmmDied,
    VmmMetadata,
    VmmSpec,
    VmmState,
    stream_of,
)
from agents.engine.libvirt import notes
from agents.engine.libvirt.engine import LibvirtEngine, LibvirtVmm
from deploy.lab.libvirt_hosts import Host, NoLibvirt, load_binding, tree
from deploy.lab.workload import Workload, boot_of
from orchestrator.core.liveness import Liveness
from orchestrator.core.records import (
    Boot,
    DiskCache,
    DiskFormat,
    DiskSpec,
    GuestSpec,
    LiveDevice,
    LiveMachine,
    NicSpec,
    PoolKind,
)
from tests.contract.test_engine import image

ROOT = Path(__file__).parents[2]
UUID = "5f1c0000-0000-4000-8000-0000000000{:02d}"
LINK = 1 << 30
MAC = "52:54:00:00:00:0a"
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no QEMU"),
]


all_of_it = pytest.mark.skipif(not os.environ.get("DROVER_LONG"), reason="`make libvirt` runs it: DROVER_LONG=1")
"""Every other case starts two VMMs through libvirt, which takes seconds each: `make test` has those that decide."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    directory = Path(tempfile.mkdtemp(prefix="lv-"))
    made: list[Host] = []
    try:
        try:
            found = tree(ROOT / "build" / "libvirt")
            load_binding(found)
            for number in (1, 2):
                made.append(Host(found, directory / str(number), number))
                made[-1].start()
        except NoLibvirt as error:
            pytest.skip(f"no libvirt: {error}")
        yield made[0], made[1]
    finally:
        for host in made:
            host.kill()
        shutil.rmtree(directory, ignore_errors=True)


def start_spec(uuid: str, inc: str, directory: Path) -> VmmSpec:
    workload = Workload(dirty_mib=1, dirty_pages_per_s=100)
    guest = GuestSpec(name=f"g-{uuid[-2:]}", memory_mib=64, boot=boot_of(workload, seed=0))
    return VmmSpec(uuid, inc, guest, directory, directory / f"{inc}.con", None, "127.0.0.1")


class Pair:
    """A guest at one host and its copy at the other; everything is destroyed at the end."""

    def __init__(self, hosts: tuple[Host, Host], directory: Path, number: int) -> None:
        self.hosts = hosts
        self.here, self.there = (LibvirtEngine(image(), host.socket) for host in hosts)
        self.directory = directory
        self.uuid = UUID.format(number)
        self.disk: DiskFile | None = None
        self.taps: dict[str, str] = {}
        self.vmms: list[LibvirtVmm] = []
        self.events: list[EngineEvent] = []

    def spec(self, inc: str) -> VmmSpec:
        spec = start_spec(self.uuid, inc, self.directory)
        if self.disk is not None:
            guest = replace(spec.spec, disks=(DiskSpec("root", "shared", "root.qcow2"),))
            spec = replace(spec, spec=guest, disks=(self.disk,))
        if inc in self.taps:
            card = LiveDevice("nic-lan", "virtio-net-pci", properties={"mac": MAC}, backend="nic:lan")
            machine = LiveMachine("pc", "qemu64", 64, 1, devices=(card,))
            guest = replace(spec.spec, nics=(NicSpec("lan", "prod"),))
            spec = replace(spec, spec=guest, machine=machine, taps=(Tap("lan", self.taps[inc]),))
        return spec

    def with_card(self, *incs: str) -> None:
        """Taps as the agent makes them, one for each copy."""
        for inc in incs:
            self.taps[inc] = f"lv{os.getpid() % 100_000}{inc}"
            subprocess.run(["ip", "tuntap", "add", "dev", self.taps[inc], "mode", "tap"], check=True)
            subprocess.run(["ip", "link", "set", self.taps[inc], "up"], check=True)

    def carries(self, inc: str) -> bool:
        """A VMM has the tap of that copy open."""
        return (Path("/sys/class/net") / self.taps[inc] / "carrier").read_text().strip() == "1"

    def without_cards(self) -> None:
        for tap in self.taps.values():
            subprocess.run(["ip", "link", "del", tap], check=True)

    @property
    def image(self) -> Path:
        """Of the one disk, which both hosts see: by another path at each, as they may."""
        return self.directory / "root.qcow2"

    def with_disk(self) -> None:
        run = subprocess.run(["qemu-img", "create", "-f", "qcow2", self.image, "16M"], capture_output=True, check=False)
        assert run.returncode == 0, run.stderr
        self.disk = DiskFile("root", self.image, DiskFormat.QCOW2, DiskCache.NONE, False, PoolKind.SHARED_FILE)

    def refused(self) -> str:
        """What QEMU says to a second writer who opens the image now; empty: nothing, he can."""
        tried = subprocess.run(["qemu-io", "-c", "read 0 512", self.image], capture_output=True, text=True, check=False)
        return tried.stderr.strip()

    async def source(self) -> LibvirtVmm:
        vmm = await self.here.start(self.spec("5e"))
        self.vmms.append(vmm)
        vmm.subscribe(self.events.append)
        return vmm

    async def destination(self, inc: str = "de") -> LibvirtVmm:
        vmm = await self.there.prepare_incoming(self.spec(inc), "m", 1)
        self.vmms.append(vmm)
        return vmm

    async def parked(self) -> tuple[LibvirtVmm, LibvirtVmm]:
        source, destination = await self.source(), await self.destination()
        await source.start_outgoing(options(destination))
        await until(source, lambda s: s.status is EngineStatus.PARKED)
        await until(destination, lambda s: s.status is EngineStatus.COMPLETED)
        return source, destination

    async def sealed(self) -> tuple[LibvirtVmm, LibvirtVmm]:
        source, destination = await self.parked()
        await source.proceed()
        return source, destination

    async def leave(self, vmm: LibvirtVmm) -> None:
        """Its agent dies."""
        await vmm.detach()
        self.vmms.remove(vmm)

    async def adopted(self, engine: LibvirtEngine, inc: str) -> LibvirtVmm | None:
        """As a later agent finds it."""
        metadata = VmmMetadata(**json.loads(notes.note_path(self.spec(inc)).read_bytes()))
        vmm = await engine.adopt(metadata, self.spec(inc))
        if vmm is not None:
            self.vmms.append(vmm)
        return vmm


def options(destination: Vmm, hold: HoldStart = HoldStart.OPEN) -> OutgoingOptions:
    return OutgoingOptions(stream_of(destination.metadata), hold, 0, LINK, 300, copy=destination.metadata.inc)


async def until(vmm: Vmm, holds: Callable[[VmmState], bool], timeout_s: float = 60.0) -> VmmState:
    """A daemon that was just restarted may be asked through a connection that has not been found dead yet."""
    now: VmmState | EngineError | None = None
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    now = await vmm.state(10.0)
                    if holds(now):
                        return now
                except EngineError as error:
                    now = error
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"it stays {now}") from None


async def gone(vmm: Vmm, timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while vmm.liveness() is not Liveness.GONE:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def beats(pair: Pair, inc: str) -> bool:
    """The guest itself says that it runs: its console has two lines that differ."""
    reader, writer = await asyncio.open_unix_connection(pair.directory / f"{inc}.con")
    try:
        async with asyncio.timeout(60):
            return await reader.readline() != await reader.readline()
    finally:
        writer.close()


_NUMBER = iter(range(1, 99))


@pytest.fixture
async def pair(hosts: tuple[Host, Host]) -> AsyncIterator[Pair]:
    directory = Path(tempfile.mkdtemp(prefix="le-"))
    made = Pair(hosts, directory, next(_NUMBER))
    try:
        yield made
    finally:
        for vmm in made.vmms:
            await vmm.destroy()
        made.without_cards()  # each is still there: nobody but who made a tap removes it
        shutil.rmtree(directory)


async def test_what_it_cannot_do_is_said(pair: Pair) -> None:
    known = await pair.here.probe()
    assert known["version"]
    assert "pc" in known["machine_types"].split(",")
    assert known["machine_aliases"].startswith("pc=pc-") or ",pc=pc-" in known["machine_aliases"]
    assert "no check before the last pass" in known["limits"]
    assert "abort" in known["limits"]


async def test_an_image_that_is_not_here_is_refused_before_anything_is_started(pair: Pair) -> None:
    spec = pair.spec("5e")
    spec = replace(spec, spec=replace(spec.spec, boot=Boot(kernel="vmlinuz-9")))
    with pytest.raises(ImageNotFound):
        await pair.here.start(spec)
    with pytest.raises(ImageNotFound):
        await pair.there.prepare_incoming(spec, "m", 1)
    assert not list(pair.directory.iterdir())


async def test_a_guest_moves_and_never_runs_twice(pair: Pair) -> None:
    source = await pair.source()
    assert (await source.state()).run_state is RunState.RUNNING
    assert source.liveness() is Liveness.ALIVE
    assert await beats(pair, "5e")
    destination = await pair.destination()
    heard: list[EngineEvent] = []
    destination.subscribe(heard.append)
    await source.start_outgoing(options(destination))
    await until(source, lambda s: s.status is EngineStatus.PARKED)
    await until(destination, lambda s: s.status is EngineStatus.COMPLETED)
    assert (await source.state()).run_state is RunState.FINISHING
    with pytest.raises(EngineError):
        await source.resume()
    await source.proceed()
    # Here the COMMIT is written: both stand, and neither can start by itself.
    assert await source.state() == VmmState(RunState.SEALED, EngineStatus.COMPLETED)
    assert (await destination.state()).run_state is RunState.PAUSED
    await destination.take_over()
    await destination.take_over()
    assert (await destination.state()).run_state is RunState.PAUSED
    assert (await source.state()).run_state is RunState.SEALED
    await destination.resume()
    await destination.promote()
    assert (await destination.state()).run_state is RunState.RUNNING
    assert (await source.state()).run_state is RunState.SEALED
    assert await beats(pair, "de")
    await source.destroy()
    assert source.liveness() is Liveness.GONE
    assert destination.liveness() is Liveness.ALIVE
    assert (await destination.state()).run_state is RunState.RUNNING
    assert any(isinstance(event, RunStateChanged) and event.running for event in heard)
    assert any(isinstance(event, RunStateChanged) and not event.running for event in pair.events)


async def test_a_late_ack_costs_the_copy_and_never_the_guest(pair: Pair) -> None:
    """The check stands behind the last pass here: the way back is taken from a guest that libvirt has sealed."""
    source, destination = await pair.parked()
    state = await source.abort()
    assert state.run_state is RunState.RUNNING
    assert state.status is EngineStatus.CANCELLED
    assert await beats(pair, "5e")
    await until(destination, lambda s: s.status is EngineStatus.FAILED)
    await destination.destroy()
    assert destination.liveness() is Liveness.GONE
    again = await pair.destination("df")
    await source.start_outgoing(options(again))
    await until(source, lambda s: s.status is EngineStatus.PARKED)
    await until(again, lambda s: s.status is EngineStatus.COMPLETED)
    await source.proceed()
    await again.take_over()
    await again.resume()
    assert await beats(pair, "df")


async def test_the_image_s_lock_goes_with_the_right_to_run(pair: Pair) -> None:
    """Through Perform, COMMIT and Finish. Nobody has it from the last pass until Finish, which this libvirt makes take
    it: behind COMMIT. From there on not even a mistaken resume starts the source."""
    pair.with_disk()
    source, destination = await pair.source(), await pair.destination()
    assert "lock" in pair.refused(), "the source's guest has its disk to itself"
    await source.start_outgoing(options(destination))
    await until(source, lambda s: s.status is EngineStatus.PARKED)
    await until(destination, lambda s: s.status is EngineStatus.COMPLETED)
    await source.proceed()
    assert pair.refused() == "", "the source has let go, and a copy that is loaded takes nothing before COMMIT"
    await destination.take_over()
    assert (await destination.state()).run_state is RunState.PAUSED
    assert "lock" in pair.refused()
    with pytest.raises(DiskLocked):
        await source.resume()
    assert (await source.state()).run_state is not RunState.RUNNING
    await destination.resume()
    assert await beats(pair, "de")
    await source.destroy()
    assert "lock" in pair.refused(), "the end of the source takes nothing from the guest"
    await destination.destroy()
    assert pair.refused() == ""


@all_of_it
async def test_a_copy_that_is_ended_before_it_ran_gives_the_image_back(pair: Pair) -> None:
    """It stood on its own already, and its marker could not be written: ownership goes back."""
    pair.with_disk()
    source, destination = await pair.sealed()
    await destination.take_over()
    await destination.destroy()
    assert pair.refused() == ""
    await source.resume()
    assert "lock" in pair.refused()
    assert await beats(pair, "5e")


@all_of_it
async def test_a_late_ack_gives_the_image_back_to_the_source(pair: Pair) -> None:
    pair.with_disk()
    source, destination = await pair.parked()
    assert pair.refused() == ""
    assert (await source.abort()).run_state is RunState.RUNNING
    assert "lock" in pair.refused()
    assert await beats(pair, "5e")
    await until(destination, lambda s: s.status is EngineStatus.FAILED)
    await destination.destroy()
    assert "lock" in pair.refused(), "the end of the copy takes nothing from the guest"
    again = await pair.destination("df")
    await source.start_outgoing(options(again))
    await until(source, lambda s: s.status is EngineStatus.PARKED)
    await until(again, lambda s: s.status is EngineStatus.COMPLETED)
    await source.proceed()
    await again.take_over()
    await again.resume()
    assert await beats(pair, "df")


@all_of_it
async def test_a_copy_whose_image_is_locked_stands_until_it_is_free(pair: Pair) -> None:
    pair.with_disk()
    source, destination = await pair.sealed()
    async with second_writer(pair.image):
        await destination.take_over()
        with pytest.raises(DiskLocked):
            await destination.resume()
        assert (await destination.state()).run_state is RunState.PAUSED
        assert (await source.state()).run_state is RunState.SEALED
    await destination.resume()
    assert await beats(pair, "de")


@all_of_it
async def test_a_guest_whose_image_is_locked_is_not_started(pair: Pair) -> None:
    pair.with_disk()
    async with second_writer(pair.image):
        with pytest.raises(DiskLocked):
            await pair.source()
        assert {path.name for path in pair.directory.iterdir()} == {"root.qcow2"}
    await pair.source()
    assert await beats(pair, "5e")


async def test_a_card_s_frames_go_through_the_tap_of_its_host(pair: Pair) -> None:
    pair.with_card("5e", "de")
    source, destination = await pair.source(), await pair.destination()
    assert (pair.carries("5e"), pair.carries("de")) == (True, False)
    await source.start_outgoing(options(destination))
    await until(source, lambda s: s.status is EngineStatus.PARKED)
    await until(destination, lambda s: s.status is EngineStatus.COMPLETED)
    assert pair.carries("de"), "libvirt has opened the destination's own tap"
    await source.proceed()
    await destination.take_over()
    await destination.resume()
    assert await beats(pair, "de")
    await source.destroy()
    assert (pair.carries("5e"), pair.carries("de")) == (False, True)


@all_of_it
async def test_a_card_stays_at_the_source_after_an_abort(pair: Pair) -> None:
    pair.with_card("5e", "de")
    source, destination = await pair.parked()
    assert (await source.abort()).run_state is RunState.RUNNING
    assert await beats(pair, "5e")
    await destination.destroy()
    assert (pair.carries("5e"), pair.carries("de")) == (True, False)


@contextlib.asynccontextmanager
async def second_writer(image: Path) -> AsyncIterator[None]:
    """Has the image open until the end, as another VMM would."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec("qemu-io", image, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(b"read 0 512\n")
        async with asyncio.timeout(30):
            while b"read 512/512" not in (line := await process.stdout.readline()):
                assert line, "the image could not be opened"
        yield
    finally:
        process.stdin.close()
        await process.wait()


@all_of_it
async def test_a_sealed_guest_runs_again_once_that_is_decided(pair: Pair) -> None:
    source, destination = await pair.sealed()
    assert (await source.abort()).run_state is RunState.SEALED, "a COMMIT may be under way: nothing starts by itself"
    await destination.destroy()
    await source.resume()
    assert (await source.state()).run_state is RunState.RUNNING
    assert await beats(pair, "5e")


@all_of_it
async def test_a_closed_gate_holds_before_any_memory_is_copied(pair: Pair) -> None:
    source, destination = await pair.source(), await pair.destination()
    await source.start_outgoing(options(destination, HoldStart.TRICKLE))
    await until(destination, lambda s: s.status is EngineStatus.ACTIVE)
    assert (await source.state()) == VmmState(RunState.RUNNING, EngineStatus.ACTIVE)
    assert await beats(pair, "5e")
    await source.release()
    await until(source, lambda s: s.status is EngineStatus.PARKED)


@all_of_it
async def test_an_attempt_with_a_closed_gate_ends_without_a_stop(pair: Pair) -> None:
    source, destination = await pair.source(), await pair.destination()
    await source.start_outgoing(options(destination, HoldStart.TRICKLE))
    await until(destination, lambda s: s.status is EngineStatus.ACTIVE)
    assert (await source.abort()).run_state is RunState.RUNNING
    await until(destination, lambda s: s.status is EngineStatus.FAILED)
    assert not any(isinstance(event, RunStateChanged) and not event.running for event in pair.events)


async def test_a_guest_that_management_stopped_moves_stopped_and_runs_when_it_is_told(pair: Pair) -> None:
    """`virsh migrate --timeout --timeout-suspend`: the guest does not converge, or an ACK is pending, and management
    stops it in the middle of pre-copy."""
    source, destination = await pair.source(), await pair.destination()
    await source.start_outgoing(options(destination, HoldStart.TRICKLE))
    await until(destination, lambda s: s.status is EngineStatus.ACTIVE)
    await source.pause()
    assert (await source.state()) == VmmState(RunState.PAUSED, EngineStatus.ACTIVE)
    await source.release()
    await until(source, lambda s: s.status is EngineStatus.PARKED)
    await until(destination, lambda s: s.status is EngineStatus.COMPLETED)
    await source.proceed()
    await destination.take_over()
    assert (await destination.state()).run_state is RunState.PAUSED
    await destination.resume()
    assert await beats(pair, "de")


@all_of_it
async def test_a_guest_that_management_stopped_stands_after_an_abort_as_well(pair: Pair) -> None:
    source, destination = await pair.source(), await pair.destination()
    await source.start_outgoing(options(destination, HoldStart.TRICKLE))
    await until(destination, lambda s: s.status is EngineStatus.ACTIVE)
    await source.pause()
    await source.release()
    await until(source, lambda s: s.status is EngineStatus.PARKED)
    assert (await source.abort()).run_state is RunState.PAUSED
    await source.resume()
    assert await beats(pair, "5e")


@all_of_it
async def test_the_source_s_agent_dies_when_its_guest_is_sealed(pair: Pair) -> None:
    """What its successor finds stands still and says that a COMMIT may be under way."""
    source, destination = await pair.sealed()
    await pair.leave(source)
    await until(destination, lambda s: s.status is EngineStatus.FAILED)
    await destination.destroy()
    found = await pair.adopted(pair.here, "5e")
    assert found is not None
    assert (await found.state()).run_state is RunState.SEALED
    await found.resume()
    assert (await found.state()).run_state is RunState.RUNNING
    assert await beats(pair, "5e")


async def test_the_destination_s_agent_dies_before_it_took_over(pair: Pair) -> None:
    """The copy goes with its migration, and never ran: ownership can be given back."""
    source, destination = await pair.sealed()
    await pair.leave(destination)
    found = await pair.adopted(pair.there, "de")
    if found is not None:
        with pytest.raises(EngineError):
            await found.take_over()
        await found.destroy()
        assert found.liveness() is Liveness.GONE
    assert (await source.state()).run_state is RunState.SEALED
    await source.resume()
    assert await beats(pair, "5e")


@all_of_it
async def test_the_destination_s_agent_dies_after_it_took_over(pair: Pair) -> None:
    source, destination = await pair.sealed()
    await destination.take_over()
    await pair.leave(destination)
    await source.destroy()
    found = await pair.adopted(pair.there, "de")
    assert found is not None
    assert (await found.state()).run_state is RunState.PAUSED
    await found.take_over()
    await found.resume()
    await found.promote()
    assert found.metadata.role == "owner"
    assert await beats(pair, "de")


@all_of_it
async def test_the_destination_s_daemon_dies_before_the_copy_was_taken_over(pair: Pair) -> None:
    source, destination = await pair.sealed()
    host = pair.hosts[1]
    host.kill()
    try:
        with pytest.raises(EngineError):
            await destination.take_over()
        await destination.destroy()
        assert destination.liveness() is Liveness.GONE
    finally:
        host.start()
    await source.resume()
    assert await beats(pair, "5e")


@all_of_it
async def test_the_source_s_daemon_dies_when_its_guest_is_sealed(pair: Pair) -> None:
    source, destination = await pair.sealed()
    host = pair.hosts[0]
    host.kill()
    try:
        await destination.take_over()
        await destination.resume()
        assert await beats(pair, "de")
    finally:
        host.start()
    # libvirt does not know whether the destination runs, and leaves the source as it was.
    assert (await until(source, lambda _: True)).run_state is RunState.SEALED
    await source.destroy()
    assert source.liveness() is Liveness.GONE
    assert await beats(pair, "de")


@all_of_it
async def test_a_source_is_destroyed_without_its_daemon(pair: Pair) -> None:
    """DONE is known: what is left of the guest here must go, whoever is away."""
    source = await pair.source()
    host = pair.hosts[0]
    host.kill()
    try:
        await source.destroy()
        assert source.liveness() is Liveness.GONE
    finally:
        host.start()


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from agents.engine.libvirt import engine, notes
from deploy.lab.libvirt_hosts import load_binding, tree
from tests.contract.test_engine import image
from tests.contract.test_engine_libvirt import ROOT, start_spec

instant, socket, directory, uuid = sys.argv[1:]
load_binding(tree(ROOT / "build" / "libvirt"))

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

make = engine._started
def slow(connection, text):
    loop.call_soon_threadsafe(loop.call_later, 0.15, die)
    make(connection, text)

async def main():
    global loop
    loop = asyncio.get_running_loop()
    match instant:
        case "before libvirt is asked": engine._started = die
        case "while libvirt starts it": engine._started = slow
        case "before its process is noted": notes.process_of = die
    await engine.LibvirtEngine(image(), Path(socket)).start(start_spec(uuid, "5e", Path(directory)))
asyncio.run(main())
"""
"""An agent that starts a guest and is killed at an instant of it."""


@pytest.mark.parametrize(
    "instant",
    [
        "before its process is noted",
        pytest.param("before libvirt is asked", marks=all_of_it),
        pytest.param("while libvirt starts it", marks=all_of_it),
    ],
)
async def test_an_agent_that_is_killed_while_it_starts_a_guest_leaves_nothing(pair: Pair, instant: str) -> None:
    """Its successor ends the domain, which never ran, and the same guest can be started again."""
    words = (instant, str(pair.hosts[0].socket), str(pair.directory), pair.uuid)
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, *words, cwd=ROOT)
    async with asyncio.timeout(120):
        assert await agent.wait() == -signal.SIGKILL
    spec = pair.spec("5e")
    if instant == "before its process is noted":
        assert notes.process_of(spec) is not None, "the killed agent has left its domain"
    assert await pair.adopted(pair.here, "5e") is None
    assert notes.process_of(spec) is None
    assert not list(pair.directory.iterdir())
    source = await pair.source()
    assert (await source.state()).run_state is RunState.RUNNING
    assert await beats(pair, "5e")


@all_of_it
async def test_a_domain_that_somebody_resumed_before_it_was_noted_is_left_as_it_is(pair: Pair) -> None:
    """Drover never started it, and yet it runs: nobody knows what it has done."""
    source = await pair.source()
    note = replace(source.metadata, extra={"starting": "yes"})
    notes.write(notes.note_path(pair.spec("5e")), note)
    with pytest.raises(EngineError, match="resumed by hand"):
        await pair.adopted(pair.here, "5e")
    assert await beats(pair, "5e")


@all_of_it
async def test_the_death_of_a_vmm_is_told(pair: Pair) -> None:
    source = await pair.source()
    os.kill(source.metadata.pid, signal.SIGKILL)
    await gone(source)
    assert VmmDied() in pair.events


@all_of_it
async def test_nobody_takes_the_stream(pair: Pair) -> None:
    source, destination = await pair.source(), await pair.destination()
    with pytest.raises(EngineError, match="another copy"):
        await source.start_outgoing(replace(options(destination), copy="ee"))
    await destination.destroy()
    with pytest.raises(EngineError, match="does not take the stream"):
        await source.start_outgoing(options(destination))
    assert (await source.state()) == VmmState(RunState.RUNNING, EngineStatus.NONE)


@all_of_it
async def test_virsh_cannot_start_either_copy_while_the_outcome_is_open(pair: Pair, hosts: tuple[Host, Host]) -> None:
    """libvirt's own lock on a domain that migrates: one more reason to keep Finish back, and not to end it early."""
    _, _ = await pair.sealed()
    virsh = str(ROOT / "build" / "libvirt" / "bin" / "virsh")
    tried = [
        await asyncio.create_subprocess_exec(
            virsh,
            "-c",
            f"qemu+unix:///system?socket={host.socket}",
            "resume",
            pair.uuid,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for host in hosts
    ]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(3):
            await asyncio.gather(*(one.wait() for one in tried))
    try:
        assert all(one.returncode != 0 for one in tried), "refused, or waits for the migration's end"
        for vmm in pair.vmms:
            assert (await vmm.state(10.0)).run_state in (RunState.SEALED, RunState.PAUSED)
    finally:
        for one in tried:
            with contextlib.suppress(ProcessLookupError):
                one.kill()
            await one.wait()
