"""What a session's shell writes and reads in the ledger: the transitions of `core.handover` as compare-and-sets.

Each write reads the record, asks the core for the next one, and writes it under the version it read. The result is an
event for the session: the truth, "refused" (somebody else was first, or a copy of our own write won) or "unknown".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from agents.handover.words import RequestsWritten, Seen
from agents.host.journal import KnownRecord
from orchestrator.core import handover
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord, Ownership, Refused
from orchestrator.core.ids import AckRequest, AttemptRef, HostRef
from orchestrator.core.records import Requests
from orchestrator.ledger import paths
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Check, Done, OutcomeUnknown, SetData, Store, StoreUnavailable, Versioned

_TRIES = 5
COMMIT_S = 0.15
"""A COMMIT that is not answered within this has lost its server: the connection is cut and another one is tried. Its
outcome is unknown then, and a read behind a barrier tells it."""
READ_S = 0.6
"""Of each step of such a read: the guest stands, and the next server may be silent too."""


@dataclass
class AttemptLedger:
    """One attempt's view of the store. `writer` names this agent process in every record it writes."""

    store: Store
    ref: AttemptRef
    here: HostRef
    inc: str
    writer: str
    zxid: int = 0
    writes: int = 0
    judged: tuple[GuestRecord, int] | None = None
    """Record and version by which the attempt was accepted: what `bind` writes over, and nothing else, is proven by
    that to have stood all the time."""
    wrote: KnownRecord | None = None
    """What this attempt wrote last. After `bind` the COMMIT is prepared from it, so that nothing is read in the
    blackout."""

    async def read(self, timeout_s: float = 2.0) -> tuple[GuestRecord, int]:
        """Raises StoreUnavailable."""
        path = paths.guest(self.ref.guest)
        node = await self.store.read(path, timeout_s)
        if node is None:
            raise StoreUnavailable(f"{path} does not exist")
        return decode(GuestRecord, node.data, path=path), node.version

    async def read_behind_barrier(self) -> tuple[GuestRecord, int]:
        """Record and version of `req`, not older than this call (H13). Raises StoreUnavailable."""
        await self.store.barrier(READ_S)
        record, _ = await self.read(READ_S)
        req = await self.store.read(paths.requests(self.ref.migration), READ_S)
        return record, req.version if req else 0

    async def _change(self, change: Callable[[GuestRecord], GuestRecord], good: Seen) -> Seen:
        """A conflict is as good as a barrier, so what is read after it is what made it."""
        for _ in range(_TRIES):
            try:
                record, version = self.judged or await self.read()
                self.judged = None
                wanted = change(record)
            except StoreUnavailable:
                return Seen.LEDGER_UNKNOWN
            except Refused:
                return Seen.LEDGER_REFUSED
            result = await self.store.multi([SetData(paths.guest(self.ref.guest), encode(wanted), version)])
            if isinstance(result, Done):
                self._written(wanted, result.versions[0], result.zxid)
                return good
            if isinstance(result, OutcomeUnknown):
                return Seen.LEDGER_UNKNOWN
        return Seen.LEDGER_REFUSED

    def _written(self, record: GuestRecord, version: int, zxid: int) -> None:
        self.zxid, self.writes = zxid, self.writes + 1
        self.wrote = KnownRecord(record, version, zxid)

    async def bind(self) -> Seen:
        """Name the destination's process in the record (H2); only then may anything move."""
        ref = self.ref
        return await self._change(
            lambda record: handover.bind(record, ref.migration, ref.attempt, self.inc, writer=self.writer), Seen.BOUND
        )

    async def abort(self, reason: AbortReason, devices: tuple[str, ...]) -> Seen:
        """OPEN -> ABORTED: the first writer of COMMIT and ABORT wins (H6)."""
        ref = self.ref
        return await self._change(
            lambda record: handover.abort(record, ref.migration, ref.attempt, reason, devices, writer=self.writer),
            Seen.ABORT_RECORDED,
        )

    async def done(self) -> Seen:
        """COMMITTED -> IDLE: the destination has taken over (H9)."""
        ref = self.ref
        return await self._change(
            lambda record: handover.done(record, ref.migration, ref.attempt, self.inc, writer=self.writer),
            Seen.DONE_RECORDED,
        )

    async def roll_back(self, *, vmm_seen_dead: bool, marker: bool) -> Seen:
        """Give the guest back to its source (H10); refused unless the copy is dead and has no marker."""
        return await self._change(
            lambda record: handover.roll_back(
                record, by=self.here, vmm_seen_dead=vmm_seen_dead, marker=marker, writer=self.writer
            ),
            Seen.ROLLBACK_RECORDED,
        )

    async def crashed(self, *, host_died: bool = False) -> Seen:
        """`host_died`: the owner's power cycle is over, as its host itself has certified by coming back."""

        def change(record: GuestRecord) -> GuestRecord:
            if record.owner != self.here:
                raise Refused("not the owner")
            if host_died:
                return handover.host_died(record, certificate=True, writer=self.writer)
            return handover.crashed(record, writer=self.writer)

        return await self._change(change, Seen.CRASH_RECORDED)

    async def commit(self, req_version: int | None) -> Seen:
        """The one write of the blackout, from what `bind` left: no read before it."""
        if self.wrote is None:
            return Seen.LEDGER_REFUSED
        wanted = handover.commit(self.wrote.record, self.ref.migration, self.ref.attempt, self.inc, writer=self.writer)
        give = SetData(paths.guest(self.ref.guest), encode(wanted), self.wrote.version)
        check = () if req_version is None else (Check(paths.requests(self.ref.migration), req_version),)
        result = await self.store.multi([*check, give], COMMIT_S)
        if isinstance(result, Done):
            self._written(wanted, result.versions[-1], result.zxid)
            return Seen.COMMITTED
        return Seen.LEDGER_UNKNOWN if isinstance(result, OutcomeUnknown) else Seen.LEDGER_REFUSED

    async def write_requests(self, entries: tuple[AckRequest, ...]) -> RequestsWritten | None:
        """`req` once it names `entries`, with all that it names; None: the attempt is over, or there is no store.

        Idempotent: entries that are there already are not written again, so that a repetition never moves the version.
        The write proves what was read before it. Only where nothing is to be written a barrier has to (H13).
        """
        path = paths.requests(self.ref.migration)
        certain = False
        for _ in range(_TRIES):
            try:
                if certain:
                    await self.store.barrier()
                record, guest_version = await self.read()
                node = await self.store.read(path)
            except StoreUnavailable:
                return None
            over = record.phase is not Ownership.OPEN or record.attempt != self.ref.attempt
            stored = Requests() if node is None else decode(Requests, node.data, path=path)
            known = {entry.device: entry for entry in self._of_this_attempt(stored)}
            if node is None or over or _has(known, entries):
                if certain:
                    return None if node is None or over else RequestsWritten(entries, _sorted(known), node.version)
                certain = True
                continue
            known |= {entry.device: entry for entry in entries}
            data = encode(replace(stored, entries=_sorted(known), attempt=self.ref.attempt))
            result = await self.store.multi(
                [Check(paths.guest(self.ref.guest), guest_version), SetData(path, data, node.version)]
            )
            if isinstance(result, Done):
                self.writes += 1
                return RequestsWritten(entries, _sorted(known), result.versions[1])
            certain = isinstance(result, OutcomeUnknown)  # a conflict is as good as a barrier
        return None

    def _of_this_attempt(self, stored: Requests) -> tuple[AckRequest, ...]:
        """What was asked in an earlier attempt ended with its device sessions; who needs an ACK asks again."""
        return stored.entries if stored.attempt == self.ref.attempt else ()

    async def write_acks(self, entries: tuple[AckRequest, ...]) -> None:
        """Informative: a failure changes nothing."""
        path = paths.acks(self.ref.migration)
        try:
            node = await self.store.read(path)
        except StoreUnavailable:
            return
        if node is not None and entries:
            data = encode(Requests(entries, self.ref.attempt))
            if data != node.data and isinstance(await self.store.multi([SetData(path, data, node.version)]), Done):
                self.writes += 1

    def watch_record(self, callback: Callable[[GuestRecord], None]) -> Callable[[], None]:
        """Hear what the guest's record says; may be old. Returns what ends the watch."""
        path = paths.guest(self.ref.guest)

        def seen(node: Versioned | None) -> None:
            if node is not None:
                callback(decode(GuestRecord, node.data, path=path))

        return self.store.watch(path, seen)

    def watch_requests(self, callback: Callable[[tuple[AckRequest, ...], int], None]) -> Callable[[], None]:
        """Hear of requests made through the ledger; may be old. Returns what ends the watch."""
        path = paths.requests(self.ref.migration)

        def seen(node: Versioned | None) -> None:
            if node is not None and node.data:
                callback(self._of_this_attempt(decode(Requests, node.data, path=path)), node.version)

        return self.store.watch(path, seen)


def _sorted(known: dict[str, AckRequest]) -> tuple[AckRequest, ...]:
    return tuple(sorted(known.values()))


def _has(known: dict[str, AckRequest], entries: tuple[AckRequest, ...]) -> bool:
    return all(entry.device in known and known[entry.device].generation >= entry.generation for entry in entries)
