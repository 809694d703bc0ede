"""A guest's files on its host: whenever an agent is killed while it removes them, the next one knows what is left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from agents.engine.qemu import process
from agents.guest.files import GuestFiles, forget_stale_links, found_on_disk, guests_root, note_roots
from orchestrator.core.liveness import LivenessUnknown
from orchestrator.core.records import GuestSpec
from tests.fakes.config import agent_config

G = "0f0e0d0c-0b0a-4987-8654-321001234567"


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", range(5))
def test_killed_after_any_step_of_the_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    config = agent_config(tmp_path)
    files = GuestFiles(config, G, GuestSpec("web"))
    files.make()
    for name in ("a.qmp", "a.log", "a.json"):
        (files.directory / name).touch()
    steps, unlink = 0, Path.unlink

    def unlink_or_die(path: Path) -> None:
        nonlocal steps
        if steps == after:
            raise Killed
        steps += 1
        unlink(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlink_or_die)
        if after < 4:
            with pytest.raises(Killed):
                files.remove()
        else:
            files.remove()
    assert [found.uuid for found in found_on_disk(config).guests] == ([G] if after < 4 else [])
    files.remove()
    assert not files.directory.exists()


def test_a_directory_that_was_about_to_go_is_gone_at_the_next_start(tmp_path: Path) -> None:
    config = agent_config(tmp_path)
    left = config.dir / "guests" / G[:16]
    left.mkdir(parents=True)
    assert found_on_disk(config).guests == ()
    assert not left.exists()


def test_sockets_have_short_paths_in_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.guest.files._runtime", lambda: Path(runtime))
    with tempfile.TemporaryDirectory(dir="/tmp") as runtime:
        config = agent_config(tmp_path).model_copy(update={"dir": tmp_path / ("d" * 100) / ("e" * 100)})
        config.dir.mkdir(parents=True)
        files = GuestFiles(config, G, GuestSpec("n" * 63))
        files.make()
        spec = files.vmm_spec("0" * 16)
        with socket.socket(socket.AF_UNIX) as served:
            served.bind(str(process.console_socket(spec)))
            served.listen()
            process.link_console(spec)
            with socket.socket(socket.AF_UNIX) as asks:
                asks.connect(str(spec.console_path.readlink()))
        assert (config.dir / "guests" / G[:16] / "guest.json").exists(), "it lies where the configuration says"
        sockets = (process.qmp_path(spec), process.oob_path(spec), process.console_socket(spec))
        others = (files.directory / f"{spec.inc}.{suffix}" for suffix in ("dev", "ctl", "vfio"))
        assert all(len(os.fsencode(path)) <= 107 for path in (*sockets, *others))
        assert [found.uuid for found in found_on_disk(config).guests] == [G]
        guests_root.cache_clear()
        Path(runtime).chmod(0o777)
        with pytest.raises(PermissionError, match="others may write"):
            guests_root(config.dir / "guests")
    guests_root.cache_clear()


@pytest.mark.parametrize("root", ["old", "with, comma", "a" * 90])
def test_the_vmms_of_a_guest_are_found_from_a_moved_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    """With its notes gone as well: the sockets that QEMU was told of are where the directory was, or a short link."""
    with tempfile.TemporaryDirectory(dir="/tmp") as runtime:
        monkeypatch.setattr("agents.guest.files._runtime", lambda: Path(runtime))
        config = agent_config(tmp_path).model_copy(update={"dir": tmp_path / root})
        config.dir.mkdir()
        note_roots(config)
        files = GuestFiles(config, G, GuestSpec("web"))
        qmp = str(files.directory / "i.qmp").replace(",", ",,")
        words = ["qemu-stand-in", "-c", "import time; time.sleep(60)", f"unix:{qmp},server=on"]
        running = subprocess.Popen(words, executable=sys.executable)
        try:
            deadline = time.monotonic() + 10
            while files.vmms() != [running.pid]:  # until it is what it was started as
                assert time.monotonic() < deadline
                time.sleep(0.01)
            config.dir.rename(tmp_path / "moved")
            moved = config.model_copy(update={"dir": tmp_path / "moved"})
            note_roots(moved)
            guests_root.cache_clear()
            assert GuestFiles(moved, G, GuestSpec("web")).vmms() == [running.pid]
            assert GuestFiles(moved, "1" + G[1:], GuestSpec("web")).vmms() == []
            (moved.dir / "roots.json").write_text("{")
            with pytest.raises(LivenessUnknown, match=r"mend or remove it.*roots\.json"):
                GuestFiles(moved, G, GuestSpec("web")).vmms()
        finally:
            running.kill()
            running.wait()
            guests_root.cache_clear()


def test_links_to_directories_that_are_no_more_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, kept, gone = (tmp_path / name for name in ("run", "kept", "gone"))
    monkeypatch.setattr("agents.guest.files._runtime", lambda: runtime)
    forget_stale_links()  # there is nothing yet
    for directory in (runtime, kept):
        directory.mkdir()
    for name, target in (("a", kept), ("b", gone)):
        (runtime / name).symlink_to(target)
    (runtime / "c").touch()
    forget_stale_links()
    assert sorted(path.name for path in runtime.iterdir()) == ["a", "c"]


def test_nobody_else_may_look_into_a_guests_directory(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        files = GuestFiles(agent_config(tmp_path), G, GuestSpec("web"))
        files.directory.mkdir(parents=True)
        files.make()
    finally:
        os.umask(before)
    assert files.directory.stat().st_mode & 0o777 == 0o700


def test_a_vmm_is_known_by_its_command_line_whatever_its_program_is_called(tmp_path: Path) -> None:
    """`kvm`, a wrapper, a build of somebody's own: `qemu` of the configuration names any program."""
    config = agent_config(tmp_path)
    files = GuestFiles(config, G, GuestSpec("web"))
    words = ["kvm", "-c", "import time; time.sleep(60)", "-name", "guest=web", f"unix:{files.directory / 'i.qmp'}"]
    running = subprocess.Popen(words, executable=sys.executable)
    try:
        deadline = time.monotonic() + 10
        while files.vmms() != [running.pid]:  # until it is what it was started as
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        running.kill()
        running.wait()
