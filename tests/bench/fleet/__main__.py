"""`make bench-fleet`: what the control plane costs with a large fleet; JSON in build/, and the same as a table.

Light agents hold the real code of agents over a fake engine; ZooKeeper, Ray, coordinator, API and gRPC are the real
ones. Every figure is bounded in time; one that cannot be taken says why, and the others go on. Status 0 whatever was
met.

    python -m tests.bench.fleet [--only at_rest,start] [--scale 0.1] [--minutes 12] [--report FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.ending import ends_well
from tests.bench.fleet import figures, plane, scenes
from tests.bench.fleet.figures import ROOT, Figure


@dataclass
class Run:
    """What was asked for, and what was found so far."""

    scale: float
    only: frozenset[str]
    found: list[Figure] = field(default_factory=list[Figure])
    over: set[str] = field(default_factory=set[str])

    def wants(self, *names: str) -> bool:
        return not self.only or bool(self.only & set(names))

    def missing(self) -> list[str]:
        """What was asked for and has neither been taken nor been given up."""
        names = (name for several in scenes.SCENES.values() for name in several)
        return [name for name in names if self.wants(name) and name not in self.over]

    async def take(self, name: str, work: Callable[[], Awaitable[list[Figure]]], timeout_s: float = 300.0) -> None:
        """One figure, if it is wanted."""
        if not self.wants(name):
            return
        begun = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                taken = await work()
        except Exception as error:
            taken = [figures.failed(name, error)]
        self.found += taken
        self.over.add(name)
        for one in taken:
            print(f"{one.name}: {one.value} {one.unit} {one.target} {one.note}", flush=True)
        print(f"  ({name}: {time.monotonic() - begun:.0f} s)", flush=True)


async def _bench(run: Run, minutes: float | None) -> None:
    ends_well()
    try:
        async with asyncio.timeout(minutes * 60 if minutes else None):
            await _scenes(run)
    except TimeoutError:
        said = f"not taken: the {minutes:g} minutes were over"
        run.found += [Figure(name, None, "", "", False, said) for name in run.missing()]
        print(said, flush=True)


async def _scenes(run: Run) -> None:
    for scene, names in scenes.SCENES.items():
        if run.wants(*names):
            begun = time.monotonic()
            try:
                await scene(run.scale, run.take)
            except Exception as error:  # its parts did not even start
                run.found += [figures.failed(name, error) for name in names if name in run.missing()]
                run.over.update(names)
            print(f"  (all of {scene.__name__}: {time.monotonic() - begun:.0f} s)", flush=True)


def main() -> None:
    known = [name for names in scenes.SCENES.values() for name in names]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full fleet")
    parser.add_argument("--only", default="", help=f"some of {','.join(known)}")
    parser.add_argument("--minutes", type=float, help="longest of all; what is not taken by then says so")
    parser.add_argument("--report", type=Path, default=ROOT / "build" / "bench-fleet.json")
    asked = parser.parse_args()
    only = frozenset(filter(None, asked.only.split(",")))
    if unknown := only - set(known):
        parser.error(f"there is no figure {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    run = Run(asked.scale, only)
    load = os.getloadavg()[0]
    plane.isolate()
    try:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(_bench(run, asked.minutes))
    finally:
        figures.write(asked.report, run.found, scale=asked.scale, load_before=load, load_after=os.getloadavg()[0])


if __name__ == "__main__":
    main()
