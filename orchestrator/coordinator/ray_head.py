"""The Ray head that a coordinator works in: GCS and raylet, token authentication, nothing that is not needed.

`python -m orchestrator.coordinator.ray_head` starts both and ends, having killed them, as soon as one of them does:
whoever supervises it then starts all anew. It uses Ray's private starter, for `ray start` also runs a dashboard and a
client server that nobody here asks for: two more Python processes at each start, and a second until it sees a death.
With another Ray than the one it was written for it becomes `ray start`.

`ray stop` is never used: it ends every Ray on the machine.
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
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click

OBJECT_STORE_BYTES = 80_000_000
"""Nothing but arguments and results passes through it; Ray wants at least 75 MiB."""
WRITTEN_FOR = "2.60.0"
_LOOK_S = 0.05
_CLOSE_S = 1.0
_START_S = 60.0
_STOP_S = 5.0

ENVIRONMENT: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
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
"""What a head needs, beside its token."""


@dataclass(frozen=True, slots=True)
class RayHeadConfig:
    """`ray_head` in the coordinator's configuration."""

    directory: str = ""
    """Where the head that this coordinator starts keeps its sockets and logs, made anew at each start; short, such as
    `/run/drover-coordinator/ray`. Empty: somebody else runs a head at `ray_address`."""
    cpus: int = 2
    """What the head says it has. Actors ask for none."""


class HeadFailed(Exception):
    """The head did not come up; its log says why."""


class OwnHead:
    """A head that lives and ends with the coordinator's process."""

    def __init__(self, config: RayHeadConfig, address: str) -> None:
        self._config = config
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> Path:
        """Returns the file of its token when it listens. A head never takes over what an earlier one left: Ray's state
        is not the truth here. Raises HeadFailed, OSError."""
        directory = Path(self._config.directory)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, mode=0o700)
        token = directory / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token.read_text(),
        }
        command = command_line(self._host, self._port, self._port + 1, self._config.cpus, directory / "head")
        self._child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, cwd=directory)
        give_up_at = time.monotonic() + _START_S
        while not self._listens():
            if self._child.poll() is not None:
                raise HeadFailed(f"the Ray head ended with status {self._child.returncode}: see {directory}/head")
            if time.monotonic() >= give_up_at:
                self.stop()
                raise HeadFailed(f"the Ray head does not listen at {self._host}:{self._port} after {_START_S:.0f} s")
            time.sleep(_LOOK_S)
        return token

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self._host, self._port), timeout=1.0):
            return True
        return False

    def stop(self) -> None:
        """End it, and with it every actor. Idempotent."""
        child = self._child
        if child is None or child.poll() is not None:
            return
        child.terminate()
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def command_line(address: str, port: int, client_port: int, cpus: int, directory: Path) -> list[str]:
    """Of a head's process."""
    options = {
        "--address": address,
        "--port": port,
        "--client-port": client_port,
        "--cpus": cpus,
        "--dir": directory,
    }
    words = (f"{name}={value}" for name, value in options.items())
    return [sys.executable, "-m", "orchestrator.coordinator.ray_head", *words]


def _usual_command(address: str, port: int, client_port: int, cpus: int, directory: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--node-ip-address={address}",
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


def _run(address: str, port: int, cpus: int, directory: str) -> str:
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
        node_ip_address=address,
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
@click.option("--address", required=True, help="IP address of the head.")
@click.option("--port", type=int, required=True)
@click.option("--client-port", type=int, required=True, help="For the client server of `ray start`.")
@click.option("--cpus", type=int, required=True)
@click.option("--dir", "directory", required=True)
def main(address: str, port: int, client_port: int, cpus: int, directory: str) -> None:
    """Run a Ray head until SIGTERM."""
    import ray

    if ray.__version__ != WRITTEN_FOR:
        click.echo(f"Ray {ray.__version__} is not {WRITTEN_FOR}, which this was written for: using `ray start`")
        os.execv(sys.executable, _usual_command(address, port, client_port, cpus, directory))
    if ended := _run(address, port, cpus, directory):
        sys.exit(f"Error: ended: {ended}")


if __name__ == "__main__":
    main()
