"""What the demo prints and writes: a table of the guests, the verdict, the report file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.lab.cluster.evidence import to_plain
from deploy.lab.demo.judge import OPERATOR, GuestReport, Run, guest_document
from deploy.lab.demo.serial import Words
from orchestrator.cli import units
from orchestrator.cli.output import Cell, Column, Printer, styled, table
from orchestrator.core.errors import AbortReason

_SHORT = {AbortReason.LATE_SWITCHOVER_ACK.value: "late"}


# --- table ------------------------------------------------------------------------------------------------------------


def show(printer: Printer, run: Run, guests: Sequence[GuestReport]) -> None:
    """The table, and what its columns mean."""
    ordered = sorted(guests, key=lambda guest: units.natural(guest.role.name))
    printer.show(table(_columns(run), ordered, printer.width))
    noise = run.noise
    spread = f"p50 {_ms(noise.p50_ms)}, p95 {_ms(noise.p95_ms)}, max {_ms(noise.max_ms)} of {noise.samples} beats"
    printer.show(
        "DOWNTIME  by the guest's own heartbeats, which stop with it; ± is the noise floor of this run: the same",
        f"          measure on guests that nobody moved just then ({spread})",
        "OUTAGE    how long a peer outside had no answer over UDP and over TCP; 5 ms are between two of its messages",
        "DISK      its pool, and how many records were promised on it (synced before the guest said so); the last 1024",
        "          of them are looked for by the guest itself, and in the image when the guest is gone",
        "OWNER     by the guest's record in ZooKeeper; HEARD on the host where its heart beats",
        "PAGES     all of its memory, and ANSWERS of its devices, checked by the guest itself",
        "COPIES    heartbeats that prove a second running copy, or a step back in time",
        "TRIES     attempts, and why some were aborted; late: LATE_SWITCHOVER_ACK",
    )


def _columns(run: Run) -> list[Column[GuestReport]]:
    noise_ms = run.noise.p95_ms or 0
    return [
        Column("GUEST", lambda guest: guest.role.name),
        Column("MiB", lambda guest: str(guest.role.memory_mib), right=True),
        Column("OWNER", lambda guest: guest.answer.owner),
        Column("HEARD", lambda guest: guest.evidence.last_host or "nowhere"),
        Column("TOOK", lambda guest: units.seconds(guest.answer.took_s), right=True),
        Column("SENT", lambda guest: f"{guest.sent_bytes / (1 << 20):.0f} MiB", right=True),
        Column("DOWNTIME", lambda guest: _downtime(guest, noise_ms), right=True),
        Column("OUTAGE", _outage, right=True),
        Column("DISK", _disk, right=True),
        Column("PAGES", _pages, right=True),
        Column("ANSWERS", _answers, right=True),
        Column("COPIES", _copies, right=True),
        Column("ARRIVED", lambda guest: styled(guest.answer.state_on_arrival)),
        Column("TRIES", _tries, elastic=True, least=10, wraps=True),
    ]


def _downtime(guest: GuestReport, noise_ms: float) -> Cell:
    if guest.downtime_ms is None:
        return "paused" if guest.role.stopped_by == OPERATOR else "?"
    return f"{guest.downtime_ms:.0f} ±{noise_ms:.0f} ms"


def _pages(guest: GuestReport) -> Cell:
    verify = guest.evidence.last_verify
    if verify is None:
        return "unchecked", "bold red"
    return f"{verify.pages} ok" if guest.evidence.memory_verified else (f"{verify.bad} wrong", "bold red")


def _answers(guest: GuestReport) -> Cell:
    wrong = guest.evidence.device_errors
    if not guest.role.devices:
        return ""
    return (f"{wrong} wrong", "bold red") if wrong else f"{guest.evidence.device_rings} ok"


def _disk(guest: GuestReport) -> Cell:
    if not guest.role.disks:
        return ""
    wrong = guest.evidence.device_errors
    pools = "+".join(disk.pool for disk in guest.role.disks)
    return (f"{pools} {wrong} wrong", "bold red") if wrong else f"{pools} {guest.evidence.device_rings} ok"


def _outage(guest: GuestReport) -> Cell:
    seen = guest.seen.outage
    return f"{_whole(seen.udp_ms)}/{_whole(seen.tcp_ms)} ms" if seen else ""


def _copies(guest: GuestReport) -> Cell:
    number = guest.evidence.overlap.copies
    return (str(number), "bold red") if number else "0"


def _whole(ms: float | None) -> str:
    return "?" if ms is None else f"{ms:.0f}"


def _tries(guest: GuestReport) -> str:
    """ "4 (3 late)"."""
    reasons = Counter(attempt.reason for attempt in guest.answer.attempts if attempt.reason)
    said = ", ".join(f"{number} {_SHORT.get(reason, reason)}" for reason, number in reasons.items())
    return f"{len(guest.answer.attempts)} ({said})" if said else str(len(guest.answer.attempts))


def _ms(value: float | None) -> str:
    return "?" if value is None else f"{round(value, 1) + 0.0:.1f} ms"  # no -0.0


# --- report file ------------------------------------------------------------------------------------------------------


def document(
    run: Run,
    guests: Sequence[GuestReport],
    words: dict[str, Words],
    broken: Sequence[str],
    *,
    elapsed_s: dict[str, float],
    beside: Path,
) -> dict[str, Any]:
    """The report file's content; paths in it are relative to `beside`, where it lies."""

    def files(guest: GuestReport) -> list[str]:
        return [str(path.relative_to(beside)) for path in words[guest.role.name].files]

    return {
        "promises_kept": not broken,
        "broken_promises": list(broken),
        "source": run.source,
        "evacuation": run.evacuation_phase,
        "safe_to_power_off": run.safe_to_power_off,
        "guests": [guest_document(guest, files(guest)) for guest in guests],
        "late_ack_aborts": sum(guest.late_acks for guest in guests),
        "noise_floor_ms": None if run.noise.p95_ms is None else round(run.noise.p95_ms, 3),
        "noise_floor": to_plain(run.noise),
        "elapsed_s": round(sum(elapsed_s.values()), 3),
        "elapsed_by_step_s": {step: round(seconds, 3) for step, seconds in elapsed_s.items()},
        "leftovers": list(run.leftovers),
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the report as JSON, with its directory where that is missing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
