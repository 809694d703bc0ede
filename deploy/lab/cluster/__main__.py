"""`python -m deploy.lab.cluster --dir DIR`: the cluster process. `drover up` starts it; so may an init system.

Runs until SIGTERM or SIGINT and then ends every part. Exit status: 0 stopped as told, 1 the cluster did not come up,
2 it cannot be started (another one runs there, something is missing).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

import click

from deploy.lab.cluster import config as configuration
from deploy.lab.cluster import lock as locking
from deploy.lab.cluster.layout import PRIVATE_UMASK, Layout, LocalClusterError
from deploy.lab.cluster.supervisor import LocalSupervisor
from orchestrator.cli.directory import default_dir


def _serve(directory: Path, lock_fd: int | None, die_with: int | None) -> bool:
    os.umask(PRIVATE_UMASK)
    layout = Layout.of(directory)
    layout.check()
    if lock_fd is not None:
        lock: locking.Lock | None = locking.Lock(lock_fd)
    else:
        lock = locking.acquire(layout, create=True)
    if lock is None:
        raise LocalClusterError(f"a cluster already runs in {layout.dir}; `drover status` shows it")
    lock.keep()
    lock.sign()
    if die_with is not None:
        _end_with(die_with)
    if layout.config_json.exists():
        config = configuration.load(layout.config_json)
    else:
        config = configuration.make(dir=layout.dir)

    async def run() -> bool:
        return await LocalSupervisor(config).run()

    return asyncio.run(run())


def _end_with(parent: int) -> None:
    """SIGTERM for this process when its parent, the foreground `drover up`, is killed."""
    import ctypes
    import signal

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:
        raise LocalClusterError("the `drover up` that started this is gone")


@click.command()
@click.option("--dir", "directory", type=click.Path(file_okay=False, path_type=Path), default=default_dir)
@click.option("--lock-fd", type=int, hidden=True, help="Descriptor of the lock that the caller hands over.")
@click.option("--die-with", type=int, hidden=True, help="Process id of the parent, whose end is the end of this.")
def main(directory: Path, lock_fd: int | None, die_with: int | None) -> None:
    """Run a local cluster until told to stop."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        came_up = _serve(directory, lock_fd, die_with)
    except LocalClusterError as error:
        raise click.UsageError(str(error)) from None
    sys.exit(0 if came_up else 1)


if __name__ == "__main__":
    main()
