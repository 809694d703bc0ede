"""Lists in pages, filtered and ordered: the rules of AIP-132, AIP-158 and AIP-160 that Drover follows (docs/lists.md).

A page token says after which row the next page begins, not how many rows to skip: rows that come and go between two
pages make nobody else appear twice or not at all. It holds for the filter and order that it was given out for.
"""

from __future__ import annotations

import base64
import bisect
import datetime
import hashlib
import heapq
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import islice
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")

DEFAULT_PAGE = 100
MAX_PAGE = 1_000
MAX_FILTER = 2_000
"""Characters of a filter."""
MAX_TERMS = 50
MAX_DEPTH = 20


class BadList(ValueError):
    """What was asked of a list cannot be done; says what is wrong and what would be right."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        """`filter`, `order_by`, `page_size` or `page_token`."""


class Kind(Enum):
    """What a field holds, and so how it is compared."""

    TEXT = "text"
    NUMBER = "number"
    TIME = "time"
    """Seconds since the epoch in the row, RFC 3339 in a filter."""
    BOOL = "bool"
    MAP = "map"
    """Text by key, written `labels.key`."""


@dataclass(frozen=True, slots=True)
class Field(Generic[T]):
    """What a row is filtered and ordered by under one name, and how it is read from the row."""

    kind: Kind
    of: Callable[[T], Any]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One answer's worth of rows."""

    rows: list[T]
    next_page_token: str
    """Empty: this was the last page."""


class Listing(Generic[T]):
    """One kind of row: its fields, and the field that names it, which also ends every order."""

    def __init__(self, fields: Mapping[str, Field[T]], *, key: str, order_by: str) -> None:
        self._fields = fields
        self._key = key
        self._order_by = order_by

    def page(
        self,
        rows: Iterable[T] | Standing[T],
        *,
        where: Callable[[T], bool] | None = None,
        filter: str = "",
        order_by: str = "",
        page_size: int = 0,
        page_token: str = "",
    ) -> Page[T]:
        """At most `page_size` rows (0: DEFAULT_PAGE; more than MAX_PAGE: MAX_PAGE) after `page_token`, of those that
        `where` lets pass. Standing rows in their own order cost what the page costs, others a look at each of them.

        Raises BadList.
        """
        if page_size < 0:
            raise BadList("page_size", f"page_size is {page_size}: it is at least 0, which means {DEFAULT_PAGE}")
        size = min(page_size or DEFAULT_PAGE, MAX_PAGE)
        accepts = self.accepts(filter)
        order = self._order(order_by)
        asked = hashlib.sha256(f"{filter}\0{order_by or self._order_by}".encode()).hexdigest()[:16]
        after = self._after(page_token, asked, order)

        def passes(row: T) -> bool:
            return (where is None or where(row)) and accepts(row)

        if isinstance(rows, Standing) and order == self._order(""):
            found = list(islice((row for row in rows.after(after) if passes(row)), size + 1))
        else:
            order_of = _order_of(order)
            keyed = ((order_of(row), number, row) for number, row in enumerate(rows) if passes(row))
            wanted = keyed if after is None else (each for each in keyed if each[0] > after)
            found = [row for _, _, row in heapq.nsmallest(size + 1, wanted)]
        shown = found[:size]
        more = len(found) > size
        return Page(shown, self._token(shown[-1], asked, order) if more else "")

    def standing(self) -> Standing[T]:
        """For rows that are to stand in the list's own order from one look to the next."""
        return Standing(_order_of(self._order("")))

    def accepts(self, filter: str) -> Callable[[T], bool]:
        """Whether a row passes a filter; an empty one lets everything pass. Raises BadList."""
        return _Parser(filter, self._fields).whole() if filter.strip() else lambda _row: True

    def _order(self, order_by: str) -> list[tuple[Field[T], bool]]:
        order: list[tuple[Field[T], bool]] = []
        for part in [*(order_by or self._order_by).split(","), self._key]:
            words = part.split()
            known = bool(words) and words[0] in self._fields and self._fields[words[0]].kind is not Kind.MAP
            if not known or len(words) > 2 or words[1:] not in ([], ["asc"], ["desc"]):
                names = ", ".join(name for name, field in self._fields.items() if field.kind is not Kind.MAP)
                raise BadList(
                    "order_by", f'cannot order by "{part.strip()}": use fields ({names}), each with or without desc'
                )
            order.append((self._fields[words[0]], words[1:] == ["desc"]))
        return order

    def _token(self, last: T, asked: str, order: list[tuple[Field[T], bool]]) -> str:
        told = [asked, *(one.of(last) for one, _ in order)]
        return base64.urlsafe_b64encode(json.dumps(told, separators=(",", ":")).encode()).decode().rstrip("=")

    def _after(self, token: str, asked: str, order: list[tuple[Field[T], bool]]) -> tuple[Any, ...] | None:
        if not token:
            return None
        try:
            told = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
            first, *values = cast(list[Any], told)
            if first != asked or len(values) != len(order):
                raise BadList("page_token", "page_token belongs to another filter or order: begin without one")
            return tuple(_place(one.kind, falls)(value) for (one, falls), value in zip(order, values, strict=True))
        except BadList:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            said = "page_token is none that a list has given out: begin without one"
            raise BadList("page_token", said) from error


# --- order ------------------------------------------------------------------------------------------------------------


_KNOWN_TEXTS = 65_536
"""Texts whose place in the order is remembered: as many as a large fleet has names."""


@dataclass(frozen=True, slots=True)
class _Falling:
    """A place in an order that falls."""

    rank: tuple[Any, ...]

    def __lt__(self, other: _Falling) -> bool:
        return other.rank < self.rank


@lru_cache(maxsize=_KNOWN_TEXTS)
def _rank(text: str) -> tuple[Any, ...]:
    """In the order that people expect of numbers in names: web-2 before web-10."""
    parts = re.split(r"(\d+)", text)
    return tuple((int(part), part) if part.isdecimal() else (-1, part) for part in parts if part)


def _place(kind: Kind, falls: bool) -> Callable[[Any], Any]:
    """From what a field holds to what is compared. Plain numbers and tuples, since every row of a list passes here."""
    if kind is Kind.TEXT:
        return (lambda value: _Falling(_rank(value))) if falls else _rank
    return (lambda value: -float(value)) if falls else float


def _order_of(order: list[tuple[Field[T], bool]]) -> Callable[[T], tuple[Any, ...]]:
    """Where a row stands."""
    steps = [(one.of, _place(one.kind, falls)) for one, falls in order]
    return lambda row: tuple([place(of(row)) for of, place in steps])


class Standing(Generic[T]):
    """Rows kept in the order that a list has when nobody asks for another, so that a page does not sort them all.

    Whoever holds the rows tells which of them `moved`, and calls `sync` before each look.
    """

    def __init__(self, order_of: Callable[[T], tuple[Any, ...]]) -> None:
        self._order_of = order_of
        self._places: list[tuple[Any, ...]] = []
        """Sorted; one for each row, since the field that ends every order names it."""
        self._rows: dict[tuple[Any, ...], T] = {}
        self._place_of: dict[str, tuple[Any, ...]] = {}
        self._moved: set[str] = set()

    def __iter__(self) -> Iterator[T]:
        return map(self._rows.__getitem__, self._places)

    def moved(self, name: str) -> None:
        """The row of this name is new, another one, or gone."""
        self._moved.add(name)

    def sync(self, rows: Mapping[str, T]) -> None:
        """These are the rows, by name. Those that moved are taken in; should others have come or gone, all are."""
        for name in self._moved:
            self._remove(name)
            if name in rows:
                self._add(name, rows[name])
        self._moved.clear()
        if len(self._place_of) != len(rows):
            self._place_of = {name: self._order_of(row) for name, row in rows.items()}
            self._rows = {self._place_of[name]: row for name, row in rows.items()}
            self._places = sorted(self._rows)

    def after(self, place: tuple[Any, ...] | None) -> Iterator[T]:
        """Those that stand behind a place; None: all."""
        begin = 0 if place is None else bisect.bisect_right(self._places, place)
        return (self._rows[self._places[number]] for number in range(begin, len(self._places)))

    def _add(self, name: str, row: T) -> None:
        place = self._order_of(row)
        bisect.insort(self._places, place)
        self._rows[place], self._place_of[name] = row, place

    def _remove(self, name: str) -> None:
        place = self._place_of.pop(name, None)
        if place is not None:
            del self._rows[place], self._places[bisect.bisect_left(self._places, place)]


# --- filters ----------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r'\s*(?:(?P<op><=|>=|!=|=|<|>|:)|(?P<mark>[()-])|"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<word>[^\s()<>=!:"]+))'
)
_HELP = 'as in: state = "RUNNING" AND (host = h1 OR labels.tier = web)'


class _Parser(Generic[T]):
    """Recursive descent: or > and > not > term. AND binds closer than OR, as everywhere but in AIP-160 itself; where
    both meet without parentheses the filter is refused, so that nobody is misunderstood."""

    def __init__(self, text: str, fields: Mapping[str, Field[T]]) -> None:
        if len(text) > MAX_FILTER:
            raise BadList("filter", f"the filter has {len(text)} characters, at most {MAX_FILTER} are read")
        self._fields = fields
        self._tokens = self._split(text)
        self._at = 0
        self._terms = 0

    @staticmethod
    def _split(text: str) -> list[tuple[str, str]]:
        tokens: list[tuple[str, str]] = []
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None:
                raise BadList("filter", f"cannot read the filter from {text[at:].strip()[:20]!r} on, {_HELP}")
            kind = match.lastgroup or ""
            value = match[kind]
            tokens.append((kind, re.sub(r"\\(.)", r"\1", value) if kind == "quoted" else value))
            at = match.end()
        return tokens

    def whole(self) -> Callable[[T], bool]:
        test = self._any_of(0)
        if self._at < len(self._tokens):
            raise BadList("filter", f"{self._tokens[self._at][1]!r} is not expected in the filter there, {_HELP}")
        return test

    def _next_is(self, *words: str) -> bool:
        kind, value = self._tokens[self._at] if self._at < len(self._tokens) else ("", "")
        if kind in ("word", "mark") and value in words:
            self._at += 1
            return True
        return False

    def _any_of(self, depth: int) -> Callable[[T], bool]:
        if depth > MAX_DEPTH:
            raise BadList("filter", f"the filter has more than {MAX_DEPTH} parentheses inside each other")
        first, mixed = self._all_of(depth)
        tests = [first]
        while self._next_is("OR"):
            test, more = self._all_of(depth)
            tests.append(test)
            mixed |= more
        if len(tests) > 1 and mixed:
            raise BadList(
                "filter", "AND and OR stand side by side in the filter: say with parentheses what belongs together"
            )
        return tests[0] if len(tests) == 1 else lambda row: any(test(row) for test in tests)

    def _all_of(self, depth: int) -> tuple[Callable[[T], bool], bool]:
        tests = [self._not(depth)]
        while self._next_is("AND"):
            tests.append(self._not(depth))
        return (tests[0] if len(tests) == 1 else lambda row: all(test(row) for test in tests)), len(tests) > 1

    def _not(self, depth: int) -> Callable[[T], bool]:
        if self._next_is("NOT", "-"):
            test = self._one(depth)
            return lambda row: not test(row)
        return self._one(depth)

    def _one(self, depth: int) -> Callable[[T], bool]:
        if self._next_is("("):
            test = self._any_of(depth + 1)
            if not self._next_is(")"):
                raise BadList("filter", f"a parenthesis of the filter is not closed, {_HELP}")
            return test
        self._terms += 1
        if self._terms > MAX_TERMS:
            raise BadList("filter", f"the filter has more than {MAX_TERMS} comparisons")
        return self._comparison()

    def _comparison(self) -> Callable[[T], bool]:
        three = self._tokens[self._at : self._at + 3]
        name = three[0][1] if three and three[0][0] == "word" else ""
        base, dot, key = name.partition(".")
        field = self._fields.get(base)
        if field is None or (bool(dot) and field.kind is not Kind.MAP):
            known = ", ".join(self._fields)
            raise BadList("filter", f"there is no field {name or _HELP!r} to filter by; there are: {known}")
        complete = len(three) == 3 and three[1][0] == "op" and three[2][0] in ("word", "quoted")
        if not complete:
            raise BadList("filter", f"{name} is compared with nothing in the filter, {_HELP}")
        self._at += 3
        operator, value = three[1][1], three[2][1]
        if field.kind is Kind.MAP:
            return _of_map(field.of, base, key, operator, value)
        return _compared(field, name, operator, value)


def _of_map(of: Callable[[T], Any], name: str, key: str, operator: str, value: str) -> Callable[[T], bool]:
    if not key:
        if operator != ":":
            raise BadList("filter", f"{name} is a map: {name}.key = value, or {name}:key for those that have the key")
        return lambda row: value in of(row)
    if operator == ":" and value == "*":
        return lambda row: key in of(row)
    if operator not in ("=", "!=", ":"):
        raise BadList("filter", f"{name}.{key} is text: it is compared with =, != or :")
    fits = _pattern(value)
    if operator == "!=":
        return lambda row: not fits(of(row).get(key, ""))
    return lambda row: key in of(row) and fits(of(row)[key])


def _compared(field: Field[T], name: str, operator: str, value: str) -> Callable[[T], bool]:
    of = field.of
    if field.kind is Kind.TEXT:
        if operator not in ("=", "!=", ":"):
            raise BadList("filter", f"{name} is text: it is compared with =, != or : (contains)")
        if operator == ":":
            return lambda row: value in of(row)
        fits = _pattern(value)
        return (lambda row: fits(of(row))) if operator == "=" else (lambda row: not fits(of(row)))
    wanted = _value(field.kind, name, value)
    if field.kind is Kind.BOOL and operator not in ("=", "!=", ":"):
        raise BadList("filter", f"{name} is true or false: it is compared with = or !=")
    compare: dict[str, Callable[[float, float], bool]] = {
        "=": lambda a, b: a == b,
        ":": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        "<": lambda a, b: a < b,
        "<=": lambda a, b: a <= b,
        ">": lambda a, b: a > b,
        ">=": lambda a, b: a >= b,
    }
    holds = compare[operator]
    return lambda row: holds(float(of(row)), wanted)


def _pattern(value: str) -> Callable[[str], bool]:
    """Equality; `*` at either end stands for anything."""
    begins, ends = value.endswith("*"), value.startswith("*")
    core = value[1 if ends else 0 : -1 if begins and len(value) > 1 else None] if value != "*" else ""
    if begins and ends:
        return lambda text: core in text
    if begins:
        return lambda text: text.startswith(core)
    if ends:
        return lambda text: text.endswith(core)
    return lambda text: text == value


def _value(kind: Kind, name: str, value: str) -> float:
    try:
        if kind is Kind.BOOL:
            return float({"true": True, "false": False}[value.lower()])
        if kind is Kind.TIME:
            when = datetime.datetime.fromisoformat(value)
            return (when if when.tzinfo else when.replace(tzinfo=datetime.UTC)).timestamp()
        return float(value)
    except (KeyError, ValueError):
        example = {
            Kind.BOOL: "true or false",
            Kind.TIME: 'a time such as "2026-11-28T17:00:00Z"',
            Kind.NUMBER: "a number",
        }
        raise BadList("filter", f"{name} is compared with {value!r}, which is not {example[kind]}") from None
