"""The local cluster's supervisor looks after each part by itself, and keeps logs from growing for ever."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from deploy.lab.cluster import config, logs, parts, processes, state, supervisor
from deploy.lab.cluster.consoles import LineFile
from deploy.lab.cluster.parts import PartSpec
from deploy.lab.cluster.state import ClusterState, PartState
from deploy.lab.cluster.supervisor import LocalSupervisor


class Prepare:
    """What is called before each start of the part; it fails as often as it is told to."""

    def __init__(self) -> None:
        self.fails = 0
        self.called = 0

    def __call__(self) -> None:
        self.called += 1
        if self.fails:
            self.fails -= 1
            raise RuntimeError("a bug in what comes before the start")


@contextlib.asynccontextmanager
async def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: Prepare) -> AsyncGenerator[LocalSupervisor]:
    """A supervisor with one part, a sleeping process; that is gone afterwards."""
    monkeypatch.setenv("DROVER_NO_NETNS", "1")
    options = config.make(dir=tmp_path / "c", hosts=1)
    options.layout.logs.mkdir(parents=True)
    sleeper = PartSpec(
        name="sleeper",
        kind="api",
        command=(sys.executable, "-S", "-E", "-c", "import time; time.sleep(600)"),
        environment={},
        directory=options.layout.logs,
        log=options.layout.logs / "sleeper.log",
        probe=parts.always,
        health=parts.always,
        prepare=prepare,
    )

    def nothing(*_: object) -> None:
        pass

    monkeypatch.setattr(parts, "write_files", nothing)
    monkeypatch.setattr(parts, "build", lambda *_: [sleeper])
    tried = LocalSupervisor(options)
    keeping = asyncio.create_task(tried._keep_cluster())
    try:
        await until(lambda: tried._state is ClusterState.READY or keeping.done())
        assert not keeping.done()
        yield tried
        assert not keeping.done()
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        for part in tried._parts.values():
            if part.process:
                processes.send(part.process, supervisor.signal.SIGKILL)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110 - what is waited for is another process
            await asyncio.sleep(0.01)


async def test_a_part_that_cannot_be_looked_after_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Prepare()
    async with kept(tmp_path, monkeypatch, prepare) as tried:
        part = tried._parts["sleeper"]
        first = part.process
        assert first
        prepare.fails = 2
        processes.send(first, supervisor.signal.SIGKILL)
        await until(lambda: part.state is PartState.RUNNING and part.process not in {None, first})
        assert prepare.called == 4


async def test_a_state_file_that_cannot_be_written_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with kept(tmp_path, monkeypatch, Prepare()) as tried:
        layout, part = tried._layout, tried._parts["sleeper"]
        (layout.dir / f".cluster.json.{tried._me.pid}").mkdir()  # in the way of the file that becomes cluster.json
        first = part.process
        assert first
        processes.send(first, supervisor.signal.SIGKILL)
        await until(lambda: part.state is PartState.RUNNING and part.process not in {None, first})
        told = await tried._reply({"op": "status"})
        assert "cluster.json cannot be written" in told["notes"][0]
        current = state.parse(told["record"])
        assert current
        assert current.parts[0].process == part.process
        old = state.read(layout.cluster_json)
        assert old
        assert old.parts[0].process == first
        (layout.dir / f".cluster.json.{tried._me.pid}").rmdir()
        await until(lambda: not tried._unwritten)
        new = state.read(layout.cluster_json)
        assert new
        assert new.parts[0].process == part.process


def test_a_log_that_is_too_long_begins_anew_and_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "api.log"
    with path.open("ab", buffering=0) as writer:
        for number in range(1000):
            writer.write(f"line {number}\n".encode())
        assert not logs.bound(path, most_bytes=20_000, kept_bytes=100)
        assert logs.bound(path, most_bytes=5_000, kept_bytes=100)
        writer.write(b"after\n")
    assert path.read_text() == "after\n"
    kept = (tmp_path / "api.log.1").read_text().splitlines()
    assert kept[-1] == "line 999"
    assert kept[0] == "line 989", "no line is cut"
    assert not logs.bound(tmp_path / "none.log", most_bytes=1, kept_bytes=1)


def test_a_log_is_emptied_also_where_its_end_cannot_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "api.log"
    path.write_text("x" * 10_000)
    (tmp_path / "api.log.1").mkdir()
    assert logs.bound(path, most_bytes=5_000, kept_bytes=100)
    assert path.read_bytes() == b""


def test_a_console_s_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "host-1.web.i1.log"
    file = LineFile(path, most_bytes=1_000)
    for number in range(200):
        file.add(number, "H 1 2 3")
        file.flush()
    file.close()
    kept = [*(tmp_path / f"{path.name}.1").read_text().splitlines(), *path.read_text().splitlines()]
    numbers = [int(line.partition(" ")[0]) for line in kept]
    assert numbers == list(range(numbers[0], 200)), "the newest lines, none lost between the two files"
    assert path.stat().st_size <= 1_100
