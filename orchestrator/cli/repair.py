"""`drover repair`: what is wrong with a guest, and what can safely be done about it."""

from __future__ import annotations

import click

from orchestrator.cli.context import Settings, complete_guest, pass_settings, remote


@click.command()
@click.argument("guest", shell_complete=complete_guest)
@click.option("--action", default="", metavar="NAME", help="Do this; one of those that are offered.")
@remote
@pass_settings
def repair(settings: Settings, guest: str, action: str) -> None:
    """Explain what the ledger and the agents have of GUEST, and what can safely be done.

    Nothing is done without --action, and only what is safe is offered.
    """
    from orchestrator import wire

    with settings.client() as client:
        found = client.repair_guest(guest, action)
    printer = settings.printer
    if printer.machine:
        printer.document(wire.to_json(found))
        return
    if action:
        printer.show(f"{action}: done; now")
    for line in found.findings:
        printer.show(f"  {line}")
    if found.otherwise:
        printer.show(f"nothing safe can be done, because {found.otherwise}")
    for offer in found.offers:
        printer.show(f"--action {offer.action}: {offer.message}")
