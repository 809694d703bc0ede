"""Pairs of real QEMU 11.1 with emulated VFIO devices, made as fast as that goes: the oracle needs hundreds.

Engine, command line, preload and device model are the product's own. Only the devices' process is left out: they live
in this one, which spares two Python start-ups a run and shows every single call, in order. (`tests/fakes/vfio_rig.py`
is the rig for tests of the product's own parts; it has device processes, heartbeats and all.)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agents.engine.base import (
    EngineError,
    EngineEvent,
    EngineStatus,
    RunState,
    StatusChanged,
    SwitchoverAckLate,
    VmmSpec,
    VmmState,
)
from agents.engine.qemu import process
from agents.engine.qemu.engine import QemuEngine
from agents.engine.qemu.vmm import QemuVmm
from deploy.lab.devices.device import Device, DeviceIdentity, DeviceSizes
from deploy.lab.devices.qemu_acks import RETURN_PATH, SWITCHOVER_ACK
from deploy.lab.devices.scenario import Scenario
from deploy.lab.devices.vfio.endpoint import Endpoint, Entry, features_of
from deploy.lab.devices.vfio.server import VfioServer
from deploy.lab.workload import Workload, boot_of
from orchestrator.core.records import DeviceSpec, GuestSpec, ShimKind
from orchestrator.core.switchover import AckMode
from tests.contract.test_engine import image
from tests.fakes import vfio_rig
from tests.oracle.trace import DESTINATION_TRACES, SOURCE_TRACES

LINK = 1 << 30
OPEN = {"downtime-limit": 300, "avail-switchover-bandwidth": LINK, "max-bandwidth": LINK}
"""The switchover waits for the gate and for nothing else."""
HELD = OPEN | {"downtime-limit": 1, "avail-switchover-bandwidth": 1 << 20}
"""A kibibyte may be left: what only stop-copy can carry holds it."""
OVER = (EngineStatus.COMPLETED, EngineStatus.FAILED, EngineStatus.CANCELLED)
IN_VAIN_S = 0.6
"""Longer than a slow ACK of the plans takes. QEMU writes tens of MB of log meanwhile."""
_TAIL_BYTES, _IN_VAIN_BYTES = 1 << 16, 1 << 20
"""Of the log: what is looked at at a time, and how much there is of the same; 1000 estimates and more."""
_BUFFER = 1 << 20
_LEGACY = "migration.switchover-ack-legacy=on"


@dataclass
class End:
    """One QEMU and its devices."""

    vmm: QemuVmm
    devices: dict[str, Device]
    log: list[Entry]
    """Every question to every device with its answer, in order."""
    directory: Path
    statuses: list[EngineStatus] = field(default_factory=list[EngineStatus])
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, event: EngineEvent) -> None:
        if isinstance(event, StatusChanged):
            self.statuses.append(event.status)
        elif isinstance(event, SwitchoverAckLate):
            self.statuses.append(EngineStatus.FAILED)
        self._changed.set()

    async def reached(self, *statuses: EngineStatus, timeout_s: float = 30.0) -> EngineStatus:
        """The migration has come to one of these."""
        async with asyncio.timeout(timeout_s):
            while True:
                self._changed.clear()
                for status in statuses:
                    if status in self.statuses:
                        return status
                await self._changed.wait()

    async def qmp(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        return await self.vmm._execute(command, arguments or {})

    def output(self) -> str:
        return process.log_path(self.vmm._spec).read_text(errors="replace")

    async def said(self, text: str, times: int = 1, timeout_s: float = 20.0) -> None:
        """QEMU wrote this so many times."""
        async with asyncio.timeout(timeout_s):
            while self.output().count(text) < times:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def asks_in_vain(self) -> None:
        """Ends when QEMU has made nothing but the same estimate for a while, over and over."""
        first, since, size, now = "", 0.0, 0, 0
        while not first or time.monotonic() - since < IN_VAIN_S or now - size < _IN_VAIN_BYTES:
            await asyncio.sleep(0.02)
            estimate, now = self._only_estimate()
            if not estimate or estimate != first:
                first, since, size = estimate, time.monotonic(), now

    def _only_estimate(self) -> tuple[str, int]:
        """The estimate, if the end of the log has this one and no other query, and how long the log is."""
        with process.log_path(self.vmm._spec).open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - _TAIL_BYTES))
            lines = log.read(_TAIL_BYTES).decode(errors="replace").split("\n")[1:-1]
        queries = [line for line in lines if line.startswith("qemu_savevm_query_pending exact=")]
        same = size >= _TAIL_BYTES and len(set(queries)) == 1 and "exact=0" in queries[0]
        return (queries[0] if same else ""), size

    async def settled(self, timeout_s: float = 10.0) -> VmmState:
        """After the end: the vCPUs are where they stay."""
        async with asyncio.timeout(timeout_s):
            while True:
                with contextlib.suppress(EngineError):
                    now = await self.vmm.state()
                    if now.status in OVER and now.run_state is not RunState.FINISHING:
                        return now
                await asyncio.sleep(0.002)


@dataclass
class Pair:
    source: End
    destination: End
    _more: Callable[[], Awaitable[End]]

    async def new_destination(self) -> End:
        """A fresh one; it is `destination` from now on."""
        self.destination = await self._more()
        return self.destination


class Lab:
    """Engines are probed once. One event loop for its whole life."""

    def __init__(self, binary: str) -> None:
        self._binary = binary
        self._directory = Path(tempfile.mkdtemp(prefix="do-"))
        self._preload = vfio_rig.preload()
        self._engines: dict[tuple[bool, bool], QemuEngine] = {}
        self._numbers = itertools.count(1)

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _engine(self, *, legacy: bool, source: bool) -> QemuEngine:
        known = self._engines.get((legacy, source))
        if known is not None:
            return known
        words = ["-global", _LEGACY] if legacy else []
        words += [word for name in (SOURCE_TRACES if source else DESTINATION_TRACES) for word in ("-trace", name)]
        wrapper = self._directory / f"{'legacy' if legacy else 'new'}-{'source' if source else 'destination'}"
        wrapper.write_text(f'#!/bin/sh\nexec {self._binary} "$@" {" ".join(words)}\n')
        wrapper.chmod(0o755)
        made = QemuEngine(image(), str(wrapper), vfio_preload=self._preload)
        self._engines[legacy, source] = made
        return made

    @asynccontextmanager
    async def pair(
        self, scenarios: Sequence[Scenario], mode: AckMode, legacy: tuple[bool, bool] | None = None
    ) -> AsyncIterator[Pair]:
        """A running guest, its capabilities set, and a destination that listens. The devices are d0, d1, ...

        `legacy`: whether source and destination have a machine type with legacy ACKs; by default as `mode` says.
        """
        directory = self._directory / str(next(self._numbers))
        directory.mkdir()
        old = legacy or (mode is AckMode.LEGACY,) * 2
        ends: list[End] = []
        servers: list[_DeviceServer] = []

        async def more() -> End:
            inc = f"d{len(ends)}" if ends else "s"
            engine = self._engine(legacy=old[bool(ends)], source=not ends)
            ends.append(await self._end(engine, directory, scenarios, servers, inc))
            return ends[-1]

        try:
            pair = Pair(await more(), await more(), more)
            wanted = {"events": True, RETURN_PATH: True, SWITCHOVER_ACK: mode is not AckMode.OFF}
            await pair.source.vmm.set_capabilities(wanted)
            yield pair
        finally:
            await asyncio.gather(*(end.vmm.destroy() for end in ends))
            await asyncio.gather(*(server.end() for server in servers))
            if "DROVER_KEEP" not in os.environ:
                shutil.rmtree(directory, ignore_errors=True)

    async def _end(
        self,
        engine: QemuEngine,
        directory: Path,
        scenarios: Sequence[Scenario],
        servers: list[_DeviceServer],
        inc: str,
    ) -> End:
        incoming = inc != "s"
        log: list[Entry] = []
        devices = {f"d{index}": _device(index, scenario, incoming=incoming) for index, scenario in enumerate(scenarios)}
        path = directory / f"{inc}.vfio"
        servers.append(_DeviceServer([Endpoint(device, log.append) for device in devices.values()]))
        await servers[-1].listen(path)
        specs = tuple(DeviceSpec(name, ShimKind.VFIO, "none") for name in devices)
        guest = GuestSpec("g", 32, 1, "pc", boot_of(Workload(dirty_mib=1, dirty_pages_per_s=100), specs, seed=1), specs)
        spec = VmmSpec("guest", inc, guest, directory, directory / f"{inc}.con", None, "127.0.0.1", vfio_path=path)
        vmm = await (engine.prepare_incoming(spec, "m", 1) if incoming else engine.start(spec))
        end = End(vmm, devices, log, directory)
        vmm.subscribe(end.hear)
        return end


class _DeviceServer:
    """The devices of one VMM; every connection is over when `end` returns."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._served = VfioServer(endpoints, time.monotonic)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def listen(self, path: Path) -> None:
        self._server = await asyncio.start_unix_server(self._accept, path, limit=_BUFFER)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._served.serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def end(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._connections:
            _, late = await asyncio.wait(self._connections, timeout=2.0)  # their VMM is gone
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


def _device(index: int, scenario: Scenario, *, incoming: bool) -> Device:
    identity = DeviceIdentity("guest", f"d{index}", index, 1)
    sizes = DeviceSizes(scenario.initial_bytes or 0, scenario.stop_copy_bytes or 0)
    return Device(identity, sizes, scenario, incoming=incoming, features=features_of(scenario), in_vmm=True)
