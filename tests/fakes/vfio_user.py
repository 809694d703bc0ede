"""The least that QEMU's vfio-user-pci needs of the other end: a PCI device. It never asks about a state."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from enum import IntEnum
from pathlib import Path

_HEADER = struct.Struct("<HHIII")
_NO_REPLY, _IS_REPLY = 0x10, 1
_SAYS = b'{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,"migration":{"pgsize":4096}}}\0'
_CONFIG_REGION, _CONFIG_BYTES = 7, 256


class Command(IntEnum):
    """As in the vfio-user protocol."""

    VERSION = 1
    DMA_MAP = 2
    DEVICE_INFO = 4
    REGION_INFO = 5
    IRQ_INFO = 7
    SET_IRQS = 8
    READ = 9
    WRITE = 10
    FEATURE = 16


class VfioUserDevice:
    """Serves one QEMU. `asked` has the numbers of all commands, in order."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        header = struct.pack("<HHHHBBBB", 0x1234, 0xBEEF, 0, 0, 1, 0, 0, 0xFF)
        self._config = bytearray(header.ljust(_CONFIG_BYTES, b"\0"))
        self._server: asyncio.Server | None = None

    async def start(self, path: Path) -> None:
        self._server = await asyncio.start_unix_server(self._serve, path)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            while True:
                number, command, size, flags, _ = _HEADER.unpack(await reader.readexactly(_HEADER.size))
                asked = bytearray(await reader.readexactly(size - _HEADER.size))
                self.asked.append(command)
                body = self._answer(command, asked)
                if not flags & _NO_REPLY:
                    writer.write(_HEADER.pack(number, command, _HEADER.size + len(body), _IS_REPLY, 0) + body)
                    await writer.drain()

    def _answer(self, command: int, asked: bytearray) -> bytes:
        match command:
            case Command.VERSION:
                return struct.pack("<HH", 0, 0) + _SAYS
            case Command.DEVICE_INFO:
                return struct.pack("<IIII", 16, 3, 9, 5)
            case Command.REGION_INFO:
                (region,) = struct.unpack_from("<I", asked, 8)
                size = _CONFIG_BYTES if region == _CONFIG_REGION else 0
                return struct.pack("<IIIIQQ", 32, 3 if size else 0, region, 0, size, 0)
            case Command.IRQ_INFO:
                return bytes(asked[:12]) + bytes(4)
            case Command.SET_IRQS | Command.DMA_MAP:
                return b""
            case Command.READ:
                offset, region, count = struct.unpack_from("<QII", asked)
                content = bytes(self._config[offset : offset + count]) if region == _CONFIG_REGION else b""
                return bytes(asked) + content.ljust(count, b"\0")
            case Command.WRITE:
                offset, region, count = struct.unpack_from("<QII", asked)
                if region == _CONFIG_REGION:
                    self._config[offset : offset + count] = asked[16 : 16 + count]
                return bytes(asked[:16])
            case _:
                return bytes(asked)
