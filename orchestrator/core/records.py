"""What the znodes hold, as plain data (docs/protocol.md has the tree). Written and read as JSON by `ledger.records`.

The guest record and its transitions have a file of their own, `handover.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.core.errors import AbortReason, FailureReason
from orchestrator.core.identity import AgentIdentity
from orchestrator.core.ids import AckRequest, HostRef
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.record import OpenWord, Record


class ShimKind(StrEnum):
    """Who holds a device of a guest, and so who moves its state."""

    COMPANION = "companion"
    NET = "net"
    VFIO = "vfio"
    """A device inside the VMM; the VMM moves its state and asks for its ACKs."""
    EXTERNAL = "external"
    """A device that a program of the host holds (docs/shims.md)."""


@dataclass(frozen=True, slots=True)
class DeviceSpec(Record):
    """One device of a guest that takes part in its migration through a shim."""

    name: str
    shim: ShimKind
    dma: str = "none"
    """A companion shim under QEMU must declare `none`: QEMU cannot be told of pages a device wrote."""
    initial_bytes: int = 65_536
    stop_copy_bytes: int = 16_384
    dirty_bytes_per_s: int = 0
    options: dict[str, str] = field(default_factory=dict[str, str])
    """For the device's own program, which alone judges them: opaque to Drover."""
    driver: str = ""
    """Of an external device: which program holds it, by the name that hosts have for it."""


class Firmware(StrEnum):
    """What a VMM runs first."""

    DIRECT = "direct"
    """The guest's kernel itself, which the VMM loads (`kernel`, `initrd`, `append`)."""
    BIOS = "bios"
    UEFI = "uefi"
    """With variables (NVRAM) of the guest's own, which travel with it."""


@dataclass(frozen=True, slots=True)
class Boot(Record):
    """What the VMM starts. Images are named, never given as paths: each host has a directory of them (ADR 0018)."""

    kernel: str = ""
    """Name of an image; empty: the host's default."""
    initrd: str = ""
    """Name of an image; empty: none."""
    append: str = ""
    """The kernel's command line. `${name}` and `${uuid}` in it are the guest's."""
    firmware: Firmware = Firmware.DIRECT
    """Anything but `direct` boots from a disk or the network, and takes no kernel, initrd or command line."""
    nvram: str = ""
    """Name of an image that the guest's UEFI variables are a copy of when it is first started; empty: blank ones."""


class DiskFormat(StrEnum):
    """How a disk's image is laid out."""

    RAW = "raw"
    QCOW2 = "qcow2"


class DiskCache(StrEnum):
    """Whether the host's page cache stands between a guest and its disk."""

    NONE = "none"
    """It does not: what the guest was promised is where every host of a shared pool sees it."""
    WRITEBACK = "writeback"


@dataclass(frozen=True, slots=True)
class DiskSpec(Record):
    """One disk of a guest: an image in a pool. Which directory a pool is, each host's configuration says."""

    name: str
    pool: str
    image: str
    """Name of a file (or of a volume) inside the pool, never a path."""
    format: DiskFormat = DiskFormat.QCOW2
    size_bytes: int = 0
    """Of the disk as the guest sees it. An image that is not there is made with it; 0: the image must be there."""
    cache: DiskCache = DiskCache.NONE
    read_only: bool = False
    boot: bool = False
    """The firmware looks here first."""
    iothread: bool = False
    """Its requests are handled by a thread of their own, beside the one that handles everything else."""
    base: str = ""
    """Name of an image in the same pool that this one lies on, and that nobody writes to: what the disk has not written
    is read from there. Empty: none."""
    base_format: DiskFormat = DiskFormat.QCOW2


@dataclass(frozen=True, slots=True)
class NicSpec(Record):
    """A network card in a network of the hosts. Which bridge a network is, each host's configuration says."""

    name: str
    network: str
    mac: str = ""
    """Empty: one that follows from the guest's uuid and this name, the same at every host."""
    queues: int = 1
    mtu: int = 0
    """What the card tells the guest; 0: nothing."""


@dataclass(frozen=True, slots=True)
class Cpu(Record):
    """The CPU that the guest sees. Always enforced: a host that cannot give all of it does not start the guest."""

    model: str = ""
    """Empty: `qemu64` under tcg, `Nehalem` under kvm."""


@dataclass(frozen=True, slots=True)
class Tpm(Record):
    """A TPM of the guest's own. Its state is its host's and travels with the guest."""

    version: str = "2.0"
    state: str = ""
    """Name of an image that its state is a copy of when the guest is first started: a swtpm's `tpm2-00.permall`.
    Empty: it is a new one."""


@dataclass(frozen=True, slots=True)
class CloudInit(Record):
    """Files of a NoCloud data source, as text. The same bytes at every host."""

    user_data: str
    meta_data: str = ""
    """Empty: instance id and host name, which are the guest's uuid and name."""
    network_config: str = ""


@dataclass(frozen=True, slots=True)
class Display(Record):
    """A screen of the guest's own, and who may look at it."""

    vnc: bool = False
    """Served by VNC on the guest's host, wherever that is. The guest has a graphics card then."""


class OnHostDeath(StrEnum):
    """What becomes of a guest whose host is certified dead."""

    LEAVE = "leave"
    """It stays CRASHED until an operator ends it."""
    RESTART = "restart"
    """It is started elsewhere: a new life under the same name. Only for guests without state on their host."""


@dataclass(frozen=True, slots=True)
class Adopted(Record):
    """The process that a guest was before Drover had it (docs/import.md). Its birth takes that process over, and never
    starts another one."""

    pid: int
    start_time: int
    """Of /proc/<pid>/stat: a recycled pid is another process."""
    qmp: str
    """Unix socket of its monitor, on its host."""


@dataclass(frozen=True, slots=True)
class GuestSpec(Record):
    """Description of a guest, `/guests/<uuid>/spec`. Edited as `core.editing` allows."""

    name: str
    memory_mib: int = 64
    vcpus: int = 1
    machine: str = "pc"
    boot: Boot = Boot()
    devices: tuple[DeviceSpec, ...] = ()
    labels: dict[str, str] = field(default_factory=dict[str, str])
    policy: MigrationPolicy = MigrationPolicy()
    on_host_death: OnHostDeath = OnHostDeath.LEAVE
    cpu: Cpu = Cpu()
    disks: tuple[DiskSpec, ...] = ()
    nics: tuple[NicSpec, ...] = ()
    tpm: Tpm | None = None
    cloud_init: CloudInit | None = None
    extra_args: tuple[str, ...] = ()
    """Options of the VMM, each as one text with its value (`-device virtio-rng-pci`). Only what a host's
    configuration allows, word for word."""
    max_memory_mib: int = 0
    """What its memory can grow to while it runs; 0: not at all."""
    max_vcpus: int = 0
    """What its number of vCPUs can grow to while it runs; 0: not at all."""
    adopted: Adopted | None = None
    """None: Drover started it."""
    display: Display = Display()
    system_uuid: str = ""
    """What the guest reads as its system's uuid (SMBIOS); empty: none."""


@dataclass(frozen=True, slots=True)
class LiveDevice(Record):
    """One device as it is in a guest's machine, by what the guest sees of it. Fixed when it is added."""

    id: str
    """Of the device; unique in the machine."""
    driver: str
    """The VMM's name for its kind."""
    bus: str = ""
    """Id of the bus it is on; empty: the machine's own choice."""
    address: str = ""
    """Its place on the bus."""
    properties: dict[str, str] = field(default_factory=dict[str, str])
    """Everything else that makes it what it is, the same at every host."""
    backend: str = ""
    """What stands behind it on its host: `disk:<name>`, `nic:<name>`, `memory:<name>`, `seed`, `tpm`; empty:
    nothing."""
    memory_mib: int = 0
    """Of a module of memory: how much it adds."""
    leaving: bool = False
    """The guest was asked to let go of it and has not done so yet. It is part of the machine until then."""


@dataclass(frozen=True, slots=True)
class LiveMachine(Record):
    """A guest's machine as it is now: both ends of a migration build it from this, never from the specification."""

    type: str
    """Versioned machine type."""
    cpu: str
    """Model."""
    memory_mib: int
    """It was born with; modules of memory among its devices come on top."""
    vcpus: int
    """It was born with; those among its devices come on top."""
    firmware: Firmware = Firmware.DIRECT
    firmware_sha256: dict[str, str] = field(default_factory=dict[str, str])
    """Role -> content of the firmware's files that the guest was started with."""
    devices: tuple[LiveDevice, ...] = ()
    """In the order in which they are added to the machine."""
    max_memory_mib: int = 0
    """Room for modules of memory up to this much in all; 0: none."""
    max_vcpus: int = 0
    """Sockets for so many vCPUs in all; 0: no more than it was born with."""
    base_sha256: dict[str, str] = field(default_factory=dict[str, str])
    """Disk -> content of the image that its own lies on, as it was when the guest was born."""
    serials: int = 2
    """Serial ports. The first is the guest's console, the second leads to its device process."""
    uuid: str = ""
    """What the guest reads as its system's uuid; empty: none."""
    cpu_definition: str = ""
    """Of a model that is another CPU on each host: what it was where the guest was born, in words."""


class PoolKind(StrEnum):
    """What a pool of disk images is to the hosts."""

    SHARED_FILE = "shared-file"
    """One directory that all of its hosts see (NFS, a cluster file system)."""
    LOCAL = "local"
    """A directory of this host alone: disks in it travel with their guests."""
    BLOCK = "block"
    """Volumes that all of its hosts see as block devices."""


class PoolFence(StrEnum):
    """What keeps a second host from writing to a block volume, whose file locks end at each host."""

    NONE = "none"
    PR = "pr"
    """Persistent reservations of SCSI or NVMe."""
    LVMLOCKD = "lvmlockd"


@dataclass(frozen=True, slots=True)
class Pool(Record):
    """One pool as its host publishes it."""

    name: str
    kind: PoolKind
    fence: PoolFence = PoolFence.NONE
    accepts_no_locks: bool = False
    """The operator lives without the second defence: nothing but the ledger keeps two hosts off one image."""
    size_bytes: int = 0
    free_bytes: int = 0
    """As of the agent's start; `HostSpace` has what moved since."""


class NetworkKind(StrEnum):
    """What carries the frames of a network on its host."""

    BRIDGE = "bridge"
    OVS = "ovs"
    """A bridge of Open vSwitch."""


@dataclass(frozen=True, slots=True)
class Network(Record):
    """One network as its host publishes it."""

    name: str
    kind: NetworkKind = NetworkKind.BRIDGE
    mtu: int = 1500


class HostFeature(StrEnum):
    """What a host can give a guest besides disks and networks. A host of an older version names none."""

    HARDWARE = "HARDWARE"
    """It knows disks, network cards, CPU models, firmware and cloud-init files of a guest at all."""
    TPM = "TPM"
    HOTPLUG = "HOTPLUG"
    """It builds machines with room for more memory and vCPUs, and adds to machines that run."""
    DISK_THREADS = "DISK_THREADS"
    """It knows disks with a thread of their own, and images that lie on others."""
    TAKEN_STATE = "TAKEN_STATE"
    """It begins guests with a uuid of their system, UEFI variables and a TPM that they had elsewhere."""
    SCREENS = "SCREENS"
    """It gives guests a graphics card, and serves what is on it."""


@dataclass(frozen=True, slots=True)
class WantRun(Record):
    """The operator's wish, `/guests/<uuid>/want_run`; its own node so that a pause never moves the record's version."""

    run: bool = True
    by: str = ""
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class HostRecord(Record):
    """`/hosts/<h>`: who the agent there is and what the host can carry."""

    name: str
    boot_id: str
    control_address: str
    """host:port of AgentService for coordinator and API."""
    peer_address: str
    """host:port of PeerService (hand-over calls)."""
    memory_mib: int
    bandwidth_mbps: int
    engine: str = ""
    """Engine and version. Guests move between hosts of one engine only, see `engine_kind`."""
    machine_types: tuple[str, ...] = ()
    accelerator: str = "tcg"
    switchover_ack: str = ""
    machine_aliases: dict[str, str] = field(default_factory=dict[str, str])
    """What names such as `pc` stand for there: another machine type in each version of the engine."""
    identity: AgentIdentity | None = None
    """Of the agent that registered it; None: one of a version that did not say."""
    shims: tuple[str, ...] = ()
    """Drivers of external devices that the host has a program for."""
    pools: tuple[Pool, ...] = ()
    networks: tuple[Network, ...] = ()
    cpu_models: tuple[str, ...] = ()
    """That its VMM can give in full under its accelerator."""
    cpu_definitions: dict[str, str] = field(default_factory=dict[str, str])
    """What models that are another CPU on each host (`host`, `max`) are on this one, in words, by model."""
    firmware: dict[str, str] = field(default_factory=dict[str, str])
    """Role of a file (`bios`, `uefi_code`, `uefi_vars`) -> its SHA-256. Firmware is part of the machine: equal at both
    ends of a migration, or the guest does not move."""
    extra_args: tuple[str, ...] = ()
    """Options of the VMM that guests may ask for here."""
    features: tuple[str, ...] = ()
    """`HostFeature`s, and perhaps words of a newer version."""
    engine_limits: tuple[str, ...] = ()
    """What its engine cannot do that a hand-over would make use of, a sentence each."""


@dataclass(frozen=True, slots=True)
class HostSpace(Record):
    """`/hosts/<h>/space`: what moves of its pools. A node of its own, so that the host's record stays as it is."""

    free_bytes: dict[str, int] = field(default_factory=dict[str, int])
    bases: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    """Pool -> the images in it that others may lie on, each with its SHA-256; those that have been read so far."""


@dataclass(frozen=True, slots=True)
class Cordon(Record):
    """Whether new guests and migrations may go to a host. `why` and `by` (who set it) are empty while it is off."""

    on: bool = False
    why: str = ""
    by: str = ""


class Proof(StrEnum):
    """Why a power cycle is known to be over."""

    RETURNED = "returned"
    """The host itself came back with another boot_id."""
    FENCER = "fencer"
    """A fencer confirmed that the power is off."""
    OPERATOR = "operator"
    """An operator gave their word."""


@dataclass(frozen=True, slots=True)
class Certificate(Record):
    """`/fence/<h>/<boot_id>`: this power cycle is over (H11). That the node exists is the certificate; what it holds is
    for people, and may be empty."""

    proof: Proof = Proof.RETURNED
    by: str = ""
    """Who asked for the declaration, and the fencer that confirmed it."""
    time_s: float = 0.0
    """Wall clock, for people only (A6)."""


class DeathPhase(StrEnum):
    """How far the declaration that a host is dead got."""

    REQUESTED = "REQUESTED"
    FENCING = "FENCING"
    """The fencer was asked to cut the power; it may be asked again."""
    CERTIFIED = "CERTIFIED"
    """The certificate is written; what the host's guests become is being written."""
    DONE = "DONE"
    FAILED = "FAILED"
    """No certificate was written: nothing changed."""

    @property
    def terminal(self) -> bool:
        """The declaration is over, one way or the other."""
        return self in (DeathPhase.DONE, DeathPhase.FAILED)


@dataclass(frozen=True, slots=True)
class HostDeath(Record):
    """`/deaths/<h>`: the newest declaration that a host is dead. The API asks for it, the leader carries it out."""

    host: str
    boot_id: str
    phase: DeathPhase = DeathPhase.REQUESTED
    on_word: bool = False
    """On the operator's word: no fencer is asked."""
    requested_by: str = ""
    fencer: str = ""
    failure: str = ""
    """RefusalReason of a FAILED one."""
    message: str = ""
    crashed: int = 0
    """Guests that this declaration made CRASHED."""
    request_time_s: float = 0.0
    end_time_s: float = 0.0
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class FencerEntry(Record):
    """One fencer, as far as others than the coordinator need to know it."""

    name: str
    kind: str
    hosts: tuple[str, ...]
    """Patterns of host names, `*` and `?` as in a shell."""


@dataclass(frozen=True, slots=True)
class FencerTable(Record):
    """`/fencers`: which fencer serves which host. The first that fits; written by the leader from its configuration."""

    entries: tuple[FencerEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class Reservation(Record):
    """`/hosts/<h>/resv/<migration>`: what is promised to one migration on its way here. Never changed."""

    memory_mib: int = 0
    disk_bytes: dict[str, int] = field(default_factory=dict[str, int])
    """Room in local pools, by pool."""


@dataclass(frozen=True, slots=True)
class Reservations(Record):
    """All that is promised to migrations on their way to one host. Until layout 2 the content of `/hosts/<h>/resv`."""

    memory_mib: dict[str, int] = field(default_factory=dict[str, int])
    """By migration id."""
    disk_bytes: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    """By migration id and pool."""

    @staticmethod
    def of(each: Mapping[str, Reservation]) -> Reservations:
        """By migration id."""
        return Reservations(
            {migration: one.memory_mib for migration, one in each.items()},
            {migration: one.disk_bytes for migration, one in each.items() if one.disk_bytes},
        )

    def each(self) -> dict[str, Reservation]:
        """By migration id."""
        return {
            migration: Reservation(memory_mib, self.disk_bytes.get(migration, {}))
            for migration, memory_mib in self.memory_mib.items()
        }


@dataclass(frozen=True, slots=True)
class Requests(Record):
    """`/migs/<aa>/<m>/req` and `/ack`: newest generation per device, with the attempt that saw it."""

    entries: tuple[AckRequest, ...] = ()
    attempt: int = 0


class MigrationPhase(StrEnum):
    """Of a migration as its users see it. ABORTING and RETRY_WAIT lead back to PREPARING of the next attempt."""

    PENDING = "PENDING"
    PREPARING = "PREPARING"
    PRECOPY = "PRECOPY"
    SWITCHOVER = "SWITCHOVER"
    COMMITTED = "COMMITTED"
    FINALIZING = "FINALIZING"
    ABORTING = "ABORTING"
    RETRY_WAIT = "RETRY_WAIT"
    SUCCEEDED = "SUCCEEDED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"

    @property
    def terminal(self) -> bool:
        """The migration is over; no phase follows."""
        return self in (MigrationPhase.SUCCEEDED, MigrationPhase.CANCELLED, MigrationPhase.FAILED)


@dataclass(frozen=True, slots=True)
class MigrationSpec(Record):
    """`/migs/<aa>/<m>`, immutable."""

    id: str
    guest: str
    guest_name: str
    destination: str = ""
    """Host name; empty: the coordinator places it (and may choose another host for the next attempt)."""
    policy: MigrationPolicy = MigrationPolicy()
    evacuation: str = ""
    requested_by: str = ""
    create_time_s: float = 0.0
    """Wall clock, for people only (A6)."""
    preferred: str = ""
    """Where the evacuation's plan has a place for it; any other host will do."""


class WaitingFor(OpenWord):
    """What holds up a migration that has not begun, or that is between two attempts."""

    PLACE = "PLACE"
    """Its turn: as many migrations as allowed leave its source, or run in the cluster."""
    ROOM = "ROOM"
    """A host that may take its guest now."""
    SOURCE = "SOURCE"
    """The agent of its source, which is silent."""


@dataclass(frozen=True, slots=True)
class MigrationState(Record):
    """`/migs/<aa>/<m>/state`: durable phase. PENDING, ACTIVE-ish phases are coarse here; agents know the fine ones."""

    phase: MigrationPhase = MigrationPhase.PENDING
    attempt: int = 0
    source: str = ""
    destination: str = ""
    cancel_requested: bool = False
    failure: FailureReason | None = None
    message: str = ""
    end_time_s: float = 0.0
    retry_wait_ms: int = 0
    epoch: int = 0
    waiting_for: WaitingFor | None = None
    """`message` says it as a sentence."""
    spent_ms: float = 0.0
    """Of `total_timeout_ms`, from the migration's creation until this was written, on the coordinators' monotonic
    clocks. Time in which no coordinator led is not in it."""
    opened_spent_ms: float | None = None
    """`spent_ms` when the attempt was opened; None: an older version opened it."""


@dataclass(frozen=True, slots=True)
class TimelineEntry(Record):
    """One line of `drover explain`. `at_ms` counts from the attempt's start on the clock of `where`."""

    at_ms: float
    where: str
    event: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class DeviceProgress(Record):
    """One device inside the VMM in one attempt; the VMM moves its state and asks for its ACKs."""

    name: str
    initial_bytes: int = 0
    """Still to be sent before it agrees to the switchover."""
    stop_copy_bytes: int = 0
    """What only goes once the guest has stopped."""
    precopy_sent_bytes: int = 0
    stop_copy_sent_bytes: int = 0
    reinits: int = 0
    """How often it asked for another ACK."""
    late: bool = False
    """The last time after the guest had been stopped."""
    lost: bool = False
    """It was reset and lost its state."""


@dataclass(frozen=True, slots=True)
class AttemptReport(Record):
    """What one attempt came to; kept in `/migs/<aa>/<m>/attempts` after the agents forgot it."""

    attempt: int
    outcome: str
    """COMMITTED or ABORTED."""
    reason: AbortReason | None = None
    devices: tuple[str, ...] = ()
    message: str = ""
    source: str = ""
    destination: str = ""
    inc: str = ""
    zxid: int = 0
    """zxid of the COMMIT or ABORT write."""
    requests: tuple[AckRequest, ...] = ()
    acks: tuple[AckRequest, ...] = ()
    requested_while_stopped: tuple[AckRequest, ...] = ()
    blackout_ms: float = 0.0
    """Freeze until the guest ran again (abort) or until DONE was known (commit), on the source's clock."""
    transferred_bytes: int = 0
    duration_ms: float = 0.0
    ledger_writes: int = 0
    timeline: tuple[TimelineEntry, ...] = ()
    device_progress: tuple[DeviceProgress, ...] = ()
    """Devices inside the VMM, at the attempt's end."""
    needs_operator: bool = False
    """The guest could not be started again at its source: its VMM and memory are kept there, and nothing runs."""


@dataclass(frozen=True, slots=True)
class Attempts(Record):
    """The reports of a migration's attempts, the oldest first."""

    reports: tuple[AttemptReport, ...] = ()


class EvacuationPhase(StrEnum):
    """How far an evacuation got. SUCCEEDED: every guest has left; FAILED: some could not, or the host died; it stays
    cordoned."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"

    @property
    def terminal(self) -> bool:
        """The evacuation is over; no phase follows."""
        return self in (EvacuationPhase.SUCCEEDED, EvacuationPhase.CANCELLED, EvacuationPhase.FAILED)


@dataclass(frozen=True, slots=True)
class EvacuationSpec(Record):
    """`/evac/<job>`, immutable."""

    id: str
    host: str
    max_concurrent: int = 4
    policy: dict[str, int | bool | str] = field(default_factory=dict[str, int | bool | str])
    """Overrides these fields of each guest's own policy (`core.policy.override`)."""
    requested_by: str = ""
    create_time_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EvacuationGuest(Record):
    """One guest of a job. `migration` is empty until its migration was created."""

    guest: str
    name: str
    memory_mib: int
    migration: str = ""
    phase: MigrationPhase = MigrationPhase.PENDING
    destination: str = ""
    failure: FailureReason | None = None
    message: str = ""
    attempts: int = 0
    tries: int = 0
    """Migrations tried for this guest by this job."""


@dataclass(frozen=True, slots=True)
class EvacuationState(Record):
    """`/evac/<job>/state`. `safe_to_power_off` is re-evaluated while the host stays cordoned, also after the end."""

    phase: EvacuationPhase = EvacuationPhase.PENDING
    guests: tuple[EvacuationGuest, ...] = ()
    """Kept in nodes of their own (`ledger.evacuations`); older versions wrote them here."""
    cancel_requested: bool = False
    safe_to_power_off: bool = False
    """As the coordinator saw it while the host's cordon had the version `safe_at`. It holds for as long as the cordon
    has that version: an uncordon takes back what every job ever said, in one write."""
    safe_at: int = -1
    failure: FailureReason | None = None
    message: str = ""
    end_time_s: float = 0.0
    epoch: int = 0
    spent_ms: float = 0.0
    """Since the job's creation, as of the last write, on the coordinators' monotonic clocks."""


@dataclass(frozen=True, slots=True)
class EvacuationGuests(Record):
    """`/evac/<job>/guests-<nnnn>`: some of a job's guests."""

    guests: tuple[EvacuationGuest, ...] = ()


@dataclass(frozen=True, slots=True)
class Leader(Record):
    """`/coord/<shard>/leader` and `/coord/<shard>/epoch`; also `/coord/seats/<name>`."""

    name: str
    """The seat."""
    id: str
    """The process."""
    write: str = ""
    """The campaign: how a winner whose answer was lost recognises its own write."""


@dataclass(frozen=True, slots=True)
class Shards(Record):
    """`/coord/shards`"""

    count: int = 1


@dataclass(frozen=True, slots=True)
class Quarantined(Record):
    """A migration or an evacuation that the leader cannot carry on with. It is tried again, ever more slowly."""

    resource: str
    """migrations/<id> or evacuations/<id>."""
    reason: str
    since_s: float = 0.0
    """Wall clock, for people only."""


@dataclass(frozen=True, slots=True)
class QuarantineList(Record):
    """`/coord/0/quarantine`: the oldest first."""

    entries: tuple[Quarantined, ...] = ()
    left_out: int = 0
    """Set aside as well, but not listed for lack of room."""


@dataclass(frozen=True, slots=True)
class Incarnation(Record):
    """`/cluster/incarnation`: which ledger this is. One that was made anew, or restored from a backup, has another id:
    agents that remember an earlier one believe nothing it says unless it `follows` theirs (docs/adr/0061)."""

    id: str
    follows: tuple[str, ...] = ()
    """Ids of the ledgers in whose place this one was put, by an import that asked the agents what they hold."""
    hosts: tuple[str, ...] = ()
    """Hosts that were asked: to others this ledger is a stranger, whatever it follows."""
    why: str = ""
    """For people: what made it."""
    time_s: float = 0.0
    """Wall clock, for people only (A6)."""


@dataclass(frozen=True, slots=True)
class RequestRecord(Record):
    """`/requests/<request_id>`: makes a create call repeat-safe."""

    operation: str
    """Resource name that the first call created."""
    digest: str
    """Hash of the request; another content under the same id is refused."""
    create_time_s: float = 0.0


def host_ref(record: HostRecord) -> HostRef:
    """The host in the power cycle in which it registered last."""
    return HostRef(record.name, record.boot_id)
