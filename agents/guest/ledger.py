"""What an agent reads and writes about a guest outside of any attempt: birth, death, the wish, and a fresh record."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from agents.host.journal import KnownRecord
from orchestrator.core import handover
from orchestrator.core.changes import with_machine_of
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership, Refused
from orchestrator.core.ids import HostRef
from orchestrator.core.records import GuestSpec, WantRun
from orchestrator.ledger import markers, paths
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.ledger.store import Check, Create, Delete, Done, Op, SetData, Store, StoreUnavailable, Versioned
from orchestrator.ledger.tries import Tries

_TRIES = 5


@dataclass(frozen=True, slots=True)
class GuestLedger:
    """One guest's nodes. All reads raise StoreUnavailable and BadRecord."""

    store: Store
    uuid: str
    writer: str

    async def look(self) -> KnownRecord | None:
        """The record, not older than this call (H13); None: the ledger has none."""
        await self.store.barrier()
        return await self.shown()

    async def shown(self) -> KnownRecord | None:
        """The record as our server of the ledger has it, which may be behind others: for what decides nothing, or ends
        in a compare-and-set on the version that was read. None: it has none."""
        path = paths.guest(self.uuid)
        node = await self.store.read(path)
        return _known(path, node) if node else None

    async def struck_off(self, host: str) -> KnownRecord | None:
        """Take the guest off the list of a host, in a transaction that proves that its record gives it to others: that
        record. None: nothing was proven. It is not on the list, or its record names the host, or has just moved."""
        path = paths.host_guest(host, self.uuid)
        mark, known = await self.store.read(path), await self.shown()
        if mark is None or known is None or markers.concerns(known.record, host):
            return None
        left = [Check(paths.guest(self.uuid), known.version), Delete(path, mark.version)]
        return known if isinstance(await self.store.multi(left), Done) else None

    async def restored(self, record: GuestRecord, spec: GuestSpec, wish: WantRun) -> bool:
        """Write a guest's nodes again where the ledger has lost them. False: its name, or the guest, is there."""
        name = await self.store.read(paths.name(spec.name))
        if name is not None and decode(str, name.data, path=paths.name(spec.name)) != self.uuid:
            return False
        await self.store.ensure(paths.shard(paths.guest(self.uuid)))
        await self.store.ensure(paths.NAMES)
        ops: list[Op] = [] if name is not None else [Create(paths.name(spec.name), encode(self.uuid))]
        ops += [
            Create(paths.guest(self.uuid), encode(record)),
            Create(paths.guest_spec(self.uuid), encode(spec)),
            Create(paths.want_run(self.uuid), encode(wish)),
        ]
        if await self.store.read(paths.host_guests(record.owner.host)) is not None:  # else all is listed again later
            ops.append(await markers.marked(self.store, record.owner.host, self.uuid))
        if isinstance(await self.store.multi(ops), Done):
            return True
        found = await self.look()  # a lost answer: our own write is recognised by its writer
        return found is not None and found.record == record

    async def _read(self) -> tuple[GuestRecord | None, int]:
        path = paths.guest(self.uuid)
        node = await self.store.read(path)
        return (decode(GuestRecord, node.data, path=path), node.version) if node else (None, -1)

    async def spec(self) -> GuestSpec | None:
        """What the guest was created with; None: there is no such guest, and none was made before this call."""
        path = paths.guest_spec(self.uuid)
        node = await self.store.read(path)
        if node is None:  # our server may be behind the one through which the guest was made
            await self.store.barrier()
            node = await self.store.read(path)
        return decode(GuestSpec, node.data, path=path) if node else None

    async def respecified(self, spec: GuestSpec, here: HostRef, reservations: int | None = None) -> bool:
        """What the guest's machine is in the ledger, from its owner's notes. The record's version moves along, so that
        whoever has placed the guest by the old specification looks again. False: the record does not name this host.

        `reservations`: the version that what this host has promised must still have, and that moves as well. Raises
        OUTCOME_UNKNOWN when it does not, StoreUnavailable and BadRecord.
        """
        path, promised = paths.guest_spec(self.uuid), paths.reservations(here.host)
        said = f"the specification of guest {self.uuid} could not be written in {_TRIES} tries"
        tries = Tries(lambda: StoreUnavailable(said), at_most=_TRIES)
        while True:
            await tries.another()
            node, (record, version) = await self.store.read(path), await self._read()
            if node is None or record is None or record.owner.host != here.host:
                return False
            known = decode(GuestSpec, node.data, path=path)
            wanted = with_machine_of(known, spec)
            if known == wanted:
                return True
            ops: list[Op] = [SetData(path, encode(wanted), node.version)]
            if record.phase in (Ownership.OPEN, Ownership.COMMITTED):  # its version belongs to whoever conducts it
                ops.append(Check(paths.guest(self.uuid), version))
            else:
                ops.append(SetData(paths.guest(self.uuid), encode(replace(record, writer=self.writer)), version))
            if reservations is not None:
                taken = await self.store.read(promised)
                if (taken.version if taken else -1) != reservations:
                    said = f"what {here.host} has promised has changed: look again"
                    raise DroverError(RefusalReason.OUTCOME_UNKNOWN, said, details={"moved": "reservations"})
                ops.append(SetData(promised, b"", taken.version) if taken else Create(promised, b""))
            if isinstance(await self.store.multi(ops), Done):
                return True
            await self.store.barrier()

    async def want_run(self, at_least: int = 0) -> WantRun:
        """The operator's wish, not older than sequence `at_least`."""
        path = paths.want_run(self.uuid)
        for fresh in (False, True):
            if fresh:
                await self.store.barrier()
            node = await self.store.read(path)
            wish = decode(WantRun, node.data, path=path) if node else WantRun()
            if wish.sequence >= at_least:
                break
        return wish

    async def started(self) -> bool:
        """STARTING -> IDLE. False: the record does not allow it (any more)."""
        return await self._change(lambda record: handover.started(record, writer=self.writer))

    async def buried(self, here: HostRef) -> bool:
        """-> GONE, and the name is free for another life. True when the record says GONE afterwards."""

        def change(record: GuestRecord) -> GuestRecord:
            if record.owner.host != here.host:
                raise Refused(f"{record.name} is owned by {record.owner.host}")
            return handover.gone(record, writer=self.writer)

        return await self._change(change, free_name=True)

    async def not_started(self, here: HostRef) -> bool:
        """STARTING has come to nothing, and nothing of the guest is left here: a guest that never ran is GONE, one that
        was started again is kept. Whether the record says so afterwards."""
        record, _ = await self._read()
        return await (self.stopped(here) if record is not None and record.starts else self.buried(here))

    async def crashed(self, here: HostRef) -> bool:
        """IDLE -> CRASHED, of a guest that is to be kept: from here on nobody moves it. True when the record says
        CRASHED afterwards, and that it is owned here."""

        def change(record: GuestRecord) -> GuestRecord:
            if record.owner.host != here.host or record.phase not in (Ownership.IDLE, Ownership.CRASHED):
                raise Refused(f"{record.name} is {record.phase}, owned by {record.owner.host}")
            return record if record.phase is Ownership.CRASHED else handover.crashed(record, writer=self.writer)

        return await self._change(change)

    async def stopped(self, here: HostRef) -> bool:
        """-> CRASHED and stopped: nothing of the guest is left here, and it may be started again. False: the record
        does not allow it (any more)."""
        return await self._change(
            lambda record: (
                record if record.stopped else handover.stopped(record, by=here, nothing_left=True, writer=self.writer)
            )
        )

    async def released(self, here: HostRef) -> bool:
        """IDLE -> GONE, its process being given back, and the name is free. False: the record does not allow it."""

        def change(record: GuestRecord) -> GuestRecord:
            if record.owner != here:
                raise Refused(f"{record.name} is owned by {record.owner.host}")
            return handover.released(record, writer=self.writer)

        await self._change(change, free_name=True)
        record, _ = await self._read()
        return record is not None and record.released

    async def _name_freed(self, record: GuestRecord) -> list[Op]:
        if self.store.keeps_rights:
            return []  # who may remove one name may remove them all: the control plane does it (`ledger.births`)
        node = await self.store.read(paths.name(record.name))
        mine = node is not None and node.data.decode(errors="replace").strip('"') == self.uuid
        return [Delete(paths.name(record.name), node.version)] if node is not None and mine else []

    async def _change(self, change: Callable[[GuestRecord], GuestRecord], *, free_name: bool = False) -> bool:
        """A compare-and-set until it is certain. Raises StoreUnavailable while it is not."""
        said = f"guest {self.uuid} could not be written in {_TRIES} tries"
        tries = Tries(lambda: StoreUnavailable(said), at_most=_TRIES)
        while True:
            await tries.another()
            record, version = await self._read()
            if record is None:
                return False
            try:
                wanted = change(record)
            except Refused:
                return free_name and record.phase is Ownership.GONE
            if wanted == record:
                return True
            ops: list[Op] = [SetData(paths.guest(self.uuid), encode(wanted), version)]
            if free_name:
                ops += await self._name_freed(record)
            if isinstance(await self.store.multi(ops), Done):
                return True
            await self.store.barrier()  # lost the race, or the answer: what stands there now decides
            record, _ = await self._read()
            if record is not None and record.writer == self.writer and record.phase is wanted.phase:
                return True

    def watch(
        self, on_record: Callable[[KnownRecord | None], None], on_wish: Callable[[WantRun], None]
    ) -> Callable[[], None]:
        """Hints; may be old. None: there is no record, or none that can be read. Returns a function that ends both
        watches."""
        path = paths.guest(self.uuid)

        def record_seen(node: Versioned | None) -> None:
            try:
                known = _known(path, node) if node and node.data else None
            except BadRecord:  # only a hint: whoever reads it in earnest says so
                known = None
            on_record(known)

        def wish_seen(node: Versioned | None) -> None:
            with contextlib.suppress(BadRecord):
                if node is not None and node.data:
                    on_wish(decode(WantRun, node.data))

        ends = (
            self.store.watch(path, record_seen),
            self.store.watch(paths.want_run(self.uuid), wish_seen),
        )

        def end() -> None:
            for one in ends:
                one()

        return end


def _known(path: str, node: Versioned) -> KnownRecord:
    """Raises BadRecord."""
    return KnownRecord(decode(GuestRecord, node.data, path=path), node.version, node.mzxid)
