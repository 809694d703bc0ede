"""`drover chaos`: make the lab's devices misbehave on purpose (docs/scenario.md). Refused unless the cluster allows
devices to be instructed (`drover up --chaos`)."""

from __future__ import annotations

import click

from deploy.lab.devices.scenario import HOOKS
from orchestrator.cli.context import Settings, complete_guest, pass_settings, remote
from orchestrator.cli.policy_options import BYTES


class ChaosGroup(click.Group):
    """Stands with the lab's other commands in `drover --help`."""

    section = "A cluster on this machine"


@click.group(cls=ChaosGroup)
def chaos() -> None:
    """Make emulated devices misbehave on purpose, where the cluster allows it."""


@chaos.command("late-ack")
@click.argument("guest", shell_complete=complete_guest)
@click.argument("device")
@click.option("--at", type=click.Choice(HOOKS), required=True, help="The point of the attempt at which it asks.")
@click.option("--times", type=click.IntRange(min=1), default=1, show_default=True, help="In how many attempts.")
@click.option("--bytes", "count", type=BYTES, default=0, help="New initial data that comes with it, e.g. 64KiB.")
@remote
@pass_settings
def late_ack(settings: Settings, guest: str, device: str, at: str, times: int, count: int) -> None:
    """Let DEVICE of GUEST ask for another switchover ACK, late.

    `freeze` and `final_query` abort the attempt: the guest runs on at its source and is tried again. Prints the
    scenario that the device follows now (docs/scenario.md).
    """
    from deploy.lab.devices.scenario_text import late_ack as instruction  # YAML is not needed for --help

    with settings.client() as client:
        scenario = client.instruct_device(guest, device, instruction(at, times, count))
    if settings.printer.machine:
        settings.printer.document({"guest": guest, "device": device, "scenario": scenario})
    else:
        settings.printer.show(scenario.rstrip() or "the device follows no scenario")
