"""Devices held by other programs on this host, which serve all of its guests: the way in for any vendor's device.

Which program serves which driver is the agent's configuration (`shims`: name -> unix socket). They speak the shim
protocol (protos/drover/v1/shim.proto, docs/shims.md), outlive agent and VMMs, and are started and ended by the host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from pathlib import Path

import structlog

from agents.shims.base import DestinationShim, OptionsRefused, Refusal, ShimError, SourceShim, WrongOption
from agents.shims.client import RemoteDestination, RemoteSource, ShimClient
from orchestrator.core.liveness import Liveness
from orchestrator.core.records import DeviceSpec

log = structlog.get_logger(__name__)

_DETACH_S = 2.0
"""How long calls are repeated while the program does not answer."""


class ExternalDevices:
    """The devices of one copy of a guest that programs of this host hold."""

    def __init__(self, guest: str, inc: str, devices: tuple[DeviceSpec, ...], sockets: Mapping[str, Path]) -> None:
        """Raises ShimError when this host has no program for one of them."""
        missing = sorted({device.driver for device in devices} - set(sockets))
        if missing:
            names = ", ".join(missing)
            raise ShimError(f"no program on this host serves {names}: see `shims` in its agent's configuration")
        self._devices = devices
        drivers = sorted({device.driver for device in devices})
        self._clients = {driver: ShimClient(sockets[driver], guest, inc, _may_come_back) for driver in drivers}

    async def attach(self, *, incoming: bool) -> None:
        """Each program has its devices, newborn or waiting for a load. Raises ShimError; none has them then."""
        try:
            for device in self._devices:
                await self._attach(device, incoming=incoming)
        except BaseException:
            await self.destroy()
            raise

    async def _attach(self, device: DeviceSpec, *, incoming: bool) -> None:
        try:
            await self._clients[device.driver].attach(device.name, device.options, incoming=incoming)
        except ShimError as error:
            if error.refusal is Refusal.WRONG:
                raise OptionsRefused([WrongOption(device.name, "", str(error))]) from error
            raise

    def source_shims(self) -> dict[str, SourceShim]:
        """By device. For one attempt."""
        return {one.name: RemoteSource(one.name, self._clients[one.driver]) for one in self._devices}

    def destination_shims(self) -> dict[str, DestinationShim]:
        """By device. For one attempt."""
        return {one.name: RemoteDestination(one.name, self._clients[one.driver]) for one in self._devices}

    async def instruct(self, device: str, instruction: str) -> str:
        """See `ShimClient.instruct`."""
        driver = next(one.driver for one in self._devices if one.name == device)
        return await self._clients[driver].instruct(device, instruction)

    async def destroy(self) -> None:
        """No program holds anything of this copy. Idempotent.

        A program that does not answer is left to `forget_strays` of the next agent: the copy is dead weight there.
        """
        await asyncio.gather(*(self._detach(device) for device in self._devices))
        await self.detach()

    async def _detach(self, device: DeviceSpec) -> None:
        try:
            await self._clients[device.driver].detach(device.name, _DETACH_S)
        except ShimError as error:
            said = "a device's program keeps a copy that is gone"
            log.warning(said, device=device.name, shim=device.driver, error=str(error))

    async def detach(self) -> None:
        """Let go of the programs and leave the devices as they are, for a later agent."""
        await asyncio.gather(*(client.close() for client in self._clients.values()))


def _may_come_back() -> Liveness:
    """A program of the host is restarted by the host: calls go on trying until their time is up."""
    return Liveness.ALIVE


async def forget_strays(sockets: Mapping[str, Path], known: Collection[tuple[str, str]]) -> None:
    """Detach what programs hold for copies that this host does not know: (guest, inc) not in `known`.

    Only before anything is prepared here: a copy is attached before it is noted down.
    """
    for driver, path in sockets.items():
        client = ShimClient(path, "", "", _may_come_back)
        try:
            held = (await client.describe_all()).devices
            for one in held:
                if (one.tag.guest_uuid, one.tag.inc) not in known:
                    log.info("a device of no copy is detached", shim=driver, guest=one.tag.guest_uuid, inc=one.tag.inc)
                    stray = ShimClient(path, one.tag.guest_uuid, one.tag.inc, _may_come_back)
                    try:
                        await stray.detach(one.tag.device, _DETACH_S)
                    finally:
                        await stray.close()
        except ShimError as error:
            log.warning("a device program does not answer", shim=driver, socket=str(path), error=str(error))
        finally:
            await client.close()
