"""The agent of one host: its place in the ledger, its guests, and the sessions that other agents speak to."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import structlog

from agents.config import AgentConfig
from agents.engine.base import MigrationEngine
from agents.guest.files import GuestFiles, forget_stale_links, found_on_disk, note_roots
from agents.guest.held import Forgotten
from agents.guest.keeper import HostedGuest
from agents.guest.ledger import GuestLedger
from agents.guest.tools import PeerChannels, Tools
from agents.handover.attempt import Arrival, Departure
from agents.handover.peer import AttemptKey
from agents.handover.shell import Mistakes
from agents.host.epoch import EpochGate
from agents.host.identity import Installation
from agents.host.journal import Journal
from agents.host.metrics import Metrics
from agents.host.registration import Registration
from agents.shims import external
from orchestrator import descriptors
from orchestrator.core.agent import (
    AgentSample,
    AgentStatus,
    AttemptSeen,
    AttemptStatus,
    ConductOrder,
    GuestStatus,
    PrepareOrder,
    WishApplied,
)
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.identity import AgentIdentity
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.migration import Prepared
from orchestrator.ledger import paths
from orchestrator.ledger.gather import members
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import SessionState, Store, StoreUnavailable
from orchestrator.tasks import Tasks, failures

log = structlog.get_logger(__name__)

T = TypeVar("T")

_UUID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")
"""Of a guest, as it stands in paths: of the ledger, and of this host's disk."""
RETRY_S = 0.2
FIRST_SCAN_S = 10.0
SCAN_S = 60.0
MEMORY_S = 2.0
"""So long a destination, and a birth, wait for the copies of guests that have left to be gone."""
SAMPLE_S = 0.25
"""Watchers are told at most this often."""


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
        self._epochs = EpochGate(here.host, self._store, self._journal)
        self._changes = 0
        self._changed = asyncio.Event()
        self._tools = Tools(
            config=config,
            here=here,
            writer=f"agent-{here.host}-{secrets.token_hex(8)}",
            engine=engine,
            store=self._store,
            commits=commits,
            journal=self._journal,
            peers=peers,
            metrics=metrics,
            departures=self._departures,
            link_shared=self._link_shared,
            changed=self._notice,
            must_have_memory=self._must_have_memory,
        )
        self._guests: dict[str, HostedGuest] = {}
        self._tasks = Tasks(f"agent of {here.host}")
        self._hosting = asyncio.Lock()
        self._all_found = False
        """Every guest that earlier agents wrote down on this disk is known."""
        metrics.gauges(
            guests=lambda: sum(1 for guest in list(self._guests.values()) if guest.is_here),
            under_way=self._departures,
            quorum_age_s=lambda: self._store.quorum_age_s,
            mistakes=Mistakes.seen.total,
            not_kept=lambda: sum(1 for guest in list(self._guests.values()) if guest.trouble is not None),
            place_lost=lambda: int(bool(self.place.lost)),
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
        self.place.hold()
        self._store.on_session(self._session)
        self._tasks.keep(descriptors.look, "reserve of descriptors", again_s=descriptors.LOOK_S)
        self._tasks.keep(self._journal.write_on, "journal", again_s=RETRY_S, every_s=0.0)
        self._tasks.keep(self._scan_now_and_then, "scan of the ledger", again_s=RETRY_S)

    async def _adopt_found(self) -> None:
        """One guest that cannot be adopted is that guest's trouble. What cannot be read is read again by each scan."""
        found = await asyncio.to_thread(found_on_disk, self._config)
        self._all_found = not found.unreadable
        await asyncio.gather(*(self._adopt(files) for files in found.guests if files.uuid not in self._guests))

    async def _forget_strays(self) -> None:
        """Before anything can be prepared here: whatever programs hold for no copy of ours is nobody's."""
        if not self._all_found:
            return  # some device may belong to a guest whose note cannot be read at the moment
        try:
            known = {(uuid, one.inc) for uuid, guest in self._guests.items() for one in guest.files.processes()}
        except (BadRecord, OSError) as error:
            log.error("external devices are not looked through", error=str(error))
            return
        await external.forget_strays(self._config.shims, known)

    async def _adopt(self, files: GuestFiles) -> None:
        guest = HostedGuest(self._tools, files)
        await guest.adopt()
        self._guests[files.uuid] = guest
        guest.start()
        guest.wake()

    async def stop(self) -> None:
        """Leave the ledger and let go; VMMs, devices and attempts are left to the next agent."""
        await asyncio.gather(self._tasks.close(), self.place.close())
        await asyncio.gather(*(guest.stop() for guest in self._guests.values()))

    def _session(self, state: SessionState) -> None:
        """A new session has no ephemeral node yet; watches are set again by the store."""
        if state is SessionState.CONNECTED:
            self.place.wake()
            for guest in self._guests.values():
                guest.wake()

    # --- the ledger's guests ------------------------------------------------------------------------------------------

    async def _scan_now_and_then(self) -> None:
        """Find guests that the ledger says are ours and of which nothing is on this disk, so that they are declared."""
        starting: set[str] = set()
        wait_s = FIRST_SCAN_S
        while True:
            try:
                starting = await self._scan(starting)
            except (StoreUnavailable, BadRecord, DroverError) as error:
                log.warning("scan of the ledger: trying again", error=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            await asyncio.sleep(wait_s)
            wait_s = SCAN_S

    async def _scan(self, starting_before: set[str]) -> set[str]:
        """Births are buried only when they were found twice: whoever wrote one may be about to call `start_guest`."""
        if not self._all_found:
            await self._adopt_found()
        starting: set[str] = set()
        for uuid in await members(self._store, paths.GUESTS):
            if uuid in self._guests:
                continue
            try:
                starting |= await self._scan_one(uuid, starting_before)
            except StoreUnavailable:
                raise
            except Exception as error:  # of this guest: the others are looked at all the same
                failures["scan of a guest"] += 1
                log.error("a guest of the ledger cannot be looked after", guest=uuid, error=repr(error))
        return starting

    async def _scan_one(self, uuid: str, starting_before: set[str]) -> set[str]:
        """The guest, when it is about to be born here."""
        node = await self._store.read(paths.guest(uuid))
        if node is None or not node.data:
            return set()
        record = decode(GuestRecord, node.data, path=paths.guest(uuid))
        if record.owner.host != self.here.host or record.phase in (Ownership.CRASHED, Ownership.GONE):
            return set()
        if record.phase is not Ownership.STARTING or uuid in starting_before:
            guest = await self._host(uuid)
            guest.may_bury = True
            guest.wake()
        return {uuid} if record.phase is Ownership.STARTING else set()

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
        await self._epochs.heed(order.epoch)
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
        await self._epochs.heed(order.epoch)
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
            guest.wake()

    async def instruct(self, uuid: str, device: str, instruction: str) -> str:
        """See `HostedGuest.instruct`. Raises INSTRUCTIONS_DISABLED as well."""
        if not self._config.instructions:
            said = f"{self.here.host} lets nobody instruct devices: `instructions` in its configuration allows it"
            raise DroverError(RefusalReason.INSTRUCTIONS_DISABLED, said)
        return await self._known(uuid).instruct(device, instruction)

    def status(self) -> AgentStatus:
        """Everything at once: guests, attempts, copies, and which guest is not kept and why."""
        sample = self._sample()
        guests = list(self._guests.values())
        return AgentStatus(
            self.here,
            self._journal.epoch,
            sample.guests,
            sample.attempts,
            copies=tuple(copy for guest in guests for copy in guest.copy_statuses()),
            complete=self._all_found and not self._hosting.locked() and all(guest.all_known for guest in guests),
            troubles=tuple(guest.trouble for guest in guests if guest.trouble is not None),
        )

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

    def arrival(self, key: AttemptKey) -> Arrival | None:
        """The attempt under way with this host as its destination; None: it is not, or no longer."""
        for guest in self._guests.values():
            found = guest.arrivals.get(key[:2])
            if found is not None and found.key == key:
                return found
        return None
