"""The port to whatever can cut a host's power, and prove that it did.

`tests/contract/test_fencers.py` is the contract; every fencer passes the same suite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from orchestrator.core.death import fencer_of
from orchestrator.core.records import FencerEntry, FencerTable


class Power(StrEnum):
    """What is known of a host's power after it was to be cut."""

    OFF = "OFF"
    """Confirmed: whatever ran there before is over."""
    NOT_OFF = "NOT_OFF"
    """The host has power still. It may be off the next moment."""
    UNKNOWN = "UNKNOWN"
    """No answer, an error, or an answer that says nothing. Never taken for OFF."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """A fencer's answer; `said` is one line for people and holds no secret."""

    power: Power
    said: str = ""


class Fencer(Protocol):
    """Cuts the power of hosts and reads back that it is off."""

    async def power_off(self, host: str) -> Fenced:
        """Cut the power of `host` and wait until it is seen to be off.

        OFF only when that was read back from whatever holds the power: an order that was accepted proves nothing, nor
        does an error of any kind. Idempotent: a host that is off already is confirmed OFF. Bounded by the fencer's own
        configuration, in time and in what it keeps of the answers; when it is cancelled it leaves no process behind.
        Never raises for trouble with the device or the host: that is UNKNOWN.
        """
        ...


@dataclass(frozen=True, slots=True)
class Fencers:
    """Which fencer serves which host; the first whose patterns fit."""

    named: Sequence[tuple[FencerEntry, Fencer]] = ()

    @property
    def table(self) -> FencerTable:
        """The same as the ledger has it, for those who only want to know who serves whom."""
        return FencerTable(tuple(entry for entry, _ in self.named))

    def name_for(self, host: str) -> str:
        """Empty: none."""
        return fencer_of(self.table, host)

    async def power_off(self, host: str) -> Fenced:
        """Have the host's fencer do it (`Fencer.power_off`). UNKNOWN for a host that no fencer serves."""
        name = self.name_for(host)
        for entry, fencer in self.named:
            if entry.name == name:
                return await fencer.power_off(host)
        return Fenced(Power.UNKNOWN, f"no fencer is configured for {host}")
