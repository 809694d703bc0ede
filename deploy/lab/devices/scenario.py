"""What one device does besides behaving well: when it asks for another switchover ACK, where it is slow, what fails.

The format is described in docs/scenario.md; `scenario_text` reads and writes it as YAML. What a scenario has used up
is part of the device's life (`Used`): it travels with the device's state, so that "one late ACK" happens
once and not again on each host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, cast

from orchestrator.core.errors import invalid


class Hook(StrEnum):
    """The points of an attempt that a device is told of, in their order. `gate_open` may be reached several times."""

    PRECOPY = "precopy"
    GATE_OPEN = "gate_open"
    FREEZE = "freeze"
    """The guest is stopped, the devices are not yet quiesced."""
    FINAL_QUERY = "final_query"
    """Quiesced and asked for the last time: what is asked for now is still seen by the check."""
    AFTER_CHECK = "after_check"
    """Too late for this attempt: served in stop-copy."""
    AFTER_COMMIT = "after_commit"


HOOKS = tuple(hook.value for hook in Hook)


class Call(StrEnum):
    """What can be slow or fail. `load` is the initial data of one generation, hence the delay of its ACK."""

    QUIESCE = "quiesce"
    STOP_COPY = "stop_copy"
    ROLL_BACK = "roll_back"
    """Its fault: the device needs a reset and loses its state."""
    LOAD = "load"
    VALIDATE = "validate"
    """Its fault: a byte arrives spoiled and the destination refuses the state."""
    ACTIVATE = "activate"
    ACK = "ack"
    """Its fault: the destination loads everything and never acknowledges."""
    LAST_LOOK = "last_look"
    """In PRE_COPY_P2P, the guest stopped: does the device demand another ACK? Asked for the last time."""
    # A device inside the VMM has these besides, the VMM's own calls:
    BEGIN = "begin"
    """-> PRE_COPY."""
    QUERY = "query"
    """What is there to send? Asked again and again while the guest runs."""
    SIZE = "size"
    """How much will stop-copy carry?"""
    READ = "read"
    WRITE = "write"
    BEGIN_LOAD = "begin_load"
    """-> RESUMING."""
    RESET = "reset"


class Lack(StrEnum):
    """What a device inside the VMM cannot do, of what the best ones can."""

    PRE_COPY = "precopy"
    P2P = "p2p"
    REINIT = "reinit"
    """It cannot say that there is new initial data: what it asks for during pre-copy stays unknown to the VMM."""


IN_VMM_CALLS = frozenset({Call.BEGIN, Call.QUERY, Call.SIZE, Call.READ, Call.WRITE, Call.BEGIN_LOAD, Call.RESET})
SLOW_CALLS = tuple(call.value for call in Call if call not in (Call.ROLL_BACK, Call.ACK))
FAULTY_CALLS = tuple(call.value for call in Call)

MAX_BYTES = 1 << 30
MAX_ESTIMATE = (1 << 64) - 1
MAX_DELAY_MS = 60_000
MAX_AFTER_MS = 3_600_000
MIN_EVERY_MS = 10
MAX_TIMES = 1_000
MAX_ENTRIES = 32
ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Ask:
    """Demands for another ACK: at a hook, or `after_ms` from the begin of each pre-copy and then `every_ms`."""

    at: Hook | None = None
    after_ms: int | None = None
    every_ms: int | None = None
    bytes: int = 0
    """New initial data that comes with the demand (VFIO's REINIT)."""
    times: int | None = 1
    """Over the device's whole life; None: always."""
    sessions: int | None = None
    """Only in this many sessions, the first of the device's life."""


@dataclass(frozen=True, slots=True)
class Delay:
    """A call that takes `ms` longer."""

    call: Call
    ms: int
    times: int | None = None
    sessions: int | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """A call that fails."""

    call: Call
    times: int | None = 1
    sessions: int | None = None


@dataclass(frozen=True, slots=True)
class Estimates:
    """What a device inside the VMM says in place of the truth; VFIO calls all three estimates."""

    initial_bytes: int | None = None
    dirty_bytes: int | None = None
    stop_copy_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything about one device that is scripted. Sizes that are None come from the guest's specification."""

    initial_bytes: int | None = None
    stop_copy_bytes: int | None = None
    dirty_bytes_per_s: int | None = None
    ask_at_begin: bool = True
    """Ask for an ACK at the begin of each session, as every device does that has pre-copy data."""
    asks: tuple[Ask, ...] = ()
    delays: tuple[Delay, ...] = ()
    faults: tuple[Fault, ...] = ()
    estimates: Estimates = Estimates()
    lacks: tuple[Lack, ...] = ()


Entry = Ask | Delay | Fault


@dataclass(frozen=True, slots=True)
class Used:
    """How often each entry of a scenario has happened in the device's life."""

    asks: tuple[int, ...] = ()
    delays: tuple[int, ...] = ()
    faults: tuple[int, ...] = ()

    def may(self, kind: str, index: int, entry: Entry, session: int) -> bool:
        """Does this entry still apply in the device's `session`-th session?"""
        counts: tuple[int, ...] = getattr(self, kind)
        count = counts[index] if index < len(counts) else 0
        return (entry.times is None or count < entry.times) and (entry.sessions is None or session <= entry.sessions)

    def count(self, kind: str, index: int) -> Used:
        """The entry happened once more."""
        counts: tuple[int, ...] = getattr(self, kind)
        padded = [*counts, *[0] * (index + 1 - len(counts))]
        padded[index] += 1
        return replace(self, **{kind: tuple(padded)})

    def forget(self, kind: str, index: int) -> Used:
        """Another entry stands in this place now."""
        counts: tuple[int, ...] = getattr(self, kind)
        return replace(self, **{kind: (*counts[:index], 0, *counts[index + 1 :])}) if index < len(counts) else self


def scenario_from(mapping: object, where: str = "") -> Scenario:
    """A scenario from plain data (of YAML or JSON). Raises DroverError(INVALID_ARGUMENT) that names every wrong field.

    `where` is put before each field path, e.g. `guest.devices[0].scenario`.
    """
    reader = _Reader(where)
    scenario = _scenario(reader, mapping)
    if reader.wrong:
        raise invalid(reader.wrong)
    return scenario


def outside_errors(scenario: Scenario) -> list[tuple[str, str]]:
    """Field and sentence for everything that only a device inside the VMM can do; empty for any other's scenario."""
    bad: list[tuple[str, str]] = []
    for kind in ("delays", "faults"):
        entries: tuple[Delay | Fault, ...] = getattr(scenario, kind)
        bad += [
            (f"{kind}[{index}].call", f"{entry.call.value} is a call to a device inside the VMM (shim: vfio) only")
            for index, entry in enumerate(entries)
            if entry.call in IN_VMM_CALLS
        ]
    if scenario.estimates != Estimates():
        bad.append(("estimates", "only a device inside the VMM (shim: vfio) gives estimates"))
    if scenario.lacks:
        bad.append(("lacks", "only a device inside the VMM (shim: vfio) can lack a feature"))
    return bad


def scenario_mapping(scenario: Scenario) -> dict[str, Any]:
    """The plain data of a scenario, without what is as standard. `scenario_from` reads it back to an equal one."""
    return _mapping(scenario, Scenario())


def used_from(mapping: Mapping[str, Any]) -> Used:
    """Of a device's own state, which was checked as a whole; not for input of people."""
    return Used(**{field.name: tuple(int(count) for count in mapping[field.name]) for field in fields(Used)})


# --- reading ----------------------------------------------------------------------------------------------------------


class _Reader:
    """Takes typed values out of plain data and collects every complaint with its field path."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.wrong: list[tuple[str, str]] = []

    def complain(self, field: str, sentence: str) -> None:
        self.wrong.append((".".join(filter(None, (self.where, field))) or "scenario", sentence))

    def mapping(self, value: object, field: str, known: Sequence[str]) -> dict[str, Any]:
        """The entries with a known name. A value of nothing counts as left out."""
        if not isinstance(value, Mapping):
            self.complain(field, f"must be a mapping with some of {', '.join(known)}, not {_shown(value)}")
            return {}
        found: dict[str, Any] = {}
        for key, entry in cast(Mapping[object, object], value).items():
            if key in known:
                found[str(key)] = entry
            else:
                prefix = f"{field}." if field else ""
                self.complain(f"{prefix}{key}", f"is not known here; write one of {', '.join(known)}, or leave it out")
        return found

    def entries(self, value: object, field: str) -> list[object]:
        if not isinstance(value, list):
            self.complain(field, f"must be a list (lines that begin with a hyphen), not {_shown(value)}")
            return []
        found = cast(list[object], value)
        if len(found) > MAX_ENTRIES:
            self.complain(field, f"at most {MAX_ENTRIES} entries, not {len(found)}")
        return found[:MAX_ENTRIES]

    def number(self, value: object, field: str, low: int, high: int, unit: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            self.complain(field, f"must be a whole number of {unit} from {low} to {high}, not {_shown(value)}")
            return low
        if not low <= value <= high:
            self.complain(field, f"must be between {low} and {high} {unit}, not {value}")
            return low
        return value

    def flag(self, value: object, field: str) -> bool:
        if not isinstance(value, bool):
            self.complain(field, f"must be true or false, not {_shown(value)}")
            return False
        return value

    def word(self, value: object, field: str, known: Sequence[str]) -> str:
        if value not in known:
            self.complain(field, f"must be one of {', '.join(known)}, not {_shown(value)}")
            return known[0]
        return str(value)


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _scenario(reader: _Reader, mapping: object) -> Scenario:
    known = [field.name for field in fields(Scenario)]
    values = reader.mapping(mapping, "", known)
    made: dict[str, Any] = {}
    for name, value in values.items():
        match name:
            case "ask_at_begin":
                made[name] = reader.flag(value, name)
            case "asks":
                made[name] = tuple(_ask(reader, entry, f"asks[{n}]") for n, entry in _numbered(reader, value, name))
            case "delays":
                made[name] = tuple(_delay(reader, entry, f"delays[{n}]") for n, entry in _numbered(reader, value, name))
            case "faults":
                made[name] = tuple(_fault(reader, entry, f"faults[{n}]") for n, entry in _numbered(reader, value, name))
            case "estimates":
                made[name] = _estimates(reader, value)
            case "lacks":
                words = [Lack(reader.word(entry, f"lacks[{n}]", _LACKS)) for n, entry in _numbered(reader, value, name)]
                made[name] = tuple(dict.fromkeys(words))
            case _:
                made[name] = reader.number(value, name, 0, MAX_BYTES, "bytes/s" if name.endswith("_per_s") else "bytes")
    return Scenario(**made)


def _numbered(reader: _Reader, value: object, field: str) -> list[tuple[int, object]]:
    return list(enumerate(reader.entries(value, field)))


def _ask(reader: _Reader, mapping: object, where: str) -> Ask:
    values = reader.mapping(mapping, where, [field.name for field in fields(Ask)])
    made = _limits(reader, values, where)
    if "at" in values:
        made["at"] = Hook(reader.word(values["at"], f"{where}.at", HOOKS))
    if "after_ms" in values:
        made["after_ms"] = reader.number(values["after_ms"], f"{where}.after_ms", 0, MAX_AFTER_MS, "ms")
    if "every_ms" in values:
        made["every_ms"] = reader.number(values["every_ms"], f"{where}.every_ms", MIN_EVERY_MS, MAX_AFTER_MS, "ms")
    if "bytes" in values:
        made["bytes"] = reader.number(values["bytes"], f"{where}.bytes", 0, MAX_BYTES, "bytes")
    if isinstance(mapping, Mapping):
        if ("at" in values) == ("after_ms" in values):
            reader.complain(
                where, f"say when: either at (one of {', '.join(HOOKS)}) or after_ms (from begin), not both"
            )
        elif "every_ms" in values and "after_ms" not in values:
            reader.complain(f"{where}.every_ms", "goes with after_ms only; a hook asks each time it is reached")
    return Ask(**made)


def _delay(reader: _Reader, mapping: object, where: str) -> Delay:
    values = reader.mapping(mapping, where, [field.name for field in fields(Delay)])
    made = _limits(reader, values, where)
    if isinstance(mapping, Mapping):
        made["call"] = Call(reader.word(values.get("call"), f"{where}.call", SLOW_CALLS))
        made["ms"] = reader.number(values.get("ms"), f"{where}.ms", 1, MAX_DELAY_MS, "ms")
    return replace(_SOME_DELAY, **made)


def _fault(reader: _Reader, mapping: object, where: str) -> Fault:
    values = reader.mapping(mapping, where, [field.name for field in fields(Fault)])
    made = _limits(reader, values, where)
    if isinstance(mapping, Mapping):
        made["call"] = Call(reader.word(values.get("call"), f"{where}.call", FAULTY_CALLS))
    return replace(_SOME_FAULT, **made)


def _estimates(reader: _Reader, mapping: object) -> Estimates:
    values = reader.mapping(mapping, "estimates", [field.name for field in fields(Estimates)])
    return Estimates(
        **{name: reader.number(value, f"estimates.{name}", 0, MAX_ESTIMATE, "bytes") for name, value in values.items()}
    )


def _limits(reader: _Reader, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`times` and `sessions`, which every entry may have."""
    made: dict[str, Any] = {}
    if "times" in values:
        times = values["times"]
        if times == ALWAYS:
            made["times"] = None
        elif isinstance(times, int) and not isinstance(times, bool):
            made["times"] = reader.number(times, f"{where}.times", 1, MAX_TIMES, "times")
        else:
            sentence = f"must be a whole number from 1 to {MAX_TIMES} or the word {ALWAYS}, not {_shown(times)}"
            reader.complain(f"{where}.times", sentence)
    if "sessions" in values:
        made["sessions"] = reader.number(values["sessions"], f"{where}.sessions", 1, MAX_TIMES, "sessions")
    return made


# --- writing ----------------------------------------------------------------------------------------------------------


def _mapping(value: Any, standard: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in fields(value):
        entry, usual = getattr(value, field.name), getattr(standard, field.name, None)
        if field.name == "times" and entry is None:
            entry = ALWAYS if usual is not None else None
        if entry == usual and field.name not in _ALWAYS_WRITTEN:
            continue
        found[field.name] = _plain(entry)
    return found


def _plain(entry: object) -> object:
    if isinstance(entry, tuple):
        return [_plain(one) for one in cast(tuple[object, ...], entry)]
    if isinstance(entry, StrEnum):
        return entry.value
    standard = _STANDARD.get(type(entry))
    return entry if standard is None else _mapping(entry, standard)


_SOME_DELAY = Delay(Call.LOAD, 0)
_SOME_FAULT = Fault(Call.LOAD)
_ALWAYS_WRITTEN = ("call", "ms")
_LACKS = tuple(lack.value for lack in Lack)
_STANDARD: dict[type, object] = {Ask: Ask(), Delay: _SOME_DELAY, Fault: _SOME_FAULT, Estimates: Estimates()}
