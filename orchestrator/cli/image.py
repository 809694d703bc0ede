"""`drover image`: disk images in the pools of hosts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from orchestrator.cli import units
from orchestrator.cli.context import Settings, complete_host, pass_settings, remote
from orchestrator.cli.exits import CliError, Exit
from orchestrator.cli.output import Cell, Column, note_unreadable
from orchestrator.cli.plugins import open_group

if TYPE_CHECKING:
    from orchestrator.rpc.messages import Image, Unreadable

_PIECE_BYTES = 1 << 20


@click.group(cls=open_group("image"))
def image() -> None:
    """Disk images in the pools of hosts: list them, bring one in."""


def _columns() -> list[Column[Image]]:
    from orchestrator import wire

    def guests(each: Image) -> str:
        return ", ".join(each.guests)

    def remark(each: Image) -> Cell:
        based = f"based on {each.backing}" if each.backing else ""
        return "; ".join(filter(None, (based, each.message)))

    return [
        Column("IMAGE", lambda each: each.name),
        Column("POOL", lambda each: each.pool),
        Column("HOST", lambda each: each.host),
        Column("FORMAT", lambda each: wire.word(each, "format").lower()),
        Column("SIZE", lambda each: units.size(each.size_bytes), right=True),
        Column("USED", lambda each: units.size(each.used_bytes), right=True),
        Column("GUESTS", guests, elastic=True),
        Column("REMARK", remark, rank=1, optional=True, elastic=True),
    ]


@image.command("list")
@click.option("--host", default="", shell_complete=complete_host, help="Only what this host sees.")
@click.option("--pool", default="", help="Only of this pool.")
@remote
@pass_settings
def list_(settings: Settings, host: str, pool: str) -> None:
    """List the images in the hosts' pools, with the guests that have disks of them.

    Of a shared pool one of its hosts is asked. Volumes of block pools are not listed. What an image says of itself is
    read from its header; nothing that the header names is opened.
    """
    from orchestrator import wire

    with settings.client() as client:
        unreadable: list[Unreadable] = []
        found = client.list_images(host, pool, unreadable=unreadable)
    printer = settings.printer
    if printer.machine:
        printer.document({"images": [wire.to_json(each) for each in found]})
    else:
        printer.table(_columns(), found, empty="there are no images")
    note_unreadable("pool", unreadable)


@image.command("import")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--pool", required=True, help="The pool that it goes to.")
@click.option(
    "--host", default="", shell_complete=complete_host, help="Which host's.  [default: any, if hosts share the pool]"
)
@click.option("--name", default="", help="What it is called in the pool.  [default: the file's own name]")
@click.option(
    "--format",
    "format_",
    type=click.Choice(("raw", "qcow2")),
    default=None,
    help="How it is laid out.  [default: as the file begins]",
)
@remote
@pass_settings
def import_(settings: Settings, file: str, pool: str, host: str, name: str, format_: str | None) -> None:
    """Bring FILE into a pool, as an image that guests' disks may name.

    It is there under its name, whole and durable, when this returns; a transfer that is cut off leaves nothing. Its
    format is never guessed on the way: a file that is not what it is said to be is refused, and so is one that is based
    on another file.
    """
    from orchestrator import wire
    from orchestrator.core.images import HEADER_BYTES, ImageImport, header_of
    from orchestrator.core.records import DiskFormat

    try:
        with Path(file).open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            begins_as = header_of(source.read(HEADER_BYTES), size).format
            source.seek(0)
            wanted = ImageImport(name or Path(file).name, pool, DiskFormat(format_) if format_ else begins_as, size)
            with settings.client() as client:
                made = client.import_image(wanted, _pieces(source), host)
    except OSError as error:
        raise CliError(Exit.USAGE, f"cannot read {file}: {error.strerror}", hint="name an image") from None
    printer = settings.printer
    if printer.machine:
        printer.document(wire.to_json(made))
    else:
        kind = wire.word(made, "format").lower()
        said = f"{made.name} is in pool {made.pool} of {made.host}: {kind}, {units.size(made.size_bytes)}"
        printer.show(f"{said}, {units.size(made.used_bytes)} used")


def _pieces(source: IO[bytes]) -> Iterator[bytes]:
    while piece := source.read(_PIECE_BYTES):
        yield piece
