"""What must hold in every state, and which states are an end."""

from __future__ import annotations

from agents.handover.destination import (
    DestinationStage,
)
from agents.handover.source import SourceStage
from agents.handover.words import (
    Do,
    Timer,
)
from orchestrator.core.handover import Ownership
from tests.exploration.world import BEFORE_SUBMIT, DEAD, DEVICE, LOADED, OWN, PARKED, RUN, SEALED, STOPPED, World


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
