"""Guests: create, look at, pause, resume, stop."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace

import structlog

from orchestrator import wire, wire_agent, wire_hardware, wire_words
from orchestrator.api import decisions, views
from orchestrator.api.calls import Caller, Tools, digest, tries, write
from orchestrator.api.decisions import StartStep, StopStep
from orchestrator.api.migrations import Migrations
from orchestrator.api.reads import GuestRead, guest_uuid, no_place, read_guest
from orchestrator.api.requests import Request
from orchestrator.core import handover
from orchestrator.core.agent import RunState
from orchestrator.core.changes import MachineChange, changed
from orchestrator.core.compatibility import real_machine
from orchestrator.core.editing import edit_errors, edited_fields, needs_a_stop
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.core.guest import MAX_INSTRUCTION_BYTES, guest_errors, name_error
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.offers import hardware_need, lasting_obstacle, local_disks, more_than, passing_obstacle
from orchestrator.core.placement import Choice, choose, need_again, need_for
from orchestrator.core.records import DeviceSpec, GuestSpec, OnHostDeath, ShimKind, WantRun
from orchestrator.core.text import quoted
from orchestrator.ledger import markers, paths
from orchestrator.ledger.births import again_ops, birth_ops, name_freed
from orchestrator.ledger.ledger import op_create, op_set
from orchestrator.ledger.snapshot import HostEntry
from orchestrator.ledger.store import Check, Delete, Done, Op
from orchestrator.rpc.agent_client import CALL_S, CHANGE_MACHINE_S, END_GUEST_S, START_GUEST_S
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2

log = structlog.get_logger(__name__)

_SILENT = frozenset({RefusalReason.AGENT_UNREACHABLE, RefusalReason.OUTCOME_UNKNOWN})
_MOVED = frozenset({RefusalReason.NOT_FOUND, RefusalReason.GUEST_IS_MIGRATING, RefusalReason.GUEST_NOT_RUNNING})
"""What an agent answers about a guest that is not, or not yet, its own to touch."""
_LOOK_AGAIN_S = 0.5
_WITH_WISH = frozenset({StopStep.END, StopStep.CANCEL, StopStep.WAIT, StopStep.FINISH_BIRTH})
"""A guest that may run somewhere: whoever starts it next must see that it is not to run."""
_OWNERS = 3
"""Owners that are told of a wish, should the guest move meanwhile."""


class Guests:
    """The calls about guests."""

    def __init__(self, tools: Tools, migrations: Migrations) -> None:
        self._tools = tools
        self._migrations = migrations

    # --- look ---------------------------------------------------------------------------------------------------------

    async def read(self, uuid: str) -> GuestRead:
        """One life as the ledger has it now. Raises NOT_FOUND, StoreUnavailable, BadRecord."""
        return await read_guest(self._tools.ledger, uuid)

    async def view(self, uuid: str) -> types_pb2.Guest:
        """One life as the API shows it, with its run state as its agent last said. Raises NOT_FOUND."""
        return views.guest(await self.read(uuid), self._tools.fleet)

    async def uuid_of(self, name: str, *, field: str = "name") -> str:
        """See `guest_uuid`; `field` is the one to blame in the request."""
        return await guest_uuid(self._tools.ledger, name, field=field)

    async def get(self, name: str) -> types_pb2.Guest:
        """By name, or by the uuid of a life. Raises INVALID_ARGUMENT, NOT_FOUND."""
        return await self.view(await self.uuid_of(name))

    # --- birth --------------------------------------------------------------------------------------------------------

    async def create(self, request: pb.CreateGuestRequest, caller: Caller) -> types_pb2.Guest:
        """The guest runs when this returns. A refusal of its agent has made the record GONE and the name free again."""
        spec = checked(request)
        asked = Request.of("" if request.validate_only else request.request_id, digest("CreateGuest", request))
        if earlier := await asked.earlier(self._tools):
            return await self.started(earlier.rpartition("/")[2], caller)
        if earlier := await self._name_taken(spec, asked):
            return await self.started(earlier, caller)
        if request.validate_only:
            host, entry = await self._place(spec, request.host)
            _pinned(spec, entry)
            return types_pb2.Guest(name=spec.name, spec=wire.guest_spec_to_proto(spec), host=host.host, want_run=True)
        return await self.started(await self.recorded(spec, request.host, asked, caller), caller)

    async def recorded(
        self, spec: GuestSpec, wanted: str, asked: Request, caller: Caller, *, want_run: bool = True
    ) -> str:
        """Write the birth of a guest; its uuid, or that of an earlier call with the same request id."""
        contest = tries(caller)
        while True:
            await contest.another()
            born = str(uuid.uuid4())
            async with self._tools.placing:
                host, entry = await self._place(spec, wanted)
                birth = _birth(_pinned(spec, entry), born, host, entry, WantRun(want_run, by=caller.by))
                await self._tools.store.ensure(paths.shard(paths.guest(born)))
                created = await asked.create(self._tools, f"guests/{born}", birth, caller)
            if created:
                known = created.rpartition("/")[2]
                if known == born:
                    log.info("guest recorded", guest=spec.name, uuid=born, host=host.host, by=caller.by)
                return known
            if earlier := await self._name_taken(spec, asked):
                return earlier

    async def _name_taken(self, spec: GuestSpec, asked: Request) -> str:
        """Empty while the name is free; the guest's uuid when this very request took it just now. Else raises
        ALREADY_EXISTS."""
        if await name_freed(self._tools.store, spec.name):
            return ""
        if earlier := await asked.earlier(self._tools):
            return earlier.rpartition("/")[2]
        raise DroverError(
            RefusalReason.ALREADY_EXISTS, f"there is a guest {quoted(spec.name)} already", field="spec.name"
        )

    async def _place(self, spec: GuestSpec, wanted: str) -> tuple[HostRef, HostEntry]:
        """The host that has room, with the versions which must not have moved when the guest is recorded there."""
        snapshot = await self._tools.index.recent()
        need = need_for(spec)
        choice: Choice = choose(snapshot.views(), need, wanted=wanted)
        if choice.destination is None:
            raise no_place(choice, field="host" if wanted else "")
        return choice.destination, snapshot.hosts[choice.destination.host]

    async def started(self, uuid: str, caller: Caller) -> types_pb2.Guest:
        """See to it that a recorded guest runs. May be repeated."""
        read = await self.read(uuid)
        decisions.need_alive(read.record)
        if read.record.phase is Ownership.STARTING:
            agent = await self._tools.agent(read.record.owner.host)
            try:
                status = await agent.start_guest(uuid, caller.remaining_s(START_GUEST_S))
            except DroverError as error:
                raise _not_started(error, read.record) from error
            log.info("guest started", guest=read.record.name, host=read.record.owner.host)
            view = await self.view(uuid)
            view.run_state = wire_words.run_state_to_proto(status.run_state)  # the newest sample may be from before
            return view
        return await self.view(uuid)

    # --- the operator's wish ------------------------------------------------------------------------------------------

    async def want_run(self, name: str, run: bool, caller: Caller) -> pb.ChangeRunStateResponse:
        """Record the wish, then tell the owner's agent; the answer says how far it got."""
        uuid = await self.uuid_of(name)
        decisions.need_alive((await self.read(uuid)).record)
        sequence = await self._wish(uuid, run, caller)
        wish, told = await self._tell(uuid, sequence, caller)
        if told is RunState.ENDED:
            said = f"guest {name} has shut down: start it again, or stop it to free its name"
            raise DroverError(RefusalReason.GUEST_NOT_RUNNING, said)
        guest = await self.view(uuid)
        if told is not None:
            guest.run_state = wire_words.run_state_to_proto(told)
        return pb.ChangeRunStateResponse(guest=guest, wish=wish)

    async def _wish(self, uuid: str, run: bool, caller: Caller) -> int:
        """Write the wish if it does not stand there; its sequence number."""
        path = paths.want_run(uuid)
        contest = tries(caller)
        while True:
            await contest.another()
            found = await self._tools.ledger.read(WantRun, path)
            wanted = decisions.wish(found[0] if found else None, run, caller.by)
            if wanted is None:
                return found[0].sequence if found else 0
            op = op_create(path, wanted) if found is None else op_set(path, wanted, found[1])
            if isinstance(await write(self._tools, [op], caller), Done):
                log.info("wish", uuid=uuid, run=run, sequence=wanted.sequence, by=caller.by)
                return wanted.sequence

    async def _tell(self, uuid: str, sequence: int, caller: Caller) -> tuple[pb.WishState.ValueType, RunState | None]:
        """The owner applies or queues it. One that is silent, or is just losing the guest, follows by its watch."""
        asked: set[HostRef] = set()
        for _ in range(_OWNERS):
            owner = (await self.read(uuid)).record.owner
            if owner in asked:
                break
            asked.add(owner)
            try:
                agent = await self._tools.agent(owner.host)
                answer = await agent.apply_want_run(uuid, sequence, caller.remaining_s(CALL_S))
            except DroverError as error:
                log.info("wish is only recorded so far", uuid=uuid, host=owner.host, why=str(error))
                continue
            return (pb.WISH_STATE_APPLIED if answer.applied else pb.WISH_STATE_QUEUED), answer.run_state
        return pb.WISH_STATE_RECORDED, None

    # --- edit ---------------------------------------------------------------------------------------------------------

    async def edit(self, request: pb.EditGuestRequest, caller: Caller) -> types_pb2.Guest:
        """Write what the guest is from now on, by compare-and-set on what it was. Raises INVALID_ARGUMENT, NOT_FOUND,
        GUEST_NOT_RUNNING for one whose life is over, GUEST_IS_RUNNING and EDIT_STALE."""
        described = checked_edit(request)
        uuid = await self.uuid_of(request.name)
        contest = tries(caller)
        while True:
            await contest.another()
            read = await self.read(uuid)
            wanted = replace(described, adopted=read.spec.adopted)  # which no caller sees or says
            if request.etag and request.etag != read.etag:
                said = f"guest {read.record.name} was edited meanwhile: look at it again"
                raise DroverError(RefusalReason.EDIT_STALE, said, field="etag")
            must_be_editable(read.record, read.spec, wanted)
            entry = (await self._tools.index.recent()).hosts.get(read.record.owner.host)
            spec = _pinned(wanted, entry) if entry is not None else wanted
            if request.validate_only or spec == read.spec:
                view = await self.view(uuid)
                view.spec.CopyFrom(wire.guest_spec_to_proto(spec))
                return view
            ops: list[Op] = [op_set(paths.guest_spec(uuid), spec, read.spec_version)]
            if needs_a_stop(read.spec, spec):
                ops.append(Check(paths.guest(uuid), read.version))  # nobody starts it meanwhile, from what it was
            if isinstance(await write(self._tools, ops, caller), Done):
                log.info("guest edited", guest=spec.name, fields=edited_fields(read.spec, spec), by=caller.by)
                return await self.view(uuid)

    # --- again --------------------------------------------------------------------------------------------------------

    async def start_again(self, name: str, caller: Caller) -> types_pb2.Guest:
        """Run a guest that was kept, has shut down or has crashed, where it is. One that runs stays as it is.

        Raises GUEST_NOT_RUNNING for one whose life is over, what a placement on its host would raise, and
        AGENT_UNREACHABLE: nothing is started while nobody knows what is left of it.
        """
        uuid = await self.uuid_of(name)
        contest = tries(caller)
        while True:
            await contest.another()
            read = await self.read(uuid)
            step = decisions.start_step(read.record)
            if step is StartStep.OVER:
                raise DroverError(RefusalReason.GUEST_NOT_RUNNING, f"guest {name} has ended for good: create it anew")
            if step is StartStep.RUNS:
                return await self.view(uuid)
            if step is StartStep.LOOK and not await self._has_ended(read, caller):
                return await self.view(uuid)
            if step in (StartStep.LOOK, StartStep.KEEP):
                await self._keep(read, caller, only_ended=True)
                continue
            if step is StartStep.PLACE and not await self._placed_again(read, caller):
                continue
            return await self.started(uuid, caller)

    async def _has_ended(self, read: GuestRead, caller: Caller) -> bool:
        """It has shut down by itself, by its agent's word. It is wished to run from here on."""
        _, told = await self._tell(read.uuid, await self._wish(read.uuid, True, caller), caller)
        if told is None:
            said = f"the agent of {read.record.owner.host} does not say whether guest {read.record.name} runs"
            raise DroverError(RefusalReason.AGENT_UNREACHABLE, said)
        return told is RunState.ENDED

    async def _keep(self, read: GuestRead, caller: Caller, *, only_ended: bool = False) -> None:
        agent = await self._tools.agent(read.record.owner.host)
        await agent.keep_guest(read.uuid, only_ended=only_ended, timeout_s=caller.remaining_s(END_GUEST_S))

    async def _placed_again(self, read: GuestRead, caller: Caller) -> bool:
        """Write that it starts on its host, if that has room. False: look again."""
        await self._wish(read.uuid, True, caller)
        host = read.record.owner.host
        async with self._tools.placing:
            snapshot = await self._tools.index.recent()
            choice = choose(snapshot.views(), need_again(read.spec), wanted=host)
            if choice.destination is None:
                raise no_place(choice)
            record = handover.start_again(read.record, choice.destination, writer=f"api-{uuid.uuid4().hex}")
            ops = again_ops(read.uuid, record, read.version, snapshot.hosts[host])
            ops.append(await markers.marked(self._tools.store, host, read.uuid))
            done = isinstance(await write(self._tools, ops, caller), Done)
        if done:
            log.info("guest starts again", guest=record.name, host=host, by=caller.by)
        return done

    # --- death --------------------------------------------------------------------------------------------------------

    async def stop(self, name: str, caller: Caller, *, keep: bool = False) -> types_pb2.Guest:
        """End the guest for good: wish it stopped, cancel its migration, wait until somebody owns it alone, end it.
        With `keep` it is not over then, and may be started again.

        Raises GUEST_IS_MIGRATING when that takes longer than the caller waits: the wish stands, repeat the call.
        """
        uuid = await self.uuid_of(name)
        if decisions.stop_step((await self.read(uuid)).record) in _WITH_WISH:
            await self._tell(uuid, await self._wish(uuid, False, caller), caller)
        moved = asyncio.Event()
        unwatch = self._tools.store.watch(paths.guest(uuid), lambda _node: moved.set())
        try:
            while True:
                moved.clear()
                read = await self.read(uuid)
                step = decisions.stop_step(read.record)
                if keep and read.record.stopped:
                    log.info("guest stopped and kept", guest=read.record.name, by=caller.by)
                    return await self.view(uuid)
                if keep and step is StopStep.ENDED:
                    raise DroverError(RefusalReason.GUEST_NOT_RUNNING, f"guest {name} has ended for good")
                if step is StopStep.ENDED:
                    log.info("guest ended", guest=read.record.name, by=caller.by)
                    return await self.view(uuid)
                if await self._stop_once(step, read, caller, keep=keep):
                    continue
                if caller.out_of_time:
                    raise _not_ended(read.record)
                try:
                    async with asyncio.timeout(caller.remaining_s(_LOOK_AGAIN_S)):
                        await moved.wait()
                except TimeoutError:
                    pass
        finally:
            unwatch()

    async def _stop_once(self, step: StopStep, read: GuestRead, caller: Caller, *, keep: bool) -> bool:
        """True: look at once; False: wait for a change."""
        record = read.record
        if step is StopStep.CANCEL:
            try:
                await self._migrations.ensure_cancelled(record.migration, caller)
            except DroverError as error:
                if error.reason not in (RefusalReason.ALREADY_COMMITTED, RefusalReason.ALREADY_ENDED):
                    raise
            return False
        if step is StopStep.WAIT:
            return False
        end = self._keep if keep else self._end
        agent_call = self._finish_birth if step is StopStep.FINISH_BIRTH else end
        try:
            await agent_call(read, caller)
        except DroverError as error:
            if step is StopStep.BURY and error.reason in _SILENT and not keep:
                return await self._bury(read, caller)
            if step is StopStep.FINISH_BIRTH and error.reason not in _SILENT:
                return False  # it did not start: the record says so, or will
            unknown = error.reason is RefusalReason.OUTCOME_UNKNOWN and not caller.out_of_time
            if error.reason not in _MOVED and not unknown:
                raise
            return False
        return True

    async def _end(self, read: GuestRead, caller: Caller) -> None:
        agent = await self._tools.agent(read.record.owner.host)
        await agent.end_guest(read.uuid, caller.remaining_s(END_GUEST_S))
        await name_freed(self._tools.store, read.record.name)

    async def _finish_birth(self, read: GuestRead, caller: Caller) -> None:
        agent = await self._tools.agent(read.record.owner.host)
        await agent.start_guest(read.uuid, caller.remaining_s(START_GUEST_S))

    async def _bury(self, read: GuestRead, caller: Caller) -> bool:
        """A crashed guest runs nowhere, so its record and name need not wait for a host that may never come back."""
        record, path = handover.gone(read.record, writer=f"api-{uuid.uuid4().hex}"), paths.name(read.record.name)
        ops: list[Op] = [op_set(paths.guest(read.uuid), record, read.version)]
        named = await self._tools.ledger.read(str, path)
        if named is not None and named[0] == read.uuid:
            ops.append(Delete(path, named[1]))
        return isinstance(await write(self._tools, ops, caller), Done)

    # --- its machine --------------------------------------------------------------------------------------------------

    async def attach(self, request: pb.AttachToGuestRequest, caller: Caller) -> types_pb2.Guest:
        """The guest has it when this returns. Raises what stands against it, and then all is as it was."""
        return await self._change(request.guest, wire_hardware.attachment_from_proto(request), caller)

    async def detach(self, request: pb.DetachFromGuestRequest, caller: Caller) -> types_pb2.Guest:
        """The guest has let go of it when this returns. Raises DEVICE_NOT_RELEASED when it does not."""
        return await self._change(request.guest, wire_hardware.detachment_from_proto(request), caller)

    async def _change(self, name: str, change: MachineChange, caller: Caller) -> types_pb2.Guest:
        """By the agent of the guest's host, which alone knows its VMM and writes the specification."""
        contest = tries(caller)
        uuid = await self.uuid_of(name, field="guest")
        while True:
            await contest.another()
            read, after = await self._changed(uuid, change)
            promised = await self._must_suit(read, after)
            agent = await self._tools.agent(read.record.owner.host)
            await self._tools.store.grant(paths.guest_spec(uuid), {read.record.owner.host})  # it may have moved since
            try:
                spec = await agent.change_machine(uuid, change, promised, caller.remaining_s(CHANGE_MACHINE_S))
            except DroverError as error:
                if error.reason is RefusalReason.OUTCOME_UNKNOWN and error.details.get("moved") == "reservations":
                    continue
                raise
            log.info("the machine of a guest was changed", guest=read.record.name, uuid=uuid, by=caller.by)
            guest = await self.view(uuid)
            guest.spec.CopyFrom(wire.guest_spec_to_proto(spec))  # our server of the ledger may be behind the agent's
            return guest

    async def _changed(self, uuid: str, change: MachineChange) -> tuple[GuestRead, GuestSpec]:
        """The guest, and what it is to be. Nobody is refused for what our server of the ledger has not heard yet."""
        try:
            read = await self.read(uuid)
            decisions.need_movable(read.record)
            return read, changed(read.spec, change)
        except DroverError:
            await self._tools.store.barrier()
        read = await self.read(uuid)
        decisions.need_movable(read.record)
        return read, changed(read.spec, change)

    async def _must_suit(self, read: GuestRead, after: GuestSpec) -> int:
        """Its host has what the guest is to have; the version of what the host had promised then. Raises NO_CAPACITY,
        and what stands against the guest's hardware there."""
        snapshot = await self._tools.index.recent()
        name = read.record.owner.host
        entry = snapshot.hosts.get(name)
        view = next((host for host in snapshot.views() if host.ref.host == name), None)
        if entry is None or view is None:
            raise DroverError(RefusalReason.AGENT_UNREACHABLE, f"{name} has not registered an agent")
        _pinned(after, entry)
        need = hardware_need(after)
        if (found := lasting_obstacle(need, read.record.name, view.offer, None)) is not None:
            raise DroverError(*found)
        new = more_than(need, hardware_need(read.spec))
        if (full := passing_obstacle(new, read.record.name, view.offer)) is not None:
            raise DroverError(*full)
        more = after.memory_mib - read.spec.memory_mib
        if more > view.free_mib:
            said = f"{name} has {max(0, view.free_mib)} MiB free, {read.record.name} is to have {more} MiB more"
            hint = "free memory there, or move the guest to a host that has more"
            raise DroverError(RefusalReason.NO_CAPACITY, f"{said}: {hint}", field="memory_mib")
        return entry.reservations_version

    # --- its screen ---------------------------------------------------------------------------------------------------

    async def open_display(self, request: pb.OpenDisplayRequest, caller: Caller) -> pb.OpenDisplayResponse:
        """By the agent of the guest's host, which alone knows its VMM. Raises GUEST_NOT_RUNNING, and
        DISPLAY_NOT_AVAILABLE for a guest without one."""
        read = await self.read(await self.uuid_of(request.guest, field="guest"))
        decisions.need_alive(read.record)
        agent = await self._tools.agent(read.record.owner.host)
        log.info("display", guest=read.record.name, by=caller.by)
        found = await agent.open_display(read.uuid, caller.remaining_s(CALL_S))
        return pb.OpenDisplayResponse(display=wire_agent.display_to_proto(found))

    # --- devices ------------------------------------------------------------------------------------------------------

    async def instruct(self, request: pb.InstructDeviceRequest, caller: Caller) -> str:
        """What the device's program says to it."""
        if not self._tools.instructions:
            said = 'this cluster lets nobody instruct devices: "instructions" in the configuration allows it'
            raise DroverError(RefusalReason.INSTRUCTIONS_DISABLED, said)
        check_instruction(request)
        read = await self.read(await self.uuid_of(request.guest, field="guest"))
        decisions.need_alive(read.record)
        need_device(read.spec, request.device)
        agent = await self._tools.agent(read.record.owner.host)
        log.warning("device instructed", guest=read.record.name, device=request.device, by=caller.by)
        return await agent.pass_instruction(read.uuid, request.device, request.instruction, caller.remaining_s(CALL_S))


# --- pure parts -------------------------------------------------------------------------------------------------------


def checked(request: pb.CreateGuestRequest) -> GuestSpec:
    """The specification. Raises INVALID_ARGUMENT with everything that is wrong with the request."""
    bad: list[tuple[str, str]] = []
    if said := decisions.request_id_error(request.request_id):
        bad.append(("request_id", said))
    if request.host and (said := name_error(request.host)):
        bad.append(("host", said))
    return _sound_spec(request, bad)


def checked_edit(request: pb.EditGuestRequest) -> GuestSpec:
    """The specification. Raises INVALID_ARGUMENT with everything that is wrong with the request."""
    bad: list[tuple[str, str]] = []
    if said := name_error(request.name):
        bad.append(("name", said))
    return _sound_spec(request, bad)


def _sound_spec(request: pb.CreateGuestRequest | pb.EditGuestRequest, bad: list[tuple[str, str]]) -> GuestSpec:
    """`bad`: what else is wrong with the request, to be told together with what is wrong with its specification."""
    if not request.HasField("spec"):
        raise invalid([*bad, ("spec", "is missing")])
    try:
        spec = wire.guest_spec_from_proto(request.spec)
    except DroverError as error:
        raise invalid([*bad, *error.violations]) from error
    if bad := bad + [(f"spec.{field}", said) for field, said in guest_errors(spec)]:
        raise invalid(bad)
    return spec


def must_be_editable(record: GuestRecord, before: GuestSpec, after: GuestSpec) -> None:
    """Raises GUEST_NOT_RUNNING, INVALID_ARGUMENT for what never changes, and GUEST_IS_RUNNING with every field that can
    be changed only while the guest is stopped."""
    if record.phase is Ownership.GONE:
        raise DroverError(RefusalReason.GUEST_NOT_RUNNING, f"guest {record.name} has ended")
    if bad := edit_errors(before, after):
        raise invalid([(f"spec.{field}", said) for field, said in bad])
    changed = needs_a_stop(before, after)
    if changed and not record.stopped:
        said = f"guest {record.name} is made of it: stop it and keep it, edit it, and start it again"
        fields = [(f"spec.{field}", said) for field in changed]
        what = f"{', '.join(changed)} of guest {record.name} can be changed only while it is stopped and kept"
        raise DroverError(RefusalReason.GUEST_IS_RUNNING, what, violations=fields)


def _pinned(spec: GuestSpec, entry: HostEntry) -> GuestSpec:
    """With the machine type that an alias such as `pc` stands for on the host where the guest is born. It
    keeps that for its life, so that it can move to a host where the alias stands for another one.

    Raises INVALID_ARGUMENT for a guest that is to be started elsewhere after its host's death, and has a disk that
    would die with the host: a pool is of one kind on every host that such a guest can be on.
    """
    if spec.on_host_death is OnHostDeath.RESTART and (names := local_disks(spec, entry.input.record)):
        said = f"must be leave: {', '.join(names)} would be lost with its host, being in a local pool there"
        raise invalid([("spec.on_host_death", said)])
    return replace(spec, machine=real_machine(spec.machine, entry.input.record.machine_aliases))


def _birth(spec: GuestSpec, born: str, host: HostRef, entry: HostEntry, wish: WantRun) -> list[Op]:
    """Everything that a new guest is, in one transaction."""
    record = handover.birth(spec.name, host, writer=f"api-{born}")
    return [op_create(paths.name(spec.name), born), *birth_ops(born, record, spec, wish, entry)]


def _not_started(error: DroverError, record: GuestRecord) -> DroverError:
    """What the agent said, or that nothing is known: then the guest may be running, or will be, or ends as GONE."""
    if error.reason not in _SILENT:
        return error
    said = (
        f"guest {record.name} is recorded on {record.owner.host}, whose agent did not say that it started "
        f"({error.message}): repeat the request with the same request_id, or stop the guest"
    )
    return DroverError(error.reason, said, details={"host": record.owner.host})


def _not_ended(record: GuestRecord) -> DroverError:
    said = f"guest {record.name} is still {record.phase} on {record.owner.host}: its end is wished for, repeat the call"
    return DroverError(RefusalReason.GUEST_IS_MIGRATING, said, details={"ownership": record.phase})


def check_instruction(request: pb.InstructDeviceRequest) -> None:
    """Raises INVALID_ARGUMENT with everything that is wrong with the request by itself."""
    bad: list[tuple[str, str]] = []
    if said := name_error(request.guest):
        bad.append(("guest", said))
    if not request.instruction.strip():
        bad.append(("instruction", "is missing: say what the device is to do, in its program's words"))
    elif (size := len(request.instruction.encode())) > MAX_INSTRUCTION_BYTES:
        bad.append(("instruction", f"at most {MAX_INSTRUCTION_BYTES} bytes, not {size}"))
    if bad:
        raise invalid(bad)


def need_device(spec: GuestSpec, name: str) -> DeviceSpec:
    """The guest's device. Raises NOT_FOUND, or INSTRUCTION_REFUSED for one that no program holds."""
    device = next((each for each in spec.devices if each.name == name), None)
    if device is None:
        known = ", ".join(each.name for each in spec.devices) or "none"
        said = f"guest {spec.name} has no device {quoted(name)}; it has {known}"
        raise DroverError(RefusalReason.NOT_FOUND, said, field="device")
    if device.shim is ShimKind.NET:
        said = f"device {name} of guest {spec.name} is a {device.shim.value} device: it takes no instructions"
        raise DroverError(RefusalReason.INSTRUCTION_REFUSED, said, field="device")
    return device
