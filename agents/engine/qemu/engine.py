"""QEMUs of one host: which QEMU it is, and how its processes are started, found again and taken over."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from agents.engine import base
from agents.engine.base import EngineError, VmmMetadata
from agents.engine.boot_images import Images
from agents.engine.qemu import foreign, process
from agents.engine.qemu.features import Features, read_features
from agents.engine.qemu.vmm import QemuVmm
from agents.host import processes
from orchestrator.core.liveness import Liveness, LivenessUnknown

log = structlog.get_logger(__name__)

_AGAINST_MEMORY = (
    "under tcg, QEMU does not notice all that a guest writes to added memory while it moves, and ends by an assertion"
)
"""physmem: cpu_physical_memory_sync_dirty_bitmap resets TLB entries by the offset in a block, where the address of the
block's start has to be added. For a second block these are entries of the first, or the range leaves the first one:
`tlb_reset_dirty_range_all: Assertion block == qemu_get_ram_block(end - 1)`. KVM keeps its own account."""


class QemuEngine(base.MigrationEngine, base.AdoptingEngine):
    """`image` is the kernel of guests that name none, `images` the directory of those that guests may name,
    `accelerator` tcg or kvm, `vfio_preload` what gives QEMU devices without VFIO.
    """

    def __init__(
        self,
        image: Path | None,
        binary: str = "qemu-system-x86_64",
        accelerator: str = "tcg",
        vfio_preload: Path | None = None,
        *,
        images: Path | None = None,
    ) -> None:
        self._images = Images(image, images)
        self._binary = binary
        self._accelerator = accelerator
        self._vfio_preload = vfio_preload
        self._features: Features | None = None
        self._probing = asyncio.Lock()

    async def probe(self) -> dict[str, str]:
        features = await self._known()
        return {
            "version": features.version,
            "machine_types": ",".join(features.machine_types),
            "machine_aliases": ",".join(f"{alias}={name}" for alias, name in features.machine_aliases.items()),
            "switchover_ack": features.switchover_ack,
            "devices_inside": "yes" if features.devices_inside else "",
            "accelerator": self._accelerator,
            "against_memory": _AGAINST_MEMORY if self._accelerator == "tcg" else "",
            "cpu_models": ",".join(features.cpu_models),
            "cpu_definitions": json.dumps(dict(features.cpu_definitions)),
        }

    async def start(self, spec: base.VmmSpec) -> QemuVmm:
        vmm = await self._spawn(spec, "owner", "", 0)
        await _or_destroyed(vmm, vmm.connect())
        await _or_destroyed(vmm, vmm.note_machine())
        return await _or_destroyed(vmm, vmm.resume())

    async def prepare_incoming(self, spec: base.VmmSpec, migration: str, attempt: int) -> QemuVmm:
        vmm = await self._spawn(spec, "incoming", migration, attempt)
        await _or_destroyed(vmm, vmm.connect())
        await _or_destroyed(vmm, vmm.note_machine())
        return await _or_destroyed(vmm, vmm.listen(spec.listen_address, spec.multifd_channels, spec.tls))

    async def adopt(self, metadata: VmmMetadata, spec: base.VmmSpec) -> QemuVmm | None:
        features = await self._known()
        try:
            watched = processes.Watched.find(metadata.pid, metadata.start_time)
        except LivenessUnknown as error:
            raise EngineError(f"VMM of {spec.spec.name}: {error}") from error
        if watched is None:
            return None
        vmm = QemuVmm(metadata, spec, watched, features)
        try:
            await vmm.connect(4.0)
        except BaseException as error:
            gone = vmm.liveness() is Liveness.GONE
            await vmm.detach()
            if gone and isinstance(error, EngineError):
                return None
            raise
        with contextlib.suppress(EngineError):
            if base.ADOPTED_QMP in metadata.extra:
                await vmm.learn()
            await vmm.set_capabilities({"events": True})
            await vmm.disks.known()
        return vmm

    async def look_at(self, pid: int, monitor: Path) -> Mapping[str, Any]:
        return await foreign.look_at(pid, monitor)

    async def try_out(self, spec: base.VmmSpec) -> Mapping[str, Any]:
        features = await self._known()
        launch = process.Launch(self._binary, self._images, self._accelerator, features.reconnect_ms)
        return await foreign.tried_out(process.command_line(launch, spec, incoming=True), spec)

    async def take_over(self, metadata: VmmMetadata, spec: base.VmmSpec) -> QemuVmm:
        watched = processes.Watched.find(metadata.pid, metadata.start_time)
        if watched is None:
            raise EngineError(f"process {metadata.pid} has ended")
        vmm = QemuVmm(metadata, spec, watched, await self._known())
        try:
            await vmm.connect(4.0)
            await vmm.learn()
            await vmm.set_capabilities({"events": True})
            await vmm.survive_its_guest()
            process.write_metadata(process.metadata_path(spec), metadata)
        except BaseException as error:
            with contextlib.suppress(OSError):
                try:
                    await vmm.hand_back()
                except EngineError:
                    await vmm.detach()
            if isinstance(error, OSError):
                raise EngineError(f"cannot note down the VMM of {spec.spec.name}: {error}") from error
            raise
        return vmm

    async def let_go(self, vmm: base.Vmm) -> None:
        if isinstance(vmm, QemuVmm):
            await vmm.hand_back()

    async def _spawn(self, spec: base.VmmSpec, role: str, migration: str, attempt: int) -> QemuVmm:
        features = await self._known()
        launch = process.Launch(
            self._binary, self._images, self._accelerator, features.reconnect_ms, self._vfio_preload
        )
        command = process.command_line(launch, spec, incoming=role == "incoming")
        environment = process.environment(launch, spec)
        child = await processes.spawned(
            lambda: process.popen_gated(command, process.log_path(spec), environment, spec.guest)
        )
        try:
            watched, start_time = await processes.Watched.adopt_child(child)
        except LivenessUnknown as error:
            raise EngineError(f"the VMM of {spec.spec.name} cannot be watched, and was ended: {error}") from error
        metadata = VmmMetadata(spec.guest, spec.inc, child.pid, start_time, role, migration, attempt)
        vmm = QemuVmm(metadata, spec, watched, features)
        try:
            process.write_metadata(process.metadata_path(spec), metadata)
            processes.let_in(child)
        except OSError as error:
            await vmm.destroy()  # a VMM without a note would be nobody's
            raise EngineError(f"cannot note down the VMM of {spec.spec.name}: {error}") from error
        return vmm

    async def _known(self) -> Features:
        async with self._probing:
            if self._features is None:
                self._features = await self._probed()
            return self._features

    async def _probed(self) -> Features:
        """A QEMU that ended under its probe is asked once more: a host that cannot probe it takes no guest at all."""
        try:
            return await read_features(self._binary, self._accelerator)
        except EngineError as error:
            log.warning("a probe of QEMU failed, trying again", binary=self._binary, error=str(error))
            return await read_features(self._binary, self._accelerator)


async def _or_destroyed(vmm: QemuVmm, step: Any) -> QemuVmm:
    """No process is left behind by a failed start."""
    try:
        await step
    except BaseException as error:
        await vmm.destroy()
        if isinstance(error, OSError):
            raise EngineError(f"the VMM was started and ended, since it could not be noted down: {error}") from error
        raise
    return vmm
