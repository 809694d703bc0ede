"""The agent's configuration file, `agent.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from orchestrator.config import ConfigError, ConfigFile
from orchestrator.core.endpoint import is_ip, zookeeper_servers
from orchestrator.core.guest import name_error
from orchestrator.core.hardware import MAX_MTU, MIN_MTU, extra_arg_error
from orchestrator.core.naming import file_error
from orchestrator.core.records import NetworkKind, PoolFence, PoolKind
from orchestrator.pki.config import Tls

__all__ = ["AgentConfig", "ConfigError", "load"]


def _host_name(name: str) -> str:
    """What the API could not address would be filled by placement and never emptied."""
    if wrong := name_error(name):
        raise ValueError(wrong)
    return name


class IdentityConfig(BaseModel):
    """Where the host's power-cycle id comes from: the kernel, or (simulated hosts share one kernel) a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["kernel", "simulated"] = "kernel"
    """`simulated`: hosts of a lab, which share one kernel, each have a file in place of it."""
    file: Path | None = None
    """Of a simulated host: its power cycle's id and its machine's, a line each."""


_Name = Annotated[str, AfterValidator(_host_name)]


def _extra_arg(argument: str) -> str:
    if wrong := extra_arg_error(argument):
        raise ValueError(wrong)
    return argument


def _image_name(name: str) -> str:
    if wrong := file_error(name, "the pool"):
        raise ValueError(wrong)
    return name


def _vnc_address(address: str) -> str:
    if address and not is_ip(address):
        raise ValueError("must be an IP address of this host")
    return address.strip("[]")


MAX_BASES = 16
"""Of one pool: what a host tells of them is small."""


class PoolConfig(BaseModel):
    """A directory of disk images (or of block devices) that guests' disks may be in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    """An absolute path."""
    kind: PoolKind
    """`shared-file`: all hosts see the same files; `local`: this host's own; `block`: volumes that all hosts see."""
    fence: PoolFence = PoolFence.NONE
    """Of a block pool: what keeps other hosts from writing to a volume that is in use here."""
    locks: Literal["required", "none"] = "required"
    """`none`: the operator accepts that nothing but the ledger keeps two hosts off one image."""
    grace_s: Annotated[int, Field(ge=0)] = 3600
    """How long the image of a disk that has moved away is kept, under another name."""
    bases: Annotated[tuple[Annotated[str, AfterValidator(_image_name)], ...], Field(max_length=MAX_BASES)] = ()
    """Images in it that those of disks may lie on, and that nobody writes to. Their content is read once, and told."""

    @model_validator(mode="after")
    def _bases_are_files(self) -> PoolConfig:
        if self.bases and self.kind is PoolKind.BLOCK:
            raise ValueError("bases are files: a pool of volumes has none")
        return self


class NetworkConfig(BaseModel):
    """A bridge of this host that guests' network cards may be in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bridge: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$")]
    """Its name on this host."""
    kind: NetworkKind = NetworkKind.BRIDGE
    """Of Linux, or of Open vSwitch."""
    mtu: Annotated[int, Field(ge=MIN_MTU, le=MAX_MTU)] = 1500
    """Of the bridge: the same on every host."""


class FirmwareConfig(BaseModel):
    """Files of firmware. None: guests that need it do not run here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uefi_code: Path | None = None
    """Code of a UEFI build with its variables apart (OVMF_CODE_4M.fd)."""
    uefi_vars: Path | None = None
    """What a new guest's variables begin with (OVMF_VARS_4M.fd)."""
    bios: Path | None = None
    """None: what QEMU itself comes with."""

    @model_validator(mode="after")
    def _uefi_is_whole(self) -> FirmwareConfig:
        if (self.uefi_code is None) != (self.uefi_vars is None):
            raise ValueError("uefi_code and uefi_vars belong together: name both, or none")
        return self


class AgentConfig(BaseModel):
    """One host's agent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: Annotated[str, AfterValidator(_host_name)]
    """The host's name: lower-case letters, digits, hyphens."""
    address: Annotated[str, Field(min_length=1)]
    """Where other hosts reach this one: an IP address (IPv6 with or without brackets), or a name for one, looked up
    once at the start. It is registered, and the engines' streams come in there."""
    listen: str = ""
    """What the services and streams listen at, where that is not `address`: an address of this host, or `0.0.0.0` or
    `::` for all."""
    allow_loopback: bool = False
    """The whole cluster is on this machine: `address` may be a loopback address."""
    control_port: Annotated[int, Field(ge=1, le=65535)] = 7701
    """Registered, so that coordinator and API find the agent."""
    peer_port: Annotated[int, Field(ge=1, le=65535)] = 7702
    """Registered, so that other agents do."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 7703
    """Prometheus reads here; 0: not served."""
    zookeeper: Annotated[str, AfterValidator(zookeeper_servers)]
    """`host:port[,host:port...]`; IPv6 addresses in brackets."""
    chroot: str = "/drover/v1"
    """Where the tree stands in ZooKeeper: the same for agents, API and coordinator."""
    tls: Tls | None = None
    """The identity of this host: ZooKeeper, the control plane and other hosts are spoken to by TLS, memory and disks
    between hosts as well, and only with certificates of the same cluster. None: everybody is heard, without TLS."""
    dir: Path
    """The agent's own: guests' sockets and notes, journal. Survives a restart of the agent and a loss of power."""
    console_dir: Path
    """Links to the sockets of the guests' consoles, `<host>.<guest>.<inc>.sock`."""
    console_server: Path | None = None
    """Unix socket of a console server of this host, which holds every console below `console_dir` and lends them
    (docs/operations.md). None: the agent connects to a console itself while somebody has a session with it."""
    volatile_dir: Path
    """Markers. Must vanish with the power."""
    identity: IdentityConfig = IdentityConfig()
    """Where the host's power-cycle id comes from."""
    memory_mib: Annotated[int, Field(ge=1)]
    """Memory for guests."""
    bandwidth_mbps: Annotated[int, Field(ge=1)] = 1000
    """Rate of the link that migrations use."""
    accelerator: Literal["tcg", "kvm"] = "kvm"
    """`tcg`: without virtualization in hardware, for labs."""
    engine: Literal["qemu", "libvirt"] = "qemu"
    """What runs this host's guests: QEMU processes of the agent's own, or a libvirt daemon (docs/libvirt.md). Guests
    move between hosts of one engine only."""
    libvirt_socket: Path = Path("/run/libvirt/libvirt-sock")
    """Where that daemon listens (`virtqemud-sock` where the daemons are split). Only with the engine libvirt."""
    qemu: str = "qemu-system-x86_64"
    """QEMU's program: a name that is found in PATH, or a path."""
    guest_image: Path | None = None
    """The kernel of guests that name none. None: each guest must name one."""
    images: Path | None = None
    """Directory of the images that guests may name (`boot.kernel`, `boot.initrd`). None: no guest may name one."""
    vfio_preload: Path | None = None
    """What gives QEMU devices inside the VMM on a machine without VFIO; None: no guest with such devices runs here."""
    device_program: tuple[str, ...] = ()
    """The command that holds the devices of one VMM (docs/shims.md); empty: no guest with devices runs here."""
    shims: dict[str, Path] = {}
    """Programs of this host that hold external devices: the name that guests use (`driver`) -> unix socket."""
    pools: dict[_Name, PoolConfig] = {}
    """Where disks of guests may be, by the name that guests use."""
    networks: dict[_Name, NetworkConfig] = {}
    """Bridges that network cards of guests may be in, by the name that guests use."""
    firmware: FirmwareConfig = FirmwareConfig()
    extra_args_allowed: tuple[Annotated[str, AfterValidator(_extra_arg)], ...] = ()
    """Options of QEMU that guests may ask for, each with its value, word for word. The same on every host."""
    vnc_listen: Annotated[str, AfterValidator(_vnc_address)] = ""
    """IP address of this host at which the screens of its guests are served, each with a password of its own that a
    viewer asks for first (`drover guest vnc`). Empty: at unix sockets below `dir` only."""
    instructions: bool = False
    """Whether devices may be instructed on request: a device that is told to misbehave does."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lines are JSON, on standard error."""

    @model_validator(mode="after")
    def _ports_differ(self) -> AgentConfig:
        ports = [port for port in (self.control_port, self.peer_port, self.metrics_port) if port]
        if len(set(ports)) < len(ports):
            raise ValueError("control_port, peer_port and metrics_port must differ")
        return self


FILE = ConfigFile("agent", AgentConfig)


def load(path: Path) -> AgentConfig:
    """Raises ConfigError naming every key that is wrong."""
    return FILE.load(path)
