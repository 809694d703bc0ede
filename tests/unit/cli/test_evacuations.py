"""`drover evacuate` and `drover evacuation`."""

from __future__ import annotations

import re

import pytest

from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_service import FakeOrchestrator
from tests.unit.cli.ran import Drover, evacuation, leaving, migration


def test_evacuate_says_who_can_go_where(drover: Drover, service: FakeOrchestrator) -> None:
    service.verdicts = [
        pb.PlacementVerdict(guest="web-10", memory_mib=64, destination="host-2"),
        pb.PlacementVerdict(guest="web-2", memory_mib=256, reason="NO_CAPACITY", message="host-2 has 9 MiB free"),
    ]
    ran = drover("evacuate", "host-1", "--validate-only")
    assert ran.code == 1
    assert ran.rows() == [
        ["GUEST", "MiB", "TO", "REASON", "MESSAGE"],
        ["web-2", "256", "nowhere", "NO_CAPACITY", "host-2 has 9 MiB free"],
        ["web-10", "64", "host-2"],
    ]
    assert ran.err == "1 of 2 guests can leave host-1\n"
    service.verdicts.pop()
    assert drover("evacuate", "host-1", "--validate-only").code == 0
    assert service.evacuations == {}


def test_evacuate_starts_and_returns(drover: Drover, service: FakeOrchestrator) -> None:
    ran = drover("evacuate", "host-1", "--max-concurrent", "2", "--max-attempts", "9")
    assert ran.out == f"evacuation {'e' * 32} of host-1, 3 guests: PENDING\n"
    (request,) = service.requests("CreateEvacuation")
    assert (request.host, request.max_concurrent, request.policy.max_attempts) == ("host-1", 2, 9)
    assert drover("evacuate", "host-9").code == 3


@pytest.mark.parametrize(
    ("phase", "why", "code", "told"),
    [
        ("SUCCEEDED", "", 0, "SUCCEEDED: 2 of 2 guests moved off host-1 in 9.0 s, 1 attempt repeated; host-1 is safe"),
        ("FAILED", ": ATTEMPTS_EXHAUSTED", 1, "1 of 2 guests remain on host-1: db (ATTEMPTS_EXHAUSTED)"),
        ("CANCELLED", ": LATE_SWITCHOVER_ACK (flows)", 6, "CANCELLED: 1 of 2 guests moved off host-1 in 9.0 s, 1"),
    ],
)
def test_evacuate_and_watch(
    drover: Drover, service: FakeOrchestrator, phase: str, why: str, code: int, told: str
) -> None:
    late = types.AttemptReport(attempt=1, outcome="ABORTED", reason="LATE_SWITCHOVER_ACK", devices=["flows"])
    service.migrations["m-db"] = migration("m-db", "RETRY_WAIT", attempts=[late])
    failure = "ATTEMPTS_EXHAUSTED" if phase == "FAILED" else ""
    message = "1 of 2 guests remain on host-1: db (ATTEMPTS_EXHAUSTED)" if phase == "FAILED" else ""
    waiting = types.EvacuationGuest(guest="db", guest_uuid="uuid-db", memory_mib=64)
    service.frames = [
        [
            evacuation("PENDING"),
            evacuation("RUNNING", leaving("web", "PRECOPY"), waiting),
            evacuation("RUNNING", leaving("web", "SUCCEEDED"), leaving("db", "RETRY_WAIT")),
            evacuation("RUNNING", leaving("web", "SUCCEEDED"), leaving("db", "PRECOPY", attempts=2)),
            evacuation(
                phase,
                leaving("web", "SUCCEEDED"),
                leaving("db", phase, attempts=2, failure=failure),
                safe_to_power_off=phase == "SUCCEEDED",
                message=message,
            ),
        ]
    ]
    ran = drover("evacuate", "host-1", "--watch")
    assert ran.code == code
    assert [line.split(" ", 1)[1] for line in ran.out.splitlines()[:6]] == [
        "web to host-2: PRECOPY (attempt 1)",
        "db: PENDING",
        "web to host-2: SUCCEEDED (attempt 1)",
        "db to host-2: RETRY_WAIT (attempt 1): LATE_SWITCHOVER_ACK (flows)",
        "db to host-2: PRECOPY (attempt 2 after LATE_SWITCHOVER_ACK (flows))",
        f"db to host-2: {phase} (attempt 2){why}",
    ]
    assert any(line.startswith(told) for line in ran.out.splitlines())


def test_evacuation_list_show_and_cancel(drover: Drover, service: FakeOrchestrator) -> None:
    service.evacuations["e" * 32] = evacuation(
        "RUNNING", leaving("web-10", "SUCCEEDED"), leaving("web-2", "PRECOPY"), max_concurrent=4
    )
    rows = drover("evacuation", "list").rows()
    assert rows[1][:5] == ["eeeeeeee", "host-1", "RUNNING", "1 of 2", "no"]
    shown = drover("evacuation", "show", "ee").out
    assert re.search(r"^power off +not safe$", shown, re.MULTILINE)
    assert shown.index("web-2") < shown.index("web-10")
    ran = drover("evacuation", "cancel", "ee")
    assert ran.code == 0
    assert service.evacuations["e" * 32].cancel_requested
