"""Attempts with devices inside the VMM: both session machines and their shells, real QEMU, emulated VFIO devices.

The ledger is in memory and the two agents talk within this process; what is tried is what QEMU and the agents make of
each other. `pytest tests/integration/test_vfio.py -k late -s` prints how long QEMU's own late ACKs stop a guest.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from agents.engine.base import EngineError, EngineStatus, HoldStart, OutgoingOptions, RunState, stream_of
from agents.handover.destination import DestinationStage
from agents.handover.report import report_of
from agents.handover.source import SourceStage
from agents.handover.words import WantRunSeen
from deploy.lab.devices.scenario_text import options_of
from orchestrator.core.errors import AbortReason, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.core.liveness import Liveness
from orchestrator.core.policy import MigrationPolicy, OnTimeout
from orchestrator.core.records import AttemptReport, DeviceSpec, ShimKind
from tests.fakes.attempt import Coming, D, Leaving, Moves, S
from tests.fakes.coordination import MemoryStore, Tree
from tests.fakes.vfio_rig import LINK, End, Rig, device, qemu, until
from tests.fakes.vfio_user import Command, VfioUserDevice

pytestmark = [pytest.mark.qemu, pytest.mark.integration]
LATE = "asks: [{at: freeze, times: %d, bytes: 20000}]"
NEVER = f"estimates: {{dirty_bytes: {2**40}, stop_copy_bytes: {2**40}}}"
"""QEMU goes by the device's estimates and believes that the rest never fits into any downtime."""
QUICK = MigrationPolicy(precopy_timeout_ms=20_000, switchover_timeout_ms=5_000)


@pytest.fixture(params=["10.0", "11.1"])
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@dataclass(kw_only=True)
class Course(Moves):
    """With devices inside the VMM, and companions beside it."""

    rig: Rig

    @property
    def here(self) -> End:
        return self.rig.source

    @property
    def there(self) -> End:
        return self.rig.destination

    async def run(
        self,
        policy: MigrationPolicy = QUICK,
        during: Callable[[], Awaitable[None]] | None = None,
        *,
        paused: bool = False,
        link_bytes_per_s: int = LINK,
    ) -> AttemptReport:
        """One attempt to its end at both hosts. `during` runs beside it."""
        if self.attempt > 0:
            await self.rig.new_destination()
        here, there, ref = self.here, self.there, await self.opened()
        leaving = Leaving(here.vmm, here.devices.source_shims(), here.devices.in_vmm())
        coming = Coming(there.inc, there.vmm, there.devices.destination_shims(), there.devices.in_vmm())
        hold = HoldStart.TRICKLE if leaving.shims and not paused else HoldStart.OPEN
        options = OutgoingOptions(stream_of(there.vmm.metadata), hold, 0, link_bytes_per_s, policy.downtime_limit_ms)
        await self.conducted(ref, leaving, coming, policy, options, self.rig.directory, paused=paused, during=during)
        return self.report()

    def report(self) -> AttemptReport:
        source = self.source
        return report_of(
            source.state,
            source.timeline,
            self.destination.timeline,
            inside=source.inside,
            destination=D.host,
            zxid=source.ledger.zxid,
            ledger_writes=source.ledger.writes,
            transferred_bytes=source.transferred_bytes,
            duration_ms=source.duration_ms,
        )

    async def moved(self) -> None:
        """The guest runs at the destination, and there only, with everything as it was."""
        assert self.source.state.stage is SourceStage.ENDED_COMMITTED
        assert self.destination.state.stage is DestinationStage.ENDED_DONE
        record = await self.record()
        assert (record.phase, record.owner) == (Ownership.IDLE, D)
        assert self.here.vmm.liveness() is Liveness.GONE
        await _sound(self.there)

    async def stayed(self, reason: AbortReason, *devices: str) -> None:
        """The attempt is over, the guest runs at the source with everything as it was, the copy is gone."""
        record = await self.record()
        assert (record.phase, record.owner) == (Ownership.ABORTED, S)
        assert (record.reason, record.devices) == (reason, devices)
        assert self.there.vmm.liveness() is Liveness.GONE
        await _sound(self.here)


async def _sound(end: End) -> None:
    """It runs, its doorbells are answered, and neither memory nor devices are other than they were."""
    assert (await end.vmm.state()).run_state is RunState.RUNNING
    rung = end.beat.rings
    await until(lambda: end.beat.rings > rung + 2)
    assert (end.beat.page_errors, end.beat.device_errors, end.complaints) == (0, 0, [])


@asynccontextmanager
async def course(version: str, *devices: DeviceSpec, machine: str = "pc") -> AsyncIterator[Course]:
    async with Rig(qemu(version), *devices, machine=machine, traces=()) as made:
        found = Course(rig=made, store=MemoryStore(Tree()))
        await found.born()
        yield found


def stops_ms(end: End) -> list[float]:
    """By QEMU's own stamps: how long each stop lasted."""
    marks = end.stopped_and_ran_s()
    return [
        round((ran - stopped) * 1000, 2)
        for (was, stopped), (is_, ran) in pairwise(marks)
        if (was, is_) == (False, True)
    ]


def companion(name: str, scenario: str = "") -> DeviceSpec:
    return DeviceSpec(
        name, ShimKind.COMPANION, initial_bytes=20_000, stop_copy_bytes=4_096, options=options_of(scenario)
    )


# --- the way through --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 4])
async def test_clean(version: str, devices: int) -> None:
    specs = [device(f"nic{n}", initial_bytes=200_000, stop_copy_bytes=100_000) for n in range(devices)]
    async with course(version, *specs) as made:
        report = await made.run()
        await made.moved()
        assert [one.name for one in report.device_progress] == [spec.name for spec in specs]
        for one in report.device_progress:
            assert one.precopy_sent_bytes >= 200_000
            assert one.stop_copy_sent_bytes >= 100_000
            assert (one.reinits, one.late, one.lost) == (0, False, False)
            states = [entry["asked"] for entry in made.here.log(one.name, "SET_STATE")]
            assert states[-4:] == ["PRE_COPY", "PRE_COPY_P2P", "STOP_COPY", "STOP"]
        assert "device" in {entry.event for entry in report.timeline if entry.where == D.host}
        print(f"QEMU {version}, {devices} devices: the guest stood still for {report.blackout_ms} ms")


async def test_acknowledgements_and_the_return_path_are_on_at_both_ends(version: str) -> None:
    async with course(version, device("nic")) as made:
        await made.run()
        await made.moved()
        found = await made.there.qmp("query-migrate-capabilities")
        on = {entry["capability"] for entry in found if entry["state"]}
        assert {"switchover-ack", "return-path", "events"} <= on
        assert made.source.options.link_bytes_per_s == LINK


async def test_new_initial_data_before_the_decision_only_closes_the_gate_again(version: str) -> None:
    async with course(version, device("nic", scenario="asks: [{at: gate_open, times: 2, bytes: 30000}]")) as made:
        report = await made.run()
        await made.moved()
        (one,) = report.device_progress
        assert one.reinits == (2 if version == "11.1" else 0), "a legacy QEMU does not opt in to REINIT"
        assert not one.late


async def test_a_device_that_does_not_know_precopy_or_p2p_moves_too(version: str) -> None:
    async with course(version, device("nic", scenario="lacks: [precopy, p2p]")) as made:
        report = await made.run()
        await made.moved()
        assert report.device_progress[0].precopy_sent_bytes == 0


async def test_estimates_that_are_too_small_cost_time_and_nothing_else(version: str) -> None:
    lies = "estimates: {initial_bytes: 0, dirty_bytes: 0, stop_copy_bytes: 5000}"
    async with course(version, device("liar", scenario=lies, initial_bytes=100_000)) as made:
        await made.run()
        await made.moved()


async def test_estimates_that_overflow_harm_nobody(version: str) -> None:
    """QEMU 11.1 refuses to add them up. At its last look it takes that for a device that wants another ACK."""
    lies = f"estimates: {{dirty_bytes: {2**64 - 1}, stop_copy_bytes: {2**64 - 1}}}"
    async with course(version, device("liar", scenario=lies)) as made:
        report = await made.run(replace(QUICK, precopy_timeout_ms=3_000))
        if report.reason is None:
            await made.moved()
        else:
            assert report.reason in (AbortReason.LATE_SWITCHOVER_ACK, AbortReason.NOT_CONVERGING)
            await made.stayed(report.reason)


async def test_a_device_that_says_it_never_converges_is_left_where_it_runs() -> None:
    """QEMU 10.0 does not look at it closely."""
    async with course("11.1", device("liar", scenario=NEVER)) as made:
        await made.run(replace(QUICK, precopy_timeout_ms=800))
        await made.stayed(AbortReason.NOT_CONVERGING)
        assert stops_ms(made.here) == []


async def test_policy_moves_a_guest_stopped_whatever_its_device_says() -> None:
    """Once it stands still there is no downtime to keep short, and QEMU is told so."""
    async with course("11.1", device("liar", scenario=NEVER)) as made:
        await made.run(replace(QUICK, precopy_timeout_ms=800, on_timeout=OnTimeout.SUSPEND))
        await made.moved()


# --- late -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 3])
async def test_late_ack_inside_qemu_is_recovered(times: int) -> None:
    async with course("11.1", device("nic", scenario=LATE % times), device("gpu")) as made:
        for _ in range(times):
            report = await made.run()
            await made.stayed(AbortReason.LATE_SWITCHOVER_ACK, "nic")
            assert [one.late for one in report.device_progress] == [True, False]
            assert (await made.here.vmm.state()).error == (
                "Switchover ACK was requested by 1 devices during switchover"
            )
            events = [entry.event for entry in report.timeline]
            assert events.index("vcpus run") < events.index("abort")
        paused = stops_ms(made.here)
        await made.run()
        await made.moved()
        assert len(paused) == times
        print(f"late ACK inside QEMU 11.1: STOP -> RESUME {paused} ms")
        assert statistics.median(paused) < 1_000


async def test_late_acks_of_four_devices_are_one_failure_with_four_names() -> None:
    specs = [device(f"nic{n}", scenario=LATE % 1) for n in range(4)]
    async with course("11.1", *specs) as made:
        await made.run()
        await made.stayed(AbortReason.LATE_SWITCHOVER_ACK, *(spec.name for spec in specs))
        assert (await made.here.vmm.state()).error.startswith("Switchover ACK was requested by 4 devices")
        print(f"late ACK of 4 devices: STOP -> RESUME {stops_ms(made.here)} ms")
        await made.run()
        await made.moved()


@pytest.mark.parametrize(
    ("version", "machine"), [("10.0", "pc"), ("11.1", "pc-i440fx-11.0")], ids=["10.0", "11.1-legacy"]
)
async def test_a_late_request_is_not_seen_by_legacy_acks(version: str, machine: str) -> None:
    """Nobody looks after the stop: what the device asked for is loaded within the blackout, as before 11.1."""
    async with course(version, device("nic", scenario=LATE % 1), machine=machine) as made:
        report = await made.run()
        await made.moved()
        assert report.device_progress[0].stop_copy_sent_bytes > 16_384 + 20_000


async def test_a_failing_last_look_counts_as_late() -> None:
    """QEMU takes it for a request of a device that it cannot ask (R31)."""
    async with course("11.1", device("nic", scenario="faults: [{call: last_look}]")) as made:
        report = await made.run()
        assert report.reason is AbortReason.LATE_SWITCHOVER_ACK
        await made.stayed(AbortReason.LATE_SWITCHOVER_ACK)
        await made.run()
        await made.moved()


# --- pause and resume -------------------------------------------------------------------------------------------------

SLOW = "delays: [{call: load, ms: 1500, times: 1}]"


async def _in_precopy(made: Course) -> None:
    """The ACK is pending: the device's data has left, the destination takes its time over it."""
    await until(lambda: made.here.log("nic", "READ"))
    assert made.source.state.stage is SourceStage.PRECOPY


async def test_paused_with_an_ack_pending_it_moves_and_stays_paused(version: str) -> None:
    async with course(version, device("nic", scenario=SLOW)) as made:

        async def pause() -> None:
            await _in_precopy(made)
            made.source.feed(WantRunSeen(False))

        report = await made.run(during=pause)
        assert report.outcome == "COMMITTED"
        there = made.there
        assert (await there.vmm.state()).run_state is RunState.PAUSED
        assert there.beat.number == 0
        await there.vmm.resume()
        await _sound(there)


async def test_a_guest_that_arrived_paused_moves_on_at_the_second_try(version: str) -> None:
    """Until the guest runs its device is in RESUMING, from where QEMU begins no migration; failing, it mends that."""
    async with Rig(qemu(version), device("nic"), traces=()) as rig:
        await rig.source.vmm.pause()
        await rig.migrate()
        assert (await rig.over()).status is EngineStatus.COMPLETED
        rig.source = rig.destination
        ends: list[EngineStatus] = []
        for _ in range(2):
            await rig.new_destination()
            await rig.migrate()
            ends.append((await rig.over()).status)
        assert ends == [EngineStatus.FAILED, EngineStatus.COMPLETED]
        await rig.hand_over()
        await _sound(rig.destination)


async def test_resume_ends_the_attempt_and_never_starts_vcpus_under_it(version: str) -> None:
    async with course(version, device("nic")) as made:

        async def pause_and_resume() -> None:
            await until(lambda: made.source.state.active)
            made.source.feed(WantRunSeen(False))
            await until(lambda: made.source.state.paused)
            made.source.feed(WantRunSeen(True))

        await made.run(during=pause_and_resume, link_bytes_per_s=500_000)
        await made.stayed(AbortReason.GUEST_RESUMED)
        assert len(stops_ms(made.here)) == 1


async def test_the_engine_refuses_to_start_vcpus_under_a_migration(version: str) -> None:
    async with Rig(qemu(version), device("nic", scenario=SLOW), traces=()) as rig:
        await rig.migrate()
        await until(lambda: rig.source.log("nic", "READ"))
        await rig.source.vmm.pause()
        if (await rig.source.vmm.state()).status is EngineStatus.ACTIVE:
            with pytest.raises(EngineError, match="cancel it first"):
                await rig.source.vmm.resume()
        await rig.source.vmm.abort()
        await rig.source.vmm.resume()
        await _sound(rig.source)


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["stop_copy", "quiesce"])
async def test_a_device_reset_after_a_failed_change_of_state_is_told_as_lost(version: str, call: str) -> None:
    async with course(version, device("nic", scenario=f"faults: [{{call: {call}}}]"), device("gpu")) as made:
        report = await made.run()
        record = await made.record()
        assert (record.phase, record.owner) == (Ownership.ABORTED, S)
        assert (record.reason, record.devices) == (AbortReason.DEVICE_RESET, ("nic",))
        assert [one.lost for one in report.device_progress] == [True, False]
        assert "lost its state" in report.message
        await until(lambda: made.here.beat.device_errors == 1)  # the guest noticed
        assert made.here.beat.page_errors == 0


async def test_a_device_that_cannot_go_back_is_told_as_lost() -> None:
    scenario = "asks: [{at: freeze, times: 1}]\nfaults: [{call: roll_back}]"
    async with course("11.1", device("nic", scenario=scenario)) as made:
        await made.run()
        record = await made.record()
        assert (record.reason, record.devices) == (AbortReason.DEVICE_RESET, ("nic",))


async def test_a_device_that_cannot_be_activated_is_no_success(version: str) -> None:
    """Only the start at the destination shows it, so the guest is there by then."""
    async with course(version, device("nic", scenario="faults: [{call: activate}]")) as made:
        report = await made.run()
        assert (report.outcome, report.reason, report.devices) == ("COMMITTED", AbortReason.DEVICE_RESET, ("nic",))
        assert D.host in report.message
        assert (await made.there.vmm.state()).run_state is RunState.RUNNING
        await until(lambda: made.there.beat.device_errors == 1)


@pytest.mark.parametrize("call", ["validate", "write", "begin_load"])
async def test_a_state_that_is_refused_is_refused_before_the_commit(version: str, call: str) -> None:
    async with course(version, device("nic", scenario=f"faults: [{{call: {call}}}]")) as made:
        report = await made.run()
        assert report.reason is not None
        assert report.reason in (AbortReason.ENGINE_FAILED, AbortReason.DESTINATION_LOST)
        await made.stayed(report.reason)


@pytest.mark.parametrize("call", ["begin", "read", "size", "query"])
async def test_faults_at_the_source_leave_the_guest_where_it_was(version: str, call: str) -> None:
    async with course(version, device("nic", scenario=f"faults: [{{call: {call}}}]")) as made:
        report = await made.run()
        if report.reason is not None:
            assert report.reason in (AbortReason.ENGINE_FAILED, AbortReason.DESTINATION_LOST)
            await made.stayed(report.reason)
            await made.run()
        await made.moved()


async def test_a_destination_that_is_deaf_while_its_device_loads_has_not_failed(version: str) -> None:
    async with course(version, device("nic", scenario="delays: [{call: load, ms: 2500, times: 1}]")) as made:

        async def deaf() -> None:
            await until(lambda: made.here.log("nic", "READ"))
            await asyncio.sleep(0.5)
            with pytest.raises(EngineError):
                await made.there.vmm.state(0.3)

        await made.run(during=deaf)
        await made.moved()


async def test_a_load_that_never_ends_is_given_up_in_time(version: str) -> None:
    async with course(version, device("nic", scenario="faults: [{call: ack}]")) as made:
        report = await made.run(replace(QUICK, precopy_timeout_ms=1_500))
        await made.stayed(AbortReason.NOT_CONVERGING)
        assert report.duration_ms < 10_000
        assert not stops_ms(made.here), "the guest was never stopped"
        await made.run()
        await made.moved()


# --- with companions --------------------------------------------------------------------------------------------------


async def test_companions_and_devices_inside_move_together(version: str) -> None:
    async with course(version, companion("dpu"), device("nic"), companion("vgpu")) as made:
        report = await made.run()
        await made.moved()
        assert [entry.device for entry in report.acks] == ["dpu", "vgpu"]
        assert [one.name for one in report.device_progress] == ["nic"]


async def test_late_companion_then_late_device_inside() -> None:
    """The companions' check comes first: QEMU gets to its own only in the attempt that passed it."""
    late = "asks: [{at: freeze, times: 1}]"
    async with course("11.1", companion("dpu", late), device("nic", scenario=late)) as made:
        await made.run()
        await made.stayed(AbortReason.LATE_SWITCHOVER_ACK, "dpu")
        print(f"late ACK of a companion: STOP -> RESUME {stops_ms(made.here)} ms")
        if made.here.log("nic", "LAST_LOOK"):  # QEMU had looked already, so nic's one demand is used up
            await made.run()
        else:
            await made.run()
            await made.stayed(AbortReason.LATE_SWITCHOVER_ACK, "nic")
            await made.run()
        await made.moved()


async def test_a_late_device_inside_rolls_the_companions_back() -> None:
    scenario = "asks: [{at: freeze, times: 1}]"
    async with course("11.1", companion("dpu"), device("nic", scenario=scenario)) as made:
        await made.run()
        await made.stayed(AbortReason.LATE_SWITCHOVER_ACK, "nic")
        await made.run()
        await made.moved()


# --- what would be lost without a word --------------------------------------------------------------------------------


async def test_a_vfio_user_device_is_refused_before_it_is_lost() -> None:
    """QEMU 11.1 moves the guest, says `completed`, and never asked the device about its state."""
    other = VfioUserDevice()
    with tempfile.TemporaryDirectory(prefix="du-") as directory:
        path = Path(directory) / "s"
        await other.start(path)
        options = {"driver": "vfio-user-pci", "id": "vu0", "socket": {"type": "unix", "path": str(path)}}
        try:
            async with Rig(qemu("11.1"), source_options=["-device", json.dumps(options)], traces=()) as rig:
                ((reason, said),) = await rig.source.vmm.unmigratable()
                assert reason is RefusalReason.DEVICE_NOT_MIGRATABLE
                assert "vu0" in said
                assert "vfio-user" in said
                assert await rig.destination.vmm.unmigratable() == ()
                assert Command.FEATURE not in other.asked, "it was never asked what it can"
                assert "blocked-reasons" not in await rig.source.qmp("query-migrate")
        finally:
            other.close()
