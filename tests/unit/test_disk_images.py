"""What is known of a guest's local images on a host, and what becomes of them when it has gone."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agents.config import AgentConfig, PoolConfig
from agents.disks import images, pools
from agents.disks.daemon import DiskDaemon
from agents.disks.images import DiskError, Images, retire, sweep
from agents.disks.local import images_of
from agents.engine.base import DiskFile, EngineError
from agents.guest.copies import Copy
from orchestrator.core.disks import (
    Copying,
    DestinationSide,
    SourceSide,
    SyncPoint,
    copying,
    has_every_write,
)
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import DiskCache, DiskFormat, DiskSpec, GuestSpec, PoolKind
from tests.fakes.config import agent_config

needs_tool = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img")


def disk(directory: Path, size_bytes: int = 1 << 20) -> DiskFile:
    path = directory / "root.qcow2"
    return DiskFile("root", path, DiskFormat.QCOW2, DiskCache.NONE, False, PoolKind.LOCAL, size_bytes)


@needs_tool
async def test_an_image_is_worth_something_from_its_release_until_somebody_opens_it(tmp_path: Path) -> None:
    images = Images(tmp_path / "note")
    made = await images.made(disk(tmp_path))
    assert not images.known()["root"].is_whole
    images.opened("root")
    images.released(["root"], "one")
    assert Images(tmp_path / "note").known()["root"].is_whole
    images.opened("root")
    assert not images.known()["root"].is_whole
    assert images.known()["root"].since == "one", "as long as its writer lives, the source may go on from there"
    again = await images.made(disk(tmp_path))
    assert again.image != made.image
    assert again.since == ""


@needs_tool
async def test_an_image_of_somebody_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "root.qcow2").write_text("data")
    images = Images(tmp_path / "note")
    with pytest.raises(DiskError, match="is there already"):
        await images.made(disk(tmp_path))
    images.discard()
    assert (tmp_path / "root.qcow2").read_text() == "data"


async def test_a_disk_without_a_size_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="size"):
        await Images(tmp_path / "note").made(disk(tmp_path, size_bytes=0))


def test_a_note_that_cannot_be_read_is_no_reason_to_remove_anything(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("{")
    (tmp_path / "root.qcow2").write_text("data")
    with pytest.raises(DiskError, match="cannot be read"):
        Images(tmp_path / "note").discard()
    assert (tmp_path / "root.qcow2").exists()


def test_what_has_moved_away_is_kept_for_its_time_of_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "root.qcow2").write_text("old")
    (tmp_path / "notes.moved-by-hand").write_text("not ours")
    away = retire(tmp_path / "root.qcow2", "0123456789abcdef")
    assert away is not None
    assert retire(tmp_path / "root.qcow2", "0123456789abcdef") is None
    assert sweep(tmp_path, 3600) == []
    assert away.read_text() == "old"
    now_s = images.uptime_s()
    monkeypatch.setattr(images, "uptime_s", lambda: now_s + 7200)
    assert sweep(tmp_path, 3600) == [away]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.moved-by-hand"]


def test_a_wall_clock_that_was_set_ends_no_time_of_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "root.qcow2").write_text("old")
    away = retire(tmp_path / "root.qcow2", "0123456789abcdef")
    assert away is not None
    eight_days_ahead_s = time.time() + 8 * 86400
    monkeypatch.setattr(time, "time", lambda: eight_days_ahead_s)
    assert sweep(tmp_path, 3600) == []
    assert away.exists()


def test_after_a_restart_of_the_machine_no_image_looks_older_than_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock begins anew, and so does the time of grace of what was stamped before."""
    (tmp_path / "root.qcow2").write_text("old")
    monkeypatch.setattr(images, "uptime_s", lambda: 90_000.0)
    away = retire(tmp_path / "root.qcow2", "0123456789abcdef")
    assert away is not None
    for up_s, gone in ((20.0, []), (3600.0, []), (3630.0, [away])):
        monkeypatch.setattr(images, "uptime_s", lambda up_s=up_s: up_s)
        assert sweep(tmp_path, 3600) == gone


def copy_that_left(directory: Path, inc: str) -> Copy:
    """As far as taking its images out of use needs one."""
    files = SimpleNamespace(directory=directory)
    return cast(Copy, SimpleNamespace(files=files, inc=inc, local_disks=(disk(directory),)))


@needs_tool
async def test_a_discard_that_is_tried_again_leaves_the_image_of_a_guest_that_comes_back(tmp_path: Path) -> None:
    """Its place is taken by then: taken out of use, it would be removed under the guest after the time of grace."""
    left = copy_that_left(tmp_path, "0123456789abcdef")
    (tmp_path / "root.qcow2").write_text("of the guest that has left")
    await Copy.retire_disks(left)
    assert not (tmp_path / "root.qcow2").exists()
    images = images_of(tmp_path)
    await images.made(disk(tmp_path))
    for step in (lambda: images.opened("root"), lambda: images.released(["root"], "fedcba9876543210")):
        await Copy.retire_disks(left)
        step()
    await Copy.retire_disks(left)
    assert (tmp_path / "root.qcow2").exists()


@needs_tool
async def test_a_copy_leaves_with_the_image_that_it_came_with(tmp_path: Path) -> None:
    """Also where the note of its arrival still stands."""
    inc = "0123456789abcdef"
    images = images_of(tmp_path)
    await images.made(disk(tmp_path))
    images.opened("root")
    images.released(["root"], inc)
    await Copy.retire_disks(copy_that_left(tmp_path, inc))
    assert not (tmp_path / "root.qcow2").exists()


async def test_a_note_that_cannot_be_read_keeps_the_images_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "root.qcow2").write_text("data")
    (tmp_path / "storage.images").write_text("{")
    with pytest.raises(OSError, match="cannot be read"):
        await Copy.retire_disks(copy_that_left(tmp_path, "0123456789abcdef"))
    assert (tmp_path / "root.qcow2").exists()


@needs_tool
@pytest.mark.rule("H16")
async def test_that_an_image_is_opened_is_on_the_disk_before_anybody_writes_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power it would be called whole, without what was sent into it and forgotten by its source."""
    images = Images(tmp_path / "note")
    await images.made(disk(tmp_path))
    synced: list[str] = []

    def sync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    monkeypatch.setattr(os, "fsync", sync)
    images.opened("root")
    assert synced == [str(tmp_path / "note.tmp"), str(tmp_path)]


class Qmp:
    """A storage daemon's monitor, as far as exports go."""

    def __init__(self) -> None:
        self.nodes: set[str] = set()
        self.exports: set[str] = set()
        self.fails = ""

    async def execute(self, command: str, arguments: dict[str, Any] | None = None, **_: object) -> Any:
        given = arguments or {}
        if command == self.fails:
            raise EngineError(f"{command}: not over in time")
        match command:
            case "query-block-exports":
                return [{"id": each} for each in self.exports]
            case "query-named-block-nodes":
                return [{"node-name": each} for each in self.nodes]
            case "blockdev-add" if given["node-name"] in self.nodes:
                raise EngineError("Duplicate nodes with node-name")
            case "blockdev-add":
                self.nodes.add(given["node-name"])
            case "blockdev-del":
                self.nodes.remove(given["node-name"])
            case "block-export-add":
                self.exports.add(given["id"])
            case _:
                raise AssertionError(command)
        return {}


async def test_an_export_that_was_given_up_in_the_middle_is_no_trouble_to_the_next(tmp_path: Path) -> None:
    qmp = Qmp()
    daemon = DiskDaemon(tmp_path, cast(Any, None), Endpoint("127.0.0.1", 1))
    daemon._qmp = cast(Any, qmp)
    qmp.fails = "block-export-add"
    with pytest.raises(DiskError):
        await daemon.export(disk(tmp_path), "one")
    qmp.fails = ""
    await daemon.export(disk(tmp_path), "two")
    assert (qmp.nodes, qmp.exports) == ({"n-root"}, {"two"})


@pytest.mark.rule("H16")
@pytest.mark.parametrize(
    ("here", "there", "how"),
    [
        (SourceSide(), DestinationSide("i1"), Copying.FULL),
        (SourceSide("i1"), DestinationSide("i1"), Copying.GOES_ON),
        (SourceSide("i1"), DestinationSide("i2"), Copying.FULL),
        (SourceSide("", "one"), DestinationSide("i1", "one"), Copying.INCREMENT),
        (SourceSide("", "one"), DestinationSide("i1", "two"), Copying.FULL),
        (SourceSide("", "one"), DestinationSide("i1"), Copying.FULL),
        (SourceSide(), DestinationSide("i1", "one"), Copying.FULL),
    ],
)
def test_an_increment_needs_the_same_point_at_both_ends(here: SourceSide, there: DestinationSide, how: Copying) -> None:
    assert copying(here, there) is how


@pytest.mark.rule("H16")
def test_only_the_images_of_this_very_drain_are_good() -> None:
    a, b = SyncPoint("a", "k", 1), SyncPoint("b", "k", 1)
    assert has_every_write((a, b), (b, a))
    assert not has_every_write((a, b), (a,))
    assert not has_every_write((a,), (SyncPoint("a", "j", 1),))
    assert not has_every_write((a,), (SyncPoint("a", "k", 2),))


def test_a_shared_pool_is_known_by_the_word_in_it(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for each in (one, other):
        each.mkdir()
    assert pools.token(one) == pools.token(one)
    assert pools.token(one) != pools.token(other)
    assert [path.name for path in one.iterdir()] == [".drover-pool"]


def test_a_pool_that_does_not_answer_takes_one_thread_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_LOOK_S", 0.01)
    pool = PoolConfig(path=tmp_path, kind=PoolKind.SHARED_FILE)
    config = agent_config(tmp_path).model_copy(update={"pools": {"nfs": pool}})
    spec = GuestSpec("g", disks=(DiskSpec("data", "nfs", "data.raw"),))
    answered, begun = threading.Event(), threading.Event()

    def hang(_: Path) -> str:
        begun.set()
        answered.wait(30)
        return "word"

    monkeypatch.setattr(pools, "token", hang)
    found: list[dict[str, str]] = []
    first = threading.Thread(target=lambda: found.append(pools.tokens(config, spec)))
    first.start()
    assert begun.wait(10)
    assert pools.tokens(config, spec) == {}
    answered.set()
    first.join(10)
    assert found == [{"nfs": "word"}]


def test_a_destination_with_another_directory_under_the_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    spec = GuestSpec("g", disks=(DiskSpec("data", "shared", "data.raw"), DiskSpec("root", "fast", "root.qcow2")))

    def config(name: str) -> AgentConfig:
        shared = PoolConfig(path=tmp_path / name, kind=PoolKind.SHARED_FILE)
        fast = PoolConfig(path=tmp_path / "other", kind=PoolKind.LOCAL)
        return agent_config(tmp_path).model_copy(update={"pools": {"shared": shared, "fast": fast}})

    at_source = pools.tokens(config("one"), spec)
    assert set(at_source) == {"shared"}
    pools.must_be_the_same(config("one"), spec, at_source)
    with pytest.raises(DroverError, match="is not the directory") as refused:
        pools.must_be_the_same(config("other"), spec, at_source)
    assert refused.value.reason is RefusalReason.POOL_NOT_FOUND
