"""docs/preflight.md has every reason that a check can give, and every reason comes with something to do."""

import re
from pathlib import Path

import pytest

from orchestrator.cli.placement import NO_PLACE
from orchestrator.core.errors import RefusalReason
from orchestrator.core.obstacles import REMEDIES, certain, remedy

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "preflight.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "`" in line]
TOLD = {word for row in ROWS for word in re.findall(r"`([A-Z_]{6,})`", row)}


@pytest.mark.parametrize("reason", sorted(NO_PLACE | {RefusalReason.BLOCK_JOB_RUNNING, RefusalReason.OUTCOME_UNKNOWN}))
def test_each_reason_has_its_row_and_its_remedy(reason: RefusalReason) -> None:
    assert reason.value in TOLD
    assert REMEDIES[reason]


def test_the_page_names_no_reason_that_there_is_not() -> None:
    assert {reason.value for reason in REMEDIES} >= TOLD


def test_what_is_not_known_stands_in_nobodys_way() -> None:
    unsure = {reason for reason in REMEDIES if not certain((reason, ""))}
    assert unsure == {RefusalReason.AGENT_UNREACHABLE, RefusalReason.OUTCOME_UNKNOWN}
    assert remedy("OF_A_NEWER_VERSION") == ""
