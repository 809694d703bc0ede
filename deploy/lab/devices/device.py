"""PURE. One migratable device: the states of VFIO migration v2, its data session, its doorbell, its misbehaviour.

The model knows no socket and no clock: every call that depends on time takes `now` (seconds on any steady clock), and
what it wants to happen later it says through `next_due`. The companion's device process and an emulated VFIO device are
two ways to attach it.

A refused call raises `DeviceError` with an errno, as a driver would, and changes nothing; a step that a scripted fault
breaks leaves the device where it stood (after a broken way back: in ERROR, where only `reset` helps).
"""

from __future__ import annotations

import errno
from collections import deque
from dataclasses import dataclass, replace
from enum import Flag, IntEnum, auto
from hashlib import blake2b

from deploy.lab.devices.device_state import (
    BLOCK_BYTES,
    RECORD_BYTES,
    RUN_BLOCKS,
    DeviceIdentity,
    Incoming,
    LoadPlan,
    Memory,
    Registers,
    Script,
    StreamError,
    blocks_record,
    hash32,
    head_record,
    newborn_memory,
    state_record,
    trailer_record,
)
from deploy.lab.devices.scenario import Ask, Call, Hook, Scenario

__all__ = [
    "Device",
    "DeviceError",
    "DeviceIdentity",
    "DeviceSizes",
    "DeviceState",
    "Feature",
    "PrecopyInfo",
    "hash32",
    "next_step",
]

_MAX_QUEUED_RINGS = 16


class DeviceState(IntEnum):
    """As in <linux/vfio.h>."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


class Feature(Flag):
    """What the device can beyond STOP_COPY."""

    NONE = 0
    P2P = auto()
    PRE_COPY = auto()


class DeviceError(Exception):
    """The device refused or failed. `code` is what an ioctl would return."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


_S = DeviceState
SAVING = frozenset({_S.PRE_COPY, _S.PRE_COPY_P2P, _S.STOP_COPY})
ANSWERING = frozenset({_S.RUNNING, _S.RUNNING_P2P, _S.PRE_COPY, _S.PRE_COPY_P2P})
"""Here the device serves its doorbell. Elsewhere it is silent: nothing outward from STOP_COPY on (A9)."""

_COLUMNS = (_S.STOP, _S.RUNNING, _S.PRE_COPY, _S.PRE_COPY_P2P, _S.STOP_COPY, _S.RESUMING, _S.RUNNING_P2P)
_ROWS = {
    _S.STOP: (1, 5, 5, 5, 3, 4, 5),
    _S.RUNNING: (5, 2, 6, 5, 5, 5, 5),
    _S.PRE_COPY: (2, 2, 6, 7, 7, 2, 2),
    _S.PRE_COPY_P2P: (5, 5, 6, 7, 3, 5, 5),
    _S.STOP_COPY: (1, 1, 0, 0, 3, 1, 1),
    _S.RESUMING: (1, 1, 1, 1, 1, 4, 1),
    _S.RUNNING_P2P: (1, 2, 2, 7, 1, 1, 5),
    _S.ERROR: (0, 0, 0, 0, 0, 0, 0),
}
_NEXT = {(row, column): _S(step) for row, steps in _ROWS.items() for column, step in zip(_COLUMNS, steps, strict=True)}
_NEEDS = {
    _S.RUNNING_P2P: Feature.P2P,
    _S.PRE_COPY: Feature.PRE_COPY,
    _S.PRE_COPY_P2P: Feature.P2P | Feature.PRE_COPY,
}


def next_step(state: DeviceState, want: DeviceState, features: Feature) -> DeviceState:
    """The next single arc on the way; states that the device lacks are passed over. ERROR: there is no way."""
    step = _NEXT.get((state, want), _S.ERROR)
    while _NEEDS.get(step, Feature.NONE) not in features:
        step = _NEXT[step, want]
    return step


@dataclass(frozen=True, slots=True)
class DeviceSizes:
    """Bytes that can travel in pre-copy, bytes that only stop-copy can carry, and how fast the former change."""

    initial_bytes: int
    stop_copy_bytes: int
    dirty_bytes_per_s: int = 0


@dataclass(frozen=True, slots=True)
class PrecopyInfo:
    """Estimates, as VFIO's. `reinit`: new initial data since the last look."""

    initial_bytes: int
    dirty_bytes: int
    reinit: bool


class _Outgoing:
    """The data session of the source: everything that was read from it, in order, is the device's state."""

    def __init__(self, now: float) -> None:
        self.began = now
        self.initial: deque[tuple[int, int]] = deque()
        """Runs of blocks (first, count) that are sent as initial data; a block may be in several."""
        self.queued_bytes = 0
        """Of all these runs, as they will be read."""
        self.head_left = True
        self.state_left = True
        self.untracked_next = 0
        self.over = False
        self.spoil = False
        self.sent_bytes = 0
        self.digest = blake2b(digest_size=16)
        self.buffer = b""
        """The rest of a record that was not read whole; `buffer_initial` says which estimate it counts for."""
        self.buffer_initial = False
        self.asked: int | None = None
        self.marked = 0
        self.reinit = False
        self.due: dict[int, float] = {}

    def queue(self, memory: Memory, first: int, count: int) -> None:
        self.initial.append((first, count))
        self.queued_bytes += memory.run_bytes(first, count) + RECORD_BYTES * -(-count // RUN_BLOCKS)

    def next_run(self, memory: Memory) -> tuple[int, int]:
        """Blocks for one record."""
        first, count = self.initial.popleft()
        part = min(count, RUN_BLOCKS)
        if part < count:
            self.initial.appendleft((first + part, count - part))
        self.queued_bytes -= memory.run_bytes(first, part) + RECORD_BYTES
        return first, part

    def out(self, limit: int) -> bytes:
        data, self.buffer = self.buffer[:limit], self.buffer[limit:]
        self.sent_bytes += len(data)
        self.digest.update(data)
        return data


class Device:
    """See the module's docstring.

    `incoming`: it waits for a load; else it is newborn. `in_vmm`: a VMM drives it, which makes a device P2P not only on
    its way to a stop.
    """

    def __init__(
        self,
        identity: DeviceIdentity,
        sizes: DeviceSizes,
        scenario: Scenario,
        *,
        incoming: bool = False,
        features: Feature = Feature.P2P | Feature.PRE_COPY,
        in_vmm: bool = False,
    ) -> None:
        self.identity = identity
        self.features = features
        self.state = _S.STOP if incoming else _S.RUNNING
        self.has_content = not incoming
        """It holds a state that a guest can go on with: newborn, or loaded and validated."""
        self.opted_in = False
        self._in_vmm = in_vmm
        self._sizes = _merged(sizes, scenario)
        script = Script(scenario)
        self._memory = Memory(0, 0) if incoming else self._newborn_memory()
        self._registers = Registers(self._first_word(), 0, 0, script)
        self._session: _Outgoing | None = None
        self._loading: Incoming | None = None
        self._just_loaded = False
        self._rings: dict[int, None] = {}
        self._reinit_cursor = 0
        self._dirty_cursor = 0
        self._dirtied_at = 0.0

    # --- what can be seen ---------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """ACKs asked for in the device's whole life; never reset."""
        return self._registers.generation

    @property
    def asked(self) -> int | None:
        """The newest generation that was asked for in the present session."""
        return self._session.asked if self._session else None

    @property
    def scenario(self) -> Scenario:
        """As now in force."""
        return self._registers.script.scenario

    @property
    def sessions(self) -> int:
        """Sessions begun in the device's life, the present one included."""
        return self._registers.script.sessions

    @property
    def just_loaded(self) -> bool:
        """It took over a state and has not run on it yet."""
        return self._just_loaded

    @property
    def gets_dirty(self) -> bool:
        """Its memory changes by itself while it is in pre-copy."""
        return self._sizes.dirty_bytes_per_s > 0

    @property
    def sent_bytes(self) -> int:
        """Read from the present data session so far; 0 without one."""
        return self._session.sent_bytes if self._session else 0

    @property
    def sent_digest(self) -> bytes:
        """blake2b-16 of everything that was read in this session."""
        return self._session.digest.digest() if self._session else b""

    @property
    def loaded_bytes(self) -> int:
        """Fed into the present load so far; 0 without one."""
        return self._loading.bytes if self._loading else 0

    @property
    def loaded_digest(self) -> bytes:
        """blake2b-16 of everything that was fed into the present load; empty without one."""
        return self._loading.digest() if self._loading else b""

    @property
    def load_plan(self) -> LoadPlan:
        """What the present load's head says about how to behave."""
        return self._loading.plan if self._loading else LoadPlan()

    def content_digest(self) -> bytes:
        """Equal for two devices exactly when memory, word, generation and script are (for tests and logs)."""
        copy = self._registers
        made = blake2b(repr((copy.word, copy.last_n, copy.generation, copy.script)).encode(), digest_size=16)
        memory = self._memory
        made.update(repr((memory.tracked_bytes, memory.untracked_bytes)).encode())
        for index in range(memory.blocks):
            made.update(memory.peek(index))
        return made.digest()

    # --- states -------------------------------------------------------------------------------------------------------

    def set_state(self, want: DeviceState, now: float) -> None:
        """Go to `want` by single arcs. Raises DeviceError: EINVAL without a change, EIO where a scripted fault is."""
        self.advance(now)
        path: list[DeviceState] = []
        at = self.state
        if want is _S.ERROR or _NEEDS.get(want, Feature.NONE) not in self.features:
            raise DeviceError(errno.EINVAL, f"{want.name} cannot be asked for")
        while at is not want:
            at = next_step(at, want, self.features)
            if at is _S.ERROR:
                raise DeviceError(errno.EINVAL, f"there is no way from {self.state.name} to {want.name}")
            path.append(at)
        for step in path:
            self._arc(step, want, now)

    def reset(self) -> None:
        """From any state to RUNNING. Sessions end and the state is lost; generation and script are not."""
        self.has_content = self.has_content and not self._just_loaded
        self._session = self._loading = None
        self._just_loaded = False
        self._registers = replace(self._registers, word=self._first_word(), last_n=0)
        self._memory = self._newborn_memory()
        self.state = _S.RUNNING

    def _arc(self, step: DeviceState, want: DeviceState, now: float) -> None:
        self._break_where_scripted(step, want)
        if self.state is _S.RESUMING and step is _S.STOP:
            self._integrate()
        leaves = self.state in SAVING and step not in SAVING
        if step in SAVING and self.state not in SAVING:
            self._begin_session(step, now)
        if leaves:
            self._session = None
        if step is _S.RESUMING:
            self._loading = Incoming(self.identity)
        elif self.state is _S.RESUMING:
            self._loading = None
        if step is _S.RUNNING:
            self._just_loaded = False
        self.state = step

    def _break_where_scripted(self, step: DeviceState, want: DeviceState) -> None:
        script, here = self._registers.script, self.state
        broken: Call | None = None
        if self._quiesces(step, want) and script.take_fault(Call.QUIESCE):
            broken = Call.QUIESCE
        elif step is _S.STOP_COPY and script.take_fault(Call.STOP_COPY):
            broken = Call.STOP_COPY
        elif self._activates(step, want) and script.take_fault(Call.ACTIVATE):
            broken = Call.ACTIVATE
        elif here in SAVING and step not in SAVING and want is _S.RUNNING and script.take_fault(Call.ROLL_BACK):
            self.state, self._session = _S.ERROR, None
            raise DeviceError(errno.EIO, "the way back failed (the scenario says so): the device needs a reset")
        if broken is not None:
            raise DeviceError(errno.EIO, f"{broken.value} failed (the scenario says so)")

    def _quiesces(self, step: DeviceState, want: DeviceState) -> bool:
        if (self.state, step) == (_S.RUNNING, _S.RUNNING_P2P):
            return want is not _S.RESUMING and not self._in_vmm
        return (self.state, step) == (_S.PRE_COPY, _S.PRE_COPY_P2P)

    def _activates(self, step: DeviceState, want: DeviceState) -> bool:
        return self.state is _S.STOP and self._just_loaded and want in (_S.RUNNING, _S.RUNNING_P2P)

    def _integrate(self) -> None:
        assert self._loading is not None
        try:
            memory, registers = self._loading.finish()
        except StreamError as error:
            raise DeviceError(errno.EINVAL, str(error)) from None
        self._memory, self._registers = memory, registers
        self._rings.clear()
        self.has_content = self._just_loaded = True

    def _begin_session(self, step: DeviceState, now: float) -> None:
        script = self._registers.script
        script.sessions += 1
        session = self._session = _Outgoing(now)
        self._memory.dirty.clear()
        self._dirtied_at = now
        if self._memory.tracked:
            session.queue(self._memory, 0, self._memory.tracked)
        if step is _S.STOP_COPY:
            return
        for index, ask in enumerate(script.scenario.asks):
            if ask.after_ms is not None:
                session.due[index] = now + ask.after_ms / 1000
        if script.scenario.ask_at_begin:
            self._registers.generation += 1
            session.asked = self._registers.generation

    # --- requests -----------------------------------------------------------------------------------------------------

    def opt_in_reinit(self) -> None:
        """VFIO's PRECOPY_INFOv2: from now `precopy_info` reports REINIT."""
        self.opted_in = True

    def precopy_info(self, now: float) -> PrecopyInfo:
        """Legal in PRE_COPY and PRE_COPY_P2P only. A look takes the REINIT flag."""
        self.advance(now)
        session = self._session
        if session is None or self.state not in (_S.PRE_COPY, _S.PRE_COPY_P2P):
            raise DeviceError(errno.EINVAL, f"no pre-copy information in {self.state.name}")
        reinit = session.reinit and self.opted_in
        session.reinit = False
        said = self.scenario.estimates
        return PrecopyInfo(
            _first(said.initial_bytes, self._initial_left(session)),
            _first(said.dirty_bytes, self._memory.dirty_bytes),
            reinit,
        )

    def stop_copy_length(self, now: float) -> int:
        """What stop-copy would carry if the device were stopped now, as the device says; legal in every state."""
        return _first(self.scenario.estimates.stop_copy_bytes, self.stop_copy_bytes(now))

    def stop_copy_bytes(self, now: float) -> int:
        """The same, in truth."""
        self.advance(now)
        memory = self._memory
        if self._session is None:
            return memory.tracked_bytes + memory.untracked_bytes
        first = memory.tracked + self._session.untracked_next
        untracked = memory.run_bytes(first, memory.blocks - first)
        return self._initial_left(self._session) + memory.dirty_bytes + untracked

    def hook(self, hook: Hook, now: float) -> None:
        """The attempt reached this point. Without a session nothing happens."""
        self.advance(now)
        if self._session is None:
            return
        for ask in self._registers.script.take_asks(hook):
            self.ask(ask.bytes)

    def ask(self, new_bytes: int) -> None:
        """Demand another ACK, with at least `new_bytes` of new initial data; dirty data becomes initial data (REINIT).

        In STOP_COPY nothing is asked of anybody any more: it is counted and the data goes with the rest. Raises
        DeviceError without a session.
        """
        session = self._session
        if session is None:
            raise DeviceError(errno.EINVAL, f"nobody to ask in {self.state.name}")
        self._registers.generation += 1
        session.asked = self._registers.generation
        session.reinit = True
        if not session.state_left:
            return
        memory = self._memory
        for index in list(memory.dirty):
            session.queue(memory, index, 1)
        memory.dirty.clear()
        blocks = -(-new_bytes // BLOCK_BYTES) if memory.tracked else 0
        while blocks > 0:
            first = self._reinit_cursor % memory.tracked
            count = min(blocks, memory.tracked - first)
            session.queue(memory, first, count)
            self._reinit_cursor = first + count
            blocks -= count

    def inject(self, ask: Ask, now: float) -> None:
        """Put one more entry into the scenario in force. Raises DroverError(INVALID_ARGUMENT) when it is full."""
        place = self._registers.script.add(ask)
        if self._session is None:
            return
        self._session.due.pop(place, None)
        if ask.after_ms is not None and self.state in (_S.PRE_COPY, _S.PRE_COPY_P2P):
            self._session.due[place] = now + ask.after_ms / 1000

    def take_delay(self, call: Call) -> int:
        """How many ms the shell must wait before this call, which now happens."""
        if call is Call.LOAD:
            return self.load_plan.delay_ms
        if call is Call.VALIDATE:
            staged = self._loading.registers if self._loading else None
            return staged.script.take_delay(call) if staged else 0
        return self._registers.script.take_delay(call)

    def take_fault(self, call: Call) -> bool:
        """Does this call, which the model knows nothing of otherwise, fail now that it happens?"""
        return self._registers.script.take_fault(call)

    # --- time ---------------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Let the time that passed take effect: memory gets dirty, timed requests fall due."""
        session = self._session
        if session is None or self.state not in (_S.PRE_COPY, _S.PRE_COPY_P2P):
            return
        self._get_dirty(now)
        if self.state is not _S.PRE_COPY:
            return
        script = self._registers.script
        for index, at in list(session.due.items()):
            if now < at:
                continue
            ask = script.scenario.asks[index]
            if script.may_ask(index):
                script.count_ask(index)
                self.ask(ask.bytes)
            if ask.every_ms is None or not script.may_ask(index):
                del session.due[index]
            else:
                session.due[index] = now + ask.every_ms / 1000

    def next_due(self) -> float | None:
        """When `advance` should be called next for a timed request; None when there is none."""
        if self._session is None or self.state is not _S.PRE_COPY or not self._session.due:
            return None
        return min(self._session.due.values())

    def _get_dirty(self, now: float) -> None:
        rate, memory = self._sizes.dirty_bytes_per_s, self._memory
        if not rate or not memory.tracked:
            return
        count = int((now - self._dirtied_at) * rate / BLOCK_BYTES)
        if count <= 0:
            return
        self._dirtied_at += count * BLOCK_BYTES / rate
        for _ in range(min(count, memory.tracked)):
            self._dirty_cursor += 1
            memory.change(self._dirty_cursor % memory.tracked, self._dirty_cursor.to_bytes(8, "big"))

    # --- data session -------------------------------------------------------------------------------------------------

    def read(self, limit: int, now: float) -> bytes:
        """Up to `limit` bytes of state. Empty: the state was delivered whole (STOP_COPY only).

        Raises DeviceError: ENOMSG when in pre-copy there is nothing at the moment, EINVAL without a session.
        """
        self.advance(now)
        session = self._session
        if session is None:
            raise DeviceError(errno.EINVAL, f"no data session in {self.state.name}")
        if not session.buffer:
            self._fill(session)
        if not session.buffer and self.state is not _S.STOP_COPY:
            raise DeviceError(errno.ENOMSG, "nothing to read at the moment")
        return session.out(limit)

    def readable_bytes(self, now: float) -> int:
        """What a reader would get now, as an estimate."""
        self.advance(now)
        if self._session is None:
            return 0
        return self._initial_left(self._session) + self._memory.dirty_bytes

    def initial_bytes_left(self) -> int:
        """Initial data of the present session that is still to be read, before its marker may be sent."""
        return self._initial_left(self._session) if self._session else 0

    def take_marker(self) -> int | None:
        """The generation whose initial data has just been read to its end; each is returned once."""
        session = self._session
        if session is None or session.asked is None or session.asked <= session.marked or self._initial_left(session):
            return None
        session.marked = session.asked
        return session.asked

    def write(self, data: bytes) -> None:
        """RESUMING: load a piece of the state. Raises DeviceError (EIO) when it cannot be this device's."""
        if self._loading is None:
            raise DeviceError(errno.EINVAL, f"nothing is loaded in {self.state.name}")
        try:
            self._loading.feed(data)
        except StreamError as error:
            raise DeviceError(errno.EIO, str(error)) from None

    @property
    def load_ended(self) -> bool:
        """The end of the state has been written: `check_load` tells at once whether it is whole."""
        return self._loading is not None and self._loading.ended

    def check_load(self) -> None:
        """Raises DeviceError (EIO) for a state that could not be taken over. Changes nothing."""
        if self._loading is None:
            raise DeviceError(errno.EINVAL, f"nothing is loaded in {self.state.name}")
        try:
            self._loading.finish()
        except StreamError as error:
            raise DeviceError(errno.EIO, str(error)) from None

    def _initial_left(self, session: _Outgoing) -> int:
        memory = self._memory
        left = session.queued_bytes
        if session.head_left:
            left += len(head_record(self.identity, memory, LoadPlan()))
        return left + (len(session.buffer) if session.buffer_initial else 0)

    def _fill(self, session: _Outgoing) -> None:
        """Make the next record, if there is one in this state."""
        memory = self._memory
        session.buffer_initial = session.head_left or bool(session.initial)
        if session.head_left:
            session.head_left = False
            session.buffer = head_record(self.identity, memory, self._load_plan())
        elif session.initial:
            session.buffer = blocks_record(memory, *session.next_run(memory))
        elif memory.dirty:
            session.buffer = blocks_record(memory, next(iter(memory.dirty)), 1)
        elif self.state is _S.STOP_COPY:
            self._fill_the_rest(session)

    def _fill_the_rest(self, session: _Outgoing) -> None:
        """What only a stopped device can give: untracked memory, registers, and the trailer that closes the state."""
        memory = self._memory
        first = memory.tracked + session.untracked_next
        if first < memory.blocks:
            part = min(RUN_BLOCKS, memory.blocks - first)
            session.untracked_next += part
            session.buffer = blocks_record(memory, first, part)
        elif session.state_left:
            session.state_left = False
            session.spoil = self._registers.script.take_fault(Call.VALIDATE)
            session.buffer = state_record(self._as_committed(), memory)
        elif not session.over:
            session.over = True
            digest = session.digest.digest()
            session.buffer = trailer_record(_spoiled(digest) if session.spoil else digest)

    def _load_plan(self) -> LoadPlan:
        script = self._registers.script
        delay_ms = script.take_delay(Call.LOAD)
        return LoadPlan(delay_ms, script.take_fault(Call.LOAD), script.take_fault(Call.ACK))

    def _as_committed(self) -> Registers:
        """What leaves is only ever used after a commit, so what is to happen then counts as having happened."""
        script = self._registers.script.copy()
        asks = script.take_asks(Hook.AFTER_COMMIT)
        return replace(self._registers, generation=self._registers.generation + len(asks), script=script)

    # --- doorbell -----------------------------------------------------------------------------------------------------

    def ring(self, n: int) -> None:
        """The guest rings doorbell `n`; `take_answers` has the answer as soon as the device may speak."""
        self._rings.pop(n, None)
        self._rings[n] = None
        while len(self._rings) > _MAX_QUEUED_RINGS:
            del self._rings[next(iter(self._rings))]

    def take_answers(self) -> list[tuple[int, int]]:
        """(n, answer) of every doorbell that waits; none while the device is stopped."""
        if self.state not in ANSWERING:
            return []
        answers = [(n, self._answer(n)) for n in self._rings]
        self._rings.clear()
        return answers

    @property
    def answered(self) -> tuple[int, int]:
        """The newest doorbell that was answered and its answer; 0 as doorbell: none yet."""
        return self._registers.last_n, self._registers.word

    def _answer(self, n: int) -> int:
        registers, memory = self._registers, self._memory
        if n != registers.last_n:
            registers.word, registers.last_n = hash32(registers.word ^ n), n
            value = registers.word.to_bytes(4, "big") + n.to_bytes(4, "big")
            if memory.tracked:
                memory.change(registers.word % memory.tracked, value)
            if memory.blocks > memory.tracked:
                memory.change(memory.tracked + registers.word % (memory.blocks - memory.tracked), value)
        return registers.word

    def _first_word(self) -> int:
        return hash32((0xD0000000 + self.identity.index) ^ self.identity.seed)

    def _newborn_memory(self) -> Memory:
        return newborn_memory(self.identity, self._sizes.initial_bytes, self._sizes.stop_copy_bytes)


def _merged(sizes: DeviceSizes, scenario: Scenario) -> DeviceSizes:
    """The scenario's sizes go before the specification's."""

    return DeviceSizes(
        _first(scenario.initial_bytes, sizes.initial_bytes),
        _first(scenario.stop_copy_bytes, sizes.stop_copy_bytes),
        _first(scenario.dirty_bytes_per_s, sizes.dirty_bytes_per_s),
    )


def _first(scripted: int | None, otherwise: int) -> int:
    return otherwise if scripted is None else scripted


def _spoiled(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]
