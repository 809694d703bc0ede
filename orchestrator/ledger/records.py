"""JSON of the znodes <-> records of the core, between versions of Drover.

Fields of a newer version are kept and written back as they came (`core.record.Record`), fields that an older one did
not write take their defaults. What must be understood and is not, such as a phase, is refused: `BadRecord`.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import pydantic_core
from pydantic import TypeAdapter, ValidationError

from orchestrator.core.record import MIN_READER, READS, Record, known_fields
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
    kind = type(record)
    tree = _adapter(kind).dump_python(record, mode="json", warnings="error")
    settle = _walk(kind, _flatten)
    settled = settle(tree) if settle else tree
    if isinstance(record, Record) and (least := record.min_reader()) > 1:
        settled[MIN_READER] = least
    data = pydantic_core.to_json(settled, inf_nan_mode="null")
    if len(data) > MAX_BYTES:
        raise BadRecord(f"{type(record).__name__} takes {len(data)} bytes, a node holds {MAX_BYTES}")
    return data


def encode_attempts(reports: Sequence[AttemptReport], *, over: Attempts | None = None) -> bytes:
    """All reports of a migration, in place of those of `over`. Where they do not fit into a node, the oldest lose their
    time lines, which `explain` then lacks: a migration with a hundred attempts must find its end all the same."""
    over = over or Attempts()
    kept = list(reports)
    for index, report in enumerate(reports):
        with contextlib.suppress(BadRecord):
            return encode(replace(over, reports=tuple(kept)))
        kept[index] = replace(report, timeline=())
    return encode(replace(over, reports=tuple(kept)))


def decode(kind: type[T], data: bytes, *, path: str = "") -> T:
    """Raises BadRecord with the node's path and what is wrong with it."""
    try:
        tree = pydantic_core.from_json(data)
        if isinstance(tree, dict):
            _must_be_readable(cast(_Object, tree).pop(MIN_READER, 1), path or kind.__name__)
        lift = _walk(kind, _lift)
        return _adapter(kind).validate_python(lift(tree) if lift else tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadRecord(f"{path or kind.__name__}: {where or 'content'}: {first['msg']}") from error
    except ValueError as error:
        raise BadRecord(f"{path or kind.__name__}: content: Invalid JSON: {error}") from error


def _must_be_readable(least: object, where: str) -> None:
    """What an older version would misread it leaves alone: it neither acts on it nor writes it back."""
    if not isinstance(least, int) or isinstance(least, bool):
        raise BadRecord(f"{where}: {MIN_READER}: {least!r} is no whole number")
    if least > READS:
        said = f"it was written for Drover versions that read {MIN_READER} {least}, and this one reads {READS}"
        raise BadRecord(f"{where}: {said}: upgrade this process (docs/upgrade.md); the record was left as it is")


# --- fields of a newer version ----------------------------------------------------------------------------------------

_Object = dict[str, Any]
_Array = Sequence[Any]
_Change = Callable[[frozenset[str], _Object], _Object]
_Tree = Callable[[Any], Any]


def _lift(known: frozenset[str], stored: dict[str, Any]) -> dict[str, Any]:
    """What only a newer version knows goes where a `Record` keeps it."""
    newer = {name: value for name, value in stored.items() if name not in known}
    return {name: value for name, value in stored.items() if name in known} | {"newer": newer} if newer else stored


def _flatten(known: frozenset[str], held: dict[str, Any]) -> dict[str, Any]:
    """And back to where it stood."""
    newer = held.pop("newer", None)
    return {**newer, **held} if newer else held


@cache
def _walk(kind: Any, change: _Change) -> _Tree | None:
    """A function that applies `change` to every record within the JSON of a `kind`; None: there is none in it."""
    if isinstance(kind, type) and issubclass(kind, Record):
        return _walk_record(kind, change)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (tuple, list) and args and (inner := _walk(args[0], change)):
        return lambda tree: [inner(each) for each in cast(_Array, tree)] if isinstance(tree, list | tuple) else tree
    if origin is dict and (inner := _walk(args[1], change)):
        return lambda tree: {k: inner(v) for k, v in cast(_Object, tree).items()} if isinstance(tree, dict) else tree
    if origin in (Union, types.UnionType):
        found = [each for each in (_walk(arg, change) for arg in args) if each is not None]
        return found[0] if len(found) == 1 else None
    return None


def _walk_record(kind: type[Record], change: _Change) -> _Tree:
    hints = get_type_hints(kind)
    known = frozenset(each.name for each in known_fields(kind))
    inner = {name: walk for name in known if (walk := _walk(hints[name], change))}

    def record(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        changed = change(known, dict(cast(_Object, tree)))
        for name, walk in inner.items():
            if name in changed:
                changed[name] = walk(changed[name])
        return changed

    return record
