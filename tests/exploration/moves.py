"""What happens by itself: the engine, the coordinator, messages, wishes, time, and faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from agents.handover import words
from agents.handover.destination import (
    destination_step,
    prepared_destination,
)
from agents.handover.source import SourceStage, SourceState, source_step
from agents.handover.words import (
    Do,
    Event,
    Rang,
    Seen,
    Timer,
)
from orchestrator.core import death, handover
from orchestrator.core.disks import SyncPoint
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import Ownership
from orchestrator.core.ids import AckRequest
from tests.exploration import world as world_module
from tests.exploration.world import (
    BEFORE_SUBMIT,
    BORN,
    D1,
    DEAD,
    DEVICE,
    LOADED,
    MIGRATION,
    NO_TIMERS,
    NONE,
    OWN,
    PARKED,
    RESTARTS,
    RUN,
    S1,
    SEALED,
    STOPPED,
    WAIT,
    Bounds,
    Disk,
    Move,
    World,
    _numbered,
    ask,
    attempted,
    commit_arrives,
    conducts_record,
    device_asks,
    feed_destination,
    feed_source,
    image_lost,
    memory,
    record_is_live,
    ref,
    vmm_back,
    write,
)


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
        resumed = feed_source(world._replace(vmm=vmm_back(world), engine=False, copy=gone), Seen.ENGINE_FAILED)
        yield "Q resumes by itself", True, feed_destination(resumed, Seen.VMM_DIED) if gone == DEAD else resumed
        if world.source is not None and world.source.inside:
            yield from _verdicts(world, gone)


def _verdicts(world: World, gone: str) -> Iterator[Move]:
    """QEMU's own ends of a migration with devices inside. Each uses up one of the requests."""
    if not world.requests:
        return
    ended = world._replace(vmm=vmm_back(world), engine=False, copy=gone, requests=world.requests - 1)
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
            cancelled = world_module.cancel_by_api(world)
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
        asked = ask(world)
        waits = state is not None and state.stage is SourceStage.GATE_WAIT
        stands = world.vmm in (PARKED, DEVICE, SEALED) and not world.wished_stop
        frozen = stands and conducts_record(world) and not waits
        yield "API asks", False, asked._replace(req=world.req + 1, late=world.late or frozen)
        if state is not None and state.stage in (SourceStage.PRECOPY, SourceStage.GATE_WAIT, SourceStage.FREEZING):
            heard, entry = device_asks(world)
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
        yield "another image is there", False, world._replace(faults=world.faults - 1, disk=image_lost(disk))
    if world.faults and disk.written_by_daemon:
        lost = world._replace(faults=world.faults - 1, disk=image_lost(disk))
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
