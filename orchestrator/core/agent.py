"""The words between agents and those who call them: what an agent is told to do, and what it says about its host.

Statuses and progress are samples: they stream to whoever watches and are never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.core.endpoint import Endpoint
from orchestrator.core.ids import AckRequest, AttemptRef, HostRef
from orchestrator.core.migration import Prepared
from orchestrator.core.offers import Obstacle
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import AttemptReport, DeviceProgress, GuestSpec, MigrationPhase


class RunState(StrEnum):
    """Of a guest, as its users see it."""

    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    """Stopped by the operator's wish."""
    STOPPED = "STOPPED"
    """Stopped by policy or for the switchover."""
    STARTING = "STARTING"
    ENDED = "ENDED"
    UNKNOWN = "UNKNOWN"
    """The owner's agent could not be asked."""


@dataclass(frozen=True, slots=True)
class DiskProgress:
    """One local disk on its way, in a sample."""

    name: str
    way: str
    """Of `core.disks.Copying`: all of it, what was written since an earlier attempt, or a copy that goes on."""
    copied_bytes: int = 0
    """In this attempt, holes included."""
    remaining_bytes: int = 0
    """Grows again while the guest writes to the disk."""
    ready: bool = False
    """Everything is there but for what is being written. The memory begins to go when all disks are."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One sample of one attempt, from its source."""

    transferred_bytes: int = 0
    remaining_bytes: int = 0
    total_bytes: int = 0
    bandwidth_mbps: float = 0.0
    dirty_rate_mbps: float = 0.0
    iteration: int = 0
    expected_downtime_ms: int = 0
    engine_status: str = ""
    """The engine's own word, never a phase."""
    gate_open: bool = False
    pending_acks: tuple[AckRequest, ...] = ()
    eta_s: float = 0.0
    """0 when it cannot be told."""
    devices: tuple[DeviceProgress, ...] = ()
    """Devices inside the VMM."""
    disks: tuple[DiskProgress, ...] = ()
    """Local disks, by name."""


@dataclass(frozen=True, slots=True)
class GuestStatus:
    """One guest that an agent runs."""

    guest: str
    """Uuid."""
    name: str
    inc: str
    run_state: RunState
    pid: int = 0


@dataclass(frozen=True, slots=True)
class CopyStatus:
    """What an agent's host has of one copy of a guest, whoever owns the guest: a VMM process, the process of its
    devices, or what is left of them."""

    guest: str
    """Uuid."""
    name: str
    inc: str
    memory_mib: int
    """What the VMM takes; 0 when it has ended."""
    pid: int
    """0: the VMM has ended."""
    devices_pid: int = 0
    """0: there is no device process, or it has ended."""
    incoming: bool = False
    """Made for an attempt to move the guest here, and not the guest yet."""


class Trouble(StrEnum):
    """Why an agent does nothing about a guest that it holds."""

    NOT_KEPT = "NOT_KEPT"
    """Something failed; it is tried again."""
    UNREADABLE = "UNREADABLE"
    """A record or a note cannot be read, and has to be mended."""
    NO_RECORD = "NO_RECORD"
    """The ledger has lost the guest's record; the guest is left as it is."""
    OLD_RECORD = "OLD_RECORD"
    """The ledger's record is older than what this agent has seen before; the guest is left as it is."""
    FOREIGN_LEDGER = "FOREIGN_LEDGER"
    """The ledger is another one than this host has known, and nobody has announced it; nothing it says is believed."""


@dataclass(frozen=True, slots=True)
class GuestTrouble:
    """One guest that an agent holds and does not keep just now."""

    guest: str
    """Uuid."""
    name: str
    trouble: Trouble
    message: str
    """A sentence: what failed, and what to do where that is known."""


@dataclass(frozen=True, slots=True)
class AttemptStatus:
    """One attempt that an agent takes part in. `phase` is None when the agent's word for it is not known here."""

    ref: AttemptRef
    phase: MigrationPhase | None
    progress: Progress | None = None
    ended: bool = False
    """The attempt is over on this agent."""
    elapsed_ms: float = 0.0
    """Since it began here, by the agent's monotonic clock; 0: not known."""


@dataclass(frozen=True, slots=True)
class AgentSample:
    """One message of WatchAgent. It names what it is about; what it does not name has not changed."""

    guests: tuple[GuestStatus, ...] = ()
    attempts: tuple[AttemptStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """Everything an agent has, at one instant."""

    host: HostRef
    epoch: int
    """Of the coordinator that it obeys, for shard 0."""
    guests: tuple[GuestStatus, ...] = ()
    """Guests that this host owns, as far as is known."""
    attempts: tuple[AttemptStatus, ...] = ()
    copies: tuple[CopyStatus, ...] = ()
    """Every copy of a guest on this host in this power cycle, those of guests that are owned elsewhere included."""
    complete: bool = False
    """`copies` names everything that is there. False: some process, or what the agent wrote down of it, is not known
    yet, so that nothing may be concluded from what is missing."""
    troubles: tuple[GuestTrouble, ...] = ()


@dataclass(frozen=True, slots=True)
class AttemptSeen:
    """What an agent knows about an attempt that it conducts or conducted."""

    known: bool
    ended: bool = False
    report: AttemptReport | None = None


@dataclass(frozen=True, slots=True)
class ConductOrder:
    """Everything the source agent needs to conduct one attempt."""

    attempt: AttemptRef
    epoch: int
    prepared: Prepared
    destination: HostRef
    policy: MigrationPolicy
    previous_reason: str = ""
    shard: int = 0
    """Of the fleet; `epoch` is that shard's."""


@dataclass(frozen=True, slots=True)
class PrepareOrder:
    """Everything a destination agent needs to wait for the stream of one attempt."""

    attempt: AttemptRef
    epoch: int
    source_peer: Endpoint
    """Of the source's PeerService."""
    timeout_ms: int
    multifd_channels: int = 0
    shard: int = 0


@dataclass(frozen=True, slots=True)
class WishApplied:
    """How far an operator's pause or resume got. `applied` False: queued until the hand-over ends."""

    applied: bool
    run_state: RunState


@dataclass(frozen=True, slots=True)
class DisplayAddress:
    """Where a guest's screen is served on its host: at a socket, or at an address with a password."""

    host: str
    socket: str = ""
    address: str = ""
    """IP:port."""
    password: str = ""
    password_valid_s: int = 0
    """Viewers are let in for so long; who is in stays."""


@dataclass(frozen=True, slots=True)
class VmmExamined:
    """The guest that a VMM is which somebody else started, as its host's agent sees it."""

    spec: GuestSpec
    start_time: int
    """Of the process: a recycled pid is another one."""
    running: bool
    obstacles: tuple[Obstacle, ...]
    """Against taking it over; empty: none."""
