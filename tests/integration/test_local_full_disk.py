"""A local cluster whose disk is full: it says so, ends nothing, and all comes back when there is room."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lab.cluster import commands, processes, state
from deploy.lab.cluster.layout import Layout
from deploy.lab.workload import Workload, boot_of
from orchestrator.core.errors import DroverError
from orchestrator.core.records import GuestSpec
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.cluster import make_config, missing, running_cluster, short_directory, until

pytestmark = [pytest.mark.integration, pytest.mark.zookeeper, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture
def small_disk(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory on a tmpfs of so many MiB; its own, so that nothing else suffers."""
    directory = short_directory()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}m,mode=755", "tmpfs", directory],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        directory.rmdir()
        pytest.skip("a tmpfs cannot be mounted here (it takes root)")
    try:
        yield directory
    finally:
        commands.down(directory / "c")
        subprocess.run(["umount", "-l", directory], check=False)
        directory.rmdir()


def fill(disk: Path) -> Path:
    """Not a byte is left afterwards; the file that took them all."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for block in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * block)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        (disk / "more").write_bytes(b"x" * 8192)
    (disk / "more").unlink(missing_ok=True)
    return ballast


def open_to_others(directory: Path) -> list[str]:
    """Everything below it that somebody else may read or write, were it not for the directory itself."""
    found: list[str] = []
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            mode = path.lstat().st_mode
            if not stat.S_ISLNK(mode) and stat.S_IMODE(mode) & 0o066:
                found.append(f"{stat.filemode(mode)} {path}")
    return found


@pytest.mark.parametrize("small_disk", [48], indirect=True)
def test_the_supervisor_goes_on_and_tells_the_truth(small_disk: Path) -> None:
    """With stand-ins, whose guests are sleeping processes: what is tried here is the supervisor."""
    layout = Layout.of(small_disk / "c")
    stand_ins = ("agent", "api", "collector", "coordinator")
    with running_cluster(make_config(layout.dir, hosts=2, stand_ins=stand_ins, without=("ray",))) as cluster:
        guests, supervisor = cluster.guests(), cluster.record.supervisor
        assert len(guests) == 2
        ballast = fill(small_disk)
        killed = {name: cluster.kill(name) for name in ("api", "agent-host-1")}
        for name, pid in killed.items():
            until(lambda name=name, pid=pid: cluster.part(name).pid not in {None, pid}, 60)
        until(lambda: cluster.part("api").health == "ok" and cluster.part("agent-host-1").health == "ok", 60)
        now = cluster.status()
        assert (now.running, now.state) == (True, "ready")
        assert [part.restarts for part in now.parts if part.name in killed] == [1, 1]
        assert any("No space left" in note for note in now.notes), now.notes
        assert processes.is_alive(supervisor)
        assert cluster.guests() == guests
        recorded = state.read(layout.cluster_json)
        assert recorded, "what was written before is still whole"
        ballast.unlink()
        until(lambda: not any("No space left" in note for note in cluster.status().notes), 60)
        written = {part.name: part.process for part in cluster.record.parts}
        assert {part.name: part.pid for part in cluster.status().parts} == {
            name: process.pid if process else None for name, process in written.items()
        }
        assert cluster.guests() == guests


@pytest.mark.qemu
@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("small_disk", [400], indirect=True)
def test_guests_live_through_it_and_everything_comes_back(small_disk: Path) -> None:
    """With the real parts. ZooKeeper is killed while nothing can be written, and cannot start until there is room."""
    with running_cluster(make_config(small_disk / "c", hosts=2)) as cluster:
        with OrchestratorClient(cluster.api) as client:
            for number in (1, 2):
                spec = GuestSpec(f"web-{number}", memory_mib=32, boot=boot_of(Workload(dirty_mib=2)))
                client.create_guest(spec, f"host-{number}")
        guests, supervisor = cluster.guests(), cluster.record.supervisor
        ballast = fill(small_disk)
        cluster.kill("zookeeper")
        cluster.kill("agent-host-1")
        begun = time.monotonic()
        while time.monotonic() - begun < 8:
            assert cluster.guests() == guests
            assert processes.is_alive(supervisor)
            time.sleep(0.2)
        assert not cluster.status().healthy
        ballast.unlink()
        until(lambda: cluster.status().healthy, 90)
        assert cluster.guests() == guests
        with OrchestratorClient(cluster.api, timeout_s=30) as client:
            assert {guest.name for guest in client.list_guests()} == {"web-1", "web-2"}
            spec = GuestSpec("web-3", memory_mib=32, boot=boot_of(Workload(dirty_mib=2)))

            def made() -> bool:
                """The API may not have found the agent again yet; it says to repeat the request."""
                with contextlib.suppress(DroverError):
                    return client.create_guest(spec, "host-1", request_id="third").name == "web-3"
                return False

            until(made, 60)
            done = client.create_migration("web-1", destination="host-2")
            for seen in client.watch_migrations([done.name]):
                done = seen
            assert done.attempts[-1].outcome == "COMMITTED"


def test_nobody_else_may_look_into_a_cluster() -> None:
    """Whatever umask it is started with, and whatever a part of it thinks of others."""
    directory = short_directory()
    directory.chmod(0o777)
    before = os.umask(0)
    try:
        with running_cluster(make_config(directory, hosts=1, stand_ins=("agent", "api"))) as cluster:
            os.umask(before)
            assert stat.S_IMODE(cluster.dir.stat().st_mode) == 0o700
            until((cluster.dir / "ray" / "session_latest").exists, 60)
            with contextlib.suppress(AssertionError):
                # Ray's launcher closes its directories a moment after somebody opened them.
                until(lambda: not open_to_others(cluster.dir), 10)
            assert open_to_others(cluster.dir) == []
    finally:
        os.umask(before)
        commands.down(directory)
