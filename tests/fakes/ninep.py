"""A guest that mounts a directory of its host (9p): its driver's part, played from outside through QEMU's qtest socket
while its vCPUs stand. Its memory is of no use to it afterwards."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

_CONFIG, _DATA = 0xCF8, 0xCFC
_VIRTIO_9P = 0x1009_1AF4
_RING, _REQUEST, _ANSWER = 32 << 20, 33 << 20, 34 << 20
"""Guest-physical."""
_ROOM = 8192
_VERSION, _ATTACH = 100, 104


class Mounter:
    """Of a guest on a `pc`, which the firmware has set up."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._base = 0
        self._turns = 0

    @classmethod
    async def at(cls, socket: Path) -> Mounter:
        return cls(*await asyncio.open_unix_connection(socket))

    def close(self) -> None:
        self._writer.close()

    async def is_set_up(self) -> bool:
        """The firmware has given the device its ports."""
        for slot in range(32):
            if await self._config(slot, 0) == _VIRTIO_9P:
                ports = await self._config(slot, 0x10)
                self._base = ports & ~3
                await self._ask(f"outl {_CONFIG:#x} {0x8000_0000 | slot << 11 | 4:#x}")
                await self._ask(f"outl {_DATA:#x} 0x7")
                return self._base != 0
        return False

    async def mount(self) -> None:
        """As a guest's kernel does: status, a ring, the version, and the root."""
        for status in (0, 1, 3):
            await self._ask(f"outb {self._base + 0x12:#x} {status:#x}")
        await self._ask(f"outl {self._base + 4:#x} 0x0")
        await self._ask(f"outw {self._base + 14:#x} 0x0")
        entries = await self._number(f"inw {self._base + 12:#x}")
        await self._write(_RING, bytes(3 * 4096))
        self._used = (_RING + 16 * entries + 6 + 2 * entries + 4095) & ~4095
        self._available = _RING + 16 * entries
        await self._ask(f"outl {self._base + 8:#x} {_RING >> 12:#x}")
        await self._ask(f"outb {self._base + 0x12:#x} 0x7")
        await self._told(_VERSION, 0xFFFF, struct.pack("<I", _ROOM) + _text("9P2000.L"))
        root = struct.pack("<II", 0, 0xFFFFFFFF) + _text("root") + _text("") + struct.pack("<I", 0)
        await self._told(_ATTACH, 1, root)

    async def _told(self, kind: int, tag: int, body: bytes) -> None:
        request = struct.pack("<IBH", 7 + len(body), kind, tag) + body
        await self._write(_REQUEST, request)
        await self._write(_RING, struct.pack("<QIHHQIHH", _REQUEST, len(request), 1, 1, _ANSWER, _ROOM, 2, 0))
        self._turns += 1
        await self._write(self._available + 4 + 2 * (self._turns - 1), struct.pack("<H", 0))
        await self._write(self._available + 2, struct.pack("<H", self._turns))
        await self._ask(f"outw {self._base + 0x10:#x} 0x0")
        async with asyncio.timeout(20):
            while struct.unpack("<H", await self._read(self._used + 2, 2))[0] != self._turns:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        _, answered, _ = struct.unpack("<IBH", await self._read(_ANSWER, 7))
        assert answered == kind + 1, f"9p answers {answered}"

    async def _config(self, slot: int, offset: int) -> int:
        await self._ask(f"outl {_CONFIG:#x} {0x8000_0000 | slot << 11 | offset:#x}")
        return await self._number(f"inl {_DATA:#x}")

    async def _write(self, address: int, data: bytes) -> None:
        await self._ask(f"write {address:#x} {len(data):#x} 0x{data.hex()}")

    async def _read(self, address: int, size: int) -> bytes:
        return bytes.fromhex((await self._ask(f"read {address:#x} {size:#x}")).removeprefix("0x"))

    async def _number(self, command: str) -> int:
        return int(await self._ask(command), 16)

    async def _ask(self, command: str) -> str:
        self._writer.write(f"{command}\n".encode())
        async with asyncio.timeout(20):
            while True:
                words = (await self._reader.readline()).decode().split()
                if words[:1] == ["OK"]:
                    return words[1] if len(words) > 1 else ""
                assert words[:1] == ["IRQ"], words


def _text(value: str) -> bytes:
    return struct.pack("<H", len(value)) + value.encode()
