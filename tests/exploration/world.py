"""Every interleaving of the production session machines with a small world: a ledger, two VMMs, a network, faults.

Nothing that decides stands here: `agents/handover/{source,destination}.py`, `agents/guest/duty.py` and
`orchestrator/core/handover.py` are the production files. The world only does what the outside does: it carries out
commands (at once, late, twice, never), stops the guest when QEMU would, loses answers, kills agents, VMMs and hosts,
asks for late ACKs, pauses and cancels.

Steps marked `heal=False` are faults or somebody's free wish: `search.py` judges progress without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from agents.guest import duty as keeping
from agents.handover import words
from agents.handover.destination import (
    DestinationStage,
    DestinationState,
    destination_step,
    prepared_destination,
    restarted_destination,
)
from agents.handover.source import SourceStage, SourceState, restarted_source, source_step
from agents.handover.table import InvalidTransition
from agents.handover.timers import Timers
from agents.handover.words import (
    CancelTimer,
    Command,
    Commit,
    Do,
    Event,
    Note,
    Rang,
    Seen,
    StartTimer,
    Timer,
    WriteAbort,
    WriteRequests,
)
from orchestrator.core import death, disks, handover
from orchestrator.core.disks import SyncPoint
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AckRequest, AttemptRef, HostRef
from orchestrator.core.liveness import Liveness
from orchestrator.core.records import GuestSpec, OnHostDeath

S0, S1, S2 = HostRef("s", "s0"), HostRef("s", "s1"), HostRef("s", "s2")
D0, D1, D2 = HostRef("d", "d0"), HostRef("d", "d1"), HostRef("d", "d2")
MIGRATION = "m"
RESTARTS = GuestSpec("g", on_host_death=OnHostDeath.RESTART)
BORN = GuestRecord(name="g", phase=Ownership.IDLE, owner=S1)

# source VMM
RUN, STOPPED, PARKED, DEVICE, SEALED, DEAD = "run", "stopped", "parked", "device", "sealed", "dead"
# destination VMM
NONE, WAIT, LOADED, OWN = "none", "wait", "loaded", "own"


@dataclass(frozen=True)
class Bounds:
    """How much of everything the search may use up."""

    attempts: int = 1
    faults: int = 1
    requests: int = 1
    wishes: int = 0
    """Pauses and resumes by the operator, and suspends by policy."""
    cancels: int = 1
    power: int = 0
    devices: bool = True
    gate_wait: bool = False
    """The policy allows to wait for an ACK after the engine stopped the guest."""
    inside: bool = False
    """Devices inside the VMM: the engine has a verdict of its own, and can reset them."""
    disk: bool = False
    """It has a local disk, and writes to it while it runs."""
    writes: int = 2
    drained_before: bool = False
    """An attempt of an earlier migration to the same host was drained and then ended. Its image is still there; or, as
    a fault, another one is."""
    off: bool = False
    """The guest may power itself off while it runs at the source, or so late that its stop for the switchover is first:
    nobody is told of that, and it arrives ended."""
    old: bool = False
    """Agents may begin on the strength of an old record: prepare, or accept, an attempt that is over or bound."""
    time: bool = False
    """Pre-copy and a missing ACK reach their bounds, and a prepared destination waits in vain. The bounds of a guest
    that stands still may always be reached."""


class Disk(NamedTuple):
    """A local disk: how many writes the guest was promised, and how many of them each image has, without a gap."""

    promised: int = 0
    here: bool = True
    """The source has its image, which has all of them."""
    present: int = 0
    """In the destination's image."""
    image: int = 1
    """Which one that is: it is made anew if its writer dies, or if another one is found there."""
    since: int = 0
    """The attempt in which it was released; 0: never."""
    written_by_daemon: bool = False
    """It is being copied into and was not released since: worth nothing if its writer dies."""
    mirror: int = 0
    """The image that a mirror runs into; 0: none runs."""
    noted: int = 0
    """The attempt since whose drain the source notes what is written; 0: it does not."""
    base: int = 0
    """The writes that it does not have to send again."""
    writes_left: int = 0


class World(NamedTuple):
    """One state. Sessions are None while their agent is down or has none."""

    record: GuestRecord
    req: int
    source: SourceState | None
    todo_source: tuple[Command, ...]
    destination: DestinationState | None
    todo_destination: tuple[Command, ...]
    source_up: bool
    destination_up: bool
    vmm: str
    wished_stop: bool
    """The source guest was stopped on purpose before the freeze."""
    engine: bool
    """An outgoing migration runs in the source VMM."""
    copy: str
    copy_inc: int
    marker: bool
    conducting: int
    """Attempt that the source's journal names; 0: none that is unfinished."""
    prepared: int
    flying: frozenset[tuple[str, int, int]]
    """COMMITs (attempt, req version or -1) and messages that may arrive at any time, again and again."""
    pending: frozenset[int]
    """Generations asked for in the attempt that the record names and not acknowledged, as an omniscient observer
    counts. A device asks within a session of its own, so what it asked in an attempt that is over counts no more."""
    late: bool
    ran_there: bool
    cancelled: bool
    want: bool
    faults: int
    requests: int
    wishes: int
    cancels: int
    power: int
    """0 nothing lost, 1 source is down, 2 destination is down, 3 source came back, 4 destination came back."""
    crashed_vmm: bool
    flaw: str
    stopped_at_park: bool
    """The guest had been stopped on purpose when the engine parked."""
    lost: bool
    """A device inside the source VMM was reset in this attempt."""
    off: bool = False
    """The guest at the source has powered itself off: its vCPUs never run again."""
    certified: frozenset[HostRef] = frozenset({S0, D0})
    """Power cycles of which a certificate says that they are over; both hosts have booted before."""
    restarted: bool = False
    """The leader has started another life of the guest on a third host, because its host is certified dead."""
    disk: Disk | None = None


def start(bounds: Bounds) -> World:
    return World(
        BORN, 0, None, (), None, (), True, True, RUN, False, False, NONE, 0, False, 0, 0, frozenset(), frozenset(),
        False, False, False, True, bounds.faults, bounds.requests, bounds.wishes, bounds.cancels, 0, False, "", False,
        False, disk=_first_disk(bounds) if bounds.disk else None,
    )  # fmt: skip


def _first_disk(bounds: Bounds) -> Disk:
    disk = Disk(writes_left=bounds.writes)
    return noted(disk._replace(promised=1, present=1, since=9), 9) if bounds.drained_before else disk


BEFORE_SUBMIT = frozenset(
    {
        SourceStage.SYNCING,
        SourceStage.PRECOPY,
        SourceStage.GATE_WAIT,
        SourceStage.FREEZING,
        SourceStage.DRAINING,
        SourceStage.LAST_PASS,
    },
)

Move = tuple[str, bool, World]
Step = Callable[[Any, Any], Any]


class Memory:
    """What a search has seen, so that it is worked out once. By identity where hashing costs; what it is known by is
    held, so that nothing else gets the same identity."""

    def __init__(self) -> None:
        self.answers: dict[tuple[int, object], tuple[object, Event, object, tuple[Command, ...]]] = {}
        """What a machine answered in a state to an event."""
        self.deaf: dict[int, tuple[object, bool]] = {}
        """Whether a state of a machine takes no ring of a timer that was cancelled."""
        self.watched: dict[int, words.RecordSeen] = {}
        """By record."""

    def clear(self) -> None:
        for known in (self.answers, self.deaf, self.watched):
            known.clear()

    def answer(self, step: Step, state: object, event: Event) -> tuple[object, tuple[Command, ...]]:
        by_identity = type(event) is Seen or type(event) is words.RecordSeen
        key = (id(state), id(event) if by_identity else event)
        found = self.answers.get(key)
        if found is None:
            found = self.answers[key] = (state, event, *_stepped(step, state, event))
        return found[2], found[3]

    def is_deaf(self, step: Step, state: object) -> bool:
        if state is None:
            return True
        found = self.deaf.get(id(state))
        if found is None:
            answers = (self.answer(step, state, Rang(timer, 0)) for timer in Timer)
            found = self.deaf[id(state)] = (state, all(after is state and not do for after, do in answers))
        return found[1]

    def watch_of(self, record: GuestRecord) -> words.RecordSeen:
        found = self.watched.get(id(record))
        if found is None:
            found = self.watched[id(record)] = words.RecordSeen(record)
        return found


memory = Memory()


def ref(attempt: int) -> AttemptRef:
    return AttemptRef("g", MIGRATION, attempt)


def conducts_record(world: World) -> bool:
    """The source's session is that of the attempt which the record names. The next one may be opened while the session
    before it is still on its way back."""
    return world.source is not None and world.source.ref.attempt == world.record.attempt


INVALID = "NO SUCH TRANSITION"


class Strictness:
    """What becomes of an event that a stage does not take: a flaw, or, as in production, it is dropped. Mutants are
    judged by what is lost in production."""

    on = True


def _stepped(step: Callable[[Any, Event], Any], state: Any, event: Event) -> tuple[object, tuple[Command, ...]]:
    try:
        after, commands = step(state, event)
    except InvalidTransition as error:
        return (error if Strictness.on else state), ()
    timers = _numbered(after.timers)
    return (after if timers == after.timers else replace(after, timers=timers)), commands


def _numbered(timers: Timers) -> Timers:
    """Starts are numbered by their timer here, so that two ways to one state are one. 0 stands for an older start."""
    return Timers(tuple(sorted((timer, NUMBERS[timer]) for timer, _ in timers.running)))


NO_TIMERS = Timers()
NUMBERS = {timer: number for number, timer in enumerate(Timer, 1)}


INERT = frozenset({Do.HOLD, Do.RELEASE, Do.WRITE_ACKS, Do.ANNOUNCE, Do.START_PRECOPY})
"""Carried out at once: they neither branch nor send anything that could be lost in a way that matters."""
MESSAGES = {
    Do.GO: "go",
    Do.RELEASE_DISKS: "release",
    Do.SEND_LOADED: "loaded",
    Do.SEND_FAILED: "failed",
    Do.SEND_DONE: "done",
}
"""Sent at once; they arrive whenever, again and again, or never."""


def waiting(commands: tuple[Command, ...]) -> tuple[Command, ...]:
    aside = (Note, StartTimer, CancelTimer)
    return tuple(c for c in commands if not isinstance(c, aside) and c not in INERT and c not in MESSAGES)


def sent(world: World, commands: tuple[Command, ...]) -> World:
    for command in commands:
        if isinstance(command, Do) and command in MESSAGES:
            world = world._replace(flying=world.flying | {(MESSAGES[command], world.copy_inc, 0)})
        if command is Do.START_PRECOPY:
            world = world._replace(engine=world.vmm in (RUN, STOPPED))
    return world


def feed_source(world: World, event: Event) -> World:
    if world.source is None:
        return world
    state, commands = memory.answer(source_step, world.source, event)
    if isinstance(state, InvalidTransition):
        return world._replace(flaw=f"{INVALID}: source {state.stage} {state.event}")
    assert isinstance(state, SourceState)
    if state is world.source and not commands:
        return world
    if Do.START_PRECOPY in commands and Do.RESUME in world.todo_source:  # here the shell's order matters
        world = world._replace(todo_source=(*world.todo_source, Do.START_PRECOPY))
        commands = tuple(command for command in commands if command is not Do.START_PRECOPY)
    world = sent(world, commands)
    if Do.RESUME in commands and not world.want:
        world = world._replace(flaw="OPERATOR'S PAUSE LOST")
    assert world.source is not None
    todo = _queued(world.todo_source, commands, anew=state.stage is not world.source.stage)
    over = state.stage.ended
    world = world._replace(
        source=None if over else state,
        todo_source=() if over else todo,
        conducting=0 if over else world.conducting,
        prepared=world.prepared,
    )
    return feed_source(world, Seen.ACTIVE) if Do.START_PRECOPY in commands else world


def _queued(todo: tuple[Command, ...], commands: tuple[Command, ...], *, anew: bool) -> tuple[Command, ...]:
    """A retry is one at a time, and for the stage that asked (`anew`: it is over); see `agents/handover/shell.py`."""
    before = tuple(command for command in todo if not (anew and command is Do.RETRY_LATER))
    asked = waiting(commands)
    if Do.ROLL_BACK_SHIMS in asked:  # what the guest may not wait for is given up
        before = tuple(command for command in before if command is not Do.SYNC_DISKS)
    if Do.RETRY_LATER in before:
        asked = tuple(command for command in asked if command is not Do.RETRY_LATER)
    return before + asked


def _lanes(todo: tuple[Command, ...]) -> Iterator[tuple[Command, tuple[Command, ...]]]:
    """The first command of each lane, and what is left then: writes of requests wait for each other only, a retry for
    nothing but its time, everything else likewise."""
    seen: set[str] = set()
    for index, command in enumerate(todo):
        lane = "requests" if isinstance(command, WriteRequests) else ASIDE.get(command, "main")
        if lane not in seen:
            seen.add(lane)
            yield command, todo[:index] + todo[index + 1 :]


ASIDE: dict[object, str] = {Do.RETRY_LATER: "retry", Do.SYNC_DISKS: "disks"}


def feed_destination(world: World, event: Event) -> World:
    if world.destination is None:
        return world
    state, commands = memory.answer(destination_step, world.destination, event)
    if isinstance(state, InvalidTransition):
        return world._replace(flaw=f"{INVALID}: destination {state.stage} {state.event}")
    assert isinstance(state, DestinationState)
    if state is world.destination and not commands:
        return world
    world = sent(world, commands)
    assert world.destination is not None
    todo = _queued(world.todo_destination, commands, anew=state.stage is not world.destination.stage)
    if state.stage.ended:
        return world._replace(destination=None, todo_destination=())
    return world._replace(destination=state, todo_destination=todo)


# --- the ledger -------------------------------------------------------------------------------------------------------


def write(world: World, record: GuestRecord) -> World:
    if record.phase is Ownership.COMMITTED and world.record.phase is Ownership.OPEN:
        if world.late:
            world = world._replace(flaw="COMMIT OVER A LATE REQUEST")
        if world.cancelled:
            world = world._replace(flaw="COMMIT AFTER CANCEL WAS ANSWERED")
    if record.phase is Ownership.ABORTED and record.reason is AbortReason.LATE_SWITCHOVER_ACK and world.stopped_at_park:
        world = world._replace(flaw="A REQUEST REFUSED A STOPPED GUEST")
    return world._replace(record=record)


def attempted(world: World, change: Callable[[], GuestRecord]) -> World | None:
    try:
        return write(world, change())
    except handover.Refused:
        return None


def answers(world: World, applied: World | None, good: Event, feed: Callable[[World, Event], World]) -> Iterator[Move]:
    """A ledger write and what its writer hears: the truth, or nothing."""
    if applied is None:
        yield "refused", True, feed(world, Seen.LEDGER_REFUSED)
        return
    yield "ok", True, feed(applied, good)
    if world.faults:
        yield "answer lost", False, feed(applied._replace(faults=world.faults - 1), Seen.LEDGER_UNKNOWN)


def commit_arrives(world: World, attempt: int, version: int, inc: str) -> World | None:
    if version >= 0 and version != world.req:
        return None
    return attempted(world, lambda: handover.commit(world.record, MIGRATION, attempt, inc, writer="s"))


def read_record(world: World) -> GuestRecord:
    """A read behind a barrier: never older than its beginning (H13)."""
    return world.record


def record_to_forget_by(world: World) -> GuestRecord:
    """A guest's files go, with the marker of what ran, in a transaction on its record, or behind a barrier (H13)."""
    return world.record


def cancel_by_api(world: World) -> World | None:
    """The API answers "cancelled" from the result of the compare-and-set only (H6)."""
    attempt = world.record.attempt
    after = attempted(
        world, lambda: handover.abort(world.record, MIGRATION, attempt, AbortReason.CANCELLED, writer="a")
    )
    return None if after is None else after._replace(cancels=world.cancels - 1, cancelled=True)


def start_at_destination(world: World) -> World:
    """DONE is due once the guest runs, or once responsibility for a stopped or ended one is taken (H9)."""
    ended = world.off and world.want
    if world.disk is not None and world.disk.present < world.disk.promised:
        world = world._replace(flaw="A PROMISED WRITE IS LOST")
    return feed_destination(world._replace(copy=OWN, ran_there=True), Seen.GUEST_ENDED if ended else Seen.STARTED)


# --- source commands --------------------------------------------------------------------------------------------------


def run_source(world: World, bounds: Bounds) -> Iterator[Move]:
    """The first command of any lane."""
    for command, left in _lanes(world.todo_source):
        yield from _run_source(world._replace(todo_source=left), command)


def _run_source(world: World, command: Command) -> Iterator[Move]:
    state = world.source
    assert state is not None
    name = type(command).__name__ if not isinstance(command, Do) else command.value

    def moves() -> Iterator[Move]:
        match command:
            case Commit(version):
                yield from _commit(world, state, -1 if version is None else version)
            case WriteAbort(reason, devices):
                attempt = state.ref.attempt
                if world.lost and world.source_up and reason is not AbortReason.DEVICE_RESET:
                    yield "", True, world._replace(flaw="A LOST DEVICE WAS NOT REPORTED")
                    return
                applied = attempted(
                    world, lambda: handover.abort(world.record, MIGRATION, attempt, reason, devices, writer="s")
                )
                yield from answers(world, applied, Seen.ABORT_RECORDED, feed_source)
            case WriteRequests(entries):
                yield from _write_requests(world, state, entries)
            case Do():
                yield from _source_effect(world, state, command)
            case _:
                yield "", True, world

    for what, heal, after in moves():
        yield f"S {name} {what}".strip(), heal, after


def _commit(world: World, state: SourceState, version: int) -> Iterator[Move]:
    attempt = state.ref.attempt
    applied = commit_arrives(world, attempt, version, state.inc)
    yield from answers(world, applied, Seen.COMMITTED, feed_source)
    if world.faults:
        less = world._replace(faults=world.faults - 1)
        on_its_way = less._replace(flying=less.flying | {("commit", attempt, version)})
        yield "delayed", False, feed_source(on_its_way, Seen.LEDGER_UNKNOWN)
        if applied is not None:
            again = applied._replace(faults=less.faults)
            yield "doubled", False, feed_source(again, Seen.LEDGER_REFUSED)


def _write_requests(world: World, state: SourceState, entries: tuple[AckRequest, ...]) -> Iterator[Move]:
    record = world.record
    if record.phase is not Ownership.OPEN or record.attempt != state.ref.attempt:
        yield "refused", True, feed_source(world, Seen.LEDGER_REFUSED)
        return
    written = world._replace(req=world.req + 1)
    present = (AckRequest("x", max(world.pending)),) if world.pending else entries
    yield "ok", True, feed_source(written, words.RequestsWritten(entries, present, written.req))


def _source_effect(world: World, state: SourceState, command: Do) -> Iterator[Move]:
    match command:
        case Do.BIND:
            attempt = state.ref.attempt
            applied = attempted(world, lambda: handover.bind(world.record, MIGRATION, attempt, state.inc, writer="s"))
            yield from answers(world, applied, Seen.BOUND, feed_source)
        case Do.PAUSE:
            yield "", True, _pause(world)
        case Do.RESUME:
            yield "", True, _resume(world)
        case Do.START_PRECOPY:
            yield "", True, feed_source(sent(world, (command,)), Seen.ACTIVE)
        case Do.QUIESCE:
            yield from _quiesce(world)
        case Do.PROCEED:
            yield from _proceed(world)
        case Do.ROLL_BACK_SHIMS:
            yield "", True, feed_source(world, Seen.SHIMS_BACK)
        case Do.ABORT_ENGINE:
            yield from _engine_aborts(world, state)
        case Do.READ:
            yield "", True, feed_source(world, words.RecordRead(read_record(world), world.req))
        case Do.SYNC_DISKS | Do.DRAIN_DISKS | Do.RETIRE_DISKS:
            yield from _disk_effect(world, state, command)
        case Do.DISCARD_SOURCE:
            yield "", True, feed_source(world._replace(vmm=DEAD, engine=False), Seen.DISCARDED)
        case Do.DECLARE_CRASHED:
            applied = attempted(world, lambda: handover.crashed(world.record, writer="s"))
            ours = applied is not None and world.record.owner.host == "s"
            yield from answers(world, applied if ours else None, Seen.CRASH_RECORDED, feed_source)
        case Do.RETRY_LATER:
            yield "", True, feed_source(world, Seen.RETRY_DUE)
        case _:
            yield "", True, world


def _proceed(world: World) -> Iterator[Move]:
    if world.disk is not None and world.disk.mirror:
        yield "", True, world._replace(flaw="LAST PASS UNDER A RUNNING MIRROR")
    elif world.vmm == PARKED:
        counts = bool(world.pending) and conducts_record(world) and not world.wished_stop
        late = world.late or counts
        yield "", True, feed_source(world._replace(vmm=DEVICE, late=late), Seen.SHIMS_SENT)
    else:
        yield "not parked", True, world


def _quiesce(world: World) -> Iterator[Move]:
    yield "", True, feed_source(world, words.Quiesced(()))
    if world.requests:
        asked, entry = _device_asks(world)
        yield "asks", False, feed_source(asked, words.Quiesced((entry,)))


def _disk_effect(world: World, state: SourceState, command: Do) -> Iterator[Move]:
    disk = world.disk
    assert disk is not None
    if command is Do.RETIRE_DISKS:
        yield "", True, world._replace(disk=disk._replace(here=False))
        return
    if command is Do.SYNC_DISKS:
        yield "", True, feed_source(world._replace(disk=_synced(disk)), Seen.DISKS_READY)
    else:
        drained = noted(_caught_up(disk)._replace(mirror=0), state.ref.attempt)
        point = SyncPoint("d", state.inc, 1)
        yield "", True, feed_source(world._replace(disk=drained), words.Drained((point,)))
    if world.faults:
        failed = world._replace(faults=world.faults - 1, disk=disk._replace(mirror=0, noted=0))
        yield "fails", False, feed_source(failed, words.DiskFailed("d"))


def noted(disk: Disk, attempt: int) -> Disk:
    """The guest stands still: what is written from here on is noted."""
    return disk._replace(noted=attempt, base=disk.promised)


def _synced(disk: Disk) -> Disk:
    """What was promised up to now is copied, in the way that the production code chooses."""
    here = disks.SourceSide(str(disk.mirror or ""), str(disk.noted or ""))
    there = disks.DestinationSide(str(disk.image), str(disk.since or ""))
    match disks.copying(here, there):
        case disks.Copying.GOES_ON:
            return disk
        case disks.Copying.INCREMENT:
            return _caught_up(disk)._replace(written_by_daemon=True)
        case disks.Copying.FULL:
            return Disk(disk.promised, disk.here, disk.promised, 3 - disk.image, 0, True, 3 - disk.image)._replace(
                writes_left=disk.writes_left
            )


def _caught_up(disk: Disk) -> Disk:
    """By a mirror, or by what was noted: that is of use only to an image that has everything before it."""
    if disk.mirror:
        return disk._replace(present=disk.promised if disk.mirror == disk.image else disk.present)
    return disk._replace(present=disk.promised if disk.present >= disk.base else disk.present, base=disk.promised)


def _image_lost(disk: Disk) -> Disk:
    """Whoever wrote it was killed in the middle: what it had in memory is gone, so it is made anew."""
    return disk._replace(present=0, image=3 - disk.image, since=0, written_by_daemon=False, mirror=0)


def _pause(world: World) -> World:
    if world.vmm == RUN:
        return feed_source(world._replace(vmm=STOPPED, wished_stop=True), Seen.PAUSED)
    if world.vmm in (PARKED, DEVICE):
        return feed_source(world, Seen.PAUSE_QUEUED)
    return feed_source(world, Seen.PAUSED)


def _resume(world: World) -> World:
    if world.engine and world.vmm in (RUN, STOPPED) and world.source is not None and world.source.inside:
        return world._replace(flaw="VCPUS STARTED UNDER A MIGRATION WITH DEVICES INSIDE")
    if world.vmm in (PARKED, DEVICE, DEAD):
        return feed_source(world, Seen.RESUME_FAILED)
    if world.off:
        return feed_source(world._replace(vmm=STOPPED), Seen.GUEST_ENDED)
    return feed_source(world._replace(vmm=RUN, wished_stop=False), Seen.RESUMED)


def _back(world: World) -> str:
    """Where the guest is after a migration ended: as before it was stopped."""
    return STOPPED if world.wished_stop or world.off else RUN


def _engine_aborts(world: World, state: SourceState) -> Iterator[Move]:
    yield "", True, _abort_engine(world)
    if state.inside and world.engine and world.requests:
        less = world._replace(requests=world.requests - 1)
        yield "resets a device", False, _abort_engine(less._replace(lost=True))
        if world.vmm == DEVICE and not world.wished_stop:
            yield "found late before", False, _abort_engine(feed_source(less, words.FoundLate(("x",))))


def _abort_engine(world: World) -> World:
    if world.vmm == SEALED:
        return feed_source(world, Seen.ENGINE_SEALED)
    if world.vmm == DEAD:
        return world
    gone = DEAD if world.copy == WAIT else world.copy
    back = world._replace(vmm=_back(world), engine=False, copy=gone)
    if gone != world.copy:
        back = feed_destination(back, Seen.VMM_DIED)
    if world.lost:
        back = feed_source(back, words.DevicesLost(("x",)))
    return feed_source(back, Seen.ENGINE_OVER)


# --- destination commands ---------------------------------------------------------------------------------------------


def run_destination(world: World, bounds: Bounds) -> Iterator[Move]:
    """The first command of any lane of the destination's shell."""
    for command, left in _lanes(world.todo_destination):
        yield from _run_destination(world._replace(todo_destination=left), command)


def _run_destination(world: World, command: Command) -> Iterator[Move]:
    state = world.destination
    assert state is not None
    name = command.value if isinstance(command, Do) else type(command).__name__
    moves = _destination_write(world, state, command)
    if moves is None:
        assert isinstance(command, Do)
        moves = _destination_effect(world, command)
    for what, heal, after in moves:
        yield f"D {name} {what}".strip(), heal, after


def _destination_write(world: World, state: DestinationState, command: Command) -> Iterator[Move] | None:
    attempt, here, inc = state.ref.attempt, state.here, state.inc
    record, change, good = world.record, None, Seen.ABORT_RECORDED
    match command:
        case Commit():  # no destination of ours does that; one that did would be carried out
            after = commit_arrives(world, attempt, -1, inc)
            return iter([("", True, world if after is None else after)])
        case WriteAbort(reason, devices):
            change = partial(handover.abort, record, MIGRATION, attempt, reason, devices, writer="d")
        case Do.WRITE_DONE:
            change, good = partial(handover.done, record, MIGRATION, attempt, inc, writer="d"), Seen.DONE_RECORDED
        case Do.WRITE_ROLLBACK:
            proof = {"by": here, "vmm_seen_dead": world.copy == DEAD, "marker": world.marker}
            change, good = partial(handover.roll_back, record, **proof, writer="d"), Seen.ROLLBACK_RECORDED
        case Do.DECLARE_CRASHED:
            change, good = partial(handover.crashed, record, writer="d"), Seen.CRASH_RECORDED
        case _:
            return None
    return answers(world, attempted(world, change), good, feed_destination)


def _destination_effect(world: World, command: Do) -> Iterator[Move]:
    feed = feed_destination
    may_fail = {
        Do.VALIDATE: (Seen.VALIDATED, Seen.SHIM_FAILED),
        Do.WRITE_MARKER: (Seen.MARKER_WRITTEN, Seen.MARKER_FAILED),
        Do.ACTIVATE_SHIMS: (Seen.ACTIVATED, Seen.ACTIVATION_FAILED),
    }
    if command in may_fail:
        good, bad = may_fail[command]
        yield "", True, feed(world._replace(marker=world.marker or command is Do.WRITE_MARKER), good)
        if world.faults:
            yield "fails", False, feed(world._replace(faults=world.faults - 1), bad)
    elif command is Do.START_GUEST and world.copy in (LOADED, OWN):
        yield "", True, start_at_destination(world)
    elif command is Do.START_GUEST:
        yield "dead", True, feed(world, Seen.ACTIVATION_FAILED)
    elif command is Do.DISCARD_DESTINATION:
        yield "", True, feed(world._replace(copy=DEAD), Seen.DISCARDED)
    elif command is Do.READ:
        yield "", True, feed(world, words.RecordRead(read_record(world), world.req))
    elif command is Do.RETRY_LATER:
        yield "", True, feed(world, Seen.RETRY_DUE)
    else:
        yield "", True, world


# --- everything that happens by itself --------------------------------------------------------------------------------


def _ask(world: World) -> World:
    """Somebody asks for one more ACK."""
    generation = bounds_generation(world)
    return world._replace(requests=world.requests - 1, pending=world.pending | {generation})


def _device_asks(world: World) -> tuple[World, AckRequest]:
    """The session that hears it may be one of an attempt that is over: nobody has to wait for that ACK."""
    entry = AckRequest("x", bounds_generation(world))
    asked = _ask(world)
    return (asked if conducts_record(world) else asked._replace(pending=world.pending)), entry


def bounds_generation(world: World) -> int:
    return 10 - world.requests


def engine_moves(world: World) -> Iterator[Move]:
    """What QEMU does by itself at both ends."""
    if world.engine and world.vmm in (RUN, STOPPED):
        yield "Q parks", True, feed_source(world._replace(vmm=PARKED, stopped_at_park=world.wished_stop), Seen.PARKED)
    if world.vmm == DEVICE:
        if world.copy == WAIT and world.copy_inc == world.conducting:
            loaded = feed_destination(world._replace(copy=LOADED), Seen.SHIMS_LOADED)
            yield "Q loads", True, feed_destination(loaded, Seen.COMPLETED)
        if world.copy == LOADED:
            yield "Q completes", True, feed_source(world._replace(vmm=SEALED, engine=False), Seen.COMPLETED)
        gone = DEAD if world.copy == WAIT else world.copy
        resumed = feed_source(world._replace(vmm=_back(world), engine=False, copy=gone), Seen.ENGINE_FAILED)
        yield "Q resumes by itself", True, feed_destination(resumed, Seen.VMM_DIED) if gone == DEAD else resumed
        if world.source is not None and world.source.inside:
            yield from _verdicts(world, gone)


def _verdicts(world: World, gone: str) -> Iterator[Move]:
    """QEMU's own ends of a migration with devices inside. Each uses up one of the requests."""
    if not world.requests:
        return
    ended = world._replace(vmm=_back(world), engine=False, copy=gone, requests=world.requests - 1)
    ends: list[tuple[str, World, Event]] = [("Q resets a device", ended._replace(lost=True), Seen.ENGINE_FAILED)]
    if not world.wished_stop:
        ends.append(("Q finds a late request", ended, words.FoundLate(("x",))))
    for name, after, event in ends:
        seen = feed_source(after, event)
        yield name, False, feed_destination(seen, Seen.VMM_DIED) if gone == DEAD else seen


def coordinator_moves(world: World, bounds: Bounds) -> Iterator[Move]:
    record = world.record
    attempt = record.attempt
    idle = record.phase is Ownership.IDLE and record.owner == S1 and attempt == 0
    # The coordinator goes by the record alone: the sessions of the attempt before may still be at their ends.
    if (idle or record.phase is Ownership.ABORTED) and attempt < bounds.attempts:
        where = D1
        opened = attempted(
            world,
            lambda: handover.open_attempt(record, MIGRATION, attempt + 1, where, epoch=1, writer="c"),
        )
        if opened is not None and world.power == 0:
            yield "C opens", True, opened._replace(late=False, pending=frozenset(), lost=False)
    if record.phase is Ownership.ABORTED:
        closed = attempted(world, lambda: handover.close(record, MIGRATION, writer="c"))
        if closed is not None:
            yield "C gives up", True, closed
    if record.phase is Ownership.OPEN:
        aborted = attempted(
            world, lambda: handover.abort(record, MIGRATION, attempt, AbortReason.PREPARE_TIMEOUT, writer="c")
        )
        if aborted is not None:
            yield "C aborts", True, aborted
        if world.cancels:
            cancelled = cancel_by_api(world)
            if cancelled is not None:
                yield "A cancels", False, cancelled
    yield from _certificates_count(world)
    yield from _prepare_and_conduct(world, bounds)


def _certificates_count(world: World) -> Iterator[Move]:
    """The leader makes the record true to the certificates, and starts elsewhere what died with its host."""
    wanted = death.after_certificates(world.record, world.certified, writer="c")
    if wanted is not None:
        yield "C reads the certificates", True, write(world, wanted)
    if death.restart_step(world.record, RESTARTS, None, name_is_ours=not world.restarted) is death.Restart.CREATE:
        yield "C starts it elsewhere", True, world._replace(restarted=True)


def _prepare_and_conduct(world: World, bounds: Bounds) -> Iterator[Move]:
    record = world.record
    is_open = record.phase is Ownership.OPEN
    if is_open:
        yield from _prepare(world, bounds, record.attempt, "D prepares")
        if not record.inc:
            yield from _conduct(world, bounds, record.attempt, "S conducts")
    if bounds.old and record.attempt:
        for attempt in {record.attempt - 1, record.attempt} - ({record.attempt} if is_open else set()) - {0}:
            yield from _prepare(world, bounds, attempt, "D prepares by an old record")
        yield from _conduct(world, bounds, world.prepared, "S conducts by an old record")


def _prepare(world: World, bounds: Bounds, k: int, name: str) -> Iterator[Move]:
    if world.destination_up and world.destination is None and world.prepared < k and world.power in (0, 3):
        state, _ = prepared_destination(ref(k), D1, f"i{k}", has_devices=bounds.devices, has_disks=bounds.disk)
        state = replace(state, claimed=not bounds.time, timers=_numbered(state.timers) if bounds.time else NO_TIMERS)
        yield name, True, world._replace(destination=state, copy=WAIT, copy_inc=k, prepared=k, marker=False)


def _conduct(world: World, bounds: Bounds, k: int, name: str) -> Iterator[Move]:
    """The attempt begins with a compare-and-set on the record that was judged: see Do.BIND."""
    ready = world.prepared == k and world.copy == WAIT and world.copy_inc == k
    alive = world.source_up and world.vmm in (RUN, STOPPED) and not world.engine and not world.off
    if ready and alive and world.source is None and world.power in (0, 4):
        state = SourceState(
            ref(k),
            S1,
            f"i{k}",
            has_devices=bounds.devices,
            inside=bounds.inside,
            disks=("d",) if bounds.disk else (),
            gate_wait=bounds.gate_wait,
            want_run=world.want,
            paused=world.wished_stop,
        )
        if world.wished_stop:
            state = replace(state, acks=state.acks.stop_by_wish())
        begun = world._replace(source=state, conducting=k, stopped_at_park=False, lost=False)
        begun = feed_source(begun, Seen.BEGIN)
        yield name, True, feed_source(begun, Seen.VITALS_GOOD)


def message_moves(world: World) -> Iterator[Move]:
    """Messages arrive at any time, any number of times, or never; watches likewise. What is for another attempt, or for
    another process of the destination, an agent's PeerService answers by itself."""
    for kind, number, extra in sorted(world.flying):
        inc = f"i{number}"
        match kind:
            case "loaded" if world.source is not None and world.source.inc == inc:
                yield "LOADED", True, feed_source(world, words.LoadedReport(inc, True, _images(world, number)))
            case "release" if world.destination is not None and world.destination.inc == inc:
                assert world.disk is not None
                yield "release", True, _release(world, world.disk, number)
            case "failed" if world.source is not None and world.source.inc == inc:
                yield "FAILED", True, feed_source(world, Seen.DEST_FAILED)
            case "go" if world.destination is not None and world.destination.inc == inc:
                yield "GO", True, feed_destination(world, words.GoSeen(inc))
            case "done" if world.source is not None and world.source.inc == inc:
                yield "DONE", True, feed_source(world, Seen.DONE_KNOWN)
            case "commit":
                after = commit_arrives(world, number, extra, inc)
                if after is not None:
                    yield "late COMMIT arrives", True, after
            case _:
                pass
    for which, watch in (("watch", memory.watch_of(world.record)), ("old watch", memory.watch_of(BORN))):
        yield f"S {which}", True, feed_source(world, watch)
        yield f"D {which}", True, feed_destination(world, watch)
    yield from _request_moves(world)


def _release(world: World, disk: Disk, number: int) -> World:
    """Only what its writer closes itself, or has closed for this attempt before, is whole."""
    if not disk.written_by_daemon and disk.since != number:
        return feed_destination(world, Seen.DISKS_FAILED)
    released = disk._replace(since=number, written_by_daemon=False)
    return feed_destination(world._replace(disk=released), Seen.DISKS_RELEASED)


def _images(world: World, number: int) -> tuple[SyncPoint, ...]:
    disk = world.disk
    return (SyncPoint("d", f"i{number}", 1),) if disk is not None and disk.since == number else ()


def _request_moves(world: World) -> Iterator[Move]:
    """An agent sees the version of the one `req` of its migration, but of its content only what its attempt asked for.
    ACKs come through the stream of the attempt."""
    if world.source is None:
        return
    newest = tuple(AckRequest("x", each) for each in sorted(world.pending)[-1:]) if conducts_record(world) else ()
    if world.req or newest:
        yield "S sees req", True, feed_source(world, words.RequestsSeen(newest, world.req))
    if newest and world.copy_inc == world.source.ref.attempt:
        begun = world.source.stage is not SourceStage.BINDING
        if (
            begun
            and world.copy == WAIT
            and (world.vmm in (RUN, STOPPED) or world.source.stage is SourceStage.GATE_WAIT)
        ):
            acked = feed_source(world._replace(pending=frozenset()), words.Acked(newest[0]))
            yield "ACK", True, acked


def wish_moves(world: World) -> Iterator[Move]:
    record, state = world.record, world.source
    if world.requests and record.phase is Ownership.OPEN:
        asked = _ask(world)
        waits = state is not None and state.stage is SourceStage.GATE_WAIT
        stands = world.vmm in (PARKED, DEVICE, SEALED) and not world.wished_stop
        frozen = stands and conducts_record(world) and not waits
        yield "API asks", False, asked._replace(req=world.req + 1, late=world.late or frozen)
        if state is not None and state.stage in (SourceStage.PRECOPY, SourceStage.GATE_WAIT, SourceStage.FREEZING):
            heard, entry = _device_asks(world)
            yield "device asks", False, feed_source(heard, words.Requested(entry))
    if world.wishes and world.vmm != DEAD and record.owner.host == "s":
        want = not world.want
        wished = world._replace(want=want, wishes=world.wishes - 1)
        if state is not None:
            yield "operator wishes", False, feed_source(wished, words.WantRunSeen(want))
        elif world.source_up and world.vmm in (RUN, STOPPED) and not world.engine:
            vmm = RUN if want and not world.off else STOPPED
            yield "operator wishes", False, wished._replace(vmm=vmm, wished_stop=not want)
    if world.wishes and state is not None and state.stage is SourceStage.PRECOPY and world.vmm == RUN:
        suspending = world._replace(source=replace(state, suspend_on_timeout=True), wishes=world.wishes - 1)
        number = state.timers.number(Timer.PRECOPY)
        if number is not None:
            yield "policy suspends", False, feed_source(suspending, Rang(Timer.PRECOPY, number))


def disk_moves(world: World) -> Iterator[Move]:
    """The guest writes, and is promised that it will be found; a mirror may be behind until it is drained."""
    disk = world.disk
    if disk is None:
        return
    if disk.writes_left and world.vmm == RUN:
        promised = disk._replace(promised=disk.promised + 1, writes_left=disk.writes_left - 1)
        yield "guest writes", False, world._replace(disk=promised)
    if world.faults and disk.since == 9 and world.copy == NONE:
        yield "another image is there", False, world._replace(faults=world.faults - 1, disk=_image_lost(disk))
    if world.faults and disk.written_by_daemon:
        lost = world._replace(faults=world.faults - 1, disk=_image_lost(disk))
        heard = feed_source(lost, words.DiskFailed("d")) if disk.mirror and _is_copying(world) else lost
        yield "D daemon dies", False, heard


def _is_copying(world: World) -> bool:
    """Who conducts an attempt hears of its mirror, from the moment that it has one."""
    return world.source is not None and world.source.stage in BEFORE_SUBMIT and Do.SYNC_DISKS not in world.todo_source


def time_moves(world: World, bounds: Bounds) -> Iterator[Move]:
    """A timer that runs may ring at any time; one that was cancelled rings as well, if its ring was on its way."""
    source, destination = world.source, world.destination
    for timer, number in source.timers.running if source is not None else ():
        if bounds.time or timer not in (Timer.PRECOPY, Timer.ACK):
            yield f"S {timer} is over", True, feed_source(world, Rang(timer, number))
    for timer, number in destination.timers.running if destination is not None else ():
        yield f"D {timer} is over", True, feed_destination(world, Rang(timer, number))
    if memory.is_deaf(source_step, source) and memory.is_deaf(destination_step, destination):
        return
    for timer in Timer:
        late = feed_destination(feed_source(world, Rang(timer, 0)), Rang(timer, 0))
        yield f"{timer} rings late", False, late if late is world else late._replace(flaw="A STALE TIMER ACTED")


def fault_moves(world: World, bounds: Bounds) -> Iterator[Move]:
    if world.faults:
        less = world._replace(faults=world.faults - 1)
        if world.source_up:
            yield "S agent dies", False, less._replace(source_up=False, source=None, todo_source=())
        if world.destination_up:
            yield "D agent dies", False, less._replace(destination_up=False, destination=None, todo_destination=())
        if world.copy in (WAIT, LOADED):
            dead = feed_destination(less._replace(copy=DEAD), Seen.VMM_DIED)
            yield "D VMM dies", False, dead
        if world.copy == OWN:
            dead = feed_destination(less._replace(copy=DEAD, crashed_vmm=True), Seen.VMM_DIED)
            yield "D guest crashes", False, dead
        if world.vmm not in (DEAD,) and record_is_live(world):
            dead = feed_source(less._replace(vmm=DEAD, engine=False, crashed_vmm=True), Seen.VMM_DIED)
            yield "S VMM dies", False, dead
        if world.source is not None and world.source.stage is SourceStage.PRECOPY:
            yield "device fails", False, feed_source(less, Seen.SHIM_FAILED)
    if bounds.off and not world.off and world.vmm == RUN and record_is_live(world):
        # An agent that is away hears nothing of it.
        yield "guest powers off", False, feed_source(world._replace(off=True, vmm=STOPPED), Seen.GUEST_ENDED)
    if bounds.off and not world.off and world.vmm in (PARKED, DEVICE) and record_is_live(world):
        yield "guest has powered off", False, world._replace(off=True)
    if bounds.power and world.power == 0:
        down = world._replace(power=1, source_up=False, source=None, todo_source=(), vmm=DEAD, engine=False)
        yield "S loses power", False, down
        lost = world._replace(
            power=2, destination_up=False, destination=None, todo_destination=(), marker=False,
            copy=DEAD if world.copy != NONE else NONE,
        )  # fmt: skip
        yield "D loses power", False, lost


def record_is_live(world: World) -> bool:
    return world.record.phase not in (Ownership.CRASHED, Ownership.GONE)


def recovery_moves(world: World) -> Iterator[Move]:
    if not world.source_up and world.power != 1:
        yield "S agent restarts", True, world._replace(source_up=True)
    if not world.destination_up and world.power != 2:
        yield "D agent restarts", True, world._replace(destination_up=True)
    if world.power == 1:
        yield "S host returns", True, _certified(world, S1)._replace(power=3, source_up=True, conducting=0)
        yield "fencer", True, _certified(world, S1)
    if world.power == 2:
        yield "D host returns", True, _certified(world, D1)._replace(power=4, destination_up=True)
        yield "fencer", True, _certified(world, D1)
    if world.source_up and world.source is None:
        yield from _source_keeper(world)
    if world.destination_up and world.destination is None:
        yield from _destination_keeper(world)


def _certified(world: World, over: HostRef) -> World:
    """By the fencer, which has seen the power off, or by the host itself when it comes back: a certificate is true."""
    return world._replace(certified=world.certified | {over})


def _declared(world: World, here: HostRef, writer: str) -> GuestRecord:
    """What a keeper writes of a guest of its host that is over: in this power cycle it saw the VMM dead."""
    owner = world.record.owner
    if owner == here:
        return handover.crashed(world.record, writer=writer)
    return handover.host_died(world.record, certificate=owner in world.certified, writer=writer)


Sees = tuple[GuestRecord | None, Liveness | None]
"""What a keeper is told: the record, or that the ledger has none, and a word on its process in place of the truth."""


def sights(world: World) -> tuple[Sees, ...]:
    """The truth; and, as a fault, a process that cannot be asked about, and a ledger that has lost the record."""
    record = read_record(world)
    return ((record, None), (record, Liveness.UNKNOWN), (None, None)) if world.faults else ((record, None),)


def _blinded(world: World, record: GuestRecord | None, told: Liveness | None) -> World:
    return world._replace(faults=world.faults - 1) if record is None or told is not None else world


def _seen(told: Liveness | None, *, gone: bool) -> Liveness:
    truth = Liveness.GONE if gone else Liveness.ALIVE
    return truth if told is None else told


def _source_keeper(world: World) -> Iterator[Move]:
    """What `agents/guest/duty.py` makes of the source's VMM while no session speaks for it."""
    for sees in sights(world):
        yield from _source_duty(world, *sees)


def _source_duty(world: World, record: GuestRecord | None, told: Liveness | None) -> Iterator[Move]:
    here = S2 if world.power == 3 else S1
    copy = keeping.Copy(
        "s",
        False,
        liveness=_seen(told, gone=world.vmm == DEAD),
        running=world.vmm == RUN,
        sealed=world.vmm == SEALED,
        ended=world.off and world.vmm == STOPPED,
        migrating=world.engine,
    )
    found = keeping.duty(record, here, (copy,), marker=False, want_run=world.want)
    if found.do in (keeping.Do.NOTHING, keeping.Do.ASK_AGAIN):
        return
    world = _blinded(world, record, told)
    match found.do:
        case keeping.Do.DECLARE_CRASHED:
            after = attempted(world, lambda: _declared(world, here, "s"))
            if after is not None:
                yield "S keeper declares", True, after
        case keeping.Do.DISCARD:
            yield "S keeper discards", True, world._replace(vmm=DEAD, engine=False, conducting=0)
        case keeping.Do.RUN | keeping.Do.STOP:
            run = found.do is keeping.Do.RUN
            if run and world.off and world.vmm == STOPPED:
                yield "S keeper tries for ever", True, world._replace(flaw="A GUEST THAT POWERED OFF IS TO RUN")
                return
            after = world._replace(vmm=RUN if run and not world.off else STOPPED, wished_stop=not run)
            yield "S keeper applies the wish", True, after
        case keeping.Do.END_AS_SOURCE:
            assert record is not None
            k = record.attempt
            state, commands = restarted_source(
                ref(k), here, f"i{k}", want_run=world.want, parked=world.vmm == PARKED, sealed=world.vmm == SEALED
            )
            yield "S keeper ends it", True, world._replace(source=state, todo_source=waiting(commands))
        case _:
            pass


def _destination_keeper(world: World) -> Iterator[Move]:
    for sees in sights(world):
        yield from _destination_duty(world, *sees)


def _destination_duty(world: World, record: GuestRecord | None, told: Liveness | None) -> Iterator[Move]:
    here = D2 if world.power == 4 else D1
    inc = f"i{world.copy_inc}"
    own = world.copy == OWN
    gone = world.copy not in (WAIT, LOADED, OWN)
    copy = keeping.Copy(
        inc,
        not own,
        MIGRATION,
        world.copy_inc,
        liveness=_seen(told, gone=gone),
        running=own and world.want and not world.off,
        ended=own and world.off,
    )
    known = () if world.copy == NONE else (copy,)
    yield from _forgotten(world, here, known)
    found = keeping.duty(record, here, known, marker=world.marker, want_run=world.want)
    if found.do in (keeping.Do.NOTHING, keeping.Do.ASK_AGAIN):
        return
    world = _blinded(world, record, told)
    match found.do:
        case keeping.Do.GIVE_BACK:
            back = attempted(
                world,
                lambda: handover.roll_back(world.record, by=here, vmm_seen_dead=True, marker=world.marker, writer="d"),
            )
            if back is not None:
                yield "D keeper gives back", True, back
        case keeping.Do.DECLARE_CRASHED:
            after = attempted(world, lambda: _declared(world, here, "d"))
            if after is not None:
                yield "D keeper declares", True, after
        case keeping.Do.DISCARD:
            yield "D keeper discards", True, world._replace(copy=DEAD)
        case keeping.Do.END_AS_DESTINATION:
            state, commands = restarted_destination(ref(world.copy_inc), here, inc, vmm_alive=True, marker=world.marker)
            yield "D keeper ends it", True, world._replace(destination=state, todo_destination=waiting(commands))
        case _:
            pass


def _forgotten(world: World, here: HostRef, known: tuple[keeping.Copy, ...]) -> Iterator[Move]:
    """Nothing is left of the guest at the destination, and its record leads nowhere there: its files go."""
    record = record_to_forget_by(world)
    nothing = keeping.duty(record, here, known, marker=world.marker, want_run=world.want).do is keeping.Do.NOTHING
    if nothing and world.marker and world.copy in (NONE, DEAD) and here.host not in death.hosts_of(record):
        yield "D keeper forgets", True, world._replace(marker=False)


def successors(world: World, bounds: Bounds) -> Iterator[Move]:
    if world.source is not None and world.todo_source:
        yield from run_source(world, bounds)
    if world.destination is not None and world.todo_destination:
        yield from run_destination(world, bounds)
    yield from engine_moves(world)
    yield from coordinator_moves(world, bounds)
    yield from message_moves(world)
    yield from wish_moves(world)
    yield from disk_moves(world)
    yield from time_moves(world, bounds)
    yield from fault_moves(world, bounds)
    yield from recovery_moves(world)


# --- what must hold ---------------------------------------------------------------------------------------------------


def flaw(world: World) -> str:
    if world.flaw:
        return world.flaw
    runs_here, runs_there = world.vmm == RUN, world.copy == OWN
    if runs_here and world.disk is not None and not world.disk.here:
        return "RUNS WITHOUT ITS IMAGE"
    if runs_here and runs_there:
        return "SPLIT BRAIN"
    if world.restarted and (runs_here or runs_there):
        return "RUNS BESIDE ITS NEXT LIFE"
    if world.ran_there and runs_here:
        return "SOURCE RUNS AFTER DESTINATION RAN"
    if world.record.phase is Ownership.CRASHED and world.power == 0 and (runs_here or runs_there):
        return "RUNS AFTER CRASHED"
    lost = world.vmm == DEAD and not world.crashed_vmm and world.power == 0 and not runs_there
    if lost and world.record.phase is not Ownership.CRASHED and world.copy != LOADED:
        return "LOST"
    return _unbounded(world)


def _unbounded(world: World) -> str:
    """A wait that nothing ends, or an end to a wait that is over."""
    source, destination = world.source, world.destination
    if source is not None and source.stage in BEFORE_SUBMIT:
        runs = source.timers.number
        waits = bool(source.acks.pending) and not source.paused and not source.suspend_on_timeout
        if world.vmm in (PARKED, DEVICE) and runs(Timer.SWITCHOVER) is None:
            return "A GUEST STANDS WITHOUT A BOUND"
        bounded = runs(Timer.PRECOPY) is not None or runs(Timer.SUSPENDED) is not None
        if source.stage is SourceStage.PRECOPY and world.vmm == RUN and not source.paused and not bounded:
            return "PRE-COPY WITHOUT A BOUND"
        if source.stage is SourceStage.PRECOPY and (runs(Timer.ACK) is not None) is not waits:
            return "AN ACK IS WAITED FOR WITHOUT A BOUND" if waits else "A BOUND FOR AN ACK THAT NOBODY WAITS FOR"
    if destination is not None and destination.stage is DestinationStage.WAITING and not world.record.inc:
        asks = Do.READ in world.todo_destination or Do.RETRY_LATER in world.todo_destination
        if not asks and not destination.claimed and destination.timers.number(Timer.UNCLAIMED) is None:
            return "A DESTINATION WAITS WITHOUT A BOUND"
    return ""


def is_end(world: World) -> bool:
    record = world.record
    if record.phase is Ownership.CRASHED:
        return True
    quiet = world.source is None and world.source_up and world.destination_up
    if record.phase is not Ownership.IDLE or not quiet:
        return False
    if record.owner.host == "s":
        rests = (RUN,) if world.want and not world.off else (STOPPED, SEALED)
        return world.vmm in rests and world.destination is None
    return world.copy == OWN and world.vmm == DEAD
