"""The configuration files of coordinator and API."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api import config as api
from orchestrator.config import ConfigError
from orchestrator.coordinator import wiring

COORDINATOR: dict[str, Any] = {"zookeeper": "127.0.0.1:2181", "ray_address": "127.0.0.1:6379"}
API: dict[str, Any] = {"listen": ["unix:/run/api.sock"], "zookeeper": "127.0.0.1:2181"}
BOUND = {"max_age_h": 5, "max_count": 9}
FENCER = {"name": "bmc", "kind": "exec", "hosts": ["h*"]}


@pytest.mark.parametrize(
    ("load", "content", "wrong"),
    [
        (wiring.load, {**COORDINATOR, "worker": 2}, "worker: there is no such key; did you mean workers?"),
        (wiring.load, {**COORDINATOR, "limits": {"max_per_sorce": 1}}, "limits.max_per_sorce: there is no such key"),
        (
            wiring.load,
            {**COORDINATOR, "retention": {"migrations": {**BOUND, "hour": 1}}},
            "retention.migrations.hour",
        ),
        (wiring.load, {**COORDINATOR, "fencing": [FENCER, {**FENCER, "host": []}]}, "fencing.1.host"),
        (api.load, {**API, "metric_listen": ""}, "metric_listen"),
        (api.load, {**API, "history": {"fil": "x"}}, "history.fil"),
        (wiring.load, {**COORDINATOR, "limits": {"burst": "many"}}, "limits.burst"),
    ],
)
def test_a_key_that_there_is_not_is_named(
    tmp_path: Path, load: Callable[[Path], object], content: dict[str, Any], wrong: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert wrong in str(raised.value)
    assert str(path) in str(raised.value)


def test_what_is_right_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**COORDINATOR, "fencing": [FENCER], "retention": {"migrations": BOUND}}))
    assert wiring.load(path).fencing[0].name == "bmc"
    path.write_text(json.dumps(API))
    assert api.load(path).zookeeper == "127.0.0.1:2181"
