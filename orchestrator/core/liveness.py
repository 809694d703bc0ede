"""PURE. Whether a process lives: yes, no, or nobody can tell just now. Only the first two may decide anything."""

from __future__ import annotations

from enum import StrEnum


class Liveness(StrEnum):
    """There is no truth value on purpose: `if liveness` would take "unknown" for one of the others."""

    ALIVE = "alive"
    GONE = "gone"
    """For certain: the kernel knows no such process, or has told of its end."""
    UNKNOWN = "unknown"
    """It could not be asked: no descriptor or no memory left, an I/O error. Neither alive nor dead follows from it."""

    def __bool__(self) -> bool:
        raise TypeError("liveness has three values: compare it with one of them")


class LivenessUnknown(Exception):
    """It cannot be told whether a process lives. The text says which process, and which call failed with what.

    Not an OSError, so that no handler of those takes it for "there is no such process".
    """
