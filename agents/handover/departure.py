"""One attempt that this host is the source of, as its agent holds it: the runner, what is told of it, its report."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from agents.engine import base as engine
from agents.guest.copies import Copy
from agents.handover.peer import AttemptKey, DestinationClient
from agents.handover.report import device_progress, phase_of, report_of
from agents.handover.source import SourceStage
from agents.handover.source_shell import SourceShell
from agents.handover.words import Command, Seen, WantRunSeen
from agents.shims.base import Load
from orchestrator.core.agent import AttemptStatus, Progress
from orchestrator.core.ids import AckRequest, AttemptRef
from orchestrator.core.records import AttemptReport, DeviceProgress, TimelineEntry

_SAMPLED = frozenset({SourceStage.BINDING, SourceStage.PRECOPY})
"""No questions to the VMM in the blackout."""
_TOLD_S = 1.0
"""So long a report waits for the destination's half of it: the ledger may tell of DONE before the destination does."""


@dataclass
class Departure:
    """Made when the attempt is accepted, kept until its report is in the journal."""

    runner: SourceShell
    copy: Copy
    peer: DestinationClient
    destination: str
    arrival_timeline: list[TimelineEntry] = field(default_factory=list[TimelineEntry])
    progress: Progress | None = None
    _told: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.peer.on_ack = self.runner.acked
        self.peer.on_lost = self.destination_failed

    @property
    def ref(self) -> AttemptRef:
        return self.runner.state.ref

    @property
    def key(self) -> AttemptKey:
        return self.ref.migration, self.ref.attempt, self.runner.state.inc

    # --- what the destination says (agents.serving.peer.Departing) ----------------------------------------------------

    def loaded(self, inc: str, loads: Sequence[Load]) -> None:
        self.runner.loaded(inc, loads)

    def destination_failed(self) -> None:
        self.runner.feed(Seen.DEST_FAILED)

    def done(self, timeline: Sequence[TimelineEntry]) -> None:
        self.arrival_timeline[:] = timeline
        self._told.set()
        self.runner.feed(Seen.DONE_KNOWN)

    # --- what its own agent says --------------------------------------------------------------------------------------

    async def conduct(self, first: Sequence[Command] | None = None) -> AttemptReport:
        """To its end. The VMM is then as the final stage says, and the report is what became of it."""
        try:
            ended = await self.runner.run(first)
        finally:
            await self.peer.close()
        if ended.stage is SourceStage.ENDED_COMMITTED:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TOLD_S):
                    await self._told.wait()
        return self.report()

    def report(self) -> AttemptReport:
        """As far as it has come."""
        runner = self.runner
        return report_of(
            runner.state,
            runner.timeline,
            self.arrival_timeline,
            inside=runner.inside,
            destination=self.destination,
            zxid=runner.ledger.zxid,
            ledger_writes=runner.ledger.writes,
            # QEMU forgets the figure of a cancelled migration: then the last sample stands.
            transferred_bytes=max(runner.transferred_bytes, self.progress.transferred_bytes if self.progress else 0),
            duration_ms=runner.duration_ms,
        )

    def wish(self, run: bool) -> None:
        self.runner.feed(WantRunSeen(run))

    def wish_is_applied(self, run: bool) -> bool | None:
        """None: not yet, ask again; False: queued until the hand-over ends."""
        state = self.runner.state
        if state.stage not in (SourceStage.NEW, SourceStage.BINDING, SourceStage.PRECOPY):
            return False if not state.stage.ended else None
        return True if state.want_run == run and state.paused != run else None

    def status(self) -> AttemptStatus:
        stage = self.runner.state.stage
        return AttemptStatus(self.ref, phase_of(stage), self.progress, ended=stage.ended)

    async def share_again(self) -> None:
        """The link is shared by more or fewer than before; no word to the VMM once the guest is stopped."""
        state = self.runner.state
        if state.stage is SourceStage.PRECOPY and state.released:
            with contextlib.suppress(engine.EngineError):
                await self.runner.vmm.release()

    async def sample(self) -> None:
        """Refresh `progress`, unless the guest is stopped for the switchover: then the last one stands."""
        state = self.runner.state
        if state.stage not in _SAMPLED:
            return
        with contextlib.suppress(engine.EngineError):
            async with asyncio.timeout(1.0):
                seen = await self.runner.vmm.progress()
                await self.runner.look_inside()
            devices = tuple(map(device_progress, self.runner.inside))
            self.progress = progress_of(seen, gate_open=state.released, pending=state.acks.pending, devices=devices)


def progress_of(
    seen: engine.Progress,
    *,
    gate_open: bool,
    pending: Sequence[AckRequest],
    devices: tuple[DeviceProgress, ...] = (),
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
    )
