"""The fencer of the local cluster: a program by the contract of docs/fencing.md that cuts a host's simulated power.

python -m deploy.lab.cluster.fence --dir DIR power-off HOST
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from deploy.lab.cluster import commands
from deploy.lab.cluster.layout import LocalClusterError

EXIT_UNKNOWN = 2


@click.command()
@click.option("--dir", "directory", type=click.Path(path_type=Path), required=True)
@click.argument("action", type=click.Choice(["power-off"]))
@click.argument("host")
def main(directory: Path, action: str, host: str) -> None:
    """Cut the power of HOST and answer when nothing of it runs any more."""
    try:
        commands.power_cycle(directory, host, off=True)
    except LocalClusterError as error:
        click.echo(error)
        sys.exit(EXIT_UNKNOWN)
    click.echo(f"{host} is without power")


if __name__ == "__main__":
    main()
