"""docs/api.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import grpc

from orchestrator.core.agent import RunState, Trouble
from orchestrator.core.death import Fate
from orchestrator.core.errors import RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.core.records import DeathPhase, MigrationPhase, WaitingFor
from orchestrator.rpc.errors import code_of

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()


def rows(heading: str) -> list[list[str]]:
    section = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_reason_has_the_code_of_the_table() -> None:
    listed = {reason: code for code, reasons in rows("Errors") for reason in reasons.split(", ")}
    for reason in RefusalReason:
        expected = listed.get(reason, grpc.StatusCode.FAILED_PRECONDITION.name)
        assert code_of(reason).name == expected, reason
    assert set(listed) <= set(RefusalReason)


def test_words_in_capitals_are_words_of_the_code() -> None:
    text = PAGE.split("## Answers that need exactness", 1)[1].split("## Errors", 1)[0]
    known = {*RefusalReason, *MigrationPhase, *WaitingFor, *Trouble, *RunState.__members__}
    known |= {"APPLIED", "QUEUED", "RECORDED", *Ownership, *Fate, *DeathPhase}
    assert set(re.findall(r"\b[A-Z][A-Z_]{3,}\b", text)) <= known
