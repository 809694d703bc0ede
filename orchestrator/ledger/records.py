"""JSON of the znodes <-> records of the core. Unknown fields are ignored (a newer writer), wrong ones are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from orchestrator.core.records import AttemptReport, Attempts

T = TypeVar("T")

MAX_BYTES = 900_000
"""Below ZooKeeper's jute.maxbuffer of 1,048,575 bytes."""


class BadRecord(Exception):
    """A node's content is not what this version of Drover can read. Nothing was changed."""


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)


def encode(record: object) -> bytes:
    """JSON with sorted, short separators; raises BadRecord when it would not fit into a node."""
    data = _adapter(type(record)).dump_json(record)
    if len(data) > MAX_BYTES:
        raise BadRecord(f"{type(record).__name__} takes {len(data)} bytes, a node holds {MAX_BYTES}")
    return data


def encode_attempts(reports: Sequence[AttemptReport]) -> bytes:
    """All reports of a migration. Where they do not fit into a node, the oldest lose their time lines, which `explain`
    then lacks: a migration with a hundred attempts must find its end all the same."""
    kept = list(reports)
    for index, report in enumerate(reports):
        with contextlib.suppress(BadRecord):
            return encode(Attempts(tuple(kept)))
        kept[index] = replace(report, timeline=())
    return encode(Attempts(tuple(kept)))


def decode(kind: type[T], data: bytes, *, path: str = "") -> T:
    """Raises BadRecord with the node's path and what is wrong with it."""
    try:
        return _adapter(kind).validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadRecord(f"{path or kind.__name__}: {where or 'content'}: {first['msg']}") from error
