"""Takes over a VMM that somebody else started: what the kernel and the VMM say of it, judged by `examine.py`.

Nothing is changed by an examination. The taking itself is a birth that starts no process: the record says STARTING and
which process it is, the process is examined again, noted down, and the record says IDLE. Until it has moved for the
first time it is what it was: somebody else's child, with one monitor, on files that others named.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agents.config import AgentConfig
from agents.engine.base import (
    ADOPTED_QMP,
    ADOPTED_VARIABLES,
    NODE_OF,
    PATH_OF,
    AdoptingEngine,
    EngineError,
    MigrationEngine,
    MonitorBusy,
    VmmMetadata,
    VmmSpec,
)
from agents.guest import examine as judging
from agents.guest import hardware as standing
from agents.guest.copies import Copy, named
from agents.guest.examine import Examined, Here, Process
from agents.guest.files import GuestFiles, known_roots
from agents.guest.hardware import Hardware
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.obstacles import refused
from orchestrator.core.offers import Obstacle
from orchestrator.core.records import Adopted, Firmware, GuestSpec, LiveMachine, NetworkKind, PoolKind
from orchestrator.proc import start_time_of

_NOBODY = "00000000-0000-0000-0000-000000000000"
_MOST_IMAGES = 256
"""Boot images that are compared with the guest's kernel, if they are as large."""


@dataclass(frozen=True, slots=True)
class Found:
    """What an examination came to."""

    examined: Examined
    start_time: int
    at_its_end: Mapping[str, str]
    """What its VMM was told to do when the guest shuts down or starts anew."""
    variables: Path | None = None
    """Its UEFI variables, where this host has them."""


async def examine(
    engine: MigrationEngine, config: AgentConfig, name: str, process: tuple[int, str], wished: GuestSpec | None = None
) -> Found:
    """The guest that a process is: pid, and the socket of its monitor. Changes nothing.

    Raises INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, MONITOR_BUSY, NOT_ADOPTABLE and FEATURE_NOT_AVAILABLE when so
    little can be seen of it that nothing can be said of the guest; everything else is among its obstacles.
    """
    pid, monitor = process
    if not isinstance(engine, AdoptingEngine):
        raise DroverError(RefusalReason.FEATURE_NOT_AVAILABLE, f"the engine of {config.host} takes over no process")
    if pid < 2 or not monitor.startswith("/"):
        raise DroverError(RefusalReason.INVALID_ARGUMENT, "a pid, and the whole path of a socket, are needed")
    seen = await asyncio.to_thread(_seen, config, pid)
    try:
        answers = await engine.look_at(pid, Path(monitor))
        accelerator = (await engine.probe())["accelerator"]
    except MonitorBusy as error:
        raise DroverError(RefusalReason.MONITOR_BUSY, str(error), field="qmp") from error
    except EngineError as error:
        raise DroverError(RefusalReason.NOT_ADOPTABLE, f"process {pid}: {error}", field="qmp") from error
    here = await asyncio.to_thread(_here, config, seen, answers, accelerator)
    examined = judging.examine(name, seen, answers, here, wished)
    if await asyncio.to_thread(start_time_of, pid) != seen.start_time:
        raise DroverError(RefusalReason.NOT_FOUND, f"process {pid} has ended", field="pid")
    against = [*examined.obstacles, *await asyncio.to_thread(_unsuitable, config, examined.spec)]
    if not against:
        against += await _tried_out(engine, config, examined, answers)
    told = {word for word, _ in judging.options_of(seen.arguments)}
    at_its_end = {
        "shutdown": "pause" if "no-shutdown" in told else "poweroff",
        "reboot": "shutdown" if "no-reboot" in told else "reset",
    }
    variables = await asyncio.to_thread(_variables, seen.pid, answers)
    if variables is None and examined.machine.firmware is Firmware.UEFI:
        against.append(
            (RefusalReason.FIRMWARE_NOT_AVAILABLE, "the file of its UEFI variables is not found on its host")
        )
    return Found(replace(examined, obstacles=tuple(against)), seen.start_time, at_its_end, variables)


async def _tried_out(
    engine: AdoptingEngine, config: AgentConfig, examined: Examined, answers: Mapping[str, Any]
) -> list[Obstacle]:
    """The machine that a destination would be given is made here, compared, and ended."""
    directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="drover-try-"))
    disks = standing.disk_files(config, examined.spec)
    spec = VmmSpec(_NOBODY, "t", examined.spec, directory, directory / "c", None, machine=examined.machine, disks=disks)
    try:
        firmware = await asyncio.to_thread(standing.firmware_of, config, examined.machine, directory / "t.nvram")
        spec = replace(spec, firmware=firmware)
        built = await engine.try_out(spec)
    except (EngineError, OSError) as error:
        said = f"the machine that another host would be given does not start: {error}"
        return [(RefusalReason.NOT_ADOPTABLE, said)]
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, True)
    return judging.differences(answers, built, examined)


def _unsuitable(config: AgentConfig, spec: GuestSpec) -> list[Obstacle]:
    """Blocking. What every guest of this host must be, beside what stands against this one already."""
    known = [disk for disk in spec.disks if disk.pool in config.pools]
    nothing_new = replace(spec, disks=tuple(known), extra_args=())
    try:
        standing.must_be_possible(config, nothing_new, ())
    except DroverError as error:
        return [(error.reason, error.message)]
    return []


# --- what the kernel says ---------------------------------------------------------------------------------------------


def _seen(config: AgentConfig, pid: int) -> Process:
    """Blocking. Raises NOT_FOUND, ALREADY_EXISTS for a VMM that Drover started, whatever has become of its note, and
    NOT_ADOPTABLE when the kernel does not let this agent look."""
    host = config.host
    try:
        start_time = start_time_of(pid)
        if start_time is None:
            raise DroverError(RefusalReason.NOT_FOUND, f"there is no process {pid} on {host}", field="pid")
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
        same_network = Path(f"/proc/{pid}/ns/net").stat().st_ino == Path("/proc/self/ns/net").stat().st_ino
        taps = tuple(_taps(pid))
        Path(f"/proc/{pid}/root/").stat()
    except OSError as error:
        said = f"the agent of {host} may not look at process {pid} ({error}): run it as root, or as that user"
        raise DroverError(RefusalReason.NOT_ADOPTABLE, said, field="pid") from error
    arguments = tuple(os.fsdecode(word) for word in words)
    if not arguments or "qemu" not in arguments[0].rpartition("/")[2]:
        said = f"process {pid} of {host} is no QEMU: {arguments[0] if arguments else 'it has no command line'}"
        raise DroverError(RefusalReason.NOT_ADOPTABLE, said, field="pid")
    if _is_ours(config, arguments):
        raise DroverError(RefusalReason.ALREADY_EXISTS, f"process {pid} of {host} is a guest of Drover's", field="pid")
    return Process(pid, start_time, arguments, taps, same_network)


def _is_ours(config: AgentConfig, arguments: Sequence[str]) -> bool:
    """Its command line names something of a guest of this installation. Raises INTERNAL when that cannot be told."""
    try:
        below = tuple(f"{root}/" for root in known_roots(config))
    except OSError as error:
        said = f"where the guests of {config.host} are is not known: {error}"
        raise DroverError(RefusalReason.INTERNAL, said) from error
    return any(root in word.replace(",,", ",") for word in arguments for root in below)


def _taps(pid: int) -> Iterable[str]:
    """Interfaces that the process has open."""
    for note in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            for line in note.read_text(errors="replace").splitlines():
                name, _, value = line.partition(":")
                if name == "iff":
                    yield value.strip()


# --- what this host has of it -----------------------------------------------------------------------------------------


def _here(config: AgentConfig, process: Process, answers: Mapping[str, Any], accelerator: str) -> Here:
    """Blocking."""
    images: dict[str, tuple[str, str]] = {}
    for file in judging.disk_files(answers):
        if (found := _in_a_pool(config, process.pid, file)) is not None:
            images[file] = found
    files = judging.boot_files(process.arguments)
    boots = {
        file: name
        for what, file in files.items()
        if what != "bios" and (name := _image_of(config, process.pid, what, file)) is not None
    }
    bios = config.firmware.bios
    same = bios is None and "bios" not in files
    if bios is not None and "bios" in files:
        same = _digest(bios) == _digest(_path_of(process.pid, files["bios"]))
    flash, firmware = judging.flash(answers), config.firmware
    code, variables = (_flash(process.pid, flash.get(place)) for place in (judging.CODE, judging.VARIABLES))
    uefi = _digest(firmware.uefi_code) if firmware.uefi_code is not None and code is not None else ""
    return Here(
        accelerator,
        images,
        boots,
        networks={name: network for name in _interfaces(process) if (network := _network_of(config, name))},
        same_bios=same,
        uefi_sha256=uefi if code is not None and uefi == _digest(code) else "",
        same_variables=_size(variables) == _size(firmware.uefi_vars) is not None,
        extra_args=tuple(config.extra_args_allowed),
    )


def _flash(pid: int, image: Mapping[str, Any] | None) -> Path | None:
    return _path_of(pid, str(image["file"])) if image is not None else None


def _variables(pid: int, answers: Mapping[str, Any]) -> Path | None:
    """Blocking. By a path that outlives the process; None: it has none, or they are not found by one."""
    image = judging.flash(answers).get(judging.VARIABLES)
    if image is None:
        return None
    with contextlib.suppress(OSError):
        path = Path(f"/proc/{pid}/cwd").readlink() / str(image["file"])
        return path if path.samefile(_path_of(pid, str(image["file"]))) else None
    return None


def _size(path: Path | None) -> int | None:
    """None: it cannot be told."""
    with contextlib.suppress(OSError):
        return path.stat().st_size if path is not None else None
    return None


def _path_of(pid: int, file: str) -> Path:
    """A file as the process sees it: below its root, relative to where it stands."""
    if not file.startswith("/"):
        return Path(f"/proc/{pid}/cwd") / file
    return Path(f"/proc/{pid}/root{file}")


def _in_a_pool(config: AgentConfig, pid: int, file: str) -> tuple[str, str] | None:
    """Pool and name of the very file that the process has open. A link elsewhere is none."""
    path = _path_of(pid, file)
    for name, pool in config.pools.items():
        candidate = pool.path / path.name
        with contextlib.suppress(OSError):
            here, there = candidate.stat(), path.stat()
            same = (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
            if pool.kind is PoolKind.BLOCK:
                same = here.st_rdev == there.st_rdev != 0
            if same:
                return name, path.name
    return None


def _image_of(config: AgentConfig, pid: int, what: str, file: str) -> str | None:
    """Name of a boot image of this host that has the same content; empty: the kernel of guests that name none."""
    path = _path_of(pid, file)
    default = config.guest_image if what == "kernel" else None
    if default is not None and (wanted := _digest(path)) and _digest(default) == wanted:
        return ""
    if config.images is None:
        return None
    with contextlib.suppress(OSError):
        size = path.stat().st_size
        entries = sorted(config.images.iterdir(), key=lambda entry: (entry.name != path.name, entry.name))
        alike = [each for each in entries[:_MOST_IMAGES] if each.is_file() and each.stat().st_size == size]
        wanted = _digest(path) if alike else ""
        return next((each.name for each in alike if each.samefile(path) or _digest(each) == wanted), None)
    return None


def _digest(path: Path) -> str:
    """Empty when it cannot be read, or is no file: a pipe or a device would never end."""
    with contextlib.suppress(OSError):
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


def _interfaces(process: Process) -> set[str]:
    said = [judging.settings_of(value, "type") for _, value in judging.options_of(process.arguments)]
    return {each["ifname"] for each in said if each.get("ifname")} | set(process.taps)


def _network_of(config: AgentConfig, interface: str) -> str:
    """Of the bridge that the interface is in; empty: none of this host's networks."""
    with contextlib.suppress(OSError):
        bridge = Path(f"/sys/class/net/{interface}/master").resolve(strict=True).name
        for name, network in config.networks.items():
            if network.bridge == bridge and network.kind is NetworkKind.BRIDGE:
                return name
    return ""


# --- taking it over ---------------------------------------------------------------------------------------------------


async def take(engine: MigrationEngine, files: GuestFiles, inc: str, taken: Adopted) -> Copy:
    """The copy of a guest whose record says STARTING, with the process that it is to be. That is as it was if this
    raises: DroverError with the reason, EngineError, OSError."""
    if not isinstance(engine, AdoptingEngine):
        raise DroverError(
            RefusalReason.FEATURE_NOT_AVAILABLE, f"the engine of {files.config.host} takes over no process"
        )
    found = await examine(engine, files.config, files.spec.name, (taken.pid, taken.qmp), files.spec)
    examined = found.examined
    if found.start_time != taken.start_time:
        said = f"process {taken.pid} is another one than was examined"
        raise DroverError(RefusalReason.NOT_FOUND, said, field="pid")
    if examined.obstacles:
        raise refused(f"{files.spec.name} cannot be taken over", examined.obstacles)
    if examined.spec != replace(files.spec, adopted=None):
        said = f"guest {files.spec.name}: its VMM has changed since it was examined: examine it again"
        raise DroverError(RefusalReason.NOT_ADOPTABLE, said)
    files.make()
    hardware = _noted(files, inc, examined.machine)
    extra = {ADOPTED_QMP: taken.qmp, **found.at_its_end}
    extra |= {NODE_OF + disk: node for disk, node in examined.nodes.items()}
    extra |= {PATH_OF + device: path for device, path in examined.paths.items()}
    if found.variables is not None:
        hardware.theirs = found.variables
        extra[ADOPTED_VARIABLES] = str(found.variables)
    metadata = VmmMetadata(
        files.uuid, inc, taken.pid, taken.start_time, "owner", machine=examined.machine.type, extra=extra
    )
    hardware.disks = named(hardware.disks, metadata)
    try:
        vmm = await engine.take_over(metadata, hardware.into(files.vmm_spec(inc)))
    except BaseException:
        with contextlib.suppress(OSError):
            standing.note_path(files, inc).unlink()
        raise
    return Copy(files, vmm, None, hardware, running=examined.running)


def _noted(files: GuestFiles, inc: str, machine: LiveMachine) -> Hardware:
    """Its machine is noted down before its process is. Raises OSError."""
    note = standing.note_path(files, inc)
    standing.write_note(files, inc, machine)
    return Hardware(machine, standing.disk_files(files.config, files.spec), files=(note,))
