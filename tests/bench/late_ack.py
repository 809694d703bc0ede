"""`make bench-late-ack`: what a late ACK costs, on real guests in a whole local cluster; JSON in build/.

Every figure is taken from the VMMs' own event stamps (STOP, RESUME), which the agents keep in their reports; beside it
stands the evidence of the guests' heartbeats with the noise floor of the same run. Ratios and targets are printed, not
asserted: a machine may be busy. What must hold on any machine (all resumed, no attempt beyond policy, k late ACKs take
k + 1 attempts) ends the bench with status 1.

    python -m tests.bench.late_ack [--scale 0.1] [--only companion,vfio,retry,row,blackout] [--report FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.lab.cluster import evidence
from deploy.lab.devices.scenario_text import late_ack
from deploy.lab.workload import Workload, boot_of
from orchestrator import wire, wire_attempts
from orchestrator.core.records import AttemptReport, DeviceSpec, GuestSpec, ShimKind
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.cluster import Cluster, make_config, running_cluster, short_directory
from tests.fakes.vfio_rig import Rig, device, qemu

ROOT = Path(__file__).parents[2]
QUIET = Workload(dirty_mib=2, dirty_pages_per_s=200, heartbeat_hz=100)
ROW = 20
"""Late ACKs in one migration of the long series."""
_LOOK_S = 0.2
"""Seldom: what looks takes the cores from what is looked at."""
STOPPED, RUNS = "vcpus stopped", "vcpus run"
_SERIAL = itertools.count()


def percentile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(part * (len(ordered) - 1)))]


def summary(values: list[float]) -> dict[str, float]:
    return {
        "count": len(values),
        "median_ms": round(statistics.median(values), 2),
        "p95_ms": round(percentile(values, 0.95), 2),
        "max_ms": round(max(values), 2),
    }


def stamp_s(report: AttemptReport, event: str, where: str, *, last: bool = True) -> float | None:
    """The engine's stamp of an event, wall clock of the machine that all hosts share here."""
    found = [float(e.detail) for e in report.timeline if e.event == event and e.where == where and e.detail]
    return (found[-1] if last else found[0]) if found else None


def stood_still_ms(report: AttemptReport) -> float | None:
    """STOP -> RESUME of the source in an attempt that was aborted."""
    stopped, runs = (stamp_s(report, event, report.source) for event in (STOPPED, RUNS))
    return (runs - stopped) * 1000 if stopped and runs and runs > stopped else None


class Bench:
    """A cluster of two hosts, and guests that go back and forth between them."""

    def __init__(self, cluster: Cluster, client: OrchestratorClient) -> None:
        self.cluster = cluster
        self.client = client
        self.broken: list[str] = []

    def guest(self, *devices: DeviceSpec, memory_mib: int = 64) -> str:
        name = f"bench-{next(_SERIAL)}"
        self.client.create_guest(
            GuestSpec(name, memory_mib, boot=boot_of(QUIET, devices), devices=devices), host="host-1"
        )
        return name

    def end(self, guest: str) -> None:
        self.client.stop_guest(guest)

    def late(self, guest: str, names: list[str], at: str, times: int) -> None:
        for name in names:
            self.client.instruct_device(guest, name, late_ack(at, times))

    def move(self, guest: str, *, max_attempts: int) -> list[AttemptReport]:
        """To the other host, without a pause between attempts. The reports of all attempts."""
        policy = {"max_attempts": max_attempts, "backoff_initial_ms": 0, "total_timeout_ms": 600_000}
        name = self.client.create_migration(guest, policy=policy).name
        deadline = time.monotonic() + 120 + 10 * max_attempts
        while time.monotonic() < deadline:
            now = self.client.get_migration(name)
            if wire.word(now, "phase") in ("SUCCEEDED", "FAILED", "CANCELLED"):
                reports = [wire_attempts.report_from_proto(report) for report in now.attempts]
                if wire.word(now, "phase") != "SUCCEEDED":
                    self.broken.append(
                        f"{guest}: {wire.word(now, 'phase')} after {len(reports)} attempts: {now.message}"
                    )
                if len(reports) > max_attempts:
                    self.broken.append(f"{guest}: {len(reports)} attempts, policy allows {max_attempts}")
                return reports
            time.sleep(_LOOK_S)
        raise TimeoutError(f"migration {name} of {guest} did not end in time")

    # --- figures ------------------------------------------------------------------------------------------------------

    def series(self, shim: ShimKind, at: str, count: int) -> dict[str, Any]:
        """`count` late ACKs of one device; how long the guest stood still for each."""
        guest = self.guest(DeviceSpec("dpu", shim))
        still = self.guest()
        stood: list[float] = []
        while len(stood) < count:
            times = min(ROW, count - len(stood))
            self.late(guest, ["dpu"], at, times)
            for report in self.move(guest, max_attempts=times + 1):
                if report.outcome == "ABORTED":
                    ms = stood_still_ms(report)
                    if str(report.reason) != "LATE_SWITCHOVER_ACK" or ms is None:
                        self.broken.append(f"{guest}: attempt ended {report.reason}, stamps say {ms}")
                        ms = ms or float("inf")
                    stood.append(ms)
        heard = self.heard(guest, still)
        self.end(guest)
        self.end(still)
        return {**summary(stood), "resumed": sum(ms < float("inf") for ms in stood), "heartbeats": heard}

    def heard(self, guest: str, still: str) -> dict[str, float]:
        """The same by heartbeats: the longest stop within one VMM, beside what a guest that nobody moved shows."""
        time.sleep(0.3)
        logs = [
            evidence.parse_log(vmm, path.read_text(errors="replace").splitlines())
            for path in self.cluster.layout.serial.glob("*.log")
            if (vmm := evidence.Vmm.of_file(path.name)) is not None
        ]
        period = evidence.estimate_period_ns(logs)
        assert period is not None
        stops = [pause.pause_ms for log in logs if log.vmm.guest == guest for pause in evidence.pauses(log, period)]
        noise = [pause.pause_ms for log in logs if log.vmm.guest == still for pause in evidence.pauses(log, period)]
        return {
            "longest_stop_ms": round(max(stops), 2),
            "noise_p95_ms": round(percentile(noise, 0.95), 2),
            "noise_max_ms": round(max(noise), 2),
            "beats": len(stops),
        }

    def retries(self, count: int) -> dict[str, Any]:
        """From the late ACK's RESUME to the next attempt's RESUME at the destination."""
        guest = self.guest(DeviceSpec("dpu", ShimKind.COMPANION))
        took: list[float] = []
        for _ in range(count):
            self.late(guest, ["dpu"], "freeze", 1)
            first, second = self.move(guest, max_attempts=2)
            here, there = stamp_s(first, RUNS, first.source), stamp_s(second, RUNS, second.destination)
            assert here
            assert there
            took.append((there - here) * 1000)
        self.end(guest)
        return summary(took)

    def rows(self, most: int, counts: tuple[int, ...]) -> dict[str, Any]:
        """k late ACKs in a row take k + 1 attempts, whatever the number of devices."""
        table: dict[str, Any] = {}
        for devices in counts:
            names = [f"dev{n}" for n in range(devices)]
            guest = self.guest(*(DeviceSpec(name, ShimKind.COMPANION) for name in names))
            for k in range(1, most + 1):
                self.late(guest, names, "freeze", k)
                attempts = len(self.move(guest, max_attempts=k + 1))
                table[f"{devices} devices, {k} in a row"] = attempts
                if attempts != k + 1:
                    self.broken.append(f"{devices} devices, {k} late ACKs in a row: {attempts} attempts")
            self.end(guest)
        return table

    def blackouts(self, binary: str, pairs: int) -> dict[str, Any]:
        """STOP at the source to RESUME at the destination: through us and by hand, turn and turn about."""
        spec = DeviceSpec("nic", ShimKind.VFIO, stop_copy_bytes=1 << 20)
        guest = self.guest(spec)
        ours, by_hand = [], []
        for _ in range(pairs):
            report = self.move(guest, max_attempts=1)[-1]
            stopped, runs = stamp_s(report, STOPPED, report.source), stamp_s(report, RUNS, report.destination)
            assert stopped
            assert runs
            ours.append((runs - stopped) * 1000)
            by_hand.append(asyncio.run(_by_hand(binary)))
        self.end(guest)
        difference = statistics.median(ours) - statistics.median(by_hand)
        return {"ours": summary(ours), "by_hand": summary(by_hand), "difference_of_medians_ms": round(difference, 2)}


async def _by_hand(binary: str) -> float:
    """One migration by plain QMP between two fresh QEMUs, as an operator would type it."""
    async with Rig(binary, device("nic", stop_copy_bytes=1 << 20), memory_mib=64, workload=QUIET) as rig:
        await rig.migrate()
        await rig.over()
        await rig.hand_over()
        stopped = next(at_s for running, at_s in reversed(rig.source.stopped_and_ran_s()) if not running)
        runs = next(at_s for running, at_s in rig.destination.stopped_and_ran_s() if running)
        return (runs - stopped) * 1000


def table(report: dict[str, Any]) -> Table:
    """The figures that were taken, each beside its target; all in ms."""
    made = Table("figure", "of", "median", "p95", "maximum", "target", "heartbeats (noise p95)")

    def row(name: str, found: dict[str, Any], target: str, met: bool | None = None) -> None:
        said = "" if met is None else " (met)" if met else " (MISSED)"
        heard = found.get("heartbeats")
        beats = f"longest stop {heard['longest_stop_ms']} ({heard['noise_p95_ms']})" if heard else ""
        figures = [str(found[key]) for key in ("count", "median_ms", "p95_ms", "max_ms")]
        made.add_row(name, *figures, target + said, beats)

    if found := report.get("vfio"):
        row("late ACK inside QEMU, STOP to RESUME", found, "p95 <= 20", found["p95_ms"] <= 20)
    if found := report.get("companion"):
        row("late ACK of a companion, STOP to RESUME", found, "p95 <= 40", found["p95_ms"] <= 40)
    if found := report.get("retry"):
        row("late ACK to the next attempt's RESUME", found, "")
    if found := report.get("row"):
        as_many = sum(attempts == int(name.split()[2]) + 1 for name, attempts in found.items())
        cells = (str(len(found)), "", "", "", f"k + 1 attempts ({as_many} of {len(found)})", "")
        made.add_row("k late ACKs in a row, devices x k", *cells)
    if found := report.get("blackout"):
        row("blackout, VFIO 1 MiB, by hand", found["by_hand"], "")
        by = found["difference_of_medians_ms"]
        row("blackout, VFIO 1 MiB, ours", found["ours"], f"by hand + 8: {by:+}", by <= 8)
    return made


@contextmanager
def bench(binary: str) -> Iterator[Bench]:
    directory = short_directory()
    config = make_config(directory, hosts=2, chaos=True, bandwidth="10gbit", qemu=binary or "qemu-system-x86_64")
    try:
        with running_cluster(config) as cluster, OrchestratorClient(cluster.api, 30) as client:
            yield Bench(cluster, client)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full counts")
    parser.add_argument("--only", default="companion,vfio,retry,row,blackout")
    parser.add_argument("--report", type=Path, default=ROOT / "build" / "bench-late-ack.json")
    asked = parser.parse_args()
    wanted = set(asked.only.split(","))

    def many(count: int) -> int:
        return max(1, round(count * asked.scale))

    report: dict[str, Any] = {"load_before": os.getloadavg()[0], "scale": asked.scale}
    broken: list[str] = []

    def take(figure: str, on: Bench, work: Callable[[], dict[str, Any]]) -> None:
        if figure in wanted:
            begun = time.monotonic()
            report[figure] = work()
            print(f"{figure}: {json.dumps(report[figure])}  ({time.monotonic() - begun:.0f} s)", flush=True)
            broken.extend(on.broken)
            on.broken.clear()

    if wanted & {"companion", "retry", "row"}:
        with bench("") as on:
            take("companion", on, lambda: on.series(ShimKind.COMPANION, "freeze", many(200)))
            take("retry", on, lambda: on.retries(many(50)))
            take("row", on, lambda: on.rows(max(1, many(5)), tuple(range(1, 1 + many(8)))))
    if wanted & {"vfio", "blackout"}:
        binary = qemu("11.1")
        with bench(binary) as on:
            take("vfio", on, lambda: on.series(ShimKind.VFIO, "freeze", many(200)))
            take("blackout", on, lambda: on.blackouts(binary, many(40)))
    report["load_after"], report["broken"] = os.getloadavg()[0], broken
    asked.report.parent.mkdir(parents=True, exist_ok=True)
    asked.report.write_text(json.dumps(report, indent=1) + "\n")
    Console(width=140).print(table(report))
    for line in broken:
        print(f"BROKEN: {line}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
