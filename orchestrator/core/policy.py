"""What an operator may choose about one migration. Every time is in milliseconds and every wait has a bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from orchestrator.core.record import Record, known_fields


class OnTimeout(StrEnum):
    """What happens at the pre-copy timeout."""

    ABORT = "abort"
    SUSPEND = "suspend"
    """Stop the guest, let the migration finish, run it at the destination (libvirt's default of `--timeout`)."""


@dataclass(frozen=True, slots=True)
class MigrationPolicy(Record):
    """Budgets and retries of one migration. Defaults suit a guest of some GiB on a 1 Gbit/s link."""

    prepare_timeout_ms: int = 15_000
    """Destination VMM ready and attempt bound, else PREPARE_TIMEOUT."""
    precopy_timeout_ms: int = 60_000
    """From the start of pre-copy, or from a resume in it, to the freeze; then `on_timeout`."""
    on_timeout: OnTimeout = OnTimeout.ABORT
    ack_timeout_ms: int = 30_000
    """How long the gate may stay closed for an ACK while the guest runs, each time anew, else ACK_TIMEOUT. The pre-copy
    timeout ends it too."""
    switchover_timeout_ms: int = 5_000
    """From the stop of the guest by the engine to the COMMIT, else SWITCHOVER_TIMEOUT: it runs on at the source."""
    total_timeout_ms: int = 600_000
    """All attempts together; no attempt starts after it."""
    max_attempts: int = 5
    backoff_initial_ms: int = 200
    backoff_max_ms: int = 5_000
    """Delay before attempt k+1: initial * 2^(k-1), at most max, times a jitter of 0.5..1 that the shell draws."""
    downtime_limit_ms: int = 300
    """QEMU's downtime-limit: the engine stops the guest once it believes the rest fits into this."""
    gate_wait_ms: int = 0
    """When the engine parks although the gate is closed: wait this long for the ACK before giving up (0: at once)."""
    max_bandwidth_mbps: int = 0
    """Upper bound of the transfer in Mbit/s; 0 means the host link's rate."""
    multifd_channels: int = 0
    """0 or 1: one stream; n > 1: multifd with n channels."""
    auto_converge: bool = False
    wait_for_capacity: bool = False
    """While no host can take the guest, wait for one that can, up to `total_timeout_ms`; else NO_CAPACITY at once."""


PolicyOverrides = Mapping[str, int | bool | str]
"""Some fields of a policy by name, as they are stored: `on_timeout` by its word."""


def override(policy: MigrationPolicy, given: PolicyOverrides) -> MigrationPolicy:
    """The policy with `given` in place of its own fields. Fields that only a newer version knows are kept as such.

    Raises ValueError for an unknown `on_timeout`.
    """
    known = {each.name for each in known_fields(MigrationPolicy)}
    changed: dict[str, Any] = {name: value for name, value in given.items() if name in known}
    if "on_timeout" in changed:
        changed["on_timeout"] = OnTimeout(changed["on_timeout"])
    newer = {name: value for name, value in given.items() if name not in known}
    return replace(policy, **changed, newer={**policy.newer, **newer})


def backoff_ms(policy: MigrationPolicy, attempt: int) -> int:
    """Upper bound of the pause after `attempt` ended; the shell multiplies by a jitter of 0.5..1."""
    return min(policy.backoff_max_ms, policy.backoff_initial_ms * 2 ** min(attempt - 1, 20))


def policy_errors(policy: MigrationPolicy) -> list[tuple[str, str]]:
    """Field and sentence for everything that is wrong with a policy; empty when it is sound."""
    bad: list[tuple[str, str]] = []
    positive = (
        "prepare_timeout_ms precopy_timeout_ms ack_timeout_ms switchover_timeout_ms total_timeout_ms downtime_limit_ms"
    )
    for name in positive.split():
        if not 1 <= getattr(policy, name) <= 86_400_000:
            bad.append((name, f"must be between 1 and 86400000 ms, not {getattr(policy, name)}"))
    if not 1 <= policy.max_attempts <= 100:
        bad.append(("max_attempts", f"must be between 1 and 100, not {policy.max_attempts}"))
    if not 0 <= policy.backoff_initial_ms <= policy.backoff_max_ms <= 3_600_000:
        bad.append(("backoff_initial_ms", "needs 0 <= backoff_initial_ms <= backoff_max_ms <= 3600000"))
    if not 0 <= policy.gate_wait_ms <= policy.switchover_timeout_ms:
        bad.append(("gate_wait_ms", "must be between 0 and switchover_timeout_ms"))
    if policy.downtime_limit_ms > 2_000_000:
        bad.append(("downtime_limit_ms", "QEMU accepts at most 2000000 ms"))
    if not 0 <= policy.max_bandwidth_mbps <= 1_000_000:
        bad.append(("max_bandwidth_mbps", "must be between 0 (link rate) and 1000000"))
    if not 0 <= policy.multifd_channels <= 255:
        bad.append(("multifd_channels", "must be between 0 and 255"))
    return bad
