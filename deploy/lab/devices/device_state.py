"""PURE. A device's state and how it travels: the memory, the script of what it still has in store, the byte stream.

The stream is a sequence of records that reads the same however it is cut into pieces:

    HEAD     which device this is, how large it is, and how the destination is to behave while it loads
    BLOCKS   memory, as often as it changed (initial data, dirty data, then in stop-copy what cannot be tracked)
    STATE    the 32-bit word of the doorbell, counters and script
    TRAILER  blake2b-16 of everything before it

The word travels masked with a digest of all memory blocks as the sender knows them, so it comes out right only where
every block arrived in its last version: a part that was lost or is stale shows in the guest's next answer.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b, shake_128
from typing import Any, cast

from deploy.lab.devices.scenario import (
    MAX_BYTES,
    MAX_ENTRIES,
    Ask,
    Call,
    Hook,
    Scenario,
    Used,
    scenario_from,
    scenario_mapping,
    used_from,
)
from orchestrator.core.errors import DroverError, invalid

BLOCK_BYTES = 4096
RUN_BLOCKS = 16
"""Blocks in one record at most."""
_VERSION = 1
_RECORD = struct.Struct("!BII")
RECORD_BYTES = _RECORD.size
"""Before the content of each record."""
_MAX_RECORD = 1 << 20
_HEAD, _BLOCKS, _STATE, _TRAILER = range(1, 5)
_PATTERN_BYTES = 4099
"""A prime, so that blocks of a newborn device differ from each other."""


class StreamError(Exception):
    """The bytes are not the whole and unspoiled state of this device."""


@dataclass(frozen=True, slots=True)
class DeviceIdentity:
    """Which device of which guest. `index` is its number on the doorbell port, `seed` the guest's."""

    guest: str
    name: str
    index: int
    seed: int

    def digest(self) -> bytes:
        """16 bytes by which a load notices that the stream is another device's; a newborn's memory is made from
        them."""
        return blake2b(f"{self.guest}/{self.name}/{self.index}/{self.seed}".encode(), digest_size=16).digest()


def hash32(x: int) -> int:
    """The mixing function that the guest knows (deploy/lab/guest_image/README.md)."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


class Memory:
    """Blocks of bytes. Changes of the first `tracked_bytes` can be sent in pre-copy, the rest in stop-copy only."""

    def __init__(self, tracked_bytes: int, untracked_bytes: int, content: bytes = b"") -> None:
        self.tracked_bytes, self.untracked_bytes = tracked_bytes, untracked_bytes
        self.tracked = -(-tracked_bytes // BLOCK_BYTES)
        self.blocks = self.tracked + -(-untracked_bytes // BLOCK_BYTES)
        self.dirty: dict[int, None] = {}
        """Tracked blocks that changed since they were taken last, in the order of their change."""
        total = tracked_bytes + untracked_bytes
        self._data = bytearray(content) * (total // len(content) + 1) if content else bytearray(total)
        del self._data[total:]
        self._digests = [0] * self.blocks
        self.fold = 0
        """Digest of all blocks as they were last taken or put."""

    def size(self, index: int) -> int:
        """Bytes of one block; the last of the tracked and of the untracked ones may be short."""
        start, end = self._span(index)
        return end - start

    def run_bytes(self, first: int, count: int) -> int:
        """Bytes of `count` blocks from `first` on, none of which crosses from tracked to untracked memory."""
        return self._span(first + count - 1)[1] - self._span(first)[0] if count else 0

    @property
    def dirty_bytes(self) -> int:
        """Bytes of the tracked blocks that have changed since they were last taken."""
        last = self.tracked - 1
        short = BLOCK_BYTES - self.size(last) if last in self.dirty else 0
        return len(self.dirty) * BLOCK_BYTES - short

    def peek(self, index: int) -> bytes:
        """Present content of one block, which stays as dirty as it was."""
        start, end = self._span(index)
        return bytes(self._data[start:end])

    def change(self, index: int, value: bytes) -> None:
        """The device writes `value`, or what fits of it, at the head of a block."""
        start, end = self._span(index)
        fitting = value[: end - start]
        self._data[start : start + len(fitting)] = fitting
        if index < self.tracked:
            self.dirty[index] = None

    def take(self, first: int, count: int) -> bytes:
        """The present content of blocks for sending; from now they are clean."""
        for index in range(first, first + count):
            self.dirty.pop(index, None)
            self._seal(index)
        return bytes(self._data[self._span(first)[0] : self._span(first + count - 1)[1]])

    def put(self, first: int, content: bytes) -> range:
        """Take over loaded blocks; returns which. Raises StreamError when they do not fit."""
        index, start = first, 0
        while start < len(content):
            if index >= self.blocks or start + self.size(index) > len(content):
                raise StreamError(f"blocks from {first} on do not fit into this device")
            at, end = self._span(index)
            self._data[at:end] = content[start : start + end - at]
            start += end - at
            self._seal(index)
            index += 1
        return range(first, index)

    def _span(self, index: int) -> tuple[int, int]:
        if index < self.tracked:
            start = index * BLOCK_BYTES
            return start, min(start + BLOCK_BYTES, self.tracked_bytes)
        start = self.tracked_bytes + (index - self.tracked) * BLOCK_BYTES
        return start, min(start + BLOCK_BYTES, self.tracked_bytes + self.untracked_bytes)

    def _seal(self, index: int) -> None:
        start, end = self._span(index)
        made = blake2b(index.to_bytes(4, "big"), digest_size=8)
        made.update(memoryview(self._data)[start:end])
        digest = int.from_bytes(made.digest(), "big")
        self.fold ^= self._digests[index] ^ digest
        self._digests[index] = digest


@dataclass(slots=True)
class Script:
    """A scenario, what of it has happened, and the number of sessions in the device's life so far."""

    scenario: Scenario
    used: Used = field(default_factory=Used)
    sessions: int = 0

    def take_delay(self, call: Call) -> int:
        """How many ms this call takes longer, now that it happens."""
        total = 0
        for index, delay in enumerate(self.scenario.delays):
            if delay.call is call and self.used.may("delays", index, delay, self.sessions):
                self.used = self.used.count("delays", index)
                total += delay.ms
        return total

    def take_fault(self, call: Call) -> bool:
        """Does this call fail, now that it happens?"""
        for index, fault in enumerate(self.scenario.faults):
            if fault.call is call and self.used.may("faults", index, fault, self.sessions):
                self.used = self.used.count("faults", index)
                return True
        return False

    def take_asks(self, hook: Hook) -> list[Ask]:
        """What the script asks for at this hook, now that it is reached: those entries count as used."""
        found: list[Ask] = []
        for index, ask in enumerate(self.scenario.asks):
            if ask.at is hook and self.may_ask(index):
                self.count_ask(index)
                found.append(ask)
        return found

    def may_ask(self, index: int) -> bool:
        """The entry with this place among the asks is not used up, in this session and in all."""
        return self.used.may("asks", index, self.scenario.asks[index], self.sessions)

    def count_ask(self, index: int) -> None:
        """Note that the entry with this place was used once more."""
        self.used = self.used.count("asks", index)

    def add(self, ask: Ask) -> int:
        """One more entry, in the place of one that is used up if there is any; returns the place.

        Raises DroverError(INVALID_ARGUMENT) when too many would wait for their turn.
        """
        asks = self.scenario.asks
        place = next((index for index in range(len(asks)) if not self.may_ask(index)), len(asks))
        if place == MAX_ENTRIES:
            raise invalid([("asks", f"at most {MAX_ENTRIES} entries can wait for their turn")])
        self.used = self.used.forget("asks", place)
        self.scenario = replace(self.scenario, asks=(*asks[:place], ask, *asks[place + 1 :]))
        return place

    def copy(self) -> Script:
        """As it stands now; later uses of either do not show in the other."""
        return Script(self.scenario, self.used, self.sessions)


@dataclass(slots=True)
class Registers:
    """What a device is besides its memory."""

    word: int
    """The state of the doorbell."""
    last_n: int
    generation: int
    """ACKs asked for in the device's whole life."""
    script: Script


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How the destination behaves while it loads: settled by the source, where the script lives."""

    delay_ms: int = 0
    fails: bool = False
    never_acks: bool = False


# --- records ----------------------------------------------------------------------------------------------------------


def head_record(identity: DeviceIdentity, memory: Memory, plan: LoadPlan) -> bytes:
    """HEAD: what `Incoming` compares before it loads anything, and how it is to behave while it loads."""
    content = {
        "version": _VERSION,
        "identity": identity.digest().hex(),
        "tracked_bytes": memory.tracked_bytes,
        "untracked_bytes": memory.untracked_bytes,
        "plan": [plan.delay_ms, plan.fails, plan.never_acks],
    }
    return _record(_HEAD, 0, json.dumps(content).encode())


def blocks_record(memory: Memory, first: int, count: int) -> bytes:
    """BLOCKS: `count` blocks from `first` on, at most RUN_BLOCKS; they are clean now (`Memory.take`)."""
    return _record(_BLOCKS, first, memory.take(first, count))


def state_record(registers: Registers, memory: Memory) -> bytes:
    """STATE: the registers, with the word masked by `memory.fold`. To be made after the last blocks."""
    script = registers.script
    content = {
        "word": (registers.word ^ memory.fold) & 0xFFFFFFFF,
        "last_n": registers.last_n,
        "generation": registers.generation,
        "sessions": script.sessions,
        "scenario": scenario_mapping(script.scenario),
        "used": {kind: list(getattr(script.used, kind)) for kind in ("asks", "delays", "faults")},
    }
    return _record(_STATE, 0, json.dumps(content).encode())


def trailer_record(digest: bytes) -> bytes:
    """TRAILER: the digest of everything before it."""
    return _record(_TRAILER, 0, digest)


def _record(kind: int, first: int, content: bytes) -> bytes:
    return _RECORD.pack(kind, first, len(content)) + content


def newborn_memory(identity: DeviceIdentity, tracked_bytes: int, untracked_bytes: int) -> Memory:
    """What a device starts with: the same bytes for the same identity, so that both ends of a test know them."""
    return Memory(tracked_bytes, untracked_bytes, shake_128(identity.digest()).digest(_PATTERN_BYTES))


class Incoming:
    """State on its way into a device. Nothing of it counts before `finish` returned it."""

    def __init__(self, identity: DeviceIdentity) -> None:
        self._identity = identity
        self.bytes = 0
        self._parsed = blake2b(digest_size=16)
        self._sum = b""
        """Digest of everything before the trailer, once that has come."""
        self._rest = bytearray()
        self.plan = LoadPlan()
        self.memory: Memory | None = None
        self.registers: Registers | None = None
        self._arrived = bytearray()
        self._trailer = b""
        self._wrong = ""

    @property
    def ended(self) -> bool:
        """The trailer arrived: whatever is not here now will not come."""
        return bool(self._trailer)

    def digest(self) -> bytes:
        """blake2b-16 of everything that was fed."""
        made = self._parsed.copy()
        made.update(self._rest)
        return made.digest()

    def feed(self, data: bytes) -> None:
        """Take any piece of the stream. Raises StreamError, and from then on `finish` does too."""
        self.bytes += len(data)
        self._rest += data
        if self._wrong:
            raise StreamError(self._wrong)
        try:
            for kind, first, content in self._records():
                self._apply(kind, first, content)
            if self.plan.fails:
                raise StreamError("the device cannot load (its scenario says so)")
        except StreamError as error:
            self._wrong = str(error)
            raise
        except (DroverError, ValueError, TypeError, KeyError) as error:
            self._wrong = f"the stream is spoiled: {error}"
            raise StreamError(self._wrong) from None

    def finish(self) -> tuple[Memory, Registers]:
        """The whole state. Raises StreamError when it is not all there or not what was sent."""
        if self._wrong:
            raise StreamError(self._wrong)
        if self.memory is None or self.registers is None or not self._trailer or self._rest:
            raise StreamError(f"the state is not complete after {self.bytes} bytes")
        if self._trailer != self._sum:
            raise StreamError("the state is not what was sent: its digest differs")
        if missing := self._arrived.count(0):
            raise StreamError(f"{missing} of {self.memory.blocks} blocks never arrived")
        word = (self.registers.word ^ self.memory.fold) & 0xFFFFFFFF
        return self.memory, replace(self.registers, word=word)

    def _records(self) -> Iterator[tuple[int, int, bytes]]:
        while len(self._rest) >= _RECORD.size:
            kind, first, length = _RECORD.unpack_from(self._rest)
            if length > _MAX_RECORD or not _HEAD <= kind <= _TRAILER:
                raise StreamError("the stream is spoiled: no such record")
            end = _RECORD.size + length
            if len(self._rest) < end:
                return
            record = bytes(self._rest[:end])
            del self._rest[:end]
            if self._trailer:
                raise StreamError("data after the end of the state")
            if kind == _TRAILER:
                self._sum = self._parsed.digest()
            self._parsed.update(record)
            yield kind, first, record[_RECORD.size :]

    def _apply(self, kind: int, first: int, content: bytes) -> None:
        if kind == _HEAD:
            self._apply_head(_json(content))
        elif kind == _TRAILER:
            self._trailer = content
        elif self.memory is None:
            raise StreamError("the stream does not begin with the device's head")
        elif kind == _BLOCKS:
            for index in self.memory.put(first, content):
                self._arrived[index] = 1
        else:
            self._apply_state(_json(content))

    def _apply_head(self, content: Mapping[str, Any]) -> None:
        if self.memory is not None:
            raise StreamError("a second head in one stream")
        if content["version"] != _VERSION:
            raise StreamError(f"version {content['version']} of the state is not known here")
        if content["identity"] != self._identity.digest().hex():
            raise StreamError(f"this is the state of another device than {self._identity.name}")
        delay_ms, fails, never_acks = content["plan"]
        self.plan = LoadPlan(int(delay_ms), bool(fails), bool(never_acks))
        sizes = int(content["tracked_bytes"]), int(content["untracked_bytes"])
        if not all(0 <= size <= MAX_BYTES for size in sizes):
            raise StreamError(f"a device has at most {MAX_BYTES} bytes of either kind, not {sizes}")
        self.memory = Memory(*sizes)
        self._arrived = bytearray(self.memory.blocks)

    def _apply_state(self, content: Mapping[str, Any]) -> None:
        script = Script(scenario_from(content["scenario"]), used_from(content["used"]), int(content["sessions"]))
        self.registers = Registers(int(content["word"]), int(content["last_n"]), int(content["generation"]), script)


def _json(content: bytes) -> Mapping[str, Any]:
    value: object = json.loads(content)
    if not isinstance(value, dict):
        raise StreamError("the stream is spoiled: a record is no mapping")
    return cast(dict[str, Any], value)
