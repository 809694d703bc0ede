"""`drover host power-cycle`, `drover host power-on`: the power of a simulated host."""

from __future__ import annotations

import click

from deploy.lab.commands.base import LabCommand
from orchestrator.cli import units
from orchestrator.cli.context import Settings, local, pass_settings
from orchestrator.cli.exits import CliError, Ended, Exit
from orchestrator.cli.host import host_argument


@click.command("power-cycle", cls=LabCommand, short_help="Cut its power and boot it (local cluster).")
@host_argument
@click.option("--off", is_flag=True, help="Leave it without power; `drover host power-on` boots it.")
@local
@pass_settings
def power_cycle(settings: Settings, host: str, off: bool) -> None:
    """Cut the power of HOST and boot it again (local cluster only).

    Everything on it dies at once, guests included, as in a real loss of power.
    """
    from deploy.lab.cluster import commands

    _in_local_cluster(settings, host)
    _powered(settings, host, commands.power_cycle(settings.directory, host, off=off), off=off)


@click.command("power-on", cls=LabCommand, short_help="Boot it when it is off (local cluster).")
@host_argument
@local
@pass_settings
def power_on(settings: Settings, host: str) -> None:
    """Boot a HOST that is without power (local cluster only)."""
    from deploy.lab.cluster import commands

    _in_local_cluster(settings, host)
    _powered(settings, host, commands.power_on(settings.directory, host), off=False)


def _in_local_cluster(settings: Settings, host: str) -> None:
    """Raises CliError unless the local cluster runs and has this host."""
    from deploy.lab.cluster import commands

    status = commands.status(settings.directory)
    if not status.running:
        said = f"no local cluster runs in {status.dir} ({status.state})"
        raise CliError(Exit.UNREACHABLE, said, hint="`drover up` starts one, --dir or DROVER_DIR names another")
    known = sorted({part.host for part in status.parts if part.host}, key=units.natural)
    if host not in known:
        raise CliError(Exit.NOT_FOUND, f"the local cluster has no host {host!r}; there are {', '.join(known)}")


def _powered(settings: Settings, host: str, serving: bool, *, off: bool) -> None:
    printer = settings.printer
    if printer.machine:
        printer.document({"host": host, "powered": not off, "serving": serving})
    elif off:
        printer.show(f"{host} is without power; `drover host power-on {host}` boots it")
    elif serving:
        printer.show(f"{host} has booted and its agent serves")
    else:
        printer.show(f"{host} has booted, but its agent does not serve yet; `drover status` shows it")
    if not off and not serving:
        raise Ended(Exit.FAILED)
