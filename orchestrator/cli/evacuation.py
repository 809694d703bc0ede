"""`drover evacuate` and `drover evacuation`: empty a host, and look at evacuations."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli import units
from orchestrator.cli.context import (
    Settings,
    complete_evacuation,
    complete_host,
    find_evacuation,
    list_options,
    pass_settings,
    remote,
    request_id_option,
)
from orchestrator.cli.exits import Ended, Exit
from orchestrator.cli.jobs import created, facts_of_time, goes_on, phase_of, show_list, times, took, worst_of
from orchestrator.cli.output import Cell, Column, Printer, note, note_unreadable, pairs, styled, table
from orchestrator.cli.policy_options import policy_of, policy_options
from orchestrator.core.errors import DroverError

if TYPE_CHECKING:
    from orchestrator.rpc.messages import CreateEvacuationResponse, Evacuation, PlacementVerdict, Unreadable
    from orchestrator.rpc.orchestrator_client import OrchestratorClient


@click.command()
@click.argument("host", shell_complete=complete_host)
@click.option("--watch", is_flag=True, help="Follow it to its end.")
@click.option("--max-concurrent", type=click.IntRange(min=1), default=None, help="Guests at a time.  [default: 4]")
@click.option("--validate-only", is_flag=True, help="Only say which guest can go where, and which cannot and why.")
@request_id_option
@policy_options
@remote
@pass_settings
def evacuate(
    settings: Settings,
    host: str,
    watch: bool,
    max_concurrent: int | None,
    validate_only: bool,
    request_id: str | None,
    **policy: Any,
) -> None:
    """Cordon HOST and move all its guests to other hosts.

    Policy options take the place of each guest's own policy. With --watch the exit code is that of the evacuation:
    0 the host is empty, 1 guests remain, 6 cancelled. With --validate-only: 0 every guest can go, 1 one cannot.
    """
    printer = settings.printer
    with settings.client() as client:

        def create(request_id: str) -> CreateEvacuationResponse:
            return client.create_evacuation(
                host, max_concurrent or 0, policy_of(policy), validate_only=validate_only, request_id=request_id
            )

        made = created("evacuation", create, request_id, validate_only=validate_only)
        if validate_only:
            _say_verdicts(printer, host, made)
        elif watch:
            _watch(client, printer, made.evacuation.name)
        else:
            _say_created(printer, made)


def _say_verdicts(printer: Printer, host: str, made: CreateEvacuationResponse) -> None:
    """Raises Ended(FAILED) when a guest can go nowhere."""
    from orchestrator import wire

    stuck = [verdict for verdict in made.verdicts if verdict.reason]
    if printer.machine:
        printer.document(wire.to_json(made))
    else:
        ordered = sorted(made.verdicts, key=lambda verdict: units.natural(verdict.guest))
        printer.table(_verdict_columns(), ordered, empty=f"there are no guests on {host}")
        if made.verdicts:
            can = len(made.verdicts) - len(stuck)
            note(f"{can} of {units.count(len(made.verdicts), 'guest')} can leave {host}")
    if stuck:
        raise Ended(Exit.FAILED)


def _verdict_columns() -> list[Column[PlacementVerdict]]:
    return [
        Column("GUEST", lambda verdict: verdict.guest),
        Column("MiB", lambda verdict: str(verdict.memory_mib), right=True),
        Column("TO", lambda verdict: verdict.destination or "nowhere"),
        Column("REASON", lambda verdict: (verdict.reason, "red"), optional=True),
        Column("MESSAGE", lambda verdict: verdict.message, elastic=True, optional=True),
    ]


def _say_created(printer: Printer, made: CreateEvacuationResponse) -> None:
    from orchestrator import wire

    if printer.machine:
        printer.document(wire.to_json(made))
        return
    job = made.evacuation
    guests = len(job.guests) or len(made.verdicts)
    printer.show(f"evacuation {job.name} of {job.host}, {units.count(guests, 'guest')}: {phase_of(job)}")
    for verdict in made.verdicts:
        if verdict.reason:
            note(f"{verdict.guest} can go nowhere now: {verdict.reason}: {verdict.message}")
    note(f"`drover evacuation watch {job.name}` follows it")


@click.group()
def evacuation() -> None:
    """Evacuations: list, show, watch and cancel them."""


evacuation_argument = click.argument("evacuation", shell_complete=complete_evacuation)


def _moved(job: Evacuation) -> str:
    from orchestrator import wire

    moved = sum(wire.word(guest, "phase") == "SUCCEEDED" for guest in job.guests)
    return f"{moved} of {len(job.guests)}"


def _power(job: Evacuation) -> Cell:
    return ("safe", "green") if job.safe_to_power_off else "no"


def _columns(short: dict[str, str], now_s: float) -> list[Column[Evacuation]]:
    return [
        Column("EVACUATION", lambda job: short[job.name]),
        Column("HOST", lambda job: job.host),
        Column("PHASE", lambda job: styled(phase_of(job))),
        Column("MOVED", _moved, right=True),
        Column("POWER OFF", _power),
        *times(now_s),
        Column("MESSAGE", lambda job: job.message, elastic=True, optional=True),
    ]


@evacuation.command("list")
@list_options
@remote
@pass_settings
def list_(settings: Settings, filter: str, order_by: str) -> None:
    """List evacuations, the newest last, at most a thousand.

    FILTER and FIELDS know name, host, phase, active, create_time, end_time and order.
    """
    with settings.client() as client:
        unreadable: list[Unreadable] = []
        found = client.list_evacuations(filter=filter, order_by=order_by, unreadable=unreadable)
    show_list(settings.printer, "evacuations", found, _columns)
    note_unreadable("evacuation", unreadable)


@evacuation.command()
@evacuation_argument
@remote
@pass_settings
def show(settings: Settings, evacuation: str) -> None:
    """Show one evacuation and its guests."""
    with settings.client() as client:
        _show(settings.printer, find_evacuation(client, evacuation))


def _show(printer: Printer, job: Evacuation) -> None:
    from orchestrator import wire
    from orchestrator.cli import watch as watching

    if printer.machine:
        printer.document(wire.to_json(job))
        return
    printer.show(pairs(_facts(job)))
    if job.guests:
        lines = [watching.line_of_guest(guest, "") for guest in job.guests]
        messages = {guest.guest: guest.message for guest in job.guests}
        ordered = sorted(lines, key=lambda line: units.natural(line.guest))
        printer.show("", table(_guest_columns(messages), ordered, printer.width))


def _guest_columns(messages: dict[str, str]) -> list[Column[Any]]:
    from orchestrator.cli.watch import Line

    columns: list[Column[Line]] = [
        Column("GUEST", lambda line: line.guest),
        Column("MiB", lambda line: str(line.memory_mib), right=True, rank=3),
        Column("TO", lambda line: line.destination),
        Column("PHASE", lambda line: styled(line.phase)),
        Column("TRY", lambda line: str(line.attempt or ""), right=True),
        Column("MIGRATION", lambda line: units.short(line.migration), rank=2),
        Column("REASON", lambda line: (line.note, "yellow"), optional=True),
        Column("MESSAGE", lambda line: messages[line.guest], elastic=True, optional=True, rank=1),
    ]
    return columns


def _facts(job: Evacuation) -> Iterable[tuple[str, Cell]]:
    yield "evacuation", job.name
    yield "host", job.host
    yield "phase", styled(phase_of(job))
    yield "moved", f"{_moved(job)} guests"
    yield "power off", ("safe: the host is cordoned and empty", "green") if job.safe_to_power_off else "not safe"
    yield "failure", job.failure
    yield "message", job.message
    yield "at a time", str(job.max_concurrent or "")
    yield from facts_of_time(job)


@evacuation.command()
@evacuation_argument
@remote
@pass_settings
def watch(settings: Settings, evacuation: str) -> None:
    """Follow EVACUATION to its end.

    Exit code 0: the host is empty, 1: guests remain, 6: cancelled.
    """
    with settings.client() as client:
        _watch(client, settings.printer, find_evacuation(client, evacuation).name)


@evacuation.command()
@evacuation_argument
@remote
@pass_settings
def cancel(settings: Settings, evacuation: str) -> None:
    """Cancel EVACUATION. Guests on their way stay at their source, or arrive if they are past their commit.

    The host stays cordoned; `drover host uncordon` lets guests go there again.
    """
    from orchestrator import wire

    with settings.client() as client:
        job = client.cancel_evacuation(find_evacuation(client, evacuation).name)
    if settings.printer.machine:
        settings.printer.document(wire.to_json(job))
    else:
        settings.printer.show(f"evacuation {job.name} of {job.host}: {phase_of(job)}; the host stays cordoned")
        if not job.end_time.seconds:
            note(f"`drover evacuation watch {job.name}` waits for its end")


class _Reasons:
    """The last abort of each guest: an evacuation does not tell it, so it is asked for when an attempt has ended."""

    def __init__(self, client: OrchestratorClient) -> None:
        self._client = client
        self._asked: dict[str, tuple[int, str]] = {}
        self._known: dict[str, str] = {}

    def of(self, migration: str, attempts: int, phase: str) -> str:
        over = phase if phase in ("RETRY_WAIT", "CANCELLED", "FAILED") else ""
        if migration and (attempts > 1 or over) and self._asked.get(migration) != (attempts, over):
            self._ask(migration, attempts, over)
        return self._known.get(migration, "")

    def _ask(self, migration: str, attempts: int, over: str) -> None:
        from orchestrator.cli.watch import last_abort

        try:
            self._known[migration] = last_abort(self._client.get_migration(migration).attempts)
        except DroverError:
            return  # asked again with the next change
        self._asked[migration] = (attempts, over)


def _watch(client: OrchestratorClient, printer: Printer, name: str) -> None:
    """Raises Ended with the code of the evacuation."""
    from orchestrator import wire
    from orchestrator.cli import watch as watching

    board = watching.Board(started_s=time.monotonic())
    reasons = _Reasons(client)

    def take(job: Evacuation) -> bool:
        board.title = f"evacuation {units.short(job.name)} of {job.host}"
        board.phase = phase_of(job)
        board.took(job.elapsed_ms, time.monotonic(), over=bool(job.end_time.seconds))
        for guest in job.guests:
            reason = reasons.of(guest.migration, guest.attempts, wire.word(guest, "phase"))
            key = guest.guest_uuid or guest.guest
            board.lines[key] = watching.forward(board.lines.get(key), watching.line_of_guest(guest, reason))
        return board.phase in watching.TERMINAL

    watching.follow(
        printer,
        board,
        lambda: client.watch_evacuations([name]),
        take,
        document=wire.to_json,
        interrupted=lambda: goes_on("evacuation", name),
    )
    job = client.get_evacuation(name)
    if not printer.machine:
        printer.show(*ending(job, board.lines.values()))
    raise Ended(worst_of([phase_of(job)]))


def ending(job: Evacuation, lines: Iterable[Any]) -> Sequence[str]:
    """How an evacuation ended: a sentence, and one per guest that stays."""
    from orchestrator.cli.watch import Line

    told: list[Line] = list(lines)
    within = f" in {took(job)}" if took(job) else ""
    retries = sum(max(0, line.attempt - 1) for line in told)
    again = f", {units.count(retries, 'attempt')} repeated" if retries else ""
    power = f"; {job.host} is safe to power off" if job.safe_to_power_off else ""
    said = [f"{phase_of(job)}: {_moved(job)} guests moved off {job.host}{within}{again}{power}"]
    if job.message and phase_of(job) != "SUCCEEDED":
        said.append(job.message)
    return said
