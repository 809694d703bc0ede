"""Bad budgets are named, all at once."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.policy import MigrationPolicy, backoff_ms, policy_errors


def test_the_defaults_are_sound() -> None:
    assert policy_errors(MigrationPolicy()) == []


def test_every_error_is_reported_with_its_field() -> None:
    bad = replace(MigrationPolicy(), max_attempts=0, precopy_timeout_ms=-1, backoff_initial_ms=9_000, gate_wait_ms=-5)
    fields = [name for name, _ in policy_errors(bad)]
    assert fields == ["precopy_timeout_ms", "max_attempts", "backoff_initial_ms", "gate_wait_ms"]


@given(st.integers(1, 10_000))
def test_backoff_grows_and_is_bounded(attempt: int) -> None:
    policy = MigrationPolicy()
    assert policy.backoff_initial_ms <= backoff_ms(policy, attempt) <= policy.backoff_max_ms
    assert backoff_ms(policy, attempt) <= backoff_ms(policy, attempt + 1)
