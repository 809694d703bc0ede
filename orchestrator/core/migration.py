"""The course of one migration, as its coordinator sees it: attempts, retries, deadlines, the verdict.

Pure. The records decide: every `Read` carries a fresh read of all three nodes (guest record, state, attempts), and the
stage follows from them, so that a driver that starts after a crash continues where the records stand. What only memory
knows are running calls and local deadlines; losing it repeats an idempotent call and starts a deadline again.

    FREE --Open--> OPEN --Prepare--> --Conduct--> bound: the agents own it --> COMMITTED --> arrived --Settle--> ENDED
                     ^                                                    \\-> ABORTED --FetchReport--Settle-+-> ENDED
                     +------------------------- RETRY_WAIT <-----------------------------------------------+

All times are milliseconds of the caller's monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import AbortReason, FailureReason, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership, may_retry
from orchestrator.core.policy import backoff_ms
from orchestrator.core.records import AttemptReport, MigrationPhase, MigrationSpec, MigrationState, WaitingFor

REPEAT_MS = 1_000.0
"""Pause before an idempotent call is repeated."""
UNREACHABLE_REPEAT_MS = 200.0
"""The same after a call whose outcome is unknown; it doubles with each that follows, up to REPEAT_MS. All of
them belong to one attempt, which `prepare_timeout_ms` ends."""
PLACEMENT_PATIENCE_MS = 20_000.0
"""How long a migration waits for a host that is silent or busy before it gives up placing."""
PLACEMENT_REPEAT_MS = 300.0
SOURCE_PATIENCE_MS = 15_000.0
"""How long the source's agent may be silent (it has no session any more) before its migrations are given up: long
enough for an agent that restarts, short enough for an operator who waits for a host that is dead."""


class Stage(StrEnum):
    """What the driver is busy with. Never stored."""

    LOOK = "LOOK"
    WAIT_GUEST = "WAIT_GUEST"
    OPEN = "OPEN"
    PLACEMENT_WAIT = "PLACEMENT_WAIT"
    PREPARE = "PREPARE"
    CONDUCT = "CONDUCT"
    FOLLOW = "FOLLOW"
    ABORT = "ABORT"
    REPORT = "REPORT"
    SETTLE = "SETTLE"
    RETRY_WAIT = "RETRY_WAIT"
    ENDED = "ENDED"


class Situation(StrEnum):
    """What the records say about this migration."""

    FREE = "FREE"
    BUSY = "BUSY"
    """The guest starts, or is in another migration."""
    OPEN = "OPEN"
    BOUND = "BOUND"
    COMMITTED = "COMMITTED"
    ABORTED = "ABORTED"
    ARRIVED = "ARRIVED"
    STAYED = "STAYED"
    """Somebody closed the migration in RETRY_WAIT: cancelled."""
    CRASHED = "CRASHED"
    GONE = "GONE"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A destination VMM that waits for the stream of one attempt."""

    inc: str
    stream: Endpoint
    """Where the engine's stream goes."""
    peer: Endpoint
    """Of the destination's PeerService."""
    machine: str = ""
    """The machine type that it really has; the source's must be the same. Empty: not known."""
    switchover_ack: str = ""
    """How its VMM handles ACKs (none, legacy, per-device); likewise."""
    tls: bool = False
    """It takes memory and disks by TLS only, and only from the guest's host."""


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read:
    """A fresh read, in this order: guest record, state, attempts."""

    record: GuestRecord | None
    durable: MigrationState
    reports: tuple[AttemptReport, ...] = ()
    source_live: bool = True
    """The agent of the guest's owner has a session."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A write (`Open`, `Abort`, `Settle`) came to a definite end, won or lost. A fresh `Read` follows."""


@dataclass(frozen=True, slots=True)
class NoPlace:
    """No host can take the guest now; `message` says why for each. The answer to `Open`."""

    reason: RefusalReason
    message: str
    transient: bool = False
    """A host that is silent, or that receives too many at the moment, would do."""
    passing: bool = False
    """Time may bring a place."""


@dataclass(frozen=True, slots=True)
class SourceSilent:
    """The attempt was not opened: the source's agent has no session."""


@dataclass(frozen=True, slots=True)
class PrepareAnswer:
    """The destination waits for the stream of this attempt. The answer to `Prepare`."""

    attempt: int
    prepared: Prepared


@dataclass(frozen=True, slots=True)
class ConductAnswer:
    """The source conducts this attempt now, or has done so. The answer to `Conduct`."""

    attempt: int


@dataclass(frozen=True, slots=True)
class CallRefused:
    """Prepare or Conduct was refused, or could not be delivered (`unreachable`: nothing is known of its effect)."""

    attempt: int
    reason: RefusalReason
    message: str
    unreachable: bool = False


@dataclass(frozen=True, slots=True)
class ReportAnswer:
    """The source agent's report, or a minimal one from the record when the agent did not answer in time."""

    report: AttemptReport


@dataclass(frozen=True, slots=True)
class Told:
    """`Wait` is written. `stand_back`: as the command asked."""

    stand_back: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: deadlines and pauses are looked at."""


Event = (
    Read | Finished | NoPlace | SourceSilent | Told | PrepareAnswer | ConductAnswer | CallRefused | ReportAnswer | Tick
)


# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Open:
    """Choose a destination and write OPEN(attempt), or answer `NoPlace`."""

    attempt: int
    wanted: str
    avoid: tuple[str, ...]
    prefer: str = ""
    """Where its memory is promised already, or where the evacuation wants it; any other host will do."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Write what the migration waits for, and give up the memory that is promised to it.

    `stand_back`: the wait may be long, so the migration also gives up its places; a later driver tries again."""

    what: WaitingFor
    message: str
    stand_back: bool = False


@dataclass(frozen=True, slots=True)
class StandBack:
    """The driver's work is over for now; the migration's is not."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """Ask the destination's agent for a VMM that waits for this attempt's stream. Repeated until there is an answer."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Conduct:
    """Ask the source's agent to move the guest into the VMM that was prepared. Repeated until there is an answer.
    `previous_reason`: why the attempt before was aborted, empty for a first one."""

    attempt: int
    prepared: Prepared
    previous_reason: str


@dataclass(frozen=True, slots=True)
class Abort:
    """H6's compare-and-set. Whoever writes first wins; the next `Read` tells who that was."""

    attempt: int
    reason: AbortReason
    said: str = ""
    """What an agent answered, or did not, where that is the cause. Written into the state together with the abort: the
    source's agent may know nothing of the attempt, and this driver may not live to write the report."""


@dataclass(frozen=True, slots=True)
class FetchReport:
    """Ask the source's agent for its report of an attempt that the record says is over; `outcome` is what the record
    says of it (COMMITTED, ABORTED)."""

    attempt: int
    outcome: str


@dataclass(frozen=True, slots=True)
class Settle:
    """One write: report, reservation released, phase; with `close` the guest record goes ABORTED -> IDLE(S)."""

    phase: MigrationPhase
    report: AttemptReport | None = None
    close: bool = False
    failure: FailureReason | None = None
    message: str = ""
    retry_wait_ms: int = 0
    keep_room: bool = False
    """The memory at the destination stays promised: another attempt follows."""


@dataclass(frozen=True, slots=True)
class End:
    """Nothing is left to do."""


Command = Open | Wait | StandBack | Prepare | Conduct | Abort | FetchReport | Settle | End


@dataclass(frozen=True, slots=True)
class Course:
    """Everything the driver of one migration knows."""

    spec: MigrationSpec
    total_deadline_ms: float
    stage: Stage = Stage.LOOK
    record: GuestRecord | None = None
    durable: MigrationState = field(default_factory=MigrationState)
    reports: tuple[AttemptReport, ...] = ()
    attempt: int = 0
    """The attempt that the stage is about."""
    prepared: Prepared | None = None
    report: AttemptReport | None = None
    """Fetched, not yet settled."""
    deadline_ms: float | None = None
    """Of the stage."""
    again_ms: float | None = None
    """When the stage's call is due again."""
    patience_ms: float | None = None
    fatal: FailureReason | None = None
    """A refusal after which no attempt can do better."""
    refusal: str = ""
    """How the attempt's last call to an agent failed, as "REASON: message"; empty once one was answered."""
    silent_since_ms: float | None = None
    """Since when the source's agent is silent; None: it is not."""
    unanswered: bool = False
    """The last call to the source had no answer."""
    in_vain: int = 0
    """Calls in a row whose outcome is unknown."""
    told: str = ""
    """What the migration last said that it waits for."""


@dataclass(frozen=True, slots=True)
class Step:
    """What the driver knows now, and what it has to do next, in this order."""

    course: Course
    commands: tuple[Command, ...] = ()


def start(
    spec: MigrationSpec, *, now_ms: float, spent_ms: float = 0.0, reports: tuple[AttemptReport, ...] = ()
) -> Course:
    """A course that knows nothing yet. Of the total budget there is left what neither the state says (`spent_ms`, from
    the migration's creation on) nor the reported attempts have used up: no wall clock."""
    spent = max(spent_ms, sum(report.duration_ms for report in reports))
    return Course(spec=spec, total_deadline_ms=now_ms + max(0.0, spec.policy.total_timeout_ms - spent))


def spent_ms(course: Course, now_ms: float) -> float:
    """How much of the total budget is used up."""
    return course.spec.policy.total_timeout_ms - (course.total_deadline_ms - now_ms)


def attempt_ms(course: Course, now_ms: float) -> float:
    """How long ago the attempt was opened, by whichever driver; 0 when nobody noted it."""
    opened = course.durable.opened_spent_ms
    return 0.0 if opened is None else max(0.0, spent_ms(course, now_ms) - opened)


def situation(record: GuestRecord | None, migration: str, durable: MigrationState) -> Situation:
    """Where this migration stands. An attempt that was opened and whose guest went on without a verdict has arrived:
    every other way out of it is written together with the verdict, but for a close in RETRY_WAIT."""
    if record is None or record.phase is Ownership.GONE:
        return Situation.GONE
    if record.phase is Ownership.CRASHED:
        return Situation.CRASHED
    if record.migration != migration:
        if durable.attempt > 0:
            return Situation.STAYED if durable.phase is MigrationPhase.RETRY_WAIT else Situation.ARRIVED
        return Situation.FREE if record.phase is Ownership.IDLE else Situation.BUSY
    if record.phase is Ownership.OPEN:
        return Situation.BOUND if record.inc else Situation.OPEN
    if record.phase is Ownership.COMMITTED:
        return Situation.COMMITTED
    if record.phase is Ownership.ABORTED:
        return Situation.ABORTED
    if record.phase is Ownership.IDLE:
        return Situation.ARRIVED if record.inc else Situation.STAYED
    return Situation.BUSY


_FATAL = {
    AbortReason.CANCELLED: FailureReason.CANCELLED,
    AbortReason.NOT_CONVERGING: FailureReason.NOT_CONVERGING,
    AbortReason.TOTAL_TIMEOUT: FailureReason.TOTAL_TIMEOUT,
    AbortReason.GUEST_ENDED: FailureReason.GUEST_ENDED,
    AbortReason.DEVICE_RESET: FailureReason.DEVICE_RESET,
}
"""Another attempt would end the same way, or must not be made."""

_DESTINATION_AT_FAULT = frozenset(
    {
        AbortReason.PREPARE_FAILED,
        AbortReason.PREPARE_TIMEOUT,
        AbortReason.DESTINATION_LOST,
        AbortReason.DESTINATION_RESTARTED,
        AbortReason.DISK_MIRROR_FAILED,
    }
)

_FATAL_REFUSALS = {
    RefusalReason.DEVICE_NOT_MIGRATABLE: FailureReason.DEVICE_NOT_MIGRATABLE,
    RefusalReason.RETRY_NEEDS_RUN: FailureReason.RETRY_NEEDS_RUN,
    RefusalReason.GUEST_NOT_RUNNING: FailureReason.GUEST_ENDED,
}


# --- the step ---------------------------------------------------------------------------------------------------------


def step(course: Course, event: Event, *, now_ms: float, jitter: float = 1.0) -> Step:
    """One event. `jitter` (0.5..1, drawn by the shell) scales a back-off that this step may begin."""
    if course.stage is Stage.ENDED:
        return Step(course)
    match event:
        case Read():
            return _seen(course, event, now_ms, jitter)
        case Finished():
            return Step(replace(course, stage=Stage.LOOK, deadline_ms=None, again_ms=None))
        case NoPlace():
            return _no_place(course, event, now_ms)
        case SourceSilent() if course.stage is Stage.OPEN:
            return _source_silent(_hear(course, now_ms, live=False), now_ms)
        case Told() if event.stand_back and course.stage is Stage.PLACEMENT_WAIT:
            return Step(replace(course, stage=Stage.ENDED), (StandBack(),))
        case PrepareAnswer() if event.attempt == course.attempt and course.stage is Stage.PREPARE:
            ready = replace(
                course,
                stage=Stage.CONDUCT,
                prepared=event.prepared,
                again_ms=now_ms + REPEAT_MS,
                refusal="",
                in_vain=0,
            )
            return Step(ready, (_conduct(ready, event.prepared),))
        case ConductAnswer() if event.attempt == course.attempt and course.stage is Stage.CONDUCT:
            return Step(replace(course, again_ms=now_ms + REPEAT_MS, unanswered=False, refusal="", in_vain=0))
        case CallRefused() if event.attempt == course.attempt and course.stage in (Stage.PREPARE, Stage.CONDUCT):
            return _call_refused(course, event, now_ms)
        case ReportAnswer() if event.report.attempt == course.attempt and course.stage is Stage.REPORT:
            return _judge(replace(course, report=event.report), now_ms, jitter)
        case Tick():
            return _tick(course, now_ms)
        case _:
            return Step(course)  # answer to a call of an attempt that is over


def wake_ms(course: Course) -> float | None:
    """When the next `Tick` is due; None: only events move this course."""
    times = [time for time in (course.deadline_ms, course.again_ms) if time is not None]
    committed = course.record is not None and course.record.phase is Ownership.COMMITTED
    if course.stage in _BOUNDED_BY_TOTAL and not committed:
        times.append(course.total_deadline_ms)
        if course.silent_since_ms is not None and course.stage is Stage.FOLLOW:
            times.append(course.silent_since_ms + SOURCE_PATIENCE_MS)
    return min(times, default=None)


_BOUNDED_BY_TOTAL = frozenset(
    {Stage.WAIT_GUEST, Stage.PLACEMENT_WAIT, Stage.PREPARE, Stage.CONDUCT, Stage.FOLLOW, Stage.RETRY_WAIT}
)


def _seen(course: Course, event: Read, now_ms: float, jitter: float) -> Step:
    course = replace(course, record=event.record, durable=event.durable, reports=event.reports)
    course = _hear(course, now_ms, live=event.source_live)
    if event.durable.phase.terminal:
        return Step(replace(course, stage=Stage.ENDED, deadline_ms=None, again_ms=None), (End(),))
    if course.stage in (Stage.OPEN, Stage.SETTLE, Stage.ABORT):
        return Step(course)  # our own write is under way; `Finished` comes
    where = situation(event.record, course.spec.id, event.durable)
    match where:
        case Situation.FREE:
            return _free(course, now_ms)
        case Situation.BUSY:
            if event.durable.cancel_requested:
                return _settle_cancelled(course)
            if _is_lost(course, now_ms):
                return _settle_lost(course)
            return _total(replace(course, stage=Stage.WAIT_GUEST, again_ms=None), now_ms)
        case Situation.OPEN | Situation.BOUND:
            return _open(course, now_ms, bound=where is Situation.BOUND)
        case Situation.COMMITTED:
            return Step(replace(_at_attempt(course), stage=Stage.FOLLOW, deadline_ms=None, again_ms=None))
        case Situation.ABORTED:
            return _aborted(course, now_ms)
        case Situation.ARRIVED:
            return _arrived(course)
        case Situation.STAYED:
            return _settle_cancelled(course)
        case Situation.CRASHED:
            return _settle(
                course, MigrationPhase.FAILED, FailureReason.GUEST_CRASHED, "the guest crashed with its host"
            )
        case Situation.GONE:
            return _settle(course, MigrationPhase.FAILED, FailureReason.GUEST_GONE, "the guest is gone")


def _hear(course: Course, now_ms: float, *, live: bool) -> Course:
    if live:
        return course if course.silent_since_ms is None else replace(course, silent_since_ms=None)
    return course if course.silent_since_ms is not None else replace(course, silent_since_ms=now_ms)


def _is_lost(course: Course, now_ms: float) -> bool:
    """The source's agent has been silent for too long."""
    return course.silent_since_ms is not None and now_ms - course.silent_since_ms >= SOURCE_PATIENCE_MS


def _source_silent(course: Course, now_ms: float) -> Step:
    """No attempt is opened: its end would be blamed on a healthy destination, and memory promised there for nothing."""
    if _is_lost(course, now_ms):
        return _settle_lost(course)
    wait = Wait(WaitingFor.SOURCE, f"waiting for the agent of {_source(course)}, which is silent")
    return _wait(course, wait, again_ms=now_ms + PLACEMENT_REPEAT_MS)


def _wait(course: Course, wait: Wait, *, again_ms: float) -> Step:
    """For something without which there is no attempt; said once."""
    commands = () if course.told == wait.message and not wait.stand_back else (wait,)
    return Step(replace(course, stage=Stage.PLACEMENT_WAIT, told=wait.message, again_ms=again_ms), commands)


def _source(course: Course) -> str:
    return course.record.owner.host if course.record is not None else course.durable.source


def _settle_lost(course: Course) -> Step:
    said = f"the agent of {_source(course)} is silent; the guest may run on there, and moves when the agent is back"
    return _settle(course, MigrationPhase.FAILED, FailureReason.SOURCE_UNREACHABLE, said)


def _at_attempt(course: Course) -> Course:
    """Adopt the record's attempt number; what belonged to another attempt is forgotten."""
    assert course.record is not None
    if course.record.migration != course.spec.id or course.record.attempt == course.attempt:
        return course
    return replace(
        course,
        attempt=course.record.attempt,
        prepared=None,
        report=None,
        stage=Stage.LOOK,
        unanswered=False,
        refusal="",
        in_vain=0,
    )


def _free(course: Course, now_ms: float) -> Step:
    if course.durable.cancel_requested:
        return _settle_cancelled(course)
    if now_ms >= course.total_deadline_ms:
        return _settle_total(course)
    if course.stage is Stage.PLACEMENT_WAIT and course.again_ms is not None and now_ms < course.again_ms:
        return Step(course)
    return _issue_open(course, 1, now_ms)


def _issue_open(course: Course, attempt: int, now_ms: float) -> Step:
    if course.silent_since_ms is not None:
        return _source_silent(course, now_ms)
    avoid = tuple(dict.fromkeys(r.destination for r in course.reports if r.reason in _DESTINATION_AT_FAULT))
    course = replace(course, stage=Stage.OPEN, deadline_ms=None, again_ms=None)
    prefer = course.durable.destination or course.spec.preferred
    return Step(course, (Open(attempt, course.spec.destination, avoid, prefer),))


def _open(course: Course, now_ms: float, *, bound: bool) -> Step:
    course = replace(_at_attempt(course), patience_ms=None, told="")
    if course.durable.cancel_requested:
        return _abort(course, AbortReason.CANCELLED)
    if now_ms >= course.total_deadline_ms:
        return _abort(course, AbortReason.TOTAL_TIMEOUT)
    if course.silent_since_ms is not None and (not bound or _is_lost(course, now_ms)):
        return _abort(course, AbortReason.SOURCE_UNREACHABLE)
    if bound:
        return Step(replace(course, stage=Stage.FOLLOW, deadline_ms=None, again_ms=None))
    if course.stage in (Stage.PREPARE, Stage.CONDUCT):
        return Step(course)
    deadline = now_ms + max(0.0, course.spec.policy.prepare_timeout_ms - attempt_ms(course, now_ms))
    course = replace(course, stage=Stage.PREPARE, deadline_ms=deadline, again_ms=None)
    return Step(course, (Prepare(course.attempt),))


def _aborted(course: Course, now_ms: float) -> Step:
    course = _at_attempt(course)
    if not any(report.attempt == course.attempt for report in course.reports):
        return _fetch(course, "ABORTED")
    if course.durable.cancel_requested or course.record is None or not may_retry(course.record):
        return _settle_cancelled(course)
    if now_ms >= course.total_deadline_ms:
        return _settle_total(course)
    if course.stage in (Stage.RETRY_WAIT, Stage.PLACEMENT_WAIT) and course.again_ms is not None:
        return Step(course) if now_ms < course.again_ms else _issue_open(course, course.attempt + 1, now_ms)
    again = now_ms + course.durable.retry_wait_ms
    return Step(replace(course, stage=Stage.RETRY_WAIT, deadline_ms=None, again_ms=again))


def _arrived(course: Course) -> Step:
    record = course.record
    ours = record is not None and record.migration == course.spec.id
    course = _at_attempt(course) if ours else replace(course, attempt=course.durable.attempt)
    settled = next((report for report in course.reports if report.attempt == course.attempt), None)
    return _fetch(course, "COMMITTED") if settled is None else _settle_arrived(course, settled)


def _settle_arrived(course: Course, report: AttemptReport | None) -> Step:
    """The guest is at the destination. One that runs there with a device that lost its state was not moved whole."""
    if report is not None and report.reason is AbortReason.DEVICE_RESET:
        return _settle(course, MigrationPhase.FAILED, FailureReason.DEVICE_RESET, report.message)
    return _settle(course, MigrationPhase.SUCCEEDED, None, "")


def _fetch(course: Course, outcome: str) -> Step:
    if course.stage is Stage.REPORT:
        return Step(course)
    course = replace(course, stage=Stage.REPORT, deadline_ms=None, again_ms=None)
    return Step(course, (FetchReport(course.attempt, outcome),))


def _judge(course: Course, now_ms: float, jitter: float) -> Step:
    """The attempt is over and its report is here: success, another attempt, or the end."""
    record, policy = course.record, course.spec.policy
    where = situation(record, course.spec.id, course.durable)
    if where is Situation.ARRIVED:
        return _settle_arrived(course, course.report)
    if where is not Situation.ABORTED or record is None:
        return Step(replace(course, stage=Stage.LOOK))  # crashed or gone meanwhile: the next look says so
    if course.durable.cancel_requested or not may_retry(record):
        return _settle_cancelled(course)
    if course.fatal is not None:
        return _settle(course, MigrationPhase.FAILED, course.fatal, course.refusal)
    if course.report is not None and course.report.needs_operator:
        said = f"attempt {course.attempt}: the guest could not be started again on {record.owner.host}, which keeps it"
        return _settle(course, MigrationPhase.FAILED, FailureReason.PAUSED_NEEDS_OPERATOR, said)
    reason = record.reason or AbortReason.ENGINE_FAILED
    detail = course.report.message if course.report else ""
    said = f"attempt {course.attempt}: {reason}" + (f" ({detail})" if detail else "")
    if reason in _FATAL:
        return _settle(course, MigrationPhase.FAILED, _FATAL[reason], said)
    lost = reason is AbortReason.SOURCE_UNREACHABLE
    if lost and course.attempt >= policy.max_attempts:
        return _settle_lost(course)
    if course.attempt >= policy.max_attempts:
        return _settle(course, MigrationPhase.FAILED, FailureReason.ATTEMPTS_EXHAUSTED, said)
    wait = int(backoff_ms(policy, course.attempt) * jitter)
    if now_ms + wait >= course.total_deadline_ms:
        return _settle(course, MigrationPhase.FAILED, FailureReason.TOTAL_TIMEOUT, f"no time for another one; {said}")
    settle = Settle(MigrationPhase.RETRY_WAIT, course.report, message=said, retry_wait_ms=wait, keep_room=not lost)
    return Step(replace(course, stage=Stage.SETTLE, deadline_ms=None, again_ms=None), (settle,))


def _settle(course: Course, phase: MigrationPhase, failure: FailureReason | None, message: str) -> Step:
    record = course.record
    close = record is not None and situation(record, course.spec.id, course.durable) is Situation.ABORTED
    command = Settle(phase, course.report, close=close, failure=failure, message=message)
    return Step(replace(course, stage=Stage.SETTLE, deadline_ms=None, again_ms=None), (command,))


def _settle_cancelled(course: Course) -> Step:
    return _settle(course, MigrationPhase.CANCELLED, FailureReason.CANCELLED, "cancelled on request")


def _settle_total(course: Course) -> Step:
    said = f"total_timeout_ms of {course.spec.policy.total_timeout_ms} ms is over"
    return _settle(course, MigrationPhase.FAILED, FailureReason.TOTAL_TIMEOUT, said)


def _total(course: Course, now_ms: float) -> Step:
    return _settle_total(course) if now_ms >= course.total_deadline_ms else Step(course)


def _abort(course: Course, reason: AbortReason, said: str = "") -> Step:
    course = replace(course, stage=Stage.ABORT, deadline_ms=None, again_ms=None)
    return Step(course, (Abort(course.attempt, reason, said),))


def _conduct(course: Course, prepared: Prepared) -> Conduct:
    last = course.reports[-1].reason if course.reports else None
    return Conduct(course.attempt, prepared, previous_reason=last or "")


def _no_place(course: Course, event: NoPlace, now_ms: float) -> Step:
    """Wait, or give up. A wait for room may take long and must not keep others from moving; one for a host that is
    silent or busy for a moment is waited out here, with PLACEMENT_PATIENCE_MS."""
    if course.stage is not Stage.OPEN:
        return Step(course)
    wait = Wait(WaitingFor.ROOM, f"waiting for room: {event.message}")
    if course.spec.policy.wait_for_capacity and event.passing and now_ms < course.total_deadline_ms:
        return _wait(course, replace(wait, stand_back=True), again_ms=now_ms + REPEAT_MS)
    patience = course.patience_ms if course.patience_ms is not None else now_ms + PLACEMENT_PATIENCE_MS
    if event.transient and now_ms < min(patience, course.total_deadline_ms):
        return _wait(replace(course, patience_ms=patience), wait, again_ms=now_ms + PLACEMENT_REPEAT_MS)
    named = None if course.spec.destination else _NO_PLACE.get(event.reason)
    no_room = event.reason is RefusalReason.NO_CAPACITY
    failure = FailureReason.NO_CAPACITY if no_room else named or FailureReason.DESTINATION_NOT_ELIGIBLE
    return _settle(course, MigrationPhase.FAILED, failure, event.message)


_NO_PLACE = {
    RefusalReason.HOST_CORDONED: FailureReason.HOST_CORDONED,
    RefusalReason.HOST_NOT_LIVE: FailureReason.HOST_NOT_LIVE,
    RefusalReason.MACHINE_TYPE_MISMATCH: FailureReason.MACHINE_TYPE_MISMATCH,
}
"""What stands against every host, where that is one and the same thing."""


def _call_refused(course: Course, event: CallRefused, now_ms: float) -> Step:
    course = replace(course, refusal=f"{event.reason}: {event.message}")
    if event.unreachable:
        unanswered = course.stage is Stage.CONDUCT
        pause_ms = min(REPEAT_MS, UNREACHABLE_REPEAT_MS * 2 ** min(course.in_vain, 10))
        in_vain = course.in_vain + 1
        return Step(replace(course, again_ms=now_ms + pause_ms, unanswered=unanswered, in_vain=in_vain))
    fatal = _FATAL_REFUSALS.get(event.reason)
    return _abort(replace(course, fatal=fatal), AbortReason.PREPARE_FAILED, course.refusal)


def _tick(course: Course, now_ms: float) -> Step:
    total = now_ms >= course.total_deadline_ms
    match course.stage:
        case Stage.PREPARE | Stage.CONDUCT | Stage.FOLLOW:
            return _tick_attempt(course, now_ms, total=total)
        case Stage.WAIT_GUEST:
            return _total(course, now_ms)
        case Stage.RETRY_WAIT | Stage.PLACEMENT_WAIT:
            if total:
                return _settle_total(course)
            if course.again_ms is not None and now_ms >= course.again_ms:
                where = situation(course.record, course.spec.id, course.durable)
                return _issue_open(course, course.attempt + 1 if where is Situation.ABORTED else 1, now_ms)
        case _:
            pass
    return Step(course)


def _tick_attempt(course: Course, now_ms: float, *, total: bool) -> Step:
    committed = course.record is not None and course.record.phase is Ownership.COMMITTED
    if total and not committed:
        return _abort(course, AbortReason.TOTAL_TIMEOUT)
    if course.stage is Stage.FOLLOW:
        lost = _is_lost(course, now_ms) and not committed
        return _abort(course, AbortReason.SOURCE_UNREACHABLE) if lost else Step(course)
    if course.deadline_ms is not None and now_ms >= course.deadline_ms:
        silent = course.stage is Stage.CONDUCT and course.unanswered
        reason = AbortReason.SOURCE_UNREACHABLE if silent else AbortReason.PREPARE_TIMEOUT
        return _abort(course, reason, course.refusal)
    if course.again_ms is None or now_ms < course.again_ms:
        return Step(course)
    course = replace(course, again_ms=now_ms + REPEAT_MS)
    if course.stage is Stage.CONDUCT and course.prepared is not None:
        return Step(course, (_conduct(course, course.prepared),))
    return Step(course, (Prepare(course.attempt),))
