"""What `duty.py` says is owed to a guest, done: one duty at a time, on a record that was read behind a barrier."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ClassVar

from agents.guest.attempts import Attempts
from agents.guest.duty import Do, Duty
from agents.guest.files import GuestFiles
from agents.guest.held import HeldGuest
from agents.handover.ledger import AttemptLedger
from agents.handover.words import Seen
from orchestrator.core import handover
from orchestrator.core.errors import RefusalReason
from orchestrator.core.handover import GuestRecord
from orchestrator.core.ids import AttemptRef
from orchestrator.core.records import ShimKind
from orchestrator.ledger import paths
from orchestrator.ledger.store import StoreUnavailable


class Duties:
    """What each duty means. Raises whatever goes wrong: nothing is given up, the keeper asks again."""

    def __init__(self, guest: HeldGuest, attempts: Attempts) -> None:
        self._guest = guest
        self._tools = guest.tools
        self._attempts = attempts

    @property
    def _files(self) -> GuestFiles:
        return self._guest.files

    async def carry_out(self, duty: Duty, record: GuestRecord) -> None:
        """Do the one thing that is owed; to be called in the guest's turn."""
        await self._duties[duty.do](self, duty, record)

    async def _finish_birth(self, duty: Duty, record: GuestRecord) -> None:
        await self._guest.begun()

    async def _bury(self, duty: Duty, record: GuestRecord) -> None:
        await self.must_be_over(record)
        # A process that was to be adopted and was not noted down has never been the guest: it is left as it is.
        await self._must_not_run_unnoted(record, adopted=bool(record.starts))
        await self._guest.ledger.not_started(self._tools.here)

    def _attempt_ledger(self, record: GuestRecord) -> AttemptLedger:
        ref = AttemptRef(self._guest.uuid, record.migration, record.attempt)
        return AttemptLedger(self._tools.store, ref, record.owner, record.inc, self._tools.writer)

    async def must_be_over(self, record: GuestRecord) -> None:
        """A guest of a former power cycle is over only if that is certified (H11): whoever bears this host's name is
        not the host for that. Raises FENCER_REQUIRED."""
        owner = record.owner
        if owner.boot_id == self._tools.here.boot_id:
            return
        if await self._tools.store.read(paths.fence(owner.host, owner.boot_id)) is None:
            said = f"it belongs to power cycle {owner.boot_id}, of which nothing says that it is over"
            raise self._guest.refused(RefusalReason.FENCER_REQUIRED, said)

    async def _declare_crashed(self, duty: Duty, record: GuestRecord) -> None:
        await self.must_be_over(record)
        host_died = record.owner.boot_id != self._tools.here.boot_id
        await self._must_not_run_unnoted(record)
        await self._settled(self._attempt_ledger(record).crashed(host_died=host_died))

    async def _must_not_run_unnoted(self, record: GuestRecord, *, adopted: bool = True) -> None:
        """A VMM of this power cycle whose note is lost is alive all the same. Raises INTERNAL, and LivenessUnknown."""
        if record.owner.boot_id != self._tools.here.boot_id:
            return
        known = {copy.vmm.metadata.pid for copy in self._guest.copies.values()}
        unnoted = set(await asyncio.to_thread(self._files.vmms, adopted=adopted)) - known
        if unnoted:
            said = f"process {min(unnoted)} of it runs here, and no note names it: it is not given up"
            raise self._guest.refused(
                RefusalReason.INTERNAL, f"{said}; end that process if the guest is to be given up"
            )

    async def _give_back(self, duty: Duty, record: GuestRecord) -> None:
        await self._must_not_run_unnoted(record)
        await self._settled(self._attempt_ledger(record).roll_back(vmm_seen_dead=True, marker=False))

    async def _settled(self, write: Awaitable[Seen]) -> None:
        """Whatever came of it, the next look decides; an unknown outcome waits for the store."""
        if await write is Seen.LEDGER_UNKNOWN:
            raise StoreUnavailable("outcome unknown")

    async def _promote(self, duty: Duty, record: GuestRecord) -> None:
        await self._guest.copies[duty.inc].vmm.promote()

    async def _refuse_owner(self, duty: Duty, record: GuestRecord) -> None:
        """Kept, not obeyed and not given up, until the record is put right: killing it may lose the guest. Raises
        FOREIGN_OWNER."""
        said = f"its record gives it to {record.owner.host}, to whom it was never sent from here; this copy is kept"
        raise self._guest.refused(RefusalReason.FOREIGN_OWNER, said)

    async def _discard(self, duty: Duty, record: GuestRecord) -> None:
        """A copy that was the guest, which others have now (H9), leaves no local images that are in use."""
        copy = self._guest.copies[duty.inc]
        given = record.owner.host != self._tools.here.host
        if given and not copy.incoming and handover.may_discard_source(record, self._tools.here, record.inc):
            await copy.retire_disks()
        await self._guest.destroyed(self._guest.copies[duty.inc])

    async def _let_go(self, duty: Duty, record: GuestRecord) -> None:
        await self._guest.let_go(self._guest.copies[duty.inc])

    async def _run(self, duty: Duty, record: GuestRecord) -> None:
        """A guest that arrived paused is announced now: QEMU sends nothing while the vCPUs stand."""
        copy = self._guest.copies[duty.inc]
        await copy.vmm.resume()
        spec = self._files.spec
        if spec.nics:
            await copy.taps.bind()
        if spec.nics or any(device.shim is ShimKind.NET for device in spec.devices):
            await copy.vmm.announce()

    async def _stop(self, duty: Duty, record: GuestRecord) -> None:
        await self._guest.copies[duty.inc].vmm.pause()

    async def _end_as_source(self, duty: Duty, record: GuestRecord) -> None:
        await self._attempts.end_as_source(duty.inc, record)

    async def _end_as_destination(self, duty: Duty, record: GuestRecord) -> None:
        await self._attempts.end_as_destination(duty.inc, record)

    _duties: ClassVar[dict[Do, Callable[[Duties, Duty, GuestRecord], Coroutine[Any, Any, None]]]] = {
        Do.FINISH_BIRTH: _finish_birth,
        Do.BURY: _bury,
        Do.DECLARE_CRASHED: _declare_crashed,
        Do.GIVE_BACK: _give_back,
        Do.PROMOTE: _promote,
        Do.END_AS_SOURCE: _end_as_source,
        Do.END_AS_DESTINATION: _end_as_destination,
        Do.DISCARD: _discard,
        Do.LET_GO: _let_go,
        Do.REFUSE_OWNER: _refuse_owner,
        Do.RUN: _run,
        Do.STOP: _stop,
    }
