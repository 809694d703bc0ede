"""Identities that cross process borders."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.record import Record


@dataclass(frozen=True, slots=True)
class HostRef(Record):
    """One power cycle of one host: a host that lost power and came back is a different HostRef (assumption A5)."""

    host: str
    boot_id: str


@dataclass(frozen=True, slots=True)
class AttemptRef:
    """One numbered try of one migration of one guest."""

    guest: str
    """Uuid of the guest's present life, never its name."""
    migration: str
    attempt: int


@dataclass(frozen=True, slots=True, order=True)
class AckRequest(Record):
    """A device's demand for one switchover ACK. The device counts generations; an ACK answers exactly one."""

    device: str
    generation: int
