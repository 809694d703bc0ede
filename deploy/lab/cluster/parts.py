"""The parts of a local cluster: how each is configured, started, waited for and asked how it is."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orchestrator
from deploy.lab.cluster import identities, network, ray_head, zookeeper
from deploy.lab.cluster.config import LocalConfig, PartKind
from deploy.lab.cluster.layout import (
    CLUSTER_VARIABLE,
    HOST_VARIABLE,
    PART_VARIABLE,
    RAY_ADDRESS,
    HostPlace,
    Layout,
    LocalClusterError,
    Places,
    Server,
)
from deploy.lab.cluster.state import write_atomically
from deploy.lab.devices import PROGRAM
from orchestrator.core.endpoint import is_loopback, join_address
from orchestrator.ledger import paths
from orchestrator.pki.names import Role

if TYPE_CHECKING:
    from orchestrator.rpc.messages import ClusterHealth

RAY_NAMESPACE = "drover"
GUEST_IMAGE_VARIABLE = "DROVER_GUEST_IMAGE"
NETWORK = "lab"
"""The network of the guests, as guest files call it."""
SHARED_POOL, LOCAL_POOL = "shared", "fast"
"""The pools of the simulated hosts, as guest files call them."""

Probe = Callable[[], Awaitable[str | None]]
"""None: it serves; otherwise what is wrong, in a few words."""


@dataclass(frozen=True, slots=True)
class PartSpec:
    """One process that the supervisor keeps."""

    name: str
    kind: PartKind
    command: tuple[str, ...]
    environment: dict[str, str]
    directory: Path
    log: Path
    probe: Probe
    health: Probe
    """As `probe`, but it may take longer and look deeper."""
    host: str | None = None
    after: tuple[tuple[str, ...], ...] = ()
    """Of each of these groups of parts one must serve before this one is started."""
    partner: str = ""
    """Of a Ray head its coordinator, and the other way round."""
    prepare: Callable[[], None] | None = None
    """Called before each start."""
    listens: tuple[tuple[str, int], ...] = ()
    """Address and port of each TCP socket that nobody else may have when it starts."""
    watched: bool = False
    """Its process may outlive what it is there for: kill it when `probe` goes on failing."""


def package_root() -> Path:
    """The directory that holds the packages: the repository, or site-packages."""
    return Path(orchestrator.__file__ or "").resolve().parent.parent


def guest_image(config: LocalConfig, layout: Layout) -> tuple[Path, Path | None]:
    """The image that guests run, and the script that builds it (None: it is the operator's own and must be there)."""
    own = config.guest_image or os.environ.get(GUEST_IMAGE_VARIABLE)
    if own:
        image = Path(own).expanduser().resolve()
        if not image.is_file():
            raise LocalClusterError(
                f"the guest image {image} does not exist; name another or leave it out to build ours"
            )
        return image, None
    root = package_root()
    script = root / "deploy" / "lab" / "guest_image" / "build.sh"
    if not script.is_file():
        raise LocalClusterError(f"{script} is missing: name a guest image with {GUEST_IMAGE_VARIABLE}=FILE")
    return _build_directory(layout) / "guest.elf", script


def vfio_preload(layout: Layout) -> tuple[Path, Path]:
    """What gives QEMU devices on a machine without VFIO, and the script that builds it."""
    return _build_directory(
        layout
    ) / "vfio-preload.so", package_root() / "deploy" / "lab" / "devices" / "vfio" / "build.sh"


def linux_guest(layout: Layout) -> tuple[Path, Path]:
    """The directory of the Linux guest's images, and the script that makes them, which needs the network."""
    return _build_directory(layout) / "linux", package_root() / "deploy" / "lab" / "linux_guest" / "build.sh"


def _build_directory(layout: Layout) -> Path:
    root = package_root()
    in_repository = (root / "pyproject.toml").is_file() and os.access(root, os.W_OK)
    return root / "build" if in_repository else layout.dir


def write_files(config: LocalConfig, layout: Layout, places: Places) -> None:
    """Make the directories and write every part's configuration."""
    work = (layout.ray_work(seat.ray_head) for seat in places.seats)
    heads = (layout.ray(seat) for seat in places.seats)
    for folder in (layout.logs, layout.console, layout.serial, *heads, *work):
        folder.mkdir(parents=True, exist_ok=True)
    if config.tls:
        identities.make(layout, places)
    for server in places.zookeepers:
        zookeeper.prepare(layout, places, server, tls=config.tls)
    image, _ = guest_image(config, layout)
    for place in places.hosts:
        layout.volatile(place.name).mkdir(parents=True, exist_ok=True)
        if not layout.power_cycle(place.name).exists():
            new_power_cycle(layout, place.name)
        _write_json(layout.agent_json(place.name), _agent(config, layout, places, place, image))
    for server in places.apis:
        _write_json(layout.part_json(server.name), _api(config, layout, places, server))
    ray_head.token(layout)
    for seat in places.seats:
        _write_json(layout.part_json(seat.name), _coordinator(config, layout, places, seat))


def _api(config: LocalConfig, layout: Layout, places: Places, server: Server) -> dict[str, Any]:
    return {
        "listen": [f"unix:{layout.api_socket_of(server)}", f"{server.address}:{places.api_port}"],
        "zookeeper": places.zookeeper,
        "chroot": paths.CHROOT,
        **_tls(config, layout, "role", Role.API),
        "instructions": config.chaos,
        "metrics_listen": join_address(server.address, places.api_metrics_port),
        "log_level": config.log_level,
    }


def _coordinator(config: LocalConfig, layout: Layout, places: Places, seat: Server) -> dict[str, Any]:
    return {
        "name": seat.name,
        "shards": config.shards,
        "zookeeper": places.zookeeper,
        "chroot": paths.CHROOT,
        **_tls(config, layout, "role", Role.COORDINATOR),
        "ray_address": f"{RAY_ADDRESS}:{seat.ray_port}",
        "ray_token_file": str(layout.ray_token),
        "ray_namespace": RAY_NAMESPACE,
        "workers": config.workers,
        "metrics_listen": join_address(seat.address, places.coordinator_metrics_port),
        "log_level": config.log_level,
        "limits": {
            "starts_per_s": config.start_rate_per_s,
            "max_concurrent": config.max_concurrent_migrations,
            "max_per_source": config.max_per_source,
        },
        "fencing": [
            {
                "name": "lab",
                "kind": "exec",
                "hosts": ["*"],
                "command": [sys.executable, "-m", "deploy.lab.cluster.fence", "--dir", str(layout.dir)],
            }
        ],
    }


def _tls(config: LocalConfig, layout: Layout, kind: str, name: str) -> dict[str, Any]:
    return {"tls": {"directory": str(layout.identity(kind, name))}} if config.tls else {}


def _agent(config: LocalConfig, layout: Layout, places: Places, place: HostPlace, image: Path) -> dict[str, Any]:
    return {
        "host": place.name,
        "address": place.address,
        "allow_loopback": is_loopback(place.address),  # without namespaces all hosts are addresses of this machine
        "control_port": places.control_port,
        "peer_port": places.peer_port,
        "zookeeper": places.zookeeper,
        "chroot": paths.CHROOT,
        **_tls(config, layout, "host", place.name),
        "dir": str(layout.host(place.name)),
        "console_dir": str(layout.console),
        "console_server": str(layout.collector_socket),
        "volatile_dir": str(layout.volatile(place.name)),
        "identity": {"kind": "simulated", "file": str(layout.power_cycle(place.name))},
        "memory_mib": config.memory_mib,
        "bandwidth_mbps": config.bandwidth_bps // 10**6,
        "accelerator": config.accelerator,
        "device_program": PROGRAM,
        "shims": {name: socket.format(host=place.name) for name, socket in config.shims.items()},
        "qemu": config.qemu_on.get(place.name, config.qemu),
        **_libvirt(config, place.name),
        "guest_image": str(image),
        "images": str(_images(config, layout)),
        "pools": _pools(layout, place.name),
        "firmware": _firmware(),
        "networks": {NETWORK: _guest_network()} if place.namespace else {},
        "vfio_preload": str(vfio_preload(layout)[0]),
        "instructions": config.chaos,
        "log_level": config.log_level,
    }


def _libvirt(config: LocalConfig, host: str) -> dict[str, Any]:
    socket = config.libvirt_on.get(host)
    return {} if socket is None else {"engine": "libvirt", "libvirt_socket": str(socket)}


def _images(config: LocalConfig, layout: Layout) -> Path:
    """What guests may name: the operator's images, else those of the Linux guest, which may not have been made."""
    return config.images.expanduser().resolve() if config.images else linux_guest(layout)[0]


def _pools(layout: Layout, host: str) -> dict[str, Any]:
    """One directory that all hosts see, and one that is the host's own."""
    pools = {SHARED_POOL: (layout.shared_pool, "shared-file"), LOCAL_POOL: (layout.local_pool(host), "local")}
    for path, _ in pools.values():
        path.mkdir(parents=True, exist_ok=True)
    return {name: {"path": str(path), "kind": kind} for name, (path, kind) in pools.items()}


_UEFI = Path("/usr/share/OVMF")


def _firmware() -> dict[str, Any]:
    """UEFI, where this machine has it."""
    code, variables = _UEFI / "OVMF_CODE_4M.fd", _UEFI / "OVMF_VARS_4M.fd"
    return {"uefi_code": str(code), "uefi_vars": str(variables)} if code.is_file() and variables.is_file() else {}


def _guest_network() -> dict[str, Any]:
    return {"bridge": network.GUEST_BRIDGE, "kind": "bridge", "mtu": network.GUEST_MTU}


def new_power_cycle(layout: Layout, host: str) -> None:
    """Give the host a new boot_id; it is still the same machine."""
    file = layout.power_cycle(host)
    before = file.read_text().split() if file.exists() else []
    machine = before[1] if len(before) > 1 else uuid.uuid4()
    write_atomically(file, f"{uuid.uuid4()}\n{machine}\n")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def build(config: LocalConfig, layout: Layout, places: Places) -> list[PartSpec]:
    """Every part, in the order of starting. Parts whose command is overridden by [] are left out."""
    make = _Maker(config, layout, places)
    parts = [
        *(make.zookeeper(server) for server in places.zookeepers),
        *(make.ray(seat) for seat in places.seats),
        *(make.api(server) for server in places.apis),
        make.part(
            "collector",
            [sys.executable, "-m", "deploy.lab.cluster.collector", "--dir", str(layout.dir)],
            _unix_probe(layout.collector_socket),
        ),
        *(make.agent(place) for place in places.hosts),
        *(make.coordinator(seat) for seat in places.seats),
    ]
    present = {part.name for part in parts if part.command}
    return [_without(part, present) for part in parts if part.command]


def _without(part: PartSpec, present: set[str]) -> PartSpec:
    """The part, not waiting for parts that were left out."""
    groups = (tuple(name for name in group if name in present) for group in part.after)
    return replace(part, after=tuple(filter(None, groups)))


class _Maker:
    """Fills in what all parts have in common."""

    def __init__(self, config: LocalConfig, layout: Layout, places: Places) -> None:
        self._config = config
        self._layout = layout
        self._places = places

    def registered(self, kind: PartKind, *nodes: str) -> Probe:
        """Does somebody hold each of these nodes in ZooKeeper? Stand-ins of tests hold none."""
        places = self._places
        if kind in self._config.commands:
            return always
        addresses = [server.address for server in places.zookeepers]

        def held(path: str) -> Probe:
            port, tls = places.zookeeper_port, self._as_admin
            return lambda: zookeeper.has_ephemeral(paths.CHROOT + path, addresses, port, tls=tls and tls())

        return _all(*map(held, nodes))

    @property
    def _ledger(self) -> tuple[str, ...]:
        """One server that serves has a quorum behind it."""
        return tuple(server.name for server in self._places.zookeepers)

    @property
    def _as_admin(self) -> Callable[[], ssl.SSLContext] | None:
        return (lambda: identities.as_admin(self._layout)) if self._config.tls else None

    def _serves(self, server: Server) -> Probe:
        """With TLS, the hosts may register as well: the first server that serves is told of them."""
        port, tls = self._places.zookeeper_port, self._as_admin

        async def probe() -> str | None:
            wrong = await zookeeper.srvr(server.address, port, _PROBE_TIMEOUT_S, tls and tls())
            if wrong or tls is None or server != self._places.zookeepers[0]:
                return wrong
            return await identities.enrolled(self._layout, self._places, 10.0)

        return probe

    def zookeeper(self, server: Server) -> PartSpec:
        return self.part(
            "zookeeper",
            zookeeper.command(self._layout, server),
            self._serves(server),
            server=server,
            listens=((server.address, self._places.zookeeper_port),),
        )

    def ray(self, seat: Server) -> PartSpec:
        # The head of a seat in a namespace of its own is asked over the bridge: the port listens on every address.
        address = seat.address if seat.number and seat.namespace else RAY_ADDRESS
        return self.part(
            "ray",
            ray_head.command(self._layout, seat, self._config.ray_cpus),
            _tcp_probe(address, seat.ray_port),
            server=replace(seat, name=seat.ray_head),
            environment=ray_head.environment(self._layout),
            prepare=lambda: ray_head.prepare(self._layout, seat),
            listens=((address, seat.ray_port), (address, seat.ray_client_port)),
            partner=seat.name,
        )

    def api(self, server: Server) -> PartSpec:
        address, port = server.address, self._places.api_port
        return self.part(
            "api",
            [sys.executable, "-m", "orchestrator.api", "--config", str(self._layout.part_json(server.name))],
            _tcp_probe(address, port),
            server=server,
            after=(self._ledger,),
            listens=((address, port),),
            health=_grpc_health(f"{address}:{port}"),
        )

    def coordinator(self, seat: Server) -> PartSpec:
        apis = ",".join(f"{server.address}:{self._places.api_port}" for server in self._places.apis)
        return self.part(
            "coordinator",
            [sys.executable, "-m", "orchestrator.coordinator", "--config", str(self._layout.part_json(seat.name))],
            self.registered("coordinator", paths.seat(seat.name), *map(paths.leader, range(self._config.shards))),
            server=seat,
            environment=ray_head.client_environment(self._layout),
            health=_carries_all(apis),
            after=(self._ledger, (seat.ray_head,)),
            partner=seat.ray_head,
        )

    def agent(self, place: HostPlace) -> PartSpec:
        layout = self._layout
        return self.part(
            "agent",
            [sys.executable, "-m", "agents", "--config", str(layout.agent_json(place.name))],
            _all(
                _tcp_probe(place.address, self._places.control_port),
                self.registered("agent", paths.live(place.name)),
            ),
            place=place,
            after=(self._ledger,),
            listens=((place.address, self._places.control_port), (place.address, self._places.peer_port)),
            health=_grpc_health(f"{place.address}:{self._places.control_port}"),
        )

    def part(
        self,
        kind: PartKind,
        command: list[str],
        probe: Probe,
        *,
        place: HostPlace | None = None,
        server: Server | None = None,
        environment: dict[str, str] | None = None,
        after: tuple[tuple[str, ...], ...] = (),
        partner: str = "",
        prepare: Callable[[], None] | None = None,
        listens: tuple[tuple[str, int], ...] = (),
        health: Probe | None = None,
    ) -> PartSpec:
        layout = self._layout
        name = f"{kind}-{place.name}" if place else server.name if server else kind
        config_file = layout.agent_json(place.name) if place else layout.part_json(name)
        override = self._config.commands.get(kind)
        if override is not None:
            names = {"dir": str(layout.dir), "host": place.name if place else "", "config": str(config_file)}
            command = [word.format(**names) for word in override]
        where = place or server
        namespace = where.namespace if where else self._places.management_namespace
        marks = {CLUSTER_VARIABLE: str(layout.dir), PART_VARIABLE: name}
        if place:
            marks[HOST_VARIABLE] = place.name
        return PartSpec(
            name=name,
            kind=kind,
            command=tuple(network.command_in(namespace, command)) if command else (),
            environment={**_inherited(), **(environment or {}), **marks},
            directory=_directory(layout, kind, name, place),
            log=layout.host(place.name) / "agent.log" if place else layout.logs / f"{name}.log",
            probe=probe,
            health=probe if health is None or override is not None else _all(probe, health),
            host=place.name if place else None,
            after=after,
            partner=partner,
            prepare=prepare,
            listens=listens,
            # While it is still starting, Ray's launcher does not notice that its GCS died, and waits for half a minute.
            watched=kind == "ray",
        )


def _directory(layout: Layout, kind: PartKind, name: str, place: HostPlace | None) -> Path:
    """Where the part is started."""
    if place:
        return layout.host(place.name)
    return layout.ray_work(name) if kind == "ray" else layout.logs


def _inherited() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    root = package_root()
    if root.name not in {"site-packages", "dist-packages"}:
        # Also when the repository was never installed.
        environment["PYTHONPATH"] = ":".join(filter(None, (str(root), environment.get("PYTHONPATH"))))
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


# --- how a part is ---------------------------------------------------------------------------------------------------

_PROBE_TIMEOUT_S = 1.0


async def always() -> str | None:
    """The probe of a part that counts as serving as soon as it runs."""
    return None


async def taken(spec: PartSpec) -> str | None:
    """What is wrong with its ports, as a clause; None: they are free.

    Asked by connecting, since an address in another namespace cannot be bound here.
    """
    for address, port in spec.listens:
        if await _connects(asyncio.open_connection(address, port)) is None:
            owner = network.listener(port) or "another process"
            return f"port {port} on {address} is in use by {owner}: end it"
    return None


def _all(*probes: Probe) -> Probe:
    async def probe() -> str | None:
        for one in probes:
            if wrong := await one():
                return wrong
        return None

    return probe


def _tcp_probe(address: str, port: int) -> Probe:
    async def probe() -> str | None:
        return await _connects(asyncio.open_connection(address, port))

    return probe


def _unix_probe(path: Path) -> Probe:
    async def probe() -> str | None:
        return await _connects(asyncio.open_unix_connection(path))

    return probe


async def _connects(opening: Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> str | None:
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            _, writer = await opening
    except TimeoutError:
        return "does not answer"
    except OSError as error:
        return os.strerror(error.errno).lower() if error.errno else "does not listen"
    writer.close()
    return None


def _carries_all(apis: str) -> Probe:
    """Has the leader set nothing aside? Asked of the APIs; one that does not answer has a line of its own."""

    async def probe() -> str | None:
        from orchestrator.core.errors import DroverError, RefusalReason
        from orchestrator.rpc.orchestrator_client import OrchestratorClient

        def ask() -> ClusterHealth:
            with OrchestratorClient(apis, timeout_s=_PROBE_TIMEOUT_S) as client:
                return client.get_cluster_health()

        try:
            found = await asyncio.to_thread(ask)
        except DroverError as error:
            silent = error.reason in (RefusalReason.API_UNREACHABLE, RefusalReason.LEDGER_UNREACHABLE)
            return None if silent else error.message
        return quarantined(found)

    return probe


def quarantined(found: ClusterHealth) -> str | None:
    """None: nothing is. Otherwise how much, with the oldest as an example."""
    if not found.quarantined:
        return None
    count = len(found.quarantined) + found.quarantined_left_out
    return f"{count} quarantined (`drover health`), {found.quarantined[0].resource}: {found.quarantined[0].reason}"


def _grpc_health(target: str) -> Probe:
    """The standard health service of a gRPC server; imported late, since only `drover status` asks for it."""

    async def probe() -> str | None:
        from orchestrator.rpc.health import check

        return await check(target, _PROBE_TIMEOUT_S)

    return probe
