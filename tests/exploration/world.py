"""Every interleaving of the production session machines with a small world: a ledger, two VMMs, a network, faults.

Nothing that decides stands here: `agents/handover/{source,destination}.py`, `agents/guest/duty.py` and
`orchestrator/core/handover.py` are the production files. The world only does what the outside does: it carries out
commands (at once, late, twice, never), stops the guest when QEMU would, loses answers, kills agents, VMMs and hosts,
asks for late ACKs, pauses and cancels.

Here is what a state is, and how a session is fed. What the commands of both sessions do is in `sessions.py`, what
happens by itself in `moves.py`, what keepers do in `keepers.py`, and what must hold in `verdict.py`.

Steps marked `heal=False` are faults or somebody's free wish: `search.py` judges progress without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from agents.handover import words
from agents.handover.destination import (
    DestinationState,
    destination_step,
)
from agents.handover.source import SourceStage, SourceState, source_step
from agents.handover.table import InvalidTransition
from agents.handover.timers import Timers
from agents.handover.words import (
    CancelTimer,
    Command,
    Do,
    Event,
    Note,
    Rang,
    Seen,
    StartTimer,
    Timer,
    WriteRequests,
)
from orchestrator.core import handover
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AckRequest, AttemptRef, HostRef
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


def noted(disk: Disk, attempt: int) -> Disk:
    """The guest stands still: what is written from here on is noted."""
    return disk._replace(noted=attempt, base=disk.promised)


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


def record_is_live(world: World) -> bool:
    return world.record.phase not in (Ownership.CRASHED, Ownership.GONE)


def ask(world: World) -> World:
    """Somebody asks for one more ACK."""
    generation = bounds_generation(world)
    return world._replace(requests=world.requests - 1, pending=world.pending | {generation})


def device_asks(world: World) -> tuple[World, AckRequest]:
    """The session that hears it may be one of an attempt that is over: nobody has to wait for that ACK."""
    entry = AckRequest("x", bounds_generation(world))
    asked = ask(world)
    return (asked if conducts_record(world) else asked._replace(pending=world.pending)), entry


def bounds_generation(world: World) -> int:
    return 10 - world.requests


def vmm_back(world: World) -> str:
    """Where the guest is after a migration ended: as before it was stopped."""
    return STOPPED if world.wished_stop or world.off else RUN


def image_lost(disk: Disk) -> Disk:
    """Whoever wrote it was killed in the middle: what it had in memory is gone, so it is made anew."""
    return disk._replace(present=0, image=3 - disk.image, since=0, written_by_daemon=False, mirror=0)
