"""The agent of one host: its place in the ledger, its guests, and the sessions that other agents speak to."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import structlog

from agents.config import AgentConfig
from agents.disks import pools
from agents.disks.imports import PoolImages
from agents.disks.locks import PoolLocks
from agents.engine.base import MigrationEngine
from agents.guest import adopting
from agents.guest.console import Consoles, Session
from agents.guest.files import GuestFiles, forget_stale_links, found_on_disk, note_roots
from agents.guest.held import Forgotten
from agents.guest.keeper import HostedGuest
from agents.guest.ledger import GuestLedger
from agents.guest.shared import AgentShared, PeerChannels
from agents.handover.attempt import Arrival, Departure
from agents.handover.peer import AttemptKey
from agents.handover.shell import Mistakes
from agents.host.concerned import Concerned
from agents.host.epoch import EpochGate
from agents.host.identity import Installation
from agents.host.incarnation import Believed
from agents.host.journal import Journal
from agents.host.metrics import Metrics
from agents.host.registration import Registration
from agents.host.streams import streams_of
from agents.nets import taps
from agents.shims import external
from orchestrator import descriptors
from orchestrator.core.agent import (
    AgentSample,
    AgentStatus,
    AttemptSeen,
    AttemptStatus,
    ConductOrder,
    DisplayAddress,
    GuestStatus,
    PrepareOrder,
    WishApplied,
)
from orchestrator.core.changes import MachineChange
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.identity import AgentIdentity
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.migration import Prepared
from orchestrator.core.offers import Obstacle
from orchestrator.core.records import GuestSpec, LiveMachine, NetworkKind
from orchestrator.core.restore import HeldGuestCopy, HostHeld
from orchestrator.ledger import paths
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import SessionState, Store, StoreUnavailable
from orchestrator.metrics import LAG_S, lag
from orchestrator.tasks import Tasks, failures

log = structlog.get_logger(__name__)

T = TypeVar("T")

_UUID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")
"""Of a guest, as it stands in paths: of the ledger, and of this host's disk."""
RETRY_S = 0.2
FIRST_SCAN_S = 10.0
SCAN_S = 60.0
"""How long a birth that nobody carries out is left alone."""
TIDY_S = 30.0
"""Guests that have left are taken off the host's list at most this often."""
NET_S = 1_800.0
"""Everything on the list is looked at this often, whatever the watch said."""
MEMORY_S = 2.0
"""How long a destination, and a birth, wait for the copies of guests that have left to be gone."""
SAMPLE_S = 0.25
"""Watchers are told at most this often."""

SWEEP_S = 3_600.0
"""What imports of images left in the pools is looked for so often, and at the start."""

MAX_CHECKED = 1_000
"""Guests that one call may ask about."""
CHECKED_AT_A_TIME = 8
"""VMMs that are asked at the same time."""


class Agent:
    """Everything that one host does. `start` once, `stop` once; all calls between are idempotent."""

    def __init__(
        self,
        config: AgentConfig,
        me: AgentIdentity,
        engine: MigrationEngine,
        stores: tuple[Store, Store],
        peers: PeerChannels,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._journal = Journal(config.dir / "journal")
        self._store, commits = stores
        here = HostRef(config.host, me.boot_id)
        self.place = Registration(config, me, Installation(config.dir), engine, self._store)
        self._believed = Believed(here.host, self._store, self._journal)
        self._believed.on_change = self._wake_all
        self._epochs = EpochGate(here.host, self._store, self._journal, self._believed)
        self._changes = 0
        self._changed = asyncio.Event()
        self._tools = self._shared(here, engine, commits, peers, metrics)
        self._guests: dict[str, HostedGuest] = {}
        self._tasks = Tasks(f"agent of {here.host}")
        self._hosting = asyncio.Lock()
        self._concerned = Concerned(here.host, self._store)
        self._listed: set[str] = set()
        """Guests that concern this host, as last listed."""
        self._settled: set[str] = set()
        """Those of them that are not here, of which nothing is owed."""
        self._unwritten: set[str] = set()
        """Guests that are to be listed, or not to be listed any more, and whose list is not written yet."""
        self._tidy_at_s = 0.0
        self._all_found = False
        """Every guest that earlier agents wrote down on this disk is known."""
        self.images = PoolImages(config)
        self._consoles = Consoles()
        self._measure(metrics)

    def _shared(
        self, here: HostRef, engine: MigrationEngine, commits: Store, peers: PeerChannels, metrics: Metrics
    ) -> AgentShared:
        return AgentShared(
            config=self._config,
            here=here,
            writer=f"agent-{here.host}-{secrets.token_hex(8)}",
            engine=engine,
            store=self._store,
            commits=commits,
            journal=self._journal,
            believed=self._believed,
            peers=peers,
            metrics=metrics,
            departures=self._departures,
            link_shared=self._link_shared,
            changed=self._notice,
            must_have_memory=self._must_have_memory,
            must_be_nobodys=self._must_be_nobodys,
            adopting=asyncio.Lock(),
            pool_locks=PoolLocks(self._config),
            streams=streams_of(self._config),
        )

    def _measure(self, metrics: Metrics) -> None:
        metrics.gauges(
            guests=lambda: sum(1 for guest in list(self._guests.values()) if guest.is_here),
            under_way=self._departures,
            quorum_age_s=lambda: self._store.quorum_age_s,
            mistakes=Mistakes.seen.total,
            not_kept=lambda: sum(1 for guest in list(self._guests.values()) if guest.trouble is not None),
            place_lost=lambda: int(bool(self.place.lost)),
            ledger_doubted=lambda: int(bool(self._believed.said)),
        )

    @property
    def here(self) -> HostRef:
        """This host in its present power cycle."""
        return self._tools.here

    def _notice(self) -> None:
        self._changes += 1
        self._changed.set()

    def _departures(self) -> int:
        return sum(1 for guest in list(self._guests.values()) if guest.departure is not None)

    def _link_shared(self) -> None:
        """Every engine that may stop its guest is told its new share of the link."""
        for guest in self._guests.values():
            if guest.departure is not None:
                self._tasks.spawn(guest.departure.share_again(), "share of the link")

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take the host's place in the ledger, then adopt what an earlier agent left: nothing is decided about a guest
        by an agent that may not be its host's. Raises as `Registration.take` does."""
        await self.place.take()
        self._journal.open()
        try:
            note_roots(self._config)
            forget_stale_links()
        except OSError as error:  # its guests need their agent now
            log.warning("where guests of this agent are is not noted down", error=str(error))
        await self._adopt_found()
        await self._forget_strays()
        await self._sweep_taps()
        self.place.hold()
        self._believed.watch()
        self._store.on_session(self._session)
        self._tasks.keep(descriptors.look, "reserve of descriptors", again_s=descriptors.LOOK_S)
        self._tasks.keep(lag.look, "lag of the event loop", again_s=LAG_S)
        self._tasks.keep(self._journal.write_on, "journal", again_s=RETRY_S, every_s=0.0)
        self._tasks.keep(self._look_for_guests, "scan of the ledger", again_s=RETRY_S)
        if self._config.pools:
            self._tasks.keep(self._sweep_imports, "what imports left", again_s=SWEEP_S, every_s=SWEEP_S)

    async def _adopt_found(self) -> None:
        """One guest that cannot be adopted is that guest's trouble. What cannot be read is read again by each scan."""
        found = await asyncio.to_thread(found_on_disk, self._config)
        self._all_found = not found.unreadable
        await asyncio.gather(*(self._adopt(files) for files in found.guests if files.uuid not in self._guests))

    async def _forget_strays(self) -> None:
        """Before anything can be prepared here: whatever programs hold for no copy of ours is nobody's."""
        if (known := self._noted()) is not None:
            await external.forget_strays(self._config.shims, known)

    def _noted(self) -> set[tuple[str, str]] | None:
        """Uuid and `inc` of every copy that earlier agents noted down. None: some note cannot be read at the moment, so
        nothing that is found can be said to be nobody's."""
        if not self._all_found:
            return None
        try:
            return {(uuid, one.inc) for uuid, guest in self._guests.items() for one in guest.files.processes()}
        except (BadRecord, OSError) as error:
            log.error("what belongs to no copy is not looked for", error=str(error))
            return None

    async def _sweep_taps(self) -> None:
        """Those that an agent left which was killed between a tap and its VMM, or with a VMM."""
        known = self._noted() if self._config.networks else None
        if known is None:
            return
        ovs = any(network.kind is NetworkKind.OVS for network in self._config.networks.values())
        try:
            await taps.sweep(taps.root_of(self._config.dir), {inc for _, inc in known}, ovs=ovs)
        except OSError as error:  # they carry nothing; the next agent looks again
            log.error("taps are not looked through", error=str(error))

    async def _sweep_imports(self) -> None:
        await asyncio.to_thread(self.images.sweep)

    async def _adopt(self, files: GuestFiles) -> None:
        guest = HostedGuest(self._tools, files)
        await guest.adopt()
        self._guests[files.uuid] = guest
        guest.start()
        guest.wake()

    async def stop(self) -> None:
        """Leave the ledger and let go; VMMs, devices and attempts are left to the next agent."""
        self._concerned.close()
        self._believed.close()
        self.images.close()
        await asyncio.gather(self._tasks.close(), self.place.close())
        await asyncio.gather(*(guest.stop() for guest in self._guests.values()))

    def _session(self, state: SessionState) -> None:
        """A new session has no ephemeral node yet; watches are set again by the store."""
        if state is SessionState.CONNECTED:
            self.place.wake()
            self._wake_all()

    def _wake_all(self) -> None:
        for guest in self._guests.values():
            guest.wake()

    # --- the ledger's guests ------------------------------------------------------------------------------------------

    async def _look_for_guests(self) -> None:
        """Find guests that the ledger says are ours and of which nothing is on this disk, so that they are declared.

        Which guests may be ours is told by a watch, so at rest nothing is read.
        """
        self._concerned.start()
        loop = asyncio.get_running_loop()
        born_after_s, net_at_s = FIRST_SCAN_S, loop.time() + NET_S
        births: dict[str, float] = {}
        while True:
            self._concerned.woken.clear()
            try:
                births = await self._scan(births, born_after_s)
            except (StoreUnavailable, BadRecord, DroverError) as error:
                log.warning("scan of the ledger: trying again", error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            born_after_s = SCAN_S
            await self._until_worth_a_scan(births, net_at_s)
            if loop.time() >= net_at_s:
                self._settled, net_at_s = set(), loop.time() + NET_S * random.uniform(0.5, 1.5)

    async def _until_worth_a_scan(self, births: dict[str, float], net_at_s: float) -> None:
        """Until the list has changed, guests have left, a birth is due or it is time for the net."""
        loop = asyncio.get_running_loop()
        while loop.time() < net_at_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_SCAN_S):
                    await self._concerned.woken.wait()
            moved = self._concerned.woken.is_set() or self._listed - self._held() - self._settled - births.keys()
            due = any(at_s <= loop.time() for at_s in births.values())
            untidy = self._unwritten and self._tidy_at_s <= loop.time()
            if moved or due or untidy or not self._all_found:
                return

    def _held(self) -> set[str]:
        return {uuid for uuid, guest in list(self._guests.items()) if not guest.forgotten}

    async def _scan(self, births: dict[str, float], born_after_s: float) -> dict[str, float]:
        """Look at listed guests that are not here, and list those that are here and missing.

        `births`: guests that are about to be born here, and when they are buried: whoever wrote one may be about to
        call `start_guest`. Returns those that remain.
        """
        if not self._all_found:
            await self._adopt_found()
        self._listed, held = await self._concerned.listed(), self._held()
        self._settled = (self._settled & self._listed) - held
        now_s = asyncio.get_running_loop().time()
        remain: dict[str, float] = {}
        for uuid in self._listed - held - self._settled:
            bury_at_s = births.get(uuid, now_s + born_after_s)
            try:
                if await self._scan_one(uuid, bury=now_s >= bury_at_s):
                    remain[uuid] = bury_at_s
                elif uuid not in self._guests:
                    self._settled.add(uuid)
                    self._unwritten.add(uuid)
            except StoreUnavailable:
                raise
            except Exception as error:  # of this guest: the others are looked at all the same
                failures["scan of a guest"] += 1
                self._settled.add(uuid)
                log.error("a guest of the ledger cannot be looked after", guest=uuid, error=repr(error))
        await self._tidy(held)
        return remain

    async def _tidy(self, held: set[str]) -> None:
        """Seldom, so that what many migrations leave behind goes with one write."""
        now_s = asyncio.get_running_loop().time()
        if now_s < self._tidy_at_s:
            return
        self._tidy_at_s = now_s + TIDY_S
        dropped = await self._concerned.drop((self._unwritten & self._listed) - held)
        self._unwritten = dropped | await self._concerned.add(held - self._listed)

    async def _scan_one(self, uuid: str, *, bury: bool) -> bool:
        """Whether the guest is about to be born here."""
        node = await self._store.read(paths.guest(uuid))
        if node is None or not node.data:
            return False
        record = decode(GuestRecord, node.data, path=paths.guest(uuid))
        if record.owner.host != self.here.host or record.phase in (Ownership.CRASHED, Ownership.GONE):
            return False
        starting = record.phase is Ownership.STARTING
        if not starting or bury:
            guest = await self._host(uuid)
            guest.may_bury = True
            guest.wake()
        return starting and not bury

    async def _host(self, uuid: str) -> HostedGuest:
        """The guest's keeper here, made if there is none. Raises DroverError when the ledger knows no such guest."""
        async with self._hosting:
            known = self._guests.get(uuid)
            if known is not None and not known.forgotten:
                return known
            known_form = _UUID.fullmatch(uuid) is not None
            spec = await GuestLedger(self._store, uuid, self._tools.writer).spec() if known_form else None
            if spec is None:
                raise DroverError(RefusalReason.NOT_FOUND, f"there is no guest {uuid}")
            guest = HostedGuest(self._tools, GuestFiles(self._config, uuid, spec))
            guest.may_bury = False
            await guest.adopt()  # its own note on the disk may be what was lost
            self._guests[uuid] = guest
            guest.start()
            return guest

    def _known(self, uuid: str) -> HostedGuest:
        guest = self._guests.get(uuid)
        if guest is None or guest.forgotten:
            raise DroverError(RefusalReason.NOT_FOUND, f"guest {uuid} is not on {self.here.host}")
        return guest

    # --- AgentService -------------------------------------------------------------------------------------------------

    def _must_take_on(self) -> None:
        """Nothing new is begun here without the host's place, nor on the reserve of descriptors: that is for the guests
        there are. Raises HOST_NAME_TAKEN and NO_CAPACITY."""
        self.place.must_hold()
        if descriptors.reserve.released:
            said = f"the agent of {self.here.host} has no descriptors left: raise its limit of open files (LimitNOFILE)"
            raise DroverError(RefusalReason.NO_CAPACITY, said)

    async def start_guest(self, uuid: str) -> GuestStatus:
        """See `HostedGuest.birth`. A caller that is cut off does not stop it half-way."""
        self._must_take_on()
        return await self._to_its_end(self._kept(uuid, lambda guest: guest.birth()))

    async def end_guest(self, uuid: str) -> None:
        """See `HostedGuest.end`. A caller that is cut off does not stop it half-way."""
        await self._to_its_end(self._kept(uuid, lambda guest: guest.end()))

    async def keep_guest(self, uuid: str, *, only_ended: bool) -> None:
        """See `HostedGuest.keep`. A caller that is cut off does not stop it half-way."""
        await self._to_its_end(self._kept(uuid, lambda guest: guest.keep(only_ended=only_ended)))

    async def examine_vmm(self, name: str, pid: int, qmp: str, wished: GuestSpec | None) -> adopting.Found:
        """See `adopting.examine`. A process that is a guest's here already is refused with ALREADY_EXISTS."""
        self._must_take_on()
        self._must_be_nobodys(pid)
        return await adopting.examine(self._tools.engine, self._config, name, (pid, qmp), wished)

    def _must_be_nobodys(self, pid: int) -> None:
        for guest in self._guests.values():
            if any(copy.vmm.metadata.pid == pid and not copy.is_gone for copy in guest.copies.values()):
                said = f"process {pid} of {self.here.host} is guest {guest.name} already"
                raise DroverError(RefusalReason.ALREADY_EXISTS, said, field="pid")

    async def release_vmm(self, uuid: str) -> None:
        """See `HostedGuest.release`. A caller that is cut off does not stop it half-way."""
        await self._to_its_end(self._kept(uuid, lambda guest: guest.release()))

    async def _kept(self, uuid: str, call: Callable[[HostedGuest], Awaitable[T]]) -> T:
        """By the guest's keeper, or by the next one when it has just ended."""
        while True:
            with contextlib.suppress(Forgotten):
                return await call(await self._host(uuid))

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """A caller that is cut off ends its waiting, never a birth or a death half-way."""
        task = self._tasks.spawn(work, "call", failed=lambda error: log.info("call ended", error=str(error)))
        if task is None:
            raise DroverError(RefusalReason.AGENT_UNREACHABLE, f"the agent of {self.here.host} is ending")
        return await asyncio.shield(task)

    async def restore_record(self, uuid: str) -> GuestStatus:
        """See `HostedGuest.restore`. Raises NOT_FOUND when this host holds nothing of the guest."""
        return await self._to_its_end(self._known(uuid).restore())

    async def apply_want_run(self, uuid: str, sequence: int) -> WishApplied:
        """See `HostedGuest.apply_wish`. Raises NOT_FOUND when the guest is not here."""
        return await self._known(uuid).apply_wish(sequence)

    async def prepare_destination(self, order: PrepareOrder) -> Prepared:
        """See `Attempts.prepare`. Also raises NO_CAPACITY while copies hold too much memory, STALE_EPOCH for an
        order of a former leader."""
        self._must_take_on()
        await self._epochs.heed(order.epoch, order.shard)
        spec = (await self._host(order.attempt.guest)).files.spec
        await self._must_have_memory(order.attempt.guest, spec.memory_mib)
        return await self._kept(order.attempt.guest, lambda guest: guest.attempts.prepare(order))

    async def _must_have_memory(self, uuid: str, need: int) -> None:
        """For `need` MiB of a copy of the guest. Records free a host's memory when a guest has arrived elsewhere or was
        given up; its copy here holds it a little longer, and only this agent knows for how long.

        Raises NO_CAPACITY once that took too long."""
        loop = asyncio.get_running_loop()
        gives_up = loop.time() + MEMORY_S
        while (held := self._memory_held(uuid)) + need > self._config.memory_mib:
            if loop.time() > gives_up:
                said = f"copies of guests hold {held} of {self._config.memory_mib} MiB of {self.here.host}"
                raise DroverError(RefusalReason.NO_CAPACITY, f"{said}: no room for {need} MiB")
            await asyncio.sleep(RETRY_S)

    def _memory_held(self, but: str) -> int:
        """By every copy of another guest, whoever owns it, in MiB."""
        others = [guest for guest in list(self._guests.values()) if guest.uuid != but]
        return sum(copy.memory_mib for guest in others for copy in guest.copy_statuses())

    async def conduct_attempt(self, order: ConductOrder) -> None:
        """See `Attempts.conduct`. Also raises STALE_EPOCH for an order of a former leader."""
        self.place.must_hold()
        await self._epochs.heed(order.epoch, order.shard)
        await self._known(order.attempt.guest).attempts.conduct(order)

    def get_attempt(self, migration: str, attempt: int) -> AttemptSeen:
        """What is known here of an attempt; a report while it is under way is what it has come to so far."""
        for guest in self._guests.values():
            departure = guest.departure
            if departure is not None and (departure.ref.migration, departure.ref.attempt) == (migration, attempt):
                return AttemptSeen(known=True, ended=False, report=departure.report())
        report = self._journal.report(migration, attempt)
        return AttemptSeen(known=report is not None, ended=report is not None, report=report)

    def nudge(self, uuid: str) -> None:
        """Let the guest's keeper look now; nothing happens when it is not here."""
        guest = self._guests.get(uuid)
        if guest is not None:
            guest.nudge()

    async def check_guests(self, uuids: Sequence[str]) -> dict[str, tuple[Obstacle, ...]]:
        """What stands against moving guests of this host, as far as only it knows; changes nothing. A guest that is
        not here is left out. Raises INVALID_ARGUMENT for more than MAX_CHECKED."""
        if len(uuids) > MAX_CHECKED:
            said = f"at most {MAX_CHECKED} guests at once, not {len(uuids)}"
            raise DroverError(RefusalReason.INVALID_ARGUMENT, said, field="guest_uuids")
        here = [guest for uuid in uuids if (guest := self._guests.get(uuid)) is not None and guest.is_here]
        turn = asyncio.Semaphore(CHECKED_AT_A_TIME)

        async def check(guest: HostedGuest) -> tuple[Obstacle, ...]:
            async with turn:
                return await guest.obstacles()

        found = await asyncio.gather(*(check(guest) for guest in here))
        return dict(zip((guest.uuid for guest in here), found, strict=True))

    async def change_machine(self, uuid: str, wanted: MachineChange, reservations: int) -> GuestSpec:
        """See `HostedGuest.change`. A caller that is cut off does not stop it half-way. Raises NOT_FOUND when the guest
        is not here."""
        self._must_take_on()
        try:
            return await self._to_its_end(self._known(uuid).change(wanted, reservations))
        except Forgotten:
            raise DroverError(RefusalReason.NOT_FOUND, f"guest {uuid} has left {self.here.host}") from None

    async def instruct(self, uuid: str, device: str, instruction: str) -> str:
        """See `HostedGuest.instruct`. Raises INSTRUCTIONS_DISABLED as well."""
        if not self._config.instructions:
            said = f"{self.here.host} lets nobody instruct devices: `instructions` in its configuration allows it"
            raise DroverError(RefusalReason.INSTRUCTIONS_DISABLED, said)
        return await self._known(uuid).instruct(device, instruction)

    async def open_display(self, uuid: str) -> DisplayAddress:
        """See `HostedGuest.open_display`."""
        return await self._known(uuid).open_display()

    @contextlib.asynccontextmanager
    async def console(self, uuid: str, inc: str) -> AsyncGenerator[Session]:
        """A session with the console of a copy; `inc` empty: of the one that is the guest. Raises NOT_FOUND while it is
        not here, and CONSOLE_NOT_AVAILABLE."""
        guest = self._known(uuid)
        copy = guest.copies.get(inc) if inc else guest.own()
        if copy is None or copy.is_gone:
            raise DroverError(RefusalReason.NOT_FOUND, f"no such copy of guest {guest.name} is on {self.here.host}")
        async with self._consoles.attach(copy.inc, copy.files.console(copy.inc)) as session:
            yield session

    def status(self) -> AgentStatus:
        """Everything at once: guests, attempts, copies, and which guest is not kept and why."""
        sample = self._sample()
        guests = list(self._guests.values())
        return AgentStatus(
            self.here,
            self._journal.epoch(),
            sample.guests,
            sample.attempts,
            copies=tuple(copy for guest in guests for copy in guest.copy_statuses()),
            complete=self._all_found and not self._hosting.locked() and all(guest.all_known for guest in guests),
            troubles=tuple(guest.trouble for guest in guests if guest.trouble is not None),
        )

    async def held(self) -> HostHeld:
        """Every process of a guest on this host, as its VMM says now, and which ledger and coordinators this agent has
        known: what an import of a backup goes by."""
        turn = asyncio.Semaphore(CHECKED_AT_A_TIME)
        guests = list(self._guests.values())

        async def one(guest: HostedGuest) -> tuple[HeldGuestCopy, ...]:
            async with turn:
                return tuple(HeldGuestCopy(guest.uuid, guest.name, each) for each in await guest.held())

        found = await asyncio.gather(*(one(guest) for guest in guests))
        return HostHeld(
            self.here,
            complete=self._all_found and not self._hosting.locked() and all(guest.all_known for guest in guests),
            incarnation=self._believed.id,
            epochs=self._journal.epochs(),
            copies=tuple(copy for each in found for copy in each),
        )

    async def rejoin(self, incarnation: str) -> None:
        """See `Believed.rejoin`."""
        await self._believed.rejoin(incarnation)

    def _sample(self) -> AgentSample:
        for uuid in [uuid for uuid, guest in self._guests.items() if guest.forgotten]:
            del self._guests[uuid]
        guests = tuple(guest.status() for guest in self._guests.values() if guest.is_here)
        attempts: list[AttemptStatus] = []
        for guest in self._guests.values():
            if guest.departure is not None:
                attempts.append(guest.departure.status())
        return AgentSample(guests, tuple(attempts))

    async def watch(self) -> AsyncIterator[AgentSample]:
        """Everything at once, then what changed: at most four times a second, and every change."""
        told_guests: dict[str, GuestStatus] = {}
        told_attempts: dict[AttemptRef, AttemptStatus] = {}
        seen, first = -1, True
        while True:
            if seen != self._changes:
                seen = self._changes
                now = self._sample()
                guests = tuple(one for one in now.guests if told_guests.get(one.guest) != one)
                attempts = tuple(one for one in now.attempts if told_attempts.get(one.ref) != one)
                told_guests = {one.guest: one for one in now.guests}
                told_attempts = {one.ref: one for one in now.attempts}
                if guests or attempts or first:
                    first = False
                    yield AgentSample(guests, attempts)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SAMPLE_S * 4):
                    await self._changed.wait()
            await asyncio.sleep(SAMPLE_S)

    # --- PeerService (agents.serving.peer.Attempts) ------------------------------------------------------------------

    def departure(self, key: AttemptKey) -> Departure | None:
        """The attempt under way with this host as its source; None: it is not, or no longer."""
        for guest in self._guests.values():
            if guest.departure is not None and guest.departure.key == key:
                return guest.departure
        return None

    async def machine(self, uuid: str) -> tuple[LiveMachine, GuestSpec]:
        """Of a guest that is here: see `HostedGuest.as_it_runs`."""
        return await self._known(uuid).as_it_runs()

    async def pool_tokens(self, uuid: str) -> Mapping[str, str]:
        """What proves which directories its shared pools are here. Raises NOT_FOUND."""
        return await asyncio.to_thread(pools.tokens, self._config, self._known(uuid).files.spec)

    async def must_go_to(self, uuid: str, host: str) -> None:
        """Raises NOT_PERMITTED unless the guest is on its way to that host; NOT_FOUND."""
        await self._known(uuid).must_go_to(host)

    async def hold_locks(self, uuid: str) -> tuple[str, ...]:
        """For whoever is to see them (`agents.disks.locks`). Raises NOT_FOUND."""
        return await self._tools.pool_locks.held(self._known(uuid).files.spec)

    def arrival(self, key: AttemptKey) -> Arrival | None:
        """The attempt under way with this host as its destination; None: it is not, or no longer."""
        for guest in self._guests.values():
            found = guest.arrivals.get(key[:2])
            if found is not None and found.key == key:
                return found
        return None
