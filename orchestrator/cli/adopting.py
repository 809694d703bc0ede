"""`drover guest adopt` and `drover guest release`: QEMUs that somebody else has started."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import click

from orchestrator.cli.context import (
    Settings,
    complete_guest,
    complete_host,
    pass_settings,
    remote,
    request_id_option,
)
from orchestrator.cli.exits import Ended, Exit
from orchestrator.cli.guest import spec_of
from orchestrator.cli.jobs import created
from orchestrator.cli.output import Column, note, table

if TYPE_CHECKING:
    from orchestrator.rpc.messages import AdoptGuestResponse, Obstacle


@click.command()
@click.argument("name")
@click.option("--host", default="", shell_complete=complete_host, help="Where it runs.  [default: this machine's name]")
@click.option("--pid", type=click.IntRange(min=2), required=True, help="Of the QEMU.")
@click.option("--qmp", metavar="SOCKET", required=True, help="Unix socket of its monitor, a whole path on that host.")
@click.option("-f", "--file", "file", metavar="FILE", default="", help="A guest file for what cannot be seen.")
@click.option("--to", "destination", default="", shell_complete=complete_host, help="Move it there.  [default: chosen]")
@click.option("--watch", is_flag=True, help="Follow its move to the end.")
@click.option("--validate-only", "--dry-run", is_flag=True, help="Only say what stands against it.")
@request_id_option
@remote
@pass_settings
def adopt(
    settings: Settings,
    name: str,
    host: str,
    pid: int,
    qmp: str,
    file: str,
    destination: str,
    watch: bool,
    validate_only: bool,
    request_id: str | None,
) -> None:
    """Make a QEMU that somebody else started the guest NAME, without stopping it, and move it at once.

    Everything that stands against it is told before anything is changed (docs/import.md). From FILE come labels,
    policy, on_host_death, and the names of disks (by pool and image) and cards (by MAC); all else the QEMU says.
    Until it has moved, `drover guest release` gives it back. Exit code 4: it cannot be taken over.
    """
    from orchestrator import wire
    from orchestrator.cli.migration import watch_migrations

    spec = spec_of(file, name) if file else None
    where = host or socket.gethostname()
    with settings.client() as client:

        def ask(request_id: str) -> AdoptGuestResponse:
            return client.adopt_guest(
                name, where, pid, qmp, spec, destination, validate_only=validate_only, request_id=request_id
            )

        answer = created("adoption", ask, request_id, validate_only=validate_only)
        printer = settings.printer
        if validate_only:
            if printer.machine:
                printer.document(wire.to_json(answer))
            else:
                _say(settings, name, where, pid, answer)
            if answer.obstacles:
                raise Ended(Exit.REFUSED)
        elif watch:
            watch_migrations(client, printer, [answer.migration.name])
        elif printer.machine:
            printer.document(wire.to_json(answer))
        else:
            printer.show(f"{name} is adopted on {where}, and moves to {answer.migration.destination or 'another host'}")
            note(f"`drover migration watch {answer.migration.name}` follows it")


def _say(settings: Settings, name: str, host: str, pid: int, answer: AdoptGuestResponse) -> None:
    from orchestrator.core.obstacles import remedy

    printer = settings.printer
    if not answer.obstacles:
        printer.show(f"process {pid} of {host} could be adopted as {name}")
        return
    columns: list[Column[Obstacle]] = [
        Column("AGAINST IT", lambda each: each.reason),
        Column("WHY", lambda each: each.message, elastic=True),
        Column("WHAT HELPS", lambda each: remedy(each.reason), elastic=True, optional=True, rank=1),
    ]
    printer.show(f"process {pid} of {host} cannot be adopted:", table(columns, list(answer.obstacles), printer.width))


@click.command()
@click.argument("guest", shell_complete=complete_guest)
@remote
@pass_settings
def release(settings: Settings, guest: str) -> None:
    """Give GUEST, which was adopted and has not moved since, back to whoever started its QEMU.

    The QEMU runs on as it is, its monitor is free again, and GUEST is no guest of Drover's any more. A move of it is
    cancelled first. One that has moved is Drover's own: it can only be stopped.
    """
    from orchestrator import wire

    with settings.client() as client:
        each = client.release_guest(guest)
    if settings.printer.machine:
        settings.printer.document(wire.to_json(each))
    else:
        settings.printer.show(
            f"{each.name or guest} is released: its QEMU runs on, and Drover has nothing to do with it"
        )
