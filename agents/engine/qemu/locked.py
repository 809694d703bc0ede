"""What QEMU's own words mean to us about an image that is locked."""

from __future__ import annotations

from agents.engine.base import DiskLocked, EngineError


def locked(error: EngineError) -> DiskLocked | None:
    """The same error as the word for an image that somebody else has open; None: it is about something else."""
    said = str(error)
    refused = 'Failed to get "' in said and '" lock' in said
    return DiskLocked(said) if refused or "Failed to lock byte" in said else None
