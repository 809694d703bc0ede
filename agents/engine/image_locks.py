"""Locks of images, as QEMU takes them: its words about them, and whether a file can be locked at all."""

from __future__ import annotations

import os
from pathlib import Path

from agents.engine.base import DiskLocked, EngineError
from agents.host.byte_locks import is_locked

_BYTE = 100
"""The first that QEMU locks."""


def locked(error: EngineError) -> DiskLocked | None:
    """The same error as the word for an image that somebody else has open; None: it is about something else."""
    said = str(error)
    refused = 'Failed to get "' in said and '" lock' in said
    return DiskLocked(said) if refused or "Failed to lock byte" in said else None


def must_be_lockable(image: Path) -> None:
    """Blocking, for as long as whoever serves the file takes. Raises EngineError where it has no locks, or cannot be
    opened for writing."""
    try:
        descriptor = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        try:
            is_locked(descriptor, _BYTE, 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        said = f"the image {image} cannot be locked: {error.strerror}"
        raise EngineError(f"{said}; mount its pool with locks, or accept `locks: none`") from error
