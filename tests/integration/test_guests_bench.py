"""The short form of `make bench-guests`: every figure is taken, and nothing of it is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.contract.test_engine import ROOT, no_qemu
from tests.fakes.zookeeper import missing

pytestmark = [
    pytest.mark.integration,
    pytest.mark.qemu,
    pytest.mark.zookeeper,
    no_qemu,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]


def test_figures_stand_beside_their_targets_and_nothing_is_left(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    own = tempfile.mkdtemp(prefix="gb-", dir="/tmp")  # sockets lie in it, whose paths are bounded
    command = [
        sys.executable,
        "-m",
        "tests.bench.guests",
        "--only",
        "floor",
        "--scale",
        "0.02",
        "--report",
        str(report),
    ]
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TMPDIR": own}, capture_output=True, text=True, timeout=150, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(report.read_text())["figures"]
    assert all({"name", "value", "unit", "target", "met"} <= set(figure) for figure in found)
    assert [figure["note"] for figure in found if figure["value"] is None] == []
    aimed = [figure for figure in found if figure["target"]]
    assert [figure["target"] for figure in aimed] == [">= 10", "<= 8"]
    assert all(isinstance(figure["met"], bool) for figure in aimed)
    Path(own).rmdir()  # nothing was left in it
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if own.encode() in _content(path)]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has just ended
        return b""


def test_a_figure_that_is_not_there_is_said_with_those_that_are(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench.guests", "--only", "ceiling", "--report", str(tmp_path / "report")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    assert "there is no figure ceiling; there are " in ran.stderr
