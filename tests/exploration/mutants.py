"""Each rule of the hand-over, taken out of the production code on its own. Every one must be caught.

A mutant replaces one small decision function of production code (or, where a rule is a shell's, the world's stand-in
for what that shell does) by a version without the rule. The names are those of docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from agents.guest import duty as keeping
from agents.handover import destination as destination_session
from agents.handover import timers
from agents.handover.destination import DestinationStage, DestinationState
from agents.handover.source import SourceStage, SourceState, back, blackout, machine, outcome, precopy
from agents.handover.source.state import UNILATERAL
from agents.handover.table import ignored
from agents.handover.words import Commit, DevicesLost, Do, Seen, Timer
from orchestrator.core import death, disks, handover
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import Ownership
from orchestrator.core.liveness import Liveness
from tests.exploration import keepers
from tests.exploration import world as world_module
from tests.exploration.world import BORN, Bounds, World

Patch = tuple[object, str, Any]


@dataclass(frozen=True)
class Mutant:
    name: str
    rule: str
    patches: Callable[[], list[Patch]]
    bounds: Bounds = field(default_factory=lambda: Bounds(requests=0, cancels=0))
    dead_ends: bool = False
    """Caught by progress, not by a flaw."""


def _with(module: Any, key: Any, handler: Any) -> Patch:
    """The machine's table with another handler for an event, in every stage that takes it."""
    return module, "TABLE", {edge: handler if edge[1] is key else old for edge, old in module.TABLE.items()}


def run_uncommitted() -> list[Patch]:
    return [(destination_session, "may_take_over", lambda state, record: state.stage is DestinationStage.LOADED)]


def resume_restarted() -> list[Patch]:
    def restarted(ref: Any, here: Any, inc: str, *, want_run: bool, parked: bool, sealed: bool) -> Any:
        state = SourceState(ref, here, inc, want_run=want_run, stage=SourceStage.ROLLING_BACK)
        return state, (Do.ROLL_BACK_SHIMS,)

    return [(keepers, "restarted_source", restarted)]


def dest_commits() -> list[Patch]:
    def validated(state: DestinationState) -> Any:
        return replace(state, stage=DestinationStage.LOADED), (Do.SEND_LOADED, Commit(None))

    return [_with(destination_session, Seen.VALIDATED, validated)]


def submit_early() -> list[Patch]:
    return [(blackout, "may_submit", lambda s: s.stage is SourceStage.LAST_PASS and s.sent and s.loaded)]


def no_check() -> list[Patch]:
    return [(blackout, "late_at_check", lambda state: ())]


def resume_submitted() -> list[Patch]:
    def timeout(state: SourceState) -> Any:
        return outcome.refused(state) if state.stage is SourceStage.SUBMITTED else (state, ())

    return [_with(machine, Seen.LEDGER_UNKNOWN, timeout)]


def bad_version_is_final() -> list[Patch]:
    def refused(state: SourceState) -> Any:
        if state.stage is SourceStage.SUBMITTED:
            return outcome.refused(state)
        return outcome.read_then_decide(state)

    return [_with(machine, Seen.LEDGER_REFUSED, refused)]


def blind_abort() -> list[Patch]:
    def abort(record: Any, migration: str, attempt: int, reason: AbortReason, devices: Any = (), *, writer: str) -> Any:
        if record.phase not in (Ownership.OPEN, Ownership.COMMITTED):
            raise handover.Refused("neither open nor committed")
        owner = record.source or record.owner
        return replace(record, phase=Ownership.ABORTED, owner=owner, reason=reason, devices=devices)

    return [(handover, "abort", abort)]


def cancel_answers_first() -> list[Patch]:
    return [(world_module, "cancel_by_api", lambda w: w._replace(cancels=w.cancels - 1, cancelled=True))]


def cancel_reopens() -> list[Patch]:
    return [(handover, "may_retry", lambda record: True)]


def restart_continues() -> list[Patch]:
    def restarted(ref: Any, here: Any, inc: str, *, want_run: bool, parked: bool, sealed: bool) -> Any:
        state = SourceState(ref, here, inc, want_run=want_run, stage=SourceStage.LAST_PASS, sealed=sealed, sent=True)
        return state, (Do.PROCEED,)

    return [(keepers, "restarted_source", restarted)]


def parked_forgotten() -> list[Patch]:
    production = machine.restarted_source

    def restarted(ref: Any, here: Any, inc: str, *, want_run: bool, parked: bool, sealed: bool) -> Any:
        if parked:
            return SourceState(ref, here, inc, want_run=want_run), ()
        return production(ref, here, inc, want_run=want_run, parked=parked, sealed=sealed)

    return [(keepers, "restarted_source", restarted)]


def discard_at_com() -> list[Patch]:
    def may_discard(record: Any, here: Any, inc: str) -> bool:
        return record.owner != here

    return [(handover, "may_discard_source", may_discard)]


def done_needs_vcpus() -> list[Patch]:
    production = world_module.start_at_destination

    def start(world: World) -> World:
        return production(world) if world.want else world._replace(copy=world_module.OWN, ran_there=True)

    return [(world_module, "start_at_destination", start)]


def rollback_unknown() -> list[Patch]:
    def dead(state: DestinationState) -> Any:
        if not state.committed:
            return replace(state, stage=DestinationStage.GIVING_UP), (Do.SEND_FAILED, Do.READ)
        return replace(state, stage=DestinationStage.ROLLING_BACK), (Do.WRITE_ROLLBACK,)

    def may(record: Any, *, by: Any, vmm_seen_dead: bool, marker: bool) -> bool:
        return record.owner == by and vmm_seen_dead

    return [(destination_session, "_dead_owner", dead), (handover, "may_roll_back", may)]


def rollback_any_boot() -> list[Patch]:
    def may(record: Any, *, by: Any, vmm_seen_dead: bool, marker: bool) -> bool:
        return record.owner.host == by.host and vmm_seen_dead and not marker

    return [(handover, "may_roll_back", may)]


def fence_guess() -> list[Patch]:
    return [(handover, "may_declare_dead", lambda *, certificate: True)]


def certificate_other_boot() -> list[Patch]:
    def certified(ref: Any, certificates: Any) -> bool:
        return any(each.host == ref.host for each in certificates)

    return [(death, "is_certified", certified)]


def restart_without_certificate() -> list[Patch]:
    return [(death, "may_restart", lambda record: record.phase is not Ownership.GONE)]


def stale_read() -> list[Patch]:
    return [(world_module, "read_record", lambda world: BORN)]


def forget_by_old_record() -> list[Patch]:
    return [(world_module, "record_to_forget_by", lambda world: BORN)]


def no_req_check() -> list[Patch]:
    return [(blackout, "req_to_check", lambda state: None)]


def late_when_stopped() -> list[Patch]:
    return [(blackout, "late_at_check", lambda state: state.acks.pending)]


def forget_pause() -> list[Patch]:
    def restore(state: SourceState) -> Any:
        return replace(state, stage=SourceStage.RESUMING), (Do.RESUME,)

    return [(back, "_restore", restore)]


def resume_in_place() -> list[Patch]:
    return [(precopy, "may_resume_in_place", lambda state: True)]


def forget_reset() -> list[Patch]:
    return [_with(machine, DevicesLost, ignored)]


def start_what_ended() -> list[Patch]:
    duty = keeping.duty

    def forgetful(record: Any, here: Any, copies: Any, **known: Any) -> Any:
        return duty(record, here, [replace(copy, ended=False) for copy in copies], **known)

    return [(keeping, "duty", forgetful)]


def wait_for_what_ended() -> list[Patch]:
    ended = back.fails(AbortReason.GUEST_ENDED)
    ours = {SourceStage.NEW, SourceStage.BINDING, *UNILATERAL}
    return [_with(machine, Seen.GUEST_ENDED, lambda state: ended(state) if state.stage in ours else (state, ()))]


def start_what_arrived_ended() -> list[Patch]:
    """A guest that cannot be set going was tried again and again, whatever the engine said of it."""
    again = destination_session._activation_failed
    return [_with(destination_session, Seen.GUEST_ENDED, lambda s: again(s) if s.stage is STARTING else (s, ()))]


STARTING = DestinationStage.STARTING


def unknown_is_gone() -> list[Patch]:
    return [
        (keeping, "is_unknown", lambda copy: False),
        (keeping, "decides", lambda copy: copy.in_session or copy.liveness is Liveness.ALIVE),
    ]


def missing_is_gone() -> list[Patch]:
    duty = keeping.duty

    def credulous(record: Any, here: Any, known: Any, **rest: Any) -> Any:
        return duty(record or replace(BORN, phase=Ownership.GONE), here, known, **rest)

    # A second rule stands behind this one since a copy that was never given away is kept whatever the ledger says.
    return [(keeping, "duty", credulous), *foreign_owner()]


def foreign_owner() -> list[Patch]:
    """On its own a case of tests/unit/test_keeping.py: no party of this world writes a record that it may not."""
    return [(keeping, "may_have_been_given_away", lambda copy: True)]


def any_ring() -> list[Patch]:
    return [(timers, "is_running", lambda running, event: True)]


def ack_timer_runs_on() -> list[Patch]:
    """Started with pre-copy and never cancelled: it ended the next closing of the gate after a moment."""

    def due(state: SourceState) -> tuple[Timer, ...]:
        wanted = DUE_AT_SOURCE(state)
        return (*wanted, Timer.ACK) if Timer.PRECOPY in wanted and Timer.ACK not in wanted else wanted

    return [(machine, "due_timers", due)]


def precopy_bound_is_lost() -> list[Patch]:
    """It rang while the guest was stopped on purpose, and nothing started it again."""

    def due(state: SourceState) -> tuple[Timer, ...]:
        return tuple(timer for timer in DUE_AT_SOURCE(state) if timer is not Timer.PRECOPY or not state.released)

    return [(machine, "due_timers", due)]


def switchover_from_check() -> list[Patch]:
    def due(state: SourceState) -> tuple[Timer, ...]:
        stands = state.stage is SourceStage.LAST_PASS
        return tuple(timer for timer in DUE_AT_SOURCE(state) if timer is not Timer.SWITCHOVER or stands)

    return [(machine, "due_timers", due)]


def waits_unclaimed() -> list[Patch]:
    return [(destination_session, "due_timers", lambda state: ())]


def undrained() -> list[Patch]:
    """The engine does not ask whether a mirror still runs: nothing but our order keeps it from going on."""
    return [(blackout, "must_drain", lambda state: False)]


def image_discarded_at_commit() -> list[Patch]:
    """The guest may come back as long as its destination has not said DONE."""

    def committed(state: SourceState) -> Any:
        after, commands = outcome.committed(state)
        return after, (Do.RETIRE_DISKS, *commands)

    return [
        (
            machine,
            "TABLE",
            {**machine.TABLE, (SourceStage.SUBMITTED, Seen.COMMITTED): committed},
        )
    ]


def increment_on_other_image() -> list[Patch]:
    """What was noted since an earlier drain goes into whatever image the destination has now."""

    def copying(source: Any, destination: Any) -> Any:
        return disks.Copying.INCREMENT if source.since and not source.mirrors_to else COPYING(source, destination)

    return [(disks, "copying", copying)]


def bitmap_after_resume() -> list[Patch]:
    """What the guest wrote between its resume and the note is in neither."""

    def noted(disk: Any, attempt: int) -> Any:
        return disk._replace(noted=attempt, base=99)

    return [(world_module, "noted", noted)]


COPYING = disks.copying
DUE_AT_SOURCE = machine.due_timers

_REQUEST = Bounds(requests=1, cancels=0, faults=0)
_CANCEL = Bounds(requests=0, cancels=1, faults=0)
_STOP = Bounds(requests=0, cancels=0, faults=0, wishes=1)
_INSIDE = Bounds(requests=0, cancels=0, faults=0, devices=False, inside=True)
_TIME = Bounds(requests=0, cancels=0, faults=0, time=True)
_DISK = Bounds(requests=0, cancels=0, faults=1, devices=False, disk=True, writes=1)
_OFF = Bounds(requests=0, cancels=0, faults=1, off=True)

MUTANTS = (
    Mutant("run_uncommitted", "H1 H8", run_uncommitted),
    Mutant("resume_restarted", "H1 H7", resume_restarted, Bounds(requests=0, cancels=0, faults=2)),
    Mutant("dest_commits", "H2", dest_commits, _REQUEST),
    Mutant("submit_early", "H3", submit_early),
    Mutant("no_check", "H3", no_check, _REQUEST),
    Mutant("resume_submitted", "H5", resume_submitted),
    Mutant("bad_version_is_final", "H5", bad_version_is_final),
    Mutant("blind_abort", "H6", blind_abort),
    Mutant("cancel_answers_first", "H6", cancel_answers_first, _CANCEL),
    Mutant("cancel_reopens", "H6", cancel_reopens, replace(_CANCEL, attempts=2)),
    Mutant("restart_continues", "H7", restart_continues, Bounds(requests=1, cancels=0, faults=1)),
    Mutant("parked_forgotten", "H7", parked_forgotten, dead_ends=True),
    Mutant("discard_at_com", "H9", discard_at_com),
    Mutant("done_needs_vcpus", "H9", done_needs_vcpus, _STOP, dead_ends=True),
    Mutant("rollback_unknown", "H10", rollback_unknown, Bounds(requests=0, cancels=0, faults=2)),
    Mutant("rollback_any_boot", "H10", rollback_any_boot, Bounds(requests=0, cancels=0, faults=0, power=1)),
    Mutant("fence_guess", "H11", fence_guess),
    Mutant("certificate_other_boot", "H11", certificate_other_boot, Bounds(requests=0, cancels=0, faults=0)),
    Mutant("restart_without_certificate", "H11", restart_without_certificate, Bounds(requests=0, cancels=0, faults=0)),
    Mutant("stale_read", "H13", stale_read, Bounds(requests=0, cancels=0, faults=2)),
    Mutant("forget_by_old_record", "H13", forget_by_old_record, Bounds(requests=0, cancels=0, faults=2)),
    Mutant("no_req_check", "H14", no_req_check, _REQUEST),
    Mutant("late_when_stopped", "H14", late_when_stopped, Bounds(requests=1, cancels=0, faults=0, wishes=1)),
    Mutant("forget_pause", "5.2", forget_pause, _STOP),
    Mutant("resume_in_place", "5.2", resume_in_place, replace(_INSIDE, wishes=2)),
    Mutant("forget_reset", "DEVICE_RESET", forget_reset, replace(_INSIDE, requests=1)),
    Mutant("start_what_ended", "GUEST_ENDED", start_what_ended, replace(_OFF, faults=0)),
    Mutant("unknown_is_gone", "H10", unknown_is_gone),
    Mutant("missing_is_gone", "H9", missing_is_gone),
    Mutant("wait_for_what_ended", "GUEST_ENDED", wait_for_what_ended, _OFF, dead_ends=True),
    Mutant(
        "start_what_arrived_ended", "GUEST_ENDED", start_what_arrived_ended, replace(_OFF, faults=0), dead_ends=True
    ),
    Mutant("undrained", "H15", undrained, replace(_DISK, faults=0)),
    Mutant("image_discarded_at_commit", "H16", image_discarded_at_commit, replace(_DISK, writes=0)),
    Mutant("increment_on_other_image", "H16", increment_on_other_image, replace(_DISK, writes=0, drained_before=True)),
    Mutant("bitmap_after_resume", "H16", bitmap_after_resume, replace(_DISK, faults=0, drained_before=True)),
    Mutant("any_ring", "time", any_ring),
    Mutant("ack_timer_runs_on", "time", ack_timer_runs_on, _REQUEST),
    Mutant("precopy_bound_is_lost", "time", precopy_bound_is_lost, _TIME),
    Mutant("switchover_from_check", "time", switchover_from_check, _TIME),
    Mutant("waits_unclaimed", "time", waits_unclaimed, _TIME),
)
