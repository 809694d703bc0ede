"""One QEMU behind the engine port: what each call means in QMP, and what has to be waited for afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from agents.engine import base
from agents.engine.base import (
    EngineError,
    EngineStatus,
    EngineTimeout,
    GuestHasEnded,
    RunState,
    VmmMetadata,
    VmmState,
)
from agents.engine.image_locks import locked
from agents.engine.qemu import answers, arguments, display, door, foreign, obstacles, process, stream, tls, verdict
from agents.engine.qemu.block import QemuDisks
from agents.engine.qemu.bounded import bounded
from agents.engine.qemu.ending import QemuEnding
from agents.engine.qemu.features import Features, features_of
from agents.engine.qemu.plug import QemuPlugs
from agents.engine.qemu.qmp import QmpConnection
from agents.engine.qemu.rate import QemuRate
from agents.host import processes
from orchestrator.core.endpoint import Endpoint, join_address, parse_ip
from orchestrator.core.liveness import Liveness
from orchestrator.core.offers import Obstacle
from orchestrator.core.records import LiveDevice

_CONNECT_S = 8.0
_CANCEL_S = 1.0
_STREAM_S = 5.0
"""How long the destination may take to accept the stream: two lost packets, and an attempt that ends soon otherwise."""
_STREAM = "stream"
"""What a QEMU calls the stream that was opened for it."""


class QemuVmm(base.Vmm, base.Displaying):
    """One QEMU process."""

    def __init__(
        self, metadata: VmmMetadata, spec: base.VmmSpec, watched: processes.Watched, features: Features
    ) -> None:
        self._metadata = metadata
        self._spec = spec
        self._process = watched
        self._features = features
        self._sinks: list[base.EventSink] = []
        self._main = QmpConnection(f"{spec.inc}.main", self._on_event)
        self._oob = QmpConnection(f"{spec.inc}.oob")
        self._telling: asyncio.Task[None] | None = None
        self._door: door.Door | None = None
        self._arrived = False
        """This QEMU told that it has loaded the guest, and has not been asked to send it since."""
        self._disks = QemuDisks(spec.disks, self._execute, self._urgently, self._emit)
        self._plugs = QemuPlugs(self._execute, self._emit)
        self._rate = QemuRate(self._execute, self.progress)
        self._ending = QemuEnding(self.state, self._execute, self._urgently, self._disks)
        self._monitor = metadata.extra.get(base.ADOPTED_QMP, "")
        """Of a QEMU that somebody else started; it takes commands out of band as well. Empty: it is ours."""
        watched.on_death = lambda: self._emit(base.VmmDied())

    @property
    def disks(self) -> QemuDisks:
        return self._disks

    @property
    def metadata(self) -> VmmMetadata:
        return self._metadata

    def subscribe(self, sink: base.EventSink) -> Callable[[], None]:
        self._sinks.append(sink)
        return lambda: self._sinks.remove(sink) if sink in self._sinks else None

    def liveness(self) -> Liveness:
        return self._process.liveness()

    async def connect(self, timeout_s: float = _CONNECT_S) -> None:
        """Both QMP connections; retried until QEMU has made its sockets. Raises EngineError with QEMU's last words."""
        try:
            async with asyncio.timeout(timeout_s):
                if self._monitor:
                    self._main = self._oob = await self._connected(Path(self._monitor), self._on_event)
                    return
                self._main = await self._connected(process.qmp_path(self._spec), self._on_event)
                self._oob = await self._connected(process.oob_path(self._spec), None)
        except TimeoutError as error:
            raise EngineTimeout(f"QEMU of {self._spec.spec.name} did not answer in {timeout_s:g} s") from error

    async def _connected(
        self, path: Path, sink: Callable[[str, Mapping[str, Any], float], None] | None
    ) -> QmpConnection:
        while True:
            connection = QmpConnection(path.name, sink)
            try:
                await connection.connect(path, 2.0)
                return connection
            except EngineError:
                await connection.close()
                if self.liveness() is Liveness.GONE:
                    words = processes.tail_of(process.log_path(self._spec))
                    ended = EngineError(f"QEMU ended at its start: {words}")
                    raise locked(ended) or ended from None
                await asyncio.sleep(0.01)

    async def state(self, timeout_s: float = 2.0) -> VmmState:
        async with bounded("state", timeout_s):
            run = await self._execute("query-status", timeout_s=timeout_s)
            info = await self._execute("query-migrate", timeout_s=timeout_s)
        status, error = answers.status(info), str(info.get("error-desc", ""))
        late = verdict.late_devices(error) if status is EngineStatus.FAILED else None
        run_state = answers.RUN_STATES.get(run["status"], RunState.PAUSED)
        return VmmState(run_state, status, self._with_words(error), late or 0)

    async def progress(self) -> base.Progress:
        return answers.progress(await self._execute("query-migrate"))

    async def unmigratable(self) -> tuple[Obstacle, ...]:
        return await obstacles.found(self._execute, self._strangers)

    async def _strangers(self) -> list[str]:
        """What of the machine is not as it was noted down: the other end would be built from the note."""
        if self._spec.machine is None:
            return []
        if self._monitor:
            return await foreign.strangers(self._execute, self._metadata)
        return arguments.strangers(self._spec.machine, await self._plugs.devices())

    async def devices(self) -> Mapping[str, str]:
        return await self._plugs.devices()

    async def attach(self, device: LiveDevice, spec: base.VmmSpec) -> LiveDevice:
        return await self._plugs.attach(device, spec)

    async def as_it_is(self, device: LiveDevice) -> LiveDevice:
        return await self._plugs.as_it_is(device)

    async def let_go(self, device: LiveDevice, timeout_s: float) -> bool:
        return await self._plugs.detach(device, timeout_s)

    async def drop(self, device: LiveDevice) -> None:
        await self._plugs.drop(device)

    def described(self, spec: base.VmmSpec) -> None:
        self._spec = spec
        self._disks.of(spec.disks)

    async def pause(self) -> None:
        await self._execute("stop")
        await self._rate.now_stands(True)

    async def resume(self) -> None:
        if not self._arrived:  # in the blackout nothing is asked that is known
            await self._must_not_be_moving()
        if self._rate.stands:
            await self._rate.now_stands(False)
        try:
            await self._execute("cont")
        except EngineTimeout:
            raise
        except EngineError as error:
            # Asked only now: in the blackout nothing is asked that a guest which is well does not need.
            if (await self.state()).run_state is RunState.ENDED:
                raise GuestHasEnded(f"the guest has shut down: {error}") from error
            raise locked(error) or error from error

    async def _must_not_be_moving(self) -> None:
        """Refuses what QEMU itself would take for a wish to run."""
        run = (await self._execute("query-status"))["status"]
        if run == "inmigrate":
            # QEMU would accept it, and start the guest by itself at the end of the load.
            raise EngineError("the guest is not loaded yet: nothing to resume")
        if self._has_devices_inside and answers.status(await self._execute("query-migrate")) not in answers.OVER:
            # QEMU would accept that too, and its devices would never be in pre-copy again: it hangs or fails later.
            raise EngineError("a migration of a guest with devices inside the VMM is running: cancel it first")

    @property
    def _has_devices_inside(self) -> bool:
        return self._spec.vfio_path is not None

    def _acknowledged(self) -> dict[str, bool]:
        """Capabilities by which devices inside the VMM hold up the switchover until they agree: equal at both ends."""
        if not self._has_devices_inside:
            return {}
        if "switchover-ack" not in self._features.capabilities:
            raise EngineError(f"QEMU {self._features.version} has no switchover-ack, which devices inside it need")
        return {"switchover-ack": True}

    def _where(self, ip: str, port: int, command: str) -> dict[str, object]:
        """What QEMU connects to or listens at: always a TCP socket. A URI could be a command (`exec:`) or a file."""
        if command in self._features.channels:
            return _channel({"type": "inet", "host": ip, "port": str(port)})
        return {"uri": f"tcp:{join_address(ip, port)}"}

    async def _migrate(self, destination: Endpoint, options: base.OutgoingOptions) -> None:
        """Several channels QEMU connects by itself: it takes no descriptors for them, and turns Nagle's algorithm off
        in all but the first, which has nothing to wait for then. A single one is opened here."""
        if options.multifd_channels > 1:
            await self._execute("migrate", self._where(destination.ip, destination.port, "migrate"))
            return
        greeting = door.greeting(options.copy) if options.tls is not None else b""
        link = options.link_bytes_per_s
        with contextlib.closing(await stream.opened(destination, link, _STREAM_S, greeting)) as connection:
            await self._main.pass_descriptor(_STREAM, connection.fileno())
        try:
            await self._execute("migrate", self._by_name("migrate"))
        except EngineError:
            with contextlib.suppress(EngineError):  # refused before QEMU took it: the destination waits for its end
                await self._execute("closefd", {"fdname": _STREAM}, timeout_s=0.5)
            raise

    async def start_outgoing(self, options: base.OutgoingOptions) -> None:
        if options.stream is None:
            raise EngineError("there is no destination to send to")
        await self._ending.cleaned_up(2.0)
        self._arrived = False
        stands = (await self.state()).run_state is RunState.PAUSED
        self._rate.of(options, stands=stands, switchover_bandwidth=self._features.switchover_bandwidth)
        wanted = {"events": True, "return-path": True, "pause-before-switchover": True}
        wanted |= {"multifd": options.multifd_channels > 1, "auto-converge": options.auto_converge}
        wanted |= self._acknowledged()
        await self.set_capabilities(wanted)
        if options.multifd_channels > 1:
            await self._execute("migrate-set-parameters", {"multifd-channels": options.multifd_channels})
        await self._rate.first(options)
        await tls.send_by(self._execute, options.tls)
        await self._migrate(options.stream, options)
        self._rate.watch(options)

    async def hold(self) -> None:
        await self._rate.hold()

    async def release(self) -> None:
        await self._rate.release()

    async def proceed(self) -> None:
        await self._execute("migrate-continue", {"state": "pre-switchover"})

    async def abort(self, timeout_s: float = 5.0) -> VmmState:
        return await self._ending.abort(timeout_s)

    async def take_over(self) -> None:
        """A loaded QEMU depends on nobody."""

    async def promote(self) -> None:
        """The note was written by `reserve`; to put it in its place takes no room on the disk."""
        promoted = replace(self._metadata, role="owner")
        try:
            try:
                process.reserved_path(self._spec).replace(process.metadata_path(self._spec))
            except FileNotFoundError:  # promoted before, or prepared by an agent that reserved nothing
                process.write_metadata(process.metadata_path(self._spec), promoted)
        except OSError as error:
            raise EngineError(f"cannot note that the VMM is the guest's now: {error}") from error
        self._metadata = promoted

    def reserve(self) -> None:
        """Write now what `promote` is to leave: a guest that stands still needs no room on a disk. Raises OSError."""
        process.write_metadata(process.reserved_path(self._spec), replace(self._metadata, role="owner"))

    async def announce(self) -> None:
        timing = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
        await self._execute("announce-self", timing)

    async def open_display(self, password: str, valid_s: int) -> base.DisplayAt:
        return await display.opened(self._execute, password, valid_s)

    async def detach(self) -> None:
        self._disks.close()
        self._rate.close()
        if self._door is not None:
            await self._door.close()
        if self._telling is not None:
            self._telling.cancel()
        await asyncio.gather(self._main.close(), self._oob.close())
        self._process.close()

    async def destroy(self) -> None:
        self._process.kill()
        async with bounded("destroy", 5.0):
            if self.liveness() is not Liveness.GONE:
                await self._process.dead.wait()
        await self.detach()
        spec = self._spec
        # The note last: an agent that is killed in the middle leaves a successor that knows what to remove.
        sockets = (process.qmp_path(spec), process.oob_path(spec), process.console_socket(spec), spec.console_path)
        sockets += (process.vnc_path(spec),)
        for path in (*sockets, process.reserved_path(spec), process.metadata_path(spec)):
            path.unlink(missing_ok=True)

    async def learn(self) -> None:
        """What this very QEMU offers: one that somebody else started may be of another version than ours."""
        version = await self._execute("query-version")
        machines = await self._execute("query-machines")
        schema = await self._execute("query-qmp-schema", timeout_s=4.0)
        self._features = features_of(version, machines, schema, set())

    async def survive_its_guest(self) -> None:
        """A guest that shuts down or starts anew must not look like a VMM that died: whatever QEMU was told at its
        start, it is told now."""
        await self._execute("set-action", {"shutdown": "pause", "reboot": "reset"})

    async def hand_back(self) -> None:
        """Of a QEMU that somebody else started: as it was told at its start, and known here no more."""
        told = {name: self._metadata.extra[name] for name in ("shutdown", "reboot") if name in self._metadata.extra}
        if self.liveness() is not Liveness.GONE and told:
            await self._execute("set-action", told)
            await self.set_capabilities({"events": False, "return-path": False, "pause-before-switchover": False})
        await self.detach()
        process.metadata_path(self._spec).unlink(missing_ok=True)

    async def note_machine(self) -> None:
        """Keep what machine type this really is, for the other end to compare; link the console. May raise OSError."""
        process.link_console(self._spec)
        kind = await self._execute("qom-get", {"path": "/machine", "property": "type"})
        self._metadata = replace(self._metadata, machine=str(kind).removesuffix("-machine"))
        self._note()

    async def listen(self, address: str, channels: int, secure: base.StreamTls | None = None) -> str:
        """Destination: accept one stream; returns the endpoint."""
        wanted = {"events": True, "return-path": True, "multifd": channels > 1, **self._acknowledged()}
        if "late-block-activate" in self._features.capabilities and not self._features.late_activation_always:
            wanted["late-block-activate"] = True
        await self.set_capabilities(wanted)
        if channels > 1:
            await self._execute("migrate-set-parameters", {"multifd-channels": channels})
        ip = str(parse_ip(address))
        if secure is not None:
            await tls.receive_by(self._execute, secure)
        if secure is not None and channels <= 1:
            where = join_address(ip, self._at_the_door(ip))
        else:
            where = await self._listens(ip)
        self._metadata = replace(self._metadata, endpoint=f"tcp:{where}")
        self._note()
        self.reserve()
        return self._metadata.endpoint

    async def _listens(self, ip: str) -> str:
        arguments = self._incoming(self._where(ip, 0, "migrate-incoming"))
        await self._execute("migrate-incoming", arguments)
        sockets = (await self._execute("query-migrate")).get("socket-address", [])
        if not sockets:
            raise EngineError("QEMU listens but does not say where")
        return join_address(sockets[0]["host"], int(sockets[0]["port"]))

    def _incoming(self, where: dict[str, object]) -> dict[str, object]:
        return {**where, "exit-on-error": False} if self._features.exit_on_error else where

    def _at_the_door(self, ip: str) -> int:
        """The port at which this agent hears who comes. Raises EngineError."""
        self._door = door.Door(self._spec.inc, self._let_in)
        try:
            return self._door.open(ip)
        except OSError as error:
            raise EngineError(f"cannot listen at {ip} for the stream: {error.strerror}") from error

    async def _let_in(self, connection: socket.socket) -> None:
        """The source's: from here on it is QEMU's. A failure is seen by the source, whose stream ends."""
        with contextlib.suppress(EngineError):
            await self._main.pass_descriptor(_STREAM, connection.fileno())
            await self._execute("migrate-incoming", self._incoming(self._by_name("migrate-incoming")))

    def _by_name(self, command: str) -> dict[str, object]:
        """A stream that QEMU was given as a descriptor."""
        if command in self._features.channels:
            return _channel({"type": "fd", "str": _STREAM})
        return {"uri": f"fd:{_STREAM}"}

    def _note(self) -> None:
        process.write_metadata(process.metadata_path(self._spec), self._metadata)

    async def set_capabilities(self, wanted: Mapping[str, bool]) -> None:
        """Set the named migration capabilities and leave the others alone. Raises EngineError: QEMU refuses while a
        migration runs, and for a combination that it does not support; none is changed then."""
        entries = [{"capability": name, "state": state} for name, state in wanted.items()]
        await self._execute("migrate-set-capabilities", {"capabilities": entries})

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float = 2.0
    ) -> Any:
        if self.liveness() is Liveness.GONE:
            raise EngineError(f"{command}: the QEMU process is gone; {self._with_words('')}")
        return await self._main.execute(command, arguments, timeout_s=timeout_s)

    async def _urgently(self, command: str, arguments: Mapping[str, object], **how: Any) -> Any:
        return await self._oob.execute(command, arguments, **how)

    def _with_words(self, error: str) -> str:
        """A refused stream is explained in the destination's log only."""
        if self._metadata.role != "incoming" and error:
            return error
        gone = self.liveness() is Liveness.GONE
        words = processes.tail_of(process.log_path(self._spec)) if error or gone else ""
        return f"{error} {words}".strip()

    def _emit(self, event: base.EngineEvent) -> None:
        for sink in tuple(self._sinks):
            sink(event)

    def _on_event(self, name: str, data: Mapping[str, Any], at_s: float) -> None:
        if name == "MIGRATION":
            status = answers.STATUSES.get(data["status"], EngineStatus.ACTIVE)
            self._arrived |= self._metadata.role == "incoming" and status is EngineStatus.COMPLETED
            if status is EngineStatus.FAILED and self._metadata.role != "incoming":
                self._telling = asyncio.create_task(self._tell_failure())
            else:
                self._emit(base.StatusChanged(status))
        elif name.startswith("BLOCK_JOB_"):
            self._disks.on_event(name, data)
        elif name in ("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"):
            self._plugs.on_event(name, data)
        elif name in ("STOP", "RESUME"):
            self._emit(base.RunStateChanged(name == "RESUME", at_s))
        elif name == "GUEST_PANICKED" or (name == "SHUTDOWN" and data.get("guest")):
            self._emit(base.GuestEnded(str(data.get("reason", "panic"))))

    async def _tell_failure(self) -> None:
        """The event does not say why. A QEMU that does not answer has failed all the same."""
        error = ""
        with contextlib.suppress(EngineError):
            info = await self._execute("query-migrate", timeout_s=_CANCEL_S)
            error = str(info.get("error-desc", "")) if answers.status(info) is EngineStatus.FAILED else ""
        late = verdict.late_devices(error)
        self._emit(base.StatusChanged(EngineStatus.FAILED, error) if late is None else base.SwitchoverAckLate(late))


def _channel(socket: Mapping[str, str]) -> dict[str, object]:
    return {"channels": [{"channel-type": "main", "addr": {"transport": "socket", **socket}}]}
