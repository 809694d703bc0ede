"""Locks on bytes of files as QEMU takes them in images: the open file's and not the process's, gone once it is closed.

All of it may block where another machine serves the file.
"""

from __future__ import annotations

import fcntl
import os
import struct

_FLOCK = struct.Struct("hhqqi4x")
"""`struct flock` of 64-bit Linux: type, whence, start, length, pid."""


def lock_shared(descriptor: int, start: int, length: int) -> None:
    """Nobody else may lock these bytes for himself. Raises OSError."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, start, length, 0))


def is_locked(descriptor: int, start: int, length: int) -> bool:
    """Another open file has a lock on some of these bytes, shared or not. Raises OSError."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    return _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK
