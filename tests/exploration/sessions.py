"""What the commands of both sessions do to the world."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from agents.handover import words
from agents.handover.destination import (
    DestinationState,
)
from agents.handover.source import SourceState
from agents.handover.words import (
    Command,
    Commit,
    Do,
    Seen,
    WriteAbort,
    WriteRequests,
)
from orchestrator.core import disks, handover
from orchestrator.core.disks import SyncPoint
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import Ownership
from orchestrator.core.ids import AckRequest
from tests.exploration import world as world_module
from tests.exploration.world import (
    DEAD,
    DEVICE,
    LOADED,
    MIGRATION,
    OWN,
    PARKED,
    RUN,
    SEALED,
    STOPPED,
    WAIT,
    Bounds,
    Disk,
    Move,
    World,
    _lanes,
    answers,
    attempted,
    commit_arrives,
    conducts_record,
    device_asks,
    feed_destination,
    feed_source,
    sent,
    vmm_back,
)

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
            yield "", True, feed_source(world, words.RecordRead(world_module.read_record(world), world.req))
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
        asked, entry = device_asks(world)
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
        drained = world_module.noted(_caught_up(disk)._replace(mirror=0), state.ref.attempt)
        point = SyncPoint("d", state.inc, 1)
        yield "", True, feed_source(world._replace(disk=drained), words.Drained((point,)))
    if world.faults:
        failed = world._replace(faults=world.faults - 1, disk=disk._replace(mirror=0, noted=0))
        yield "fails", False, feed_source(failed, words.DiskFailed("d"))


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
    back = world._replace(vmm=vmm_back(world), engine=False, copy=gone)
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
        yield "", True, world_module.start_at_destination(world)
    elif command is Do.START_GUEST:
        yield "dead", True, feed(world, Seen.ACTIVATION_FAILED)
    elif command is Do.DISCARD_DESTINATION:
        yield "", True, feed(world._replace(copy=DEAD), Seen.DISCARDED)
    elif command is Do.READ:
        yield "", True, feed(world, words.RecordRead(world_module.read_record(world), world.req))
    elif command is Do.RETRY_LATER:
        yield "", True, feed(world, Seen.RETRY_DUE)
    else:
        yield "", True, world
