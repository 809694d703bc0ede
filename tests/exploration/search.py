"""The search through everything that can happen in the world within bounds: what is wrong, and what never ends.

It is breadth first, so a counter-example is a shortest one. From every state that was reached, healing steps alone must
lead to an end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.exploration.keepers import recovery_moves
from tests.exploration.moves import (
    coordinator_moves,
    disk_moves,
    engine_moves,
    fault_moves,
    message_moves,
    time_moves,
    wish_moves,
)
from tests.exploration.sessions import run_destination, run_source
from tests.exploration.verdict import flaw, is_end
from tests.exploration.world import Bounds, Move, Strictness, World, memory, start


@dataclass
class Result:
    states: int
    edges: int
    flaws: dict[str, list[str]]
    """Flaw and the shortest way to it."""
    dead_ends: list[list[str]]
    complete: bool


def successors(world: World, bounds: Bounds) -> Iterator[Move]:
    if world.source is not None and world.todo_source:
        yield from run_source(world, bounds)
    if world.destination is not None and world.todo_destination:
        yield from run_destination(world, bounds)
    yield from engine_moves(world)
    yield from coordinator_moves(world, bounds)
    yield from message_moves(world)
    yield from wish_moves(world)
    yield from disk_moves(world)
    yield from time_moves(world, bounds)
    yield from fault_moves(world, bounds)
    yield from recovery_moves(world)


class Parts:
    """One of each record, session and queue that the states of a search consist of."""

    def __init__(self) -> None:
        self._one_of: dict[object, object] = {}
        self._known: set[int] = set()

    def of(self, world: World) -> World:
        """The same state, of the parts that are known."""
        changed: dict[str, object] = {}
        for name in ("record", "source", "todo_source", "destination", "todo_destination"):
            part = getattr(world, name)
            if id(part) not in self._known:
                one = self._one_of.setdefault(part, part)
                if one is part:
                    self._known.add(id(part))
                else:
                    changed[name] = one
        return world._replace(**changed) if changed else world

    @staticmethod
    def key(world: World) -> tuple[object, ...]:
        """Equal for equal states that consist of known parts."""
        record, req, source, todo_source, destination, todo_destination, *rest = world
        return (id(record), id(source), id(todo_source), id(destination), id(todo_destination), req, *rest)


def explore(bounds: Bounds, *, first: bool = False, strict: bool = True, limit: int = 2_000_000) -> Result:
    """Breadth first over everything within `bounds`; `first` stops at the first flaw.

    `strict`: an event that a stage does not take is a flaw; else it is dropped, as in production.

    States are numbered as they are found. Hashing what a state consists of is what costs, so there is one of each
    record, session and queue, known by its identity from then on.
    """
    memory.clear()
    Strictness.on = strict
    parts = Parts()
    worlds = [parts.of(start(bounds))]
    numbers = {parts.key(worlds[0]): 0}
    came: list[tuple[int, str]] = [(-1, "")]
    backwards: list[list[int]] = [[]]
    edges = number = 0
    flaws: dict[str, int] = {}
    while number < len(worlds) < limit and not (first and flaws):
        world = worlds[number]
        moves = successors(world, bounds) if not flaw(world) else iter(())
        for name, heal, after in moves:
            if after is world:
                continue
            after = parts.of(after)
            reached = numbers.setdefault(parts.key(after), len(worlds))
            if reached == number:
                continue
            edges += 1
            if reached == len(worlds):
                worlds.append(after)
                came.append((number, name))
                backwards.append([])
                found = flaw(after)
                if found:
                    flaws.setdefault(found, reached)
            if heal:
                backwards[reached].append(number)
        number += 1
    dead = [] if first and flaws else _dead_ends(worlds, backwards)
    paths = {found: _path(came, world) for found, world in flaws.items()}
    return Result(len(worlds), edges, paths, [_path(came, world) for world in dead[:3]], number == len(worlds))


def follow(bounds: Bounds, *names: str) -> World:
    """The world after the steps of these names. Raises StopIteration where one of them cannot be taken."""
    memory.clear()
    Strictness.on = True
    world = start(bounds)
    for wanted in names:
        world = next(after for name, _, after in successors(world, bounds) if name == wanted)
    return world


def _dead_ends(worlds: list[World], backwards: list[list[int]]) -> list[int]:
    """States from which healing steps alone lead to no end; one with a flaw has been reported as that."""
    live = [is_end(world) or bool(flaw(world)) for world in worlds]
    stack = [number for number, lives in enumerate(live) if lives]
    while stack:
        for before in backwards[stack.pop()]:
            if not live[before]:
                live[before] = True
                stack.append(before)
    return [number for number, lives in enumerate(live) if not lives]


def _path(came: list[tuple[int, str]], number: int) -> list[str]:
    names: list[str] = []
    while number > 0:
        number, name = came[number]
        names.append(name)
    return names[::-1]
