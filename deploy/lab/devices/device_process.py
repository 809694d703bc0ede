"""The process that holds all devices of one VMM, outside and inside it: `python -m deploy.lab.devices.device_process`.

It lives in a session of its own and outlives agent and VMM, as a DPU would. It ends when it is told to, on SIGTERM, or
when its directory or its metadata file vanishes, so that nothing is ever left behind.

It reads its description from standard input (JSON: `guest`, `inc`, `directory`, `seed`, `incoming`, `devices` with
`name`, `shim`, sizes and `options`) and ends if that is not complete: its agent was killed. It writes
`<inc>.devices.json` (pid and start time, for a later agent), as the agent did, and serves

* `<inc>.dev`, the guest's second serial port: doorbells `R <d> <n>`, answers `A <d> <n> <answer>`
  (deploy/lab/guest_image/README.md). A device answers while it may speak; doorbells that came while it was stopped are
  answered when it runs again.
* `<inc>.vfio`, if there are devices inside the VMM: the preload in it asks here what QEMU asks them (vfio/preload.c).
  `<inc>.vfio.log` has each question with its answer (vfio/log.py);
* `<inc>.ctl`, the shim protocol (protos/drover/v1/shim.proto, served by serving.py): any number of connections and of
  calls at a time.

The serial port and the VFIO socket are there before gRPC is imported, so that a VMM can be started meanwhile. Whoever
starts the process may name a descriptor in DROVER_READY_FD: `p` is written to it when the ports are there, `c` when the
control socket is; or `r` and every wrong option, when a device cannot be what its options say.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from deploy.lab.devices.device import Device, DeviceIdentity, DeviceSizes
from deploy.lab.devices.scenario import Scenario
from deploy.lab.devices.server import DeviceServer, Hosted, log, now_s
from deploy.lab.devices.vfio.endpoint import Endpoint, features_of
from deploy.lab.devices.vfio.layout import FIRST_INDEX
from deploy.lab.devices.vfio.log import Log
from deploy.lab.devices.vfio.server import VfioServer
from orchestrator import proc
from orchestrator.core.errors import DroverError
from orchestrator.core.text import clip

_WATCH_S = 1.0
_MOST_WRONG = 20
"""Options that are told of: a pipe holds no more than 64 KiB, and a person reads less."""
_STOP_S = 0.2
_VFIO_BUFFER = 1 << 20
"""QEMU reads and writes up to so much at a time."""


def hosted_from(description: dict[str, Any]) -> list[Hosted]:
    """The companion devices of a description (see the module's docstring)."""
    incoming = bool(description["incoming"])
    devices = [_device(description, *entry) for entry in _numbered(description, "companion", 0)]
    return [Hosted(device, live=not incoming) for device in devices]


def endpoints_from(description: dict[str, Any], record: Log) -> list[Endpoint]:
    """The devices inside the VMM."""
    devices = [_device(description, *entry) for entry in _numbered(description, "vfio", FIRST_INDEX)]
    return [Endpoint(device, record) for device in devices]


def _numbered(description: dict[str, Any], shim: str, first: int) -> list[tuple[int, dict[str, Any]]]:
    """The devices of one kind with the numbers by which the guest rings them."""
    return list(enumerate((entry for entry in description["devices"] if entry["shim"] == shim), first))


def _scenario(entry: dict[str, Any]) -> Scenario:
    """Raises DroverError(INVALID_ARGUMENT) for options that this device cannot have."""
    if not entry["options"]:
        return Scenario()
    from deploy.lab.devices.scenario_text import scenario_of  # late: most devices have none, and YAML takes its time

    return scenario_of(entry["options"], in_vmm=entry["shim"] == "vfio")


def _device(description: dict[str, Any], index: int, entry: dict[str, Any]) -> Device:
    identity = DeviceIdentity(description["guest"], entry["name"], index, description["seed"])
    sizes = DeviceSizes(entry["initial_bytes"], entry["stop_copy_bytes"], entry["dirty_bytes_per_s"])
    in_vmm, incoming = entry["shim"] == "vfio", bool(description["incoming"])
    scenario = _scenario(entry)
    if in_vmm:
        return Device(identity, sizes, scenario, incoming=incoming, features=features_of(scenario), in_vmm=True)
    return Device(identity, sizes, scenario, incoming=incoming)


def _ready(word: bytes) -> None:
    """Tell whoever started this process, if it wants to know and still listens."""
    with contextlib.suppress(KeyError, ValueError, OSError):
        os.write(int(os.environ["DROVER_READY_FD"]), word)


def wrong_options(description: dict[str, Any]) -> list[dict[str, str]]:
    """Device, option and a sentence for everything that is wrong with the devices' options."""
    found: list[dict[str, str]] = []
    for entry in description["devices"]:
        try:
            _scenario(entry)
        except DroverError as error:
            found += [
                {"device": entry["name"], "option": option, "message": clip(said)} for option, said in error.violations
            ]
    return found[:_MOST_WRONG]


async def _serve(description: dict[str, Any]) -> None:
    directory, inc = Path(description["directory"]), str(description["inc"])
    evidence = (directory / f"{inc}.vfio.log").open("a", buffering=1) if _has_vfio(description) else None
    endpoints = endpoints_from(description, Log(_as_far_as_it_goes(evidence))) if evidence else []
    server = DeviceServer(description["guest"], inc, hosted_from(description), endpoints)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.over.set)
    metadata, port, ctl, vfio = (directory / f"{inc}.{suffix}" for suffix in ("devices.json", "dev", "ctl", "vfio"))
    made = {"guest": server.guest, "inc": inc, "pid": os.getpid(), "start_time": proc.start_time_of(os.getpid())}
    temporary = metadata.with_suffix(".tmp")
    temporary.write_text(json.dumps(made))
    temporary.replace(metadata)
    inode = metadata.stat().st_ino
    try:
        listeners = [await asyncio.start_unix_server(server.serve_port, port)]
        if endpoints:
            inside = VfioServer(endpoints, now_s)
            listeners.append(await asyncio.start_unix_server(inside.serve, vfio, limit=_VFIO_BUFFER))
        _ready(b"p")
        from deploy.lab.devices.serving import serve  # late: gRPC takes longer to import than all else together

        control = await serve(server, ctl)
        _ready(b"c")
        log(f"{inc}: {', '.join(entry['name'] for entry in description['devices'])}")
        while not server.over.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_S):
                    await server.over.wait()
            if not _still_there(metadata, inode):
                break
        for listener in listeners:
            listener.close()
        await control.stop(_STOP_S)
    finally:
        if _still_there(metadata, inode):
            for path in (port, ctl, vfio, metadata):
                path.unlink(missing_ok=True)


def _as_far_as_it_goes(file: TextIO) -> Callable[[str], None]:
    """Evidence that cannot be written, on a full disk, is missing, and costs no device its guest."""

    def write(line: str) -> None:
        with contextlib.suppress(OSError):
            file.write(line)

    return write


def _has_vfio(description: dict[str, Any]) -> bool:
    return any(entry["shim"] == "vfio" for entry in description["devices"])


def _still_there(metadata: Path, inode: int) -> bool:
    """Our own metadata: another process under the same name has sockets of its own there.

    An error of the disk says nothing about it: a guest's devices do not end because of that.
    """
    try:
        return metadata.stat().st_ino == inode
    except FileNotFoundError:
        return False
    except OSError:
        return True


def main() -> None:
    """Serve the devices that standard input describes until they are ended. Exits with a sentence, and tells the
    agent, when their options are wrong."""
    os.umask(0o077)
    description: dict[str, Any] = json.load(sys.stdin)
    if wrong := wrong_options(description):
        _ready(b"r" + json.dumps(wrong).encode())
        sys.exit("the options of its devices are wrong: " + json.dumps(wrong))
    asyncio.run(_serve(description))


if __name__ == "__main__":
    main()
