"""`drover migrate` and `drover migration`: what is asked, what is printed, how it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from orchestrator.cli.exits import Exit
from orchestrator.core.errors import DroverError
from orchestrator.core.obstacles import remedy
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_service import FakeOrchestrator
from tests.unit.cli.ran import Drover, R, migration


def test_migrate_sends_what_was_given_and_nothing_else(drover: Drover, service: FakeOrchestrator) -> None:
    ran = drover(
        *("migrate", "db", "--to", "host-2", "--precopy-timeout", "20s", "--on-timeout", "suspend"),
        *("--max-bandwidth", "1.5gbit", "--no-auto-converge", "--request-id", "mine"),
    )
    assert ran.code == 0, ran.err
    assert ran.out == f"migration {'5' * 32} of db: PENDING\n"
    (request,) = service.requests("CreateMigration")
    assert (request.guest, request.destination, request.request_id) == ("db", "host-2", "mine")
    assert {field.name: value for field, value in request.policy.ListFields()} == {
        "precopy_timeout_ms": 20_000,
        "on_timeout": types.ON_TIMEOUT_SUSPEND,
        "max_bandwidth_mbps": 1500,
        "auto_converge": False,
    }
    assert drover("migrate", "web-2").code == 0
    assert not service.requests("CreateMigration")[1].HasField("policy")


def test_a_check_without_a_place_shows_what_stands_against_each_host(
    drover: Drover, service: FakeOrchestrator, tmp_path: Path
) -> None:
    for each in service.hosts.values():
        each.cordoned = each.name == "host-2"
        each.memory_mib, each.memory_used_mib = 64, 60
    rows = [["HOST", "REASON", "MESSAGE", "WHAT CAN BE DONE"]]
    rows += [["host-2", "HOST_CORDONED", "host-2 is cordoned", remedy("HOST_CORDONED")]]
    rows += [["host-10", "NO_CAPACITY", "host-10 has 4 MiB free, db needs 64 MiB", remedy("NO_CAPACITY")]]
    ran = drover("migrate", "db", "--dry-run")
    assert ran.rows() == rows
    assert ran.code == 4
    assert "NO_CAPACITY" in ran.err
    assert [each["host"] for each in drover("migrate", "db", "--dry-run", "-o", "json").json["verdicts"]] == [
        "host-10",
        "host-2",
    ]
    assert drover("migrate", "db", "--to", "host-2", "--dry-run").rows() == rows[:2]
    (tmp_path / "a.yaml").write_text("name: new")
    ran = drover("guest", "run", str(tmp_path / "a.yaml"), "--dry-run")
    assert ran.out.startswith("hosts for new:\n")
    assert ran.out.count("NO_CAPACITY") == 2
    listed = drover("guest", "run", str(tmp_path / "a.yaml"), "--dry-run", "-o", "json").json
    assert len(listed["placements"]["new"]["verdicts"]) == 3


def test_migrate_can_only_check(drover: Drover, service: FakeOrchestrator) -> None:
    assert drover("migrate", "db", "--validate-only").out == "db can go from host-1 to host-10\n"
    assert service.migrations == {}


@pytest.mark.parametrize(("phase", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("CANCELLED", 6)])
def test_the_watch_of_a_migration_ends_with_its_code(
    drover: Drover, service: FakeOrchestrator, phase: str, code: int
) -> None:
    name = "5" * 32
    committed = types.AttemptReport(attempt=2, outcome="COMMITTED", blackout_ms=12.3)
    late = types.AttemptReport(attempt=1, outcome="ABORTED", reason="LATE_SWITCHOVER_ACK", devices=["flows"])
    attempts = [late, committed] if phase == "SUCCEEDED" else [late]
    failure = "" if phase == "SUCCEEDED" else "ATTEMPTS_EXHAUSTED" if phase == "FAILED" else "CANCELLED"
    pending = types.Progress(total_bytes=100, remaining_bytes=50, transferred_bytes=50, bandwidth_mbps=940, eta_s=3)
    pending.pending_acks.add(device="flows", generation=2)
    service.frames = [
        [
            migration(name, "PREPARING"),
            migration(name, "PRECOPY"),
            migration(name, "RETRY_WAIT", attempts=[late]),
            migration(name, "PRECOPY", attempt=2, attempts=[late], progress=pending),
            migration(name, phase, attempt=2, attempts=attempts, failure=failure),
        ]
    ]
    ran = drover("migrate", "web-2", "--watch")
    assert ran.code == code
    lines = [line.split(" ", 1)[1] for line in ran.out.splitlines()[:4]]
    assert lines == [
        "web-2 to host-2: PREPARING (attempt 1)",
        "web-2 to host-2: PRECOPY (attempt 1)",
        "web-2 to host-2: RETRY_WAIT (attempt 1): LATE_SWITCHOVER_ACK (flows)",
        "web-2 to host-2: PRECOPY (attempt 2 after LATE_SWITCHOVER_ACK (flows)): waits for ACK: flows",
    ]
    assert (
        ran.out.splitlines()[-1]
        == {
            "SUCCEEDED": "web-2 is on host-2 after 4.0 s, 2 attempts, blackout 12.3 ms",
            "FAILED": "web-2 stays on host-1: FAILED after 4.0 s, 2 attempts: ATTEMPTS_EXHAUSTED",
            "CANCELLED": "web-2 stays on host-1: CANCELLED after 4.0 s, 2 attempts: CANCELLED",
        }[phase]
    )


def test_a_migration_that_no_host_could_take_has_no_attempt_and_no_source_to_name(
    drover: Drover, service: FakeOrchestrator
) -> None:
    name, why = "5" * 32, {"failure": "NO_CAPACITY", "message": "no host can take web-2"}
    service.frames = [[migration(name, "FAILED", source="", destination="", attempt=0, **why)]]
    said = "web-2 stays where it is: FAILED after 4.0 s, no attempt: NO_CAPACITY: no host can take web-2"
    assert drover("migrate", "web-2", "--watch").out.splitlines()[-1] == said
    service.migrations = {name: migration(name, "PENDING", source="", destination="", attempt=0)}
    assert drover("migration", "cancel", name).out == f"migration {name} of web-2 is cancelled: it stays where it is\n"


def test_a_watch_for_programs_is_one_document_per_line(drover: Drover, service: FakeOrchestrator) -> None:
    same = migration("5" * 32, "PRECOPY")
    service.frames = [[same, same, migration("5" * 32)]]
    ran = drover("migrate", "web-2", "--watch", "-o", "json")
    assert [json.loads(line)["phase"] for line in ran.out.splitlines()] == ["PRECOPY", "SUCCEEDED"]


def test_a_watch_survives_a_restart_of_the_api(
    drover: Drover, service: FakeOrchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.cli.watch.RETRY_S", 0.01)
    name = "5" * 32
    lost = DroverError(R.LEDGER_UNREACHABLE, "ZooKeeper is away")
    # The client itself bears a loss that is shorter than its timeout.
    service.frames = [[migration(name, "PRECOPY"), lost], [lost], [lost], [lost], [migration(name)]]
    ran = drover("migrate", "web-2", "--watch", "--timeout", "0.3")
    assert ran.code == 0
    assert ran.err.count("lost the API, trying again: ZooKeeper is away") == 1


def test_a_watch_gives_up_after_a_while_and_says_that_the_work_goes_on(
    drover: Drover, service: FakeOrchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.cli.watch.RETRY_S", 0.01)
    monkeypatch.setattr("orchestrator.cli.watch.PATIENCE_S", 0.2)
    service.frames = [[DroverError(R.LEDGER_UNREACHABLE, "ZooKeeper is away")]]
    ran = drover("migrate", "web-2", "--watch")
    assert ran.code == 5
    assert "the watch ends, but what it watched goes on: ZooKeeper is away" in ran.err


def test_the_watch_of_several_ends_with_the_worst(drover: Drover, service: FakeOrchestrator) -> None:
    first, second = "a" * 32, "b" * 32
    service.migrations = {first: migration(first, "PRECOPY"), second: migration(second, "PRECOPY")}
    service.frames = [[migration(first), migration(second, "CANCELLED", failure="CANCELLED")]]
    assert drover("migration", "watch", "aa", "bb").code == 6
    assert service.requests("WatchMigrations")[0].names == [first, second]


def test_lists_abbreviate_ids_and_prefixes_are_accepted(drover: Drover, service: FakeOrchestrator) -> None:
    long_ago = {"create_time": Timestamp(seconds=1), "end_time": Timestamp(seconds=9)}
    one, two, other = "3f2a1b0c4" + "0" * 23, "3f2a1b0c5" + "0" * 23, "99" + "1" * 30
    late = types.AttemptReport(attempt=1, outcome="ABORTED", reason="LATE_SWITCHOVER_ACK", devices=["flows"])
    service.migrations = {
        one: migration(one, attempts=[late], attempt=2),
        two: migration(two, "FAILED", failure="NO_CAPACITY", **long_ago),
        other: migration(other, "PRECOPY", guest="db", create_time=Timestamp(seconds=1 << 31)),
    }
    rows = drover("migration", "list").rows()
    assert rows[0] == ["MIGRATION", "GUEST", "FROM", "TO", "PHASE", "TRY", "BEGAN", "TOOK", "LAST REASON"]
    assert [row[0] for row in rows[1:]] == ["3f2a1b0c5", "3f2a1b0c4", "99111111"]
    assert rows[1][-2:] == ["4.0 s", "NO_CAPACITY"]
    assert rows[2][-1] == "LATE_SWITCHOVER_ACK (flows)"
    assert [row[0] for row in drover("migration", "list", "--last", "1").rows()[1:]] == ["99111111"]
    assert [row[0] for row in drover("migration", "list", "--guest", "db").rows()[1:]] == ["99111111"]
    assert drover("migration", "show", "9", "-o", "json").json["name"] == other
    ambiguous = drover("migration", "show", "3f2a1b0c")
    assert ambiguous.code == 2
    assert "begins the id of 2 migrations" in ambiguous.err
    assert drover("migration", "show", "77").code == 3
    assert drover("migration", "show", "7" * 32).code == 3


def test_a_list_says_what_a_migration_waits_for(drover: Drover, service: FakeOrchestrator) -> None:
    said = "1 of 1 migrations leave host-1 at a time"
    waiting = migration("a" * 32, "PENDING", waiting_for="PLACE", message=said)
    service.migrations = {waiting.name: waiting}
    assert drover("migration", "list").rows()[1][-1] == f"waits: {said}"


def test_show_and_cancel(drover: Drover, service: FakeOrchestrator) -> None:
    name = "ab" * 16
    policy = types.MigrationPolicy(max_attempts=8)
    service.migrations = {name: migration(name, "PRECOPY", policy=policy, progress=types.Progress(gate_open=True))}
    shown = drover("migration", "show", "ab").out
    assert re.search(r"^policy +max_attempts=8$", shown, re.MULTILINE)
    assert re.search(r"^gate +open$", shown, re.MULTILINE)
    assert drover("migration", "cancel", "ab").out == f"migration {name} of web-2 is cancelled: it stays on host-1\n"


def copied(percent: int) -> types.Progress:
    disk = types.DiskProgress(
        name="root", way="full", copied_bytes=percent << 20, remaining_bytes=(100 - percent) << 20
    )
    disk.ready = percent == 100
    return types.Progress(total_bytes=1 << 30, remaining_bytes=1 << 30, disks=[disk])


def test_the_disks_of_a_migration_are_shown_on_their_way(drover: Drover, service: FakeOrchestrator) -> None:
    name = "ab" * 16
    service.migrations = {name: migration(name, "PRECOPY", progress=copied(40))}
    shown = drover("migration", "show", "ab").out
    assert re.search(r"^disk root +all of it: 40.0 MiB copied, 60.0 MiB left$", shown, re.MULTILINE)
    service.migrations = {name: migration(name, "PRECOPY", progress=copied(100))}
    assert "100.0 MiB copied, 0 B left; ready, the guest's writes follow" in drover("migration", "show", "ab").out


def test_a_watch_in_lines_tells_of_disks_in_tenths(drover: Drover, service: FakeOrchestrator) -> None:
    name = "ab" * 16
    each = [migration(name, "PRECOPY", progress=copied(percent)) for percent in (1, 2, 31, 35, 39, 100)]
    service.frames = [[*each, migration(name)]]
    lines = [line.split(" ", 1)[1] for line in drover("migrate", "web-2", "--watch").out.splitlines()[:3]]
    assert lines == [
        "web-2 to host-2: PRECOPY (attempt 1): copies disk root (0 %)",
        "web-2 to host-2: PRECOPY (attempt 1): copies disk root (30 %)",
        "web-2 to host-2: PRECOPY (attempt 1)",
    ]


def test_a_cancel_that_came_too_late_is_4_with_the_commit(drover: Drover, service: FakeOrchestrator) -> None:
    name = "ab" * 16
    service.migrations = {name: migration(name, "COMMITTED")}
    service.failures["CancelMigration"] = DroverError(R.ALREADY_COMMITTED, "too late", details={"zxid": "500"})
    ran = drover("migration", "cancel", "ab")
    assert ran.code == 4
    assert "too late [ALREADY_COMMITTED] (commit zxid 0x1f4)" in ran.err


def test_a_check_shows_every_obstacle_with_what_can_be_done(service: FakeOrchestrator, drover: Drover) -> None:
    service.guests["db"].host = "host-1"
    ran = drover("guest", "check", "db")
    assert (ran.code, "it could move to" in ran.out) == (Exit.OK, True)
    service.obstacles = [types.Obstacle(reason="BLOCK_JOB_RUNNING", message="job nightly works on a disk")]
    ran = drover("guest", "check", "db")
    assert ran.code == Exit.REFUSED
    assert "it could move to" not in ran.out
    (row,) = [row for row in ran.rows() if row[0] == "its own"]
    assert row == ["its own", "BLOCK_JOB_RUNNING", "job nightly works on a disk", remedy("BLOCK_JOB_RUNNING")]
    assert drover("guest", "check", "db", "-o", "json").json["obstacles"][0]["reason"] == "BLOCK_JOB_RUNNING"
    service.obstacles = [types.Obstacle(reason="AGENT_UNREACHABLE", message="it was not asked")]
    ran = drover("guest", "check", "db")
    assert (ran.code, "it was not asked" in ran.out) == (Exit.OK, True)
    service.obstacles = [types.Obstacle(reason="OF_A_NEWER_VERSION", message="who knows")]
    assert drover("guest", "check", "db").code == Exit.REFUSED
    assert drover("guest", "check", "nobody").code == Exit.NOT_FOUND
