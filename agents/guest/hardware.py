"""What a copy's machine stands on at this host: images, firmware, a TPM, the cloud-init disk.

Made before its VMM and removed after it. Only guests that ask for hardware have any of it (`core.hardware`). The
machine is a list of live devices (`machine.py`), which is noted down here, and which the next destination asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from agents.config import AgentConfig
from agents.disks import images
from agents.disks.births import Births
from agents.engine.base import DiskFile, EngineError, FirmwareFiles, VmmSpec
from agents.engine.boot_images import Images
from agents.guest import machine as machines
from agents.guest import seed, tpm_state
from agents.guest.files import GuestFiles
from agents.guest.tpm import Tpm, available, program
from agents.host import pools
from agents.host.commands import CommandFailed
from agents.shims.net import mac_address
from orchestrator.core.compatibility import real_machine
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.hardware import has_hardware
from orchestrator.core.naming import file_error
from orchestrator.core.offers import UNNAMED_CPUS, cpu_difference
from orchestrator.core.records import (
    DiskCache,
    DiskSpec,
    Firmware,
    GuestSpec,
    LiveMachine,
    PoolFence,
    PoolKind,
)
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.whole import write_whole

_IMAGE_S = 60.0
"""For making an image, which is sparse: nothing is written but its tables."""


_NO_FIRMWARE = FirmwareFiles()


@dataclass(frozen=True, slots=True)
class Kept:
    """What a guest leaves on its host besides its disks, for its next start there."""

    directory: Path
    """The guest's own."""

    @property
    def nvram(self) -> Path:
        """Its UEFI variables."""
        return self.directory / "kept.nvram"

    @property
    def tpm(self) -> Path:
        """The state of its TPM."""
        return self.directory / "kept.tpmstate"


@dataclass
class Hardware:
    """Of one copy. Made by `make` or `adopt`."""

    machine: LiveMachine | None
    """None: its note is lost. The copy is kept, and cannot move."""
    disks: tuple[DiskFile, ...] = ()
    firmware: FirmwareFiles = _NO_FIRMWARE
    tpm: Tpm | None = None
    seed_path: Path | None = None
    files: tuple[Path, ...] = field(default_factory=tuple[Path, ...])
    """To be removed with the copy."""
    theirs: Path | None = None
    """UEFI variables of a process that somebody else has started: what is kept of them is a copy."""

    def into(self, spec: VmmSpec) -> VmmSpec:
        """The VMM's description with all of this in it."""
        return replace(
            spec,
            machine=self.machine,
            disks=self.disks,
            firmware=self.firmware,
            tpm_path=self.tpm.socket if self.tpm is not None else None,
            seed_path=self.seed_path,
        )

    async def remove(self, kept: Kept | None = None) -> None:
        """Nothing of it is left but the images of its disks, which are nobody's to remove here. Idempotent. With `kept`
        its firmware's variables and its TPM's state are put aside: to be called once its VMM is gone.

        Raises EngineError and OSError when something is left; to be repeated then.
        """
        if self.tpm is not None:
            await self.tpm.destroy(keep=kept.tpm if kept is not None else None)
        if kept is not None and self.theirs is not None:
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(self.theirs, kept.nvram)
        elif kept is not None and self.firmware.nvram is not None and self.firmware.nvram.exists():
            self.firmware.nvram.replace(kept.nvram)
        for path in self.files:
            path.unlink(missing_ok=True)

    def detach(self) -> None:
        """Leave it to a later agent."""
        if self.tpm is not None:
            self.tpm.detach()


def note_path(files: GuestFiles, inc: str) -> Path:
    """The note of a copy's machine."""
    return files.directory / f"{inc}.machine.json"


def write_note(files: GuestFiles, inc: str, machine: LiveMachine) -> None:
    """Note down a copy's machine, over what was noted before. Raises OSError."""
    write_whole(note_path(files, inc), encode(machine))


async def born(
    files: GuestFiles,
    inc: str,
    probed: Mapping[str, str],
    *,
    had: Sequence[DiskSpec] = (),
    kept: Kept | None = None,
) -> Hardware | None:
    """Of a new guest; images that are to be made are made. None: the guest asks for none.

    `had` and `kept` are those of a guest that has run before: no empty image takes the place of one that it had.

    Raises DroverError with the reason, EngineError and OSError; nothing is left then but images in local pools, which
    are noted (`Births`) and go with the guest's files.
    """
    if not has_hardware(files.spec):
        return None
    config, spec = files.config, files.spec
    hashes = await asyncio.to_thread(pools.firmware_hashes, config)
    bases = await asyncio.to_thread(_bases, config, spec)
    try:
        machine = machines.born(
            spec,
            machines.Facts(
                machine_type=real_machine(spec.machine, _aliases(probed)),
                accelerator=probed["accelerator"],
                firmware_sha256={role: hashes[role] for role in _roles(spec.boot.firmware) if role in hashes},
                mac_of=lambda name: mac_address(files.uuid, name),
                cpu_definitions=pools.cpu_definitions(probed),
                base_sha256={disk.name: bases[disk.pool, disk.base] for disk in spec.disks if disk.base},
            ),
        )
    except machines.MachineError as error:
        raise DroverError(RefusalReason.MACHINE_TYPE_MISMATCH, str(error), field="spec.machine") from error
    made: list[Path] = []
    try:
        for disk in spec.disks:
            again = any((disk.pool, disk.image) == (each.pool, each.image) for each in had)
            if (path := await image(files, inc, disk, again=again)) is not None:
                made.append(path)
        async with _first(files, inc, kept) as begin:
            return await make(files, inc, machine, begin)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink()
        raise


@dataclass(frozen=True, slots=True)
class Begin:
    """What a copy begins with in place of blank variables and a new TPM; both are only read."""

    nvram: Path | None = None
    tpm: Path | None = None


@contextlib.asynccontextmanager
async def _first(files: GuestFiles, inc: str, kept: Kept | None) -> AsyncGenerator[Begin]:
    """What a start begins with: what the guest left here, else what it is to have from elsewhere (`boot.nvram`,
    `tpm.state`). Raises ImageNotFound and FIRMWARE_NOT_AVAILABLE for what is not here, or no such thing."""
    spec, images_here = files.spec, Images(directory=files.config.images)
    nvram = kept.nvram if kept is not None and kept.nvram.exists() else None
    tpm = kept.tpm if kept is not None and kept.tpm.exists() else None
    made: Path | None = None
    if nvram is None and spec.boot.nvram:
        nvram = await asyncio.to_thread(images_here.nvram, spec.boot)
        await asyncio.to_thread(_must_be_variables, files.config, spec, nvram)
    try:
        if tpm is None and spec.tpm is not None and spec.tpm.state:
            given = await asyncio.to_thread(images_here.tpm_state, spec.tpm)
            tpm = made = files.directory / f"{inc}.tpmtaken"
            await tpm_state.taken(program(), given, made)
        yield Begin(nvram, tpm)
    finally:
        if made is not None:
            made.unlink(missing_ok=True)


def _must_be_variables(config: AgentConfig, spec: GuestSpec, nvram: Path) -> None:
    """Blocking. Raises FIRMWARE_NOT_AVAILABLE: the firmware of this host keeps its variables in another size."""
    template = config.firmware.uefi_vars
    there, wanted = nvram.stat().st_size, template.stat().st_size if template is not None else 0
    if template is not None and there != wanted:
        said = f"the variables {spec.boot.nvram} that guest {spec.name} is to begin with have {there} bytes"
        have = f"those of the firmware of {config.host} have {wanted}: they are of another build"
        raise DroverError(RefusalReason.FIRMWARE_NOT_AVAILABLE, f"{said}, and {have}", field="spec.boot.nvram")


async def make(files: GuestFiles, inc: str, machine: LiveMachine, begin: Begin | None = None) -> Hardware:
    """What the machine needs here, for a VMM that is about to be started. Raises as `born` does."""
    config, directory = files.config, files.directory
    note = note_path(files, inc)
    made = Hardware(machine, disk_files(config, files.spec), files=(note,))
    try:
        write_note(files, inc, machine)
        begin = begin or Begin()
        made.firmware = await asyncio.to_thread(firmware_of, config, machine, directory / f"{inc}.nvram", begin.nvram)
        if files.spec.cloud_init is not None:
            made.seed_path = directory / f"{inc}.seed"
            made.seed_path.write_bytes(seed.seed(files.spec.cloud_init, uuid=files.uuid, name=files.spec.name))
        made.files = tuple(filter(None, (made.firmware.nvram, made.seed_path, files.cards_path(inc), note)))
        if files.spec.tpm is not None:
            made.tpm = await Tpm.launch(directory, inc, state=begin.tpm)
    except BaseException:
        with contextlib.suppress(EngineError, OSError):
            await made.remove()
        raise
    return made


def adopt(files: GuestFiles, inc: str) -> Hardware | None:
    """What an earlier agent made. None: the guest has none. Raises EngineError when it cannot be told what lives."""
    if not has_hardware(files.spec):
        return None
    note = note_path(files, inc)
    try:
        machine = decode(LiveMachine, note.read_bytes(), path=str(note))
    except (OSError, BadRecord):
        machine = None
    nvram, seed_path = files.directory / f"{inc}.nvram", files.directory / f"{inc}.seed"
    try:
        disks = disk_files(files.config, files.spec)
    except DroverError:  # a pool that was taken out of the configuration: the VMM has its images open all the same
        disks = ()
    return Hardware(
        machine,
        disks,
        firmware=FirmwareFiles(nvram=nvram) if files.spec.boot.firmware is Firmware.UEFI else FirmwareFiles(),
        tpm=Tpm.adopt(files.directory, inc) if files.spec.tpm is not None else None,
        seed_path=seed_path if files.spec.cloud_init is not None else None,
        files=(nvram, seed_path, files.cards_path(inc), note),
    )


def _aliases(probed: Mapping[str, str]) -> dict[str, str]:
    pairs = (each.partition("=") for each in probed.get("machine_aliases", "").split(",") if each)
    return {alias: name for alias, _, name in pairs}


# --- disks ------------------------------------------------------------------------------------------------------------


def disk_files(config: AgentConfig, spec: GuestSpec) -> tuple[DiskFile, ...]:
    """The disks as this host has them. Raises POOL_NOT_FOUND."""
    return tuple(_disk_file(config, disk) for disk in spec.disks)


def _disk_file(config: AgentConfig, disk: DiskSpec) -> DiskFile:
    pool = config.pools.get(disk.pool)
    if pool is None:
        raise DroverError(
            RefusalReason.POOL_NOT_FOUND, f"{config.host} has no pool {disk.pool}, which disk {disk.name} is in"
        )
    if wrong := file_error(disk.image, f"pool {disk.pool}"):  # what stands between a record and the files of the host
        raise DroverError(RefusalReason.INVALID_ARGUMENT, f"the image of disk {disk.name} {wrong}")
    path, locks = pool.path / disk.image, pool.locks == "required"
    made = DiskFile(disk.name, path, disk.format, disk.cache, disk.read_only, pool.kind, disk.size_bytes, locks)
    made = replace(made, iothread=disk.iothread)
    if not disk.base:
        return made
    if wrong := file_error(disk.base, f"pool {disk.pool}"):
        raise DroverError(RefusalReason.INVALID_ARGUMENT, f"the base of disk {disk.name} {wrong}")
    return replace(made, base=pool.path / disk.base, base_format=disk.base_format)


async def image(files: GuestFiles, inc: str, disk: DiskSpec, *, again: bool) -> Path | None:
    """Make the image unless it is there; its path if it was made in a pool that other hosts have as well. `again`: the
    guest has run on it, so it must be there.

    Raises DISK_NOT_FOUND, and EngineError.
    """
    config = files.config
    file = _disk_file(config, disk)
    if await asyncio.to_thread(file.path.exists):
        if file.base is not None:
            await _must_lie_on(file.path, disk)
        return None
    if again:
        said = f"the image {disk.image} in pool {disk.pool} of {config.host}, on which the guest has run, is not there"
        raise DroverError(RefusalReason.DISK_NOT_FOUND, f"{said}: put it back", field="spec.disks")
    if not disk.size_bytes or file.kind is PoolKind.BLOCK:
        said = f"there is no image {disk.image} in pool {disk.pool} of {config.host}, which disk {disk.name} names"
        hint = "give the disk a size to have one made, or put the image there"
        raise DroverError(RefusalReason.DISK_NOT_FOUND, f"{said}: {hint}", field="spec.disks")
    # Under another name first, and never over one that is there: somebody else may make the same image.
    fresh = file.path.with_name(f".{disk.image}.{inc}.new")
    births = Births(files.directory) if file.kind is PoolKind.LOCAL else None
    try:
        if births is not None:
            births.begins(file.path, fresh)
        await images.make(file, fresh, timeout_s=_IMAGE_S)
        if births is not None:
            births.made(file.path, fresh)
        await asyncio.to_thread(file.path.hardlink_to, fresh)
    except FileExistsError:
        return None
    except (CommandFailed, OSError) as error:
        raise EngineError(f"the image {disk.image} cannot be made in pool {disk.pool}: {error}") from error
    finally:
        await asyncio.to_thread(fresh.unlink, missing_ok=True)  # the pool may be on another machine
    return None if births is not None else file.path


async def _must_lie_on(path: Path, disk: DiskSpec) -> None:
    """An image that was made on another base holds what differs from that one: on this one it would be another disk.

    Raises BASE_NOT_AVAILABLE, and EngineError when the image cannot be read.
    """
    try:
        found = await images.base_of(path)
    except (CommandFailed, ValueError) as error:
        raise EngineError(f"the image {disk.image} of disk {disk.name} cannot be read: {error}") from error
    if found != disk.base:
        said = f"the image {disk.image} of disk {disk.name} lies on {found or 'no other image'}, not on {disk.base}"
        raise DroverError(RefusalReason.BASE_NOT_AVAILABLE, said, field="spec.disks")


# --- firmware ---------------------------------------------------------------------------------------------------------


def _roles(firmware: Firmware) -> tuple[str, ...]:
    """Files of firmware that are part of a machine. The variables a guest begins with are its own from then on."""
    return {Firmware.UEFI: ("uefi_code",), Firmware.BIOS: ("bios",)}.get(firmware, ())


def firmware_of(config: AgentConfig, machine: LiveMachine, nvram: Path, begin: Path | None = None) -> FirmwareFiles:
    """What a machine is started with here; `nvram` is made, as a copy of `begin` or with blank variables. Blocking.

    Raises FIRMWARE_NOT_AVAILABLE where there is no such firmware, and OSError when there is no room for it.
    """
    match machine.firmware:
        case Firmware.UEFI:
            template = config.firmware.uefi_vars
            if template is None or config.firmware.uefi_code is None:
                raise _no_firmware(config, machine)
            # At a destination what is in it comes with the stream; the right size is what counts there.
            shutil.copyfile(begin or template, nvram)
            return FirmwareFiles(uefi_code=config.firmware.uefi_code, nvram=nvram)
        case Firmware.BIOS:
            return FirmwareFiles(bios=config.firmware.bios)
        case _:
            return FirmwareFiles()


def _no_firmware(config: AgentConfig, machine: LiveMachine) -> DroverError:
    said = f"{config.host} has no firmware of kind {machine.firmware.value}: set `firmware` in its configuration"
    return DroverError(RefusalReason.FIRMWARE_NOT_AVAILABLE, said)


# --- what stands against it -------------------------------------------------------------------------------------------


def must_be_possible(config: AgentConfig, spec: GuestSpec, cpu_models: tuple[str, ...]) -> None:
    """Everything that a guest asks of this host's hardware, in one look. Blocking.

    Raises DroverError with the first obstacle: POOL_NOT_FOUND, POOL_NOT_FENCED, CPU_NOT_AVAILABLE,
    FIRMWARE_NOT_AVAILABLE, TPM_NOT_AVAILABLE, EXTRA_ARGS_NOT_ALLOWED.
    """
    host = config.host
    for disk in spec.disks:
        _disk_file(config, disk)
        _pool_must_fit(config, disk)
    _bases(config, spec)
    if spec.cpu.model and cpu_models and spec.cpu.model not in cpu_models:
        said = f"{host} cannot give all of the CPU model {spec.cpu.model} that guest {spec.name} is to see"
        raise DroverError(RefusalReason.CPU_NOT_AVAILABLE, said)
    if spec.boot.firmware is Firmware.UEFI and "uefi_code" not in pools.firmware_hashes(config):
        said = f"{host} has no UEFI firmware: set `firmware` in its configuration to files that are there"
        raise DroverError(RefusalReason.FIRMWARE_NOT_AVAILABLE, said)
    if spec.tpm is not None and not available():
        raise DroverError(RefusalReason.TPM_NOT_AVAILABLE, f"{host} has no program that emulates a TPM (swtpm)")
    for argument in spec.extra_args:
        if argument not in config.extra_args_allowed:
            said = f"{host} does not allow {argument!r}: `extra_args_allowed` in its configuration says what it does"
            raise DroverError(RefusalReason.EXTRA_ARGS_NOT_ALLOWED, said)


def _pool_must_fit(config: AgentConfig, disk: DiskSpec) -> None:
    pool = config.pools[disk.pool]
    shared = pool.kind is not PoolKind.LOCAL
    if pool.kind is PoolKind.BLOCK and pool.fence is PoolFence.NONE and pool.locks == "required" and not disk.read_only:
        said = f"nothing keeps a second host from writing to volumes of pool {disk.pool} of {config.host}"
        hint = "declare its `fence` (pr, lvmlockd), or accept that with `locks: none`"
        raise DroverError(RefusalReason.POOL_NOT_FENCED, f"{said}: {hint}")
    if shared and disk.cache is not DiskCache.NONE and not disk.read_only:
        said = f"disk {disk.name} is in the shared pool {disk.pool}, and must have cache: none"
        raise DroverError(RefusalReason.INVALID_ARGUMENT, said, field="spec.disks")


def _bases(config: AgentConfig, spec: GuestSpec) -> dict[tuple[str, str], str]:
    """Content of the images that the guest's disks lie on, by pool and name. Blocking. Raises BASE_NOT_AVAILABLE."""
    known = pools.bases(config)
    found: dict[tuple[str, str], str] = {}
    for disk in spec.disks:
        if not disk.base:
            continue
        digest = known.get(disk.pool, {}).get(disk.base, "")
        if not digest:
            said = f"pool {disk.pool} of {config.host} has no base {disk.base}, which disk {disk.name} lies on"
            hint = "put it there and name it in the pool's `bases`; if that is done, its content is still being read"
            raise DroverError(RefusalReason.BASE_NOT_AVAILABLE, f"{said}: {hint}")
        found[disk.pool, disk.base] = digest
    return found


def must_agree(
    config: AgentConfig, spec: GuestSpec, machine: LiveMachine, cpus: Mapping[str, str] | None = None
) -> None:
    """The machine as it is at its source can be built here. `cpus`: what `host` and its like are here. Blocking.

    Raises CPU_NOT_AVAILABLE, FIRMWARE_NOT_AVAILABLE, and BASE_NOT_AVAILABLE.
    """
    name = spec.name
    model = machine.cpu.partition(",")[0]
    if model in UNNAMED_CPUS and (said := cpu_difference((cpus or {}).get(model, ""), machine.cpu_definition)):
        told = f"guest {name} was born with the CPU {model} of its host, and that of {config.host} is another one"
        raise DroverError(RefusalReason.CPU_NOT_AVAILABLE, f"{told} ({said})")
    here_bases = _bases(config, spec)
    for disk in spec.disks:
        born_on, found = machine.base_sha256.get(disk.name, ""), here_bases.get((disk.pool, disk.base), "")
        if born_on != found:
            said = f"disk {disk.name} of guest {name} lies on {disk.base} with content {born_on[:12]}"
            have = f"in pool {disk.pool} of {config.host} it has {found[:12]}"
            raise DroverError(RefusalReason.BASE_NOT_AVAILABLE, f"{said}, and {have}: put the same file there")
    here = pools.firmware_hashes(config)
    for role, digest in machine.firmware_sha256.items():
        if here.get(role) != digest:
            have = f"another build ({here[role][:12]})" if role in here else "none"
            said = f"guest {name} was started with {role} {digest[:12]}, and {config.host} has {have}"
            raise DroverError(RefusalReason.FIRMWARE_NOT_AVAILABLE, f"{said}: install the same on both")
