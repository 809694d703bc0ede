"""The search through everything that can happen in the world within bounds: what is wrong, and what never ends.

It is breadth first, so a counter-example is a shortest one. From every state that was reached, healing steps alone must
lead to an end.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.exploration.world import Bounds, Strictness, World, flaw, is_end, start, steps, successors


@dataclass
class Result:
    states: int
    edges: int
    flaws: dict[str, list[str]]
    """Flaw and the shortest way to it."""
    dead_ends: list[list[str]]
    complete: bool


def explore(bounds: Bounds, *, first: bool = False, strict: bool = True, limit: int = 2_000_000) -> Result:
    """Breadth first over everything within `bounds`; `first` stops at the first flaw.

    `strict`: an event that a stage does not take is a flaw; else it is dropped, as in production.

    States are numbered as they are found: hashing one is what costs, so it is done once for each edge.
    """
    steps.clear()
    Strictness.on = strict
    worlds = [start(bounds)]
    numbers = {worlds[0]: 0}
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
            reached = numbers.setdefault(after, len(worlds))
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
    steps.clear()
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
