"""The QEMU process: its command line, its birth in a session of its own, and how its death is noticed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from agents.engine.base import EngineError, VmmMetadata, VmmSpec
from agents.engine.boot_images import Images
from agents.engine.qemu import arguments, display, vfio
from agents.host.processes import gated, leashed
from agents.host.scopes import scoped
from orchestrator.core.guest import command_line_of
from orchestrator.core.records import Firmware, ShimKind
from orchestrator.whole import write_whole

_MAX_SOCKET_PATH = 107


@dataclass(frozen=True, slots=True)
class Launch:
    """What does not depend on the guest."""

    binary: str
    images: Images
    accelerator: str
    reconnect_ms: bool
    """QEMU 9.2 and later take the delay in milliseconds."""
    vfio_preload: Path | None = None
    """What gives QEMU devices where there is no VFIO, see vfio.py."""


def qmp_path(spec: VmmSpec) -> Path:
    """The socket of ordinary QMP commands and of events."""
    return spec.directory / f"{spec.inc}.qmp"


def oob_path(spec: VmmSpec) -> Path:
    """The socket of the second QMP connection, for commands that overtake a blocked one (`yank`)."""
    return spec.directory / f"{spec.inc}.oob"


def vnc_path(spec: VmmSpec) -> Path:
    """The socket at which the guest's screen is served, unless the host has an address for that."""
    return spec.directory / f"{spec.inc}.vnc"


def log_path(spec: VmmSpec) -> Path:
    """What QEMU writes to its standard output and error: its last words, should it not start."""
    return spec.directory / f"{spec.inc}.log"


def metadata_path(spec: VmmSpec) -> Path:
    """The VMM's note (`VmmMetadata`) for an agent that is started later."""
    return spec.directory / f"{spec.inc}.json"


def console_socket(spec: VmmSpec) -> Path:
    """The socket of COM1; `link_console` makes it known outside under `console_path`."""
    return spec.directory / f"{spec.inc}.com1"


def link_console(spec: VmmSpec) -> None:
    """Idempotent. Call it when the socket is there, or whoever looks for consoles tries too early. Raises OSError."""
    if spec.console_path.is_symlink() and spec.console_path.readlink() == console_socket(spec).absolute():
        return
    spec.console_path.unlink(missing_ok=True)
    spec.console_path.symlink_to(console_socket(spec).absolute())


def reserved_path(spec: VmmSpec) -> Path:
    """The note that an incoming VMM leaves when it becomes the guest, written before it can."""
    return spec.directory / f"{spec.inc}.owner"


def in_vmm(spec: VmmSpec) -> list[str]:
    """Names of the devices inside the VMM."""
    return [device.name for device in spec.spec.devices if device.shim is ShimKind.VFIO]


def environment(launch: Launch, spec: VmmSpec) -> dict[str, str]:
    """What QEMU needs besides the agent's own. Raises EngineError when devices cannot be had."""
    names = in_vmm(spec)
    if not names:
        return {}
    if spec.vfio_path is None:
        raise EngineError(f"no device process was made for the devices inside the VMM ({', '.join(names)})")
    if launch.vfio_preload is None or not launch.vfio_preload.is_file():
        where = launch.vfio_preload or "this host: its configuration names none (vfio_preload)"
        raise EngineError(f"devices inside the VMM ({', '.join(names)}) need the preload, and there is none at {where}")
    return vfio.environment(str(launch.vfio_preload), str(spec.vfio_path), len(names))


def command_line(launch: Launch, spec: VmmSpec, *, incoming: bool) -> list[str]:
    """Raises EngineError when a socket path is too long for the kernel, or an image of the guest is not here."""
    sockets = [qmp_path(spec), oob_path(spec), console_socket(spec)]
    sockets += [path for path in (spec.device_path, spec.vfio_path) if path is not None]
    if spec.spec.display.vnc and not spec.vnc_listen:
        sockets.append(vnc_path(spec))
    for path in sockets:
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
            raise EngineError(
                f"socket path {path} is longer than {_MAX_SOCKET_PATH} bytes: use a shorter state directory"
            )
    device = "null,id=device"
    if spec.device_path is not None:
        delay = "reconnect-ms=100" if launch.reconnect_ms else "reconnect=1"
        device = f"socket,id=device,path={arguments.escaped(spec.device_path)},{delay}"
    command = [launch.binary, "-name", f"guest={arguments.escaped(spec.spec.name)}", "-accel", launch.accelerator]
    command += _machine(spec)
    # -no-shutdown: a guest that shuts down must not look like a VMM that died.
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-shutdown"]
    if spec.spec.display.vnc:
        command += ["-vnc", display.argument(spec.vnc_listen, vnc_path(spec))]
    for path in (qmp_path(spec), oob_path(spec)):
        command += ["-qmp", f"unix:{arguments.escaped(path)},server=on,wait=off"]
    command += ["-chardev", f"socket,id=console,path={arguments.escaped(console_socket(spec))},server=on,wait=off"]
    command += ["-chardev", device, *_serials(spec)]
    if spec.machine is not None:
        command += arguments.backend_arguments(spec) + arguments.device_arguments(spec.machine)
    command += _network(spec)
    if spec.vfio_path is not None:
        command += vfio.arguments(in_vmm(spec))
    if spec.machine is None or spec.machine.firmware is Firmware.DIRECT:
        command += _boot(launch.images, spec)
    command += arguments.extra_arguments(spec)
    # No vCPU runs before the process is noted down: one that nobody knows of must not be a guest.
    command.append("-S")
    return [*command, "-incoming", "defer"] if incoming else command


def _machine(spec: VmmSpec) -> list[str]:
    if spec.machine is not None:
        return arguments.machine_arguments(spec, spec.machine)
    return ["-M", spec.spec.machine, "-m", str(spec.spec.memory_mib), "-smp", str(spec.spec.vcpus)]


def _serials(spec: VmmSpec) -> list[str]:
    """As many as the guest's machine has: one that was adopted may have fewer, or more, than those born here."""
    count = spec.machine.serials if spec.machine is not None else 2
    behind = ["chardev:console", "chardev:device"]
    return [word for number in range(count) for word in ("-serial", behind[number] if number < 2 else "null")]


def _boot(images: Images, spec: VmmSpec) -> list[str]:
    boot = spec.spec.boot
    words = ["-kernel", str(images.kernel(boot))]
    initrd = images.initrd(boot)
    if initrd is not None:
        words += ["-initrd", arguments.escaped(initrd)]
    return [*words, "-append", command_line_of(boot, name=spec.spec.name, uuid=spec.guest)]


def _network(spec: VmmSpec) -> list[str]:
    """All cards are on one segment. Without option ROMs: nobody boots from them, and each costs time."""
    words: list[str] = []
    for number, nic in enumerate(spec.nics):
        net, segment = f"net{number}", spec.segment
        backend = f"hubport,id={net},hubid=0"
        if segment is not None:
            backend = f"socket,id={net},mcast={segment.group}:{segment.port},localaddr={segment.host_address}"
        device = f"virtio-net-pci,id=nic{number},netdev={net},mac={nic.mac},romfile="
        words += ["-netdev", backend, "-device", device]
    return words


def write_metadata(path: Path, metadata: VmmMetadata) -> None:
    """Atomic: a reader sees the old text or the new."""
    write_whole(path, json.dumps(asdict(metadata)).encode())


def popen_gated(command: list[str], log: Path, environment: Mapping[str, str], guest: str) -> subprocess.Popen[bytes]:
    """A VMM that begins once it is noted down (`let_in`), and never if its agent is killed before. Blocking."""
    _must_be_there(command[0])
    # Its environment is for it alone: nothing is preloaded into who waits for it.
    words = ["env", *(f"{name}={value}" for name, value in environment.items()), *command]
    return popen(gated(scoped(words, guest, "vmm")), log, stdin=subprocess.PIPE)


def popen_leashed(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A QEMU that is asked something and ends with its agent at the latest (`end_leashed`). Blocking."""
    _must_be_there(command[0])
    return popen(leashed(command), log, stdin=subprocess.PIPE)


def _must_be_there(program: str) -> None:
    if shutil.which(program) is None:
        raise EngineError(f"cannot run {program}: there is no such program; is QEMU installed?")


def popen(command: list[str], log: Path, *, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """Blocking. The session of its own lets the VMM outlive this process."""
    sink: IO[bytes]
    with log.open("ab") as sink:
        try:
            child = subprocess.Popen(
                command, stdin=stdin, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise EngineError(f"cannot run {command[0]}: {error}; is QEMU installed?") from error
    if os.getpriority(os.PRIO_PROCESS, 0) < 0:
        # The agent goes before the guests, so that a stopped one comes back at once; guests go like everybody else.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, child.pid, 0)
    return child
