"""One attempt between two sessions in one process: real runners, with a link in place of the agents' gRPC."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agents.disks.local import LocalImages
from agents.engine.base import OutgoingOptions, Vmm
from agents.handover.destination import DestinationState
from agents.handover.destination_shell import DestinationShell
from agents.handover.ledger import AttemptLedger
from agents.handover.peer import Described
from agents.handover.source import SourceState
from agents.handover.source_shell import SourceShell
from agents.handover.words import Seen
from agents.shims.base import DestinationShim, Frame, InVmmDevices, Load, SourceShim
from agents.shims.block import SourceDisks
from orchestrator.core import handover
from orchestrator.core.disks import ImageThere, SyncPoint
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AckRequest, AttemptRef, HostRef
from orchestrator.core.policy import MigrationPolicy, OnTimeout
from orchestrator.core.records import Requests
from orchestrator.core.switchover import AckLedger
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger, op_create, op_set
from orchestrator.ledger.store import Done, Store

S, D = HostRef("host-1", "boot-1"), HostRef("host-2", "boot-2")


@dataclass
class Link:
    """Both directions between the two agents of an attempt."""

    source: SourceShell | None = None
    destination: DestinationShell | None = None

    async def ping(self) -> bool:
        return self.destination is not None

    async def send_frame(self, frame: Frame) -> None:
        assert self.destination is not None
        await self.destination.frame(frame)

    async def images(self) -> tuple[ImageThere, ...]:
        assert self.destination is not None
        return self.destination.images_there()

    async def release(self, points: tuple[SyncPoint, ...]) -> None:
        assert self.destination is not None
        await self.destination.release(points)

    async def go(self, want_run: bool) -> bool:
        assert self.destination is not None
        self.destination.go(self.destination.state.inc, want_run)
        return self.destination.started.is_set()

    async def machine(self, *, hold_locks: bool = False) -> Described:
        raise NotImplementedError("asked before there is an attempt")

    async def ack(self, entry: AckRequest) -> None:
        assert self.source is not None
        self.source.acked(entry)

    async def loaded(self, inc: str, loads: tuple[Load, ...], images: tuple[SyncPoint, ...] = ()) -> None:
        assert self.source is not None
        self.source.loaded(inc, loads, images)

    async def failed(self, inc: str) -> None:
        assert self.source is not None
        self.source.feed(Seen.DEST_FAILED)

    async def done(self, inc: str) -> None:
        assert self.source is not None
        self.source.feed(Seen.DONE_KNOWN)


@dataclass(frozen=True)
class Leaving:
    """The source's end of an attempt."""

    vmm: Vmm
    shims: Sequence[SourceShim] = ()
    in_vmm: InVmmDevices | None = None
    disks: tuple[str, ...] = ()
    """Local ones."""


@dataclass(frozen=True)
class Coming:
    """The destination's end."""

    inc: str
    vmm: Vmm
    shims: Sequence[DestinationShim] = ()
    in_vmm: InVmmDevices | None = None
    images: LocalImages | None = None


@dataclass(kw_only=True)
class Moves:
    """What the ledger says of a guest on host-1, and its attempts to get to host-2, one after the other."""

    store: Store
    guest: str = field(default_factory=lambda: uuid.uuid4().hex)
    migration: str = field(default_factory=lambda: uuid.uuid4().hex)
    attempt: int = 0
    source: SourceShell = field(init=False)
    """Of the attempt under way, or of the last one; likewise `destination`."""
    destination: DestinationShell = field(init=False)

    async def born(self) -> None:
        await Ledger(self.store).init_tree()
        await self.store.ensure(paths.migration(self.migration))
        await self.store.ensure(paths.shard(paths.guest(self.guest)))
        result = await self.store.multi(
            [
                op_create(paths.guest(self.guest), GuestRecord("g", Ownership.IDLE, S)),
                op_create(paths.requests(self.migration), Requests()),
                op_create(paths.acks(self.migration), Requests()),
            ]
        )
        assert isinstance(result, Done), result

    async def record(self) -> GuestRecord:
        found = await Ledger(self.store).read_guest(self.guest)
        assert found is not None
        return found[0]

    async def opened(self) -> AttemptRef:
        """The next attempt, as the coordinator opens it."""
        self.attempt += 1
        found = await Ledger(self.store).read_guest(self.guest)
        assert found is not None
        record = handover.open_attempt(found[0], self.migration, self.attempt, D, epoch=1, writer="test")
        assert isinstance(await self.store.multi([op_set(paths.guest(self.guest), record, found[1])]), Done)
        return AttemptRef(self.guest, self.migration, self.attempt)

    async def conducted(
        self,
        ref: AttemptRef,
        here: Leaving,
        there: Coming,
        policy: MigrationPolicy,
        options: OutgoingOptions,
        directory: Path,
        *,
        paused: bool = False,
        during: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """To its end at both hosts. `during` runs beside it; markers are written into `directory`."""
        link = Link()
        self.source = link.source = self._source(ref, here, there.inc, link, policy, options, paused=paused)
        self.destination = link.destination = self._destination(
            ref, there, bool(here.shims), link, directory, paused=paused
        )
        await self.destination.begin(ref.attempt)
        async with asyncio.timeout(40), asyncio.TaskGroup() as group:
            group.create_task(self.source.run())
            group.create_task(self.destination.run())
            if during is not None:
                group.create_task(_awaited(during))

    def _source(
        self,
        ref: AttemptRef,
        here: Leaving,
        inc: str,
        link: Link,
        policy: MigrationPolicy,
        options: OutgoingOptions,
        *,
        paused: bool,
    ) -> SourceShell:
        state = SourceState(
            ref,
            S,
            inc,
            suspend_on_timeout=policy.on_timeout is OnTimeout.SUSPEND,
            has_devices=bool(here.shims),
            disks=here.disks,
            inside=here.in_vmm is not None,
            want_run=not paused,
            paused=paused,
            acks=AckLedger(stopped=paused),
        )
        ledger = AttemptLedger(self.store, ref, S, inc, "agent-1")
        disks = SourceDisks(here.vmm.disks, inc) if here.disks else None
        return SourceShell(
            state, here.vmm, here.shims, ledger, link, policy, options, ref.attempt, in_vmm=here.in_vmm, disks=disks
        )

    def _destination(
        self, ref: AttemptRef, there: Coming, has_devices: bool, link: Link, directory: Path, *, paused: bool
    ) -> DestinationShell:
        async def want_run() -> bool:
            return not paused

        state = DestinationState(ref, D, there.inc, has_devices=has_devices, has_disks=there.images is not None)
        ledger = AttemptLedger(self.store, ref, D, there.inc, "agent-2")
        marker = directory / f"{there.inc}.marker"
        return DestinationShell(
            state,
            there.vmm,
            there.shims,
            ledger,
            link,
            marker,
            want_run,
            in_vmm=there.in_vmm,
            images=there.images,
        )


async def _awaited(work: Callable[[], Awaitable[None]]) -> None:
    await work()
