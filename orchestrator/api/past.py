"""What the ledger has forgotten, as the history file has it (`orchestrator.history`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from itertools import islice

import structlog

from orchestrator.api.calls import Tools
from orchestrator.api.decisions import Standing, is_id
from orchestrator.api.reads import MigrationRead
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import Attempts, MigrationSpec, MigrationState
from orchestrator.core.retention import Kept
from orchestrator.history import Entry
from orchestrator.ledger.records import BadRecord, decode
from protos.drover.v1 import orchestrator_pb2 as pb

log = structlog.get_logger(__name__)

_CHUNK = 64
"""Entries that one turn of a thread reads."""
_KINDS = (Kept.MIGRATIONS, Kept.EVACUATIONS, Kept.GUESTS)


async def forgotten(tools: Tools, migration: str) -> MigrationRead | None:
    """A migration that the ledger no longer has. None: the history does not have it either, or cannot be read."""
    if tools.history is None or not is_id(migration):
        return None
    try:
        async with tools.looking_back:
            entry = await asyncio.to_thread(tools.history.find, Kept.MIGRATIONS, migration)
        return None if entry is None else _read(entry)
    except (OSError, BadRecord) as error:
        log.error("the history cannot be read", migration=migration, error=str(error))
        return None


def _read(entry: Entry) -> MigrationRead:
    where = f"history of {entry.name}"
    spec = decode(MigrationSpec, entry.content("") or b"", path=where)
    state = decode(MigrationState, entry.content("state") or b"", path=where)
    kept = entry.content("attempts")
    reports = decode(Attempts, kept, path=where).reports if kept is not None else ()
    return MigrationRead(spec, Standing(None, -1, 0, state, -1, reports))


async def export(tools: Tools, asked: pb.ExportHistoryRequest) -> AsyncGenerator[pb.HistoryEntry]:
    """Everything the history has of a kind, oldest first. Raises NO_HISTORY, INVALID_ARGUMENT, INTERNAL when the file
    cannot be read."""
    if asked.kind and asked.kind not in _KINDS:
        said = f"there is no kind {asked.kind!r}: ask for {', '.join(_KINDS)}, or for all"
        raise DroverError(RefusalReason.INVALID_ARGUMENT, said, field="kind")
    if tools.history is None:
        said = "this API has no history file: set `history` in the configuration of coordinator and API"
        raise DroverError(RefusalReason.NO_HISTORY, said)
    entries = tools.history.entries()

    def some(rest: Iterator[Entry]) -> list[Entry]:
        return list(islice(rest, _CHUNK))

    try:
        while chunk := await asyncio.to_thread(some, entries):
            for one in chunk:
                if asked.kind in ("", one.kind) and one.name.startswith(asked.name_prefix):
                    yield pb.HistoryEntry(kind=one.kind, name=one.name, json=one.line().decode().rstrip("\n"))
    except OSError as error:
        raise DroverError(RefusalReason.INTERNAL, f"the history cannot be read: {error}") from error
