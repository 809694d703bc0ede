"""The port to whatever runs and moves guests. QEMU is behind it today; nothing above knows its commands.

The contract, for every engine (`tests/contract/test_engine.py`):

* All calls are bounded by the engine's own deadlines and raise `EngineError` (definite) or `EngineTimeout` (outcome
  unknown: read `state` again; a destination's VMM may be busy loading for seconds and that is no failure).
* Events are hints: state is re-read after each wait, an edge alone is never trusted.
* A VMM lives in a session of its own and survives the agent; `adopt` finds it again by pid and start time.
* No VMM ever starts vCPUs by itself except: a new guest from `start`; the source after an attempt that failed before it
  was sealed (QEMU resumes it). A destination VMM runs only after `resume`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from orchestrator.core.disks import SourceSide
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.liveness import Liveness
from orchestrator.core.offers import Obstacle
from orchestrator.core.records import DiskCache, DiskFormat, GuestSpec, LiveDevice, LiveMachine, PoolKind


class EngineError(Exception):
    """The engine refused or failed; the text says what and the state is as before unless it says otherwise."""


class ImageNotFound(EngineError):
    """This host has no such image to boot. Nothing was started."""


class DiskLocked(EngineError):
    """Somebody else holds the lock of a disk's image. The guest is as it was; it may be tried again."""


class MonitorBusy(EngineError):
    """The monitor of a VMM that somebody else started answers to somebody else."""


class EngineTimeout(EngineError):
    """No answer in time: the command may have been carried out."""


class GuestHasEnded(EngineError):
    """The guest shut down or panicked by itself. Nothing sets it going again, and nothing has to be tried again."""


class RunState(StrEnum):
    """Of the vCPUs."""

    RUNNING = "running"
    PAUSED = "paused"
    """Stopped by `pause`, or started paused, or a loaded destination."""
    INCOMING = "inmigrate"
    """A destination that has not loaded everything."""
    FINISHING = "finish-migrate"
    """Stopped by the engine for the switchover."""
    SEALED = "postmigrate"
    """Everything was sent; cannot start by itself."""
    ENDED = "shutdown"
    """The guest shut down or panicked; the VMM may still be there."""


class EngineStatus(StrEnum):
    """Of the migration, reduced to what we act on. Words that are not known map to ACTIVE while running."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    PARKED = "pre-switchover"
    DEVICE = "device"
    COMPLETED = "completed"
    CANCELLING = "cancelling"
    FAILING = "failing"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class VmmState:
    """Both facts read together, after which neither may have changed for long: act through the machine, not on this."""

    run_state: RunState
    status: EngineStatus
    error: str = ""
    late_devices: int = 0
    """The migration failed by the VMM's own verdict (see SwitchoverAckLate), whatever else was done to it."""


@dataclass(frozen=True, slots=True)
class StatusChanged:
    """The migration's status became `status`. `error` is what the engine said of a failure; empty: nothing."""

    status: EngineStatus
    error: str = ""


@dataclass(frozen=True, slots=True)
class RunStateChanged:
    """STOP, RESUME: the vCPUs of this VMM stopped or started. `at_s` is the engine's wall-clock stamp, for reports."""

    running: bool
    at_s: float


@dataclass(frozen=True, slots=True)
class SwitchoverAckLate:
    """In place of StatusChanged(FAILED): the VMM ended the migration by itself, because so many devices inside it asked
    for another ACK after it had decided to stop the guest. The guest runs again, or is about to."""

    devices: int


@dataclass(frozen=True, slots=True)
class GuestEnded:
    """The guest shut down or panicked by itself."""

    how: str


@dataclass(frozen=True, slots=True)
class VmmDied:
    """The process is gone."""


@dataclass(frozen=True, slots=True)
class DiskReady:
    """The destination's image of this local disk has all but what is being written: its mirror follows the guest."""

    disk: str


@dataclass(frozen=True, slots=True)
class DiskFailed:
    """The mirror of this local disk has ended by itself. The guest has noticed nothing."""

    disk: str
    error: str


@dataclass(frozen=True, slots=True)
class DeviceGone:
    """The guest has let go of a device (its id) that it was asked for, and nobody waits for that any more."""

    device: str


EngineEvent = (
    StatusChanged | SwitchoverAckLate | RunStateChanged | GuestEnded | VmmDied | DiskReady | DiskFailed | DeviceGone
)
EventSink = Callable[[EngineEvent], None]


@dataclass(frozen=True, slots=True)
class Progress:
    """One sample of an outgoing migration of RAM. `remaining_bytes` still differ from what the destination has, and
    grow again while the guest writes; `iteration` counts the passes over memory; `expected_downtime_ms` is the
    engine's own estimate. All 0 when no migration has run."""

    transferred_bytes: int = 0
    remaining_bytes: int = 0
    total_bytes: int = 0
    bandwidth_mbps: float = 0.0
    dirty_rate_mbps: float = 0.0
    iteration: int = 0
    expected_downtime_ms: int = 0
    status: EngineStatus = EngineStatus.NONE


@dataclass(frozen=True, slots=True)
class DiskCopied:
    """One sample of a local disk on its way. `remaining_bytes` grow again while the guest writes to the disk."""

    copied_bytes: int
    """As in `DiskCopies.sent`, but up to now."""
    remaining_bytes: int
    """Of the mirror or pass that is under way; 0: neither is."""
    ready: bool
    """Everything is there but for what is being written."""


@dataclass(frozen=True, slots=True)
class Nic:
    """A network card of the guest. `device` is its name in the guest's specification."""

    device: str
    mac: str


@dataclass(frozen=True, slots=True)
class Segment:
    """The network that the guests of a cluster share: frames in UDP multicast. The host sends from `host_address`."""

    group: str
    port: int
    host_address: str


@dataclass(frozen=True, slots=True)
class DiskFile:
    """A disk of the guest as this host has it."""

    name: str
    """In the guest's specification."""
    path: Path
    format: DiskFormat
    cache: DiskCache
    read_only: bool
    kind: PoolKind
    size_bytes: int = 0
    """As the guest sees it; 0: what the image says."""
    locks: bool = True
    """A shared image is not opened where it cannot be locked. False: the operator accepts that."""
    base: Path | None = None
    """What the image lies on, which nobody writes to; None: on nothing."""
    base_format: DiskFormat = DiskFormat.QCOW2
    iothread: bool = False
    """The device's requests are handled by a thread of their own."""
    called: str = ""
    """The node, where somebody else named it: in a VMM that was adopted."""

    @property
    def node(self) -> str:
        """The engine's name for what the guest's device writes to; the file below it is `<node>-file`."""
        return self.called or f"disk-{self.name}"

    @property
    def shared(self) -> bool:
        """Other hosts of the pool open the same image; otherwise the disk's content travels with the guest."""
        return self.kind is not PoolKind.LOCAL


@dataclass(frozen=True, slots=True)
class Tap:
    """What carries a network card's frames on this host: an interface that is there already."""

    nic: str
    """In the guest's specification."""
    ifname: str


@dataclass(frozen=True, slots=True)
class FirmwareFiles:
    """What the VMM runs first; all None: its own choice."""

    bios: Path | None = None
    uefi_code: Path | None = None
    nvram: Path | None = None
    """The guest's own variables on this host. Of the right size, even where what is in it comes with the stream."""


@dataclass(frozen=True, slots=True)
class VmmSpec:
    """Everything a VMM process is made of. `directory` is the guest's own below the agent's; it exists."""

    guest: str
    """Uuid."""
    inc: str
    spec: GuestSpec
    directory: Path
    console_path: Path
    """Where whoever listens to COM1 looks for it: a link to the socket, which lies in `directory` under a short name.

    The kernel bounds the paths of sockets (107 bytes), not those of links; this one holds the guest's name."""
    device_path: Path | None
    """Unix socket of the device process that the VMM connects COM2 to; None without companion devices."""
    listen_address: str = ""
    """Destination only: IP address that the stream comes in at."""
    multifd_channels: int = 0
    vfio_path: Path | None = None
    """Unix socket of the device process that holds the devices inside the VMM; None when there are none."""
    nics: tuple[Nic, ...] = ()
    segment: Segment | None = None
    """None: the cards are there and lead nowhere."""
    machine: LiveMachine | None = None
    """The guest's machine as it was put together at its birth, the same at every host. None: a guest without
    `hardware`, whose few devices follow from its specification."""
    disks: tuple[DiskFile, ...] = ()
    taps: tuple[Tap, ...] = ()
    """One per network card; for a card without one frames lead nowhere."""
    firmware: FirmwareFiles = FirmwareFiles()
    tpm_path: Path | None = None
    """Unix socket of the program that emulates the TPM."""
    seed_path: Path | None = None
    """Image of the NoCloud data source."""
    vnc_listen: str = ""
    """IP address that the screen of a guest with one is served at; empty: a unix socket in `directory` alone."""
    tls: StreamTls | None = None
    """Destination only: what the stream comes in by. None: unprotected."""


@dataclass(frozen=True, slots=True)
class VmmMetadata:
    """Written to `<directory>/<inc>.json` before anything can go wrong, read by `adopt` after a restart."""

    guest: str
    inc: str
    pid: int
    start_time: int
    """Of /proc/<pid>/stat: a recycled pid is another process."""
    role: str
    """`owner` or `incoming`."""
    migration: str = ""
    attempt: int = 0
    endpoint: str = ""
    """`tcp:` and what an incoming VMM listens at, as it says itself; `stream_of` reads it."""
    machine: str = ""
    """The machine type that the VMM really has: `pc` is another one in each version."""
    extra: dict[str, str] = field(default_factory=dict[str, str])


def stream_of(metadata: VmmMetadata) -> Endpoint:
    """Where an incoming VMM listens. Raises EngineError when its note says no such thing."""
    try:
        return Endpoint.parse(metadata.endpoint.removeprefix("tcp:"))
    except ValueError as error:
        raise EngineError(f"VMM {metadata.inc} listens at no address: {error}") from error


@dataclass(frozen=True, slots=True)
class StreamTls:
    """With whom a guest's memory and disks are exchanged, and what this host proves itself with."""

    directory: Path
    """This host's certificate, key and authority under the names that QEMU knows: see `host.streams`."""
    peer: str
    """Incoming: subject of the one certificate that may send. Outgoing: the name in the one that may receive."""


class HoldStart(StrEnum):
    """How an outgoing migration starts while the gate is closed (lab 3h)."""

    OPEN = "open"
    """No hold: the gate is open (no devices, or the guest is paused)."""
    TRICKLE = "trickle"
    """Nearly no bandwidth until release: for guests whose RAM is small against their devices' initial state."""
    TAIL = "tail"
    """Full rate until less than `tail_bytes` remain, then a trickle until release."""


def _alone() -> int:
    return 1


@dataclass(frozen=True, slots=True)
class OutgoingOptions:
    """How `start_outgoing` sends the guest: where to, how fast, and how long it may stand still."""

    stream: Endpoint | None
    """Where the destination's VMM listens; None: nothing is to be sent, an attempt is only ended."""
    hold: HoldStart
    tail_bytes: int
    link_bytes_per_s: int
    """Rate of `max-bandwidth` when released."""
    downtime_limit_ms: int
    multifd_channels: int = 0
    auto_converge: bool = False
    sharing: Callable[[], int] = _alone
    """How many outgoing migrations share the link, asked whenever the gate opens (also by a repeated `release`): what
    is left of the guest must fit into the downtime limit at that share of the rate."""
    tls: StreamTls | None = None
    """What the stream goes out by, over one channel or several. None: unprotected."""
    copy: str = ""
    """The destination's copy (`inc`) that the stream is for. An engine that speaks to the agent there names it."""


@dataclass(frozen=True, slots=True)
class DiskTarget:
    """Where a copy of a local disk goes: the export of the very image `image`, which it is called by."""

    disk: str
    image: str
    endpoint: Endpoint
    tls: StreamTls | None = None
    """None: unprotected."""


class DiskCopies(Protocol):
    """The local disks of a VMM on their way to a destination. A target that is full, lost or frozen never stops the
    guest for longer than a second or two: it is cut off, and its copy has failed (DiskFailed)."""

    async def known(self) -> Mapping[str, SourceSide]:
        """What there is of earlier copies, by disk; of all local disks that are written to. Asked of the VMM now."""
        ...

    async def connect_disk(self, target: DiskTarget) -> None:
        """In place of whatever this disk was connected to; a mirror that runs into that very image stays. Raises
        EngineError; the disk is connected to nothing then."""
        ...

    async def start_mirror(self, disk: str) -> None:
        """Copy everything, then follow the guest: DiskReady, or DiskFailed. One that runs is told of again."""
        ...

    async def increment(self, disk: str, since: str) -> None:
        """Send what was written since `mark(since)`, and from then on until the drain; returns when this pass is over.

        Raises EngineError when it failed: what is still to be sent is known as before.
        """
        ...

    async def drain(self, bound_s: float) -> None:
        """The guest stands still: send the rest of all disks and end the copying. Raises EngineError, and
        EngineTimeout when `bound_s` is over; then the targets are cut off, and the images are worth nothing."""
        ...

    async def mark(self, sync: str) -> None:
        """The guest stands still, drained: note all writes from here on under `sync`, in place of earlier notes."""
        ...

    async def sizes(self) -> Mapping[str, int]:
        """Bytes of each local disk that is written to, as the guest sees it. Asked of the VMM now."""
        ...

    def limit(self, bytes_per_s: int) -> None:
        """From here on at most so much is sent of each disk while the guest runs; 0: no bound. A drain has none."""
        ...

    def sent(self) -> Mapping[str, int]:
        """Bytes of each disk that were copied since it was connected last, holes included, those that a mirror goes on
        from left out: up to READY, and once a drain is over all of them."""
        ...

    async def progress(self) -> Mapping[str, DiskCopied]:
        """Of each disk that is connected, or was in this attempt. Asked of the VMM now. Raises EngineError."""
        ...

    async def forget(self) -> None:
        """End all copying, and note writes no longer. Idempotent."""
        ...


class Vmm(Protocol):
    """One VMM process, source or destination."""

    @property
    def disks(self) -> DiskCopies:
        """Of this VMM; empty where it has no local disks."""
        ...

    @property
    def metadata(self) -> VmmMetadata:
        """The note that `adopt` would read now; it changes with `promote`."""
        ...

    def subscribe(self, sink: EventSink) -> Callable[[], None]:
        """Events in order, on the event loop. Returns a function that ends it."""
        ...

    def liveness(self) -> Liveness:
        """Of the process. GONE only when that is certain; UNKNOWN decides nothing. Asks no VMM, takes no descriptor."""
        ...

    async def state(self, timeout_s: float = 2.0) -> VmmState:
        """Both states, asked of the VMM now. Raises EngineTimeout after `timeout_s`."""
        ...

    async def progress(self) -> Progress:
        """Asked of the VMM now. Raises EngineError."""
        ...

    async def unmigratable(self) -> tuple[Obstacle, ...]:
        """Why this VMM's guest cannot move without losing something, a reason and a sentence each; none: it can.

        Devices whose state the VMM would leave behind without a word count as well as those that it refuses to move,
        and so does a job on one of its disks that is not of a migration. Raises EngineError.
        """
        ...

    async def devices(self) -> Mapping[str, str]:
        """Every device that has a name, id -> driver. Asked of the VMM now. Raises EngineError."""
        ...

    async def attach(self, device: LiveDevice, spec: VmmSpec) -> LiveDevice:
        """Add a device to the guest, and what stands behind it; `spec` has the disk, or the card and its tap.

        Returns the device as it is there: a module of memory has its address then. Raises EngineError (DiskLocked),
        and all is as it was; after an EngineTimeout `devices` says whether it is there.
        """
        ...

    async def as_it_is(self, device: LiveDevice) -> LiveDevice:
        """What `attach` would have returned for a device that is there. Raises EngineError."""
        ...

    async def let_go(self, device: LiveDevice, timeout_s: float) -> bool:
        """Ask the guest for a device, and wait. True: it is gone, and so is what stood behind it. False: the guest has
        not let go of it in time, and may do so later (DeviceGone). Idempotent. Raises EngineError."""
        ...

    async def drop(self, device: LiveDevice) -> None:
        """Remove what stood behind a device that is not there. Idempotent. Raises EngineError."""
        ...

    def described(self, spec: VmmSpec) -> None:
        """The VMM is this from now on: its machine and its disks have changed."""
        ...

    async def pause(self) -> None:
        """Operator's or policy's stop, before any switchover. An attempt goes on without its hold (see `release`)."""
        ...

    async def resume(self) -> None:
        """Start the vCPUs (`cont`). Only where the hand-over protocol allows; the engine does not know.

        Raises GuestHasEnded, also where the guest arrived after its end; any other EngineError may pass.
        Refused (EngineError) while a migration runs in a VMM with devices inside: they cannot go back to pre-copy.
        """
        ...

    async def start_outgoing(self, options: OutgoingOptions) -> None:
        """Begin pre-copy. Returns when the engine accepted; what fails later comes as StatusChanged(FAILED).

        Raises EngineError when nobody takes the stream; no migration runs then, and another destination may be tried.
        """
        ...

    async def hold(self) -> None:
        """Gate closed again while the guest runs: keep it in pre-copy. Idempotent. No promise: it may have stopped."""
        ...

    async def release(self) -> None:
        """Gate open: let the engine stop the guest when it converges. Idempotent."""
        ...

    async def proceed(self) -> None:
        """From PARKED to the last pass. Raises EngineError when it is not parked any more."""
        ...

    async def abort(self, timeout_s: float = 5.0) -> VmmState:
        """End the migration unless it is sealed; returns the state read after it is over.

        Afterwards the guest is as it was before the migration stopped it (running, or paused if it had been paused). A
        blocked VMM is freed out of band (`yank`). If it had completed before the abort took effect, the state says
        SEALED/COMPLETED and nothing else happened. No-op when no migration runs.
        """
        ...

    async def take_over(self) -> None:
        """The ledger has given the guest to this loaded VMM: from here on it must outlive the migration that made it,
        and its agent. Nothing runs yet. Idempotent, and without a wait where there is nothing to do.

        Raises EngineError when it cannot be had any more: it never ran then, and is only good for `destroy`.
        """
        ...

    async def promote(self) -> None:
        """An incoming VMM became the guest: note that down for `adopt`. Idempotent. Raises EngineError (disk full)."""
        ...

    async def announce(self) -> None:
        """Tell the network where the guest's MAC address lives now."""
        ...

    async def detach(self) -> None:
        """Let go of the process and leave it as it is, for `adopt` by a later agent. This object is of no use then."""
        ...

    async def destroy(self) -> None:
        """Kill the process and forget it; returns when it is gone. Idempotent."""
        ...


class MigrationEngine(Protocol):
    """Makes VMMs, and finds those again that an earlier agent made."""

    async def probe(self) -> dict[str, str]:
        """`version`, `machine_types` (comma separated), `machine_aliases` (`pc=pc-i440fx-10.0,...`), `switchover_ack`
        (none, legacy, per-device), `accelerator`, `devices_inside` (empty: it cannot have devices inside the VMM),
        `cpu_models` (comma separated, those that it can give in full; empty: it does not say), `cpu_definitions`
        (JSON: what models such as `host` are here, in words, by model; empty or missing: no guest has one of them),
        `limits` (what it cannot do that the hand-over would make use of, a sentence each, separated by `; `; empty or
        missing: nothing), `against_memory` (why no memory is added to a machine that runs; empty or missing: nothing
        stands against it).
        """
        ...

    async def start(self, spec: VmmSpec) -> Vmm:
        """A new guest, running. Raises EngineError with the VMM's words when it does not start; no process is left."""
        ...

    async def prepare_incoming(self, spec: VmmSpec, migration: str, attempt: int) -> Vmm:
        """A paused VMM that listens; `metadata.endpoint` says where. Raises EngineError; no process is left then."""
        ...

    async def adopt(self, metadata: VmmMetadata, spec: VmmSpec) -> Vmm | None:
        """The VMM of an earlier agent process. None: that process is gone (same pid with another start time counts).

        Raises EngineError when it is not gone and does not answer, and when it cannot be told whether it is gone.
        """
        ...


@dataclass(frozen=True, slots=True)
class DisplayAt:
    """Where a guest's screen is served, by one of the two."""

    socket: Path | None = None
    endpoint: Endpoint | None = None


@runtime_checkable
class Displaying(Protocol):
    """A VMM that serves its guest's screen (`GuestSpec.display`)."""

    async def open_display(self, password: str, valid_s: int) -> DisplayAt:
        """Where, asked of the VMM now. At an endpoint viewers get in by `password`, for so long and in place of earlier
        ones, and by nothing before the first call. Raises EngineError when it serves none."""
        ...


ADOPTED_QMP = "adopted_qmp"
"""In `VmmMetadata.extra`: the monitor of a VMM that somebody else started. Its files are not ours."""
ADOPTED_VARIABLES = "adopted_variables"
"""In `VmmMetadata.extra`: the file of the UEFI variables of such a VMM. It is not ours either."""
NODE_OF = "node:"
"""In `VmmMetadata.extra`, before a disk's name: the node of the disk in such a VMM."""
PATH_OF = "path:"
"""In `VmmMetadata.extra`, before a live device's id: its path in such a VMM."""


@runtime_checkable
class AdoptingEngine(Protocol):
    """An engine that can take over VMMs that somebody else started. Each is asked through its own monitor."""

    async def look_at(self, pid: int, monitor: Path) -> Mapping[str, Any]:
        """What such a VMM says of itself; changes nothing. Raises MonitorBusy, and EngineError also when the monitor is
        not that process's."""
        ...

    async def try_out(self, spec: VmmSpec) -> Mapping[str, Any]:
        """The machine that a destination would be given, as a VMM says of itself that is made, asked and ended: in the
        words of `look_at`. No guest runs. Raises EngineError with the VMM's words when it does not start."""
        ...

    async def take_over(self, metadata: VmmMetadata, spec: VmmSpec) -> Vmm:
        """The VMM of a process that `look_at` has seen, as a guest's own from here on; `adopt` finds it later.

        It survives its guest's end, as every VMM of ours does. Raises EngineError; it is let go then.
        """
        ...

    async def let_go(self, vmm: Vmm) -> None:
        """Give such a VMM back: it runs on as it was, and nothing of ours is left. Idempotent. Raises EngineError and
        OSError."""
        ...
