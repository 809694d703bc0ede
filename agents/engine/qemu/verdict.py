"""PURE. What QEMU's own words mean to us about a failed migration."""

from __future__ import annotations

import re

_LATE = re.compile(r"Switchover ACK was requested by (\d+) devices during switchover")


def late_devices(error: str) -> int | None:
    """How many devices asked for another ACK between QEMU's decision to stop the guest and its last look.

    `error` is the `error-desc` of a migration whose status is `failed`; one that was cancelled before QEMU looked never
    has this text. None: it failed for another reason.
    """
    found = _LATE.fullmatch(error.strip())
    return int(found[1]) if found else None
