"""The Ray head as a child of the local cluster: loopback only, token authentication, nothing that is not needed.

`python -m deploy.lab.cluster.ray_head` starts GCS and raylet and ends, having killed them, as soon as one of them does:
the supervisor then starts all anew. It uses Ray's private starter, for `ray start` also runs a dashboard and a client
server that nobody here asks for: two more Python processes at each start, and a second until it sees a death. With
another Ray than the one it was written for it becomes `ray start`.

`ray stop` is never used: it ends every Ray on the machine. What a dead head leaves is found by what we know of our
own processes (teardown.find_ray) and killed one by one.
"""

# ray._private has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import sys
import time
from pathlib import Path

import click

from deploy.lab.cluster.layout import RAY_ADDRESS, Layout, Server

OBJECT_STORE_BYTES = 80_000_000
"""Nothing but arguments and results passes through it; Ray wants at least 75 MiB."""
WRITTEN_FOR = "2.60.0"
_LOOK_S = 0.05
_CLOSE_S = 1.0


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
    return {
        **client_environment(layout),
        "RAY_enable_metrics_collection": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        # Actors run at nice 15 by default: on busy cores the coordinator would starve.
        "RAY_worker_niceness": "0",
        # With a detached actor alive the head drains for 30 s when it is told to stop.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_LOG_TO_DRIVER": "0",
        # Of each of its logs: half a GiB by default.
        "RAY_ROTATION_MAX_BYTES": str(8 << 20),
        "RAY_ROTATION_BACKUP_COUNT": "1",
    }


def command(layout: Layout, seat: Server, cpus: int) -> list[str]:
    """The head's command line; `prepare` comes first."""
    options = {
        "--port": seat.ray_port,
        "--client-port": seat.ray_client_port,
        "--cpus": cpus,
        "--dir": layout.ray(seat),
    }
    return [
        sys.executable,
        "-m",
        "deploy.lab.cluster.ray_head",
        *(f"{name}={value}" for name, value in options.items()),
    ]


def _usual_command(port: int, client_port: int, cpus: int, directory: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--node-ip-address={RAY_ADDRESS}",
        f"--port={port}",
        f"--ray-client-server-port={client_port}",
        f"--num-cpus={cpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--temp-dir={directory}",
        "--include-dashboard=false",
        # An empty value is false to Ray's command line; the word is not.
        "--include-log-monitor=",
        "--no-monitor",
        "--disable-usage-stats",
    ]


def _run(port: int, cpus: int, directory: str) -> str:
    """Until one of its processes ends, or SIGTERM; which ones ended. Afterwards none of them runs."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class Head(Node):
        """GCS and raylet, without the API server that comes with every head."""

        def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
            pass

    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopping.append(number))
    params = RayParams(
        node_ip_address=RAY_ADDRESS,
        gcs_server_port=port,
        num_cpus=cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        temp_dir=directory,
        include_dashboard=False,
        include_log_monitor="",  # false
        no_monitor=True,
    )
    node = Head(params, head=True, shutdown_at_exit=False, spawn_reaper=False)
    close_at = 0.0
    try:
        while not stopping and not node.dead_processes():
            if time.monotonic() >= close_at:
                _close_to_others(Path(directory))
                close_at = time.monotonic() + _CLOSE_S
            time.sleep(_LOOK_S)
        return ", ".join(f"{kind} ({process.returncode})" for kind, process in node.dead_processes())
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


def _close_to_others(directory: Path) -> None:
    """Ray makes its directories writable for everybody, whatever the umask, and so does each driver that comes.

    The cluster's own directory above them keeps everybody out all the while.
    """
    for path in (directory, *directory.rglob("*")):
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink() and path.stat().st_mode & 0o077:
                path.chmod(0o700)


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--client-port", type=int, required=True, help="For the client server of `ray start`.")
@click.option("--cpus", type=int, required=True)
@click.option("--dir", "directory", required=True)
def main(port: int, client_port: int, cpus: int, directory: str) -> None:
    """Run a Ray head until SIGTERM."""
    import ray

    if ray.__version__ != WRITTEN_FOR:
        click.echo(f"Ray {ray.__version__} is not {WRITTEN_FOR}, which this was written for: using `ray start`")
        os.execv(sys.executable, _usual_command(port, client_port, cpus, directory))
    if ended := _run(port, cpus, directory):
        sys.exit(f"Error: ended: {ended}")


if __name__ == "__main__":
    main()
