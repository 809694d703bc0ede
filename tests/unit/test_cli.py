"""`drover` against a real gRPC server with a service in memory: what is asked, what is printed, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf.timestamp_pb2 import Timestamp

from deploy.lab.cluster import commands, parts, qemu_versions
from deploy.lab.cluster.commands import ClusterStatus, PartStatus
from deploy.lab.cluster.config import LocalConfig
from deploy.lab.devices.scenario_text import parse_scenario
from orchestrator import wire
from orchestrator.cli import guest_file, main, units
from orchestrator.cli.exits import Exit, code_of
from orchestrator.core.agent import AgentStatus, CopyStatus, GuestTrouble, Trouble
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.ids import HostRef
from orchestrator.core.obstacles import remedy
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_service import FakeOrchestrator, host, serve

R = RefusalReason
ROOT = Path(__file__).resolve().parents[2]
DROVER = [sys.executable, "-m", "orchestrator.cli.main"]

Drover = Callable[..., "Ran"]


class Ran:
    """One call of `drover`."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def rows(self) -> list[list[str]]:
        """The table's lines, header included, as cells."""
        return [re.split(r" {2,}", line) for line in self.out.splitlines()]


@pytest.fixture
def service() -> FakeOrchestrator:
    fake = FakeOrchestrator()
    fake.hosts = {name: host(name) for name in ("host-1", "host-2", "host-10")}
    for name in ("web-2", "web-10", "db"):
        fake.guests[name] = guest(name)
    return fake


@pytest.fixture
def address(service: FakeOrchestrator, tmp_path: Path) -> Iterator[str]:
    with serve(service, f"unix:{tmp_path}/api.sock") as listening:
        yield listening


@pytest.fixture
def drover(address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Drover:
    monkeypatch.setenv("DROVER_API", address)
    return runner(capsys)


def runner(capsys: pytest.CaptureFixture[str]) -> Drover:
    def run(*arguments: str) -> Ran:
        capsys.readouterr()
        code = main.run(arguments)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


def guest(name: str, **values: Any) -> types.Guest:
    device = types.DeviceSpec(name="flows", shim=types.SHIM_KIND_COMPANION, dma="none", initial_bytes=65536)
    given: dict[str, Any] = {
        "uuid": f"uuid-{name}",
        "host": "host-1",
        "ownership": types.OWNERSHIP_PHASE_IDLE,
        "run_state": types.RUN_STATE_RUNNING,
        "want_run": True,
        "spec": types.GuestSpec(name=name, memory_mib=64, vcpus=1, machine="pc", devices=[device], labels={"a": "b"}),
        **values,
    }
    return types.Guest(name=name, **given)


def migration(name: str, phase: str = "SUCCEEDED", **values: Any) -> types.Migration:
    begin = int(time.time()) - 100
    given: dict[str, Any] = {
        "guest": "web-2",
        "guest_uuid": f"uuid-{values.get('guest', 'web-2')}",
        "source": "host-1",
        "destination": "host-2",
        "attempt": 1,
        "create_time": Timestamp(seconds=begin),
        # Stamps of different clocks: nothing that took some time may be told from them.
        "end_time": Timestamp(seconds=begin - 700_000) if phase in ("SUCCEEDED", "FAILED", "CANCELLED") else None,
        "elapsed_ms": 4_000,
        **values,
    }
    return types.Migration(name=name, phase=types.MigrationPhase.Value(f"MIGRATION_PHASE_{phase}"), **given)


def evacuation(phase: str, *guests: types.EvacuationGuest, **values: Any) -> types.Evacuation:
    begin = int(time.time()) - 10
    over = phase in ("SUCCEEDED", "FAILED", "CANCELLED")
    return types.Evacuation(
        name="e" * 32,
        host="host-1",
        phase=types.EvacuationPhase.Value(f"EVACUATION_PHASE_{phase}"),
        guests=guests,
        create_time=Timestamp(seconds=begin),
        end_time=Timestamp(seconds=begin + 700_000) if over else None,
        elapsed_ms=9_000,
        **values,
    )


def leaving(name: str, phase: str, **values: Any) -> types.EvacuationGuest:
    number = types.MigrationPhase.Value(f"MIGRATION_PHASE_{phase}")
    given: dict[str, Any] = {"destination": "host-2", "attempts": 1, "migration": f"m-{name}", **values}
    return types.EvacuationGuest(guest=name, guest_uuid=f"uuid-{name}", memory_mib=64, phase=number, **given)


# --- errors and exit codes --------------------------------------------------------------------------------------------


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


def test_each_command_is_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()

    def walk(command: Any, path: str) -> Iterator[str]:
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, f"{path} {name}") if hasattr(child, "commands") else [f"{path} {name}"]

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


# --- output -----------------------------------------------------------------------------------------------------------


def test_tables_have_natural_order_and_are_whole_on_a_pipe(drover: Drover, service: FakeOrchestrator) -> None:
    service.hosts["host-2"].cordoned = True
    service.hosts["host-2"].cordon_reason = "a reason " * 30
    rows = drover("host", "list").rows()
    assert rows[0] == ["HOST", "STATE", "GUESTS", "FREE MiB", "OF MiB", "PROMISED", "Mbit/s", "ENGINE", "CORDONED"]
    assert [row[0] for row in rows[1:]] == ["host-1", "host-2", "host-10"]
    assert rows[1][1:] == ["LIVE", "0", "7424", "8192", "0", "1000", "QEMU 10.0.3 (tcg)", "no"]
    assert rows[2][-1] == ("yes: " + "a reason " * 30).rstrip()


def test_json_and_yaml_are_one_document_with_stable_names(drover: Drover) -> None:
    ran = drover("host", "list", "-o", "json")
    assert [each["name"] for each in ran.json["hosts"]] == ["host-1", "host-2", "host-10"]
    first = ran.json["hosts"][0]
    assert (first["state"], first["memory_mib"], first["cordoned"]) == ("LIVE", 8192, False)
    assert yaml.safe_load(drover("host", "list", "-o", "yaml").out) == ran.json
    shown = drover("host", "show", "host-1", "--output", "json").json
    agent = shown.pop("agent")
    assert (shown, agent["answered"], agent["copies"]) == (first, True, [])


def test_an_empty_list_says_so_beside_the_result(drover: Drover, service: FakeOrchestrator) -> None:
    service.guests.clear()
    ran = drover("guest", "list", "--host", "host-2")
    assert (ran.code, ran.out, ran.err) == (0, "", "there are no guests on host-2\n")
    assert drover("guest", "list", "-o", "json").json == {"guests": []}


def test_global_options_stand_before_or_behind_the_command(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROVER_API", "127.0.0.1:1")
    drover = runner(capsys)
    assert drover("--api", address, "host", "list").code == 0
    assert drover("--api", "127.0.0.1:2", "host", "list", "--api", address).code == 0


# --- hosts and guests -------------------------------------------------------------------------------------------------


def test_declaring_a_host_dead_takes_two_steps(drover: Drover, service: FakeOrchestrator) -> None:
    assert "HOST_ALIVE" in drover("host", "declare-dead", "host-1").err
    service.hosts["host-1"].state = types.HOST_STATE_SILENT
    fate = types.GuestFate(guest="web-2", guest_uuid="u", fate="LOST", message="its policy says leave")
    service.deaths["host-1"] = types.HostDeath(host="host-1", guests=[fate], lost=130, fencer="ipmi")
    plan = drover("host", "declare-dead", "host-1")
    assert plan.code == Exit.OK
    assert "web-2  LOST     its policy says leave" in plan.out
    assert "... and 129 more" in plan.out
    assert "130 lost" in plan.out
    assert "fencer ipmi would cut its power: drover host declare-dead host-1 --confirm token-host-1" in plan.out
    assert service.hosts["host-1"].state == types.HOST_STATE_SILENT
    stale = drover("host", "declare-dead", "host-1", "--confirm", "token-host-9")
    assert (stale.code, "CONFIRMATION_STALE" in stale.err) == (Exit.REFUSED, True)
    done = drover("host", "declare-dead", "host-1", "--confirm", "token-host-1")
    assert (done.code, done.out) == (Exit.OK, "host-1 DONE: host-1 is dead\n")
    assert "@" in service.requests("DeclareHostDead")[-1].requested_by


def test_ones_word_needs_a_look_first(drover: Drover, service: FakeOrchestrator) -> None:
    service.hosts["host-1"].state = types.HOST_STATE_SILENT
    without = drover("host", "declare-dead", "host-1", "--i-am-sure")
    assert (without.code, service.requests("DeclareHostDead")) == (Exit.USAGE, [])
    assert "no fencer is configured" in drover("host", "declare-dead", "host-1").out
    refused = drover("host", "declare-dead", "host-1", "--confirm", "token-host-1")
    assert (refused.code, "FENCER_REQUIRED" in refused.err) == (Exit.REFUSED, True)
    done = drover("host", "declare-dead", "host-1", "--confirm", "token-host-1", "--i-am-sure", "-o", "json")
    assert (done.code, done.json["on_operators_word"], done.json["phase"]) == (Exit.OK, True, "DONE")


def test_repair_explains_and_does_only_what_it_was_told(drover: Drover, service: FakeOrchestrator) -> None:
    quiet = drover("repair", "db")
    assert "the ledger says IDLE, owner host-1" in quiet.out
    assert "nothing safe can be done, because nothing is wrong with it" in quiet.out
    service.offers["db"] = [pb.RepairOffer(action="abort", message="end attempt 2")]
    assert "--action abort: end attempt 2" in drover("repair", "db").out
    assert drover("repair", "db", "--action", "abort").out.startswith("abort: done; now")
    refused = drover("repair", "db", "--action", "bury")
    assert (refused.code, "NOTHING_SAFE" in refused.err) == (Exit.REFUSED, True)
    assert service.requests("RepairGuest")[-1].action == "bury"


def test_health_is_0_only_if_a_coordinator_leads_and_nothing_is_quarantined(
    drover: Drover, service: FakeOrchestrator
) -> None:
    ran = drover("health")
    assert (ran.code, ran.out) == (0, "coordinator leads\n")
    service.health.leader = ""
    ran = drover("health")
    assert ran.code == 1
    assert "no coordinator leads" in ran.out
    service.health.leader = "coordinator"
    since = wire.timestamp(time.time() - 7_205)  # far from the next unit: the call takes some seconds on a busy machine
    service.health.quarantined.add(resource="migrations/m1", reason="WorkerLost: three in a row", since=since)
    ran = drover("health")
    assert ran.code == 1
    what, since_when, why = ran.rows()[2]
    assert (what, why) == ("migrations/m1", "WorkerLost: three in a row")
    assert since_when.startswith("2 h")
    ran = drover("health", "-o", "json")
    assert (ran.code, ran.json["quarantined"][0]["resource"]) == (1, "migrations/m1")


async def test_the_coordinator_is_not_ok_while_anything_is_quarantined(address: str, service: FakeOrchestrator) -> None:
    """The part of its health in `drover status` that the API knows."""
    probe = parts._carries_all(address)
    assert await probe() is None
    service.health.quarantined.add(resource="evacuations/e1", reason="BadRecord: LEVITATING")
    service.health.quarantined_left_out = 2
    assert await probe() == "3 quarantined (`drover health`), evacuations/e1: BadRecord: LEVITATING"
    service.failures["GetClusterHealth"] = DroverError(RefusalReason.INTERNAL, "the list cannot be read")
    assert "the list cannot be read" in (await probe() or "")
    service.failures["GetClusterHealth"] = DroverError(RefusalReason.LEDGER_UNREACHABLE, "ZooKeeper is away")
    assert await probe() is None  # that is the API's and ZooKeeper's line


def test_removing_a_host(drover: Drover, service: FakeOrchestrator) -> None:
    assert "HOST_ALIVE" in drover("host", "remove", "host-10").err
    service.hosts["host-10"].state = types.HOST_STATE_DEAD
    assert drover("host", "remove", "host-10").out.startswith("host-10 is forgotten")
    assert "host-10" not in service.hosts


def test_cordon_and_uncordon(drover: Drover, service: FakeOrchestrator) -> None:
    assert drover("host", "cordon", "host-1", "--reason", "disks").out.startswith("host-1 is cordoned")
    assert service.hosts["host-1"].cordon_reason == "disks"
    assert "yes: disks" in drover("host", "show", "host-1").out
    assert drover("host", "uncordon", "host-1").out == "host-1 takes guests again\n"


def test_a_host_is_shown_with_what_its_agent_has(drover: Drover, service: FakeOrchestrator) -> None:
    db = service.guests["db"].uuid
    service.agents["host-2"] = AgentStatus(
        HostRef("host-2", "boot-host-2"),
        0,
        copies=(
            CopyStatus(db, "db", "i", 64, 4711, 4712, incoming=True),
            CopyStatus("u-lost", "lost", "i", 128, 4713),
            CopyStatus(db, "db", "j", 0, 0),
        ),
        troubles=(GuestTrouble("u-lost", "lost", Trouble.NO_RECORD, "the ledger has lost its record"),),
    )
    shown = drover("host", "show", "host-2").out
    assert "copies of guests on host-2, not everything: its agent does not know all of it yet" in shown
    assert re.search(r"db +64 +4711 +4712 +incoming; owned by host-1", shown)
    assert re.search(r"db +0 +ended +- +owned by host-1", shown)
    assert re.search(r"lost +128 +4713 +- +the ledger knows no such guest", shown)
    assert "not kept: lost NO_RECORD: the ledger has lost its record" in shown
    service.agents["host-2"] = DroverError(R.AGENT_UNREACHABLE, "no answer")
    said = drover("host", "show", "host-2")
    assert "its agent is silent (no answer): what is on host-2 is not known" in said.out
    assert (said.code, "copies of guests" in said.out) == (Exit.OK, False)


OBEYED = "\x1b[2J\x1b]0;owned\x07host-1 is safe\x9b31m\u202e"


def test_no_text_that_somebody_else_wrote_is_obeyed_by_the_terminal(drover: Drover, service: FakeOrchestrator) -> None:
    """A reason, a message, a refusal: with escape sequences it could clear the screen and say what it liked."""
    drover("host", "cordon", "host-2", "--reason", OBEYED)
    name = "5" * 32
    service.migrations = {name: migration(name, "FAILED", failure="NO_CAPACITY", message=OBEYED)}
    service.frames = [[migration(name, "PRECOPY", message=OBEYED), migration(name, "FAILED", message=OBEYED)]]
    service.agents["host-2"] = DroverError(R.AGENT_UNREACHABLE, OBEYED)
    for words in (
        ("host", "list"),
        ("host", "show", "host-2"),
        ("migration", "show", name),
        ("explain", name),
        ("migrate", "web-2", "--watch"),
        ("guest", "show", OBEYED),
    ):
        ran = drover(*words)
        said = ran.out + ran.err
        assert "host-1 is safe" in said, words
        assert not set(said) & set("\x1b\x07\x9b\u202e"), words


def test_guest_list_and_show(drover: Drover, service: FakeOrchestrator) -> None:
    service.guests["db"].migration = "01234567" * 4
    rows = drover("guest", "list").rows()
    assert rows[0] == ["GUEST", "HOST", "STATE", "MiB", "vCPUS", "DEVICES", "MIGRATION", "LABELS"]
    assert [row[0] for row in rows[1:]] == ["db", "web-2", "web-10"]
    assert rows[1] == ["db", "host-1", "RUNNING", "64", "1", "flows", "01234567", "a=b"]
    shown = drover("guest", "show", "db").out
    assert re.search(r"^uuid +uuid-db$", shown, re.MULTILINE)
    assert re.search(r"^flows +companion +none +64.0 KiB", shown, re.MULTILINE)


def test_guest_run_makes_each_guest_of_the_files(drover: Drover, service: FakeOrchestrator, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("guests: [{name: a, count: 2, memory: 128MiB}, {name: b}]")
    ran = drover("guest", "run", str(tmp_path / "a.yaml"), "--host", "host-2")
    assert ran.code == 0, ran.err
    assert [row[:4] for row in ran.rows()[1:]] == [
        ["a-1", "host-2", "RUNNING", "128"],
        ["a-2", "host-2", "RUNNING", "128"],
        ["b", "host-2", "RUNNING", "64"],
    ]
    requests = service.requests("CreateGuest")
    assert len({request.request_id for request in requests}) == 3


def test_guest_create_takes_the_files_as_options(drover: Drover, service: FakeOrchestrator, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a")
    (tmp_path / "b.yaml").write_text("name: b")
    ran = drover("guest", "create", "-f", str(tmp_path / "a.yaml"), "--file", str(tmp_path / "b.yaml"))
    assert ran.code == 0, ran.err
    assert {request.spec.name for request in service.requests("CreateGuest")} == {"a", "b"}


def test_guest_show_tells_the_hardware(drover: Drover, service: FakeOrchestrator) -> None:
    text = """
name: shop
boot: {firmware: uefi}
cpu: {model: Nehalem}
disks: [{name: root, pool: fast, size: 2GiB}, {name: iso, pool: shared, image: a.iso, format: raw, read_only: true}]
nics: [{name: eth0, network: prod}]
tpm: {version: 2.0}
cloud_init: {user_data: "#cloud-config"}
"""
    (spec,) = guest_file.load([("a.yaml", text)])
    service.guests["db"].spec.CopyFrom(wire.guest_spec_to_proto(spec))
    shown = drover("guest", "show", "db").out
    for said in (
        r"cpu +Nehalem",
        r"firmware +uefi",
        r"disk root +fast/shop-root.qcow2, qcow2, 2.0 GiB",
        r"disk iso +shared/a.iso, raw, read-only",
        r"card eth0 +prod",
        r"tpm +2.0",
        r"cloud-init +yes",
    ):
        assert re.search(said, shown), said


def test_guest_run_with_a_wrong_file_runs_nothing(drover: Drover, service: FakeOrchestrator, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("name: good")
    (tmp_path / "bad.yaml").write_text("name: bad\nvcpu: 2\nmemory: 3")
    ran = drover("guest", "run", str(tmp_path / "good.yaml"), str(tmp_path / "bad.yaml"))
    assert ran.code == 2
    assert ran.err.splitlines() == [
        "drover: 1 problem in the guest files, nothing was run",
        f"  {tmp_path}/bad.yaml:2: vcpu: there is no such key; did you mean vcpus?",
    ]
    assert service.requests("CreateGuest") == []


def test_guest_run_goes_on_when_one_guest_is_refused(drover: Drover, service: FakeOrchestrator, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("guests: [{name: db}, {name: new}]")
    ran = drover("guest", "run", str(tmp_path / "a.yaml"))
    assert ran.code == 4
    assert "drover: db: there is a guest 'db' already [ALREADY_EXISTS]" in ran.err
    assert "new" in service.guests
    assert [row[0] for row in ran.rows()] == ["GUEST", "new"]


def test_guest_run_can_only_check(drover: Drover, service: FakeOrchestrator, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: new")
    ran = drover("guest", "run", str(tmp_path / "a.yaml"), "--validate-only")
    assert ran.out == "new could run on host-1\n"
    assert "new" not in service.guests


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ("APPLIED", "db is paused"),
        ("QUEUED", "db is to be paused; it is in a switchover, and the wish takes effect before it runs again"),
        ("RECORDED", "db is to be paused; its agent cannot be reached, and follows when it is back"),
    ],
)
def test_pause_says_how_far_the_wish_got(drover: Drover, service: FakeOrchestrator, wish: str, told: str) -> None:
    service.wish = pb.WishState.Value(f"WISH_STATE_{wish}")
    assert drover("guest", "pause", "db").out == f"{told}\n"
    assert drover("guest", "pause", "db", "-o", "json").json["wish"] == wish


def test_resume_and_stop(drover: Drover, service: FakeOrchestrator) -> None:
    assert drover("guest", "resume", "db").out == "db is running\n"
    assert drover("guest", "stop", "db").out == "db has ended\n"
    assert "db" not in service.guests


def test_chaos(drover: Drover, service: FakeOrchestrator) -> None:
    ran = drover("chaos", "late-ack", "db", "flows", "--at", "freeze", "--times", "3", "--bytes", "4KiB")
    assert ran.out == "flows was told: asks: [{at: freeze, times: 3, bytes: 4096}]\n"
    (asked,) = service.requests("InstructDevice")
    (ask,) = parse_scenario(asked.instruction).asks
    assert (ask.at, ask.times, ask.bytes) == ("freeze", 3, 4096)
    service.instructions = False
    ran = drover("chaos", "late-ack", "db", "flows", "--at", "freeze")
    assert ran.code == 4
    assert "`instructions` in the configuration of API and agents" in ran.err


def test_a_device_is_instructed_in_its_programs_own_words(drover: Drover, service: FakeOrchestrator) -> None:
    assert drover("guest", "instruct", "db", "flows", "add 3").out == "flows was told: add 3\n"
    told = drover("guest", "instruct", "db", "flows", "add 3", "-o", "json").json
    assert told == {"guest": "db", "device": "flows", "answer": "flows was told: add 3"}
    assert drover("guest", "instruct", "db", "disk", "add 3").code == 3


# --- migrations -------------------------------------------------------------------------------------------------------


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


def test_show_and_cancel(drover: Drover, service: FakeOrchestrator) -> None:
    name = "ab" * 16
    policy = types.MigrationPolicy(max_attempts=8)
    service.migrations = {name: migration(name, "PRECOPY", policy=policy, progress=types.Progress(gate_open=True))}
    shown = drover("migration", "show", "ab").out
    assert re.search(r"^policy +max_attempts=8$", shown, re.MULTILINE)
    assert re.search(r"^gate +open$", shown, re.MULTILINE)
    assert drover("migration", "cancel", "ab").out == f"migration {name} of web-2 is cancelled: it stays on host-1\n"


def test_a_cancel_that_came_too_late_is_4_with_the_commit(drover: Drover, service: FakeOrchestrator) -> None:
    name = "ab" * 16
    service.migrations = {name: migration(name, "COMMITTED")}
    service.failures["CancelMigration"] = DroverError(R.ALREADY_COMMITTED, "too late", details={"zxid": "500"})
    ran = drover("migration", "cancel", "ab")
    assert ran.code == 4
    assert "too late [ALREADY_COMMITTED] (commit zxid 0x1f4)" in ran.err


# --- evacuations ------------------------------------------------------------------------------------------------------


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


# --- interruption, pipes, completion: real processes ------------------------------------------------------------------


def process(address: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DROVER, *arguments],
        cwd=ROOT,
        env={**os.environ, "DROVER_API": address, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_leaves_the_evacuation_running_and_says_how_to_cancel_it(
    address: str, service: FakeOrchestrator
) -> None:
    service.frames = [[evacuation("RUNNING", leaving("web", "PRECOPY")), 60.0]]
    watch = process(address, "evacuate", "host-1", "--watch")
    assert watch.stdout
    assert watch.stdout.readline().endswith("web to host-2: PRECOPY (attempt 1)\n")
    watch.send_signal(signal.SIGINT)
    _, err = watch.communicate(timeout=20)
    name = "e" * 32
    assert watch.returncode == 130
    assert err == (
        f"the evacuation goes on; `drover evacuation cancel {name}` cancels it, "
        f"`drover evacuation watch {name}` looks again\n"
    )
    assert service.requests("CancelEvacuation") == []


def test_a_closed_pipe_is_no_complaint(address: str, service: FakeOrchestrator) -> None:
    for number in range(3000):
        service.guests[f"many-{number}"] = guest(f"many-{number}")
    # Without a buffer Python itself would leave the rest unwritten, without an error.
    listing = process(address, "guest", "list", "-o", "json", PYTHONUNBUFFERED="")
    assert listing.stdout
    assert listing.stdout.readline() == "{\n"
    listing.stdout.close()
    assert listing.stderr
    assert listing.stderr.read() == ""
    listing.stderr.close()
    assert listing.wait(20) == Exit.FAILED


def test_shell_completion(address: str) -> None:
    def complete(words: str) -> list[str]:
        count = str(len(words.split(" ")) - 1)
        shell = process(address, _DROVER_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=count)
        out, _ = shell.communicate(timeout=20)
        return [line.partition(",")[2] for line in out.splitlines()]

    assert complete("drover evac") == ["evacuate", "evacuation"]
    assert complete("drover guest show web") == ["web-2", "web-10"]
    assert complete("drover evacuate host-1") == ["host-1", "host-10"]


def test_the_command_line_starts_without_what_it_does_not_need() -> None:
    """Measured as modules, not as time, which depends on the machine."""
    program = (
        "import sys; from orchestrator.cli import main; code = main.run(['--help']); "
        "print(sorted(set(sys.modules) & {'grpc', 'google.protobuf', 'pydantic', 'rich', 'yaml', 'asyncio'}))"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


# --- the local cluster ------------------------------------------------------------------------------------------------


@pytest.fixture
def local(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Drover:
    monkeypatch.setenv("DROVER_DIR", str(tmp_path))
    monkeypatch.delenv("DROVER_API", raising=False)
    return runner(capsys)


def test_status_of_nothing_is_5(local: Drover, tmp_path: Path) -> None:
    ran = local("status")
    assert (ran.code, ran.out) == (5, f"cluster in {tmp_path}: not running\n")
    assert local("status", "-o", "json").json["running"] is False


@pytest.mark.parametrize(("health", "code"), [("ok", 0), ("does not answer", 1)])
def test_status_shows_each_part(
    local: Drover, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, health: str, code: int
) -> None:
    part = PartStatus("agent-host-1", "agent", "host-1", 4711, time.time() - 90, 2, "running", health)
    cluster = ClusterStatus(tmp_path, True, "ready", (part,), ("no namespaces: no bandwidth limit",), 7.5)
    monkeypatch.setattr(commands, "status", lambda _: cluster)
    ran = local("status")
    assert ran.code == code
    assert ran.out.splitlines()[:2] == [
        f"cluster in {tmp_path}: ready, ready after 7.5 s",
        "no namespaces: no bandwidth limit",
    ]
    assert (
        ran.rows()[3] == ["agent-host-1", "running", "4711", "1 min 30 s", "2", health] or ran.rows()[3][-1] == health
    )
    document = local("status", "-o", "json").json
    assert (document["healthy"], document["parts"][0]["pid"]) == (code == 0, 4711)


def test_up_passes_the_options_on(local: Drover, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[LocalConfig, bool]] = []

    def up(config: LocalConfig, *, foreground: bool) -> None:
        seen.append((config, foreground))

    monkeypatch.setattr(commands, "up", up)
    options = ["--hosts", "3", "--bandwidth", "100mbit", "--no-shape", "--memory", "2GiB", "--chaos", "--foreground"]
    assert local("up", *options, "--max-concurrent", "5", "--qemu", "bin/qemu").code == 0
    assert local("up").code == 0
    (given, foreground), (default, _) = seen
    assert foreground
    assert given.model_dump(exclude_defaults=True) == {
        "hosts": 3,
        "bandwidth": "100mbit",
        "shape": False,
        "memory_mib": 2048,
        "chaos": True,
        "max_concurrent_migrations": 5,
        "qemu": str(Path("bin/qemu").resolve()),
    }
    assert given.dir == tmp_path
    assert default == LocalConfig(dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--hosts", "99"], "hosts: "),
        (["--bandwidth", "fast"], "not a bandwidth: 'fast'"),
        (["--qemu", "11.1"], "there is no QEMU 11.1 here; found: 10.0.2 (/x/qemu-system-x86_64)"),
    ],
)
def test_up_with_wrong_options_is_2(
    local: Drover, monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    monkeypatch.setattr(qemu_versions, "find", lambda: {"/x/qemu-system-x86_64": "10.0.2"})
    ran = local("up", *options)
    assert ran.code == 2
    assert told in ran.err


def test_qemu_is_found_by_its_version(local: Drover, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, version in (("qemu-system-x86_64", "10.0.2 (Debian)"), ("qemu-system-x86_64-11.1", "11.1.3")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho 'QEMU emulator version {version}'\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "qemu-system-x86_64-microvm").write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = qemu_versions.find()
    assert list(found.values())[:2] == ["10.0.2", "11.1.3"]
    seen: list[LocalConfig] = []

    def up(config: LocalConfig, *, foreground: bool) -> None:
        seen.append(config)

    monkeypatch.setattr(commands, "up", up)
    assert local("up", "--qemu", "11.1").code == 0
    assert seen[0].qemu == str(tmp_path / "qemu-system-x86_64-11.1")
    assert local("up", "--qemu", "11.10").code == 2


def test_down_says_what_is_left(local: Drover, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = local("down", "--dir", str(tmp_path / "none"))
    assert (ran.code, ran.err) == (0, f"no cluster ran in {tmp_path / 'none'}, nothing of it is left\n")
    monkeypatch.setattr(commands, "down", lambda _, keep: ["process 7: qemu", f"kept {keep}"])
    ran = local("down", "--keep", "serial")
    assert ran.code == 1
    assert ran.err.splitlines()[:3] == [
        "drover: not everything could be removed",
        "  process 7: qemu",
        "  kept ('serial',)",
    ]


def test_down_names_no_files_of_a_directory_that_is_not_a_cluster(local: Drover, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    ran = local("down")
    assert (ran.code, ran.err) == (0, f"no cluster ran in {tmp_path}, nothing of it is left\n")
    assert (tmp_path / "mine.txt").exists()


def test_power_needs_a_cluster_and_a_host_of_it(local: Drover, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert local("host", "power-cycle", "host-1").code == 5
    part = PartStatus("agent-host-1", "agent", "host-1", 1, None, 0, "running", "ok")
    monkeypatch.setattr(commands, "status", lambda _: ClusterStatus(tmp_path, True, "ready", (part,)))
    ran = local("host", "power-cycle", "host-7")
    assert ran.code == 3
    assert "the local cluster has no host 'host-7'; there are host-1" in ran.err
    monkeypatch.setattr(commands, "power_cycle", lambda _, host, *, off: not off)
    assert local("host", "power-cycle", "host-1").out == "host-1 has booted and its agent serves\n"
    assert local("host", "power-cycle", "host-1", "--off", "-o", "json").json == {
        "host": "host-1",
        "powered": False,
        "serving": False,
    }
    monkeypatch.setattr(commands, "power_on", lambda _, host: False)
    assert local("host", "power-on", "host-1").code == 1


# --- units ------------------------------------------------------------------------------------------------------------


def test_units() -> None:
    assert [units.size(n) for n in (0, 512, 65536, 67_000_000, 3 << 30)] == [
        *("0 B", "512 B", "64.0 KiB", "63.9 MiB", "3.0 GiB")
    ]
    assert [units.milliseconds(n) for n in (0, 6.25, 99.96, 840.4, 12_345)] == [
        *("0.0 ms", "6.2 ms", "100.0 ms", "840 ms", "12 s")
    ]
    assert [units.seconds(n) for n in (-1, 4.21, 41.4, 200, 7500)] == [
        *("0.0 s", "4.2 s", "41 s", "3 min 20 s", "2 h 5 min")
    ]
    assert [units.rate(n) for n in (0, 2.25, 940.2)] == ["0 Mbit/s", "2.2 Mbit/s", "940 Mbit/s"]
    long = [f"abcdefgh{number}{'0' * 23}" for number in (1, 2)]
    assert units.abbreviate(long) == {long[0]: "abcdefgh1", long[1]: "abcdefgh2"}
    assert units.abbreviate(["host-1-49d755bc", "host-1-49d755bd"])["host-1-49d755bc"] == "host-1-49d755bc"
    assert units.abbreviate(["a" * 32, "b" * 32, "a" * 32]) == {"a" * 32: "a" * 8, "b" * 32: "b" * 8}
    assert sorted(["host-10", "host-2", "db"], key=units.natural) == ["db", "host-2", "host-10"]
    assert [units.parse_ms(text) for text in ("500ms", "1.5s", "2m", "1h")] == [500, 1500, 120_000, 3_600_000]
    assert [units.parse_mbps(text) for text in ("0", "500mbit", "2.5gbit")] == [0, 500, 2500]


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
