"""Whether a guest, as it is, can move between two engines, or two versions of one. Pure.

Two things must be the same at both ends: the machine, which a versioned machine type pins whatever QEMU provides it,
and the way in which switchover ACKs are counted, which only matters to a guest with devices inside its VMM. QEMU before
11.1 counts one ACK for all devices (`legacy`); QEMU 11.1 counts one per device (`per-device`), but for machine types up
to 11.0 it counts as its predecessors did.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

PER_DEVICE = "per-device"
LEGACY = "legacy"
_PER_DEVICE_SINCE = (11, 1)
_NAMED = 8
"""So many things are named in a refusal."""
_VERSIONED = re.compile(r"(.+)-(\d+)\.(\d+)")


def engine_kind(engine: str) -> str:
    """`qemu` or `libvirt`, of what a host has registered as its engine; empty: it did not say."""
    return engine.partition(" ")[0]


def other_engine(here: str, there: str) -> str:
    """Why a guest cannot go from one engine to the other: they do not speak to each other. Empty: they are the same."""
    mine, theirs = engine_kind(here), engine_kind(there)
    if not mine or not theirs or mine == theirs:
        return ""
    return f"its host runs guests by {mine} and this one by {theirs}: guests move between hosts of one engine only"


def not_by(engine: str, name: str, beyond_libvirt: Iterable[str]) -> str:
    """Why guest `name`, of which libvirt cannot do what is given, cannot be where this engine is. Empty: it can."""
    what = list(beyond_libvirt)
    if engine_kind(engine) != "libvirt" or not what:
        return ""
    more = f" and {len(what) - _NAMED} more" if len(what) > _NAMED else ""
    return (
        f"guest {name} has {', '.join(what[:_NAMED])}{more}, which hosts that run their guests by libvirt do not give"
    )


def ack_mode(engine_mode: str, machine: str) -> str:
    """How an engine of this mode counts the ACKs of a guest with this (versioned) machine type."""
    versioned = _version(machine)
    if engine_mode == PER_DEVICE and versioned is not None and versioned[1] < _PER_DEVICE_SINCE:
        return LEGACY
    return engine_mode


def real_machine(machine: str, aliases: Mapping[str, str]) -> str:
    """What a name such as `pc` stands for at an engine with these aliases; the name itself where it is no alias."""
    return aliases.get(machine, machine)


def common_machine(machine: str, here: Iterable[str], there: Iterable[str]) -> str:
    """The newest machine type of the same kind that both ends have; empty: there is none."""
    kind = _version(machine)
    both = [(versioned, name) for name in set(here) & set(there) if (versioned := _version(name)) is not None]
    fitting = [(version, name) for (of, version), name in both if kind is not None and of == kind[0]]
    return max(fitting)[1] if fitting else ""


def _version(machine: str) -> tuple[str, tuple[int, int]] | None:
    """Kind and version of `pc-i440fx-10.0`; None for a name without a version."""
    found = _VERSIONED.fullmatch(machine)
    return (found[1], (int(found[2]), int(found[3]))) if found else None
