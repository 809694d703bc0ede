"""One cluster for all tests of the hand-over; each makes guests of its own, is judged, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Generator, Iterator

import pytest

from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.cluster import Cluster, make_config, missing, running_cluster, short_directory
from tests.integration.handover.judge import judge, nothing_is_left
from tests.integration.handover.scene import Observer, Scene

HOSTS = ("host-1", "host-2", "host-3")


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


class Clusters:
    """The cluster that runs, and another in its place once a test has spoiled it."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._running: tuple[Cluster, OrchestratorClient, Observer] | None = None
        self._turn = -1

    def get(self) -> tuple[Cluster, OrchestratorClient, Observer]:
        if self._running is None:
            directory = short_directory()
            self._stack.callback(shutil.rmtree, directory, ignore_errors=True)
            cluster = self._stack.enter_context(running_cluster(make_config(directory, hosts=len(HOSTS), chaos=True)))
            client = self._stack.enter_context(OrchestratorClient(cluster.api))
            observer = self._stack.enter_context(contextlib.closing(Observer(cluster)))
            self._running = cluster, client, observer
        return self._running

    def roles(self) -> tuple[str, ...]:
        """The hosts in another order each time: an agent that is killed again and again is started ever later."""
        self._turn += 1
        return tuple(HOSTS[(self._turn + n) % len(HOSTS)] for n in range(len(HOSTS)))

    def end(self) -> None:
        stack, self._stack, self._running = self._stack, contextlib.ExitStack(), None
        stack.close()


@pytest.fixture(scope="package")
def clusters() -> Iterator[Clusters]:
    if lacking := missing():
        pytest.skip(lacking)
    if not shutil.which("qemu-system-x86_64"):
        pytest.skip("qemu-system-x86_64 is not installed")
    running = Clusters()
    yield running
    running.end()


@pytest.fixture
def scene(clusters: Clusters, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """Judged after the test, whatever it did; if its guests do not end well, the next test gets a new cluster."""
    cluster, client, observer = clusters.get()
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower()).strip("-")
    made = Scene(cluster, client, observer, f"{name[:40].strip('-')}-{os.urandom(2).hex()}", clusters.roles())
    try:
        yield made
        made.thaw_all()
        made.ledger_is_back()
        made.agents_are_back()
        made.coordinator_is_back()
        made.uncordon()
        if request.node.stash.get(_FAILED, False):
            made.cancel_all()  # what it had under way; a test that passed waited for it
        for verdict in judge(made, made.guests):
            print(f"{verdict.guest} stopped for {list(verdict.stops_ms)} ms by its own heartbeats")
        made.end_guests(made.guests)
        nothing_is_left(made, made.guests)
    except BaseException:
        made.thaw_all()
        clusters.end()
        raise
