"""What a source's report says of an attempt's end."""

from __future__ import annotations

import pytest

from agents.handover.report import report_of
from agents.handover.source import SourceStage, SourceState
from orchestrator import wire_attempts
from orchestrator.core.ids import AttemptRef, HostRef


@pytest.mark.parametrize("stage", [SourceStage.ENDED_NEEDS_OPERATOR, SourceStage.ENDED_COMMITTED])
def test_only_a_guest_that_could_not_be_started_again_needs_a_person(stage: SourceStage) -> None:
    state = SourceState(AttemptRef("g", "m", 1), HostRef("a", "1"), "inc", stage=stage)
    report = report_of(state, (), (), destination="b", zxid=0, ledger_writes=0, transferred_bytes=0, duration_ms=1.0)
    assert report.needs_operator is (stage is SourceStage.ENDED_NEEDS_OPERATOR)
    assert wire_attempts.report_from_proto(wire_attempts.report_to_proto(report)) == report
