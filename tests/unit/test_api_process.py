"""How the API's process starts, or says in one sentence why it cannot; and what its log lines look like."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.api import __main__ as process
from orchestrator.api import config
from orchestrator.api.config import ApiConfig
from orchestrator.ledger import paths
from orchestrator.telemetry import configure_logging


def test_the_configuration_that_a_local_cluster_writes(tmp_path: Path) -> None:
    file = tmp_path / "api.json"
    listen = ("unix:/x/api.sock", "127.0.0.1:7070")
    file.write_text(json.dumps({"listen": listen, "zookeeper": "127.0.0.1:2181", "instructions": True}))
    wanted = ApiConfig(listen, "127.0.0.1:2181", chroot=paths.CHROOT, instructions=True, log_level="info")
    assert config.load(file) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "Invalid JSON"),
        ('{"listen": [], "instructions": "perhaps", "zookeeper": "z"}', "instructions"),
        ('{"listen": []}', "zookeeper"),
        ('{"listen": [], "zookeeper": "z", "log_level": "loud"}', "log level must be one of"),
    ],
)
def test_why_it_cannot_start(tmp_path: Path, text: str | None, said: str) -> None:
    refused(tmp_path, text, said)


def test_an_address_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "configure_logging", lambda _level: None)  # it is for the whole process, ours too
    refused(tmp_path, '{"listen": ["nowhere.invalid:x"], "zookeeper": "127.0.0.1:1"}', "nowhere.invalid")


def refused(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "api.json"
    if text is not None:
        file.write_text(text)
    result = CliRunner().invoke(process.main, ["--config", str(file)])
    assert result.exit_code == 1
    assert said in result.output
    assert "cannot start the API" in result.output
    assert len(result.output.splitlines()) == 1


LOGS = """
import logging, structlog
from orchestrator.telemetry import about, configure_logging
log = structlog.get_logger("x")
configure_logging("warning")
with about(guest="web", migration="", attempt=2):
    log.warning("late", devices=["nic"])
    log.info("not shown")
    logging.getLogger("kazoo.client").error("lost %s", "it")
log.error("ended", error=ValueError("x"))
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
"""


def test_every_log_line_is_json_and_says_what_it_is_about() -> None:
    run = subprocess.run([sys.executable, "-c", LOGS], capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout == ""
    late, lost, ended, failed = [json.loads(line) for line in run.stderr.splitlines()]
    assert (late["event"], late["level"], late["guest"], late["attempt"]) == ("late", "warning", "web", 2)
    assert late["devices"] == ["nic"]
    assert "migration" not in late
    assert late["at"].endswith("Z")
    assert (lost["event"], lost["logger"], lost["guest"]) == ("lost it", "kazoo.client", "web")
    assert (ended["error"], "guest" in ended) == ("x", False)
    assert "ZeroDivisionError" in failed["exception"]


def test_a_level_that_there_is_not() -> None:
    before = logging.getLogger().handlers[:]
    with pytest.raises(ValueError, match="debug, info, warning, error"):
        configure_logging("loud")
    assert logging.getLogger().handlers == before
