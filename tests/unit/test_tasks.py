"""The owner of background tasks: no exception is mute, nothing is left behind."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from structlog.testing import capture_logs

from orchestrator import tasks as owners
from orchestrator.tasks import Tasks


async def _fails() -> None:
    raise ValueError("broken")


async def test_an_exception_is_logged_and_counted() -> None:
    tasks, before = Tasks("test"), owners.failures["sampler"]
    with capture_logs() as lines:
        tasks.spawn(_fails(), "sampler")
        await asyncio.sleep(0.01)
    assert [(line["event"], line["task"], line["owner"]) for line in lines] == [("a task failed", "sampler", "test")]
    assert isinstance(lines[0]["exc_info"], ValueError)
    assert owners.failures["sampler"] == before + 1
    assert len(tasks) == 0


async def test_an_owner_that_wants_to_know_is_told_instead() -> None:
    tasks, told = Tasks("test"), list[BaseException]()
    with capture_logs() as lines:
        tasks.spawn(_fails(), "server", failed=told.append)
        await asyncio.sleep(0.01)
    assert [str(error) for error in told] == ["broken"]
    assert lines == []


async def test_a_kept_loop_outlives_its_exceptions_and_slows_down_while_they_last() -> None:
    tasks, calls, enough = Tasks("test"), list[float](), asyncio.Event()

    async def scan() -> None:
        calls.append(asyncio.get_running_loop().time())
        if len(calls) <= 3:
            raise OSError("no descriptor")
        enough.set()

    with capture_logs() as lines:
        tasks.keep(scan, "scan", again_s=0.02)
        async with asyncio.timeout(5):
            await enough.wait()
        await tasks.close()
    waits = [after - before for before, after in pairwise(calls)]
    assert len([line for line in lines if line["event"] == "a task failed"]) == 3
    assert waits[2] > waits[0] * 1.5
    assert len(tasks) == 0


async def test_close_ends_all_and_names_what_does_not_end() -> None:
    tasks, ended, let_go = Tasks("test"), list[str](), asyncio.Event()

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("waits")

    async def hangs() -> None:
        while not let_go.is_set():
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                await asyncio.shield(let_go.wait())

    tasks.spawn(waits(), "waits")
    tasks.spawn(hangs(), "hangs")
    await asyncio.sleep(0.01)
    with capture_logs() as lines:
        await tasks.close(within_s=0.05)
    assert ended == ["waits"]
    assert [line["task"] for line in lines] == ["test: hangs"]
    let_go.set()
    await asyncio.sleep(0.01)


async def test_a_closed_owner_begins_nothing() -> None:
    tasks = Tasks("test")
    await tasks.close()
    assert tasks.spawn(_fails(), "late") is None
