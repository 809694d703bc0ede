"""`drover pki`: the authority of a cluster and the certificates that it signs. No API is asked: these commands work on
directories of this machine, for somebody who holds the authority's key."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from orchestrator.cli.context import Settings, local, pass_settings
from orchestrator.cli.exits import CliError, Ended, Exit
from orchestrator.cli.output import Column, note, pairs

if TYPE_CHECKING:
    from orchestrator.pki.authority import Authority, Issued
    from orchestrator.pki.files import Shown

F = TypeVar("F", bound=Callable[..., Any])
_DIRECTORY = click.Path(file_okay=False, path_type=Path)


@click.group()
def pki() -> None:
    """Make the authority of a cluster; issue, renew, revoke and show certificates."""


def _ca(command: F) -> F:
    return click.option(
        "--ca",
        type=_DIRECTORY,
        metavar="DIRECTORY",
        help="Where the authority lies.  [default: pki/ca below the local cluster's directory]",
    )(command)


def _hours(command: F) -> F:
    return click.option(
        "--hours", type=float, default=24.0, show_default=True, help="How long the certificate is good for."
    )(command)


@contextmanager
def _told() -> Generator[None]:
    """What goes wrong, as one sentence."""
    from orchestrator.pki.files import PkiError
    from orchestrator.pki.names import BadName

    try:
        yield
    except (PkiError, BadName) as error:
        raise CliError(Exit.USAGE, str(error)) from error
    except OSError as error:
        raise CliError(Exit.FAILED, f"{error.filename or 'a file'}: {error.strerror or error}") from error


def _of(settings: Settings) -> Path:
    return settings.directory / "pki"


def _opened(settings: Settings, ca: Path | None) -> Authority:
    from orchestrator.pki.authority import Authority

    return Authority(ca or _of(settings) / "ca")


@pki.command()
@click.argument("cluster")
@click.option("--days", type=click.IntRange(min=1, max=36_500), default=3650, show_default=True)
@_ca
@local
@pass_settings
def init(settings: Settings, cluster: str, days: int, ca: Path | None) -> None:
    """Make the authority of CLUSTER. Whoever has its key can be everybody: keep it off the hosts."""
    from orchestrator.pki.authority import Authority
    from orchestrator.pki.files import utc_now

    directory = ca or _of(settings) / "ca"
    with _told():
        Authority.create(directory, cluster, utc_now(), days=days)
    settings.printer.show(f"the authority of {cluster} is in {directory}")


@pki.command()
@click.argument("identity")
@click.option(
    "--into", type=_DIRECTORY, help="Where it goes.  [default: pki/IDENTITY in the local cluster's directory]"
)
@click.option("--dns", multiple=True, metavar="NAME", help="Another name that a server has; may be repeated.")
@click.option("--ip", "ips", multiple=True, metavar="ADDRESS", help="An address that a server has; may be repeated.")
@_hours
@_ca
@local
@pass_settings
def issue(
    settings: Settings,
    identity: str,
    into: Path | None,
    dns: tuple[str, ...],
    ips: tuple[str, ...],
    hours: float,
    ca: Path | None,
) -> None:
    """Make a key and a certificate for IDENTITY: host/h1, role/api, role/operator/alice.

    Its holder's directory gets ca.pem, cert.pem, key.pem and deny.json, which nobody else may read.
    """
    from orchestrator.pki.files import utc_now
    from orchestrator.pki.names import read_short

    with _told():
        authority = _opened(settings, ca)
        meant = read_short(authority.cluster, identity)
        directory = into or _of(settings) / str(meant)
        made = authority.issue(meant, directory, utc_now(), hours=hours, dns=dns, ips=ips)
    _tell(settings, made, directory)


@pki.command()
@click.argument("directories", nargs=-1, required=True, type=_DIRECTORY, metavar="DIRECTORY...")
@_hours
@_ca
@local
@pass_settings
def renew(settings: Settings, directories: tuple[Path, ...], hours: float, ca: Path | None) -> None:
    """Replace key and certificate in each DIRECTORY by new ones for the same identity and names.

    The deny list goes along. One that was revoked is not renewed: `drover pki issue` makes a new one.
    """
    from orchestrator.pki.files import utc_now

    for directory in directories:
        with _told():
            made = _opened(settings, ca).renew(directory, utc_now(), hours=hours)
        _tell(settings, made, directory)


@pki.command()
@click.argument("what", nargs=-1, required=True, metavar="WHAT...")
@click.option("--to", "holders", multiple=True, type=_DIRECTORY, help="A directory that gets the list; repeatable.")
@_ca
@local
@pass_settings
def revoke(settings: Settings, what: tuple[str, ...], holders: tuple[Path, ...], ca: Path | None) -> None:
    """Put certificates on the deny list: a serial number, or an identity (host/h1) for all that it holds.

    The list is kept with the authority, and goes to the directories named by --to.
    """
    from orchestrator.pki.files import utc_now, write_denied

    with _told():
        authority = _opened(settings, ca)
        serials = [serial for each in what for serial in _serials(each, authority, authority.issued(utc_now()))]
        refused = authority.revoke(serials)
        for directory in holders:
            write_denied(directory, refused)
    settings.printer.show(f"{len(set(serials))} revoked, {len(refused)} on the list")


def _serials(what: str, authority: Authority, issued: list[Issued]) -> list[str]:
    from orchestrator.pki.names import read_short

    if "/" in what:
        uri = read_short(authority.cluster, what).uri
        found = [each.serial for each in issued if each.uri == uri]
        if not found:
            raise CliError(Exit.NOT_FOUND, f"no certificate of {what} is good any more", hint="`drover pki show`")
        return found
    try:
        serial = f"{int(what, 16):x}"
    except ValueError:
        said = f"{what!r} is neither a serial number (hexadecimal) nor an identity (host/h1)"
        raise CliError(Exit.USAGE, said, hint="`drover pki show` shows both") from None
    if serial not in {each.serial for each in issued}:
        note(
            f"{serial}: this authority has signed none with that number that is still good; it is refused all the same"
        )
    return [serial]


@pki.command()
@click.argument("holder", required=False, type=_DIRECTORY, metavar="[DIRECTORY]")
@_ca
@local
@pass_settings
def show(settings: Settings, holder: Path | None, ca: Path | None) -> None:
    """Show the certificate in DIRECTORY and what is wrong with it (exit code 1), or all that the authority signed.

    DIRECTORY may be filled by any other PKI: PEM files of the same names.
    """
    from orchestrator.pki import files

    with _told():
        if holder is not None:
            found = files.show(holder, files.utc_now())
        else:
            _list(settings, _opened(settings, ca).issued(files.utc_now()))
            return
    _show(settings, found)
    if found.problems:
        raise Ended(Exit.FAILED)


def _list(settings: Settings, issued: list[Issued]) -> None:
    from dataclasses import asdict

    if settings.printer.machine:
        settings.printer.document({"certificates": [asdict(each) for each in issued]})
        return
    columns: list[Column[Issued]] = [
        Column("SERIAL", lambda each: each.serial),
        Column("IDENTITY", lambda each: each.uri),
        Column("ENDS", lambda each: each.not_after),
        Column("REVOKED", lambda each: "yes" if each.revoked else "-"),
    ]
    settings.printer.table(columns, issued, empty="no certificate is good any more, or none was signed")


def _show(settings: Settings, found: Shown) -> None:
    document = {
        "identity": found.identity.uri,
        "serial": found.serial,
        "issuer": found.issuer,
        "not_before": found.not_before.isoformat(),
        "not_after": found.not_after.isoformat(),
        "problems": list(found.problems),
    }
    if settings.printer.machine:
        settings.printer.document(document)
        return
    settings.printer.show(pairs([(name, str(text)) for name, text in document.items() if name != "problems"]))
    for problem in found.problems:
        note(problem)


def _tell(settings: Settings, made: Issued, directory: Path) -> None:
    if settings.printer.machine:
        document = {"serial": made.serial, "identity": made.uri, "not_after": made.not_after}
        settings.printer.document({**document, "directory": str(directory)})
    else:
        settings.printer.show(f"{made.uri} until {made.not_after} in {directory} (serial {made.serial})")
