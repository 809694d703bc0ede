"""An engine without processes or time: every step happens inside the call that causes it, and can be scripted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from agents.engine import base
from agents.engine.base import (
    EngineError,
    EngineStatus,
    GuestHasEnded,
    HoldStart,
    ImageNotFound,
    RunState,
    VmmMetadata,
    VmmState,
)
from orchestrator.core.disks import SourceSide
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.liveness import Liveness
from orchestrator.core.offers import Obstacle
from orchestrator.core.records import LiveDevice

_UNDER_WAY = (EngineStatus.SETUP, EngineStatus.ACTIVE, EngineStatus.PARKED, EngineStatus.DEVICE)


@dataclass(slots=True)
class Script:
    """What goes wrong next. Each text is used once; the booleans stay until changed."""

    fail_start: str = ""
    fail_outgoing: str = ""
    fail_take_over: str = ""
    keep_in_device: bool = False
    """`proceed` stops in DEVICE, as with a frozen destination."""
    late_devices: int = 0
    """So many devices inside the VMM ask after the decision, once: `proceed` ends in the VMM's own verdict."""
    unmigratable: tuple[Obstacle, ...] = ()
    fail_attach: str = ""
    holds_on: bool = False
    """The guest lets go of no device that it is asked for."""
    blind: bool = False
    """Of no process can be told whether it lives."""


class FakeDisks:
    """See `base.DiskCopies`. Copies nothing, and knows what it would have copied."""

    def __init__(self, names: Sequence[str], emit: base.EventSink) -> None:
        self._known = {name: SourceSide() for name in names}
        self._connected: dict[str, str] = {}
        self._emit = emit
        self.calls: list[str] = []
        self.fail_drain = ""

    async def known(self) -> Mapping[str, SourceSide]:
        return dict(self._known)

    async def connect_disk(self, target: base.DiskTarget) -> None:
        self.calls.append("connect")
        self._connected[target.disk] = target.image

    async def start_mirror(self, disk: str) -> None:
        self.calls.append("mirror")
        self._known[disk] = SourceSide(self._connected[disk])
        self._emit(base.DiskReady(disk))

    async def increment(self, disk: str, since: str) -> None:
        self.calls.append("increment")
        if self._known[disk].since != since:
            raise EngineError(f"nothing is noted since {since}")

    async def drain(self, bound_s: float) -> None:
        self.calls.append("drain")
        if self.fail_drain:
            self._known = {disk: SourceSide() for disk in self._known}
            raise EngineError(self.fail_drain)
        self._known = {disk: SourceSide("", each.since) for disk, each in self._known.items()}
        self._connected.clear()

    async def mark(self, sync: str) -> None:
        self.calls.append("mark")
        self._known = {disk: SourceSide("", sync) for disk in self._known}

    async def sizes(self) -> Mapping[str, int]:
        return dict.fromkeys(self._known, 1 << 20)

    def limit(self, bytes_per_s: int) -> None:
        self.calls.append(f"limit {bytes_per_s}")

    def sent(self) -> Mapping[str, int]:
        return dict.fromkeys(self._known, 0)

    async def progress(self) -> Mapping[str, base.DiskCopied]:
        return dict.fromkeys(self._connected, base.DiskCopied(1 << 20, 0, True))

    async def forget(self) -> None:
        self._known = {disk: SourceSide() for disk in self._known}
        self._connected.clear()

    def fail(self, disk: str) -> None:
        """Its target is lost."""
        self._known[disk] = SourceSide()
        self._emit(base.DiskFailed(disk, "lost"))


class FakeVmm:
    """See `base.Vmm`. `calls` has the names of the calls in order."""

    def __init__(self, engine: FakeEngine, metadata: VmmMetadata, spec: base.VmmSpec, run: RunState) -> None:
        self.engine = engine
        self._metadata = metadata
        self.spec = spec
        self.run = run
        self.status = EngineStatus.NONE
        self.error = ""
        self.calls: list[str] = []
        self.peer: FakeVmm | None = None
        self._sinks: list[base.EventSink] = []
        self._disks = FakeDisks([disk.name for disk in spec.disks if not disk.shared], self._emit)
        listed = spec.machine.devices if spec.machine is not None else ()
        self._devices = {device.id: device.driver for device in listed}
        self._asked: set[str] = set()
        self._before = run
        self._dead = False
        self._late = 0
        self.ends_unheard = False
        """The guest powers itself off at the very moment of its stop: no event tells it here, and it arrives ended."""

    @property
    def disks(self) -> FakeDisks:
        return self._disks

    @property
    def metadata(self) -> VmmMetadata:
        return self._metadata

    def subscribe(self, sink: base.EventSink) -> Callable[[], None]:
        self._sinks.append(sink)
        return lambda: self._sinks.remove(sink) if sink in self._sinks else None

    def alive(self) -> bool:
        return not self._dead

    def liveness(self) -> Liveness:
        if self.engine.script.blind:
            return Liveness.UNKNOWN
        return Liveness.GONE if self._dead else Liveness.ALIVE

    async def state(self, timeout_s: float = 2.0) -> VmmState:
        self._called("state")
        return self._now()

    def _now(self) -> VmmState:
        late = self._late if self.status is EngineStatus.FAILED else 0
        return VmmState(self.run, self.status, self.error, late)

    async def progress(self) -> base.Progress:
        self._called("progress")
        total = self.spec.spec.memory_mib << 20
        sent = total if self.status in (EngineStatus.PARKED, EngineStatus.COMPLETED) else total // 2
        return base.Progress(sent, total - sent, total, status=self.status)

    async def unmigratable(self) -> tuple[Obstacle, ...]:
        self._called("unmigratable")
        return self.engine.script.unmigratable

    async def devices(self) -> Mapping[str, str]:
        self._called("devices")
        return dict(self._devices)

    async def attach(self, device: LiveDevice, spec: base.VmmSpec) -> LiveDevice:
        self._called("attach")
        why, self.engine.script.fail_attach = self.engine.script.fail_attach, ""
        if why or device.id in self._devices:
            raise EngineError(why or f"Duplicate device ID '{device.id}'")
        self._devices[device.id] = device.driver
        return await self.as_it_is(device)

    async def as_it_is(self, device: LiveDevice) -> LiveDevice:
        if device.id not in self._devices:
            raise EngineError(f"there is no {device.id}")
        return replace(device, address=hex(len(self._devices) << 30)) if device.memory_mib else device

    async def let_go(self, device: LiveDevice, timeout_s: float) -> bool:
        self._called("let_go")
        if device.id in self._devices and self.engine.script.holds_on:
            self._asked.add(device.id)
            return False
        self._devices.pop(device.id, None)
        return True

    async def drop(self, device: LiveDevice) -> None:
        self._called("drop")
        if device.id in self._devices:
            raise EngineError(f"{device.id} is in use")

    def described(self, spec: base.VmmSpec) -> None:
        self.spec = spec
        self._disks = FakeDisks([disk.name for disk in spec.disks if not disk.shared], self._emit)

    def lets_go(self, device: str) -> None:
        """As a guest that restarts, long after it was asked."""
        assert device in self._asked
        del self._devices[device]
        self._emit(base.DeviceGone(device))

    async def pause(self) -> None:
        self._called("pause")
        if self.run is RunState.RUNNING:
            self._set_run(RunState.PAUSED)

    async def resume(self) -> None:
        self._called("resume")
        if self.run in (RunState.INCOMING, RunState.FINISHING):
            raise EngineError(f"cannot resume in {self.run}")
        if self.run is RunState.ENDED:
            raise GuestHasEnded("Resetting the Virtual Machine is required")
        if self.spec.vfio_path is not None and self.status in _UNDER_WAY:
            raise EngineError("a migration of a guest with devices inside the VMM is running: cancel it first")
        if self.run is not RunState.RUNNING:
            self._set_run(RunState.RUNNING)

    async def start_outgoing(self, options: base.OutgoingOptions) -> None:
        self._called("start_outgoing")
        if options.stream is None:
            raise EngineError("there is no destination to send to")
        self.peer = self.engine.listening.get(str(options.stream))
        if self.peer is None or not self.peer.alive():
            raise EngineError(f"the destination does not take the stream at {options.stream}: Connection refused")
        self.error, self._late = "", 0
        self._set_status(EngineStatus.SETUP)
        why, self.engine.script.fail_outgoing = self.engine.script.fail_outgoing, ""
        if why:
            self._fail(why)
            return
        if self.peer.spec.spec.memory_mib != self.spec.spec.memory_mib:
            self.peer.error = "size mismatch of RAM"
            self.peer._set_status(EngineStatus.FAILED)
            self._fail("broken pipe")
            return
        self._set_status(EngineStatus.ACTIVE)
        self.peer._set_status(EngineStatus.ACTIVE)
        if options.hold is HoldStart.OPEN:
            self.converge()

    async def hold(self) -> None:
        self._called("hold")

    async def release(self) -> None:
        self._called("release")
        self.converge()

    async def proceed(self) -> None:
        self._called("proceed")
        if self.status is not EngineStatus.PARKED or self.peer is None:
            raise EngineError(f"not parked but {self.status}")
        self._set_status(EngineStatus.DEVICE)
        late, self.engine.script.late_devices = self.engine.script.late_devices, 0
        if not self.peer.alive():
            self._fail("the destination is gone")
        elif late:
            self._find_late(late)
        elif not self.engine.script.keep_in_device:
            self.complete()

    async def abort(self, timeout_s: float = 5.0) -> VmmState:
        self._called("abort")
        if self.status in _UNDER_WAY:
            self._set_status(EngineStatus.CANCELLING)
            self._back()
            self._set_status(EngineStatus.CANCELLED)
            if self.peer is not None and self.peer.alive():
                self.peer._set_status(EngineStatus.FAILED)
        return self._now()

    async def take_over(self) -> None:
        self._called("take_over")
        why, self.engine.script.fail_take_over = self.engine.script.fail_take_over, ""
        if why:
            raise EngineError(why)

    async def promote(self) -> None:
        self._called("promote")
        self._metadata = replace(self._metadata, role="owner")

    async def open_display(self, password: str, valid_s: int) -> base.DisplayAt:
        self._called("open_display")
        if not self.spec.spec.display.vnc:
            raise EngineError("its VMM serves no screen")
        if not self.spec.vnc_listen:
            return base.DisplayAt(self.spec.directory / f"{self.spec.inc}.vnc")
        return base.DisplayAt(endpoint=Endpoint(self.spec.vnc_listen, 5900))

    async def announce(self) -> None:
        self._called("announce")

    async def detach(self) -> None:
        self._called("detach")
        self._sinks.clear()

    async def destroy(self) -> None:
        self.calls.append("destroy")
        self.die()

    def converge(self) -> None:
        """The engine stops the guest by itself: also what a hold that came too late looks like."""
        if self.status is not EngineStatus.ACTIVE or (
            self._metadata.role == "incoming" and self.run is RunState.INCOMING
        ):
            return
        self._before = self.run
        if self.run is RunState.RUNNING:
            self._set_run(RunState.FINISHING)
        self.run = RunState.FINISHING
        self._set_status(EngineStatus.PARKED)

    def complete(self) -> None:
        """The destination has loaded everything and says so."""
        assert self.peer is not None
        self.peer.run = RunState.ENDED if self.ends_unheard or self._before is RunState.ENDED else RunState.PAUSED
        self.peer._set_status(EngineStatus.COMPLETED)
        self.run = RunState.SEALED
        self._set_status(EngineStatus.COMPLETED)

    def die(self) -> None:
        if not self._dead:
            self._dead = True
            self.engine.processes.pop(self._metadata.pid, None)
            self._emit(base.VmmDied())

    def end_guest(self, how: str) -> None:
        self._emit(base.GuestEnded(how))
        self._set_run(RunState.ENDED)

    def _find_late(self, devices: int) -> None:
        """The guest runs before the failure is told, as on QEMU 11.1."""
        self.error = f"Switchover ACK was requested by {devices} devices during switchover"
        self._late = devices
        self._back()
        self.status = EngineStatus.FAILED
        if self.peer is not None:
            self.peer._set_status(EngineStatus.FAILED)
        self._emit(base.SwitchoverAckLate(devices))

    def _fail(self, why: str) -> None:
        self.error = why
        self._back()
        self._set_status(EngineStatus.FAILED, why)

    def _back(self) -> None:
        if self.run is RunState.FINISHING:
            if self._before is RunState.RUNNING:
                self._set_run(RunState.RUNNING)
            self.run = self._before

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self._dead:
            raise EngineError(f"{name}: the process is gone")

    def _set_run(self, run: RunState) -> None:
        self.run = run
        self._emit(base.RunStateChanged(run is RunState.RUNNING, 0.0))

    def _set_status(self, status: EngineStatus, error: str = "") -> None:
        self.status = status
        self._emit(base.StatusChanged(status, error))

    def _emit(self, event: base.EngineEvent) -> None:
        for sink in tuple(self._sinks):
            sink(event)


@dataclass(slots=True)
class FakeEngine:
    """Share `listening` and `processes` between the engines of several hosts to let guests move between them."""

    script: Script = field(default_factory=Script)
    listening: dict[str, FakeVmm] = field(default_factory=dict[str, FakeVmm])
    processes: dict[int, FakeVmm] = field(default_factory=dict[int, FakeVmm])
    against_memory: str = ""

    async def probe(self) -> dict[str, str]:
        known = {"version": "fake", "machine_types": "pc", "switchover_ack": "none", "accelerator": "none"}
        return known | {"devices_inside": "yes", "against_memory": self.against_memory}

    async def start(self, spec: base.VmmSpec) -> FakeVmm:
        return self._make(spec, "owner", "", 0, RunState.RUNNING)

    async def prepare_incoming(self, spec: base.VmmSpec, migration: str, attempt: int) -> FakeVmm:
        vmm = self._make(spec, "incoming", migration, attempt, RunState.INCOMING)
        stream = Endpoint(spec.listen_address or "127.0.0.1", 10_000 + vmm.metadata.pid % 50_000)
        vmm._metadata = replace(vmm.metadata, endpoint=f"tcp:{stream}")
        self.listening[str(stream)] = vmm
        return vmm

    async def adopt(self, metadata: VmmMetadata, spec: base.VmmSpec) -> FakeVmm | None:
        vmm = self.processes.get(metadata.pid)
        return vmm if vmm is not None and vmm.metadata.start_time == metadata.start_time else None

    def _make(self, spec: base.VmmSpec, role: str, migration: str, attempt: int, run: RunState) -> FakeVmm:
        why, self.script.fail_start = self.script.fail_start, ""
        if spec.spec.boot.kernel:
            raise ImageNotFound(f"this host's configuration has none of the images that guests name, {spec.spec.boot}")
        if why or spec.spec.machine not in ("pc", "q35"):
            raise EngineError(why or f"unsupported machine type {spec.spec.machine}")
        pid = 1000 + len(self.processes) + len(self.listening)
        while pid in self.processes or f"fake:{pid}" in self.listening:
            pid += 1
        vmm = FakeVmm(
            self,
            VmmMetadata(spec.guest, spec.inc, pid, pid * 7, role, migration, attempt, machine=spec.spec.machine),
            spec,
            run,
        )
        self.processes[pid] = vmm
        return vmm
