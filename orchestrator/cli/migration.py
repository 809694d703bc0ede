"""`drover migrate` and `drover migration`: move one guest, and look at migrations."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli import units
from orchestrator.cli.context import (
    Settings,
    complete_guest,
    complete_host,
    complete_migration,
    find_migration,
    list_options,
    pass_settings,
    remote,
    request_id_option,
)
from orchestrator.cli.exits import CliError, Ended, Exit
from orchestrator.cli.jobs import created, facts_of_time, goes_on, phase_of, show_list, times, took, worst_of
from orchestrator.cli.output import Cell, Column, Printer, note, note_unreadable, pairs, styled, table
from orchestrator.cli.placement import NO_PLACE, show_check
from orchestrator.cli.policy_options import policy_of, policy_options
from orchestrator.core.errors import DroverError, RefusalReason

if TYPE_CHECKING:
    from orchestrator.rpc.messages import AttemptReport, Migration, Unreadable
    from orchestrator.rpc.orchestrator_client import OrchestratorClient


@click.command()
@click.argument("guest", shell_complete=complete_guest)
@click.option("--to", "destination", default="", shell_complete=complete_host, help="Host.  [default: chosen]")
@click.option("--watch", is_flag=True, help="Follow it to its end.")
@click.option("--validate-only", "--dry-run", is_flag=True, help="Only say whether and where it could go.")
@request_id_option
@policy_options
@remote
@pass_settings
def migrate(
    settings: Settings,
    guest: str,
    destination: str,
    watch: bool,
    validate_only: bool,
    request_id: str | None,
    **policy: Any,
) -> None:
    """Move GUEST to another host.

    Policy options take the place of the guest's own policy. With --validate-only nothing is changed; when no host can
    take it, each host is shown with what stands against it. With --watch the exit code is that of the migration:
    0 SUCCEEDED, 1 FAILED, 6 CANCELLED.
    """
    from orchestrator import wire

    with settings.client() as client:

        def create(request_id: str) -> Migration:
            return client.create_migration(
                guest, destination, policy_of(policy), validate_only=validate_only, request_id=request_id
            )

        printer = settings.printer
        try:
            made = created("migration", create, request_id, validate_only=validate_only)
        except DroverError as error:
            if validate_only and error.reason in NO_PLACE:
                show_check(printer, client.check_placement(guest, destination))
            raise
        if validate_only:
            if printer.machine:
                printer.document(wire.to_json(made))
            else:
                printer.show(f"{made.guest} can go from {made.source} to {made.destination}")
        elif watch:
            watch_migrations(client, printer, [made.name])
        elif printer.machine:
            printer.document(wire.to_json(made))
        else:
            printer.show(f"migration {made.name} of {made.guest}: {phase_of(made)}")
            note(f"`drover migration watch {made.name}` follows it")


@click.group()
def migration() -> None:
    """Migrations: list, show, watch and cancel them."""


migration_argument = click.argument("migration", shell_complete=complete_migration)


def _reason(each: Migration) -> str:
    from orchestrator.cli.watch import last_abort

    waits = f"waits: {each.message}" if each.waiting_for and each.message and not each.end_time.seconds else ""
    return each.failure or waits or last_abort(each.attempts)


def _columns(short: dict[str, str], now_s: float) -> list[Column[Migration]]:
    return [
        Column("MIGRATION", lambda each: short[each.name]),
        Column("GUEST", lambda each: each.guest),
        Column("FROM", lambda each: each.source),
        Column("TO", lambda each: each.destination),
        Column("PHASE", lambda each: styled(phase_of(each))),
        Column("TRY", lambda each: str(each.attempt or ""), right=True),
        *times(now_s),
        Column("LAST REASON", _reason, elastic=True, least=20, optional=True),
    ]


@migration.command("list")
@click.option("--guest", default="", shell_complete=complete_guest, help="Only of this guest.")
@click.option("--active", is_flag=True, help="Only those that are not over.")
@click.option("--last", type=click.IntRange(min=1), help="Only the newest so many.")
@list_options
@remote
@pass_settings
def list_(settings: Settings, guest: str, active: bool, last: int | None, filter: str, order_by: str) -> None:
    """List migrations, the newest last, at most a thousand.

    FILTER and FIELDS know name, guest, guest_uuid, evacuation, source, destination, phase, failure, attempts, active,
    create_time, end_time and order.
    """
    with settings.client() as client:
        unreadable: list[Unreadable] = []
        found = client.list_migrations(
            guest, active_only=active, filter=filter, order_by=order_by, limit=last or 1_000, unreadable=unreadable
        )
    show_list(settings.printer, "migrations", found, _columns, last=last)
    note_unreadable("migration", unreadable)


@migration.command()
@migration_argument
@remote
@pass_settings
def show(settings: Settings, migration: str) -> None:
    """Show one migration and its attempts."""
    with settings.client() as client:
        show_migration(settings.printer, find_migration(client, migration))


def show_migration(printer: Printer, each: Migration) -> None:
    """Print one migration with its attempts; for programs the whole message."""
    from orchestrator import wire

    if printer.machine:
        printer.document(wire.to_json(each))
        return
    printer.show(pairs(_facts(each)))
    if each.attempts:
        printer.show("", table(_attempt_columns(), list(each.attempts), printer.width))
    note(f"`drover explain {each.name}` shows the time line")


def _facts(each: Migration) -> Iterable[tuple[str, Cell]]:
    yield "migration", each.name
    yield "guest", f"{each.guest} ({each.guest_uuid})" if each.guest_uuid else each.guest
    yield "from", each.source
    yield "to", each.destination
    yield "phase", styled(phase_of(each))
    yield "attempt", str(each.attempt or "")
    yield ("failure" if each.failure else "message"), ": ".join(filter(None, (each.failure, each.message)))
    yield "evacuation", each.evacuation
    yield from facts_of_time(each)
    if each.HasField("progress") and not each.end_time.seconds:
        yield from _progress(each)
    if each.HasField("policy"):
        yield "policy", _policy(each)


_WAYS = {"full": "all of it", "increment": "what was written since", "goes_on": "the copy goes on"}


def _progress(each: Migration) -> Iterable[tuple[str, Cell]]:
    sample = each.progress
    yield "sent", f"{units.size(sample.transferred_bytes)}, {units.size(sample.remaining_bytes)} left to send"
    yield "rate", f"{units.rate(sample.bandwidth_mbps)}, dirtied at {units.rate(sample.dirty_rate_mbps)}"
    yield "iteration", str(sample.iteration or "")
    yield "gate", "open" if sample.gate_open else "closed"
    yield "pending ACKs", ", ".join(f"{ack.device}/{ack.generation}" for ack in sample.pending_acks)
    for device in sample.devices:
        rest = f"{units.size(device.initial_bytes)} to send, {units.size(device.stop_copy_bytes)} after the stop"
        yield f"device {device.name}", f"{rest}; asked for {units.count(device.reinits, 'further ACK')}"
    for disk in sample.disks:
        ready = "; ready, the guest's writes follow" if disk.ready else ""
        done = f"{units.size(disk.copied_bytes)} copied, {units.size(disk.remaining_bytes)} left"
        yield f"disk {disk.name}", f"{_WAYS.get(disk.way, disk.way)}: {done}{ready}"
    if sample.expected_downtime_ms:
        yield "downtime", f"{units.milliseconds(sample.expected_downtime_ms)} expected"


def _policy(each: Migration) -> str:
    """What differs from the defaults."""
    from orchestrator import wire
    from orchestrator.core.policy import MigrationPolicy
    from orchestrator.core.record import known_fields

    default, given = MigrationPolicy(), wire.policy_from_proto(each.policy)
    names = [field.name for field in known_fields(MigrationPolicy)]
    differs = [f"{name}={getattr(given, name)}" for name in names if getattr(given, name) != getattr(default, name)]
    return ", ".join(differs) or "default"


def _attempt_columns() -> list[Column[AttemptReport]]:
    from orchestrator.cli.watch import reason_of

    return [
        Column("TRY", lambda report: str(report.attempt), right=True),
        Column("TO", lambda report: report.destination),
        Column("OUTCOME", lambda report: styled(report.outcome)),
        Column("TOOK", lambda report: units.milliseconds(report.duration_ms), right=True),
        Column("SENT", lambda report: units.size(report.transferred_bytes), right=True),
        Column("BLACKOUT", lambda report: units.milliseconds(report.blackout_ms), right=True),
        Column("ZXID", lambda report: f"{report.zxid:#x}" if report.zxid else "", right=True, rank=1),
        Column("REASON", reason_of, elastic=True, optional=True),
        Column("MESSAGE", lambda report: report.message, elastic=True, optional=True, rank=2),
    ]


@migration.command()
@click.argument("migrations", nargs=-1, shell_complete=complete_migration)
@remote
@pass_settings
def watch(settings: Settings, migrations: tuple[str, ...]) -> None:
    """Follow MIGRATIONS to their end; without any, all that run, until Ctrl-C.

    The exit code is that of the worst: 1 when one FAILED, 6 when one was CANCELLED, else 0.
    """
    with settings.client() as client:
        names = [find_migration(client, each).name for each in migrations]
        watch_migrations(client, settings.printer, names)


def watch_migrations(client: OrchestratorClient, printer: Printer, names: list[str]) -> None:
    """Follow them to their ends. Raises Ended with the code of the worst end."""
    from orchestrator import wire
    from orchestrator.cli import watch as watching

    board = watching.Board(started_s=time.monotonic())
    ends: dict[str, str] = {}

    def take(message: Migration) -> bool:
        board.lines[message.name] = watching.forward(board.lines.get(message.name), watching.line_of_migration(message))
        if len(names) == 1:
            board.took(message.elapsed_ms, time.monotonic(), over=bool(message.end_time.seconds))
        if phase_of(message) in watching.TERMINAL:
            ends[message.name] = phase_of(message)
        return bool(names) and all(name in ends for name in names)

    def interrupted() -> str:
        going = [name for name in (names or board.lines) if name not in ends]
        if not going:
            return "nothing is under way"
        if len(going) > 1:
            return f"{len(going)} migrations go on; `drover migration cancel ID` cancels one, `list` shows them"
        return goes_on("migration", going[0])

    watching.follow(
        printer,
        board,
        lambda: client.watch_migrations(names),
        take,
        document=wire.to_json,
        interrupted=interrupted,
    )
    for name in names:
        if name not in ends:
            ends[name] = phase_of(client.get_migration(name))
    if not printer.machine:
        for name in names:
            printer.show(ending(client.get_migration(name)))
    raise Ended(worst_of(ends.values()))


def ending(each: Migration) -> str:
    """One sentence on how a migration ended."""
    phase = phase_of(each)
    after = f" after {took(each)}" if took(each) else ""
    tries = units.count(each.attempt, "attempt") if each.attempt else "no attempt"
    if phase == "SUCCEEDED":
        committed = [report for report in each.attempts if report.outcome == "COMMITTED"]
        stood_ms = committed[-1].blackout_ms if committed else 0.0
        blackout = f", blackout {units.milliseconds(stood_ms)}" if stood_ms else ""
        return f"{each.guest} is on {each.destination}{after}, {tries}{blackout}"
    why = ": ".join(filter(None, (each.failure, each.message)))
    return f"{each.guest} stays {_where(each)}: {phase}{after}, {tries}{': ' if why else ''}{why}"


def _where(each: Migration) -> str:
    """Where the guest of a migration that moved nothing is: its source is known from the first attempt on."""
    return f"on {each.source}" if each.source else "where it is"


@migration.command()
@migration_argument
@remote
@pass_settings
def cancel(settings: Settings, migration: str) -> None:
    """Cancel MIGRATION. Exit code 0 means: it will never commit, the guest stays at its source."""
    from orchestrator import wire

    with settings.client() as client:
        name = find_migration(client, migration).name
        try:
            each = client.cancel_migration(name)
        except DroverError as error:
            if error.reason is RefusalReason.ALREADY_COMMITTED and "zxid" in error.details:
                raise CliError(Exit.REFUSED, f"{error} (commit {_hex(error.details['zxid'])})") from None
            raise
    if settings.printer.machine:
        settings.printer.document(wire.to_json(each))
    else:
        settings.printer.show(f"migration {each.name} of {each.guest} is cancelled: it stays {_where(each)}")


def _hex(zxid: str) -> str:
    return f"zxid {int(zxid):#x}" if zxid.isdecimal() else f"zxid {zxid}"
