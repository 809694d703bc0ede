"""Carries a plan out on real QEMU, and holds everything that came of it against the machine, the plan and the log."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, field, replace

from agents.engine.base import EngineStatus, RunState
from deploy.lab.devices.qemu_acks import PAUSE, RETURN_PATH, SWITCHOVER_ACK, AckSetup, Final, QemuSource, QemuStage
from deploy.lab.devices.vfio.endpoint import Entry
from orchestrator.core.switchover import AckMode
from tests.oracle import trace
from tests.oracle.lab import HELD, OPEN, OVER, End, Lab, Pair
from tests.oracle.plans import Ending, Foretold, Plan, Stop, foretell, may_wait_in_vain, requests_in_precopy
from tests.oracle.replay import Replay

_ACKED = "source_return_path_thread_switchover_acked"
_MARKER = "vfio_send_init_data_flag"
_LOOKS = ("PRECOPY_INFO", "LAST_LOOK")


@dataclass(frozen=True)
class Run:
    """What one real migration left behind."""

    plan: Plan
    status: str
    error: str
    runs: bool
    """The guest, on the source, at the end."""
    output: str
    destination_output: str
    log: tuple[Entry, ...]
    destination_log: tuple[Entry, ...]
    loaded: bool
    """The destination is a whole paused copy."""
    waited: bool = False
    """QEMU was seen to ask the same in vain, with its migration active, and then cancelled."""


@dataclass(frozen=True)
class Verdict:
    """All sides agreed, on this."""

    machine: QemuSource
    final: Final | None
    steps: int
    replay: Replay = field(compare=False)


async def carry_out(lab: Lab, plan: Plan) -> Run:
    """Raises TimeoutError when QEMU does not come to where the plan says it must."""
    async with lab.pair(plan.devices, plan.mode, legacy=(plan.legacy, plan.legacy)) as pair:
        source = pair.source
        if plan.stop is Stop.BEFORE:
            await source.qmp("stop")
        if plan.ending is not Ending.THROUGH:
            await source.vmm.set_capabilities({PAUSE: True})
        await source.qmp("migrate-set-parameters", dict(HELD if plan.held else OPEN))
        await source.qmp("migrate", {"uri": pair.destination.vmm.metadata.endpoint})
        await _in_precopy(source, plan)
        waited = await _waits_in_vain(source)
        if waited:
            await source.qmp("migrate_cancel")
        elif plan.ending is not Ending.THROUGH:
            await _parked(source, plan)
        await source.reached(*OVER)
        return await _result(plan, pair, waited=waited)


async def _in_precopy(source: End, plan: Plan) -> None:
    if plan.stop is Stop.PENDING:
        await source.said(_MARKER)
        await source.qmp("stop")
    if not plan.held:
        return
    acks = 1 if plan.mode is AckMode.LEGACY else requests_in_precopy(plan)
    if acks:
        await source.said(_ACKED, acks)
    for number in plan.reopened:
        acks += 1
        source.devices[f"d{number}"].ask(4096)
        await source.said(_ACKED, acks)
    if plan.stop is Stop.ACKED:
        await source.qmp("stop")
    await source.qmp("migrate-set-parameters", dict(OPEN))


async def _waits_in_vain(source: End) -> bool:
    """False: it has parked, or is over. Raises TimeoutError if it does neither and does not wait in vain."""
    ends = asyncio.create_task(source.reached(EngineStatus.PARKED, *OVER))
    waits = asyncio.create_task(source.asks_in_vain())
    await asyncio.wait((ends, waits), return_when=asyncio.FIRST_COMPLETED)
    if ends.done():
        waits.cancel()
        await ends
        return False
    ends.cancel()
    await waits
    return (await source.qmp("query-migrate"))["status"] == "active"


async def _parked(source: End, plan: Plan) -> None:
    await source.reached(EngineStatus.PARKED, *OVER)
    if plan.ending is Ending.CONTINUE:
        await source.qmp("migrate-continue", {"state": "pre-switchover"})
    else:
        await source.qmp("migrate_cancel")


async def _result(plan: Plan, pair: Pair, *, waited: bool) -> Run:
    source, destination = pair.source, pair.destination
    now = await source.settled()
    info = await source.qmp("query-migrate")
    loaded = False
    if now.status is EngineStatus.COMPLETED:
        await destination.reached(*OVER)
        there = await destination.settled()
        loaded = (there.status, there.run_state) == (EngineStatus.COMPLETED, RunState.PAUSED)
    return Run(
        plan,
        info["status"],
        info.get("error-desc", ""),
        now.run_state is RunState.RUNNING,
        source.output(),
        destination.output(),
        tuple(source.log),
        tuple(destination.log),
        loaded,
        waited,
    )


def judge(run: Run) -> Verdict:
    """Holds QEMU, the machine, the plan and the devices' own log against each other. Raises AssertionError."""
    plan = run.plan
    off = plan.mode is AckMode.OFF
    capabilities = {RETURN_PATH} | (set() if off else {SWITCHOVER_ACK})
    capabilities |= set() if plan.ending is Ending.THROUGH else {PAUSE}
    replay = Replay(
        AckSetup(frozenset(capabilities), legacy=plan.legacy),
        plan.accounts(),
        trace.approvals_of(run.destination_output),
        stopped_before=plan.stop is Stop.BEFORE,
    ).play(trace.events_of(run.output))
    assert not replay.broken, f"the stream broke: {run.error}; {run.destination_output[-400:]}"
    check_waiting(run, replay)
    foretold = foretell(plan)
    _check_plan(run, replay, replace(foretold, stage=QemuStage.CANCELLED, pending=None) if run.waited else foretold)
    _check_log(run, replay)
    final = replay.finals[0] if replay.finals else None
    return Verdict(replay.machine, final, sum(replay.steps.values()), replay)


def check_waiting(run: Run, replay: Replay) -> None:
    """QEMU waited in vain only where the plan lets it, and where the machine says that it would have for ever."""
    assert may_wait_in_vain(run.plan) or not run.waited, f"QEMU waits in vain: {replay.machine}"
    by_machine = replay.in_vain > 0
    assert run.waited == by_machine, f"waited in vain: QEMU {run.waited}, our machine {by_machine}: {replay.machine}"


def _check_plan(run: Run, replay: Replay, foretold: Foretold) -> None:
    machine = replay.machine
    cancelled = machine.stage is QemuStage.CANCELLED
    error = "" if cancelled else run.error  # a cancel leaves words of its own
    assert (run.status, error, run.runs) == (machine.stage.value, machine.error, machine.running)
    assert run.loaded == (machine.stage is QemuStage.COMPLETED)
    seen = {
        "stage": machine.stage,
        "error": machine.error,
        "runs": machine.running,
        "requests": machine.requests,
        "acks": machine.acks,
        "pending": replay.finals[0].pending if replay.finals else None,
    }
    wrong = {
        name: f"{seen[name]}, foretold {expected}"
        for name, expected in asdict(foretold).items()
        if expected is not None and seen[name] != expected
    }
    assert not wrong, wrong


def _check_log(run: Run, replay: Replay) -> None:
    """QEMU's looks, as its trace tells them, are those that the devices answered, and the last ones were the last."""
    for account in run.plan.accounts():
        name = account.name
        answered = [entry for entry in run.log if entry.call in _LOOKS and f"vfio-{entry.device}" == name]
        told = [
            None if "errno" in entry.answer else tuple(entry.answer[key] for key in ("initial", "dirty", "reinit"))
            for entry in answered
        ]
        traced = [
            None if look.failed else (look.initial, look.dirty, int(look.reinit)) for look in replay.looks.get(name, [])
        ]
        assert traced == told, f"looks at {name}"
        last = [entry for entry in answered if entry.call == "LAST_LOOK"]
        if run.plan.stop is Stop.NEVER:  # the operator's stop may come between the two questions of a query
            assert len(last) == (name in replay.last_looks), f"last looks at {name}: {last}"
    assert len(trace.approvals_of(run.destination_output)) >= replay.machine.acks or run.plan.legacy
