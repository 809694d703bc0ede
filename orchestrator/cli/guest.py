"""`drover guest`: run guests from files, look at them, stop and go."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli import units
from orchestrator.cli.attaching import attach, detach
from orchestrator.cli.context import Settings, complete_guest, complete_host, list_options, pass_settings, remote
from orchestrator.cli.exits import CliError, Ended, Exit, explain
from orchestrator.cli.output import Cell, Column, Printer, note, note_unreadable, pairs, styled, table
from orchestrator.cli.placement import NO_PLACE, show_check, show_verdicts
from orchestrator.cli.plugins import open_group
from orchestrator.core.errors import DroverError, RefusalReason

if TYPE_CHECKING:
    from orchestrator.core.records import GuestSpec
    from orchestrator.rpc.messages import ChangeRunStateResponse, DeviceSpec, DisplayAddress, Guest, Unreadable
    from orchestrator.rpc.orchestrator_client import OrchestratorClient

AT_A_TIME = 4
"""Guests that `run` lets start at the same time."""


@click.group(cls=open_group("guest"))
def guest() -> None:
    """Guests: run, list, pause, resume and stop them."""


guest.add_command(attach)
guest.add_command(detach)
guest_argument = click.argument("guest", shell_complete=complete_guest)


# --- run --------------------------------------------------------------------------------------------------------------


@guest.command(short_help="Run the guests that files describe.")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(dir_okay=False, allow_dash=True))
@click.option("--host", default="", shell_complete=complete_host, help="Where.  [default: most free memory]")
@click.option(
    "--validate-only", "--dry-run", is_flag=True, help="Check the files, and whether the guests could be run."
)
@remote
@pass_settings
def run(settings: Settings, files: tuple[str, ...], host: str, validate_only: bool) -> None:
    """Run the guests that FILEs describe (docs/guest-file.md); - is standard input.

    Nothing is run when anything is wrong with a file: every problem is told at once, with its line. With
    --validate-only a guest that no host can take is followed by what stands against it on each host.
    """
    _make(settings, files, host, validate_only)


@guest.command(short_help="As `run`, with the files as options.")
@click.option(
    "-f",
    "--file",
    "files",
    metavar="FILE",
    multiple=True,
    required=True,
    type=click.Path(dir_okay=False, allow_dash=True),
    help="A guest file; - is standard input. May be repeated.",
)
@click.option("--host", default="", shell_complete=complete_host, help="Where.  [default: most free memory]")
@click.option(
    "--validate-only", "--dry-run", is_flag=True, help="Check the files, and whether the guests could be run."
)
@remote
@pass_settings
def create(settings: Settings, files: tuple[str, ...], host: str, validate_only: bool) -> None:
    """Create the guests that the files describe (docs/guest-file.md), and run them: as `drover guest run FILE...`."""
    _make(settings, files, host, validate_only)


def _make(settings: Settings, files: tuple[str, ...], host: str, validate_only: bool) -> None:
    from orchestrator import wire

    specs = specs_of(files)
    with settings.client() as client:
        results = _create_all(client, specs, host, validate_only)
        refused = [(spec, r) for spec, r in zip(specs, results, strict=True) if isinstance(r, CliError)]
        placeless = [spec for spec, error in refused if validate_only and error.reason in NO_PLACE]
        verdicts = {spec.name: client.check_placement(spec, host) for spec in placeless}
    printer = settings.printer
    made = [result for result in results if not isinstance(result, CliError)]
    if printer.machine:
        document: dict[str, Any] = {"guests": [wire.to_json(each) for each in made]}
        if verdicts:
            document["placements"] = {name: wire.to_json(found) for name, found in verdicts.items()}
        printer.document(document)
    else:
        if made:
            _say_made(printer, made, validate_only)
        for name, found in verdicts.items():
            printer.show(f"hosts for {name}:")
            show_verdicts(printer, found)
    for spec, error in refused:
        note(f"drover: {spec.name}: {error.message}")
        for line in error.lines:
            note(f"  {line}")
    if refused:
        for hint in dict.fromkeys(error.hint for _, error in refused if error.hint):
            note(f"  {hint}")
        raise Ended(refused[0][1].code)


def specs_of(files: Iterable[str]) -> list[GuestSpec]:
    """The guests of these files; - is standard input. Raises CliError with everything that is wrong."""
    from orchestrator.cli import guest_file

    texts: list[tuple[str, str]] = []
    for name in files:
        try:
            texts.append((name, sys.stdin.read()) if name == "-" else (name, Path(name).read_text()))
        except (OSError, UnicodeDecodeError) as error:
            said = getattr(error, "strerror", None) or "it is not text"
            raise CliError(Exit.USAGE, f"cannot read {name}: {said}", hint="name a guest file") from None
    try:
        return guest_file.load([("<stdin>" if name == "-" else name, text) for name, text in texts])
    except guest_file.GuestFileError as error:
        lines = [str(problem) for problem in error.problems]
        said = f"{units.count(len(lines), 'problem')} in the guest files, nothing was run"
        raise CliError(Exit.USAGE, said, lines=lines) from None


def spec_of(file: str, name: str) -> GuestSpec:
    """The one guest of that file, which has that name. Raises CliError."""
    specs = specs_of([file])
    names = [each.name for each in specs]
    if names != [name]:
        said = f"{file} must describe one guest, {name}, not {', '.join(names) or 'none'}"
        raise CliError(Exit.USAGE, said, hint="name it in the file as you name it here")
    return specs[0]


def _create_all(
    client: OrchestratorClient, specs: Sequence[GuestSpec], host: str, validate_only: bool
) -> list[Guest | CliError]:
    """One result per guest, in their order; a refusal of one does not keep the others from running."""

    from concurrent.futures import ThreadPoolExecutor

    def create(spec: GuestSpec) -> Guest | CliError:
        request_id = str(uuid.uuid4())
        try:
            return client.create_guest(spec, host, validate_only=validate_only, request_id=request_id)
        except DroverError as error:
            told = explain(error)
            if error.reason is RefusalReason.OUTCOME_UNKNOWN:
                told.hint = "`drover guest list` shows whether it runs"
            return told

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(create, specs))


def _say_made(printer: Printer, made: Sequence[Guest], validate_only: bool) -> None:
    if validate_only:
        where = [f"{each.spec.name or each.name} could run on {each.host}" for each in made]
        printer.show(*where)
        return
    printer.table(_columns({}), made, empty="")


# --- list and show ----------------------------------------------------------------------------------------------------


def _state(each: Guest) -> Cell:
    from orchestrator import wire

    return styled(wire.word(each, "run_state") or wire.word(each, "ownership"))


def _columns(short: dict[str, str]) -> list[Column[Guest]]:
    def labels(each: Guest) -> str:
        return ",".join(f"{key}={value}" for key, value in sorted(each.spec.labels.items()))

    return [
        Column("GUEST", lambda each: each.name),
        Column("HOST", lambda each: each.host),
        Column("STATE", _state),
        Column("MiB", lambda each: str(each.spec.memory_mib), right=True),
        Column("vCPUS", lambda each: str(each.spec.vcpus), right=True, rank=4),
        Column("DEVICES", lambda each: ",".join(device.name for device in each.spec.devices), rank=2, optional=True),
        Column("MIGRATION", lambda each: short.get(each.migration, ""), rank=1, optional=True),
        Column("LABELS", labels, rank=5, optional=True, elastic=True),
        Column("MESSAGE", lambda each: each.message, rank=3, optional=True, elastic=True),
    ]


@guest.command("list")
@click.option("--host", default="", shell_complete=complete_host, help="Only on this host.")
@list_options
@remote
@pass_settings
def list_(settings: Settings, host: str, filter: str, order_by: str) -> None:
    """List the guests.

    FILTER and FIELDS know name, uuid, host, ownership, run_state, memory_mib, vcpus, machine, migration and
    labels.KEY (in a filter only).
    """
    from orchestrator import wire

    with settings.client() as client:
        unreadable: list[Unreadable] = []
        found = client.list_guests(host, filter=filter, order_by=order_by, unreadable=unreadable)
    printer = settings.printer
    if printer.machine:
        printer.document({"guests": [wire.to_json(each) for each in found]})
    else:
        short = units.abbreviate(each.migration for each in found if each.migration)
        printer.table(_columns(short), found, empty=f"there are no guests on {host}" if host else "there are no guests")
    note_unreadable("guest", unreadable)


@guest.command()
@guest_argument
@remote
@pass_settings
def show(settings: Settings, guest: str) -> None:
    """Show one guest."""
    from orchestrator import wire

    with settings.client() as client:
        each = client.get_guest(guest)
    printer = settings.printer
    if printer.machine:
        printer.document(wire.to_json(each))
        return
    printer.show(pairs(_facts(each)))
    if each.spec.devices:
        printer.show("", table(_device_columns(), list(each.spec.devices), printer.width))


def _facts(each: Guest) -> Iterable[tuple[str, Cell]]:
    from orchestrator import wire

    spec = each.spec
    yield "guest", each.name
    yield "uuid", each.uuid
    yield "host", each.host
    yield "state", _state(each)
    yield "wish", "run" if each.want_run else "paused by the operator"
    yield "ownership", wire.word(each, "ownership")
    yield "migration", each.migration
    yield "message", each.message
    yield "memory", f"{spec.memory_mib} MiB"
    yield "vcpus", str(spec.vcpus)
    yield "machine", spec.machine
    yield "kernel", spec.boot.kernel
    yield "initrd", spec.boot.initrd
    yield "append", spec.boot.append
    yield from _hardware(each)
    yield "labels", ", ".join(f"{key}={value}" for key, value in sorted(spec.labels.items()))


def _hardware(each: Guest) -> Iterable[tuple[str, Cell]]:
    """What is not there is not shown."""
    from orchestrator import wire

    spec = each.spec
    yield "cpu", spec.cpu.model
    yield "firmware", wire.word(spec.boot, "firmware").lower().removeprefix("direct")
    for disk in spec.disks:
        more = [f"{disk.pool}/{disk.image}", wire.word(disk, "format").lower()]
        more += [units.size(disk.size_bytes)] if disk.size_bytes else []
        yield f"disk {disk.name}", ", ".join([*more, *(["read-only"] if disk.read_only else [])])
    for nic in spec.nics:
        yield f"card {nic.name}", ", ".join(filter(None, (nic.network, nic.mac)))
    yield "tpm", spec.tpm.version if spec.HasField("tpm") else ""
    yield "cloud-init", "yes" if spec.HasField("cloud_init") else ""
    yield "screen", "vnc" if spec.display.vnc else ""
    yield "extra arguments", "; ".join(spec.extra_args)


def _options(device: DeviceSpec) -> str:
    return ", ".join(f"{name}={' '.join(value.split())}" for name, value in sorted(device.options.items()))


def _device_columns() -> list[Column[DeviceSpec]]:
    from orchestrator import wire

    return [
        Column("DEVICE", lambda device: device.name),
        Column("SHIM", lambda device: wire.word(device, "shim").lower()),
        Column("DMA", lambda device: device.dma, rank=2),
        Column("INITIAL", lambda device: units.size(device.initial_bytes), right=True),
        Column("STOP-COPY", lambda device: units.size(device.stop_copy_bytes), right=True),
        Column("DIRTIES", lambda device: f"{units.size(device.dirty_bytes_per_s)}/s", right=True),
        Column("OPTIONS", _options, elastic=True, optional=True, rank=1),
    ]


# --- check ------------------------------------------------------------------------------------------------------------


@guest.command()
@guest_argument
@click.option("--to", "host", default="", shell_complete=complete_host, help="Only to this host.  [default: all]")
@remote
@pass_settings
def check(settings: Settings, guest: str, host: str) -> None:
    """Say whether GUEST could move now, and what stands against it where (docs/preflight.md).

    Its own host is asked for what only its VMM knows. Changes nothing. Exit code 0: it could move; 4: it could not.
    """
    with settings.client() as client:
        found = client.check_placement(guest, host)
    if not show_check(settings.printer, found):
        raise Ended(Exit.REFUSED)


# --- pause, resume, stop ----------------------------------------------------------------------------------------------

_WISHES = {
    "APPLIED": "",
    "QUEUED": "; it is in a switchover, and the wish takes effect before it runs again",
    "RECORDED": "; its agent cannot be reached, and follows when it is back",
}


def _wish(settings: Settings, call: Callable[[OrchestratorClient], ChangeRunStateResponse], what: str) -> None:
    from orchestrator import wire

    with settings.client() as client:
        answer = call(client)
    if settings.printer.machine:
        settings.printer.document(wire.to_json(answer))
    else:
        wish = wire.word(answer, "wish")
        done = what if wish == "APPLIED" else f"to be {what}"
        settings.printer.show(f"{answer.guest.name} is {done}{_WISHES.get(wish, f' ({wish})')}")


@guest.command()
@guest_argument
@remote
@pass_settings
def pause(settings: Settings, guest: str) -> None:
    """Stop the vCPUs of GUEST. It stays so when it moves."""
    _wish(settings, lambda client: client.pause_guest(guest), "paused")


@guest.command()
@guest_argument
@remote
@pass_settings
def resume(settings: Settings, guest: str) -> None:
    """Let GUEST run again."""
    _wish(settings, lambda client: client.resume_guest(guest), "running")


@guest.command()
@guest_argument
@click.option("--keep", is_flag=True, help="Keep it on its host, to be started again.")
@remote
@pass_settings
def stop(settings: Settings, guest: str, keep: bool) -> None:
    """End GUEST for good, or until it is started again. A migration of it is cancelled first.

    Its power is cut: what it has not written to its disks is lost. With --keep it stays on its host with its name and
    its disks, and `drover guest start` boots it there.
    """
    from orchestrator import wire

    with settings.client() as client:
        each = client.stop_and_keep_guest(guest) if keep else client.stop_guest(guest)
    if settings.printer.machine:
        settings.printer.document(wire.to_json(each))
    elif keep:
        settings.printer.show(f"{each.name or guest} is stopped, and kept on {each.host}")
    else:
        settings.printer.show(f"{each.name or guest} has ended")


@guest.command()
@guest_argument
@remote
@pass_settings
def start(settings: Settings, guest: str) -> None:
    """Start GUEST again, where it is: one that was stopped with --keep, has shut down by itself, or has crashed.

    It keeps its uuid, its disks and its cards' addresses, and boots anew. A guest that runs is left as it is.
    """
    from orchestrator import wire

    with settings.client() as client:
        each = client.start_guest_again(guest)
    if settings.printer.machine:
        settings.printer.document(wire.to_json(each))
    else:
        settings.printer.show(f"{each.name or guest} is {wire.word(each, 'run_state').lower()} on {each.host}")


@guest.command(short_help="Change what it is, in your editor or from a file.")
@guest_argument
@click.option(
    "-f", "--file", "file", type=click.Path(dir_okay=False, allow_dash=True), help="Take it from this guest file."
)
@click.option("--validate-only", "--dry-run", is_flag=True, help="Only say whether it would be taken.")
@remote
@pass_settings
def edit(settings: Settings, guest: str, file: str | None, validate_only: bool) -> None:
    """Change what GUEST is: opens its guest file in $EDITOR, or takes FILE's (- is standard input).

    Labels, policy and on_host_death hold at once. Everything else can be changed while the guest is stopped with
    `drover guest stop --keep`, and holds from its next start. What somebody else changed meanwhile is never lost.
    """
    from orchestrator.cli import editor

    with settings.client() as client:
        editor.edit(settings, client, guest, file, validate_only=validate_only)


@guest.command(short_help="Sit at its console, wherever it goes.")
@guest_argument
@remote
@pass_settings
def console(settings: Settings, guest: str) -> None:
    """Sit at the console of GUEST (its first serial port) until it has ended, or you type Ctrl-].

    The session goes with the guest when it moves. What is typed goes there as it is, Ctrl-C too. Without a terminal,
    standard input is typed to its end, and the session goes on until Ctrl-C.
    """
    from orchestrator.cli.terminal import sit

    with settings.client() as client, client.attach_console(guest) as session:
        sit(session)


@guest.command(short_help="Where its screen is served.")
@guest_argument
@remote
@pass_settings
def vnc(settings: Settings, guest: str) -> None:
    """Say where the screen of GUEST is served by VNC now, and the password that lets a viewer in for a minute.

    The guest file asks for a screen (`display: {vnc: true}`). A host whose configuration gives no address for screens
    (`vnc_listen`) serves them at unix sockets, which `ssh -L` reaches. A viewer stays behind when the guest moves: ask
    again.
    """
    from orchestrator import wire

    with settings.client() as client:
        found = client.open_display(guest)
    if settings.printer.machine:
        settings.printer.document({"guest": guest, **wire.to_json(found)})
        return
    settings.printer.show(pairs(_screen(found)))


def _screen(found: DisplayAddress) -> Iterable[tuple[str, Cell]]:
    yield "host", found.host
    yield "address", found.address
    yield "socket", found.socket
    yield "password", f"{found.password} (lets viewers in for {found.password_valid_s} s)" if found.password else ""
    if found.socket:
        yield "from here", f"ssh -N -L 5900:{found.socket} {found.host}, and a viewer to localhost:5900"


@guest.command()
@guest_argument
@click.argument("device")
@click.argument("instruction")
@remote
@pass_settings
def instruct(settings: Settings, guest: str, device: str, instruction: str) -> None:
    """Tell DEVICE of GUEST something in the words of the device's own program, where the cluster allows it.

    Prints what the program says to it. A device that takes no instructions, or not now, refuses and stays as it is.
    """
    with settings.client() as client:
        answer = client.instruct_device(guest, device, instruction)
    if settings.printer.machine:
        settings.printer.document({"guest": guest, "device": device, "answer": answer})
    else:
        settings.printer.show(answer.rstrip() or "done")
