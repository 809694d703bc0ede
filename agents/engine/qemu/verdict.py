"""PURE. What QEMU's own words mean to us: about a failed migration, and about an image that is locked."""

from __future__ import annotations

import re

from agents.engine.base import DiskLocked, EngineError

_LATE = re.compile(r"Switchover ACK was requested by (\d+) devices during switchover")


def late_devices(error: str) -> int | None:
    """How many devices asked for another ACK between QEMU's decision to stop the guest and its last look.

    `error` is the `error-desc` of a migration whose status is `failed`; one that was cancelled before QEMU looked never
    has this text. None: it failed for another reason.
    """
    found = _LATE.fullmatch(error.strip())
    return int(found[1]) if found else None


def locked(error: EngineError) -> DiskLocked | None:
    """The same error as the word for an image that somebody else has open; None: it is about something else."""
    said = str(error)
    refused = 'Failed to get "' in said and '" lock' in said
    return DiskLocked(said) if refused or "Failed to lock byte" in said else None
