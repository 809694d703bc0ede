"""What is to happen in one real migration, what must come of it, and how to make such plans by the hundred.

The devices' part of a plan is scenarios as in docs/scenario.md. `foretell` works out the result from the plan alone, by
the rules of docs/rules.md: no machine and no QEMU is asked.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from enum import StrEnum

from hypothesis import strategies as st

from deploy.lab.devices.qemu_acks import DeviceAccount, QemuStage, late_text
from deploy.lab.devices.scenario import Ask, Call, Delay, Fault, Hook, Lack, Scenario
from orchestrator.core.switchover import AckMode

MAX_DEVICES = 4
PENDING_MS = 400
"""So long the first ACK of a plan with Stop.PENDING is held back."""


class Stop(StrEnum):
    """When the operator stops the guest."""

    NEVER = "never"
    BEFORE = "before"
    """Before the migration."""
    PENDING = "pending"
    """In pre-copy, while an ACK is pending."""
    ACKED = "acked"
    """In pre-copy, when all are acknowledged and only the downtime limit holds the guest."""


class Ending(StrEnum):
    THROUGH = "through"
    CONTINUE = "continue"
    """Parks in pre-switchover and is told to go on."""
    CANCEL = "cancel"
    """Parks in pre-switchover and is cancelled."""


@dataclass(frozen=True)
class Plan:
    mode: AckMode
    devices: tuple[Scenario, ...]
    stop: Stop = Stop.NEVER
    ending: Ending = Ending.THROUGH
    reopened: tuple[int, ...] = ()
    """Devices (by number) that ask again, one after the other, each when everything is acknowledged."""
    old_machine: bool = False
    """With ACKs off: the machine type is one whose ACKs would be legacy ones."""

    @property
    def legacy(self) -> bool:
        return self.mode is AckMode.LEGACY or self.old_machine

    @property
    def held(self) -> bool:
        """The downtime limit keeps the guest running until the test lets go."""
        return self.stop is Stop.ACKED or bool(self.reopened)

    def accounts(self) -> tuple[DeviceAccount, ...]:
        return tuple(
            DeviceAccount(
                f"vfio-d{index}", precopy=takes_part(each), reinit=says_reinit(each), p2p=Lack.P2P not in each.lacks
            )
            for index, each in enumerate(self.devices)
        )


@dataclass(frozen=True)
class Foretold:
    """The result. None: depends on who is faster."""

    stage: QemuStage | None
    error: str | None
    runs: bool | None
    """The guest, on the source, at the end."""
    requests: int | None
    acks: int | None
    pending: int | None
    """After the final query; None as well if there is none."""


def takes_part(scenario: Scenario) -> bool:
    """The device migrates in pre-copy."""
    return Lack.PRE_COPY not in scenario.lacks


def says_reinit(scenario: Scenario) -> bool:
    return takes_part(scenario) and Lack.REINIT not in scenario.lacks


def is_looked_at_last(scenario: Scenario) -> bool:
    return says_reinit(scenario) and Lack.P2P not in scenario.lacks


def asks_at(scenario: Scenario, hook: Hook) -> int:
    """In how many of the times that this hook is reached the device asks."""
    return max((ask.times or 0 for ask in scenario.asks if ask.at is hook), default=0)


def fails(scenario: Scenario, call: Call) -> bool:
    return any(fault.call is call for fault in scenario.faults)


def asks_unheard(scenario: Scenario) -> bool:
    """It has new initial data while its looks fail. Whether that is still to be told when one succeeds, and is then a
    request of its own (R31), depends on how much QEMU has read meanwhile."""
    return says_reinit(scenario) and fails(scenario, Call.QUERY) and asks_at(scenario, Hook.PRECOPY) > 0


def requests_in_precopy(plan: Plan) -> int:
    """Before anything is stopped: each device's first, and its REINITs whenever it has nothing left to send."""
    if plan.mode is not AckMode.PER_DEVICE or plan.stop is Stop.BEFORE:
        return 0
    first = sum(takes_part(each) for each in plan.devices)
    return first + sum(asks_at(each, Hook.GATE_OPEN) for each in plan.devices if says_reinit(each))


def asking_last(plan: Plan) -> int:
    """Devices whose last look asks: by REINIT, or by failing (R31)."""
    if plan.mode is not AckMode.PER_DEVICE or plan.stop is Stop.BEFORE:
        return 0
    looked_at = [each for each in plan.devices if is_looked_at_last(each)]
    return sum(bool(asks_at(each, Hook.FREEZE)) or fails(each, Call.LAST_LOOK) for each in looked_at)


def may_wait_in_vain(plan: Plan) -> bool:
    """The stop may find initial data unsent before an exact query has asked anew for a size that is unknown (R31).

    That depends on who is faster; then it is cancelled, which `foretell` does not know.
    """
    return plan.stop in (Stop.PENDING, Stop.ACKED) and any(fails(each, Call.SIZE) for each in plan.devices)


def foretell(plan: Plan) -> Foretold:
    timed = any(ask.at is None for each in plan.devices if says_reinit(each) for ask in each.asks)
    if plan.stop is Stop.NEVER and plan.mode is AckMode.PER_DEVICE and timed and plan.ending is not Ending.CANCEL:
        return Foretold(None, None, None, None, None, None)  # it may fall due in the gap itself
    last = asking_last(plan)
    cancelled = plan.ending is Ending.CANCEL
    late = last if plan.stop is Stop.NEVER and not cancelled else 0
    stage = QemuStage.CANCELLED if cancelled else QemuStage.FAILED if late else QemuStage.COMPLETED
    runs = plan.stop is Stop.NEVER and stage is not QemuStage.COMPLETED
    asked = requests_in_precopy(plan) + len(plan.reopened)
    if plan.mode is AckMode.PER_DEVICE:
        collected = not cancelled or plan.stop is Stop.ACKED  # the last looks' requests, by whatever query
        requests, acks = asked + (last if collected else 0), asked
        pending = requests - acks
    else:
        requests, acks = 0, int(plan.legacy and _is_acked(plan))
        pending = int(plan.legacy) - acks
    known = plan.stop is not Stop.PENDING and not timed and not any(map(asks_unheard, plan.devices))
    # A device that asks at the operator's stop may be in the middle of its turn: then its marker leaves all the same.
    countable = known and not (plan.stop is Stop.ACKED and last)
    return Foretold(
        stage,
        late_text(late) if late else "",
        runs,
        requests if known else None,
        acks if countable else None,
        pending if countable and not cancelled else None,
    )


def _is_acked(plan: Plan) -> bool:
    """The one legacy ACK comes: at once where no device takes part, else when all have sent their marker."""
    waited_for = any(takes_part(each) for each in plan.devices)
    return not waited_for or (plan.mode is AckMode.LEGACY and plan.stop is not Stop.BEFORE)


# --- making plans -----------------------------------------------------------------------------------------------------

_BYTES = st.sampled_from([0, 1, 4096, 65_536, 3 << 20]) | st.integers(0, 400_000)
"""QEMU reads a MiB in one turn at most."""
_NEW_BYTES = st.sampled_from([0, 1, 4096]) | st.integers(0, 200_000)
_GATE_OPEN = st.builds(Ask, at=st.just(Hook.GATE_OPEN), bytes=_NEW_BYTES, times=st.integers(1, 3))
_OTHER = st.builds(
    Ask,
    at=st.sampled_from([Hook.PRECOPY, Hook.FREEZE, Hook.FREEZE, Hook.FINAL_QUERY, Hook.AFTER_CHECK]),
    bytes=_NEW_BYTES,
    times=st.just(1),
)
_TIMED = st.builds(Ask, after_ms=st.integers(0, 80), bytes=_NEW_BYTES, times=st.just(1))
_ASKS = st.tuples(
    st.lists(_OTHER, max_size=2), st.lists(_GATE_OPEN, max_size=1), st.just(()) | st.just(()) | st.tuples(_TIMED)
).map(lambda asks: tuple(itertools.chain(*asks)))
_LACKS = st.sampled_from([(), (), (), (), (Lack.REINIT,), (Lack.PRE_COPY,), (Lack.P2P,)])
_FAULTS = st.sampled_from(
    [(), (), (), (), (), (Fault(Call.LAST_LOOK),), (Fault(Call.SIZE),), (Fault(Call.QUERY, times=2),)]
)
_DELAYS = st.sampled_from([(), (), (Delay(Call.LOAD, 20),), (Delay(Call.LAST_LOOK, 5),), (Delay(Call.READ, 10),)])
_DEVICES = st.builds(
    Scenario,
    initial_bytes=_BYTES,
    stop_copy_bytes=st.integers(4096, 65_536),
    asks=_ASKS,
    delays=_DELAYS,
    faults=_FAULTS,
    lacks=_LACKS,
)
_MODES = st.sampled_from([AckMode.PER_DEVICE, AckMode.PER_DEVICE, AckMode.PER_DEVICE, AckMode.LEGACY, AckMode.OFF])
_STOPS = st.sampled_from([Stop.NEVER, Stop.NEVER, Stop.NEVER, Stop.BEFORE, Stop.PENDING, Stop.ACKED])
_ENDINGS = st.sampled_from([*[Ending.THROUGH] * 6, Ending.CONTINUE, Ending.CONTINUE, Ending.CANCEL])


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Bounded, and mostly about what matters: per device, running guests."""
    mode, ending, stop = draw(_MODES), draw(_ENDINGS), draw(_STOPS)
    devices = tuple(draw(st.lists(_DEVICES, min_size=1, max_size=MAX_DEVICES)))
    if len(devices) > 1:  # QEMU starts with several devices only if all of them have P2P
        devices = tuple(replace(each, lacks=tuple(set(each.lacks) - {Lack.P2P})) for each in devices)
    if mode is AckMode.OFF and stop in (Stop.PENDING, Stop.ACKED):
        stop = Stop.BEFORE  # nothing is ever pending
    if stop is Stop.PENDING:
        devices = _slowed(devices)
    reopened: tuple[int, ...] = ()
    able = [number for number, each in enumerate(devices) if says_reinit(each)]
    if mode is AckMode.PER_DEVICE and stop in (Stop.NEVER, Stop.ACKED) and able:
        reopened = tuple(draw(st.lists(st.sampled_from(able), max_size=2)))
    return Plan(mode, devices, stop, ending, reopened, old_machine=mode is AckMode.OFF and draw(st.booleans()))


def _slowed(devices: tuple[Scenario, ...]) -> tuple[Scenario, ...]:
    """The first device takes part in pre-copy, and the destination takes its time over it, and so over all."""
    first = devices[0]
    slow = Scenario(
        first.initial_bytes,
        first.stop_copy_bytes,
        asks=first.asks,
        delays=(Delay(Call.LOAD, PENDING_MS),),
        faults=first.faults,
    )
    return (slow, *devices[1:])
