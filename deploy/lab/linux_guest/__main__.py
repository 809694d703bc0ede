"""`python -m deploy.lab.linux_guest IMAGE --uuid UUID --promised N`: check a raw image of a probe's disk from outside.

Exit status 0: every promised record is there; 1: one is not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from deploy.lab.linux_guest.image import check, seed_of


@click.command()
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--uuid", required=True, help="The guest's.")
@click.option(
    "--promised", type=click.IntRange(min=0), required=True, help="Its newest promise, from its last heartbeat."
)
def main(image: Path, uuid: str, promised: int) -> None:
    """Look for every promised record in a raw IMAGE of the probe's disk."""
    with image.open("rb") as file:

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        verdict = check(read, seed_of(uuid), promised)
    click.echo(
        f"{verdict.checked} promised records looked for, {len(verdict.missing)} missing, newest {verdict.newest}"
    )
    for number in verdict.missing[:20]:
        click.echo(f"record {number} is missing or torn", err=True)
    sys.exit(0 if verdict.kept else 1)


if __name__ == "__main__":
    main()
