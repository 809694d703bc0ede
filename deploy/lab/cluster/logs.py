"""Logs that stay bounded although their writers know nothing of it: they have them open for appending."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

MOST_BYTES = 16 << 20
KEPT_BYTES = 4 << 20
"""Of a log that has grown beyond the former, its end is kept as `<name>.1`, and it begins anew."""


def bound(path: Path, most_bytes: int = MOST_BYTES, kept_bytes: int = KEPT_BYTES) -> bool:
    """True: the log was too long. Blocking. Lines that are written at this moment may be lost; nothing is raised.

    Where the end cannot be kept, for the disk is full, the log is emptied all the same: that makes room.
    """
    try:
        if path.stat().st_size <= most_bytes:
            return False
        with contextlib.suppress(OSError), path.open("rb") as log:
            log.seek(-kept_bytes, os.SEEK_END)
            path.with_name(f"{path.name}.1").write_bytes(log.read().partition(b"\n")[2])
        os.truncate(path, 0)
    except OSError:
        return False
    return True
