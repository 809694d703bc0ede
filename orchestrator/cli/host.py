"""`drover host`: what hosts there are, and whether they take guests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from orchestrator.cli import units
from orchestrator.cli.context import Settings, complete_host, list_options, pass_settings, remote
from orchestrator.cli.exits import CliError, Ended, Exit
from orchestrator.cli.output import Cell, Column, Printer, note, note_unreadable, pairs, styled
from orchestrator.cli.plugins import open_group

if TYPE_CHECKING:
    from orchestrator.cli.agreement import Difference
    from orchestrator.rpc.messages import GuestFate, Host, HostAgent, HostCopy, HostDeath, Pool, Unreadable

MIN_COMPARED = 2


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
                *(("engine cannot" if number == 0 else "", limit) for number, limit in enumerate(each.engine_limits)),
                ("machine types", ", ".join(each.machine_types)),
                ("pools", _pools(each)),
                ("networks", ", ".join(f"{network.name} (MTU {network.mtu})" for network in each.networks)),
                ("firmware", ", ".join(f"{role} {each.firmware[role][:12]}" for role in sorted(each.firmware))),
                ("extra arguments", ", ".join(each.extra_args)),
                ("switchover ACK", each.switchover_ack),
                ("boot id", each.boot_id),
                ("control address", each.control_address),
                ("peer address", each.peer_address),
            ]
        )
    )


def _pools(each: Host) -> str:
    from orchestrator import wire

    def told(pool: Pool) -> str:
        room = f", {units.size(pool.free_bytes)} of {units.size(pool.size_bytes)} free" if pool.size_bytes else ""
        bases = "".join(f", base {name} {pool.bases[name][:12]}" for name in sorted(pool.bases))
        return f"{pool.name} ({wire.word(pool, 'kind').lower()}{room}{bases})"

    return ", ".join(map(told, each.pools))


def _copy_columns(host: str) -> list[Column[HostCopy]]:
    return [
        Column("GUEST", lambda each: each.guest or each.guest_uuid),
        Column("MiB", lambda each: str(each.memory_mib), right=True),
        Column("VMM", lambda each: str(each.pid) if each.pid else "ended", right=True),
        Column("DEVICES", lambda each: str(each.devices_pid or "-"), right=True, rank=1),
        Column("WHOSE", lambda each: _whose(each, host), elastic=True, least=20),
    ]


def _whose(each: HostCopy, host: str) -> Cell:
    if each.incoming:
        return f"incoming; owned by {each.owner or 'nobody the ledger knows'}"
    if not each.owner:
        return ("the ledger knows no such guest", "yellow")
    return "owned here" if each.owner == host else (f"owned by {each.owner}", "yellow")


def _show_agent(printer: Printer, seen: Host) -> None:
    agent: HostAgent = seen.agent
    printer.show("")
    if not agent.answered:
        printer.show(f"its agent is silent ({agent.message}): what is on {seen.name} is not known")
        return
    every = "everything that is there" if agent.complete else "not everything: its agent does not know all of it yet"
    printer.show(f"copies of guests on {seen.name}, {every}")
    printer.table(_copy_columns(seen.name), list(agent.copies), empty=f"no copy of a guest is known on {seen.name}")
    for each in agent.troubles:
        printer.show(f"not kept: {each.guest or each.guest_uuid} {each.trouble}: {each.message}")


@host.command("list")
@list_options
@remote
@pass_settings
def list_(settings: Settings, filter: str, order_by: str) -> None:
    """List the hosts.

    FILTER and FIELDS know name, live, cordoned, memory_mib, free_mib, guests and engine.
    """
    from orchestrator import wire

    with settings.client() as client:
        unreadable: list[Unreadable] = []
        hosts = client.list_hosts(filter=filter, order_by=order_by, unreadable=unreadable)
    if settings.printer.machine:
        settings.printer.document({"hosts": [wire.to_json(each) for each in hosts]})
    else:
        settings.printer.table(_columns(), hosts, empty="there are no hosts")
    note_unreadable("host", unreadable)


@host.command()
@host_argument
@remote
@pass_settings
def show(settings: Settings, host: str) -> None:
    """Show one host, and what its agent says is there.

    A silent agent is waited for a few seconds at most.
    """
    with settings.client() as client:
        seen = client.get_host(host, ask_agent=True)
    _show(settings.printer, seen)
    if not settings.printer.machine:
        _show_agent(settings.printer, seen)


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


@host.command(short_help="Let its agent believe the ledger as it is now.")
@host_argument
@remote
@pass_settings
def rejoin(settings: Settings, host: str) -> None:
    """Let HOST's agent believe the ledger as it is now, after it was restored or made anew without an import.

    An agent that finds another ledger than it has known lets its guests run on and believes nothing. Do this only when
    the ledger says the truth about HOST's guests, or HOST has none: it is told what its records say, and obeys.
    """
    with settings.client() as client:
        _changed(settings.printer, client.rejoin_host(host))


@host.command("declare-dead", short_help="Say that it is gone for good, so that its guests' names are free.")
@host_argument
@click.option("--confirm", "token", default="", metavar="TOKEN", help="Of the same command without it: do it.")
@click.option("--i-am-sure", is_flag=True, help="Ask no fencer: you vouch that nothing runs there any more.")
@remote
@pass_settings
def declare_dead(settings: Settings, host: str, token: str, i_am_sure: bool) -> None:
    """Declare a silent HOST dead.

    Without --confirm nothing is done: it shows which guests would be lost or started elsewhere, and the token to
    repeat. With it the host's fencer cuts the power and confirms it; then its guests are CRASHED.

    --i-am-sure takes your word for that. A host that runs on all the same may then run guests that run elsewhere too:
    go and see that it has no power first.
    """
    if i_am_sure and not token:
        raise CliError(Exit.USAGE, "--i-am-sure needs the token of a look at what would happen", hint=_look_first(host))
    with settings.client() as client:
        seen = client.declare_host_dead(host, token, on_operators_word=i_am_sure, requested_by=_who())
    if settings.printer.machine:
        from orchestrator import wire

        settings.printer.document(wire.to_json(seen))
    else:
        _show_death(settings.printer, seen)
    if token and _word(seen) not in ("CERTIFIED", "DONE"):
        raise Ended(Exit.UNREACHABLE)


def _look_first(host: str) -> str:
    return f"`drover host declare-dead {host}` shows it and changes nothing"


def _who() -> str:
    import getpass
    import socket

    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):
        return f"somebody@{socket.gethostname()}"


def _word(seen: HostDeath) -> str:
    from orchestrator import wire

    return wire.word(seen, "phase")


def _fate_columns() -> list[Column[GuestFate]]:
    return [
        Column("GUEST", lambda each: each.guest),
        Column("BECOMES", lambda each: styled(each.fate)),
        Column("BECAUSE", lambda each: each.message, elastic=True),
    ]


def _show_death(printer: Printer, seen: HostDeath) -> None:
    if _word(seen) != "PLANNED":
        said = seen.message or "asked for; the coordinator carries it out"
        printer.show(f"{seen.host} {_word(seen)}: {said}")
        return
    printer.table(_fate_columns(), list(seen.guests), empty=f"no guest is recorded on {seen.host}")
    named = len(seen.guests)
    total = seen.lost + seen.restarted + seen.staying
    if total > named:
        printer.show(f"... and {total - named} more")
    counts = f"{seen.lost} lost, {seen.restarted} started elsewhere, {seen.staying} staying where they are"
    printer.show(f"nothing was done; {seen.host} dead would mean: {counts}")
    again = f"drover host declare-dead {seen.host} --confirm {seen.confirmation_token}"
    if seen.fencer:
        printer.show(f"fencer {seen.fencer} would cut its power: {again}")
    else:
        printer.show(f"no fencer is configured for it. When you have seen that it has no power: {again} --i-am-sure")


@host.command()
@host_argument
@remote
@pass_settings
def remove(settings: Settings, host: str) -> None:
    """Forget a HOST that is gone: not live, without guests, declared dead or cordoned."""
    with settings.client() as client:
        client.remove_host(host)
    if settings.printer.machine:
        settings.printer.document({"host": host, "removed": True})
    else:
        settings.printer.show(f"{host} is forgotten; an agent of that name registers anew")


def _changed(printer: Printer, each: Host) -> None:
    if printer.machine:
        _show(printer, each)
    elif each.cordoned:
        printer.show(f"{each.name} is cordoned: no guest goes there; {units.count(each.guests, 'guest')} on it")
    else:
        printer.show(f"{each.name} takes guests again")


@host.command("compare")
@remote
@pass_settings
def compare(settings: Settings) -> None:
    """Say in what LIVE hosts differ, of what guests may need.

    Exit code 0: in nothing, 1: in something, or fewer than two hosts are LIVE.
    """
    from orchestrator import wire
    from orchestrator.cli.agreement import differences

    with settings.client() as client:
        hosts = client.list_hosts()
    live = [each for each in hosts if wire.word(each, "state") == "LIVE"]
    silent = sorted(each.name for each in hosts if wire.word(each, "state") == "SILENT")
    found = differences(live)
    if settings.printer.machine:
        rows = [{"fact": each.fact, "found": each.found, "means": each.means} for each in found]
        settings.printer.document({"hosts": [each.name for each in live], "silent": silent, "differences": rows})
    else:
        _show_differences(settings.printer, found, len(live))
        if silent:
            note(f"not compared, their agents are silent: {', '.join(silent)}")
    if found or len(live) < MIN_COMPARED:
        raise Ended(Exit.FAILED)


def _show_differences(printer: Printer, found: list[Difference], live: int) -> None:
    columns: list[Column[Difference]] = [
        Column("FACT", lambda each: each.fact),
        Column("WHERE", _where, elastic=True, wraps=True),
        Column("MEANS", lambda each: each.means, elastic=True, wraps=True),
    ]
    if live < MIN_COMPARED:
        note(f"nothing to compare: LIVE hosts: {live}")
    elif not found:
        printer.show(f"{live} LIVE hosts agree in what guests may need")
    else:
        printer.table(columns, found, empty="")


def _where(each: Difference) -> str:
    return "; ".join(f"{what}: {', '.join(hosts)}" for what, hosts in each.found.items())
