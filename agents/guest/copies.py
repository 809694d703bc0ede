"""One VMM process of a guest with the process that holds its devices and the taps of its network cards: made, adopted
and ended together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from agents.disks.images import DiskError, retire
from agents.disks.local import images_of, local
from agents.engine.base import (
    ADOPTED_QMP,
    ADOPTED_VARIABLES,
    NODE_OF,
    DeviceGone,
    DiskFile,
    EngineError,
    EngineEvent,
    EngineStatus,
    GuestEnded,
    MigrationEngine,
    RunState,
    RunStateChanged,
    StreamTls,
    Vmm,
    VmmDied,
    VmmMetadata,
    VmmSpec,
)
from agents.guest import devices as holding
from agents.guest import duty as keeping
from agents.guest import hardware as standing
from agents.guest.devices import Devices
from agents.guest.files import GuestFiles
from agents.guest.hardware import Hardware
from agents.guest.tpm import Tpm
from agents.nets.taps import NetsError, Taps
from agents.shims.base import DestinationShim, InVmmDevices, ShimError, SourceShim
from agents.shims.companion import DeviceProcess
from orchestrator.core.hardware import has_hardware
from orchestrator.core.liveness import Liveness
from orchestrator.core.records import DiskSpec, LiveMachine

log = structlog.get_logger(__name__)

MIGRATING = frozenset(
    {
        EngineStatus.SETUP,
        EngineStatus.ACTIVE,
        EngineStatus.PARKED,
        EngineStatus.DEVICE,
        EngineStatus.CANCELLING,
        EngineStatus.FAILING,
    }
)


class Copy:
    """A VMM process that is, was or may become the guest. Knows by events whether the vCPUs run."""

    def __init__(
        self,
        files: GuestFiles,
        vmm: Vmm,
        devices: Devices | None,
        hardware: Hardware | None = None,
        *,
        running: bool,
    ) -> None:
        self.files = files
        self.vmm = vmm
        self.devices = devices
        self.hardware = hardware
        """What its machine stands on; None: a guest that asks for no hardware."""
        self.taps = files.taps(vmm.metadata.inc, made=ADOPTED_QMP not in vmm.metadata.extra)
        self.running = running
        self.ended = ""
        """How the guest ended by itself; empty while it did not."""
        self.in_session = False
        self.disks_engaged = False
        """Its VMM may copy local disks, or note what is written to them, for an attempt that is to come."""
        self.asked = bool(hardware and hardware.machine and any(each.leaving for each in hardware.machine.devices))
        """It may have let go of a device that it was asked for."""
        self.removed = False
        """It was destroyed, and nothing of it is left."""
        self.on_change: Callable[[], None] = lambda: None
        vmm.subscribe(self._event)

    @property
    def inc(self) -> str:
        """Names this process among all that the guest ever has."""
        return self.vmm.metadata.inc

    @property
    def incoming(self) -> bool:
        """Made to receive the guest, and not promoted yet."""
        return self.vmm.metadata.role == "incoming"

    @property
    def adopted(self) -> bool:
        """Somebody else started its VMM."""
        return ADOPTED_QMP in self.vmm.metadata.extra

    def _event(self, event: EngineEvent) -> None:
        match event:
            case RunStateChanged(running, _):
                self.running = running
            case GuestEnded(how):
                self.ended = how
            case VmmDied():
                self.running = False
            case DeviceGone():
                self.asked = True
            case _:
                return
        self.on_change()

    def described(self, files: GuestFiles) -> VmmSpec:
        """What its VMM would be started from, with the guest as `files` have it. Raises POOL_NOT_FOUND."""
        spec = _vmm_spec(files, self.inc, self.hardware)
        return replace(spec, disks=named(standing.disk_files(files.config, files.spec), self.vmm.metadata))

    def note_machine(self, machine: LiveMachine) -> None:
        """Its machine is this from now on. Raises OSError."""
        if self.hardware is not None:
            standing.write_note(self.files, self.inc, machine)
            self.hardware.machine = machine
            self.vmm.described(self.described(self.files))

    def respecified(self, files: GuestFiles) -> None:
        """The guest's specification has changed: its disks, or its cards, are others."""
        self.files, self.taps = files, files.taps(self.inc, made=not self.adopted)
        if self.hardware is not None:
            self.hardware.disks = named(standing.disk_files(files.config, files.spec), self.vmm.metadata)
            self.vmm.described(self.described(files))

    @property
    def local_disks(self) -> tuple[DiskFile, ...]:
        """Those whose content travels with the guest."""
        return local(self.hardware.disks) if self.hardware is not None else ()

    async def retire_disks(self) -> None:
        """The guest has gone for good: its local images here get another name at once, and are removed once their
        pool's time of grace is over. Idempotent. Raises OSError.

        This may be tried again after the guest has set out to come back: what is at the place of its image by then is
        that of the copy to come, and is left alone. Nothing waits between the look and the new name.
        """
        images = images_of(self.files.directory)
        try:
            for disk in self.local_disks:
                if not images.is_for_another(disk, self.inc):
                    retire(disk.path, self.inc)
        except DiskError as error:
            raise OSError(str(error)) from error

    def source_shims(self) -> list[SourceShim]:
        """The devices outside the VMM, as the source of an attempt speaks to them."""
        return self.devices.source_shims() if self.devices else []

    def destination_shims(self) -> list[DestinationShim]:
        """The devices outside the VMM, as the destination of an attempt speaks to them."""
        return self.devices.destination_shims() if self.devices else []

    def in_vmm(self) -> InVmmDevices | None:
        """The devices inside the VMM; None when there are none."""
        return self.devices.in_vmm() if self.devices else None

    async def look(self) -> keeping.Copy:
        """What the keeper needs to know, asked from the VMM now. Raises EngineError when it does not answer."""
        metadata = self.vmm.metadata
        seen = keeping.Copy(
            self.inc,
            self.incoming,
            metadata.migration,
            metadata.attempt,
            liveness=self.vmm.liveness(),
            in_session=self.in_session,
            adopted=self.adopted,
        )
        if self.in_session:
            return replace(seen, running=self.running)
        if seen.liveness is not Liveness.ALIVE:
            return seen
        state = await self.vmm.state()
        self.found(state.run_state)
        return replace(
            seen,
            running=self.running,
            ended=bool(self.ended),
            sealed=state.run_state is RunState.SEALED,
            migrating=not self.incoming and state.status in MIGRATING,
        )

    def found(self, run_state: RunState) -> None:
        """What the VMM says of its vCPUs, where no event has told it."""
        self.running = run_state is RunState.RUNNING
        if run_state is RunState.ENDED:
            self.ended = self.ended or "before this agent came"

    @property
    def is_gone(self) -> bool:
        """The VMM has ended for certain."""
        return self.vmm.liveness() is Liveness.GONE

    async def destroy(self) -> None:
        """VMM, devices, hardware and taps are gone and their files removed. Idempotent.

        Raises EngineError, ShimError and OSError when something is left; to be repeated then.
        """
        await self.vmm.destroy()
        if self.devices is not None:
            await self.devices.destroy()
        if self.hardware is not None:
            await self.hardware.remove(kept=None if self.incoming else standing.Kept(self.files.directory))
        await self.taps.remove()
        self.files.drop_marker(self.inc)
        self.removed = True

    async def detach(self) -> None:
        """Leave its processes to a later agent."""
        await self.vmm.detach()
        if self.devices is not None:
            await self.devices.detach()
        if self.hardware is not None:
            self.hardware.detach()


async def _with_devices(devices: Devices | None, starting: Coroutine[Any, Any, Vmm]) -> Vmm:
    """The VMM, once its devices take calls as well: the two start side by side. Nothing is left behind otherwise."""
    if devices is None:
        return await starting
    vmm = asyncio.create_task(starting)
    try:
        await devices.ready()
        return await vmm
    except BaseException:
        vmm.cancel()
        await asyncio.wait({vmm})
        if not vmm.cancelled() and vmm.exception() is None:
            await vmm.result().destroy()
        await devices.destroy()
        raise


@contextlib.asynccontextmanager
async def _plugged(taps: Taps) -> AsyncGenerator[Taps]:
    """Taps that are there before the VMM, which opens them; nothing of them is left when it does not come up."""
    await taps.make()
    try:
        yield taps
    except BaseException:
        with contextlib.suppress(NetsError):  # then the next agent finds them
            await taps.remove()
        raise


@contextlib.asynccontextmanager
async def _on(hardware: Hardware | None) -> AsyncGenerator[None]:
    """Nothing of the hardware is left when its VMM does not come up."""
    try:
        yield
    except BaseException:
        if hardware is not None:
            with contextlib.suppress(EngineError, OSError):
                await hardware.remove()
        raise


async def start(
    engine: MigrationEngine, files: GuestFiles, inc: str, *, had: Sequence[DiskSpec] = (), again: bool = False
) -> Copy:
    """A new guest, running; or one that has run before (`again`), on the disks that it `had`.

    Raises DroverError, EngineError, ShimError and OSError; nothing is left behind then.
    """
    files.make()
    hardware = None
    if has_hardware(files.spec):
        kept = standing.Kept(files.directory) if again else None
        hardware = await standing.born(files, inc, await engine.probe(), had=had, kept=kept)
    async with _on(hardware), _plugged(files.taps(inc)) as taps:
        devices = await holding.launch(files, inc, incoming=False)
        vmm = await _with_devices(devices, engine.start(_vmm_spec(files, inc, hardware)))
    with contextlib.suppress(NetsError):  # whoever controls the bridge may be away: the guest is kept all the same
        await taps.bind()
    return Copy(files, vmm, devices, hardware, running=True)


async def prepare(
    engine: MigrationEngine,
    files: GuestFiles,
    inc: str,
    migration: str,
    attempt: int,
    multifd_channels: int,
    machine: LiveMachine | None = None,
    tls: StreamTls | None = None,
) -> Copy:
    """A paused copy that waits for the stream of one attempt. Raises as `start` does.

    What it writes when it becomes the guest has its room from here on. `machine`: as the guest has it at its source.
    `tls`: what the stream is to come in by.
    """
    files.make()
    files.reserve_marker(inc)
    hardware = await standing.make(files, inc, machine) if machine is not None else None
    async with _on(hardware), _plugged(files.taps(inc)):
        devices = await holding.launch(files, inc, incoming=True)
        spec = replace(_vmm_spec(files, inc, hardware, multifd_channels=multifd_channels), tls=tls)
        vmm = await _with_devices(devices, engine.prepare_incoming(spec, migration, attempt))
    return Copy(files, vmm, devices, hardware, running=False)


def _vmm_spec(files: GuestFiles, inc: str, hardware: Hardware | None, *, multifd_channels: int = 0) -> VmmSpec:
    spec = files.vmm_spec(inc, multifd_channels=multifd_channels)
    return spec if hardware is None else hardware.into(spec)


def named(disks: tuple[DiskFile, ...], metadata: VmmMetadata) -> tuple[DiskFile, ...]:
    """With the nodes that the VMM has for them, where somebody else named those."""
    nodes = metadata.extra
    return tuple(replace(disk, called=nodes.get(NODE_OF + disk.name, disk.called)) for disk in disks)


async def adopt(engine: MigrationEngine, files: GuestFiles, metadata: VmmMetadata) -> Copy | None:
    """The copy of an earlier agent; None when the VMM is gone, and then nothing of it is left.

    Raises EngineError or ShimError when a process lives and does not answer: it is left as it is, to be asked again.
    """
    hardware, taps = standing.adopt(files, metadata.inc), files.taps(metadata.inc)
    if hardware is not None:
        hardware.disks = named(hardware.disks, metadata)
        if (theirs := metadata.extra.get(ADOPTED_VARIABLES)) is not None:
            hardware.theirs = Path(theirs)
    spec = _vmm_spec(files, metadata.inc, hardware)
    devices = await holding.adopt(files, metadata.inc)
    vmm: Vmm | None = None
    try:
        vmm = await engine.adopt(metadata, spec)
        if vmm is not None:
            copy = Copy(files, vmm, devices, hardware, running=False)
            copy.found((await vmm.state()).run_state)
            copy.disks_engaged = bool(copy.local_disks) and not copy.incoming
            return copy
        if devices is not None:
            await devices.destroy()
        if hardware is not None:
            await hardware.remove(kept=None if metadata.role == "incoming" else standing.Kept(files.directory))
        await taps.remove()
    except BaseException:
        for held in filter(None, (vmm, devices)):
            await held.detach()
        raise
    # The note last, as ever: whoever is killed in the middle leaves a successor that knows what to remove.
    left = sorted(files.directory.glob(f"{metadata.inc}.*"), key=lambda path: path.suffixes == [".json"])
    for path in (spec.console_path, files.reserved_marker(metadata.inc), *left):
        await asyncio.to_thread(path.unlink, missing_ok=True)
    return None


async def end_unnoted(files: GuestFiles, known: Collection[str]) -> None:
    """End what earlier agents of this host started for VMMs that they never noted down: device processes and TPMs come
    first, and an agent may be killed in between. `known`: every copy (`inc`) that there is.

    To be called when all notes were read, and before any copy is made. What does not end is left to the next agent: it
    holds nothing that the guest needs. Raises LivenessUnknown.
    """
    left = files.unnoted(known)
    if not left:
        return
    if running := set(await asyncio.to_thread(files.vmms)) - {one.pid for one in files.processes()}:
        said = "a VMM runs and no note names it: what it stands on is left as it is"
        log.error(said, guest=files.spec.name, pid=min(running))
        return
    for inc in sorted(left):
        log.warning("what was started for a VMM that never came to be is ended", guest=files.spec.name, inc=inc)
        try:
            await DeviceProcess.end_left(files.devices_spec(inc))
            await Tpm.adopt(files.directory, inc).end()
            await asyncio.to_thread(files.remove_unnoted, inc)
        except (ShimError, EngineError, OSError) as error:
            log.error("something of a VMM that never came to be is left", guest=files.spec.name, error=str(error))
