"""What the lab's commands have in common. They become commands of `drover` by the entry points in pyproject.toml."""

from __future__ import annotations

from typing import Any

import click

from deploy.lab.cluster.layout import LocalClusterError
from orchestrator.cli.exits import CliError, Exit


class LabCommand(click.Command):
    """A command about the cluster on this machine: what it says of itself is an error of the command line's."""

    section = "A cluster on this machine"

    def invoke(self, ctx: click.Context) -> Any:
        """Raises CliError(FAILED) for a LocalClusterError."""
        try:
            return super().invoke(ctx)
        except LocalClusterError as error:
            raise CliError(Exit.FAILED, str(error)) from None
