"""What migrations and evacuations have in common on the command line: both are created, go on for a while, and end."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.cli import units
from orchestrator.cli.exits import Exit
from orchestrator.cli.output import Cell, Column, Printer
from orchestrator.core.errors import DroverError, RefusalReason

if TYPE_CHECKING:
    from orchestrator.rpc.messages import Evacuation, Migration, Timestamp


J = TypeVar("J", "Migration", "Evacuation")
T = TypeVar("T")


def wall_s(stamp: Timestamp) -> float:
    """Seconds since 1970; 0 when not set."""
    return stamp.seconds + stamp.nanos / 1e9


def took_s(job: Migration | Evacuation) -> float | None:
    """What it took, by no wall clock; None before the end, and where it is not known."""
    return job.elapsed_ms / 1000 if job.end_time.seconds and job.elapsed_ms else None


def took(job: Migration | Evacuation) -> str:
    """The same for people; empty before the end."""
    seconds = took_s(job)
    return "" if seconds is None else units.seconds(seconds)


def phase_of(job: Migration | Evacuation) -> str:
    """The phase in capitals, without the enum's prefix."""
    from orchestrator import wire

    return wire.word(job, "phase")


def worst_of(phases: Iterable[str]) -> Exit:
    """The exit code for how jobs ended."""
    ended = set(phases)
    if "FAILED" in ended:
        return Exit.FAILED
    return Exit.CANCELLED if "CANCELLED" in ended else Exit.OK


def created(what: str, call: Callable[[str], T], request_id: str | None, *, validate_only: bool) -> T:
    """Call with the request id, or with a new one. Raises DroverError.

    When no answer came the error says how to find out, and how to repeat the command without doing it twice.
    """
    request_id = request_id or str(uuid.uuid4())
    try:
        return call(request_id)
    except DroverError as error:
        lost = error.reason in (RefusalReason.OUTCOME_UNKNOWN, RefusalReason.API_UNREACHABLE)
        if validate_only or not lost:
            raise
        said = (
            f"{error.message}; whether the {what} was created is not known: the same command with "
            f"--request-id {request_id} is safe to repeat"
        )
        raise DroverError(error.reason, said, field=error.field, details=error.details) from None


def times(now_s: float) -> list[Column[Any]]:
    """The columns that say when."""
    return [
        Column("BEGAN", lambda job: units.clock(wall_s(job.create_time), now_s), rank=2),
        Column("TOOK", took, right=True, rank=1),
    ]


def facts_of_time(job: Migration | Evacuation) -> Iterable[tuple[str, Cell]]:
    """The rows that say when, and whether it is to end early."""
    yield "cancel", "requested" if job.cancel_requested and not job.end_time.seconds else ""
    yield "began", units.clock(wall_s(job.create_time), time.time())
    yield "took", took(job)


def show_list(
    printer: Printer,
    plural: str,
    jobs: Sequence[J],
    columns: Callable[[dict[str, str], float], list[Column[J]]],
    *,
    last: int | None = None,
) -> None:
    """The newest last, and only the `last` ones, of `jobs` as the API lists them: newest first, by no clock.

    `columns` is given the abbreviated id of each, and the time."""
    from orchestrator import wire

    ordered = list(reversed(jobs))
    ordered = ordered[-last:] if last else ordered
    if printer.machine:
        printer.document({plural: [wire.to_json(job) for job in ordered]})
        return
    short = units.abbreviate(job.name for job in ordered)
    printer.table(columns(short, time.time()), ordered, empty=f"there are no such {plural}")


def goes_on(what: str, name: str) -> str:
    """What is said when Ctrl-C ends a watch."""
    return f"the {what} goes on; `drover {what} cancel {name}` cancels it, `drover {what} watch {name}` looks again"
