"""Both ends of QEMU's accounting joined by a stream and a return path in memory: what tests say in a line or two."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from deploy.lab.devices.qemu_acks import (
    RETURN_PATH,
    SWITCHOVER_ACK,
    AckSetup,
    DeviceAccount,
    QemuDestination,
    QemuSource,
    Query,
)
from orchestrator.core.switchover import AckMode

ACK = frozenset({SWITCHOVER_ACK, RETURN_PATH})


def setup(mode: AckMode, *more: str) -> AckSetup:
    """An end that is set up for this mode as it should be."""
    capabilities = frozenset({RETURN_PATH, *more}) | (frozenset() if mode is AckMode.OFF else ACK)
    return AckSetup(capabilities, legacy=mode is AckMode.LEGACY)


def begun(
    *names: str, mode: AckMode = AckMode.PER_DEVICE, initial_bytes: int = 0, more: tuple[str, ...] = ()
) -> QemuSource:
    """A source in pre-copy whose devices have been looked at once, as QEMU does before its first query."""
    source = QemuSource(setup(mode, *more)).migrate(DeviceAccount(name) for name in names)
    for name in names:
        source = source.look(name, initial_bytes)
    return source


def served(source: QemuSource, *names: str) -> QemuSource:
    """Query, then all initial data and the marker of each device leave and are acknowledged."""
    source = source.query(Query.ESTIMATE)
    for name in names:
        source = source.read(name, source.device(name).initial_bytes).iterate(name).acked()
    return source


def stopped_for_switchover(source: QemuSource, *late: str, bytes: int = 4096) -> QemuSource:
    """The decision, the last look at each device (those in `late` say REINIT), and all of them quiesced."""
    source = source.switch_over()
    for each in source.devices:
        source = last_look(source, each.name, late=each.name in late, bytes=bytes)
    return source


def last_look(source: QemuSource, name: str, *, late: bool = False, bytes: int = 4096) -> QemuSource:
    if source.gets_last_look(name):
        source = source.look(name, bytes if late else source.device(name).initial_bytes, reinit=late)
    return source.quiesce(name)


class Pair:
    """Two ends; what the source sends reaches the destination when `deliver` says so, and so do the ACKs back."""

    def __init__(self, source: AckSetup, destination: AckSetup, *names: str, initial_bytes: int = 4096) -> None:
        self.source = QemuSource(source).migrate(DeviceAccount(name) for name in names)
        self.destination, at_once = QemuDestination(destination).begin(self.source.devices)
        self.markers: deque[str] = deque()
        self.acks = at_once
        for name in names:
            self.source = self.source.look(name, initial_bytes)

    def turn(self) -> None:
        """One iteration of the source: query, then each device sends all that it has."""
        self.source = self.source.query(Query.ESTIMATE)
        for name in [each.name for each in self.source.devices]:
            self.source = self.source.read(name, self.source.device(name).initial_bytes)
            if self.source.marks(name):
                self.markers.append(name)
            self.source = self.source.iterate(name)

    def load(self) -> None:
        """The destination loads everything that is on its way, the oldest first. Raises StreamRefused."""
        while self.markers:
            self.destination, acks = self.destination.approve(self.markers.popleft())
            self.acks += acks

    def deliver(self, count: int | None = None) -> None:
        """So many ACKs arrive, or all."""
        for _ in range(self.acks if count is None else count):
            self.source, self.acks = self.source.acked(), self.acks - 1


def lacking(source: QemuSource, name: str, feature: str) -> QemuSource:
    """The same source with a device that lacks `reinit` or `p2p`."""
    devices = tuple(replace(each, **{feature: False}) if each.name == name else each for each in source.devices)
    return replace(source, devices=devices)
