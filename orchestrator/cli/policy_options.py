"""The policy of a migration as options: what is given takes the place of the guest's own policy, field by field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from orchestrator.cli import units
from orchestrator.core.policy import OnTimeout

F = TypeVar("F", bound=Callable[..., Any])


class Quantity(click.ParamType[int]):
    """A number with its unit, such as 30s or 500mbit."""

    def __init__(self, name: str, parse: Callable[[str], int]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number in the option's own unit. What cannot be read is an error of usage that says why."""
        if isinstance(value, int):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


TIME = Quantity("time", units.parse_ms)
BANDWIDTH = Quantity("bandwidth", units.parse_mbps)
BYTES = Quantity("bytes", units.parse_bytes)
MIB = Quantity("size", units.parse_mib)

_OPTIONS: tuple[tuple[str, str, Any, str], ...] = (
    ("--prepare-timeout", "prepare_timeout_ms", TIME, "Until the destination is ready."),
    ("--precopy-timeout", "precopy_timeout_ms", TIME, "From the start of pre-copy to the freeze."),
    ("--on-timeout", "on_timeout", click.Choice([each.value for each in OnTimeout]), "What the pre-copy timeout does."),
    ("--ack-timeout", "ack_timeout_ms", TIME, "How long a device's switchover ACK may be missing."),
    ("--switchover-timeout", "switchover_timeout_ms", TIME, "From the freeze until all is loaded."),
    ("--total-timeout", "total_timeout_ms", TIME, "All waits and attempts together."),
    ("--max-attempts", "max_attempts", click.IntRange(1, 100), "Attempts before the migration fails."),
    ("--backoff-initial", "backoff_initial_ms", TIME, "Pause before the second attempt; doubles."),
    ("--backoff-max", "backoff_max_ms", TIME, "Longest pause between attempts."),
    ("--downtime-limit", "downtime_limit_ms", TIME, "The engine stops the guest when the rest fits into this."),
    ("--gate-wait", "gate_wait_ms", TIME, "Wait for an ACK when the engine stopped under a closed gate."),
    ("--max-bandwidth", "max_bandwidth_mbps", BANDWIDTH, "Bound of the transfer; 0: the link's rate."),
    ("--multifd-channels", "multifd_channels", click.IntRange(0, 255), "Parallel streams of memory."),
)
_AUTO_CONVERGE = "auto_converge"
_WAIT_FOR_CAPACITY = "wait_for_capacity"
POLICY_FIELDS = (*(field for _, field, _, _ in _OPTIONS), _AUTO_CONVERGE, _WAIT_FOR_CAPACITY)


def policy_options(command: F) -> F:
    """The options; the command gets them as keyword arguments, named as the fields of MigrationPolicy."""
    command = click.option(
        "--auto-converge/--no-auto-converge",
        _AUTO_CONVERGE,
        default=None,
        help="Slow the guest down until it converges.",
    )(command)
    command = click.option(
        "--wait-for-capacity/--no-wait-for-capacity",
        _WAIT_FOR_CAPACITY,
        default=None,
        help="Wait for a host that can take the guest, up to --total-timeout.",
    )(command)
    for flag, field, kind, text in reversed(_OPTIONS):
        command = click.option(flag, field, type=kind, help=text)(command)
    return command


def policy_of(options: dict[str, Any]) -> dict[str, object] | None:
    """What was given, as the client takes it; None when nothing was."""
    given: dict[str, object] = {field: options[field] for field in POLICY_FIELDS if options[field] is not None}
    return given or None
