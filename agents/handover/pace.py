"""PURE. How fast the devices of a guest may send while it runs: what `max_bandwidth_mbps` leaves them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Pace:
    """Pieces one after the other at a rate, without bursts. Times in seconds, of one clock of the caller's."""

    bytes_per_s: float
    """0: no bound."""
    free_at_s: float = 0.0
    """When the pieces so far are through at that rate."""

    def wait_s(self, size: int, now_s: float) -> float:
        """How long the next piece, of `size` bytes, has to wait. It counts as sent."""
        if self.bytes_per_s <= 0:
            return 0.0
        begins = max(now_s, self.free_at_s)
        self.free_at_s = begins + size / self.bytes_per_s
        return begins - now_s
