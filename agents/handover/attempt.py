"""One attempt as its agent holds it, at either end: conducted, spoken to by the other agent, and ended.

The end is told here and nowhere else. When `conduct` returns the attempt is over, whatever came of it: its report is
kept and counted, nothing is left of a copy that is dead, and a copy that lives is its keeper's again.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Generic, TypeVar

import structlog

from agents.engine import base as engine
from agents.guest.copies import Copy
from agents.handover.destination_shell import DestinationShell
from agents.handover.peer import AttemptKey, GrpcDestinationPeer, GrpcSourcePeer
from agents.handover.report import device_progress, phase_of, report_of
from agents.handover.source import SourceStage
from agents.handover.source_shell import SourceShell
from agents.handover.words import Command, Seen, WantRunSeen
from agents.host.journal import Journal
from agents.host.metrics import Metrics
from agents.shims.base import Frame, Load
from orchestrator.core.agent import AttemptStatus, DiskProgress, Progress
from orchestrator.core.disks import ImageThere, SyncPoint
from orchestrator.core.ids import AckRequest, AttemptRef
from orchestrator.core.migration import Prepared
from orchestrator.core.records import AttemptReport, DeviceProgress, TimelineEntry
from orchestrator.tasks import Tasks, failures

log = structlog.get_logger(__name__)

FAILED_S = 0.3
"""How long an attempt whose shell failed is left alone; then the keeper ends it as a restarted agent would."""
NEEDS_OPERATOR_S = 5.0
"""A guest that could not be started again is tried again this often; it is started nowhere else."""

_SAMPLED = frozenset({SourceStage.BINDING, SourceStage.SYNCING, SourceStage.PRECOPY})
"""No questions to the VMM in the blackout."""
_SAMPLE_S = 0.25
_TOLD_S = 1.0
"""How long a report waits for the destination's half of it: the ledger may tell of DONE before the destination does."""
_WARM_S = 2.0
_STARTED_S = 0.7

_Shell = TypeVar("_Shell", SourceShell, DestinationShell)


@dataclass
class Attempt(ABC, Generic[_Shell]):
    """What both ends share. From the moment it is made, it alone speaks for its copy."""

    half: ClassVar[str]
    shell: _Shell
    copy: Copy

    def __post_init__(self) -> None:
        self.copy.in_session = True
        self._tasks = Tasks(f"{self.half} of attempt {self.ref.attempt} of {self.ref.migration}")

    @property
    def ref(self) -> AttemptRef:
        """Guest, migration and number of the attempt."""
        return self.shell.state.ref

    @property
    def key(self) -> AttemptKey:
        """What the other agent calls it by: migration, number, and the destination's process."""
        return self.ref.migration, self.ref.attempt, self.shell.state.inc

    async def conduct(self, first: Sequence[Command] | None = None) -> None:
        """To its end; to be called once. Raises nothing: what an attempt leaves undone, its keeper finds.

        `first`: what an agent that was restarted has to do, which conducts nothing and ends what it finds.
        """
        try:
            await self._conduct(first)
        except Exception:
            guest = self.copy.files.spec.name
            log.exception(f"{self.half} failed", migration=self.ref.migration, attempt=self.ref.attempt, guest=guest)
            await asyncio.sleep(FAILED_S)
        finally:
            await self._tasks.close()
            self.copy.in_session = False

    @abstractmethod
    async def _conduct(self, first: Sequence[Command] | None) -> None: ...

    async def _ended(self) -> None:
        """The shell has: nothing stays of a copy that it left dead."""
        log.info(
            f"{self.half} ended",
            migration=self.ref.migration,
            attempt=self.ref.attempt,
            guest=self.copy.files.spec.name,
            stage=self.shell.state.stage,
        )
        if self.copy.is_gone:
            await self.copy.destroy()


@dataclass
class Departure(Attempt[SourceShell]):
    """This host is the source. Made when the attempt is accepted."""

    half = "departure"
    peer: GrpcDestinationPeer
    destination: str
    journal: Journal
    metrics: Metrics
    changed: Callable[[], None]
    """Called for every sample: watchers want to know."""
    arrival_timeline: list[TimelineEntry] = field(default_factory=list[TimelineEntry])
    progress: Progress | None = None
    _told: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peer.on_ack = self.shell.acked
        self.peer.on_lost = self.destination_failed

    # --- what the destination says ------------------------------------------------------------------------------------

    def loaded(self, inc: str, loads: Sequence[Load], images: tuple[SyncPoint, ...] = ()) -> None:
        """LOADED: what the destination's devices have taken in, and which images it holds."""
        self.shell.loaded(inc, loads, images)

    def destination_failed(self) -> None:
        """The destination says, or its silence shows, that it cannot take the guest."""
        self.shell.feed(Seen.DEST_FAILED)

    def done(self, timeline: Sequence[TimelineEntry]) -> None:
        """DONE, with the destination's time line for the report."""
        self.arrival_timeline[:] = timeline
        self._told.set()
        self.shell.feed(Seen.DONE_KNOWN)

    # --- what its own agent says --------------------------------------------------------------------------------------

    async def _conduct(self, first: Sequence[Command] | None) -> None:
        self._tasks.spawn(self._sample_on(), "sampler")
        try:
            stage = (await self.shell.run(first)).stage
        finally:
            await self.peer.close()
        if stage is SourceStage.ENDED_COMMITTED:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TOLD_S):
                    await self._told.wait()
        # An attempt that is ended by a restarted agent may have been reported by the earlier one, which knew more.
        if first is None or self.journal.report(self.ref.migration, self.ref.attempt) is None:
            report = self.report()
            self.journal.keep(self.ref.migration, report)
            self.metrics.attempt_over(report, self.copy.files.outside)
        await self._ended()
        if stage is SourceStage.ENDED_NEEDS_OPERATOR:
            await asyncio.sleep(NEEDS_OPERATOR_S)

    def report(self) -> AttemptReport:
        """As far as it has come."""
        shell = self.shell
        return report_of(
            shell.state,
            shell.timeline,
            self.arrival_timeline,
            inside=shell.inside,
            destination=self.destination,
            zxid=shell.ledger.zxid,
            ledger_writes=shell.ledger.writes,
            # QEMU forgets the figure of a cancelled migration: then the last sample stands.
            transferred_bytes=max(shell.transferred_bytes, self.progress.transferred_bytes if self.progress else 0),
            duration_ms=shell.duration_ms,
        )

    def wish(self, run: bool) -> None:
        """The operator's wish changed."""
        self.shell.feed(WantRunSeen(run))

    def wish_is_applied(self, run: bool) -> bool | None:
        """None: not yet, ask again; False: queued until the hand-over ends."""
        state = self.shell.state
        if state.stage not in (SourceStage.NEW, SourceStage.BINDING, SourceStage.SYNCING, SourceStage.PRECOPY):
            return False if not state.stage.ended else None
        return True if state.want_run == run and state.paused != run else None

    def status(self) -> AttemptStatus:
        """Its phase and its last sample, for watchers."""
        stage = self.shell.state.stage
        elapsed_ms = self.shell.elapsed_ms
        return AttemptStatus(self.ref, phase_of(stage), self.progress, ended=stage.ended, elapsed_ms=elapsed_ms)

    async def share_again(self) -> None:
        """The link is shared by more or fewer than before; no word to the VMM once the guest is stopped."""
        state = self.shell.state
        if state.stage is SourceStage.PRECOPY and state.released:
            with contextlib.suppress(engine.EngineError):
                await self.shell.vmm.release()

    async def _sample_on(self) -> None:
        while True:
            try:
                await self.sample()
            except Exception as error:  # a sample is missing, and the next one comes
                failures["sampler"] += 1
                guest = self.copy.files.spec.name
                log.warning("an attempt could not be sampled", guest=guest, error=repr(error))
                await asyncio.sleep(FAILED_S)
            self.changed()
            await asyncio.sleep(_SAMPLE_S)

    async def sample(self) -> None:
        """Refresh `progress`, unless the guest is stopped for the switchover: then the last one stands."""
        state = self.shell.state
        if state.stage not in _SAMPLED:
            return
        with contextlib.suppress(engine.EngineError):
            async with asyncio.timeout(1.0):
                seen = await self.shell.vmm.progress()
                await self.shell.look_inside()
                disks = await self.shell.disks.progress() if self.shell.disks is not None else ()
            devices = tuple(map(device_progress, self.shell.inside))
            if disks and not seen.total_bytes:  # nothing of it has gone yet
                memory_bytes = self.copy.files.spec.memory_mib << 20
                seen = replace(seen, total_bytes=memory_bytes, remaining_bytes=memory_bytes)
            self.progress = progress_of(
                seen, gate_open=state.released, pending=state.acks.pending, devices=devices, disks=disks
            )


@dataclass
class Arrival(Attempt[DestinationShell]):
    """This host is the destination. Made when the copy waits for its stream, kept until it is the guest or is gone."""

    half = "arrival"
    peer: GrpcSourcePeer
    source: str
    prepared: Prepared | None
    """What its caller was told, and is told again; None: the agent was restarted, and the attempt is only ended."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peer.timeline = lambda: self.shell.timeline

    # --- what the source says -----------------------------------------------------------------------------------------

    @property
    def acks(self) -> asyncio.Queue[AckRequest]:
        """ACKs that wait to be sent to the source."""
        return self.peer.acks

    async def frame(self, frame: Frame) -> None:
        """A piece of a device's state has arrived. Raises ShimError when the device refuses it."""
        await self.shell.frame(frame)

    def images(self) -> tuple[ImageThere, ...]:
        """What there is here for the guest's local disks; empty when they cannot be told."""
        return self.shell.images_there()

    async def release(self, points: Sequence[SyncPoint]) -> None:
        """The source has drained the local disks. Returns once that is dealt with, for good or bad."""
        await self.shell.release(points)

    async def go(self, inc: str, want_run: bool) -> bool:
        """True when the guest was started within the call, which tells the source when its blackout ended."""
        self.shell.go(inc, want_run)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STARTED_S):
                await self.shell.started.wait()
        return self.shell.started.is_set()

    # --- what its own agent says --------------------------------------------------------------------------------------

    async def _conduct(self, first: Sequence[Command] | None) -> None:
        self._tasks.spawn(self._keep_warm(), "connection to the source")
        await self.shell.run(first or ())
        await self._ended()

    async def _keep_warm(self) -> None:
        """No connection may have to be made in the blackout."""
        while True:
            await self.peer.warm()
            await asyncio.sleep(_WARM_S)


def progress_of(
    seen: engine.Progress,
    *,
    gate_open: bool,
    pending: Sequence[AckRequest],
    devices: tuple[DeviceProgress, ...] = (),
    disks: tuple[DiskProgress, ...] = (),
) -> Progress:
    """The engine's sample in the words of its users. The ETA is a division, and is not made while it would mislead."""
    shrinking = seen.bandwidth_mbps > seen.dirty_rate_mbps
    bits_left = seen.remaining_bytes * 8
    eta_s = bits_left / ((seen.bandwidth_mbps - seen.dirty_rate_mbps) * 1e6) if gate_open and shrinking else 0.0
    return Progress(
        transferred_bytes=seen.transferred_bytes,
        remaining_bytes=seen.remaining_bytes,
        total_bytes=seen.total_bytes,
        bandwidth_mbps=seen.bandwidth_mbps,
        dirty_rate_mbps=seen.dirty_rate_mbps,
        iteration=seen.iteration,
        expected_downtime_ms=seen.expected_downtime_ms,
        engine_status=str(seen.status),
        gate_open=gate_open,
        pending_acks=tuple(pending),
        eta_s=round(eta_s, 2),
        devices=devices,
        disks=disks,
    )
