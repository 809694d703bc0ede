"""`drover health`: whether a coordinator leads, and what it has set aside."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from orchestrator.cli import units
from orchestrator.cli.context import Settings, pass_settings, remote
from orchestrator.cli.exits import Ended, Exit
from orchestrator.cli.output import Column, note

if TYPE_CHECKING:
    from orchestrator.rpc.messages import Quarantined


@click.command()
@remote
@pass_settings
def health(settings: Settings) -> None:
    """Show whether a coordinator leads, and what it cannot carry on with.

    Exit code 0: one leads and nothing is quarantined, 1: otherwise.
    """
    from orchestrator import wire

    with settings.client() as client:
        found = client.get_cluster_health()
    printer = settings.printer
    if printer.machine:
        printer.document(wire.to_json(found))
    else:
        leads = f"{found.leader} leads" if found.leader else "no coordinator leads: nothing begins, nothing is retried"
        printer.show(leads)
        if found.quarantined:
            printer.table(_columns(time.time()), found.quarantined, empty="")
        else:
            note("nothing is quarantined")
        if found.quarantined_left_out:
            note(f"and {found.quarantined_left_out} more")
    if not found.leader or found.quarantined:
        raise Ended(Exit.FAILED)


def _columns(now_s: float) -> list[Column[Quarantined]]:
    def for_s(each: Quarantined) -> str:
        return units.seconds(max(0.0, now_s - each.since.seconds)) if each.since.seconds else ""

    return [
        Column("QUARANTINED", lambda each: each.resource),
        Column("FOR", for_s, right=True),
        Column("REASON", lambda each: each.reason, elastic=True, wraps=True),
    ]
