"""All devices of one copy of a guest that live outside its VMM or are emulated for it, whoever holds them.

The VMM's own device process (companions, devices inside the VMM) and the programs of the host (external devices) are
one thing to the rest of the agent.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from agents.guest.files import GuestFiles
from agents.shims.base import DestinationShim, InVmmDevices, OptionsRefused, ShimError, SourceShim
from agents.shims.companion import DeviceProcess
from agents.shims.external import ExternalDevices
from orchestrator.core.errors import DroverError, invalid
from orchestrator.core.liveness import Liveness
from orchestrator.core.records import GuestSpec


@dataclass
class Devices:
    """Of one copy. Made by `launch` or `adopt`."""

    order: tuple[str, ...]
    """Names, as the guest's specification has them."""
    process: DeviceProcess | None
    external: ExternalDevices | None

    @property
    def pid(self) -> int:
        """Of the VMM's device process; 0: it has none."""
        return self.process.pid if self.process else 0

    def liveness(self) -> Liveness:
        """Of the VMM's device process; the programs of the host are not the copy's."""
        return self.process.liveness() if self.process else Liveness.GONE

    def source_shims(self) -> list[SourceShim]:
        """In the order of the specification. For one attempt."""
        found = self.external.source_shims() if self.external else {}
        found |= {shim.device: shim for shim in self.process.source_shims()} if self.process else {}
        return [found[name] for name in self.order]

    def destination_shims(self) -> list[DestinationShim]:
        """In the order of the specification. For one attempt."""
        found = self.external.destination_shims() if self.external else {}
        found |= {shim.device: shim for shim in self.process.destination_shims()} if self.process else {}
        return [found[name] for name in self.order]

    def in_vmm(self) -> InVmmDevices | None:
        """The devices inside the VMM; None when there are none."""
        return self.process.in_vmm() if self.process else None

    async def ready(self) -> None:
        """They take calls. Raises ShimError; nothing of them is left then."""
        if self.process is not None:
            try:
                await self.process.ready()
            except BaseException:
                await self.destroy()
                raise

    async def instruct(self, device: str, instruction: str) -> str:
        """What the device's program says to it: see `ShimClient.instruct`. Raises ShimError."""
        if self.external is not None and device in self.external.source_shims():
            return await self.external.instruct(device, instruction)
        if self.process is None:
            raise ShimError(f"there is no device {device!r} here")
        return await self.process.instruct(device, instruction)

    async def destroy(self) -> None:
        """They are gone, with their files. Idempotent."""
        if self.process is not None:
            await self.process.destroy()
        if self.external is not None:
            await self.external.destroy()

    async def detach(self) -> None:
        """Leave them to a later agent."""
        for held in filter(None, (self.process, self.external)):
            await held.detach()


def options_refused(error: OptionsRefused, spec: GuestSpec) -> DroverError:
    """INVALID_ARGUMENT for the options that a device's program did not take, each with its field of the request."""
    numbers = {device.name: number for number, device in enumerate(spec.devices)}
    return invalid(
        [
            (".".join(filter(None, (f"spec.devices[{numbers.get(one.device, 0)}].options", one.option))), str(one))
            for one in error.wrong
        ]
    )


async def launch(files: GuestFiles, inc: str, *, incoming: bool) -> Devices | None:
    """Devices that the VMM can connect to; they take calls once they are `ready`. None: the guest has none.

    Raises ShimError; nothing is left then.
    """
    external = _external(files, inc)
    if external is not None:
        await external.attach(incoming=incoming)
    try:
        process = await DeviceProcess.launch(files.devices_spec(inc), incoming=incoming) if files.has_process else None
    except BaseException:
        if external is not None:
            await external.destroy()
        raise
    return _of(files, process, external)


async def adopt(files: GuestFiles, inc: str) -> Devices | None:
    """What an earlier agent made. None: the guest has none, or they are gone. Raises ShimError: no answer."""
    process = await DeviceProcess.adopt(files.devices_spec(inc)) if files.has_process else None
    external: ExternalDevices | None = None
    with contextlib.suppress(ShimError):  # a program that was taken out of the configuration serves no device any more
        external = _external(files, inc)
    return _of(files, process, external)


def _external(files: GuestFiles, inc: str) -> ExternalDevices | None:
    if not files.externals:
        return None
    return ExternalDevices(files.uuid, inc, files.externals, files.config.shims)


def _of(files: GuestFiles, process: DeviceProcess | None, external: ExternalDevices | None) -> Devices | None:
    if process is None and external is None:
        return None
    held = [*(files.companions if process else ()), *(files.externals if external else ())]
    order = tuple(device.name for device in files.outside if device in held)
    return Devices(order, process, external)
