"""Pages, filters and orders of lists."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.listing import MAX_DEPTH, MAX_FILTER, MAX_PAGE, MAX_TERMS, BadList, Field, Kind, Listing


@dataclass(frozen=True)
class Row:
    name: str
    state: str = "RUNNING"
    size: int = 0
    at: float = 0.0
    safe: bool = False
    labels: dict[str, str] = field(default_factory=dict)


ROWS = Listing[Row](
    {
        "name": Field(Kind.TEXT, lambda row: row.name),
        "state": Field(Kind.TEXT, lambda row: row.state),
        "size": Field(Kind.NUMBER, lambda row: row.size),
        "create_time": Field(Kind.TIME, lambda row: row.at),
        "safe": Field(Kind.BOOL, lambda row: row.safe),
        "labels": Field(Kind.MAP, lambda row: row.labels),
    },
    key="name",
    order_by="name",
)

WEB = Row("web-2", "RUNNING", 64, 1_764_000_000.0, True, {"tier": "web", "a b": "c"})
DB = Row("db-10", "PAUSED", 128, 1_764_100_000.0, False, {"tier": "db"})
BARE = Row('odd "one"', "", 0, 0.0)
ALL = [WEB, DB, BARE]


def names(filter: str) -> set[str]:
    return {row.name for row in ROWS.page(ALL, filter=filter).rows}


@pytest.mark.parametrize(
    ("filter", "found"),
    [
        ("", {"web-2", "db-10", 'odd "one"'}),
        ("state = RUNNING", {"web-2"}),
        ('state="RUNNING"', {"web-2"}),
        ("state != RUNNING", {"db-10", 'odd "one"'}),
        ('state = ""', {'odd "one"'}),
        ("name = web-*", {"web-2"}),
        ("name = *-10", {"db-10"}),
        ("name = *b-*", {"web-2", "db-10"}),
        ("name = *", {"web-2", "db-10", 'odd "one"'}),
        ("name : eb", {"web-2"}),
        ('name = "odd \\"one\\""', {'odd "one"'}),
        ("size > 64", {"db-10"}),
        ("size >= 64 AND size < 128", {"web-2"}),
        ("size = 64.0", {"web-2"}),
        ('create_time > "2025-11-25T00:00:00Z"', {"db-10"}),
        ('create_time <= "2025-11-24T16:00:00+00:00"', {"web-2", 'odd "one"'}),
        ("safe = true", {"web-2"}),
        ("safe != TRUE", {"db-10", 'odd "one"'}),
        ("labels.tier = web", {"web-2"}),
        ("labels.tier != web", {"db-10", 'odd "one"'}),
        ("labels:tier", {"web-2", "db-10"}),
        ("labels.tier:*", {"web-2", "db-10"}),
        ("NOT labels:tier", {'odd "one"'}),
        ("-state = RUNNING", {"db-10", 'odd "one"'}),
        ("state = RUNNING OR state = PAUSED", {"web-2", "db-10"}),
        ("(state = RUNNING OR state = PAUSED) AND NOT (labels.tier = db)", {"web-2"}),
    ],
)
def test_filters(filter: str, found: set[str]) -> None:
    assert names(filter) == found


@pytest.mark.parametrize(
    ("asked", "field_", "said"),
    [
        ({"filter": "nothing = 1"}, "filter", "no field 'nothing'.*name, state"),
        ({"filter": "state"}, "filter", "compared with nothing"),
        ({"filter": "state ="}, "filter", "compared with nothing"),
        ({"filter": "state = RUNNING extra"}, "filter", "'extra' is not expected"),
        ({"filter": "= RUNNING"}, "filter", "no field"),
        ({"filter": "(state = a"}, "filter", "not closed"),
        ({"filter": "state = a)"}, "filter", "not expected"),
        ({"filter": "state = a AND"}, "filter", "no field"),
        ({"filter": "state = a AND state = b OR state = c"}, "filter", "parentheses"),
        ({"filter": 'state = "a'}, "filter", "cannot read"),
        ({"filter": "state > a"}, "filter", "is text"),
        ({"filter": "size = big"}, "filter", "not a number"),
        ({"filter": "create_time > yesterday"}, "filter", "2026-"),
        ({"filter": "safe = maybe"}, "filter", "true or false"),
        ({"filter": "safe > true"}, "filter", "true or false"),
        ({"filter": "labels = web"}, "filter", "is a map"),
        ({"filter": "labels.tier > a"}, "filter", "is text"),
        ({"filter": "state.x = a"}, "filter", "no field 'state.x'"),
        ({"filter": "a" * (MAX_FILTER + 1)}, "filter", f"at most {MAX_FILTER}"),
        ({"filter": " AND ".join(["size = 1"] * (MAX_TERMS + 1))}, "filter", f"more than {MAX_TERMS}"),
        ({"filter": "(" * (MAX_DEPTH + 1) + "size = 1" + ")" * (MAX_DEPTH + 1)}, "filter", "parentheses"),
        ({"order_by": "labels"}, "order_by", "name, state, size"),
        ({"order_by": "name up"}, "order_by", '"name up"'),
        ({"order_by": "name,,size"}, "order_by", "cannot order"),
        ({"page_size": -1}, "page_size", "at least 0"),
        ({"page_token": "!"}, "page_token", "begin without"),
        ({"page_token": "bm9uZQ"}, "page_token", "begin without"),
        ({"page_token": "W10"}, "page_token", "begin without"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said(asked: dict[str, str], field_: str, said: str) -> None:
    with pytest.raises(BadList, match=said) as caught:
        ROWS.page(ALL, **asked)  # type: ignore[arg-type]
    assert caught.value.field == field_


def test_names_with_numbers_are_in_the_order_that_people_expect() -> None:
    rows = [Row("web-10"), Row("web-2"), Row("db"), Row("web-2a")]
    assert [row.name for row in ROWS.page(rows).rows] == ["db", "web-2", "web-2a", "web-10"]
    assert [row.name for row in ROWS.page(rows, order_by="name desc").rows] == ["web-10", "web-2a", "web-2", "db"]
    assert [row.name for row in ROWS.page(ALL, order_by="state, size desc").rows] == ['odd "one"', "db-10", "web-2"]


def test_a_token_is_for_one_filter_and_order() -> None:
    rows = [Row(str(n)) for n in range(5)]
    token = ROWS.page(rows, page_size=2).next_page_token
    assert [row.name for row in ROWS.page(rows, page_size=2, page_token=token).rows] == ["2", "3"]
    with pytest.raises(BadList, match="another filter"):
        ROWS.page(rows, filter="size = 0", page_token=token)
    with pytest.raises(BadList, match="another filter"):
        ROWS.page(rows, order_by="name desc", page_token=token)
    assert len(ROWS.page([Row(str(n)) for n in range(MAX_PAGE + 5)], page_size=10**9).rows) == MAX_PAGE


@given(
    st.sets(st.integers(0, 300)),
    st.integers(1, 7),
    st.sampled_from(["", "name desc", "size", "size desc, name", "state, size"]),
    st.data(),
)
def test_pages_hold_every_row_that_stays_exactly_once(
    numbers: set[int], size: int, order_by: str, data: st.DataObject
) -> None:
    """Whatever comes and goes between two pages."""
    stays = {n: Row(f"r{n}", f"s{n % 3}", n % 5) for n in numbers if n % 2}
    comes = [Row(f"r{n}", f"s{n % 3}", n % 5) for n in numbers if n % 2 == 0]
    told: list[str] = []
    token = ""
    while True:
        there = [*stays.values(), *(row for row in comes if data.draw(st.booleans()))]
        page = ROWS.page(there, order_by=order_by, page_size=size, page_token=token)
        told += [row.name for row in page.rows]
        token = page.next_page_token
        if not token:
            break
    assert len(told) == len(set(told))
    assert {row.name for row in stays.values()} <= set(told)


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(-1, 3), st.booleans()), max_size=40),
    st.sampled_from(["", "size = 2", "state = s1"]),
    st.booleans(),
)
def test_standing_rows_give_the_pages_of_rows_that_are_sorted_each_time(
    moves: list[tuple[int, int, bool]], filter: str, falls: bool
) -> None:
    """Whatever comes, changes and goes, told or not; `size` -1 is the end of a row."""
    fields: dict[str, Field[Row]] = {
        "name": Field(Kind.TEXT, lambda row: row.name),
        "state": Field(Kind.TEXT, lambda row: row.state),
        "size": Field(Kind.NUMBER, lambda row: row.size),
    }
    listing = Listing[Row](fields, key="name", order_by="size desc, state" if falls else "size, state desc")
    there: dict[str, Row] = {}
    standing = listing.standing()
    for number, size, told in moves:
        name = f"r{number}"
        before = len(there)
        if size < 0:
            there.pop(name, None)
        else:
            there[name] = Row(name, f"s{number % 2}", size)
        if told or len(there) == before:  # a row that is another one now is always told, one that came or went need not
            standing.moved(name)
        standing.sync(there)
        token = ""
        while True:
            asked = {"filter": filter, "page_size": 3, "page_token": token}
            expected = listing.page(there.values(), **asked)
            assert listing.page(standing, **asked) == expected
            other = {"filter": filter, "order_by": "name", "page_size": 5}
            assert listing.page(standing, **other) == listing.page(there.values(), **other)
            if not (token := expected.next_page_token):
                break


def test_standing_rows_cost_what_the_page_costs() -> None:
    looked: list[str] = []

    def name_of(row: Row) -> str:
        looked.append(row.name)
        return row.name

    listing = Listing[Row]({"name": Field(Kind.TEXT, name_of)}, key="name", order_by="name")
    there = {f"r{number}": Row(f"r{number}") for number in range(5_000)}
    standing = listing.standing()
    standing.sync(there)
    looked.clear()
    there["r77"] = Row("r77", "PAUSED")
    standing.moved("r77")
    standing.sync(there)
    listing.page(standing, page_size=20, page_token=listing.page(standing, page_size=50).next_page_token)
    assert len(looked) < 10
