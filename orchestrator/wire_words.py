"""The words of enumerations between protos and the core, and what is said of a word or a number that is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import TypeVar, cast

from google.protobuf.message import Message

from orchestrator.core.agent import RunState
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.core.records import EvacuationPhase, MigrationPhase
from orchestrator.core.text import quoted
from protos.drover.v1 import types_pb2

_OWNERSHIP = {value: types_pb2.OwnershipPhase.Value(f"OWNERSHIP_PHASE_{value.name}") for value in Ownership}
_RUN_STATE = {value: types_pb2.RunState.Value(f"RUN_STATE_{value.name}") for value in RunState}
_PHASE = {value: types_pb2.MigrationPhase.Value(f"MIGRATION_PHASE_{value.name}") for value in MigrationPhase}
_EVACUATION = {value: types_pb2.EvacuationPhase.Value(f"EVACUATION_PHASE_{value.name}") for value in EvacuationPhase}
_RUN_STATE_OF = {number: value for value, number in _RUN_STATE.items()}
_PHASE_OF = {number: value for value, number in _PHASE.items()}


def ownership_to_proto(phase: Ownership) -> types_pb2.OwnershipPhase.ValueType:
    """What the guest's record says of its ownership."""
    return _OWNERSHIP[phase]


def run_state_to_proto(state: RunState) -> types_pb2.RunState.ValueType:
    """Whether the guest's vCPUs run, as its agent sees it."""
    return _RUN_STATE[state]


def run_state_from_proto(number: int) -> RunState:
    """A word that is not known here says nothing: UNKNOWN."""
    return _RUN_STATE_OF.get(cast(types_pb2.RunState.ValueType, number), RunState.UNKNOWN)


def phase_to_proto(phase: MigrationPhase) -> types_pb2.MigrationPhase.ValueType:
    """How far a migration has come."""
    return _PHASE[phase]


def phase_from_proto(number: int) -> MigrationPhase | None:
    """None for a phase of a newer version."""
    return _PHASE_OF.get(cast(types_pb2.MigrationPhase.ValueType, number))


def evacuation_phase_to_proto(phase: EvacuationPhase) -> types_pb2.EvacuationPhase.ValueType:
    """How far an evacuation has come."""
    return _EVACUATION[phase]


def wrong(field: str, said: str) -> DroverError:
    """INVALID_ARGUMENT: what `field` must be, and is not."""
    return DroverError(RefusalReason.INVALID_ARGUMENT, said, field=field)


def unknown_word(field: str, value: object, words: Iterable[str]) -> DroverError:
    """INVALID_ARGUMENT: `field` must be one of `words`."""
    return wrong(field, f"must be one of {', '.join(words)}, not {quoted(value)}")


_T = TypeVar("_T", bound=StrEnum)


def meant(words: Mapping[_T, int], number: int, unset: _T, field: str) -> _T:
    """Of an enumeration in a request: 0 is its default, a number that is not known is refused."""
    if not number:
        return unset
    for word, known in words.items():
        if known == number:
            return word
    raise unknown_word(field, number, words)


def is_set(message: Message, name: str) -> bool:
    """Whether an optional field is set, by a name that is not known before the program runs."""
    return message.HasField(name)
