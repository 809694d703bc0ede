"""`drover api --config api.yaml`: serves OrchestratorService until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import gc
import signal
from pathlib import Path

import click
from prometheus_client import REGISTRY

from orchestrator import descriptors
from orchestrator.api import config as configuration
from orchestrator.api.config import ApiConfig
from orchestrator.api.server import ApiServer
from orchestrator.config import DIRECTORY
from orchestrator.core.errors import DroverError
from orchestrator.ledger.records import BadRecord
from orchestrator.ledger.zookeeper import ZooKeeperStore
from orchestrator.metrics import LAG_S, lag
from orchestrator.pki.config import directory_of
from orchestrator.pki.files import PkiError
from orchestrator.tasks import Tasks
from orchestrator.telemetry import configure_logging


async def _serve(config: ApiConfig) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    store = ZooKeeperStore(config.zookeeper, chroot=config.chroot, tls=directory_of(config.tls))
    server = ApiServer(config, store, REGISTRY)
    tasks = Tasks("process of the API")
    tasks.keep(descriptors.look, "reserve of descriptors", again_s=descriptors.LOOK_S)
    tasks.keep(lag.look, "lag of the event loop", again_s=LAG_S)
    try:
        await server.start()
        gc.freeze()  # what start-up made stays: later collections need not look at it
        await stopping.wait()
    finally:
        await tasks.close()
        await server.stop()


@click.command()
@click.option(
    "--config",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=DIRECTORY / "api.yaml",
    show_default=True,
)
def main(path: Path) -> None:
    """Serve Drover's API."""
    try:
        config = configuration.load(path)
        configure_logging(config.log_level)
        descriptors.raise_limit()
        asyncio.run(_serve(config))
    except (OSError, BadRecord, PkiError, ValueError, DroverError) as error:
        raise click.ClickException(f"cannot start the API: {error}") from error


if __name__ == "__main__":
    main()
