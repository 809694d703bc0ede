"""The cloud-init disk: the same bytes wherever it is made, and readable by others."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from agents.guest import seed
from orchestrator.core.hardware import MAX_CLOUD_INIT_BYTES
from orchestrator.core.records import CloudInit

USER = "#cloud-config\npackages: [nginx]\n"
KNOWN = "71d066fd29f7a97bf4ec22c618c6b62be474efc75fa6576e236cbf2c9c00882c"
LARGE = CloudInit(USER + "#" * (MAX_CLOUD_INIT_BYTES - 4096), network_config="version: 2\n")


def test_the_bytes_are_known() -> None:
    """An image that changed between two versions of Drover would change under a guest that moves between them: this
    figure must never change."""
    made = seed.seed(CloudInit(USER), uuid="1f2e3d4c", name="web-1")
    assert seed.digest(CloudInit(USER), uuid="1f2e3d4c", name="web-1") == KNOWN
    assert len(made) == 27 * 2048


def test_without_meta_data_the_guest_is_told_who_it_is() -> None:
    files = seed.files_of(CloudInit(USER), uuid="u-1", name="web-1")
    assert files == {"meta-data": b"instance-id: u-1\nlocal-hostname: web-1\n", "user-data": USER.encode()}
    assert seed.files_of(CloudInit(USER, "own: 1", "net"), uuid="u", name="w")["network-config"] == b"net"


@pytest.mark.skipif(shutil.which("xorriso") is None, reason="xorriso is not installed")
@pytest.mark.parametrize("given", [CloudInit(USER), CloudInit(USER, "own: 1\n", "version: 2\n"), LARGE])
def test_others_read_it(tmp_path: Path, given: CloudInit) -> None:
    path = tmp_path / "seed.iso"
    path.write_bytes(seed.seed(given, uuid="u", name="n"))
    command = ["xorriso", "-osirrox", "on", "-indev", path, "-extract", "/", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "Volume id    : 'cidata'" in done.stdout + done.stderr
    read = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert read == seed.files_of(given, uuid="u", name="n")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
