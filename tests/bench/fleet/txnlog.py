"""ZooKeeper's own log of transactions: what each quorum write was for, read from the files of a server of the bench."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FILE_HEADER = 16
_RECORD = struct.Struct(">qi")
_HEADER = struct.Struct(">qiqqi")
_NAMES = {1: "create", 2: "delete", 5: "set", 13: "check", 15: "create", 19: "create", 20: "delete"}
_SESSIONS = {-10: "session begins", -11: "session ends"}
_MULTI, _ERROR = 14, -1
_ID = re.compile(
    r"[0-9a-f-]{32,36}|(?<=/)[0-9a-f]{12}|(?<=/)[0-9a-f]{2}$|(?<=/)(?:host|boot)-[^/]+|(?<=/)[0-9a-f]{2}(?=/)|(?<=/names/)[^/]+"
)


@dataclass(frozen=True, slots=True)
class Write:
    zxid: int
    parts: tuple[tuple[str, str], ...]
    """Operation and path, of each part."""
    what: str = ""
    """Of one without parts."""
    refused: bool = False
    """An operation of it conflicted, so nothing of it was applied; it went through the quorum all the same."""

    @property
    def kind(self) -> str:
        """What it moved, or was to move, without ids; barriers and checks are left out where there is anything else.
        Of one that was refused ZooKeeper writes down what stands before the operation that conflicted."""
        moved = [(op, shape_of(path)) for op, path in self.parts if op != "check" and "/barrier" not in path]
        if moved:
            said = ", ".join(dict.fromkeys(f"{op} {shape}" for op, shape in moved))
            return f"refused: {said}" if self.refused else said
        if self.refused:
            return "refused"
        return "barrier alone" if self.parts else self.what


def shape_of(path: str) -> str:
    """The path with ids and names left out."""
    return _ID.sub("*", path.removeprefix("/drover/v1"))


def kinds_since(data: Path, zxid: int) -> Counter[str]:
    """How many transactions after `zxid` were of which kind."""
    return Counter(write.kind for write in _writes(data) if write.zxid & 0xFFFFFFFF > zxid)


def _writes(data: Path) -> Iterator[Write]:
    for path in sorted((data / "version-2").glob("log.*"), key=lambda path: int(path.suffix[1:], 16)):
        content = path.read_bytes()
        at = _FILE_HEADER
        while at + _RECORD.size <= len(content):
            _, length = _RECORD.unpack_from(content, at)
            if length <= 0:
                break  # room that was made in advance
            yield _write(content[at + _RECORD.size : at + _RECORD.size + length])
            at += _RECORD.size + length + 1


def _write(record: bytes) -> Write:
    *_, zxid, _, kind = _HEADER.unpack_from(record)
    body = record[_HEADER.size :]
    if kind == _MULTI:
        parts = tuple(_parts(body))
        return Write(zxid, tuple(part for part in parts if part[0]), refused=any(not op for op, _ in parts))
    if kind in _NAMES:
        return Write(zxid, ((_NAMES[kind], _path(body)),))
    return Write(zxid, (), _SESSIONS.get(kind, "refused" if kind == _ERROR else f"of type {kind}"))


def _parts(body: bytes) -> Iterator[tuple[str, str]]:
    (count,) = struct.unpack_from(">i", body)
    at = 4
    for _ in range(count):
        kind, length = struct.unpack_from(">ii", body, at)
        if kind in _NAMES:
            yield _NAMES[kind], _path(body[at + 8 :])
        elif kind == _ERROR:
            yield "", ""
        at += 8 + length


def _path(body: bytes) -> str:
    (length,) = struct.unpack_from(">i", body)
    return body[4 : 4 + length].decode(errors="replace")
