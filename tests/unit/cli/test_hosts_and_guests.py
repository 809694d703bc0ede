"""`drover host`, `drover guest` and what else is about them."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from deploy.lab.cluster import parts
from deploy.lab.devices.scenario_text import parse_scenario
from orchestrator import wire
from orchestrator.cli import guest_file
from orchestrator.cli.exits import Exit
from orchestrator.core.agent import AgentStatus, CopyStatus, GuestTrouble, Trouble
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.ids import HostRef
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_service import FakeOrchestrator
from tests.unit.cli.ran import Drover, R, migration


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


def test_where_a_screen_is(drover: Drover, service: FakeOrchestrator) -> None:
    refused = drover("guest", "vnc", "db")
    assert refused.code == Exit.REFUSED
    assert "DISPLAY_NOT_AVAILABLE" in refused.err
    service.guests["db"].spec.display.vnc = True
    told = drover("guest", "vnc", "db", "-o", "json").json
    assert (told["guest"], told["host"], told["socket"][:12]) == ("db", "host-1", "/run/host-1/")
    assert f"ssh -N -L 5900:{told['socket']} host-1" in drover("guest", "vnc", "db").out
    assert "screen" in drover("guest", "show", "db").out


# --- guests that run --------------------------------------------------------------------------------------------------


def test_a_running_guest_is_given_more(drover: Drover, service: FakeOrchestrator) -> None:
    ran = drover("guest", "attach", "db", "disk", "--name", "data", "--pool", "fast", "--size", "20GiB")
    assert ran.out == "db on host-1 has disk data (fast/db-data.qcow2)\n"
    (asked,) = service.requests("AttachToGuest")
    assert (asked.guest, asked.disk.name, asked.disk.image) == ("db", "data", "db-data.qcow2")
    assert asked.disk.size_bytes == 20 << 30
    assert drover("guest", "attach", "db", "memory", "2GiB").code != Exit.OK
    told = drover("guest", "attach", "db", "memory", "2Gib?")
    assert (told.code, "write a size such as" in told.err) == (Exit.USAGE, True)
    assert drover("guest", "attach", "db", "vcpus", "0").code == Exit.USAGE


def test_a_running_guest_is_relieved_of_something(drover: Drover, service: FakeOrchestrator) -> None:
    assert drover("guest", "attach", "db", "disk", "--name", "d", "--pool", "fast").code == Exit.OK
    assert drover("guest", "detach", "db", "disk", "d").out == "db on host-1 has no disk d any more\n"
    assert "has no disk 'd'" in drover("guest", "detach", "db", "disk", "d").err
    assert drover("guest", "detach", "db", "memory", "n").code == Exit.USAGE


def test_hosts_are_compared_while_their_agents_live(drover: Drover, service: FakeOrchestrator) -> None:
    alike = drover("host", "compare")
    assert (alike.code, alike.out) == (Exit.OK, "3 LIVE hosts agree in what guests may need\n")
    service.hosts["host-2"].accelerator = "kvm"
    differ = drover("host", "compare")
    assert differ.code == Exit.FAILED
    assert "accelerator" in differ.out
    assert "kvm: host-2" in differ.out
    document = drover("host", "compare", "-o", "json").json
    assert document["differences"][0]["found"] == {"kvm": ["host-2"], "tcg": ["host-1", "host-10"]}
    service.hosts["host-2"].state = types.HOST_STATE_SILENT
    assert "their agents are silent: host-2" in drover("host", "compare").err
    service.hosts["host-10"].state = types.HOST_STATE_DEAD
    assert drover("host", "compare").code == Exit.FAILED
