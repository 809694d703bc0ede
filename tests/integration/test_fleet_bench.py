"""The short form of `make bench-fleet` and `make soak`: what holds at any size, on any machine."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deploy.lab.cluster import teardown
from deploy.lab.cluster.layout import Layout
from orchestrator.core.records import GuestSpec
from tests.bench import soak
from tests.bench.fleet import figures, fill, scenes
from tests.bench.fleet.figures import Figure
from tests.bench.fleet.plane import isolated, running
from tests.fakes.cluster import ROOT
from tests.fakes.zookeeper import missing

pytestmark = [
    pytest.mark.integration,
    pytest.mark.zookeeper,
    pytest.mark.timeout(420),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
HOSTS, GUESTS = 8, 600
"""More guests than one migration reads nodes, so that a look at all of them shows."""


def value_of(found: Sequence[Figure], name: str) -> float:
    value = next(one.value for one in found if name in one.name)
    assert value is not None
    return value


def must_be_gone(layout: Layout) -> None:
    assert not layout.dir.exists()
    assert not teardown.find(layout)


async def _measured() -> tuple[list[Figure], Layout]:
    async with running() as plane:
        await fill.fill_guests(plane.store, HOSTS, GUESTS)
        await plane.start_agents(HOSTS, GUESTS)
        await plane.start_control()
        await scenes.settle(plane, GUESTS, 0.0)
        found = await scenes.at_rest(plane, 5.0)
        found += await scenes.placement(plane, GUESTS)
        found += await scenes.start(plane, 16, GUESTS)
        found += await scenes.lists(plane, GUESTS)
        alone = await scenes.clean_migrations(plane, 3, 1)
        found += [figures.beside(f"{one.name}, alone", one.value or 0.0, one.unit) for one in alone]
        for count in (24, 72):
            some = await scenes.clean_migrations(plane, count, 24)
            found += [figures.beside(f"{one.name} of {count}", one.value or 0.0, one.unit) for one in some]
        return found, plane.layout


def test_a_placement_reads_no_fleet_and_each_migration_writes_alike(tmp_path: Path) -> None:
    found, layout = isolated(lambda: asyncio.run(_measured()))
    must_be_gone(layout)
    assert value_of(found, "full scans") == 0
    assert value_of(found, "quorum writes, no device, alone") <= 8
    few, many = (value_of(found, f"quorum writes, no device of {count}") for count in (24, 72))
    assert many <= 1.2 * few
    report = tmp_path / "bench.json"
    figures.write(report, found, scale=0.01)
    written = json.loads(report.read_text())
    assert written["scale"] == 0.01
    assert all({"name", "value", "unit", "target", "met"} <= set(one) for one in written["figures"])
    assert {one["met"] for one in written["figures"]} <= {True, False, None}
    assert all(one["target"] for one in written["figures"] if one["met"] is not None)


BENCH = """
import asyncio
from tests.bench.ending import ends_well
from tests.bench.fleet import fill
from tests.bench.fleet.plane import isolate, running

async def bench():
    ends_well()
    async with running() as plane:
        await fill.make_tree(plane.store)
        await plane.start_agents(2, 0)
        print(plane.layout.dir, flush=True)
        await asyncio.sleep(600)

isolate()
asyncio.run(bench())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_bench_that_is_ended_leaves_nothing(number: signal.Signals) -> None:
    bench = subprocess.Popen([sys.executable, "-c", BENCH], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        assert bench.stdout is not None
        layout = Layout.of(Path(bench.stdout.readline().decode().strip()))
        assert len(teardown.find(layout)) >= 3, "ZooKeeper and light agents"
        bench.send_signal(number)
        bench.wait(120)
    finally:
        bench.kill()
    deadline = time.monotonic() + 120
    while (layout.dir.exists() or teardown.find(layout)) and time.monotonic() < deadline:
        time.sleep(0.1)
    must_be_gone(layout)


async def _soaked() -> tuple[dict[str, Any], Layout]:
    async with soak.light_ground(4, 24) as ground:
        names = [fill.guest_name(number) for number in range(24)]
        report = await soak.soak(ground, names, lambda name: GuestSpec(name, memory_mib=64), 40.0)
        return report, ground.layout


def test_a_cluster_at_work_whose_parts_are_restarted_loses_no_guest() -> None:
    report, layout = isolated(lambda: asyncio.run(_soaked()))
    must_be_gone(layout)
    counts: dict[str, int] = report["counts"]
    assert counts["migrations SUCCEEDED"] > 0
    assert {part for part in soak.PARTS if counts.get(f"restarts of {part}")} == set(soak.PARTS)
    assert report["missing"] == []
    names = {one.name for one in report["figures"]}
    assert {"agents: RSS", "agents: descriptors", "ledger: znodes", "files: journals"} <= names
