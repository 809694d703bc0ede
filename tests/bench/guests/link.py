"""The same blackout over 1 Gbit/s between two namespaces: what waits in the source's kernel when a guest stops.

The process that takes it has a network of its own, which is the source's host; `python -m tests.bench.guests.link 10`
is such a process and prints its blackouts as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agents.engine.qemu.engine import QemuEngine
from orchestrator.telemetry import configure_logging
from tests.bench.fleet.figures import ROOT
from tests.bench.guests.floor import MEMORY_MIB, Hosts, go_before_guests, median_difference, rounds
from tests.bench.guests.registry import Asked, Figure, NotHere, Scene, beside, spread
from tests.contract.test_engine import image

RATE_MBPS = 1_000
HERE, THERE = "10.79.0.1", "10.79.0.2"
_LIMIT = f"root tbf rate {RATE_MBPS}mbit burst 256k latency 50ms"
"""As the local cluster limits its hosts."""


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True, timeout=10)


@contextmanager
def other_host() -> Iterator[list[str]]:
    """What begins a command that is to run there. It ends with its keeper, and the link with it."""
    own = Path("/proc/self/ns/net").readlink()
    keeper = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    try:
        until = time.monotonic() + 5
        while Path(f"/proc/{keeper.pid}/ns/net").readlink() == own:
            if time.monotonic() > until:
                raise TimeoutError("the other host's namespace was not made")
            time.sleep(0.01)
        inside = ["nsenter", f"--net=/proc/{keeper.pid}/ns/net", "--"]
        _run("ip link set lo up")
        _run(f"ip link add near type veth peer name far netns {keeper.pid}")
        for prefix, name, address in (("", "near", HERE), (" ".join(inside) + " ", "far", THERE)):
            _run(f"{prefix}ip addr add {address}/24 dev {name}")
            _run(f"{prefix}ip link set {name} up")
            _run(f"{prefix}tc qdisc add dev {name} {_LIMIT}")
        yield inside
    finally:
        keeper.kill()
        keeper.wait(5)


async def _measured(inside: list[str], count: int, directory: Path) -> tuple[list[float], list[float]]:
    wrapper = directory / "qemu"
    wrapper.write_text(f'#!/bin/sh\nexec {" ".join(inside)} qemu-system-x86_64 "$@"\n')
    wrapper.chmod(0o755)
    hosts = Hosts(QemuEngine(image()), QemuEngine(image(), str(wrapper)), THERE, RATE_MBPS * 125_000)
    before, ours, _ = await rounds(hosts, count, hand=False)
    return before, ours


def _measure(count: int) -> None:
    configure_logging("warning")
    go_before_guests()
    directory = Path(tempfile.mkdtemp(prefix="bl-"))
    try:
        with other_host() as inside:
            print(json.dumps(asyncio.run(_measured(inside, count, directory))))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def link(asked: Asked) -> list[Figure]:
    """50 rounds of the two."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc", "unshare", "nsenter"))):
        raise NotHere("needs root, iproute2 and util-linux: namespaces of its own")
    command = ["unshare", "--net", sys.executable, "-m", "tests.bench.guests.link", str(asked.many(50))]
    ran = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        said, wrong = await ran.communicate()
    except asyncio.CancelledError:
        ran.send_signal(2)  # it takes its guests down, and the other host
        await ran.wait()
        raise
    if ran.returncode != 0:
        raise RuntimeError(wrong.decode(errors="replace")[-300:])
    before, ours = json.loads(said.decode().splitlines()[-1])
    name = f"blackout, quiet {MEMORY_MIB} MiB guest, {RATE_MBPS // 1000} Gbit/s, median"
    less = median_difference(before, ours)
    return [
        beside(f"{name}: QEMU connects", statistics.median(before), "ms", spread(before)),
        beside(f"{name}: as it is", statistics.median(ours), "ms", spread(ours)),
        beside("the same link: QEMU connects minus as it is, median of the rounds", less, "ms"),
    ]


FIGURES = {"link": Scene(link, timeout_s=900)}


if __name__ == "__main__":
    _measure(int(sys.argv[1]))
