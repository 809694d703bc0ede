"""How an evacuation lies in the ledger: its head in one node, its guests in rows of others.

A node holds less than a megabyte, and so does a transaction; a host may carry thousands of guests. So the guests are
kept ROWS to a node, a state is written in as many transactions as it takes, with the head last, and only nodes that
changed are written. Between two of these transactions the rows are newer than the head, which does no harm: a job goes
on from what its rows and the world say, row by row. Each transaction checks the head's version: a cancel that came in
between is never written over.

Jobs of older versions have their guests in the head; they are read as they are, and the next write moves them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from orchestrator.core.records import EvacuationGuest, EvacuationGuests, EvacuationSpec, EvacuationState
from orchestrator.core.text import clip
from orchestrator.ledger import paths
from orchestrator.ledger.gather import each
from orchestrator.ledger.ledger import op_create, op_set
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import Check, Create, Op, SetData, Store

ROWS = 50
"""Guests per node: some 20 kB as a rule, never more than 150 kB."""
SAID = 300
"""Characters of what is said of one guest; the migration itself has all of it."""
MAX_MESSAGE = 1_000
MAX_TRANSACTION = 400_000
"""Bytes of content."""


@dataclass(frozen=True, slots=True)
class Rows:
    """One node of guests."""

    guests: tuple[EvacuationGuest, ...]
    version: int


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it was read."""

    spec: EvacuationSpec
    head: EvacuationState
    """With its guests only where an older version wrote it."""
    version: int
    """Of the head."""
    rows: tuple[Rows, ...] = ()
    mzxid: int = 0
    """Of the spec: when the job was made, in the ledger's own order."""

    @property
    def state(self) -> EvacuationState:
        """The head together with the guests."""
        return replace(self.head, guests=self.guests)

    @property
    def guests(self) -> tuple[EvacuationGuest, ...]:
        """All guests of the job, each once: as its row has it, else as the head does."""
        rows = [guest for rows in self.rows for guest in rows.guests]
        known = {guest.guest for guest in rows}
        return (*rows, *(guest for guest in self.head.guests if guest.guest not in known))


async def read_job(store: Store, name: str, *, rows: tuple[Rows, ...] | None = None) -> Job | None:
    """None when there is none, or not all of it yet. `rows` is for who is the only one to write them, and knows them.

    The head first: the rows are never older than it. Raises StoreUnavailable, BadRecord.
    """
    spec = await store.read(paths.evacuation(name))
    head = await store.read(paths.evacuation_state(name)) if spec is not None else None
    if spec is None or head is None:
        return None
    return Job(
        spec=decode(EvacuationSpec, spec.data, path=paths.evacuation(name)),
        head=decode(EvacuationState, head.data, path=paths.evacuation_state(name)),
        version=head.version,
        rows=await _read_rows(store, name) if rows is None else rows,
        mzxid=spec.mzxid,
    )


async def _read_rows(store: Store, name: str) -> tuple[Rows, ...]:
    count = sum(paths.is_evacuation_guests(child) for child in await store.children(paths.evacuation(name)))

    async def one(number: int) -> Rows:
        path = paths.evacuation_guests(name, number)
        node = await store.read(path)
        if node is None:
            raise BadRecord(f"{path}: missing")
        return Rows(decode(EvacuationGuests, node.data, path=path).guests, node.version)

    return tuple(await each(range(count), one))


def trimmed(state: EvacuationState) -> EvacuationState:
    """As it can be kept: texts clipped, because a node holds many of them."""
    guests = tuple(
        guest if len(guest.message) <= SAID else replace(guest, message=clip(guest.message, SAID))
        for guest in state.guests
    )
    return replace(state, guests=guests, message=clip(state.message, MAX_MESSAGE))


def transactions(job: Job, new: EvacuationState) -> list[list[Op]]:
    """What turns the job's state into `new`, one transaction after the other, the head in the last one. Each conflicts
    when the head moved since the job was read."""
    name = job.spec.id
    head = op_set(paths.evacuation_state(name), replace(new, guests=()), job.version)
    check = Check(head.path, job.version)
    batches = [[check, *ops] for ops in _batches(_row_ops(job, new))]
    if batches and len(batches[-1]) > 1:
        return [*batches[:-1], [*batches[-1][1:], head]]
    return [*batches, [head]]


def written(job: Job, new: EvacuationState) -> Job:
    """The job once all of `transactions` were applied."""
    rows = tuple(
        Rows(guests, _next_version(job, number, guests)) for number, guests in enumerate(_in_rows(new.guests, job))
    )
    return replace(job, head=replace(new, guests=()), version=job.version + 1, rows=rows)


def _in_rows(guests: tuple[EvacuationGuest, ...], job: Job) -> list[tuple[EvacuationGuest, ...]]:
    found = [guests[start : start + ROWS] for start in range(0, len(guests), ROWS)]
    return found + [()] * (len(job.rows) - len(found))


def _next_version(job: Job, number: int, guests: tuple[EvacuationGuest, ...]) -> int:
    if number >= len(job.rows):
        return 0
    known = job.rows[number]
    return known.version + (known.guests != guests)


def _row_ops(job: Job, new: EvacuationState) -> Iterator[Create | SetData]:
    for number, guests in enumerate(_in_rows(new.guests, job)):
        path = paths.evacuation_guests(job.spec.id, number)
        if number >= len(job.rows):
            yield op_create(path, EvacuationGuests(guests))
        elif job.rows[number].guests != guests:
            yield op_set(path, EvacuationGuests(guests), job.rows[number].version)


def _batches(ops: Iterable[Create | SetData]) -> list[list[Op]]:
    batches: list[list[Op]] = []
    room = 0
    for op in ops:
        room -= len(op.data)
        if room < 0 or not batches:
            batches.append([])
            room = MAX_TRANSACTION - len(op.data)
        batches[-1].append(op)
    return batches
