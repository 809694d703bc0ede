"""PURE. What stands against moving a guest, and what an operator can do about it (docs/preflight.md is the table)."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.offers import Obstacle

REMEDIES = {
    RefusalReason.DEVICE_NOT_MIGRATABLE: "take the device out of the guest, or let the guest stay",
    RefusalReason.BLOCK_JOB_RUNNING: "wait for the job's end, or cancel it where it was begun",
    RefusalReason.MACHINE_TYPE_MISMATCH: "a host whose QEMU has it; else start the guest anew with one that all have",
    RefusalReason.CPU_NOT_AVAILABLE: "a host that can give the model; else a model by name that all hosts have",
    RefusalReason.FIRMWARE_NOT_AVAILABLE: "install the same firmware files on both hosts",
    RefusalReason.POOL_NOT_FOUND: "add the pool to that host's configuration, of the same kind",
    RefusalReason.POOL_NOT_FENCED: "declare what fences the pool, or accept `locks: none`",
    RefusalReason.POOL_FULL: "make room in that host's pool",
    RefusalReason.DISK_NOT_MIGRATABLE: "start the guest anew with a disk that has a size, and `cache: none` if shared",
    RefusalReason.BASE_NOT_AVAILABLE: "put the same file into that host's pool, and name it in the pool's `bases`",
    RefusalReason.DISK_NOT_FOUND: "put the image into the pool",
    RefusalReason.NETWORK_NOT_FOUND: "add the network to that host's configuration, with the same MTU",
    RefusalReason.TPM_NOT_AVAILABLE: "install swtpm on that host",
    RefusalReason.EXTRA_ARGS_NOT_ALLOWED: "allow the option in that host's configuration",
    RefusalReason.IMAGE_NOT_FOUND: "put the same file among the images of that host",
    RefusalReason.NOT_ADOPTABLE: "change it in the running VMM, or import the guest at its next power cycle",
    RefusalReason.MONITOR_BUSY: "let go of the monitor: disconnect whatever is connected to it",
    RefusalReason.FEATURE_NOT_AVAILABLE: "upgrade that host's agent",
    RefusalReason.NO_CAPACITY: "free memory there, add a host, or wait (--wait-for-capacity)",
    RefusalReason.HOST_CORDONED: "drover host uncordon HOST",
    RefusalReason.HOST_NOT_LIVE: "look at that host's agent",
    RefusalReason.GUEST_NOT_RUNNING: "nothing: there is nothing left to move",
    RefusalReason.GUEST_IS_MIGRATING: "wait for its migration, or cancel it",
    RefusalReason.AGENT_UNREACHABLE: "look at the agent of the guest's host; what only it knows is not checked",
    RefusalReason.OUTCOME_UNKNOWN: "ask again; a VMM that never answers is a case for docs/operations.md",
}
"""What can be done about an obstacle, by its reason."""

MAX_OBSTACLES = 16
"""Of one guest that are told."""


def remedy(reason: str) -> str:
    """Empty for a reason that nothing is known about, such as one of a newer version."""
    try:
        return REMEDIES.get(RefusalReason(reason), "")
    except ValueError:
        return ""


def certain(obstacle: Obstacle) -> bool:
    """It stands in the way. What was not to be found out may be nothing."""
    return obstacle[0] not in (RefusalReason.AGENT_UNREACHABLE, RefusalReason.OUTCOME_UNKNOWN)


def refused(said: str, against: Sequence[Obstacle]) -> DroverError:
    """A refusal with everything that stands against what was asked for; there is at least one obstacle. It has the
    reason of the first."""
    sentences = "; ".join(sentence for _, sentence in against)
    violations = [(reason.value, sentence) for reason, sentence in against]
    return DroverError(against[0][0], f"{said}: {sentences}", violations=violations)
