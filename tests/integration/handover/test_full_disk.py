"""The destination's disk fills up under an attempt: the guest arrives all the same, the next one is refused by name,
and everything goes on when there is room again."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.core.handover import Ownership
from tests.integration.handover.scene import Scene, device

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]


def _run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True)


@contextlib.contextmanager
def small_disks(scene: Scene, host: str) -> Iterator[list[Path]]:
    """The notes, sockets, logs and markers of the host's guests lie on 2 MiB of their own; there are no guests yet, and
    none at the end.

    An agent that starts meanwhile registers the small disk as the place of its markers, and that is taken away: another
    one registers the directory below it, or no later agent of this power cycle could prove that it has the markers.
    """
    config = json.loads((scene.layout.host(host) / "agent.json").read_text())
    with contextlib.ExitStack() as mounted:
        mounted.callback(scene.agents_are_back)
        mounted.callback(scene.kill_agent, host)
        directories = [Path(config["dir"]) / "guests", Path(config["volatile_dir"])]
        for directory in directories:
            directory.mkdir(exist_ok=True)
            assert not list(directory.iterdir())
            _run("mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", directory)
            mounted.callback(_run, "umount", "-l", directory)
        yield directories


def fill(disks: list[Path]) -> None:
    for disk in disks:
        _fill(disk)


def _fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def test_a_disk_that_fills_up_in_pre_copy_costs_nobody_a_guest(scene: Scene) -> None:
    first, second = scene.guest(device(), memory_mib=96), scene.guest()
    with small_disks(scene, scene.there) as disks:
        migration = scene.migrate(first, scene.there, max_bandwidth_mbps=100)
        scene.reach_phase(migration, "PRECOPY")
        fill(disks)
        over = scene.succeeded(migration)
        assert [report.outcome for report in over.attempts] == ["COMMITTED"]
        record = scene.record(first)
        assert (record.phase, record.owner.host) == (Ownership.IDLE, scene.there)

        refused = scene.ended(scene.migrate(second, scene.there, max_attempts=1))
        assert [(report.outcome, report.reason) for report in refused.attempts] == [("ABORTED", "PREPARE_FAILED")]
        assert scene.record(second).owner.host == scene.here

        scene.kill_agent(scene.there)  # its successor finds the guest, with the disk still full
        scene.agents_are_back()
        assert scene.record(first).phase is Ownership.IDLE

        for disk in disks:
            (disk / "ballast").unlink()
        scene.succeeded(scene.migrate(second, scene.there))
        for guest in (first, second):
            scene.succeeded(scene.migrate(guest, scene.here))
