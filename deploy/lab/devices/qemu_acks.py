"""How QEMU 11.1 counts switchover ACKs, as a value: what it asks when, what it makes of the answers, when it gives up.

Drover conducts no migration with this machine: QEMU decides by itself, and can only be told its capabilities. But what
Drover refuses and concludes about QEMU rests on it, and docs/rules.md compares it rule by rule with our own ledger
(`switchover.py`). That it is QEMU's behaviour and not our idea of it is shown by the oracle (tests/oracle), which plays
every step of real runs of QEMU 11.1.3 against it.

There is one number for the whole migration, `pending`: the switchover may happen when it is 0 or the guest is stopped.
Nothing says which device is meant, neither on the source nor on the wire.

    a look at a device   GET_PRECOPY_INFO: its sizes, and whether its initial data began anew (REINIT)
    a query              over all devices, as an estimate (no look), exact (looks first), or final (looks no more);
                         each collects the requests that looks have left behind, and adds them to `pending`
    the marker           INIT_DATA_SENT: all initial data of this device has left; the destination answers it by an ACK
    the last look        one more at each device, when the guest has been stopped and before the device is quiesced

Pure values: every method returns a new one. Names in quotes are QEMU's own words.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from orchestrator.core.switchover import AckMode

SWITCHOVER_ACK, RETURN_PATH, PAUSE, POSTCOPY = (
    "switchover-ack",
    "return-path",
    "pause-before-switchover",
    "postcopy-ram",
)
IN_PROGRESS = "There's a migration process in progress"
UNDERFLOW = "Switchover ack pending num underflowed"
_U32 = 1 << 32


class QemuRefusal(Exception):
    """QEMU refuses the command, in these words, and nothing has changed."""


class QemuStage(StrEnum):
    """Of one source process; the values are MigrationStatus. `setup`, `failing` and the like are passed through."""

    NONE = "none"
    ACTIVE = "active"
    PARKED = "pre-switchover"
    DEVICE = "device"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Query(StrEnum):
    """How thoroughly QEMU asks its devices what is left to send (`state_pending_estimate`, `state_pending_exact`)."""

    ESTIMATE = "estimate"
    EXACT = "exact"
    FINAL = "final"
    """Once, with the guest stopped and the devices quiesced: what it collects itself is late (R17)."""


@dataclass(frozen=True, slots=True)
class AckSetup:
    """What decides about ACKs at one end. `legacy` comes with the machine type and lasts as long as the process."""

    capabilities: frozenset[str] = frozenset()
    legacy: bool = False

    @property
    def mode(self) -> AckMode:
        """OFF without the capability; with it what the machine type says."""
        if SWITCHOVER_ACK not in self.capabilities:
            return AckMode.OFF
        return AckMode.LEGACY if self.legacy else AckMode.PER_DEVICE


def late_text(count: int) -> str:
    """`error-desc` of a migration that failed because `count` devices asked for an ACK after the decision (R17)."""
    return f"Switchover ACK was requested by {count} devices during switchover"


@dataclass(frozen=True, slots=True)
class DeviceAccount:
    """What QEMU knows about one device of the source."""

    name: str
    precopy: bool = True
    """It migrates in pre-copy at all. One that does not never asks (R10)."""
    reinit: bool = True
    """It can say that its initial data began anew (VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2)."""
    p2p: bool = True
    """It has PRE_COPY_P2P, in which it does no DMA to other devices. One without gets no last look."""
    initial_bytes: int = 0
    """Left to send: what the newest look said, less what was read since."""
    asks: bool = False
    """A request that the next query collects."""
    marked: bool = False
    """The marker of the present initial data has left."""
    quiesced: bool = False
    """Past PRE_COPY and PRE_COPY_P2P, from where no way leads back in this migration: no look, no marker."""


@dataclass(frozen=True, slots=True)
class Final:
    """The final query: `before` the switchover, what it `collected` itself, and what is `pending` after it."""

    before: int
    collected: int
    pending: int


@dataclass(frozen=True, slots=True)
class QemuSource:
    """One QEMU process as a source. Raises QemuRefusal where QEMU refuses, ValueError for what it never does."""

    setup: AckSetup = field(default_factory=AckSetup)
    stage: QemuStage = QemuStage.NONE
    running: bool = True
    """The guest's vCPUs."""
    live: bool = True
    """The guest ran until this switchover stopped it, so it runs again if the switchover fails (R21)."""
    devices: tuple[DeviceAccount, ...] = ()
    pending: int = 0
    collected: int = 0
    """By the query that is under way."""
    requests: int = 0
    """Collected in this migration, ever."""
    acks: int = 0
    markers: int = 0
    before: int = 0
    """`pending` when the switchover began."""
    final: Final | None = None
    error: str = ""
    """`error-desc`."""

    # --- commands ---

    def configure(self, *capabilities: str) -> QemuSource:
        """Replace the capabilities: as a whole (R1), and never under a migration (R2)."""
        if self.in_progress:
            raise QemuRefusal(IN_PROGRESS)
        wanted = frozenset(capabilities)
        if SWITCHOVER_ACK in wanted and RETURN_PATH not in wanted:
            raise QemuRefusal(f"Capability '{SWITCHOVER_ACK}' requires capability '{RETURN_PATH}'")
        return replace(self, setup=replace(self.setup, capabilities=wanted))

    def migrate(self, devices: Iterable[DeviceAccount]) -> QemuSource:
        """Start a migration: nothing of an earlier one counts (R9). Legacy waits for its one ACK from the start, and
        counts it even where the capability is off and nobody will send it.

        Each device that can migrate in pre-copy asks once, even without initial data (R10); one whose guest is stopped
        already never enters PRE_COPY, and so neither asks nor gets a marker.
        """
        fresh = tuple(devices)
        if self.in_progress:
            raise QemuRefusal(IN_PROGRESS)
        if fresh and POSTCOPY in self.setup.capabilities:
            raise QemuRefusal(f"{fresh[0].name}: VFIO migration is not supported with postcopy migration")
        asking = self.mode is AckMode.PER_DEVICE and self.running
        begun = tuple(
            replace(each, asks=asking and each.precopy, marked=False, quiesced=not self.running) for each in fresh
        )
        return QemuSource(self.setup, QemuStage.ACTIVE, self.running, self.running, begun, int(self.setup.legacy))

    def stop(self) -> QemuSource:
        """The operator stops the guest in pre-copy. Each device gets its last look now, before `quiesce`."""
        self._only(QemuStage.ACTIVE, QemuStage.NONE)
        return replace(self, running=False)

    def cont(self) -> QemuSource:
        """The guest runs again, and the gate closes again over what is pending (R15). Devices stay out of PRE_COPY."""
        self._only(QemuStage.ACTIVE, QemuStage.NONE)
        return replace(self, running=True)

    def cancel(self) -> QemuSource:
        """R23: no check is made any more, whatever looks have found."""
        self._only(QemuStage.ACTIVE, QemuStage.PARKED, QemuStage.DEVICE)
        return replace(self, stage=QemuStage.CANCELLED, running=self._was_running)

    # --- pre-copy ---

    def look(self, name: str, initial_bytes: int, *, reinit: bool = False) -> QemuSource:
        """A device told its sizes. REINIT asks for a new ACK, unless the marker of the old data has yet to leave (R12).

        Growth without REINIT asks for nothing (R14).
        """
        device = self._looked_at(name)
        again = reinit and device.reinit and device.marked and self.mode is AckMode.PER_DEVICE
        asks, marked = device.asks or again, device.marked and not again
        return self._with(replace(device, initial_bytes=initial_bytes, asks=asks, marked=marked))

    def failed_look(self, name: str) -> QemuSource:
        """The device did not answer: taken for one without initial data. The last look counts as REINIT does (R31)."""
        device = self._looked_at(name)
        is_last = not self.running and self.gets_last_look(name)
        asks, marked = device.asks or is_last, device.marked and not is_last
        return self._with(replace(device, initial_bytes=0, asks=asks, marked=marked))

    def read(self, name: str, count: int) -> QemuSource:
        """So many bytes of the device have left, initial data first."""
        device = self.device(name)
        return self._with(replace(device, initial_bytes=max(0, device.initial_bytes - count)))

    def ran_dry(self, name: str) -> QemuSource:
        """ENOMSG: believed at once, even with initial data left."""
        return self._with(replace(self.device(name), initial_bytes=0))

    def marks(self, name: str) -> bool:
        """Does the marker leave when this device's turn to send is over?"""
        device = self.device(name)
        may = self.mode is not AckMode.OFF and device.precopy and not device.quiesced
        return may and not device.marked and device.initial_bytes == 0

    def iterate(self, name: str) -> QemuSource:
        """The device's turn to send is over."""
        if not self.marks(name):
            return self
        return replace(self._with(replace(self.device(name), marked=True)), markers=self.markers + 1)

    def query(self, kind: Query) -> QemuSource:
        """All devices, one after the other, and the sum."""
        queried = self
        for device in self.devices:
            queried = queried.query_device(device.name)
        return queried.sum_up(kind)

    def query_device(self, name: str) -> QemuSource:
        """One device's part of a query: what it asks for is collected."""
        device = self.device(name)
        return replace(self._with(replace(device, asks=False)), collected=self.collected + device.asks)

    def sum_up(self, kind: Query) -> QemuSource:
        """The end of a query. What the final query collected itself is late, nothing else (R17, R18, R27).

        Only in per-device mode is there anything to collect (R19).
        """
        self._only(QemuStage.DEVICE if kind is Query.FINAL else QemuStage.ACTIVE)
        count = self.collected
        counted = replace(self, collected=0, pending=self.pending + count, requests=self.requests + count)
        if kind is not Query.FINAL:
            return counted
        counted = replace(counted, final=Final(self.before, count, counted.pending))
        return counted.fail(late_text(count)) if count else counted

    def acked(self) -> QemuSource:
        """An ACK arrived; which device's, nobody knows. One too many makes the number wrap around (R4)."""
        counted = replace(self, acks=self.acks + 1, pending=(self.pending - 1) % _U32)
        return replace(counted, error=UNDERFLOW) if self.pending == 0 else counted

    # --- switchover ---

    def asks_exactly(self, total_bytes: int, precopy_bytes: int, threshold_bytes: int) -> bool:
        """Does the exact query follow an estimate with this sum, of which pre-copy can still carry so much?

        Without it there is no decision, and nobody is asked anew what stop-copy will carry.
        """
        return precopy_bytes == 0 or total_bytes <= threshold_bytes

    def waits_in_vain(self, total_bytes: int, precopy_bytes: int, threshold_bytes: int, *, ram_bytes: int) -> bool:
        """After an estimate: the next one will be the same, and so on until the limit is widened or QEMU is told to
        cancel, though the gate is open (R31).

        The guest was stopped while a device had pre-copy data left, which now only stop-copy can carry and which still
        counts for pre-copy, so no exact query is due. A size that is unknown, and counted as 100 GiB, stays so.
        """
        idle = not self.running and ram_bytes == 0 and all(each.quiesced or not each.precopy for each in self.devices)
        return idle and not self.asks_exactly(total_bytes, precopy_bytes, threshold_bytes)

    @property
    def may_switch_over(self) -> bool:
        """The gate: R5, R6, R7, R8. Evaluated after the exact query of the same iteration (R28)."""
        return self.mode is AckMode.OFF or not self.running or self.pending == 0

    def switches_over(self, total_bytes: int, threshold_bytes: int) -> bool:
        """Does QEMU decide for the switchover, after an exact query with this sum?"""
        return self.may_switch_over and total_bytes <= threshold_bytes

    def switch_over(self) -> QemuSource:
        """The decision, and the stop that follows it. Each device that `gets_last_look` has it now."""
        self._only(QemuStage.ACTIVE)
        if not self.may_switch_over:
            raise ValueError(f"QEMU does not stop a running guest while {self.pending} ACKs are pending")
        stage = QemuStage.PARKED if PAUSE in self.setup.capabilities else QemuStage.DEVICE
        return replace(self, stage=stage, live=self.running, running=False, before=self.pending)

    def gets_last_look(self, name: str) -> bool:
        """With the guest stopped, before PRE_COPY_P2P. Later REINITs, and those of other devices, are never seen."""
        device = self.device(name)
        able = device.precopy and device.reinit and device.p2p
        return self.mode is AckMode.PER_DEVICE and able and not device.quiesced

    def quiesce(self, name: str) -> QemuSource:
        """PRE_COPY -> PRE_COPY_P2P -> STOP_COPY. In between nobody looks, except at an operator's stop."""
        return self._with(replace(self.device(name), quiesced=True))

    def proceed(self) -> QemuSource:
        """`migrate-continue`."""
        self._only(QemuStage.PARKED)
        return replace(self, stage=QemuStage.DEVICE, before=self.pending)

    def finish(self) -> QemuSource:
        """Everything was sent and the return path has ended; an error on it counts even now."""
        self._only(QemuStage.DEVICE)
        return self.fail(self.error) if self.error else replace(self, stage=QemuStage.COMPLETED)

    def fail(self, error: str) -> QemuSource:
        """The migration is over; a guest that it had stopped runs again (R21)."""
        return replace(self, stage=QemuStage.FAILED, running=self._was_running, error=error)

    # --- reading ---

    @property
    def mode(self) -> AckMode:
        """How this process counts ACKs."""
        return self.setup.mode

    @property
    def in_progress(self) -> bool:
        """A migration is under way: capabilities are fixed, and no other one starts."""
        return self.stage in (QemuStage.ACTIVE, QemuStage.PARKED, QemuStage.DEVICE)

    def device(self, name: str) -> DeviceAccount:
        """What is known about the device of that name. Raises StopIteration if there is none."""
        return next(each for each in self.devices if each.name == name)

    @property
    def _was_running(self) -> bool:
        return self.running or (self.stage in (QemuStage.PARKED, QemuStage.DEVICE) and self.live)

    def _looked_at(self, name: str) -> DeviceAccount:
        device = self.device(name)
        if device.quiesced or not device.precopy:
            raise ValueError(f"QEMU does not look at {name}: it is not in PRE_COPY")
        return device

    def _with(self, changed: DeviceAccount) -> QemuSource:
        return replace(self, devices=tuple(changed if each.name == changed.name else each for each in self.devices))

    def _only(self, *stages: QemuStage) -> None:
        if self.stage not in stages:
            raise ValueError(f"not in stage {self.stage}")


class StreamRefused(Exception):
    """The destination gives up loading, in these words."""


@dataclass(frozen=True, slots=True)
class QemuDestination:
    """The other end, as far as it acknowledges. Methods return how many ACK messages leave as well."""

    setup: AckSetup = field(default_factory=AckSetup)
    waiting: int = 0
    """Legacy: devices whose marker has not been loaded."""

    def begin(self, devices: Iterable[DeviceAccount]) -> tuple[QemuDestination, int]:
        """The stream opens. In legacy mode, without a device that takes part, the ACK leaves at once."""
        waiting = sum(each.precopy for each in devices) if self.setup.mode is AckMode.LEGACY else 0
        at_once = self.setup.mode is AckMode.LEGACY and waiting == 0
        return replace(self, waiting=waiting), int(at_once)

    def approve(self, name: str) -> tuple[QemuDestination, int]:
        """A device has loaded all data before its marker. Raises StreamRefused."""
        match self.setup.mode:
            case AckMode.OFF:
                raise StreamRefused(f"{name}: Received INIT_DATA_SENT but switchover ack is not used")
            case AckMode.PER_DEVICE:
                return self, 1
            case AckMode.LEGACY:
                if self.waiting == 0:
                    raise StreamRefused(f"{name}: approved once more than there are devices")
                return replace(self, waiting=self.waiting - 1), int(self.waiting == 1)
