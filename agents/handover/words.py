"""PURE. The words in which an attempt's session machines and their shell speak: commands and events.

`step(state, event) -> (state, commands)` stands in `source/machine.py` and `destination.py`: no clock, no I/O.
The shell carries the commands out, in order, and feeds back what came of them as events. Deadlines are timers that the
shell keeps: commands start and cancel them (`timers.py`), a ring is an event. Everything that decides whether the guest
may run somewhere is in these machines or in `orchestrator.core`, so that the exploration (tests/exploration) drives the
very code that runs in production. Rules H1-H16 are those of docs/protocol.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.core.disks import SyncPoint
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord
from orchestrator.core.ids import AckRequest

# --- commands ---------------------------------------------------------------------------------------------------------


class Do(StrEnum):
    """Effects without arguments. The event that answers each stands behind it."""

    BIND = "bind"  # Bound / LedgerRefused
    SYNC_DISKS = "sync_disks"  # beside all others: local disks are copied; DISKS_READY / DiskFailed
    START_PRECOPY = "start_precopy"  # engine under hold, shims RUNNING -> PRE_COPY; StatusSeen, ShimFailed
    HOLD = "hold"
    RELEASE = "release"
    PAUSE = "pause"  # Paused
    RESUME = "resume"  # Resumed
    QUIESCE = "quiesce"  # all shims PRE_COPY -> P2P, final query of each, then all STOP_COPY; Quiesced
    DRAIN_DISKS = "drain_disks"  # end every mirror, note writes from here on; Drained / DiskFailed
    RELEASE_DISKS = "release_disks"  # the destination lets go of its images; repeated by the shell until LOADED
    PROCEED = "proceed"  # migrate-continue, stop-copy streams beside it; StatusSeen, ShimsSent
    ROLL_BACK_SHIMS = "roll_back_shims"  # ShimsBack
    ABORT_ENGINE = "abort_engine"  # EngineOver
    READ = "read"  # barrier, then record and req; RecordRead
    GO = "go"  # repeated by the shell until DONE is known
    RETIRE_DISKS = "retire_disks"  # the local images here are out of use; not answered
    DISCARD_SOURCE = "discard_source"  # VMM destroyed, shims retired; Discarded
    WRITE_ACKS = "write_acks"  # informative, not answered
    DECLARE_CRASHED = "declare_crashed"  # CrashRecorded
    # destination
    VALIDATE = "validate"  # shims RESUMING -> STOP; Validated / ShimFailed
    SEND_LOADED = "send_loaded"  # repeated by the shell until answered or the attempt is over
    WRITE_MARKER = "write_marker"  # MarkerWritten / MarkerFailed
    ACTIVATE_SHIMS = "activate_shims"  # Activated / ActivationFailed
    START_GUEST = "start_guest"  # cont, or only take responsibility; Started / ActivationFailed
    ANNOUNCE = "announce"
    WRITE_DONE = "write_done"  # DoneRecorded / LedgerRefused / LedgerUnknown
    SEND_DONE = "send_done"
    SEND_FAILED = "send_failed"
    DISCARD_DESTINATION = "discard_destination"  # Discarded
    WRITE_ROLLBACK = "write_rollback"  # RolledBack / LedgerRefused / LedgerUnknown
    RETRY_LATER = "retry_later"  # beside all others; RetryDue, after a bounded pause


class Timer(StrEnum):
    """The bounds that a machine may set; how long each is, its shell knows."""

    DISKS = "disks"  # local disks are copied before the memory
    PRECOPY = "precopy"  # the guest runs and is copied
    SUSPENDED = "suspended"  # policy has stopped it, so that the rest fits
    ACK = "ack"  # an ACK is missing
    GATE_WAIT = "gate_wait"  # the engine has stopped the guest although one is missing
    SWITCHOVER = "switchover"  # the guest stands still, and no COMMIT has left
    # destination
    UNCLAIMED = "unclaimed"  # nobody conducts the attempt
    SOURCE_TIME = "source_time"  # the source may write its own reason first


@dataclass(frozen=True, slots=True)
class StartTimer:
    """At once, not in turn with other commands. Rang, unless it is cancelled before. `number` tells starts apart."""

    timer: Timer
    number: int


@dataclass(frozen=True, slots=True)
class CancelTimer:
    """At once. A ring that is on its way is dropped by its number."""

    timer: Timer
    number: int


@dataclass(frozen=True, slots=True)
class WriteRequests:
    """Make requests durable, behind `check guest version`; RequestsWritten / LedgerRefused."""

    entries: tuple[AckRequest, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """The one quorum write of the blackout. `req_version` None: the guest was stopped, no request can be late."""

    req_version: int | None


@dataclass(frozen=True, slots=True)
class WriteAbort:
    """H6, the compare-and-set. AbortRecorded / LedgerRefused / LedgerUnknown."""

    reason: AbortReason
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Note:
    """A line of the time line."""

    event: str
    detail: str = ""


Command = Do | StartTimer | CancelTimer | WriteRequests | Commit | WriteAbort | Note

# --- events -----------------------------------------------------------------------------------------------------------


class Seen(StrEnum):
    """Events without content."""

    BEGIN = "begin"
    BOUND = "bound"
    ACTIVE = "active"
    PARKED = "parked"
    COMPLETED = "completed"
    ENGINE_FAILED = "engine_failed"
    GUEST_ENDED = "guest_ended"
    VMM_DIED = "vmm_died"
    PAUSED = "paused"
    PAUSE_QUEUED = "pause_queued"  # parked before the pause could take effect
    RESUMED = "resumed"
    RESUME_FAILED = "resume_failed"
    DISKS_READY = "disks_ready"  # every local disk is copied, but for what is being written
    SHIMS_SENT = "shims_sent"
    SHIM_FAILED = "shim_failed"
    SHIMS_BACK = "shims_back"
    SHIMS_BACK_RESET = "shims_back_reset"  # a device lost its state on the way back
    ENGINE_OVER = "engine_over"  # the attempt is over in the VMM; the guest is as before it was stopped
    ENGINE_SEALED = "engine_sealed"  # it had completed before the abort took effect
    DEST_FAILED = "dest_failed"
    DONE_KNOWN = "done_known"
    DISCARDED = "discarded"
    ABORT_RECORDED = "abort_recorded"
    COMMITTED = "committed"
    LEDGER_REFUSED = "ledger_refused"
    LEDGER_UNKNOWN = "ledger_unknown"
    CRASH_RECORDED = "crash_recorded"
    RETRY_DUE = "retry_due"
    VITALS_GOOD = "vitals_good"  # peer answered and a quorum was seen, both less than a second ago
    VITALS_BAD = "vitals_bad"
    # destination
    SHIMS_LOADED = "shims_loaded"  # END of every device arrived
    DISKS_RELEASED = "disks_released"  # nobody but our VMM uses the local images any more
    DISKS_FAILED = "disks_failed"  # they cannot be released
    VALIDATED = "validated"
    MARKER_WRITTEN = "marker_written"
    MARKER_FAILED = "marker_failed"
    ACTIVATED = "activated"
    STARTED = "started"
    ACTIVATION_FAILED = "activation_failed"
    DONE_RECORDED = "done_recorded"
    ROLLBACK_RECORDED = "rollback_recorded"


@dataclass(frozen=True, slots=True)
class Rang:
    """A timer is over. Its machine drops a ring whose number is not that of the running start."""

    timer: Timer
    number: int


@dataclass(frozen=True, slots=True)
class Requested:
    """A device of ours asks for an ACK."""

    entry: AckRequest


@dataclass(frozen=True, slots=True)
class Acked:
    """The destination's device loaded all initial bytes of this generation."""

    entry: AckRequest


@dataclass(frozen=True, slots=True)
class RequestsWritten:
    """Our requests are durable. `version` covers everything that stands in the node, so `present` tells all of it."""

    entries: tuple[AckRequest, ...]
    present: tuple[AckRequest, ...]
    version: int


@dataclass(frozen=True, slots=True)
class RequestsSeen:
    """`req` as a watch shows it: somebody else asked through the ledger."""

    entries: tuple[AckRequest, ...]
    version: int


@dataclass(frozen=True, slots=True)
class Quiesced:
    """Every shim is in STOP_COPY; `newest` has what their final queries asked for."""

    newest: tuple[AckRequest, ...]


@dataclass(frozen=True, slots=True)
class DiskFailed:
    """Copying a local disk has ended, or cannot begin: the destination is full, lost, or does not answer."""

    disk: str


@dataclass(frozen=True, slots=True)
class Drained:
    """The guest stands still, every mirror has ended without an error, and what is written from here on is noted."""

    points: tuple[SyncPoint, ...]


@dataclass(frozen=True, slots=True)
class FoundLate:
    """The VMM's own verdict on the devices inside it: they asked for another ACK after it had stopped the guest."""

    devices: tuple[str, ...] = ()
    """As far as their names are known."""


@dataclass(frozen=True, slots=True)
class DevicesLost:
    """Devices inside the VMM were reset on the attempt's way out, or on its way in: what they held is gone."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadedReport:
    """LOADED from the destination; `equal`: bytes and digest of every device are those that were sent."""

    inc: str
    equal: bool
    images: tuple[SyncPoint, ...] = ()
    """The local disks' images that it holds, each with the point at which it was released."""


@dataclass(frozen=True, slots=True)
class WantRunSeen:
    """The operator's wish, as a watch shows it."""

    run: bool


@dataclass(frozen=True, slots=True)
class RecordRead:
    """Record and `req` version, read behind a barrier of this session (H13)."""

    record: GuestRecord
    req_version: int


@dataclass(frozen=True, slots=True)
class RecordSeen:
    """What a watch shows: may be old, so only facts that can never change back are taken from it."""

    record: GuestRecord


@dataclass(frozen=True, slots=True)
class GoSeen:
    """The source says that the commit succeeded."""

    inc: str


Event = (
    Seen
    | Rang
    | Requested
    | Acked
    | RequestsWritten
    | RequestsSeen
    | Quiesced
    | DiskFailed
    | Drained
    | FoundLate
    | DevicesLost
    | LoadedReport
    | WantRunSeen
    | RecordRead
    | RecordSeen
    | GoSeen
)
