"""How an outgoing migration is held while the devices' gate is closed: a decision without effects (lab figures)."""

from __future__ import annotations

from agents.engine.base import HoldStart
from orchestrator.core.errors import AbortReason

MINIMUM_TAIL_BYTES = 64 << 20
"""Smaller tails were skipped over: zero pages at the end of RAM cost nothing, so polls miss the end."""

TAIL_SECONDS = 0.5


def choose_hold(
    memory_bytes: int, initial_bytes: int, link_bytes_per_s: int, previous_reason: AbortReason | None
) -> tuple[HoldStart, int]:
    """TRICKLE, or TAIL with the remaining bytes at which the full rate ends (0 for TRICKLE).

    `initial_bytes` is what the devices still have to send before their gate opens, `previous_reason` why the attempt
    before this one ended. A tail must outlast both the poller and the devices' initial state, else the guest is
    stopped with the gate closed; guests that are not at least twice the tail start at a trickle.
    """
    tail = max(MINIMUM_TAIL_BYTES, int(link_bytes_per_s * TAIL_SECONDS), initial_bytes)
    if previous_reason is AbortReason.GATE_CLOSED_AT_CONVERGENCE or memory_bytes < 2 * tail:
        return HoldStart.TRICKLE, 0
    return HoldStart.TAIL, tail
