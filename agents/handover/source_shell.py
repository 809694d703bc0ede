"""The shell of a source session: carries out the commands of `source/` and feeds back what came of them.

Commands run one after another in the order in which the machine gave them, but for the writes of requests, which have
a lane of their own: an abort in the blackout does not wait for them. Events are taken in at any time. That is just what
the exploration assumes. Nothing is decided here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from agents.engine import base as engine
from agents.handover import words
from agents.handover.ledger import AttemptLedger
from agents.handover.pace import Pace
from agents.handover.peer import DestinationPeer, PeerUnavailable
from agents.handover.report import device_entries
from agents.handover.shell import RETRY_S, Shell
from agents.handover.source import SourceStage, SourceState, source_step
from agents.handover.words import (
    CancelTimer,
    Command,
    Commit,
    Do,
    Event,
    Note,
    Seen,
    StartTimer,
    Timer,
    WriteAbort,
    WriteRequests,
)
from agents.shims.base import Frame, FrameKind, InVmmDevices, Load, ShimError, SourceShim
from agents.shims.block import DiskTrouble, SourceDisks
from agents.shims.inside import InVmmDevice
from orchestrator.core.disks import SyncPoint
from orchestrator.core.handover import GuestRecord
from orchestrator.core.ids import AckRequest
from orchestrator.core.liveness import Liveness
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import TimelineEntry
from orchestrator.ledger.store import StoreUnavailable

_VITALS_S = 0.25
_FRESH_S = 1.0
_HOOK_S = 2.0
_NAMES_S = 0.5
"""How long an abort waits to learn which devices inside the VMM it is about."""

_ROLL_BACK_S = 2.0
"""How long a guest that stands still waits for a device's way back; then it runs on without it."""
_CUT_SHORT: frozenset[Command] = frozenset({Do.QUIESCE, Do.DRAIN_DISKS, Do.PROCEED})


async def _within(bound_s: float | None, shim: SourceShim) -> None:
    """Raises ShimError, also when the device took too long."""
    try:
        async with asyncio.timeout(bound_s):
            await shim.roll_back()
    except TimeoutError:
        raise ShimError(f"{shim.device} was not back within {bound_s:g} s", reset=True) from None


@dataclass
class SourceShell(Shell[SourceState]):
    """Conducts one attempt from BEGIN to its end. `run` returns the final state; the VMM is then as that state says."""

    state: SourceState
    vmm: engine.Vmm
    shims: Sequence[SourceShim]
    ledger: AttemptLedger
    peer: DestinationPeer
    policy: MigrationPolicy
    options: engine.OutgoingOptions
    session_number: int
    in_vmm: InVmmDevices | None = None
    disks: SourceDisks | None = None
    """The guest's local disks; None: it has none."""
    retire_disks: Callable[[], Awaitable[None]] | None = None
    """Take the images of the local disks out of use here. Raises OSError."""
    inside: tuple[InVmmDevice, ...] = ()
    """The devices inside the VMM, as they were last seen."""
    timeline: list[TimelineEntry] = field(default_factory=list[TimelineEntry])
    transferred_bytes: int = 0
    """Of the engine's stream, known once the attempt is over."""
    duration_ms: float = 0.0
    _writes: asyncio.Queue[WriteRequests] = field(default_factory=asyncio.Queue[WriteRequests])
    _precopy: list[asyncio.Task[Any]] = field(default_factory=list[asyncio.Task[Any]])
    _sent: dict[str, Load] = field(default_factory=dict[str, Load])
    _loaded: tuple[str, dict[str, Load]] | None = None
    _images: tuple[SyncPoint, ...] = ()
    _syncing: asyncio.Task[Any] | None = None
    _busy: asyncio.Task[Event | None] | None = None
    """What the guest, which stands still, waits for just now, and may not wait for any longer than policy says."""
    _stood: bool = False
    _bound: asyncio.Event = field(default_factory=asyncio.Event)
    """The ledger has answered to the bind."""
    _unpaced: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        policy = self.policy
        self._pace = Pace(policy.max_bandwidth_mbps * 125_000)
        self._set_up(
            source_step,
            {
                Timer.DISKS: max(policy.total_timeout_ms, policy.precopy_timeout_ms),
                Timer.PRECOPY: policy.precopy_timeout_ms,
                Timer.SUSPENDED: policy.precopy_timeout_ms,
                Timer.ACK: policy.ack_timeout_ms,
                Timer.GATE_WAIT: policy.gate_wait_ms,
                Timer.SWITCHOVER: policy.switchover_timeout_ms,
            },
            "source",
        )

    def loaded(self, inc: str, loads: Sequence[Load], images: tuple[SyncPoint, ...] = ()) -> None:
        """LOADED from the destination. Compared once everything was sent; repetitions are harmless."""
        self._images = images
        self._loaded = (inc, {load.device: load for load in loads})
        self._compare()

    async def run(self, first: Sequence[Command] | None = None) -> SourceState:
        """To the attempt's end. `first`: what `restarted_source` asked for, instead of a beginning."""
        loop = asyncio.get_running_loop()
        self._began = loop.time()
        ends = [
            self.vmm.subscribe(self._engine_event),
            self.ledger.watch_record(self._record_seen),
            self.ledger.watch_requests(self._requests_seen),
        ]
        self._spawn(self._carry_out(), "commands")
        self._spawn(self._write_requests(), "requests")
        self._spawn(self._vitals(), "vitals")
        if first is None:
            self.feed(Seen.BEGIN)
        for command in first or ():
            self._queue(command)
        try:
            await self._drive()
            await self._count_bytes()
            await self.look_inside()
            self._note_inside()
        finally:
            self.duration_ms = (loop.time() - self._began) * 1000
            for end in ends:
                end()
            await self._close()
        return self.state

    def _take(self, command: Command) -> None:
        if isinstance(command, WriteRequests):
            self._writes.put_nowait(command)
            return
        if command is Do.ROLL_BACK_SHIMS:
            for task in filter(None, (self._busy, self._syncing)):
                task.cancel()
        super()._take(command)

    # --- commands -----------------------------------------------------------------------------------------------------

    async def _carry_out(self) -> None:
        while True:
            command = await self._commands.get()
            event = await (self._given_up_for_a_roll_back(command) if command in _CUT_SHORT else self._one(command))
            if event is not None:
                self.feed(event)

    async def _given_up_for_a_roll_back(self, command: Command) -> Event | None:
        """A device or an engine that does not answer must not keep a guest standing that is to run again."""
        task = asyncio.get_running_loop().create_task(self._one(command))
        self._busy, self._stood = task, True
        try:
            await asyncio.wait({task})
        finally:
            self._busy = None
            task.cancel()
        if task.cancelled():
            self._note("given_up", str(command))
            return None
        return task.result()

    async def _one(self, command: Command) -> Event | None:
        match command:
            case Commit(version):
                return await self.ledger.commit(version)
            case WriteAbort(reason, devices):
                event = await self.ledger.abort(reason, devices)
                self._note(str(event), f"zxid {self.ledger.zxid}")
                return event
            case Do():
                return await self._effects[command](self)
            case Note() | WriteRequests() | StartTimer() | CancelTimer():
                raise AssertionError("carried out when it was queued, or in a lane of its own")

    async def _write_requests(self) -> None:
        while True:
            command = await self._writes.get()
            self.feed(await self.ledger.write_requests(command.entries) or Seen.LEDGER_UNKNOWN)

    async def _bind(self) -> Event | None:
        try:
            return await self.ledger.bind()
        finally:
            self._bound.set()

    async def _sync_disks(self) -> Event | None:
        self._syncing = self._spawn(self._synced(), "local disks")
        return None

    async def _synced(self) -> None:
        """Beside everything else: it takes as long as the disks are large, and the guest is obeyed meanwhile."""
        assert self.disks is not None
        self.disks.limit(self.policy.max_bandwidth_mbps * 125_000)
        try:
            await self.disks.sync(await self.peer.images())
        except (DiskTrouble, PeerUnavailable) as error:
            disk = error.disk if isinstance(error, DiskTrouble) else ",".join(self.state.disks)
            self._note("disk_failed", str(error))
            self.feed(words.DiskFailed(disk))
            return
        for disk, how in sorted(self.disks.copied.items()):
            self._note("disk_copied", f"{disk}: {how}")
        self._note_sent()
        self.feed(Seen.DISKS_READY)

    async def _drain_disks(self) -> Event | None:
        assert self.disks is not None
        try:
            drained = await self.disks.drain(self.policy.switchover_timeout_ms / 1000)
            self._note_sent()
            return words.Drained(drained)
        except DiskTrouble as error:
            self._note("disk_failed", str(error))
            return words.DiskFailed(error.disk)

    def _note_sent(self) -> None:
        for disk, count in sorted(self.disks.sent.items()) if self.disks is not None else ():
            self._note("disk_sent", f"{disk}: {count} bytes")

    async def _release_disks(self) -> Event | None:
        self._spawn(self._repeat_release(), "release of the images")
        return None

    async def _repeat_release(self) -> None:
        while self.state.stage is SourceStage.LAST_PASS:
            with contextlib.suppress(PeerUnavailable):
                await self.peer.release(self.state.drained)
                return
            await asyncio.sleep(RETRY_S)

    async def _retire_disks(self) -> Event | None:
        if self.retire_disks is not None:
            try:
                await self.retire_disks()
            except OSError as error:
                self._note("images_not_retired", str(error))
        return None

    async def _start_precopy(self) -> Event | None:
        try:
            for shim in self.shims:
                await shim.begin(self.session_number, lambda entry: self.feed(words.Requested(entry)))
            for shim in self.shims:
                if (task := self._spawn(self._run_shim(shim), f"device {shim.device}")) is not None:
                    self._precopy.append(task)
            await self._hook("precopy")
            await self.vmm.start_outgoing(self.options)
        except ShimError as error:
            self._note("shim_failed", str(error))
            return Seen.SHIM_FAILED
        except engine.EngineError as error:
            self._note("engine_failed", str(error))
            return Seen.ENGINE_FAILED
        return Seen.ACTIVE

    async def _run_shim(self, shim: SourceShim) -> None:
        try:
            await shim.run_precopy(self.send)
        except (ShimError, PeerUnavailable) as error:
            self._note("shim_failed", f"{shim.device}: {error}")
            self.feed(Seen.SHIM_FAILED)

    async def send(self, frame: Frame) -> None:
        """A piece of a device's state, at the transfer's pace while the guest runs. Raises PeerUnavailable."""
        if (
            frame.kind is FrameKind.PRECOPY
            and (wait_s := self._pace.wait_s(len(frame.data), asyncio.get_running_loop().time())) > 0
        ):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._unpaced.wait()
        if frame.kind is FrameKind.END:
            self._sent[frame.device] = Load(frame.device, frame.session, frame.total_bytes, frame.digest)
        await self.peer.send_frame(frame)

    async def _engine_call(self, call: Callable[[], Awaitable[None]]) -> Event | None:
        """Hold, release: no promise, the engine may have stopped the guest meanwhile; its status will say so."""
        try:
            await call()
        except engine.EngineError as error:
            self._note("engine", str(error))
        return None

    async def _hold(self) -> Event | None:
        return await self._engine_call(self.vmm.hold)

    async def _release(self) -> Event | None:
        await self._engine_call(self.vmm.release)
        await self._hook("gate_open")
        return None

    async def _pause(self) -> Event | None:
        try:
            await self.vmm.pause()
            state = await self.vmm.state()
        except engine.EngineError as error:
            self._note("pause_failed", str(error))
            return Seen.PAUSE_QUEUED
        return Seen.PAUSE_QUEUED if state.run_state is engine.RunState.FINISHING else Seen.PAUSED

    async def _resume(self) -> Event | None:
        try:
            await self.vmm.resume()
        except engine.GuestHasEnded as error:
            self._note("guest_ended", str(error))
            return Seen.GUEST_ENDED
        except engine.EngineError as error:
            self._note("resume_failed", str(error))
            return Seen.RESUME_FAILED
        return Seen.RESUMED

    def lift_pace(self) -> None:
        """The guest stands and waits for what its devices still have to send."""
        self._unpaced.set()

    async def _quiesce(self) -> Event | None:
        self.lift_pace()
        for task in self._precopy:
            task.cancel()
        await asyncio.gather(*self._precopy, return_exceptions=True)
        try:
            await self._hook("freeze")
            queries = await asyncio.gather(*(shim.quiesce() for shim in self.shims))
            await self._hook("final_query")
            await asyncio.gather(*(shim.stop_copy() for shim in self.shims))
        except ShimError as error:
            self._note("shim_failed", str(error))
            return Seen.SHIM_FAILED
        return words.Quiesced(tuple(query.newest for query in queries if query.newest is not None))

    async def _proceed(self) -> Event | None:
        self._spawn(self._send_stop_copy(), "stop-copy")
        try:
            await self.vmm.proceed()
        except engine.EngineTimeout:
            return None  # its status, or the switchover timeout, says how it went on
        except engine.EngineError as error:
            self._note("engine_failed", str(error))
            return Seen.ENGINE_FAILED
        return None

    async def _send_stop_copy(self) -> None:
        async def one(shim: SourceShim) -> None:
            async for frame in shim.stop_copy_frames():
                await self.send(frame)

        try:
            await self._hook("after_check")
            await asyncio.gather(*(one(shim) for shim in self.shims))
        except (ShimError, PeerUnavailable) as error:
            self._note("shim_failed", str(error))
            self.feed(Seen.SHIM_FAILED)
            return
        self.feed(Seen.SHIMS_SENT)
        self._compare()

    def _compare(self) -> None:
        if self._loaded is not None and len(self._sent) == len(self.shims):
            inc, loads = self._loaded
            self.feed(words.LoadedReport(inc, loads == self._sent, self._images))

    async def _roll_back_shims(self) -> Event | None:
        bound_s = _ROLL_BACK_S if self._stood else None
        results = await asyncio.gather(*(_within(bound_s, shim) for shim in self.shims), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        for error in errors:
            self._note("roll_back_failed", str(error))
        return Seen.SHIMS_BACK_RESET if errors else Seen.SHIMS_BACK

    async def _abort_engine(self) -> Event | None:
        while self.vmm.liveness() is not Liveness.GONE:
            try:
                state = await self.vmm.abort()
            except engine.EngineError as error:
                self._note("abort_again", str(error))
                await asyncio.sleep(RETRY_S)
                continue
            self._note("guest", f"{state.run_state}")
            await self.look_inside()
            if state.late_devices:
                self._found_late(state.late_devices)
            if lost := tuple(one.device for one in self.inside if one.lost):
                self.feed(words.DevicesLost(lost))
            return Seen.ENGINE_SEALED if state.run_state is engine.RunState.SEALED else Seen.ENGINE_OVER
        return Seen.VMM_DIED

    async def _read(self) -> Event | None:
        try:
            record, version = await self.ledger.read_behind_barrier()
        except StoreUnavailable:
            self._retry_later()
            return None
        return words.RecordRead(record, version)

    async def _go(self) -> Event | None:
        self._spawn(self._repeat_go(), "GO")
        self._spawn(self._hook("after_commit"), "hook")
        return None

    async def _repeat_go(self) -> None:
        told = False
        while True:
            with contextlib.suppress(PeerUnavailable):
                if await self.peer.go(self.state.want_run) and not told:
                    told = True
                    self._note("runs there")
            await asyncio.sleep(RETRY_S)

    async def _discard_source(self) -> Event | None:
        await self._count_bytes()
        await self.vmm.destroy()
        for shim in self.shims:
            with contextlib.suppress(ShimError):
                await shim.retire()
        return Seen.DISCARDED

    async def _count_bytes(self) -> None:
        """For the report; the blackout is over, and a VMM that is gone has told before."""
        if self.vmm.liveness() is not Liveness.GONE:
            with contextlib.suppress(engine.EngineError):
                self.transferred_bytes = (await self.vmm.progress()).transferred_bytes

    async def _write_acks(self) -> Event | None:
        self._spawn(self.ledger.write_acks(self.state.acks.acks), "ACKs")
        return None

    async def _declare_crashed(self) -> Event | None:
        return await self.ledger.crashed()

    _effects: ClassVar[dict[Do, Callable[[SourceShell], Awaitable[Event | None]]]] = {
        Do.BIND: _bind,
        Do.SYNC_DISKS: _sync_disks,
        Do.DRAIN_DISKS: _drain_disks,
        Do.RELEASE_DISKS: _release_disks,
        Do.RETIRE_DISKS: _retire_disks,
        Do.START_PRECOPY: _start_precopy,
        Do.HOLD: _hold,
        Do.RELEASE: _release,
        Do.PAUSE: _pause,
        Do.RESUME: _resume,
        Do.QUIESCE: _quiesce,
        Do.PROCEED: _proceed,
        Do.ROLL_BACK_SHIMS: _roll_back_shims,
        Do.ABORT_ENGINE: _abort_engine,
        Do.READ: _read,
        Do.GO: _go,
        Do.DISCARD_SOURCE: _discard_source,
        Do.WRITE_ACKS: _write_acks,
        Do.DECLARE_CRASHED: _declare_crashed,
    }

    # --- devices inside the VMM ---------------------------------------------------------------------------------------

    async def look_inside(self) -> None:
        """Refresh `inside`. What cannot be asked stays as it was."""
        if self.in_vmm is None:
            return
        with contextlib.suppress(ShimError, TimeoutError):
            async with asyncio.timeout(_NAMES_S):
                self.inside = await self.in_vmm.look()

    async def _name_late(self, count: int) -> None:
        await self.look_inside()
        self._found_late(count)

    def _found_late(self, count: int) -> None:
        """The VMM's verdict has a number only; the devices that we can ask know who it was."""
        names = tuple(one.device for one in self.inside if one.late)
        self._note("engine_found_late", f"{count}: {', '.join(names)}" if names else str(count))
        self.feed(words.FoundLate(names))

    def _note_inside(self) -> None:
        """What QEMU did to the devices, where it belongs on the time line."""
        if entries := device_entries(self.inside, self._began, self.state.here.host):
            self.timeline[:] = sorted([*self.timeline, *entries], key=lambda entry: entry.at_ms)

    # --- what comes in by itself --------------------------------------------------------------------------------------

    def acked(self, entry: AckRequest) -> None:
        """The destination's device loaded all initial bytes of this generation."""
        self._note("ack", f"{entry.device}/{entry.generation}")
        self.feed(words.Acked(entry))

    def _record_seen(self, record: GuestRecord) -> None:
        self.feed(words.RecordSeen(record))

    def _requests_seen(self, entries: tuple[AckRequest, ...], version: int) -> None:
        self.feed(words.RequestsSeen(entries, version))

    def _engine_event(self, event: engine.EngineEvent) -> None:
        match event:
            case engine.StatusChanged(status, error):
                self._note(f"engine {status}", error)
                known = {
                    engine.EngineStatus.PARKED: Seen.PARKED,
                    engine.EngineStatus.COMPLETED: Seen.COMPLETED,
                    engine.EngineStatus.FAILED: Seen.ENGINE_FAILED,
                }.get(status)
                if known is not None:
                    self.feed(known)
            case engine.DiskReady():
                self._disks_heard(event)
            case engine.DiskFailed(disk, error):
                self._note("disk_failed", f"{disk}: {error}")
                self._disks_heard(event)
                self.feed(words.DiskFailed(disk))
            case engine.SwitchoverAckLate(count):
                self._spawn(self._name_late(count), "late devices")
            case engine.RunStateChanged(running, at_s):
                # The engine's own stamp beside ours: what a guest stood still is read from it to the microsecond.
                self._note("vcpus run" if running else "vcpus stopped", f"{at_s:.6f}")
            case engine.GuestEnded(how):
                self._note("guest_ended", how)
                self.feed(Seen.GUEST_ENDED)
            case engine.VmmDied():
                self.feed(Seen.VMM_DIED)
            case engine.DeviceGone(device):
                self._note("device_gone", device)  # its keeper takes it off the list after the attempt

    def _disks_heard(self, event: engine.EngineEvent) -> None:
        if self.disks is not None:
            self.disks.heard(event)

    async def _vitals(self) -> None:
        """The gate opens only while the peer answers and a quorum was seen, both less than a second ago.

        The bind is the first proof of a quorum. Later ones cost a write each, and are asked for while the gate is shut.
        """
        await self._bound.wait()
        while True:
            good = False
            with contextlib.suppress(PeerUnavailable, StoreUnavailable, TimeoutError):
                async with asyncio.timeout(_FRESH_S):
                    good = await self.peer.ping()
                    shut = self.state.stage is SourceStage.PRECOPY and not self.state.released
                    if shut and self.ledger.store.quorum_age_s > _FRESH_S / 2:
                        await self.ledger.store.barrier(_FRESH_S)
            good = good and self.ledger.store.quorum_age_s <= _FRESH_S
            self.feed(Seen.VITALS_GOOD if good else Seen.VITALS_BAD)
            await asyncio.sleep(_VITALS_S)

    async def _hook(self, name: str) -> None:
        """Tell the devices which point was reached. A device that does not listen holds nothing up for long."""
        with contextlib.suppress(ShimError, TimeoutError):
            async with asyncio.timeout(_HOOK_S):
                await asyncio.gather(*(shim.hook(name) for shim in self.shims))
