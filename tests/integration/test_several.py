"""More than one of everything: each part is killed or frozen in turn, under running migrations and an evacuation.

One cluster bears all blows. Between two of them nothing is awaited but that the jobs are over: a part that was killed
may still be starting when the next one is hit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from deploy.lab.cluster import network, processes, teardown, zookeeper
from deploy.lab.cluster.layout import Server
from deploy.lab.cluster.processes import Identity
from orchestrator import wire
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import Leader
from orchestrator.ledger import paths
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.cluster import Cluster, make_config, missing, running_cluster, short_directory, until
from tests.integration.handover.judge import judge
from tests.integration.handover.scene import Born, Observer, Scene, reach

pytestmark = [
    pytest.mark.integration,
    pytest.mark.zookeeper,
    pytest.mark.qemu,
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
]

GUESTS = 4
SLOW_MBPS = 60
"""A guest of 64 MiB takes seconds."""
OVER_S = 90.0
CLI_S = 60.0


class Crowd:
    """The cluster, and its guests on the way from one host to another and back."""

    def __init__(self, cluster: Cluster, client: OrchestratorClient, observer: Observer) -> None:
        self.cluster = cluster
        self.client = client
        self.scene = Scene(cluster, client, observer, "several")
        self.frozen: set[Identity] = set()
        self.guests: list[Born] = []

    # --- who is who -------------------------------------------------------------------------------------------------

    def leader(self) -> str:
        """The seat that leads."""
        found = self.scene.observer.read(Leader, paths.leader())
        return found.name if found else ""

    def led(self) -> Server:
        name = self.leader()
        return next(seat for seat in self.cluster.places.seats if seat.name == name)

    def seats(self) -> tuple[str, ...]:
        return self.scene.observer.run(self.scene.observer.store.children(paths.SEATS))

    def server(self, mode: str) -> str:
        """A ZooKeeper server that leads the ensemble, or follows."""

        def look() -> str:
            for one in self.cluster.places.zookeepers:
                with contextlib.suppress(OSError):
                    if f"Mode: {mode}" in ask("srvr", one.address, self.cluster.places.zookeeper_port):
                        return one.name
            raise AssertionError(f"no ZooKeeper server is {mode}")

        return self.cluster.inside(look)

    def part(self, name: str) -> Identity:
        pid = self.cluster.part(name).pid
        found = processes.identify(pid or 0)
        assert found, name
        return found

    # --- blows ------------------------------------------------------------------------------------------------------

    def kill(self, *doomed: Identity) -> None:
        for one in doomed:
            processes.send(one, signal.SIGKILL)

    def freeze(self, *doomed: Identity) -> None:
        for one in doomed:
            if processes.send(one, signal.SIGSTOP):
                self.frozen.add(one)

    def thaw(self) -> None:
        for one in self.frozen:
            processes.send(one, signal.SIGCONT)
        self.frozen.clear()

    # --- work -------------------------------------------------------------------------------------------------------

    def under(self, blow: Callable[[], None]) -> None:
        """Strike while guests move, and have all of it end well: half of them one by one, the others as a job."""
        source, away = self.scene.here, self.scene.there
        singles, job_guests = self.guests[: GUESTS // 2], self.guests[GUESTS // 2 :]
        assert {self.scene.record(guest).owner.host for guest in self.guests} == {source}
        policy = {"max_bandwidth_mbps": SLOW_MBPS, "max_attempts": 20}
        made = [self.client.create_migration(guest.name, away, policy).name for guest in singles]
        until(lambda: any(self.client.get_migration(name).attempt for name in made), 60, "a migration under way")
        job = self.client.create_evacuation(source, policy=policy).evacuation.name
        begun = time.monotonic()
        blow()
        until(lambda: all(self.ended(name) for name in made), OVER_S, "the end of the migrations")
        until(lambda: self.job_ended(job), OVER_S, "the end of the evacuation")
        print(f"all was over {time.monotonic() - begun:.1f} s after the blow")
        assert [wire.word(self.client.get_migration(name), "phase") for name in made] == ["SUCCEEDED"] * len(made)
        over = self.client.get_evacuation(job)
        assert wire.word(over, "phase") == "SUCCEEDED", over
        assert not any(self.scene.record(guest).owner.host == source for guest in self.guests), job_guests
        self.gather(source, away)

    def gather(self, source: str, away: str) -> None:
        """All on one host again, which is the next source."""
        reach(lambda: self.client.uncordon_host(source).name, "an uncordon")
        strays = [guest for guest in self.guests if self.scene.record(guest).owner.host != away]
        made = [
            reach(lambda guest=guest: self.client.create_migration(guest.name, away).name, "a way") for guest in strays
        ]
        until(lambda: all(self.ended(name) for name in made), OVER_S, "all of them on one host")
        third = self.scene.third
        self.scene.here, self.scene.there, self.scene.third = away, third, source

    def move(self, guest: Born, away: str) -> str:
        return reach(lambda: self.client.create_migration(guest.name, away).name, "a migration")

    def ended(self, name: str) -> bool:
        return self.looked(lambda: bool(self.client.get_migration(name).end_time.seconds))

    def job_ended(self, name: str) -> bool:
        return self.looked(lambda: bool(self.client.get_evacuation(name).end_time.seconds))

    @staticmethod
    def looked(look: Callable[[], bool]) -> bool:
        """As the command line's watches do: an ensemble without a leader has no answer for some seconds."""
        try:
            return look()
        except DroverError as error:
            if error.reason is not RefusalReason.LEDGER_UNREACHABLE:
                raise
            return False

    def cli(self) -> float:
        """One call of the command line, in a process of its own; seconds."""
        begun = time.monotonic()
        told = subprocess.run(
            [sys.executable, "-m", "orchestrator.cli.main", "--dir", str(self.cluster.dir), "guest", "list"],
            capture_output=True,
            text=True,
            timeout=CLI_S,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )
        assert told.returncode == 0, told.stderr
        assert all(guest.name in told.stdout for guest in self.guests)
        return time.monotonic() - begun


def ask(word: str, address: str, port: int) -> str:
    import asyncio

    return asyncio.run(zookeeper._ask(word, address, port, 1.0, None))


@pytest.fixture(scope="module", params=["namespaces", "loopback"])
def crowd(request: pytest.FixtureRequest) -> Iterator[Crowd]:
    directory = short_directory()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        if request.param == "loopback":
            patch.setenv(network.NO_NAMESPACES_VARIABLE, "1")
        shards = 2 if request.param == "namespaces" else 1
        config = make_config(directory, hosts=3, zookeeper=3, coordinators=2, apis=2, shards=shards)
        cluster = stack.enter_context(running_cluster(config))
        if request.param == "namespaces" and cluster.places.management_namespace is None:
            pytest.skip("no network namespaces here")
        sockets = ",".join(f"unix:{cluster.layout.api_socket_of(one)}" for one in cluster.places.apis)
        client = stack.enter_context(OrchestratorClient(sockets, timeout_s=30))
        observer = stack.enter_context(contextlib.closing(Observer(cluster)))
        crowd = Crowd(cluster, client, observer)
        stack.callback(crowd.thaw)
        crowd.guests += [crowd.scene.guest() for _ in range(GUESTS)]
        yield crowd


def test_status_shows_every_part_and_both_seats_are_there(crowd: Crowd) -> None:
    names = {part.name for part in crowd.cluster.status().parts}
    pairs = {f"{kind}-{n}" for kind in ("api", "ray", "coordinator") for n in (1, 2)}
    assert names >= {"zookeeper-1", "zookeeper-2", "zookeeper-3", *pairs}
    until(lambda: crowd.cluster.status().healthy, 60)
    assert crowd.seats() == ("coordinator-1", "coordinator-2")
    assert crowd.leader() in crowd.seats()
    if crowd.cluster.places.management_namespace:
        everywhere = [*crowd.cluster.places.zookeepers, *crowd.cluster.places.apis, *crowd.cluster.places.seats]
        assert len({one.namespace for one in everywhere}) == len(everywhere)


def zookeeper_leader_killed(crowd: Crowd) -> None:
    crowd.kill(crowd.part(crowd.server("leader")))


def zookeeper_leader_frozen(crowd: Crowd) -> None:
    crowd.freeze(crowd.part(crowd.server("leader")))


def api_killed(crowd: Crowd) -> None:
    crowd.kill(crowd.part("api-1"))
    print(f"the command line with api-1 killed: {crowd.cli():.1f} s")


def api_frozen(crowd: Crowd) -> None:
    crowd.freeze(crowd.part("api-2"))
    print(f"the command line with api-2 frozen: {crowd.cli():.1f} s")


def leader_s_ray_killed(crowd: Crowd) -> None:
    """Whoever is quicker leads then: the other seat when the session ends, or this one with a new Ray."""
    seat, before, begun = crowd.led(), crowd.scene.epoch(), time.monotonic()
    crowd.kill(*teardown.find_ray(crowd.cluster.layout, seat.ray_head), crowd.part(seat.name))
    until(lambda: crowd.scene.epoch() > before, 60, "somebody to lead")
    print(f"{crowd.leader()} leads {time.monotonic() - begun:.1f} s after {seat.ray_head} was killed")


def leader_s_ray_frozen(crowd: Crowd) -> None:
    seat = crowd.led()
    crowd.freeze(*teardown.find_ray(crowd.cluster.layout, seat.ray_head))
    begun = time.monotonic()
    until(lambda: crowd.leader() not in ("", seat.name), 60, "the other seat to lead")
    print(f"the other seat leads {time.monotonic() - begun:.1f} s after the freeze")
    crowd.thaw()  # what the old leader still wants to write is refused


BLOWS = (
    leader_s_ray_killed,
    zookeeper_leader_killed,
    api_killed,
    leader_s_ray_frozen,
    zookeeper_leader_frozen,
    api_frozen,
)


def test_each_part_in_turn(crowd: Crowd) -> None:
    blows = BLOWS
    if crowd.cluster.places.management_namespace is None and "DROVER_LONG" not in os.environ:
        blows = blows[:2]  # what they prove does not depend on namespaces; that the parts find each other does
    for blow in blows:
        begun = time.monotonic()
        print(f"--- {blow.__name__}")
        crowd.under(partial(blow, crowd))
        crowd.thaw()
        print(f"{blow.__name__}: {time.monotonic() - begun:.1f} s in all")
    until(lambda: crowd.cluster.status().healthy, 90, "everything to be well again")
    assert crowd.seats() == ("coordinator-1", "coordinator-2")
    judge(crowd.scene, crowd.guests)
