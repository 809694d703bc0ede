"""PURE. The device model as QEMU's VFIO code sees it: one question in, one answer out, and a record of all of them.

Nobody tells a device inside the VMM which point its attempt has reached, so it goes by what it is asked (the hooks are
those of docs/scenario.md). QEMU's habit, seen on 10.0 and 11.1: a look at whether it may stop the guest is DATA_SIZE
and then PRECOPY_INFO; after the stop an 11.1 with per-device ACKs asks PRECOPY_INFO once more, on its own.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

from agents.shims.inside import ASKS, INITIAL_SENT, DeviceEvent, InVmmDevice
from deploy.lab.devices.device import Device, DeviceError, DeviceState, Feature, next_step
from deploy.lab.devices.scenario import Call, Hook, Lack, Scenario
from deploy.lab.devices.vfio import layout, uapi
from deploy.lab.devices.vfio.layout import Kind, Register
from deploy.lab.devices.vfio.uapi import FeatureNumber, Ioctl, MigrationFlag, Operation

NEVER = -1
_MAX_EVENTS = 64
_S = DeviceState
_SAVING = frozenset({_S.PRE_COPY, _S.PRE_COPY_P2P, _S.STOP_COPY})
_LOGGING = frozenset(
    {FeatureNumber.DMA_LOGGING_START, FeatureNumber.DMA_LOGGING_STOP, FeatureNumber.DMA_LOGGING_REPORT}
)


@dataclass(frozen=True, slots=True)
class Question:
    """One call of QEMU's as the preload passes it on. `number`, `offset`: as in the header (`layout.QUESTION`)."""

    kind: Kind
    number: int = 0
    offset: int = 0
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """What QEMU's call returns."""

    result: int
    """Or minus errno."""
    payload: bytes = b""
    opens_session: bool = False
    hold_ms: int = 0
    """How long it is held back; NEVER: until the VMM is gone."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One question and its answer, for the device's log."""

    at_s: float
    device: str
    call: str
    asked: str
    answer: dict[str, int | str]


@dataclass(slots=True)
class _Session:
    """What is told of one session besides what the model knows."""

    precopy_sent: int = 0
    stop_copy_sent: int = 0
    reinits: int = 0
    frozen: bool = False
    """The hook `freeze` was reached."""
    late: bool = False
    drained: bool = False
    gate_told: bool = False
    """The hook `gate_open` was reached since there was new initial data."""
    load_held: bool = False
    load_checked: bool = False
    events: list[DeviceEvent] = field(default_factory=list[DeviceEvent])

    def note(self, now: float, what: str) -> None:
        if len(self.events) < _MAX_EVENTS:
            self.events.append(DeviceEvent(now, what))


def features_of(scenario: Scenario) -> Feature:
    """What the device offers to VFIO: all that it knows, less what its scenario says it lacks."""
    found = Feature.P2P | Feature.PRE_COPY
    if Lack.P2P in scenario.lacks:
        found &= ~Feature.P2P
    if Lack.PRE_COPY in scenario.lacks:
        found &= ~Feature.PRE_COPY
    return found


class Endpoint:
    """One device inside a VMM. `delay_ms`, a pause of that length, then `answer`: so a slow device is slow."""

    def __init__(self, device: Device, record: Callable[[Entry], None]) -> None:
        self.device = device
        self.lost = False
        self._record = record
        self._session = _Session()
        self._previous = ""
        """The migration call before."""
        self._broken = False
        """The last change of state failed: a reset that follows is QEMU's way out, not the guest's."""
        if not device.has_content:
            device.reset()  # as every VFIO device it runs, on nothing, until something is loaded

    @property
    def name(self) -> str:
        """Of the device, as in the guest's specification."""
        return self.device.identity.name

    @property
    def live(self) -> bool:
        """It is the guest's device: newborn, or loaded and running."""
        return self.device.has_content and not self.device.just_loaded

    def look(self, now: float) -> InVmmDevice:
        """What the device says of itself and of its newest session, as an agent is told. Changes nothing that QEMU
        sees."""
        device, session = self.device, self._session
        saving = device.state in _SAVING
        return InVmmDevice(
            device=self.name,
            session=device.sessions,
            initial_bytes=device.initial_bytes_left() if saving else 0,
            stop_copy_bytes=device.stop_copy_bytes(now) if saving else 0,
            precopy_sent_bytes=session.precopy_sent,
            stop_copy_sent_bytes=session.stop_copy_sent,
            reinits=session.reinits,
            late=session.late,
            lost=self.lost,
            events=tuple(session.events),
        )

    # --- slowness -----------------------------------------------------------------------------------------------------

    def delay_ms(self, question: Question) -> int:
        """The scripted slowness before this call, which now happens."""
        try:
            return sum(self.device.take_delay(call) for call in self._calls_of(question))
        except DeviceError:
            return 0  # it will be refused

    def _calls_of(self, question: Question) -> list[Call]:
        match question.kind:
            case Kind.DATA_READ:
                return [Call.READ]
            case Kind.DATA_WRITE:
                return [Call.WRITE]
            case Kind.DATA_IOCTL:
                return [Call.LAST_LOOK if self._is_last_look() else Call.QUERY]
            case Kind.DEVICE_IOCTL if question.number == Ioctl.RESET:
                return [Call.RESET]
            case Kind.DEVICE_IOCTL if question.number == Ioctl.FEATURE:
                asked = uapi.feature_call(question.payload)
                if asked.number == FeatureNumber.DATA_SIZE and asked.operation == Operation.GET:
                    return [Call.SIZE]
                if asked.number == FeatureNumber.DEVICE_STATE and asked.operation == Operation.SET:
                    return self._calls_on_the_way(uapi.wanted_state(question.payload))
                return []
            case _:
                return []

    def _calls_on_the_way(self, want: DeviceState) -> list[Call]:
        """What a change of state consists of, in a scenario's words."""
        found: list[Call] = []
        here, features, loaded = self.device.state, self.device.features, self.device.just_loaded
        while here is not want and (step := next_step(here, want, features)) is not _S.ERROR:
            if step in (_S.PRE_COPY, _S.PRE_COPY_P2P) and here not in _SAVING:
                found.append(Call.BEGIN)
            if (here, step) == (_S.PRE_COPY, _S.PRE_COPY_P2P):
                found.append(Call.QUIESCE)
            if step is _S.STOP_COPY:
                found.append(Call.STOP_COPY)
            if step is _S.RESUMING:
                found.append(Call.BEGIN_LOAD)
            loaded = loaded or here is _S.RESUMING
            if here is _S.STOP and loaded and want in (_S.RUNNING, _S.RUNNING_P2P):
                found.append(Call.ACTIVATE)
            here = step
        return found

    # --- questions ----------------------------------------------------------------------------------------------------

    def answer(self, question: Question, now: float) -> Answer:
        """What VFIO would answer at `now` (seconds). What the device refuses is an answer with its errno: never
        raises."""
        try:
            return self._handle(question, now)
        except DeviceError as error:
            self._note(now, *self._named(question), {"errno": errno.errorcode[error.code], "why": str(error)})
            self._previous = self._named(question)[0] or self._previous
            return Answer(-error.code)

    def _handle(self, question: Question, now: float) -> Answer:
        match question.kind:
            case Kind.HELLO:
                return Answer(0, layout.configuration_space())
            case Kind.BAR_READ:
                data = self._registers()[question.offset : question.offset + question.number]
                return Answer(len(data), data)
            case Kind.BAR_WRITE:
                self._ring(question)
                return Answer(len(question.payload))
            case Kind.DEVICE_IOCTL:
                return self._device_ioctl(question, now)
            case Kind.DATA_IOCTL if question.number == Ioctl.GET_PRECOPY_INFO:
                return self._precopy_info(question.payload, now)
            case Kind.DATA_READ:
                return self._read(question.number, now)
            case Kind.DATA_WRITE:
                return self._write(question.payload, now)
            case Kind.DATA_CLOSE:
                self._note(now, "CLOSE", "", {})
                return Answer(0)
            case _:
                raise DeviceError(errno.ENOTTY, f"there is no call {question.number} on a data session")

    def _named(self, question: Question) -> tuple[str, str]:
        """Call and argument of a question that was refused."""
        match question.kind:
            case Kind.DATA_READ:
                return "READ", str(question.number)
            case Kind.DATA_WRITE:
                return "WRITE", str(len(question.payload))
            case Kind.DATA_IOCTL:
                return "LAST_LOOK" if self._is_last_look() else "PRECOPY_INFO", ""
            case Kind.DEVICE_IOCTL if question.number == Ioctl.FEATURE and len(question.payload) >= 8:
                return _feature_named(question.payload)
            case Kind.DEVICE_IOCTL:
                known = question.number in Ioctl.__members__.values()
                return Ioctl(question.number).name if known else "IOCTL", "" if known else str(question.number)
            case _:
                return "", ""

    def _note(self, now: float, call: str, asked: str, answer: dict[str, int | str]) -> None:
        self._record(Entry(now, self.name, call, asked, answer))

    def _fail_where_scripted(self, call: Call) -> None:
        if self.device.take_fault(call):
            raise DeviceError(errno.EIO, f"{call.value} failed (the scenario says so)")

    # --- the doorbell -------------------------------------------------------------------------------------------------

    def _registers(self) -> bytes:
        n, word = self.device.answered
        values = {
            Register.MAGIC: layout.MAGIC,
            Register.INDEX: self.device.identity.index,
            Register.ANSWERED: n,
            Register.ANSWER: word,
        }
        made = bytearray(layout.BAR_BYTES)
        for register, value in values.items():
            made[register : register + 4] = value.to_bytes(4, "little")
        return bytes(made)

    def _ring(self, question: Question) -> None:
        if question.offset == Register.RING and len(question.payload) == 4:
            self.device.ring(int.from_bytes(question.payload, "little"))
            self.device.take_answers()

    # --- device calls -------------------------------------------------------------------------------------------------

    def _device_ioctl(self, question: Question, now: float) -> Answer:
        argument = question.payload
        match question.number:
            case Ioctl.GET_INFO:
                return Answer(0, uapi.device_info(argument))
            case Ioctl.GET_REGION_INFO:
                return Answer(0, uapi.region_info(argument))
            case Ioctl.GET_IRQ_INFO:
                return Answer(0, uapi.irq_info(argument))
            case Ioctl.BIND_IOMMUFD:
                return Answer(0, uapi.bound(argument))
            case Ioctl.SET_IRQS | Ioctl.ATTACH_PAGE_TABLE | Ioctl.DETACH_PAGE_TABLE:
                return Answer(0, argument)
            case Ioctl.RESET:
                return self._reset(now)
            case Ioctl.FEATURE:
                return self._feature(argument, now)
            case _:
                raise DeviceError(errno.ENOTTY, f"there is no call {question.number} on a device")

    def _reset(self, now: float) -> Answer:
        self._fail_where_scripted(Call.RESET)
        was = self.device.state
        lost = self._broken or was is _S.ERROR
        self.device.reset()
        self._broken, self._previous = False, "RESET"
        self._note(now, "RESET", "", {"was": was.name, "lost": int(lost)})
        if lost:
            self.lost = True
            self._session.note(now, f"is reset in {was.name} and loses its state")
        return Answer(0)

    def _feature(self, argument: bytes, now: float) -> Answer:
        asked = uapi.feature_call(argument)
        call, what = _feature_named(argument)
        reinit_is_lacking = Lack.REINIT in self.device.scenario.lacks
        try:
            number = FeatureNumber(asked.number)
        except ValueError:
            raise DeviceError(errno.ENOTTY, f"there is no feature {asked.number}") from None
        if number is FeatureNumber.PRECOPY_INFO_V2 and reinit_is_lacking:
            raise DeviceError(errno.ENOTTY, "the device lacks REINIT")
        if Operation.PROBE in asked.operation:
            self._note(now, call, what, {})
            return Answer(0, argument)
        match number, asked.operation:
            case FeatureNumber.MIGRATION, Operation.GET:
                flags = self._flags()
                self._note(now, call, what, {"flags": int(flags)})
                return Answer(0, uapi.migration_flags(argument, flags))
            case FeatureNumber.DEVICE_STATE, Operation.GET:
                return Answer(0, uapi.device_state(argument, self.device.state))
            case FeatureNumber.DEVICE_STATE, Operation.SET:
                return self._set_state(argument, now)
            case FeatureNumber.DATA_SIZE, Operation.GET:
                return self._data_size(argument, now)
            case FeatureNumber.PRECOPY_INFO_V2, Operation.SET:
                self.device.opt_in_reinit()
            case _ if number in _LOGGING:
                pass  # it writes no memory of the guest: a report leaves the bitmap as it is, nothing is dirty
            case _:
                raise DeviceError(errno.EINVAL, f"{number.name} cannot be {asked.operation.name}")
        self._note(now, call, what, {})
        return Answer(0, argument)

    def _flags(self) -> MigrationFlag:
        found = MigrationFlag.STOP_COPY
        if Feature.P2P in self.device.features:
            found |= MigrationFlag.P2P
        if Feature.PRE_COPY in self.device.features:
            found |= MigrationFlag.PRE_COPY
        return found

    def _data_size(self, argument: bytes, now: float) -> Answer:
        self._fail_where_scripted(Call.SIZE)
        size = self.device.stop_copy_length(now)
        self._previous = "DATA_SIZE"
        self._note(now, "DATA_SIZE", "", {"bytes": size})
        return Answer(0, uapi.data_size(argument, size))

    # --- states -------------------------------------------------------------------------------------------------------

    def _set_state(self, argument: bytes, now: float) -> Answer:
        want = uapi.wanted_state(argument)
        was = self.device.state
        try:
            opened = self._change(want, now)
        except DeviceError:
            self._broken = True
            raise
        self._broken, self._previous = False, "SET_STATE"
        self._note(now, "SET_STATE", want.name, {"was": was.name, "opens_session": int(opened)})
        if was is not want:
            self._session.note(now, want.name)
        return Answer(0, uapi.device_state(argument, want), opens_session=opened)

    def _change(self, want: DeviceState, now: float) -> bool:
        """True: this opened a data session."""
        device, calls = self.device, self._calls_on_the_way(want)
        for call in (Call.BEGIN, Call.BEGIN_LOAD):
            if call in calls:
                self._fail_where_scripted(call)
        if Call.QUIESCE in calls:
            self._freeze(now)  # a VMM without a last look
        if Call.STOP_COPY in calls:
            device.hook(Hook.FINAL_QUERY, now)
        was_saving = device.state in _SAVING
        device.set_state(want, now)
        opened = (device.state in _SAVING and not was_saving) or Call.BEGIN_LOAD in calls
        if opened:
            self._session, self.lost = _Session(), False
        if Call.BEGIN in calls:
            if device.asked is not None:
                self._session.note(now, f"{ASKS} for an ACK")
            device.hook(Hook.PRECOPY, now)
        if Call.STOP_COPY in calls:
            device.hook(Hook.AFTER_CHECK, now)
        return opened

    def _freeze(self, now: float) -> None:
        if not self._session.frozen:
            self._session.frozen = True
            self.device.hook(Hook.FREEZE, now)

    # --- the data session ---------------------------------------------------------------------------------------------

    def _is_last_look(self) -> bool:
        """Not the one with which a session begins, and not half of a look at whether the guest may be stopped."""
        return self.device.state is _S.PRE_COPY and self._previous not in ("SET_STATE", "DATA_SIZE")

    def _precopy_info(self, argument: bytes, now: float) -> Answer:
        device, session = self.device, self._session
        last = self._is_last_look()
        if last:
            self._freeze(now)
        elif self._previous == "DATA_SIZE" and not session.gate_told and not device.initial_bytes_left():
            session.gate_told = True
            device.hook(Hook.GATE_OPEN, now)
        self._fail_where_scripted(Call.LAST_LOOK if last else Call.QUERY)
        info = device.precopy_info(now)
        answer = uapi.precopy_info(argument, info)
        if info.reinit:
            session.reinits += 1
            session.late = last
            session.drained = session.gate_told = False
            asks = f"{ASKS} again with {info.initial_bytes} bytes of new initial data"
            session.note(now, f"{asks}, after the guest was stopped" if last else asks)
        call = "LAST_LOOK" if last else "PRECOPY_INFO"
        self._previous = call
        told = {"initial": info.initial_bytes, "dirty": info.dirty_bytes, "reinit": int(info.reinit)}
        self._note(now, call, device.state.name, dict(told))
        return Answer(0, answer)

    def _read(self, limit: int, now: float) -> Answer:
        device, session = self.device, self._session
        self._fail_where_scripted(Call.READ)
        initial = device.initial_bytes_left() > 0
        pieces: list[bytes] = []
        left = limit
        while left > 0 and (initial is (device.initial_bytes_left() > 0) or not pieces):
            try:
                piece = device.read(left, now)
            except DeviceError:
                if not pieces:
                    raise
                break
            if not piece:
                break
            pieces.append(piece)
            left -= len(piece)
        data = b"".join(pieces)
        if device.state is _S.STOP_COPY:
            session.stop_copy_sent += len(data)
        else:
            session.precopy_sent += len(data)
            if initial and not device.initial_bytes_left() and not session.drained:
                session.drained = True
                session.note(now, INITIAL_SENT)
        self._previous = "READ"
        self._note(now, "READ", str(limit), {"bytes": len(data), "initial": int(initial), "state": device.state.name})
        return Answer(len(data), data)

    def _write(self, data: bytes, now: float) -> Answer:
        device, session = self.device, self._session
        self._fail_where_scripted(Call.WRITE)
        device.write(data)
        hold_ms = 0
        if not session.load_held:
            plan = device.load_plan
            if plan.never_acks:
                hold_ms = NEVER
            elif plan.delay_ms:
                hold_ms = device.take_delay(Call.LOAD)
            session.load_held = hold_ms != 0
        if device.load_ended and not session.load_checked:
            session.load_checked = True
            hold_ms = hold_ms or device.take_delay(Call.VALIDATE)
            device.check_load()
            session.note(now, "has loaded its whole state")
        self._previous = "WRITE"
        self._note(now, "WRITE", str(len(data)), {"loaded": device.loaded_bytes})
        return Answer(len(data), hold_ms=hold_ms)


def _feature_named(argument: bytes) -> tuple[str, str]:
    asked = uapi.feature_call(argument)
    number = next((known.name for known in FeatureNumber if known == asked.number), str(asked.number))
    if asked.number == FeatureNumber.DEVICE_STATE and asked.operation == Operation.SET:
        return "SET_STATE", _state_named(argument)
    if asked.number == FeatureNumber.DATA_SIZE and asked.operation == Operation.GET:
        return "DATA_SIZE", ""
    if asked.number == FeatureNumber.DMA_LOGGING_REPORT:
        return "DMA_REPORT", ""
    return "FEATURE", f"{number} {asked.operation.name or ''}".strip()


def _state_named(argument: bytes) -> str:
    try:
        return uapi.wanted_state(argument).name
    except DeviceError:
        return "?"
