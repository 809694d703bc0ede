"""What is asked of metrics they tell: alert rules, dashboards and docs/metrics.md name those that the code has."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import generate_latest

from agents.host.metrics import Metrics
from orchestrator.api.metrics import ApiMetrics
from orchestrator.coordinator import metrics as coordinator
from orchestrator.metrics import LoopLag
from tests.fakes.coordination import MemoryStore

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((MONITORING / "drover.rules.yml").read_text())["groups"] for rule in group["rules"]
]
DASHBOARDS = sorted((MONITORING / "dashboards").glob("*.json"))
_NAME = re.compile(r"\b(?:drover|process)_[a-z_]+\b|\bup\b")
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}


def families() -> dict[str, str]:
    """What agent, API and coordinator tell, each with its type, as a Prometheus reads it."""
    agent, api, leader = CollectorRegistry(), CollectorRegistry(), CollectorRegistry()
    Metrics(agent)
    ApiMetrics(api, MemoryStore(), lambda: 0)
    coordinator.register(leader, lambda: None, lambda: None)
    ProcessCollector(registry=agent)
    found: dict[str, str] = {}
    for registry in (agent, api, leader):
        for line in generate_latest(registry).decode().splitlines():
            if line.startswith("# TYPE ") and not line.split()[2].endswith("_created"):
                found[line.split()[2]] = line.split()[3]
    return found


@cache
def series() -> frozenset[str]:
    told = families()
    return frozenset({"up"} | {f"{name}{suffix}" for name, kind in told.items() for suffix in _SUFFIXES[kind]})


def asked(expression: str) -> set[str]:
    return set(_NAME.findall(re.sub(r'"[^"]*"', "", expression)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_there_is_and_leads_to_a_runbook_that_there_is(rule: dict[str, Any]) -> None:
    assert asked(rule["expr"])
    assert asked(rule["expr"]) - series() == set()
    assert rule["labels"]["severity"] in ("page", "ticket")
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    titles = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_loads_and_asks_for_what_there_is(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"]
    assert board["title"].startswith("Drover")
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    sources = {each["name"] for each in board["templating"]["list"] if each["type"] == "datasource"}
    for panel in board["panels"]:
        assert panel["datasource"]["uid"].strip("${}") in sources
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        for target in panel["targets"]:
            assert asked(target["expr"]), target
            assert asked(target["expr"]) - series() == set(), panel["title"]


def test_there_are_dashboards() -> None:
    assert {path.stem for path in DASHBOARDS} == {"fleet", "migrations"}


def test_the_page_of_metrics_names_those_that_there_are() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    ours = {name for name in families() if name.startswith("drover_")}
    named = set(re.findall(r"`(drover_[a-z_]+)`", page))
    assert ours - named == set(), "told by the code, and not on the page"
    assert named - ours == set(), "on the page, and told by nobody"


async def test_a_loop_that_stands_still_is_late() -> None:
    lag = LoopLag()
    assert lag.worst_s == 0
    await lag.look()
    at_rest = lag.worst_s
    looking = asyncio.ensure_future(lag.look())
    await asyncio.sleep(0)
    time.sleep(1.5)  # noqa: ASYNC251 - the fault itself
    await looking
    assert lag.worst_s >= max(at_rest, 0.9)


def test_promtool_passes_the_rules_and_their_tests() -> None:
    fetched = subprocess.run([MONITORING / "promtool.sh"], capture_output=True, text=True, timeout=300, check=False)
    if fetched.returncode == 69:
        pytest.skip(fetched.stderr.strip())
    assert fetched.returncode == 0, fetched.stderr
    promtool = fetched.stdout.strip()
    for words in (["check", "rules", "drover.rules.yml"], ["test", "rules", "drover.test.yml"]):
        done = subprocess.run(
            [promtool, *words], cwd=MONITORING, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
