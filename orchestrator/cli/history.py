"""`drover history`: what the ledger has forgotten."""

from __future__ import annotations

import sys

import click

from orchestrator.cli.context import Settings, pass_settings, remote


@click.group()
def history() -> None:
    """What is over for so long that the ledger has forgotten it."""


@history.command()
@click.option("--kind", type=click.Choice(["migrations", "evacuations", "guests"]), help="Only of this kind.")
@click.option("--name", "prefix", default="", metavar="PREFIX", help="Only those whose name begins so.")
@remote
@pass_settings
def export(settings: Settings, kind: str | None, prefix: str) -> None:
    """Write the history as JSON lines, the oldest first.

    Each line has kind, name, order (the ledger's own) and nodes, the content of what stood in the ledger. A line may be
    there twice.
    """
    with settings.client() as client:
        for entry in client.export_history(kind or "", prefix):
            sys.stdout.write(f"{entry.json}\n")
