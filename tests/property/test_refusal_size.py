"""Whatever a refusal says, its status fits into the trailers of an answer, and its reason arrives."""

from __future__ import annotations

from typing import Any, cast

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.rpc.errors import MAX_STATUS_BYTES, MAX_VIOLATIONS, from_rpc_error, status_bytes, to_status

BUDGET = 8_192
"""Of gRPC's: with more than this it may drop the trailers, and above twice as much it does."""

LONG = st.text(max_size=40).flatmap(lambda text: st.sampled_from([text, text * 500])) | st.text(
    st.characters(exclude_categories=()), max_size=60
)


class Arrived(grpc.RpcError):
    def __init__(self, status: grpc.Status) -> None:
        self.status = cast(Any, status)

    def code(self) -> grpc.StatusCode:
        return self.status.code

    def details(self) -> str:
        return self.status.details

    def trailing_metadata(self) -> Any:
        return self.status.trailing_metadata


def told(error: DroverError) -> DroverError:
    return from_rpc_error(Arrived(to_status(error)))


@settings(max_examples=400)
@given(
    st.sampled_from(RefusalReason),
    LONG,
    st.lists(st.tuples(LONG, LONG), max_size=80),
    st.dictionaries(LONG, LONG, max_size=40),
)
def test_every_error_fits(
    reason: RefusalReason, message: str, violations: list[tuple[str, str]], details: dict[str, str]
) -> None:
    error = DroverError(reason, message, violations=violations, details=details)
    assert status_bytes(to_status(error)) <= MAX_STATUS_BYTES < BUDGET - 512
    got = told(error)
    assert got.reason is reason
    assert len(got.violations) <= MAX_VIOLATIONS
    assert bool(got.violations) == bool(violations)
    if len(got.violations) < len(violations):
        assert got.details["violations_left_off"] == str(len(violations) - len(got.violations))


@pytest.mark.parametrize("letter", ["x", "ä", "\u4e2d", "\U0001f600", "%", "\n", "\udc80"])
def test_the_worst_letters_fit(letter: str) -> None:
    """One letter may take twelve bytes of a message on the wire, and travels a second time in the details."""
    text = letter * 300_000
    error = DroverError(
        RefusalReason.NO_CAPACITY,
        text,
        violations=[(text, text)] * 5_000,
        details={f"{n}{text}": text for n in range(99)},
    )
    assert status_bytes(to_status(error)) <= MAX_STATUS_BYTES


def test_what_fits_is_left_alone() -> None:
    error = invalid([(f"labels['k{n}']", "a key is 1 to 63 letters") for n in range(MAX_VIOLATIONS)])
    got = told(error)
    assert (got.message, got.violations) == (error.message, error.violations)
    assert got.message.startswith("20 fields are wrong: labels['k0']: a key is")
    assert got.message.endswith("; and 15 more")
