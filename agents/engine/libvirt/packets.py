"""PURE. What a relay between libvirt's client and its daemon lets pass: known calls, in their order, and no others.

libvirt's own client library makes every message and reads every answer. Of what goes by, only the header of the
framing is read (length, program, version, procedure, type, serial, status), and of a Finish whether it cancels. What is
not known does not pass: a libvirt that migrated by other calls would be refused here, and the guest would stay.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum, IntEnum

LENGTH_BYTES = 4
MAX_PACKET_BYTES = 36 << 20
"""A little more than libvirt itself takes."""

_HEADER = struct.Struct(">IIIIII")
_REMOTE, _KEEPALIVE = 0x20008086, 0x6B656570


class PacketError(ValueError):
    """What came is no packet of libvirt's protocol."""


class Kind(IntEnum):
    """`type` in the header."""

    CALL = 0
    REPLY = 1


class Procedure(IntEnum):
    """Calls of libvirt's remote protocol that a migration consists of. Numbers once given are never given again."""

    OPEN = 1
    CLOSE = 2
    GET_XML_DESC = 14
    LOOKUP_BY_NAME = 23
    LOOKUP_BY_UUID = 24
    SUPPORTS_FEATURE = 60
    AUTH_LIST = 66
    GET_STATE = 212
    BEGIN = 302
    PREPARE = 303
    PERFORM = 305
    FINISH = 306
    CONFIRM = 307


class Verdict(Enum):
    """What becomes of a call."""

    PASS = "pass"
    KEEP = "keep"
    """It waits for a word of ours."""
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Packet:
    """One message, whole: `data` begins with its length."""

    data: bytes
    procedure: int
    """0: none of the remote protocol's, such as a sign of life."""
    kind: int
    ok: bool
    """A reply without an error."""

    @property
    def cancels(self) -> bool:
        """Of a Finish or a Confirm: the migration has failed. It is the last word of both."""
        return self.data[-4:] != bytes(4)


def length_of(prefix: bytes) -> int:
    """How many bytes follow the length. Raises PacketError."""
    (length,) = struct.unpack(">I", prefix)
    if not LENGTH_BYTES + _HEADER.size <= length <= MAX_PACKET_BYTES:
        raise PacketError(f"a packet of {length} bytes")
    return length - LENGTH_BYTES


def packet_of(data: bytes) -> Packet:
    """`data`: with its length. Raises PacketError."""
    if len(data) < LENGTH_BYTES + _HEADER.size:
        raise PacketError(f"a packet of {len(data)} bytes")
    program, _, procedure, kind, _, status = _HEADER.unpack_from(data, LENGTH_BYTES)
    if program == _KEEPALIVE:
        return Packet(data, 0, kind, ok=True)
    if program != _REMOTE:
        raise PacketError(f"program {program:#x} has no part in a migration")
    return Packet(data, procedure, kind, ok=status == 0)


_ASKING = frozenset(
    {
        Procedure.OPEN,
        Procedure.CLOSE,
        Procedure.AUTH_LIST,
        Procedure.SUPPORTS_FEATURE,
        Procedure.LOOKUP_BY_NAME,
        Procedure.LOOKUP_BY_UUID,
        Procedure.GET_XML_DESC,
        Procedure.GET_STATE,
    }
)


def at_source(packet: Packet) -> Verdict:
    """Calls to the source's daemon. A Confirm ends the source, or lets it run: that is said by the ledger, so none ever
    passes."""
    if packet.procedure in (Procedure.PERFORM, Procedure.CONFIRM):
        return Verdict.KEEP
    known = packet.procedure == 0 or packet.procedure in _ASKING or packet.procedure == Procedure.BEGIN
    return Verdict.PASS if known else Verdict.REFUSE


def at_destination(packet: Packet) -> Verdict:
    """Calls to the destination's daemon. A Finish that does not cancel makes the copy independent of its migration, and
    waits for COMMIT; one that cancels is as good as the end of the connection."""
    if packet.procedure == Procedure.FINISH:
        return Verdict.REFUSE if packet.cancels else Verdict.KEEP
    known = packet.procedure == 0 or packet.procedure == Procedure.PREPARE
    known = known or packet.procedure in _ASKING - {Procedure.GET_XML_DESC}
    return Verdict.PASS if known else Verdict.REFUSE
