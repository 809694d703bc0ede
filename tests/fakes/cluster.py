"""A local cluster for tests: started, handed out, ended, and looked after so that nothing of it stays.

    cluster = cluster_fixture(hosts=3)                    # one for the module (scope="session": for the run)

    def test_something(cluster: Cluster) -> None:
        with OrchestratorClient(cluster.api) as client: ...

Every part is the real one unless `stand_ins` names it (tests/fakes/local_part.py) or `without` leaves it out. If the
end of the cluster leaves anything, the fixture fails. With DROVER_KEEP_LOGS=DIR its logs and serial files are copied
there.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest

from deploy.lab.cluster import commands, network, processes, state, teardown, zookeeper
from deploy.lab.cluster import config as configuration
from deploy.lab.cluster.commands import ClusterStatus, PartStatus
from deploy.lab.cluster.config import LocalConfig, PartKind
from deploy.lab.cluster.layout import Layout, LocalClusterError, Places
from deploy.lab.cluster.processes import Identity

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests" / "fakes" / "local_part.py"
KEEP_LOGS_VARIABLE = "DROVER_KEEP_LOGS"
KEPT = ("logs", "serial", "hosts")


def missing() -> str:
    """What a cluster lacks on this machine; empty if nothing."""
    try:
        zookeeper.require()
    except LocalClusterError as error:
        return str(error)
    return ""


def short_directory() -> Path:
    """Not below pytest's: sockets live in it, and their paths are bounded."""
    return Path(tempfile.mkdtemp(prefix="dl", dir="/tmp"))


def make_config(
    directory: Path, *, stand_ins: Collection[PartKind] = (), without: Collection[PartKind] = (), **options: Any
) -> LocalConfig:
    """A configuration in which some parts are stand-ins and some are left out. `options` as in LocalConfig."""
    options.setdefault("start_timeout_s", 150)  # many tests may share the cores
    options["commands"] = {
        **{kind: [sys.executable, "-S", "-E", str(STAND_IN), kind, "{config}"] for kind in stand_ins},
        **{kind: [] for kind in without},
        **options.get("commands", {}),
    }
    return configuration.make(dir=directory, **options)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that runs."""

    config: LocalConfig
    said: str
    """What `up` wrote for the operator."""

    @property
    def layout(self) -> Layout:
        return self.config.layout

    @property
    def dir(self) -> Path:
        return self.layout.dir

    @property
    def api(self) -> str:
        """Address of the API, reachable from every namespace."""
        return f"unix:{self.layout.api_socket}"

    @property
    def record(self) -> state.ClusterRecord:
        record = state.read(self.layout.cluster_json)
        assert record, f"no cluster in {self.dir}"
        return record

    @property
    def places(self) -> Places:
        """Addresses and namespaces of hosts and management; see `inside`."""
        places = self.record.places
        assert places
        return places

    @property
    def zookeeper(self) -> str:
        """host:port, reachable `inside` the management namespace."""
        return self.places.zookeeper

    def status(self) -> ClusterStatus:
        return commands.status(self.dir)

    def part(self, name: str) -> PartStatus:
        """By name: zookeeper, ray, api, collector, coordinator, agent-host-1, ..."""
        return next(part for part in self.status().parts if part.name == name)

    def guests(self) -> set[Identity]:
        """The VMM processes that live."""
        return teardown.running_guests(self.layout)

    def kill(self, name: str) -> int:
        """SIGKILL a part's process; the pid that it had."""
        pid = self.part(name).pid
        kill(pid)
        assert pid
        return pid

    def started_again(self, name: str, old: int) -> float:
        """Wait until a part is another process; seconds since 1970 when that was started, by the supervisor's word."""
        until(lambda: self.part(name).pid not in {None, old}, 40)
        return self.part(name).up_since or 0

    def came_back(self, name: str, old: int, timeout_s: float = 40) -> float:
        """Wait until a part serves again as another process; seconds that it took."""

        def is_new() -> bool:
            now = self.part(name)
            return now.pid not in {None, old} and now.health == "ok"

        return until(is_new, timeout_s)

    def kill_supervisor(self) -> None:
        supervisor = self.record.supervisor
        kill(supervisor.pid)
        until(lambda: not processes.is_alive(supervisor), 40)

    def inside(self, function: Callable[[], T], host: str = "") -> T:
        """Call it in the namespace of a host, or of the management; also what it starts (threads, loops) is there."""
        places = self.places
        namespace = places.management_namespace
        if host:
            namespace = next(place.namespace for place in places.hosts if place.name == host)
        return in_namespace(namespace, function)


def in_namespace(namespace: str | None, function: Callable[[], T]) -> T:
    """Call it in a thread that lives in the namespace."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            if namespace is not None:
                network.enter(namespace)
            result.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


@contextlib.contextmanager
def _choosing_ports() -> Generator[None]:
    """Without namespaces all clusters of the machine share its ports. A free one is free until its part listens: two
    processes that run tests must not choose at the same time."""
    if network.obstacle() is None:
        yield
        return
    with (Path(tempfile.gettempdir()) / "drover-tests-choose-ports").open("a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def running_cluster(config: LocalConfig) -> Generator[Cluster]:
    """Up, and down whatever happens; fails if anything stays."""
    out = io.StringIO()
    try:
        with _choosing_ports():
            commands.up(config, out=out)
        yield Cluster(config, out.getvalue())
    finally:
        _keep_logs(config.layout)
        left = commands.down(config.dir)
    assert left == [], f"the cluster left {left}"


def cluster_fixture(scope: Literal["function", "module", "session"] = "module", **options: Any) -> Any:
    """A fixture that yields a Cluster; `options` as for `make_config`."""

    @pytest.fixture(scope=scope)
    def cluster() -> Iterator[Cluster]:
        if lacking := missing():
            pytest.skip(lacking)
        directory = short_directory()
        try:
            with running_cluster(make_config(directory, **options)) as running:
                yield running
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    return cluster


def _keep_logs(layout: Layout) -> None:
    if keep := os.environ.get(KEEP_LOGS_VARIABLE):
        for name in KEPT:
            if (layout.dir / name).exists():
                # Sockets are no files to copy.
                ignore = shutil.ignore_patterns("*.sock", "*.qmp", "*.oob", "*.dev", "*.ctl")
                with contextlib.suppress(shutil.Error, OSError):
                    shutil.copytree(layout.dir / name, Path(keep) / layout.id / name, ignore=ignore, dirs_exist_ok=True)


def until(true: Callable[[], bool], timeout_s: float, what: str = "") -> float:
    """Seconds until it is true."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < timeout_s, f"not within {timeout_s} s: {what or 'what was waited for'}"
        time.sleep(0.02)
    return time.monotonic() - begun


def kill(pid: int | None) -> None:
    assert pid, "no such process"
    os.kill(pid, signal.SIGKILL)
