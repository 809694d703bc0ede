"""The guest as a witness: it must see a wrong device answer and a wrong page, and nothing when all is well."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "agents" / "guests" / "image" / "build.sh"
MEMORY_MIB = 64
OPTIONS = "base=4 pages=1024 rate=16 hz=100 hb=5 res=8 dev=2 devhz=10"

pytestmark = [pytest.mark.qemu, pytest.mark.integration]


def guest_hash(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


@dataclass
class Beat:
    beat: int
    sweeps: int
    errors: int
    rings: int
    device_errors: int
    device_retries: int


class Guest:
    """A running guest with two devices that answer on its second port."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.process: asyncio.subprocess.Process | None = None
        self.states = [guest_hash(0xD0000000 + device) for device in range(2)]
        self.last = [(0, 0), (0, 0)]
        self.spoil: Callable[[int, int], int] = lambda device, answer: answer
        self.deaf = False

    async def serve_devices(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            device, ring = (int(word, 16) for word in line.split()[1:])
            if self.deaf:
                continue
            if self.last[device][0] != ring:
                self.states[device] = guest_hash(self.states[device] ^ ring)
                self.last[device] = (ring, self.states[device])
            answer = self.spoil(device, self.last[device][1])
            writer.write(f"A {device:08x} {ring:08x} {answer:08x}\n".encode())
        writer.close()

    async def read_console(self) -> None:
        assert self.process
        assert self.process.stdout
        while line := await self.process.stdout.readline():
            self.lines.append(line.decode(errors="replace").strip())

    def beats(self) -> list[Beat]:
        return [Beat(*(int(word, 16) for word in line.split()[1:])) for line in self.lines if line.startswith("H ")]

    async def until(self, ready: Callable[[], bool], timeout_s: float = 10) -> None:
        async with asyncio.timeout(timeout_s):
            while not ready():  # noqa: ASYNC110 - what is waited for is in another process
                await asyncio.sleep(0.02)

    async def verify(self) -> str:
        assert self.process
        assert self.process.stdin
        before = sum(line.startswith("V ") for line in self.lines)
        self.process.stdin.write(b"v")
        await self.until(lambda: sum(line.startswith("V ") for line in self.lines) > before)
        return [line for line in self.lines if line.startswith("V ")][-1]

    def corrupt(self, page: int) -> None:
        """Flip one word of the page inside the VMM's memory."""
        assert self.process
        pid = self.process.pid
        size = MEMORY_MIB << 20
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
        start = next(low for low, high in spans if high - low == size)
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(start + (4 << 20) + page * 4096 + 2048)
            word = memory.read(4)
            memory.seek(-4, 1)
            memory.write(bytes(byte ^ 0xFF for byte in word))


@asynccontextmanager
async def running_guest(directory: Path) -> AsyncIterator[Guest]:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed (deploy/install-system.sh)")
    image = directory / "guest.elf"
    await asyncio.to_thread(subprocess.run, [BUILD, image], check=True)
    guest = Guest()
    socket = directory / "devices.sock"
    server = await asyncio.start_unix_server(guest.serve_devices, socket)
    guest.process = await asyncio.create_subprocess_exec(
        "qemu-system-x86_64",
        *f"-accel tcg -M pc -m {MEMORY_MIB} -nodefaults -no-user-config -display none -serial stdio".split(),
        *("-chardev", f"socket,id=devices,path={socket}", "-serial", "chardev:devices"),
        *("-kernel", str(image), "-append", OPTIONS),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    console = asyncio.create_task(guest.read_console())
    try:
        await guest.until(lambda: len(guest.beats()) >= 3)
        yield guest
    finally:
        guest.process.kill()
        await guest.process.wait()
        await console
        server.close()


async def test_a_sound_guest_reports_no_error(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        await guest.until(lambda: guest.beats()[-1].rings >= 10)
        assert await guest.verify() == f"V ok {1024 + 8 * 256:08x}"
        last = guest.beats()[-1]
        assert (last.errors, last.device_errors, last.device_retries) == (0, 0, 0)
        numbers = [beat.beat for beat in guest.beats()]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@pytest.mark.parametrize("page", [100, 1024 + 700], ids=["dirtied", "static"])
async def test_a_changed_page_is_found(tmp_path: Path, page: int) -> None:
    async with running_guest(tmp_path) as guest:
        guest.corrupt(page)
        assert await guest.verify() == "V bad 00000001"


async def test_a_wrong_answer_of_a_device_counts_once(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        await guest.until(lambda: guest.beats()[-1].rings >= 4)
        guest.states[1] ^= 1  # state was lost: from here on another device, as far as the guest can tell
        await guest.until(lambda: guest.beats()[-1].device_errors == 1)
        rings = guest.beats()[-1].rings
        await guest.until(lambda: guest.beats()[-1].rings >= rings + 6)
        assert guest.beats()[-1].device_errors == 1
        told = [line.split() for line in guest.lines if line.startswith("D ")]
        assert [int(words[1], 16) for words in told] == [1], told


async def test_a_lost_answer_is_asked_for_again_and_is_no_error(tmp_path: Path) -> None:
    async with running_guest(tmp_path) as guest:
        guest.deaf = True
        await guest.until(lambda: guest.beats()[-1].device_retries >= 1)
        guest.deaf = False
        rings = guest.beats()[-1].rings
        await guest.until(lambda: guest.beats()[-1].rings >= rings + 4)
        assert guest.beats()[-1].device_errors == 0
