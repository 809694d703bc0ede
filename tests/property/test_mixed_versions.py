"""Records between an older and a newer version of Drover, for every type that stands in the ledger or in a journal.

A newer version is one that writes fields which this one does not know; an older one is one that leaves fields out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
from collections.abc import Iterator
from enum import StrEnum
from types import ModuleType
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.guest import files
from agents.host import journal
from orchestrator.core import handover, ids, policy, records
from orchestrator.core.errors import AbortReason, FailureReason
from orchestrator.core.record import OpenWord, Record, known_fields
from orchestrator.ledger.records import BadRecord, decode, encode


def records_of(module: ModuleType) -> Iterator[type[Any]]:
    for _, kind in inspect.getmembers(module, inspect.isclass):
        if kind.__module__ == module.__name__ and dataclasses.is_dataclass(kind):
            yield kind


STORED = [
    *records_of(records),
    *records_of(policy),
    ids.HostRef,
    ids.AckRequest,
    handover.GuestRecord,
    journal._Epoch,
    files._Note,
]
NAMES = [kind.__name__ for kind in STORED]

WORDS = st.text("abcxyz-0123456789", max_size=8)
NUMBERS = st.integers(-(2**40), 2**40)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)


def instances(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of the kind as this version would write it."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return st.builds(kind, **{each.name: instances(hints[each.name]) for each in known_fields(kind)})
    args: tuple[Any, ...] = getattr(kind, "__args__", ())
    origin = getattr(kind, "__origin__", None)
    if origin is tuple:
        return st.lists(instances(args[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(WORDS, instances(args[1]), max_size=2)
    if args:
        return st.one_of([instances(each) for each in args])
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return st.sampled_from(list(kind))
    known: dict[Any, st.SearchStrategy[Any]] = {
        int: NUMBERS,
        str: WORDS,
        bool: st.booleans(),
        float: st.floats(0, 1e9, allow_nan=False),
        type(None): st.none(),
    }
    return known[kind]


def places(kind: Any, tree: Any) -> Iterator[dict[str, Any]]:
    """Every object within the JSON that is a record: there a newer version may have added a field."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(tree, dict):
        yield tree
        hints = get_type_hints(kind)
        for name in (each.name for each in known_fields(kind)):
            yield from places(hints[name], tree[name])
        return
    args: tuple[Any, ...] = getattr(kind, "__args__", ())
    origin = getattr(kind, "__origin__", None)
    if origin is tuple:
        for each in tree:
            yield from places(args[0], each)
    elif origin is dict:
        for each in tree.values():
            yield from places(args[1], each)
    elif args and tree is not None:
        for each in args:
            if isinstance(each, type) and dataclasses.is_dataclass(each):
                yield from places(each, tree)


@pytest.mark.parametrize("kind", STORED, ids=NAMES)
def test_every_stored_type_is_a_record(kind: type[Any]) -> None:
    assert issubclass(kind, Record)


@pytest.mark.parametrize("kind", STORED, ids=NAMES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_a_newer_version_wrote_survives_a_rewrite_by_this_one(kind: type[Any], data: st.DataObject) -> None:
    written = json.loads(encode(data.draw(instances(kind))))
    for place in places(kind, written):
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(["a_newer_field", "newer", "newest"]))
            place[name] = data.draw(JSON)
    read = decode(kind, json.dumps(written).encode())
    assert json.loads(encode(dataclasses.replace(read))) == written
    for each in known_fields(kind)[:1]:
        changed = dataclasses.replace(read, **{each.name: getattr(read, each.name)})
        assert json.loads(encode(changed)) == written


@pytest.mark.parametrize("kind", STORED, ids=NAMES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_an_older_version_left_out_takes_its_default(kind: type[Any], data: st.DataObject) -> None:
    whole = data.draw(instances(kind))
    written = json.loads(encode(whole))
    optional = [
        each
        for each in known_fields(kind)
        if each.default is not dataclasses.MISSING or each.default_factory is not dataclasses.MISSING
    ]
    left_out = data.draw(st.lists(st.sampled_from(optional), unique=True)) if optional else []
    for each in left_out:
        del written[each.name]
    read = decode(kind, json.dumps(written).encode())
    for each in known_fields(kind):
        made = each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default
        assert getattr(read, each.name) == (made if each in left_out else getattr(whole, each.name))


def words_of(kind: type[Any]) -> Iterator[tuple[str, type[StrEnum]]]:
    for name, hint in get_type_hints(kind).items():
        for each in (hint, *getattr(hint, "__args__", ())):
            if isinstance(each, type) and issubclass(each, StrEnum):
                yield name, each


@pytest.mark.parametrize(
    ("kind", "name", "word"),
    [(kind, name, word) for kind in STORED for name, word in words_of(kind)],
    ids=lambda each: getattr(each, "__name__", each),
)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_word_of_a_newer_version_is_kept_or_refused(
    kind: type[Any], name: str, word: type[StrEnum], data: st.DataObject
) -> None:
    """Kept where it only explains, refused with the node where something would have to be decided on it."""
    written = json.loads(encode(data.draw(instances(kind)))) | {name: "A_NEWER_WORD"}
    stored = json.dumps(written).encode()
    if issubclass(word, OpenWord):
        assert json.loads(encode(decode(kind, stored))) == written
        assert getattr(decode(kind, stored), name) == "A_NEWER_WORD"
    else:
        with pytest.raises(BadRecord, match=f"/some/node: {name}"):
            decode(kind, stored, path="/some/node")


@given(st.binary(max_size=40) | JSON.map(lambda tree: json.dumps(tree).encode()))
def test_no_content_whatever_raises_anything_but_bad_record(content: bytes) -> None:
    for kind in STORED:
        with contextlib.suppress(BadRecord):
            decode(kind, content)


def test_an_unknown_word_is_equal_to_itself_and_to_no_other() -> None:
    assert AbortReason("LATER") == AbortReason("LATER") == "LATER"
    assert AbortReason("LATER") not in list(AbortReason)
    assert FailureReason("LATER").name == "LATER"
    for nonsense in ("", "not a word", "X" * 65, 7):
        with pytest.raises(ValueError, match="is not a valid"):
            AbortReason(nonsense)
