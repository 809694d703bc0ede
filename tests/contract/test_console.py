"""The console of a real QEMU: it lets one connection in, and `agents.guest.console` makes that several sessions."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agents.guest.console import ConsoleAt, Consoles, Session
from tests.fakes.cluster import short_directory

QEMU = "qemu-system-x86_64"
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed"),
]


@pytest.fixture
async def com1() -> AsyncIterator[Path]:
    """Of a machine whose BIOS finds nothing to boot, says so on its serial port, and begins anew, over and over."""
    directory = short_directory()
    socket = directory / "com1"
    words = [QEMU, "-accel", "tcg", "-M", "pc,graphics=off", "-nodefaults", "-display", "none", "-m", "32"]
    words += ["-boot", "reboot-timeout=100", "-serial", "chardev:console"]
    words += ["-chardev", f"socket,id=console,path={socket},server=on,wait=off"]
    vmm = await asyncio.create_subprocess_exec(*words)
    try:
        yield socket
    finally:
        vmm.kill()
        await vmm.wait()
        shutil.rmtree(directory)


async def heard(session: Session, words: bytes) -> None:
    data = b""
    async with asyncio.timeout(60):
        async for said in session.output():
            data += said.data
            if words in data:
                return
    raise AssertionError(f"the console was closed after {data!r}")


async def test_several_hear_it_and_it_is_free_again_afterwards(com1: Path) -> None:
    known, at = Consoles(), ConsoleAt(com1)
    async with known.attach("i", at) as one, known.attach("i", at) as other:
        await asyncio.gather(heard(one, b"SeaBIOS"), heard(other, b"SeaBIOS"))
        one.type(b"x")
    async with known.attach("i", at) as again:
        await heard(again, b"SeaBIOS")
