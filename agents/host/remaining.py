"""`drover-guests-here`: which guests' VMMs run on this host, for a package that is about to be removed.

Exit status 0: none; 1: some, each named on standard error, or it cannot be told.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from agents.config import FILE, ConfigError
from orchestrator import proc
from orchestrator.config import DIRECTORY
from orchestrator.core.liveness import LivenessUnknown

_USUAL = Path("/var/lib/drover")
_LINKS = Path("/run/drover")
"""What is below it leads to directories whose paths are too long for sockets."""


def _noted(directory: Path) -> Iterator[int]:
    """VMMs that the agent has noted down and that live, also those that it did not start itself."""
    for note in directory.glob("guests/*/*.json"):
        try:
            known = json.loads(note.read_text())
            pid, start_time = int(known["pid"]), int(known["start_time"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        descriptor = proc.open_process(pid, start_time)
        if descriptor is not None:
            os.close(descriptor)
            yield pid


def _named(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return words[words.index(b"-name") + 1].decode(errors="replace").removeprefix("guest=").partition(",")[0]
    except (OSError, ValueError, IndexError):
        return "a guest"


def remaining(directory: Path) -> list[tuple[int, str]]:
    """Process and guest of each VMM of an agent with this directory. Raises LivenessUnknown."""
    found = {*proc.vmms_below([str(directory), str(directory.resolve()), str(_LINKS)]), *_noted(directory)}
    return [(pid, _named(pid)) for pid in sorted(found)]


@click.command()
@click.option("--config", "path", type=click.Path(dir_okay=False, path_type=Path), default=DIRECTORY / "agent.yaml")
def main(path: Path) -> None:
    """Say which guests run on this host."""
    try:
        directory = FILE.load(path).dir if path.exists() else _USUAL
        found = remaining(directory)
    except (ConfigError, LivenessUnknown) as error:
        click.echo(f"drover: whether guests run here cannot be told: {error}", err=True)
        sys.exit(1)
    for pid, name in found:
        click.echo(f"drover: {name} runs here (process {pid})", err=True)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
