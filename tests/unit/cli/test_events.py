"""`drover events`: each trouble is told once, what is wrong already comes first, a webhook is tried a few times."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.cli import events as command
from orchestrator.cli.exits import Exit
from orchestrator.core.events import EventKind, Observer
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_service import FakeOrchestrator
from tests.unit.cli.ran import DROVER, ROOT, Drover


def kinds(events: list[Any]) -> list[EventKind]:
    return [event.kind for event in events]


def test_a_trouble_is_told_once_when_it_begins_and_once_when_it_is_over() -> None:
    seen = Observer()
    assert kinds(seen.hosts({"h1": False, "h2": True})) == [EventKind.HOST_SILENT]
    assert seen.hosts({"h1": False, "h2": True}) == []
    assert kinds(seen.hosts({"h1": False, "h2": False})) == [EventKind.HOST_BACK]
    assert seen.health("c", {}) == []
    assert kinds(seen.health("", {"migrations/m": "why"})) == [EventKind.NOBODY_LEADS, EventKind.QUARANTINED]
    assert seen.health("", {"migrations/m": "why"}) == []
    assert kinds(seen.health("c", {})) == [EventKind.LEADS_AGAIN]
    assert kinds(seen.guest("u", "web", "CRASHED", "h1", "")) == [EventKind.GUEST_CRASHED]
    assert seen.guest("u", "web", "CRASHED", "h1", "") == []
    assert seen.guest("u", "web", "IDLE", "h1", "") == []
    assert kinds(seen.guest("u", "web", "CRASHED", "h1", "")) == [EventKind.GUEST_CRASHED]
    assert seen.migration("m", "web", "RETRY_WAIT", "", "") == []
    assert kinds(seen.migration("m", "web", "FAILED", "ATTEMPTS_EXHAUSTED", "")) == [EventKind.MIGRATION_FAILED]
    assert seen.migration("m", "web", "FAILED", "ATTEMPTS_EXHAUSTED", "") == []
    assert kinds(seen.away("x")) == [EventKind.API_UNREACHABLE]
    assert seen.away("y") == []
    assert kinds(seen.back()) == [EventKind.API_BACK]
    assert seen.back() == []


def test_an_evacuation_says_who_cannot_leave_and_that_it_ended_so() -> None:
    seen = Observer()
    blocked = {"web": "no host has room"}
    told = seen.evacuation("e", "h1", "RUNNING", "", "", blocked)
    assert (kinds(told), told[0].message) == ([EventKind.EVACUATION_BLOCKED], "web cannot leave h1: no host has room")
    assert seen.evacuation("e", "h1", "RUNNING", "", "", blocked) == []
    assert kinds(seen.evacuation("e", "h1", "RUNNING", "", "", blocked | {"db": "x"})) == [EventKind.EVACUATION_BLOCKED]
    assert kinds(seen.evacuation("e", "h1", "FAILED", "SOME_GUESTS_REMAIN", "", {})) == [EventKind.EVACUATION_FAILED]
    assert seen.evacuation("e", "h1", "FAILED", "SOME_GUESTS_REMAIN", "", {}) == []


def test_what_is_remembered_of_jobs_that_ended_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.core.events.KEPT", 3)
    seen = Observer()
    for number in range(10):
        assert seen.migration(str(number), "web", "FAILED", "x", "")
    assert len(seen._told) == 3


def test_once_tells_what_is_wrong_now(drover: Drover, service: FakeOrchestrator) -> None:
    assert drover("events", "--once").out == ""
    service.hosts["host-2"].state = types.HOST_STATE_SILENT
    service.guests["db"].ownership = types.OWNERSHIP_PHASE_CRASHED
    ran = drover("events", "--once", "-o", "json")
    assert ran.err == ""
    told = [json.loads(line) for line in ran.out.splitlines()]
    assert [(one["kind"], one["severity"], one["subject"]) for one in told] == [
        ("HOST_SILENT", "page", "hosts/host-2"),
        ("GUEST_CRASHED", "page", "guests/db"),
    ]
    assert ran.code == Exit.FAILED
    assert drover("events", "--webhook", "gopher://x").code == Exit.USAGE


class Hook(http.server.BaseHTTPRequestHandler):
    codes: list[int]
    got: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        code = self.codes.pop(0) if self.codes else 200
        if code == 200:
            self.got.append(json.loads(body))
        self.send_response(code)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def hook() -> Iterator[tuple[str, type[Hook]]]:
    class Own(Hook):
        codes: list[int] = []  # noqa: RUF012
        got: list[dict[str, Any]] = []  # noqa: RUF012

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/", Own
    server.shutdown()
    server.server_close()


def test_a_webhook_is_tried_again_but_not_for_ever(hook: tuple[str, type[Hook]]) -> None:
    url, own = hook
    waits: list[float] = []
    own.codes[:] = [503, 429]
    assert command.posted(url, {"a": 1}, waits.append)
    assert (own.got, waits) == ([{"a": 1}], [1.0, 2.0])
    own.codes[:] = [500] * 9
    assert not command.posted(url, {"a": 2}, waits.append)
    assert len(own.codes) == 4, "five tries"
    own.codes[:] = [404, 200]
    assert not command.posted(url, {"a": 3}, waits.append)
    assert own.codes == [200], "what is wrong is not said again"
    assert not command.posted("http://127.0.0.1:9/", {}, lambda _: None)


def test_what_happens_reaches_the_webhook(
    address: str, service: FakeOrchestrator, hook: tuple[str, type[Hook]]
) -> None:
    url, own = hook
    service.hosts["host-2"].state = types.HOST_STATE_SILENT
    environment = os.environ | {"DROVER_API": address}
    command = [*DROVER, "events", "--webhook", url, "-o", "json"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            assert json.loads(running.stdout.readline())["kind"] == "HOST_SILENT"
            service.guests["db"].ownership = types.OWNERSHIP_PHASE_CRASHED
            told = json.loads(running.stdout.readline())
            assert (told["kind"], told["subject"]) == ("GUEST_CRASHED", "guests/db")
            service.hosts["host-2"].state = types.HOST_STATE_LIVE
            assert json.loads(running.stdout.readline())["kind"] == "HOST_BACK"
        finally:
            running.terminate()
    assert [one["kind"] for one in own.got[:2]] == ["HOST_SILENT", "GUEST_CRASHED"]
