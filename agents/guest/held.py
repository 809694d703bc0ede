"""What of one guest is on this host, and what is known of it: its copies, its attempts, its record.

The record is trusted as far as it is not older than what this host has read before, and only once every process that an
earlier agent left is known. Who acts on it is `keeper.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from dataclasses import replace

import structlog

from agents.disks.local import LocalImages, local
from agents.engine import base as engine
from agents.guest import copies as making
from agents.guest.copies import Copy
from agents.guest.files import GuestFiles
from agents.guest.hardware import disk_files
from agents.guest.ledger import GuestLedger
from agents.guest.shared import AgentShared
from agents.handover.attempt import Arrival, Departure
from agents.host.journal import KnownRecord
from agents.shims.base import ShimError
from orchestrator.core.agent import (
    CopyStatus,
    GuestStatus,
    RunState,
    Trouble,
)
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AttemptRef
from orchestrator.core.liveness import Liveness, LivenessUnknown
from orchestrator.core.records import GuestSpec, HostRecord, WantRun
from orchestrator.core.restore import Held
from orchestrator.ledger import paths
from orchestrator.ledger.records import decode

log = structlog.get_logger(__name__)


class Forgotten(Exception):
    """The keeper had nothing of the guest left and ended while the call waited for its turn: another one has to take
    it. What this one made now, nobody would keep."""


class Untrusted(DroverError):
    """The ledger says nothing of the guest, or something older than what was read before: nothing follows from it."""

    def __init__(self, trouble: Trouble, message: str) -> None:
        super().__init__(RefusalReason.OLD_RECORD, message)
        self.trouble = trouble


class HeldGuest:
    """The guest as this host has it. Decides nothing and changes nothing in the ledger."""

    def __init__(self, tools: AgentShared, files: GuestFiles) -> None:
        self.tools = tools
        self.files = files
        self.ledger = GuestLedger(tools.store, files.uuid, tools.writer)
        self.copies: dict[str, Copy] = {}
        self.departure: Departure | None = None
        self.arrivals: dict[tuple[str, int], Arrival] = {}
        self.record: GuestRecord | None = None
        """As last seen; a hint."""
        self.told: KnownRecord | None = None
        """The record as watches, and this host's own writes, last told; may be old. None: there is none to go by."""
        self.wish = WantRun()
        """The operator's, as last seen."""
        self.woken = asyncio.Event()
        """Something changed, and nobody has looked since."""
        self.forgotten = False
        """Nothing of the guest is here any more."""
        self.all_adopted = False
        """Every process that an earlier agent left was adopted, or is dead."""
        self._adopting = asyncio.Lock()
        self._images: LocalImages | None = None
        self._making = 0
        """Processes that are being started and are not among the copies yet."""

    @property
    def uuid(self) -> str:
        """Names this life of the guest in the ledger and on the disk."""
        return self.files.uuid

    @property
    def images(self) -> LocalImages | None:
        """Of its local disks, when it is to come here; None: it has none. Raises POOL_NOT_FOUND."""
        if self._images is None and self.files.spec.disks:
            config = self.files.config
            disks = local(disk_files(config, self.files.spec))
            if disks:
                listen = config.listen or config.address
                self._images = LocalImages(self.files.directory, disks, listen, config.address)
        return self._images

    @property
    def name(self) -> str:
        """As its users call it; another life may bear it later."""
        return self.files.spec.name

    async def described(self) -> None:
        """What the guest is, as the ledger says it by now: it may have been edited since it was here last. To be called
        while no copy of it is here, in the guest's turn."""
        spec = await self.ledger.spec()
        if spec is None or spec == self.files.spec:
            return
        images, self._images = self._images, None
        if images is not None:
            await images.detach()
        self.files = self.files.with_spec(spec)
        if self.files.directory.exists():
            await asyncio.to_thread(self.files.note)

    def wake(self) -> None:
        """Something changed: the keeper looks as soon as it can."""
        self.woken.set()

    def add(self, copy: Copy) -> None:
        """Hold a new copy, and hear of its changes."""
        self.copies[copy.inc] = copy
        copy.on_change = self.copy_changed

    def copy_changed(self) -> None:
        """Wake the keeper, and tell those who watch the agent."""
        self.wake()
        self.tools.changed()

    def must_keep(self) -> None:
        """Raises Forgotten when nothing of the guest is here any more."""
        if self.forgotten:
            raise Forgotten(self.uuid)

    async def adopt_left(self) -> None:
        """Raises BUSY while a process that was left is alive and does not answer, BadRecord for a note that cannot be
        read: what is not known is not dead, and nothing may be decided before."""
        async with self._adopting:
            if not self.all_adopted:
                await self._adopt_all()
                self.all_adopted = True

    async def _adopt_all(self) -> None:
        for metadata in self.files.processes():
            if metadata.inc in self.copies:
                continue
            try:
                copy = await making.adopt(self.tools.engine, self.files, metadata)
            except (engine.EngineError, ShimError) as error:
                said = f"its process {metadata.inc} does not answer: {error}"
                raise self.refused(RefusalReason.BUSY, said) from error
            if copy is not None:
                self.add(copy)
        try:
            await making.end_unnoted(self.files, self.copies)
        except LivenessUnknown as error:
            raise self.refused(RefusalReason.BUSY, str(error)) from error

    async def fresh(self, *, anew: bool = False) -> KnownRecord:
        """The record, not older than this call, once all processes are known. Raises Untrusted, StoreUnavailable and
        BadRecord as well.

        `anew`: a life or an attempt begins here by this record, whatever was known before.
        """
        await self.adopt_left()
        found = await self.ledger.look()
        if doubt := await self.tools.believed.doubt():  # after the look: whatever was read is not of a later ledger
            raise Untrusted(Trouble.FOREIGN_LEDGER, f"guest {self.name}: the ledger is not believed: {doubt}")
        if found is None:
            said = "the ledger has lost its record. What runs here is left as it is; `drover repair` can write it again"
            raise Untrusted(Trouble.NO_RECORD, f"guest {self.name}: {said}")
        known = self.tools.journal.known_record(self.uuid)
        if known is not None and self.is_older(found) and not anew:
            said = (
                f"the ledger's record ({found.record.phase}, owner {found.record.owner.host}) is older than the one "
                f"that was read before ({known.record.phase}, owner {known.record.owner.host}): was it restored from "
                "a backup? What runs here is left as it is"
            )
            raise Untrusted(Trouble.OLD_RECORD, f"guest {self.name}: {said}")
        self.saw(found)
        return found

    async def shown(self) -> KnownRecord | None:
        """The record as our server of the ledger has it, once all processes are known; may be old. None: nothing that
        could be trusted. Raises StoreUnavailable and BadRecord."""
        await self.adopt_left()
        found = await self.ledger.shown()
        if found is None or await self.tools.believed.doubt() or self.is_older(found):
            return None
        self.saw(found)
        return found

    def wrote(self, known: KnownRecord | None) -> None:
        """An attempt of this host wrote the record; its answer may be faster than the watch."""
        if known is not None and (self.told is None or known.mzxid > self.told.mzxid):
            self.told = known

    def is_older(self, found: KnownRecord) -> bool:
        """Than what this host has read before."""
        known = self.tools.journal.known_record(self.uuid)
        if known is None or known.incarnation != self.tools.believed.id:
            return False
        return found.mzxid < known.mzxid and found.record != known.record

    def saw(self, found: KnownRecord) -> None:
        """Remember it, also for later agents of this host."""
        self.tools.journal.saw_record(self.uuid, replace(found, incarnation=self.tools.believed.id))
        self.record = found.record

    async def respecify(self, spec: GuestSpec) -> None:
        """What the guest is has changed: note it down, and know it from here on. Raises OSError."""
        if spec == self.files.spec:
            return
        files = replace(self.files, spec=spec)
        files.note()
        self.files = files
        if self._images is not None:
            await self._images.detach()
            self._images = None
        for copy in self.copies.values():
            copy.respecified(files)

    async def registered(self, host: str) -> HostRecord | None:
        """What the host has registered, as our server of the ledger has it. Raises StoreUnavailable and BadRecord."""
        node = await self.tools.store.read(paths.host(host))
        return decode(HostRecord, node.data, path=paths.host(host)) if node and node.data else None

    def own(self) -> Copy | None:
        """The copy that is the guest, as far as is known without asking."""
        alive = [copy for copy in self.copies.values() if not copy.is_gone]
        born = [copy for copy in alive if not copy.incoming]
        named = [copy for copy in alive if self.is_here and self.record is not None and copy.inc == self.record.inc]
        return (named or born or [None])[0]

    async def begun(self) -> bool:
        """Its VMM runs: STARTING -> IDLE. False: the record does not allow it (any more). Raises OSError as well; then
        the record is as it was."""
        await asyncio.to_thread(self.files.births.succeeded)
        return await self.ledger.started()

    @contextlib.contextmanager
    def being_made(self) -> Generator[None]:
        """While a process is being started, the list of copies is not complete."""
        self._making += 1
        try:
            yield
        finally:
            self._making -= 1

    async def destroyed(self, copy: Copy) -> None:
        """It stays known while anything of it is left: what raises here is tried again."""
        await copy.destroy()
        self.copies.pop(copy.inc, None)

    async def let_go(self, copy: Copy) -> None:
        """Give an adopted copy back to whoever had started it. What raises here is tried again."""
        if isinstance(self.tools.engine, engine.AdoptingEngine):
            await self.tools.engine.let_go(copy.vmm)
        self.copies.pop(copy.inc, None)

    def status(self) -> GuestStatus:
        """The guest as this host sees it, without asking its VMM."""
        own = self.own()
        if own is None and not self.all_adopted:
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
            state = RunState.STOPPED if self.wish.run else RunState.PAUSED
        return GuestStatus(self.uuid, self.name, own.inc, state, own.vmm.metadata.pid)

    def copy_statuses(self) -> tuple[CopyStatus, ...]:
        """What of the guest is on this host, whoever owns it."""
        return tuple(map(self._copy_status, self.copies.values()))

    async def held(self) -> tuple[Held, ...]:
        """Its processes, as their VMMs say it now."""
        there = [copy for copy in self.copies.values() if not copy.is_gone]
        return tuple([await self._held(copy) for copy in there])

    async def _held(self, copy: Copy) -> Held:
        seen = Held(self.tools.here, copy.inc, copy.incoming, known=False)
        if copy.vmm.liveness() is not Liveness.ALIVE:
            return seen
        try:
            state = (await copy.vmm.state()).run_state
        except engine.EngineError:
            return seen
        return replace(
            seen,
            running=state is engine.RunState.RUNNING,
            sealed=state is engine.RunState.SEALED,
            ended=state is engine.RunState.ENDED or bool(copy.ended),
            known=True,
        )

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
        return self.all_adopted and not self._making and Liveness.UNKNOWN not in processes

    @property
    def is_here(self) -> bool:
        """This host owns the guest, as far as is known."""
        return self.record is not None and self.record.owner.host == self.tools.here.host

    def stale(self, ref: AttemptRef, said: str) -> DroverError:
        """STALE_ATTEMPT, to be raised, for an order that the record no longer agrees with."""
        return DroverError(
            RefusalReason.STALE_ATTEMPT, f"attempt {ref.attempt} of {ref.migration} for guest {self.name} {said}"
        )

    def refused(self, reason: RefusalReason, said: str) -> DroverError:
        """A refusal about this guest, to be raised."""
        return DroverError(reason, f"guest {self.name}: {said}")
