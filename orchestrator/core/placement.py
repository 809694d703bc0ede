"""Where a guest may go: one verdict per host with its reason, and the choice by free memory.

Free memory is what the host has, less what its guests take, less what is promised to migrations on their way there. The
view is only as good as the reads behind it; what makes two placements unable to take the same last GiB is the write of
the reservation, which fails when the host's reservations or its cordon moved since they were read.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop
from operator import attrgetter

from orchestrator.core.compatibility import ack_mode, common_machine, not_by, other_engine, real_machine
from orchestrator.core.errors import RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.hardware import beyond_libvirt, disk_pools, disks_beyond_libvirt
from orchestrator.core.ids import HostRef
from orchestrator.core.offers import (
    NONE,
    NOTHING,
    HardwareNeed,
    Offer,
    hardware_need,
    lasting_obstacle,
    offer_of,
    passing_obstacle,
)
from orchestrator.core.records import Cordon, GuestSpec, HostRecord, HostSpace, Reservations, ShimKind
from orchestrator.core.text import NAMED, clip

GUEST_OVERHEAD_MIB = 0
"""What a VMM takes beyond the guest's own memory, per guest. Hosts state a capacity that already allows for it."""


@dataclass(frozen=True, slots=True)
class HostView:
    """One host as a placement sees it. Memory in MiB."""

    ref: HostRef
    memory_mib: int
    used_mib: int = 0
    reserved_mib: int = 0
    arrivals: int = 0
    """Migrations on their way here."""
    live: bool = True
    cordoned: bool = False
    cordon_reason: str = ""
    machine_types: tuple[str, ...] = ()
    """Empty: not known, so not a reason to refuse."""
    accelerator: str = ""
    switchover_ack: str = ""
    machine_aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    engine: str = ""
    """For people."""
    shims: tuple[str, ...] = ()
    """Drivers of external devices that it has a program for."""
    offer: Offer = NOTHING
    """To guests' hardware."""

    @property
    def free_mib(self) -> int:
        """What neither guests take nor migrations were promised; below 0 where a host has shrunk."""
        return self.memory_mib - self.used_mib - self.reserved_mib


@dataclass(frozen=True, slots=True)
class Need:
    """What one guest asks of a destination."""

    guest: str
    """Uuid."""
    name: str
    source: str
    memory_mib: int
    machine: str = ""
    inside: bool = False
    """It has devices inside its VMM."""
    drivers: tuple[str, ...] = ()
    """Of its external devices: the destination needs a program for each."""
    hardware: HardwareNeed = NONE
    beyond_libvirt: tuple[str, ...] = ()
    """What of it no host that runs its guests by libvirt gives."""
    disk_pools: tuple[tuple[str, str], ...] = ()
    """Its disks, each with its pool: which of them such a host gives."""


def need_for(spec: GuestSpec, *, guest: str = "", source: str = "") -> Need:
    """What a guest of this specification asks; `guest` is its uuid, `source` its host, if it has any yet."""
    inside = any(device.shim is ShimKind.VFIO for device in spec.devices)
    drivers = tuple(sorted({device.driver for device in spec.devices if device.shim is ShimKind.EXTERNAL}))
    return Need(
        guest,
        spec.name,
        source,
        spec.memory_mib,
        spec.machine,
        inside,
        drivers,
        hardware_need(spec),
        beyond_libvirt(spec),
        disk_pools(spec),
    )


def _disks_beyond_libvirt(host: HostView, need: Need) -> tuple[str, ...]:
    return disks_beyond_libvirt(need.disk_pools, {name: pool.kind for name, pool in host.offer.pools.items()})


def need_again(spec: GuestSpec) -> Need:
    """What a guest asks of the host that it was on when it is started there again: its images are there already."""
    return need_for(replace(spec, disks=tuple(replace(disk, size_bytes=0) for disk in spec.disks)))


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one host may take one guest; `reason` and `message` say why not."""

    host: str
    eligible: bool
    free_mib: int
    reason: RefusalReason | None = None
    message: str = ""
    passing: bool = False
    """Time may remove the obstacle."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The destination with its verdict, or None with the reason that decided and the verdict on every host."""

    destination: HostRef | None
    verdicts: tuple[Verdict, ...]
    reason: RefusalReason | None = None
    message: str = ""
    transient: bool = False
    """Nothing fits now, but a host that is silent at the moment would."""
    passing: bool = False
    """Nothing fits now, but room, a cordon that is lifted or a host that comes back may change that."""


@dataclass(frozen=True, slots=True)
class PlannedGuest:
    """One line of a plan: where a guest would go, or why it cannot."""

    need: Need
    choice: Choice


def judge(host: HostView, need: Need, *, source: HostView | None = None) -> Verdict:
    """One host, one guest. Lasting obstacles are named before passing ones."""

    def no(reason: RefusalReason, message: str, *, passing: bool = False) -> Verdict:
        return Verdict(host.ref.host, False, host.free_mib, reason, message, passing)

    name = host.ref.host
    if name == need.source:
        return no(RefusalReason.INVALID_ARGUMENT, f"{need.name} is on {name} already")
    if need.machine and host.machine_types and need.machine not in host.machine_types:
        said = f"{name} does not offer machine type {need.machine}{_advice(host, need, source)}"
        return no(RefusalReason.MACHINE_TYPE_MISMATCH, said)
    if missing := [driver for driver in need.drivers if driver not in host.shims]:
        said = f"{name} has no program for {need.name}'s devices of driver {', '.join(missing)}"
        return no(RefusalReason.DEVICE_NOT_MIGRATABLE, said)
    if source is not None and (said := other_engine(source.engine, host.engine)):
        return no(RefusalReason.MACHINE_TYPE_MISMATCH, f"{name}: {said}")
    if said := not_by(host.engine, need.name, need.beyond_libvirt + _disks_beyond_libvirt(host, need)):
        return no(RefusalReason.FEATURE_NOT_AVAILABLE, f"{name}: {said}")
    if source is not None and host.accelerator and source.accelerator and host.accelerator != source.accelerator:
        said = f"{name} runs guests with {host.accelerator}, {need.source} with {source.accelerator}"
        return no(RefusalReason.MACHINE_TYPE_MISMATCH, said)
    if source is not None and (said := _other_machine(host, need, source)):
        return no(RefusalReason.MACHINE_TYPE_MISMATCH, said)
    if found := lasting_obstacle(need.hardware, need.name, host.offer, source.offer if source is not None else None):
        return no(*found)
    if host.cordoned:
        why = f" ({clip(host.cordon_reason)})" if host.cordon_reason else ""
        return no(RefusalReason.HOST_CORDONED, f"{name} is cordoned{why}", passing=True)
    if host.free_mib < need.memory_mib + GUEST_OVERHEAD_MIB:
        return no(RefusalReason.NO_CAPACITY, _too_small(host, need), passing=True)
    if found := passing_obstacle(need.hardware, need.name, host.offer):
        return no(*found, passing=True)
    if not host.live:
        return no(RefusalReason.HOST_NOT_LIVE, f"the agent of {name} is silent", passing=True)
    return Verdict(name, True, host.free_mib)


def _other_machine(host: HostView, need: Need, source: HostView) -> str:
    """What differs between the guest as it is at its source and as it would be there; empty: nothing."""
    here, there = (real_machine(need.machine, view.machine_aliases) for view in (source, host))
    if here != there and need.machine in source.machine_aliases and need.machine in host.machine_aliases:
        said = f"machine type {need.machine} is {here} on {need.source} and {there} on {host.ref.host}"
        return f"{said}: start {need.name} anew as {here if here in host.machine_types else there}"
    if not need.inside:
        return ""
    mine, theirs = ack_mode(source.switchover_ack, here), ack_mode(host.switchover_ack, there)
    if mine != theirs:
        said = f"switchover-ack mode differs for {need.name}, which has devices inside its VMM"
        return f"{said}: {mine or 'unknown'} on {need.source}, {theirs or 'unknown'} on {host.ref.host}"
    return ""


def _advice(host: HostView, need: Need, source: HostView | None) -> str:
    """What would help a guest whose machine type a host lacks."""
    if source is None:
        return ""
    machine = real_machine(need.machine, source.machine_aliases)
    common = common_machine(machine, source.machine_types, host.machine_types)
    engine = f" (its {host.engine} has none)" if host.engine else ""
    return f"{engine}: {need.name} can go there once it is started anew as {common}" if common else engine


def _too_small(host: HostView, need: Need) -> str:
    return f"{host.ref.host} has {max(0, host.free_mib)} MiB free, {need.name} needs {need.memory_mib} MiB"


def choose(
    hosts: Sequence[HostView],
    need: Need,
    *,
    wanted: str = "",
    prefer: str = "",
    avoid: Iterable[str] = (),
    later: Collection[str] = (),
    max_arrivals: int = 0,
    every: bool = False,
    salt: str = "",
    lane: tuple[int, int] = (0, 1),
) -> Choice:
    """The eligible host with most memory left, then with fewest arrivals, then by name.

    With a `salt`, hosts that could take about as many such guests are equal, and which of them is first differs from
    salt to salt: several who place at the same time, each with its own, do not all choose the same host. Those in
    `later` stand behind their equals, and so do those that are not in the `lane` (number, how many there are): `hosts`
    are dealt out to lanes in their order.

    Hosts are judged in that order until one will do, whose verdict alone is in the choice; `every` asks for the verdict
    on each host all the same. Where none will do the verdict on each host is there in any case.

    `wanted` restricts the choice to that host; `prefer` is taken when it is eligible. Hosts in `avoid` (an earlier
    attempt failed there) are taken only when nothing else is eligible. `max_arrivals` > 0 holds back hosts that receive
    so many migrations already: transient.
    """
    source = next((host for host in hosts if host.ref.host == need.source), None)
    candidates = [host for host in hosts if not wanted or host.ref.host == wanted]
    if wanted and not candidates:
        return Choice(None, (), RefusalReason.NOT_FOUND, f"there is no host {wanted}")
    full = False
    judged: dict[str, Verdict] = {}
    for host in _order(candidates, need, prefer=prefer, avoid=frozenset(avoid), later=later, salt=salt, lane=lane):
        held_back = 0 < max_arrivals <= host.arrivals
        if held_back and full:
            continue
        verdict = judged[host.ref.host] = judge(host, need, source=source)
        if verdict.eligible and not held_back:
            verdicts = _each(candidates, need, source, judged) if every else (verdict,)
            return Choice(host.ref, verdicts)
        full = full or verdict.eligible
    verdicts = _each(candidates, need, source, judged)
    if full:
        said = f"every host that could take {need.name} receives {max_arrivals} migrations already"
        return Choice(None, verdicts, RefusalReason.NO_CAPACITY, said, transient=True, passing=True)
    return _nowhere(verdicts, need, wanted)


def _order(
    hosts: Sequence[HostView],
    need: Need,
    *,
    prefer: str,
    avoid: Collection[str],
    later: Collection[str],
    salt: str,
    lane: tuple[int, int],
) -> Iterator[HostView]:
    """The best first. Which of equals is first is worked out only when it is their turn: there may be thousands."""
    size_mib = need.memory_mib + GUEST_OVERHEAD_MIB
    number, lanes = lane
    rooms: dict[int, int] = {}
    alike: dict[tuple[bool, bool, int, bool, bool, int], list[HostView]] = {}
    for at, host in enumerate(hosts):
        name, free_mib = host.ref.host, host.free_mib
        room = rooms.get(free_mib)
        if room is None:
            room = rooms[free_mib] = -_about(free_mib // size_mib) if salt else -free_mib
        key = (name in avoid, name != prefer, room, at % lanes != number, name in later, host.arrivals)
        found = alike.get(key)
        if found is None:
            alike[key] = [host]
        else:
            found.append(host)
    keys = list(alike)
    heapify(keys)
    while keys:
        equals = sorted(alike[heappop(keys)], key=_NAME)
        turned = 1 + zlib.crc32(salt.encode()) % len(equals) if salt else 0
        yield from equals[-turned:]
        yield from equals[:-turned] if turned else ()


_NAME = attrgetter("ref.host")


def _about(count: int) -> int:
    """To four binary digits: hosts with room for 200 guests or for 201 are equal, with room for 10 or for 11 not."""
    spare = max(0, count.bit_length() - 4)
    return count >> spare << spare


def _each(
    hosts: Iterable[HostView], need: Need, source: HostView | None, judged: Mapping[str, Verdict]
) -> tuple[Verdict, ...]:
    """By name. Those that have been judged are not judged again."""
    ordered = sorted(hosts, key=_NAME)
    return tuple(judged.get(host.ref.host) or judge(host, need, source=source) for host in ordered)


def pack(hosts: Sequence[HostView], needs: Sequence[Need]) -> dict[str, str]:
    """Guest -> host, for as many of `needs` as possible; of two such packings the one that moves more memory.

    Guests are spread over the hosts where that suffices, for the sake of their load, else packed tightly. Where that
    leaves somebody behind and the guests are few enough, a better packing is searched for: the best within
    SEARCH_STEPS, not proven to be the best of all.
    """
    packing = _Packing(hosts, needs)
    best = max(packing.spread(), packing.tight(), key=packing.worth)
    if len(best) < len(needs) <= SEARCHED_GUESTS:
        best = max(best, packing.search(best), key=packing.worth)
    return best


SEARCH_STEPS = 5_000
SEARCHED_GUESTS = 32
"""Among more guests than that a search sees too little of what is possible to be worth its time."""


class _Packing:
    """One packing problem: who may go where but for memory, and how much is free."""

    def __init__(self, hosts: Sequence[HostView], needs: Sequence[Need]) -> None:
        self._order = sorted(needs, key=lambda need: (-need.memory_mib, need.name))
        self._size = {need.guest: need.memory_mib + GUEST_OVERHEAD_MIB for need in needs}
        self._free = {host.ref.host: host.free_mib for host in hosts}
        self._arrivals = {host.ref.host: host.arrivals for host in hosts}
        by_name = {host.ref.host: host for host in hosts}
        kinds: dict[Need, tuple[str, ...]] = {}
        self._may: dict[str, tuple[str, ...]] = {}
        for need in needs:
            kind = replace(need, guest="", name="", memory_mib=0)
            if kind not in kinds:
                source = by_name.get(need.source)
                kinds[kind] = tuple(
                    name for name in sorted(by_name) if judge(by_name[name], kind, source=source).eligible
                )
            self._may[need.guest] = kinds[kind]
        self._alike = {name: tuple(name in may for may in kinds.values()) for name in by_name}
        self._steps = 0
        self._best: dict[str, str] = {}

    def worth(self, places: dict[str, str]) -> tuple[int, int]:
        return len(places), sum(self._size[guest] for guest in places)

    def spread(self) -> dict[str, str]:
        """Biggest first, each to the host with most memory left."""
        return self._greedy(lambda host, free, arrivals: (-free, arrivals, host))

    def tight(self) -> dict[str, str]:
        """Biggest first, each to the host that it fills best."""
        return self._greedy(lambda host, free, arrivals: (free, arrivals, host))

    def _greedy(self, key: Callable[[str, int, int], tuple[int, int, str]]) -> dict[str, str]:
        free, arrivals, places = dict(self._free), dict(self._arrivals), dict[str, str]()
        for need in self._order:
            fit = [host for host in self._may[need.guest] if free[host] >= self._size[need.guest]]
            if fit:
                host = min(fit, key=lambda host: key(host, free[host], arrivals[host]))
                places[need.guest] = host
                free[host] -= self._size[need.guest]
                arrivals[host] += 1
        return places

    def search(self, known: dict[str, str]) -> dict[str, str]:
        """Better than `known`, or `known`. Depth first, biggest guest first, tightest host first."""
        self._best, self._steps = known, SEARCH_STEPS
        self._walk(0, dict(self._free), {})
        return self._best

    def _walk(self, at: int, free: dict[str, int], places: dict[str, str]) -> None:
        self._steps -= 1
        if self.worth(places) > self.worth(self._best):
            self._best = dict(places)
        if self._steps < 0 or at == len(self._order) or not self._may_be_better(at, places):
            return
        guest = self._order[at].guest
        size, tried = self._size[guest], set[tuple[int, tuple[bool, ...]]]()
        for host in sorted(self._may[guest], key=lambda host: (free[host], host)):
            if free[host] < size or (free[host], self._alike[host]) in tried:
                continue
            tried.add((free[host], self._alike[host]))
            places[guest] = host
            free[host] -= size
            self._walk(at + 1, free, places)
            free[host] += size
            del places[guest]
        self._walk(at + 1, free, places)

    def _may_be_better(self, at: int, places: dict[str, str]) -> bool:
        count, memory = self.worth(places)
        rest = self._order[at:]
        most = count + len(rest), memory + sum(self._size[need.guest] for need in rest)
        return most > self.worth(self._best)


def _nowhere(verdicts: tuple[Verdict, ...], need: Need, wanted: str) -> Choice:
    transient = any(verdict.reason is RefusalReason.HOST_NOT_LIVE for verdict in verdicts)
    passing = any(verdict.passing for verdict in verdicts)
    if wanted:
        only = verdicts[0]
        return Choice(None, verdicts, only.reason, only.message, transient, passing)
    others = [verdict for verdict in verdicts if verdict.host != need.source]
    said = f"no host can take {need.name} ({need.memory_mib} MiB): {in_short(others) or 'there is no other host'}"
    reasons = set(obstacles(others))
    reason = reasons.pop() if len(reasons) == 1 else RefusalReason.NO_CAPACITY
    return Choice(None, verdicts, reason, said, transient, passing or not others)


def obstacles(verdicts: Iterable[Verdict]) -> dict[RefusalReason, int]:
    """How many hosts each reason stands against, the most frequent first. The guest's own host is not counted."""
    reasons = (verdict.reason for verdict in verdicts if verdict.reason is not RefusalReason.INVALID_ARGUMENT)
    count = Counter(reason for reason in reasons if reason is not None)
    return dict(sorted(count.items(), key=lambda each: (-each[1], each[0])))


def in_short(verdicts: Sequence[Verdict]) -> str:
    """Why none of them: each host by name where they are few, else how many for which reason and some examples, so that
    the sentence does not grow with the number of hosts."""
    against = [verdict for verdict in verdicts if verdict.reason is not None]
    if len(against) <= NAMED:
        return "; ".join(verdict.message for verdict in against)
    count = obstacles(against)
    counts = ", ".join(f"{number} {reason}" for reason, number in count.items())
    examples = [next(verdict for verdict in against if verdict.reason is reason) for reason in count]
    named = list(dict.fromkeys([*examples, *against]))[:NAMED]
    said = "; ".join(verdict.message for verdict in named)
    return f"{len(against)} hosts ({counts}), among them: {said}"


def plan(hosts: Sequence[HostView], needs: Sequence[Need]) -> tuple[PlannedGuest, ...]:
    """Who can move where if all of `needs` go, by `pack`. Who has no place could go nowhere even alone, or else is told
    what is left once the others are in theirs.

    Order of the answer = of `needs`. For a guest with a place the verdicts are that of its host alone.
    """
    places = pack(hosts, needs)
    left = {host.ref.host: host for host in hosts}
    planned: dict[str, PlannedGuest] = {}
    for need in needs:
        if (name := places.get(need.guest)) is not None:
            host = left[name]
            planned[need.guest] = PlannedGuest(need, Choice(host.ref, (Verdict(name, True, host.free_mib),)))
            taken = host.reserved_mib + need.memory_mib
            left[name] = replace(host, reserved_mib=taken, arrivals=host.arrivals + 1)
    for need in needs:
        if need.guest not in planned:
            alone = choose(hosts, need)
            choice = choose(tuple(left.values()), need) if alone.destination is not None else alone
            planned[need.guest] = PlannedGuest(need, choice)
    return tuple(planned[need.guest] for need in needs)


@dataclass(frozen=True, slots=True)
class HostInput:
    """What was read of one host."""

    record: HostRecord
    live: bool
    cordon: Cordon
    reservations: Reservations
    certified_dead: bool = False
    """This power cycle of it is certified to be over."""
    space: HostSpace | None = None


@dataclass(frozen=True, slots=True)
class GuestInput:
    """What was read of one guest."""

    uuid: str
    record: GuestRecord
    spec: GuestSpec


def need_of(guest: GuestInput) -> Need:
    """What a guest asks of a destination now."""
    return need_for(guest.spec, guest=guest.uuid, source=guest.record.owner.host)


def _disks_promised(reservations: Reservations, here: set[str], but: str) -> list[dict[str, int]]:
    """To migrations that have not arrived; what has arrived is in the pool's figures."""
    return [pools for mig, pools in reservations.disk_bytes.items() if mig not in here and mig != but]


_HOLDS_MEMORY = (Ownership.STARTING, Ownership.IDLE, Ownership.OPEN, Ownership.COMMITTED, Ownership.ABORTED)


def host_views(hosts: Sequence[HostInput], guests: Sequence[GuestInput], *, but: str = "") -> tuple[HostView, ...]:
    """Memory by ownership, without what is promised to the migration `but`. A committed guest takes memory at both ends
    until DONE; a guest that has arrived is not counted a second time for the reservation that its migration has not
    released yet."""
    used: dict[str, int] = {}
    arrived: dict[str, set[str]] = {}
    for guest in guests:
        record = guest.record
        if record.phase not in _HOLDS_MEMORY:
            continue
        used[record.owner.host] = used.get(record.owner.host, 0) + guest.spec.memory_mib
        arrived.setdefault(record.owner.host, set()).add(record.migration)
        if record.phase is Ownership.COMMITTED and record.source is not None:
            used[record.source.host] = used.get(record.source.host, 0) + guest.spec.memory_mib
    views: list[HostView] = []
    for host in hosts:
        name = host.record.name
        here = arrived.get(name, set())
        promised = {mig: mib for mig, mib in host.reservations.memory_mib.items() if mig not in here and mig != but}
        views.append(
            HostView(
                ref=HostRef(name, host.record.boot_id),
                memory_mib=host.record.memory_mib,
                used_mib=used.get(name, 0),
                reserved_mib=sum(promised.values()),
                arrivals=len(promised),
                live=host.live,
                cordoned=host.cordon.on,
                cordon_reason=host.cordon.why,
                machine_types=host.record.machine_types,
                accelerator=host.record.accelerator,
                switchover_ack=host.record.switchover_ack,
                machine_aliases=host.record.machine_aliases,
                engine=host.record.engine,
                shims=host.record.shims,
                offer=offer_of(host.record, host.space, _disks_promised(host.reservations, here, but)),
            )
        )
    return tuple(views)
