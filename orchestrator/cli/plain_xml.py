"""PURE. XML as plain nodes with their lines, and without XML's traps: no document types, so no entities, and bounds on
size, depth and number. Comments and processing instructions are no part of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.parsers import expat

MAX_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 32
_IN_NAMESPACE = "}"


class XmlError(Exception):
    """Not XML, or not XML that is read here. `line` is 0 when it cannot be told."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


@dataclass
class Node:
    """One element. A name in a namespace is written `{uri}name`."""

    tag: str
    line: int
    attributes: dict[str, str] = field(default_factory=dict[str, str])
    children: list[Node] = field(default_factory=list["Node"])
    text: str = ""
    """All text directly in it, without the blanks around it."""
    path: str = ""
    """Where it stood, once somebody went through its document."""

    def child(self, *tags: str) -> Node | None:
        """The first child of this name, its first child of the next name, and so on."""
        found: Node | None = self
        for tag in tags:
            found = next((each for each in found.children if each.tag == tag), None) if found is not None else None
        return found

    def all(self, tag: str) -> list[Node]:
        """Children of this name."""
        return [each for each in self.children if each.tag == tag]

    def get(self, name: str, default: str = "") -> str:
        """An attribute."""
        return self.attributes.get(name, default)


def parse(data: bytes) -> Node:
    """The document's element. Raises XmlError."""
    if len(data) > MAX_BYTES:
        raise XmlError(f"has more than {MAX_BYTES} bytes")
    return _Reader().read(data)


class _Reader:
    def __init__(self) -> None:
        self._parser = expat.ParserCreate(namespace_separator=_IN_NAMESPACE)
        self._parser.buffer_text = True
        self._parser.StartDoctypeDeclHandler = self._doctype
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._words
        self._open: list[Node] = []
        self._texts: list[list[str]] = []
        self._top: Node | None = None
        self._nodes = 0

    def read(self, data: bytes) -> Node:
        try:
            self._parser.Parse(data, True)
        except expat.ExpatError as error:
            raise XmlError(f"not XML: {expat.ErrorString(error.code)}", error.lineno) from None
        except (LookupError, ValueError) as error:
            raise XmlError(f"not XML: {error}") from None
        if self._top is None:
            raise XmlError("there is no element in it")
        return self._top

    def _doctype(self, *_: object) -> None:
        raise XmlError("has a document type (<!DOCTYPE ...>), which is not read", self._parser.CurrentLineNumber)

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        line = self._parser.CurrentLineNumber
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise XmlError(f"has more than {MAX_NODES} elements", line)
        if len(self._open) >= MAX_DEPTH:
            raise XmlError(f"has elements more than {MAX_DEPTH} deep", line)
        node = Node(_name(name), line, {_name(key): value for key, value in attributes.items()})
        if self._open:
            self._open[-1].children.append(node)
        else:
            self._top = node
        self._open.append(node)
        self._texts.append([])

    def _end(self, _: str) -> None:
        self._open.pop().text = "".join(self._texts.pop()).strip()

    def _words(self, words: str) -> None:
        self._texts[-1].append(words)


def _name(name: str) -> str:
    return "{" + name if _IN_NAMESPACE in name else name
