"""What is added to a QEMU that runs, and taken away: first what stands behind a device, then the device.

The device itself is said word for word as `arguments.py` says it on a command line, so that the other end of a
migration builds the same one. A guest lets go of a device when its system has, which may be never: an event tells it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from agents.engine import base
from agents.engine.base import EngineError, EngineTimeout
from agents.engine.image_locks import locked
from agents.engine.qemu import arguments
from agents.engine.qemu.arguments import Json
from orchestrator.core.records import LiveDevice, NicSpec

Execute = Callable[..., Awaitable[Any]]
_ADD_S = 8.0
"""To open an image, or to take memory."""
_PERIPHERAL = "/machine/peripheral"


class QemuPlugs:
    """The devices of one VMM that have a name. `execute` is QMP's main connection."""

    def __init__(self, execute: Execute, emit: base.EventSink) -> None:
        self._execute = execute
        self._emit = emit
        self._awaited: dict[str, asyncio.Future[bool]] = {}
        """Id -> whether the guest has let go of it, for devices that somebody waits for."""

    async def devices(self) -> Mapping[str, str]:
        """Id -> driver of what is there now."""
        entries = await self._execute("qom-list", {"path": _PERIPHERAL})
        kinds = {str(each["name"]): str(each["type"]) for each in entries}
        return {name: kind.removeprefix("child<").removesuffix(">") for name, kind in kinds.items() if "<" in kind}

    async def attach(self, device: LiveDevice, spec: base.VmmSpec) -> LiveDevice:
        """See `base.Vmm.attach`."""
        await self.drop(device)
        try:
            for command, named in _behind(device, spec):
                await self._execute(command, named, timeout_s=_ADD_S)
            await self._execute("device_add", _added(device), timeout_s=_ADD_S)
        except EngineTimeout:
            raise
        except EngineError as error:
            with contextlib.suppress(EngineError):
                await self.drop(device)
            raise locked(error) or error from error
        return await self.as_it_is(device)

    async def as_it_is(self, device: LiveDevice) -> LiveDevice:
        """With the address of a module of memory, which QEMU chooses by its slots and sizes."""
        if not device.memory_mib:
            return device
        modules = (each["data"] for each in await self._execute("query-memory-devices"))
        address = next((each["addr"] for each in modules if each.get("id") == device.id), None)
        if address is None:
            raise EngineError(f"module {device.id} is not among the guest's memory")
        return replace(device, address=hex(address))

    async def detach(self, device: LiveDevice, timeout_s: float) -> bool:
        """See `base.Vmm.let_go`."""
        awaited: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._awaited[device.id] = awaited
        try:
            if device.id in await self.devices():
                await self._asked(device)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout_s):
                        await awaited
            if device.id in await self.devices():
                return False
        finally:
            self._awaited.pop(device.id, None)
        await self.drop(device)
        return True

    async def _asked(self, device: LiveDevice) -> None:
        try:
            await self._execute("device_del", {"id": device.id})
        except EngineTimeout:
            raise
        except EngineError as error:
            if "in the process of unplug" not in str(error):  # asked before, and the guest takes its time
                raise

    async def drop(self, device: LiveDevice) -> None:
        """Nothing stands behind it any more; the device is not there. Idempotent. Raises EngineError."""
        kind, _, name = device.backend.partition(":")
        match kind:
            case "disk":
                known = await self._execute("query-named-block-nodes", {"flat": True})
                nodes = {str(node["node-name"]) for node in known}
                for node in (f"disk-{name}", f"disk-{name}-file"):
                    if node in nodes:
                        await self._execute("blockdev-del", {"node-name": node})
            case "nic":
                await self._unless_missing("netdev_del", f"nic-{name}")
            case "memory":
                await self._unless_missing("object-del", arguments.memory_of(device))
            case _:
                return

    async def _unless_missing(self, command: str, name: str) -> None:
        try:
            await self._execute(command, {"id": name})
        except EngineTimeout:
            raise
        except EngineError as error:
            if "not found" not in str(error):
                raise

    def on_event(self, name: str, data: Mapping[str, Any]) -> None:
        """DEVICE_DELETED, or what says that a guest will not let go."""
        device = str(data.get("device", ""))
        if not device:
            return  # of the devices inside a device
        awaited = self._awaited.get(device)
        gone = name == "DEVICE_DELETED"
        if awaited is not None and not awaited.done():
            awaited.set_result(gone)
        elif gone:
            self._emit(base.DeviceGone(device))


def _behind(device: LiveDevice, spec: base.VmmSpec) -> list[tuple[str, Json]]:
    """Commands that make what stands behind a device, in their order."""
    kind, _, name = device.backend.partition(":")
    match kind:
        case "disk":
            disk = next(disk for disk in spec.disks if disk.name == name)
            return [("blockdev-add", node) for node in arguments.disk_nodes(disk)]
        case "nic":
            nic = next(nic for nic in spec.spec.nics if nic.name == name)
            ifname = next((tap.ifname for tap in spec.taps if tap.nic == name), "")
            return [("netdev_add", _netdev(nic, ifname))]
        case "memory":
            size: Json = {"qom-type": "memory-backend-ram", "id": arguments.memory_of(device)}
            return [("object-add", {**size, "size": device.memory_mib << 20})]
        case _:
            return []


def _netdev(nic: NicSpec, ifname: str) -> Json:
    if not ifname:
        return {"type": "hubport", "id": f"nic-{nic.name}", "hubid": 0}
    tap: Json = {"type": "tap", "id": f"nic-{nic.name}", "ifname": ifname, "script": "no", "downscript": "no"}
    return {**tap, "queues": nic.queues} if nic.queues > 1 else tap


def _added(device: LiveDevice) -> Json:
    """Of `device_add`, whose values have types since QEMU 9.2."""
    return {name: _typed(value) for name, value in arguments.options_of(device).items()}


def _typed(value: str) -> object:
    if value in ("on", "off"):
        return value == "on"
    return int(value) if value.isdecimal() else value
