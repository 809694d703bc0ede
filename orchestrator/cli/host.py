"""`drover host`: what hosts there are, and whether they take guests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from orchestrator.cli import units
from orchestrator.cli.context import Settings, complete_host, pass_settings, remote
from orchestrator.cli.output import Cell, Column, Printer, pairs, styled
from orchestrator.cli.plugins import open_group

if TYPE_CHECKING:
    from orchestrator.rpc.messages import Host


@click.group(cls=open_group("host"))
def host() -> None:
    """Hosts: list them, take them out of service, put them back."""


host_argument = click.argument("host", shell_complete=complete_host)


def _state(each: Host) -> Cell:
    from orchestrator import wire

    return styled(wire.word(each, "state"))


def _cordoned(each: Host) -> Cell:
    reason = f": {each.cordon_reason}" if each.cordon_reason else ""
    return (f"yes{reason}", "yellow") if each.cordoned else "no"


def _free_mib(each: Host) -> int:
    return each.memory_mib - each.memory_used_mib - each.memory_reserved_mib


def _engine(each: Host) -> str:
    return f"{each.engine} ({each.accelerator})" if each.accelerator else each.engine


def _columns() -> list[Column[Host]]:
    return [
        Column("HOST", lambda each: each.name),
        Column("STATE", _state),
        Column("GUESTS", lambda each: str(each.guests), right=True),
        Column("FREE MiB", lambda each: str(_free_mib(each)), right=True),
        Column("OF MiB", lambda each: str(each.memory_mib), right=True, rank=1),
        Column("PROMISED", lambda each: str(each.memory_reserved_mib), right=True, rank=2),
        Column("Mbit/s", lambda each: str(each.bandwidth_mbps), right=True, rank=3),
        Column("ENGINE", _engine, rank=4, elastic=True),
        Column("CORDONED", _cordoned, elastic=True, least=20),
    ]


def _show(printer: Printer, each: Host) -> None:
    from orchestrator import wire

    if printer.machine:
        printer.document(wire.to_json(each))
        return
    promised = f", {each.memory_reserved_mib} MiB promised to arrivals" if each.memory_reserved_mib else ""
    printer.show(
        pairs(
            [
                ("host", each.name),
                ("state", _state(each)),
                ("cordoned", _cordoned(each)),
                ("guests", str(each.guests)),
                ("memory", f"{each.memory_used_mib} of {each.memory_mib} MiB used{promised}, {_free_mib(each)} free"),
                ("bandwidth", units.rate(each.bandwidth_mbps)),
                ("engine", _engine(each)),
                ("machine types", ", ".join(each.machine_types)),
                ("switchover ACK", each.switchover_ack),
                ("boot id", each.boot_id),
                ("control address", each.control_address),
                ("peer address", each.peer_address),
            ]
        )
    )


@host.command("list")
@remote
@pass_settings
def list_(settings: Settings) -> None:
    """List the hosts."""
    from orchestrator import wire

    with settings.client() as client:
        hosts = sorted(client.list_hosts(), key=lambda each: units.natural(each.name))
    if settings.printer.machine:
        settings.printer.document({"hosts": [wire.to_json(each) for each in hosts]})
    else:
        settings.printer.table(_columns(), hosts, empty="there are no hosts")


@host.command()
@host_argument
@remote
@pass_settings
def show(settings: Settings, host: str) -> None:
    """Show one host."""
    with settings.client() as client:
        _show(settings.printer, client.get_host(host))


@host.command()
@host_argument
@click.option("--reason", default="", help="Why, for those who find it cordoned.")
@remote
@pass_settings
def cordon(settings: Settings, host: str, reason: str) -> None:
    """Let no new guest go to HOST. What runs there stays."""
    with settings.client() as client:
        _changed(settings.printer, client.cordon_host(host, reason))


@host.command()
@host_argument
@remote
@pass_settings
def uncordon(settings: Settings, host: str) -> None:
    """Let guests go to HOST again."""
    with settings.client() as client:
        _changed(settings.printer, client.uncordon_host(host))


def _changed(printer: Printer, each: Host) -> None:
    if printer.machine:
        _show(printer, each)
    elif each.cordoned:
        printer.show(f"{each.name} is cordoned: no guest goes there; {units.count(each.guests, 'guest')} on it")
    else:
        printer.show(f"{each.name} takes guests again")
