"""`drover host enroll`: who may be a host. Like `drover ledger` it speaks with ZooKeeper itself."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.cli.context import Settings, local, pass_settings
from orchestrator.cli.ledger import ledger_meant, where_options


@click.command(short_help="Let HOST be a host, before its agent comes.")
@click.argument("host")
@where_options
@local
@pass_settings
def enroll(
    settings: Settings, host: str, config: Path | None, zookeeper: str | None, chroot: str | None, tls: Path | None
) -> None:
    """Let HOST be a host of the cluster: its agent may register from now on, with the certificate of that name.

    Only where `tls` is in use: there no agent makes itself a host. Show ZooKeeper the identity `role/admin` by --tls,
    and give HOST its certificate by `drover pki issue host/HOST`. May be repeated; a registered host stays as it is.
    """
    import asyncio

    from orchestrator.restore.access import enrol_host

    asyncio.run(enrol_host(ledger_meant(settings, config, zookeeper, chroot, tls), host))
    settings.printer.show(f"{host} may be a host: its agent registers once it has the certificate of host/{host}")
