"""A small ledger and agents in memory for the coordinator's tests.

`MemoryStore` keeps one tree; `session()` gives stores that share it, so that several coordinators can compete. Its
writes are linear; `fail_next` makes the next ones end as OutcomeUnknown, applied or not; `lag` lets one session fall
behind, as the clients of a ZooKeeper server that follows do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.coordinator.ports import AttemptSeen, ConductOrder
from orchestrator.core import handover
from orchestrator.core.agent import AgentStatus, CopyStatus, GuestStatus, RunState
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import AbortReason, DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.migration import Prepared
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import (
    AttemptReport,
    Attempts,
    Cordon,
    EvacuationGuests,
    EvacuationSpec,
    EvacuationState,
    GuestSpec,
    HostRecord,
    MigrationSpec,
    MigrationState,
    Reservation,
)
from orchestrator.ledger import paths
from orchestrator.ledger.layout import Layout
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import (
    Check,
    Conflict,
    ConflictKind,
    Create,
    Delete,
    Done,
    Op,
    OutcomeUnknown,
    SessionState,
    SetData,
    StoreUnavailable,
    Versioned,
    WriteResult,
)

MAX_TRANSACTION = 1_048_575
"""ZooKeeper's jute.maxbuffer."""


class _Nodes(dict[str, Versioned]):
    """Says which one moved, whoever moved it."""

    def __init__(self) -> None:
        super().__init__()
        self.trees: list[tuple[tuple[str, ...], Callable[[str | None], None]]] = []

    def _tell(self, path: str) -> None:
        for roots, tell in list(self.trees):
            if any(path == root or path.startswith(f"{root.rstrip('/')}/") for root in roots):
                tell(path)

    def __setitem__(self, path: str, node: Versioned) -> None:
        super().__setitem__(path, node)
        self._tell(path)

    def __delitem__(self, path: str) -> None:
        super().__delitem__(path)
        self._tell(path)

    def pop(self, path: str, *default: Any) -> Any:
        self._tell(path)
        return super().pop(path, *default)


def children_of(nodes: Iterable[str], path: str) -> tuple[str, ...]:
    head = path.rstrip("/") + "/"
    return tuple(sorted(p[len(head) :] for p in nodes if p.startswith(head) and "/" not in p[len(head) :]))


@dataclass
class Tree:
    nodes: _Nodes = field(default_factory=_Nodes)
    owners: dict[str, object] = field(default_factory=dict)
    zxid: int = 0
    watches: list[tuple[str, bool, Callable[..., None]]] = field(default_factory=list)

    def children(self, path: str) -> tuple[str, ...]:
        return children_of(self.nodes, path)

    def notify(self, path: str) -> None:
        loop = asyncio.get_running_loop()
        for watched, of_children, callback in list(self.watches):
            if of_children and path.rpartition("/")[0] == watched:
                loop.call_soon(callback, self.children(watched))
            elif not of_children and path == watched:
                loop.call_soon(callback, self.nodes.get(path))


class MemoryStore:
    """One session of a shared tree; passes for `orchestrator.ledger.store.Store`."""

    def __init__(self, tree: Tree | None = None) -> None:
        self.tree = tree or Tree()
        self.down = False
        self.fail_next: list[bool] = []
        """Per coming write: lost answer, True if applied all the same."""
        self.writes: list[tuple[Op, ...]] = []
        self.granted: dict[str, frozenset[str]] = {}
        """Who may write a node, as it was said last."""
        self.barriers = 0
        """How many were asked for: each is a write."""
        self._old: dict[str, Versioned] | None = None
        self._late: list[Callable[[], None]] = []
        self._callbacks: list[Callable[[SessionState], None]] = []

    async def start(self, timeout_s: float = 10.0) -> None: ...

    async def close(self) -> None:
        self.expire()

    @property
    def session(self) -> SessionState:
        return SessionState.SUSPENDED if self.down else SessionState.CONNECTED

    @property
    def quorum_age_s(self) -> float:
        return 0.0

    def on_session(self, callback: Callable[[SessionState], None]) -> None:
        self._callbacks.append(callback)

    def expire(self) -> None:
        """The session is lost; its ephemeral nodes go."""
        for path, owner in list(self.tree.owners.items()):
            if owner is self:
                self.tree.nodes.pop(path, None)
                self.tree.owners.pop(path)
                self.tree.notify(path)
        for callback in self._callbacks:
            callback(SessionState.LOST)

    def _need_connection(self) -> None:
        if self.down:
            raise StoreUnavailable("down")

    @property
    def _shown(self) -> dict[str, Versioned]:
        return self.tree.nodes if self._old is None else self._old

    def lag(self) -> None:
        """From now on this session sees, and is told, nothing new: until a write of its own was answered, or
        `catch_up`."""
        if self._old is None:
            self._old = dict(self.tree.nodes)

    def catch_up(self) -> None:
        """Be told what was missed."""
        self._old, late, self._late = None, self._late, []
        for tell in late:
            tell()

    async def barrier(self, timeout_s: float = 2.0) -> None:
        await asyncio.sleep(0)
        self._need_connection()
        self.barriers += 1
        self.catch_up()

    async def read(self, path: str, timeout_s: float = 2.0) -> Versioned | None:
        await asyncio.sleep(0)
        self._need_connection()
        return self._shown.get(path)

    async def children(self, path: str, timeout_s: float = 2.0) -> tuple[str, ...]:
        await asyncio.sleep(0)
        self._need_connection()
        return children_of(self._shown, path)

    async def ensure(self, path: str, timeout_s: float = 2.0) -> None:
        self._need_connection()
        parts = path.strip("/").split("/")
        for depth in range(1, len(parts) + 1):
            part = "/" + "/".join(parts[:depth])
            if part not in self.tree.nodes:
                self.tree.nodes[part] = Versioned(b"", 0, 0)
                self.tree.notify(part)

    async def multi(self, ops: Sequence[Op], timeout_s: float = 2.0) -> WriteResult:
        await asyncio.sleep(0)
        if self.down:
            return OutcomeUnknown(sent=False)
        if sum(len(op.path) + len(op.data) for op in ops if isinstance(op, Create | SetData)) > MAX_TRANSACTION:
            return OutcomeUnknown(why="too large: ZooKeeper cuts the connection")
        if self.fail_next:
            if self.fail_next.pop(0):
                self._apply(ops)
            return OutcomeUnknown()
        self.catch_up()
        return self._apply(ops)

    def _apply(self, ops: Sequence[Op]) -> WriteResult:
        seen = dict(self.tree.nodes)  # each operation sees what those before it did
        for index, op in enumerate(ops):
            node = seen.get(op.path)
            if isinstance(op, Create):
                if node is not None:
                    return Conflict(index, ConflictKind.EXISTS)
                parent = op.path.rpartition("/")[0]
                if parent and parent not in seen:
                    return Conflict(index, ConflictKind.MISSING)
                seen[op.path] = Versioned(op.data, 0, 0)
            elif node is None:
                return Conflict(index, ConflictKind.MISSING)
            elif node.version != op.version:
                return Conflict(index, ConflictKind.BAD_VERSION)
            elif isinstance(op, Delete):
                if any(path.startswith(f"{op.path}/") for path in seen):
                    return Conflict(index, ConflictKind.NOT_EMPTY)
                del seen[op.path]
            elif isinstance(op, SetData):
                seen[op.path] = Versioned(op.data, op.version + 1, 0)
        self.tree.zxid += 1
        self.writes.append(tuple(ops))
        return Done(self.tree.zxid, tuple(self._apply_one(op) for op in ops))

    def _apply_one(self, op: Op) -> int:
        nodes, zxid = self.tree.nodes, self.tree.zxid
        version = -1
        if isinstance(op, Create):
            nodes[op.path] = Versioned(op.data, 0, zxid)
            version = 0
            if op.ephemeral:
                self.tree.owners[op.path] = self
        elif isinstance(op, SetData):
            version = op.version + 1
            nodes[op.path] = Versioned(op.data, version, zxid)
        elif isinstance(op, Delete):
            nodes.pop(op.path)
            self.tree.owners.pop(op.path, None)
        if not isinstance(op, Check):
            self.tree.notify(op.path)
        return version

    keeps_rights = False

    async def grant(self, path: str, hosts: Collection[str], timeout_s: float = 2.0) -> None:
        self._need_connection()
        self.granted[path] = frozenset(hosts)

    def watch(self, path: str, callback: Callable[[Versioned | None], None]) -> Callable[[], None]:
        def moved(node: Versioned | None) -> None:
            self._tell(lambda: callback(self._shown.get(path)), now=lambda: callback(node))

        return self._watch((path, False, moved), lambda: callback(self._shown.get(path)))

    def watch_children(self, path: str, callback: Callable[[tuple[str, ...]], None]) -> Callable[[], None]:
        def moved(names: tuple[str, ...]) -> None:
            self._tell(lambda: callback(children_of(self._shown, path)), now=lambda: callback(names))

        return self._watch((path, True, moved), lambda: callback(children_of(self._shown, path)))

    def watch_tree(self, roots: Sequence[str], callback: Callable[[str | None], None]) -> Callable[[], None]:
        entry = (tuple(roots), lambda path: self._tell(lambda: callback(path), now=lambda: callback(path)))
        self.tree.nodes.trees.append(entry)
        trees = self.tree.nodes.trees
        asyncio.get_running_loop().call_soon(lambda: callback(None) if entry in trees else None)
        return lambda: trees.remove(entry) if entry in trees else None

    def _tell(self, later: Callable[[], None], *, now: Callable[[], None]) -> None:
        """Of a change, to whoever watches; once this session is told of it."""
        if self._old is None:
            now()
        else:
            self._late.append(later)

    def _watch(self, entry: tuple[str, bool, Callable[..., None]], first: Callable[[], None]) -> Callable[[], None]:
        self.tree.watches.append(entry)
        asyncio.get_running_loop().call_soon(first)
        if self._old is not None:
            self._late.append(first)
        return lambda: self.tree.watches.remove(entry) if entry in self.tree.watches else None


@dataclass
class FakeAgent:
    """Source and destination in one; passes the contract suite of agents (tests/contract/test_agent_service.py).
    `World.ends` scripts the attempts: a reason to abort with, or None to commit."""

    world: World
    host: str

    async def prepare_destination(
        self,
        attempt: AttemptRef,
        *,
        epoch: int,
        source_peer: Endpoint,
        timeout_ms: int,
        multifd_channels: int,
        shard: int = 0,
    ) -> Prepared:
        self.world.call("prepare", self.host, attempt.attempt, epoch, shard)
        inc = f"inc-{attempt.migration}-{attempt.attempt}"
        self.world.must_be_open(attempt, inc)
        return Prepared(inc, Endpoint("127.0.0.1", 1), Endpoint("127.0.0.1", 2))

    async def conduct_attempt(self, order: ConductOrder) -> None:
        self.world.call("conduct", self.host, order.attempt.attempt, order.epoch, order.shard)
        self.world.conduct(order)

    async def get_attempt(self, migration: str, attempt: int) -> AttemptSeen:
        key = (migration, attempt)
        report, conducting = self.world.reports.get(key), self.world.conducting.get(key)
        under_way = conducting is not None and not conducting.done()
        known = under_way or report is not None
        return AttemptSeen(known, ended=known and not under_way, report=report)

    async def nudge(self, guest: str) -> None: ...

    async def get_agent(self) -> AgentStatus:
        self.world.asked.append(self.host)
        if self.host in self.world.silent:
            raise DroverError(RefusalReason.AGENT_UNREACHABLE, f"{self.host} does not answer")
        copies = tuple(self.world.copies.get(self.host, ()))
        here = HostRef(self.host, f"boot-{self.host}")
        return AgentStatus(here, 0, copies=copies, complete=self.host not in self.world.unsure)

    async def start_guest(self, guest: str) -> GuestStatus:
        return await self.world.start(guest, self.host)


@dataclass
class World:
    """Hosts, guests and agents over one tree."""

    store: MemoryStore = field(default_factory=MemoryStore)
    ends: list[AbortReason | None] = field(default_factory=list)
    calls: list[tuple[str, str, int]] = field(default_factory=list)
    reports: dict[tuple[str, int], AttemptReport] = field(default_factory=dict)
    hold: asyncio.Event | None = None
    """While set up and not set, conducted attempts stay in pre-copy."""
    refuse: DroverError | None = None
    silent: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    """Hosts on which no guest starts."""
    starts: list[tuple[str, str]] = field(default_factory=list)
    copies: dict[str, list[CopyStatus]] = field(default_factory=dict)
    """What agents still hold, by host."""
    unsure: set[str] = field(default_factory=set)
    """Agents that do not know yet what they hold."""
    asked: list[str] = field(default_factory=list)
    conducting: dict[tuple[str, int], asyncio.Task[None]] = field(default_factory=dict)
    misread_epoch: int | None = None
    """What agents take for the epoch, whatever the ledger says."""

    def __post_init__(self) -> None:
        self.put(paths.LAYOUT, Layout())

    def at(self, control_address: str, host: str = "") -> FakeAgent:
        return FakeAgent(self, control_address.split(":", maxsplit=1)[0])

    async def close(self) -> None:
        for task in self.conducting.values():
            task.cancel()

    def put(self, path: str, record: object) -> None:
        """With its parents where missing."""
        self.store.tree.zxid += 1
        parent = path.rpartition("/")[0]
        while parent and parent not in self.store.tree.nodes:
            self.store.tree.nodes[parent] = Versioned(b"", 0, 0)
            parent = parent.rpartition("/")[0]
        self.store.tree.nodes[path] = Versioned(encode(record), 0, self.store.tree.zxid)

    def host(self, name: str, memory_mib: int = 1024) -> None:
        self.put(paths.host(name), HostRecord(name, f"boot-{name}", f"{name}:1", "127.0.0.1:2", memory_mib, 1000))
        self.put(paths.cordon(name), Cordon())
        self.put(paths.reservations(name), "")
        self.put(paths.live(name), Cordon())
        self.put(paths.host_guests(name), "")

    def guest(self, uuid: str, host: str, memory_mib: int = 64, policy: MigrationPolicy | None = None) -> None:
        policy = policy or MigrationPolicy(backoff_initial_ms=1, backoff_max_ms=2)
        self.put(paths.guest(uuid), GuestRecord(f"n-{uuid}", Ownership.IDLE, HostRef(host, f"boot-{host}")))
        self.put(paths.guest_spec(uuid), GuestSpec(f"n-{uuid}", memory_mib, policy=policy))

    def migration(self, name: str, guest: str, destination: str = "", policy: MigrationPolicy | None = None) -> None:
        policy = policy or MigrationPolicy(backoff_initial_ms=1, backoff_max_ms=2)
        self.put(paths.migration(name), MigrationSpec(name, guest, f"n-{guest}", destination, policy))
        self.put(paths.migration_state(name), MigrationState())
        self.put(paths.attempts(name), Attempts())
        self.put(paths.active_migration(name), guest)

    def evacuation(self, job: str, host: str, max_concurrent: int = 2) -> None:
        self.put(paths.evacuation(job), EvacuationSpec(job, host, max_concurrent))
        self.put(paths.evacuation_state(job), EvacuationState())
        self.put(paths.active_evacuation(job), host)

    def call(self, what: str, host: str, attempt: int, epoch: int, shard: int = 0) -> None:
        self.calls.append((what, host, attempt))
        node = self.store.tree.nodes.get(paths.epoch(shard))
        current = self.misread_epoch if self.misread_epoch is not None else node.version if node else -1
        if epoch != current:
            raise DroverError(RefusalReason.STALE_EPOCH, f"epoch {epoch} is over: {host} reads {current}")
        if host in self.silent:
            raise DroverError(RefusalReason.AGENT_UNREACHABLE, f"{host} does not answer")
        if self.refuse is not None and what == "prepare":
            raise self.refuse

    def must_be_open(self, ref: AttemptRef, inc: str = "") -> None:
        """The record waits for this attempt, which is bound to nothing but `inc`."""
        if paths.guest(ref.guest) not in self.store.tree.nodes:
            raise DroverError(RefusalReason.NOT_FOUND, f"there is no guest {ref.guest}")
        record = self.record(ref.guest)
        open_for = (record.migration, record.attempt) if record.phase is Ownership.OPEN else None
        if open_for != (ref.migration, ref.attempt) or record.inc not in ("", inc):
            raise DroverError(RefusalReason.STALE_ATTEMPT, f"{ref}: the record says {record.phase}, {open_for}")

    def conduct(self, order: ConductOrder) -> None:
        key = (order.attempt.migration, order.attempt.attempt)
        if key not in self.conducting:
            self.must_be_open(order.attempt)
            self.conducting[key] = asyncio.get_running_loop().create_task(self._conduct(order))

    def _held(self, ref: AttemptRef) -> bool:
        """In pre-copy, until the test lets it go on or somebody ends the attempt."""
        return self.hold is not None and not self.hold.is_set() and self.record(ref.guest).phase is Ownership.OPEN

    async def _conduct(self, order: ConductOrder) -> None:
        ref, inc = order.attempt, order.prepared.inc
        await self._write(ref.guest, lambda r: handover.bind(r, ref.migration, ref.attempt, inc, writer="a"))
        while self._held(ref):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        end = self.ends.pop(0) if self.ends else None
        outcome = "COMMITTED" if end is None else "ABORTED"
        report = AttemptReport(ref.attempt, outcome, reason=end, duration_ms=1.0, transferred_bytes=7)
        self.reports[(ref.migration, ref.attempt)] = report
        try:
            if end is not None:
                await self._write(
                    ref.guest, lambda r: handover.abort(r, ref.migration, ref.attempt, end, ("d0",), writer="a")
                )
                return
            await self._write(ref.guest, lambda r: handover.commit(r, ref.migration, ref.attempt, inc, writer="a"))
            await self._write(ref.guest, lambda r: handover.done(r, ref.migration, ref.attempt, inc, writer="b"))
        except handover.Refused:
            self.reports.pop((ref.migration, ref.attempt))

    async def start(self, guest: str, host: str) -> GuestStatus:
        """As a real agent: a guest that it does not start is GONE, and its name is free."""
        self.starts.append((guest, host))
        if host in self.silent:
            raise DroverError(RefusalReason.AGENT_UNREACHABLE, f"{host} does not answer")
        record = self.record(guest)
        if record.phase is Ownership.STARTING and host in self.broken:
            await self._write(guest, lambda r: handover.gone(r, writer="a"))
            self.store.tree.nodes.pop(paths.name(record.name), None)
            raise DroverError(RefusalReason.INTERNAL, f"guest {record.name} did not start on {host}")
        if record.owner.host != host or record.phase in (Ownership.CRASHED, Ownership.GONE):
            raise DroverError(RefusalReason.GUEST_NOT_RUNNING, f"{record.phase}, owner {record.owner.host}")
        if record.phase is Ownership.STARTING:
            await self._write(guest, lambda r: handover.started(r, writer="a"))
        return GuestStatus(guest, record.name, "inc", RunState.RUNNING, 4711)

    async def _write(self, guest: str, change: Callable[[GuestRecord], GuestRecord]) -> None:
        while True:
            node = self.store.tree.nodes[paths.guest(guest)]
            new = change(decode(GuestRecord, node.data))
            if isinstance(self.store._apply([SetData(paths.guest(guest), encode(new), node.version)]), Done):
                return
            await asyncio.sleep(0)

    def record(self, guest: str) -> GuestRecord:
        return decode(GuestRecord, self.store.tree.nodes[paths.guest(guest)].data)

    def state(self, migration: str) -> MigrationState:
        return decode(MigrationState, self.store.tree.nodes[paths.migration_state(migration)].data)

    def attempts(self, migration: str) -> tuple[AttemptReport, ...]:
        return decode(Attempts, self.store.tree.nodes[paths.attempts(migration)].data).reports

    def reserved(self, host: str) -> dict[str, int]:
        """MiB by migration."""
        above, tree = paths.reservations(host), self.store.tree
        promised = {name: tree.nodes[f"{above}/{name}"].data for name in tree.children(above)}
        return {name: decode(Reservation, data).memory_mib for name, data in promised.items()}

    def promise(self, host: str, **memory_mib: int) -> None:
        """To migrations by name."""
        for migration, mib in memory_mib.items():
            self.put(paths.reservation(host, migration), Reservation(mib))

    def job(self, job: str) -> EvacuationState:
        """With its guests."""
        nodes = self.store.tree.nodes
        head = decode(EvacuationState, nodes[paths.evacuation_state(job)].data)
        rows = [name for name in self.store.tree.children(paths.evacuation(job)) if paths.is_evacuation_guests(name)]
        found = [decode(EvacuationGuests, nodes[f"{paths.evacuation(job)}/{name}"].data).guests for name in rows]
        return replace(head, guests=(*(guest for guests in found for guest in guests), *head.guests))

    def edit_state(self, migration: str, change: Callable[[MigrationState], MigrationState]) -> None:
        path = paths.migration_state(migration)
        node = self.store.tree.nodes[path]
        assert isinstance(
            self.store._apply([SetData(path, encode(change(decode(MigrationState, node.data))), node.version)]), Done
        )
