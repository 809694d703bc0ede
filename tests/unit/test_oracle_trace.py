"""Reading what QEMU traces."""

from __future__ import annotations

import pytest

from tests.oracle.trace import Iterated, Read, RunState, UnknownTraceError, events_of

PAUSED = "runstate_set current_run_state 9 (running) new_state 4 (paused)"
READ = "vfio_save_block  (vfio-d0) data_size 1048576"
ITERATED = "vfio_save_iterate  (vfio-d0) precopy initial size 7 precopy dirty size 0"


@pytest.mark.parametrize("between", ["\n", ""], ids=["lines of their own", "one line, as two threads may leave it"])
def test_no_event_is_lost_behind_another_one(between: str) -> None:
    log = f"{READ}{between}{PAUSED}{between}{READ}{between}{ITERATED}\n\n\n"
    read = Read("vfio-d0", 1048576)
    assert events_of(log) == [read, RunState("paused"), read, Iterated("vfio-d0", 7)]


def test_half_a_line_of_an_event_is_not_passed_over() -> None:
    with pytest.raises(UnknownTraceError):
        events_of(f"vfio_save_block  (vfi{PAUSED}\no-d0) data_size 1048576\n")
