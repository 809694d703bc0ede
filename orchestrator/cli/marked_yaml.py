"""YAML with the line of every value, and without YAML's traps: doubled keys, self-references, exploding aliases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import yaml

MAX_NODES = 100_000
"""A file of some kilobytes can name billions of values by aliases of aliases."""

Path = tuple[str | int, ...]
"""Keys and indices from the top of the document."""


@dataclass
class Marked:
    """A value of plain Python, and the line (from 1) of each of its parts by path."""

    value: Any
    lines: dict[Path, int] = field(default_factory=dict[Path, int])
    wrong: list[tuple[Path, int, str]] = field(default_factory=list[tuple[Path, int, str]])
    """What cannot be read as it stands there, with its line; the rest could be."""

    def line(self, path: Path) -> int:
        """Of this part, else of the nearest part around it; 0 for a document that is empty."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 0)

    def part(self, path: Path) -> Marked:
        """One part as a value of its own. The path must exist."""
        value = self.value
        for step in path:
            value = value[step]
        depth = len(path)
        lines = {place[depth:]: line for place, line in self.lines.items() if place[:depth] == path}
        return Marked(value, lines)


class YamlError(Exception):
    """Not YAML. `line` is 0 when it cannot be told."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


def parse(text: str) -> Marked:
    """The one document of a text. Raises YamlError when it is not YAML, or more than one document."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            return _Reader(loader).document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(filter(None, (error.context, error.problem)))
        raise YamlError(f"not YAML: {said or error}", mark.line + 1 if mark else 0) from None
    except (yaml.YAMLError, ValueError) as error:
        raise YamlError(f"not YAML: {' '.join(str(error).split())}") from None


class _Reader:
    """Turns nodes into values, noting where each stood."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self._loader = loader
        self._result = Marked(None)
        self._inside: set[int] = set()
        self._left = MAX_NODES

    def document(self, node: yaml.Node | None) -> Marked:
        if node is not None:
            self._result.value = self._read(node, ())
        return self._result

    def _read(self, node: yaml.Node, path: Path) -> Any:
        line = node.start_mark.line + 1
        self._left -= 1
        if self._left < 0:
            raise YamlError(f"more than {MAX_NODES} values: is an alias used in an alias?", line)
        if id(node) in self._inside:
            raise YamlError("a value that contains itself", line)
        self._result.lines.setdefault(path, line)
        self._inside.add(id(node))
        try:
            match node:
                case yaml.MappingNode():
                    return self._mapping(node, path)
                case yaml.SequenceNode():
                    return [self._read(item, (*path, index)) for index, item in enumerate(node.value)]
                case _:
                    return self._scalar(node, path)
        finally:
            self._inside.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        pairs = cast("list[tuple[yaml.Node, yaml.Node]]", node.value)
        for key_node, value_node in pairs:
            key = self._key(key_node, path)
            if key is None:
                continue
            place = (*path, key)
            if key in result:
                self._complain(place, key_node, f"stands here twice (first in line {self._result.lines[place]})")
                continue
            self._result.lines[place] = key_node.start_mark.line + 1
            result[key] = self._read(value_node, place)
        return result

    def _key(self, node: yaml.Node, path: Path) -> str | None:
        if node.tag == "tag:yaml.org,2002:merge":
            self._complain(path, node, "merge keys (<<) are not read here: use defaults")
            return None
        if not isinstance(node, yaml.ScalarNode):
            self._complain(path, node, "a key must be a word")
            return None
        return cast(str, node.value)

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        loader = cast(Any, self._loader)
        try:
            return loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            self._complain(path, node, " ".join(str(getattr(error, "problem", None) or error).split()))
            return None

    def _complain(self, path: Path, node: yaml.Node, message: str) -> None:
        self._result.wrong.append((path, node.start_mark.line + 1, message))
