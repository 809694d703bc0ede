"""The local cluster: it starts, keeps its parts alive, and leaves nothing behind however it ends.

ZooKeeper, Ray, the namespaces and the supervisor are the real ones. Agents, API, collector and coordinator are
stand-ins that listen where the real ones do, so what is tested here is the cluster process and not them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.local import commands, network, processes, state, teardown, zookeeper
from orchestrator.local import config as configuration
from orchestrator.local.commands import ClusterStatus, PartStatus
from orchestrator.local.config import LocalConfig
from orchestrator.local.layout import Layout, LocalClusterError

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests" / "fakes" / "local_part.py"


def _missing() -> str:
    try:
        zookeeper.require()
    except LocalClusterError as error:
        return str(error)
    return ""


pytestmark = [
    pytest.mark.integration,
    pytest.mark.zookeeper,
    pytest.mark.skipif(bool(_missing()), reason=_missing()),
]
needs_namespaces = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, for the sockets below it; whatever the test did, nothing of its cluster stays."""
    path = Path(tempfile.mkdtemp(prefix="dl", dir="/tmp"))
    yield path
    commands.down(path)
    shutil.rmtree(path, ignore_errors=True)


def a_config(directory: Path, *, ray: bool = False, **options: Any) -> LocalConfig:
    kinds = ("agent", "api", "collector", "coordinator")
    stand_ins: dict[str, list[str]] = {
        kind: [sys.executable, "-S", "-E", str(STAND_IN), kind, "{config}"] for kind in kinds
    }
    if not ray:
        stand_ins["ray"] = []
    options.setdefault("hosts", 3)
    return configuration.make(dir=directory, commands={**stand_ins, **options.pop("commands", {})}, **options)


def up(config: LocalConfig) -> tuple[ClusterStatus, str]:
    out = io.StringIO()
    return commands.up(config, out=out), out.getvalue()


def part(directory: Path, name: str) -> PartStatus:
    return next(part for part in commands.status(directory).parts if part.name == name)


def until(true: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until it is true."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < timeout_s, "never became true"
        time.sleep(0.02)
    return time.monotonic() - begun


def kill(pid: int | None) -> None:
    assert pid
    os.kill(pid, signal.SIGKILL)


def kill_supervisor(layout: Layout) -> None:
    record = state.read(layout.cluster_json)
    assert record
    kill(record.supervisor.pid)
    until(lambda: not processes.is_alive(record.supervisor), 2)


def came_back(directory: Path, name: str, old: int | None, timeout_s: float) -> float:
    def is_new() -> bool:
        now = part(directory, name)
        return now.pid not in {None, old} and now.health == "ok"

    return until(is_new, timeout_s)


def in_namespace(name: str | None, program: str, timeout_s: float = 20) -> str:
    command = network.command_in(name, [sys.executable, "-c", program])
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True).stdout.strip()


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


def test_each_part_comes_back_and_guests_live_on(directory: Path) -> None:
    up(a_config(directory, hosts=2))
    layout = Layout.of(directory)
    guests = teardown.running_guests(layout)
    for name in ("agent-host-1", "api", "collector", "coordinator", "zookeeper"):
        old = part(directory, name).pid
        kill(old)
        print(f"{name} serves again after {came_back(directory, name, old, 1.5):.2f} s")
        assert part(directory, name).restarts == 1
    assert teardown.running_guests(layout) == guests


def test_zookeeper_keeps_what_was_written(directory: Path) -> None:
    kazoo = pytest.importorskip("kazoo.client")
    os.environ[network.NO_NAMESPACES_VARIABLE] = "1"
    try:
        up(a_config(directory, hosts=1))
    finally:
        del os.environ[network.NO_NAMESPACES_VARIABLE]
    record = state.read(Layout.of(directory).cluster_json)
    assert record
    assert record.places

    address = record.places.zookeeper

    def client() -> Any:
        return kazoo.KazooClient(hosts=address, timeout=4)

    first = client()
    first.start(timeout=5)
    first.create("/kept", b"value")
    first.stop()
    old = part(directory, "zookeeper").pid
    kill(old)
    came_back(directory, "zookeeper", old, 2)
    second = client()
    second.start(timeout=5)
    assert second.get("/kept")[0] == b"value"
    second.stop()
    second.close()


def test_a_part_that_never_comes_up_is_named_and_nothing_stays(directory: Path) -> None:
    broken = [sys.executable, "-S", "-c", "import sys; sys.exit('no such thing as an API')"]
    with pytest.raises(LocalClusterError, match=r"(?s)api does not come up.*no such thing as an API"):
        up(a_config(directory, commands={"api": broken}))
    assert commands.leftovers(directory) == []


def test_a_part_that_never_serves_is_named(directory: Path) -> None:
    with pytest.raises(LocalClusterError, match=r"not ready after 2 s: api"):
        up(a_config(directory, commands={"api": ["sleep", "600"]}, start_timeout_s=2))
    assert commands.leftovers(directory) == []


def start_up(config: LocalConfig, *options: str) -> subprocess.Popen[str]:
    program = (
        "import sys; from orchestrator.local import commands, config\n"
        "c = config.LocalConfig.model_validate_json(sys.argv[1])\n"
        "try: commands.up(c, foreground='--foreground' in sys.argv)\n"
        "except commands.Interrupted: sys.exit(130)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, config.model_dump_json(), *options],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


# From before the first step to after the last one: 0.9 s and later meets a cluster that is (almost) ready.
@pytest.mark.parametrize("after_s", [0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.75, 0.9])
def test_ctrl_c_at_any_moment_of_up_leaves_nothing(directory: Path, after_s: float) -> None:
    starting = start_up(a_config(directory, hosts=2))
    time.sleep(after_s)
    starting.send_signal(signal.SIGINT)
    _, said = starting.communicate(timeout=20)
    if starting.returncode == 0:
        assert "ready after" in said  # it was through already
        assert commands.down(directory) == []
    # Before Python listens at all, Ctrl-C ends it as it ends anything; nothing has been made by then.
    with contextlib.suppress(OSError):
        directory.rmdir() if not any(directory.iterdir()) else None
    assert commands.leftovers(directory) == []


def test_ctrl_c_while_ray_starts_leaves_nothing(directory: Path) -> None:
    starting = start_up(a_config(directory, hosts=1, ray=True))
    until(lambda: (directory / "ray").exists() and any((directory / "ray").iterdir()), 10)
    starting.send_signal(signal.SIGINT)
    starting.communicate(timeout=20)
    assert starting.returncode == 130
    assert commands.leftovers(directory) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_a_foreground_cluster_ends_all_of_it(directory: Path, number: signal.Signals) -> None:
    staying = start_up(a_config(directory, hosts=1), "--foreground")
    until(lambda: commands.status(directory).state == "ready", 10)
    staying.send_signal(number)
    staying.communicate(timeout=20)
    if number is signal.SIGKILL:
        until(lambda: all(line.startswith("file ") for line in commands.leftovers(directory)), 10)
        assert commands.status(directory).state == "stopped"
        commands.down(directory)
    assert commands.leftovers(directory) == []


def test_after_the_supervisor_was_killed_down_finds_everything(directory: Path) -> None:
    config = a_config(directory, hosts=2)
    up(config)
    layout = Layout.of(directory)
    kill_supervisor(layout)
    assert commands.status(directory).state == "crashed"
    assert len(teardown.find(layout)) >= 6  # everything else lives on
    with pytest.raises(LocalClusterError, match=r"2 of its guests still run.*drover down"):
        up(config)
    assert len(teardown.running_guests(layout)) == 2
    assert commands.down(directory) == []


def test_up_clears_what_a_crashed_cluster_without_guests_left(directory: Path) -> None:
    config = a_config(directory, hosts=2)
    up(config)
    layout = Layout.of(directory)
    kill_supervisor(layout)
    teardown.kill(teardown.running_guests(layout))
    now, said = up(config)
    assert "cleaning up" in said
    assert now.healthy
    assert commands.down(directory) == []


@needs_namespaces
def test_down_clears_a_network_that_was_made_half(directory: Path) -> None:
    layout = Layout.of(directory)
    subprocess.run(["ip", "netns", "add", layout.namespace(1)], check=True)
    stray = subprocess.Popen(network.command_in(layout.namespace(1), ["sleep", "600"]))
    (network.NAMESPACES / layout.namespace(2)).touch()  # where `ip netns add` was killed between its two steps
    until(lambda: len(commands.leftovers(directory)) >= 3, 5)
    left = commands.down(directory)
    assert not any(word in line for line in left for word in ("process", "namespace", "mount"))
    assert stray.wait(5) == -signal.SIGKILL


def test_down_asks_an_up_that_is_under_way_to_stop(directory: Path) -> None:
    starting = start_up(a_config(directory, hosts=2))
    until((directory / "lock").exists, 5)
    time.sleep(0.15)
    assert commands.down(directory) == []
    starting.communicate(timeout=20)
    assert starting.returncode
    assert commands.leftovers(directory) == []


def test_two_ups_at_once_make_one_cluster(directory: Path) -> None:
    config = a_config(directory, hosts=1)
    both = [start_up(config), start_up(config)]
    said = [one.communicate(timeout=30)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert sorted("already runs" in text for text in said) == [False, True]
    record = state.read(Layout.of(directory).cluster_json)
    assert record
    supervisors = [
        seen for seen in processes.scan() if str(directory) in seen.arguments() and "--lock-fd" in seen.arguments()
    ]
    assert [seen.identity for seen in supervisors] == [record.supervisor]


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


def test_loss_of_power(directory: Path) -> None:
    up(a_config(directory, hosts=2))
    layout = Layout.of(directory)
    boot = {host: layout.power_cycle(host).read_text() for host in ("host-1", "host-2")}
    guests = {host: guest for guest, host in teardown.guest_processes(layout).items()}
    others = part(directory, "agent-host-2").pid
    for host in boot:
        (layout.volatile(host) / "marker").touch()

    begun = time.monotonic()
    assert commands.power_cycle(directory, "host-1")
    print(f"power cycle {time.monotonic() - begun:.2f} s")
    assert not processes.is_alive(guests["host-1"])
    assert layout.power_cycle("host-1").read_text() != boot["host-1"]
    assert list(layout.volatile("host-1").iterdir()) == []
    assert (layout.host("host-1") / "guests" / "one" / "vmm.json").exists()  # its disk survives
    # ... and nothing of it reaches another host.
    assert processes.is_alive(guests["host-2"])
    assert layout.power_cycle("host-2").read_text() == boot["host-2"]
    assert (layout.volatile("host-2") / "marker").exists()
    assert part(directory, "agent-host-2").pid == others


def test_power_off_and_on(directory: Path) -> None:
    up(a_config(directory, hosts=2))
    commands.power_cycle(directory, "host-2", off=True)
    time.sleep(0.5)
    dark = part(directory, "agent-host-2")
    assert (dark.pid, dark.state) == (None, "off")
    assert not commands.status(directory).healthy
    assert commands.power_on(directory, "host-2")
    assert commands.status(directory).healthy
    with pytest.raises(LocalClusterError, match="has power"):
        commands.power_on(directory, "host-2")
    with pytest.raises(LocalClusterError, match=r"no host 'host-9'.*host-1, host-2"):
        commands.power_cycle(directory, "host-9")


def test_without_namespaces(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(network.NO_NAMESPACES_VARIABLE, "1")
    with socket.create_server(("127.0.0.12", 7701)):
        now, said = up(a_config(directory, hosts=2))
    assert now.healthy
    assert [line for line in said.splitlines() if "no network namespaces" in line] == [
        "no network namespaces (DROVER_NO_NETNS is set): hosts are loopback addresses without bandwidth limits"
    ]
    agent = json.loads(Layout.of(directory).agent_json("host-2").read_text())
    assert agent["address"] == "127.0.0.12"
    assert agent["control_port"] != 7701  # somebody else's
    assert network.existing(Layout.of(directory)) == []

    old = part(directory, "agent-host-1").pid
    kill(old)
    came_back(directory, "agent-host-1", old, 1.5)
    guests = {host: guest for guest, host in teardown.guest_processes(Layout.of(directory)).items()}
    assert commands.power_cycle(directory, "host-1")
    assert not processes.is_alive(guests["host-1"])
    assert processes.is_alive(guests["host-2"])
    assert commands.down(directory) == []
    assert not processes.is_alive(guests["host-2"])


@needs_namespaces
def test_the_network(directory: Path) -> None:
    up(a_config(directory, hosts=2, bandwidth="400mbit"))
    layout = Layout.of(directory)
    first, second = layout.namespace(1), layout.namespace(2)
    retries = "print(open('/proc/sys/net/ipv4/tcp_retries2').read())"
    assert in_namespace(first, retries) == str(network.TCP_RETRIES)
    assert Path("/proc/sys/net/ipv4/tcp_retries2").read_text().strip() == "15" or os.environ.get("CI")
    receive = (
        "import socket, time\n"
        "s = socket.create_server(('10.77.0.12', 9000)); s.settimeout(10)\n"
        "c = s.accept()[0]; n = 0; t = time.monotonic()\n"
        "while b := c.recv(1 << 18): n += len(b)\n"
        "print(n * 8 / (time.monotonic() - t) / 1e6)\n"
    )
    send = (
        "import socket, time\n"
        "for _ in range(100):\n"
        "    try: s = socket.create_connection(('10.77.0.12', 9000)); break\n"
        "    except OSError: time.sleep(0.05)\n"
        "for _ in range(40): s.sendall(bytes(1 << 20))\n"
    )
    measured: list[float] = []
    receiver = threading.Thread(target=lambda: measured.append(float(in_namespace(second, receive))))
    receiver.start()
    in_namespace(first, send)
    receiver.join(20)
    print(f"400 Mbit/s measured as {measured[0]:.0f}")
    assert 300 < measured[0] < 440


@pytest.mark.long
def test_ray_head_and_its_driver_come_back_together(directory: Path) -> None:
    begun = time.monotonic()
    now, _ = up(a_config(directory, hosts=1, ray=True))
    print(f"with Ray ready after {time.monotonic() - begun:.2f} s")
    assert now.healthy
    layout = Layout.of(directory)
    assert layout.ray_token.stat().st_mode & 0o777 == 0o600
    driver = part(directory, "coordinator").pid
    head = part(directory, "ray").pid
    until(lambda: "raylet" in _ray(layout), 5)
    old = _ray(layout)
    kill(old["gcs_server"].pid)
    print(f"Ray serves again after {came_back(directory, 'ray', head, 15):.2f} s")
    print(f"its driver after {came_back(directory, 'coordinator', driver, 5):.2f} s more")
    assert not any(map(processes.is_alive, old.values()))  # nothing of the old head

    head = part(directory, "ray").pid
    kill(head)
    print(f"launcher killed: serves again after {came_back(directory, 'ray', head, 15):.2f} s")
    begun = time.monotonic()
    assert commands.down(directory) == []
    print(f"down with Ray {time.monotonic() - begun:.2f} s")


def _ray(layout: Layout) -> dict[str, processes.Identity]:
    ours = teardown.find_ray(layout)
    return {seen.name: seen.identity for seen in processes.scan() if seen.identity in ours}


@pytest.mark.long
def test_after_supervisor_and_launcher_were_killed_nothing_of_ray_stays(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without namespaces, where Ray's agents can be told by nothing but the directory that they were started in."""
    monkeypatch.setenv(network.NO_NAMESPACES_VARIABLE, "1")
    up(a_config(directory, hosts=1, ray=True))
    layout = Layout.of(directory)
    until(lambda: any(name.startswith("ray::") for name in _ray(layout)), 10)
    record = state.read(layout.cluster_json)
    assert record
    kill(record.supervisor.pid)
    kill(part(directory, "ray").pid)
    known = set(_ray(layout).values())
    assert known
    assert commands.down(directory) == []
    assert not any(processes.is_alive(identity) for identity in known)
