"""Whatever is interrupted or killed, and whenever: nothing of a local cluster stays.

Instants are random; each test prints its seed and takes another from DROVER_SEED. With DROVER_LONG=1 there are many
more of them, with a real Ray head.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.lab.cluster import commands, network, processes, state, teardown
from deploy.lab.cluster.config import LocalConfig
from deploy.lab.cluster.layout import RAY_ADDRESS, Layout, LocalClusterError
from deploy.lab.cluster.processes import Identity
from tests.fakes.cluster import ROOT, Cluster, kill, make_config, missing, running_cluster, short_directory, until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.zookeeper,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
long = [pytest.mark.long, pytest.mark.skipif("DROVER_LONG" not in os.environ, reason="many instants: DROVER_LONG=1")]


@pytest.fixture
def directory() -> Iterator[Path]:
    """Whatever the test did, nothing of its cluster stays."""
    path = short_directory()
    yield path
    commands.down(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def chance() -> random.Random:
    seed = int(os.environ.get("DROVER_SEED") or random.randrange(10**6))
    print(f"DROVER_SEED={seed}")
    return random.Random(seed)


def a_config(directory: Path, *, ray: bool = False, **options: Any) -> LocalConfig:
    options.setdefault("hosts", 2)
    stand_ins = ("agent", "api", "collector", "coordinator")
    return make_config(directory, stand_ins=stand_ins, without=() if ray else ("ray",), **options)


def start_up(config: LocalConfig, *options: str) -> subprocess.Popen[str]:
    program = (
        # A shell that runs the tests in the background must not make them deaf.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from deploy.lab.cluster import commands, config\n"
        "c = config.LocalConfig.model_validate_json(sys.argv[1])\n"
        "try: commands.up(c, foreground='--foreground' in sys.argv)\n"
        "except (commands.Interrupted, KeyboardInterrupt): sys.exit(130)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, config.model_dump_json(), *options],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(starting: subprocess.Popen[str]) -> str:
    _, said = starting.communicate(timeout=60)
    return said


def time_to_start_s(**options: Any) -> float:
    """Of one `up` from the start of its process, as busy as the machine is now."""
    directory = short_directory()
    try:
        begun = time.monotonic()
        starting = start_up(a_config(directory, **options))
        assert "ready after" in end(starting)
        return time.monotonic() - begun
    finally:
        commands.down(directory)
        shutil.rmtree(directory, ignore_errors=True)


def assert_nothing_stays(directory: Path, context: str) -> None:
    # The test made the directory; `up` may not have got so far as to make it its own.
    with contextlib.suppress(OSError):
        directory.rmdir()
    assert commands.leftovers(directory) == [], context


# --- interrupts ------------------------------------------------------------------------------------------------------


def interrupt_ups(chance: random.Random, rounds: int, *, ray: bool = False) -> None:
    """Start a cluster, interrupt it at some instant, often more than once, and look."""
    within_s = 1.2 * time_to_start_s(ray=ray)  # the last instants meet a cluster that is ready
    outcomes: list[str] = []
    for number in range(rounds):
        directory = short_directory()
        foreground = ["--foreground"] if chance.random() < 0.3 else []
        after_s = chance.uniform(0, within_s)
        blows = [chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]) for _ in range(chance.randint(1, 3))]
        context = f"round {number}: {[blow.name for blow in blows]} after {after_s:.3f} s {foreground}"
        try:
            starting = start_up(a_config(directory, ray=ray), *foreground)
            time.sleep(after_s)
            for blow in blows:
                starting.send_signal(blow)
                time.sleep(chance.uniform(0, 0.1))
            said = end(starting)
            assert "Traceback" not in said or starting.returncode, f"{context}\n{said}"
            if "ready after" in said and not foreground:  # it was through already
                assert commands.status(directory).healthy, context
                assert commands.down(directory) == [], context
            else:
                assert starting.returncode or foreground, context
            outcomes.append(f"{after_s:.2f}:{starting.returncode}")
            assert_nothing_stays(directory, f"{context}\n{said}")
        finally:
            commands.down(directory)
            shutil.rmtree(directory, ignore_errors=True)
    print(f"instants until {within_s:.2f} s, each with the exit status:", *outcomes)


def test_ctrl_c_at_any_moment_of_up_leaves_nothing(chance: random.Random) -> None:
    interrupt_ups(chance, 14)


def test_ctrl_c_at_any_moment_without_namespaces(chance: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(network.NO_NAMESPACES_VARIABLE, "1")
    interrupt_ups(chance, 4)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("loopback", [pytest.param("0", marks=long), pytest.param("1", marks=long)])
def test_ctrl_c_at_many_moments(chance: random.Random, monkeypatch: pytest.MonkeyPatch, loopback: str) -> None:
    monkeypatch.setenv(network.NO_NAMESPACES_VARIABLE, loopback)
    interrupt_ups(chance, 120, ray=True)


def test_ctrl_c_while_ray_starts_leaves_nothing(directory: Path) -> None:
    starting = start_up(a_config(directory, hosts=1, ray=True))
    until(lambda: (directory / "ray").exists() and any((directory / "ray").iterdir()), 60)
    starting.send_signal(signal.SIGINT)
    end(starting)
    assert starting.returncode == 130
    assert_nothing_stays(directory, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_end_of_a_foreground_cluster_ends_all_of_it(directory: Path, number: signal.Signals) -> None:
    staying = start_up(a_config(directory, hosts=1), "--foreground")
    until(lambda: commands.status(directory).state == "ready", 60)
    time.sleep(0.3)
    assert staying.poll() is None
    staying.send_signal(number)
    end(staying)
    if number is signal.SIGKILL:
        until(lambda: all(line.startswith("file ") for line in commands.leftovers(directory)), 60)
        assert commands.status(directory).state == "stopped"
        commands.down(directory)
    assert_nothing_stays(directory, "")


def test_a_foreground_cluster_that_ends_by_itself_says_so(directory: Path) -> None:
    staying = start_up(a_config(directory, hosts=1), "--foreground")
    until(lambda: commands.status(directory).state == "ready", 60)
    Cluster(a_config(directory), "").kill_supervisor()
    said = end(staying)
    assert "the cluster process ended: signal 9" in said
    assert "of its guests go on: `drover down` ends them and cleans up" in said
    assert staying.returncode == 1
    commands.down(directory)
    assert_nothing_stays(directory, "")


# --- kill -9, then down ----------------------------------------------------------------------------------------------


def ray_processes(layout: Layout) -> dict[str, Identity]:
    ours = teardown.find_ray(layout)
    return {seen.name: seen.identity for seen in processes.scan() if seen.identity in ours}


def victims(cluster: Cluster) -> dict[str, int]:
    """Every kind of process that there is, by name."""
    found = {part.name: part.pid for part in cluster.status().parts if part.pid and part.kind != "ray"}
    found |= {name: identity.pid for name, identity in ray_processes(cluster.layout).items()}
    found["ray"] = cluster.part("ray").pid or 0
    return {"supervisor": cluster.record.supervisor.pid, **found}


WITH_RAY = ("supervisor", "ray", "gcs_server", "raylet", "all at once")
WITHOUT_RAY = ("zookeeper", "agent-host-1", "coordinator")
"""Ray, which takes long to start, has nothing to do with their end."""


@pytest.mark.parametrize("victim", WITH_RAY + WITHOUT_RAY)
def test_after_kill_9_down_leaves_nothing(directory: Path, chance: random.Random, victim: str) -> None:
    ray = victim in WITH_RAY
    with running_cluster(a_config(directory, ray=ray)) as cluster:
        if ray:
            until(lambda: "raylet" in ray_processes(cluster.layout), 60)
        there = victims(cluster) if ray else {victim: cluster.part(victim).pid or 0}
        for name in there if victim == "all at once" else [victim]:
            with contextlib.suppress(ProcessLookupError):
                kill(there[name])
        # At once, while it is being started again, or after that.
        time.sleep(chance.choice([0, chance.uniform(0, 1)]))
        begun = time.monotonic()
        guests = cluster.guests()
        assert commands.down(directory) == []
        print(f"{victim} killed: down after {time.monotonic() - begun:.2f} s")
        assert not any(map(processes.is_alive, guests))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("loopback", [pytest.param("0", marks=long), pytest.param("1", marks=long)])
def test_after_many_kills_down_leaves_nothing(
    chance: random.Random, monkeypatch: pytest.MonkeyPatch, loopback: str
) -> None:
    """Several at a time, also while the cluster starts."""
    monkeypatch.setenv(network.NO_NAMESPACES_VARIABLE, loopback)
    within_s = 3 * time_to_start_s(ray=True)
    for number in range(60):
        directory = short_directory()
        try:
            starting = start_up(a_config(directory, ray=True))
            time.sleep(chance.uniform(0.2, within_s))
            living = list(teardown.find(Layout.of(directory)))
            for identity in chance.sample(living, min(len(living), chance.randint(1, 4))):
                processes.send(identity, signal.SIGKILL)
            if chance.random() < 0.5:
                starting.kill()
            time.sleep(chance.choice([0, chance.uniform(0, 2)]))
            assert commands.down(directory) == [], f"round {number}"
            end(starting)
            assert commands.down(directory) == [], f"round {number}"
        finally:
            commands.down(directory)
            shutil.rmtree(directory, ignore_errors=True)


def test_after_up_was_killed_down_leaves_nothing(chance: random.Random) -> None:
    within_s = 1.2 * time_to_start_s()
    for number in range(6):
        directory = short_directory()
        after_s = chance.uniform(0.1, within_s)
        try:
            starting = start_up(a_config(directory))
            time.sleep(after_s)
            starting.kill()
            time.sleep(chance.choice([0, chance.uniform(0, 0.3)]))
            commands.down(directory)
            end(starting)
            assert_nothing_stays(directory, f"round {number}: killed after {after_s:.3f} s")
        finally:
            commands.down(directory)
            shutil.rmtree(directory, ignore_errors=True)


def test_after_down_was_killed_the_next_down_ends_it(directory: Path, chance: random.Random) -> None:
    program = "import sys; from deploy.lab.cluster import commands; commands.down(sys.argv[1])"
    for _ in range(3):
        with running_cluster(a_config(directory)):
            ending = subprocess.Popen([sys.executable, "-c", program, str(directory)], cwd=ROOT)
            time.sleep(chance.uniform(0.05, 0.35))
            ending.kill()
            ending.wait()
            assert commands.down(directory) == []


def test_after_the_supervisor_was_killed_nothing_starts_over_its_guests(directory: Path) -> None:
    config = a_config(directory)
    with running_cluster(config) as cluster:
        cluster.kill_supervisor()
        assert cluster.status().state == "crashed"
        assert {part.health for part in cluster.status().parts} == {"unwatched: the supervisor is gone"}
        assert len(teardown.find(cluster.layout)) >= 6  # everything else lives on
        with pytest.raises(LocalClusterError, match=r"2 of its guests still run.*drover down"):
            commands.up(config)
        assert len(cluster.guests()) == 2
        assert commands.down(directory) == []


def test_up_clears_what_a_crashed_cluster_without_guests_left(directory: Path) -> None:
    config = a_config(directory)
    with running_cluster(config) as cluster:
        cluster.kill_supervisor()
        teardown.kill(cluster.guests())
        with running_cluster(config) as again:
            assert "cleaning up" in again.said
            assert again.status().healthy


def test_down_finds_a_cluster_whose_directory_was_removed(directory: Path) -> None:
    with running_cluster(a_config(directory)) as cluster:
        guests, layout = cluster.guests(), cluster.layout
        assert guests
        shutil.rmtree(directory)
        assert commands.down(directory) == []
        assert teardown.find(layout) == {}
        assert not any(map(processes.is_alive, guests))


def test_a_supervisor_that_cannot_write_goes_on_and_writes_again_once_it_can(directory: Path) -> None:
    """As on a full disk: its record can no longer be replaced."""
    with running_cluster(a_config(directory, hosts=1)) as cluster:
        supervisor, agent = cluster.record.supervisor, cluster.part("agent-host-1").pid
        cluster.layout.cluster_json.unlink()
        cluster.layout.cluster_json.mkdir()
        kill(agent)
        time.sleep(2)  # for it to start another agent, which it cannot write down
        assert processes.is_alive(supervisor)
        cluster.layout.cluster_json.rmdir()
        until(cluster.layout.cluster_json.is_file, 60)
        until(lambda: cluster.part("agent-host-1").pid not in {None, agent}, 60)
        assert cluster.record.supervisor == supervisor


def test_down_asks_an_up_that_is_under_way_to_stop(directory: Path, chance: random.Random) -> None:
    starting = start_up(a_config(directory))
    until((directory / "lock").exists, 60)
    time.sleep(chance.uniform(0, 0.5))
    assert commands.down(directory) == []
    end(starting)
    assert starting.returncode
    assert commands.leftovers(directory) == []


def test_two_ups_at_once_make_one_cluster(directory: Path) -> None:
    config = a_config(directory, hosts=1)
    both = [start_up(config), start_up(config)]
    said = [end(one) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert sorted("already runs" in text for text in said) == [False, True]
    record = state.read(Layout.of(directory).cluster_json)
    assert record
    supervisors = [
        seen for seen in processes.scan() if str(directory) in seen.arguments() and "--lock-fd" in seen.arguments()
    ]
    assert [seen.identity for seen in supervisors] == [record.supervisor]


# --- Ray -------------------------------------------------------------------------------------------------------------


def test_ray_head_and_its_driver_come_back_together(directory: Path) -> None:
    begun = time.monotonic()
    with running_cluster(a_config(directory, hosts=1, ray=True)) as cluster:
        print(f"with Ray ready after {time.monotonic() - begun:.2f} s")
        assert cluster.status().healthy
        assert cluster.layout.ray_token.stat().st_mode & 0o777 == 0o600
        driver, head = cluster.part("coordinator").pid, cluster.part("ray").pid
        assert driver
        assert head
        until(lambda: "raylet" in ray_processes(cluster.layout), 60)
        old = ray_processes(cluster.layout)
        kill(old["gcs_server"].pid)
        print(f"GCS killed: Ray serves again after {cluster.came_back('ray', head):.2f} s")
        print(f"its driver after {cluster.came_back('coordinator', driver):.2f} s more")
        assert not any(map(processes.is_alive, old.values()))  # nothing of the old head

        head = cluster.kill("ray")
        print(f"launcher killed: serves again after {cluster.came_back('ray', head):.2f} s")
        begun = time.monotonic()
        assert commands.down(directory) == []
        print(f"down with Ray {time.monotonic() - begun:.2f} s")


def test_another_ray_than_expected_is_started_by_its_own_command(directory: Path) -> None:
    program = "import ray; ray.__version__ = '3.0.0'; from orchestrator.coordinator import ray_head; ray_head.main()"
    options = [f"--address={RAY_ADDRESS}", "--port=6379", "--client-port=10001", "--cpus=1", "--dir={dir}/ray"]
    config = a_config(directory, hosts=1, ray=True, commands={"ray": [sys.executable, "-c", program, *options]})
    with running_cluster(config) as cluster:
        launcher = processes.look(cluster.part("ray").pid or 0)
        assert launcher
        assert "ray.scripts.scripts" in launcher.arguments()
        assert "using `ray start`" in (cluster.layout.logs / "ray.log").read_text()
        until(lambda: "raylet" in ray_processes(cluster.layout), 60)


def test_after_supervisor_and_launcher_were_killed_nothing_of_ray_stays(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without namespaces, where Ray's agents can be told by nothing but the directory that they were started in."""
    monkeypatch.setenv(network.NO_NAMESPACES_VARIABLE, "1")
    with running_cluster(a_config(directory, hosts=1, ray=True)) as cluster:
        until(lambda: any(name.startswith("ray::") for name in ray_processes(cluster.layout)), 60)
        launcher = cluster.part("ray").pid
        cluster.kill_supervisor()
        kill(launcher)
        known = set(ray_processes(cluster.layout).values())
        assert known
        assert commands.down(directory) == []
        assert not any(map(processes.is_alive, known))


# --- a fault of the supervisor's own ----------------------------------------------------------------------------------


def test_a_fault_of_the_supervisor_leaves_the_guests_alone(directory: Path) -> None:
    """It gives up and says why; what runs goes on, and `down` ends it."""
    config = a_config(directory)
    config.layout.lock.touch()
    config.layout.config_json.write_text(config.model_dump_json())
    program = (
        "import asyncio, sys\n"
        "from deploy.lab.cluster import supervisor\n"
        "async def broken(self):\n"
        "    while self._ready_after_s is None: await asyncio.sleep(0.05)\n"
        "    raise RuntimeError('a bug')\n"
        "supervisor.LocalSupervisor._tidy = broken\n"
        "from deploy.lab.cluster.__main__ import main\n"
        "main(['--dir', sys.argv[1]])\n"
    )
    command = [sys.executable, "-c", program, str(directory)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 1, ran.stderr
    guests = teardown.running_guests(config.layout)
    assert len(guests) == 2, ran.stderr
    now = commands.status(directory)
    assert (now.running, now.state) == (False, "crashed")
    assert now.failure == "the supervisor failed: RuntimeError: a bug"
    assert all(part.pid for part in now.parts), "parts go on as well"
    with pytest.raises(LocalClusterError, match="2 of its guests still run"):
        commands.up(config)
    assert commands.down(directory) == []
    assert not any(map(processes.is_alive, guests))
