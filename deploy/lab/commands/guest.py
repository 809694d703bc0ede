"""`drover guest serial`, `drover guest verify`: what guests of the local cluster say on their consoles."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import click

from deploy.lab.commands.base import LabCommand
from orchestrator.cli import units
from orchestrator.cli.context import Settings, local, pass_settings
from orchestrator.cli.exits import CliError, Ended, Exit
from orchestrator.cli.guest import guest_argument

if TYPE_CHECKING:
    from deploy.lab.cluster.console_client import ConsoleInfo


@click.command(cls=LabCommand, short_help="Show what it wrote on its console (local cluster).")
@guest_argument
@click.option("--lines", type=click.IntRange(1, 200), default=20, show_default=True, help="How many.")
@local
@pass_settings
def serial(settings: Settings, guest: str, lines: int) -> None:
    """Show the last lines that GUEST wrote on its console (local cluster only), and how long ago."""
    import asyncio

    from deploy.lab.cluster import console_client

    name, _ = _console_of(settings, guest)
    with _reachable():
        found = asyncio.run(console_client.tail(settings.directory, name, lines=lines))
    stamped = [(int(stamp), text) for stamp, _, text in (line.partition(" ") for line in found)]
    printer = settings.printer
    if printer.machine:
        printer.document({"guest": guest, "lines": [{"monotonic_ns": ns, "text": text} for ns, text in stamped]})
        return
    now_ns = time.monotonic_ns()
    for ns, text in stamped:
        printer.out.write(f"{(ns - now_ns) / 1e9:9.3f} s  {text}\n")


@click.command(cls=LabCommand, short_help="Let it check all of its memory (local cluster).")
@guest_argument
@click.option("--timeout", "timeout_s", type=click.FloatRange(0, 600, min_open=True), default=60, show_default=True)
@local
@pass_settings
def verify(settings: Settings, guest: str, timeout_s: float) -> None:
    """Let GUEST check all of its memory (local cluster only).

    Exit code 0: every page is right, 1: one is wrong. A paused guest does not answer.
    """
    from deploy.lab.cluster import console_client

    name, consoles = _console_of(settings, guest)
    if not any(each.connected for each in consoles):
        raise CliError(Exit.REFUSED, f"the guest {guest} has ended: its consoles are closed")
    with _reachable():
        result = console_client.verify_sync(settings.directory, name, timeout_s=timeout_s)
    where = result.console.host
    if settings.printer.machine:
        document: dict[str, Any] = {"guest": guest, "host": where, "ok": result.ok}
        settings.printer.document({**document, "pages": result.pages, "bad_pages": result.bad})
    elif result.ok:
        settings.printer.show(f"{guest} on {where}: all {result.pages} pages are right")
    else:
        settings.printer.show(f"{guest} on {where}: {units.count(result.bad, 'page')} wrong")
    if not result.ok:
        raise Ended(Exit.FAILED)


@contextlib.contextmanager
def _reachable() -> Generator[None]:
    """Turns what a console says against us into an error of the CLI."""
    from deploy.lab.cluster.console_client import ConsoleError

    try:
        yield
    except ConsoleError as error:
        raise CliError(Exit.UNREACHABLE, str(error)) from None


def _console_of(settings: Settings, guest: str) -> tuple[str, list[ConsoleInfo]]:
    """What the collector calls the guest (its name or its uuid), and its consoles."""
    from deploy.lab.cluster import console_client

    with _reachable():
        consoles = console_client.list_consoles_sync(settings.directory)
    known = {each.vmm.guest for each in consoles}
    name = guest
    if guest not in known:
        with settings.client() as client:
            name = client.get_guest(guest).uuid
        if name not in known:
            raise CliError(Exit.NOT_FOUND, f"the collector knows no console of guest {guest}")
    return name, [each for each in consoles if each.vmm.guest == name]
