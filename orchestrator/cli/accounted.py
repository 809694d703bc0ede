"""PURE. Every word of an XML document accounted for: used, the same as here anyway, left out for a reason, or refused.

A table says what may stand where. What it does not know is refused by its path, so that nothing of a document is lost
in silence; a reader sees only what was known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from orchestrator.cli.plain_xml import Node
from orchestrator.core.text import quoted


class Fate(Enum):
    """What becomes of a value."""

    USED = "used"
    SAME = "same"
    """It says what is so here anyway."""
    LEFT_OUT = "left out"


@dataclass(frozen=True, slots=True)
class Value:
    """What an attribute or a text may be: the first pattern that fits decides."""

    choices: tuple[tuple[str, Fate, str], ...]
    """Pattern, fate, and the reason if it is left out."""
    otherwise: str = "cannot be kept"
    """Said of a value that none of them fits."""

    def fate(self, text: str) -> tuple[Fate, str] | None:
        """None: to be refused."""
        for pattern, fate, why in self.choices:
            if re.fullmatch(pattern, text, re.DOTALL):
                return fate, why
        return None


_ANY = ".*"


def used(pattern: str = _ANY, otherwise: str = "cannot be kept") -> Value:
    """A value that is read."""
    return Value(((pattern, Fate.USED, ""),), otherwise)


def same(pattern: str, otherwise: str = "cannot be kept") -> Value:
    """A value that says what is so here anyway."""
    return Value(((pattern, Fate.SAME, ""),), otherwise)


def left_out(why: str, pattern: str = _ANY, otherwise: str = "cannot be kept") -> Value:
    """A value that is left out for a reason."""
    return Value(((pattern, Fate.LEFT_OUT, why),), otherwise)


@dataclass(frozen=True, slots=True)
class Element:
    """What may stand in an element, and what becomes of it."""

    attributes: Mapping[str, Value] = field(default_factory=dict[str, Value])
    children: Mapping[str, Element] = field(default_factory=dict[str, "Element"])
    text: Value | None = None
    """None: there is none."""
    many: bool = False
    """It may stand there more than once."""
    why: str = ""
    """Left out with all that may stand in it, for this reason."""
    refused: str = ""
    """Known, and refused with this sentence."""
    free: bool = False
    """Of a left-out element: whatever is below it is not the document's own."""
    variant: Callable[[Node], Element | None] | None = None
    """What stands for this element where it looks so; None: this one."""


@dataclass(frozen=True, slots=True)
class Said:
    """Something to say of one place of a document."""

    path: str
    """Such as `/domain/devices/disk[2]/target/@bus`."""
    line: int
    text: str


@dataclass
class Account:
    """What became of a document."""

    kept: Node
    """What was known and is of use; nothing else is in it."""
    left_out: list[Said] = field(default_factory=list[Said])
    refused: list[Said] = field(default_factory=list[Said])
    unused: list[str] = field(default_factory=list[str])
    """Of `without`: what is not there, or needs no word."""


def account(top: Node, known: Element, without: Collection[str] = ()) -> Account:
    """Go through a document. `without`: paths that the operator does without; with or without the numbers in them."""
    return _Walk(without).through(top, known)


class _Walk:
    def __init__(self, without: Collection[str]) -> None:
        self._without = {path.rstrip("/") for path in without}
        self._met: set[str] = set()
        self._left_out: list[Said] = []
        self._refused: list[Said] = []

    def through(self, top: Node, known: Element) -> Account:
        path = f"/{top.tag}"
        kept = self._element(top, known, path, silent=False)
        unused = sorted(self._without - self._met)
        return Account(kept, self._left_out, self._refused, unused)

    def _done_without(self, path: str) -> bool:
        plain = re.sub(r"\[\d+\]", "", path)
        met = {path, plain} & self._without
        self._met |= met
        return bool(met)

    def _given_up(self, path: str, node: Node) -> bool:
        if not self._done_without(path):
            return False
        self._left_out.append(Said(path, node.line, "done without, as asked"))
        return True

    def _element(self, node: Node, known: Element, path: str, *, silent: bool) -> Node:
        """What is kept of it. `silent`: an element around it is left out, and its reason stands for this one."""
        kept = Node(node.tag, node.line, path=path)
        if known.why and not silent:
            self._left_out.append(Said(path, node.line, known.why))
        silent = silent or bool(known.why)
        if known.free:
            return kept
        for name, value in node.attributes.items():
            if self._value(value, known.attributes.get(name), f"{path}/@{name}", node, silent=silent):
                kept.attributes[name] = value
        if (node.text or known.text is not None) and self._value(
            node.text, known.text, f"{path}/text()", node, silent=silent
        ):
            kept.text = node.text
        self._children(node, known, path, kept, silent=silent)
        return kept

    def _value(self, value: str, known: Value | None, path: str, node: Node, *, silent: bool) -> bool:
        """Whether it is kept."""
        fate = known.fate(value) if known is not None else None
        if fate is None:
            if not self._given_up(path, node):
                said = f"is {quoted(value)}: {known.otherwise}" if known is not None else "is not known here"
                self._refused.append(Said(path, node.line, said))
            return False
        if fate[0] is Fate.LEFT_OUT and not silent:
            self._left_out.append(Said(path, node.line, fate[1]))
        return fate[0] is Fate.USED and not silent

    def _children(self, node: Node, known: Element, path: str, kept: Node, *, silent: bool) -> None:
        numbers: dict[str, int] = {}
        for child in node.children:
            numbers[child.tag] = number = numbers.get(child.tag, 0) + 1
            several = sum(each.tag == child.tag for each in node.children) > 1
            place = f"{path}/{child.tag}[{number}]" if several else f"{path}/{child.tag}"
            rule = known.children.get(child.tag)
            rule = (rule.variant(child) if rule is not None and rule.variant is not None else None) or rule
            if wrong := _wrong(rule, number):
                if not self._given_up(place, child):
                    self._refused.append(Said(place, child.line, wrong))
            elif rule is not None and not self._given_up(place, child):
                below = self._element(child, rule, place, silent=silent)
                if not silent and not rule.why:
                    kept.children.append(below)


def _wrong(rule: Element | None, number: int) -> str:
    if rule is None:
        return "is not known here"
    if rule.refused:
        return rule.refused
    return "stands there a second time" if number > 1 and not rule.many else ""


def by_reason(said: Sequence[Said]) -> dict[str, list[str]]:
    """Reason -> the places that it is said of, both in the document's order."""
    found: dict[str, list[str]] = {}
    for each in said:
        found.setdefault(each.text, []).append(each.path)
    return found
