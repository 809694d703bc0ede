"""What a bench found: figures beside their targets, as JSON and as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, slots=True)
class Figure:
    """`met` None: it has no target of its own, and stands there for the sake of others."""

    name: str
    value: float | None
    """None: it could not be taken; `note` says why."""
    unit: str
    target: str = ""
    met: bool | None = None
    note: str = ""


def at_most(name: str, value: float, unit: str, limit: float, note: str = "") -> Figure:
    return Figure(name, round(value, 2), unit, f"<= {limit:g}", value <= limit, note)


def beside(name: str, value: float, unit: str, note: str = "") -> Figure:
    return Figure(name, round(value, 2), unit, note=note)


def failed(name: str, error: BaseException) -> Figure:
    return Figure(name, None, "", "", False, f"not taken: {error!r}"[:300])


def write(path: Path, figures: Sequence[Figure], **about: object) -> None:
    """The report, and the same as a table on standard output."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {**about, "cores": os.cpu_count(), "figures": [asdict(figure) for figure in figures]}
    path.write_text(json.dumps(report, indent=1) + "\n")
    table = Table("figure", "value", "unit", "target", "", "note")
    for one in figures:
        met = "" if one.met is None else "met" if one.met else "MISSED"
        table.add_row(one.name, "-" if one.value is None else f"{one.value:g}", one.unit, one.target, met, one.note)
    Console(width=160).print(table)
    print(f"report: {path}")


def percentile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(part * (len(ordered) - 1)))]
