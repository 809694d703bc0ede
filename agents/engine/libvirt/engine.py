"""libvirt behind the engine port: domains that its daemon runs, moved by its own client with our COMMIT in between.

What differs from QEMU alone is in `LIMITS` and in docs/libvirt.md. In short: libvirt goes from the stop to the end of
the last pass by itself, so what the port calls PARKED is a guest that libvirt has sealed already. Nothing is decided by
that: both copies stand, Finish and Confirm are kept, and the way back is a resume.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

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
from agents.engine.boot_images import Images
from agents.engine.image_locks import locked, must_be_lockable
from agents.engine.libvirt import domain, notes
from agents.engine.libvirt.binding import Daemon, NoDomain, library
from agents.engine.libvirt.incoming import Incoming, Stage
from agents.engine.libvirt.outgoing import Outgoing
from agents.host import processes
from orchestrator import proc
from orchestrator.core.disks import SourceSide
from orchestrator.core.endpoint import join_address
from orchestrator.core.liveness import Liveness, LivenessUnknown
from orchestrator.core.offers import Obstacle
from orchestrator.core.records import LiveDevice

LIMITS = (
    "no check before the last pass: a late ACK is found when libvirt has sealed the guest",
    "an abort of a guest that stands takes libvirt up to seconds, where QEMU takes milliseconds",
    "a closed gate is held by not starting to copy memory, and not at all once copying has begun",
    "a guest that shuts down takes its VMM with it",
    "no disks but those in shared pools, no firmware, TPM, CPU model or devices inside the VMM",
    "no changes to a guest's devices while it runs",
)
"""What it cannot do, for `probe`: shown for every host that runs it."""

_START_S = 60.0
_ASK_S = 5.0
_RESUME_S = 40.0
"""libvirt itself waits up to 30 s for a domain that a migration holds."""
_GONE_S = 5.0
_SETTLE_S = 10.0
_POLL_S = 0.01
_NO_CHANGES = "a guest that libvirt runs is not changed through Drover"
_FINISHED = "finished"
_SEALED = "sealed"
_STARTING = "starting"
"""Words in a VMM's note, for an agent that adopts it. A guest that is noted as starting has never run: its vCPUs wait
for the note that names its process."""

_UNDER_WAY = (EngineStatus.SETUP, EngineStatus.ACTIVE, EngineStatus.PARKED)


class NoCopies(base.DiskCopies):
    """Of local disks, which no guest of this engine has: those in shared pools need no copy."""

    async def known(self) -> Mapping[str, SourceSide]:
        return {}

    async def connect_disk(self, target: base.DiskTarget) -> None:
        raise EngineError(f"disk {target.disk}: the libvirt engine copies no disks")

    async def start_mirror(self, disk: str) -> None:
        raise EngineError(f"disk {disk}: the libvirt engine copies no disks")

    async def increment(self, disk: str, since: str) -> None:
        raise EngineError(f"disk {disk}: the libvirt engine copies no disks")

    async def drain(self, bound_s: float) -> None:
        """There is nothing to drain."""

    async def mark(self, sync: str) -> None:
        """There is nothing to note."""

    async def sizes(self) -> Mapping[str, int]:
        return {}

    async def forget(self) -> None:
        """There is nothing to forget."""

    def limit(self, bytes_per_s: int) -> None:
        """There is nothing to limit."""

    def sent(self) -> Mapping[str, int]:
        return {}

    async def progress(self) -> Mapping[str, base.DiskCopied]:
        return {}


class LibvirtVmm(base.Vmm):
    """One domain: the guest, or the copy that one attempt makes of it."""

    def __init__(
        self, metadata: VmmMetadata, spec: base.VmmSpec, daemon: Daemon, socket: Path, watched: processes.Watched | None
    ) -> None:
        self._metadata = metadata
        self._spec = spec
        self._daemon = daemon
        self._socket = socket
        self._process = watched
        self._sinks: list[base.EventSink] = []
        self._disks = NoCopies()
        self._incoming: Incoming | None = None
        self._outgoing: Outgoing | None = None
        self._status = EngineStatus.NONE
        self._error = ""
        self._stands = False
        """The guest was stopped on purpose."""
        self._last = base.Progress()
        self._destroyed = False
        self._finding: asyncio.Task[None] | None = None
        if watched is not None:
            watched.on_death = self._died
        self._sink = self._heard
        daemon.listen(spec.guest, self._sink)

    # --- what is known without asking ---------------------------------------------------------------------------------

    @property
    def disks(self) -> NoCopies:
        return self._disks

    @property
    def metadata(self) -> VmmMetadata:
        return self._metadata

    def subscribe(self, sink: base.EventSink) -> Callable[[], None]:
        self._sinks.append(sink)
        return lambda: self._sinks.remove(sink) if sink in self._sinks else None

    def liveness(self) -> Liveness:
        if self._process is not None:
            return self._process.liveness()
        if self._destroyed:
            return Liveness.GONE
        # An incoming copy whose domain libvirt has not made yet: what waits is this process.
        return Liveness.ALIVE

    @property
    def _sealed(self) -> bool:
        return _SEALED in self._metadata.extra

    @property
    def _on_its_own(self) -> bool:
        """No incoming migration holds it any more."""
        return self._metadata.role != "incoming" or _FINISHED in self._metadata.extra

    # --- asking -------------------------------------------------------------------------------------------------------

    async def state(self, timeout_s: float = 2.0) -> VmmState:
        if self._incoming is not None and not self._on_its_own:
            return self._arriving()
        run, status = await self._run_state(timeout_s), self._status
        if run is RunState.RUNNING:
            return VmmState(run, status if status in _UNDER_WAY else self._settled_status(), self._error)
        if self._sealed:
            return VmmState(RunState.SEALED, EngineStatus.COMPLETED)
        if status is EngineStatus.PARKED:
            return VmmState(RunState.FINISHING, status)
        return VmmState(run, status, self._error)

    def _settled_status(self) -> EngineStatus:
        return EngineStatus.CANCELLED if self._status is EngineStatus.COMPLETED else self._status

    def _arriving(self) -> VmmState:
        assert self._incoming is not None
        stage = self._incoming.stage
        if stage is Stage.LOADED:
            return VmmState(RunState.PAUSED, EngineStatus.COMPLETED)
        if stage is Stage.BROKEN:
            return VmmState(RunState.INCOMING, EngineStatus.FAILED, self._error)
        return VmmState(RunState.INCOMING, EngineStatus.ACTIVE if stage is Stage.MADE else EngineStatus.NONE)

    async def _run_state(self, timeout_s: float) -> RunState:
        try:
            state, _ = await self._domain("state", lambda found: found.state(), timeout_s)
        except NoDomain:
            if self.liveness() is not Liveness.GONE:
                raise
            raise EngineError(f"the VMM of {self._spec.spec.name} is gone") from None
        libvirt = self._daemon.libvirt
        if state in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED):
            return RunState.RUNNING
        ended = (libvirt.VIR_DOMAIN_SHUTDOWN, libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED)
        return RunState.ENDED if state in ended else RunState.PAUSED

    async def progress(self) -> base.Progress:
        if self._outgoing is None or self._status is not EngineStatus.ACTIVE:
            return replace(self._last, status=self._status)
        with contextlib.suppress(EngineError):
            self._last = _progress(await self._domain("progress", lambda found: found.jobStats(0), 2.0))
        return replace(self._last, status=self._status)

    async def unmigratable(self) -> tuple[Obstacle, ...]:
        await self._run_state(_ASK_S)
        return ()

    # --- stop and start -----------------------------------------------------------------------------------------------

    async def devices(self) -> Mapping[str, str]:
        """Those that it was started with: nothing is changed here, and so none is ever gone."""
        devices = self._spec.machine.devices if self._spec.machine is not None else ()
        return {device.id: device.driver for device in devices}

    async def attach(self, device: LiveDevice, spec: base.VmmSpec) -> LiveDevice:
        raise EngineError(_NO_CHANGES)

    async def as_it_is(self, device: LiveDevice) -> LiveDevice:
        raise EngineError(_NO_CHANGES)

    async def let_go(self, device: LiveDevice, timeout_s: float) -> bool:
        raise EngineError(_NO_CHANGES)

    async def drop(self, device: LiveDevice) -> None:
        raise EngineError(_NO_CHANGES)

    def described(self, spec: base.VmmSpec) -> None:
        self._spec = spec

    async def pause(self) -> None:
        if self._incoming is not None and not self._on_its_own:
            return
        if await self._run_state(_ASK_S) is RunState.RUNNING:
            await self._domain("pause", lambda found: found.suspend())
        self._stands = True

    async def resume(self) -> None:
        if self._metadata.role == "incoming":
            await self.take_over()
        elif self._status is EngineStatus.PARKED:
            raise EngineError("libvirt has stopped the guest for its migration: end that first")
        await self._released()
        run = await self._run_state(_ASK_S)
        if run is RunState.ENDED:
            raise GuestHasEnded("the guest has shut down")
        if run is not RunState.RUNNING:
            try:
                await self._domain("resume", lambda found: found.resume(), _RESUME_S)
            except EngineError as error:
                raise (locked(error) or error) from error
        self._stands = False
        self._unseal()

    async def _released(self) -> None:
        """libvirt's client is gone, and with it what it holds of the domain."""
        if self._outgoing is not None:
            await self._outgoing.over(_GONE_S)
            self._outgoing = None

    # --- the source ---------------------------------------------------------------------------------------------------

    async def start_outgoing(self, options: base.OutgoingOptions) -> None:
        if options.stream is None:
            raise EngineError("there is no destination to send to")
        await self._released()
        self._stands = await self._run_state(_ASK_S) is not RunState.RUNNING
        self._error, self._last = "", base.Progress()
        await self._domain("downtime", lambda found: found.migrateSetMaxDowntime(options.downtime_limit_ms))
        sockets = notes.client_sockets(self._spec)
        outgoing = Outgoing(self._daemon, self._spec.guest, options, sockets, self._parked, self._client_ended)
        await outgoing.begin(options.stream, self._socket)
        self._outgoing = outgoing
        self._tell(EngineStatus.ACTIVE)

    async def hold(self) -> None:
        """Nothing: a guest whose memory is being copied is not held. Before that, no gate was opened."""

    async def release(self) -> None:
        if self._outgoing is not None:
            self._outgoing.release()

    async def proceed(self) -> None:
        if self._status is not EngineStatus.PARKED or self._outgoing is None or self._outgoing.is_over:
            raise EngineError(f"not parked but {self._status}")
        try:
            self._note(replace(self._metadata, extra={**self._metadata.extra, _SEALED: "yes"}))
        except OSError as error:
            raise EngineError(f"cannot note that the guest is sealed: {error}") from error
        self._tell(EngineStatus.COMPLETED)

    async def abort(self, timeout_s: float = 30.0) -> VmmState:
        """See the port. libvirt needs seconds for it, and so has longer than the port's own default."""
        outgoing = self._outgoing
        if outgoing is None:
            return await self._left_behind()
        if not outgoing.sealed:
            with contextlib.suppress(EngineError):
                await self._domain("abort", lambda found: found.abortJob(), _ASK_S)
        if self._sealed:
            return VmmState(RunState.SEALED, EngineStatus.COMPLETED)
        self._status = EngineStatus.CANCELLING
        if not await outgoing.over(timeout_s):
            raise EngineTimeout(f"abort: libvirt's client has not ended in {timeout_s:g} s")
        self._outgoing = None
        run = await self._as_before(timeout_s)
        self._tell(EngineStatus.CANCELLED)
        return VmmState(run, EngineStatus.CANCELLED, self._error)

    async def _left_behind(self) -> VmmState:
        """A migration that an earlier agent began ends with its client; one that copies memory is told so."""
        if self._sealed or self._incoming is not None:
            return await self.state()
        with contextlib.suppress(EngineError):
            await self._domain("abort", lambda found: found.abortJob(), _ASK_S)
        return await self.state()

    async def _as_before(self, timeout_s: float) -> RunState:
        """The guest runs again unless it was stopped on purpose. The daemon is asked until it has let go of it."""
        async with _bounded("abort", timeout_s):
            while True:
                with contextlib.suppress(EngineTimeout):
                    run = await self._run_state(_ASK_S)
                    if run is not RunState.PAUSED or self._stands:
                        return run
                    await self._domain("resume", lambda found: found.resume(), _RESUME_S)
                await asyncio.sleep(_POLL_S)

    def _parked(self) -> None:
        if self._status is EngineStatus.ACTIVE:
            self._tell(EngineStatus.PARKED)

    def _client_ended(self, error: str) -> None:
        """Also of a parked guest: the destination has gone, and what it has loaded with it."""
        if self._status in (EngineStatus.ACTIVE, EngineStatus.PARKED):
            self._error = error
            self._tell(EngineStatus.FAILED, error)

    # --- the destination ----------------------------------------------------------------------------------------------

    async def listen(self, address: str) -> None:
        """Raises EngineError and OSError."""
        incoming = Incoming(self._spec.inc, domain.places_of(self._spec), self._came)
        port = await incoming.listen(address, self._socket)
        self._incoming = incoming
        self._note(replace(self._metadata, endpoint=f"tcp:{join_address(address, port)}"))
        notes.write(notes.owner_path(self._spec), replace(self._metadata, role="owner"))

    async def take_over(self) -> None:
        if self._on_its_own:
            return
        if self._incoming is None:
            raise EngineError("the copy's migration ended with the agent that it came through; it never ran")
        await self._incoming.finish(_SETTLE_S)
        try:
            await self._found()
            if self._process is None:
                raise EngineError("libvirt says that it has the copy, and there is no process of it")
            self._note(replace(self._metadata, extra={**self._metadata.extra, _FINISHED: "yes"}))
            notes.write(notes.owner_path(self._spec), replace(self._metadata, role="owner"))
        except OSError as error:
            raise EngineError(f"cannot note that the copy stands on its own: {error}") from error

    async def promote(self) -> None:
        await self.take_over()
        promoted = replace(self._metadata, role="owner")
        try:
            try:
                notes.owner_path(self._spec).replace(notes.note_path(self._spec))
            except FileNotFoundError:
                notes.write(notes.note_path(self._spec), promoted)
        except OSError as error:
            raise EngineError(f"cannot note that the VMM is the guest's now: {error}") from error
        self._metadata = promoted

    async def announce(self) -> None:
        """QEMU does so by itself when its vCPUs start."""

    def _came(self, stage: Stage, why: str) -> None:
        match stage:
            case Stage.MADE:
                self._emit(base.StatusChanged(EngineStatus.ACTIVE))
                self._finding = asyncio.ensure_future(self._found_quietly())
            case Stage.LOADED:
                self._tell(EngineStatus.COMPLETED)
            case Stage.BROKEN:
                self._error = why
                self._tell(EngineStatus.FAILED, why)
            case _:
                pass

    async def _found_quietly(self) -> None:
        with contextlib.suppress(EngineError, OSError):
            await self._found()

    async def _found(self) -> None:
        """The process that libvirt has made is watched, and noted in place of this agent's own."""
        if self._process is not None:
            return
        process = await asyncio.to_thread(notes.process_of, self._spec)
        if process is None or self._process is not None or self._destroyed:
            return
        try:
            self._process = processes.Watched.find(*process)
        except LivenessUnknown as error:
            raise EngineError(f"the VMM of {self._spec.spec.name} cannot be watched: {error}") from error
        if self._process is not None:
            self._process.on_death = self._died
            self._note(replace(self._metadata, pid=process[0], start_time=process[1]))

    # --- the end ------------------------------------------------------------------------------------------------------

    async def detach(self) -> None:
        self._daemon.unlisten(self._spec.guest, self._sink)
        if self._outgoing is not None:
            self._outgoing.cut()
        if self._incoming is not None:
            await self._incoming.end()
        if self._process is not None:
            self._process.close()

    async def destroy(self) -> None:
        if self._incoming is not None:
            await self._incoming.end()
        await self._released()
        if self._process is None:
            await self._found()
        if self._process is not None and self.liveness() is not Liveness.GONE:
            with contextlib.suppress(EngineError):
                await self._named("destroy", lambda found: found.destroy(), _GONE_S)
            if self.liveness() is not Liveness.GONE:
                self._process.kill()  # the daemon does not answer, or knows it no longer
            async with _bounded("destroy", _GONE_S):
                await self._process.dead.wait()
        gone, self._destroyed = self._process is None and not self._destroyed, True
        await self.detach()
        await asyncio.to_thread(notes.remove_all, self._spec)
        if gone:
            self._died()

    # --- helpers ------------------------------------------------------------------------------------------------------

    async def _domain(self, what: str, work: Callable[[Any], Any], timeout_s: float = 5.0) -> Any:
        return await self._daemon.domain(what, self._spec.guest, work, timeout_s)

    async def _named(self, what: str, work: Callable[[Any], Any], timeout_s: float) -> Any:
        """By the copy's own name: hosts that share a daemon's machine may have two of one uuid in turn."""
        name = domain.places_of(self._spec).name
        return await self._daemon.call(what, lambda connection: work(connection.lookupByName(name)), timeout_s)

    def _note(self, metadata: VmmMetadata) -> None:
        notes.write(notes.note_path(self._spec), metadata)
        self._metadata = metadata

    def _unseal(self) -> None:
        """It runs here again: what was noted for its successor is no longer so. A note that cannot be written is read
        as sealed, which only makes that one ask the ledger first."""
        if self._sealed:
            extra = {key: value for key, value in self._metadata.extra.items() if key != _SEALED}
            with contextlib.suppress(OSError):
                self._note(replace(self._metadata, extra=extra))
            self._metadata = replace(self._metadata, extra=extra)
            self._status = EngineStatus.CANCELLED

    def _tell(self, status: EngineStatus, error: str = "") -> None:
        self._status = status
        self._emit(base.StatusChanged(status, error))

    def _emit(self, event: base.EngineEvent) -> None:
        for sink in tuple(self._sinks):
            sink(event)

    def _died(self) -> None:
        self._emit(base.VmmDied())

    def _heard(self, event: int, detail: int) -> None:
        libvirt = self._daemon.libvirt
        if event in (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_RESUMED):
            self._emit(base.RunStateChanged(event == libvirt.VIR_DOMAIN_EVENT_RESUMED, time.time()))
        elif event == libvirt.VIR_DOMAIN_EVENT_CRASHED:
            self._emit(base.GuestEnded("panic"))
        elif event == libvirt.VIR_DOMAIN_EVENT_STOPPED and detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN:
            self._emit(base.GuestEnded("shutdown"))


class LibvirtEngine(base.MigrationEngine):
    """Runs guests as transient domains of the daemon behind `socket`. `image`, `images` and `binary` as with QEMU."""

    def __init__(
        self,
        image: Path | None,
        socket: Path,
        binary: str = "qemu-system-x86_64",
        accelerator: str = "tcg",
        *,
        images: Path | None = None,
    ) -> None:
        self._images = Images(image, images)
        self._socket = socket
        self._daemon = Daemon(f"qemu+unix:///system?socket={socket}")
        self._emulator = shutil.which(binary) or binary
        self._accelerator = accelerator
        self._known: dict[str, str] | None = None

    async def probe(self) -> dict[str, str]:
        known = self._known
        if known is None:
            known = self._known = dict(await self._daemon.call("probe of libvirt", self._probed, 30.0))
        return known

    def _probed(self, connection: Any) -> dict[str, str]:
        number = connection.getLibVersion()
        capabilities = ET.fromstring(connection.getCapabilities())
        names: set[str] = set()
        aliases: dict[str, str] = {}
        for machine in capabilities.findall("guest/arch[@name='x86_64']/machine"):
            name, real = machine.text or "", machine.get("canonical", "")
            names.add(name)
            if real:
                aliases[name] = real
                names.add(real)
        return {
            "version": f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}",
            "machine_types": ",".join(sorted(names)),
            "machine_aliases": ",".join(f"{alias}={name}" for alias, name in sorted(aliases.items())),
            "switchover_ack": "none",
            "devices_inside": "",
            "accelerator": self._accelerator,
            "cpu_models": "",
            "limits": "; ".join(LIMITS),
        }

    async def start(self, spec: base.VmmSpec) -> LibvirtVmm:
        text = self._made(spec)
        await _lockable(spec)
        await self._linked(spec)
        try:
            self._announced(spec)
            await self._daemon.call("start", lambda connection: _started(connection, text), _START_S)
            return await self._watched(spec)
        except BaseException as error:
            # Whatever has come of it: nothing is left of a guest that nobody knows of.
            await self._undone(spec)
            if isinstance(error, EngineError) and (refused := locked(error)) is not None:
                raise refused from error
            raise

    async def prepare_incoming(self, spec: base.VmmSpec, migration: str, attempt: int) -> LibvirtVmm:
        self._made(spec)
        await _lockable(spec)
        await self.probe()
        await self._linked(spec)
        me = _myself()
        metadata = VmmMetadata(spec.guest, spec.inc, *me, "incoming", migration, attempt)
        vmm = LibvirtVmm(metadata, spec, self._daemon, self._socket, None)
        try:
            await vmm.listen(spec.listen_address or "127.0.0.1")
        except BaseException as error:
            await vmm.destroy()
            if isinstance(error, OSError):
                raise EngineError(f"cannot listen for guest {spec.spec.name}: {error}") from error
            raise
        return vmm

    async def adopt(self, metadata: VmmMetadata, spec: base.VmmSpec) -> LibvirtVmm | None:
        if _STARTING in metadata.extra:
            await self._never_started(spec)
            return None
        try:
            watched = processes.Watched.find(metadata.pid, metadata.start_time)
        except LivenessUnknown as error:
            raise EngineError(f"VMM of {spec.spec.name}: {error}") from error
        if watched is None and metadata.role == "incoming":
            # The note may be of before libvirt made the copy: it goes with its migration, but perhaps not yet.
            await self._undone(spec)
        if watched is None:
            return None
        vmm = LibvirtVmm(metadata, spec, self._daemon, self._socket, watched)
        try:
            await self._daemon.domain("adopt", spec.guest, lambda found: found.name(), 4.0)
        except BaseException as error:
            gone = vmm.liveness() is Liveness.GONE
            await vmm.detach()
            if gone and isinstance(error, EngineError):
                return None
            raise
        return vmm

    def _made(self, spec: base.VmmSpec) -> str:
        """The domain's XML. Raises EngineError and ImageNotFound before anything is made."""
        self._images.kernel(spec.spec.boot)
        self._images.initrd(spec.spec.boot)
        return domain.domain_xml(spec, self._accelerator, self._emulator)

    async def _linked(self, spec: base.VmmSpec) -> None:
        kernel, initrd = self._images.kernel(spec.spec.boot), self._images.initrd(spec.spec.boot)
        try:
            await asyncio.to_thread(notes.link_all, spec, kernel, initrd)
        except OSError as error:
            raise EngineError(f"cannot make the files of guest {spec.spec.name}: {error}") from error

    async def _watched(self, spec: base.VmmSpec) -> LibvirtVmm:
        """The guest that was just made, stopped still: watched, noted down, and only then started."""
        process = await asyncio.to_thread(notes.process_of, spec)
        watched = None
        with contextlib.suppress(LivenessUnknown):
            watched = processes.Watched.find(*process) if process is not None else None
        if process is None or watched is None:
            raise EngineError(f"libvirt has started guest {spec.spec.name}, and its process cannot be found")
        live = await self._daemon.domain("machine", spec.guest, lambda found: found.XMLDesc(0))
        metadata = VmmMetadata(spec.guest, spec.inc, *process, "owner", machine=domain.machine_of(live))
        try:
            notes.write(notes.note_path(spec), metadata)
        except OSError as error:
            watched.close()
            raise EngineError(f"cannot note down the VMM of {spec.spec.name}: {error}") from error
        vmm = LibvirtVmm(metadata, spec, self._daemon, self._socket, watched)
        await vmm.resume()
        return vmm

    def _announced(self, spec: base.VmmSpec) -> None:
        """What libvirt is about to start is noted before it is asked to: an agent that dies in between leaves a
        successor that knows of it. Raises EngineError."""
        try:
            notes.write(
                notes.note_path(spec), VmmMetadata(spec.guest, spec.inc, *_myself(), "owner", extra={_STARTING: "yes"})
            )
        except OSError as error:
            raise EngineError(f"cannot note down the VMM of {spec.spec.name}: {error}") from error

    async def _never_started(self, spec: base.VmmSpec) -> None:
        """End what an agent was killed over before it noted the process down. Nothing of it has run, unless somebody
        resumed the domain by hand: then it is left as it is.

        Raises EngineError when that, or the process, cannot be told: the note stays, and it is asked again.
        """
        await asyncio.to_thread(notes.bar, spec)
        name, libvirt = domain.places_of(spec).name, library()
        try:
            state, _ = await self._daemon.call("adopt", lambda connection: connection.lookupByName(name).state(), 4.0)
        except NoDomain:
            pass  # libvirt has not made it, and now cannot
        except EngineError:
            if await asyncio.to_thread(notes.process_of, spec) is not None:
                raise
        else:
            if state in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED):
                said = "runs although Drover never started it: was it resumed by hand? It is left as it is"
                raise EngineError(f"domain {name} {said}")
        await self._undone(spec)

    async def _undone(self, spec: base.VmmSpec) -> None:
        """Nothing is left of a copy that never ran. Raises EngineError when that cannot be told."""
        await asyncio.to_thread(notes.bar, spec)
        name = domain.places_of(spec).name
        with contextlib.suppress(EngineError):
            await self._daemon.call("destroy", lambda connection: connection.lookupByName(name).destroy(), _GONE_S)
        process = await asyncio.to_thread(notes.process_of, spec)
        if process is not None and (watched := processes.Watched.find(*process)) is not None:
            watched.kill()
            async with _bounded("destroy", _GONE_S):
                await watched.dead.wait()
        await asyncio.to_thread(notes.remove_all, spec)


async def _lockable(spec: base.VmmSpec) -> None:
    """Raises EngineError: an image of a shared pool cannot be locked here, and QEMU would open it all the same. Only a
    command line of our own could forbid it that, and libvirt writes this one."""
    async with _bounded("locks of the images", _ASK_S):
        for disk in spec.disks:
            if disk.locks and not disk.read_only:
                await asyncio.to_thread(must_be_lockable, disk.path)


def _started(connection: Any, text: str) -> None:
    """Made, and stopped still: no vCPU runs before the process is noted down."""
    connection.createXML(text, library().VIR_DOMAIN_START_PAUSED)


def _myself() -> tuple[int, int]:
    """Pid and start time of this process."""
    return os.getpid(), proc.start_time_of(os.getpid()) or 0


def _progress(stats: Mapping[str, Any]) -> base.Progress:
    return base.Progress(
        transferred_bytes=stats.get("data_processed", 0),
        remaining_bytes=stats.get("data_remaining", 0),
        total_bytes=stats.get("data_total", 0),
        bandwidth_mbps=stats.get("memory_bps", 0) * 8 / 1e6,
        dirty_rate_mbps=stats.get("memory_dirty_rate", 0) * stats.get("memory_page_size", 4096) * 8 / 1e6,
        iteration=stats.get("memory_iteration", 0),
        expected_downtime_ms=stats.get("downtime", 0),
    )


@contextlib.asynccontextmanager
async def _bounded(what: str, timeout_s: float) -> AsyncGenerator[None, None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise EngineTimeout(f"{what}: not over after {timeout_s:g} s") from error
