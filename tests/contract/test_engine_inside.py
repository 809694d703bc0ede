"""What an engine promises of guests with devices inside the VMM: the fake, and QEMU 11.1 with an emulated device."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from agents.engine.base import (
    EngineError,
    EngineEvent,
    EngineStatus,
    HoldStart,
    OutgoingOptions,
    RunState,
    RunStateChanged,
    StatusChanged,
    SwitchoverAckLate,
    Vmm,
    VmmSpec,
    VmmState,
    stream_of,
)
from orchestrator.core.records import GuestSpec
from tests.contract.test_engine import LINK, until
from tests.fakes.engine import FakeEngine
from tests.fakes.vfio_rig import Rig, device, qemu


class Pair(Protocol):
    """A guest with a device inside its VMM that asks for another ACK once, too late; and destinations for it."""

    source: Vmm

    async def destination(self) -> Vmm: ...


class FakePair:
    def __init__(self, directory: Path) -> None:
        self._engine = FakeEngine()
        self._engine.script.late_devices = 1
        spec = GuestSpec("g", devices=(device("nic"),))
        self._spec = VmmSpec("guest-1", "s", spec, directory, directory / "con", None, vfio_path=directory / "vfio")
        self.source: Vmm

    async def start(self) -> None:
        self.source = await self._engine.start(self._spec)

    async def destination(self) -> Vmm:
        return await self._engine.prepare_incoming(replace(self._spec, inc="d"), "m", 1)


class QemuPair:
    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._used = False
        self.source: Vmm = rig.source.vmm

    async def destination(self) -> Vmm:
        """The rig begins with one."""
        if self._used:
            await self._rig.new_destination()
        self._used = True
        return self._rig.destination.vmm


@pytest.fixture(params=["fake", pytest.param("qemu-11.1", marks=pytest.mark.qemu)])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    if request.param == "fake":
        directory = Path(tempfile.mkdtemp(prefix="de-"))
        made = FakePair(directory)
        await made.start()
        yield made
        shutil.rmtree(directory)
        return
    late = "asks: [{at: freeze, times: 1}]"
    async with Rig(qemu("11.1"), device("nic", scenario=late), traces=()) as rig:
        yield QemuPair(rig)


def options(destination: Vmm, link_bytes_per_s: int = LINK) -> OutgoingOptions:
    return OutgoingOptions(stream_of(destination.metadata), HoldStart.OPEN, 0, link_bytes_per_s, 300)


async def parked(pair: Pair) -> Vmm:
    destination = await pair.destination()
    await pair.source.start_outgoing(options(destination))
    await until(pair.source, lambda now: now.status is EngineStatus.PARKED)
    return destination


def is_over(now: VmmState) -> bool:
    return now.status is EngineStatus.FAILED and now.run_state is RunState.RUNNING


async def test_the_engines_own_verdict_comes_in_place_of_its_failure(pair: Pair) -> None:
    seen: list[EngineEvent] = []
    pair.source.subscribe(seen.append)
    await parked(pair)
    await pair.source.proceed()
    over = await until(pair.source, is_over)
    assert over.late_devices == 1
    await heard(lambda: SwitchoverAckLate(1) in seen)
    assert not [event for event in seen if isinstance(event, StatusChanged) and event.status is EngineStatus.FAILED]
    assert [event.running for event in seen if isinstance(event, RunStateChanged)] == [False, True]


async def test_an_abort_that_comes_after_the_verdict_still_tells_it(pair: Pair) -> None:
    await parked(pair)
    await pair.source.proceed()
    await until(pair.source, is_over)
    after = await pair.source.abort()
    assert (after.run_state, after.late_devices) == (RunState.RUNNING, 1)


async def test_an_abort_that_comes_first_is_no_verdict(pair: Pair) -> None:
    await parked(pair)
    after = await pair.source.abort()
    assert (after.run_state, after.status, after.late_devices) == (RunState.RUNNING, EngineStatus.CANCELLED, 0)


async def test_the_next_attempt_to_a_fresh_destination_goes_through(pair: Pair) -> None:
    await parked(pair)
    await pair.source.proceed()
    await until(pair.source, is_over)
    destination = await parked(pair)
    await pair.source.proceed()
    await until(pair.source, lambda now: now.run_state is RunState.SEALED)
    await until(destination, lambda now: now.run_state is RunState.PAUSED)


async def test_no_vcpu_starts_under_a_migration(pair: Pair) -> None:
    destination = await pair.destination()
    await pair.source.pause()
    await pair.source.start_outgoing(options(destination))
    await until(pair.source, lambda now: now.status is EngineStatus.PARKED)
    with pytest.raises(EngineError):
        await pair.source.resume()
    await pair.source.abort()
    await pair.source.resume()
    assert (await pair.source.state()).run_state is RunState.RUNNING


async def test_a_guest_that_can_move_says_so(pair: Pair) -> None:
    assert await pair.source.unmigratable() == ()


async def heard(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@pytest.mark.qemu
@pytest.mark.parametrize("before", [True, False])
async def test_no_downtime_is_kept_short_of_a_guest_that_stands_still(before: bool) -> None:
    """A device that says that it has a tebibyte left: while the guest runs it is never stopped for that. Once it is
    stopped on purpose nothing is gained by waiting."""
    huge = "estimates: {stop_copy_bytes: 1099511627776}"
    async with Rig(qemu("11.1"), device("nic", scenario=huge), traces=()) as rig:
        source = rig.source.vmm
        if before:
            await source.pause()
        await source.start_outgoing(options(rig.destination.vmm))
        if not before:
            await asyncio.sleep(0.5)
            assert (await source.state()).status is EngineStatus.ACTIVE
            await source.pause()
        await until(source, lambda now: now.status is EngineStatus.PARKED)
        await source.proceed()
        await until(source, lambda now: now.run_state is RunState.SEALED)


@pytest.mark.qemu
@pytest.mark.rule("R31")
async def test_a_size_that_is_unknown_holds_up_no_guest_that_stands_still() -> None:
    """QEMU counts 100 GiB for it, and asks again only when that fits the limit (docs/rules.md)."""
    scenario = "{delays: [{call: read, ms: 100}], faults: [{call: size}]}"
    slow = device("nic", scenario=scenario, initial_bytes=24 << 20)
    async with Rig(qemu("11.1"), slow, traces=()) as rig:
        source = rig.source.vmm
        await source.start_outgoing(options(rig.destination.vmm))
        await asyncio.sleep(0.3)
        await source.pause()
        await until(source, lambda now: now.status is EngineStatus.PARKED, 20)
