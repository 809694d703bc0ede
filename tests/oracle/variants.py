"""What the final query's numbers were taken to mean before the form that QEMU 11.1.3 has.

Each takes what the final query found and gives the error text of a failed switchover, or "" to go on. They exist to be
shown wrong (R20, R27); nothing in the product decides by them.
"""

from __future__ import annotations

from deploy.lab.devices.qemu_acks import Final, late_text


def merged(final: Final) -> str:
    """QEMU 11.1.3: what the final query collected itself."""
    return late_text(final.collected) if final.collected else ""


def first_version(final: Final) -> str:
    """As first posted: anything pending after the final query."""
    return late_text(final.pending) if final.pending else ""


def amended(final: Final) -> str:
    """As amended in the same thread: pending after the final query is more than before it."""
    return late_text(final.pending - final.before) if final.pending > final.before else ""
