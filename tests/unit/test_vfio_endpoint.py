"""A device inside the VMM, asked as QEMU asks: the bytes of VFIO's ioctls in, the bytes of its answers out."""

from __future__ import annotations

import errno
import json
import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agents.engine.qemu.verdict import late_devices
from deploy.lab.devices.device import Device, DeviceIdentity, DeviceSizes, DeviceState, hash32
from deploy.lab.devices.scenario_text import parse_scenario
from deploy.lab.devices.vfio import layout
from deploy.lab.devices.vfio.endpoint import NEVER, Answer, Endpoint, Entry, Question, features_of
from deploy.lab.devices.vfio.layout import Kind, Register
from deploy.lab.devices.vfio.log import MAX_LINES, Log
from deploy.lab.devices.vfio.uapi import FeatureNumber, Ioctl, Operation

S = DeviceState
RESULT, LOOK, STOP = "PRECOPY_INFO", "LAST_LOOK", "SET_STATE"


class Qemu:
    """What QEMU does to one device, in its words. `log` has what the device recorded."""

    def __init__(
        self, scenario: str = "", *, incoming: bool = False, initial: int = 20_000, final: int = 5_000
    ) -> None:
        script = parse_scenario(scenario)
        identity = DeviceIdentity("guest", "nic", layout.FIRST_INDEX, 7)
        sizes = DeviceSizes(initial, final)
        features = features_of(script)
        model = Device(identity, sizes, script, incoming=incoming, features=features, in_vmm=True)
        self.log: list[Entry] = []
        self.now = 0.0
        self.endpoint = Endpoint(model, self.log.append)
        self.delays: list[int] = []

    @property
    def state(self) -> DeviceState:
        return self.endpoint.device.state

    def ask(self, kind: Kind, number: int = 0, payload: bytes = b"", offset: int = 0) -> Answer:
        question = Question(kind, number, offset, payload)
        self.delays.append(self.endpoint.delay_ms(question))
        return self.endpoint.answer(question, self.now)

    def ioctl(self, number: int, payload: bytes = b"") -> Answer:
        return self.ask(Kind.DEVICE_IOCTL, number, payload)

    def feature(self, number: int, operation: Operation, *values: int, form: str = "Q") -> Answer:
        body = struct.pack(f"={form}", *values) if values else bytes(8)
        return self.ioctl(Ioctl.FEATURE, struct.pack("=II", 8 + len(body), number | operation) + body)

    def opt_in(self) -> Answer:
        return self.feature(FeatureNumber.PRECOPY_INFO_V2, Operation.SET)

    def set_state(self, state: DeviceState) -> Answer:
        return self.feature(FeatureNumber.DEVICE_STATE, Operation.SET, state, -1, form="Ii")

    def data_size(self) -> int:
        answer = self.feature(FeatureNumber.DATA_SIZE, Operation.GET)
        return struct.unpack_from("=Q", answer.payload, 8)[0] if answer.result == 0 else answer.result

    def info(self) -> tuple[int, int, bool] | int:
        """(initial, dirty, reinit), or minus errno."""
        answer = self.ask(Kind.DATA_IOCTL, Ioctl.GET_PRECOPY_INFO, struct.pack("=IIQQ", 24, 0, 0, 0))
        if answer.result:
            return answer.result
        flags, initial, dirty = struct.unpack_from("=IQQ", answer.payload, 4)
        return initial, dirty, bool(flags & 1)

    def exact(self) -> tuple[int, int, bool] | int:
        """A look at whether the guest may be stopped."""
        self.data_size()
        return self.info()

    def read(self, limit: int = 1 << 20) -> bytes | int:
        answer = self.ask(Kind.DATA_READ, limit)
        return answer.payload if answer.result >= 0 else answer.result

    def drain(self) -> bytes:
        """Everything that can be read now."""
        pieces: list[bytes] = []
        while isinstance(piece := self.read(), bytes) and piece:
            pieces.append(piece)
        return b"".join(pieces)

    def write(self, data: bytes) -> Answer:
        return self.ask(Kind.DATA_WRITE, payload=data)

    def begin(self) -> Qemu:
        """Opt-in, PRE_COPY and the look with which a session begins."""
        self.opt_in()
        assert self.set_state(S.PRE_COPY).opens_session
        assert isinstance(self.info(), tuple)
        return self

    def stop(self) -> tuple[int, int, bool] | int:
        """The last look, then quiesced and in STOP_COPY."""
        looked = self.info()
        assert self.set_state(S.PRE_COPY_P2P).result == 0
        assert self.set_state(S.STOP_COPY).result == 0
        return looked

    def register(self, register: Register) -> int:
        answer = self.ask(Kind.BAR_READ, 4, offset=register)
        return int.from_bytes(answer.payload, "little")

    def ring(self, n: int) -> tuple[int, int]:
        """(the doorbell that was answered, its answer)."""
        assert self.ask(Kind.BAR_WRITE, payload=n.to_bytes(4, "little"), offset=Register.RING).result == 4
        return self.register(Register.ANSWERED), self.register(Register.ANSWER)

    def calls(self, *wanted: str) -> list[Entry]:
        return [entry for entry in self.log if entry.call in wanted]


def moved(source: Qemu, destination: Qemu, *pieces: bytes) -> None:
    assert destination.set_state(S.RESUMING).opens_session
    for piece in pieces:
        assert destination.write(piece).result == len(piece)
    assert destination.set_state(S.RUNNING_P2P).result == 0
    assert destination.set_state(S.RUNNING).result == 0


# --- what it is -------------------------------------------------------------------------------------------------------


def test_a_pci_device_with_one_bar_and_no_interrupt() -> None:
    qemu = Qemu()
    flags, regions, irqs = struct.unpack_from(
        "=III", qemu.ioctl(Ioctl.GET_INFO, struct.pack("=IIIII", 20, 0, 0, 0, 0)).payload, 4
    )
    assert (flags, regions, irqs) == (3, 9, 5)
    found: dict[int, tuple[int, int]] = {}
    for index in range(9):
        answer = qemu.ioctl(Ioctl.GET_REGION_INFO, struct.pack("=IIIIQQ", 32, 0, index, 0, 0, 0))
        found[index] = struct.unpack_from("=QQ", answer.payload, 16)
    assert found.pop(0) == (layout.BAR_BYTES, 0)
    assert found.pop(7) == (256, layout.CONFIG_OFFSET)
    assert set(found.values()) == {(0, 0)}
    irq = qemu.ioctl(Ioctl.GET_IRQ_INFO, struct.pack("=IIII", 16, 0, 1, 9)).payload
    assert struct.unpack_from("=I", irq, 12) == (0,)
    header = qemu.ask(Kind.HELLO).payload
    assert struct.unpack_from("<HH", header) == (layout.VENDOR, layout.DEVICE)
    assert len(header) <= layout.CONFIG_BYTES


@pytest.mark.parametrize(("lacks", "flags"), [("", 7), ("p2p", 5), ("precopy", 3), ("precopy, p2p", 1)])
def test_it_says_what_it_can(lacks: str, flags: int) -> None:
    qemu = Qemu(f"lacks: [{lacks}]")
    answer = qemu.feature(FeatureNumber.MIGRATION, Operation.GET)
    assert struct.unpack_from("=Q", answer.payload, 8) == (flags,)


def test_what_it_does_not_have_is_enotty() -> None:
    qemu = Qemu("lacks: [reinit]")
    assert qemu.opt_in().result == -errno.ENOTTY
    assert qemu.feature(3, Operation.SET).result == -errno.ENOTTY
    assert qemu.ioctl(112, struct.pack("=II", 8, 0)).result == -errno.ENOTTY
    assert qemu.ask(Kind.DATA_IOCTL, 99, bytes(8)).result == -errno.ENOTTY
    assert qemu.feature(FeatureNumber.DMA_LOGGING_START, Operation.PROBE | Operation.SET).result == 0


@given(
    kind=st.sampled_from(Kind), number=st.integers(0, 255), offset=st.integers(0, 5000), payload=st.binary(max_size=48)
)
def test_nonsense_is_answered(kind: Kind, number: int, offset: int, payload: bytes) -> None:
    qemu = Qemu()
    answer = qemu.ask(kind, number, payload, offset)
    assert -200 < answer.result <= layout.MAX_PAYLOAD
    assert isinstance(answer.payload, bytes)


# --- doorbells --------------------------------------------------------------------------------------------------------


def test_answers_come_from_the_devices_whole_history() -> None:
    qemu = Qemu()
    state = hash32((0xD0000000 + layout.FIRST_INDEX) ^ 7)
    for n in range(1, 6):
        state = hash32(state ^ n)
        assert qemu.ring(n) == (n, state)
    assert qemu.ring(5) == (5, state)
    assert (qemu.register(Register.MAGIC), qemu.register(Register.INDEX)) == (layout.MAGIC, layout.FIRST_INDEX)
    assert qemu.register(Register.RING) == 0


def test_answers_go_on_where_the_state_arrives_and_are_wrong_where_a_part_is_stale() -> None:
    source, destination, stale = Qemu().begin(), Qemu(incoming=True), Qemu(incoming=True)
    source.ring(1)
    first = source.drain()
    _, word = source.ring(2)
    dirty = source.drain()
    source.stop()
    rest = source.drain()
    moved(source, destination, first, dirty, rest)
    assert destination.ring(3) == (3, hash32(word ^ 3))
    assert stale.set_state(S.RESUMING).opens_session
    assert stale.write(first).result == len(first)
    assert stale.write(rest).result == -errno.EIO, "the digest says that something is missing"


# --- states -----------------------------------------------------------------------------------------------------------


def test_the_whole_way_at_both_ends() -> None:
    source, destination = Qemu().begin(), Qemu(incoming=True)
    data = source.drain()
    assert source.read() == -errno.ENOMSG
    assert source.info() == (0, 0, False)
    source.stop()
    assert source.info() == -errno.EINVAL, "no pre-copy information in STOP_COPY"
    rest = source.drain()
    assert source.read() == b""
    assert source.set_state(S.STOP).result == 0
    moved(source, destination, data, rest)
    told = destination.endpoint.look(0)
    assert (told.lost, destination.endpoint.live) == (False, True)
    assert "has loaded its whole state" in [event.what for event in told.events]


def test_stop_copy_never_leads_back_to_precopy() -> None:
    qemu = Qemu().begin()
    qemu.stop()
    assert qemu.set_state(S.PRE_COPY).result == -errno.EINVAL
    assert qemu.set_state(S.ERROR).result == -errno.EINVAL
    assert qemu.set_state(S.RUNNING).result == 0
    assert qemu.read() == -errno.EINVAL


def test_a_reset_after_a_failed_change_is_a_loss_and_any_other_is_not() -> None:
    qemu = Qemu("faults: [{call: stop_copy}]")
    assert qemu.ioctl(Ioctl.RESET).result == 0
    assert not qemu.endpoint.look(0).lost
    qemu.begin()
    qemu.set_state(S.PRE_COPY_P2P)
    assert qemu.set_state(S.STOP_COPY).result == -errno.EIO
    assert qemu.ioctl(Ioctl.RESET).result == 0
    assert qemu.endpoint.look(0).lost
    assert qemu.state is S.RUNNING
    qemu.begin()
    assert not qemu.endpoint.look(0).lost, "said until the next session begins"


# --- asking for another ACK -------------------------------------------------------------------------------------------


def test_a_demand_at_freeze_shows_in_the_last_look_only() -> None:
    qemu = Qemu("asks: [{at: freeze, bytes: 8192}]").begin()
    qemu.drain()
    assert qemu.exact() == (0, 0, False)
    assert qemu.exact() == (0, 0, False)
    looked = qemu.stop()
    assert isinstance(looked, tuple)
    assert looked[0] >= 8192
    assert looked[2]
    told = qemu.endpoint.look(0)
    assert (told.reinits, told.late) == (1, True)
    assert [entry.call for entry in qemu.calls(RESULT, LOOK)][-1] == LOOK


def test_a_vmm_that_does_not_look_after_the_stop_never_learns_of_it() -> None:
    qemu = Qemu("asks: [{at: freeze, bytes: 8192}]").begin()
    first = len(qemu.drain())
    qemu.exact()
    qemu.set_state(S.PRE_COPY_P2P)
    qemu.set_state(S.STOP_COPY)
    told = qemu.endpoint.look(0)
    assert (told.reinits, told.late) == (0, False)
    assert first > 0
    assert len(qemu.drain()) > 8192


def test_a_demand_at_gate_open_comes_with_the_look_that_would_open_it() -> None:
    qemu = Qemu("asks: [{at: gate_open, times: 2, bytes: 4096}]").begin()
    for _ in range(2):
        assert qemu.info() != -errno.EINVAL
        qemu.drain()
        looked = qemu.exact()
        assert isinstance(looked, tuple)
        assert looked[2]
        assert qemu.exact() == (looked[0], 0, False), "told once"
    qemu.drain()
    assert qemu.exact() == (0, 0, False)
    assert not qemu.endpoint.look(0).late


def test_without_the_opt_in_nobody_is_told() -> None:
    qemu = Qemu("asks: [{at: gate_open, bytes: 4096}]")
    qemu.set_state(S.PRE_COPY)
    qemu.info()
    qemu.drain()
    looked = qemu.exact()
    assert isinstance(looked, tuple)
    assert (looked[0] > 0, looked[2]) == (True, False)


def test_a_timed_demand_comes_at_its_time() -> None:
    qemu = Qemu("asks: [{after_ms: 500, bytes: 100}]").begin()
    qemu.drain()
    assert qemu.exact() == (0, 0, False)
    qemu.now = 0.6
    looked = qemu.exact()
    assert isinstance(looked, tuple)
    assert looked[2]


# --- slowness, faults, lies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["begin", "query", "last_look", "size", "read", "reset"])
def test_each_call_of_the_source_can_fail(call: str) -> None:
    qemu = Qemu(f"faults: [{{call: {call}}}]")
    qemu.opt_in()
    results = [qemu.set_state(S.PRE_COPY).result]
    if call == "begin":
        results.append(qemu.set_state(S.PRE_COPY).result)
    looked = qemu.info()
    results += [looked if isinstance(looked, int) else 0, qemu.data_size()]
    looked = qemu.info()
    read = qemu.read()
    last = qemu.info()
    results += [one if isinstance(one, int) else 0 for one in (looked, read, last)]
    results.append(qemu.ioctl(Ioctl.RESET).result)
    assert results.count(-errno.EIO) == 1
    failed = [entry for entry in qemu.log if entry.answer.get("errno") == "EIO"]
    assert len(failed) == 1


def test_each_call_can_be_slow() -> None:
    calls = ["begin", "query", "size", "read", "quiesce", "stop_copy"]
    qemu = Qemu("delays: [%s]" % ", ".join(f"{{call: {call}, ms: {n}}}" for n, call in enumerate(calls, 1)))  # noqa: UP031
    qemu.begin()
    qemu.drain()
    qemu.exact()
    qemu.stop()
    assert set(range(1, 7)) <= set(qemu.delays)


def test_a_slow_load_holds_the_first_write_and_an_ack_that_never_comes_holds_it_for_good() -> None:
    for scenario, held in (("delays: [{call: load, ms: 70}]", 70), ("faults: [{call: ack}]", NEVER)):
        source, destination = Qemu(scenario).begin(), Qemu(incoming=True)
        destination.set_state(S.RESUMING)
        first, second = source.read(9_000), source.read(9_000)
        assert isinstance(first, bytes)
        assert isinstance(second, bytes)
        assert destination.write(first).hold_ms == held
        assert destination.write(second).hold_ms == 0


def test_a_spoiled_state_is_refused_by_the_write_that_ends_it() -> None:
    source, destination = Qemu("faults: [{call: validate}]").begin(), Qemu(incoming=True)
    data = source.drain()
    source.stop()
    rest = source.drain()
    destination.set_state(S.RESUMING)
    assert destination.write(data).result == len(data)
    assert destination.write(rest).result == -errno.EIO
    assert not destination.endpoint.live


def test_estimates_are_told_and_not_believed() -> None:
    qemu = Qemu(f"estimates: {{initial_bytes: 0, dirty_bytes: {2**64 - 1}, stop_copy_bytes: 3}}").begin()
    assert qemu.info() == (0, 2**64 - 1, False)
    assert qemu.data_size() == 3
    assert len(qemu.drain()) > 20_000


# --- any order --------------------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """QEMU's calls in any order: whatever comes, the device keeps VFIO's rules."""

    def __init__(self) -> None:
        super().__init__()
        self.qemu = Qemu("asks: [{at: freeze, times: always, bytes: 4096}, {at: gate_open, times: 3}]")
        self.qemu.opt_in()
        self.n = 0

    @rule(state=st.sampled_from(DeviceState))
    def set_state(self, state: DeviceState) -> None:
        was = self.qemu.state
        answer = self.qemu.set_state(state)
        if answer.result:
            assert answer.result == -errno.EINVAL
            assert self.qemu.state is was or was is S.RESUMING
        else:
            assert self.qemu.state is state

    @rule()
    def look(self) -> None:
        looked = self.qemu.info()
        legal = self.qemu.state in (S.PRE_COPY, S.PRE_COPY_P2P)
        assert isinstance(looked, tuple) is legal

    @rule()
    def size(self) -> None:
        assert self.qemu.data_size() >= 0

    @rule(limit=st.integers(1, 70_000))
    def read(self, limit: int) -> None:
        found = self.qemu.read(limit)
        if isinstance(found, bytes):
            assert len(found) <= limit
            assert found or self.qemu.state is S.STOP_COPY
        else:
            assert found in (-errno.ENOMSG, -errno.EINVAL)
            assert not (found == -errno.ENOMSG and self.qemu.endpoint.device.initial_bytes_left())
            assert not (found == -errno.ENOMSG and self.qemu.state is S.STOP_COPY)

    @rule()
    def reset(self) -> None:
        assert self.qemu.ioctl(Ioctl.RESET).result == 0
        assert self.qemu.state is S.RUNNING

    @rule()
    def ring(self) -> None:
        self.n += 1
        answered, _ = self.qemu.ring(self.n)
        assert answered in (self.n, *range(self.n))

    @invariant()
    def late_is_a_reinit(self) -> None:
        told = self.qemu.endpoint.look(0)
        assert not told.late or told.reinits > 0


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# --- the log ----------------------------------------------------------------------------------------------------------


def entry(call: str, at: float = 0.0, **answer: Any) -> Entry:
    return Entry(at, "nic", call, "", answer)


def test_looks_that_change_nothing_are_counted_and_left_out() -> None:
    lines: list[str] = []
    log = Log(lines.append)
    for _ in range(1000):
        log(entry("DATA_SIZE", bytes=5))
        log(entry("PRECOPY_INFO", initial=0))
    log(entry("PRECOPY_INFO", initial=7))
    log(entry("SET_STATE"))
    log(entry("PRECOPY_INFO", initial=7))
    told = [(json.loads(line)["call"], json.loads(line)["same"]) for line in lines]
    assert told == [
        ("DATA_SIZE", 0),
        ("PRECOPY_INFO", 0),
        ("PRECOPY_INFO", 1998),
        ("SET_STATE", 0),
        ("PRECOPY_INFO", 0),
    ]


def test_a_log_has_an_end() -> None:
    lines: list[str] = []
    log = Log(lines.append)
    for n in range(MAX_LINES + 10):
        log(entry("READ", at=n, bytes=n))
    assert len(lines) == MAX_LINES
    assert json.loads(lines[-1])["at_s"] == MAX_LINES - 1


def test_entries_tell_question_and_answer() -> None:
    qemu = Qemu().begin()
    assert [(one.call, one.asked) for one in qemu.log] == [
        ("FEATURE", "PRECOPY_INFO_V2 SET"),
        ("SET_STATE", "PRE_COPY"),
        ("PRECOPY_INFO", "PRE_COPY"),
    ]
    assert replace(qemu.log[1], at_s=0.0).answer == {"was": "RUNNING", "opens_session": 1}


# --- QEMU's words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Switchover ACK was requested by 1 devices during switchover", 1),
        ("Switchover ACK was requested by 12 devices during switchover\n", 12),
        ("Switchover ACK was requested by 1 devices during switchover, and more", None),
        ("x Switchover ACK was requested by 1 devices during switchover", None),
        ("Switchover ACK was requested by -1 devices during switchover", None),
        ("Channel error: Input/output error", None),
        ("", None),
    ],
)
def test_only_the_whole_text_is_the_verdict(text: str, count: int | None) -> None:
    assert late_devices(text) == count
