"""What an agent remembers across its restarts, besides ZooKeeper: the coordinator's epoch, its attempts' reports, and
the records of the guests that it has had, as it last read them.

Losing the journal loses explanations and comparisons (with an older ledger), never a guest.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from orchestrator.core.handover import GuestRecord
from orchestrator.core.record import Record
from orchestrator.core.records import AttemptReport, Incarnation
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.whole import write_whole

KEPT_REPORTS = 500
KEPT_RECORDS = 2000
_EPOCH_FILE = "epoch.json"
_INCARNATION_FILE = "incarnation.json"
RETRY_S = 1.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Epoch(Record):
    epoch: int = -1
    """Of shard 0, the only one of a fleet that is not shared out."""
    others: dict[str, int] = field(default_factory=dict[str, int])
    """Of the other shards, by their numbers."""


@dataclass(frozen=True, slots=True)
class KnownRecord(Record):
    """A guest's record as this host last read it. A ledger that says something older has lost what came after."""

    record: GuestRecord
    version: int
    mzxid: int
    incarnation: str = ""
    """Of the ledger in which it was read: nothing is older or newer across two of them."""


class Journal:
    """Files below `directory`; the reports of the last attempts are also held in memory.

    Nothing is written on the event loop. A report that cannot be written is kept in memory and written when there is
    room again (`write_on`).
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._unwritten: dict[Path, bytes | None] = {}
        """What the files are to hold; None: they are to go. No more than the last reports."""
        self._dirty = asyncio.Event()
        self._writing = asyncio.Lock()
        self._reports: OrderedDict[tuple[str, int], AttemptReport] = OrderedDict()
        self._records: OrderedDict[str, KnownRecord] = OrderedDict()
        self._epochs: dict[int, int] = {}
        self._said = ""
        self.incarnation = ""
        """Of the ledger that this host believes; empty: it has met none that says."""

    def open(self) -> None:
        """Read what an earlier agent left. What cannot be read, or made, is left out, and said."""
        try:
            (self._directory / "attempts").mkdir(parents=True, exist_ok=True)
            files = sorted((self._directory / "attempts").glob("*.json"), key=lambda path: path.stat().st_mtime)
        except OSError as error:
            log.error("journal: its directory cannot be used", error=str(error))
            files = []
        self._open_records()
        self._open_incarnation()
        try:
            found = decode(_Epoch, (self._directory / _EPOCH_FILE).read_bytes())
            self._epochs = {0: found.epoch, **{int(shard): epoch for shard, epoch in found.others.items()}}
        except FileNotFoundError:
            pass
        except (BadRecord, OSError, ValueError) as error:
            log.warning("journal: epoch is unreadable", error=str(error))
        for path in files:
            migration, _, attempt = path.stem.rpartition("-")
            try:
                self._reports[migration, int(attempt)] = decode(AttemptReport, path.read_bytes(), path=str(path))
            except (BadRecord, ValueError, OSError) as error:
                log.warning("journal: a report is unreadable", file=path.name, error=str(error))

    def _open_incarnation(self) -> None:
        try:
            self.incarnation = decode(Incarnation, (self._directory / _INCARNATION_FILE).read_bytes()).id
        except FileNotFoundError:
            pass
        except (BadRecord, OSError) as error:
            log.warning("journal: which ledger this host believes is unreadable", error=str(error))

    async def see_incarnation(self, incarnation: str) -> None:
        """The ledger that this host believes from now on. Durable when this returns, as an epoch is."""
        self.incarnation = incarnation
        self._unwritten[self._directory / _INCARNATION_FILE] = encode(Incarnation(incarnation))
        await self._write_all()

    def epochs(self) -> dict[int, int]:
        """Of every shard that was heard of."""
        return dict(self._epochs)

    def _open_records(self) -> None:
        with contextlib.suppress(OSError):
            for path in sorted((self._directory / "records").glob("*.json"), key=lambda path: path.stat().st_mtime):
                try:
                    self._records[path.stem] = decode(KnownRecord, path.read_bytes(), path=str(path))
                except (BadRecord, OSError) as error:
                    log.warning("journal: a guest's record is unreadable", file=path.name, error=str(error))

    def known_record(self, guest: str) -> KnownRecord | None:
        """What this host last read of a guest, also of one that has left it."""
        return self._records.get(guest)

    def saw_record(self, guest: str, found: KnownRecord) -> None:
        """Remember it; of guests beyond KEPT_RECORDS the ones that were seen last are remembered."""
        if self._records.get(guest) == found:
            return
        self._records[guest] = found
        self._records.move_to_end(guest)
        self._unwritten[self._record_file(guest)] = encode(found)
        while len(self._records) > KEPT_RECORDS:
            oldest, _ = self._records.popitem(last=False)
            self._unwritten[self._record_file(oldest)] = None
        self._bound()

    def _record_file(self, guest: str) -> Path:
        return self._directory / "records" / f"{guest}.json"

    def epoch(self, shard: int = 0) -> int:
        """Of a shard, as it was last read in the ledger; -1 before the first time."""
        return self._epochs.get(shard, -1)

    async def see_epoch(self, epoch: int, shard: int = 0) -> None:
        """As it stands in the ledger now, which may be lower than before. Durable when this returns (H12).

        On a disk that takes nothing it holds for the life of this process, and is written when there is room again.
        """
        self._epochs[shard] = epoch
        others = {str(other): seen for other, seen in sorted(self._epochs.items()) if other}
        self._unwritten[self._directory / _EPOCH_FILE] = encode(_Epoch(self.epoch(), others))
        await self._write_all()

    async def write_on(self) -> None:
        """Write what waits to be written, once there is something; for ever, by whoever keeps the agent's tasks."""
        await self._dirty.wait()
        self._dirty.clear()
        if not await self._write_all():
            await asyncio.sleep(RETRY_S)

    async def _write_all(self) -> bool:
        async with self._writing:
            for path, data in list(self._unwritten.items()):
                error = await asyncio.to_thread(_write, path, data)
                if error is not None:
                    self._say(error)
                    self._dirty.set()
                    return False
                if self._unwritten.get(path, b"") == data:
                    self._unwritten.pop(path, None)
        self._said = ""
        return True

    def _say(self, error: OSError) -> None:
        """Once for each trouble: it is tried again every second."""
        if str(error) != self._said:
            self._said = str(error)
            log.error("journal: cannot write, trying again", error=str(error), waiting=len(self._unwritten))

    def report(self, migration: str, attempt: int) -> AttemptReport | None:
        """The report of an attempt that ended here; None: it is not over, not from here, or too long ago."""
        return self._reports.get((migration, attempt))

    def keep(self, migration: str, report: AttemptReport) -> None:
        """Remember the report of an attempt that is over; the oldest beyond KEPT_REPORTS are dropped."""
        key = (migration, report.attempt)
        self._reports[key] = report
        self._unwritten[self._file(*key)] = encode(report)
        while len(self._reports) > KEPT_REPORTS:
            oldest, _ = self._reports.popitem(last=False)
            self._unwritten[self._file(*oldest)] = None
        self._bound()

    def _bound(self) -> None:
        while len(self._unwritten) > KEPT_REPORTS + KEPT_RECORDS:  # on a disk that takes nothing for a long time
            self._unwritten.pop(next(iter(self._unwritten)))
        self._dirty.set()

    def _file(self, migration: str, attempt: int) -> Path:
        return self._directory / "attempts" / f"{migration}-{attempt}.json"


def _write(path: Path, data: bytes | None) -> OSError | None:
    """Blocking. Whole or not at all; None: done. Only the epoch and the ledger's id are flushed: losing power may cost
    the newest of the rest, and a flush would be in the way of whoever shares the disk, ZooKeeper for one."""
    try:
        if data is None:
            path.unlink(missing_ok=True)
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data, durable=path.name in (_EPOCH_FILE, _INCARNATION_FILE))
    except OSError as error:
        return error
    return None
