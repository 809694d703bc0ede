"""The Ray head as a child of the local cluster: loopback only, with a token of the cluster's own.

What runs is the product's (orchestrator/coordinator/ray_head.py). What a dead head leaves is found by what we know of
our own processes (teardown.find_ray) and killed one by one.
"""

from __future__ import annotations

import os
import secrets
import shutil

from deploy.lab.cluster.layout import RAY_ADDRESS, Layout, Server
from orchestrator.coordinator import ray_head as product


def prepare(layout: Layout, seat: Server) -> None:
    """Make its directory anew. A head never takes over what an earlier one left: Ray's state is not the truth here."""
    shutil.rmtree(layout.ray(seat), ignore_errors=True)
    layout.ray(seat).mkdir(parents=True, exist_ok=True)


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
    return {**product.ENVIRONMENT, **client_environment(layout)}


def command(layout: Layout, seat: Server, cpus: int) -> list[str]:
    """The head's command line; `prepare` comes first."""
    return product.command_line(RAY_ADDRESS, seat.ray_port, seat.ray_client_port, cpus, layout.ray(seat))
