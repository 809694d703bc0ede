"""`drover ledger import`: a backup into a ledger that holds nothing yet, and the truth about guests from their hosts.

The new ledger has no name, or another one than the agents have known, until everything is written: so no agent
believes anything of a restore that is not over, and one that was cut off is begun again. While it runs this process
sits in every leader's seat. The last write announces the ledger to the hosts that were asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import HostRecord, Incarnation, Leader, Shards
from orchestrator.core.restore import Fate, HostHeld
from orchestrator.core.text import clip, handful
from orchestrator.ledger import incarnation, layout, paths
from orchestrator.ledger.backup import Backup
from orchestrator.ledger.gather import each
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.ledger.store import Create, Delete, Done, Op, OutcomeUnknown, SetData, Store, StoreUnavailable
from orchestrator.restore.plan import MAX_EPOCH, Found, Plan, certified, hosts_known, planned
from orchestrator.rpc.agent_client import AgentClients

log = structlog.get_logger(__name__)

ASK_S = 10.0
"""For one host to say what it holds."""
REGISTER_S = 60.0
"""How long the import waits for hosts to register with the new ledger."""
BELIEVE_S = 30.0
"""How long the import waits for agents to believe the new ledger."""
OPS = 100
OPS_BYTES = 400_000
TRIES = 5
NAME = "ledger import"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the hosts said."""

    heard: tuple[HostHeld, ...]
    unheard: Mapping[str, str]
    """Host -> why nothing follows from what it said."""


@dataclass
class Outcome:
    """What an import would do, or did."""

    plan: Plan
    asked: Asked
    token: str
    """Confirms exactly this."""
    incarnation: str = ""
    """Of the ledger; empty: nothing was written."""
    left: list[str] = field(default_factory=list[str])
    """What has to be looked after, a sentence each."""

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "done": bool(self.incarnation),
            "incarnation": self.incarnation,
            "token": self.token,
            "hosts": [host.host.host for host in self.asked.heard],
            "guests": [
                {"name": one.name, "uuid": one.guest, "fate": one.fate.value, "host": one.where, "why": one.why}
                for one in self.plan.found
            ],
            "left": [clip(each) for each in self.left],
        }


class Import:
    """One import. `look` changes nothing; `carry_out` is to follow it with the token that it gave."""

    def __init__(
        self, store: Store, agents: AgentClients, backup: Backup, *, dead: Sequence[str], time_s: float
    ) -> None:
        self._store = store
        self._agents = agents
        self._backup = backup
        self._dead = tuple(dict.fromkeys(dead))
        self._time_s = time_s
        self._addresses: dict[str, str] = {}
        self._shards = 1

    # --- looking ------------------------------------------------------------------------------------------------------

    async def look(self) -> Outcome:
        """What would become of each guest. Raises INVALID_ARGUMENT for a ledger that is not empty or is led, and for a
        host that cannot be left out; HOST_NOT_LIVE for hosts that did not say what they hold; LEDGER_UNREACHABLE."""
        try:
            await self._store.barrier()
            await self._must_be_empty()
            registered = await self._registered()
            named = await incarnation.read(self._store)
        except (StoreUnavailable, BadRecord) as error:
            raise DroverError(RefusalReason.LEDGER_UNREACHABLE, str(error)) from error
        asked = await self._ask(registered)
        if asked.unheard:
            said = "; ".join(f"{host}: {why}" for host, why in sorted(asked.unheard.items()))
            hint = "bring their agents back, or, if their power is off for good, vouch for that with --dead HOST"
            raise DroverError(RefusalReason.HOST_NOT_LIVE, f"not every host says what it holds ({said}): {hint}")
        registered = await self._until_registered(asked)
        plan = planned(
            self._backup,
            asked.heard,
            dead=self._dead,
            registered=tuple(registered),
            incarnations=(named.id,) if named is not None else (),
            time_s=self._time_s,
            writer=f"import-{self._backup.digest[:16]}",
        )
        if wrong := [shard for shard, epoch in plan.epochs.items() if epoch > MAX_EPOCH]:
            said = f"an agent has seen an epoch beyond {MAX_EPOCH} of shard {wrong[0]}, which no coordinator had"
            raise DroverError(RefusalReason.INVALID_ARGUMENT, said)
        outcome = Outcome(plan, asked, self._token(plan, asked))
        outcome.left = [_said(found) for found in plan.found if found.fate is Fate.UNKNOWN]
        return outcome

    async def _until_registered(self, asked: Asked) -> dict[str, HostRecord]:
        """Agents register with an empty ledger by themselves; a record of theirs from the backup would be of an agent
        that may have been restarted since. Raises HOST_NOT_LIVE for a host that does not."""
        loop = asyncio.get_running_loop()
        gives_up = loop.time() + REGISTER_S
        while True:
            try:
                registered = await self._registered()
            except (StoreUnavailable, BadRecord) as error:
                raise DroverError(RefusalReason.LEDGER_UNREACHABLE, str(error)) from error
            missing = {host.host.host for host in asked.heard} - registered.keys()
            if not missing:
                return registered
            if loop.time() > gives_up:
                said = f"{handful(sorted(missing))} does not register here: restart its agent, its guests run on"
                raise DroverError(RefusalReason.HOST_NOT_LIVE, said)
            await asyncio.sleep(0.2)

    def _token(self, plan: Plan, asked: Asked) -> str:
        facts = [
            self._backup.digest,
            *sorted(f"{one.guest} {one.fate} {one.where}" for one in plan.found),
            *sorted(f"{host.host.host} {host.host.boot_id}" for host in asked.heard),
            *self._dead,
        ]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]

    async def _must_be_empty(self) -> None:
        """But for hosts that have registered, and for what an earlier try of this very import has left."""
        await layout.must_be_ours(self._store)
        leads = [
            decode(Leader, node.data).name
            for name in await self._store.children(paths.COORDINATORS)
            if (node := await self._store.read(f"{paths.COORDINATORS}/{name}/leader")) is not None and node.data
        ]
        seats = await self._store.children(paths.SEATS)
        if running := [*seats, *leads]:
            said = f"a coordinator runs ({handful(sorted(set(running)))}): stop all coordinators and APIs first"
            raise DroverError(RefusalReason.INVALID_ARGUMENT, said)
        begun = await self._store.read(paths.RESTORE)
        if begun is not None:
            if begun.data.decode(errors="replace") == self._backup.digest:
                return
            said = "the import of another backup was begun in this ledger and not finished: finish that one"
            raise DroverError(RefusalReason.INVALID_ARGUMENT, said)
        roots = (paths.NAMES, paths.GUESTS, paths.MIGRATIONS, paths.EVACUATIONS, paths.REQUESTS)
        full = [root for root in roots if await self._store.children(root)]
        if full:
            said = f"the ledger is not empty: there is something below {handful(full)}. Import into an empty one"
            raise DroverError(RefusalReason.INVALID_ARGUMENT, said)

    async def _registered(self) -> dict[str, HostRecord]:
        found: dict[str, HostRecord] = {}
        for name in await self._store.children(paths.HOSTS):
            node = await self._store.read(paths.host(name))
            if node is not None and node.data:
                found[name] = decode(HostRecord, node.data, path=paths.host(name))
        return found

    async def _ask(self, registered: Mapping[str, HostRecord]) -> Asked:
        """Every host that there is, but for those that are certified, or vouched for, to be off."""
        records = {**hosts_known(self._backup), **registered}
        if strange := [host for host in self._dead if host not in records]:
            raise DroverError(RefusalReason.INVALID_ARGUMENT, f"there is no host {strange[0]}", field="dead")
        hosts = [
            host
            for name, host in sorted(records.items())
            if name not in self._dead and (name in registered or not certified(self._backup, host))
        ]
        self._addresses = {host.name: host.control_address for host in hosts}
        answers = await each(hosts, self._ask_one, at_once=16)
        heard = tuple(answer for answer in answers if isinstance(answer, HostHeld))
        unheard = {host.name: said for host, said in zip(hosts, answers, strict=True) if isinstance(said, str)}
        return Asked(heard, unheard)

    async def _ask_one(self, host: HostRecord) -> HostHeld | str:
        said = ""
        for _ in range(TRIES):  # one that is busy with a birth, or finds its processes just now, is asked again
            try:
                held = await self._agents.at(host.control_address, host.name).list_copies(ASK_S)
            except DroverError as error:
                return clip(error.message)
            if held.host.host != host.name:
                return f"{held.host.host} answers at {host.control_address}"
            if held.complete and all(copy.held.known for copy in held.copies):
                return held
            said = "it does not know everything that is there yet"
            await asyncio.sleep(1.0)
        return said

    # --- doing --------------------------------------------------------------------------------------------------------

    async def carry_out(self, outcome: Outcome, token: str) -> None:
        """Raises CONFIRMATION_STALE when the guests or hosts are not as they were confirmed, LEDGER_UNREACHABLE when
        not everything is certain to be written: begin again, what is there already is found."""
        if token != outcome.token:
            said = "the guests, or the hosts, are not as they were when this was confirmed: look again"
            raise DroverError(RefusalReason.CONFIRMATION_STALE, said)
        try:
            await self._write(outcome)
        except StoreUnavailable as error:
            raise DroverError(RefusalReason.LEDGER_UNREACHABLE, f"not finished, begin it again: {error}") from error
        await self._until_believed(outcome)
        await self._take_strangers(outcome)

    async def _write(self, outcome: Outcome) -> None:
        plan, store = outcome.plan, self._store
        await Ledger(store).init_tree()
        await store.ensure(paths.CLUSTER)
        await self._put({paths.RESTORE: self._backup.digest.encode()})
        await self._sit(plan)
        await self._put(_with_parents(plan.nodes))
        for shard, epoch in sorted(plan.epochs.items()):
            await self._raise_epoch(shard, epoch)
        named = Incarnation(
            uuid.uuid4().hex,
            plan.follows,
            tuple(sorted(host.host.host for host in outcome.asked.heard)),
            f"imported from a backup of {self._backup.incarnation or 'a ledger without a name'}",
            self._time_s,
        )
        await self._announce(named)
        outcome.incarnation = named.id

    async def _sit(self, plan: Plan) -> None:
        """In every leader's seat, until this session ends: no coordinator leads before everything is written."""
        shards = plan.nodes.get(paths.SHARDS) or b"{}"
        self._shards = decode(Shards, shards, path=paths.SHARDS).count
        for shard in sorted({*range(self._shards), *plan.epochs}):
            plan.epochs.setdefault(shard, 0)
            await self._store.ensure(paths.epoch(shard))
            seat = encode(Leader(NAME, uuid.uuid4().hex))
            result = await self._store.multi([Create(paths.leader(shard), seat, ephemeral=True)])
            if not isinstance(result, Done):
                raise StoreUnavailable(f"the seat of shard {shard} is taken, or cannot be: {result}")

    async def _put(self, nodes: Mapping[str, bytes | None]) -> None:
        """Every node has this content afterwards; None: it is there, with whatever content it has."""
        batch: list[str] = []
        size = 0
        for path in sorted(nodes):  # what lies above comes before what lies below
            batch.append(path)
            size += len(nodes[path] or b"")
            if len(batch) >= OPS or size >= OPS_BYTES:
                await self._put_some({each_path: nodes[each_path] for each_path in batch})
                batch, size = [], 0
        await self._put_some({path: nodes[path] for path in batch})

    async def _put_some(self, nodes: Mapping[str, bytes | None]) -> None:
        for _ in range(TRIES):
            there = await each(nodes, self._store.read)
            ops: list[Op] = []
            for (path, data), node in zip(nodes.items(), there, strict=True):
                if node is None:
                    ops.append(Create(path, data or b""))
                elif data is not None and node.data != data:
                    ops.append(SetData(path, data, node.version))
            if not ops or isinstance(await self._store.multi(ops), Done):
                return
            await self._store.barrier()
        raise StoreUnavailable("somebody else writes to the ledger, or it does not take what is written")

    async def _raise_epoch(self, shard: int, above: int) -> None:
        """The next leader's epoch is one that no agent has ever seen."""
        path = paths.epoch(shard)
        data = encode(Leader(NAME, self._backup.digest[:16]))
        for _ in range(above // OPS + TRIES + 1):
            node = await self._store.read(path)
            if node is None:
                raise StoreUnavailable(f"{path} is gone")
            if node.version > above:
                return
            steps = min(OPS, above + 1 - node.version)
            await self._store.multi([SetData(path, data, node.version + step) for step in range(steps)])
            await self._store.barrier()
        raise StoreUnavailable(f"the epoch of shard {shard} is not above {above}")

    async def _announce(self, named: Incarnation) -> None:
        for _ in range(TRIES):
            there, begun = await self._store.read(paths.INCARNATION), await self._store.read(paths.RESTORE)
            if there is not None and there.data == encode(named):
                return
            name: Op = (
                Create(paths.INCARNATION, encode(named))
                if there is None
                else SetData(paths.INCARNATION, encode(named), there.version)
            )
            done: list[Op] = [Delete(paths.RESTORE, begun.version)] if begun is not None else []
            result = await self._store.multi([name, *done])
            if isinstance(result, Done):
                return
            if isinstance(result, OutcomeUnknown):
                await self._store.barrier()
        raise StoreUnavailable("the ledger could not be announced")

    # --- afterwards ---------------------------------------------------------------------------------------------------

    async def _until_believed(self, outcome: Outcome) -> None:
        """Agents believe it within a moment; one that does not is told of, and believes it when it can."""
        waiting = {host.host.host for host in outcome.asked.heard}
        loop = asyncio.get_running_loop()
        gives_up = loop.time() + BELIEVE_S
        while waiting and loop.time() < gives_up:
            for host in sorted(waiting):
                try:
                    held = await self._agents.at(self._addresses[host], host).list_copies(ASK_S)
                except DroverError:
                    continue
                if held.incarnation == outcome.incarnation:
                    waiting.discard(host)
            if waiting:
                await asyncio.sleep(0.2)
        outcome.left += [f"{host} does not believe the ledger yet: look at its agent's log" for host in sorted(waiting)]

    async def _take_strangers(self, outcome: Outcome) -> None:
        for guest, (name, host) in sorted(outcome.plan.strangers.items()):
            try:
                await self._agents.at(self._addresses[host], host).restore_record(guest)
            except DroverError as error:
                outcome.left.append(
                    f"guest {name} on {host} has no record yet: {error.message}; `drover repair {name}`"
                )


def _with_parents(nodes: Mapping[str, bytes]) -> dict[str, bytes | None]:
    """What lies above is there as well: a host's own record above its list of guests stays its agent's."""
    found: dict[str, bytes | None] = dict(nodes)
    for path in nodes:
        parent = path.rpartition("/")[0]
        while parent:
            found.setdefault(parent, None)
            parent = parent.rpartition("/")[0]
    return found


def _said(found: Found) -> str:
    return f"guest {found.name} ({found.guest}) has no record: {found.why}; `drover repair {found.name}` tells more"
