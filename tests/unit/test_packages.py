"""What Drover is installed from: the package, its units, and how guests are kept apart from their agent."""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from agents.config import FILE as AGENT
from agents.host import remaining
from agents.host.scopes import VARIABLE, scoped
from deploy.packages import deb
from orchestrator import proc
from orchestrator.api.config import FILE as API
from orchestrator.config import ConfigFile
from orchestrator.coordinator.wiring import FILE as COORDINATOR

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "deploy" / "packages" / "root"
UNITS = TREE / "usr/lib/systemd/system"
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")


@needs_systemd
@pytest.mark.parametrize(("unit", "most"), [("agent", 4.0), ("api", 2.0), ("coordinator", 2.0)])
def test_how_exposed_a_service_is(unit: str, most: float) -> None:
    file = UNITS / f"drover-{unit}.service"
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
    assert found
    assert float(found[1]) <= most


def test_guests_outlive_their_agent() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNITS / "drover-agent.service")
    service = dict(unit["Service"])
    assert service["KillMode"] == "process"
    assert service["SendSIGKILL"] == "no"
    assert service["RuntimeDirectoryPreserve"] == "yes", "markers and sockets of the guests stay"
    assert int(service["LimitNOFILE"]) >= 65536
    assert service["Environment"] == f"{VARIABLE}=drover-guests.slice"
    assert (UNITS / "drover-guests.slice").exists()


@pytest.mark.parametrize("file", [AGENT, API, COORDINATOR], ids=lambda file: file.program)
def test_the_examples_are_fit(file: ConfigFile[Any]) -> None:
    file.load(TREE / "usr/share/doc/drover/examples" / f"{file.program}.yaml")


@needs_dpkg
def test_the_same_package_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two libraries only; `make test-systemd` has all of it."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    few = [metadata.distribution(name) for name in ("click", "kazoo")]
    made = [deb.build(tmp_path / name, "1.2-3", few) for name in ("a", "b")]
    assert len({hashlib.sha256(each.read_bytes()).hexdigest() for each in made}) == 1
    names = subprocess.run(["dpkg-deb", "-c", str(made[0])], capture_output=True, text=True, check=True).stdout
    lines = names.splitlines()
    assert all(" root/root " in line for line in lines)
    assert all("2023-11-14" in line for line in lines)
    for wanted in ("./opt/drover/bin/drover", "./usr/bin/drover", "site-packages/kazoo/client.py", "client.cpython-"):
        assert wanted in names
    for other in ("direct_url.json", "site-packages/deploy", "REQUESTED"):
        assert other not in names
    unpacked = tmp_path / "root"
    subprocess.run(["dpkg-deb", "-x", str(made[0]), str(unpacked)], check=True)
    points = next(unpacked.glob("opt/drover/lib/*/site-packages/drover-*.dist-info/entry_points.txt")).read_text()
    assert "agents.command:agent" in points
    assert "deploy." not in points


def test_the_package_has_every_library_that_drover_needs() -> None:
    names = {each.metadata["Name"].lower().replace("_", "-") for each in deb.libraries()}
    assert {"cryptography", "grpcio", "kazoo", "ray", "pydantic", "qemu.qmp", "protobuf", "click"} <= names
    assert not {"pytest", "ruff", "pyright", "drover"} & names


# --- guests in scopes of their own ------------------------------------------------------------------------------------


def test_without_systemd_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert scoped(["qemu", "-S"], "0f0e0d0c-0b0a-0908", "vmm") == ["qemu", "-S"]


def test_each_process_of_a_guest_has_a_scope_below_the_guest_s_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "drover-guests.slice")
    made = [scoped(["qemu", "-S"], "0f0e0d0c-0b0a-0908-0706-050403020100", "vmm") for _ in range(2)]
    for words in made:
        assert words[:2] == ["systemd-run", "--scope"]
        assert "--slice=drover-guests-0f0e0d0c0b0a0908.slice" in words
        assert words[words.index("--") :] == ["--", "qemu", "-S"]
    units = {word for words in made for word in words if word.startswith("--unit=")}
    assert len(units) == 2, "a copy that ends does not keep the next one from beginning"


def test_guests_that_are_still_here_are_named(tmp_path: Path) -> None:
    """Both by the directory in its command line, and by the note of one that somebody else had started."""
    assert remaining.remaining(tmp_path) == []
    command = [sys.executable, "-c", "import time; time.sleep(600)", "-name", "guest=web-1,debug-threads=on"]
    own = subprocess.Popen([*command, f"{tmp_path}/guests/a/1.qmp"])
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "-name", "theirs"])
    try:
        note = tmp_path / "guests" / "b" / "2.json"
        note.parent.mkdir(parents=True)
        note.write_text(json.dumps({"pid": other.pid, "start_time": proc.start_time_of(other.pid)}))
        (note.parent / "unreadable.json").write_text("{")
        assert dict(remaining.remaining(tmp_path)) == {own.pid: "web-1", other.pid: "theirs"}
    finally:
        for each in (own, other):
            each.kill()
            each.wait()
    assert remaining.remaining(tmp_path) == []


def test_the_package_is_not_removed_when_it_cannot_be_told(tmp_path: Path) -> None:
    wrong = tmp_path / "agent.yaml"
    wrong.write_text("host: [")
    command = [sys.executable, "-m", "agents.host.remaining", "--config", str(wrong)]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1
    assert "cannot be told" in ran.stderr
