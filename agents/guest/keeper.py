"""The keeper of one guest on this host: its birth and its end, its operator's wish, and what is owed to it in between.

Nothing is decided here. An attempt is conducted by a `Departure` or an `Arrival` (`handover/attempt.py`), which speaks
for its copy until it is over; what no attempt speaks for is decided by `duty.duty`, on a record that was read behind a
barrier, and done by `duties.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable

import structlog

from agents.engine import base as engine
from agents.guest import adopting, displays
from agents.guest import copies as making
from agents.guest import duty as keeping
from agents.guest.attempts import Attempts, reason_of
from agents.guest.changes import Changes
from agents.guest.devices import options_refused
from agents.guest.duties import Duties
from agents.guest.duty import Do, Duty
from agents.guest.files import GuestFiles
from agents.guest.held import HeldGuest, Untrusted
from agents.guest.shared import AgentShared
from agents.handover import preflight
from agents.host.journal import KnownRecord
from agents.shims.base import OptionsRefused, Refusal, ShimError
from orchestrator.core import handover
from orchestrator.core.agent import (
    DisplayAddress,
    GuestStatus,
    GuestTrouble,
    RunState,
    Trouble,
    WishApplied,
)
from orchestrator.core.changes import MachineChange
from orchestrator.core.death import hosts_of
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.liveness import LivenessUnknown
from orchestrator.core.offers import Obstacle
from orchestrator.core.records import DiskSpec, GuestSpec, LiveMachine, WantRun
from orchestrator.ledger import markers
from orchestrator.ledger.records import BadRecord
from orchestrator.ledger.store import StoreUnavailable
from orchestrator.tasks import Tasks, failures

log = structlog.get_logger(__name__)

_EXPECTED = (StoreUnavailable, DroverError, BadRecord, engine.EngineError, ShimError, LivenessUnknown, OSError)
"""What can go wrong while a guest is kept; anything else is a fault of ours, and is logged with its traceback."""

RESYNC_S = 5.0
RETRY_S = 0.3
SAID_AGAIN_S = 60.0
"""The same trouble of a guest is logged so often."""
DESCRIBED_S = 2.0
"""How long another host waits for what changes a guest's machine just now."""
WISH_S = 2.0
"""How long the answer to a pause or resume waits for its effect."""
START_S = 10.0
"""From the record that says that a stopped guest is to start again, to the call that starts it."""


def _said(error: Exception) -> str:
    if isinstance(error, DroverError):
        return error.message
    return str(error) or repr(error)


class HostedGuest(HeldGuest):
    """All calls are idempotent and raise DroverError; `wake` makes the keeper look.

    What begins something (`birth`, `end`, `restore`, `attempts.prepare`) raises Forgotten as well.
    """

    def __init__(self, tools: AgentShared, files: GuestFiles) -> None:
        super().__init__(tools, files)
        self._turn = asyncio.Lock()
        self._tasks = Tasks(f"guest {files.spec.name}")
        self.attempts = Attempts(self, self._turn, self._tasks)
        self._duties = Duties(self, self.attempts)
        self.changes = Changes(self)
        self._unwatch: Callable[[], None] = lambda: None
        self.may_bury = True
        """A record that says STARTING may be of a birth that is about to be asked for; only a restart is sure."""
        self._awaited_s: float | None = None
        """Until when the call is waited for that starts a guest which this agent has seen stopped: it comes after the
        record. By the loop's clock; 0: the guest is stopped; None: nothing is waited for."""
        self.trouble: GuestTrouble | None = None
        """Why the guest is not kept just now; None: it is."""
        self._troubles = 0
        """Failures to keep it in a row."""
        self._said_s = 0.0
        """When its trouble was last logged, by the loop's clock."""
        self._told: tuple[Duty, Ownership, HostRef] | None = None
        """The duty that was found last, and of which record."""
        self._thorough = False
        """The next look is to be behind a barrier, whatever watches have told."""

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
            await self.adopt_left()
        except Exception as error:
            self._not_kept(error)

    async def stop(self) -> None:
        """Let go of everything and leave it to a later agent."""
        self._unwatch()
        await self._tasks.close()
        await asyncio.gather(*(copy.detach() for copy in self.copies.values()), return_exceptions=True)
        if self._images is not None:
            await self._images.detach()

    def nudge(self) -> None:
        """Somebody says that the record has moved: look behind a barrier, no watch may have told of it yet."""
        self._thorough = True
        self.wake()

    def _record_seen(self, known: KnownRecord | None) -> None:
        self.told = known
        if known is not None:  # a record that vanished says nothing about the guest
            self.record = known.record
        self.wake()

    def _wish_seen(self, wish: WantRun) -> None:
        if wish.sequence >= self.wish.sequence:
            self.wish = wish
            if self.departure is not None:
                self.departure.wish(wish.run)
        self.wake()

    # --- birth and death ----------------------------------------------------------------------------------------------

    async def birth(self) -> GuestStatus:
        """Execute a guest whose record says STARTING here."""
        async with self._turn:
            self.must_keep()
            record = (await self.fresh()).record
            if record.owner != self.tools.here or record.phase in (Ownership.GONE, Ownership.CRASHED):
                raise self.refused(RefusalReason.GUEST_NOT_RUNNING, f"{record.phase}, owner {record.owner.host}")
            if record.phase is Ownership.STARTING and not self.copies:
                await self._execute(again=bool(record.starts))
            if record.phase is Ownership.STARTING and not await self.begun():
                raise self.refused(RefusalReason.GUEST_NOT_RUNNING, "its record changed while it was started")
        self.wake()
        self.tools.changed()
        return self.status()

    async def _execute(self, *, again: bool) -> None:
        """`again`: it has run before, so the disks that it had must be there, and a failure leaves it as it was."""
        before = self.files
        had: tuple[DiskSpec, ...] = ()
        try:
            if again:
                before = self.files.with_spec(await asyncio.to_thread(self.files.ran_with))
                had = before.spec.disks
            await self.described()
            if again or self.files.spec.adopted is None:  # the memory of one that is adopted is taken already
                await self.tools.must_have_memory(self.uuid, self.files.spec.memory_mib)
            await preflight.must_suit(self.tools.engine, self.tools.config, self.files)
            if again:
                await self._must_not_linger()
            with self.being_made():
                self.add(await self._made(secrets.token_hex(8), had, again=again))
        except (DroverError, engine.EngineError, ShimError, OSError) as error:
            await self._not_executed(before, again=again)
            if isinstance(error, DroverError):
                raise
            if (full := preflight.no_room(error, self.tools.here.host, self.files.config.dir)) is not None:
                raise full from error
            if isinstance(error, OptionsRefused):
                raise options_refused(error, self.files.spec) from error
            said = f"guest {self.name} did not start on {self.tools.here.host}: {error}"
            raise DroverError(reason_of(error), said) from error

    async def _must_not_linger(self) -> None:
        """Of a start that failed, or of an earlier life of this one, no process is left. Raises BUSY."""
        try:
            left = await asyncio.to_thread(self.files.vmms)
        except LivenessUnknown as error:
            raise self.refused(RefusalReason.BUSY, str(error)) from error
        if left:
            raise self.refused(RefusalReason.BUSY, f"process {min(left)} of it runs here, and no note names it")

    async def _not_executed(self, before: GuestFiles, *, again: bool) -> None:
        """The record says what has come of the start. While a process of it is left it says nothing: the keeper looks
        until none is."""
        if not again:
            await self.ledger.not_started(self.tools.here)
            self.files.remove()
            self.forgotten = True
            return
        try:
            await self._must_not_linger()
        except DroverError:
            self.wake()
            return
        await self.ledger.not_started(self.tools.here)
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self.files.births.failed)
            self.files = before  # what it has run with, not what it was to become
            await asyncio.to_thread(self.files.note)

    async def _made(self, inc: str, had: tuple[DiskSpec, ...], *, again: bool) -> making.Copy:
        """Its first copy: a process that is started, or the one that somebody else has started already. A guest that is
        started again has no process of somebody else's any more."""
        taken = self.files.spec.adopted
        if again or taken is None:
            return await making.start(self.tools.engine, self.files, inc, had=had, again=again)
        async with self.tools.adopting:  # whoever comes next finds it among this guest's copies
            self.tools.must_be_nobodys(taken.pid)
            return await adopting.take(self.tools.engine, self.files, inc, taken)

    async def release(self) -> None:
        """Give an adopted guest back to whoever had started its process, which runs on. Its name is free then.

        Raises NOT_ADOPTABLE for one that has moved since, or that Drover started: its process is Drover's own.
        GUEST_NOT_RUNNING: there is nothing to give back (any more), or the guest may run elsewhere by now.
        """
        async with self._turn:
            self.must_keep()
            record = (await self.fresh()).record
            if record.phase is Ownership.GONE and record.released:
                return
            if record.phase in (Ownership.GONE, Ownership.CRASHED):
                raise self.refused(RefusalReason.GUEST_NOT_RUNNING, f"its record says {record.phase}")
            if record.owner != self.tools.here or record.phase is not Ownership.IDLE or self.departure is not None:
                raise self.refused(RefusalReason.GUEST_IS_MIGRATING, f"{record.phase}, owner {record.owner.host}")
            own = self.own()
            if own is None or not own.adopted or own.incoming or len(self.copies) > 1:
                said = "it is no process of somebody else's (any more): nobody is there to give it back to"
                raise self.refused(RefusalReason.NOT_ADOPTABLE, said)
            if own.local_disks:  # of a move that came to nothing
                await own.vmm.disks.forget()
                own.disks_engaged = False
            if not await self.ledger.released(self.tools.here):
                raise self.refused(RefusalReason.GUEST_IS_MIGRATING, "its record changed")
            await self.let_go(own)
            self._forget()
        self.tools.changed()

    async def end(self) -> None:
        """Stop the guest for good. It is stopped before its name is free, so that no two lives overlap."""
        async with self._turn:
            self.must_keep()
            record = (await self.fresh()).record
            if record.phase is Ownership.GONE:
                return
            if record.owner.host != self.tools.here.host or record.phase not in (Ownership.IDLE, Ownership.CRASHED):
                raise self.refused(RefusalReason.GUEST_IS_MIGRATING, f"{record.phase}, owner {record.owner.host}")
            await self._stand_still()
            if not await self.ledger.buried(self.tools.here):
                raise self.refused(RefusalReason.GUEST_IS_MIGRATING, "its record changed")
            await self._clear()
        self.tools.changed()

    async def _stand_still(self) -> None:
        """Before its record says that it runs no more. It has lived: its images are not ours to remove."""
        with contextlib.suppress(*_EXPECTED):
            await self.changes.settle()  # what was made for it is its own, or is not
        for copy in self.copies.values():
            with contextlib.suppress(engine.EngineError):
                await copy.vmm.pause()
        await asyncio.to_thread(self.files.births.succeeded)

    async def _clear(self) -> None:
        await self._end_copies()
        self._forget()

    async def _end_copies(self) -> None:
        for copy in list(self.copies.values()):
            await copy.destroy()
            self.copies.pop(copy.inc, None)

    async def keep(self, *, only_ended: bool = False) -> None:
        """End what of the guest is here and keep the guest, so that it can be started again. Also of one that has
        crashed: its record says afterwards that nothing of it is left here.

        With `only_ended` a guest that runs is left alone. Raises GUEST_IS_MIGRATING, GUEST_NOT_RUNNING for one whose
        life is over, and BUSY.
        """
        async with self._turn:
            self.must_keep()
            await self.adopt_left()
            record = (await self.fresh()).record
            if record.stopped and not self.copies:
                return
            self._may_keep(record, only_ended=only_ended)
            await self._duties.must_be_over(record)
            await self._stand_still()
            if record.phase is Ownership.IDLE and not await self.ledger.crashed(self.tools.here):
                raise self.refused(RefusalReason.GUEST_IS_MIGRATING, "its record changed")
            await self._end_copies()
            await self._must_not_linger()
            if not await self.ledger.stopped(self.tools.here):
                raise self.refused(RefusalReason.GUEST_IS_MIGRATING, "its record changed")
        self.wake()
        self.tools.changed()

    def _may_keep(self, record: GuestRecord, *, only_ended: bool) -> None:
        if record.phase is Ownership.GONE:
            raise self.refused(RefusalReason.GUEST_NOT_RUNNING, "it has ended")
        here = record.owner.host == self.tools.here.host
        under_way = self.departure is not None or bool(self.arrivals)
        if not here or under_way or record.phase not in (Ownership.IDLE, Ownership.CRASHED):
            raise self.refused(RefusalReason.GUEST_IS_MIGRATING, f"{record.phase}, owner {record.owner.host}")
        own = self.own()
        if only_ended and record.phase is Ownership.IDLE and own is not None and not own.ended:
            raise self.refused(RefusalReason.BUSY, "it runs by now")

    # --- the operator's wish ------------------------------------------------------------------------------------------

    async def apply_wish(self, sequence: int) -> WishApplied:
        """Make the wish in the ledger true, now if the hand-over rules allow."""
        self._wish_seen(await self.ledger.want_run(sequence))
        run = self.wish.run
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
            own = self.own()
            return own is not None and own.running == run and not own.in_session

    # --- checking ----------------------------------------------------------------------------------------------------

    async def obstacles(self) -> tuple[Obstacle, ...]:
        """See `preflight.obstacles`."""
        return await preflight.obstacles(self.own())

    # --- its machine --------------------------------------------------------------------------------------------------

    async def change(self, wanted: MachineChange, reservations: int) -> GuestSpec:
        """See `Changes.make`. Raises NOT_ADOPTABLE for a guest that has not moved since it was adopted."""
        async with self._turn:
            self.must_keep()
            if (own := self.own()) is not None and own.adopted:
                said = "it still runs in the process that it was adopted from: move it first"
                raise self.refused(RefusalReason.NOT_ADOPTABLE, said)
            spec = await self.changes.make(wanted, reservations)
        self.tools.changed()
        return spec

    async def must_go_to(self, host: str) -> None:
        """Raises NOT_PERMITTED unless the record gives the guest to that host, or says that it is on its way there;
        StoreUnavailable and BadRecord."""
        for look in (self.shown, self.fresh):  # nobody is refused for what is old
            if (known := await look()) is not None and host in hosts_of(known.record):
                return
        said = f"the guest is not on its way to {host}"
        raise self.refused(RefusalReason.NOT_PERMITTED, said)

    async def as_it_runs(self) -> tuple[LiveMachine, GuestSpec]:
        """The machine and the specification as the guest's VMM has them, with no change half-done.

        Raises BUSY, NOT_FOUND, and FEATURE_NOT_AVAILABLE when the machine is not known any more.
        """
        try:
            async with asyncio.timeout(DESCRIBED_S), self._turn:
                await self.changes.settle()
        except TimeoutError:
            raise self.refused(RefusalReason.BUSY, "its machine is being changed") from None
        except engine.EngineError as error:
            raise self.refused(RefusalReason.BUSY, f"its machine is not known just now: {error}") from error
        own = self.own()
        if own is None or own.hardware is None:
            raise self.refused(RefusalReason.NOT_FOUND, f"it has no hardware on {self.tools.here.host}")
        if own.hardware.machine is None:
            said = f"the note of its machine is lost on {self.tools.here.host}: it can move after its next start"
            raise self.refused(RefusalReason.FEATURE_NOT_AVAILABLE, said)
        return own.hardware.machine, self.files.spec

    # --- devices ------------------------------------------------------------------------------------------------------

    async def open_display(self) -> DisplayAddress:
        """Where the guest's screen is served here, and what lets a viewer in. Raises GUEST_NOT_RUNNING, and
        DISPLAY_NOT_AVAILABLE for a guest without one."""
        own = self.own()
        if own is None or own.is_gone:
            raise DroverError(
                RefusalReason.GUEST_NOT_RUNNING, f"guest {self.name} does not run on {self.files.config.host}"
            )
        return await displays.opened(own)

    async def instruct(self, device: str, instruction: str) -> str:
        """Tell a device something in its own program's words; what the program says to it.

        Raises NOT_FOUND, INVALID_ARGUMENT when the program does not understand it, INSTRUCTION_REFUSED when the device
        takes none, or not now; nothing has changed then.
        """
        own = self.own()
        known = [known.name for known in (*self.files.outside, *self.files.in_vmm)]
        if own is None or own.devices is None or device not in known:
            names = ", ".join(known) or "none"
            raise DroverError(
                RefusalReason.NOT_FOUND,
                f"guest {self.name} has no device {device} here that could be instructed; it has: {names}",
                field="device",
            )
        try:
            return await own.devices.instruct(device, instruction)
        except ShimError as error:
            said = f"device {device} of guest {self.name}: {error}"
            if error.refusal is Refusal.WRONG:
                raise DroverError(RefusalReason.INVALID_ARGUMENT, said, field="instruction") from error
            unwilling = error.refusal is Refusal.UNWILLING
            reason = RefusalReason.INSTRUCTION_REFUSED if unwilling else RefusalReason.INTERNAL
            raise DroverError(reason, said) from error

    # --- keeping ------------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Look whenever something changed, and now and then, until nothing of the guest is here."""
        while not self.forgotten:
            try:
                if not await self._something_to_look_at():
                    continue
                self.woken.clear()
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
                await self.woken.wait()
        except TimeoutError:
            self._thorough = self._suspicious()
            return self._thorough
        return True

    def _kept(self) -> None:
        if self.trouble is not None:
            log.info("a guest is kept again", guest=self.name)
            self.tools.changed()
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
        self.tools.changed()
        unknown = None if isinstance(error, _EXPECTED) else error
        log.error("a guest is not kept: trying again", guest=self.name, error=self.trouble.message, exc_info=unknown)

    def _suspicious(self) -> bool:
        """Is a periodic look worth a write (the barrier)? At rest the watches and the processes tell everything."""
        if self.trouble is not None:
            return True
        if self.record is not None and self.record.stopped and not self.copies:
            return False
        own = self.own()
        settled = self.record is not None and self.record.phase is Ownership.IDLE
        if own is None or not settled or len(self.copies) > 1:
            return True
        return own.running != self.wish.run and not own.ended

    def _spoken_for(self) -> bool:
        """Sessions conduct all that is here, and wake the keeper at their ends: a look before that costs a write."""
        conducted = bool(self.copies) and all(copy.in_session for copy in self.copies.values())
        return self.departure is not None or conducted

    async def _keep_once(self) -> None:
        thorough, self._thorough = self._thorough or self.trouble is not None, False
        if self.changes.pending and not self._spoken_for():
            await self.changes.settle()
        while not self._spoken_for() and not self.forgotten:
            if not thorough and await self._nothing_is_owed():
                return
            record, doubt = await self._record_for_duty()
            wish = self.wish = await self.ledger.want_run() if record is not None else self.wish
            duty, seen = await self._duty(record, wish)
            if record is not None and record.phase is not Ownership.STARTING:
                self._awaited_s = 0.0 if record.stopped else None
            if record is None:
                raise doubt or self.refused(RefusalReason.OLD_RECORD, "it has no record")
            if duty.do is Do.ASK_AGAIN:
                unknown = ", ".join(copy.inc for copy in seen if keeping.is_unknown(copy))
                raise self.refused(RefusalReason.BUSY, f"it cannot be told whether its process {unknown} lives")
            if duty.do is Do.BURY and (not self.may_bury or self._start_is_awaited()):
                return
            self._tell(duty, record)
            if duty.do is Do.NOTHING:
                await self._tidy(record)
                return
            await self._duties.carry_out(duty, record)

    def _start_is_awaited(self) -> bool:
        if self._awaited_s is None:
            return False
        now_s = asyncio.get_running_loop().time()
        self._awaited_s = self._awaited_s or now_s + START_S
        return now_s < self._awaited_s

    async def _duty(self, record: GuestRecord | None, wish: WantRun) -> tuple[Duty, list[keeping.Copy]]:
        """What is owed by that record, and the copies as they are."""
        seen = [await copy.look() for copy in self.copies.values()]
        marker = record is not None and bool(record.inc) and self.files.has_marker(record.inc)
        return keeping.duty(record, self.tools.here, seen, marker=marker, want_run=wish.run), seen

    async def _nothing_is_owed(self) -> bool:
        """By what watches have told, without a question to the ledger (H13).

        That may be old, so nothing is done on its strength. Nothing needs to be: what is newer wakes the keeper. False:
        look behind a barrier, something may have to be done.
        """
        told = self.told
        if told is None or not self.all_adopted or not self.tools.believed.settled or self.is_older(told):
            return False
        duty, _ = await self._duty(told.record, self.wish)
        if duty.do is not Do.NOTHING or told is not self.told:
            return False
        if self._has_images_to_tend(told.record) or self._has_disks_to_let_go(told.record) is not None:
            return False
        if self._is_left(told.record):
            return await self._forget_what_left()
        if any(copy.is_gone for copy in self.copies.values()):
            return False
        self._tell(duty, told.record)
        self.saw(told)
        return True

    def _tell(self, duty: Duty, record: GuestRecord) -> None:
        """Once for each: what cannot be done yet is tried again and again."""
        told = (duty, record.phase, record.owner)
        if told != self._told and duty.do is not Do.NOTHING:
            log.info("keeping", guest=self.name, do=duty.do, inc=duty.inc, phase=record.phase)
        self._told = told

    async def _record_for_duty(self) -> tuple[GuestRecord | None, Untrusted | None]:
        """None: there is no record that could be trusted, and why."""
        try:
            return (await self.fresh()).record, None
        except Untrusted as doubt:
            return None, doubt

    async def _tidy(self, record: GuestRecord) -> None:
        """Remove what is left of dead processes; forget a guest of which nothing is here. The record was read behind a
        barrier: with a copy goes the marker that says whether it ran (H10)."""
        for copy in list(self.copies.values()):
            if not copy.in_session and copy.is_gone:
                await self.destroyed(copy)
        await self._tend_images(record)
        if self._is_left(record):
            self._forget()

    def _has_disks_to_let_go(self, record: GuestRecord) -> making.Copy | None:
        """The copy whose local disks were on their way to a host that the guest will not go to."""
        own = self.own()
        at_rest = record.phase is Ownership.IDLE and record.owner == self.tools.here
        return own if own is not None and own.disks_engaged and at_rest and not own.in_session else None

    def _has_images_to_tend(self, record: GuestRecord) -> bool:
        """Local images were made for a copy to come, and by that record none is to come any more."""
        images = self.images if self.files.spec.disks else None
        if images is None or not images.anything or self.arrivals:
            return False
        return record.owner == self.tools.here if self.copies else self._is_left(record)

    async def _tend_images(self, record: GuestRecord) -> None:
        """They are the guest's own where it is, and nobody's where it is not to be. The record was read behind a
        barrier."""
        if (own := self._has_disks_to_let_go(record)) is not None:
            await own.vmm.disks.forget()
            own.disks_engaged = False
        if not self._has_images_to_tend(record) or self.images is None:
            return
        if record.owner.host == self.tools.here.host:  # also of a power cycle before: it ran on them
            await self.images.finish()
        else:
            await self.images.discard()

    def _is_left(self, record: GuestRecord) -> bool:
        """Nothing of the guest is here, and by that record nothing leads here."""
        nothing_here = not self.copies and not self.arrivals and self.departure is None
        return nothing_here and not markers.concerns(record, self.tools.here.host) and not self._awaits_a_retry(record)

    def _awaits_a_retry(self, record: GuestRecord) -> bool:
        """Its local disks are here already, and the next attempt may lead here again: they are not copied twice."""
        images = self.images if self.files.spec.disks else None
        leads_here = record.destination is not None and record.destination.host == self.tools.here.host
        return record.phase is Ownership.ABORTED and leads_here and images is not None and images.anything

    async def _forget_what_left(self) -> bool:
        """Take it off the host's list, which proves that the record gives it to others, and forget it. False: nothing
        was proven."""
        proven = await self.ledger.struck_off(self.tools.here.host)
        if proven is None or self.is_older(proven):
            return False
        self.saw(proven)
        await self._tend_images(proven.record)
        self._forget()
        return True

    def _forget(self) -> None:
        self.files.remove()
        self.forgotten = True

    # --- what others see ----------------------------------------------------------------------------------------------

    # --- refusals -----------------------------------------------------------------------------------------------------

    async def restore(self) -> GuestStatus:
        """An operator's order: write the record that the ledger has lost again, from what runs here.

        Only where nothing can run elsewhere: the guest's one process is here, no attempt is under way in it, and it was
        never given away as far as this host knows. Raises ALREADY_EXISTS when the ledger has a record, and
        GUEST_IS_MIGRATING when this host cannot vouch for the guest.
        """
        async with self._turn:
            self.must_keep()
            await self.adopt_left()
            if await self.ledger.look() is not None:
                raise self.refused(RefusalReason.ALREADY_EXISTS, "the ledger has its record")
            own = await self._only_copy_at_rest()
            await asyncio.to_thread(self.files.births.succeeded)
            record = handover.restored(self.name, self.tools.here, writer=self.tools.writer)
            if not await self.ledger.restored(record, self.files.spec, WantRun(own.running or own.ended)):
                raise self.refused(RefusalReason.ALREADY_EXISTS, "its name, or its record, is taken by now")
            if (found := await self.ledger.look()) is not None:
                self.saw(found)
        log.warning("a lost record was written again, as ordered", guest=self.name)
        self.wake()
        return self.status()

    async def _only_copy_at_rest(self) -> keeping.Copy:
        known = self.tools.journal.known_record(self.uuid)
        if known is not None and known.record.owner.host != self.tools.here.host:
            said = f"it was given to {known.record.owner.host}: ask that host"
            raise self.refused(RefusalReason.GUEST_IS_MIGRATING, said)
        try:
            seen = [copy for copy in [await copy.look() for copy in self.copies.values()] if keeping.decides(copy)]
        except engine.EngineError as error:
            raise self.refused(RefusalReason.BUSY, str(error)) from error
        if len(seen) != 1 or self.departure is not None:
            raise self.refused(RefusalReason.GUEST_IS_MIGRATING, f"{len(seen)} copies of it are here, or it moves")
        own = seen[0]
        if own.incoming or own.in_session or own.sealed or own.migrating or keeping.is_unknown(own):
            said = f"its process {own.inc} is not at rest, or is not the guest: it may run elsewhere"
            raise self.refused(RefusalReason.GUEST_IS_MIGRATING, said)
        return own
