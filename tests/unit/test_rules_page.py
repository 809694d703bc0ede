"""The page of rules and what is made of it: complete, honest about what differs, and red where a proof is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agents.handover.source import SourceStage, SourceState, source_step
from agents.handover.words import Do, Seen, WriteAbort
from orchestrator.core.errors import AbortReason
from orchestrator.core.ids import AttemptRef, HostRef
from tests.rules import PAGE, Proofs, Rule, rules_of

RULES = rules_of(PAGE.read_text())
DIFFERENT_ON_PURPOSE = {"R13", "R25", "R27", "R28", "R30"}
ROOT = PAGE.parents[1]


def test_every_rule_has_one_row_in_order() -> None:
    assert [rule.id for rule in RULES] == [f"R{n}" for n in range(1, 32)] + [f"H{n}" for n in range(1, 17)]


def test_what_differs_on_purpose_says_why() -> None:
    assert {rule.id for rule in RULES if rule.differs} == DIFFERENT_ON_PURPOSE
    assert all("because" in rule.ours for rule in RULES if rule.differs)


@pytest.mark.parametrize("row", ["| R1 | a | b |", "| R1 | a | b | c | d |", "| R1 |  | b | c |"])
def test_a_row_that_is_not_a_rule_is_refused(row: str) -> None:
    with pytest.raises(ValueError, match="line 3"):
        rules_of(f"| rule | when | q | o |\n|---|---|---|---|\n{row}\n")


def test_a_rule_is_proved_by_a_test_that_passed_and_none_that_failed() -> None:
    rules = [Rule(id, "when", "qemu", "ours") for id in ("R1", "R2", "R3", "R4", "R5")]
    proofs = Proofs(rules)
    assert proofs.expect("t.py::test_good", ["R1", "R2"]) == []
    assert proofs.expect("t.py::test_bad[x]", ["R2", "R9"]) == ["R9"]
    proofs.expect("t.py::test_skipped", ["R3"])
    proofs.expect("t.py::test_never_ran", ["R5"])
    for test, *phases in (
        ("t.py::test_good", "passed", "passed", "passed"),
        ("t.py::test_bad[x]", "passed", "passed", "failed"),
        ("t.py::test_skipped", "skipped", "passed"),
    ):
        for phase in phases:
            proofs.note(test, phase)
    results = {rule.id: proofs.proof(rule).result for rule in rules}
    assert results == {"R1": "passed (1)", "R2": "FAILED (1)", "R3": "NOT RUN", "R4": "NO TEST", "R5": "NO TEST"}
    assert [rule.id for rule, _ in proofs.unproved()] == ["R2", "R3", "R4", "R5"]
    table = proofs.table()
    assert all(result in table for result in results.values())
    assert "bad" in table


def _suite(tmp_path: Path, *, broken: str = "", missing: str = "") -> subprocess.CompletedProcess[str]:
    """A suite with the real hooks, a page of its own and a test for each rule of it."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "rules.md").write_text("| R1 | when | q | o |\n| R2 | when | q | o |\n")
    tests = tmp_path / "tests"
    tests.mkdir()
    for name in ("conftest.py", "rules.py"):
        (tests / name).write_text((ROOT / "tests" / name).read_text())
    lines = ["import pytest"]
    for rule in ("R1", "R2"):
        if rule != missing:
            lines += [f"@pytest.mark.rule('{rule}')", f"def test_{rule}():", f"    assert '{rule}' != '{broken}'"]
    (tests / "test_some.py").write_text("\n".join([*lines, "def test_other(): pass"]))
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\nmarkers = rule(id): a rule\n")
    return _pytest(tmp_path, "-m", "rule", "tests")


def _pytest(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, and without the plugins that have no part in it."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_run_prints_the_table(tmp_path: Path) -> None:
    run = _suite(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "QEMU 11.1.3 does" in run.stdout
    assert run.stdout.count("passed (1)") == 2


def test_a_rule_without_a_test_fails_the_run(tmp_path: Path) -> None:
    run = _suite(tmp_path, missing="R2")
    assert run.returncode == 1
    assert "rule R2 is not proved: NO TEST" in run.stdout


def test_a_rule_with_a_failing_test_is_shown_as_such(tmp_path: Path) -> None:
    run = _suite(tmp_path, broken="R1")
    assert run.returncode == 1
    assert "rule R1 is not proved: FAILED (1)" in run.stdout


def test_a_marker_without_a_rule_stops_the_run(tmp_path: Path) -> None:
    assert _suite(tmp_path).returncode == 0
    page = tmp_path / "docs" / "rules.md"
    page.write_text(page.read_text().replace("R2", "R3"))
    run = _pytest(tmp_path, "tests")
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "carries R2, which rules.md does not have" in run.stderr + run.stdout


@pytest.mark.rule("H4")
def test_before_submit_the_source_resumes_at_once_and_writes_the_abort_afterwards() -> None:
    state = SourceState(AttemptRef("g", "m", 1), HostRef("h", "1"), "i", has_devices=False)
    for event in (Seen.BEGIN, Seen.BOUND, Seen.VITALS_GOOD, Seen.ACTIVE, Seen.PARKED):
        state, _ = source_step(state, event)
    assert state.stage is SourceStage.LAST_PASS
    order: list[object] = []
    for event in (Seen.DEST_FAILED, Seen.SHIMS_BACK, Seen.ENGINE_OVER, Seen.ABORT_RECORDED):
        state, commands = source_step(state, event)
        order += [each for each in commands if isinstance(each, Do | WriteAbort)]
    assert order == [Do.ROLL_BACK_SHIMS, Do.ABORT_ENGINE, WriteAbort(AbortReason.DESTINATION_LOST)]
    assert state.stage is SourceStage.ENDED_ABORTED
