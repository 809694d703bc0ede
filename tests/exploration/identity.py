"""Two agents that claim one host's name: everything that can happen to their machines, sessions and disks, in bounds.

`orchestrator.core.identity.may_take` decides, as in production; what is in the world is what registration.py does with
its answer: it reads, then writes in one transaction guarded by what it read, with anything in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

from orchestrator.core import identity
from orchestrator.core.identity import AgentIdentity, Answer, Place, PlaceSeen


class Kind(StrEnum):
    """What the second agent is to the first."""

    COPIED = "copied"
    """Its configuration was copied to another host."""
    CLONED = "cloned"
    """Its disk was copied to another machine, at any time."""
    TWIN = "twin"
    """Its disk was copied before the last registration, to a machine with the same hardware number."""
    FRESH_TWIN = "fresh_twin"
    """The same at any time. Sound only while the first agent keeps its session: a limit (docs/adr/0013)."""
    BESIDE = "beside"
    """Its directory was copied, and is used on the same machine."""
    APART = "apart"
    """The same, with a volatile directory of its own."""


@dataclass(frozen=True)
class Bounds:
    kind: Kind
    cycles: int = 2
    """Losses of power."""
    deaths: int = 1
    """Of agents alone."""
    cuts: int = 1
    """Of an agent from the ledger, long enough for its session to lapse."""
    declared: int = 0
    """Certificates by an operator, all true (A4)."""
    moves: int = 0
    """Of the first agent's directory to another file system, while no agent uses it."""


class Machine(NamedTuple):
    number: str
    boot: int = 0
    on: bool = True


class Agent(NamedTuple):
    machine: int
    installation: str
    lock: str
    markers: str = "v0"
    claims: tuple[int, ...] = ()
    """As noted on its disk."""
    process: int = 0
    """0: none is alive."""
    linked: bool = True
    read: tuple[Answer, AgentIdentity, AgentIdentity | None] | None = None
    """What it decided, on which record and which session."""


class World(NamedTuple):
    machines: tuple[Machine, ...]
    agents: tuple[Agent, ...]
    record: AgentIdentity
    live: AgentIdentity | None
    fence: frozenset[str]
    cloned: bool
    left: Bounds
    flaw: str = ""


def start(bounds: Bounds) -> World:
    """The first agent is registered and serves; the second one's is not started yet."""
    twin = bounds.kind in (Kind.TWIN, Kind.FRESH_TWIN)
    beside = bounds.kind in (Kind.BESIDE, Kind.APART)
    machines = (Machine("m0"), Machine("m0" if twin else "m1", boot=100))
    first = Agent(0, "first", "lock0", claims=(1, 2), process=3)
    second = Agent(0 if beside else 1, "second", "lock1", "v1" if bounds.kind is Kind.APART else "v0")
    if bounds.kind is Kind.TWIN:
        second = second._replace(installation="first", claims=(1,))
    registered = AgentIdentity("first", "m0", "b0", "p3", "lock0", "2", markers="v0")
    cloned = bounds.kind in (Kind.COPIED, Kind.TWIN)
    return World(machines, (first, second), registered, registered, frozenset(), cloned, bounds)


def me(world: World, number: int) -> AgentIdentity:
    agent = world.agents[number]
    machine = world.machines[agent.machine]
    boot, process = f"b{machine.boot}", f"p{agent.process}"
    return AgentIdentity(agent.installation, machine.number, boot, process, agent.lock, markers=agent.markers)


def holder_gone(world: World, number: int) -> bool:
    """What the kernel of this agent's machine says of the process that is registered; of no other machine's."""
    here = world.agents[number].machine
    alive = {f"p{each.process}" for each in world.agents if each.process and each.machine == here}
    mine = me(world, number)
    same_kernel = (world.record.machine, world.record.boot_id) == (mine.machine, mine.boot_id)
    return same_kernel and world.record.agent not in alive


def _fresh(used: set[str], letter: str) -> int:
    """The smallest number that nothing in the world refers to any more, so that states do not differ by names alone."""
    return next(number for number in range(1, len(used) + 2) if f"{letter}{number}" not in used)


def _new_process(world: World) -> int:
    seen = [world.record, world.live, *(each for agent in world.agents if agent.read for each in agent.read[1:])]
    return _fresh({f"p{a.process}" for a in world.agents} | {each.agent for each in seen if each}, "p")


def _new_claim(world: World) -> int:
    seen = [world.record, world.live, *(each for agent in world.agents if agent.read for each in agent.read[1:])]
    noted = {str(claim) for agent in world.agents for claim in agent.claims}
    return _fresh(noted | {each.claim for each in seen if each}, "")


def _with(world: World, number: int, **changes: Any) -> World:
    agents = list(world.agents)
    agents[number] = agents[number]._replace(**changes)
    return world._replace(agents=tuple(agents))


def _spend(world: World, what: str) -> World:
    left = Bounds(**{**world.left.__dict__, what: getattr(world.left, what) - 1})
    return world._replace(left=left)


Move = tuple[str, bool, World]


def successors(world: World) -> Iterator[Move]:
    """Name, whether it heals (so that progress may count on it), and what follows."""
    for number in range(len(world.machines)):
        yield from _power(world, number)
    for number in range(len(world.agents)):
        yield from _agent(world, number)
    yield from _ledger(world)
    if not world.cloned:
        first = world.agents[0]
        copied = _with(world, 1, installation=first.installation, claims=first.claims)
        yield "clone", False, copied._replace(cloned=True)


def _power(world: World, number: int) -> Iterator[Move]:
    machine, machines = world.machines[number], list(world.machines)
    if machine.on and world.left.cycles:
        machines[number] = machine._replace(on=False)
        off = _spend(world, "cycles")._replace(machines=tuple(machines))
        for each, agent in enumerate(world.agents):
            if agent.machine == number:
                off = _with(off, each, process=0, read=None)
        yield f"power off {number}", False, off
    if not machine.on:
        machines[number] = machine._replace(on=True, boot=machine.boot + 1)
        yield f"power on {number}", True, world._replace(machines=tuple(machines))


def _agent(world: World, number: int) -> Iterator[Move]:
    agent = world.agents[number]
    if not agent.process:
        if world.machines[agent.machine].on and (number == 0 or world.cloned):
            yield f"start {number}", number == 0, _with(world, number, process=_new_process(world))
        if number == 0 and world.left.moves:
            yield "move 0", False, _spend(_with(world, 0, lock="lock2"), "moves")
        return
    if world.left.deaths:
        yield f"kill {number}", False, _spend(_with(world, number, process=0, read=None), "deaths")
    if agent.linked and world.left.cuts:
        yield f"cut {number}", False, _spend(_with(world, number, linked=False), "cuts")
    if not agent.linked:
        yield f"heal {number}", True, _with(world, number, linked=True)
    elif world.record.agent == f"p{agent.process}":
        if world.live is None:
            yield f"live again {number}", True, world._replace(live=world.record)
    elif agent.read is None:
        yield f"read {number}", number == 0, _read(world, number)
    else:
        yield f"write {number}", True, _write(world, number)


def _read(world: World, number: int) -> World:
    seen = PlaceSeen(
        boot_id=world.record.boot_id,
        holder=world.record,
        live=world.live is not None,
        live_holder=world.live,
        certified=world.record.boot_id in world.fence,
        declared_dead=me(world, number).boot_id in world.fence,
        holder_gone=holder_gone(world, number),
    )
    answer = identity.may_take(me(world, number), [str(claim) for claim in world.agents[number].claims], seen)
    if answer.place is Place.REFUSED:
        return _with(world, number, process=0)
    if answer.place is Place.WAIT:
        return world
    return _with(world, number, read=(answer, world.record, world.live))


def holds(world: World, record: AgentIdentity, live: AgentIdentity | None) -> bool:
    """The guard of the transaction that takes a place."""
    return (world.record, world.live) == (record, live)


def _write(world: World, number: int) -> World:
    agent = world.agents[number]
    assert agent.read is not None
    answer, record, live = agent.read
    claim = _new_claim(world)
    noted = _with(world, number, claims=(*agent.claims, claim)[-2:], read=None)
    if not holds(world, record, live):
        return noted
    mine = replace(me(world, number), claim=str(claim))
    fence = world.fence | {world.record.boot_id} if answer.place is Place.CERTIFY else world.fence
    taken = noted._replace(record=mine, live=mine, fence=fence)
    predecessor = {f"p{each.process}" for each in world.agents if each.process}
    if world.record.agent in predecessor:
        taken = taken._replace(flaw="the place was taken from an agent that is alive")
    elif record.boot_id == mine.boot_id and record.lock != mine.lock:
        taken = taken._replace(flaw=_moved_flaw(agent, record))
    return taken


def _moved_flaw(agent: Agent, record: AgentIdentity) -> str:
    """In one power cycle, with another directory: what the agent knows of its guests must be all there is."""
    if record.claim not in map(str, agent.claims):
        return "the place was taken with notes older than the last agent's"
    if record.markers != agent.markers:
        return "the place was taken without the markers of this power cycle"
    return ""


def _ledger(world: World) -> Iterator[Move]:
    if world.live is not None:
        alive = [f"p{each.process}" for each in world.agents if each.process and each.linked]
        if world.live.agent not in alive:
            yield "session lapses", True, world._replace(live=None)
    registered = world.record.boot_id
    if world.left.declared and registered not in world.fence and registered not in _running(world):
        yield "declare dead", False, _spend(world, "declared")._replace(fence=world.fence | {registered})


def _running(world: World) -> set[str]:
    return {f"b{machine.boot}" for machine in world.machines if machine.on}


def flaw(world: World) -> str:
    if world.flaw:
        return world.flaw
    if world.fence & _running(world):
        return "a power cycle that is not over was certified"
    if world.live is not None and world.live.agent != world.record.agent:
        return "the session is not the registered agent's"
    return ""


def is_end(world: World) -> bool:
    """An agent that is alive holds the place."""
    alive = {f"p{each.process}" for each in world.agents if each.process}
    return world.live is not None and world.live.agent in alive


@dataclass
class Result:
    states: int
    flaws: dict[str, list[str]]
    dead_ends: list[list[str]]


def explore(bounds: Bounds, *, first: bool = False, is_lost: Callable[[World], bool] = lambda _: False) -> Result:
    """Breadth first. `is_lost`: no progress is expected from there (an operator has to act)."""
    begin = start(bounds)
    came: dict[World, tuple[World, str] | None] = {begin: None}
    backwards: dict[World, list[World]] = {}
    queue, flaws = [begin], dict[str, World]()
    for world in queue:
        if found := flaw(world):
            flaws.setdefault(found, world)
            if first:
                break
            continue
        for name, heals, after in successors(world):
            if heals:
                backwards.setdefault(after, []).append(world)
            if after not in came:
                came[after] = (world, name)
                queue.append(after)
    live = {world for world in came if is_end(world) or flaw(world) or is_lost(world)}
    stack = list(live)
    while stack:
        for before in backwards.get(stack.pop(), ()):
            if before not in live:
                live.add(before)
                stack.append(before)
    dead = [] if first and flaws else [world for world in came if world not in live]
    return Result(
        len(came), {each: _path(came, world) for each, world in flaws.items()}, [_path(came, w) for w in dead[:3]]
    )


def _path(came: dict[World, tuple[World, str] | None], world: World) -> list[str]:
    names: list[str] = []
    while (step := came[world]) is not None:
        world, name = step
        names.append(name)
    return names[::-1]
