"""As much of a VNC viewer as tells whether a screen is served, and to whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from orchestrator.core.endpoint import Endpoint

Where = Path | Endpoint
NONE, PASSWORD = 1, 2
"""Kinds of security."""


class NotLetIn(Exception):
    """In the server's own words."""


@asynccontextmanager
async def viewer(where: Where, password: str = "") -> AsyncGenerator[tuple[str, tuple[int, int]]]:
    """The greeting, and the size of the screen, of a server that lets us in. Raises NotLetIn, and OSError."""
    async with asyncio.timeout(10):
        if isinstance(where, Path):
            reader, writer = await asyncio.open_unix_connection(where)
        else:
            reader, writer = await asyncio.open_connection(where.ip, where.port)
    try:
        async with asyncio.timeout(20):
            yield await _let_in(reader, writer, password)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _let_in(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, password: str
) -> tuple[str, tuple[int, int]]:
    greeting = (await reader.readexactly(12)).decode().strip()
    writer.write(b"RFB 003.008\n")
    kinds = list(await reader.readexactly((await reader.readexactly(1))[0]))
    wanted = PASSWORD if PASSWORD in kinds else NONE
    assert wanted in kinds
    writer.write(bytes([wanted]))
    if wanted == PASSWORD:
        writer.write(await _answer(await reader.readexactly(16), password))
    if await reader.readexactly(4) != bytes(4):
        size = int.from_bytes(await reader.readexactly(4), "big")
        raise NotLetIn((await reader.readexactly(size)).decode())
    writer.write(b"\1")  # others may look as well
    width, height = await reader.readexactly(2), await reader.readexactly(2)
    return greeting, (int.from_bytes(width, "big"), int.from_bytes(height, "big"))


async def _answer(challenge: bytes, password: str) -> bytes:
    """DES, which only VNC still asks for: its key is the password with the bits of each byte the other way round."""
    key = bytes(int(f"{byte:08b}"[::-1], 2) for byte in password.encode()[:8].ljust(8, b"\0"))
    words = ("enc", "-des-ecb", "-K", key.hex(), "-nopad", "-provider", "legacy", "-provider", "default")
    pipe = asyncio.subprocess.PIPE
    made = await asyncio.create_subprocess_exec("openssl", *words, stdin=pipe, stdout=pipe, stderr=pipe)
    answer, said = await made.communicate(challenge)
    assert len(answer) == 16, said
    return answer
