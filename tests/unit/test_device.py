"""The device model: its states, its data session, its doorbell, and that nothing can be lost unnoticed."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deploy.lab.devices import device_state
from deploy.lab.devices.device import (
    SAVING,
    Device,
    DeviceError,
    DeviceIdentity,
    DeviceSizes,
    DeviceState,
    Feature,
    hash32,
    next_step,
)
from deploy.lab.devices.scenario import MAX_ENTRIES, Ask, Call, Delay, Fault, Hook, Scenario
from orchestrator.core.errors import DroverError

S = DeviceState
ALL = Feature.P2P | Feature.PRE_COPY
IDENTITY = DeviceIdentity("guest-1", "dpu", 0, 77)
SILENT = (S.STOP, S.STOP_COPY, S.RESUMING, S.ERROR)
REQUESTABLE = [state for state in S if state is not S.ERROR]


def made(scenario: Scenario = Scenario(), *, incoming: bool = False, **sizes: int) -> Device:  # noqa: B008
    chosen = DeviceSizes(**({"initial_bytes": 20_000, "stop_copy_bytes": 5_000} | sizes))
    return Device(IDENTITY, chosen, scenario, incoming=incoming)


def drained(device: Device, now: float = 0.0, limit: int = 1 << 20) -> bytes:
    """Everything that can be read in the present state."""
    pieces: list[bytes] = []
    while True:
        try:
            piece = device.read(limit, now)
        except DeviceError as error:
            if error.code != errno.ENOMSG:
                raise
            return b"".join(pieces)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)


def stopped(device: Device, now: float = 0.0) -> Device:
    device.set_state(S.STOP_COPY, now)
    return device


def received(data: bytes, into: Device | None = None) -> Device:
    device = into or made(incoming=True)
    device.set_state(S.RESUMING, 0)
    device.write(data)
    device.set_state(S.STOP, 0)
    return device


def answer(device: Device, n: int) -> int:
    device.ring(n)
    ((rung, word),) = device.take_answers()
    assert rung == n
    return word


def refused(code: int, call: Callable[[], object]) -> None:
    with pytest.raises(DeviceError) as caught:
        call()
    assert caught.value.code == code


# --- states -----------------------------------------------------------------------------------------------------------

PATHS = [
    (S.RUNNING, S.STOP_COPY, "RUNNING_P2P STOP STOP_COPY"),
    (S.RUNNING, S.PRE_COPY, "PRE_COPY"),
    (S.RUNNING, S.PRE_COPY_P2P, "RUNNING_P2P PRE_COPY_P2P"),
    (S.RUNNING, S.RESUMING, "RUNNING_P2P STOP RESUMING"),
    (S.PRE_COPY, S.STOP_COPY, "PRE_COPY_P2P STOP_COPY"),
    (S.PRE_COPY, S.STOP, "RUNNING RUNNING_P2P STOP"),
    (S.PRE_COPY_P2P, S.RUNNING, "RUNNING_P2P RUNNING"),
    (S.STOP_COPY, S.RUNNING, "STOP RUNNING_P2P RUNNING"),
    (S.STOP_COPY, S.RESUMING, "STOP RESUMING"),
    (S.RESUMING, S.RUNNING, "STOP RUNNING_P2P RUNNING"),
    (S.STOP, S.PRE_COPY, "RUNNING_P2P RUNNING PRE_COPY"),
]


@pytest.mark.parametrize(("start", "want", "path"), PATHS)
def test_ways_are_combined_of_single_arcs(start: S, want: S, path: str) -> None:
    steps, at = [], start
    while at is not want:
        at = next_step(at, want, ALL)
        steps.append(at.name)
    assert " ".join(steps) == path


def test_no_way_has_a_saving_state_inside_unless_it_ends_in_one() -> None:
    for start in REQUESTABLE:
        for want in REQUESTABLE:
            at, inner = start, []
            while at not in (want, S.ERROR):
                at = next_step(at, want, ALL)
                inner.append(at)
                assert len(inner) < 6
            if want not in SAVING:
                assert not SAVING.intersection(inner)


def test_states_that_the_device_lacks_are_passed_over_and_cannot_be_asked_for() -> None:
    assert next_step(S.RUNNING, S.STOP, Feature.PRE_COPY) is S.STOP
    assert next_step(S.PRE_COPY, S.STOP_COPY, Feature.PRE_COPY) is S.STOP_COPY
    plain = Device(IDENTITY, DeviceSizes(100, 100), Scenario(), features=Feature.NONE)
    for want in (S.PRE_COPY, S.PRE_COPY_P2P, S.RUNNING_P2P):
        refused(errno.EINVAL, lambda want=want: plain.set_state(want, 0))
    plain.set_state(S.STOP_COPY, 0)
    assert received(drained(plain)).content_digest() == plain.content_digest()


@pytest.mark.parametrize("start", REQUESTABLE)
def test_forbidden_ways_change_nothing(start: S) -> None:
    device = made()
    device.set_state(start, 0)
    before = device.content_digest()
    forbidden = [S.ERROR, *([S.PRE_COPY, S.PRE_COPY_P2P] if start is S.STOP_COPY else [])]
    for want in forbidden:
        refused(errno.EINVAL, lambda want=want: device.set_state(want, 0))
        assert (device.state, device.content_digest()) == (start, before)


def test_error_is_left_by_a_reset_only_and_the_reset_loses_the_state() -> None:
    device = made(Scenario(faults=(Fault(Call.ROLL_BACK),)))
    fresh = device.content_digest()
    answer(device, 1)
    device.set_state(S.PRE_COPY, 0)
    refused(errno.EIO, lambda: device.set_state(S.RUNNING, 0))
    for want in REQUESTABLE:
        refused(errno.EINVAL, lambda want=want: device.set_state(want, 0))
    assert device.state is S.ERROR
    generation = device.generation
    device.reset()
    assert (device.state, device.generation) == (S.RUNNING, generation)
    assert device.content_digest() != fresh, "the script went on"
    assert answer(device, 1) == hash32(hash32(0xD0000000 ^ 77) ^ 1)


@pytest.mark.parametrize(
    ("call", "want", "left"), [(Call.QUIESCE, S.STOP_COPY, S.PRE_COPY), (Call.STOP_COPY, S.STOP_COPY, S.PRE_COPY_P2P)]
)
def test_a_broken_step_leaves_the_device_where_it_stood(call: Call, want: S, left: S) -> None:
    device = made(Scenario(faults=(Fault(call),)))
    device.set_state(S.PRE_COPY, 0)
    refused(errno.EIO, lambda: device.set_state(want, 0))
    assert device.state is left
    device.set_state(want, 0)
    assert device.state is want


# --- data session -----------------------------------------------------------------------------------------------------


def test_the_state_arrives_whole_and_the_guest_goes_on() -> None:
    source = made(dirty_bytes_per_s=100_000)
    for n in range(1, 6):
        answer(source, n)
    source.set_state(S.PRE_COPY, 0)
    data = drained(source, 0)
    answer(source, 6)
    data += drained(source, 1.0)
    answer(source, 7)
    data += drained(stopped(source, 2.0), 2.0)
    assert (source.sent_bytes, source.sent_digest) == (len(data), blake2b(data, digest_size=16).digest())
    copy = received(data)
    assert copy.content_digest() == source.content_digest()
    copy.set_state(S.RUNNING, 3)
    source.set_state(S.RUNNING, 3)
    assert answer(copy, 8) == answer(source, 8)


def test_estimates_go_down_as_data_is_read_and_the_flag_shows_new_initial_data_once() -> None:
    device = made()
    device.set_state(S.PRE_COPY, 0)
    first = device.precopy_info(0)
    assert first.initial_bytes >= 20_000
    assert (first.dirty_bytes, first.reinit) == (0, False)
    device.read(1000, 0)
    assert device.precopy_info(0).initial_bytes < first.initial_bytes
    drained(device)
    assert device.precopy_info(0).initial_bytes == 0
    answer(device, 1)
    assert device.precopy_info(0).dirty_bytes > 0
    device.ask(8192)
    assert not device.precopy_info(0).reinit, "nobody opted in"
    device.opt_in_reinit()
    device.ask(8192)
    looked = device.precopy_info(0)
    assert (looked.initial_bytes >= 8192, looked.dirty_bytes, looked.reinit) == (True, 0, True)
    assert not device.precopy_info(0).reinit


@pytest.mark.parametrize("state", [state for state in REQUESTABLE if state not in (S.PRE_COPY, S.PRE_COPY_P2P)])
def test_precopy_information_is_refused_outside_precopy(state: S) -> None:
    device = made()
    device.set_state(state, 0)
    refused(errno.EINVAL, lambda: device.precopy_info(0))
    assert device.stop_copy_length(0) >= 0


def test_nothing_at_the_moment_is_never_said_while_initial_data_is_left_nor_in_stop_copy() -> None:
    device = made()
    device.set_state(S.PRE_COPY, 0)
    while device.precopy_info(0).initial_bytes:
        assert device.read(100, 0)
    refused(errno.ENOMSG, lambda: device.read(100, 0))
    stopped(device)
    assert drained(device)
    assert device.read(100, 0) == b""


def test_markers_come_once_per_generation_and_after_its_data() -> None:
    device = made()
    device.set_state(S.PRE_COPY, 0)
    assert device.take_marker() is None
    drained(device)
    assert (device.take_marker(), device.take_marker()) == (1, None)
    device.ask(4096)
    device.ask(4096)
    assert device.take_marker() is None
    drained(device)
    assert (device.take_marker(), device.take_marker()) == (3, None)


def test_a_session_is_refused_outside_its_states() -> None:
    device = made()
    refused(errno.EINVAL, lambda: device.read(10, 0))
    refused(errno.EINVAL, lambda: device.write(b"x"))
    refused(errno.EINVAL, lambda: device.ask(10))
    device.set_state(S.RESUMING, 0)
    refused(errno.EINVAL, lambda: device.set_state(S.STOP, 0))
    assert device.state is S.RESUMING


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 300_000])
@pytest.mark.parametrize("final", [0, 1, 5000])
def test_sizes_at_the_borders(size: int, final: int) -> None:
    source = made(initial_bytes=size, stop_copy_bytes=final)
    answer(source, 1)
    source.set_state(S.PRE_COPY, 0)
    data = drained(source)
    answer(source, 2)
    data += drained(stopped(source))
    assert received(data).content_digest() == source.content_digest()


def forged(data: bytes, drop: Callable[[int, int], bool]) -> bytes:
    """The stream without some records, with a trailer that fits: what a careless carrier would deliver."""
    kept, at, head = b"", 0, device_state._RECORD
    while at < len(data):
        kind, _, length = head.unpack_from(data, at)
        end = at + head.size + length
        if kind != device_state._TRAILER and not drop(kind, at):
            kept += data[at:end]
        at = end
    return kept + device_state.trailer_record(blake2b(kept, digest_size=16).digest())


def test_a_stale_part_shows_in_the_next_answer_even_if_the_load_was_accepted() -> None:
    source = made(initial_bytes=8192)
    source.set_state(S.PRE_COPY, 0)
    data = drained(source)
    answer(source, 1)
    sent = len(data)
    data += drained(stopped(source))
    whole = received(forged(data, lambda kind, at: False))
    stale = received(forged(data, lambda kind, at: kind == device_state._BLOCKS and at == sent))
    for copy in (whole, stale):
        copy.set_state(S.RUNNING, 0)
    source.set_state(S.RUNNING, 0)
    right = answer(source, 2)
    assert answer(whole, 2) == right
    assert answer(stale, 2) != right


def test_a_part_that_never_arrived_a_foreign_device_and_spoiled_bytes_are_refused() -> None:
    source = made(initial_bytes=8192)
    data = drained(stopped(source))
    lost = forged(data, lambda kind, at: kind == device_state._BLOCKS and at > 400)
    refused(errno.EINVAL, lambda: received(lost))
    other = Device(DeviceIdentity("guest-2", "dpu", 0, 77), DeviceSizes(8192, 5000), Scenario(), incoming=True)
    refused(errno.EIO, lambda: received(data, other))
    refused(errno.EIO, lambda: received(data + b"\1\0\0\0\0\0\0\0\0"))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_single_wrong_byte_and_no_cut_is_ever_accepted(data: st.DataObject) -> None:
    stream = drained(stopped(made(initial_bytes=5000, stop_copy_bytes=300)))
    at = data.draw(st.integers(0, len(stream) - 1))
    if data.draw(st.booleans()):
        broken = stream[:at]
    else:
        broken = stream[:at] + bytes([stream[at] ^ data.draw(st.integers(1, 255))]) + stream[at + 1 :]
    device = made(incoming=True)
    with pytest.raises(DeviceError):
        received(broken, device)
    assert not device.has_content


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=12), st.integers(1, 4000))
@settings(deadline=None)
def test_segmentation_of_reads_and_writes_does_not_matter(cuts: list[int], limit: int) -> None:
    source = made()
    source.set_state(S.PRE_COPY, 0)
    data = drained(source, 0, limit) + drained(stopped(source), 0, limit)
    copy = made(incoming=True)
    copy.set_state(S.RESUMING, 0)
    at = 0
    while at < len(data):
        piece = data[at : at + cuts[at % len(cuts)]]
        copy.write(piece)
        at += len(piece)
        assert copy.loaded_digest == blake2b(data[:at], digest_size=16).digest()
    copy.set_state(S.STOP, 0)
    assert copy.content_digest() == source.content_digest()


# --- requests and the script ------------------------------------------------------------------------------------------


def test_a_device_may_ask_for_nothing() -> None:
    device = made(Scenario(ask_at_begin=False))
    device.set_state(S.PRE_COPY, 0)
    drained(device)
    assert (device.generation, device.asked, device.take_marker()) == (0, None, None)


def test_timed_requests_fall_due_in_precopy_only() -> None:
    device = made(Scenario(asks=(Ask(after_ms=100, every_ms=50, times=3),)))
    device.advance(10)
    assert device.next_due() is None
    device.set_state(S.PRE_COPY, 10.0)
    assert device.next_due() == pytest.approx(10.1)
    for now, generation in ((10.09, 1), (10.1, 2), (10.12, 2), (10.15, 3), (10.21, 4), (10.3, 4)):
        device.advance(now)
        assert device.generation == generation
    assert device.next_due() is None


def test_requests_at_hooks_are_counted_over_sessions_and_can_be_limited_to_the_first_ones() -> None:
    device = made(Scenario(asks=(Ask(Hook.FREEZE, times=None, sessions=2), Ask(Hook.GATE_OPEN, times=3))))
    generations: list[int] = []
    for _ in range(3):
        device.set_state(S.PRE_COPY, 0)
        device.hook(Hook.GATE_OPEN, 0)
        device.hook(Hook.GATE_OPEN, 0)
        device.hook(Hook.FREEZE, 0)
        generations.append(device.generation)
        device.set_state(S.RUNNING, 0)
        device.hook(Hook.FREEZE, 0)
    assert generations == [4, 7, 8]


def test_injected_requests_take_the_places_of_those_that_are_used_up() -> None:
    """A bench or a chaos run injects hundreds into one device's life."""
    device = made(Scenario(asks=(Ask(Hook.PRECOPY, times=None), Ask(Hook.FREEZE, times=2)), ask_at_begin=False))
    for first in range(3 * MAX_ENTRIES):
        device.inject(Ask(Hook.FREEZE), 0.0)
        device.set_state(S.PRE_COPY, 0.0)
        before = device.generation
        device.hook(Hook.FREEZE, 0.0)
        assert device.generation == before + (2 if first < 2 else 1)
        device.set_state(S.RUNNING, 0.0)
    assert device.scenario.asks == (Ask(Hook.PRECOPY, times=None), Ask(Hook.FREEZE), Ask(Hook.FREEZE))


def test_no_more_requests_can_wait_than_a_scenario_has_room_for() -> None:
    device = made(Scenario())
    for _ in range(MAX_ENTRIES):
        device.inject(Ask(Hook.FREEZE), 0.0)
    with pytest.raises(DroverError, match="at most 32"):
        device.inject(Ask(Hook.FREEZE), 0.0)
    assert len(device.scenario.asks) == MAX_ENTRIES


def test_what_happens_after_the_commit_counts_as_happened_in_the_state_that_leaves() -> None:
    source = made(Scenario(asks=(Ask(Hook.AFTER_COMMIT),)))
    source.set_state(S.PRE_COPY, 0)
    copy = received(drained(source) + drained(stopped(source)))
    assert (source.generation, copy.generation) == (1, 2)
    source.set_state(S.RUNNING, 0)
    source.set_state(S.PRE_COPY, 0)
    source.hook(Hook.AFTER_COMMIT, 0)
    assert source.generation == 3, "the attempt failed: it is still to come at the source"
    copy.set_state(S.PRE_COPY, 0)
    copy.hook(Hook.AFTER_COMMIT, 0)
    assert copy.generation == 3, "nothing but the first request of its own session"


def test_the_script_goes_on_at_the_destination_whatever_that_was_told() -> None:
    source = made(Scenario(asks=(Ask(Hook.FREEZE, times=2),), delays=(Delay(Call.ACTIVATE, 5, times=1),)))
    source.set_state(S.PRE_COPY, 0)
    source.hook(Hook.FREEZE, 0)
    copy = received(drained(source) + drained(stopped(source)))
    assert [copy.take_delay(Call.ACTIVATE) for _ in range(2)] == [5, 0]
    copy.set_state(S.PRE_COPY, 0)
    for _ in range(3):
        copy.hook(Hook.FREEZE, 0)
    assert copy.generation == 4
    assert copy.sessions == 2


def test_the_source_settles_how_the_destination_loads() -> None:
    scenario = Scenario(delays=(Delay(Call.LOAD, 30, times=1),), faults=(Fault(Call.ACK),))
    source = made(scenario)
    plans: list[Any] = []
    for _ in range(2):
        source.set_state(S.PRE_COPY, 0)
        copy = made(scenario, incoming=True)
        copy.set_state(S.RESUMING, 0)
        copy.write(drained(source))
        plans.append((copy.take_delay(Call.LOAD), copy.load_plan.never_acks))
        source.set_state(S.RUNNING, 0)
    assert plans == [(30, True), (0, False)]


def test_state_is_readable_by_the_version_that_it_names_only() -> None:
    data = drained(stopped(made()))
    header = device_state._RECORD
    _, _, length = header.unpack_from(data)
    content = json.loads(data[header.size : header.size + length])
    changed = device_state._record(1, 0, json.dumps(content | {"version": 2}).encode())
    refused(errno.EIO, lambda: received(changed + data[header.size + length :]))


# --- random walks -----------------------------------------------------------------------------------------------------


class Walk(RuleBasedStateMachine):
    """A device, an oracle of what the guest expects, and any order of calls."""

    def __init__(self) -> None:
        super().__init__()
        asks = (Ask(Hook.FREEZE, times=3, bytes=5000), Ask(after_ms=500, every_ms=300, times=None, bytes=100))
        self.device = made(Scenario(asks=asks), dirty_bytes_per_s=30_000)
        self.now = 0.0
        self.n = 0
        self.word = hash32(0xD0000000 ^ 77)
        self.stream = b""
        self.loading: bytes | None = None
        self.generation = 0

    @rule(want=st.sampled_from(list(S)))
    def go(self, want: S) -> None:
        before, content = self.device.state, self.device.content_digest()
        try:
            self.device.set_state(want, self.now)
        except DeviceError:
            assert self.device.state is before or (before is S.RESUMING and self.device.state is S.RESUMING)
            if before not in (S.PRE_COPY, S.PRE_COPY_P2P):  # there, time alone changes the memory
                assert self.device.content_digest() == content
            return
        assert self.device.state is want
        if not (before in SAVING and want in SAVING):
            self.stream = b""

    @rule(seconds=st.floats(0, 1))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.device.advance(self.now)

    @rule(hook=st.sampled_from(Hook))
    def reach(self, hook: Hook) -> None:
        self.device.hook(hook, self.now)

    @precondition(lambda self: self.device.state in SAVING)
    @rule(limit=st.integers(1, 100_000))
    def read(self, limit: int) -> None:
        try:
            self.stream += self.device.read(limit, self.now)
        except DeviceError as error:
            if error.code != errno.ENOMSG or self.device.state is S.STOP_COPY or self.device.initial_bytes_left():
                raise

    @rule()
    def ring(self) -> None:
        self.n += 1
        self.device.ring(self.n)
        answers = self.device.take_answers()
        if self.device.state in SILENT:
            assert answers == []
            self.n -= 1  # still waiting: the guest rings it again
            return
        self.word = hash32(self.word ^ self.n)
        assert answers == [(self.n, self.word)]

    @precondition(lambda self: self.device.state is S.STOP_COPY)
    @rule()
    def hand_over(self) -> None:
        """The rest of the state, and a new device takes the place of the old."""
        self.stream += drained(self.device, self.now)
        assert self.device.sent_digest == blake2b(self.stream, digest_size=16).digest()
        copy = received(self.stream)
        assert copy.content_digest() == self.device.content_digest()
        copy.set_state(S.RUNNING, self.now)
        self.device, self.stream = copy, b""

    @invariant()
    def requests_only_grow(self) -> None:
        assert self.device.generation >= self.generation
        self.generation = self.device.generation

    @invariant()
    def silent_while_stopped(self) -> None:
        if self.device.state in SILENT:
            assert self.device.take_answers() == []


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(0, 5), max_size=12), st.lists(st.integers(0, 5), max_size=12))
@settings(deadline=None)
def test_the_digest_is_equal_exactly_for_equal_histories(left: list[int], right: list[int]) -> None:
    def after(numbers: list[int]) -> tuple[bytes, list[int]]:
        device, counted, n = made(), [], 0
        for step in numbers:
            n += step
            if step:
                answer(device, n)
                counted.append(n)
        return device.content_digest(), counted

    (left_digest, left_rung), (right_digest, right_rung) = after(left), after(right)
    assert (left_digest == right_digest) == (left_rung == right_rung)
