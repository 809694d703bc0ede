"""The shell of a destination session: carries out the commands of `destination.py`. Nothing is decided here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from agents.disks.images import DiskError
from agents.disks.local import LocalImages
from agents.engine import base as engine
from agents.guest.files import make_marker, there
from agents.handover import words
from agents.handover.destination import DestinationStage, DestinationState, destination_step
from agents.handover.ledger import AttemptLedger
from agents.handover.peer import PeerUnavailable, SourcePeer
from agents.handover.report import DEVICES_LOST, device_entries
from agents.handover.shell import RETRY_S, Shell
from agents.handover.words import Command, Do, Event, Seen, Timer, WriteAbort
from agents.shims.base import DestinationShim, Frame, FrameKind, InVmmDevices, Load, ShimError
from orchestrator.core.disks import ImageThere, SyncPoint
from orchestrator.core.handover import GuestRecord
from orchestrator.core.liveness import Liveness
from orchestrator.core.records import TimelineEntry
from orchestrator.ledger.store import StoreUnavailable

_SOURCE_TIME_S = 2.0
_LOOK_S = 0.5
_UNCLAIMED_MS = 15_000.0


@dataclass
class DestinationShell(Shell[DestinationState]):
    """One attempt at its destination, from the waiting VMM to DONE or to its discard."""

    state: DestinationState
    vmm: engine.Vmm
    shims: Sequence[DestinationShim]
    ledger: AttemptLedger
    peer: SourcePeer
    marker: Path
    """In the host's volatile directory. Written before anything here can have an effect on the guest."""
    want_run: Callable[[], Awaitable[bool]]
    """The operator's wish, read from the ledger when the guest is about to start and no GO has brought it."""
    unclaimed_ms: float = _UNCLAIMED_MS
    """How long the VMM waits for somebody to conduct its attempt (PrepareOrder.timeout_ms)."""
    in_vmm: InVmmDevices | None = None
    bind: Callable[[], Awaitable[None]] | None = None
    """Says to whoever controls the host's bridges that the guest is here. Raises OSError."""
    images: LocalImages | None = None
    """The guest's local disks; None: it has none."""
    timeline: list[TimelineEntry] = field(default_factory=list[TimelineEntry])
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """The guest was started here, or left stopped as wished."""
    _told_want_run: bool | None = None
    _loads: tuple[Load, ...] = ()
    _points: tuple[SyncPoint, ...] = ()
    _releasing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _ended: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        after_ms = {Timer.UNCLAIMED: self.unclaimed_ms, Timer.SOURCE_TIME: _SOURCE_TIME_S * 1000}
        self._set_up(destination_step, after_ms, "destination")

    def go(self, inc: str, want_run: bool) -> None:
        """GO brings what the source knows of the wish, so that nothing is read in the blackout."""
        if inc == self.state.inc:
            self._told_want_run = want_run
        self.feed(words.GoSeen(inc))

    async def begin(self, session_number: int) -> None:
        """Devices -> RESUMING, before the source may send. Raises ShimError."""
        for shim in self.shims:
            await shim.begin_load(session_number)

    async def frame(self, frame: Frame) -> None:
        """One piece of a device's state; its ACK goes back from here."""
        shim = next((shim for shim in self.shims if shim.device == frame.device), None)
        if shim is None:
            return
        try:
            ack = await shim.load(frame)
        except ShimError as error:
            self._note("shim_failed", str(error))
            self.feed(Seen.SHIM_FAILED)
            return
        if ack is not None:
            self._spawn(self._repeat(lambda: self.peer.ack(ack), once=True), "ACK")
        if frame.kind is FrameKind.END:
            self._ended.add(frame.device)
            if len(self._ended) == len(self.shims):
                self.feed(Seen.SHIMS_LOADED)

    def images_there(self) -> tuple[ImageThere, ...]:
        """For the source, which fills them; empty when they cannot be told."""
        if self.images is None:
            return ()
        try:
            return self.images.there()
        except DiskError as error:
            self._note("images_unknown", str(error))
            return ()

    async def release(self, points: Sequence[SyncPoint]) -> None:
        """Let go of the images, as the source has drained them. It may say so more than once."""
        async with self._releasing:
            if self.images is None or self._points or self.state.stage is not DestinationStage.WAITING:
                return
            try:
                self._points = await self.images.release(points)
            except DiskError as error:
                self._note("release_failed", str(error))
                self.feed(Seen.DISKS_FAILED)
                return
            self._note("disks_released", ",".join(point.disk for point in self._points))
            self.feed(Seen.DISKS_RELEASED)

    async def _images_are_ours(self) -> None:
        """DONE: nobody comes back for them. What fails is found again by the guest's keeper."""
        if self.images is not None:
            try:
                await self.images.finish()
            except DiskError as error:
                self._note("images_not_finished", str(error))

    async def run(self, first: Sequence[Command] = ()) -> DestinationState:
        """To DONE or discard. `first`: what `restarted_destination` asked for."""
        loop = asyncio.get_running_loop()
        self._began = loop.time()
        ends = [self.vmm.subscribe(self._engine_event), self.ledger.watch_record(self._record_seen)]
        self._spawn(self._carry_out(), "commands")
        for command in first:
            self._queue(command)
        try:
            await self._drive()
            with contextlib.suppress(PeerUnavailable):
                if self.state.stage is DestinationStage.ENDED_DONE:
                    await self.peer.done(self.state.inc)
            if self.state.stage is DestinationStage.ENDED_DONE:
                await self._images_are_ours()
        finally:
            for end in ends:
                end()
            await self._close()
        return self.state

    async def _carry_out(self) -> None:
        while True:
            command = await self._commands.get()
            event: Event | None = None
            match command:
                case WriteAbort(reason, devices):
                    event = await self.ledger.abort(reason, devices)
                case Do():
                    event = await self._effects[command](self)
                case _:
                    pass
            if event is not None:
                self.feed(event)

    # --- commands -----------------------------------------------------------------------------------------------------

    async def _validate(self) -> Event | None:
        try:
            self._loads = tuple(await asyncio.gather(*(shim.validate() for shim in self.shims)))
        except ShimError as error:
            self._note("shim_failed", str(error))
            return Seen.SHIM_FAILED
        return Seen.VALIDATED

    async def _send_loaded(self) -> Event | None:
        self._spawn(self._repeat(lambda: self.peer.loaded(self.state.inc, self._loads, self._points)), "LOADED")
        return None

    async def _send_failed(self) -> Event | None:
        self._spawn(self._repeat(lambda: self.peer.failed(self.state.inc)), "FAILED")
        return None

    async def _write_marker(self) -> Event | None:
        if self.vmm.liveness() is Liveness.GONE:
            # Its death is on its way here as an event. Without a marker the guest can be given back.
            self._note("marker_not_written", "the VMM is dead")
            return Seen.MARKER_FAILED
        try:
            await self.vmm.take_over()
        except engine.EngineError as error:
            self._note("take_over_failed", str(error))
            return Seen.MARKER_FAILED
        try:
            make_marker(self.marker)
        except OSError as error:
            self._note("marker_failed", str(error))
            return Seen.MARKER_FAILED
        return Seen.MARKER_WRITTEN

    async def _activate_shims(self) -> Event | None:
        try:
            await asyncio.gather(*(shim.activate() for shim in self.shims))
        except ShimError as error:
            self._note("activation_failed", str(error))
            return Seen.ACTIVATION_FAILED
        return Seen.ACTIVATED

    async def _start_guest(self) -> Event | None:
        good = Seen.STARTED
        try:
            told = self._told_want_run
            if await self.want_run() if told is None else told:
                try:
                    await self.vmm.resume()
                except engine.GuestHasEnded as error:
                    self._note("guest_ended", str(error))
                    good = Seen.GUEST_ENDED
            # Before DONE: a restarted agent must know this copy as the guest even when the record has moved on.
            self.started.set()
            await self.vmm.promote()
            await self._note_inside()
        except (engine.EngineError, StoreUnavailable) as error:
            self._note("disk_locked" if isinstance(error, engine.DiskLocked) else "start_failed", str(error))
            return Seen.ACTIVATION_FAILED
        return good

    async def _note_inside(self) -> None:
        """A device that could not be set going was reset by the VMM: the guest runs, with a device that forgot it."""
        if self.in_vmm is None:
            return
        with contextlib.suppress(ShimError, TimeoutError):
            async with asyncio.timeout(_LOOK_S):
                inside = await self.in_vmm.look()
            self.timeline.extend(device_entries(inside, self._began, self.state.here.host))
            if lost := ",".join(one.device for one in inside if one.lost):
                self._note(DEVICES_LOST, lost)

    async def _announce(self) -> Event | None:
        """The guest runs: its ports are bound now, and then it is announced, since frames of before may be lost."""
        if self.bind is not None:
            try:
                await self.bind()
            except OSError as error:
                self._note("bind_failed", str(error))
        with contextlib.suppress(engine.EngineError):
            await self.vmm.announce()
        return None

    async def _write_done(self) -> Event | None:
        return await self.ledger.done()

    async def _write_rollback(self) -> Event | None:
        try:
            marker = there(self.marker)
        except OSError as error:  # not known: nothing is given back on the strength of that
            self._note("marker_unknown", str(error))
            await asyncio.sleep(RETRY_S)
            return Seen.LEDGER_UNKNOWN
        gone = self.vmm.liveness() is Liveness.GONE
        return await self.ledger.roll_back(vmm_seen_dead=gone, marker=marker)

    async def _declare_crashed(self) -> Event | None:
        return await self.ledger.crashed()

    async def _discard(self) -> Event | None:
        await self.vmm.destroy()
        for shim in self.shims:
            with contextlib.suppress(ShimError):
                await shim.discard()
        return Seen.DISCARDED

    async def _read(self) -> Event | None:
        try:
            record, version = await self.ledger.read_behind_barrier()
        except StoreUnavailable:
            self._retry_later()
            return None
        return words.RecordRead(record, version)

    async def _nothing(self) -> Event | None:
        return None  # DONE is told to the source after the session ended, see `run`

    _effects: ClassVar[dict[Do, Callable[[DestinationShell], Awaitable[Event | None]]]] = {
        Do.VALIDATE: _validate,
        Do.SEND_LOADED: _send_loaded,
        Do.SEND_FAILED: _send_failed,
        Do.SEND_DONE: _nothing,
        Do.WRITE_MARKER: _write_marker,
        Do.ACTIVATE_SHIMS: _activate_shims,
        Do.START_GUEST: _start_guest,
        Do.ANNOUNCE: _announce,
        Do.WRITE_DONE: _write_done,
        Do.WRITE_ROLLBACK: _write_rollback,
        Do.DECLARE_CRASHED: _declare_crashed,
        Do.DISCARD_DESTINATION: _discard,
        Do.READ: _read,
    }

    # --- what comes in by itself --------------------------------------------------------------------------------------

    def _record_seen(self, record: GuestRecord) -> None:
        self.feed(words.RecordSeen(record))

    def _engine_event(self, event: engine.EngineEvent) -> None:
        match event:
            case engine.StatusChanged(engine.EngineStatus.COMPLETED):
                self.feed(Seen.COMPLETED)
            case engine.StatusChanged(engine.EngineStatus.FAILED, error):
                self._note("engine_failed", error)
                self.feed(Seen.ENGINE_FAILED)
            case engine.RunStateChanged(running, at_s):
                # The engine's own stamp beside ours: what a guest stood still is read from it to the microsecond.
                self._note("vcpus run" if running else "vcpus stopped", f"{at_s:.6f}")
            case engine.VmmDied():
                self.feed(Seen.VMM_DIED)
            case _:
                pass

    async def _repeat(self, call: Callable[[], Awaitable[None]], *, once: bool = False) -> None:
        """Until it was answered; a message that was answered but lost on its way is what the ledger is for."""
        while True:
            try:
                await call()
            except PeerUnavailable:
                await asyncio.sleep(RETRY_S)
                continue
            if once:
                return
            await asyncio.sleep(RETRY_S)
