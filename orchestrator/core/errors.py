"""Every typed end and refusal of Drover, in one place: the same words in znodes, API errors, CLI and docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from orchestrator.core.record import OpenWord
from orchestrator.core.text import clip, handful


class AbortReason(OpenWord):
    """Why one attempt ended without a commit. Stored in the guest record and in the attempt report."""

    LATE_SWITCHOVER_ACK = "LATE_SWITCHOVER_ACK"
    GATE_CLOSED_AT_CONVERGENCE = "GATE_CLOSED_AT_CONVERGENCE"
    NOT_CONVERGING = "NOT_CONVERGING"
    ACK_TIMEOUT = "ACK_TIMEOUT"
    PREPARE_FAILED = "PREPARE_FAILED"
    PREPARE_TIMEOUT = "PREPARE_TIMEOUT"
    SWITCHOVER_TIMEOUT = "SWITCHOVER_TIMEOUT"
    TOTAL_TIMEOUT = "TOTAL_TIMEOUT"
    CANCELLED = "CANCELLED"
    DESTINATION_LOST = "DESTINATION_LOST"
    DESTINATION_RESTARTED = "DESTINATION_RESTARTED"
    SOURCE_RESTARTED = "SOURCE_RESTARTED"
    SOURCE_UNREACHABLE = "SOURCE_UNREACHABLE"
    """The source's agent fell silent; the guest may well run on there."""
    ENGINE_FAILED = "ENGINE_FAILED"
    SHIM_FAILED = "SHIM_FAILED"
    DEVICE_RESET = "DEVICE_RESET"
    DISK_MIRROR_FAILED = "DISK_MIRROR_FAILED"
    """A local disk could not be copied while the guest ran: destination full or lost, or too slow."""
    DISK_DRAIN = "DISK_DRAIN"
    """The rest of a local disk did not reach the destination in the time that the guest may stand still."""
    GUEST_ENDED = "GUEST_ENDED"
    GUEST_RESUMED = "GUEST_RESUMED"
    """Resumed during pre-copy: devices inside its VMM cannot go back to pre-copy, so this attempt had to end."""
    LEDGER_UNREACHABLE = "LEDGER_UNREACHABLE"
    ROLLED_BACK = "ROLLED_BACK"


class FailureReason(OpenWord):
    """Why a migration or an evacuation ended without success."""

    NO_CAPACITY = "NO_CAPACITY"
    HOST_CORDONED = "HOST_CORDONED"
    HOST_NOT_LIVE = "HOST_NOT_LIVE"
    MACHINE_TYPE_MISMATCH = "MACHINE_TYPE_MISMATCH"
    DESTINATION_NOT_ELIGIBLE = "DESTINATION_NOT_ELIGIBLE"
    NOT_CONVERGING = "NOT_CONVERGING"
    CANCELLED = "CANCELLED"
    ATTEMPTS_EXHAUSTED = "ATTEMPTS_EXHAUSTED"
    TOTAL_TIMEOUT = "TOTAL_TIMEOUT"
    DEVICE_NOT_MIGRATABLE = "DEVICE_NOT_MIGRATABLE"
    DEVICE_RESET = "DEVICE_RESET"
    GUEST_GONE = "GUEST_GONE"
    GUEST_ENDED = "GUEST_ENDED"
    GUEST_CRASHED = "GUEST_CRASHED"
    RETRY_NEEDS_RUN = "RETRY_NEEDS_RUN"
    PAUSED_NEEDS_OPERATOR = "PAUSED_NEEDS_OPERATOR"
    SOURCE_UNREACHABLE = "SOURCE_UNREACHABLE"
    SOME_GUESTS_REMAIN = "SOME_GUESTS_REMAIN"
    HOST_DIED = "HOST_DIED"
    LEDGER_RESTORED = "LEDGER_RESTORED"
    """The ledger was restored from a backup that was made while it was under way."""


class RefusalReason(StrEnum):
    """`google.rpc.ErrorInfo.reason` of a refused call (domain `drover`)."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_REQUIRED = "DEADLINE_REQUIRED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    """The caller has no certificate of this cluster, or one that is revoked."""
    NOT_PERMITTED = "NOT_PERMITTED"
    """The caller's role, or the host that it is, may not do this (docs/security.md)."""
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    GUEST_IS_MIGRATING = "GUEST_IS_MIGRATING"
    GUEST_NOT_RUNNING = "GUEST_NOT_RUNNING"
    GUEST_IS_RUNNING = "GUEST_IS_RUNNING"
    """It can only be done while the guest is stopped and kept."""
    EDIT_STALE = "EDIT_STALE"
    """The guest was edited by somebody else meanwhile: look again, and edit that."""
    HOST_CORDONED = "HOST_CORDONED"
    HOST_NOT_LIVE = "HOST_NOT_LIVE"
    HOST_NAME_TAKEN = "HOST_NAME_TAKEN"
    """The agent may not (any more) act as this host: the name belongs to another installation, machine or session."""
    NO_CAPACITY = "NO_CAPACITY"
    ALREADY_COMMITTED = "ALREADY_COMMITTED"
    ALREADY_ENDED = "ALREADY_ENDED"
    WRONG_ENDPOINT = "WRONG_ENDPOINT"
    """An address that is not what the host has registered: nothing was connected to it."""
    FOREIGN_OWNER = "FOREIGN_OWNER"
    """The ledger gives a guest to a host that its owner never gave it to; the owner keeps its copy."""
    STALE_EPOCH = "STALE_EPOCH"
    STALE_ATTEMPT = "STALE_ATTEMPT"
    BUSY = "BUSY"
    """An earlier attempt is still being ended there: repeat the call in a moment."""
    TOO_MANY_WATCHES = "TOO_MANY_WATCHES"
    SLOW_READER = "SLOW_READER"
    """The watch was ended because its reader did not keep up. Begin another one: it starts with the present state."""
    INSTRUCTIONS_DISABLED = "INSTRUCTIONS_DISABLED"
    """This cluster allows nobody to instruct devices."""
    INSTRUCTION_REFUSED = "INSTRUCTION_REFUSED"
    """The device takes no instructions, or not now; it is as it was."""
    DEVICE_NOT_MIGRATABLE = "DEVICE_NOT_MIGRATABLE"
    BLOCK_JOB_RUNNING = "BLOCK_JOB_RUNNING"
    """Somebody else's job works on a disk of the guest: it would end with the move, half done."""
    MACHINE_TYPE_MISMATCH = "MACHINE_TYPE_MISMATCH"
    OLD_RECORD = "OLD_RECORD"
    """The ledger's record of a guest is missing, or older than what its host has read before: nothing is done."""
    IMAGE_NOT_FOUND = "IMAGE_NOT_FOUND"
    """The host has no image of the name that the guest is to boot."""
    POOL_NOT_FOUND = "POOL_NOT_FOUND"
    """The host has no pool of the name that a disk is in, or one of another kind."""
    POOL_NOT_FENCED = "POOL_NOT_FENCED"
    """Nothing keeps a second host from writing to an image of this pool, and no operator accepted that."""
    POOL_FULL = "POOL_FULL"
    """The host's pool has no room for a disk."""
    DISK_NOT_FOUND = "DISK_NOT_FOUND"
    """The image of a disk is not in its pool, and no size says that it is to be made."""
    DISK_NOT_MIGRATABLE = "DISK_NOT_MIGRATABLE"
    """As it is described the disk cannot go along: it has a cache that another host does not see, or no size."""
    DISK_LOCKED = "DISK_LOCKED"
    """Somebody else holds the lock of a disk's image."""
    NETWORK_NOT_FOUND = "NETWORK_NOT_FOUND"
    """The host has no network of the name that a card is in, or one whose MTU is too small."""
    CPU_NOT_AVAILABLE = "CPU_NOT_AVAILABLE"
    """The host cannot give all of the guest's CPU model."""
    BASE_NOT_AVAILABLE = "BASE_NOT_AVAILABLE"
    """The image that a disk's own lies on is not in the host's pool, or its content is another."""
    FIRMWARE_NOT_AVAILABLE = "FIRMWARE_NOT_AVAILABLE"
    """The host has no such firmware, or another build of it than the guest was started with."""
    TPM_NOT_AVAILABLE = "TPM_NOT_AVAILABLE"
    """The host has no program that emulates a TPM."""
    FEATURE_NOT_AVAILABLE = "FEATURE_NOT_AVAILABLE"
    """The host, or the version of its agent, cannot give the guest something else that it asks for."""
    EXTRA_ARGS_NOT_ALLOWED = "EXTRA_ARGS_NOT_ALLOWED"
    """The host's configuration does not allow an option of the VMM that the guest asks for."""
    CONSOLE_NOT_AVAILABLE = "CONSOLE_NOT_AVAILABLE"
    """Nobody lets the host's agent in at a guest's console, or too many are there."""
    DISPLAY_NOT_AVAILABLE = "DISPLAY_NOT_AVAILABLE"
    """The guest has no screen, or its VMM does not serve it."""
    DEVICE_NOT_RELEASED = "DEVICE_NOT_RELEASED"
    """The guest has not let go of a device that it was asked for: it has all of it, and may still let go later."""
    NOT_ADOPTABLE = "NOT_ADOPTABLE"
    """A process that somebody else started has something that no other VMM can be given."""
    MONITOR_BUSY = "MONITOR_BUSY"
    """The monitor of such a process answers to somebody else, or another one of it does."""
    HOST_DISK_FULL = "HOST_DISK_FULL"
    """The host has no room for the few files of a guest: nothing was begun there."""
    VOLATILE_DIRECTORY_UNSAFE = "VOLATILE_DIRECTORY_UNSAFE"
    RETRY_NEEDS_RUN = "RETRY_NEEDS_RUN"
    FENCER_REQUIRED = "FENCER_REQUIRED"
    """No fencer serves the host: only the operator's own word can declare it dead."""
    NOT_FENCED = "NOT_FENCED"
    """The fencer did not confirm that the power is off."""
    HOST_ALIVE = "HOST_ALIVE"
    """The session of the host's agent lives: it cannot be declared dead or removed."""
    HOST_NOT_EMPTY = "HOST_NOT_EMPTY"
    CONFIRMATION_STALE = "CONFIRMATION_STALE"
    """What was confirmed is no longer so, or the confirmation is too old: look again."""
    NO_HISTORY = "NO_HISTORY"
    """No history file is configured where this is served: what the ledger has forgotten is gone."""
    NOTHING_SAFE = "NOTHING_SAFE"
    """A repair was asked for that is not safe now."""
    OUTCOME_UNKNOWN = "OUTCOME_UNKNOWN"
    LEDGER_UNREACHABLE = "LEDGER_UNREACHABLE"
    AGENT_UNREACHABLE = "AGENT_UNREACHABLE"
    API_UNREACHABLE = "API_UNREACHABLE"
    INTERNAL = "INTERNAL"


class DroverError(Exception):
    """A refusal with a reason that a program can act on and a sentence that a person can.

    `field` names the offending part of a request or file, e.g. `guest.devices[0].name`. `violations` has field and
    sentence of everything that is wrong at once (`invalid` makes such an error). `details` are facts for programs, such
    as the `zxid` of the commit that a cancel came too late for.
    """

    def __init__(
        self,
        reason: RefusalReason,
        message: str,
        *,
        field: str = "",
        violations: Sequence[tuple[str, str]] = (),
        details: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.violations = tuple(violations) or (((field, message),) if field else ())
        self.details = dict(details or {})

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        return f"{where}{self.message} [{self.reason}]"


def invalid(violations: Sequence[tuple[str, str]]) -> DroverError:
    """INVALID_ARGUMENT for everything that is wrong with a request or a file; there is at least one violation.

    The sentence names the first few of them.
    """
    if len(violations) == 1:
        field, message = violations[0]
        return DroverError(RefusalReason.INVALID_ARGUMENT, message, field=field)
    said = handful((clip(f"{field}: {message}") for field, message in violations), "; ")
    return DroverError(
        RefusalReason.INVALID_ARGUMENT, f"{len(violations)} fields are wrong: {said}", violations=violations
    )
