"""`make bench-guests`: what moving real guests costs; JSON in build/, and the same as a table.

Every figure is bounded in time; one that cannot be taken says why, and the others go on. Status 0 whatever was met.

    python -m tests.bench.guests [--only floor] [--scale 0.1] [--report FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import time
from pathlib import Path

from orchestrator.telemetry import configure_logging
from tests.bench.ending import ends_well
from tests.bench.fleet import figures
from tests.bench.fleet.figures import ROOT, Figure
from tests.bench.guests import disks, floor, link, outage, whole
from tests.bench.guests.registry import Asked, Scene

MODULES = (floor, link, outage, disks, whole)
FIGURES: dict[str, Scene] = {name: scene for module in MODULES for name, scene in module.FIGURES.items()}


async def _taken(name: str, scene: Scene, asked: Asked) -> list[Figure]:
    begun = time.monotonic()
    try:
        async with asyncio.timeout(max(60.0, scene.timeout_s * asked.scale)):
            found = await scene.take(asked)
    except Exception as error:
        found = [figures.failed(name, error)]
    for one in found:
        print(f"{one.name}: {one.value} {one.unit} {one.target} {one.note}", flush=True)
    print(f"  ({name}: {time.monotonic() - begun:.0f} s)", flush=True)
    return found


async def bench(only: frozenset[str], asked: Asked, found: list[Figure]) -> None:
    """Fills `found` figure by figure, so that what was taken is there even when it is ended early."""
    ends_well()
    for name, scene in FIGURES.items():
        if not only or name in only:
            found += await _taken(name, scene, asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full counts")
    parser.add_argument("--only", default="", help=f"some of {','.join(FIGURES)}")
    parser.add_argument("--report", type=Path, default=ROOT / "build" / "bench-guests.json")
    asked = parser.parse_args()
    only = frozenset(filter(None, asked.only.split(",")))
    if unknown := only - set(FIGURES):
        parser.error(f"there is no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    configure_logging("warning")
    found: list[Figure] = []
    load = os.getloadavg()[0]
    try:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(bench(only, Asked(asked.scale), found))
    finally:
        figures.write(asked.report, found, scale=asked.scale, load_before=load, load_after=os.getloadavg()[0])


if __name__ == "__main__":
    main()
