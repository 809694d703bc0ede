"""`drover import`: guests of another manager as guest files."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli import units
from orchestrator.cli.context import Settings, output_option, pass_settings
from orchestrator.cli.exits import CliError, Exit
from orchestrator.cli.output import note
from orchestrator.cli.plain_xml import MAX_BYTES, XmlError

if TYPE_CHECKING:
    from orchestrator.cli.libvirt_xml import Imported

VIRSH = "virsh"
VIRSH_S = 15.0
"""For one question to libvirt."""
_SAID_BYTES = 4096
_URI = re.compile(r"[a-z][a-z0-9+.-]*://.*")


@click.group("import")
def import_() -> None:
    """Take over what another manager of guests has described."""


def _pairs(_: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in given:
        there, _sign, here = each.rpartition("=")
        if not there or not here:
            raise click.BadParameter(f"must be THERE=HERE, such as {parameter.metavar}, not {each!r}")
        found[there.rstrip("/") or there] = here
    return found


@import_.command(short_help="Make a guest file of a libvirt domain.")
@click.argument("source", metavar="FILE|URI")
@click.argument("domain", default="")
@click.option(
    "--pool",
    "pools",
    multiple=True,
    callback=_pairs,
    metavar="/var/lib/libvirt/images=fast",
    help="Which pool of the hosts a directory is, or a pool of libvirt's; repeatable.",
)
@click.option(
    "--network",
    "networks",
    multiple=True,
    callback=_pairs,
    metavar="br0=prod",
    help="Which network of the hosts a bridge is, or a network of libvirt's; repeatable.",
)
@click.option("--cpu", default="", metavar="MODEL", help="Instead of the domain's CPU.")
@click.option("--name", default="", help="Instead of the domain's name.")
@click.option(
    "--without",
    multiple=True,
    metavar="PATH",
    help="Leave out what stands there, although it would be refused; repeatable.",
)
@output_option
@pass_settings
def libvirt(
    settings: Settings,
    source: str,
    domain: str,
    pools: dict[str, str],
    networks: dict[str, str],
    cpu: str,
    name: str,
    without: tuple[str, ...],
) -> None:
    """Print the guest file of a libvirt domain (docs/import.md).

    FILE is what `virsh dumpxml --inactive` prints (- is standard input); a URI such as qemu:///system is asked for
    DOMAIN by virsh. What cannot be kept is refused by its path; what is left out is told on stderr with its reason.
    The guest is taken over at its next power cycle: nothing is run, there or here.
    """
    from orchestrator.cli.libvirt_xml import Choices, ImportRefused, convert

    data = _read(source, domain)
    try:
        imported = convert(data, Choices(pools, networks, cpu, name, without))
    except XmlError as error:
        where = f"{source}:{error.line}" if error.line else source
        raise CliError(
            Exit.USAGE, f"{where}: {error.message}", hint="give what `virsh dumpxml --inactive DOMAIN` prints"
        ) from None
    except ImportRefused as error:
        lines = [f"{source}:{each.line}: {each.path}: {each.text}" for each in error.problems]
        count = units.count(len(lines), "thing")
        said = f"{count} of the domain {'is' if len(lines) == 1 else 'are'} not kept, no guest file was made"
        hint = "--without PATH does without what stands there; what the guest loses by it is yours to know"
        raise CliError(Exit.REFUSED, said, lines=lines, hint=hint) from None
    text = _file(imported)
    printer = settings.printer
    if printer.machine:
        left_out = [{"path": each.path, "line": each.line, "why": each.text} for each in imported.left_out]
        printer.document({"guest": imported.guest, "left_out": left_out})
    else:
        printer.out.write(text)
        printer.out.flush()
        _tell(imported)


def _tell(imported: Imported) -> None:
    from orchestrator.cli.accounted import by_reason

    found = by_reason(imported.left_out)
    if found:
        note(f"drover: not in the guest file, {units.count(len(found), 'reason')}:")
    for why, paths in found.items():
        note(f"  {', '.join(path.removeprefix('/domain/') for path in paths)}: {why}")
    note("shut the guest down there and keep it from being started there again before you run it here (docs/import.md)")


def _file(imported: Imported) -> str:
    """The guest file, which `drover guest run` takes. Raises CliError when it would not."""
    import yaml

    from orchestrator.cli import guest_file

    document: dict[str, Any] = imported.guest
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=10_000)
    try:
        guest_file.load([("guest", text)])
    except guest_file.GuestFileError as error:
        lines = [f"{problem.field}: {problem.message}" for problem in error.problems]
        raise CliError(Exit.REFUSED, "the domain is no guest that can be run here", lines=lines) from None
    return text


def _read(source: str, domain: str) -> bytes:
    if _URI.fullmatch(source):
        return _asked(source, domain)
    if domain:
        raise CliError(Exit.USAGE, f"{source} is a file: a domain is named with a URI such as qemu:///system only")
    try:
        if source == "-":
            return sys.stdin.buffer.read(MAX_BYTES + 1)
        with Path(source).open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CliError(Exit.USAGE, f"cannot read {source}: {error.strerror}", hint="name a file with XML") from None


def _asked(uri: str, domain: str) -> bytes:
    """What virsh knows of a domain that is to be defined anew: its inactive XML."""
    if not domain or domain.startswith("-"):
        raise CliError(
            Exit.USAGE, f"name the domain that {uri} is to be asked for", hint=f"`{VIRSH} list --all` has them"
        )
    command = [VIRSH, "--quiet", "--readonly", "--connect", uri, "dumpxml", "--inactive", "--domain", domain]
    data, said, code = _heard(command, uri)
    if code and len(data) <= MAX_BYTES:
        raise CliError(Exit.NOT_FOUND, f"{VIRSH}: {said or 'failed'}")
    return data


def _heard(command: list[str], uri: str) -> tuple[bytes, str, int]:
    """Output, words on stderr and exit code of virsh, which gets its time and its room and no more; it may have begun
    processes of its own, such as an ssh that waits for a password."""
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        hint = "give a file instead, with what `virsh dumpxml --inactive DOMAIN` prints on the old host"
        raise CliError(Exit.UNREACHABLE, f"cannot run {VIRSH}: {error.strerror}", hint=hint) from None
    late = threading.Event()

    def end() -> None:
        late.set()
        _end(child)

    timer = threading.Timer(VIRSH_S, end)
    timer.start()
    try:
        with child:
            data = child.stdout.read(MAX_BYTES + 1) if child.stdout is not None else b""
            if len(data) > MAX_BYTES:
                _end(child)
            said = child.stderr.read(_SAID_BYTES) if child.stderr is not None else b""
            code = child.wait()
    except BaseException:
        _end(child)
        raise
    finally:
        timer.cancel()
    if late.is_set():
        raise CliError(Exit.UNREACHABLE, f"{VIRSH} did not answer within {VIRSH_S:g} s for {uri}")
    return data, " ".join(said.decode(errors="replace").split())[-400:], code


def _end(child: subprocess.Popen[bytes]) -> None:
    """With everything that it began. It was not waited for yet, so its group is still its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
