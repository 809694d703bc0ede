"""Where one local cluster lives: its directory, the names of its namespaces, its addresses and ports.

Light to import: `drover down` and `drover status` read this and should start at once.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from orchestrator.cli.directory import api_socket, resolved

MAX_DIR_BYTES = 36
"""A UNIX socket's path ends at 107 bytes; Ray's longest one adds 68 to the directory, the consoles' about as many."""

RAY = "ray"
"""Kind of the part that is a Ray head."""
RAY_ADDRESS = "127.0.0.2"
"""Ray replaces 127.0.0.1 by the first interface's address and keeps this one, so its traffic stays on loopback."""

PRIVATE_UMASK = 0o077
"""Of every process of a cluster: consoles, guests' sockets and the ledger's data are nobody else's."""

CLUSTER_VARIABLE = "DROVER_CLUSTER"
HOST_VARIABLE = "DROVER_HOST"
PART_VARIABLE = "DROVER_PART"
"""Set in every process that a cluster starts, and inherited: how a process is recognised after a crash."""


class StopReason(StrEnum):
    """Why a cluster could not start, or could not go on."""

    MISSING_SOFTWARE = "MISSING_SOFTWARE"
    """A program that it needs is not installed."""
    PORT_IN_USE = "PORT_IN_USE"
    """Somebody else listens where a part should."""
    PART_FAILED = "PART_FAILED"
    """A part ended each time that it was started."""
    NOT_READY = "NOT_READY"
    """A part runs and does not serve within the time for starting."""
    SUPERVISOR_FAILED = "SUPERVISOR_FAILED"
    """The cluster process itself ended: a bug, or the machine is out of something."""


class LocalClusterError(Exception):
    """Something about the local cluster that the operator can mend; the text says what is wrong and what to do.

    `sentence` is one line, `detail` what a log says about it (may be empty), and the text is both. `reason` is set for
    a cluster that could not start or go on, `part` if one part is to blame.
    """

    def __init__(self, sentence: str, *, reason: StopReason | None = None, part: str = "", detail: str = "") -> None:
        super().__init__("\n".join(filter(None, (sentence, detail))))
        self.sentence = sentence
        self.reason = reason
        self.part = part
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of one cluster. Everything that it ever writes is below `dir`, apart from its namespaces' names."""

    dir: Path

    @classmethod
    def of(cls, directory: Path | str) -> Layout:
        """The same cluster whichever way its directory is spelt."""
        return cls(resolved(directory))

    def check(self) -> None:
        """Raises LocalClusterError when sockets below the directory would have too long a path."""
        if len(os.fsencode(self.dir)) > MAX_DIR_BYTES:
            raise LocalClusterError(
                f"the directory {self.dir} is too long ({len(os.fsencode(self.dir))} bytes, at most {MAX_DIR_BYTES}): "
                "the sockets below it would exceed what the kernel allows; name a shorter one with --dir or DROVER_DIR"
            )

    @property
    def id(self) -> str:
        """Short name of the cluster, the same for the same directory."""
        return hashlib.sha256(os.fsencode(self.dir)).hexdigest()[:6]

    @property
    def lock(self) -> Path:
        """Held (flock) by whoever starts, runs or ends the cluster; also marks the directory as ours to empty."""
        return self.dir / "lock"

    @property
    def cluster_json(self) -> Path:
        """What runs (`state.py`), written by the supervisor alone."""
        return self.dir / "cluster.json"

    @property
    def config_json(self) -> Path:
        """What the operator asked for: the `LocalConfig` that the supervisor starts with."""
        return self.dir / "local.json"

    @property
    def supervisor_socket(self) -> Path:
        """Where the supervisor takes commands: the power of hosts, the end of the cluster."""
        return self.dir / "supervisor.sock"

    @property
    def supervisor_log(self) -> Path:
        """The supervisor's own log; each part has one beside it."""
        return self.logs / "supervisor.log"

    @property
    def api_socket(self) -> Path:
        """Where the command line finds the API of this cluster without being told."""
        return api_socket(self.dir)

    @property
    def api_json(self) -> Path:
        """Configuration of the API, if there is only one."""
        return self.part_json("api")

    @property
    def coordinator_json(self) -> Path:
        """Configuration of the coordinator, if there is only one."""
        return self.part_json("coordinator")

    def part_json(self, name: str) -> Path:
        """Configuration of a part of the control plane, by its name."""
        return self.dir / f"{name}.json"

    def api_socket_of(self, server: Server) -> Path:
        """The first API has the socket at which a lone one is found."""
        return self.api_socket if server.number <= 1 else self.dir / f"api-{server.number}.sock"

    @property
    def collector_socket(self) -> Path:
        """Of the collector, which holds the consoles of all VMMs and lends them to the agents."""
        return self.dir / "collector.sock"

    @property
    def console(self) -> Path:
        """Directory of links to the consoles of VMMs, one for each, which agents make and the collector connects to."""
        return self.dir / "console"

    @property
    def serial(self) -> Path:
        """Directory of what guests said on their consoles: the collector's files, which the evidence is drawn from."""
        return self.dir / "serial"

    @property
    def logs(self) -> Path:
        """Directory of the logs of all parts, `<part>.log`."""
        return self.dir / "logs"

    def identity(self, kind: str, name: str) -> Path:
        """Directory of a certificate, of a host or a role."""
        return self.dir / "pki" / kind / name

    @property
    def authority(self) -> Path:
        """What has signed them."""
        return self.dir / "pki" / "ca"

    @property
    def quorum_identity(self) -> Path:
        """What servers of the ensemble show each other: of an authority of their own, beside it."""
        return self.dir / "pki" / "quorum" / "server"

    def zookeeper(self, server: Server) -> Path:
        """Configuration and data of that ZooKeeper server."""
        return self.dir / f"zk{server.number or ''}"

    def ray(self, seat: Server) -> Path:
        """Ray's session files for the head that belongs to this coordinator's seat."""
        return self.dir / f"ray{seat.number or ''}"

    def ray_work(self, head: str) -> Path:
        """Where a head's processes are started: by it they are told from those of another head."""
        return self.logs if head == RAY else self.logs / head

    @property
    def ray_token(self) -> Path:
        """What a client shows to the cluster's Ray heads; only its owner may read it."""
        return self.dir / "ray-token"

    @property
    def hosts(self) -> Path:
        """Directory of the hosts' own directories."""
        return self.dir / "hosts"

    def host(self, name: str) -> Path:
        """All files of one host, as its disk; `volatile` in it is the exception."""
        return self.hosts / name

    def agent_json(self, host: str) -> Path:
        """Configuration of the host's agent."""
        return self.host(host) / "agent.json"

    def volatile(self, host: str) -> Path:
        """What the host loses with its power: emptied at a simulated loss. Markers of copies are there."""
        return self.host(host) / "volatile"

    @property
    def shared_pool(self) -> Path:
        """Disk images that every host sees."""
        return self.dir / "pools" / "shared"

    def local_pool(self, host: str) -> Path:
        """Disk images of one host; they outlive a loss of its power."""
        return self.host(host) / "pools" / "fast"

    def power_cycle(self, host: str) -> Path:
        """Holds the id of the host's current power cycle: its boot_id."""
        return self.host(host) / "power_cycle"

    @property
    def namespace_prefix(self) -> str:
        """What the names of this cluster's network namespaces begin with, and no other cluster's."""
        return f"drv{self.id}-"

    @property
    def management_namespace(self) -> str:
        """The network namespace of the lone parts of the control plane."""
        return f"{self.namespace_prefix}m"

    def namespace(self, number: int) -> str:
        """The network namespace of the host with this number."""
        return f"{self.namespace_prefix}h{number}"

    def server_namespace(self, kind: str, number: int) -> str:
        """Of one of several servers of a kind."""
        return f"{self.namespace_prefix}{kind[0]}{number}"


@dataclass(frozen=True, slots=True)
class Server:
    """Where a part of the control plane is reached: a ZooKeeper server, an API, or a coordinator with its Ray head.

    The only one of its kind has the number 0, its kind as its name, and lives in the management namespace; one of
    several has a namespace of its own, where there are namespaces.
    """

    name: str
    number: int
    address: str
    namespace: str | None
    ray_port: int = 6379
    """Of the head of a coordinator's seat."""
    ray_client_port: int = 10001

    @property
    def ray_head(self) -> str:
        """Name of the head that belongs to this seat."""
        return numbered(RAY, self.number)


def numbered(kind: str, number: int) -> str:
    """The name of a part: its kind, and its number where there are several of it (the only one has the number 0)."""
    return f"{kind}-{number}" if number else kind


@dataclass(frozen=True, slots=True)
class HostPlace:
    """Where a simulated host is reached. `namespace` is None where hosts are loopback addresses."""

    name: str
    address: str
    namespace: str | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """The network as it was made, with the ports that its parts listen on."""

    management_address: str
    management_namespace: str | None
    hosts: tuple[HostPlace, ...]
    notes: tuple[str, ...] = field(default=())
    """One line each for whatever could not be had: no namespaces, no bandwidth limit."""
    zookeepers: tuple[Server, ...] = field(default=())
    apis: tuple[Server, ...] = field(default=())
    seats: tuple[Server, ...] = field(default=())
    """Coordinators, each with its Ray head."""
    zookeeper_port: int = 2181
    quorum_port: int = 2888
    election_port: int = 3888
    """What ZooKeeper servers say to each other, when there are several."""
    api_port: int = 7700
    control_port: int = 7701
    peer_port: int = 7702
    api_metrics_port: int = 7704
    coordinator_metrics_port: int = 7705

    @property
    def zookeeper(self) -> str:
        """All ZooKeeper servers as clients are told of them: `host:port,...`."""
        return ",".join(f"{server.address}:{self.zookeeper_port}" for server in self.zookeepers)
