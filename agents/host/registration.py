"""The host's place in the ledger: its record, its `live` node, the certificate that its former power cycle is over.

Whether it may be taken is decided by `orchestrator.core.identity.may_take`. Record, `live` node and certificate are
written in one transaction that holds only if nothing has changed since it was decided: of two agents that claim one
name at the same time, one gets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import structlog

from agents.config import AgentConfig
from agents.engine.base import MigrationEngine
from agents.guest import tpm
from agents.host import pools
from agents.host.identity import Installation, has_ended
from orchestrator.core.endpoint import join_address
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.identity import AgentIdentity, Answer, Doubt, Place, PlaceSeen, may_take
from orchestrator.core.records import (
    Certificate,
    Cordon,
    HostFeature,
    HostRecord,
    HostSpace,
    Network,
    Pool,
    Proof,
)
from orchestrator.ledger import paths
from orchestrator.ledger.layout import WrongLayout
from orchestrator.ledger.ledger import Ledger, op_create
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.ledger.store import Check, Create, Delete, Done, Op, SetData, Store, StoreUnavailable, Versioned
from orchestrator.tasks import Tasks

log = structlog.get_logger(__name__)

LAYOUT_AGAIN_S = 1.0
RETRY_S = 0.2
LOOK_S = 600.0
"""A net below the watches, which tell everything that can happen to the place."""
"""The place is looked at this often, whatever the watches say."""
OFFERED_S = 5.0
"""For a look at what this host offers: a pool may be on a file system that does not answer, and its guests, those that
have nothing in it as well, need their agent."""
SPACE_S = 60.0
"""The room in pools is told at most this often."""
PATIENCE_S = 30.0
"""How long a newcomer waits for a session that is in its way: one that nobody keeps alive lapses long before."""

_SAID: dict[Doubt, str] = {
    Doubt.SESSION_LIVES: "another agent's session holds the name and is kept alive. Two agents must not have one name: "
    "end the wrong one, or give this host a name of its own (`host` in agent.json)",
    Doubt.NO_IDENTITY: "the agent that registered it last was of a version that did not say which machine it is. If "
    "its former power cycle is over, declare it dead; upgrade agents before their hosts restart",
    Doubt.OTHER_INSTALLATION: "it belongs to another installation of Drover. Is agent.json a copy of another host's? "
    "Then give this host a name of its own. If this host replaces the other, declare that one dead first",
    Doubt.OTHER_DIRECTORY: "it was registered on this machine, in this power cycle, with another directory. Start the "
    "agent with the directory (`dir`) that it had. If that was moved, end the agent that still uses it, and keep "
    "`volatile_dir` as it was; if it is lost, restart the host",
    Doubt.OLD_COPY: "its directory (`dir`) is an older copy: the host has been registered since. Is this disk a clone, "
    "or was it restored? If the other host's power cycle is over, declare it dead",
    Doubt.MACHINE_UNKNOWN: "nothing in this machine's hardware proves that it is the one which was registered (no "
    "usable DMI product UUID), so it may be a clone of it. If its former power cycle is over, declare it dead",
    Doubt.OTHER_MACHINE: "it was registered by another machine. Is this disk a clone? Then give this host a name of "
    "its own. If this machine replaces the other, declare that one dead first",
    Doubt.DECLARED_DEAD: "this power cycle was declared dead, and its guests may run elsewhere: restart the host",
}


_ALWAYS = (
    HostFeature.HARDWARE,
    HostFeature.HOTPLUG,
    HostFeature.DISK_THREADS,
    HostFeature.TAKEN_STATE,
    HostFeature.SCREENS,
)


@dataclass(frozen=True, slots=True)
class Offered:
    """What was found on this host for guests' hardware when the agent began."""

    pools: tuple[Pool, ...] = ()
    cpu_models: tuple[str, ...] = ()
    cpu_definitions: dict[str, str] = field(default_factory=dict[str, str])
    firmware: dict[str, str] = field(default_factory=dict[str, str])
    features: tuple[str, ...] = _ALWAYS

    @classmethod
    def of(cls, config: AgentConfig, probed: Mapping[str, str]) -> Offered:
        """Blocking: reads the firmware's files once."""
        features = list(_ALWAYS)
        features += [HostFeature.TPM] if tpm.available() else []
        if config.engine != "qemu":
            features = [HostFeature.HARDWARE]
        return cls(
            pools.published(config),
            tuple(filter(None, probed.get("cpu_models", "").split(","))),
            pools.cpu_definitions(probed),
            pools.firmware_hashes(config),
            tuple(features),
        )

    @classmethod
    def unseen(cls, config: AgentConfig, probed: Mapping[str, str]) -> Offered:
        """Without a look at any file: the room in pools is told later, and firmware by the next agent."""
        names = sorted(config.pools.items())
        return cls(
            tuple(Pool(name, pool.kind, pool.fence, pool.locks == "none") for name, pool in names),
            tuple(filter(None, probed.get("cpu_models", "").split(","))),
            pools.cpu_definitions(probed),
            features=cls().features if config.engine == "qemu" else (HostFeature.HARDWARE,),
        )


@dataclass(frozen=True, slots=True)
class _Look:
    """The place as it was read, and the versions that a write depends on."""

    seen: PlaceSeen
    record: Versioned | None
    live: Versioned | None


class Registration:
    """Takes the host's place once (`take`), then holds it in every new session and notices when it is lost."""

    def __init__(
        self,
        config: AgentConfig,
        me: AgentIdentity,
        installation: Installation,
        engine: MigrationEngine,
        store: Store,
    ) -> None:
        self._config = config
        self._me = me
        self._installation = installation
        self._engine = engine
        self._store = store
        self._tasks = Tasks(f"place of {config.host}")
        self._woken = asyncio.Event()
        self._unwatch: list[Callable[[], None]] = []
        self._record: HostRecord | None = None
        self._offered = Offered()
        self._space: HostSpace | None = None
        """As it was written last by this agent; None: it has not, and what stands there is an earlier one's."""
        self._telling = asyncio.Lock()
        self.lost = ""
        """Why this agent starts nothing new: somebody else has the host's place. Empty: it is ours."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when `lost` changed."""

    # --- taking it ----------------------------------------------------------------------------------------------------

    async def _look_around(self, probed: Mapping[str, str]) -> Offered:
        try:
            async with asyncio.timeout(OFFERED_S):
                return await asyncio.to_thread(Offered.of, self._config, probed)
        except TimeoutError:
            said = "a pool or a file of firmware does not answer: this host offers no firmware until its next start"
            log.error(said, pools=sorted(self._config.pools), waited_s=OFFERED_S)
            return Offered.unseen(self._config, probed)

    async def take(self) -> None:
        """Become the host's agent in the ledger; waits for ZooKeeper, and for a predecessor's session to lapse.

        Waits as well for the upgrade of a ledger of an older layout. Raises DroverError HOST_NAME_TAKEN when the place
        is, or may be, another's, LEDGER_UNREACHABLE when the layout is a newer one: nothing was changed then. Raises
        EngineError when the engine cannot be asked what it can do, OSError when there is no room for this
        installation's id.
        """
        self._installation.open()
        self._me = replace(self._me, installation=self._installation.id)
        probed = await self._engine.probe()
        self._offered = await self._look_around(probed)
        loop = asyncio.get_running_loop()
        gives_up: float | None = None
        while True:
            try:
                await Ledger(self._store).init_tree()
                await self._store.barrier()
                answer = await self._try_to_take(probed)
            except WrongLayout as wrong:
                if wrong.newer:
                    raise DroverError(RefusalReason.LEDGER_UNREACHABLE, str(wrong)) from wrong
                log.warning("the host is not registered, its guests run on", why=str(wrong))
                gives_up = None
                await asyncio.sleep(LAYOUT_AGAIN_S)
                continue
            except StoreUnavailable as error:
                log.warning("the host cannot be registered: ZooKeeper does not answer, trying again", error=str(error))
                gives_up = None
                await asyncio.sleep(RETRY_S)
                continue
            if answer is None:
                return
            if answer.place is Place.REFUSED:
                raise self._refusal(answer.doubt)
            if answer.place is Place.WAIT and gives_up is None:
                gives_up = loop.time() + PATIENCE_S
                log.warning("another session holds the host's name: waiting for it to lapse", longest_s=PATIENCE_S)
            if answer.place is Place.WAIT and gives_up is not None and loop.time() > gives_up:
                raise self._refusal(answer.doubt)
            await asyncio.sleep(RETRY_S)

    async def _try_to_take(self, probed: dict[str, str]) -> Answer | None:
        """None: taken. An answer of TAKE or CERTIFY: something changed meanwhile, look again."""
        look = await self._look()
        answer = may_take(self._me, self._installation.claims, look.seen)
        if answer.place not in (Place.TAKE, Place.CERTIFY):
            return answer
        me = self._with_new_claim(look.seen.holder)
        record = self._host_record(me, probed)
        ops = await self._taking(look, record)
        if answer.place is Place.CERTIFY:
            # A host comes back with another boot_id: its former power cycle is over (H11).
            await self._store.ensure(paths.fences(record.name))
            proof = Certificate(Proof.RETURNED, by=f"{record.name}, installation {me.installation}", time_s=time.time())
            ops.append(op_create(paths.fence(record.name, look.seen.boot_id), proof))
        if not isinstance(await self._store.multi(ops), Done):
            return answer  # if our own write went through all the same, the next look finds it
        if answer.place is Place.CERTIFY:
            log.info("former power cycle is over", boot_id=look.seen.boot_id)
        self._me, self._record = me, record
        return None

    def _with_new_claim(self, holder: AgentIdentity | None) -> AgentIdentity:
        claim = secrets.token_hex(8)
        try:
            self._installation.claim(claim)
        except OSError as error:
            # Its guests need their agent now. Without a claim on the disk the old one stays: it proves a little less.
            log.warning("no room for a new claim on the host's name", error=str(error))
            claim = holder.claim if holder is not None else ""
        return replace(self._me, claim=claim)

    async def _look(self) -> _Look:
        """Raises StoreUnavailable, and DroverError for a record that cannot be read: it may be anybody's."""
        host, me = self._config.host, self._me
        node, live = await self._store.read(paths.host(host)), await self._store.read(paths.live(host))
        try:
            before = decode(HostRecord, node.data, path=paths.host(host)) if node and node.data else None
        except BadRecord as error:
            raise DroverError(RefusalReason.HOST_NAME_TAKEN, f"the record of {host} cannot be read: {error}") from error
        certified = before is not None and await self._is_certified(before.boot_id)
        # After the record was read: whoever it names is dead for good once it is dead.
        gone = before is not None and before.identity is not None and has_ended(before.identity, me)
        return _Look(
            PlaceSeen(
                boot_id=before.boot_id if before else "",
                holder=before.identity if before else None,
                live=live is not None,
                live_holder=_holder(live),
                certified=certified,
                declared_dead=await self._is_certified(me.boot_id),
                holder_gone=gone,
            ),
            node,
            live,
        )

    async def _is_certified(self, boot_id: str) -> bool:
        return await self._store.read(paths.fence(self._config.host, boot_id)) is not None

    async def _taking(self, look: _Look, record: HostRecord) -> list[Op]:
        path, live = paths.host(record.name), paths.live(record.name)
        ops: list[Op] = [
            SetData(path, encode(record), look.record.version) if look.record is not None else op_create(path, record)
        ]
        for child, content in (
            (paths.cordon(record.name), Cordon()),
            (paths.reservations(record.name), None),
            (paths.host_guests(record.name), None),
        ):
            if await self._store.read(child) is None:
                ops.append(Create(child, b"") if content is None else op_create(child, content))
        if look.live is not None:
            ops.append(Delete(live, look.live.version))
        ops.append(Create(live, encode(record.identity), ephemeral=True))
        return ops

    def _host_record(self, me: AgentIdentity, probed: dict[str, str]) -> HostRecord:
        config = self._config
        return HostRecord(
            name=config.host,
            boot_id=me.boot_id,
            control_address=join_address(config.address, config.control_port),
            peer_address=join_address(config.address, config.peer_port),
            memory_mib=config.memory_mib,
            bandwidth_mbps=config.bandwidth_mbps,
            engine=f"{config.engine} {probed['version']}",
            engine_limits=tuple(filter(None, probed.get("limits", "").split("; "))),
            machine_types=tuple(probed["machine_types"].split(",")),
            machine_aliases=_aliases(probed.get("machine_aliases", "")),
            accelerator=probed["accelerator"],
            switchover_ack=probed["switchover_ack"],
            identity=me,
            shims=tuple(sorted(config.shims)),
            pools=self._offered.pools,
            networks=tuple(Network(name, each.kind, each.mtu) for name, each in sorted(config.networks.items())),
            cpu_models=self._offered.cpu_models,
            cpu_definitions=self._offered.cpu_definitions,
            firmware=self._offered.firmware,
            extra_args=config.extra_args_allowed,
            features=self._offered.features,
        )

    def _refusal(self, doubt: Doubt) -> DroverError:
        said = f"this agent may not be {self._config.host}: {_SAID[doubt]} (see docs/fencing.md)"
        return DroverError(RefusalReason.HOST_NAME_TAKEN, said, field="host", details={"doubt": doubt})

    # --- holding it ---------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Watch over the place that was taken, until `close`."""
        host = self._config.host
        for path in (paths.host(host), paths.live(host), paths.fence(host, self._me.boot_id)):
            self._unwatch.append(self._store.watch(path, lambda _: self.wake()))
        self._tasks.keep(self._hold_once, "the host's place", again_s=RETRY_S, every_s=0.0)
        if self._config.pools:
            self._tasks.keep(self._tell_space, "room in pools", again_s=SPACE_S, every_s=SPACE_S)
        if any(pool.bases for pool in self._config.pools.values()):
            self._tasks.keep(self._read_bases, "bases in pools", again_s=SPACE_S, every_s=SPACE_S)

    async def _tell_space(self) -> None:
        """Write how much room the pools have, once it has moved by more than a hundredth of a pool. Best effort: what
        counts is looked at again where a disk is made."""
        await asyncio.to_thread(pools.sweep, self._config)
        async with self._telling:
            await self._tell_what_moved()

    async def _tell_what_moved(self) -> None:
        if self.lost:
            return
        now = await asyncio.to_thread(pools.published, self._config)
        bases = await asyncio.to_thread(pools.bases, self._config)
        told = self._space
        if told is not None and told.bases == bases and not any(_has_moved(told, pool) for pool in now):
            return
        space = HostSpace({pool.name: pool.free_bytes for pool in now}, bases)
        path = paths.space(self._config.host)
        try:
            node = await self._store.read(path)
            write = op_create(path, space) if node is None else SetData(path, encode(space), node.version)
            if isinstance(await self._store.multi([write]), Done):
                self._space = space
        except StoreUnavailable as error:
            log.warning("the room in this host's pools is not told", error=str(error))

    async def _read_bases(self) -> None:
        """What bases there are is told as soon as it is known."""
        await asyncio.to_thread(pools.read_bases, self._config)
        if self._space is None or self._space.bases != await asyncio.to_thread(pools.bases, self._config):
            await self._tell_space()

    def wake(self) -> None:
        """Look soon: a new session has no `live` node yet."""
        self._woken.set()

    async def close(self) -> None:
        """End watches and tasks. The `live` node stays until the store's session ends."""
        for end in self._unwatch:
            end()
        await self._tasks.close()

    def must_hold(self) -> None:
        """Raises HOST_NAME_TAKEN when somebody else has the host's place: nothing new is started here."""
        if self.lost:
            raise DroverError(RefusalReason.HOST_NAME_TAKEN, f"{self._config.host} starts nothing new: {self.lost}")

    async def _hold_once(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await self._woken.wait()
        self._woken.clear()
        try:
            lost = await self._look_after_it()
        except StoreUnavailable:
            await asyncio.sleep(RETRY_S)
            self.wake()
            return
        if lost == self.lost:
            return
        self.lost = lost
        if lost:
            log.error("the host's place was taken: guests are kept, nothing new is started", why=lost)
        else:
            log.warning("the host's place is ours again")
        self.on_change()

    async def _look_after_it(self) -> str:
        """Make what is missing again; why the place is not ours, empty when it is."""
        look = await self._look()
        record, seen = self._record, look.seen
        if record is None or seen.declared_dead:
            return "this power cycle was declared dead; restart the host"
        if look.record is None:
            log.error("the host's record has vanished from the ledger: registering again")
            await Ledger(self._store).init_tree()
            if not isinstance(await self._store.multi(await self._taking(look, record)), Done):
                self.wake()
            return self.lost
        if seen.holder is None or seen.holder.agent != self._me.agent:
            return f"another agent has registered as {self._config.host} ({_whose(seen.holder)})"
        if not seen.live:
            ops = [Check(paths.host(record.name), look.record.version)]
            made = [*ops, Create(paths.live(record.name), encode(self._me), ephemeral=True)]
            if not isinstance(await self._store.multi(made), Done):
                await asyncio.sleep(RETRY_S)
                self.wake()
            return self.lost
        if seen.live_holder is None or seen.live_holder.agent != self._me.agent:
            return f"another agent's session stands for {self._config.host} ({_whose(seen.live_holder)})"
        return ""


def _has_moved(told: HostSpace, pool: Pool) -> bool:
    """By more than a hundredth of the pool."""
    return abs(told.free_bytes.get(pool.name, 0) - pool.free_bytes) * 100 > pool.size_bytes


def _holder(live: Versioned | None) -> AgentIdentity | None:
    if live is None or not live.data:
        return None
    with contextlib.suppress(BadRecord):
        return decode(AgentIdentity, live.data)
    return None


def _whose(holder: AgentIdentity | None) -> str:
    if holder is None:
        return "it does not say which machine it is"
    return f"installation {holder.installation}, power cycle {holder.boot_id}"


def _aliases(told: str) -> dict[str, str]:
    pairs = (each.partition("=") for each in told.split(",") if each)
    return {alias: machine for alias, _, machine in pairs}
