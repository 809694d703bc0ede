"""Two real QEMUs with emulated VFIO devices, and everything they tell: QMP, events, traces, heartbeats, device logs.

The processes are made by the product's own code (engine, device process, preload); what moves between them is up to the
test. Nothing of a rig outlives its `async with`.

    async with Rig(qemu("11.1"), device("nic", scenario="asks: [{at: freeze}]")) as rig:
        await rig.migrate()                       # both ends with switchover-ack, no pause before the switchover
        over = await rig.over()                   # status and error of the source, which runs again or is sealed
        asked = rig.source.log("nic")             # what QEMU asked the device, with its answers
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agents.engine.base import (
    EngineError,
    EngineEvent,
    EngineStatus,
    RunState,
    RunStateChanged,
    VmmSpec,
    VmmState,
)
from agents.engine.qemu.engine import QemuEngine
from agents.engine.qemu.vmm import QemuVmm
from agents.shims.companion import DeviceProcess, DevicesSpec
from agents.shims.inside import InVmmDevice
from deploy.lab.devices import PROGRAM
from deploy.lab.devices.scenario_text import options_of
from deploy.lab.workload import Workload, boot_of
from orchestrator.core.records import DeviceSpec, GuestSpec, ShimKind
from tests.contract.test_engine import image

ROOT = Path(__file__).parents[2]
SEED = 0xC0FFEE
LINK = 1 << 30
ACK = {"events": True, "return-path": True, "switchover-ack": True}
WORKLOAD = Workload(dirty_mib=1, dirty_pages_per_s=100, doorbell_hz=20)
TRACES = (
    "qemu_savevm_query_pending*",
    "qemu_savevm_query_switchover_ack*",
    "source_return_path_thread_switchover_acked",
    "loadvm_approve_switchover*",
    "migration_request*",
    "migrate_set_state",
    "vfio_send_init_data_flag",
)
_UNAVAILABLE = 69


def qemu(version: str) -> str:
    """The binary of a QEMU whose version begins like this. Skips the test with the reason where it cannot be had."""
    if version.startswith("11"):
        made = ROOT / "build" / "qemu-11.1" / "bin" / "qemu-system-x86_64"
        if not made.is_file():
            script = ROOT / "deploy" / "qemu-11.sh"
            ran = subprocess.run([str(script)], capture_output=True, text=True, timeout=600, check=False)
            if ran.returncode == _UNAVAILABLE:
                pytest.skip(ran.stderr.strip().splitlines()[-1])
            assert ran.returncode == 0, ran.stderr
        return str(made)
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        pytest.skip("there is no qemu-system-x86_64 here")
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    if f"version {version}" not in said:
        pytest.skip(f"qemu-system-x86_64 is not {version} but {said.splitlines()[0] if said else 'broken'}")
    return found


def preload() -> Path:
    """Built by the product's script."""
    made = ROOT / "build" / "vfio-preload.so"
    script = ROOT / "deploy" / "lab" / "devices" / "vfio" / "build.sh"
    subprocess.run([str(script), str(made)], check=True, capture_output=True)
    return made


def device(name: str, *, scenario: str = "", initial_bytes: int = 65_536, stop_copy_bytes: int = 16_384) -> DeviceSpec:
    """A device inside the VMM; `scenario` is YAML as in docs/scenario.md."""
    return DeviceSpec(name, ShimKind.VFIO, "none", initial_bytes, stop_copy_bytes, 0, options_of(scenario))


@dataclass(frozen=True)
class Beat:
    """The newest heartbeat of a guest."""

    number: int = 0
    page_errors: int = 0
    rings: int = 0
    device_errors: int = 0
    retries: int = 0


@dataclass
class End:
    """One QEMU with its devices."""

    vmm: QemuVmm
    devices: DeviceProcess
    directory: Path
    events: list[EngineEvent] = field(default_factory=list[EngineEvent])
    beat: Beat = Beat()
    complaints: list[str] = field(default_factory=list[str])
    """`E`, `D` and `FATAL` lines of the guest: there should be none."""
    _reader: asyncio.Task[None] | None = None

    @property
    def inc(self) -> str:
        return self.vmm.metadata.inc

    async def listen(self) -> None:
        self.vmm.subscribe(self.events.append)
        reader, writer = await asyncio.open_unix_connection(self.directory / f"{self.inc}.con")
        self._reader = asyncio.create_task(self._read(reader, writer))

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                words = line.decode(errors="replace").split()
                if words[:1] == ["H"] and len(words) == 7:
                    numbers = [int(word, 16) for word in words[1:]]
                    self.beat = Beat(numbers[0], numbers[2], *numbers[3:])
                elif words and words[0] in ("E", "D", "FATAL"):
                    self.complaints.append(line.decode(errors="replace").strip())

    async def qmp(self, command: str, **arguments: object) -> Any:
        """A QMP command; underscores in argument names become hyphens. Raises EngineError."""
        return await self.vmm._execute(command, {key.replace("_", "-"): value for key, value in arguments.items()})

    async def capabilities(self, **wanted: bool) -> None:
        await self.vmm.set_capabilities({name.replace("_", "-"): on for name, on in wanted.items()})

    async def look(self) -> dict[str, InVmmDevice]:
        """What the devices tell of themselves."""
        inside = self.devices.in_vmm()
        return {one.device: one for one in await inside.look()} if inside else {}

    def log(self, device: str = "", *calls: str) -> list[dict[str, Any]]:
        """What QEMU asked (deploy/lab/devices/vfio/log.py), of one device or of all, of some calls or of all."""
        lines = (self.directory / f"{self.inc}.vfio.log").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        return [
            entry
            for entry in entries
            if (not device or entry["device"] == device) and (not calls or entry["call"] in calls)
        ]

    def output(self) -> str:
        """QEMU's own words and traces."""
        return (self.directory / f"{self.inc}.log").read_text(errors="replace")

    def traces(self, name: str) -> list[str]:
        """Arguments of every trace event of this name, in order."""
        return re.findall(rf"^(?:\d+@\d+\.\d+:)?{re.escape(name)} ?(.*)$", self.output(), re.MULTILINE)

    def stopped_and_ran_s(self) -> list[tuple[bool, float]]:
        """(runs, QEMU's own stamp in s) of each STOP and RESUME."""
        return [(each.running, each.at_s) for each in self.events if isinstance(each, RunStateChanged)]

    async def until_beats(self, more: int = 3, timeout_s: float = 30.0) -> None:
        """The guest runs: so many more heartbeats arrive."""
        wanted = self.beat.number + more
        await until(lambda: self.beat.number >= wanted, timeout_s)

    async def end(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        await self.vmm.destroy()
        await self.devices.destroy()


async def until(holds: Callable[[], object], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


class Rig:
    """A running guest with devices, and destinations for it as they are asked for."""

    def __init__(
        self,
        binary: str,
        *devices: DeviceSpec,
        machine: str = "pc",
        destination_binary: str = "",
        source_options: Sequence[str] = (),
        destination_options: Sequence[str] = (),
        traces: Sequence[str] = TRACES,
        memory_mib: int = 32,
        workload: Workload = WORKLOAD,
    ) -> None:
        """`..._options` are added to that QEMU's command line, such as `-global migration.switchover-ack-legacy=on`."""
        self.directory = Path(tempfile.mkdtemp(prefix="dv-"))
        self.devices = devices
        self.machine = machine
        self.memory_mib = memory_mib
        self.workload = workload
        traced = [word for name in traces for word in ("-trace", name)]
        self._engines = (
            self._engine("source", binary, [*source_options, *traced]),
            self._engine("destination", destination_binary or binary, [*destination_options, *traced]),
        )
        self.ends: list[End] = []
        self.source: End
        self.destination: End

    def _engine(self, name: str, binary: str, options: Sequence[str]) -> QemuEngine:
        """Runs QEMU with more options than the product gives it."""
        wrapper = self.directory / name
        words = " ".join(f"'{option}'" for option in options)
        probe = f'case "$*" in *"-M none"*) exec {binary} "$@" ;; esac'  # of what it can, without a machine
        wrapper.write_text(f'#!/bin/sh\n{probe}\nexec {binary} "$@" {words}\n')
        wrapper.chmod(0o755)
        return QemuEngine(image(), str(wrapper), vfio_preload=preload())

    async def __aenter__(self) -> Rig:
        try:
            self.source = await self._end("s", incoming=False)
            self.destination = await self.new_destination()
            await self.source.until_beats()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(end.end() for end in self.ends))
        shutil.rmtree(self.directory, ignore_errors=True)

    async def new_destination(self) -> End:
        """A fresh one; it is `destination` from now on."""
        self.destination = await self._end(f"d{len(self.ends)}", incoming=True)
        return self.destination

    async def _end(self, inc: str, *, incoming: bool) -> End:
        spec = DevicesSpec("guest-1", inc, self.directory, tuple(self.devices), SEED, PROGRAM)
        process = await DeviceProcess.start(spec, incoming=incoming)
        boot = boot_of(self.workload, self.devices, seed=SEED)
        guest = GuestSpec("g", self.memory_mib, 1, self.machine, boot, tuple(self.devices))
        vmm_spec = VmmSpec(
            "guest-1",
            inc,
            guest,
            self.directory,
            self.directory / f"{inc}.con",
            process.com_path if process.spec.companions else None,
            "127.0.0.1",
            vfio_path=process.vfio_path if process.spec.in_vmm else None,
        )
        engine = self._engines[incoming]
        try:
            vmm = await (engine.prepare_incoming(vmm_spec, "m", 1) if incoming else engine.start(vmm_spec))
        except BaseException:
            await process.destroy()
            raise
        end = End(vmm, process, self.directory)
        self.ends.append(end)
        await end.listen()
        return end

    async def migrate(self, *, downtime_limit_ms: int = 300, **capabilities: bool) -> None:
        """Begin, by plain QMP: nothing is held, nothing parks. `capabilities` are the source's, besides ACK."""
        wanted = ACK | {name.replace("_", "-"): on for name, on in capabilities.items()}
        await self.source.vmm.set_capabilities(wanted)
        await self.source.qmp(
            "migrate-set-parameters",
            downtime_limit=downtime_limit_ms,
            max_bandwidth=LINK,
            avail_switchover_bandwidth=LINK,
        )
        await self.source.qmp("migrate", uri=self.destination.vmm.metadata.endpoint)

    async def over(self, timeout_s: float = 20.0) -> VmmState:
        """The source's state once the migration ended and the vCPUs are where they stay."""
        ends = (EngineStatus.COMPLETED, EngineStatus.FAILED, EngineStatus.CANCELLED)
        async with asyncio.timeout(timeout_s):
            while True:
                with contextlib.suppress(EngineError):
                    now = await self.source.vmm.state()
                    if now.status in ends and now.run_state is not RunState.FINISHING:
                        return now
                await asyncio.sleep(0.002)

    async def hand_over(self) -> None:
        """After `completed`: the destination runs, and its guest finds all as it was."""
        async with asyncio.timeout(10):
            while (await self.destination.vmm.state()).run_state is not RunState.PAUSED:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        await self.destination.vmm.resume()
        await self.destination.until_beats()
