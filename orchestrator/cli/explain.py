"""`drover explain`: all of one migration, attempt by attempt, also long after its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli import units
from orchestrator.cli.context import Settings, complete_guest, complete_migration, find_migration, pass_settings, remote
from orchestrator.cli.exits import CliError, Exit
from orchestrator.cli.output import STYLES, Column, Printer, table

if TYPE_CHECKING:
    from rich.text import Text

    from orchestrator.cli.timeline import Moment, Story
    from orchestrator.core.records import AttemptReport, DeviceProgress
    from orchestrator.rpc.messages import Migration
    from orchestrator.rpc.orchestrator_client import OrchestratorClient


@click.command()
@click.argument("migration", required=False, shell_complete=complete_migration)
@click.option("--guest", default="", shell_complete=complete_guest, help="The newest migration of this guest instead.")
@remote
@pass_settings
def explain(settings: Settings, migration: str | None, guest: str) -> None:
    """Tell all that happened in MIGRATION.

    Phases, requests and ACKs of devices, gate, freeze, check, commit with its zxid, every attempt with its reason, and
    what the downtime consisted of. It can be asked for as long as the migration is remembered.
    """
    if bool(migration) == bool(guest):
        raise click.UsageError("name a MIGRATION, or a guest with --guest, and not both")
    from orchestrator import wire, wire_attempts
    from orchestrator.cli.timeline import tell

    with settings.client() as client:
        found = find_migration(client, migration) if migration else _newest(client, guest)
    reports = [wire_attempts.report_from_proto(report) for report in found.attempts]
    stories = [tell(report) for report in reports]
    if settings.printer.machine:
        settings.printer.document(_document(wire.to_json(found), stories))
    else:
        _tell(settings.printer, found, reports, stories)


def _newest(client: OrchestratorClient, guest: str) -> Migration:
    found = client.list_migrations(guest, limit=1)
    if not found:
        client.get_guest(guest)  # says so if there is no such guest
        raise CliError(Exit.NOT_FOUND, f"guest {guest} has no migrations")
    return client.get_migration(found[0].name)


def _document(migration: dict[str, Any], stories: list[Story]) -> dict[str, Any]:
    """The migration, and each attempt's time line on one clock."""
    attempts = [
        {
            "attempt": report["attempt"],
            "off_by_ms": story.off_by_ms,
            "timeline": [asdict(moment) for moment in story.moments],
            "stop": [asdict(part) for part in story.stops],
        }
        for report, story in zip(migration["attempts"], stories, strict=True)
    ]
    return {"migration": migration, "attempts": attempts}


def _tell(printer: Printer, found: Migration, reports: list[AttemptReport], stories: list[Story]) -> None:
    printer.show(*_head(found), *explain_lines(reports, stories, printer.width))
    if not reports:
        printer.show("", "no attempt has ended yet")


def explain_lines(reports: Sequence[AttemptReport], stories: Sequence[Story], width: int | None) -> list[Text | str]:
    """Each attempt with its time line, for a terminal of this width (None: as wide as it wants to be)."""
    lines: list[Text | str] = []
    for report, story in zip(reports, stories, strict=True):
        lines += ["", _attempt_head(report)]
        if story.moments:
            lines.append(table(_columns(), story.moments, width))
        lines += _after(report, story)
    return lines


def _head(found: Migration) -> list[Text | str]:
    from rich.text import Text

    from orchestrator.cli.jobs import phase_of, took_s, wall_s

    phase = phase_of(found)
    head = Text(f"migration {found.name}\n{found.guest}", style="bold").append(f": {found.source}", style="not bold")
    head.append(f" -> {found.destination or '?'}, ", style="not bold").append(phase, style=STYLES.get(phase, ""))
    took = took_s(found)
    if took is not None:
        head.append(f" in {units.seconds(took)}", style="not bold")
    head.append(f", {units.count(found.attempt, 'attempt')}", style="not bold")
    lines: list[Text | str] = [head]
    if found.failure or found.message:
        lines.append(": ".join(filter(None, (found.failure, found.message))))
    asked = f"asked for at {units.clock(wall_s(found.create_time), time.time())}" if found.create_time.seconds else ""
    by = f"by evacuation {found.evacuation}" if found.evacuation else ""
    lines += [" ".join(filter(None, (asked, by)))] if asked or by else []
    if not found.end_time.seconds and found.progress.pending_acks:
        waits = ", ".join(f"{ack.device}/{ack.generation}" for ack in found.progress.pending_acks)
        lines.append(f"now waiting for ACKs: {waits}")
    return lines


def _attempt_head(report: AttemptReport) -> Text:
    from rich.text import Text

    head = Text(f"attempt {report.attempt}", style="bold")
    head.append(f"  {report.source} -> {report.destination}  ", style="not bold")
    head.append(report.outcome, style=STYLES.get(report.outcome, "bold"))
    if report.reason:
        devices = f" ({', '.join(report.devices)})" if report.devices else ""
        head.append(f" {report.reason}{devices}", style="yellow")
    if report.zxid:
        head.append(f" at zxid {report.zxid:#x}", style="not bold")
    return head


def _columns() -> list[Column[Moment]]:
    return [
        Column("ms", lambda moment: f"{'~' if moment.placed else ''}{moment.at_ms:.1f}", right=True),
        Column("WHERE", lambda moment: moment.where),
        Column("PHASE", lambda moment: (moment.phase, STYLES.get(moment.phase, "cyan"))),
        Column("EVENT", lambda moment: moment.text, elastic=True, wraps=True),
    ]


def _inside(device: DeviceProgress) -> str:
    """One line on a device inside the VMM."""
    before, after = units.size(device.precopy_sent_bytes), units.size(device.stop_copy_sent_bytes)
    asked = f", asked for {units.count(device.reinits, 'further ACK')}" if device.reinits else ""
    late = ", the last one late" if device.late else ""
    lost = "; reset, its state is lost" if device.lost else ""
    return f"device {device.name} inside the VMM: {before} before the stop, {after} after it{asked}{late}{lost}"


def _after(report: AttemptReport, story: Story) -> list[str]:
    lines: list[str] = []
    if report.message:
        lines.append(report.message)
    if report.blackout_ms:
        parts = " + ".join(f"{part.name} {units.milliseconds(part.ms)}" for part in story.stops)
        most = "at most " if report.outcome == "COMMITTED" else ""  # its end is known by word from the destination
        stood = f"the guest stood still for {most}{units.milliseconds(report.blackout_ms)}"
        lines.append(f"{stood}: {parts}" if parts else stood)
    lines.append(
        f"{units.milliseconds(report.duration_ms)} in all, {units.size(report.transferred_bytes)} sent, "
        f"{units.count(story.requests, 'ACK request')} and {units.count(story.acks, 'ACK')}, "
        f"{units.count(report.ledger_writes, 'ledger write')}"
    )
    lines += [_inside(device) for device in report.device_progress]
    if report.requested_while_stopped:
        names = ", ".join(f"{ack.device}/{ack.generation}" for ack in report.requested_while_stopped)
        lines.append(f"pending when the guest had been stopped on purpose, so not late: {names}")
    if any(moment.placed for moment in story.moments):
        known = "" if story.off_by_ms is None else f", to within {units.milliseconds(story.off_by_ms)}"
        lines.append(f"~ noted on the destination's clock, placed by cause and effect{known}")
    return lines
