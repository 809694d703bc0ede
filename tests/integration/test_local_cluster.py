"""The local cluster: it starts, keeps its parts alive, loses power, limits bandwidth, and says what is wrong.

ZooKeeper, the namespaces and the supervisor are the real ones. Agents, API, collector and coordinator are stand-ins
that listen where the real ones do, so what is tested here is the cluster process and not them. What it does when
something of it is killed, or it is interrupted, is in test_local_crashes.py.
"""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deploy.lab.cluster import commands, console_client, evidence, network, processes, teardown, zookeeper
from deploy.lab.cluster.commands import ClusterStatus
from deploy.lab.cluster.config import LocalConfig
from deploy.lab.cluster.layout import Layout, LocalClusterError, StopReason
from tests.fakes.cluster import (
    ROOT,
    STAND_IN,
    Cluster,
    make_config,
    missing,
    running_cluster,
    short_directory,
    until,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.zookeeper,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
needs_namespaces = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")


@pytest.fixture
def directory() -> Iterator[Path]:
    """Whatever the test did, nothing of its cluster stays."""
    path = short_directory()
    yield path
    commands.down(path)
    shutil.rmtree(path, ignore_errors=True)


def a_config(directory: Path, **options: Any) -> LocalConfig:
    options.setdefault("hosts", 3)
    return make_config(directory, stand_ins=("agent", "api", "collector", "coordinator"), without=("ray",), **options)


def up(config: LocalConfig) -> tuple[ClusterStatus, str]:
    out = io.StringIO()
    return commands.up(config, out=out), out.getvalue()


# --- start and end ---------------------------------------------------------------------------------------------------


def test_a_cluster_from_start_to_end(directory: Path) -> None:
    begun = time.monotonic()
    now, said = up(a_config(directory))
    print(f"ready after {time.monotonic() - begun:.2f} s")
    assert now.healthy
    assert "ready after" in said
    assert [part.name for part in now.parts] == [
        "zookeeper", "api", "collector", "agent-host-1", "agent-host-2", "agent-host-3", "coordinator",
    ]  # fmt: skip
    assert all(part.pid and part.restarts == 0 for part in now.parts)

    again, said = up(a_config(directory))
    assert "already runs" in said
    assert [part.pid for part in again.parts] == [part.pid for part in now.parts]

    guests = teardown.running_guests(Layout.of(directory))
    assert len(guests) == 3
    begun = time.monotonic()
    assert commands.down(directory) == []
    print(f"down after {time.monotonic() - begun:.2f} s")
    assert not any(processes.is_alive(guest) for guest in guests)
    assert not directory.exists()
    assert commands.status(directory).state == "not running"
    assert commands.down(directory) == []


def test_two_clusters_side_by_side(directory: Path) -> None:
    other = short_directory()
    try:
        with running_cluster(a_config(directory, hosts=1)) as first:
            with running_cluster(a_config(other, hosts=1)) as second:
                assert first.status().healthy
                assert second.status().healthy
            assert first.status().healthy
            assert first.guests()
            assert network.existing(first.layout)
    finally:
        shutil.rmtree(other, ignore_errors=True)


def test_what_is_to_be_kept_is_kept_until_the_next_up(directory: Path) -> None:
    config = a_config(directory, hosts=1)
    up(config)
    (directory / "serial" / "host-1.g.1.log").write_text("1 beat\n")
    assert commands.down(directory, keep=["serial"]) == []
    assert [path.name for path in sorted(directory.iterdir())] == ["lock", "serial"]
    assert (directory / "serial" / "host-1.g.1.log").read_text() == "1 beat\n"
    assert commands.status(directory).state == "not running"
    up(config)
    assert list((directory / "serial").iterdir()) == []


def test_a_foreign_directory_is_refused_and_left_alone(directory: Path) -> None:
    (directory / "thesis.txt").write_text("years of work")
    with pytest.raises(LocalClusterError, match="not Drover's"):
        up(a_config(directory))
    commands.down(directory)
    assert (directory / "thesis.txt").read_text() == "years of work"


def test_a_process_that_merely_mentions_the_directory_lives(directory: Path) -> None:
    up(a_config(directory, hosts=1))
    reader = subprocess.Popen(["tail", "-F", str(directory / "cluster.json")], cwd=directory, stderr=subprocess.DEVNULL)
    try:
        assert commands.down(directory) == []
        assert reader.poll() is None
    finally:
        reader.kill()
        reader.wait()


# --- what cannot start -----------------------------------------------------------------------------------------------


def refusal(config: LocalConfig) -> LocalClusterError:
    with pytest.raises(LocalClusterError) as caught:
        up(config)
    print(caught.value.sentence)
    assert "\n" not in caught.value.sentence
    assert commands.leftovers(config.dir) == []
    return caught.value


def test_a_part_that_never_comes_up_is_named_and_nothing_stays(directory: Path) -> None:
    broken = [sys.executable, "-S", "-c", "import sys; sys.exit('no such thing as an API')"]
    error = refusal(a_config(directory, commands={"api": broken}))
    assert error.sentence == (
        "the cluster did not come up: api does not come up: it ended 4 times, exit status 1: no such thing as an API"
    )
    assert (error.reason, error.part) == (StopReason.PART_FAILED, "api")
    assert "no such thing" in error.detail


def test_a_part_that_never_serves_is_named(directory: Path) -> None:
    error = refusal(a_config(directory, commands={"api": ["sleep", "600"]}, start_timeout_s=5))
    said, _, parts = error.sentence.rpartition(": ")
    assert said == "the cluster did not come up: not ready after 5 s"
    assert "api" in parts.split(", "), "on a slow machine others are not ready either"
    assert error.reason == StopReason.NOT_READY
    assert error.part in parts.split(", ")


def test_a_missing_program_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(directory / "empty"))
    error = refusal(a_config(directory))
    assert error.sentence.startswith("a Java runtime (the command java), which runs ZooKeeper, is missing; deploy/")
    assert (error.reason, error.part) == (StopReason.MISSING_SOFTWARE, "zookeeper")


def test_a_broken_java_is_named(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'Error: could not find libjava.so' >&2\nexit 2\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    error = refusal(a_config(directory))
    assert error.sentence.endswith("it ended 4 times, exit status 2: Error: could not find libjava.so")
    assert error.part == "zookeeper"


@pytest.mark.parametrize(
    "without_namespaces", [pytest.param(False, marks=needs_namespaces), True], ids=["namespaces", "loopback"]
)
def test_a_taken_port_is_named_with_whoever_has_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch, without_namespaces: bool
) -> None:
    if without_namespaces:
        monkeypatch.setenv(network.NO_NAMESPACES_VARIABLE, "1")
    # ZooKeeper's stand-in also sits on the port of the API, which waits for it.
    thief = (
        "import json, socket, sys, threading\n"
        "def answer(s):\n"
        "    while c := s.accept()[0]: c.recv(9); c.sendall(b'Mode: x'); c.close()\n"
        "host, _, port = json.load(open(sys.argv[1] + '/api.json'))['listen'][1].rpartition(':')\n"
        "thief = socket.create_server((host, int(port)))\n"
        "host, _, port = json.load(open(sys.argv[1] + '/api.json'))['zookeeper'].rpartition(':')\n"
        "answer(socket.create_server((host, int(port))))\n"
    )
    config = a_config(directory, hosts=1, commands={"zookeeper": [sys.executable, "-S", "-c", thief, "{dir}"]})
    error = refusal(config)
    assert (error.reason, error.part) == (StopReason.PORT_IN_USE, "api")
    assert "api: port 7700 on " in error.sentence
    assert "is in use by python" in error.sentence


def test_a_port_that_is_taken_later_shows_in_the_status(directory: Path) -> None:
    with running_cluster(a_config(directory, hosts=1)) as cluster:
        address, port = cluster.places.management_address, cluster.places.api_port

        def take() -> socket.socket:
            """Between the death of the API and its next start, which waits as long as the supervisor stands still."""
            pid, supervisor = cluster.part("api").pid, cluster.record.supervisor
            assert pid
            processes.send(supervisor, signal.SIGSTOP)
            try:
                os.kill(pid, signal.SIGKILL)
                until(lambda: processes.look(pid) is None, 60)
                return socket.create_server((address, port))
            finally:
                processes.send(supervisor, signal.SIGCONT)

        with cluster.inside(take):
            until(lambda: "is in use by python" in cluster.part("api").health, 60)
            assert not cluster.status().healthy
        until(lambda: cluster.part("api").health == "ok", 60)


# --- parts and guests ------------------------------------------------------------------------------------------------


def test_each_part_comes_back_and_guests_live_on(directory: Path) -> None:
    with running_cluster(a_config(directory, hosts=2)) as cluster:
        guests = cluster.guests()
        for name in ("agent-host-1", "api", "collector", "coordinator", "zookeeper"):
            killed_at, old = time.time(), cluster.kill(name)
            serves_s = cluster.came_back(name, old)
            started_s = cluster.started_again(name, old) - killed_at
            print(f"{name} killed: started again after {started_s:.2f} s, serves after {serves_s:.2f} s")
            assert started_s < 1
            assert cluster.part(name).restarts == 1
        assert cluster.guests() == guests


def test_zookeeper_keeps_what_was_written(directory: Path) -> None:
    kazoo = pytest.importorskip("kazoo.client")
    with running_cluster(a_config(directory, hosts=1)) as cluster:

        def visit(what: Callable[[Any], Any]) -> Any:
            client = kazoo.KazooClient(hosts=cluster.zookeeper, timeout=4)
            client.start(timeout=5)
            try:
                return what(client)
            finally:
                client.stop()
                client.close()

        cluster.inside(lambda: visit(lambda client: client.create("/kept", b"value")))
        cluster.came_back("zookeeper", cluster.kill("zookeeper"))
        assert cluster.inside(lambda: visit(lambda client: client.get("/kept")))[0] == b"value"


def test_the_node_of_a_dead_process_is_no_sign_of_life(directory: Path) -> None:
    """Its session goes on for seconds; a part that was killed must not look as if it served already."""
    program = (
        "import sys, time; from kazoo.client import KazooClient\n"
        "client = KazooClient(hosts=sys.argv[1], timeout=8); client.start(timeout=5)\n"
        "client.create('/here', ephemeral=True); print('there', flush=True); time.sleep(60)\n"
    )
    with running_cluster(a_config(directory, hosts=1)) as cluster:
        places = cluster.places

        def look() -> str | None:
            asking = zookeeper.has_ephemeral("/here", [places.management_address], places.zookeeper_port)
            return cluster.inside(lambda: asyncio.run(asking))

        assert look() == "not registered"
        words = [sys.executable, "-c", program, cluster.zookeeper]
        holder = subprocess.Popen(network.command_in(places.management_namespace, words), stdout=subprocess.PIPE)
        with holder:
            assert holder.stdout
            assert holder.stdout.readline() == b"there\n"
            assert look() is None
            holder.kill()
            holder.wait()
            until(lambda: look() == "not registered", 60)


@pytest.mark.qemu
@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed")
def test_real_guests_outlive_agent_and_supervisor_and_end_with_down(directory: Path, tmp_path: Path) -> None:
    """The real collector is their witness: no heartbeat is missing, and each console ends with EOF."""
    subprocess.run([ROOT / "deploy/lab/guest_image/build.sh", tmp_path / "guest.elf"], check=True)
    agent = [sys.executable, "-S", "-E", str(STAND_IN), "agent", "{config}", "qemu"]
    config = make_config(
        directory,
        stand_ins=("api", "coordinator"),
        without=("ray",),
        hosts=2,
        guest_image=tmp_path / "guest.elf",
        commands={"agent": agent},
    )
    up(config)
    cluster = Cluster(config, "")

    def log(host: str) -> evidence.ConsoleLog:
        vmm = evidence.Vmm(host, "one", "i1")
        return evidence.parse_log(vmm, (directory / "serial" / f"{vmm.name}.log").read_text().splitlines())

    def beat(beyond: int = 0) -> int:
        until(lambda: all(each.last_line for each in console_client.list_consoles_sync(directory)), 60)
        until(lambda: all((beats := log(host).beats) and beats[-1].number > beyond for host in hosts), 60)
        return max(log(host).beats[-1].number for host in hosts)

    hosts = ("host-1", "host-2")
    until(lambda: len(console_client.list_consoles_sync(directory)) == 2, 60)
    guests, last = cluster.guests(), beat()
    cluster.came_back("agent-host-1", cluster.kill("agent-host-1"))
    last = beat(last + 10)
    cluster.kill_supervisor()
    last = beat(last + 10)
    assert cluster.guests() == guests
    with pytest.raises(LocalClusterError, match="2 of its guests still run"):
        up(config)
    beat(last + 10)
    assert commands.down(directory, keep=["serial"]) == []
    assert not any(map(processes.is_alive, guests))
    for host in hosts:
        assert evidence.missing_beats([log(host)]) == 0
        assert log(host).ended_ns
    assert commands.down(directory) == []


# --- power -----------------------------------------------------------------------------------------------------------


def test_loss_of_power(directory: Path) -> None:
    with running_cluster(a_config(directory, hosts=2)) as cluster:
        layout = cluster.layout
        boot = {host: layout.power_cycle(host).read_text() for host in ("host-1", "host-2")}
        guests = {host: guest for guest, host in teardown.guest_processes(layout).items()}
        others = cluster.part("agent-host-2").pid
        for host in boot:
            (layout.volatile(host) / "marker").touch()

        begun = time.monotonic()
        assert commands.power_cycle(directory, "host-1")
        print(f"power cycle {time.monotonic() - begun:.2f} s")
        assert not processes.is_alive(guests["host-1"])
        assert layout.power_cycle("host-1").read_text() != boot["host-1"]
        assert list(layout.volatile("host-1").iterdir()) == []
        assert (layout.host("host-1") / "guests" / "one" / "i1.json").exists()  # its disk survives
        # ... and nothing of it reaches another host.
        assert processes.is_alive(guests["host-2"])
        assert layout.power_cycle("host-2").read_text() == boot["host-2"]
        assert (layout.volatile("host-2") / "marker").exists()
        assert cluster.part("agent-host-2").pid == others


def test_power_off_and_on(directory: Path) -> None:
    with running_cluster(a_config(directory, hosts=2)) as cluster:
        commands.power_cycle(directory, "host-2", off=True)
        time.sleep(0.5)  # longer than a part that ended waits for its next start
        dark = cluster.part("agent-host-2")
        assert (dark.pid, dark.state) == (None, "off")
        assert not cluster.status().healthy
        assert commands.power_on(directory, "host-2")
        assert cluster.status().healthy
        with pytest.raises(LocalClusterError, match="has power"):
            commands.power_on(directory, "host-2")
        with pytest.raises(LocalClusterError, match=r"no host 'host-9'.*host-1, host-2"):
            commands.power_cycle(directory, "host-9")


# --- the network -----------------------------------------------------------------------------------------------------


LOOPBACK_NOTE = "no network namespaces ({}): hosts are loopback addresses without bandwidth limits"


def somebody_else_at(address: str, port: int) -> socket.socket:
    """A server there, once no cluster of another test process has the port."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return socket.create_server((address, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def test_without_namespaces(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(network.NO_NAMESPACES_VARIABLE, "1")
    with somebody_else_at("127.0.0.12", 7701), running_cluster(a_config(directory, hosts=2)) as cluster:
        assert cluster.status().healthy
        notes = [line for line in cluster.said.splitlines() if "namespaces" in line]
        assert notes == [LOOPBACK_NOTE.format("DROVER_NO_NETNS is set")]
        agent = json.loads(cluster.layout.agent_json("host-2").read_text())
        assert agent["address"] == "127.0.0.12"
        assert agent["control_port"] != 7701  # somebody else's
        assert network.existing(cluster.layout) == []

        cluster.came_back("agent-host-1", cluster.kill("agent-host-1"))
        guests = {host: guest for guest, host in teardown.guest_processes(cluster.layout).items()}
        assert commands.power_cycle(directory, "host-1")
        assert not processes.is_alive(guests["host-1"])
        assert processes.is_alive(guests["host-2"])
    assert not processes.is_alive(guests["host-2"])


UNPRIVILEGED = {
    # Another user, who may read our Python wherever it lies.
    "not root": "--reuid 65534 --regid 65534 --clear-groups --inh-caps +dac_override --ambient-caps +dac_override",
    # As in a container: root, but not allowed to make a namespace.
    "Operation not permitted": "--bounding-set -sys_admin,-net_admin",
}


@needs_namespaces
@pytest.mark.parametrize("why", UNPRIVILEGED)
def test_without_the_right_to_namespaces(directory: Path, why: str) -> None:
    directory.chmod(0o777)
    program = (
        "import sys; from deploy.lab.cluster import commands, config\n"
        "c = config.LocalConfig.model_validate_json(sys.argv[1])\n"
        "assert commands.up(c).healthy\n"
        "assert commands.power_cycle(c.dir, 'host-2')\n"
        "assert commands.down(c.dir) == [], commands.leftovers(c.dir)\n"
    )
    config = a_config(directory / "d", hosts=2)
    command = ["setpriv", *UNPRIVILEGED[why].split(), sys.executable, "-c", program, config.model_dump_json()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if "namespaces" in line]
    assert len(notes) == 1
    assert why in notes[0]
    assert notes[0].endswith("hosts are loopback addresses without bandwidth limits")
    assert commands.leftovers(config.dir) == []


def throughput_mbps(cluster: Cluster, source: str, destination: str, mib: int) -> float:
    """One TCP connection between two hosts, seen by the receiver."""
    address = next(place.address for place in cluster.places.hosts if place.name == destination)
    server = cluster.inside(lambda: socket.create_server((address, 0)), destination)
    server.settimeout(10)
    send = (
        "import socket, sys\n"
        "s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10)\n"
        "for _ in range(int(sys.argv[3])): s.sendall(bytes(1 << 20))\n"
    )
    words = [sys.executable, "-S", "-E", "-c", send, address, str(server.getsockname()[1]), str(mib)]
    namespace = next(place.namespace for place in cluster.places.hosts if place.name == source)
    with server, subprocess.Popen(network.command_in(namespace, words)) as sender:
        connection = server.accept()[0]
        begun, received, buffer = time.monotonic(), 0, bytearray(1 << 18)
        with connection:
            while count := connection.recv_into(buffer):
                received += count
        took_s = time.monotonic() - begun
        assert sender.wait(5) == 0
    assert received == mib << 20
    return received * 8 / took_s / 1e6


@needs_namespaces
def test_bandwidth_is_limited_both_ways_and_not_at_all_when_told_so(directory: Path) -> None:
    with running_cluster(a_config(directory, hosts=3, bandwidth="200mbit")) as cluster:
        alone = throughput_mbps(cluster, "host-1", "host-2", 20)
        # Two senders share what one receiver gets: the limit at the bridge's port.
        both: list[float] = []
        into_three = [
            lambda source=source: both.append(throughput_mbps(cluster, source, "host-3", 10))
            for source in ("host-1", "host-2")
        ]
        run_together(into_three)
    print(f"200 Mbit/s: one stream {alone:.0f}, two streams into one host {sum(both):.0f} Mbit/s")
    assert 150 < alone < 215
    assert 150 < sum(both) < 230
    with running_cluster(a_config(directory, hosts=2)) as cluster:
        usual = throughput_mbps(cluster, "host-1", "host-2", 100)
    with running_cluster(a_config(directory, hosts=2, shape=False)) as cluster:
        unlimited = throughput_mbps(cluster, "host-1", "host-2", 200)
    print(f"1 Gbit/s (the default): {usual:.0f} Mbit/s; without a limit: {unlimited:.0f} Mbit/s")
    assert 700 < usual < 1075
    assert unlimited > 1.5 * usual


def run_together(functions: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(functions)) as pool:
        for done in [pool.submit(function) for function in functions]:
            done.result()


@needs_namespaces
def test_each_namespace_is_its_own(directory: Path) -> None:
    retries = Path("/proc/sys/net/ipv4/tcp_retries2")
    root, interfaces = retries.read_text(), socket.if_nameindex()
    with running_cluster(a_config(directory, hosts=1)) as cluster:
        assert cluster.inside(retries.read_text, "host-1").strip() == str(network.TCP_RETRIES)
        assert retries.read_text() == root
        assert socket.if_nameindex() == interfaces  # the root namespace is left as it was
        inside = {name for _, name in cluster.inside(socket.if_nameindex, "host-1")}
        assert inside == {"lo", "eth0", network.GUEST_BRIDGE, network.GUEST_UPLINK}
        cluster.inside(lambda: socket.create_connection((cluster.places.hosts[0].address, 7701), 1).close())


@needs_namespaces
def test_down_clears_a_network_that_was_made_half(directory: Path) -> None:
    layout = Layout.of(directory)
    subprocess.run(["ip", "netns", "add", layout.namespace(1)], check=True)
    stray = subprocess.Popen(network.command_in(layout.namespace(1), ["sleep", "600"]))
    (network.NAMESPACES / layout.namespace(2)).touch()  # where `ip netns add` was killed between its two steps
    until(lambda: len(commands.leftovers(directory)) >= 3, 60)
    left = commands.down(directory)
    assert not any(word in line for line in left for word in ("process", "namespace", "mount"))
    assert stray.wait(5) < 0
