"""The Ray head as a child of the local cluster: loopback only, token authentication, nothing that is not needed.

`ray stop` is never used: it ends every Ray on the machine. What a dead head leaves is found by what we know of our
own processes (teardown.find_ray) and killed one by one.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys

from orchestrator.local.layout import RAY_ADDRESS, Layout, Places

OBJECT_STORE_BYTES = 80_000_000
"""Nothing but arguments and results passes through it; Ray wants at least 75 MiB."""


def prepare(layout: Layout) -> None:
    """Make its directory anew. A head never takes over what an earlier one left: Ray's state is not the truth here."""
    shutil.rmtree(layout.ray, ignore_errors=True)
    layout.ray.mkdir(parents=True, exist_ok=True)


def token(layout: Layout) -> str:
    """The cluster's secret, made at the first call; readable by its owner only."""
    try:
        return layout.ray_token.read_text()
    except FileNotFoundError:
        value = secrets.token_hex(32)
        descriptor = os.open(layout.ray_token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(value)
        return value


def client_environment(layout: Layout) -> dict[str, str]:
    """What a process needs before it imports ray, to talk to this head."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token(layout), "RAY_USAGE_STATS_ENABLED": "0"}


def environment(layout: Layout) -> dict[str, str]:
    """What the head itself needs."""
    return {
        **client_environment(layout),
        "RAY_enable_metrics_collection": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        # With a detached actor alive the head drains for 30 s when it is told to stop.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_LOG_TO_DRIVER": "0",
    }


def command(layout: Layout, places: Places, cpus: int) -> list[str]:
    """The head's command line; `prepare` comes first."""
    return [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--node-ip-address={RAY_ADDRESS}",
        f"--port={places.ray_port}",
        f"--ray-client-server-port={places.ray_client_port}",
        f"--num-cpus={cpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--temp-dir={layout.ray}",
        "--include-dashboard=false",
        # An empty value is false to Ray's command line; the word is not.
        "--include-log-monitor=",
        "--no-monitor",
        "--disable-usage-stats",
    ]
