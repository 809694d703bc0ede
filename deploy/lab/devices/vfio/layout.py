"""PURE. What the preload (preload.c has the same numbers) and the device process agree on.

The descriptors that the preload opens are those of QEMU's command line: agents/engine/qemu/vfio.py.
A question is a header, then its payload; so is an answer. Numbers are in the machine's byte order: both ends run on it.
"""

from __future__ import annotations

import struct
from enum import IntEnum

MAX_DEVICES = 8
"""Inside one VMM."""
FIRST_INDEX = 8
"""Number of a VMM's first such device for the guest; companions have those below (deploy/lab/guest_image/README.md)."""
BAR_BYTES = 4096
CONFIG_OFFSET = 1 << 20
CONFIG_BYTES = 4096
VENDOR, DEVICE = 0x1234, 0xD07E

QUESTION = struct.Struct("=IIII")
"""Kind, number (of the ioctl or the device; bytes wanted by a read), payload length, offset into the BAR."""
ANSWER = struct.Struct("=iIII")
"""Result or minus errno, flags, payload length, nothing."""
OPENS_SESSION = 1
MAX_PAYLOAD = 4 << 20


class Kind(IntEnum):
    """Which call of QEMU's a question passes on; HELLO is the first of each connection and says which device it is
    about."""

    HELLO = 1
    DEVICE_IOCTL = 2
    DATA_IOCTL = 3
    DATA_READ = 4
    DATA_WRITE = 5
    DATA_CLOSE = 6
    BAR_READ = 7
    BAR_WRITE = 8


class Register(IntEnum):
    """Offsets into the BAR, 32 bits each."""

    MAGIC = 0x00
    INDEX = 0x04
    RING = 0x08
    """Write n: doorbell n is rung."""
    ANSWERED = 0x0C
    """The newest doorbell that was answered; 0: none."""
    ANSWER = 0x10


MAGIC = 0x44524F56


def configuration_space() -> bytes:
    """The device's PCI header: one 32-bit memory BAR, no interrupt, no capabilities."""
    header = bytearray(256)
    struct.pack_into("<HHHHBBBBBBBB", header, 0, VENDOR, DEVICE, 0, 0, 1, 0, 0, 0xFF, 0, 0, 0, 0)
    struct.pack_into("<HH", header, 0x2C, VENDOR, DEVICE)
    return bytes(header)
