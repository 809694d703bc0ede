"""`drover`: errors and exit codes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.cli.exits import Exit, code_of
from orchestrator.core.errors import DroverError
from protos.drover.v1 import orchestrator_pb2 as pb
from tests.fakes.orchestrator_service import FakeOrchestrator
from tests.unit.cli.ran import ROOT, Drover, R


def test_every_refusal_has_an_exit_code_of_its_kind() -> None:
    usage = {R.INVALID_ARGUMENT, R.DEADLINE_REQUIRED, R.REQUEST_ID_REUSED}
    away = {R.OUTCOME_UNKNOWN, R.LEDGER_UNREACHABLE, R.AGENT_UNREACHABLE, R.API_UNREACHABLE}
    for reason in R:
        expected = (
            Exit.USAGE
            if reason in usage
            else Exit.UNREACHABLE
            if reason in away
            else {R.NOT_FOUND: Exit.NOT_FOUND, R.INTERNAL: Exit.FAILED}.get(reason, Exit.REFUSED)
        )
        assert code_of(reason) is expected, reason


def test_exit_codes_are_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert told == {int(code) for code in Exit}


def _arguments_before_commands(command: Any) -> list[str]:
    """Of a group that takes some, such as `attach GUEST disk`."""
    if not hasattr(command, "commands"):
        return []
    return [str(each.name).upper() for each in command.params if each.param_type_name == "argument"]


def test_each_command_is_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()

    def walk(command: Any, path: str) -> Iterator[str]:
        for name, child in getattr(command, "commands", {}).items():
            here = " ".join([path, name, *_arguments_before_commands(child)])
            yield from walk(child, here) if hasattr(child, "commands") else [here]

    assert [path for path in walk(main.root, "drover") if f"`{path}" not in page] == []


def test_what_is_not_there_is_3(drover: Drover) -> None:
    ran = drover("guest", "show", "nobody")
    assert (ran.code, ran.out, ran.err) == (3, "", "drover: there is no guest 'nobody' [NOT_FOUND]\n")


def test_a_refusal_in_the_present_state_is_4_and_says_what_to_do(drover: Drover, service: FakeOrchestrator) -> None:
    service.failures["CreateMigration"] = DroverError(R.GUEST_IS_MIGRATING, "web-2 is in migration 55 already")
    ran = drover("migrate", "web-2")
    assert ran.code == 4
    assert ran.err.splitlines() == [
        "drover: web-2 is in migration 55 already [GUEST_IS_MIGRATING]",
        "  `drover migration list --active` shows its migration; wait for it or cancel it",
    ]


@pytest.mark.parametrize("kind", ["host", "guest", "migration", "evacuation"])
def test_what_a_list_leaves_out_is_told_beside_it(drover: Drover, service: FakeOrchestrator, kind: str) -> None:
    service.unreadable = [pb.Unreadable(name="x-1", reason="/x-1: phase: Field required")]
    for output in ("table", "json"):
        ran = drover(kind, "list", "--output", output)
        assert (ran.code, "x-1" in ran.out) == (0, False)
        assert f"{kind} x-1 cannot be read and is not listed: /x-1: phase: Field required" in ran.err


def test_a_refusal_is_one_line_and_names_a_field_only_of_wrong_input(drover: Drover, service: FakeOrchestrator) -> None:
    service.failures["GetHost"] = DroverError(R.NOT_FOUND, "there is\n  no host", field="name")
    assert drover("host", "show", "x").err == "drover: there is no host [NOT_FOUND]\n"
    service.failures["GetHost"] = DroverError(R.INVALID_ARGUMENT, "must be a name", field="name")
    assert drover("host", "show", "x").err == "drover: name: must be a name [INVALID_ARGUMENT]\n"


def test_wrong_fields_come_one_per_line_and_are_2(drover: Drover, service: FakeOrchestrator) -> None:
    wrong = [("policy.max_attempts", "must be positive"), ("destination", "is the source")]
    service.failures["CreateMigration"] = DroverError(R.INVALID_ARGUMENT, "two are wrong", violations=wrong)
    ran = drover("migrate", "web-2")
    assert ran.code == 2
    assert ran.err.splitlines() == [
        "drover: 2 fields are wrong [INVALID_ARGUMENT]",
        "  policy.max_attempts: must be positive",
        "  destination: is the source",
    ]


def test_no_api_is_5_at_once(local: Drover) -> None:
    ran = local("host", "list")
    assert ran.code == 5
    assert "`drover up` starts one" in ran.err
    ran = local("host", "list", "--api", "127.0.0.1:1", "--timeout", "3")
    assert ran.code == 5
    assert "[API_UNREACHABLE]" in ran.err


def test_a_create_without_an_answer_is_5_and_says_how_to_repeat_it(drover: Drover, service: FakeOrchestrator) -> None:
    service.delays_s["CreateMigration"] = 3.0
    ran = drover("migrate", "web-2", "--timeout", "0.2")
    request_id = service.requests("CreateMigration")[0].request_id
    assert ran.code == 5
    assert "[OUTCOME_UNKNOWN]" in ran.err
    assert f"--request-id {request_id} is safe to repeat" in ran.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["hosts"], "no such command 'hosts'"),
        (["migrate"], "missing argument 'GUEST'"),
        (["migrate", "web-2", "--precopy-timeout", "30"], "must be a time with its unit such as 500ms"),
        (["migrate", "web-2", "--max-bandwidth", "fast"], "must be a bandwidth such as 500mbit or 2.5gbit"),
        (["migrate", "web-2", "--on-timeout", "never"], "is not one of 'abort', 'suspend'"),
        (["explain"], "name a MIGRATION, or a guest with --guest, and not both"),
        (["explain", "55", "--guest", "web-2"], "name a MIGRATION, or a guest with --guest, and not both"),
        (["chaos", "late-ack", "web-2", "flows", "--at", "never"], "is not one of 'precopy'"),
        (["guest", "run", "/nowhere.yaml"], "cannot read /nowhere.yaml: No such file or directory"),
        (["host", "list", "-o", "xml"], "is not one of 'table', 'json', 'yaml'"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_2_and_one_sentence(drover: Drover, arguments: list[str], told: str) -> None:
    ran = drover(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert told in ran.err
    assert ran.err.startswith("drover: ")


def test_help_is_0(drover: Drover) -> None:
    assert drover("--help").code == 0
    assert "Cordon HOST and move all its guests" in drover("evacuate", "--help").out
    assert drover("--version").out.startswith("drover, version ")
