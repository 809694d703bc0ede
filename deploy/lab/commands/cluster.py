"""`drover up`, `drover down`, `drover status`: a whole cluster on this machine."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.lab.commands.base import LabCommand
from orchestrator.cli import units
from orchestrator.cli.context import Settings, dir_option, local, pass_settings
from orchestrator.cli.exits import CliError, Ended, Exit
from orchestrator.cli.output import Column, note, styled
from orchestrator.cli.policy_options import MIB

if TYPE_CHECKING:
    from deploy.lab.cluster.commands import ClusterStatus, PartStatus

_VERSION = re.compile(r"\d+(\.\d+){0,2}")


@click.command(cls=LabCommand)
@click.option("--hosts", type=int, help="Simulated hosts.  [default: 4]")
@click.option("--bandwidth", help="Of each host, per direction, e.g. 100mbit.  [default: 1gbit]")
@click.option("--shape/--no-shape", default=None, help="Limit the bandwidth.  [default: yes, where it can be done]")
@click.option("--memory", "memory_mib", type=MIB, help="For the guests of each host, e.g. 4GiB.  [default: 8GiB]")
@click.option("--chaos", is_flag=True, default=None, help="Allow `drover chaos`.")
@click.option("--qemu", metavar="BINARY|VERSION", help="QEMU to use.  [default: qemu-system-x86_64]")
@click.option("--qemu-on", multiple=True, metavar="HOST=BINARY|VERSION", help="Another QEMU on one host.")
@click.option("--accelerator", type=click.Choice(["tcg", "kvm"]), help="How guests are run.  [default: tcg]")
@click.option("--guest-image", type=click.Path(dir_okay=False, path_type=Path), help="Another image than our own.")
@click.option(
    "--images", type=click.Path(file_okay=False, exists=True, path_type=Path), help="Images that guests name."
)
@click.option("--zookeeper", type=int, metavar="1|3|5", help="ZooKeeper servers.  [default: 1]")
@click.option(
    "--tls/--no-tls", default=None, help="ZooKeeper, and memory and disks between hosts, by TLS.  [default: no]"
)
@click.option("--coordinators", type=int, help="Coordinators, each with its own Ray.  [default: 1]")
@click.option("--shards", type=int, help="Of the fleet, shared out among coordinators.  [default: 1]")
@click.option("--apis", type=int, help="API servers.  [default: 1]")
@click.option("--workers", type=int, help="Ray actors that drive migrations.  [default: 2]")
@click.option("--max-concurrent", "max_concurrent_migrations", type=int, help="Migrations at a time.  [default: 64]")
@click.option("--max-per-source", type=int, help="Migrations that leave one host at a time.  [default: 8]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[default: info]")
@click.option("--start-timeout", "start_timeout_s", type=float, metavar="SECONDS", help="[default: 60]")
@click.option("--foreground", is_flag=True, help="Stay until Ctrl-C, then end the cluster.")
@dir_option
@pass_settings
def up(settings: Settings, foreground: bool, **options: Any) -> None:
    """Start a cluster on this machine and return when it is ready.

    ZooKeeper, Ray, the API, the coordinator and simulated hosts with their agents, all below one directory. Where the
    machine does not allow network namespaces, hosts are loopback addresses without a bandwidth limit.
    """
    from deploy.lab.cluster import commands, config
    from deploy.lab.cluster.layout import LocalClusterError

    given = {name: value for name, value in options.items() if value is not None}
    if "qemu" in given:
        given["qemu"] = _qemu(given["qemu"])
    given["qemu_on"] = dict(_host_qemu(each) for each in given["qemu_on"])
    try:
        configuration = config.make(dir=settings.directory, **given)
    except LocalClusterError as error:
        raise CliError(Exit.USAGE, str(error)) from None
    try:
        commands.up(configuration, foreground=foreground)
    except commands.Interrupted:
        note("drover: interrupted; nothing is left of the cluster")
        raise Ended(Exit.INTERRUPTED) from None


def _host_qemu(given: str) -> tuple[str, str]:
    host, found, wanted = given.partition("=")
    if not (host and found and wanted):
        raise CliError(Exit.USAGE, f"--qemu-on needs HOST=BINARY or HOST=VERSION, such as host-2=11.1, not {given}")
    return host, _qemu(wanted)


def _qemu(wanted: str) -> str:
    """A binary, or the one on this machine that has this version. Raises CliError when there is none."""
    if not _VERSION.fullmatch(wanted):
        return str(Path(wanted).resolve()) if os.sep in wanted else wanted
    from deploy.lab.cluster import qemu_versions

    found = qemu_versions.find()
    fitting = [binary for binary, version in found.items() if f"{version}.".startswith(f"{wanted}.")]
    if fitting:
        return fitting[0]
    known = ", ".join(f"{version} ({binary})" for binary, version in found.items()) or "none"
    raise CliError(Exit.USAGE, f"there is no QEMU {wanted} here; found: {known}", hint="name its binary with --qemu")


@click.command(cls=LabCommand)
@click.option("--keep", multiple=True, type=click.Choice(["serial", "logs"]), help="Leave these files there.")
@dir_option
@pass_settings
def down(settings: Settings, keep: tuple[str, ...]) -> None:
    """End the local cluster and its guests, and remove all that it made."""
    from deploy.lab.cluster import commands

    before = commands.status(settings.directory)
    left = commands.down(settings.directory, keep=keep)
    if left:
        raise CliError(Exit.FAILED, "not everything could be removed", lines=left, hint="try again, or as root")
    kept = f"; {', '.join(keep)} kept in {before.dir}" if keep else ""
    said = "no cluster ran" if before.state == "not running" else "the cluster is down"
    note(f"{said} in {before.dir}, nothing of it is left{kept}")


@click.command(cls=LabCommand)
@local
@pass_settings
def status(settings: Settings) -> None:
    """Show the parts of the local cluster and how they are.

    Exit code 0: every part is well, 1: one is not, 5: no cluster runs there.
    """
    from deploy.lab.cluster import commands

    cluster = commands.status(settings.directory)
    printer = settings.printer
    if printer.machine:
        printer.document(_document(cluster))
    else:
        ready = f", ready after {cluster.ready_after_s} s" if cluster.ready_after_s else ""
        why = [cluster.failure] if cluster.failure else []
        printer.show(f"cluster in {cluster.dir}: {cluster.state}{ready}", *why, *cluster.notes)
        if cluster.parts:
            printer.table(_columns(time.time()), cluster.parts, empty="")
    if not cluster.running:
        if not printer.machine:
            note("`drover up` starts a cluster" if cluster.state != "crashed" else "`drover down` cleans up after it")
        raise Ended(Exit.UNREACHABLE)
    if not cluster.healthy:
        raise Ended(Exit.FAILED)


def _columns(now_s: float) -> list[Column[PartStatus]]:
    def up_for(part: PartStatus) -> str:
        return units.seconds(now_s - part.up_since) if part.up_since and part.pid else ""

    return [
        Column("PART", lambda part: part.name),
        Column("STATE", lambda part: styled(part.state)),
        Column("PID", lambda part: str(part.pid or ""), right=True),
        Column("UP", up_for, right=True),
        Column("RESTARTS", lambda part: str(part.restarts), right=True),
        Column("HEALTH", lambda part: (part.health, "green" if part.health == "ok" else "bold red"), elastic=True),
    ]


def _document(cluster: ClusterStatus) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        **asdict(cluster),
        "dir": str(cluster.dir),
        "healthy": cluster.healthy,
        "parts": [asdict(part) for part in cluster.parts],
        "notes": list(cluster.notes),
    }
