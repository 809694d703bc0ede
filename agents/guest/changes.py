"""What is added to a guest's machine while it runs, and taken away: told to its VMM, noted down, and recorded.

Three places say what the machine is: the VMM, the notes of this host (the machine's list, the guest's specification)
and the ledger. The VMM is right. A note of the change is written before the VMM is told, and goes last, once all three
say the same; whoever finds one asks the VMM what came of it and finishes (`settle`). So an agent that dies at any
instant leaves nothing half-done, and the list that the other end of a migration is built from is never but the truth.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from agents.engine.base import EngineError, EngineTimeout, RunState
from agents.guest import copies as making
from agents.guest import hardware, plugging
from agents.guest.attempts import reason_of
from agents.guest.copies import Copy
from agents.guest.held import HeldGuest
from agents.guest.machine import MachineError, disk_of, nic_of
from agents.handover import preflight
from agents.nets.taps import NetsError
from agents.shims.net import mac_address
from orchestrator.core.changes import MachineChange, changed
from orchestrator.core.compatibility import engine_kind
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.core.record import Record
from orchestrator.core.records import GuestSpec, LiveDevice, LiveMachine
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.whole import write_whole

log = structlog.get_logger(__name__)

LET_GO_S = 8.0
"""How long a guest is waited for that was asked for a device."""


@dataclass(frozen=True, slots=True)
class Change(Record):
    """A change that was begun."""

    spec: GuestSpec
    """As it is to be."""
    before: GuestSpec
    devices: tuple[LiveDevice, ...] = ()
    """To be added."""
    leaving: str = ""
    """Id of the device that the guest is asked for."""


def outcome(change: Change, machine: LiveMachine, found: Mapping[str, str]) -> tuple[LiveMachine, GuestSpec]:
    """PURE. What the machine and its specification are, by what its VMM has (id -> driver)."""
    if change.leaving:
        if change.leaving in found:
            return plugging.leaving(machine, change.leaving), change.before
        return plugging.detached(machine, change.leaving), change.spec
    listed = {device.id for device in machine.devices}
    there = [device for device in change.devices if device.id in found]
    machine = plugging.attached(machine, [device for device in there if device.id not in listed])
    if len(there) == len(change.devices):
        return machine, change.spec
    return machine, replace(change.before, vcpus=plugging.vcpus(machine))


class Changes:
    """Of one guest; all calls stand in its turn."""

    def __init__(self, guest: HeldGuest) -> None:
        self._guest = guest
        self._shared = guest.tools
        self.now: Callable[[str], None] = lambda _step: None
        """Told before each step; for tests, which end an agent there."""

    @property
    def _note(self) -> Path:
        return self._guest.files.directory / "change.json"

    async def make(self, wanted: MachineChange, reservations: int) -> GuestSpec:
        """The specification once it is done. `reservations`: version of what the host had promised when it was found to
        have the memory; another one now means OUTCOME_UNKNOWN, and nothing was done.

        Raises what stands against it. GUEST_IS_MIGRATING: not while an attempt may begin or is under way.
        DEVICE_NOT_RELEASED: the guest has not let go of the device, which is still all there.
        """
        guest = self._guest
        own = await self._must_be_at_rest()
        await self.settle()
        guest.files.note_cards(own.inc)
        after = changed(guest.files.spec, wanted)
        if after == guest.files.spec:
            return after
        change = self._planned(own, wanted, after)
        if change.leaving:
            if own.disks_engaged:
                await own.vmm.disks.forget()
                own.disks_engaged = False
        else:
            await self._must_be_possible(after)
        self._write(change)
        try:
            await self._carry_out(own, change, reservations)
        except EngineTimeout as error:
            guest.wake()
            said = f"its VMM has not answered ({error}): it will be asked what came of it"
            raise guest.refused(RefusalReason.OUTCOME_UNKNOWN, said) from error
        except (DroverError, EngineError, OSError) as error:
            await self.settle()
            raise error if isinstance(error, DroverError) else guest.refused(reason_of(error), str(error)) from error
        await self.settle()
        if change.leaving and guest.files.spec != after:
            said = f"it has not let go of {change.leaving} within {LET_GO_S:g} s: the device is still there, as it was"
            raise guest.refused(RefusalReason.DEVICE_NOT_RELEASED, said)
        log.info("the machine of a guest has changed", guest=guest.name, devices=[d.id for d in change.devices])
        return guest.files.spec

    async def _must_be_at_rest(self) -> Copy:
        guest = self._guest
        record = (await guest.fresh()).record
        if record.owner != self._shared.here or record.phase in (Ownership.GONE, Ownership.CRASHED):
            raise guest.refused(RefusalReason.GUEST_NOT_RUNNING, f"{record.phase}, owner {record.owner.host}")
        if record.phase is not Ownership.IDLE or guest.departure is not None:
            said = f"its record says {record.phase}: wait for its migration, or cancel it"
            raise guest.refused(RefusalReason.GUEST_IS_MIGRATING, said)
        own = guest.own()
        if own is None or own.ended:
            raise guest.refused(RefusalReason.GUEST_NOT_RUNNING, "no copy of it runs here")
        if engine_kind(self._shared.config.engine) == "libvirt":
            said = "a guest that libvirt runs is not changed while it runs: start it anew with what it is to have"
            raise guest.refused(RefusalReason.FEATURE_NOT_AVAILABLE, said)
        if own.hardware is None:
            said = "its machine has no list of devices: start it anew with a disk, a card or max_memory"
            raise guest.refused(RefusalReason.FEATURE_NOT_AVAILABLE, said)
        if own.hardware.machine is None:
            raise guest.refused(RefusalReason.FEATURE_NOT_AVAILABLE, "the note of its machine is lost")
        try:
            state = await own.vmm.state()
        except EngineError as error:
            raise guest.refused(RefusalReason.OUTCOME_UNKNOWN, str(error)) from error
        if own.in_session or state.status in making.MIGRATING:
            raise guest.refused(RefusalReason.BUSY, "an earlier attempt is still being ended")
        if state.run_state is RunState.ENDED:
            raise guest.refused(RefusalReason.GUEST_NOT_RUNNING, "it has shut down")
        if not plugging.places_are_ours(guest.files.spec, own.hardware.machine):
            said = "some of its devices have places that QEMU chose, which a change could move: start it anew as q35"
            raise guest.refused(RefusalReason.FEATURE_NOT_AVAILABLE, said)
        return own

    def _planned(self, own: Copy, wanted: MachineChange, after: GuestSpec) -> Change:
        machine = _machine(own)
        before = self._guest.files.spec
        if name := wanted.detach_disk or wanted.detach_nic:
            name_of = disk_of if wanted.detach_disk else nic_of
            device = next((each for each in machine.devices if name_of(each) == name), None)
            if device is None:
                said = f"the list of its machine has no {name}"
                raise self._guest.refused(RefusalReason.MACHINE_TYPE_MISMATCH, said)
            return Change(after, before, leaving=device.id)
        try:
            if wanted.disk is not None:
                devices = (plugging.disk(machine, wanted.disk),)
            elif wanted.nic is not None:
                mac = wanted.nic.mac or mac_address(self._guest.uuid, wanted.nic.name)
                devices = (plugging.nic(machine, wanted.nic, mac),)
            elif wanted.memory_mib:
                devices = (plugging.module(machine, wanted.memory_mib),)
            else:
                devices = plugging.sockets(machine, wanted.vcpus)
        except MachineError as error:
            raise self._guest.refused(RefusalReason.FEATURE_NOT_AVAILABLE, str(error)) from error
        return Change(after, before, devices)

    async def _must_be_possible(self, after: GuestSpec) -> None:
        files = replace(self._guest.files, spec=after)
        await preflight.must_suit(self._shared.engine, self._shared.config, files)
        if after.memory_mib > self._guest.files.spec.memory_mib:
            await self._memory_must_be_possible()
            await self._shared.must_have_memory(self._guest.uuid, after.memory_mib)

    async def _memory_must_be_possible(self) -> None:
        try:
            against = (await self._shared.engine.probe()).get("against_memory", "")
        except EngineError as error:
            raise self._guest.refused(reason_of(error), str(error)) from error
        if against:
            said = f"{against}; start it anew with more `memory`"
            raise self._guest.refused(RefusalReason.FEATURE_NOT_AVAILABLE, said)

    async def _carry_out(self, own: Copy, change: Change, reservations: int) -> None:
        """Raises whatever goes wrong: what came of it is settled afterwards."""
        guest = self._guest
        if change.leaving:
            machine = _machine(own)
            own.note_machine(plugging.leaving(machine, change.leaving))
            device = next(each for each in machine.devices if each.id == change.leaving)
            self.now("device_del")
            await own.vmm.let_go(device, LET_GO_S)
            return
        if change.spec.memory_mib > change.before.memory_mib:
            await guest.ledger.respecified(change.spec, self._shared.here, reservations)
        files = replace(guest.files, spec=change.spec)
        for disk in change.spec.disks[len(change.before.disks) :]:
            await hardware.image(files, own.inc, disk, again=False)
        spec = own.described(files)
        for nic in change.spec.nics[len(change.before.nics) :]:
            await files.plug(own.inc, nic)
        for device in change.devices:
            self.now("device_add")
            await own.vmm.attach(device, spec)
            self.now("attached")

    async def settle(self) -> None:
        """What was begun is finished, or undone, by what the VMM has. Raises EngineError while it does not say,
        StoreUnavailable and OSError."""
        guest = self._guest
        await guest.adopt_left()
        own = guest.own()
        change = self._left_open() or (await self._let_go(own) if own is not None else None)
        if change is None:
            return
        if own is None or own.hardware is None or own.hardware.machine is None:
            # The VMM is gone, and its machine with it. The guest may have written to an image that was made for it.
            await asyncio.to_thread(guest.files.births.succeeded)
            self._note.unlink(missing_ok=True)
            return
        own.asked = False  # before the VMM is asked: what it tells from here on is to be looked at again
        found = await own.vmm.devices()
        known = {device.id: device for device in own.hardware.machine.devices}
        there = [each for each in change.devices if each.id in found and each.id not in known]
        as_they_are = {each.id: await own.vmm.as_it_is(each) for each in there}
        change = replace(change, devices=tuple(as_they_are.get(each.id, each) for each in change.devices))
        machine, spec = outcome(change, own.hardware.machine, found)
        gone = [each for each in change.devices if each.id not in found]
        gone += [each for each in known.values() if each.id == change.leaving and each.id not in found]
        for device in gone:
            await own.vmm.drop(device)
        # Before anything says that the guest has the disk: from there on nobody may remove its image.
        births = guest.files.births
        await asyncio.to_thread(births.failed if change.devices and gone else births.succeeded)
        self.now("noting")
        own.note_machine(machine)
        await guest.respecify(spec)
        await self._unplug(own, change, spec)
        self.now("recording")
        await guest.ledger.respecified(spec, self._shared.here)
        self._note.unlink(missing_ok=True)
        if plugging.gone(machine, found):
            own.asked = True
            guest.wake()
        self._shared.changed()

    async def _unplug(self, own: Copy, change: Change, spec: GuestSpec) -> None:
        """Taps of cards that the guest does not have (any more)."""
        for nic in (*change.before.nics, *change.spec.nics):
            if nic not in spec.nics:
                with contextlib.suppress(NetsError):  # then the next agent finds it
                    await self._guest.files.unplug(own.inc, nic)

    async def _let_go(self, own: Copy) -> Change | None:
        """The guest was asked for a device long ago, and has let go of it now."""
        if not own.asked or own.hardware is None or own.hardware.machine is None:
            return None
        own.asked = False
        gone = plugging.gone(own.hardware.machine, await own.vmm.devices())
        if not gone:
            return None
        spec, device = self._guest.files.spec, gone[0]
        disks = tuple(disk for disk in spec.disks if disk.name != disk_of(device))
        nics = tuple(nic for nic in spec.nics if nic.name != nic_of(device))
        change = Change(replace(spec, disks=disks, nics=nics), spec, leaving=device.id)
        self._write(change)
        return change

    @property
    def pending(self) -> bool:
        """Something was begun, or the guest has let go of something, and that is not noted everywhere yet."""
        own = self._guest.own()
        return self._note.exists() or (own is not None and own.asked)

    def _left_open(self) -> Change | None:
        try:
            return decode(Change, self._note.read_bytes(), path=str(self._note))
        except FileNotFoundError:
            return None

    def _write(self, change: Change) -> None:
        write_whole(self._note, encode(change))


def _machine(own: Copy) -> LiveMachine:
    if own.hardware is None or own.hardware.machine is None:
        raise BadRecord("the note of a guest's machine is lost")
    return own.hardware.machine
