"""PURE. What an import writes: the backup's nodes, with everything that time has made untrue put right.

Guests are where their hosts say they are (`core.restore`). Migrations and evacuations that were under way are over:
their attempts belong to a ledger that is gone. What was promised, who led and who was there is left out, and made again
by whoever it concerns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.core.death import hosts_of
from orchestrator.core.errors import FailureReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.records import (
    Certificate,
    Cordon,
    DeathPhase,
    EvacuationPhase,
    EvacuationSpec,
    EvacuationState,
    HostDeath,
    HostRecord,
    MigrationPhase,
    MigrationState,
    Proof,
    WantRun,
)
from orchestrator.core.restore import Fate, Held, HostHeld, Settled, settle
from orchestrator.ledger import paths
from orchestrator.ledger.backup import Backup
from orchestrator.ledger.records import decode, encode

SAID = "the ledger was restored from a backup that was made while this was under way"
MAX_EPOCH = 1_000_000
"""An epoch is raised by a write for each step; no cluster has held so many elections."""


@dataclass(frozen=True, slots=True)
class Found:
    """What became of one guest, for whoever does the import."""

    guest: str
    """Uuid."""
    name: str
    fate: Fate
    where: str = ""
    """Host."""
    why: str = ""


@dataclass
class Plan:
    """Everything that is to be written, and what to tell."""

    nodes: dict[str, bytes] = field(default_factory=dict[str, bytes])
    """Path -> content; whatever lies above one of them is made as well."""
    epochs: dict[int, int] = field(default_factory=dict[int, int])
    """Shard -> what its epoch must have reached at least."""
    follows: tuple[str, ...] = ()
    """Incarnations that this ledger takes the place of."""
    found: list[Found] = field(default_factory=list[Found])
    strangers: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    """Guests that the backup does not know and one host has: uuid -> name and host, whose agent writes the record."""


def planned(
    backup: Backup,
    heard: Sequence[HostHeld],
    *,
    unheard: Sequence[str] = (),
    dead: Sequence[str] = (),
    registered: Sequence[str] = (),
    incarnations: Sequence[str] = (),
    time_s: float,
    writer: str,
) -> Plan:
    """`heard`: the hosts that answered. `unheard`: those that did not, or not completely. `dead`: those of which the
    operator vouches that their power cycle is over. `registered`: hosts that are in the new tree already.
    `incarnations`: what the new tree has been called so far. Raises BadRecord for a node that cannot be read."""
    plan = Plan()
    for path, node in backup.nodes.items():
        if (content := _carried(path, node.data, registered, time_s)) is not None:
            plan.nodes[path] = content
    _end_jobs(plan, backup)
    _place_guests(plan, backup, heard, unheard, dead, writer)
    for host in dead:
        record = hosts_known(backup).get(host)
        if record is not None:
            proof = Certificate(Proof.OPERATOR, by="ledger import", time_s=time_s)
            plan.nodes.setdefault(paths.fence(host, record.boot_id), encode(proof))
    _mark(plan, [*registered, *(path[len(paths.HOSTS) + 1 :] for path in plan.nodes if _is_host(path))])
    for path, node in backup.of(paths.COORDINATORS):
        if path.endswith("/epoch") and path.count("/") == 3:
            plan.epochs[int(path.split("/")[2])] = node.version
    for host in heard:
        for shard, epoch in host.epochs.items():
            plan.epochs[shard] = max(epoch, plan.epochs.get(shard, 0))
    before = [backup.incarnation, *incarnations, *(host.incarnation for host in heard)]
    plan.follows = tuple(dict.fromkeys(each for each in before if each))
    return plan


_LEFT_OUT = (paths.BARRIER, paths.ACTIVE_MIGRATIONS, paths.ACTIVE_EVACUATIONS, paths.FENCERS, paths.CLUSTER)


def _carried(path: str, data: bytes, registered: Sequence[str], time_s: float) -> bytes | None:
    """What the node holds after the import; None: it is left out, or written in another way."""
    root = f"/{path.split('/')[1]}"
    if path in (paths.LAYOUT, paths.LEDGER_CLOCK) or any(_within(path, each) for each in _LEFT_OUT):
        return None
    match root:
        case paths.COORDINATORS:
            return data if path == paths.SHARDS else None
        case paths.HOSTS:
            return _of_host(path, data, registered)
        case paths.MIGRATIONS if path.endswith("/state"):
            return _ended_migration(path, data, time_s)
        case paths.EVACUATIONS if path.endswith("/state"):
            return _ended_job(path, data, time_s)
        case paths.DEATHS if data:
            return _ended_death(path, data, time_s)
        case _:
            return data


def _within(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}/")


def _is_host(path: str) -> bool:
    return path.startswith(f"{paths.HOSTS}/") and path.count("/") == 2


def _of_host(path: str, data: bytes, registered: Sequence[str]) -> bytes | None:
    """Its cordon always; its record where its agent has not registered by now; what it had promised never."""
    match path.split("/")[2:]:
        case []:
            return data
        case [host]:
            return None if host in registered else data
        case [_, "cordon"]:
            return data
        case _:
            return None


def _ended_migration(path: str, data: bytes, time_s: float) -> bytes:
    state = decode(MigrationState, data, path=path)
    if state.phase.terminal:
        return data
    failed = replace(
        state,
        phase=MigrationPhase.FAILED,
        failure=FailureReason.LEDGER_RESTORED,
        message=SAID,
        waiting_for=None,
        end_time_s=time_s,
    )
    return encode(failed)


def _ended_job(path: str, data: bytes, time_s: float) -> bytes:
    """No job says any more that its host may be powered off: it was said of another time."""
    state = replace(decode(EvacuationState, data, path=path), safe_to_power_off=False, safe_at=-1)
    if not state.phase.terminal:
        state = replace(
            state,
            phase=EvacuationPhase.FAILED,
            failure=FailureReason.LEDGER_RESTORED,
            message=SAID,
            end_time_s=time_s,
        )
    return encode(state)


def _ended_death(path: str, data: bytes, time_s: float) -> bytes:
    """An old order to cut the power of a host that has run since is never carried out."""
    death = decode(HostDeath, data, path=path)
    if death.phase.terminal:
        return data
    failed = replace(death, phase=DeathPhase.FAILED, message=f"{SAID}: declare it again", end_time_s=time_s)
    return encode(failed)


def _end_jobs(plan: Plan, backup: Backup) -> None:
    """A job that was under way is among those that ended, as long as its host is cordoned."""
    for path, _ in backup.of(paths.ACTIVE_EVACUATIONS):
        job = path[len(paths.ACTIVE_EVACUATIONS) + 1 :]
        spec = backup.nodes.get(paths.evacuation(job))
        if spec is not None:
            host = decode(EvacuationSpec, spec.data, path=paths.evacuation(job)).host
            plan.nodes[paths.ended_evacuation(job)] = encode(host)


# --- guests -----------------------------------------------------------------------------------------------------------


def _place_guests(
    plan: Plan, backup: Backup, heard: Sequence[HostHeld], unheard: Sequence[str], dead: Sequence[str], writer: str
) -> None:
    held: dict[str, list[Held]] = {}
    names: dict[str, str] = {}
    for host in heard:
        for copy in host.copies:
            held.setdefault(copy.guest, []).append(copy.held)
            names[copy.guest] = copy.name
    known = _records(backup)
    called = {record.name: uuid for uuid, record in known.items() if record.phase is not Ownership.GONE}
    strangers = {uuid: name for uuid, name in names.items() if uuid not in known}
    for uuid, record in known.items():
        other = [each for each, name in strangers.items() if name == record.name]
        settled = settle(record, held.get(uuid, ()), unheard=unheard, dead=dead, succeeded=bool(other), writer=writer)
        _write_guest(plan, backup, uuid, record, settled)
        if settled.fate is Fate.GONE and record.phase is not Ownership.GONE:
            called.pop(record.name, None)
    for uuid, name in sorted(strangers.items()):
        _take_stranger(plan, uuid, name, held[uuid], called)


def _records(backup: Backup) -> dict[str, GuestRecord]:
    found: dict[str, GuestRecord] = {}
    for path, node in backup.of(paths.GUESTS):
        if path.count("/") == 3 and node.data:
            found[path.rpartition("/")[2]] = decode(GuestRecord, node.data, path=path)
    return found


def _write_guest(plan: Plan, backup: Backup, uuid: str, record: GuestRecord, settled: Settled) -> None:
    path, name = paths.guest(uuid), paths.name(record.name)
    plan.nodes.pop(path, None)
    if settled.record is not None and paths.guest_spec(uuid) not in backup.nodes:
        settled = Settled(Fate.UNKNOWN, None, why="the backup has no specification of it: it was being made, or ended")
    if settled.record is None:
        for child in (paths.guest_spec(uuid), paths.want_run(uuid), paths.newest_migration(uuid)):
            plan.nodes.pop(child, None)
    else:
        plan.nodes[path] = encode(settled.record)
        if settled.runs is not None:
            plan.nodes[paths.want_run(uuid)] = encode(_wish(backup, uuid, settled.runs))
    if settled.fate is Fate.GONE:
        if backup.nodes.get(name) is not None and decode(str, backup.nodes[name].data, path=name) == uuid:
            plan.nodes.pop(name, None)
    else:
        plan.nodes[name] = encode(uuid)
    if record.phase is not Ownership.GONE or settled.why:
        where = settled.record.owner.host if settled.record is not None else ""
        plan.found.append(Found(uuid, record.name, settled.fate, where, settled.why))


def _wish(backup: Backup, uuid: str, runs: bool) -> WantRun:
    """That the guest goes on as it is. Whoever wished otherwise did so in the ledger that is gone."""
    node = backup.nodes.get(paths.want_run(uuid))
    wish = decode(WantRun, node.data, path=paths.want_run(uuid)) if node is not None and node.data else WantRun()
    return wish if wish.run is runs else replace(wish, run=runs, by="ledger import", sequence=wish.sequence + 1)


def _take_stranger(plan: Plan, uuid: str, name: str, held: Sequence[Held], called: Mapping[str, str]) -> None:
    """A guest that was made after the backup. Only its host knows what it is: its agent writes the record, if it has
    the one process that there is."""
    if called.get(name, uuid) != uuid:
        said = f"it was made after the backup, and another guest is called {name}"
        plan.found.append(Found(uuid, name, Fate.UNKNOWN, why=said))
        return
    plan.nodes[paths.name(name)] = encode(uuid)
    if len(held) == 1 and held[0].known and not (held[0].sealed or held[0].incoming):
        plan.strangers[uuid] = (name, held[0].host.host)
        plan.found.append(Found(uuid, name, Fate.OWNED, held[0].host.host, "it was made after the backup"))
        return
    where = ", ".join(sorted({each.host.host for each in held}))
    plan.found.append(Found(uuid, name, Fate.UNKNOWN, why=f"it was made after the backup and is on {where}"))


def _mark(plan: Plan, hosts: Iterable[str]) -> None:
    """Each host's list of the guests that concern it (`ledger.markers`)."""
    there = set(hosts)
    for host in there:
        plan.nodes.setdefault(paths.reservations(host), b"")
        plan.nodes.setdefault(paths.host_guests(host), b"")
        plan.nodes.setdefault(paths.cordon(host), encode(Cordon()))
    for path, data in list(plan.nodes.items()):
        if path.startswith(f"{paths.GUESTS}/") and path.count("/") == 3 and data:
            record = decode(GuestRecord, data, path=path)
            for host in hosts_of(record) & there:
                plan.nodes[paths.host_guest(host, path.rpartition("/")[2])] = b""


def hosts_known(backup: Backup) -> dict[str, HostRecord]:
    """The hosts of the backup, by name. Raises BadRecord."""
    return {
        path[len(paths.HOSTS) + 1 :]: decode(HostRecord, node.data, path=path)
        for path, node in backup.of(paths.HOSTS)
        if _is_host(path) and node.data
    }


def certified(backup: Backup, host: HostRecord) -> bool:
    """Whether the backup holds a certificate that the host's last power cycle is over: it is asked nothing."""
    return paths.fence(host.name, host.boot_id) in backup.nodes
