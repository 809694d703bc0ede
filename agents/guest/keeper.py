"""One guest on this host: its VMM processes, the sessions that conduct its attempts, and what is owed between them.

Nothing is decided here. An attempt is conducted by a `Departure` or an `Arrival` (`handover/attempt.py`), which speaks
for its copy until it is over; what no attempt speaks for is decided by `keeping.duty`, on a record that was read behind
a barrier.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import structlog

from agents.config import AgentConfig
from agents.engine import base as engine
from agents.engine.base import MigrationEngine
from agents.guest import copies as making
from agents.guest import duty as keeping
from agents.guest.copies import Copy
from agents.guest.duty import Do, Duty
from agents.guest.files import GuestFiles
from agents.guest.ledger import GuestLedger
from agents.handover import preflight
from agents.handover.attempt import Arrival, Departure
from agents.handover.destination import DestinationState, prepared_destination, restarted_destination
from agents.handover.destination_shell import DestinationShell
from agents.handover.ledger import AttemptLedger
from agents.handover.peer import GrpcDestinationPeer, GrpcSourcePeer
from agents.handover.source import SourceState, restarted_source
from agents.handover.source_shell import SourceShell
from agents.handover.words import Command, Seen
from agents.host.journal import Journal
from agents.host.metrics import Metrics
from agents.shims.base import ShimError
from orchestrator.core import handover
from orchestrator.core.agent import (
    ConductOrder,
    CopyStatus,
    GuestStatus,
    GuestTrouble,
    PrepareOrder,
    RunState,
    Trouble,
    WishApplied,
)
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.liveness import Liveness, LivenessUnknown
from orchestrator.core.migration import Prepared
from orchestrator.core.policy import MigrationPolicy, OnTimeout
from orchestrator.core.records import HostRecord, ShimKind, WantRun
from orchestrator.core.switchover import AckLedger
from orchestrator.ledger import paths
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import Store, StoreUnavailable
from orchestrator.tasks import Tasks, failures

log = structlog.get_logger(__name__)

_EXPECTED = (StoreUnavailable, DroverError, BadRecord, engine.EngineError, ShimError, LivenessUnknown, OSError)
"""What can go wrong while a guest is kept; anything else is a fault of ours, and is logged with its traceback."""

RESYNC_S = 5.0
RETRY_S = 0.3
SAID_AGAIN_S = 60.0
"""The same trouble of a guest is logged so often."""
WISH_S = 2.0
"""So long the answer to a pause or resume waits for its effect."""


class PeerChannels(Protocol):
    """Connections to the other agents' PeerService, kept warm."""

    def destination(self, address: str, ref: AttemptRef, inc: str) -> GrpcDestinationPeer: ...

    def source(self, address: str, ref: AttemptRef, inc: str) -> GrpcSourcePeer: ...


@dataclass(frozen=True, slots=True)
class Tools:
    """What all guests of an agent share."""

    config: AgentConfig
    here: HostRef
    writer: str
    """Names this agent process in every record it writes."""
    engine: MigrationEngine
    store: Store
    commits: Store
    """A session of its own for attempts: nothing may queue before a COMMIT."""
    journal: Journal
    peers: PeerChannels
    metrics: Metrics
    departures: Callable[[], int]
    """Attempts that this host is the source of: they share its link."""
    link_shared: Callable[[], None]
    """Their number changed."""
    changed: Callable[[], None]
    """Something that watchers of this agent want to know."""


def _said(error: Exception) -> str:
    if isinstance(error, DroverError):
        return error.message
    return str(error) or repr(error)


def session_number(ref: AttemptRef) -> int:
    """Names a device's session of one attempt; unlike across migrations, so that none is taken for another's."""
    return int(ref.migration.replace("-", "")[:10], 16) << 8 | ref.attempt & 0xFF


class Forgotten(Exception):
    """The keeper had nothing of the guest left and ended while the call waited for its turn: another one has to take
    it. What this one made now, nobody would keep."""


class Untrusted(DroverError):
    """The ledger says nothing of the guest, or something older than what was read before: nothing follows from it."""

    def __init__(self, trouble: Trouble, message: str) -> None:
        super().__init__(RefusalReason.OLD_RECORD, message)
        self.trouble = trouble


class HostedGuest:
    """All calls are idempotent and raise DroverError; `wake` makes the keeper look. `birth`, `end` and `prepare` raise
    Forgotten as well."""

    def __init__(self, tools: Tools, files: GuestFiles) -> None:
        self._tools = tools
        self.files = files
        self.ledger = GuestLedger(tools.store, files.uuid, tools.writer)
        self.copies: dict[str, Copy] = {}
        self.departure: Departure | None = None
        self.arrivals: dict[tuple[str, int], Arrival] = {}
        self.record: GuestRecord | None = None
        """As last seen; a hint."""
        self._wish = WantRun()
        self._turn = asyncio.Lock()
        self._woken = asyncio.Event()
        self._tasks = Tasks(f"guest {files.spec.name}")
        self._unwatch: Callable[[], None] = lambda: None
        self.may_bury = True
        """A record that says STARTING may be of a birth that is about to be asked for; only a restart is sure."""
        self.forgotten = False
        """Nothing of the guest is here any more."""
        self._all_known = False
        """Every process that an earlier agent left was adopted, or is dead."""
        self._making = 0
        """Processes that are being started and are not among the copies yet."""
        self.trouble: GuestTrouble | None = None
        """Why the guest is not kept just now; None: it is."""
        self._troubles = 0
        """Failures to keep it in a row."""
        self._said_s = 0.0
        """When its trouble was last logged, by the loop's clock."""

    @property
    def uuid(self) -> str:
        return self.files.uuid

    @property
    def name(self) -> str:
        return self.files.spec.name

    # --- life of this object ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to watch and to keep."""
        self._unwatch = self.ledger.watch(self._record_seen, self._wish_seen)
        self._tasks.spawn(self._keep(), "keeper")

    async def adopt(self) -> None:
        """Find the processes that an earlier agent left, before anything is decided about them.

        Never raises: what goes wrong is this guest's trouble, and the keeper tries again.
        """
        try:
            await self._adopt_left()
        except Exception as error:
            self._not_kept(error)

    async def _adopt_left(self) -> None:
        """Raises BUSY while a process that was left is alive and does not answer, BadRecord for a note that cannot be
        read: what is not known is not dead, and nothing may be decided before."""
        if self._all_known:
            return
        for metadata in self.files.processes():
            if metadata.inc in self.copies:
                continue
            try:
                copy = await making.adopt(self._tools.engine, self.files, metadata)
            except (engine.EngineError, ShimError) as error:
                said = f"its process {metadata.inc} does not answer: {error}"
                raise self._refused(RefusalReason.BUSY, said) from error
            if copy is not None:
                self._add(copy)
        self._all_known = True

    async def stop(self) -> None:
        """Let go of everything and leave it to a later agent."""
        self._unwatch()
        await self._tasks.close()
        await asyncio.gather(*(copy.detach() for copy in self.copies.values()), return_exceptions=True)

    def wake(self) -> None:
        self._woken.set()

    def _add(self, copy: Copy) -> None:
        self.copies[copy.inc] = copy
        copy.on_change = self._copy_changed

    def _copy_changed(self) -> None:
        self.wake()
        self._tools.changed()

    def _record_seen(self, record: GuestRecord | None) -> None:
        if record is not None:  # a record that vanished is no news of the guest
            self.record = record
        self.wake()

    def _wish_seen(self, wish: WantRun) -> None:
        if wish.sequence >= self._wish.sequence:
            self._wish = wish
            if self.departure is not None:
                self.departure.wish(wish.run)
        self.wake()

    def _must_keep(self) -> None:
        if self.forgotten:
            raise Forgotten(self.uuid)

    # --- birth and death ----------------------------------------------------------------------------------------------

    async def birth(self) -> GuestStatus:
        """Execute a guest whose record says STARTING here."""
        async with self._turn:
            self._must_keep()
            record = await self._fresh()
            if record.owner != self._tools.here or record.phase in (Ownership.GONE, Ownership.CRASHED):
                raise self._refused(RefusalReason.GUEST_NOT_RUNNING, f"{record.phase}, owner {record.owner.host}")
            if record.phase is Ownership.STARTING and not self.copies:
                await self._execute()
            if record.phase is Ownership.STARTING and not await self.ledger.started():
                raise self._refused(RefusalReason.GUEST_NOT_RUNNING, "its record changed while it was started")
        self.wake()
        self._tools.changed()
        return self.status()

    async def _execute(self) -> None:
        try:
            with self._being_made():
                self._add(await making.start(self._tools.engine, self.files, secrets.token_hex(8)))
        except (engine.EngineError, ShimError, OSError) as error:
            await self.ledger.buried(self._tools.here)
            self.files.remove()
            self.forgotten = True
            if (full := preflight.no_room(error, self._tools.here.host, self.files.config.dir)) is not None:
                raise full from error
            said = f"guest {self.name} did not start on {self._tools.here.host}: {error}"
            raise DroverError(_reason_of(error), said) from error

    async def end(self) -> None:
        """Stop the guest for good. It is stopped before its name is free, so that no two lives overlap."""
        async with self._turn:
            self._must_keep()
            record = await self._fresh()
            if record.phase is Ownership.GONE:
                return
            if record.owner.host != self._tools.here.host or record.phase not in (Ownership.IDLE, Ownership.CRASHED):
                raise self._refused(RefusalReason.GUEST_IS_MIGRATING, f"{record.phase}, owner {record.owner.host}")
            for copy in self.copies.values():
                with contextlib.suppress(engine.EngineError):
                    await copy.vmm.pause()
            if not await self.ledger.buried(self._tools.here):
                raise self._refused(RefusalReason.GUEST_IS_MIGRATING, "its record changed")
            await self._clear()
        self._tools.changed()

    async def _clear(self) -> None:
        for copy in list(self.copies.values()):
            await copy.destroy()
            self.copies.pop(copy.inc, None)
        self.files.remove()
        self.forgotten = True

    # --- the operator's wish ------------------------------------------------------------------------------------------

    async def apply_wish(self, sequence: int) -> WishApplied:
        """Make the wish in the ledger true, now if the hand-over rules allow."""
        self._wish_seen(await self.ledger.want_run(sequence))
        run = self._wish.run
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WISH_S
        while loop.time() < deadline:
            departure = self.departure
            if departure is not None:
                applied = departure.wish_is_applied(run)
                if applied is not None:
                    return WishApplied(applied, self.status().run_state)
            elif self.status().run_state is RunState.ENDED:
                return WishApplied(False, RunState.ENDED)
            elif await self._at_rest(run):
                return WishApplied(True, self.status().run_state)
            else:
                self.wake()
            await asyncio.sleep(0.01)
        return WishApplied(False, self.status().run_state)

    async def _at_rest(self, run: bool) -> bool:
        async with self._turn:
            own = self._own()
            return own is not None and own.running == run and not own.in_session

    # --- destination --------------------------------------------------------------------------------------------------

    async def prepare(self, order: PrepareOrder) -> Prepared:
        """A paused copy that waits for the stream of this attempt. The same attempt gets the same answer."""
        ref = order.attempt
        async with self._turn:
            self._must_keep()
            known = self.arrivals.get((ref.migration, ref.attempt))
            if known is not None and known.prepared is None:
                raise self._stale(ref, "is being ended: this agent was restarted")
            if known is not None and known.prepared is not None:
                return known.prepared
            record = await self._fresh(anew=True)
            self._must_be_open(record, ref)
            if record.destination != self._tools.here or record.inc:
                raise self._stale(ref, "is not to arrive here")
            preflight.must_have_room(self.files)
            source = await self._registered(record.owner.host)
            preflight.must_be_registered(record.owner, source, order.source_peer)
            await preflight.must_fit(self._tools.engine, self._tools.config, self.files)
            arrival, prepared, first = await self._make_arrival(order)
            self._receive(arrival, first)
        self._tools.changed()
        return prepared

    async def _make_arrival(self, order: PrepareOrder) -> tuple[Arrival, Prepared, tuple[Command, ...]]:
        ref, inc = order.attempt, secrets.token_hex(8)
        try:
            with self._being_made():
                copy = await making.prepare(
                    self._tools.engine, self.files, inc, ref.migration, ref.attempt, order.multifd_channels
                )
                self._add(copy)
        except (engine.EngineError, ShimError, OSError) as error:
            if (full := preflight.no_room(error, self._tools.here.host, self.files.config.dir)) is not None:
                raise full from error
            said = f"{self._tools.here.host} cannot prepare guest {self.name}: {error}"
            raise DroverError(_reason_of(error), said) from error
        state, first = prepared_destination(ref, self._tools.here, inc, has_devices=bool(self.files.outside))
        peer = self._tools.peers.source(str(order.source_peer), ref, inc)
        try:
            shell = self._destination_shell(copy, state, peer, order.timeout_ms)
            await shell.begin(session_number(ref))
        except ShimError as error:
            await self._destroyed(copy)
            raise DroverError(RefusalReason.INTERNAL, f"devices of guest {self.name}: {error}") from error
        config = self._tools.config
        peer_here = Endpoint(config.address, config.peer_port)
        made = copy.vmm.metadata
        stream = replace(engine.stream_of(made), ip=config.address)
        acks = (await preflight.probed(self._tools.engine, self._tools.here.host))["switchover_ack"]
        prepared = Prepared(inc, stream, peer_here, made.machine, acks)
        return Arrival(shell, copy, peer, prepared), prepared, first

    def _destination_shell(
        self, copy: Copy, state: DestinationState, peer: GrpcSourcePeer, unclaimed_ms: float = 0.0
    ) -> DestinationShell:
        async def want_run() -> bool:
            return (await self.ledger.want_run()).run

        tools = self._tools
        return DestinationShell(
            state,
            copy.vmm,
            copy.destination_shims(),
            AttemptLedger(tools.commits, state.ref, tools.here, copy.inc, tools.writer),
            peer,
            self.files.marker(copy.inc),
            want_run,
            in_vmm=copy.in_vmm(),
            unclaimed_ms=unclaimed_ms,
        )

    def _receive(self, arrival: Arrival, first: tuple[Command, ...]) -> None:
        ref = arrival.ref
        self.arrivals[ref.migration, ref.attempt] = arrival

        async def until_over() -> None:
            try:
                await arrival.conduct(first)
            finally:
                self.arrivals.pop((ref.migration, ref.attempt), None)
                self._copy_changed()

        self._tasks.spawn(until_over(), "arrival")

    # --- source -------------------------------------------------------------------------------------------------------

    async def conduct(self, order: ConductOrder) -> None:
        """Accept one attempt; from here this agent owns the transfer. Repeated calls for it are answered alike."""
        ref = order.attempt
        async with self._turn:
            if self.departure is not None and self.departure.ref == ref:
                return
            if self.departure is not None:
                raise self._refused(RefusalReason.BUSY, f"attempt {self.departure.ref.attempt} is still being ended")
            if self._tools.journal.report(ref.migration, ref.attempt) is not None:
                return
            record = await self._fresh()
            self._must_be_open(record, ref)
            own = self._own()
            if record.owner != self._tools.here or own is None or record.inc:
                # Bound without a session of ours: its conductor died, and a restarted agent conducts nothing (H7).
                raise self._stale(ref, "cannot be conducted here")
            if record.destination != order.destination:
                raise self._stale(ref, f"is not to go to {order.destination.host}")
            destination = await self._registered(order.destination.host)
            preflight.must_be_registered(order.destination, destination, order.prepared.peer, order.prepared.stream)
            departure = await self._make_departure(order, own)
            self._depart(departure)

    async def _make_departure(self, order: ConductOrder, own: Copy) -> Departure:
        try:
            state = await own.vmm.state()
        except engine.EngineError as error:
            raise DroverError(RefusalReason.OUTCOME_UNKNOWN, f"guest {self.name}: {error}") from error
        if own.in_session or state.status in making.MIGRATING:
            raise self._refused(RefusalReason.BUSY, "an earlier attempt is still being ended")
        wish = await self.ledger.want_run()
        if state.run_state is engine.RunState.SEALED:
            if wish.run:
                raise self._refused(RefusalReason.BUSY, "it is about to run again after its last attempt")
            said = "it was stopped after its last attempt had sent everything; QEMU moves it again once it has run"
            raise self._refused(RefusalReason.RETRY_NEEDS_RUN, said)
        if state.run_state is engine.RunState.ENDED:
            raise self._refused(RefusalReason.GUEST_NOT_RUNNING, "it has shut down")
        tools = self._tools
        await preflight.must_be_movable(tools.engine, tools.here.host, self.name, own, order.prepared)
        paused = state.run_state is engine.RunState.PAUSED
        session = SourceState(
            order.attempt,
            self._tools.here,
            order.prepared.inc,
            suspend_on_timeout=order.policy.on_timeout is OnTimeout.SUSPEND,
            has_devices=bool(self.files.outside),
            inside=bool(self.files.in_vmm),
            gate_wait=order.policy.gate_wait_ms > 0,
            want_run=wish.run,
            paused=paused,
            acks=AckLedger(stopped=paused),
        )
        peer = self._tools.peers.destination(str(order.prepared.peer), order.attempt, order.prepared.inc)
        options = preflight.outgoing(order, tools.config, self.files, tools.departures, paused=paused)
        return self._departure(own, session, peer, order.policy, options, order.destination.host)

    def _departure(
        self,
        copy: Copy,
        state: SourceState,
        peer: GrpcDestinationPeer,
        policy: MigrationPolicy,
        options: engine.OutgoingOptions,
        destination: str,
    ) -> Departure:
        tools = self._tools
        shell = SourceShell(
            state,
            copy.vmm,
            copy.source_shims(),
            AttemptLedger(tools.commits, state.ref, tools.here, state.inc, tools.writer),
            peer,
            policy,
            options,
            session_number(state.ref),
            in_vmm=copy.in_vmm(),
        )
        return Departure(shell, copy, peer, destination, tools.journal, tools.metrics, tools.changed)

    def _depart(self, departure: Departure, first: tuple[Command, ...] | None = None) -> None:
        self.departure = departure

        async def until_over() -> None:
            try:
                await departure.conduct(first)
            finally:
                self.departure = None
                self._tools.link_shared()
                self._copy_changed()

        self._tasks.spawn(until_over(), "departure")
        self._tools.link_shared()

    # --- chaos --------------------------------------------------------------------------------------------------------

    async def inject_late_ack(self, device: str, at: str, times: int, bytes: int) -> str:
        """The scenario that is in force for the device afterwards."""
        own = self._own()
        known = [known.name for known in (*self.files.outside, *self.files.in_vmm)]
        if own is None or own.devices is None or device not in known:
            names = ", ".join(known) or "none"
            raise DroverError(
                RefusalReason.NOT_FOUND,
                f"guest {self.name} has no device {device} here that could be told to; it has: {names}",
                field="device",
            )
        try:
            return await own.devices.inject_late_ack(device, at, times, bytes)
        except ShimError as error:
            raise DroverError(RefusalReason.INTERNAL, f"device {device} of guest {self.name}: {error}") from error

    # --- keeping ------------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Look whenever something changed, and now and then, until nothing of the guest is here."""
        while not self.forgotten:
            try:
                if not await self._something_to_look_at():
                    continue
                self._woken.clear()
                async with self._turn:
                    await self._keep_once()
            except Exception as error:
                self._not_kept(error)
                await asyncio.sleep(min(RETRY_S * 2 ** min(self._troubles - 1, 10), RESYNC_S))
                self.wake()
            else:
                self._kept()
        self._unwatch()

    async def _something_to_look_at(self) -> bool:
        try:
            async with asyncio.timeout(RESYNC_S):
                await self._woken.wait()
        except TimeoutError:
            return self._suspicious()
        return True

    def _kept(self) -> None:
        if self.trouble is not None:
            log.info("a guest is kept again", guest=self.name)
            self._tools.changed()
        self.trouble, self._troubles = None, 0

    def _not_kept(self, error: Exception) -> None:
        """Whatever it is, it is this guest's trouble, and said; everything else goes on, and this is tried again."""
        self._troubles += 1
        kind = Trouble.UNREADABLE if isinstance(error, BadRecord) else Trouble.NOT_KEPT
        if isinstance(error, Untrusted):
            kind = error.trouble
        before, self.trouble = self.trouble, GuestTrouble(self.uuid, self.name, kind, _said(error))
        if not isinstance(error, _EXPECTED):
            failures["keeper"] += 1
        now_s = asyncio.get_running_loop().time()
        if before == self.trouble and now_s - self._said_s < SAID_AGAIN_S:
            return
        self._said_s = now_s
        self._tools.changed()
        unknown = None if isinstance(error, _EXPECTED) else error
        log.error("a guest is not kept: trying again", guest=self.name, error=self.trouble.message, exc_info=unknown)

    def _suspicious(self) -> bool:
        """Is a periodic look worth a write (the barrier)? At rest the watches and the processes tell everything."""
        if self.trouble is not None:
            return True
        own = self._own()
        settled = self.record is not None and self.record.phase is Ownership.IDLE
        if own is None or not settled or len(self.copies) > 1:
            return True
        return own.running != self._wish.run and not own.ended

    def _spoken_for(self) -> bool:
        """Sessions conduct all that is here, and wake the keeper at their ends: a look before that costs a write."""
        conducted = bool(self.copies) and all(copy.in_session for copy in self.copies.values())
        return self.departure is not None or conducted

    async def _keep_once(self) -> None:
        while not self._spoken_for() and not self.forgotten:
            record, doubt = await self._record_for_duty()
            wish = self._wish = await self.ledger.want_run() if record is not None else self._wish
            seen = [await copy.look() for copy in self.copies.values()]
            marker = record is not None and bool(record.inc) and self.files.has_marker(record.inc)
            duty = keeping.duty(record, self._tools.here, seen, marker=marker, want_run=wish.run)
            if record is None:
                raise doubt or self._refused(RefusalReason.OLD_RECORD, "it has no record")
            if duty.do is Do.ASK_AGAIN:
                unknown = ", ".join(copy.inc for copy in seen if keeping.is_unknown(copy))
                raise self._refused(RefusalReason.BUSY, f"it cannot be told whether its process {unknown} lives")
            if duty.do is Do.BURY and not self.may_bury:
                return
            if duty.do is Do.NOTHING:
                await self._tidy(record)
                return
            log.info("keeping", guest=self.name, do=duty.do, inc=duty.inc, phase=record.phase)
            await self._duties[duty.do](self, duty, record)

    async def _record_for_duty(self) -> tuple[GuestRecord | None, Untrusted | None]:
        """None: there is no record that could be trusted, and why."""
        try:
            return await self._fresh(), None
        except Untrusted as doubt:
            return None, doubt

    async def _tidy(self, record: GuestRecord) -> None:
        """Remove what is left of dead processes; forget a guest of which nothing is here."""
        for copy in list(self.copies.values()):
            if not copy.in_session and copy.is_gone:
                await self._destroyed(copy)
        elsewhere = record.owner.host != self._tools.here.host or record.phase is Ownership.GONE
        if elsewhere and not self.copies and not self.arrivals and self.departure is None:
            self.files.remove()
            self.forgotten = True

    async def _finish_birth(self, duty: Duty, record: GuestRecord) -> None:
        await self.ledger.started()

    async def _bury(self, duty: Duty, record: GuestRecord) -> None:
        await self._must_be_over(record)
        await self.ledger.buried(self._tools.here)

    def _attempt_ledger(self, record: GuestRecord) -> AttemptLedger:
        ref = AttemptRef(self.uuid, record.migration, record.attempt)
        return AttemptLedger(self._tools.store, ref, record.owner, record.inc, self._tools.writer)

    async def _must_be_over(self, record: GuestRecord) -> None:
        """A guest of a former power cycle is over only if that is certified (H11): whoever bears this host's name is
        not the host for that. Raises FENCER_REQUIRED."""
        owner = record.owner
        if owner.boot_id == self._tools.here.boot_id:
            return
        if await self._tools.store.read(paths.fence(owner.host, owner.boot_id)) is None:
            said = f"it belongs to power cycle {owner.boot_id}, of which nothing says that it is over"
            raise self._refused(RefusalReason.FENCER_REQUIRED, said)

    async def _declare_crashed(self, duty: Duty, record: GuestRecord) -> None:
        await self._must_be_over(record)
        host_died = record.owner.boot_id != self._tools.here.boot_id
        if not host_died:
            await self._must_not_run_unnoted()
        await self._settled(self._attempt_ledger(record).crashed(host_died=host_died))

    async def _must_not_run_unnoted(self) -> None:
        """A VMM whose note is lost is alive all the same. Raises INTERNAL, and LivenessUnknown."""
        known = {copy.vmm.metadata.pid for copy in self.copies.values()}
        unnoted = set(await asyncio.to_thread(self.files.vmms)) - known
        if unnoted:
            said = f"process {min(unnoted)} of it runs here, and no note names it: it is not declared crashed"
            raise self._refused(RefusalReason.INTERNAL, f"{said}; end that process if the guest is to be given up")

    async def _give_back(self, duty: Duty, record: GuestRecord) -> None:
        await self._settled(self._attempt_ledger(record).roll_back(vmm_seen_dead=True, marker=False))

    async def _settled(self, write: Awaitable[Seen]) -> None:
        """Whatever came of it, the next look decides; an unknown outcome waits for the store."""
        if await write is Seen.LEDGER_UNKNOWN:
            raise StoreUnavailable("outcome unknown")

    async def _promote(self, duty: Duty, record: GuestRecord) -> None:
        await self.copies[duty.inc].vmm.promote()

    async def _end_as_source(self, duty: Duty, record: GuestRecord) -> None:
        """H7: an attempt whose conductor died."""
        copy = self.copies[duty.inc]
        seen = await copy.look()
        status = (await copy.vmm.state()).status
        ref = AttemptRef(self.uuid, record.migration, record.attempt)
        parked = status is engine.EngineStatus.PARKED
        state, first = restarted_source(
            ref, self._tools.here, record.inc, want_run=self._wish.run, parked=parked, sealed=seen.sealed
        )
        destination = record.owner if record.owner != self._tools.here else record.destination or record.owner
        peer = self._tools.peers.destination(await self._peer_address(destination.host), ref, record.inc)
        options = engine.OutgoingOptions(None, engine.HoldStart.OPEN, 0, 1, 1)
        self._depart(self._departure(copy, state, peer, MigrationPolicy(), options, destination.host), first)

    async def _end_as_destination(self, duty: Duty, record: GuestRecord) -> None:
        copy = self.copies[duty.inc]
        metadata = copy.vmm.metadata
        ref = AttemptRef(self.uuid, metadata.migration, metadata.attempt)
        marker = self.files.marker(duty.inc).exists()
        state, first = restarted_destination(ref, self._tools.here, duty.inc, vmm_alive=True, marker=marker)
        source = record.source or record.owner
        peer = self._tools.peers.source(await self._peer_address(source.host), ref, duty.inc)
        self._receive(Arrival(self._destination_shell(copy, state, peer), copy, peer, None), first)

    async def _registered(self, host: str) -> HostRecord | None:
        """What the host has registered; as fresh as the last barrier. Raises StoreUnavailable and BadRecord."""
        node = await self._tools.store.read(paths.host(host))
        return decode(HostRecord, node.data, path=paths.host(host)) if node and node.data else None

    async def _peer_address(self, host: str) -> str:
        """Where the agent at the other end of an attempt may be found; nowhere, when its host is gone."""
        record = await self._registered(host)
        return record.peer_address if record is not None else "127.0.0.1:1"

    async def _refuse_owner(self, duty: Duty, record: GuestRecord) -> None:
        """Kept, not obeyed and not given up, until the record is put right: killing it may lose the guest. Raises
        FOREIGN_OWNER."""
        said = f"its record gives it to {record.owner.host}, to whom it was never sent from here; this copy is kept"
        raise self._refused(RefusalReason.FOREIGN_OWNER, said)

    async def _discard(self, duty: Duty, record: GuestRecord) -> None:
        await self._destroyed(self.copies[duty.inc])

    async def _destroyed(self, copy: Copy) -> None:
        """It stays known while anything of it is left: what raises here is tried again."""
        await copy.destroy()
        self.copies.pop(copy.inc, None)

    @contextlib.contextmanager
    def _being_made(self) -> Generator[None]:
        self._making += 1
        try:
            yield
        finally:
            self._making -= 1

    async def _run(self, duty: Duty, record: GuestRecord) -> None:
        """A guest that arrived paused is announced now: QEMU sends nothing while the vCPUs stand."""
        vmm = self.copies[duty.inc].vmm
        await vmm.resume()
        if any(device.shim is ShimKind.NET for device in self.files.spec.devices):
            await vmm.announce()

    async def _stop(self, duty: Duty, record: GuestRecord) -> None:
        await self.copies[duty.inc].vmm.pause()

    _duties: ClassVar[dict[Do, Callable[[HostedGuest, Duty, GuestRecord], Coroutine[Any, Any, None]]]] = {
        Do.FINISH_BIRTH: _finish_birth,
        Do.BURY: _bury,
        Do.DECLARE_CRASHED: _declare_crashed,
        Do.GIVE_BACK: _give_back,
        Do.PROMOTE: _promote,
        Do.END_AS_SOURCE: _end_as_source,
        Do.END_AS_DESTINATION: _end_as_destination,
        Do.DISCARD: _discard,
        Do.REFUSE_OWNER: _refuse_owner,
        Do.RUN: _run,
        Do.STOP: _stop,
    }

    # --- what others see ----------------------------------------------------------------------------------------------

    def _own(self) -> Copy | None:
        """The copy that is the guest, as far as is known without asking."""
        alive = [copy for copy in self.copies.values() if not copy.is_gone]
        born = [copy for copy in alive if not copy.incoming]
        named = [copy for copy in alive if self.is_here and self.record is not None and copy.inc == self.record.inc]
        return (named or born or [None])[0]

    def status(self) -> GuestStatus:
        own = self._own()
        if own is None and not self._all_known:
            return GuestStatus(self.uuid, self.name, "", RunState.UNKNOWN)
        if own is None:
            starting = self.record is None or self.record.phase is Ownership.STARTING
            return GuestStatus(self.uuid, self.name, "", RunState.STARTING if starting else RunState.ENDED)
        if own.vmm.liveness() is Liveness.UNKNOWN:
            state = RunState.UNKNOWN
        elif own.ended:
            state = RunState.ENDED
        elif own.running:
            state = RunState.RUNNING
        else:
            state = RunState.STOPPED if self._wish.run else RunState.PAUSED
        return GuestStatus(self.uuid, self.name, own.inc, state, own.vmm.metadata.pid)

    def copy_statuses(self) -> tuple[CopyStatus, ...]:
        """What of the guest is on this host, whoever owns it."""
        return tuple(map(self._copy_status, self.copies.values()))

    def _copy_status(self, copy: Copy) -> CopyStatus:
        devices = copy.devices
        return CopyStatus(
            self.uuid,
            self.name,
            copy.inc,
            memory_mib=0 if copy.is_gone else self.files.spec.memory_mib,
            pid=0 if copy.is_gone else copy.vmm.metadata.pid,
            devices_pid=0 if devices is None or devices.liveness() is Liveness.GONE else devices.pid,
            incoming=copy.incoming,
        )

    @property
    def all_known(self) -> bool:
        """`copy_statuses` is all there is: nothing was left unadopted, is being started or cannot be told alive."""
        processes = [copy.vmm.liveness() for copy in self.copies.values()]
        processes += [copy.devices.liveness() for copy in self.copies.values() if copy.devices is not None]
        return self._all_known and not self._making and Liveness.UNKNOWN not in processes

    @property
    def is_here(self) -> bool:
        """This host owns the guest, as far as is known."""
        return self.record is not None and self.record.owner.host == self._tools.here.host

    # --- refusals -----------------------------------------------------------------------------------------------------

    async def _fresh(self, *, anew: bool = False) -> GuestRecord:
        """The record, once all processes are known. Raises Untrusted, StoreUnavailable and BadRecord as well.

        `anew`: a life or an attempt begins here by this record, whatever was known before.
        """
        await self._adopt_left()
        found = await self.ledger.look()
        if found is None:
            said = "the ledger has lost its record. What runs here is left as it is; `drover repair` can write it again"
            raise Untrusted(Trouble.NO_RECORD, f"guest {self.name}: {said}")
        known = self._tools.journal.known_record(self.uuid)
        if known is not None and found.mzxid < known.mzxid and found.record != known.record and not anew:
            said = (
                f"the ledger's record ({found.record.phase}, owner {found.record.owner.host}) is older than the one "
                f"that was read before ({known.record.phase}, owner {known.record.owner.host}): was it restored from "
                "a backup? What runs here is left as it is"
            )
            raise Untrusted(Trouble.OLD_RECORD, f"guest {self.name}: {said}")
        self._tools.journal.saw_record(self.uuid, found)
        self.record = found.record
        return found.record

    async def restore(self) -> GuestStatus:
        """An operator's order: write the record that the ledger has lost again, from what runs here.

        Only where nothing can run elsewhere: the guest's one process is here, no attempt is under way in it, and it was
        never given away as far as this host knows. Raises ALREADY_EXISTS when the ledger has a record, and
        GUEST_IS_MIGRATING when this host cannot vouch for the guest.
        """
        async with self._turn:
            self._must_keep()
            await self._adopt_left()
            if await self.ledger.look() is not None:
                raise self._refused(RefusalReason.ALREADY_EXISTS, "the ledger has its record")
            own = await self._only_copy_at_rest()
            record = handover.restored(self.name, self._tools.here, writer=self._tools.writer)
            if not await self.ledger.restored(record, self.files.spec, WantRun(own.running or own.ended)):
                raise self._refused(RefusalReason.ALREADY_EXISTS, "its name, or its record, is taken by now")
            if (found := await self.ledger.look()) is not None:
                self._tools.journal.saw_record(self.uuid, found)
                self.record = found.record
        log.warning("a lost record was written again, as ordered", guest=self.name)
        self.wake()
        return self.status()

    async def _only_copy_at_rest(self) -> keeping.Copy:
        known = self._tools.journal.known_record(self.uuid)
        if known is not None and known.record.owner.host != self._tools.here.host:
            said = f"it was given to {known.record.owner.host}: ask that host"
            raise self._refused(RefusalReason.GUEST_IS_MIGRATING, said)
        try:
            seen = [copy for copy in [await copy.look() for copy in self.copies.values()] if keeping.decides(copy)]
        except engine.EngineError as error:
            raise self._refused(RefusalReason.BUSY, str(error)) from error
        if len(seen) != 1 or self.departure is not None:
            raise self._refused(RefusalReason.GUEST_IS_MIGRATING, f"{len(seen)} copies of it are here, or it moves")
        own = seen[0]
        if own.incoming or own.in_session or own.sealed or own.migrating or keeping.is_unknown(own):
            said = f"its process {own.inc} is not at rest, or is not the guest: it may run elsewhere"
            raise self._refused(RefusalReason.GUEST_IS_MIGRATING, said)
        return own

    def _must_be_open(self, record: GuestRecord, ref: AttemptRef) -> None:
        if record.phase is not Ownership.OPEN or (record.migration, record.attempt) != (ref.migration, ref.attempt):
            raise self._stale(ref, f"is not open: the record says {record.phase}, attempt {record.attempt}")

    def _stale(self, ref: AttemptRef, said: str) -> DroverError:
        return DroverError(
            RefusalReason.STALE_ATTEMPT, f"attempt {ref.attempt} of {ref.migration} for guest {self.name} {said}"
        )

    def _refused(self, reason: RefusalReason, said: str) -> DroverError:
        return DroverError(reason, f"guest {self.name}: {said}")


def _reason_of(error: Exception) -> RefusalReason:
    """Of a copy that could not be made."""
    return RefusalReason.IMAGE_NOT_FOUND if isinstance(error, engine.ImageNotFound) else RefusalReason.INTERNAL
