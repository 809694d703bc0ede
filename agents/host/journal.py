"""What an agent remembers across its own restarts, besides ZooKeeper: the highest epoch and its attempts' reports.

Losing the journal loses explanations and one comparison (the epoch is read again from the ledger), never a guest.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import structlog

from orchestrator.core.records import AttemptReport
from orchestrator.ledger.records import BadRecord, decode, encode

KEPT_REPORTS = 500

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Epoch:
    epoch: int = -1


class Journal:
    """Files below `directory`; the reports of the last attempts are also held in memory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._reports: OrderedDict[tuple[str, int], AttemptReport] = OrderedDict()
        self._epoch = -1

    def open(self) -> None:
        """Read what an earlier agent left. A file that cannot be read is left out, and said."""
        (self._directory / "attempts").mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            try:
                self._epoch = decode(_Epoch, (self._directory / "epoch.json").read_bytes()).epoch
            except BadRecord as error:
                log.warning("journal: epoch is unreadable", error=str(error))
        files = sorted((self._directory / "attempts").glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in files:
            migration, _, attempt = path.stem.rpartition("-")
            try:
                self._reports[migration, int(attempt)] = decode(AttemptReport, path.read_bytes(), path=str(path))
            except (BadRecord, ValueError, OSError) as error:
                log.warning("journal: a report is unreadable", file=path.name, error=str(error))

    @property
    def epoch(self) -> int:
        """The highest that was ever seen; -1 before the first."""
        return self._epoch

    def see_epoch(self, epoch: int) -> None:
        """Durable before it is acted on, so that a restarted agent refuses the same coordinators (H12)."""
        if epoch > self._epoch:
            _write(self._directory / "epoch.json", encode(_Epoch(epoch)), durable=True)
            self._epoch = epoch

    def report(self, migration: str, attempt: int) -> AttemptReport | None:
        return self._reports.get((migration, attempt))

    def keep(self, migration: str, report: AttemptReport) -> None:
        """Remember the report of an attempt that is over; the oldest beyond KEPT_REPORTS are dropped."""
        key = (migration, report.attempt)
        self._reports[key] = report
        _write(self._file(*key), encode(report), durable=False)
        while len(self._reports) > KEPT_REPORTS:
            oldest, _ = self._reports.popitem(last=False)
            self._file(*oldest).unlink(missing_ok=True)

    def _file(self, migration: str, attempt: int) -> Path:
        return self._directory / "attempts" / f"{migration}-{attempt}.json"


def _write(path: Path, data: bytes, *, durable: bool) -> None:
    """Whole or not at all. A full disk costs the note and nothing else."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        log.error("journal: cannot write", file=str(path), error=str(error))
