"""The agent's configuration file: what is refused, and how that is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents.config import ConfigError, load

SOUND = {
    "host": "h1",
    "address": "192.0.2.7",
    "zookeeper": "192.0.2.1:2181",
    "dir": "/d",
    "console_dir": "/c",
    "volatile_dir": "/v",
    "memory_mib": 1024,
    "guest_image": "/g",
}


def loaded(tmp_path: Path, **changes: object) -> str:
    """What is wrong; empty when it is sound."""
    file = tmp_path / "agent.json"
    file.write_text(json.dumps(SOUND | {"device_program": ["x"]} | changes))
    try:
        load(file)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["h1", "node-1", "a" * 63])
def test_names_that_the_api_can_address(tmp_path: Path, name: str) -> None:
    assert loaded(tmp_path, host=name) == ""


@pytest.mark.parametrize("name", ["Node1", "a.b", "a/b", "хост", "", "-a", "a-", "a" * 64, "a_b"])
def test_other_names_are_refused_with_what_is_allowed(tmp_path: Path, name: str) -> None:
    """Placement filled such a host by itself, and nobody could cordon or evacuate it."""
    said = loaded(tmp_path, host=name)
    assert "host: " in said
    assert "must be lower-case letters, digits and hyphens, 1 to 63 of them" in said
