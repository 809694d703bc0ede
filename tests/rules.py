"""The rules of docs/rules.md against the tests that carry their markers: which test proves which rule, and did it pass.

`pytest -m rule` prints the table. Wherever the whole suite runs (with that marker expression or without one), a rule
that no passing test carries, or that a failing test carries, fails the run.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

PAGE = Path(__file__).parents[1] / "docs" / "rules.md"
_COLUMNS = 4
_DIFFERS = "≠"
_WIDTH = 160
_SHOWN = 4


@dataclass(frozen=True)
class Rule:
    """One row of the page."""

    id: str
    when: str
    qemu: str
    ours: str

    @property
    def differs(self) -> bool:
        """Drover's way is another than QEMU's on purpose, and the row says why."""
        return self.ours.startswith(_DIFFERS)


def rules_of(page: str) -> list[Rule]:
    """The rows of all tables on the page, in its order. Raises ValueError for a row with too many or too few cells."""
    found: list[Rule] = []
    for number, line in enumerate(page.splitlines(), 1):
        if not line.startswith("|") or set(line) <= set("|-: "):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != _COLUMNS or not all(cells):
            raise ValueError(f"line {number} of the page has not {_COLUMNS} filled cells: {line}")
        if cells[0] != "rule":
            found.append(Rule(*cells))
    return found


@dataclass
class Proof:
    """The tests of one rule, by outcome."""

    passed: list[str] = field(default_factory=list[str])
    failed: list[str] = field(default_factory=list[str])
    skipped: list[str] = field(default_factory=list[str])

    @property
    def holds(self) -> bool:
        """Some test ran, and none failed."""
        return bool(self.passed) and not self.failed

    @property
    def result(self) -> str:
        if self.failed:
            return f"FAILED ({len(self.failed)})"
        if not self.passed:
            return "NOT RUN" if self.skipped else "NO TEST"
        return f"passed ({len(self.passed)})" + (f", {len(self.skipped)} skipped" if self.skipped else "")


class Proofs:
    """What a run of tests says about the rules. Tests are named by their node id."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = rules
        self.marks: dict[str, tuple[str, ...]] = {}
        """The rules that each test carries."""
        self._outcomes: dict[str, str] = {}

    def expect(self, test: str, ids: Iterable[str]) -> list[str]:
        """Note which rules a test carries; returns those that no row of the page has."""
        self.marks[test] = tuple(ids)
        known = {rule.id for rule in self.rules}
        return [each for each in self.marks[test] if each not in known]

    def note(self, test: str, outcome: str) -> None:
        """One phase of a test ended; the worst of them counts. Setting a test up proves nothing."""
        order = ("passed", "skipped", "failed")
        if order.index(outcome) >= order.index(self._outcomes.get(test, "passed")):
            self._outcomes[test] = outcome

    def proof(self, rule: Rule) -> Proof:
        found = Proof()
        for test, ids in self.marks.items():
            if rule.id in ids and test in self._outcomes:
                getattr(found, self._outcomes[test]).append(test)
        return found

    def unproved(self) -> list[tuple[Rule, Proof]]:
        return [(rule, proof) for rule in self.rules if not (proof := self.proof(rule)).holds]

    def table(self, width: int = _WIDTH) -> str:
        """For people: one row per rule."""
        table = Table(show_lines=True, expand=True, pad_edge=False)
        for title, ratio in (("rule", 2), ("QEMU 11.1.3 does", 16), ("ours does", 16), ("tests", 13), ("result", 5)):
            table.add_column(title, ratio=ratio, overflow="fold")
        for rule in self.rules:
            proof = self.proof(rule)
            ours = f"{rule.when}: {rule.ours}" if rule.qemu == "-" else rule.ours
            tests = "\n".join(_names([*proof.failed, *proof.passed, *proof.skipped]))
            table.add_row(rule.id, "-" if rule.qemu == "-" else f"{rule.when}: {rule.qemu}", ours, tests, proof.result)
        console = Console(file=io.StringIO(), width=width, color_system=None, markup=False)
        console.print(table)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()


def _names(tests: Iterable[str]) -> list[str]:
    """Functions without their files, as sentences; a few parameters by name, many as a count."""
    found: dict[str, list[str]] = {}
    for test in tests:
        name, _, parameter = test.rsplit("::", 1)[-1].partition("[")
        found.setdefault(name.removeprefix("test_").replace("_", " "), []).append(parameter.rstrip("]"))
    return [f"- {name}{_parameters(parameters)}" for name, parameters in found.items()]


def _parameters(parameters: list[str]) -> str:
    if not any(parameters):
        return "" if len(parameters) == 1 else f" ({len(parameters)} tests)"
    return f" [{', '.join(parameters)}]" if len(parameters) <= _SHOWN else f" ({len(parameters)} cases)"
