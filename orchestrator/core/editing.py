"""PURE. What may become of a guest by an edit, and when."""

from __future__ import annotations

from dataclasses import fields

from orchestrator.core.hardware import Problem
from orchestrator.core.records import GuestSpec

AT_ANY_TIME = frozenset({"labels", "policy", "on_host_death"})
"""What no VMM is made of: it holds from the next time that somebody looks."""


def edited_fields(before: GuestSpec, after: GuestSpec) -> tuple[str, ...]:
    """Names of the fields that differ."""
    return tuple(each.name for each in fields(GuestSpec) if getattr(before, each.name) != getattr(after, each.name))


def needs_a_stop(before: GuestSpec, after: GuestSpec) -> tuple[str, ...]:
    """Fields that may only be changed while nothing of the guest is anywhere: its next start makes it so."""
    return tuple(name for name in edited_fields(before, after) if name not in AT_ANY_TIME and name != "name")


def edit_errors(before: GuestSpec, after: GuestSpec) -> list[Problem]:
    """What no edit may change; empty when there is nothing of that."""
    if before.name != after.name:
        return [("name", f"cannot be changed: the guest is {before.name}")]
    return []
