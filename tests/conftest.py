"""Hooks for the whole suite. `rule` markers: see tests/rules.py and docs/rules.md.

`make test` runs the suite in two processes (pytest-xdist), for most tests wait most of their time. Only those processes
know the markers, and only the one that started them hears every outcome: they hand their markers over when they end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from agents.handover.shell import Mistakes
from tests.rules import PAGE, Proofs, rules_of

_TESTS = Path(__file__).parent
_proofs = pytest.StashKey[Proofs]()


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile("drover", deadline=None)  # a busy machine takes long over any example
    settings.load_profile("drover")
    Mistakes.strict = True  # of sessions in this process; agents of a cluster count, see `drover_invalid_transitions`
    config.stash[_proofs] = Proofs(rules_of(PAGE.read_text()))


_ORDER = ("integration/handover", "integration", "oracle", "contract", "exploration", "property", "unit")
"""Two processes take file by file from the front. Files that share a cluster stand together, so that each process
starts it once; what takes long comes first, and many short files last, so that neither waits for the other."""


def _turn(item: pytest.Item) -> int:
    path = item.path.relative_to(_TESTS).as_posix()
    return next((turn for turn, folder in enumerate(_ORDER) if path.startswith(f"{folder}/")), len(_ORDER))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)


def pytest_collection_finish(session: pytest.Session) -> None:
    proofs = session.config.stash[_proofs]
    for item in session.items:
        ids = [str(each) for mark in item.iter_markers("rule") for each in mark.args]
        if unknown := proofs.expect(item.nodeid, ids):
            raise pytest.UsageError(f"{item.nodeid} carries {', '.join(unknown)}, which {PAGE.name} does not have")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _running is not None:
        _running.note(report.nodeid, report.outcome)


_running: Proofs | None = None


def pytest_sessionstart(session: pytest.Session) -> None:
    global _running  # noqa: PLW0603 - reports come without their session
    _running = session.config.stash[_proofs]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """One of the processes that run tests has ended; one that crashed hands nothing over."""
    for test, ids in getattr(node, "workeroutput", {}).get("rules", {}).items():
        node.config.stash[_proofs].expect(test, ids)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    handed_over = getattr(session.config, "workeroutput", None)
    if handed_over is not None:
        handed_over["rules"] = session.config.stash[_proofs].marks
        return
    passed = session.exitstatus == pytest.ExitCode.OK
    if passed and _is_whole(session.config) and session.config.stash[_proofs].unproved():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    proofs = config.stash[_proofs]
    if config.option.markexpr == "rule" and not config.option.collectonly:
        terminalreporter.write_sep("=", "rules")
        terminalreporter.write_line(proofs.table())
    if _is_whole(config):
        for rule, proof in proofs.unproved():
            terminalreporter.write_line(f"rule {rule.id} is not proved: {proof.result}", red=True)


def _is_whole(config: pytest.Config) -> bool:
    """Every test that carries a rule was to run, so that none is a fault and not a choice."""
    option = config.option
    narrowed = option.keyword or option.deselect or option.collectonly or getattr(option, "lf", False)
    arguments = [(config.invocation_params.dir / argument).resolve() for argument in config.args]
    return not narrowed and option.markexpr in ("", "rule") and any(a in (_TESTS, _TESTS.parent) for a in arguments)
