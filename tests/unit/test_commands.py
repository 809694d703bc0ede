"""Programs that an agent runs to their end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agents.host.commands import CommandFailed, ran


async def test_what_it_prints_is_returned() -> None:
    assert await ran("sh", "-c", "read word; echo got $word; echo noise >&2", timeout_s=10, text="it\n") == "got it\n"


@pytest.mark.parametrize(
    ("command", "said", "words"),
    [
        (("sh", "-c", "echo no room >&2; exit 3"), "sh: no room", "no room"),
        (("sh", "-c", "exit 3"), "sh: exit status 3", ""),
        (("no-such-program",), "cannot run no-such-program: No such file or directory", ""),
        (("sleep", "60"), "sleep did not end within 0.2 s", ""),
    ],
)
async def test_what_went_wrong_is_said(command: tuple[str, ...], said: str, words: str) -> None:
    with pytest.raises(CommandFailed) as raised:
        await ran(*command, timeout_s=0.2 if command[0] == "sleep" else 10)
    assert (str(raised.value), raised.value.words) == (said, words)


async def test_it_does_not_outlive_a_caller_who_is_cancelled(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    running = asyncio.create_task(ran("sh", "-c", f"echo $$ > {note}; exec sleep 60", timeout_s=60))
    async with asyncio.timeout(10):
        while not note.exists() or not note.read_text().strip():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not Path(f"/proc/{note.read_text().strip()}").exists()
