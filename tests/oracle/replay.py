"""Plays what a real QEMU 11.1.3 did against our machine of its accounting, step by step.

QEMU's looks, reads, stops and ACKs are what happens *to* the machine; what it must say to each of them by itself is
what QEMU said: who asks, what each query collected and counts, which marker left, when it decided, how it ended. Beside
it runs our own ledger on the same requests and ACKs, held to the same gate and the same verdict except where
docs/rules.md lets the two differ.

QEMU works, and writes its log, in several threads. An ACK takes effect before its line, so a query or a decision may
know of it already; never the other way round. And the operator's stop looks at a device and quiesces it while a query
goes on, which then may have passed that device, or in the middle of its turn to send, which then ends as it would have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from deploy.lab.devices.qemu_acks import (
    PAUSE,
    AckSetup,
    DeviceAccount,
    Final,
    QemuSource,
    QemuStage,
    Query,
)
from orchestrator.core.ids import AckRequest
from orchestrator.core.switchover import AckLedger, AckMode
from tests.oracle.trace import (
    Acked,
    Decided,
    DeviceQueried,
    DeviceState,
    Event,
    Iterated,
    Look,
    Marker,
    Queried,
    RanDry,
    Read,
    RunState,
    Status,
    Threshold,
)

_LAST = {"completed": QemuStage.COMPLETED, "failed": QemuStage.FAILED, "cancelled": QemuStage.CANCELLED}


class DisagreementError(AssertionError):
    """QEMU did something else than the machine. The text has the step, both sides, and the steps before it."""


@dataclass
class Replay:
    """All migrations of one source. `approvals`: whose markers the destination loaded, in order."""

    setup: AckSetup
    devices: tuple[DeviceAccount, ...]
    approvals: Sequence[str] = ()
    stopped_before: bool = False
    machine: QemuSource = field(init=False)
    ours: AckLedger = field(init=False)
    threshold_bytes: int = 0
    steps: Counter[str] = field(default_factory=Counter[str])
    """How often each kind of step was compared."""
    finals: list[Final] = field(default_factory=list[Final])
    looks: dict[str, list[Look]] = field(default_factory=dict[str, list[Look]])
    last_looks: set[str] = field(default_factory=set[str])
    """Devices that were looked at between the decision and the end."""
    _events: Sequence[Event] = ()
    _place: int = 0
    _early: int = 0
    """ACKs that took effect before their line."""
    _unbroken: QemuSource | None = None
    """What the machine was before the stream broke in pre-copy, for reasons that are not the machine's."""
    _marked: set[str] = field(default_factory=set[str])
    _interrupted: set[str] = field(default_factory=set[str])
    """Devices that the operator's stop quiesced in this iteration."""
    _must_decide: bool | None = None
    """After an exact query, as far as was known then: an ACK may still open the gate before QEMU looks at it."""
    in_vain: int = 0
    """How many estimates at the end were the same, and by the machine with no end to it."""
    _must_ask: bool | None = None
    """After an estimate: the exact query is due."""
    _device_bytes: int = 0
    """Of the query that is under way: what pre-copy can still carry of devices."""
    _in_vain_total: int | None = None
    _asked_first: set[str] = field(default_factory=set[str])
    """Devices that have asked in this migration."""
    _approved: int = 0
    """How many of the approvals have been answered to."""
    _in_flight: set[str] = field(default_factory=set[str])
    """Devices whose look at the operator's stop asks, until QEMU goes on to change their state."""
    _generations: Counter[str] = field(default_factory=Counter[str])
    _answered: Counter[str] = field(default_factory=Counter[str])
    _late: set[str] = field(default_factory=set[str])
    """Devices whose last look asked, or failed, while QEMU stopped the guest."""

    def __post_init__(self) -> None:
        self.machine = QemuSource(self.setup, running=not self.stopped_before)
        self.ours = AckLedger(stopped=self.stopped_before, mode=self.setup.mode)

    def play(self, events: Iterable[Event]) -> Replay:
        """The whole log of a source. Raises DisagreementError."""
        self._events = list(events)
        for place, event in enumerate(self._events):
            self._place = place
            self.steps[type(event).__name__] += 1
            try:
                self._step(event)
            except ValueError as error:
                self._differs(f"our machine refuses the step: {error}")
        return self

    @property
    def broken(self) -> bool:
        """The stream broke in pre-copy."""
        return self._unbroken is not None

    # --- steps --------------------------------------------------------------------------------------------------------

    def _step(self, event: Event) -> None:
        if not self.machine.in_progress and not isinstance(event, Status):
            if isinstance(event, RunState):
                self._run_state_outside(event.word)
            return
        self._expect_a_decision(event)
        match event:
            case Status(word):
                self._status(word)
            case RunState(word):
                self._run_state(word)
            case Threshold(size):
                if size != self.threshold_bytes:
                    self._forget_in_vain()
                self.threshold_bytes = size
            case Queried():
                self._queried(event)
            case Acked(pending):
                self._acked(pending)
            case Decided(total):
                self._decided(total)
            case _:
                self._device_step(event)

    def _device_step(self, event: Event) -> None:
        match event:
            case Look():
                self._look(event)
            case DeviceQueried():
                self._device_queried(event)
            case Read(device, count):
                self.machine = self.machine.read(device, count)
            case RanDry(device):
                self.machine = self.machine.ran_dry(device)
            case Marker(device):
                self._same(f"the marker of {device} leaves", True, self._in_its_turn(device).marks(device))
                self._marked.add(device)
            case Iterated(device, initial):
                turn = self._in_its_turn(device)
                self._same(f"initial bytes left of {device}", initial, turn.device(device).initial_bytes)
                self._same(f"the marker of {device} left", device in self._marked, turn.marks(device))
                self.machine = turn.iterate(device)
                if device in self._interrupted:
                    self.machine = self.machine.quiesce(device)
                self._marked.discard(device)
            case DeviceState(device, word):
                self._in_flight.discard(device)
                if word == "STOP_COPY":
                    if self.machine.stage is not QemuStage.ACTIVE and not self.machine.device(device).quiesced:
                        due = self.machine.gets_last_look(device)
                        self._same(f"{device} had a last look", device in self.last_looks, due)
                    if self.machine.stage is QemuStage.ACTIVE and not self.machine.device(device).quiesced:
                        self._interrupted.add(device)
                    self.machine = self.machine.quiesce(device)
            case _:
                pass

    def _device_queried(self, event: DeviceQueried) -> None:
        device, account = event.device, self.machine.device(event.device)
        self._device_bytes += event.initial + event.dirty
        if device in self._in_flight and not event.asks:
            return  # its request comes after this query has passed it
        self._same(f"{device} asks in the {event.kind} query", event.asks, account.asks)
        if not account.quiesced:
            self._same(f"initial bytes of {device}", event.initial, account.initial_bytes)
        if event.asks and device not in self._asked_first:  # the first request of each comes without a look
            self._asks_ours(device)
        self.machine = self.machine.query_device(device)

    def _in_its_turn(self, device: str) -> QemuSource:
        """A device that the operator's stop quiesced in this iteration may have its turn to send nevertheless."""
        if device not in self._interrupted:
            return self.machine
        devices = tuple(replace(each, quiesced=False) if each.name == device else each for each in self.machine.devices)
        return replace(self.machine, devices=devices)

    def _status(self, word: str) -> None:
        match word:
            case "setup":
                self.machine = self.machine.migrate(self.devices)
                self.ours = AckLedger(stopped=not self.machine.running, mode=self.setup.mode)
                self._answered = self._generations.copy()  # of an earlier migration: nothing answers those any more
                self.threshold_bytes = 0
                self._must_ask, self._device_bytes = None, 0
                self._forget_in_vain()
                self.last_looks.clear()
                self._late.clear()
                self._asked_first.clear()
            case "pre-switchover":
                self._same("parks", True, PAUSE in self.setup.capabilities)
            case "device":
                if self.machine.stage is QemuStage.PARKED:
                    self.machine = self.machine.proceed()
                self.ours = self.ours.freeze()
            case "cancelling":  # which may find the stream broken that it closed itself a moment before
                self.machine = (self._unbroken or self.machine).cancel()
                self._unbroken = None
            case "failing" if self.machine.stage is QemuStage.ACTIVE:
                self._unbroken, self.machine = self.machine, self.machine.fail("")
            case "failing" if self.machine.stage is not QemuStage.FAILED:
                self.machine = self.machine.finish()
                self._same("stage", QemuStage.FAILED, self.machine.stage)
            case "completed":
                self.machine = self.machine.finish()
            case _:
                pass
        if word in _LAST:
            self._same("stage", _LAST[word], self.machine.stage)

    def _run_state(self, word: str) -> None:
        self._forget_in_vain()
        match word:
            case "paused":
                self.machine, self.ours = self.machine.stop(), self.ours.stop_by_wish()
            case "running":
                self.machine, self.ours = self.machine.cont(), self.ours.resume_by_wish()
            case "finish-migrate":
                self._same("the switchover was decided", True, self.machine.stage is not QemuStage.ACTIVE)
            case _:
                pass

    def _run_state_outside(self, word: str) -> None:
        """After the end the guest goes on as the machine says; before the begin it is as the test wants it."""
        if self.machine.stage in (QemuStage.FAILED, QemuStage.CANCELLED):
            self._same("the guest runs again", word == "running", self.machine.running)

    def _look(self, look: Look) -> None:
        before = self.machine.device(look.device)
        self.looks.setdefault(look.device, []).append(look)
        machine = self._in_its_turn(look.device)
        if look.failed:
            # While the operator stops the guest a query may look as well; only the last look's failure is a request.
            queried = machine.stage is QemuStage.ACTIVE and not look.asks
            machine = replace(machine, running=True) if queried else machine
            machine = machine.failed_look(look.device)
        else:
            machine = machine.look(look.device, look.initial, reinit=look.reinit)
        self.machine = replace(machine, running=self.machine.running)
        if before.quiesced:
            self.machine = self.machine.quiesce(look.device)
        asks = self.machine.device(look.device).asks and not before.asks
        self._same(f"{look.device} asks in a look", look.asks, asks)
        if asks and not look.failed:
            self._asks_ours(look.device)
        if asks and self.machine.stage is QemuStage.ACTIVE and not self.machine.running:
            self._in_flight.add(look.device)
        if self.machine.stage is not QemuStage.ACTIVE:
            self._same(f"{look.device} has a last look", True, machine.gets_last_look(look.device))
            self.last_looks.add(look.device)
            if asks:
                self._late.add(look.device)

    def _asks_ours(self, device: str) -> None:
        self._asked_first.add(device)
        self._generations[device] += 1
        self.ours = self.ours.request(AckRequest(device, self._generations[device]))

    def _queried(self, queried: Queried) -> None:
        if queried.kind is Query.ESTIMATE:  # with which each iteration begins
            self._interrupted.clear()
        self._check_kind(queried)
        before = self.machine.requests
        self.machine = self.machine.sum_up(queried.kind)
        self._same(f"collected by the {queried.kind} query", queried.collected, self.machine.requests - before)
        self._acked_early(queried.pending)
        self._same(f"pending after the {queried.kind} query", queried.pending, self.machine.pending)
        exact = queried.kind is Query.EXACT
        self._must_decide = self.machine.switches_over(queried.total, self.threshold_bytes) if exact else None
        if queried.kind is Query.FINAL and self.machine.final is not None:
            self.finals.append(self.machine.final)
            self._check_ours(self.machine.final)

    def _check_kind(self, queried: Queried) -> None:
        """Whether an exact query follows an estimate, and whether QEMU will ever do anything else."""
        devices, self._device_bytes = self._device_bytes, 0
        if self._must_ask is not None and queried.kind is not Query.FINAL:
            self._same("an exact query follows the estimate", queried.kind is Query.EXACT, self._must_ask)
        self._must_ask = None
        if queried.kind is not Query.ESTIMATE:
            return
        sums = queried.total, queried.precopy, self.threshold_bytes
        self._must_ask = self.machine.asks_exactly(*sums)
        if self._in_vain_total is not None:
            self._same("the estimate of a QEMU that waits in vain", queried.total, self._in_vain_total)
        if self.machine.waits_in_vain(*sums, ram_bytes=queried.precopy - devices):
            self._in_vain_total = queried.total
            self.in_vain += 1

    def _forget_in_vain(self) -> None:
        self._in_vain_total, self.in_vain = None, 0

    def _check_ours(self, final: Final) -> None:
        """The same verdict, but for the rules where ours differs: R25 and what a failed look means (R31)."""
        refused = {device for device in self._late if self.looks[device][-1].failed}
        late = {entry.device for entry in self.ours.late}
        if self.ours.stopped:
            self._same("late by our ledger, of a stopped guest", set[str](), late)
        else:
            self._same("late by our ledger", self._late - refused, late)
            self._same("late by QEMU", final.collected, len(self._late))

    def _acked(self, pending: int) -> None:
        if self._early:
            self._early -= 1
            return
        self._take_ack()
        self._acked_early(pending)
        self._same("pending after an ACK", pending, self.machine.pending)

    def _take_ack(self) -> None:
        self.machine = self.machine.acked()
        number, self._approved = self._approved, self._approved + 1
        if self.setup.mode is AckMode.LEGACY:
            self.ours = self.ours.ack(AckRequest("all", 1))
        elif number < len(self.approvals):
            device = self.approvals[number]
            self._answered[device] += 1
            self.ours = self.ours.ack(AckRequest(device, self._answered[device]))

    def _acked_early(self, pending: int) -> None:
        """QEMU counts fewer than the machine: ACKs whose lines are still to come, but must come."""
        if self.machine.pending <= pending:
            return
        coming = sum(isinstance(event, Acked) for event in self._events[self._place + 1 :]) - self._early
        for _ in range(min(coming, self.machine.pending - pending)):
            self._early += 1
            self._take_ack()

    # --- the decision -------------------------------------------------------------------------------------------------

    def _expect_a_decision(self, event: Event) -> None:
        """After an exact query QEMU decides at once, or goes on because the gate is closed or too much is left."""
        if self._must_decide is None or isinstance(event, Acked | Decided | RunState | Look | DeviceState | Threshold):
            return
        due, self._must_decide = self._must_decide, None
        if not isinstance(event, Status):  # the migration's end needs no decision
            self._same("it decides for the switchover", False, due)

    def _decided(self, total: int) -> None:
        self._must_decide = None
        if self.machine.running and self.setup.mode is not AckMode.OFF:
            self._acked_early(0)
        self._same("it decides for the switchover", True, self.machine.switches_over(total, self.threshold_bytes))
        self._same("our gate is open", True, self.ours.gate_open)
        self.machine = self.machine.switch_over()

    # --- comparing ----------------------------------------------------------------------------------------------------

    def _same(self, what: str, qemu: object, ours: object) -> None:
        if qemu != ours:
            self._differs(f"{what}: QEMU {qemu}, our machine {ours}")

    def _differs(self, said: str) -> None:
        first = max(0, self._place - 12)
        before = "\n".join(f"  {n}: {event}" for n, event in enumerate(self._events[first : self._place + 1], first))
        raise DisagreementError(f"step {self._place}: {said}\n{before}\n  {self.machine}")
