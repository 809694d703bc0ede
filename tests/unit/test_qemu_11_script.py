"""deploy/qemu-11.sh where it cannot do its work: one sentence, and a status that tests turn into a skip."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "qemu-11.sh"
UNAVAILABLE = 69


def ran(target: Path, tools: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{tools}:/usr/bin:/bin"}
    return subprocess.run(
        [str(SCRIPT), str(target)], capture_output=True, text=True, timeout=30, env=environment, check=False
    )


def tool(directory: Path, name: str, script: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.mark.parametrize(
    ("name", "script", "says"),
    [
        ("uname", "echo aarch64", "this machine is aarch64"),
        ("apt-get", "echo 'E: no network here'; exit 100", "no network here"),
        ("apt-cache", "echo 'Version: 1:12.0.1+ds-1'", "sid has 12.0.1+ds-1 now"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(tmp_path: Path, name: str, script: str, says: str) -> None:
    if not Path("/usr/share/keyrings/debian-archive-keyring.gpg").is_file():
        pytest.skip("this is no Debian")
    tools = tmp_path / "tools"
    tool(tools, name, script)
    if name == "apt-cache":
        tool(tools, "apt-get", "exit 0")
    made = ran(tmp_path / "qemu", tools)
    assert made.returncode == UNAVAILABLE, made.stderr
    assert made.stderr.startswith("qemu-11: QEMU 11.1 cannot be had here: ")
    assert says in made.stderr
    assert len(made.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qemu.lock", "tools"] or name == "uname"


def test_a_tree_that_is_there_is_left_alone(tmp_path: Path) -> None:
    tool(tmp_path / "qemu", "x", "exit 1")
    tool(tmp_path / "qemu" / "bin", "qemu-system-x86_64", "echo 'QEMU emulator version 11.1.9 (Debian)'")
    tools = tmp_path / "tools"
    tool(tools, "apt-get", "echo never; exit 1")
    made = ran(tmp_path / "qemu", tools)
    assert made.returncode == 0
    assert "there already" in made.stdout
