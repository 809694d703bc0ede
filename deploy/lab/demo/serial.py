"""What is kept beside the report so that anyone can check: the guests' own words, and for repairs our logs."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from deploy.lab.cluster.evidence import ConsoleLog, Vmm, parse_log, period_ns
from deploy.lab.cluster.layout import Layout

_BOOT = re.compile(r"BOOT .*\bhz=([0-9a-f]{8}) hb=([0-9a-f]{8})\b")
_BOOT_LINUX = re.compile(r"BOOT linux period_us=([0-9]+) ")


@dataclass
class Words:
    """All that one guest wrote, on the consoles of all its VMMs."""

    logs: list[ConsoleLog] = field(default_factory=list[ConsoleLog])
    files: list[Path] = field(default_factory=list[Path])
    period_ns: float | None = None
    """Between two heartbeats, as the guest said when it booted."""


def keep(layout: Layout, words: Path, logs: Path) -> None:
    """Copy the collector's files, and the logs of all parts, in place of those of an earlier run."""
    for kept in (words, logs):
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
    for path in layout.serial.glob("*.log"):
        shutil.copy2(path, words)
    for path in layout.logs.glob("*.log"):
        shutil.copy2(path, logs)
    for path in layout.hosts.glob("*/agent.log"):
        shutil.copy2(path, logs / f"agent-{path.parent.name}.log")


def read(words: Path) -> dict[str, Words]:
    """By guest."""
    found: dict[str, Words] = {}
    for path in sorted(words.glob("*.log")):
        vmm = Vmm.of_file(path.name)
        if vmm is None:
            continue
        text = path.read_text(errors="replace")
        said = found.setdefault(vmm.guest, Words())
        said.logs.append(parse_log(vmm, text.splitlines()))
        said.files.append(path)
        if boot := _BOOT.search(text):
            said.period_ns = period_ns(int(boot[1], 16), int(boot[2], 16))
        elif boot := _BOOT_LINUX.search(text):
            said.period_ns = int(boot[1]) * 1e3
    return found
