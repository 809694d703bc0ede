"""PURE. VFIO's ioctls as bytes (<linux/vfio.h>): what is asked, and the same structure filled in.

Every structure begins with its size and flags. Numbers are in the machine's byte order.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from deploy.lab.devices.device import DeviceError, DeviceState, PrecopyInfo
from deploy.lab.devices.vfio import layout


class Ioctl(IntEnum):
    """Numbers after VFIO_BASE of the calls that QEMU makes, in <linux/vfio.h> with VFIO_ or VFIO_DEVICE_ before
    them."""

    GET_INFO = 107
    GET_REGION_INFO = 108
    GET_IRQ_INFO = 109
    SET_IRQS = 110
    RESET = 111
    FEATURE = 117
    BIND_IOMMUFD = 118
    ATTACH_PAGE_TABLE = 119
    DETACH_PAGE_TABLE = 120
    GET_PRECOPY_INFO = 121
    """On a data session."""


class FeatureNumber(IntEnum):
    """VFIO_DEVICE_FEATURE_*: those that concern migration."""

    MIGRATION = 1
    DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    DATA_SIZE = 9
    PRECOPY_INFO_V2 = 12


class Operation(IntFlag):
    """Flags of a VFIO_DEVICE_FEATURE call; PROBE with GET or SET only asks whether that would be taken."""

    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18


class MigrationFlag(IntFlag):
    """VFIO_MIGRATION_*: which states the device has, as the feature MIGRATION answers it."""

    STOP_COPY = 1
    P2P = 2
    PRE_COPY = 4


@dataclass(frozen=True, slots=True)
class FeatureCall:
    """Which feature a VFIO_DEVICE_FEATURE call is about, and what it wants of it."""

    number: int
    operation: Operation


_RESET, _PCI, _REGIONS, _IRQS = 1, 2, 9, 5
_BAR0, _CONFIG = 0, 7
_READABLE, _WRITABLE = 1, 2
_EVENTFD = 1
_REINIT = 1


def _unpacked(form: str, argument: bytes, offset: int) -> int:
    try:
        return struct.unpack_from(form, argument, offset)[0]
    except struct.error:
        raise DeviceError(errno.EINVAL, "the argument is too short") from None


def _packed(argument: bytes, offset: int, form: str, *values: int) -> bytes:
    made = bytearray(argument)
    try:
        struct.pack_into(form, made, offset, *values)
    except struct.error:
        raise DeviceError(errno.EINVAL, "the argument is too short") from None
    return bytes(made)


def device_info(argument: bytes) -> bytes:
    """GET_INFO filled in: a PCI device that can be reset."""
    return _packed(argument, 4, "=III", _RESET | _PCI, _REGIONS, _IRQS)


def region_info(argument: bytes) -> bytes:
    """The BAR and the configuration space; every other region is empty."""
    sizes = {_BAR0: (layout.BAR_BYTES, 0), _CONFIG: (256, layout.CONFIG_OFFSET)}
    size, offset = sizes.get(_unpacked("=I", argument, 8), (0, 0))
    filled = _packed(argument, 4, "=I", _READABLE | _WRITABLE if size else 0)
    return _packed(filled, 12, "=IQQ", 0, size, offset)


def irq_info(argument: bytes) -> bytes:
    """No interrupt of any kind."""
    return _packed(_packed(argument, 4, "=I", _EVENTFD), 12, "=I", 0)


def bound(argument: bytes) -> bytes:
    """BIND_IOMMUFD filled in: bound, under the device id 1."""
    return _packed(argument, 12, "=I", 1)


def feature_call(argument: bytes) -> FeatureCall:
    """Takes the call's argument apart. Raises DeviceError(EINVAL) when it is too short."""
    flags = _unpacked("=I", argument, 4)
    return FeatureCall(flags & 0xFFFF, Operation(flags & (Operation.GET | Operation.SET | Operation.PROBE)))


def migration_flags(argument: bytes, flags: MigrationFlag) -> bytes:
    """The feature MIGRATION filled in: which states the device has."""
    return _packed(argument, 8, "=Q", flags)


def wanted_state(argument: bytes) -> DeviceState:
    """The state that SET of DEVICE_STATE asks for. Raises DeviceError(EINVAL) when there is no such state."""
    number = _unpacked("=I", argument, 8)
    try:
        return DeviceState(number)
    except ValueError:
        raise DeviceError(errno.EINVAL, f"there is no state {number}") from None


def device_state(argument: bytes, state: DeviceState) -> bytes:
    """With no data session; the preload puts one in where the answer opens it."""
    return _packed(argument, 8, "=Ii", state, -1)


def data_size(argument: bytes, size: int) -> bytes:
    """The feature DATA_SIZE filled in: bytes that stop-copy would carry now."""
    return _packed(argument, 8, "=Q", size)


def precopy_info(argument: bytes, info: PrecopyInfo) -> bytes:
    """GET_PRECOPY_INFO filled in: initial and dirty bytes left, and whether the initial data began anew (REINIT)."""
    return _packed(argument, 4, "=IQQ", _REINIT if info.reinit else 0, info.initial_bytes, info.dirty_bytes)
