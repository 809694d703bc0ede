"""`drover guest adopt` and `drover guest release`: what is asked, what is printed, how it ends."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cli.exits import Exit
from orchestrator.core.agent import VmmExamined
from orchestrator.core.errors import DroverError
from orchestrator.core.obstacles import remedy
from orchestrator.core.records import GuestSpec
from tests.fakes.orchestrator_service import FakeOrchestrator, host
from tests.unit.cli.ran import Drover, R, guest, migration

PID = 4242
FOUND = VmmExamined(GuestSpec("hand"), 77, True, ())
ADOPT = ("guest", "adopt", "shop", "--host", "host-1", "--pid", str(PID), "--qmp", "/run/q")


@pytest.fixture(autouse=True)
def by_hand(service: FakeOrchestrator) -> None:
    """Runs on host-1."""
    service.vmms["host-1", PID] = FOUND


def test_adopt_sends_what_was_given(drover: Drover, service: FakeOrchestrator, tmp_path: Path) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text("name: shop\nlabels: {tier: db}\n")
    ran = drover(*ADOPT, "--to", "host-2", "-f", str(file), "--request-id", "mine")
    assert (ran.code, ran.out) == (Exit.OK, "shop is adopted on host-1, and moves to host-2\n"), ran.err
    assert f"`drover migration watch {'5' * 32}` follows it" in ran.err
    (request,) = service.requests("AdoptGuest")
    assert (request.name, request.host, request.pid, request.qmp) == ("shop", "host-1", PID, "/run/q")
    assert (request.destination, request.request_id, request.validate_only) == ("host-2", "mine", False)
    assert (request.spec.name, dict(request.spec.labels)) == ("shop", {"tier": "db"})
    again = drover(*ADOPT, "--to", "host-2", "-f", str(file), "--request-id", "mine", "-o", "json")
    assert again.json["migration"]["name"] == "5" * 32
    assert (len(service.migrations), again.json["guest"]["name"]) == (1, "shop")


def test_without_a_host_it_is_this_machine(drover: Drover, service: FakeOrchestrator) -> None:
    here = socket.gethostname()
    service.hosts[here] = host(here)
    service.vmms[here, PID] = FOUND
    ran = drover("guest", "adopt", "shop", "--pid", str(PID), "--qmp", "/run/q")
    assert (ran.code, ran.out) == (Exit.OK, f"shop is adopted on {here}, and moves to another host\n")
    assert not service.requests("AdoptGuest")[0].HasField("spec")


def test_a_dry_run_tells_what_stands_against_it_and_what_helps(drover: Drover, service: FakeOrchestrator) -> None:
    ran = drover(*ADOPT, "--dry-run")
    assert (ran.code, ran.out) == (Exit.OK, f"process {PID} of host-1 could be adopted as shop\n")
    against = ((R.MONITOR_BUSY, "its second monitor is in use"), (R.POOL_NOT_FOUND, "/srv is in no pool"))
    service.vmms["host-1", PID] = replace(FOUND, obstacles=against)
    ran = drover(*ADOPT, "--validate-only")
    assert ran.code == Exit.REFUSED
    head, *rows = ran.rows()
    assert head == [f"process {PID} of host-1 cannot be adopted:"]
    assert [row[:2] for row in rows if row != [""]][1:] == [[reason.value, said] for reason, said in against]
    assert remedy(R.MONITOR_BUSY) in ran.out
    ran = drover(*ADOPT, "--dry-run", "-o", "json")
    assert ran.code == Exit.REFUSED
    assert [each["reason"] for each in ran.json["obstacles"]] == ["MONITOR_BUSY", "POOL_NOT_FOUND"]
    ran = drover(*ADOPT)
    assert (ran.code, "/srv is in no pool" in ran.err) == (Exit.REFUSED, True)
    assert "shop" not in service.guests


def test_adoption_is_followed_to_the_end_of_its_move(drover: Drover, service: FakeOrchestrator) -> None:
    name = "5" * 32
    service.frames = [[migration(name, "SUCCEEDED", guest="shop")]]
    ran = drover(*ADOPT, "--watch")
    assert (ran.code, "SUCCEEDED" in ran.out) == (Exit.OK, True), ran.err
    assert [list(request.names) for request in service.requests("WatchMigrations")] == [[name]]


def test_a_file_that_is_about_another_guest_is_refused(
    drover: Drover, service: FakeOrchestrator, tmp_path: Path
) -> None:
    file = tmp_path / "other.yaml"
    file.write_text("name: other\n")
    ran = drover(*ADOPT, "-f", str(file))
    assert (ran.code, "must describe one guest, shop" in ran.err) == (Exit.USAGE, True)
    assert drover(*ADOPT[:-1]).code == Exit.USAGE
    assert drover("guest", "adopt", "shop", "--pid", "1", "--qmp", "/run/q").code == Exit.USAGE
    assert not service.requests("AdoptGuest")


def test_what_was_adopted_is_released(drover: Drover, service: FakeOrchestrator) -> None:
    assert drover(*ADOPT).code == Exit.OK
    ran = drover("guest", "release", "shop")
    assert (ran.code, ran.out.startswith("shop is released: its QEMU runs on")) == (Exit.OK, True)
    assert "shop" not in service.guests
    service.guests["shop"] = guest("shop")
    ran = drover("guest", "release", "shop")
    assert (ran.code, "NOT_ADOPTABLE" in ran.err) == (Exit.REFUSED, True)
    del service.guests["shop"]
    assert drover(*ADOPT).code == Exit.OK
    assert drover("guest", "release", "shop", "-o", "json").json["ownership"] == "GONE"


def test_a_busy_monitor_is_said_with_what_helps(drover: Drover, service: FakeOrchestrator) -> None:
    service.vmms["host-1", PID] = DroverError(R.MONITOR_BUSY, "somebody is connected to /run/q", field="qmp")
    ran = drover(*ADOPT)
    assert (ran.code, "somebody is connected to /run/q" in ran.err) == (Exit.REFUSED, True)
