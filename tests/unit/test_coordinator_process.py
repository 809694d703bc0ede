"""The log of the coordinator's processes: JSON lines, folded, at the configured level, and not lost at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ACTOR = """
import asyncio, sys
from orchestrator.coordinator import actor
from orchestrator.coordinator.wiring import CoordinatorConfig
from orchestrator.ledger.store import StoreUnavailable

class Away:
    def on_session(self, *_): ...
    session = None
    async def start(self):
        raise StoreUnavailable("nobody answers at port 2181")

def away(*_, **__):
    return Away()

def broken(*_, **__):
    raise RuntimeError("no such store")

async def main():
    kind, store, level = sys.argv[1:]
    config = CoordinatorConfig(
        zookeeper="", ray_address="", workers=0, log_level=level,
        store_factory=f"__main__:{store}", agents_factory="builtins:object",
    )
    kept = getattr(actor, kind)(config)
    await asyncio.sleep(2.2)

asyncio.run(main())
"""


def run_actor(kind: str, store: str, level: str = "info") -> tuple[int, list[dict[str, Any]]]:
    """Exit status, and its log."""
    done = subprocess.run(
        [sys.executable, "-c", ACTOR, kind, store, level], check=False, capture_output=True, text=True, timeout=60
    )
    return done.returncode, [json.loads(line) for line in done.stderr.splitlines()]


@pytest.mark.parametrize("kind", ["Coordinator", "MigrationWorker"])
def test_an_actor_logs_json_lines_and_folds_repeats(kind: str) -> None:
    code, lines = run_actor(kind, "away")
    told = [line for line in lines if line["event"].startswith("ledger is not reachable")]
    assert code == 0
    assert len(told) == 1, lines  # it tries twice a second
    assert told[0]["level"] == "warning"
    assert "2181" in told[0]["error"]


def test_an_actor_logs_at_the_configured_level() -> None:
    assert run_actor("MigrationWorker", "away", "error") == (0, [])


@pytest.mark.parametrize("kind", ["Coordinator", "MigrationWorker"])
def test_an_actor_that_dies_says_why(kind: str) -> None:
    code, lines = run_actor(kind, "broken")
    assert code == 70
    assert lines[-1]["event"] == "actor dies"
    assert "no such store" in lines[-1]["exception"]


def test_a_log_level_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "coordinator.json"
    config.write_text(json.dumps({"zookeeper": "z:1", "ray_address": "r:1", "log_level": "loud"}))
    command = [sys.executable, "-m", "orchestrator.coordinator", "--config", str(config)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "log level must be one of" in done.stderr
