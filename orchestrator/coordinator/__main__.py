"""`drover coordinator --config coordinator.yaml`: keeps the coordinator alive inside Ray.

Starts or finds the actors and watches that they make progress. Exits with 3 when Ray is gone, so that whoever
supervises this process restarts Ray and it; with 0 on SIGTERM, leaving the actors at work; `--stop` ends the actors.
With `ray_head` configured the head, and all actors with it, begins and ends with this process.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

import click
import structlog

from orchestrator.config import DIRECTORY
from orchestrator.coordinator import watchdog
from orchestrator.coordinator.ray_head import HeadFailed, OwnHead
from orchestrator.coordinator.watchdog import SILENT_S, Verdict
from orchestrator.coordinator.wiring import CoordinatorConfig, check, fencers_of, load
from orchestrator.core.errors import DroverError
from orchestrator.ledger.records import BadRecord
from orchestrator.telemetry import configure_logging, flush

log = structlog.get_logger(__name__)

EXIT_RAY_GONE = 3
PING_S = 0.5
PING_TIMEOUT_S = 3.0


def _with_head(config: CoordinatorConfig) -> tuple[CoordinatorConfig, OwnHead | None]:
    """The head is up, where this process is the one that starts it. Raises HeadFailed, OSError."""
    if not config.ray_head.directory:
        return config, None
    head = OwnHead(config.ray_head, config.ray_address)
    return replace(config, ray_token_file=str(head.start())), head


def _authenticate(config: CoordinatorConfig) -> None:
    """Ray reads these when it is imported and never again."""
    if config.ray_token_file:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = Path(config.ray_token_file).read_text().strip()


def _head_listens(config: CoordinatorConfig) -> bool:
    """Ray's own client takes 30 s and more to notice that its head is gone; the socket knows at once."""
    host, _, port = config.ray_address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1.0):
            return True
    except (OSError, ValueError):
        return False


def _watch(config: CoordinatorConfig, stopping: threading.Event) -> None:
    """Returns on SIGTERM; raises RayGone."""
    from orchestrator.coordinator import actor

    handle = actor.start_or_find(config)
    pulse = watchdog.start(time.monotonic())
    told: object = None
    while not stopping.wait(PING_S):
        status = actor.ping(handle, PING_TIMEOUT_S)
        if status is not None:
            seat = (status["pid"], status["epoch"], status["waiting_for"])
            if seat != told:
                told = seat
                log.info("coordinator", **status)
        elif not _head_listens(config):
            raise actor.RayGone(f"nothing listens at {config.ray_address} any more")
        pulse, verdict = watchdog.feel(pulse, status, time.monotonic())
        match verdict:
            case Verdict.RAY_GONE:
                raise actor.RayGone(f"the coordinator has not answered for {2 * SILENT_S:.0f} s")
            case Verdict.RESTART:
                log.error("coordinator makes no progress: restarting it", status=status)
                actor.restart(handle)
            case Verdict.LEAVE:
                pass


@click.command()
@click.option(
    "--config",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=DIRECTORY / "coordinator.yaml",
    show_default=True,
)
@click.option("--stop", is_flag=True, help="End the actors for good and exit.")
def main(path: Path, stop: bool) -> None:
    """Keep the coordinator alive inside Ray."""
    try:
        config = load(path)
        configure_logging(config.log_level)
        fencers_of(config)
        check(config)
        head: OwnHead | None = None
        if stop and config.ray_head.directory:
            config = replace(config, ray_token_file=str(Path(config.ray_head.directory) / "token"))
        else:
            config, head = _with_head(config)
        _authenticate(config)
    except (OSError, BadRecord, ValueError, DroverError, HeadFailed) as error:
        raise click.ClickException(f"cannot start the coordinator: {error}") from error
    from orchestrator.coordinator import actor

    stopping = threading.Event()

    def on_signal(_signal: int, _frame: FrameType | None) -> None:
        stopping.set()

    try:
        actor.connect(config)
        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)
        if stop:
            actor.stop_all(config)
        else:
            _watch(config, stopping)
        actor.disconnect()
        if head is not None:
            head.stop()
    except actor.RayGone as error:
        log.error("Ray is gone", error=str(error))
        flush()
        if head is not None:
            head.stop()
        os._exit(EXIT_RAY_GONE)  # ray's own exit handlers wait for the cluster


if __name__ == "__main__":
    main()
