"""The network of a local cluster: a namespace per host, a bridge in a management namespace, a bandwidth limit per host,
and beside it a network for guests: a bridge in each host, joined by one in the management namespace.

The root namespace is never touched: each veth pair is made with both ends inside the cluster's own namespaces. Where
namespaces cannot be made, hosts are loopback addresses and `Places.notes` says why in one line.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from deploy.lab.cluster import processes
from deploy.lab.cluster.layout import HostPlace, Layout, Places, Server, numbered

NAMESPACES = Path("/run/netns")
NO_NAMESPACES_VARIABLE = "DROVER_NO_NETNS"
SUBNET = "10.77.0"
FIRST_HOST = 11
FIRST_SERVER = {"zookeeper": 201, "api": 211, "coordinator": 221}
"""Where there are several of a kind, the last number of the first one's address."""
LOOPBACK_SERVERS = {"zookeeper": "127.0.1", "api": "127.0.2", "coordinator": "127.0.3"}

TCP_RETRIES = 3
"""Retransmissions until a connection to a vanished peer fails: 3 means about 3 s, the kernel's 15 many minutes."""

GUEST_BRIDGE = "lab0"
"""In each host's namespace, and in the management namespace, where a peer is outside of all hosts."""
GUEST_UPLINK = "up0"
GUEST_PEER = "10.78.0.1"
GUEST_MTU = 1500

_CLONE_NEWNET = 0x40000000
_LISTEN = "0A"
_COMMAND_TIMEOUT_S = 10.0


class _CommandFailed(Exception):
    pass


def _run(*command: str, text: str | None = None) -> str:
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _CommandFailed(str(error)) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise _CommandFailed(f"{' '.join(command)}: {lines[0]}")
    return done.stdout


def _batch(tool: str, namespace: str | None, lines: Sequence[str]) -> None:
    """Several commands of `ip` or `tc` by one process: starting one for each would take longer than all else here."""
    where = ["-n", namespace] if namespace else []
    _run(tool, *where, "-batch", "-", text="\n".join(lines) + "\n")


def command_in(namespace: str | None, command: Sequence[str]) -> list[str]:
    """The command, run inside a namespace. nsenter executes it in its own place, so the pid is the command's."""
    if namespace is None:
        return list(command)
    return ["nsenter", f"--net={NAMESPACES / namespace}", "--", *command]


def enter(namespace: str) -> None:
    """Move the calling thread, and all that it starts from now on, into a namespace."""
    descriptor = os.open(NAMESPACES / namespace, os.O_RDONLY)
    try:
        # os.setns comes with Python 3.12 only.
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), namespace)
    finally:
        os.close(descriptor)


def set_link(namespace: str, *, up: bool) -> None:
    """Plug a host's cable in or out. Pulled out, nothing the host's kernel still sends reaches anybody."""
    state = "up" if up else "down"
    try:
        _batch("ip", namespace, [f"link set {cable} {state}" for cable in ("eth0", GUEST_UPLINK)])
    except _CommandFailed as error:
        raise OSError(str(error)) from error


def existing(layout: Layout) -> list[str]:
    """Names of the namespaces of this cluster that exist, also half-made ones."""
    try:
        return sorted(path.name for path in NAMESPACES.iterdir() if path.name.startswith(layout.namespace_prefix))
    except FileNotFoundError:
        return []


def create(layout: Layout, hosts: int, rate_bps: int | None, servers: Mapping[str, int] = {}) -> Places:
    """Make the whole network anew, or fall back to loopback addresses.

    `servers`: how many there are of each kind in FIRST_SERVER, 1 where nothing is said. `rate_bps` limits each host in
    each direction; None: no limit. On any failure nothing is left of what was made.
    Processes must not live in namespaces of an earlier run (see teardown).
    """
    reason = obstacle()
    if reason is None:
        remove(layout)
        try:
            return _create_namespaces(layout, hosts, rate_bps, servers)
        except _CommandFailed as error:
            remove(layout)
            reason = str(error)
    return _loopback(hosts, reason, servers)


def obstacle() -> str | None:
    """Why namespaces cannot be made here, as far as it can be told beforehand; None: nothing is known."""
    if os.environ.get(NO_NAMESPACES_VARIABLE, "0") not in {"", "0"}:
        return f"{NO_NAMESPACES_VARIABLE} is set"
    if os.geteuid() != 0:
        return "not root"
    for tool in ("ip", "nsenter"):
        if shutil.which(tool) is None:
            return f"the command {tool} is missing; deploy/install-system.sh installs it"
    return None


def _create_namespaces(layout: Layout, hosts: int, rate_bps: int | None, counts: Mapping[str, int]) -> Places:
    management = layout.management_namespace
    numbers = range(1, hosts + 1)
    places = [HostPlace(f"host-{n}", f"{SUBNET}.{FIRST_HOST + n - 1}", layout.namespace(n)) for n in numbers]
    servers = {kind: _servers(layout, kind, counts.get(kind, 1)) for kind in FIRST_SERVER}
    cabled = {place.namespace or "": place.address for place in places}
    cabled |= {one.namespace or "": one.address for some in servers.values() for one in some if one.number}
    ports = {name: _port(layout, name) for name in cabled}
    namespaces = [management, *cabled]
    _add_namespaces(namespaces)
    # Being able to make one does not mean being allowed to enter it (seccomp profiles of containers).
    _run(*command_in(management, ["true"]))
    _batch("ip", None, [
        f"link add eth0 netns {name} type veth peer name {port} netns {management}" for name, port in ports.items()
    ])  # fmt: skip
    bridge = ["link set lo up", "link add br0 type bridge", f"addr add {SUBNET}.1/24 dev br0", "link set br0 up"]
    _batch("ip", management, bridge + [f"link set {port} master br0 up" for port in ports.values()])
    for name, address in cabled.items():
        _batch("ip", name, ["link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up"])
    _join_guests(management, {place.namespace or "": f"g{n}" for n, place in enumerate(places, start=1)})
    shaped = {place.namespace or "": ports[place.namespace or ""] for place in places}
    notes = _tune(namespaces) + (_shape(management, shaped, rate_bps) if rate_bps else ())
    return Places(
        f"{SUBNET}.1",
        management,
        tuple(places),
        notes,
        zookeepers=servers["zookeeper"],
        apis=servers["api"],
        seats=servers["coordinator"],
    )


def _join_guests(management: str, hosts: Mapping[str, str]) -> None:
    """The network of the guests' cards. Its bridges have no address of their own, but for the peer's. `hosts`: the name
    of the joining bridge's end of each host's cable, by namespace."""
    bridge = [f"link add {GUEST_BRIDGE} type bridge mcast_snooping 0", f"link set {GUEST_BRIDGE} addrgenmode none up"]
    _batch("ip", None, [
        f"link add {GUEST_UPLINK} netns {name} type veth peer name {port} netns {management}"
        for name, port in hosts.items()
    ])  # fmt: skip
    _batch("ip", management, [
        *bridge,
        f"addr add {GUEST_PEER}/16 dev {GUEST_BRIDGE}",
        *(f"link set {port} addrgenmode none master {GUEST_BRIDGE} up" for port in hosts.values()),
    ])  # fmt: skip
    for name in hosts:
        _batch("ip", name, [*bridge, f"link set {GUEST_UPLINK} addrgenmode none master {GUEST_BRIDGE} up"])


def _servers(layout: Layout, kind: str, count: int) -> tuple[Server, ...]:
    if count == 1:
        return (Server(kind, 0, f"{SUBNET}.1", layout.management_namespace),)
    first = FIRST_SERVER[kind] - 1
    return tuple(
        Server(numbered(kind, n), n, f"{SUBNET}.{first + n}", layout.server_namespace(kind, n))
        for n in range(1, count + 1)
    )


def _port(layout: Layout, namespace: str) -> str:
    """The bridge's end of a namespace's cable: h1, z1, ..."""
    return namespace.removeprefix(layout.namespace_prefix)


def _add_namespaces(names: Sequence[str]) -> None:
    lines = [f"netns add {name}" for name in names]
    try:
        _batch("ip", None, lines)
    except _CommandFailed:
        # Another cluster that ends at this moment may have taken /run/netns away under our hands.
        time.sleep(0.05)
        for name in names:
            _remove_namespace(name)
        _batch("ip", None, lines)


def _tune(namespaces: Sequence[str]) -> tuple[str, ...]:
    def write() -> None:
        for namespace in namespaces:
            enter(namespace)
            Path("/proc/sys/net/ipv4/tcp_retries2").write_text(str(TCP_RETRIES))

    try:
        # In a thread of its own, which then ends: the caller stays where it is.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(write).result()
    except OSError:
        return ("a lost link is noticed late: net.ipv4.tcp_retries2 cannot be set here",)
    return ()


def _shape(management: str, hosts: Mapping[str, str], rate_bps: int) -> tuple[str, ...]:
    """Limit each host both ways: what it sends at its own end, what it receives at the bridge's port. `hosts`: the port
    of each host's namespace."""
    # Two milliseconds' worth, and room for some of the 64 KiB packets that the kernel hands over in one piece.
    burst_bytes = max(256 * 1024, rate_bps // 8 // 500)
    limit = f"root tbf rate {rate_bps}bit burst {burst_bytes} latency 50ms"
    try:
        for namespace in hosts:
            _batch("tc", namespace, [f"qdisc replace dev eth0 {limit}"])
        _batch("tc", management, [f"qdisc replace dev {port} {limit}" for port in hosts.values()])
    except _CommandFailed as error:
        return (f"no bandwidth limit: {error}",)
    return ()


def _loopback(hosts: int, reason: str, counts: Mapping[str, int] = {}) -> Places:
    """Without namespaces: loopback addresses. Their ports are the whole machine's, so busy ones are avoided."""
    management = "127.0.0.1"
    # 127.0.0.0/8 is one network to the kernel, so these need no set-up.
    places = tuple(HostPlace(f"host-{n}", f"127.0.0.{FIRST_HOST + n - 1}") for n in range(1, hosts + 1))
    usual = Places(management, None, places)
    addresses = [place.address for place in places]
    servers = {kind: _loopback_servers(kind, counts.get(kind, 1), management) for kind in FIRST_SERVER}
    zookeepers = [server.address for server in servers["zookeeper"]]
    apis = [server.address for server in servers["api"]]
    seats = [server.address for server in servers["coordinator"]]
    return Places(
        management,
        None,
        places,
        (f"no network namespaces ({reason}): hosts are loopback addresses without bandwidth limits",),
        zookeepers=servers["zookeeper"],
        apis=servers["api"],
        seats=servers["coordinator"],
        zookeeper_port=_free_port(zookeepers, usual.zookeeper_port),
        quorum_port=_free_port(zookeepers, usual.quorum_port),
        election_port=_free_port(zookeepers, usual.election_port),
        api_port=_free_port(apis, usual.api_port),
        control_port=_free_port(addresses, usual.control_port),
        peer_port=_free_port(addresses, usual.peer_port),
        api_metrics_port=_free_port(apis, usual.api_metrics_port),
        coordinator_metrics_port=_free_port(seats, usual.coordinator_metrics_port),
    )


def _loopback_servers(kind: str, count: int, management: str) -> tuple[Server, ...]:
    found: list[Server] = []
    for number in range(1, count + 1) if count > 1 else (0,):
        address = f"{LOOPBACK_SERVERS[kind]}.{number}" if number else management
        server = Server(numbered(kind, number), number, address, None)
        if kind == "coordinator":
            # Ray listens on every address, and lets in whoever has the token.
            apart = 2 * max(0, number - 1)
            server = replace(
                server,
                ray_port=_free_port(["0.0.0.0"], server.ray_port + apart),
                ray_client_port=_free_port(["0.0.0.0"], server.ray_client_port + apart),
            )
        found.append(server)
    return tuple(found)


def _free_port(addresses: Sequence[str], preferred: int) -> int:
    """A port that is free on every one of these addresses: the preferred one if it is."""
    candidate = preferred
    for _ in range(50):
        try:
            with contextlib.ExitStack() as stack:
                for address in addresses:
                    holder = stack.enter_context(socket.socket())
                    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    holder.bind((address, candidate))
        except OSError:
            with socket.socket() as holder:
                holder.bind((addresses[0], 0))
                candidate = holder.getsockname()[1]
        else:
            return candidate
    return preferred


def listener(port: int) -> str | None:
    """Who listens on a TCP port in this thread's namespace: "nginx (pid 12)". None: nobody, or it may not be seen."""
    inodes: set[str] = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{rest[5]}]")
    for seen in processes.scan() if inodes else ():
        if not inodes.isdisjoint(seen.files()):
            return f"{seen.name} (pid {seen.pid})"
    return None


def remove(layout: Layout) -> None:
    """Remove every namespace of the cluster; links, bridge and limits vanish with them. Safe to repeat."""
    names = existing(layout)
    for name in names:
        _remove_namespace(name)
    if names:
        _remove_common_mount()


def _remove_namespace(name: str) -> None:
    with contextlib.suppress(_CommandFailed):
        _run("ip", "netns", "del", name)
    # A start that was killed half-way leaves a plain file that `ip netns del` refuses to take for a namespace.
    with contextlib.suppress(OSError):
        (NAMESPACES / name).unlink()


def _remove_common_mount() -> None:
    """/run/netns becomes a mount with the first namespace of the machine; take it away after the last one."""
    with contextlib.suppress(OSError, _CommandFailed):
        if not any(NAMESPACES.iterdir()):
            # Not lazily: while any other namespace has its name there, this is refused, as it must be.
            _run("umount", str(NAMESPACES))
            NAMESPACES.rmdir()
