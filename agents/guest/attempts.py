"""The attempts that one guest takes part in on this host: accepted, or begun again after a restart, and conducted.

What an attempt is, and what belongs to its end, is told in `agents/handover/attempt.py`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import replace

from agents.disks import pools
from agents.disks.images import DiskError
from agents.engine import base as engine
from agents.guest import copies as making
from agents.guest import hardware
from agents.guest.copies import Copy
from agents.guest.files import GuestFiles
from agents.guest.held import HeldGuest
from agents.handover import preflight
from agents.handover.attempt import Arrival, Departure
from agents.handover.destination import DestinationState, prepared_destination, restarted_destination
from agents.handover.destination_shell import DestinationShell
from agents.handover.ledger import AttemptLedger
from agents.handover.peer import GrpcDestinationPeer, GrpcSourcePeer, PeerUnavailable
from agents.handover.source import SourceState, restarted_source
from agents.handover.source_shell import SourceShell
from agents.handover.words import Command
from agents.host import pools as host_pools
from agents.host.journal import KnownRecord
from agents.host.streams import agreed
from agents.nets.taps import NetworkNotFound
from agents.shims.base import OptionsRefused, ShimError
from agents.shims.block import SourceDisks
from orchestrator.core.agent import (
    ConductOrder,
    PrepareOrder,
)
from orchestrator.core.changes import with_machine_of
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.hardware import has_hardware
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.migration import Prepared
from orchestrator.core.policy import MigrationPolicy, OnTimeout
from orchestrator.core.records import GuestSpec, HostRecord, LiveMachine
from orchestrator.core.switchover import AckLedger
from orchestrator.tasks import Tasks


def session_number(ref: AttemptRef) -> int:
    """Names a device's session of one attempt; unlike across migrations, so that none is taken for another's."""
    return int(ref.migration.replace("-", "")[:10], 16) << 8 | ref.attempt & 0xFF


class Attempts:
    """Prepares, conducts and ends them. `prepare` and `conduct` raise DroverError and may be repeated."""

    def __init__(self, guest: HeldGuest, turn: asyncio.Lock, tasks: Tasks) -> None:
        """`turn` is held while anything begins for the guest; each attempt runs as one of `tasks`."""
        self._guest = guest
        self._tools = guest.tools
        self._turn = turn
        self._tasks = tasks

    @property
    def _files(self) -> GuestFiles:
        return self._guest.files

    async def prepare(self, order: PrepareOrder) -> Prepared:
        """A paused copy that waits for the stream of this attempt. The same attempt gets the same answer."""
        ref = order.attempt
        async with self._turn:
            self._guest.must_keep()
            if not self._guest.copies:
                await self._guest.described()
            known = self._guest.arrivals.get((ref.migration, ref.attempt))
            if known is not None and known.prepared is None:
                raise self._guest.stale(ref, "is being ended: this agent was restarted")
            if known is not None and known.prepared is not None:
                return known.prepared
            record = await self._record_to_arrive_by(ref)
            preflight.must_have_room(self._files)
            owner, peer = record.owner, order.source_peer
            await self._judged(owner, lambda source: preflight.must_be_registered(owner, source, peer))
            await self._judged(owner, lambda source: preflight.must_be_of_one_engine(self._files, source))
            machine = await self._machine_at(order, owner)
            await self._judged(owner, lambda source: preflight.must_have_networks(self._files, source))
            await preflight.must_fit(self._tools.engine, self._tools.config, self._files)
            tls = self._tools.streams.from_host(owner.host) if self._tools.streams is not None else None
            arrival, prepared, first = await self._make_arrival(order, owner.host, machine, tls)
            self._receive(arrival, first)
        self._tools.changed()
        return prepared

    async def _machine_at(self, order: PrepareOrder, source: HostRef) -> LiveMachine | None:
        """The guest's machine as its source has it; None: a guest that asks for no hardware. Raises DroverError."""
        if not has_hardware(self._files.spec):
            return None
        peer = self._tools.peers.source(str(order.source_peer), order.attempt, "", source.host)
        locks, spec = self._tools.pool_locks, self._files.spec
        try:
            described = await peer.machine(hold_locks=locks.unproven(spec, source))
        except PeerUnavailable as error:
            said = f"its source does not say what its machine is: {error}"
            raise self._guest.refused(RefusalReason.AGENT_UNREACHABLE, said) from error
        if described.spec is not None:
            await self._as_it_is_there(described.spec)
        spec = self._files.spec
        cpus = host_pools.cpu_definitions(await preflight.probed(self._tools.engine, self._tools.config.host))
        await asyncio.to_thread(hardware.must_agree, self._tools.config, spec, described.machine, cpus)
        await asyncio.to_thread(pools.must_be_the_same, self._tools.config, spec, described.pool_tokens)
        await locks.must_be_seen(spec, source, described.locked_pools)
        return described.machine

    async def _as_it_is_there(self, there: GuestSpec) -> None:
        """The ledger as our server has it may be behind what was added to the guest, or taken away, a moment ago."""
        spec = with_machine_of(self._files.spec, there)
        if spec.memory_mib > self._files.spec.memory_mib:
            await self._tools.must_have_memory(self._guest.uuid, spec.memory_mib)
        if spec != self._files.spec:
            self._files.make()
            await self._guest.respecify(spec)

    async def _record_to_arrive_by(self, ref: AttemptRef) -> GuestRecord:
        """One that leads here and is not bound. An old one will do (H13): a copy that waits in vain is given up once
        that is seen, and none becomes the guest without the ledger's word."""
        shown = await self._guest.shown()
        if shown is not None and self._leads_here(shown.record, ref):
            return shown.record
        record = (await self._guest.fresh(anew=True)).record
        if not self._leads_here(record, ref):
            self._must_be_open(record, ref)
            raise self._guest.stale(ref, "is not to arrive here")
        return record

    def _leads_here(self, record: GuestRecord, ref: AttemptRef) -> bool:
        return _is_open(record, ref) and record.destination == self._tools.here and not record.inc

    async def _judged(self, host: HostRef, judge: Callable[[HostRecord | None], None]) -> None:
        """Raises what `judge` raises of what the host has registered; but nobody is refused for what our server of the
        ledger has not heard yet."""
        try:
            judge(await self._guest.registered(host.host))
        except DroverError:
            await self._tools.store.barrier()
            judge(await self._guest.registered(host.host))

    async def _make_arrival(
        self, order: PrepareOrder, source: str, machine: LiveMachine | None, tls: engine.StreamTls | None
    ) -> tuple[Arrival, Prepared, tuple[Command, ...]]:
        ref, inc = order.attempt, secrets.token_hex(8)
        images = self._guest.images
        try:
            with self._guest.being_made():
                if images is not None:
                    self._files.make()
                    await images.ready(tls)
                channels = order.multifd_channels
                copy = await making.prepare(
                    self._tools.engine, self._files, inc, ref.migration, ref.attempt, channels, machine, tls
                )
                self._guest.add(copy)
        except (engine.EngineError, ShimError, DiskError, OSError) as error:
            if (full := preflight.no_room(error, self._tools.here.host, self._files.config.dir)) is not None:
                raise full from error
            said = f"{self._tools.here.host} cannot prepare guest {self._guest.name}: {error}"
            raise DroverError(reason_of(error), said) from error
        state, first = prepared_destination(
            ref, self._tools.here, inc, has_devices=bool(self._files.outside), has_disks=images is not None
        )
        peer = self._tools.peers.source(str(order.source_peer), ref, inc, source)
        try:
            shell = self._destination_shell(copy, state, peer, order.timeout_ms)
            await shell.begin(session_number(ref))
        except ShimError as error:
            await self._guest.destroyed(copy)
            raise DroverError(RefusalReason.INTERNAL, f"devices of guest {self._guest.name}: {error}") from error
        config = self._tools.config
        peer_here = Endpoint(config.address, config.peer_port)
        made = copy.vmm.metadata
        stream = replace(engine.stream_of(made), ip=config.address)
        acks = (await preflight.probed(self._tools.engine, self._tools.here.host))["switchover_ack"]
        prepared = Prepared(inc, stream, peer_here, made.machine, acks, tls is not None)
        return Arrival(shell, copy, peer, source, prepared), prepared, first

    def _destination_shell(
        self, copy: Copy, state: DestinationState, peer: GrpcSourcePeer, unclaimed_ms: float = 0.0
    ) -> DestinationShell:
        async def want_run() -> bool:
            return (await self._guest.ledger.want_run()).run

        tools = self._tools
        return DestinationShell(
            state,
            copy.vmm,
            copy.destination_shims(),
            AttemptLedger(tools.commits, state.ref, tools.here, copy.inc, tools.writer),
            peer,
            self._files.marker(copy.inc),
            want_run,
            in_vmm=copy.in_vmm(),
            unclaimed_ms=unclaimed_ms,
            bind=copy.taps.bind,
            images=self._guest.images,
        )

    def _receive(self, arrival: Arrival, first: tuple[Command, ...]) -> None:
        ref = arrival.ref
        self._guest.arrivals[ref.migration, ref.attempt] = arrival

        async def until_over() -> None:
            try:
                await arrival.conduct(first)
            finally:
                self._guest.arrivals.pop((ref.migration, ref.attempt), None)
                self._over(arrival)

        self._tasks.spawn(until_over(), "arrival")

    async def conduct(self, order: ConductOrder) -> None:
        """Accept one attempt; from here this agent owns the transfer. Repeated calls for it are answered alike."""
        ref = order.attempt
        async with self._turn:
            if self._guest.departure is not None and self._guest.departure.ref == ref:
                return
            if self._guest.departure is not None:
                raise self._guest.refused(
                    RefusalReason.BUSY, f"attempt {self._guest.departure.ref.attempt} is still being ended"
                )
            if self._tools.journal.report(ref.migration, ref.attempt) is not None:
                return
            judged = await self._guest.shown()
            if judged is None or self._not_to_be_conducted(judged.record, order) is not None:
                judged = await self._guest.fresh()  # nobody is refused for what is old
            if (refusal := self._not_to_be_conducted(judged.record, order)) is not None:
                raise refusal
            own = self._guest.own()
            if own is None:
                raise self._guest.stale(ref, "cannot be conducted here")
            there, prepared = order.destination, order.prepared
            await self._judged(
                there, lambda host: preflight.must_be_registered(there, host, prepared.peer, prepared.stream)
            )
            departure = await self._make_departure(order, own, judged)
            self._depart(departure)

    def _not_to_be_conducted(self, record: GuestRecord, order: ConductOrder) -> DroverError | None:
        """Why not, by that record. An old one that has nothing against it will do (H13): the attempt begins with a
        compare-and-set on the very version that was judged."""
        ref = order.attempt
        if not _is_open(record, ref):
            return self._not_open(record, ref)
        if record.owner != self._tools.here or record.inc:
            # Bound without a session of ours: its conductor died, and a restarted agent conducts nothing (H7).
            return self._guest.stale(ref, "cannot be conducted here")
        if record.destination != order.destination:
            return self._guest.stale(ref, f"is not to go to {order.destination.host}")
        return None

    async def _make_departure(self, order: ConductOrder, own: Copy, judged: KnownRecord) -> Departure:
        try:
            state = await own.vmm.state()
        except engine.EngineError as error:
            raise DroverError(RefusalReason.OUTCOME_UNKNOWN, f"guest {self._guest.name}: {error}") from error
        if own.in_session or state.status in making.MIGRATING:
            raise self._guest.refused(RefusalReason.BUSY, "an earlier attempt is still being ended")
        wish = max(await self._guest.ledger.want_run(), self._guest.wish, key=lambda one: one.sequence)
        if state.run_state is engine.RunState.SEALED:
            if wish.run:
                raise self._guest.refused(RefusalReason.BUSY, "it is about to run again after its last attempt")
            said = "it was stopped after its last attempt had sent everything; QEMU moves it again once it has run"
            raise self._guest.refused(RefusalReason.RETRY_NEEDS_RUN, said)
        if state.run_state is engine.RunState.ENDED:
            raise self._guest.refused(RefusalReason.GUEST_NOT_RUNNING, "it has shut down")
        tools = self._tools
        await preflight.must_be_movable(tools.engine, tools.here.host, self._guest.name, own, order.prepared)
        paused = state.run_state is engine.RunState.PAUSED
        session = SourceState(
            order.attempt,
            self._tools.here,
            order.prepared.inc,
            suspend_on_timeout=order.policy.on_timeout is OnTimeout.SUSPEND,
            has_devices=bool(self._files.outside),
            disks=tuple(disk.name for disk in own.local_disks),
            inside=bool(self._files.in_vmm),
            gate_wait=order.policy.gate_wait_ms > 0,
            want_run=wish.run,
            paused=paused,
            acks=AckLedger(stopped=paused),
        )
        peer = self._tools.peers.destination(
            str(order.prepared.peer), order.attempt, order.prepared.inc, order.destination.host
        )
        tls = agreed(tools.streams, order.destination.host, offered=order.prepared.tls)
        options = preflight.outgoing(order, tools.config, self._files, tools.departures, paused=paused)
        options = replace(options, tls=tls)
        departure = self._departure(own, session, peer, order.policy, options, order.destination.host)
        own.disks_engaged = bool(own.local_disks)
        departure.shell.ledger.judged = (judged.record, judged.version)
        return departure

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
            disks=SourceDisks(copy.vmm.disks, state.inc, options.tls) if copy.local_disks else None,
            retire_disks=copy.retire_disks,
        )
        return Departure(shell, copy, peer, destination, tools.journal, tools.metrics, tools.changed)

    def _depart(self, departure: Departure, first: tuple[Command, ...] | None = None) -> None:
        self._guest.departure = departure

        async def until_over() -> None:
            try:
                await departure.conduct(first)
            finally:
                self._guest.departure = None
                self._tools.link_shared()
                self._over(departure)

        self._tasks.spawn(until_over(), "departure")
        self._tools.link_shared()

    def _over(self, attempt: Departure | Arrival) -> None:
        """Its keeper speaks for the guest again, and knows what the attempt wrote."""
        if attempt.copy.removed:
            self._guest.copies.pop(attempt.copy.inc, None)
        self._guest.wrote(attempt.shell.ledger.wrote)
        self._guest.copy_changed()

    async def end_as_source(self, inc: str, record: GuestRecord) -> None:
        """H7: an attempt whose conductor died."""
        copy = self._guest.copies[inc]
        seen = await copy.look()
        status = (await copy.vmm.state()).status
        ref = AttemptRef(self._guest.uuid, record.migration, record.attempt)
        parked = status is engine.EngineStatus.PARKED
        state, first = restarted_source(
            ref, self._tools.here, record.inc, want_run=self._guest.wish.run, parked=parked, sealed=seen.sealed
        )
        destination = record.owner if record.owner != self._tools.here else record.destination or record.owner
        peer = self._tools.peers.destination(
            await self._peer_address(destination.host), ref, record.inc, destination.host
        )
        options = engine.OutgoingOptions(None, engine.HoldStart.OPEN, 0, 1, 1)
        self._depart(self._departure(copy, state, peer, MigrationPolicy(), options, destination.host), first)

    async def end_as_destination(self, inc: str, record: GuestRecord) -> None:
        """Conduct what is left of an attempt whose conductor died here; ends it, never begins anything (H7, H8)."""
        copy = self._guest.copies[inc]
        metadata = copy.vmm.metadata
        ref = AttemptRef(self._guest.uuid, metadata.migration, metadata.attempt)
        marker = self._files.marker(inc).exists()
        state, first = restarted_destination(ref, self._tools.here, inc, vmm_alive=True, marker=marker)
        source = record.source or record.owner
        peer = self._tools.peers.source(await self._peer_address(source.host), ref, inc, source.host)
        self._receive(Arrival(self._destination_shell(copy, state, peer), copy, peer, source.host, None), first)

    async def _peer_address(self, host: str) -> str:
        """Where the agent at the other end of an attempt may be found; nowhere, when its host is gone."""
        record = await self._guest.registered(host)
        return record.peer_address if record is not None else "127.0.0.1:1"

    def _must_be_open(self, record: GuestRecord, ref: AttemptRef) -> None:
        if not _is_open(record, ref):
            raise self._not_open(record, ref)

    def _not_open(self, record: GuestRecord, ref: AttemptRef) -> DroverError:
        said = f"is not open: the record says {record.phase}, attempt {record.attempt}"
        return self._guest.stale(ref, said)


def _is_open(record: GuestRecord, ref: AttemptRef) -> bool:
    return record.phase is Ownership.OPEN and (record.migration, record.attempt) == (ref.migration, ref.attempt)


def reason_of(error: Exception) -> RefusalReason:
    """Of a copy that could not be made."""
    if isinstance(error, engine.DiskLocked):
        return RefusalReason.DISK_LOCKED
    if isinstance(error, OptionsRefused):  # the program of its source took them, this host's does not
        return RefusalReason.DEVICE_NOT_MIGRATABLE
    if isinstance(error, NetworkNotFound):
        return RefusalReason.NETWORK_NOT_FOUND
    return RefusalReason.IMAGE_NOT_FOUND if isinstance(error, engine.ImageNotFound) else RefusalReason.INTERNAL
