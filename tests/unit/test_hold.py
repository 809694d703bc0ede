from __future__ import annotations

from agents.engine.base import HoldStart
from agents.engine.qemu.hold import MINIMUM_TAIL_BYTES, choose_hold
from orchestrator.core.errors import AbortReason

MIB = 1 << 20
GBIT = 125_000_000


def test_small_guest_starts_at_a_trickle() -> None:
    assert choose_hold(64 * MIB, 65_536, GBIT, None) == (HoldStart.TRICKLE, 0)


def test_large_guest_keeps_at_least_half_a_second_of_the_link_as_its_tail() -> None:
    start, tail = choose_hold(8192 * MIB, 65_536, 10 * GBIT, None)
    assert start is HoldStart.TAIL
    assert tail >= 10 * GBIT // 2


def test_slow_link_keeps_the_smallest_tail_that_was_seen_to_hold() -> None:
    assert choose_hold(1024 * MIB, 0, 1_000_000, None) == (HoldStart.TAIL, MINIMUM_TAIL_BYTES)


def test_memory_small_against_the_devices_starts_at_a_trickle() -> None:
    assert choose_hold(1024 * MIB, 900 * MIB, GBIT, None)[0] is HoldStart.TRICKLE


def test_after_a_gate_closed_at_convergence_always_a_trickle() -> None:
    assert choose_hold(8192 * MIB, 0, GBIT, AbortReason.GATE_CLOSED_AT_CONVERGENCE) == (HoldStart.TRICKLE, 0)
