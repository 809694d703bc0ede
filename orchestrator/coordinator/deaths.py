"""Carries out what `core.death` decides: fences and certifies hosts, makes records true to the certificates, and starts
guests elsewhere whose policy asks for it.

Only the leader does this, and every write checks its epoch. Each step is one bounded transaction that reads what it
changes first, so it may end between any two of them: the next leader finds in the records where it goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from uuid import uuid4

import structlog

from orchestrator.coordinator.driver import STORE_RETRY_S, epoch_write
from orchestrator.coordinator.ports import AgentDirectory
from orchestrator.core import death, handover
from orchestrator.core.death import DeathFacts, Next, Restart
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.offers import for_another_life
from orchestrator.core.placement import HostView, choose, need_for
from orchestrator.core.records import (
    Certificate,
    DeathPhase,
    GuestSpec,
    HostDeath,
    HostRecord,
    Proof,
    WantRun,
    host_ref,
)
from orchestrator.fencing.base import Fenced, Fencers, Power
from orchestrator.ledger import paths
from orchestrator.ledger.births import birth_ops
from orchestrator.ledger.gather import members
from orchestrator.ledger.index import Index
from orchestrator.ledger.ledger import op_create, op_set
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.ledger.snapshot import HostEntry
from orchestrator.ledger.store import Create, Delete, Op, SetData, Store, StoreUnavailable, Versioned
from orchestrator.tasks import Tasks

log = structlog.get_logger(__name__)

TURN_S = 0.5
"""Declarations are looked at this often."""
PENDING_S = 2.0
"""While a guest waits to be started elsewhere, all guests are looked at this often."""
NET_S = 15.0
"""And otherwise this often: a COMMIT that was under way may arrive after its destination was certified dead."""
_AT_ONCE = 32


@dataclass(slots=True)
class _Room:
    """The hosts as seen once, with what was placed on them since."""

    views: dict[str, HostView] = field(default_factory=dict[str, HostView])
    entries: dict[str, HostEntry] = field(default_factory=dict[str, HostEntry])
    seen: bool = False
    """False: not looked at yet, or no longer as they were."""

    def look(self, views: Mapping[str, HostView], entries: Mapping[str, HostEntry]) -> None:
        self.views, self.entries, self.seen = dict(views), dict(entries), True

    def taken(self, host: str, memory_mib: int) -> None:
        view, entry = self.views[host], self.entries[host]
        self.views[host] = replace(view, used_mib=view.used_mib + memory_mib)
        self.entries[host] = replace(entry, reservations_version=max(0, entry.reservations_version + 1))


class DeathRunner:
    """All declarations and certificates of one leadership. `run` raises Deposed."""

    def __init__(
        self,
        store: Store,
        agents: AgentDirectory,
        index: Index,
        epoch: int,
        fencers: Fencers,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._agents = agents
        self._index = index
        self._epoch = epoch
        self._fencers = fencers
        self._wall_s = wall_s
        self._tasks = Tasks("deaths")
        self._busy: set[str] = set()
        """Hosts that are being fenced and guests that are being started, each by a task of its own."""
        self._gone: set[str] = set()
        self._crashed: Counter[HostRef] = Counter()
        """Guests that became CRASHED and are not counted in a declaration yet."""
        self._woken = asyncio.Event()
        self._sweep_at_s = 0.0
        self._deposed: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """For ever."""
        loop = asyncio.get_running_loop()
        self._deposed = loop.create_future()
        unwatch = self._store.watch_children(paths.DEATHS, lambda _names: self._woken.set())
        try:
            await self._publish_fencers()
            while True:
                try:
                    await self.turn()
                except (StoreUnavailable, BadRecord) as error:
                    log.warning("deaths of hosts: trying again", error=str(error))
                    await asyncio.sleep(STORE_RETRY_S)
                await self._wait()
        finally:
            unwatch()
            await self._tasks.close()

    async def _wait(self) -> None:
        """Until something is to be done; raises what ended a task for life."""
        assert self._deposed is not None
        if self._deposed.done():
            self._deposed.result()
        try:
            async with asyncio.timeout(TURN_S):
                await self._woken.wait()
        except TimeoutError:
            pass
        self._woken.clear()

    def _failed(self, error: BaseException) -> None:
        """Of a task: Deposed ends the run; a store that is away is asked again at the next turn."""
        if isinstance(error, (StoreUnavailable, BadRecord)):
            log.warning("deaths of hosts: trying again", error=str(error))
        elif self._deposed is not None and not self._deposed.done():
            self._deposed.set_exception(error)
        self._woken.set()

    def _beside(self, key: str, work: Callable[[], object]) -> None:
        """Run it unless it runs already: a fencer or an agent takes its time, and nobody else is to wait for it."""
        if key in self._busy:
            return
        self._busy.add(key)

        async def run() -> None:
            try:
                await work()  # type: ignore[misc]
            finally:
                self._busy.discard(key)
                self._sweep_at_s = 0.0
                self._woken.set()

        self._tasks.spawn(run(), key, failed=self._failed)

    async def _publish_fencers(self) -> None:
        """So that the API can say, before anybody confirms anything, whether a fencer serves a host."""
        content = encode(self._fencers.table)
        while True:
            try:
                await self._store.ensure(paths.FENCERS)
                await self._store.ensure(paths.DEATHS)
                node = await self._store.read(paths.FENCERS)
                if node is not None and node.data == content:
                    return
                if node is not None:
                    await epoch_write(self._store, self._epoch, [SetData(paths.FENCERS, content, node.version)])
            except StoreUnavailable:
                await asyncio.sleep(STORE_RETRY_S)

    async def turn(self) -> None:
        """One look at every declaration, and, when it is due, at every guest."""
        for host in await self._store.children(paths.DEATHS):
            try:
                await self._declaration(host)
            except BadRecord as error:
                log.error("the declaration of a host's death cannot be read", host=host, error=str(error))
        now = asyncio.get_running_loop().time()
        if now >= self._sweep_at_s:
            pending = await self.sweep()
            self._sweep_at_s = now + (PENDING_S if pending else NET_S)

    # --- declarations -------------------------------------------------------------------------------------------------

    async def _declaration(self, host: str) -> None:
        path = paths.death(host)
        node = await self._store.read(path)
        if node is None or not node.data:
            return
        found = decode(HostDeath, node.data, path=path)
        if found.phase.terminal or host in self._busy:
            return
        step = death.death_step(found, await self._facts(found))
        new = replace(step.death, epoch=self._epoch)
        if step.next is Next.REFUSE:
            log.warning("host is not declared dead", host=host, reason=new.failure, why=new.message)
            await self._store_death(replace(new, end_time_s=self._wall_s()), node.version)
            return
        if step.next is Next.CERTIFY:
            await self._certify(new, node.version, by=new.requested_by)
            return
        version = node.version
        if new != found:
            if not await self._store_death(new, version):
                return
            version += 1
        if step.next is Next.FENCE:
            self._beside(host, lambda: self._fence(new, version))
        elif step.next is Next.CONSUME:
            await self._consume(new, version)

    async def _facts(self, found: HostDeath) -> DeathFacts:
        host = await self._store.read(paths.host(found.host))
        registered = decode(HostRecord, host.data, path=paths.host(found.host)) if host and host.data else None
        return DeathFacts(
            registered=host_ref(registered) if registered is not None else None,
            live=await self._store.read(paths.live(found.host)) is not None,
            certified=await self._store.read(paths.fence(found.host, found.boot_id)) is not None,
            fencer=self._fencers.name_for(found.host),
        )

    async def _store_death(self, new: HostDeath, version: int) -> bool:
        return await epoch_write(self._store, self._epoch, [op_set(paths.death(new.host), new, version)])

    async def _fence(self, declared: HostDeath, version: int) -> None:
        log.warning("cutting the power of a host", host=declared.host, fencer=declared.fencer)
        try:
            fenced = await self._fencers.power_off(declared.host)
        except Exception as error:  # a fencer of the operator's own: whatever it raises, nothing is known
            fenced = Fenced(Power.UNKNOWN, repr(error))
        log.warning("fencer answered", host=declared.host, power=fenced.power, said=fenced.said)
        if fenced.power is Power.OFF:
            await self._certify(declared, version, by=f"{declared.requested_by}, confirmed by {declared.fencer}")
            return
        knows = "says that it is not off" if fenced.power is Power.NOT_OFF else "could not tell whether it is off"
        said = f"fencer {declared.fencer} {knows}: {fenced.said or 'no reason given'}"
        failed = death.refused(declared, RefusalReason.NOT_FENCED, said)
        await self._store_death(replace(failed, end_time_s=self._wall_s()), version)

    async def _certify(self, declared: HostDeath, version: int, *, by: str) -> None:
        """One transaction. On an operator's word it also proves that no session of the host lives at that instant: the
        node that such a session holds can be made, and is taken away again."""
        await self._store.ensure(paths.fences(declared.host))
        live = paths.live(declared.host)
        silent: list[Op] = [Create(live, b""), Delete(live, 0)] if declared.on_word else []
        proof = Proof.OPERATOR if declared.on_word else Proof.FENCER
        certificate = Certificate(proof=proof, by=by, time_s=self._wall_s())
        certified = replace(declared, phase=DeathPhase.CERTIFIED)
        ops: list[Op] = [
            op_set(paths.death(declared.host), certified, version),
            *silent,
            op_create(paths.fence(declared.host, declared.boot_id), certificate),
        ]
        if await epoch_write(self._store, self._epoch, ops):
            log.warning("host is certified dead", host=declared.host, boot_id=declared.boot_id, proof=proof, by=by)
        self._woken.set()

    async def _consume(self, declared: HostDeath, version: int) -> None:
        """Done when one whole look at all guests found nothing more to write."""
        dead = HostRef(declared.host, declared.boot_id)
        await self.sweep()
        total = declared.crashed + self._crashed.pop(dead, 0)
        if total != declared.crashed:
            await self._store_death(replace(declared, crashed=total), version)
            return
        said = f"{declared.host} is dead: {_guests(total)} crashed with it"
        done = replace(declared, phase=DeathPhase.DONE, message=said, end_time_s=self._wall_s())
        if await self._store_death(done, version):
            log.warning("host is dead", host=declared.host, crashed=total)

    # --- records ------------------------------------------------------------------------------------------------------

    async def sweep(self) -> bool:
        """Make every record true to the certificates, and go on with every restart; whether one waits."""
        certified = await self._certificates()
        if not certified:
            return False
        guests = await self._guests()
        bound = asyncio.Semaphore(_AT_ONCE)

        async def one(uuid: str, record: GuestRecord) -> GuestRecord:
            async with bound:
                return await self._true_to(uuid, record, certified)

        now = await asyncio.gather(*(one(uuid, record) for uuid, record in guests.items()))
        pending = await self._restarts(dict(zip(guests, now, strict=True)))
        await self._forget_certificates(certified, now)
        return pending

    async def _certificates(self) -> set[HostRef]:
        found: set[HostRef] = set()
        for host in await self._store.children(paths.FENCE):
            found |= {HostRef(host, boot_id) for boot_id in await self._store.children(paths.fences(host))}
        return found

    async def _guests(self) -> dict[str, GuestRecord]:
        """Of every life that is not over. One that cannot be read keeps nobody else waiting."""
        bound = asyncio.Semaphore(_AT_ONCE)

        async def one(uuid: str) -> GuestRecord | None:
            async with bound:
                try:
                    found = await self._guest(uuid)
                except BadRecord as error:
                    log.error("a guest's record cannot be read", error=str(error))
                    return None
            if found is not None and found[0].phase is Ownership.GONE:
                self._gone.add(uuid)
                return None
            return found[0] if found else None

        uuids = [uuid for uuid in await members(self._store, paths.GUESTS) if uuid not in self._gone]
        records = await asyncio.gather(*(one(uuid) for uuid in uuids))
        return {uuid: record for uuid, record in zip(uuids, records, strict=True) if record is not None}

    async def _guest(self, uuid: str) -> tuple[GuestRecord, Versioned] | None:
        node = await self._store.read(paths.guest(uuid))
        if node is None or not node.data:
            return None
        return decode(GuestRecord, node.data, path=paths.guest(uuid)), node

    async def _true_to(self, uuid: str, record: GuestRecord, certified: set[HostRef]) -> GuestRecord:
        """The record afterwards. A race that is lost is run again: the winner may have written nothing that matters."""
        while death.after_certificates(record, certified, writer="") is not None:
            found = await self._guest(uuid)
            if found is None:
                return record
            record, node = found
            wanted = death.after_certificates(record, certified, writer=_writer())
            if wanted is None:
                return record
            if await epoch_write(self._store, self._epoch, [op_set(paths.guest(uuid), wanted, node.version)]):
                if wanted.phase is Ownership.CRASHED:
                    self._crashed[record.owner] += 1
                log.warning("guest of a dead host", guest=record.name, host=record.owner.host, phase=wanted.phase)
                return wanted
        return record

    async def _forget_certificates(self, certified: set[HostRef], records: Sequence[GuestRecord]) -> None:
        """A host that boots every day would fill the ledger with the ends of its power cycles."""
        by_host: dict[str, list[HostRef]] = {}
        for ref in certified:
            by_host.setdefault(ref.host, []).append(ref)
        needed = {ref for record in records for ref in death.speaks_for(record)}
        for host, refs in by_host.items():
            if len(refs) <= death.KEPT_CERTIFICATES:
                continue
            nodes = [(ref, await self._store.read(paths.fence(host, ref.boot_id))) for ref in refs]
            known = {ref: node for ref, node in nodes if node is not None}
            registered = await self._index.host(host)
            current = {host_ref(registered.input.record)} if registered else set[HostRef]()
            for ref in death.superfluous([(ref, node.mzxid) for ref, node in known.items()], needed | current):
                forget = Delete(paths.fence(host, ref.boot_id), known[ref].version)
                await epoch_write(self._store, self._epoch, [forget])

    # --- restarts -----------------------------------------------------------------------------------------------------

    async def _restarts(self, guests: Mapping[str, GuestRecord]) -> bool:
        """Whether any waits for something. One that cannot be read keeps no other waiting."""
        room = _Room()
        pending = False
        for uuid in [uuid for uuid, each in guests.items() if death.may_restart(each)]:
            try:
                pending = await self._restart(uuid, room) or pending
            except BadRecord as error:
                log.error("guest cannot be started elsewhere", uuid=uuid, error=str(error))
        return pending

    async def _restart(self, uuid: str, room: _Room) -> bool:
        """The next step of one guest; whether another follows."""
        spec, found = await self._index.spec(uuid), await self._guest(uuid)
        if spec is None or found is None or death.why_left(spec):
            return False
        record, node = found
        successor = await self._guest(record.successor) if record.successor else None
        name = await self._store.read(paths.name(record.name))
        leads_to = decode(str, name.data, path=paths.name(record.name)) if name is not None else ""
        ours = leads_to in ("", uuid, record.successor)
        step = death.restart_step(record, spec, successor[0] if successor else None, name_is_ours=ours)
        if step is Restart.CREATE:
            if not room.seen:
                snapshot = await self._index.snapshot()
                room.look({view.ref.host: view for view in snapshot.views()}, snapshot.hosts)
            avoid = successor[0].owner.host if successor else ""
            if not await self._create(uuid, record, node.version, spec, name, room, avoid):
                room.seen = False
        elif step is Restart.START and successor is not None:
            self._start(record.successor, successor[0])
        elif step is Restart.CLOSE:
            closed = handover.gone(record, writer=_writer())
            await epoch_write(self._store, self._epoch, [op_set(paths.guest(uuid), closed, node.version)])
        return step in (Restart.CREATE, Restart.START)

    async def _create(
        self,
        uuid: str,
        record: GuestRecord,
        version: int,
        spec: GuestSpec,
        name: Versioned | None,
        room: _Room,
        avoid: str,
    ) -> bool:
        """False: what was seen of the hosts or of the guest is no longer so."""
        need = need_for(spec)
        choice = choose(tuple(room.views.values()), need, avoid=(avoid,) if avoid else ())
        if choice.destination is None:
            log.info("guest waits for room after its host's death", guest=spec.name, why=choice.message)
            return True
        host = choice.destination
        born = death.successor_uuid(uuid, record.restarts + 1)
        wish = await self._store.read(paths.want_run(uuid))
        wanted = decode(WantRun, wish.data, path=paths.want_run(uuid)) if wish is not None else WantRun()
        path = paths.name(spec.name)
        await self._store.ensure(paths.shard(paths.guest(born)))
        ops: list[Op] = [
            op_set(paths.guest(uuid), handover.succeeded_by(record, born, writer=_writer()), version),
            op_create(path, born) if name is None else op_set(path, born, name.version),
            *birth_ops(
                born,
                handover.birth(spec.name, host, writer=_writer()),
                for_another_life(spec),
                wanted,
                room.entries[host.host],
            ),
        ]
        if not await epoch_write(self._store, self._epoch, ops):
            return False
        log.warning("guest starts again after its host's death", guest=spec.name, uuid=born, host=host.host)
        room.taken(host.host, spec.memory_mib)
        self._start(born, handover.birth(spec.name, host, writer=""))
        return True

    def _start(self, uuid: str, record: GuestRecord) -> None:
        async def start() -> None:
            entry = await self._index.host(record.owner.host)
            if entry is None:
                return
            try:
                await self._agents.at(entry.input.record.control_address, record.owner.host).start_guest(uuid)
                log.info("guest started", guest=record.name, uuid=uuid, host=record.owner.host)
            except DroverError as error:
                log.warning("guest did not start yet", guest=record.name, host=record.owner.host, why=str(error))
                await asyncio.sleep(PENDING_S)

        self._beside(uuid, start)


def _writer() -> str:
    return f"coordinator-{uuid4().hex}"


def _guests(count: int) -> str:
    return f"{count} guest{'' if count == 1 else 's'}"
