"""The history file: what the ledger no longer holds, one JSON object per line, oldest first.

The leader writes what it is about to remove, and removes it once the lines are on the disk; a line may be there twice
after a crash between the two. The file is rotated (`history.jsonl`, `history.jsonl.1`, ...) and so never outgrows
`max_bytes` x `files`; the oldest file is dropped. Anything that reads lines can read it, also while it is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LINE = 4_000_000
"""Bytes; a migration of the most attempts takes about a megabyte."""


@dataclass(frozen=True, slots=True)
class HistoryConfig:
    """`history` in the configuration of coordinator and API. The API reads the files of the coordinators on its host,
    or of a file system that they share."""

    path: str = ""
    """Empty: what is removed is gone."""
    max_bytes: int = 64_000_000
    """A file that is larger is rotated."""
    files: int = 8
    """So many are kept, the current one among them."""

    def problems(self) -> list[str]:
        """What is wrong with it; empty: nothing."""
        found: list[str] = []
        if self.path and not Path(self.path).is_absolute():
            found.append(f"history.path is {self.path!r}: give an absolute path")
        if self.max_bytes < 1_000_000:
            found.append(f"history.max_bytes is {self.max_bytes}: give at least 1000000")
        if not 1 <= self.files <= 1000:
            found.append(f"history.files is {self.files}: give 1 to 1000")
        return found


@dataclass(frozen=True, slots=True)
class Entry:
    """Something that was removed, as it stood in the ledger."""

    kind: str
    """`migrations`, `evacuations`, `guests`."""
    name: str
    nodes: Mapping[str, Any]
    """Content of its nodes by name; "" is the node itself. What was no JSON stands there as text."""
    order: int = 0
    """zxid of its creation."""

    def line(self) -> bytes:
        """With its line break."""
        data = {"kind": self.kind, "name": self.name, "order": self.order, "nodes": self.nodes}
        return json.dumps(data, separators=(",", ":"), sort_keys=True).encode() + b"\n"

    def content(self, node: str) -> bytes | None:
        """What a node of it held; None: there was none."""
        found = self.nodes.get(node)
        return None if found is None else json.dumps(found).encode()


def entry(kind: str, name: str, nodes: Mapping[str, bytes], order: int) -> Entry:
    """From the bytes of its nodes."""

    def tree(data: bytes) -> Any:
        try:
            return json.loads(data) if data else None
        except ValueError:
            return data.decode(errors="replace")

    return Entry(kind, name, {node: tree(data) for node, data in nodes.items()}, order)


class HistoryFile:
    """Blocking: call it in a thread."""

    def __init__(self, config: HistoryConfig) -> None:
        self._path = Path(config.path)
        self._max_bytes = config.max_bytes
        self._files = config.files

    def append(self, entries: Iterable[Entry]) -> None:
        """Returns when they are on the disk. Raises OSError; some of them may be written then."""
        lines = b"".join(one.line() for one in entries)
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._path.exists() and self._path.stat().st_size + len(lines) > self._max_bytes:
            self._rotate()
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                lines = b"\n" + lines  # a line that a full disk cut off stays alone
            view = memoryview(lines)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _rotate(self) -> None:
        for number in range(self._files - 1, 0, -1):
            older = self._numbered(number)
            newer = self._numbered(number - 1)
            if newer.exists():
                newer.replace(older)
        if self._files == 1:
            self._path.unlink(missing_ok=True)

    def _numbered(self, number: int) -> Path:
        return self._path if number == 0 else self._path.with_name(f"{self._path.name}.{number}")

    def entries(self) -> Iterator[Entry]:
        """All there are, oldest first. Lines that cannot be read are left out. Raises OSError."""
        yield from self._matching(b"")

    def find(self, kind: str, name: str) -> Entry | None:
        """The newest of that name. Raises OSError."""
        found: Entry | None = None
        for one in self._matching(json.dumps(name).encode()):
            if (one.kind, one.name) == (kind, name):
                found = one
        return found

    def names(self, kind: str, prefix: str) -> list[str]:
        """Names that begin with `prefix`, the oldest first. Raises OSError."""
        found = (one.name for one in self._matching(f'"name":"{prefix}'.encode()) if one.kind == kind)
        return list(dict.fromkeys(name for name in found if name.startswith(prefix)))

    def _matching(self, needle: bytes) -> Iterator[Entry]:
        for number in range(self._files - 1, -1, -1):
            try:
                file = self._numbered(number).open("rb")
            except FileNotFoundError:
                continue
            with file:
                while line := file.readline(MAX_LINE):
                    if needle in line and (read := _read(line)) is not None:
                        yield read


def _read(line: bytes) -> Entry | None:
    try:
        data = json.loads(line)
        return Entry(str(data["kind"]), str(data["name"]), dict(data["nodes"]), int(data.get("order", 0)))
    except (ValueError, TypeError, KeyError):
        return None
