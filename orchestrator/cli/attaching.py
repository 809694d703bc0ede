"""`drover guest attach` and `drover guest detach`: disks, network cards, memory and vCPUs of a guest that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from orchestrator.cli import units
from orchestrator.cli.context import Settings, complete_guest, pass_settings, remote
from orchestrator.cli.exits import CliError, Exit

if TYPE_CHECKING:
    from orchestrator.rpc.messages import Guest


@click.group()
@click.argument("guest", shell_complete=complete_guest)
def attach(guest: str) -> None:
    """Add a disk, a network card, memory or vCPUs to GUEST while it runs (docs/hot-plug.md).

    The guest has it when this returns, and keeps it wherever it moves. Repeated, the command finds that it was done.
    """


def _guest() -> str:
    """The argument of the group."""
    above = click.get_current_context().parent
    return str(above.params["guest"]) if above is not None else ""


def _say(settings: Settings, each: Guest, said: str) -> None:
    from orchestrator import wire

    if settings.printer.machine:
        settings.printer.document(wire.to_json(each))
    else:
        settings.printer.show(f"{each.name} on {each.host} {said}")


@attach.command()
@click.option("--name", required=True, help="What it is called among the guest's disks.")
@click.option("--pool", required=True, help="The hosts' pool that its image is in.")
@click.option("--image", default="", help="The image's name in the pool.  [default: GUEST-NAME.FORMAT]")
@click.option("--size", default="", help="Such as 20GiB: an image that is not there is made.  [default: it must be]")
@click.option("--format", "form", type=click.Choice(["qcow2", "raw"]), default="qcow2", show_default=True)
@click.option("--cache", type=click.Choice(["none", "writeback"]), default="none", show_default=True)
@click.option("--read-only", is_flag=True, help="The guest cannot write to it.")
@remote
@pass_settings
def disk(
    settings: Settings, name: str, pool: str, image: str, size: str, form: str, cache: str, read_only: bool
) -> None:
    """Add a disk. An image that is there is taken as it is."""
    from orchestrator.core.records import DiskCache, DiskFormat, DiskSpec

    guest = _guest()
    wanted = DiskSpec(
        name=name,
        pool=pool,
        image=image or f"{guest}-{name}.{form}",
        format=DiskFormat(form),
        size_bytes=_parsed("--size", size, units.parse_bytes) if size else 0,
        cache=DiskCache(cache),
        read_only=read_only,
    )
    with settings.client() as client:
        each = client.attach_to_guest(guest, disk=wanted)
    _say(settings, each, f"has disk {name} ({pool}/{wanted.image})")


@attach.command()
@click.option("--name", required=True, help="What it is called among the guest's network cards.")
@click.option("--network", required=True, help="The hosts' network that it is in.")
@click.option("--mac", default="", help="Its address.  [default: follows from the guest's uuid and NAME]")
@click.option("--queues", type=int, default=1, show_default=True)
@click.option("--mtu", type=int, default=0, help="What it tells the guest.  [default: nothing]")
@remote
@pass_settings
def nic(settings: Settings, name: str, network: str, mac: str, queues: int, mtu: int) -> None:
    """Add a network card."""
    from orchestrator.core.records import NicSpec

    with settings.client() as client:
        each = client.attach_to_guest(_guest(), nic=NicSpec(name, network, mac.lower(), queues, mtu))
    _say(settings, each, f"has network card {name} in {network}")


@attach.command()
@click.argument("size")
@remote
@pass_settings
def memory(settings: Settings, size: str) -> None:
    """Let the guest have SIZE of memory in all, such as 2GiB: a multiple of 128 MiB more than it has.

    Up to its `max_memory`. Memory that a guest has is not taken from it while it runs.
    """
    mib = _parsed("SIZE", size, units.parse_mib)
    with settings.client() as client:
        each = client.attach_to_guest(_guest(), memory_mib=mib)
    _say(settings, each, f"has {each.spec.memory_mib} MiB")


@attach.command()
@click.argument("count", type=click.IntRange(1))
@remote
@pass_settings
def vcpus(settings: Settings, count: int) -> None:
    """Let the guest have COUNT vCPUs in all, up to its `max_vcpus`. None is taken from it while it runs."""
    with settings.client() as client:
        each = client.attach_to_guest(_guest(), vcpus=count)
    _say(settings, each, f"has {each.spec.vcpus} vCPUs")


@click.command()
@click.argument("guest", shell_complete=complete_guest)
@click.argument("kind", type=click.Choice(["disk", "nic"]))
@click.argument("name")
@remote
@pass_settings
def detach(settings: Settings, guest: str, kind: str, name: str) -> None:
    """Take the disk or the network card NAME from GUEST while it runs (docs/hot-plug.md).

    The guest's own system has to let go of it. One that does not keeps all of it, and the command says so. A disk's
    image stays in its pool.
    """
    with settings.client() as client:
        each = client.detach_from_guest(guest, **{kind: name})
    _say(settings, each, f"has no {kind} {name} any more")


def _parsed(what: str, text: str, parse: Callable[[str], int]) -> int:
    try:
        return parse(text)
    except ValueError as error:
        raise CliError(Exit.USAGE, f"{what}: {error}", hint="write a size such as 512MiB or 20GiB") from None
