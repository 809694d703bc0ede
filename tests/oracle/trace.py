"""What QEMU 11.1 traces about switchover ACKs, as typed events in the order of its log."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from deploy.lab.devices.qemu_acks import Query

SOURCE_TRACES = (
    "migrate_set_state",
    "migrate_transferred",
    "migration_thread_low_pending",
    "qemu_savevm_query_pending",
    "runstate_set",
    "source_return_path_thread_switchover_acked",
    "vfio_migration_set_device_state",
    "vfio_query_precopy_size",
    "vfio_query_precopy_size_request_switchover_ack",
    "vfio_save_block",
    "vfio_save_block_precopy_empty_hit",
    "vfio_save_iterate",
    "vfio_send_init_data_flag",
    "vfio_state_pending",
)
DESTINATION_TRACES = ("loadvm_approve_switchover", "loadvm_approve_switchover_legacy")


@dataclass(frozen=True)
class Status:
    """MigrationStatus."""

    word: str


@dataclass(frozen=True)
class RunState:
    word: str


@dataclass(frozen=True)
class Threshold:
    """What may be left for the switchover; 0 until QEMU first knows."""

    bytes: int


@dataclass(frozen=True)
class Look:
    """GET_PRECOPY_INFO with its answer. `asks`: QEMU took it for a request, and said so.

    QEMU speaks of a last look only where it failed.
    """

    device: str
    initial: int
    dirty: int
    reinit: bool
    failed: bool
    asks: bool = False


@dataclass(frozen=True)
class DeviceQueried:
    """One device's part of a query, before its sum."""

    device: str
    asks: bool
    initial: int
    dirty: int
    kind: Query


@dataclass(frozen=True)
class Queried:
    kind: Query
    precopy: int
    """Of `total`, what pre-copy can still carry."""
    total: int
    collected: int
    pending: int


@dataclass(frozen=True)
class Read:
    device: str
    bytes: int


@dataclass(frozen=True)
class RanDry:
    device: str


@dataclass(frozen=True)
class Marker:
    device: str


@dataclass(frozen=True)
class Iterated:
    device: str
    initial: int


@dataclass(frozen=True)
class Acked:
    """Of the thread of the return path: `pending` afterwards."""

    pending: int


@dataclass(frozen=True)
class Decided:
    total: int


@dataclass(frozen=True)
class DeviceState:
    """QEMU has brought a device into its new state."""

    device: str
    word: str


Event = (
    Status
    | RunState
    | Threshold
    | Look
    | DeviceQueried
    | Queried
    | Read
    | RanDry
    | Marker
    | Iterated
    | Acked
    | Decided
    | DeviceState
)


@dataclass(frozen=True)
class _Asks:
    """Right behind the look that it belongs to, but for other threads' lines."""

    device: str
    failed: bool = False


def _kind(exact: str, final: str) -> Query:
    return Query.FINAL if final == "1" else Query.EXACT if exact == "1" else Query.ESTIMATE


def _failed_last(device: str) -> _Asks:
    return _Asks(device, failed=True)


_Made = Callable[..., "Event | _Asks"]
_DEVICE = r"\((\S+)\)"
_QUERIED = (
    r"qemu_savevm_query_pending exact=(\d), final=(\d), precopy=(\d+), .*total=(\d+), "
    r"collected switchover ack pending=(\d+), total switchover ack pending=(\d+)"
)
_DEVICE_QUERIED = (
    rf"vfio_state_pending +{_DEVICE} stopcopy size \d+, precopy initial size (\d+), precopy dirty size (\d+), "
    r"request switchover ack (\d), exact (\d), final (\d)"
)
_LINES: list[tuple[re.Pattern[str], _Made]] = [
    (re.compile(pattern), made)
    for pattern, made in (
        (r"migrate_set_state new state (\S+)", Status),
        (r"runstate_set current_run_state \d+ \(\S+\) new_state \d+ \((\S+)\)", RunState),
        (r"migrate_transferred .* max_size (\d+)", lambda size: Threshold(int(size))),
        (r"migration_thread_low_pending (\d+)", lambda total: Decided(int(total))),
        (
            _QUERIED,
            lambda exact, final, *numbers: Queried(_kind(exact, final), *map(int, numbers)),
        ),
        (
            r"source_return_path_thread_switchover_acked switchover_ack_pending_num (\d+)",
            lambda pending: Acked(int(pending)),
        ),
        (rf"vfio_migration_set_device_state +{_DEVICE} state (\w+)", DeviceState),
        (
            rf"vfio_query_precopy_size +{_DEVICE} init (\d+), dirty (\d+), reinit (\d), ret (-?\d+)",
            lambda device, initial, dirty, reinit, result: Look(
                device, int(initial), int(dirty), reinit == "1", failed=result != "0"
            ),
        ),
        (rf"vfio_query_precopy_size_request_switchover_ack +{_DEVICE}", _Asks),
        (r"\S+: (\S+): Final precopy reinit check failed", _failed_last),
        (rf"vfio_save_block +{_DEVICE} data_size (\d+)", lambda device, count: Read(device, int(count))),
        (rf"vfio_save_block_precopy_empty_hit +{_DEVICE}", RanDry),
        (
            rf"vfio_save_iterate +{_DEVICE} precopy initial size (\d+)",
            lambda device, initial: Iterated(device, int(initial)),
        ),
        (rf"vfio_send_init_data_flag +{_DEVICE}", Marker),
        (
            _DEVICE_QUERIED,
            lambda device, initial, dirty, asks, exact, final: DeviceQueried(
                device, asks == "1", int(initial), int(dirty), _kind(exact, final)
            ),
        ),
    )
]
_TRACED = re.compile("|".join(SOURCE_TRACES))
_AT_AN_EVENT = re.compile(rf"(?=(?:{'|'.join(SOURCE_TRACES)}) )")
"""QEMU's threads write without waiting for each other: an event may begin in the line of another one."""


class UnknownTraceError(Exception):
    """A line of a traced event is not as this version of QEMU writes it: everything after it would be guesswork."""


def events_of(log: str) -> list[Event]:
    """All events of a source's log. Other lines, QEMU's words among them, are left out. Raises UnknownTraceError."""
    found: list[Event] = []
    for line in _AT_AN_EVENT.sub("\n", log).splitlines():
        event = _event(line.strip())
        if isinstance(event, _Asks):
            _note_asks(found, event)
        elif event is not None:
            found.append(event)
    return found


def _event(line: str) -> Event | _Asks | None:
    for pattern, made in _LINES:
        if match := pattern.match(line):
            return made(*match.groups())
    first = line.split(" ", 1)[0]
    if _TRACED.fullmatch(first):
        raise UnknownTraceError(line)
    return None


def _note_asks(events: list[Event], asks: _Asks) -> None:
    for place in range(len(events) - 1, -1, -1):
        event = events[place]
        if isinstance(event, Look) and (event.device, event.failed) == (asks.device, asks.failed):
            events[place] = replace(event, asks=True)
            return
    raise UnknownTraceError(f"a request of {asks.device} without a look")


def approvals_of(log: str) -> list[str]:
    """The devices whose markers a destination loaded, in order."""
    return re.findall(r"loadvm_approve_switchover(?:_legacy)? Approver (\S+?)(?:,|$)", log, re.MULTILINE)
