"""What operators do with a guest all day, on a whole cluster: an image is brought in, a guest runs on it, somebody sits
at its console while it moves, and it is stopped, kept and started again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import wire
from orchestrator.cli import main
from orchestrator.cli.exits import Exit
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.cluster import Cluster, make_config, missing, running_cluster, short_directory

pytestmark = [
    pytest.mark.integration,
    pytest.mark.zookeeper,
    pytest.mark.qemu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
]
Run = Callable[..., Any]
GUEST = """
name: sat-at
memory: 64MiB
machine: q35
cpu: {model: max}
disks:
  - {name: data, pool: shared, image: brought-in.raw, format: raw}
labels: {team: blue}
display: {vnc: true}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    directory = short_directory()
    try:
        with running_cluster(make_config(directory, hosts=2)) as cluster:
            yield cluster
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Seat:
    """At a guest's console, read by a thread of its own."""

    def __init__(self, client: OrchestratorClient, guest: str) -> None:
        self.session = client.attach_console(guest)
        self.heard = ""
        self.hosts: list[str] = []
        self.lost = 0
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for said in self.session:
            self.heard += said.data.decode("ascii", "replace")
            self.hosts += [said.host] if said.host else []
            self.lost += said.lost_bytes

    def beats(self) -> list[int]:
        """Numbers of the heartbeats that were heard whole."""
        return [int(number, 16) for number in re.findall(r"^H ([0-9a-f]+) .*\r?\n", self.heard, re.MULTILINE)]

    def verified(self) -> int:
        """How often the guest said that all of its memory is right."""
        return len(re.findall(r"^V ok", self.heard, re.MULTILINE))

    def leave(self) -> None:
        self.session.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


def command_line(name: str) -> list[str]:
    """Of the one VMM of the guest."""
    found: list[list[str]] = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = process.read_bytes().decode(errors="replace").split("\0")
            found += [words] if f"guest={name}" in words else []
    (only,) = found
    return only


def until(what: str, question: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


@pytest.fixture
def run(cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`drover ARGUMENTS` against the cluster; its result as a document."""
    monkeypatch.setenv("DROVER_API", cluster.api)

    def call(*arguments: str, ends: Exit = Exit.OK) -> Any:
        code = main.run([*arguments, "-o", "json"])
        told = capsys.readouterr()
        assert code == ends, told.err
        return json.loads(told.out.splitlines()[-1] if "--watch" in arguments else told.out or "{}") | {"err": told.err}

    return call


def test_a_day_of_a_guest(cluster: Cluster, run: Run, tmp_path: Path) -> None:
    image, content = bring_in(cluster, run, tmp_path / "disk")
    given = tmp_path / "guest.yaml"
    given.write_text(GUEST)
    uuid = create_on(image, run, given)
    with OrchestratorClient(cluster.api) as client:
        seat, beside = Seat(client, "sat-at"), Seat(client, "sat-at")
        both_are_answered(seat, beside)
        last = moves_with_its_sessions(run, seat, beside)
        stopped_and_kept(run, seat)
        edited(run, tmp_path / "edited.yaml")
        started_again(run, uuid)
        runs_as_edited(run, client, given, before=last)
        beside.leave()
        crashes_and_is_started(cluster, run, client)
        run("guest", "stop", "sat-at")
    assert image.read_bytes() == content


def bring_in(cluster: Cluster, run: Run, file: Path) -> tuple[Path, bytes]:
    """The image in its pool, and what is in it; a second one of that name is refused."""
    content = os.urandom(64 << 10) + bytes(8 << 20)
    file.write_bytes(content)
    words = ("image", "import", str(file), "--pool", "shared", "--name", "brought-in.raw")
    made = run(*words)
    assert (made["format"], made["size_bytes"]) == ("RAW", len(content))
    image = cluster.layout.shared_pool / "brought-in.raw"
    assert image.read_bytes() == content
    assert "ALREADY_EXISTS" in run(*words, ends=Exit.REFUSED)["err"]
    return image, content


def create_on(image: Path, run: Run, given: Path) -> str:
    """The guest's uuid; the image is listed as its."""
    born = run("guest", "create", "-f", str(given), "--host", "host-1")["guests"][0]
    (listed,) = [each for each in run("image", "list", "--pool", "shared")["images"] if each["name"] == image.name]
    assert listed["guests"] == ["sat-at"]
    return born["uuid"]


def both_are_answered(seat: Seat, beside: Seat) -> None:
    until("both hear it", lambda: len(seat.beats()) > 5 and len(beside.beats()) > 5)
    seat.session.type(b"v")
    until("it answers", lambda: seat.verified() == 1 and beside.verified() == 1)


def moves_with_its_sessions(run: Run, seat: Seat, beside: Seat) -> int:
    """The number of the last heartbeat heard there."""
    has_a_screen_on(run, "host-1")
    run("migrate", "sat-at", "--to", "host-2", "--watch")
    has_a_screen_on(run, "host-2")
    until("the session has gone along", lambda: seat.hosts == ["host-1", "host-2"])
    before = len(seat.beats())
    until("it is heard there", lambda: len(seat.beats()) > before + 20)
    beside.session.type(b"v")
    until("it answers there", lambda: seat.verified() == 2 and beside.verified() == 2)
    beats = seat.beats()
    assert beats == list(range(beats[0], beats[0] + len(beats))), "not a heartbeat of the migration is missing"
    return beats[-1]


def has_a_screen_on(run: Run, host: str) -> None:
    """What a viewer is greeted with, at the address that is said."""
    found = run("guest", "vnc", "sat-at")
    assert (found["host"], found["password"]) == (host, "")
    with socket.socket(socket.AF_UNIX) as viewer:
        viewer.settimeout(60)
        viewer.connect(found["socket"])
        assert viewer.recv(12) == b"RFB 003.008\n"


def stopped_and_kept(run: Run, seat: Seat) -> None:
    kept = run("guest", "stop", "sat-at", "--keep")
    assert (kept["ownership"], kept["run_state"]) == ("STOPPED", "ENDED")
    until("sessions end with what they were with", lambda: not seat.thread.is_alive())
    assert "GUEST_NOT_RUNNING" in run("guest", "pause", "sat-at", ends=Exit.REFUSED)["err"]
    assert "GUEST_NOT_RUNNING" in run("guest", "vnc", "sat-at", ends=Exit.REFUSED)["err"]


def edited(run: Run, file: Path) -> None:
    file.write_text(GUEST.replace("64MiB", "96MiB").replace("blue", "red"))
    spec = run("guest", "edit", "sat-at", "-f", str(file))["spec"]
    assert (spec["memory_mib"], spec["labels"]) == (96, {"team": "red"})


def started_again(run: Run, uuid: str) -> None:
    again = run("guest", "start", "sat-at")
    assert (again["uuid"], again["host"], again["run_state"]) == (uuid, "host-2", "RUNNING")
    assert run("guest", "start", "sat-at")["uuid"] == uuid


def runs_as_edited(run: Run, client: OrchestratorClient, given: Path, *, before: int) -> None:
    anew = Seat(client, "sat-at")
    until("it has booted anew", lambda: len(anew.beats()) > 5)
    assert anew.beats()[0] < before
    assert "GUEST_IS_RUNNING" in run("guest", "edit", "sat-at", "-f", str(given), ends=Exit.REFUSED)["err"]
    assert "-m 96" in " ".join(command_line("sat-at"))
    anew.leave()


def crashes_and_is_started(cluster: Cluster, run: Run, client: OrchestratorClient) -> None:
    (vmm,) = cluster.guests()
    os.kill(vmm.pid, 9)
    until("it has crashed", lambda: wire.word(client.get_guest("sat-at"), "ownership") == "CRASHED")
    assert run("guest", "start", "sat-at")["run_state"] == "RUNNING"
