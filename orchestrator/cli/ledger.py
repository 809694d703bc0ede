"""`drover ledger`: the ledger as a file, and back. These commands speak with ZooKeeper themselves: they are for the day
on which no API answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from orchestrator.cli.context import Settings, local, pass_settings
from orchestrator.cli.exits import CliError, Ended, Exit
from orchestrator.cli.output import note

if TYPE_CHECKING:
    from orchestrator.restore.access import Where
    from orchestrator.restore.files import Looked

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def ledger() -> None:
    """Export the ledger to a file, check such a file, bring the ledger back from one."""


def where_options(command: F) -> F:
    """Options that say which ledger is meant; `ledger_meant` reads them."""
    for option in (
        click.option("--chroot", metavar="PATH", help="The node of ZooKeeper below which the ledger lies."),
        click.option(
            "--tls",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Directory of the identity to show ZooKeeper, if that asks for one (`role/admin`).",
        ),
        click.option("--zookeeper", metavar="SERVERS", help="host:port[,host:port...]; instead of --config."),
        click.option(
            "--config",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Configuration of an API, a coordinator or an agent that names it.  [default: the local cluster's]",
        ),
    ):
        command = option(command)
    return command


def ledger_meant(
    settings: Settings, config: Path | None, zookeeper: str | None, chroot: str | None, tls: Path | None
) -> Where:
    """Raises CliError where nothing names one."""
    from dataclasses import replace

    from orchestrator.restore.access import Where, configured

    path = config or settings.directory / "api.json"
    if zookeeper:
        where = Where(zookeeper)
    elif path.exists():
        where = configured(path)
    else:
        hint = "name it with --zookeeper, or a configuration that does with --config"
        raise CliError(Exit.USAGE, "which ledger is meant?", hint=hint)
    return replace(where, chroot=chroot or where.chroot, tls=tls or where.tls)


def _run(work: Coroutine[Any, Any, T]) -> T:
    import asyncio

    return asyncio.run(work)


@ledger.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@where_options
@local
@pass_settings
def export(
    settings: Settings, file: Path, config: Path | None, zookeeper: str | None, chroot: str | None, tls: Path | None
) -> None:
    """Write the whole ledger into FILE; guests, migrations and the control plane go on meanwhile.

    FILE is replaced once the new one is complete, and only its owner can read it.
    """
    from orchestrator.restore import files

    where = ledger_meant(settings, config, zookeeper, chroot, tls)
    made = _run(files.export(where, file, time_s=time.time()))
    _tell(settings, made, file)


@ledger.command("import", short_help="Bring the ledger back from FILE; every host is asked what it holds.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--dead", multiple=True, metavar="HOST", help="You vouch that its power is off for good; repeatable.")
@click.option("--confirm", "token", default="", metavar="TOKEN", help="Of the same command without it: do it.")
@where_options
@local
@pass_settings
def import_(
    settings: Settings,
    file: Path,
    dead: tuple[str, ...],
    token: str,
    config: Path | None,
    zookeeper: str | None,
    chroot: str | None,
    tls: Path | None,
) -> None:
    """Bring the ledger back from FILE into an empty ZooKeeper, with every guest where it runs now.

    Stop coordinators and APIs before, and restart the agents: guests run on. Without --confirm nothing is done: it asks
    every host what it holds, shows what becomes of each guest, and the token to repeat. A host that does not answer
    stands against it. A host that the backup does not know, and that has not registered with the new ZooKeeper, is not
    asked: look whether all are listed.
    """
    from orchestrator.restore import files

    where = ledger_meant(settings, config, zookeeper, chroot, tls)
    done = _run(files.bring_back(where, file, dead=dead, token=token, time_s=time.time()))
    if settings.printer.machine:
        settings.printer.document(done.document())
    else:
        settings.printer.show(*files.lines(done))
        for left in done.left:
            note(left)
    if done.left:
        raise Ended(Exit.FAILED)


@ledger.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@local
@pass_settings
def verify(settings: Settings, file: Path) -> None:
    """Check that FILE is a whole backup that this version can import. Exit code 0: it is; 1: what is wrong is told."""
    from orchestrator.restore import files

    found = files.verify(file)
    _tell(settings, found, file)


def _tell(settings: Settings, found: Looked, file: Path) -> None:
    """Exit code 1 where something is wrong with it."""
    if settings.printer.machine:
        settings.printer.document(found.document())
    else:
        settings.printer.show(found.said(file))
        for problem in found.shown():
            note(problem)
    if found.problems:
        raise Ended(Exit.FAILED)
