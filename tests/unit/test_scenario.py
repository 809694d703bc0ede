"""The scenario format: strict reading, round trip, and what is used up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.lab.devices.scenario import (
    FAULTY_CALLS,
    HOOKS,
    MAX_AFTER_MS,
    MAX_BYTES,
    MAX_DELAY_MS,
    MAX_ENTRIES,
    MAX_ESTIMATE,
    MAX_TIMES,
    SLOW_CALLS,
    Ask,
    Call,
    Delay,
    Estimates,
    Fault,
    Hook,
    Lack,
    Scenario,
    Used,
    outside_errors,
    scenario_from,
    scenario_mapping,
)
from deploy.lab.devices.scenario_text import format_scenario, parse_scenario
from orchestrator.core.errors import DroverError, RefusalReason

TIMES = st.none() | st.integers(1, MAX_TIMES)
SESSIONS = st.none() | st.integers(1, MAX_TIMES)
SIZE = st.none() | st.integers(0, MAX_BYTES)
ASKS = st.builds(
    Ask, at=st.sampled_from(Hook), bytes=st.integers(0, MAX_BYTES), times=TIMES, sessions=SESSIONS
) | st.builds(
    Ask,
    after_ms=st.integers(0, MAX_AFTER_MS),
    every_ms=st.none() | st.integers(10, MAX_AFTER_MS),
    bytes=st.integers(0, MAX_BYTES),
    times=TIMES,
    sessions=SESSIONS,
)
DELAYS = st.builds(
    Delay, st.sampled_from([Call(word) for word in SLOW_CALLS]), st.integers(1, MAX_DELAY_MS), TIMES, SESSIONS
)
FAULTS = st.builds(Fault, st.sampled_from([Call(word) for word in FAULTY_CALLS]), TIMES, SESSIONS)
ESTIMATE = st.none() | st.integers(0, MAX_ESTIMATE)
SCENARIOS = st.builds(
    Scenario,
    SIZE,
    SIZE,
    SIZE,
    st.booleans(),
    st.lists(ASKS, max_size=4).map(tuple),
    st.lists(DELAYS, max_size=4).map(tuple),
    st.lists(FAULTS, max_size=4).map(tuple),
    st.builds(Estimates, ESTIMATE, ESTIMATE, ESTIMATE),
    st.lists(st.sampled_from(Lack), unique=True).map(tuple),
)


@given(SCENARIOS)
def test_what_is_written_is_read_back(scenario: Scenario) -> None:
    assert parse_scenario(format_scenario(scenario)) == scenario
    assert scenario_from(scenario_mapping(scenario)) == scenario


def test_empty_text_is_a_well_behaved_device_and_the_other_way_round() -> None:
    assert parse_scenario("") == parse_scenario("# nothing\n") == parse_scenario("{}") == Scenario()
    assert format_scenario(Scenario()) == ""


def test_everything_that_can_be_said() -> None:
    text = """
    initial_bytes: 1_048_576
    stop_copy_bytes: 4096
    dirty_bytes_per_s: 100
    ask_at_begin: false
    asks:
    - {at: freeze, times: always, sessions: 3}
    - after_ms: 100
      every_ms: 50
      bytes: 10
    delays: [{call: load, ms: 200, times: 1}]
    faults: [{call: ack, times: 2}]
    """
    assert parse_scenario(text) == Scenario(
        1 << 20,
        4096,
        100,
        False,
        (Ask(Hook.FREEZE, times=None, sessions=3), Ask(after_ms=100, every_ms=50, bytes=10)),
        (Delay(Call.LOAD, 200, times=1),),
        (Fault(Call.ACK, times=2),),
    )


WRONG = [
    ("- 1", "scenario", "must be a mapping"),
    ("asks: 3", "asks", "must be a list"),
    ("speed: 1", "speed", "write one of initial_bytes"),
    ("1: 2", "1", "not known"),
    ("initial_bytes: -1", "initial_bytes", "between 0 and 1073741824 bytes, not -1"),
    ("initial_bytes: 1e6", "initial_bytes", "whole number of bytes"),
    ("initial_bytes: 1.5", "initial_bytes", "whole number"),
    ("initial_bytes: true", "initial_bytes", "whole number"),
    ("initial_bytes:", "initial_bytes", "not nothing"),
    ("dirty_bytes_per_s: x", "dirty_bytes_per_s", "bytes/s"),
    ("ask_at_begin: 1", "ask_at_begin", "true or false"),
    ("asks: [5]", "asks[0]", "must be a mapping"),
    ("asks: [{}]", "asks[0]", "either at (one of precopy,"),
    ("asks: [{at: freeze, after_ms: 3}]", "asks[0]", "either at"),
    ("asks: [{at: freeze, every_ms: 30}]", "asks[0].every_ms", "goes with after_ms"),
    ("asks: [{at: on}]", "asks[0].at", "not True"),
    ("asks: [{at: [freeze]}]", "asks[0].at", "one of"),
    ("asks: [{at: freeze}, {at: tea}]", "asks[1].at", f"one of {', '.join(HOOKS)}, not 'tea'"),
    ("asks: [{at: freeze, times: 0}]", "asks[0].times", "between 1"),
    ("asks: [{at: freeze, times: often}]", "asks[0].times", "always"),
    ("asks: [{at: freeze, sessions: 0}]", "asks[0].sessions", "between 1"),
    ("asks: [{after_ms: 1, every_ms: 9}]", "asks[0].every_ms", "between 10"),
    ("delays: [{call: load}]", "delays[0].ms", "not nothing"),
    ("delays: [{call: roll_back, ms: 5}]", "delays[0].call", "one of quiesce"),
    ("delays: [{call: load, ms: 60001}]", "delays[0].ms", "60000 ms"),
    ("faults: [{}]", "faults[0].call", "one of quiesce"),
    ("faults: [{call: load, ms: 3}]", "faults[0].ms", "not known here"),
    ("faults: [" + "{call: load}," * (MAX_ENTRIES + 1) + "]", "faults", "at most 32 entries"),
    ("estimates: 3", "estimates", "must be a mapping"),
    ("estimates: {dirty_bytes: -1}", "estimates.dirty_bytes", "between 0"),
    ("estimates: {speed: 1}", "estimates.speed", "write one of initial_bytes"),
    ("lacks: [p2p, wings]", "lacks[1]", "one of precopy, p2p, reinit, not 'wings'"),
    ("asks: []\nasks: []", "scenario", "line 2, column 1: 'asks' is given twice"),
    ("a: &x 1\nb: *x", "scenario", "references"),
    ("<<: {initial_bytes: 3}", "scenario", "must be a word"),
    ("? [a]\n: b", "scenario", "must be a word"),
    ("{", "scenario", "line 1"),
    ("a: !!python/object:os.system {}", "scenario", "line 1, column 4"),
    ("\x00", "scenario", "cannot be read"),
    ("a: " + "[" * 5000, "scenario", "cannot be read"),
    ("#" * 70_000, "scenario", "at most 65536 characters"),
]


@pytest.mark.parametrize(("text", "field", "says"), WRONG, ids=[wrong[0][:40] for wrong in WRONG])
def test_what_is_wrong_is_named_with_its_place(text: str, field: str, says: str) -> None:
    with pytest.raises(DroverError) as caught:
        parse_scenario(text)
    assert caught.value.reason is RefusalReason.INVALID_ARGUMENT
    assert caught.value.field == field
    assert says in caught.value.message


def test_all_mistakes_are_named_at_once_below_the_callers_field() -> None:
    with pytest.raises(DroverError) as caught:
        parse_scenario("speed: 1\nasks: [{at: tea}]\nfaults: [{call: x}]", "guest.devices[0].scenario")
    where = "guest.devices[0].scenario."
    assert [field for field, _ in caught.value.violations] == [
        f"{where}speed",
        f"{where}asks[0].at",
        f"{where}faults[0].call",
    ]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["asks", "at", "times", "faults", "call", "x"]), inner)
        ),
    )
)
def test_any_content_is_a_scenario_or_a_drover_error(content: object) -> None:
    try:
        scenario = scenario_from(content)
    except DroverError as error:
        if not error.violations:
            raise
        return
    assert scenario_from(scenario_mapping(scenario)) == scenario


def test_what_only_a_device_inside_the_vmm_does_is_refused_for_any_other() -> None:
    text = "delays: [{call: load, ms: 1}, {call: read, ms: 1}]\nfaults: [{call: reset}]\nestimates: {dirty_bytes: 1}\n"
    wrong = outside_errors(parse_scenario(text + "lacks: [p2p]"))
    assert [field for field, _ in wrong] == ["delays[1].call", "faults[0].call", "estimates", "lacks"]
    assert not outside_errors(parse_scenario("faults: [{call: load}, {call: validate}]\nasks: [{at: freeze}]"))


def test_used_up() -> None:
    used, twice = Used(), Ask(Hook.FREEZE, times=2)
    for _ in range(2):
        assert used.may("asks", 1, twice, 1)
        used = used.count("asks", 1)
    assert used == Used(asks=(0, 2))
    assert not used.may("asks", 1, twice, 1)
    assert used.may("asks", 1, Ask(Hook.FREEZE, times=None), 99)
    assert [used.may("asks", 0, Ask(Hook.FREEZE, times=None, sessions=2), n) for n in (1, 2, 3)] == [True, True, False]
