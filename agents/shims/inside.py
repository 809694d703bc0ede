"""PURE. What a device inside the VMM tells of itself."""

from __future__ import annotations

from dataclasses import dataclass

ASKS = "asks"
"""How every event begins by which a device demands an ACK."""
INITIAL_SENT = "its initial data is sent"
"""The last that its source knows of an ACK: the VMM tells nobody when the other end gave it."""


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """Something that a device inside the VMM did or was asked. `at_s`: the machine's monotonic clock."""

    at_s: float
    what: str


@dataclass(frozen=True, slots=True)
class InVmmDevice:
    """What a device inside the VMM tells of its present session, or of its last one. The VMM alone drives it."""

    device: str
    session: int
    """Which one in the device's life; 0: none yet."""
    initial_bytes: int = 0
    """Still to be read before it agrees to the switchover."""
    stop_copy_bytes: int = 0
    """What stop-copy would carry now."""
    precopy_sent_bytes: int = 0
    stop_copy_sent_bytes: int = 0
    reinits: int = 0
    """How often it told the VMM of new initial data, each time a demand for another ACK."""
    late: bool = False
    """The last of them came after the VMM had stopped the guest."""
    lost: bool = False
    """The VMM reset it after a failed change of state: it lost what it held."""
    events: tuple[DeviceEvent, ...] = ()
