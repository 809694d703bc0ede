"""Programs of the host that an agent runs to their end: bounded in time, and none of them is left running."""

from __future__ import annotations

import asyncio
import contextlib


class CommandFailed(Exception):
    """It could not be run, failed, or was killed since it took too long; the text says which, with its own words."""

    def __init__(self, said: str, words: str = "") -> None:
        super().__init__(said)
        self.words = words
        """What it wrote to its standard error; empty: it was not run, or not to its end."""


async def ran(*command: str, timeout_s: float, text: str = "") -> str:
    """What the program printed; `text` is its standard input. Raises CommandFailed; it is killed when it takes longer
    than `timeout_s`, and when the caller is cancelled."""
    program = command[0]
    try:
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise CommandFailed(f"cannot run {program}: {error.strerror}") from error
    try:
        async with asyncio.timeout(timeout_s):
            out, words = await child.communicate(text.encode())
    except TimeoutError:
        raise CommandFailed(f"{program} did not end within {timeout_s:g} s") from None
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    if child.returncode:
        told = words.decode(errors="replace").strip()
        raise CommandFailed(f"{program}: {told[-400:] or f'exit status {child.returncode}'}", told)
    return out.decode(errors="replace")
