"""The sessions' tables: what may come at any time has an edge everywhere, what has none is somebody's mistake."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agents.handover import destination, source
from agents.handover.destination import DestinationStage, DestinationState, destination_step
from agents.handover.shell import Mistakes, stepped
from agents.handover.source import SourceStage, SourceState, source_step
from agents.handover.table import InvalidTransition, ignored, table
from agents.handover.words import Acked, RecordSeen, Requested, RequestsSeen, Seen, WantRunSeen
from orchestrator.core.ids import AttemptRef, HostRef

SOURCE = SourceState(AttemptRef("g", "m", 1), HostRef("s", "1"), "i")
AT_ANY_TIME = (
    RecordSeen,
    RequestsSeen,
    WantRunSeen,
    Seen.VITALS_GOOD,
    Seen.VITALS_BAD,
    Seen.GUEST_ENDED,
    Seen.DEST_FAILED,
    Seen.VMM_DIED,
)
ONCE_BEGUN = (Acked, Requested, Seen.SHIM_FAILED, Seen.ENGINE_FAILED)


def live(stages: type[SourceStage] | type[DestinationStage]) -> list[SourceStage | DestinationStage]:
    return [stage for stage in stages if not stage.ended]


@pytest.mark.parametrize("stage", live(SourceStage), ids=str)
def test_a_source_takes_at_every_stage_what_comes_by_itself(stage: SourceStage) -> None:
    expected = {*AT_ANY_TIME, *(() if stage in (SourceStage.NEW, SourceStage.BINDING) else ONCE_BEGUN)}
    assert expected <= {key for at, key in source.TABLE if at is stage}


@pytest.mark.parametrize("stage", live(DestinationStage), ids=str)
def test_a_destination_takes_at_every_stage_what_comes_by_itself(stage: DestinationStage) -> None:
    assert {RecordSeen, Seen.VMM_DIED} <= {key for at, key in destination.TABLE if at is stage}


def test_nothing_is_taken_after_the_end() -> None:
    assert not [stage for stage, _ in (*source.TABLE, *destination.TABLE) if stage.ended]


def test_two_edges_for_one_event_in_one_stage_are_refused() -> None:
    rows = ((Seen.BEGIN, (SourceStage.NEW,), ignored), (Seen.BEGIN, (SourceStage.NEW,), ignored))
    with pytest.raises(ValueError, match="two edges for begin in NEW"):
        table(rows)


def test_a_mistake_tells_its_story() -> None:
    with pytest.raises(InvalidTransition, match="attempt 1 of m, guest g: NEW does not take parked") as told:
        source_step(SOURCE, Seen.PARKED)
    assert (told.value.ref, told.value.stage, told.value.event) == (SOURCE.ref, SourceStage.NEW, Seen.PARKED)
    waiting = DestinationState(AttemptRef("g", "m", 1), HostRef("d", "1"), "i")
    with pytest.raises(InvalidTransition, match="WAITING does not take started"):
        destination_step(waiting, Seen.STARTED)


def test_in_production_a_mistake_is_counted_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidTransition):
        stepped(source_step, SOURCE, Seen.PARKED)
    monkeypatch.setattr(Mistakes, "strict", False)
    before = Mistakes.seen["NEW parked"]
    assert stepped(source_step, SOURCE, Seen.PARKED) == (SOURCE, ())
    assert Mistakes.seen["NEW parked"] == before + 1


# --- edges that only the real parts reach -----------------------------------------------------------------------------


def test_a_guest_that_cannot_be_stopped_as_wished_does_not_keep_its_attempt_open() -> None:
    """QEMU refused the stop, and the attempt waited for its answer for ever; the guest's keeper applies the wish."""
    resuming = replace(SOURCE, stage=SourceStage.RESUMING, want_run=False)
    state, commands = source_step(resuming, Seen.PAUSE_QUEUED)
    assert state.stage is SourceStage.RECORDING
    assert len(commands) == 1


def test_a_guest_that_ran_again_just_before_the_freeze_is_no_stopped_guest() -> None:
    """Its requests would be taken for those of a guest that has no downtime to protect (H14)."""
    frozen = replace(SOURCE, stage=SourceStage.FREEZING, paused=True, acks=SOURCE.acks.stop_by_wish())
    state, _ = source_step(frozen, Seen.RESUMED)
    assert state.stage is SourceStage.ROLLING_BACK
    assert state.reason is not None
    assert state.reason.name == "GUEST_RESUMED"
